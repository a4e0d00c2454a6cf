r"""
Train a DiP.

    python train.py                     # drawn shapes and a small model, in minutes
    python train.py --data IMAGES       # IMAGES/train/<class>/*.jpg, IMAGES/<class>/*.jpg, or *.jpg
    python train.py --init FILE --data IMAGES       # from our weights, or the authors'
    torchrun --nproc_per_node=8 train.py --image-size 256 --data IMAGENET         # DiP-XL/16
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        train.py --data IMAGENET

To resume, run the same command again.  Image, flip, time, noise and label dropout of example k
depend on (seed, k) and the kind of device alone, not on the number of processes, micro-batches or
workers; results agree up to the order of sums.  A run writes ckpt-*.pt, log.jsonl, loss.png and
samples-*.png into --out, which all nodes must share.  On SIGTERM or Ctrl-C it finishes the step,
saves and exits; give torchrun --shutdown-timeout 300 for large models.  An update with a gradient
that is not finite is skipped.  In --help, [a; b] are defaults: b for DiP-Nano/8, a for others.
"""

import copy
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from dip import (PRESETS, REPA_WEIGHT, DiP, check_choice, drop_labels, flow_matching_loss,
                 logit_normal_time)
from fid import list_images, read_image
from sample import (CHECKPOINT, Parser, autocast, blocks_of, check_finite, compile_blocks,
                    draw_grid, generate, imagenet_names, in_one_line, is_system_error, load_model,
                    locked, newest_intact, number, on_rank_0, random_stream, read_file, run,
                    save_atomically, start_processes, text, to_uint8)

# -------------------------------------------------------------------------------------------------
# Options

PAPER = dict(steps=1_600_000, batch_size=256, lr=1e-4, warmup=0, cooldown=0.0,
             time_mean=0.0)                  # Table 4; steps: 320 epochs of ImageNet
NANO = dict(steps=3000, batch_size=16, lr=3e-3, warmup=50, cooldown=0.3, time_mean=0.4)


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=text, metavar="DIR", help="image folder [drawn shapes]")
    add("--image-size", type=number(int, 1), help="height and width in pixels [the preset's]")
    add("--model", choices=PRESETS, metavar="NAME",
        help=f"{', '.join(PRESETS)} [DiP-XL/16 with CUDA and --data, else DiP-Nano/8]")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="other fields of DiPConfig, such as head=mlp depth=4")
    add("--init", type=text, metavar="FILE", help="start from these weights: ours or the authors'")
    add("--repa", type=text, metavar="ENCODER",
        help="align tokens with an encoder, such as dinov2_vitb14")
    add("--repa-repo", type=text, default="facebookresearch/dinov2",
        help="the encoder's torch.hub repository")
    add("--repa-source", default="github", choices=("github", "local"), help="local: a folder")
    add("--steps", type=number(int, 1), help="updates [1600000; 3000]")
    add("--batch-size", type=number(int, 1),
        help="images per update, over all processes [256; 16, fewer above 64 pixels]")
    add("--micro-batch", type=number(int, 1), help="images at once per process [at most 32]")
    add("--lr", type=number(float, 0), help="AdamW's learning rate [1e-4; 3e-3]")
    add("--warmup", type=number(int, 0), help="steps over which lr rises [0; 50]")
    add("--cooldown", type=number(float, 0, 1), help="last fraction, in which lr falls [0; 0.3]")
    add("--clip", type=number(float, 0), default=1.0, help="largest gradient norm; 0: none [1]")
    add("--ema", type=number(float, 0, 1), default=0.9999, help="decay of the EMA [0.9999]")
    add("--time-mean", type=number(float, -99, 99), help="mean of logit t, deviation 1 [0; 0.4]")
    add("--label-dropout", type=number(float, 0, 0.99), default=0.1,
        help="fraction of labels dropped, for guidance [0.1]")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights, order and noise [0]")
    add("--out", type=text, metavar="DIR", help="folder of the run [runs/MODEL-SIZE]")
    add("--log-every", type=number(int, 1), default=50, help="steps between lines of the log [50]")
    add("--sample-every", type=number(int, 0),
        help="validate and draw after every so many steps; 0: never [1/5 of the run, 250 to 10000]")
    add("--save-every", type=number(int, 1), help="steps between checkpoints [the same]")
    add("--keep", type=number(int, 1), default=2, help="number of checkpoints kept [2]")
    add("--workers", type=number(int, 0), help="loader processes [8 with CUDA and --data, else 0]")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--grad-checkpoint", action="store_true", help="recompute activations: less memory, slower")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, mps [auto]")
    return parser.parse_args(argv)


def configure(options, device, inherited=None):
    """Fill in the options left open.  Returns the DiPConfig; main() adds num_classes and repa_dim.

    inherited: (DiPConfig, preset) of --init; they replace the default preset.
    """
    large, world = device.type == "cuda" and options.data, dist.get_world_size()
    default = "DiP-XL/16" if large else "DiP-Nano/8"
    config, name = inherited or (PRESETS[default], default)
    if options.model:
        config, name = PRESETS[options.model], options.model
    options.model = name
    fields = {key: type(value) for key, value in asdict(config).items()
              if key not in ("image_size", "num_classes", "repa_dim")}    # these have other sources
    changes = {}
    for pair in options.set:
        field, _, value = pair.partition("=")
        check_choice("--set", field, fields)
        try:
            changes[field] = fields[field](value)
        except ValueError:
            raise ValueError(f"--set {pair}: {field} must be a whole number") from None
    if changes.get("head", config.head) != config.head:      # another head has its own default size
        changes = {"head_width": 0, "head_depth": 0, **changes}
    config = config.replace(image_size=options.image_size or config.image_size, **changes)
    small = name.startswith("DiP-Nano/")
    recipe = dict(NANO if small else PAPER)
    if small and config.image_size > 64:                     # fewer images: steps stay short
        images = max(4, 16 * 64**2 // config.image_size**2)
        recipe["batch_size"] = images + -images % world      # a multiple of the processes
    steps = options.steps or recipe["steps"]
    recipe["warmup"] = min(recipe["warmup"], steps // 10)
    every = min(10_000, max(250, steps // 5))
    start = options.init and f"init-{Path(options.init).stem}"
    words = filter(None, [start, name, *options.set, str(config.image_size)])
    folder = "runs/" + re.sub(r"[^\w.-]+", "-", "-".join(words))
    defaults = dict(recipe, image_size=config.image_size, sample_every=every, save_every=every,
                    workers=8 if large else 0, out=folder)
    for option, value in defaults.items():
        if getattr(options, option) is None:
            setattr(options, option, value)
    part, rest = divmod(options.batch_size, world)
    if options.micro_batch is None:
        options.micro_batch = max(n for n in range(1, 33) if part % n == 0)
        if options.micro_batch < min(8, part) and dist.get_rank() == 0:
            print(f"note: {part} images per process have no larger divisor up to 32 than "
                  f"{options.micro_batch}, which is slow; choose another --batch-size")
    if rest or part % options.micro_batch:
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of {world} "
                         f"processes x --micro-batch {options.micro_batch}; choose a multiple")
    if options.warmup >= options.steps:
        raise ValueError(f"--warmup {options.warmup} must be below --steps {options.steps}")
    return config


# -------------------------------------------------------------------------------------------------
# The step

BINS = 10                # losses are logged by tenths of t


def training_step(net, ema, optimizer, batches, step, options, encoder=None):
    """One update.  Returns the losses summed by tenths of t (3, BINS) and the gradient's norm.

    net: the DiP, perhaps within DDP; ema: its average; batches: this rank's micro-batches.  An
    update whose gradient is not finite is skipped; the norm, inf or nan, says so.
    """
    model = getattr(net, "module", net)
    device, config = next(model.parameters()).device, model.config
    losses = torch.zeros(3, BINS, device=device)
    count = options.batch_size // (dist.get_world_size() * options.micro_batch)
    for i in range(count):
        # a micro-batch: z ~ N(0, 1) becomes t, u ~ U(0, 1) drops labels, examples are indices
        pixels, y, z, u, examples = next(batches)
        x_0 = to_model(pixels, device)                                   # (B, 3, H, W) in [-1, 1]
        y, z, u = (part.to(device, non_blocking=True) for part in (y, z, u))         # (B,) each
        noise = draw_noise(x_0, options.seed, "train", examples)         # (B, 3, H, W)
        t = logit_normal_time(z, options.time_mean)                      # (B,)
        y = drop_labels(y, u, config.num_classes, options.label_dropout)

        net.require_backward_grad_sync = i == count - 1      # DDP: average at the last
        with autocast(device):
            features = encoder(x_0) if encoder else None                 # (B, repa_dim, h, w)
            flow, repa = flow_matching_loss(net, x_0, y, t, noise, features)         # (B,) each
        ((flow + REPA_WEIGHT * repa).mean() / count).backward()
        losses += by_time(t, flow, repa)

    # lr rises over the warm-up, is constant, and falls over the last fraction `cooldown`
    up = (step + 1) / (options.warmup + 1)
    down = (options.steps - step) / (options.cooldown * options.steps + 1)
    optimizer.param_groups[0]["lr"] = options.lr * min(1, up, down)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
    if norm.isfinite():                                      # the same on all ranks
        optimizer.step()
        # ema += (1 - decay) (model - ema); a short run averages over about its last tenth
        decay = min(options.ema, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)
    optimizer.zero_grad()
    return losses, norm.item()


def to_model(pixels, device):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1] on the device"""
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_noise(x_0, seed, purpose, examples):
    """eps of Eq. (6) like x_0 (B, 3, H, W).  Example k's depends on (seed, purpose, k).  It is
    drawn on the device, so that it need not be copied there."""
    noise = torch.empty(x_0.shape, device=x_0.device)
    for row, k in zip(noise, examples.tolist()):
        row.normal_(generator=random_stream(seed, purpose, k, "noise", device=x_0.device))
    return noise


def by_time(t, flow, repa):
    """For each tenth of t: sums of flow and repa, number of images.  (B,) each -> (3, BINS)"""
    bins = (t * BINS).long().clamp(max=BINS - 1)
    values = torch.stack([flow, repa, torch.ones_like(flow)]).detach()
    return torch.zeros(3, BINS, device=t.device).index_add(1, bins, values)


# -------------------------------------------------------------------------------------------------
# The run

MAX_SKIPPED = 10         # this many skipped updates in a row end the run


def fit(model, options, data, val_data=None, encoder=None, signals=()):
    """Train from scratch, or from the newest checkpoint in --out, until --steps or until a signal
    arrives (noted_signals).  Returns (EMA of the model, steps done)."""
    out, rank = Path(options.out), dist.get_rank()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0, fused=True)
    first = resume(model, ema, optimizer, options, data)
    net = prepare(model, options)
    batches = load_batches(options, data, first)
    if rank == 0:
        write_log(out, step=first, options=vars(options), config=asdict(model.config))
    bar = tqdm(range(first, options.steps), initial=first, total=options.steps, disable=rank > 0)
    done = since = first                     # steps done; steps at the last line of the log
    sums, skipped, clock = torch.zeros(3, BINS), 0, time.time()
    for step in bar:
        losses, norm = training_step(net, ema, optimizer, batches, step, options, encoder)
        done, last = step + 1, step + 1 == options.steps
        if math.isfinite(norm):
            sums, skipped = sums + losses.cpu(), 0
        else:
            skipped += 1
            report_skipped(out, done, norm, skipped)
        stop = total(len(signals)) > 0                       # a signal to one rank stops all
        sample = options.sample_every and (last or done % options.sample_every == 0)
        save = last or stop or (not skipped and (sample or done % options.save_every == 0))
        if save or sample or done % options.log_every == 0:  # before a save: sums are not saved
            sums = total(sums)
            if rank == 0 and sums.any():                     # some update was not skipped
                line = mean_losses(sums)
                speed = (done - since) * options.batch_size / (time.time() - clock)
                write_log(out, step=done, **line, lr=optimizer.param_groups[0]["lr"],
                          images_per_s=round(speed, 1), grad_norm=norm)
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {speed:.0f} images/s")
            sums, since = torch.zeros(3, BINS), done
            if rank == 0 and save:                           # before the pictures: they are slow
                save_checkpoint(model, ema, optimizer, options, data, done)
            if rank == 0 and sample and not stop:
                try:
                    write_pictures(out, done, ema, data, val_data, options)
                except FloatingPointError as error:          # of an early or diverging model
                    tqdm.write(f"warning: no samples at step {done}: {error}", file=sys.stderr)
            clock = time.time()                              # speed counts training alone
        if stop:
            break
    dist.barrier()                                           # no rank exits before rank 0 has saved
    return ema, done


def total(value):
    """The sum over all ranks of a number or a tensor on the CPU."""
    value = torch.as_tensor(value)
    dist.all_reduce(value)
    return value


def prepare(model, options):
    """Compile and checkpoint block by block, and wrap in DDP."""
    if options.compile:
        compile_blocks(model)
    for block in blocks_of(model) if options.grad_checkpoint else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if dist.get_world_size() == 1:
        return model
    # with --compile, each border of a bucket splits a graph: use few, large buckets
    return DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=250)


def save_checkpoint(model, ema, optimizer, options, data, step):
    """Save ckpt-<step>.pt whole or not at all, then drop the oldest beyond --keep."""
    check_finite(model.state_dict())
    path = Path(options.out, f"ckpt-{step:08d}.pt")
    state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                 step=step, config=asdict(model.config), options=vars(options),
                 run=identity(model, options, data), classes=data.classes, names=data.names)
    save_atomically(path, lambda file: torch.save(state, file))
    saved = [file for file in sorted(path.parent.glob(CHECKPOINT))
             if file <= path]                # later ones are damaged: the run resumed before them
    for old in saved[:-options.keep]:
        old.unlink(missing_ok=True)


def identity(model, options, data):
    """What must not change when a run is resumed.  A single class is left out: its name is
    that of the folder, which may move."""
    fixed = "seed", "batch_size", "time_mean", "label_dropout", "ema", "repa"
    return {**asdict(model.config), **{name: getattr(options, name) for name in fixed},
            "classes": data.classes[1:] and data.classes, "number of images": len(data)}


def resume(model, ema, optimizer, options, data):
    """Load the newest checkpoint in --out, if there is one.  Returns the steps done."""
    out = Path(options.out)
    path = on_rank_0(newest_intact, out, True)
    if not path:
        on_rank_0(clean, out, 0)
        return 0
    state = read_file(path)
    with in_one_line(f"{path} does not fit; choose another --out"):
        then, now = state["run"], identity(model, options, data)
        differ = [f"{key}={then.get(key)!s:.60} there, {now[key]!s:.60} here"
                  for key in now if then.get(key) != now[key]]
        if differ:
            raise ValueError("; ".join(differ))
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        moments = copy.deepcopy(state["optimizer"]["state"])             # a copy, not mapped
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        step, old = state["step"], state["options"]
    on_rank_0(clean, out, step)
    if dist.get_rank() == 0:
        changed = [f"; --{name} {old.get(name)} -> {getattr(options, name)}"
                   for name in ("steps", "lr", "warmup", "cooldown", "clip", "data", "init")
                   if old.get(name) != getattr(options, name)]
        print(f"resumed at step {step}" + "".join(changed))
    return step


def clean(out, step):
    """Remove what a killed run left: half-written files, and lines of the log after `step`.  A log
    without a checkpoint may be another run's, so it is kept."""
    for path in out.glob(".*.[0-9]*.partial"):
        path.unlink()
    if not step and (log := out / "log.jsonl").exists():
        with (out / "log.old.jsonl").open("ab") as old:
            old.write(log.read_bytes())
        log.unlink()
    kept = "".join(json.dumps(line) + "\n" for line in read_log(out) if line["step"] <= step)
    save_atomically(out / "log.jsonl", lambda file: file.write_text(kept))


ENDING_SIGNALS = [getattr(signal, name) for name in (        # sent by terminals and schedulers
    "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)]


@contextmanager
def noted_signals():
    """Inside, a signal that ends a job is only noted, and the loop stops after the current step.
    The same signal again, more than a second later, ends the process between two operations."""
    noted = {}

    def note(signum, _):
        if time.monotonic() - noted.setdefault(signum, time.monotonic()) > 1:
            os._exit(128 + signum)
        with suppress(OSError):              # the terminal may be gone; print is not safe here
            os.write(2, b"\nstopping: finishing the step and saving first\n")

    handlers = {signum: signal.signal(signum, note) for signum in ENDING_SIGNALS
                if signal.getsignal(signum) is not signal.SIG_IGN}       # nohup ignores SIGHUP
    try:
        yield noted
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def report_skipped(out, step, norm, skipped):
    """Warn of an update that was skipped; end the run after MAX_SKIPPED in a row."""
    if dist.get_rank() == 0:
        tqdm.write(f"warning: step {step}: the gradient's norm is {norm}: update skipped",
                   file=sys.stderr)
        write_log(out, step=step, skipped=str(norm))
    if skipped == MAX_SKIPPED:
        raise FloatingPointError(f"{skipped} updates in a row were not finite, the last at step "
                                 f"{step}; try a lower --lr from the last checkpoint")


def start_from(model, given, path):
    """Copy the weights of --init.  If the number of classes differs, the label table is new except
    for its null class.  If the width of REPA's features differs, the projector is new too."""
    fresh, weights = model.state_dict(), given.state_dict()
    if given.config.num_classes != model.config.num_classes:
        fresh["label.weight"][-1] = weights.pop("label.weight")[-1]
        if dist.get_rank() == 0:
            print(f"--init {path} has {given.config.num_classes} classes: a new label table for "
                  f"{model.config.num_classes}; the null class is kept")
    if given.config.repa_dim != model.config.repa_dim:
        weights = {name: w for name, w in weights.items() if not name.startswith("repa_projector.")}
    new = {name: w for name, w in fresh.items() if name.startswith(("label.", "repa_projector."))}
    with in_one_line(f"--init {path} does not fit the model"):
        model.load_state_dict({**new, **weights})


# -------------------------------------------------------------------------------------------------
# Log and pictures


def mean_losses(sums, prefix=""):
    """What by_time() added up, as a line of the log: means over all images and over each tenth."""
    flow, repa, count = sums.sum(1).tolist()
    tenths = [round(loss / n, 6) if n and math.isfinite(loss) else None      # JSON has no NaN
              for loss, _, n in sums.T.tolist()]
    aligned = {f"{prefix}repa": repa / count} if repa else {}
    return {f"{prefix}loss": flow / count, **aligned, f"{prefix}loss_by_t": tenths}


@torch.no_grad()
def validate(model, data, batch=50, limit=500):
    """Sums of by_time() over at most `limit` validation images with fixed noise.  t is logit-normal
    around 0 whatever --time-mean, so that runs can be compared."""
    device, count = next(model.parameters()).device, min(limit, len(data))
    examples, losses = Examples(data, 0, "val"), torch.zeros(3, BINS)
    for start in tqdm(range(0, count, batch), "validating", leave=False):
        pixels, y, z, _, indices = default_collate(
            [examples[k] for k in range(start, min(start + batch, count))])
        x_0, t = to_model(pixels, device), logit_normal_time(z.to(device))
        with autocast(device):
            losses += by_time(t, *flow_matching_loss(model, x_0, y.to(device), t,
                                                     draw_noise(x_0, 0, "val", indices))).cpu()
    return losses


def write_pictures(out, step, ema, data, val_data, options):
    """Log the validation loss; draw samples-<step>.png, a row per class, and loss.png.

    The samples are quick ones: 12 steps, where sample.py takes 100; above 64 pixels on a CPU, 10
    steps and fewer images."""
    if val_data:
        losses = validate(ema, val_data, min(50, options.micro_batch))
        write_log(out, step=step, **mean_losses(losses, "val_"))
    slow = next(ema.parameters()).device.type == "cpu" and ema.config.image_size > 64
    rows, columns, steps = (4, 1, 10) if slow else (10, 4, 12)
    count = min(rows, len(data.names))
    classes = [k * len(data.names) // count for k in range(count)]       # evenly among many
    images = [to_uint8(generate(ema, [c] * columns, range(k * columns, (k + 1) * columns),
                                options.seed, sampler="ab2", steps=steps, cfg=2.0))
              for k, c in enumerate(tqdm(classes, "sampling", leave=False))]
    picture = draw_grid(np.concatenate(images), [data.names[c] for c in classes])
    save_atomically(out / f"samples-{step:08d}.png", lambda file: picture.save(file, "PNG"))
    draw_losses(out, options.time_mean)


def write_log(out, **line):
    """Append a line to log.jsonl; numbers that are not finite become null."""
    line = {key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in line.items()}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_log(out):
    """The lines of log.jsonl, except those that a crash or a full disk cut short."""
    path, lines = out / "log.jsonl", []
    for written in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(written)
            lines += [line] if isinstance(line["step"], int) else []
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
    return lines


def draw_losses(out, time_mean):
    """loss.png: losses of training and of validation, a panel each because they draw t differently,
    and both by t at the last step."""
    figure, log = Figure((11, 3.4), layout="constrained"), read_log(out)
    *curves, by_t = figure.subplots(1, 3)
    names = f"training, mean logit t = {time_mean:g}", "validation, EMA, mean logit t = 0"
    for axes, key, name, colour in zip(curves, ("loss", "val_loss"), names, ("C0", "C1")):
        lines = [line for line in log if line.get(key) is not None]
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], ".-", c=colour)
        axes.set(title=name, xlabel="step", ylabel="flow matching loss, Eq. (5)")
        if lines:
            by_t.stairs(np.array(lines[-1][f"{key}_by_t"], dtype=float),
                        np.linspace(0, 1, BINS + 1), color=colour, label=name, baseline=None)
            by_t.legend(fontsize=7)
    by_t.set(title="both by t, at the last step", xlabel="t, from data to noise")
    for axes in (*curves, by_t):                             # plain numbers, also in a narrow range
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    save_atomically(out / "loss.png", lambda path: figure.savefig(path, format="png", dpi=120))


# -------------------------------------------------------------------------------------------------
# Examples: their order, flips and random numbers depend on (seed, position in the run) alone


class Examples(Dataset):
    """Example k of a run: image, label, and the random numbers that time and dropout need."""

    def __init__(self, data, seed, purpose="train"):
        self.data, self.seed, self.purpose, self.epoch = data, seed, purpose, None

    def index(self, k):
        """Which image example k shows: every epoch is a new permutation."""
        epoch, position = divmod(k, len(self.data))
        if epoch != self.epoch:
            generator = random_stream(self.seed, self.purpose, "epoch", epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator)
        return int(self.order[position])

    def __getitem__(self, k):
        """uint8 (H, W, 3), label, z () ~ N(0, 1) for its time, u () ~ U(0, 1) for dropout, k"""
        index, g = self.index(k), random_stream(self.seed, self.purpose, k)
        z, (u, coin) = torch.randn((), generator=g), torch.rand(2, generator=g)
        pixels, label = self.data[index]
        if self.data.flip and self.purpose == "train" and coin < 0.5:
            pixels = pixels[:, ::-1].copy()
        return pixels, label, z, u, k


def load_batches(options, data, first_step):
    """This rank's part of every global batch from `first_step` on, in micro-batches."""
    part = options.batch_size // dist.get_world_size()
    starts = (step * options.batch_size + dist.get_rank() * part + k
              for step in range(first_step, options.steps)
              for k in range(0, part, options.micro_batch))
    return iter(DataLoader(
        Examples(data, options.seed), num_workers=options.workers, worker_init_fn=ignore_signals,
        batch_sampler=(range(k, k + options.micro_batch) for k in starts),
        pin_memory=options.device != "cpu" and torch.cuda.is_available()))


def ignore_signals(worker):
    """In a loader process: a signal to the whole process group must not end it before the step is
    done.  The command kills its loaders when it ends."""
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


# -------------------------------------------------------------------------------------------------
# Images from a folder

SPLIT = re.compile(                          # seg_train, Validation, test_images, val2017
    r"(?:\w+[-_ ])?(train|val|test)(?:ing|id|idation)?(?:[-_ ]?(?:set|data|images))?\d*", re.I)
LAYOUTS = "train/<class>/*.jpg with val/<class>/*.jpg, or <class>/*.jpg, or *.jpg"


class ImageFolder:
    """<root>/<class>/**/*.jpg: classes are the sorted folder names, labels their positions; or
    <root>/*.jpg, one class.  Raises ValueError for any other layout.

    Warns once of each unreadable image and uses the next one instead.  More than one, and more
    than 1 % of the folder, is an error; in a large folder, soon after the 1000th image read.
    """

    flip = True

    def __init__(self, root, size):
        self.root, self.size = Path(root), size
        self.files = list_images(root)
        inside = [Path(file).relative_to(root).parts for file in self.files]
        folders = sorted(path.name for path in self.root.iterdir()
                         if path.is_dir() and path.name[0] != ".")
        loose = [parts[0] for parts in inside if len(parts) == 1]
        empty = set(folders) - {parts[0] for parts in inside}
        names = {part for parts in inside for part in parts[:-1]}
        splits = {found[1].lower(): found[0] for found in map(SPLIT.fullmatch, sorted(names))
                  if found}                  # one alone, such as bullet_train, may be a class
        deep = {parts[1] for parts in inside if len(parts) > 2}
        numbered = (self.root / "dataset.json").exists() or (folders and all(    # EDM, FFHQ
            name.isdecimal() and len(name) >= 5 for name in folders))
        nested = len(folders) == 1 and len(deep) > 1 and all(len(parts) > 2 for parts in inside)
        for holds, problem in (
                (not self.files, "no images"),
                (len(splits) > 1, f"splits where classes should be: {', '.join(splits.values())}"),
                (loose and folders, f"images beside folders: {', '.join(loose[:1] + folders[:1])}"),
                (empty, f"folders without images: {', '.join(sorted(empty)[:5])}"),
                (numbered, f"numbered folders, which look like shards (if they are classes, put a "
                           f"letter before each name): {', '.join(folders[:3])}"),
                (nested, f"one folder of folders, {''.join(folders[:1])}: give that one itself?")):
            if holds:
                raise ValueError(f"--data {root}: found {problem}; expected {LAYOUTS}")
        named = Path(os.path.abspath(root))  # no folders of classes: DIR/train has class DIR
        self.classes = folders or [(named.parent if named.name in ("train", "val") else named).name]
        self.labels = [folders.index(parts[0]) if folders else 0 for parts in inside]
        known = imagenet_names()
        self.names = [known.get(name, name) for name in self.classes]
        self.bad, self.read = set(), 0       # of this process

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        """uint8 (size, size, 3), label"""
        for i in ((index + k) % len(self) for k in range(len(self))):
            self.read += 1
            try:
                return read_image(self.files[i], self.size), self.labels[i]
            except Exception as error:       # a broken file may raise anything
                if is_system_error(error):
                    raise
                if i not in self.bad:
                    tqdm.write(f"warning: {self.files[i]}: unreadable ({error}); the next image "
                               f"stands in for it", file=sys.stderr)
                self.bad.add(i)
                if len(self.bad) > max(1, min(len(self), 1000 + self.read) / 100):
                    break
        names = ", ".join(self.files[i] for i in sorted(self.bad)[:5])
        raise ValueError(f"--data {self.root}: {len(self.bad)} of the first "
                         f"{min(self.read, len(self))} images are unreadable, more than 1 %: "
                         f"{names}")


def open_data(data, size):
    """(training set, validation set or None): DIR/train and DIR/val if there, else DIR itself."""
    if data is None:
        return Shapes(size), Shapes(size, 1000, first=10**6)
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"--data {data} is not a folder")
    if not (root / "train").is_dir():
        return ImageFolder(root, size), None
    others = sorted(path.name for path in root.iterdir() if path.is_dir()
                    and path.name[0] != "." and path.name not in ("train", "val", "test"))
    if others:
        raise ValueError(f"--data {data}: found train/ beside {', '.join(others[:3])}; a class or "
                         f"a split?  Rename it, or move the others.  Expected {LAYOUTS}")
    training = ImageFolder(root / "train", size)
    validation = ImageFolder(root / "val", size) if (root / "val").is_dir() else None
    differ = sorted(set(training.classes) ^ set(validation.classes)) if validation else ()
    if differ:
        raise ValueError(f"--data {data}: train/ and val/ have different classes; only one of them "
                         f"has {', '.join(differ[:5])}.  Expected {LAYOUTS}")
    return training, validation


# -------------------------------------------------------------------------------------------------
# REPA's encoder


class Encoder:
    """REPA's frozen teacher: a vision transformer from torch.hub with the interface of DINOv2."""

    def __init__(self, name, repo, source, device):
        # ImageNet's, as DINOv2 expects
        mean_and_std = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
        self.mean, self.std = torch.tensor(mean_and_std, device=device)[:, :, None, None]
        try:
            net = torch.hub.load(repo, name, source=source, trust_repo=True)     # never ask
            self.net = net.to(device).eval().requires_grad_(False)
            self.dim = self(torch.zeros(1, 3, 32, 32, device=device)).shape[1]
        except Exception as error:           # the repository's own code may raise anything
            raise ValueError(f"--repa {name}: cannot use it from {repo}: {error}") from None

    @torch.no_grad()
    def __call__(self, x_0):
        """x_0 (B, 3, H, W) in [-1, 1] -> (B, dim, h, w): one feature per 16 x 16 pixels"""
        h, w = (max(1, round(side / 16)) for side in x_0.shape[-2:])
        P = self.net.patch_size
        x = F.interpolate((x_0 + 1) / 2, size=(h * P, w * P), mode="bicubic", antialias=True)
        tokens = self.net.forward_features((x - self.mean) / self.std)["x_norm_patchtokens"]
        return tokens.transpose(1, 2).unflatten(2, (h, w))


def load_encoder(options, device):
    """The encoder of --repa, or None.  One process per node downloads it first."""
    encoder, first = None, int(os.environ.get("LOCAL_RANK", 0)) == 0
    for turn in (True, False) if options.repa else ():
        if turn == first:
            encoder = Encoder(options.repa, options.repa_repo, options.repa_source, device)
        dist.barrier()
    return encoder


# -------------------------------------------------------------------------------------------------
# The command


def main():
    options = parse()
    device = start_processes(options.device)
    rank = dist.get_rank()
    given, info = load_model(options.init) if options.init else (None, None)
    inherited = (given.config, info["options"].get("model", "")) if given else None
    config = configure(options, device, inherited)
    out = Path(options.out)
    if options.data and out.resolve().is_relative_to(Path(options.data).resolve()):
        raise ValueError(f"--out {out} is inside --data {options.data}: its pictures would become "
                         f"training images; choose another --out")
    data, val_data = open_data(options.data, options.image_size)
    encoder = load_encoder(options, device)
    config = config.replace(num_classes=len(data.classes), repa_dim=encoder.dim if encoder else 0)
    torch.manual_seed(options.seed)          # the same weights on every rank
    model = DiP(config).to(device)
    if given:
        start_from(model, given, options.init)
        del given
    with (locked(out) if rank == 0 else nullcontext()), noted_signals() as signals:
        if rank == 0:
            weights = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"{options.model or options.init}: {weights:.2f} M weights, on "
                  f"{dist.get_world_size()} x {device.type}\n"
                  f"{options.data or 'no --data DIR, so drawn shapes'}: {len(data)} images of "
                  f"{options.image_size} x {options.image_size}, classes: {len(data.classes)}\n"
                  f"{options.steps} steps of {options.batch_size} images, {options.micro_batch} at "
                  f"a time on each process, into {out}")
        _, done = fit(model, options, data, val_data, encoder, signals)
    if done < options.steps:
        if rank == 0:
            print(f"stopped by a signal after step {done}; run the same command to continue")
        return 128 + max(signals, default=signal.SIGTERM)    # as shells do
    if rank == 0:
        pictures = [str(path) for path in (out / f"samples-{done:08d}.png", out / "loss.png")
                    if path.exists()]
        print(f"done: {out} is at step {done}; look at {' and '.join(pictures) or out}; next:\n"
              f"    python sample.py --ckpt {shlex.quote(str(out))} --class 0")


# -------------------------------------------------------------------------------------------------
# Drawn shapes: data without a download.  A class is a shape that spans many patches, filled with a
# texture that repeats 4 to 8 times across the image.  Every shape comes with two textures and every
# texture on two shapes, so neither global structure nor local detail alone tells the class.

SHAPES = ("disc", "ring", "triangle", "cross", "star")
TEXTURES = ("striped", "checked", "dotted", "zigzag", "gridded")
PALETTES = np.array([    # RGB of background, dark, light
    [[244, 239, 230], [29, 53, 87], [142, 202, 230]],
    [[253, 240, 213], [120, 0, 0], [244, 162, 97]],
    [[233, 245, 219], [49, 87, 44], [167, 201, 87]],
    [[243, 232, 255], [60, 9, 108], [199, 125, 255]],
    [[224, 251, 252], [41, 50, 65], [238, 108, 77]],
    [[255, 243, 176], [51, 92, 103], [224, 159, 62]]], dtype=np.float32)


def signed_distance(shape, x, y):
    """About the distance to the outline of a shape of radius 1, negative inside.  x, y (H, W)"""
    if shape == "disc":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.28
    if shape == "triangle":
        return np.maximum(y, np.abs(x) * np.cos(np.pi / 6) - y / 2) - 0.6
    if shape == "cross":
        a, b = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(a - 0.95, b - 0.32)
    # star: fold the plane onto one half of one point, then the distance to that point's edge
    sector, inner = np.pi / 5, 0.48
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    edge = np.array([inner * np.cos(sector) - 1, inner * np.sin(sector)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return 1.05 * ((radius * np.cos(angle) - 1) * normal[0] + radius * np.sin(angle) * normal[1])


def texture_wave(texture, p, q):
    """Positive where the texture is light; slope about 1.  p, q (H, W): phases across and down."""
    if texture == "striped":
        return np.sin((p + q) * 0.6)
    if texture == "checked":
        return 1.6 * np.sin(0.7 * p) * np.sin(0.7 * q)
    if texture == "dotted":
        return np.cos(0.85 * p) + np.cos(0.85 * q) - 0.55
    if texture == "zigzag":
        return np.sin(0.8 * q + 1.8 * np.arcsin(np.sin(0.45 * p)))
    return 1.8 * np.maximum(np.cos(0.85 * p), np.cos(0.85 * q)) - 1.1    # gridded


class Shapes:
    """Ten classes of textured shapes, deterministic by index, at any resolution, antialiased."""

    pairs = [(SHAPES[k // 2], TEXTURES[(k // 2 + k % 2) % 5]) for k in range(10)]
    names = [f"{texture} {shape}" for shape, texture in pairs]
    classes = names
    flip = False

    def __init__(self, size, length=50_000, first=0):
        self.size, self.length, self.first = size, length, first
        side = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
        self.x, self.y = np.meshgrid(side, side)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        """uint8 (size, size, 3), label"""
        shape, texture = self.pairs[index % 10]
        rng = np.random.default_rng((2511, self.first + index))
        dx, dy, turn = rng.uniform(-1, 1, 3).astype(np.float32) * (0.1, 0.1, 0.2)
        radius = rng.uniform(0.75, 0.85)
        background, dark, light = PALETTES[rng.integers(len(PALETTES))]
        x, y = (self.x - dx) / radius, (self.y - dy) / radius
        x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        distance = signed_distance(shape, x, y) * radius * self.size / 2     # in pixels
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        p, q = (2 * np.pi * (4.5 * axis + rng.uniform(-0.15, 0.15)) for axis in (self.x, self.y))
        sharpness = self.size / 53                           # a soft edge of about one pixel
        ink = np.clip(0.5 + sharpness * texture_wave(texture, p, q), 0, 1)[..., None]
        picture = background + inside * (dark + ink * (light - dark) - background)
        return (picture + 0.5).astype(np.uint8), index % 10


if __name__ == "__main__":
    run(main)
