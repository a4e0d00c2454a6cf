"""
Draw images with a trained DiP.

    python sample.py --class 1                              # newest run under runs/, or our weights
    python sample.py --class "striped disc" 7 --per-class 4 --cfg 2.5 --seed 3
    python sample.py --class 1 --trajectory                 # also show how noise becomes an image
    python sample.py --ckpt FILE --class goldfish           # the authors' weights
    python sample.py --num-samples 50000 --out samples.npz  # for fid.py; label of image i: i mod K
    torchrun --nproc_per_node=8 sample.py --num-samples 50000 --out samples.npz

With the same settings, image i depends on (seed, i, class) alone, not on the number of GPUs.  The
batch size only changes rounding: in bf16, on a GPU, a pixel may differ by a few levels of 255.
"""

import argparse
import ctypes
import difflib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dip import Block, DiP, DiPConfig, PatchDetailerHead, check_choice, check_multiple, from_release

# -------------------------------------------------------------------------------------------------
# Samplers integrate dx/dt = velocity(x, t) from x at t = 1 down to t = 0, so dt is negative.  They
# are plain functions of a velocity field and know nothing of images, models or guidance.


def time_steps(steps):
    """(t, next t) of every step, from 1 down to 0."""
    return pairwise(k / steps for k in range(steps, -1, -1))


def euler(velocity, x, steps):
    """Order 1, one evaluation per step: the paper's sampler, with 100 steps (Table 4)."""
    for t, t_next in time_steps(steps):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity, x, steps):
    """Order 2, two evaluations per step: the mean of the velocities at both ends.  The last step is
    plain Euler, as in EDM: training rarely sees t = 0."""
    for t, t_next in time_steps(steps):
        v, dt = velocity(x, t), t_next - t
        if t_next > 0:
            v = (v + velocity(x + dt * v, t_next)) / 2
        x = x + dt * v
    return x


def adams_bashforth(velocity, x, steps):
    """Order 2, one evaluation per step: extrapolates from the velocity of the previous step."""
    v_prev = None
    for t, t_next in time_steps(steps):
        v = velocity(x, t)
        slope = v if v_prev is None else v + (v - v_prev) / 2
        x = x + (t_next - t) * slope
        v_prev = v
    return x


def euler_maruyama(velocity, x, steps, noise=None):
    """The reverse SDE which, without guidance, has the marginals of the ODE; diffusion w = t:

        dx = [v - w/2 score] dt + sqrt(w) dW,    score = -eps_hat / t,    eps_hat = x + (1 - t) v

    dt < 0, dW ~ N(0, |dt|).  Weak order 1, one evaluation per step; the last step is plain Euler.
    `noise()` draws a standard normal like x.
    """
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in time_steps(steps):
        v, dt = velocity(x, t), t_next - t
        if t_next > 0:
            eps_hat = x + (1 - t) * v
            x = x + dt * (v + eps_hat / 2) + math.sqrt(-t * dt) * noise()
        else:
            x = x + dt * v
    return x


SAMPLERS = {"euler": euler, "heun": heun, "ab2": adams_bashforth, "sde": euler_maruyama}


def guided(model, y, scale=1.0, interval=(0.0, 1.0)):
    """The velocity field of a model under classifier-free guidance: v_0 + scale (v_y - v_0).

    Guidance acts for t inside the interval only (Kynkaanniemi et al., arXiv 2404.07724).  Outside
    it, or with scale 1, a step costs one evaluation; inside, one evaluation of a doubled batch.
    y (B,) labels, x (B, 3, H, W), t a float -> (B, 3, H, W)
    """
    null = torch.full_like(y, model.config.num_classes)

    def velocity(x, t):
        times = torch.full((len(x),), t, device=x.device)
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return model(x, times, y)
        v_y, v_0 = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, null])).chunk(2)
        return v_0 + scale * (v_y - v_0)

    return velocity


# -------------------------------------------------------------------------------------------------
# From labels to images


@torch.no_grad()
def generate(model, labels, indices=None, seed=0, size=None, sampler="euler", steps=100,
             cfg=1.0, interval=(0.0, 1.0), watch=None):
    """Images of `labels`; image k depends on (seed, indices[k], labels[k]) alone.

    labels: B ints; indices: B ints [0, 1, ...]; size: (H, W), or one int [as trained] -> float
    (B, 3, H, W) on the model's device.  `watch(t, x_t, v)` is called at every evaluation of the
    velocity: to move a progress bar, for example.  Raises ValueError for settings that make no
    sense, FloatingPointError where the images diverge.
    """
    K, device = model.config.num_classes, next(model.parameters()).device
    y = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
    if y.ndim != 1 or y.dtype.kind not in "iu" or not ((0 <= y) & (y <= K)).all():
        given = " ".join(str(labels).split())[:60]
        raise ValueError(f"labels={given} must be whole numbers from 0 to {K}, the null class; "
                         f"find_class() turns a name into one")
    check_choice("sampler", sampler, SAMPLERS)
    if not steps >= 1 or not math.isfinite(cfg):
        raise ValueError(f"steps={steps} must be at least 1, and cfg={cfg} finite")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval={interval} must be (low, high) with 0 <= low <= high <= 1")
    size = model.config.image_size if size is None else size
    H, W = (int(side) for side in np.broadcast_to(size, 2))
    for side in (H, W):
        check_multiple("size", side, model.config.patch_size, "patch_size")
    indices = range(len(y)) if indices is None else indices
    streams = [random_stream(int(seed), "sample", int(i)) for i in indices]

    def noise():
        drawn = torch.empty(len(streams), 3, H, W)           # on the CPU: the same for any device
        for row, stream in zip(drawn, streams):
            row.normal_(generator=stream)
        return drawn.to(device)

    def checked(x, t):                       # x_t of a working model stays below 10
        if not (x.abs() < 1e4).all():
            raise FloatingPointError(f"the images diverged by t = {t:.4g}, step "
                                     f"{round((1 - t) * steps)} of {steps}; try a cfg below {cfg}")
        return x

    field = guided(model, torch.tensor(y, dtype=torch.long, device=device), cfg, interval)

    def velocity(x, t):
        with autocast(device):
            v = field(checked(x, t), t)
        if watch:
            watch(t, x, v)
        return v

    integrate = partial(euler_maruyama, noise=noise) if sampler == "sde" else SAMPLERS[sampler]
    return checked(integrate(velocity, noise(), steps), 0.0)


def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded"""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# -------------------------------------------------------------------------------------------------
# Pictures: a grid, a trajectory


def draw_grid(images, names, headers=None, cell=96):
    """Lay out the images of each name beside it, wrapped after ten, with a header on each column.

    images: uint8 (len(names) * n, H, W, 3), n for each name in turn.  Small images are enlarged to
    about `cell` pixels, by a whole factor and without smoothing.
    """
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 14)
    H, W = images.shape[1:3]
    zoom = max(1, round(cell / max(H, W)))
    dx, dy, n = W * zoom + 4, H * zoom + 4, len(images) // len(names)
    columns, lines = min(n, 10), math.ceil(n / 10)           # rows of images for each name
    names = [" ".join(name.split())[:200] for name in names] # Pillow refuses a line break
    for k in range(len(names)):
        while len(names[k]) > 1 and font.getlength(names[k]) > columns * dx:
            names[k] = names[k][:-2] + "…"                   # no wider than the images
    left, top = 12 + math.ceil(max(map(font.getlength, names))), 24 if headers else 4
    sheet = Image.new("RGB", (left + columns * dx, top + len(names) * lines * dy), "white")
    pen = ImageDraw.Draw(sheet)
    for j, header in enumerate(headers or []):
        pen.text((left + j * dx + W * zoom // 2, 12), header, "black", font, "mm")
    for k, image in enumerate(images):
        name, j = divmod(k, n)
        line, column = divmod(j, 10)
        x, y = left + column * dx, top + (name * lines + line) * dy
        sheet.paste(Image.fromarray(image).resize((W * zoom, H * zoom), Image.NEAREST), (x, y))
        if j == 0:
            pen.text((left - 8, y + H * zoom // 2), names[name], "black", font, "rm")
    return sheet


def sample_grid(model, names, options):
    """Draw --per-class images of every class into one picture."""
    n, seen, images = options.per_class or 8, {}, []
    labels, names = np.repeat(options.classes, n), [names[c] for c in options.classes]
    starts = range(0, len(labels), options.batch)

    def watch(t, x, v):                      # Heun evaluates most t twice: keep the second
        bar.update()
        if options.trajectory and not images:                # of the first batch
            kept = round((1 - t) * options.steps) % max(1, options.steps // 32) == 0
            seen[t] = to_uint8(x[:1] - t * v[:1]), to_uint8(x) if kept else None

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=options.out.parent):     # or an error, before the work
        pass
    with tqdm(total=len(starts) * options.evaluations, desc="sampling") as bar:
        for start in starts:
            part = np.arange(start, min(start + options.batch, len(labels)))
            images.extend(to_uint8(generate(model, labels[part], part, **options.settings,
                                            watch=watch)))
    images, out = np.stack(images), options.out
    save_picture(out, [draw_grid(images, names)])
    print(f"wrote {out}: {len(images)} images, {', '.join(names)}")
    if options.trajectory:
        draw_trajectory(seen, images, n, names, out)


def draw_trajectory(seen, images, n, names, out):
    """Write two more files: a strip of the model's guesses x_t - t v of the first image, and a GIF
    of x_t for the first batch, from noise to images.

    seen: {t: (that prediction (1, H, W, 3), noisy images (B, H, W, 3) or None)}, uint8
    """
    times, last = list(seen), len(seen) - 1
    # denser near t = 1, where more changes
    chosen = [times[k] for k in sorted({round(last * (j / 9) ** 2) for j in range(10)})]
    path = out.with_stem(out.stem + "-trajectory")
    save_picture(path, [draw_grid(np.concatenate([seen[t][0] for t in chosen]), names[:1],
                                  [f"t={t:.2f}" for t in chosen])])
    print(f"wrote {path}: the predicted clean image of the first sample, from noise to data")

    noisy = [x for _, x in seen.values() if x is not None]
    whole = max(1, len(noisy[0]) // n)                       # classes that are in the first batch
    stages = [*noisy, images[:len(noisy[0])]]
    save_picture(path.with_suffix(".gif"),
                 [draw_grid(stage[:whole * n], names[:whole]) for stage in stages])
    print(f"wrote {path.with_suffix('.gif')}: x_t of the first images as t falls")


def save_picture(path, frames):
    """One frame as PNG; several as GIF, 0.1 s each and the last 2.5 s."""
    kind, animation = ("PNG", {}) if len(frames) == 1 else ("GIF", dict(
        save_all=True, append_images=frames[1:], loop=0,
        duration=[100] * (len(frames) - 1) + [2500]))
    save_atomically(path, lambda file: frames[0].save(file, kind, **animation))


# -------------------------------------------------------------------------------------------------
# Export: an .npz for fid.py


def export(model, options):
    """Write --num-samples images with label i mod K: uint8 NHWC `arr_0`, labels `arr_1`.

    The ranks take batches of fixed composition in turn, write them into one file, and then mark
    them as done in another.  To resume, run the same command, with any number of ranks.
    """
    N, K, out = options.num_samples, model.config.num_classes, options.out
    H, W = options.size or [model.config.image_size] * 2
    parts, starts = out.with_name(out.name + ".parts"), range(0, N, options.batch)
    rank, world = dist.get_rank(), dist.get_world_size()
    with locked(parts) if rank == 0 else nullcontext():
        todo = on_rank_0(begin_export, parts, options, (N, H, W, 3), len(starts))[rank::world]
        with (tqdm(total=len(todo) * options.evaluations, disable=rank > 0) as bar,
              open(parts / "images.npy", "r+b") as pixels, open(parts / "done", "r+b") as done):
            header = pixels.seek(0, os.SEEK_END) - N * H * W * 3
            for b in todo:
                part = np.arange(starts[b], min(starts[b] + options.batch, N))
                x = generate(model, part % K, part, **options.settings,
                             watch=lambda *_: bar.update())
                write_at(pixels, header + starts[b] * H * W * 3, to_uint8(x).tobytes())
                write_at(done, b, b"\1")
        dist.barrier()
        if rank == 0:
            def write(path):
                with path.open("wb") as file:
                    np.savez(file, arr_0=np.load(parts / "images.npy", mmap_mode="r"),
                             arr_1=np.arange(N) % K)

            save_atomically(out, write)
            print(f"wrote {out}: arr_0 uint8 {(N, H, W, 3)}, {K} classes in turn")
    if rank == 0:
        shutil.rmtree(parts, ignore_errors=True)


def write_at(file, place, data):
    """Write bytes at a place of an open file, and wait until they are on the disk."""
    file.seek(place)
    file.write(data)
    sync(file)


def begin_export(parts, options, shape, batches):
    """Begin an export, or check that `parts` holds this one.  Returns the batches still to draw."""
    settings = json.dumps({**options.settings, "shape": shape, "batch": options.batch,
                           "ckpt": options.ckpt, "saved": Path(options.ckpt).stat().st_mtime,
                           "ema": options.ema, "device": options.device})
    file, done = parts / "settings.json", parts / "done"
    if not file.exists():
        others = {path.name for path in parts.glob("[!.]*")} - {"images.npy", "done"}
        if others:
            raise ValueError(f"{parts} holds {', '.join(sorted(others)[:3])}, and the export would "
                             f"delete that folder; choose another --out")
        np.lib.format.open_memmap(parts / "images.npy", "w+", np.uint8, shape=shape)
        save_atomically(done, lambda path: path.write_bytes(bytes(batches)))     # 1 means done
        save_atomically(file, lambda path: path.write_text(settings))
    elif file.read_text(errors="replace") != settings:
        raise ValueError(f"{parts} holds an unfinished export with other settings; delete it, or "
                         f"choose another --out")
    if len(done.read_bytes()) != batches:
        raise ValueError(f"{done} is damaged; delete {parts} to draw all images again")
    return [b for b, is_done in enumerate(done.read_bytes()) if not is_done]


# -------------------------------------------------------------------------------------------------
# The command


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=text, help="weights: a file, or a folder of runs [newest in runs/, or ours]")
    add("--no-ema", dest="ema", action="store_false", help="the last weights, not their average")
    add("--class", dest="classes", nargs="+", default=[], metavar="CLASS",
        help="classes, by index or name [the first ten]")
    add("--per-class", type=number(int, 1, 1000), help="images of each class [8]")
    add("--size", nargs=2, type=number(int, 1), metavar=("H", "W"), help="in pixels [as trained]")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the noise [0]")
    add("--sampler", choices=tuple(SAMPLERS), default="euler", help="integrator [euler]")
    add("--steps", type=number(int, 1), default=100, help="steps from t = 1 to t = 0 [100]")
    add("--cfg", type=number(float), default=2.9, help="guidance scale (App. C); 1 = off [2.9]")
    add("--interval", nargs=2, type=number(float, 0, 1), default=(0.03, 0.89),
        metavar=("LOW", "HIGH"), help="guide only for these t; the paper counts 1 - t [0.03 0.89]")
    add("--out", type=text, help="[samples-CLASSES-SEED.png; samples.npz with --num-samples]")
    add("--trajectory", action="store_true", help="also a strip and a GIF of noise becoming images")
    add("--num-samples", type=number(int, 1), help="export N images, image i of class i mod K")
    add("--save-weights", type=text, help="only write the weights, as bfloat16, to this .pt file")
    add("--batch", type=number(int, 1), default=32, help="images at a time, per process [32]")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    options = parser.parse_args(argv)
    words = "-".join(["samples", *map("class{}".format, options.classes[:9])])
    words = re.sub(r"[^\w.-]+", "-", words).encode()[:150].decode(errors="ignore")
    default = "samples.npz" if options.num_samples else f"{words}-seed{options.seed}.png"
    options.out = Path(options.out or default)
    options.settings = {name: getattr(options, name) for name in (
        "seed", "size", "sampler", "steps", "cfg", "interval")}      # what generate() needs
    options.evaluations = 2 * options.steps - 1 if options.sampler == "heun" else options.steps
    if options.out.suffix != (".npz" if options.num_samples else ".png"):
        parser.error(f"--out {options.out} must end in .png, or in .npz with --num-samples")
    if options.num_samples and (options.classes or options.per_class or options.trajectory
                                or options.save_weights):
        parser.error("--num-samples takes all classes in turn; leave out --class, --per-class, "
                     "--trajectory and --save-weights")
    if options.interval[0] > options.interval[1]:
        parser.error(f"--interval {options.interval} must be LOW HIGH with LOW <= HIGH")
    if options.save_weights and not (options.ema and options.save_weights.endswith(".pt")):
        parser.error(f"--save-weights {options.save_weights} must end in .pt; it writes the "
                     f"averaged weights, so leave out --no-ema")
    for file in filter(None, (options.num_samples and options.out, options.save_weights)):
        if Path(file).exists():
            parser.error(f"{file} exists; delete it, or choose another name")
    return options


def find_class(query, classes, names):
    """Index of a class given by index, folder name or readable name.  An index comes first."""
    def plain(name):
        return name.lower().replace("_", " ")

    if query.isdecimal() and int(query) < len(names):
        return int(query)
    found = [i for i, pair in enumerate(zip(classes, names)) if plain(query) in map(plain, pair)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"--class {query!r} matches several classes; give an index: {found}")
    close = difflib.get_close_matches(plain(query), names, 3, 0.4) or names[:5]
    raise ValueError(f"--class {query!r} is unknown; did you mean {', '.join(map(repr, close))}, "
                     f"or an index from 0 to {len(names) - 1}?")


def main():
    options = parse()
    device = start_processes(options.device)
    rank, options.device = dist.get_rank(), device.type
    options.ckpt = str(on_rank_0(find_checkpoint, options.ckpt))
    model, info = load_model(options.ckpt, device, options.ema)
    for side in options.size or ():
        check_multiple("--size", side, model.config.patch_size, "patch_size")
    names = info["names"]
    options.classes = ([find_class(query, info["classes"], names) for query in options.classes]
                       or list(range(min(10, len(names)))))
    if options.compile:
        compile_blocks(model)
    if rank == 0:
        if options.ckpt == str(OUR_WEIGHTS):
            print("the small model's weights in assets/; `python train.py` makes your own")
        print(f"{options.ckpt}: step {info['step']}, {'EMA' if options.ema else 'last'} weights; "
              f"{options.sampler}, {options.steps} steps, cfg {options.cfg} for t in "
              f"{list(options.interval)}, seed {options.seed}")
        trained = model.config.image_size
        if options.size and not all(trained / 2 <= side <= trained * 2 for side in options.size):
            print(f"warning: --size {options.size[0]} {options.size[1]} is far from the training's "
                  f"{trained} x {trained}; expect poor images")
    if options.save_weights and rank == 0:
        rounded = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
        preset = {"model": info["options"].get("model", "")}             # for --init's recipe
        state = {**info, "ema": rounded, "options": preset}
        save_atomically(options.save_weights, lambda file: torch.save(state, file))
        print(f"wrote {options.save_weights}: the weights as bfloat16")
    elif options.num_samples:
        export(model, options)
    elif rank == 0:
        sample_grid(model, names, options)


# -------------------------------------------------------------------------------------------------
# Weights.  A checkpoint is a dict of builtins and tensors, which weights_only=True can open.

OUR_WEIGHTS = Path(__file__).parent / "assets" / "dip-nano.pt"
INFO = "config", "step", "classes", "names", "options"       # stored beside the weights


def load_model(path, device="cpu", ema=True):
    """(model in eval mode, dict of INFO).  Float32 weights, each of them finite.

    path: a checkpoint of train.py, or a folder of them; a Lightning checkpoint of the release
    (ema_denoiser. or, without ema, denoiser.); a state dict with the release's names, .pt or
    .safetensors.  Raises ValueError, in one line, for anything else.
    """
    path = find_checkpoint(path)
    state = read_file(path)
    with in_one_line(f"{path} is neither a checkpoint of train.py nor weights of a released DiP"):
        if "config" in state:
            if not ema and "model" not in state:
                raise ValueError("it has the averaged weights alone; leave out --no-ema")
            weights, info = state["ema" if ema else "model"], {key: state[key] for key in INFO}
            if state["config"]["depth"] + state["config"]["head_depth"] > len(weights):
                raise ValueError("it has too few weights for its depth")     # DiP() might never end
            config, texts = DiPConfig(**state["config"]), info["classes"] + info["names"]
            if len(texts) != 2 * config.num_classes or {*map(type, texts)} != {str}:
                raise ValueError(f"classes and names are not {config.num_classes} texts each")
        else:
            weights = {re.sub(r"\b(module|_orig_mod)\.", "", name): weight
                       for name, weight in state.get("state_dict", state).items()}
            prefix = "ema_denoiser." if ema else "denoiser."
            if any("denoiser." in name for name in weights):
                weights = {name.removeprefix(prefix): weight for name, weight in weights.items()
                           if name.startswith(prefix)}
            elif not ema:
                raise ValueError("it does not say whether its weights are averaged; leave out "
                                 "--no-ema")
            if not weights:
                raise ValueError(f"it has no weights named {prefix}*")
            config, weights = from_release(weights)
            known = imagenet_names() if config.num_classes == 1000 else {}
            numbers = [f"class {k}" for k in range(config.num_classes)]
            info = dict(config=asdict(config), step=int(state.get("global_step", 0)), options={},
                        classes=list(known) or numbers, names=list(known.values()) or numbers)
        with torch.device("meta"):
            model = DiP(config)                              # shapes alone, no memory
        weights = {name: weight.to(device, torch.float32, copy=True)         # the file may go
                   for name, weight in weights.items()}
        model.load_state_dict(weights, assign=True)
        check_finite(weights)
    return model.eval().requires_grad_(False), info


def check_finite(weights):
    """Raise ValueError if a weight is not finite: it would draw black images without an error."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"weight {name} is not finite; use an earlier checkpoint, or train "
                             f"again with a lower --lr")


CHECKPOINT = "ckpt-" + 8 * "[0-9]" + ".pt"   # train.py's names; a copy with another name is ignored


def find_checkpoint(given=None):
    """Path of a checkpoint: the given file; or the newest below the given folder; or, if nothing
    is given, the newest below runs/, or else our small weights in assets/."""
    path = Path("runs" if given is None else given)
    if given is not None and not path.is_dir():
        return path
    paths = [*path.glob(f"**/{CHECKPOINT}"), *path.glob(f"*/{CHECKPOINT}")]      # also in links
    newest = max(paths, key=lambda found: found.stat().st_mtime, default=None)
    if newest is None and given is not None:
        files = [str(file) for file in sorted(path.rglob("*")) if file.is_file()]
        raise ValueError(f"no ckpt-STEP.pt of train.py under {path}; give a file of weights, or "
                         f"train; it holds {', '.join(files[:5]) or 'no file'}")
    return newest_intact(newest.parent) if newest else OUR_WEIGHTS


def newest_intact(folder, verify=False):
    """Path of the last intact checkpoint of a run, or None where there is no checkpoint at all.

    Names the damaged ones that it skips.  Raises ValueError if all are damaged.
    verify: also compare every byte with the checksums in the file, which torch.load does not do.
    """
    paths = sorted(Path(folder).glob(CHECKPOINT), reverse=True)
    for path in paths:
        try:
            state = read_file(path)
            with in_one_line(f"{path} is damaged"):
                if not {*INFO, "model", "ema"} <= state.keys():
                    raise ValueError("it is not a checkpoint of train.py")
                if verify and zipfile.ZipFile(path).testzip():
                    raise ValueError("a checksum is wrong")
            return path
        except (ValueError, FileNotFoundError) as error:     # damaged, or dropped meanwhile
            print(f"warning: {error}; skipped", file=sys.stderr)
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} is intact")


def read_file(path):
    """The dict in a .pt or .safetensors file, tensors mapped from the file; runs no code from it.

    Raises ValueError, in one line, for what is wrong with the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; `python train.py` makes one under runs/")
    with in_one_line(f"{path} is not a checkpoint, or not all of it is there"):
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file          # an optional package
            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            if not (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
                raise
            raise ValueError(
                f"it holds {found[1]}, which may run code when opened; if you trust it: python -c "
                f"\"import torch; torch.save(torch.load('{path}', 'cpu', weights_only=False)"
                f"['state_dict'], 'weights.pt')\"")
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state


def imagenet_names():
    """{wnid: readable name} of the 1000 classes in ImageNet's order: sorted by wnid."""
    lines = (Path(__file__).parent / "assets" / "imagenet_classes.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


# -------------------------------------------------------------------------------------------------
# Shared with train.py: random streams, blocks, files, processes, options, errors


def random_stream(*key, device="cpu"):
    """A random generator that depends on its key alone, such as (seed, "train", example): never on
    the rank, the batch size or the number of workers.  A CPU and a GPU draw different numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little", signed=True))


def autocast(device):
    """bfloat16 for the network on CUDA, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def blocks_of(model):
    """The units of --compile and --grad-checkpoint: every Block, and every head without Blocks."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    heads = [module.head for module in model.modules() if isinstance(module, PatchDetailerHead)]
    return blocks + [head for head in heads if not set(head.modules()) & set(blocks)]


def compile_blocks(model):
    """Compile block by block: seconds, not the minutes that the whole model takes."""
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward)


@contextmanager
def if_supported(risk):
    """Turn "not supported by this file system" into a warning of the risk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{risk} ({error})")


def sync(file):
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    with if_supported("no fsync here: a power loss may damage files"):
        os.fsync(file.fileno())


def save_atomically(path, write):
    """Call write(temporary path), then rename: a half-written file never has this name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            sync(file)                       # its bytes are on the disk before its name is
        os.replace(temporary, path)
    except RuntimeError as error:            # how torch.save reports a full disk
        if "DataLoader" in str(error):       # a loader was killed meanwhile
            raise
        raise OSError(f"{path} could not be written; is the disk full? ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder):
    """Hold the system's lock on a folder, so that one process alone writes into it.  The lock ends
    with the process, however that ends; loader processes do not inherit it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:                      # Windows has no such lock
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            with if_supported(f"{folder}: no locks here; do not start a second run there"):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another process is writing there; wait until it ends, or "
                             f"choose another --out") from None
        yield


def is_system_error(error):
    """Whether reading failed for a reason that is not in the file: memory, I/O, permissions."""
    return (isinstance(error, MemoryError)
            or bool(re.search("out of memory|(can't|Cannot) allocate memory", str(error)))
            or getattr(error, "errno", None) not in (None, errno.ENOENT, errno.EINVAL))


@contextmanager
def in_one_line(message):
    """Report any error from a bad file in one line.  System errors pass through."""
    try:
        yield
    except Exception as error:
        if is_system_error(error):
            raise
        line = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"{message} ({line})") from None


def start_processes(device="auto"):
    """Join torchrun's process group, or one of this process alone.  Returns this rank's device."""
    alone = "RANK" not in os.environ
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and alone else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=device).item()                  # fails if it is absent, or "meta"
    except Exception as error:               # each backend raises its own type
        raise ValueError(f"--device {device}: {' '.join(str(error).split())[:200]}") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        nccl = device.startswith("cuda") and not alone
        store = dict(store=dist.HashStore(), rank=0, world_size=1) if alone else {}
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", **store,
                                timeout=timedelta(hours=2))  # others wait while rank 0 saves
    return torch.device(device)


def on_rank_0(function, *arguments):
    """Rank 0 alone calls the function; every rank returns the result, or raises the error."""
    answer = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function(*arguments)
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[1]:
        raise answer[1]
    return answer[0]


class Parser(argparse.ArgumentParser):
    """Plain argparse, except that an error is one line, like every error of the commands."""

    def __init__(self, **settings):
        super().__init__(usage="%(prog)s [options]", allow_abbrev=False, **settings,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise ValueError(f"{message}; --help lists the options")


def text(value):
    """An argparse type: a text that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty; an unset variable?")
    return value


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def number(value):                       # argparse prints this name
        if not low <= kind(value) <= high or kind(value) in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"{value:.40} must be finite, from {low} to {high}")
        return kind(value)

    return number


ADVICE = {                                   # a pattern in an error: what the user can do
    "shared memory|Bus error": "out of shared memory: fewer --workers, or docker's --shm-size",
    "DataLoader worker": "a loader process was killed; out of memory? Fewer --workers",
    "out of memory|(can't|Cannot|Unable to) allocate|^MemoryError":
        "out of memory: a smaller --micro-batch (training) or --batch (sampling)",
    "No working C\\+\\+ compiler|InvalidCxxCompiler|Cannot find a working triton":
        "--compile needs a compiler; leave it out, or set CXX",
    "[Cc]onnection (closed|reset)": "another process of this command has ended",
}


def explain(error):
    """One line for an error that the user can fix; None for one that nobody expected."""
    if isinstance(error, (EOFError, ConnectionError)):       # reading from a loader process
        error = RuntimeError(f"DataLoader worker: {error!r}")
    lines = (str(error).strip() or type(error).__name__).splitlines()
    line = lines[-1] if lines[0].startswith("Caught ") else lines[0]     # from a loader process
    line = line.removeprefix(f"{type(error).__name__}: ")[:400]
    if isinstance(error, (RuntimeError, MemoryError)):
        return next((f"{advice} ({line})" for pattern, advice in ADVICE.items()
                     if re.search(pattern, "\n".join(lines))), None)
    return line if isinstance(error, (ValueError, OSError, FloatingPointError)) else None


class Terminal:
    """A stream whose errors are ignored: a closed terminal or pipe must not end a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            return self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def run(main):
    """Run a command, then end its process and its loaders at once.  Exit code: what main() returns,
    or 1 after an error."""
    torch.set_flush_denormal(True)           # subnormal numbers make a CPU slow
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None:
        mallopt(-1, -1)                      # M_TRIM_THRESHOLD: glibc keeps freed memory,
        mallopt(-4, 0)                       # M_MMAP_MAX: a tenth of the small model's time
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")     # None: it was closed
        stream.reconfigure(errors="replace")                 # a console may lack a class's letters
        setattr(sys, name, Terminal(stream))
    code = 1
    try:
        code = main() or 0
    except SystemExit as error:              # --help
        code = error.code or 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if hasattr(signal, "SIGCHLD"):       # or a killed loader raises a second error
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if line := explain(error):
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        else:
            traceback.print_exc()
    finally:                                 # leftover threads of a process group may hang
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    run(main)
