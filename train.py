r"""
Train a DiP.

    python train.py                     # drawn shapes and a small model, in minutes
    python train.py --data IMAGES       # IMAGES/train/<class>/*.jpg, IMAGES/<class>/*.jpg, or *.jpg
    python train.py --init FILE --data IMAGES       # from our weights, or the authors'
    torchrun --nproc_per_node=8 train.py --data IMAGENET        # DiP-XL/16, 256 x 256
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        train.py --data IMAGENET

The same command resumes.  Image, flip, time, noise and label dropout of example k depend on (seed,
k) alone, not on the number of processes, micro-batches and workers; results agree up to the order
of sums.  Noise is drawn on the device, so CPU and GPU differ.  A run writes ckpt-*.pt, log.jsonl,
loss.png and samples-*.png into --out.  SIGTERM and Ctrl-C save a checkpoint and end it (torchrun
needs --shutdown-timeout 300 for large ones); an update that is not finite is skipped; up to 1 % of
the images may be unreadable.
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
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate
from tqdm import tqdm

from common import (at_least, autocast, available_memory, check_fit, compile_pieces, in_one_line,
                    load_checkpoint, load_model, locked, memory_needed, newest_intact,
                    noted_signals, option, parse_options, pieces, progress, run_main,
                    save_atomically, start_processes, write_checkpoint)
from dataset import Examples, load_encoder, load_examples, open_data, refuse_bad_files
from dip import (PRESETS, REPA_WEIGHT, DiP, check_choice, cost, drop_labels, flow_matching_loss,
                 logit_normal_time)
from sample import draw_grid, generate, to_uint8

# -------------------------------------------------------------------------------------------------
# Options

PAPER = dict(steps=1_600_000, batch_size=256, lr=1e-4, warmup=0, cooldown=0.0,
             time_mean=0.0)                  # Table 4; steps: 320 epochs of ImageNet
MINUTES = dict(steps=3500, batch_size=16, lr=3e-3, warmup=50, cooldown=0.3,
               time_mean=0.8)                # on two CPU cores
RECIPES = {"DiP-Nano/16": MINUTES}           # every other preset: the paper's


@dataclass
class TrainOptions:
    data: str | None = option(None, "image folder [embedded shapes]", group="data", metavar="DIR")
    image_size: int | None = option(None, "height and width in pixels [the preset's]")
    workers: int | None = option(None, "loader processes [8 with CUDA and --data, else 0]")

    model: str | None = option(None, "preset [DiP-XL/16 with CUDA and --data, else DiP-Nano/16]",
                               group="model", metavar="NAME")
    set: tuple = option((), "other DiPConfig fields, as head=mlp depth=4", nargs="+",
                        action="extend", metavar="FIELD=VALUE")
    init: str | None = option(None, "start a new run from these weights: ours or the authors'",
                              metavar="FILE")
    repa: str | None = option(None, "align with this encoder, as dinov2_vitb14 [no REPA]",
                              metavar="ENCODER")
    repa_repo: str = option("facebookresearch/dinov2", "torch.hub repository of the encoder")
    repa_source: str = option("github", "local: --repa-repo is a folder",
                              choices=("github", "local"))

    steps: int | None = option(None, "updates [1600000; Nano: 3500]", group="training")
    batch_size: int | None = option(None, "images an update, over all processes [256; Nano: 16]")
    micro_batch: int | None = option(None, "images at once in a process [32 at most, to fit]")
    lr: float | None = option(None, "AdamW's learning rate [1e-4; Nano: 3e-3]")
    warmup: int | None = option(None, "steps in which lr rises [0; Nano: 50]")
    cooldown: float | None = option(None, "last fraction, in which lr falls [0; Nano: 0.3]")
    clip: float = option(1.0, "largest gradient norm; 0 = no limit, as the release")
    ema: float = option(0.9999, "decay of the averaged weights, reached by warm-up")
    time_mean: float | None = option(None, "mean of logit t, of deviation 1 [0; Nano: 0.8]")
    label_dropout: float = option(0.1, "fraction of labels dropped, for guidance")
    seed: int = option(0, "of weights, order and noise: the run is a function of it")

    out: str | None = option(None, "folder of the run [runs/MODEL-SIZE]", group="output",
                             metavar="DIR")
    log_every: int = option(50, "steps between lines of log.jsonl")
    sample_every: int | None = option(None, "steps between grids; 0: none [five a run, or 10000]")
    save_every: int | None = option(None, "steps between checkpoints [five a run, or 10000]")
    keep: int = option(2, "newest checkpoints kept")

    device: str = option("auto", "auto, cpu, cuda, mps", group="machine")
    compile: bool = option(False, "torch.compile, block by block")
    grad_checkpoint: bool = option(False, "recompute activations: less memory, more time")

    def __post_init__(self):
        at_least(1, image_size=self.image_size, steps=self.steps, batch_size=self.batch_size,
                 micro_batch=self.micro_batch, log_every=self.log_every, keep=self.keep,
                 save_every=self.save_every)
        at_least(0, workers=self.workers, lr=self.lr, warmup=self.warmup, clip=self.clip,
                 seed=self.seed, sample_every=self.sample_every)
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed} must be below 2^63")
        if self.time_mean is not None and not abs(self.time_mean) < 100:
            raise ValueError(f"--time-mean {self.time_mean} must be between -100 and 100")
        for field in ("cooldown", "ema", "label_dropout"):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{field.replace('_', '-')} {value} is a fraction: it must be "
                                 f"from 0 to 1")
        if self.label_dropout == 1:
            raise ValueError("--label-dropout 1 drops every label; a folder of images without "
                             "class folders trains without labels")


def configure(options, processes, inherited=None):
    """Fill in what the user left open; returns the DiPConfig, except num_classes and repa_dim.

    inherited: the DiPConfig and the preset's name of --init, which come before the default preset.
    """
    say = print if processes.rank == 0 else lambda line: None
    has_cuda = processes.device.type == "cuda"
    large = has_cuda and bool(options.data)
    if options.model is None and inherited is None and not large:
        missing = "--data" if has_cuda else "CUDA"
        say(f"no {missing} and no --model: the small DiP-Nano/16, with its recipe for minutes")
    config, name = inherited or (None, "")
    if options.model or not inherited:
        name = options.model or ("DiP-XL/16" if large else "DiP-Nano/16")
        check_choice("--model", name, PRESETS)
        config = PRESETS[name]
    options.model = name
    changes = read_changes(options.set, config)
    if changes.get("head", config.head) != config.head:      # another head has sizes of its own
        changes = {"head_width": 0, "head_depth": 0} | changes
        say(f"head={changes['head']}: its own head_width and head_depth, unless --set gives them")
    config = config.replace(image_size=options.image_size or config.image_size, **changes)
    options.image_size = config.image_size
    recipe = dict(RECIPES.get(name, PAPER))
    if name in RECIPES and config.image_size > 64:           # fewer images: steps stay short
        images = max(4, 16 * 64**2 // config.image_size**2)
        recipe["batch_size"] = images + -images % processes.world
    for field, value in recipe.items():
        if getattr(options, field) is None:
            setattr(options, field, value)
    every = min(10_000, max(1, options.steps // 5))
    options.sample_every = every if options.sample_every is None else options.sample_every
    options.save_every = options.save_every or every
    if options.workers is None:
        options.workers = 8 if has_cuda and options.data else 0
    folder = "-".join([name or "init", *options.set, str(config.image_size)])
    options.out = options.out or "runs/" + re.sub(r"[^\w.-]+", "-", folder)
    return config


def read_changes(pairs, config):
    """{field: value} of --set FIELD=VALUE ..."""
    elsewhere = "image_size", "num_classes", "repa_dim"      # --image-size, the data, the encoder
    fields = {field: type(value) for field, value in asdict(config).items()
              if field not in elsewhere}
    changes = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        check_choice("--set", field, fields)
        try:
            if not equals:
                raise ValueError
            changes[field] = fields[field](value)
        except ValueError:
            raise ValueError(f"--set {pair}: must be {field}=VALUE, and {field} is a "
                             f"{fields[field].__name__}") from None
    return changes


def choose_micro_batch(options, config, processes):
    """Set options.micro_batch, images at once in a process: the user's, or at most 32 that fit."""
    part, rest = divmod(options.batch_size, processes.world)
    if rest or part % (options.micro_batch or 1):
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of "
                         f"{processes.world} processes x --micro-batch {options.micro_batch or 1}")
    on_cuda = processes.device.type == "cuda"
    if on_cuda and options.micro_batch:
        return                       # tried as it is: run_main() says when memory runs out
    free = available_memory(processes.device)
    fixed, per_image = memory_needed(config, torch.bfloat16 if on_cuda else None,
                                     options.grad_checkpoint)
    candidates = [options.micro_batch] if options.micro_batch else [
        n for n in range(min(part, 32), 0, -1) if part % n == 0]
    fitting = [n for n in candidates if fixed + n * per_image < free]
    if not fitting:
        need = (fixed + candidates[-1] * per_image) / 2**30
        raise ValueError(
            f"--micro-batch {candidates[-1]} needs about {need:.1f} GiB, {free / 2**30:.1f} GiB "
            f"are free; a smaller --micro-batch, --image-size or --model, or --grad-checkpoint, "
            f"helps")
    options.micro_batch = min(processes.gather(fitting[0]))


# -------------------------------------------------------------------------------------------------
# The training step

TIME_BINS = 10           # of t, in which losses are logged
MAX_SKIPPED = 10         # updates in a row that may be not finite


def learning_rate(options, step):
    """Linear up over `warmup` steps, constant, linear down over the last `cooldown` fraction."""
    up = (step + 1) / (options.warmup + 1)
    down = (options.steps - step) / (options.cooldown * options.steps + 1)
    return options.lr * min(1, up, down)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)): a short run
    averages over about its last tenth."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)


def accumulate(net, batches, options, config, processes, encoder=None):
    """Add the gradients of one global batch, micro-batch by micro-batch; returns the sums of its
    losses by time on this rank, shaped as by_time() returns them."""
    count = options.batch_size // (processes.world * options.micro_batch)
    sums = torch.zeros(3, TIME_BINS, device=processes.device)
    for k in range(count):
        x_0, y, noise, z, u = next(batches)
        y = drop_labels(y, u, config.num_classes, options.label_dropout)
        t = logit_normal_time(z, options.time_mean)
        net.require_backward_grad_sync = k == count - 1      # DDP: gradients are summed once a step
        with autocast(processes.device):
            features = encoder(x_0) if encoder else None
            flow, repa = flow_matching_loss(net, x_0, y, t, noise, features)
        ((flow + REPA_WEIGHT * repa).mean() / count).backward()
        sums += by_time(t, flow, repa)
    return sums


def fit(options, config, data, val_data, processes, encoder=None, signals=(), build=DiP, look=None,
        initial=None):
    """Train from the newest checkpoint, or afresh, to --steps or a signal: (EMA model, steps done).

    build(config) makes the fresh model, which starts from the weights `initial`, if given;
    look(out, step, ema, data, val_data, options, signals) is called every --sample-every steps.
    """
    out, rank, look = Path(options.out), processes.rank, look or write_pictures
    model, ema, optimizer, first_step, unlogged = begin_or_resume(options, config, data, processes,
                                                                build, initial)
    net = prepare(model, options, processes)
    batches = load_examples(options, data, processes, first_step)
    skipped, since, clock = 0, first_step, time.time()
    bar = progress(range(first_step, options.steps), None, initial=first_step,
                   total=options.steps, disable=rank > 0, unit="step")
    for step in bar:
        lr = optimizer.param_groups[0]["lr"] = learning_rate(options, step)
        losses = accumulate(net, batches, options, config, processes, encoder)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
        norm, stop = processes.read(norm, signals)           # the step's one wait for the device
        if math.isfinite(norm):                              # the same on all ranks
            optimizer.step()
            update_ema(ema, model, step, options.ema)
            unlogged, skipped = unlogged + losses, 0
        else:
            skipped = report_skipped(out, step + 1, skipped + 1, losses, processes)
        optimizer.zero_grad()

        done, last = step + 1, step + 1 == options.steps
        log = last or done % options.log_every == 0
        sample = options.sample_every and (last or done % options.sample_every == 0)
        save = last or stop or (done % options.save_every == 0 and not skipped)
        if log or save:
            unlogged = processes.reduce(unlogged) * (rank == 0)  # rank 0 has the sum, others 0
        if rank == 0 and log and unlogged.any():             # some update was not skipped
            speed = (done - since) * options.batch_size / (time.time() - clock)
            log_step(out, bar, done, mean_losses(unlogged), lr, speed, norm)
            unlogged, since, clock = torch.zeros_like(unlogged), done, time.time()
        if rank == 0 and save:                               # before bad files end the run
            save_run(options, config, data, model, ema, optimizer, done, unlogged)
        if log:
            refuse_bad_files((data, val_data), processes)
        if rank == 0 and sample:
            look(out, done, ema, data, val_data, options, signals)
        if sample or save:
            since, clock = done, time.time()                 # the speed is that of training alone
        if stop:
            processes.barrier()                              # nobody leaves before it is saved
            break
    return ema, done


def log_step(out, bar, step, losses, lr, speed, norm):
    """A line of log.jsonl, and what the progress bar says."""
    write_log(out, step=step, **losses, lr=lr, images_per_s=round(speed, 1), grad_norm=norm)
    bar.set_postfix_str(f"loss {losses['loss']:.4f}, {speed:.0f} images/s")


def save_run(options, config, data, model, ema, optimizer, step, unlogged):
    """ckpt-<step>.pt: all that resume() and sample.py need."""
    write_checkpoint(
        Path(options.out), options.keep, model=model.state_dict(), ema=ema.state_dict(),
        optimizer=optimizer.state_dict(), step=step, unlogged=unlogged, config=asdict(config),
        options=asdict(options), images=len(data), classes=data.classes, names=data.names)


def prepare(model, options, processes):
    """The model wrapped for training: compiled and checkpointed block by block, and DDP."""
    if options.compile:
        compile_pieces(model)
    for module in pieces(model) if options.grad_checkpoint else ():
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    if processes.world == 1:
        return model
    # with --compile a bucket's border cuts a graph in two: few, large buckets
    return DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=250)


# -------------------------------------------------------------------------------------------------
# A new run, or one that goes on


def begin_or_resume(options, config, data, processes, build=DiP, initial=None):
    """Model, its average and optimizer, steps done, losses not yet logged: new, or from --out."""
    out, rank, device = Path(options.out), processes.rank, processes.device
    torch.manual_seed(options.seed)          # the same on every rank; DDP does not send the EMA
    model = build(config).to(device)
    path = processes.on_first(lambda: newest_intact(out, verify=True))
    if initial and not path:
        start_from(initial, model, options.init, rank)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # weight decay: Table 4
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0, fused=True)
    first_step, unlogged = 0, torch.zeros(3, TIME_BINS)
    if path:
        first_step, unlogged = resume(path, options, config, data, model, ema, optimizer, rank)
    if first_step >= options.steps:
        raise ValueError(f"{out} is already at step {first_step} of --steps {options.steps}; "
                         f"a larger --steps trains on")
    if rank == 0:
        remove_leftovers(out, first_step)
    return model, ema, optimizer, first_step, unlogged.to(device)


def start_from(initial, model, path, rank):
    """Copy weights into a fresh model.  With another number of classes the label table stays new,
    except the null class; REPA's projector stays new where the other's does not fit."""
    weights, fresh = dict(initial), model.state_dict()
    rows, name = len(fresh["label.weight"]), "label.weight"
    if len(weights[name]) != rows:
        table = fresh[name].clone()
        table[-1] = weights[name][-1]
        if rank == 0:
            print(f"--init {path} has {len(weights[name]) - 1} classes: a new label table for "
                  f"{rows - 1}; the null class is kept")
        weights[name] = table
    ours = {key: weight for key, weight in fresh.items() if key.startswith("repa_projector.")}
    theirs = {key: weights.pop(key) for key in list(weights) if key.startswith("repa_projector.")}
    fits = {k: w.shape for k, w in theirs.items()} == {k: w.shape for k, w in ours.items()}
    weights |= theirs if fits else ours
    check_fit(path, model, weights)
    model.load_state_dict(weights)


def identity(config, options, classes, images):
    """What may not change when a run is resumed."""
    fields = "seed", "batch_size", "time_mean", "label_dropout", "ema", "repa"
    return {**config, **{"--" + field.replace("_", "-"): options.get(field) for field in fields},
            "the classes": classes, "the number of images": images}


def resume(path, options, config, data, model, ema, optimizer, rank):
    """Put a checkpoint's state where it belongs; returns (steps already done, unlogged losses)."""
    state = load_checkpoint(path)
    old = identity(state["config"], state["options"], state["classes"], state["images"])
    new = identity(asdict(config), asdict(options), data.classes, len(data))
    differ = [f"{key}={str(old.get(key)):.60} there, {str(new[key]):.60} here"
              for key in new if old.get(key) != new[key]]
    if differ:
        raise ValueError(f"{path} is of another configuration ({'; '.join(differ)}); "
                         f"choose another --out")
    check_fit(path, model, state["model"])
    check_fit(path, ema, state["ema"])
    with in_one_line(f"{path} does not fit"):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        moments = {**optimizer.state_dict(), "state": state["optimizer"]["state"]}
        optimizer.load_state_dict(moments)   # lr and the like stay those of the options
        unlogged = torch.zeros(3, TIME_BINS)
        if rank == 0:                        # the sum over all ranks; the others go on from 0
            unlogged.copy_(state["unlogged"])
    for field in ("steps", "lr", "warmup", "cooldown", "clip", "data"):      # may change
        then, now = state["options"].get(field), getattr(options, field)
        if then != now and rank == 0:
            print(f"changed since the checkpoint: --{field} {then} -> {now}")
    if options.init and options.init != state["options"].get("init") and rank == 0:
        print(f"--init {options.init} is not used: the run continues from {path}; choose another "
              f"--out for a new one")
    if rank == 0:
        print(f"resumed at step {state['step']}")
    return state["step"], unlogged


def remove_leftovers(out, step):
    """Drop what a killed run left: half-written files, and log lines of steps to be run again."""
    for path in out.glob(".*.partial"):
        path.unlink()
    kept = [line for line in read_log(out) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    save_atomically(out / "log.jsonl", lambda path: path.write_text(text))


# -------------------------------------------------------------------------------------------------
# Losses and pictures


def by_time(t, flow, repa):
    """Sums over the images whose t is in each tenth: of flow, of repa, of 1.  (B,) -> (3, 10)"""
    bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    values = torch.stack([flow, repa, torch.ones_like(flow)]).detach()
    return torch.zeros(3, TIME_BINS, device=t.device).index_add(1, bins, values)


def mean_losses(sums, prefix=""):
    """What by_time() added up as a line of the log: means over all images, and over each tenth."""
    flow, repa, count = sums.sum(1).tolist()
    tenths = [round(total / n, 6) if n and math.isfinite(total) else None      # JSON has no NaN
              for total, _, n in sums.T.tolist()]
    aligned = {f"{prefix}repa": repa / count} if repa else {}
    return {f"{prefix}loss": flow / count, **aligned, f"{prefix}loss_by_t": tenths}


@torch.no_grad()
def validate(model, examples, device, batch=50, limit=500, signals=()):
    """Flow matching losses of `limit` fixed validation images and their fixed noise, by time; t is
    logit-normal around 0 whatever --time-mean, so that all runs can be compared."""
    sums, count = torch.zeros(3, TIME_BINS, device=device), min(limit, len(examples.data))
    for start in progress(range(0, count, batch), "validating", leave=False):
        stop_if(signals)
        chunk = default_collate([examples[k] for k in range(start, min(start + batch, count))])
        x_0, y, noise, z, _ = examples.on_device(chunk, device)
        t = logit_normal_time(z)
        with autocast(device):
            sums += by_time(t, *flow_matching_loss(model, x_0, y, t, noise))
    return sums


class Interrupted(Exception):
    """Pictures are left unfinished: a signal waits for the training loop."""


def stop_if(signals):
    if signals:
        raise Interrupted


def write_pictures(out, step, ema, data, val_data, options, signals=()):
    """Validation loss into the log, a grid of samples, the loss curve; cut short by a signal."""
    device = next(ema.parameters()).device
    try:
        if val_data:
            losses = validate(ema, Examples(val_data, 0, "val"), device,
                              min(50, options.micro_batch), signals=signals)
            write_log(out, step=step, **mean_losses(losses, "val_"))
        write_samples(out, step, ema, data.names, options.seed, signals)
    except Interrupted:
        pass
    draw_loss_curve(out, options.time_mean)


def write_samples(out, step, ema, names, seed, signals=()):
    """A grid of the EMA's images, a class a row: samples-<step>.png.  Drawn in a hurry: 20 steps,
    where sample.py takes 100, and fewer images where they are large and the device is a CPU."""
    large = next(ema.parameters()).device.type == "cpu" and ema.config.image_size > 64
    count, columns, steps = (min(4, len(names)), 1, 10) if large else (min(10, len(names)), 5, 20)
    classes = [k * len(names) // count for k in range(count)]            # evenly among many
    rows = [to_uint8(generate(ema, [c] * columns, range(columns), seed, sampler="ab2", steps=steps,
                              cfg=2.0, watch=lambda *_: stop_if(signals)))
            for c in progress(classes, "sampling", leave=False)]
    picture = draw_grid(rows, [names[c] for c in classes])
    save_atomically(out / f"samples-{step:08d}.png", lambda path: picture.save(path, "PNG"))


def write_log(out, **line):
    """Append a line to log.jsonl; JSON has no NaN: null."""
    line = {key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in line.items()}
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())              # on the disk before any later checkpoint is


def read_log(out):
    """The lines of log.jsonl, except those that a crash or a full disk cut short."""
    path, lines = out / "log.jsonl", []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def draw_loss_curve(out, time_mean=0.0):
    """loss.png: the loss by step, and by time at the end; of training, and of the EMA held out."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (by_step, by_t) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines, names = read_log(out), {"loss": f"training, logit t around {time_mean:g}",
                                   "val_loss": "validation, EMA, logit t around 0"}
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(line["step"], line[key], line[f"{key}_by_t"]) for line in lines
                  if line.get(key) is not None]
        if points:
            steps, losses, tenths = zip(*points)
            by_step.plot(steps, losses, style, label=names[key], markersize=3, linewidth=1)
            heights = np.array(tenths[-1], dtype=float)
            by_t.stairs(heights, np.linspace(0, 1, TIME_BINS + 1), label=names[key], baseline=None)
    by_step.set(xlabel="step", ylabel="flow matching loss, Eq. (5)", yscale="log")
    by_t.set(xlabel="t, from data to noise; at the last step", yscale="log")
    for axes in (by_step, by_t):
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    save_atomically(out / "loss.png", lambda path: figure.savefig(path, format="png", dpi=120))
    plt.close(figure)


def report_skipped(out, step, skipped, losses, processes):
    """Say where an update was not finite; end the run after too many in a row, else return how
    many there were."""
    flow = processes.reduce(losses)[0].tolist()
    where = [f"{k / TIME_BINS:.1f} to {(k + 1) / TIME_BINS:.1f}" for k in range(TIME_BINS)
             if not math.isfinite(flow[k])]
    what = f"the loss for t in {', '.join(where)}" if where else "the gradient, and no loss,"
    if processes.rank == 0:
        tqdm.write(f"warning: step {step}: {what} is not finite: update skipped", file=sys.stderr)
        write_log(out, step=step, skipped=what)
    if skipped == MAX_SKIPPED:
        raise FloatingPointError(
            f"{skipped} updates in a row were not finite, the last at step {step}: {what}; last "
            f"good checkpoint: {newest_up_to(out, step)}; try a lower --lr")
    return skipped


def newest_up_to(out, step):
    """The newest checkpoint at or before a step, or None.  Any later one is broken: newest_intact()
    passed over it."""
    name = f"ckpt-{step:08d}.pt"
    return max((path for path in out.glob("ckpt-*.pt") if path.name <= name), default=None)


# -------------------------------------------------------------------------------------------------
# The command


def announce(options, config, data, processes):
    """The first lines: what is going to happen, and every setting."""
    parameters, flops = cost(config)
    world = processes.world
    count = options.batch_size // world // options.micro_batch
    print(f"{options.model or options.init}: {parameters / 1e6:.2f} M weights, {flops / 1e9:.3g} "
          f"GFLOPs per forward pass, {processes.device}, {world} process{'es' * (world > 1)}")
    print(f"{options.data or 'embedded shapes'}: {len(data)} images of {options.image_size} x "
          f"{options.image_size} in {len(data.classes)} class{'es' * (len(data.classes) > 1)}")
    print(f"{options.steps} steps of {options.batch_size} images in {count} "
          f"micro-batch{'es' * (count > 1)} of {options.micro_batch} a process, into {options.out}")
    days = 3 * flops * options.batch_size * options.steps / 5e10 / 86400
    if processes.device.type == "cpu" and days > 2:
        print(f"note: this is about {days:.0f} days of a CPU at 50 GFLOP/s; --steps, --batch-size, "
              f"--image-size and --model make it less")
    for kind, settings in (("options", options), ("config", config)):
        pairs = asdict(settings).items()
        print(f"{kind}: " + " ".join(f"{key}={value}" for key, value in pairs if value is not None))


def main():
    options = parse_options(TrainOptions, __doc__)
    processes = start_processes(options.device)
    given, info = load_model(options.init, "cpu") if options.init else (None, None)
    config = configure(options, processes, given and (
        given.config, info["options"].get("model", "")))
    data, val_data = open_data(options.data, options.image_size)
    encoder = load_encoder(options, processes)
    config = config.replace(num_classes=len(data.classes), repa_dim=encoder.dim if encoder else 0)
    choose_micro_batch(options, config, processes)
    if processes.rank == 0:
        announce(options, config, data, processes)
        if given and info["classes"] != data.classes and len(info["classes"]) == len(data.classes):
            print(f"note: --init {options.init}: its classes have other names than those of --data")
    out, weights = Path(options.out), given and given.state_dict()
    with locked(out) if processes.rank == 0 else nullcontext():
        with noted_signals() as signals:
            _, done = fit(options, config, data, val_data, processes, encoder, signals,
                          initial=weights)
    code = 128 + max(signals, default=signal.SIGTERM) if done < options.steps else 0     # as shells
    if processes.rank > 0:
        return code
    if code:
        print(f"stopped by a signal after step {done}; the same command continues from "
              f"{newest_up_to(out, done) or 'the beginning'}")
        return code
    ckpt = "" if out.parts[:1] == ("runs",) else f" --ckpt {shlex.quote(str(out))}"
    pictures = [path for path in (out / f"samples-{done:08d}.png", out / "loss.png")
                if path.exists()]
    look = f": look at {' and '.join(map(str, pictures))}" if pictures else ""
    print(f"done{look}; next:\n"
          f"    python sample.py{ckpt} --class {shlex.quote(data.names[0])}")


if __name__ == "__main__":
    run_main(main)
