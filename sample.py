"""
Draw images with a trained DiP.

    python sample.py --class 1                              # newest run under runs/, or our weights
    python sample.py --class "striped disc" 7 --num 8 --cfg 2.5 --seed 3
    python sample.py --class 1 --trajectory                 # also how the noise becomes an image
    python sample.py --ckpt FILE --class goldfish           # the authors' weights
    python sample.py --num-samples 50000 --out samples.npz  # for fid.py: uint8 NHWC, label i mod K
    torchrun --nproc_per_node=8 sample.py --num-samples 50000 --out samples.npz

Samplers are plain functions of a velocity field: they know nothing of images, models or guidance.
With the same settings image i depends on (seed, i, class), not on the number of GPUs.  The batch
size changes rounding only: in bf16, on a GPU, by up to a few levels of a pixel.
"""

import argparse
import dataclasses
import difflib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import traceback
import typing
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dip import (LAST_LAYERS, Block, DiP, DiPConfig, PatchDetailerHead, check_multiple,
                 from_release)

# -------------------------------------------------------------------------------------------------
# Samplers.  Each integrates dx/dt = velocity(x, t) from x at t = 1 down to t = 0; dt is negative.


def time_grid(steps, shift=1.0):
    """`steps + 1` times from 1 to 0; shift > 1 spends more of them near noise (SD3's shift)."""
    even = (k / steps for k in range(steps, -1, -1))
    return [shift * t / (shift * t + (1 - t)) for t in even]


def euler(velocity, x, steps, shift=1.0):
    """Order 1, one evaluation a step: the paper's sampler, with 100 steps (Table 4)."""
    for t, t_next in pairwise(time_grid(steps, shift)):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity, x, steps, shift=1.0):
    """Order 2, two evaluations a step: the mean of the velocities at both ends."""
    for t, t_next in pairwise(time_grid(steps, shift)):
        dt = t_next - t
        v = velocity(x, t)
        v_next = velocity(x + dt * v, t_next)
        x = x + dt * (v + v_next) / 2
    return x


def adams_bashforth(velocity, x, steps, shift=1.0):
    """Order 2, one evaluation a step: extrapolates from the velocity of the previous step."""
    v_prev = dt_prev = None
    for t, t_next in pairwise(time_grid(steps, shift)):
        v, dt = velocity(x, t), t_next - t
        slope = v if v_prev is None else v + dt / (2 * dt_prev) * (v - v_prev)
        x = x + dt * slope
        v_prev, dt_prev = v, dt
    return x


def euler_maruyama(velocity, x, steps, shift=1.0, noise=None):
    """The reverse SDE whose marginals are, without guidance, those of the ODE; g(t)^2 = w = t:

        dx = [v - w/2 score] dt + sqrt(w) dW,    score = -eps_hat / t,    eps_hat = x + (1 - t) v

    dt < 0, dW ~ N(0, |dt|).  Weak order 1, one evaluation a step; the last step, to t = 0, is one
    of Euler.  `noise()` draws a standard normal like x.
    """
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in pairwise(time_grid(steps, shift)):
        v, dt = velocity(x, t), t_next - t
        if t_next > 0:
            eps_hat = x + (1 - t) * v
            x = x + dt * (v + eps_hat / 2) + math.sqrt(-t * dt) * noise()
        else:
            x = x + dt * v
    return x


SAMPLERS = {"euler": euler, "heun": heun, "ab2": adams_bashforth, "sde": euler_maruyama}


def guided(model, y, scale=1.0, interval=(0.0, 1.0)):
    """The field velocity(x, t) of a model under classifier-free guidance, v_0 + scale (v_y - v_0).

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


def random_stream(*key, device="cpu"):
    """A generator that is a function of its key alone: of (seed, what for, index), never of rank,
    batch size or number of workers.  On another kind of device it draws other numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little", signed=True))


def autocast(device):
    """bf16 for the network on CUDA, float32 elsewhere; the ODE's state is float32 everywhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def generate(model, labels, indices=None, seed=0, size=None, sampler="euler", steps=100,
             cfg=1.0, interval=(0.0, 1.0), shift=1.0, watch=None):
    """Images for `labels`; image k is drawn from the randomness of (seed, indices[k]) alone.

    labels: B ints; indices: B ints [0, 1, ...] -> float (B, 3, H, W) on the model's device.
    `watch(t, x_t, v)`, if given, is called at every evaluation of the velocity.
    """
    K = model.config.num_classes
    indices = range(len(labels)) if indices is None else indices
    if not all(isinstance(label, (int, np.integer)) and 0 <= label <= K for label in labels):
        raise ValueError(f"labels={list(labels)!r} must be whole numbers from 0 to {K}, the null "
                         f"class; find_class() turns a name into one")
    device = next(model.parameters()).device
    H, W = size or (model.config.image_size, model.config.image_size)
    streams = [random_stream(seed, "sample", int(i)) for i in indices]

    def noise():
        drawn = torch.empty(len(streams), 3, H, W)
        for row, stream in zip(drawn, streams):
            row.normal_(generator=stream)
        return drawn.to(device)

    field = guided(model, torch.tensor(labels, device=device), cfg, interval)

    def velocity(x, t):
        with autocast(device):
            v = field(x, t)
        if watch:
            watch(t, x, v)
        return v

    extra = {"noise": noise} if sampler == "sde" else {}
    return SAMPLERS[sampler](velocity, noise(), steps, shift, **extra)


def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded"""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# -------------------------------------------------------------------------------------------------
# Pictures: a grid, a trajectory


def draw_grid(rows, labels, headers=None, cell=96):
    """A picture of rows of images, a label before each row and, if given, a header on each column.

    rows: list of uint8 arrays (columns, H, W, 3).  Small images are enlarged by the whole factor
    that brings them nearest to `cell` pixels, without smoothing.
    """
    H, W = rows[0].shape[1:3]
    gap = 4
    zoom = max(1, round(cell / max(H, W)))
    font = ImageFont.load_default(size=15)
    left = 3 * gap + max(round(font.getlength(label)) for label in labels)
    top = 24 if headers else gap
    columns = max(len(row) for row in rows)
    size = (left + columns * (W * zoom + gap), top + len(rows) * (H * zoom + gap))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for j, header in enumerate(headers or []):
        middle = left + j * (W * zoom + gap) + W * zoom // 2
        pen.text((middle, top // 2), header, "black", font, "mm")
    for i, (row, label) in enumerate(zip(rows, labels)):
        y = top + i * (H * zoom + gap)
        pen.text((left - 2 * gap, y + H * zoom // 2), label, "black", font, "rm")
        for j, image in enumerate(row):
            picture = Image.fromarray(image).resize((W * zoom, H * zoom), Image.NEAREST)
            sheet.paste(picture, (left + j * (W * zoom + gap), y))
    return sheet


def lay_out(images, names):
    """(rows, labels) for draw_grid: as many images of every name, at most ten a row."""
    rows, labels = [], []
    for name, group in zip(names, np.split(images, len(names))):
        for j in range(0, len(group), 10):
            rows.append(group[j:j + 10])
            labels.append(name if j == 0 else "")
    return rows, labels


def sample_grid(model, names, options):
    """Rows of images, class after class; image j of every class starts from the same noise."""
    classes, num, seen = options.class_, options.num or 8, {}
    names = [names[c] for c in classes]
    labels = [c for c in classes for _ in range(num)]
    indices = [j for _ in classes for j in range(num)]
    def watch(t, x, v):                      # Heun visits most times twice: the last visit stays
        seen[t] = to_uint8(x[:1] - t * v[:1]), to_uint8(x)

    images = []
    for start in progress(range(0, len(labels), options.batch), "sampling", unit="batch"):
        part = slice(start, start + options.batch)
        watched = watch if options.trajectory and start == 0 else None
        x = generate(model, labels[part], indices[part], **options.settings(), watch=watched)
        images.append(to_uint8(x))
    images = np.concatenate(images)
    out = Path(options.out) if options.out else free_name("samples.png")
    sheet = draw_grid(*lay_out(images, names))
    save_atomically(out, lambda path: sheet.save(path, "PNG"))
    print(f"wrote {out}: {len(images)} images, {', '.join(names)}")
    if options.trajectory:
        draw_trajectory(seen, images, num, names, out)


def draw_trajectory(seen, images, num, names, out):
    """Beside the grid: a strip of what the model predicts for the first image, x_t - t v, as t
    falls; and a GIF in which the noise of the first batch turns into its images.

    seen: {t: (that prediction (1, H, W, 3), noisy images (B, H, W, 3))}, uint8
    """
    times, last = list(seen), len(seen) - 1
    # quadratic spacing: most changes near t = 1
    chosen = [times[k] for k in sorted({round(last * (j / 9) ** 2) for j in range(10)})]
    strip = np.concatenate([seen[t][0] for t in chosen])
    sheet = draw_grid([strip], names[:1], [f"t={t:.2f}" for t in chosen])
    path = out.with_name(out.stem + "-trajectory.png")
    save_atomically(path, lambda partial: sheet.save(partial, "PNG"))
    print(f"wrote {path}: the predicted clean image of the first sample, from noise to data")

    noisy = [x for _, x in seen.values()]
    whole = max(1, len(noisy[0]) // num)                     # classes that are in the first batch
    stages = noisy[::max(1, len(noisy) // 32)] + [images[:len(noisy[0])]]
    frames = [draw_grid(*lay_out(stage[:whole * num], names[:whole])) for stage in stages]
    path = path.with_suffix(".gif")
    save_atomically(path, lambda partial: frames[0].save(
        partial, "GIF", save_all=True, append_images=frames[1:], loop=0,
        duration=[100] * (len(frames) - 1) + [2500]))        # milliseconds
    print(f"wrote {path}: x_t of the first images as t falls, {len(frames)} frames")


# -------------------------------------------------------------------------------------------------
# Export: an .npz for fid.py


def export(model, options, processes):
    """`--num-samples` images with label i mod K as uint8 NHWC `arr_0`, labels `arr_1`.

    The work is cut into batches of fixed composition, dealt to the ranks in turn, each saved when
    done: the same command continues where it was stopped, with any number of ranks.
    """
    N, K, out = options.num_samples, model.config.num_classes, Path(options.out or "samples.npz")
    if out.suffix != ".npz":
        raise ValueError(f"--out {out} must end in .npz with --num-samples")
    if out.exists():
        raise ValueError(f"--out {out} is there already; delete it, or choose another name")
    parts = out.with_name(out.name + ".parts")
    check_recipe(parts, options, processes)
    H, W = options.size or [model.config.image_size] * 2
    batches = {parts / f"{i:08d}.npy": range(i, min(i + options.batch, N))
               for i in range(0, N, options.batch)}
    todo = processes.on_first(lambda: [file for file in batches if not file.exists()])
    if processes.rank == 0 and len(todo) < len(batches):
        print(f"continuing: {len(batches) - len(todo)} of {len(batches)} batches are already drawn")
    mine = todo[processes.rank::processes.world]
    for file in progress(mine, "exporting", unit="batch", disable=processes.rank > 0):
        indices = batches[file]
        images = to_uint8(generate(model, [i % K for i in indices], indices, **options.settings()))
        save_atomically(file, lambda path: save_array(path, images))
    processes.barrier()
    if processes.rank == 0:
        save_atomically(out, lambda path: write_npz(path, batches, (N, H, W, 3), np.arange(N) % K))
        shutil.rmtree(parts)
        print(f"wrote {out}: arr_0 uint8 {(N, H, W, 3)}, {K} classes in turn")


def save_array(path, images):
    with path.open("wb") as file:            # np.save would add .npy to the name of a path
        np.save(file, images)


def check_recipe(parts, options, processes):
    """Store beside the parts what they are made with; refuse to go on with other settings."""
    recipe = json.dumps({
        **options.settings(), "num_samples": options.num_samples, "batch": options.batch,
        "ema": options.ema, "ckpt": options.ckpt, "saved": Path(options.ckpt).stat().st_mtime,
        "device": processes.device.type})
    path = parts / "recipe.json"
    if processes.rank == 0 and not path.exists():
        shutil.rmtree(parts, ignore_errors=True)
        save_atomically(path, lambda partial: partial.write_text(recipe))
    processes.barrier()
    if path.read_text(errors="replace") != recipe:
        raise ValueError(f"{parts} holds an unfinished export with other settings; "
                         f"delete it, or choose another --out")


def write_npz(path, batches, shape, labels):
    """An .npz, which is a zip of .npy: arr_0 joined from the parts, one in memory at a time."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for file, indices in batches.items():
                with in_one_line(f"{file} is damaged; delete it, and the same command draws it"):
                    images = np.load(file, allow_pickle=False)
                    if images.dtype != np.uint8 or images.shape != (len(indices), *shape[1:]):
                        raise ValueError(f"{images.dtype} {images.shape}")
                member.write(images.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels)


# -------------------------------------------------------------------------------------------------
# The command


def option(default, help, **settings):
    """A dataclass field that is also a command line option; `group` starts a group of options."""
    return dataclasses.field(default=default, metadata={"help": help, **settings})


@dataclass
class SampleOptions:
    ckpt: str | None = option(None, "weights: a file, or the folder of a run [newest under runs/]",
                              group="model", metavar="PATH")
    ema: bool = option(True, "the averaged weights [--ema], or the last ones")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")

    class_: tuple = option((), "classes by index or name [all, ten at most]",
                           group="what to draw", nargs="+", metavar="CLASS")
    num: int | None = option(None, "images per class [8]")
    size: tuple = option((), "another height and width in pixels [as trained]",
                         nargs=2, type=int, metavar=("H", "W"))
    seed: int = option(0, "image i depends on (seed, i, class), not on the GPUs")
    out: str | None = option(None, "file to write [samples.png; samples.npz with --num-samples]",
                             metavar="FILE")
    trajectory: bool = option(False, "also a strip and a GIF of how noise becomes an image")

    sampler: str = option("euler", "integrator", group="how to draw", choices=tuple(SAMPLERS))
    steps: int = option(100, "steps from t = 1 to t = 0")
    cfg: float = option(2.9, "guidance scale, 1 = off; from Appendix C:")
    interval: tuple = option((0.03, 0.89), "guidance acts for t in it; paper: 1 - t in 0.11 0.97",
                             nargs=2, type=float, metavar=("LOW", "HIGH"))
    time_shift: float = option(1.0, "> 1 spends more steps near noise")
    batch: int = option(32, "images at a time, per process")
    compile: bool = option(False, "torch.compile, block by block")

    num_samples: int = option(0, "export this many images, label i mod K; resumable",
                              group="files to make")
    save_weights: str | None = option(None, "only write the weights, as bfloat16, into this file",
                                      metavar="FILE")

    def __post_init__(self):
        at_least(1, num=self.num, steps=self.steps, batch=self.batch)
        at_least(0, num_samples=self.num_samples, cfg=self.cfg)
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"--interval {low} {high} must have 0 <= LOW <= HIGH <= 1")
        if not 0 < self.time_shift < math.inf:
            raise ValueError(f"--time-shift {self.time_shift} must be above 0 and finite")
        if (self.num or 8) * (len(self.class_) or 10) > 10_000:
            raise ValueError(f"--num {self.num}: a picture of more than 10,000 images; "
                             f"--num-samples exports as many as you like")
        if self.num_samples and (self.class_ or self.num is not None or self.trajectory):
            raise ValueError("--num-samples takes the classes in turn; "
                             "leave out --class, --num and --trajectory")
        if self.save_weights and Path(self.save_weights).suffix != ".pt":
            raise ValueError(f"--save-weights {self.save_weights} must end in .pt")
        if self.out and not self.num_samples and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"--out {self.out} must end in .png; an .npz needs --num-samples")

    def settings(self):
        """What generate() needs to know."""
        return dict(seed=self.seed, size=self.size or None, sampler=self.sampler, steps=self.steps,
                    cfg=self.cfg, interval=tuple(self.interval), shift=self.time_shift)


def announce(options, model, info):
    """Say what is about to be drawn, with which weights."""
    trained = model.config.image_size
    weights = f"step {info['step']}, {'EMA' if options.ema else 'last'} weights"
    if options.ckpt == str(OUR_WEIGHTS):
        print("the small weights that come with the code; `python train.py` makes your own")
    print(f"{options.ckpt}: {weights}; {options.sampler}, {options.steps} steps, cfg {options.cfg} "
          f"for t in {list(options.interval)}, seed {options.seed}")
    if options.size and not all(trained / 2 <= side <= trained * 2 for side in options.size):
        print(f"warning: --size {options.size[0]} {options.size[1]} is far from the {trained} x "
              f"{trained} of the training; expect poor images")


def main():
    options = parse_options(SampleOptions, __doc__)
    processes = start_processes(options.device)
    options.ckpt = str(processes.on_first(find_checkpoint, options.ckpt))
    model, info = load_model(options.ckpt, processes.device, options.ema)
    for side in options.size:
        check_multiple("--size", side, model.config.patch_size, "patch_size")
    names = info["names"]
    options.class_ = [find_class(query, info["classes"], names) for query in options.class_]
    if options.save_weights:
        if processes.rank == 0:
            write_weights(options.save_weights, model, info)
            print(f"wrote {options.save_weights}: weights of {options.ckpt} as bfloat16")
        return
    if processes.device.type == "cuda":
        keep_in_bf16(model)
    if options.compile:
        compile_pieces(model)
    if processes.rank == 0:
        announce(options, model, info)
    if options.num_samples:
        export(model, options, processes)
    elif processes.rank == 0:
        options.class_ = options.class_ or list(range(min(10, len(names))))
        sample_grid(model, names, options)


# #################################################################################################
# Shared plumbing of train.py and sample.py from here to the end: files and checkpoints, processes
# and devices, the command line.  None of it is about diffusion.

OUR_WEIGHTS = Path(__file__).parent / "assets" / "dip-nano.pt"


def save_atomically(path, write):
    """Call write(temporary path), then move the finished file into place: never half a file, not
    even after a power loss."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())                          # its bytes are on the disk,
        os.replace(partial, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)                                 # and so is its name
            os.close(folder)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        if "inline_container" not in line:                   # torch.save's answer to a full disk
            raise
        raise OSError(f"{path} could not be written; is the disk full? ({line})") from None
    finally:
        partial.unlink(missing_ok=True)


def free_name(path):
    """The path, or the first of path-2, path-3, ... that is not taken."""
    path, k = Path(path), 1
    name = path
    while name.exists():
        k += 1
        name = path.with_stem(f"{path.stem}-{k}")
    return name


@contextmanager
def in_one_line(message):
    """Turn whatever reading an untrusted or damaged file raises into one line: the message, and the
    first line of the error.  Errors of the system that may pass (I/O, memory) stay as they are."""
    try:
        yield
    except Exception as error:
        if is_of_the_system(error):
            raise
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{message} ({line})") from None


def is_of_the_system(error):
    """Whether reading failed for a reason that is not in the file, and may pass."""
    passing = errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in passing


# -------------------------------------------------------------------------------------------------
# Weights and checkpoints: dicts of builtins and tensors, so that weights_only=True can open them

CHECKPOINT = {"config": dict, "ema": dict, "step": int, "classes": list, "names": list,
              "options": dict}                               # enough to sample from
RESUMABLE = {"model": dict, "optimizer": dict, "unlogged": torch.Tensor, "images": int}


def write_checkpoint(out, keep, **state):
    """Save ckpt-<step>.pt whole or not at all, then drop the oldest beyond `keep`."""
    check_finite(out, state["model"])
    path = out / f"ckpt-{state['step']:08d}.pt"
    save_atomically(path, lambda partial: torch.save(state, partial))
    saved = sorted(out.glob("ckpt-*.pt"))
    for old in [file for file in saved if file <= path][:-keep]:     # of later steps: not counted
        old.unlink()


def write_weights(path, model, info):
    """The weights alone, rounded to bfloat16: what assets/ holds, and what one shares."""
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    state = dict(config=asdict(model.config), ema=weights, step=info["step"],
                 classes=info["classes"], names=info["names"],
                 options={"model": info["options"].get("model", "")})        # for --init's recipe
    save_atomically(path, lambda partial: torch.save(state, partial))


def read_file(path):
    """What a .pt or .safetensors file holds, tensors mapped from the file; runs no code from it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}; `python train.py` makes one under runs/")
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path}: reading it needs the safetensors package; "
                             f"`pip install safetensors`, or give a .pt file") from None
        with in_one_line(f"{path} is not a .safetensors file, or not all of it is there"):
            return load_file(path)
    with in_one_line(f"{path} is not a checkpoint, or not all of it is there"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            if not foreign:
                raise
    raise ValueError(
        f"{path} holds more than tensors ({foreign[1]}) and may run code when opened; if you trust "
        f"it: python -c \"import torch; torch.save(torch.load('{path}', weights_only=False, "
        f"map_location='cpu')['state_dict'], 'weights.pt')\" and use weights.pt")


def check_types(path, state, types):
    """Refuse what is not a dict with these keys, each with a value of its type."""
    wrong = [key for key, kind in types.items()
             if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {', '.join(wrong)}")


def load_checkpoint(path, verify=False):
    """The dict that train.py saved, its tensors mapped from the file.  Runs no code from it.

    verify: also compare every byte with the checksums in the file, as nothing else does.
    """
    state = read_file(path)
    check_types(path, state, CHECKPOINT | RESUMABLE)
    if verify:
        with in_one_line(f"{path} is damaged"):
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"{damaged} in it does not have its checksum")
    return state


def newest_intact(folder, verify=False):
    """Path of the last readable checkpoint of a run, or None where there is no checkpoint at all.

    Names the broken ones it passes over; if all are, that is an error and no new beginning.
    """
    paths = sorted(Path(folder).glob("ckpt-*.pt"), reverse=True)
    for path in paths:
        try:
            load_checkpoint(path, verify)
            return path
        except (ValueError, FileNotFoundError) as error:     # damaged, or dropped meanwhile
            print(f"warning: {error}; passed over")
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} is intact")


def find_checkpoint(given=None):
    """Path of a checkpoint: the file given, or the newest below the folder given or runs/; without
    any, our own small weights."""
    path = Path(given or "runs")
    if given and not path.is_dir():
        return path
    newest = max(path.glob("**/ckpt-*.pt"), key=lambda found: found.stat().st_mtime, default=None)
    if newest is None and (given or not OUR_WEIGHTS.exists()):
        raise FileNotFoundError(f"no checkpoint under {path}/; `python train.py` makes one")
    return newest_intact(newest.parent) if newest else OUR_WEIGHTS


def load_model(path, device="cpu", ema=True):
    """(model in eval mode, dict of what is known of it: config, step, classes, names, options)

    path: a checkpoint of train.py, or a folder of them; a Lightning checkpoint of the release
    (ema_denoiser. or, without ema, denoiser.); a state dict in the release's names, .pt or
    .safetensors.  Float32 weights, each checked to be finite.
    """
    path = find_checkpoint(path)
    state = read_file(path)
    if isinstance(state, dict) and "config" in state:
        weights, config, info = read_ours(path, state, ema)
    else:
        weights, config, info = read_release(path, state, ema)
    with torch.device("meta"), in_one_line(f"{path}: its configuration cannot be built"):
        model = DiP(config)                                  # shapes alone, no memory
    check_fit(path, model, weights)
    weights = {name: weight.to(device, torch.float32, copy=True)
               for name, weight in weights.items()}
    check_finite(path, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False), info


def read_ours(path, state, ema):
    """(weights, DiPConfig, info) of a checkpoint of train.py, or of weights written from one"""
    check_types(path, state, CHECKPOINT)
    weights, labels = state["ema"] if ema else state.get("model"), state["classes"] + state["names"]
    if weights is None:
        raise ValueError(f"{path} has the averaged weights alone: leave out --no-ema")
    with in_one_line(f"{path}: its configuration cannot be used"):
        for field in ("depth", "head_depth"):                # before 2 ** head_depth is computed
            if state["config"].get(field, 0) > len(weights):
                raise ValueError(f"{len(weights)} weights for {field}={state['config'][field]}")
        config = DiPConfig(**state["config"])
        if len(labels) != 2 * config.num_classes or not all(isinstance(x, str) for x in labels):
            raise ValueError(f"classes and names are not {config.num_classes} texts each")
    return weights, config, {key: value for key, value in state.items()
                             if key not in ("model", "ema", "optimizer", "unlogged")}


def read_release(path, state, ema):
    """(weights, DiPConfig, info) of the authors' weights, from a Lightning checkpoint or bare"""
    with in_one_line(f"{path} is neither a checkpoint of train.py nor weights of a released DiP"):
        weights = state.get("state_dict", state)
        prefix = "ema_denoiser." if ema else "denoiser."
        if any("denoiser." in name for name in weights):
            weights = {name.removeprefix(prefix): weight for name, weight in weights.items()
                       if name.startswith(prefix)}
        if not weights:
            raise ValueError(f"no weights named {prefix}*; try {'--no-ema' if ema else '--ema'}")
        config, weights = from_release(weights)
        known = imagenet_names() if config.num_classes == 1000 else {}
        numbers = [f"class {k}" for k in range(config.num_classes)]
        return weights, config, dict(
            config=asdict(config), step=int(state.get("global_step", 0)), options={},
            classes=list(known) or numbers, names=list(known.values()) or numbers)


def check_fit(path, model, weights):
    """Refuse weights that are not those of the model, naming the first few that differ."""
    ours = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    shapes = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    other = [f"{name} {shapes[name]} there, {ours[name]} here" for name in ours
             if name in shapes and shapes[name] != ours[name]]
    kinds = {"missing": [name for name in ours if name not in shapes], "of another shape": other,
             "unexpected": [name for name in shapes if name not in ours]}
    found = [f"{kind}: {', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"
             for kind, names in kinds.items() if names]
    if found:
        line = " ".join("; ".join(found).split())            # a foreign name may hold line breaks
        raise ValueError(f"{path}: weights and model do not fit; {line}")


def check_finite(path, weights):
    """Refuse weights that are not finite: they would silently draw black images."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{path}: weight {name} is not finite; use an earlier checkpoint, "
                             f"or train again with a lower --lr")


def pieces(model):
    """The modules that are compiled, or recomputed in the backward pass, one at a time: each Block,
    and each head that is not made of Blocks."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    heads = [module.head for module in model.modules() if isinstance(module, PatchDetailerHead)]
    return blocks + [head for head in heads
                     if not any(isinstance(module, Block) for module in head.modules())]


def compile_pieces(model):
    """torch.compile, one piece at a time: seconds a piece, where the whole takes minutes."""
    for module in pieces(model):
        module.forward = torch.compile(module.forward)


def keep_in_bf16(model):
    """Cast once the weights that autocast casts at every evaluation, all except last layers, which
    run in float32: the same bits in less time."""
    kinds = nn.Linear, nn.Conv2d, nn.ConvTranspose2d
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not name.endswith(LAST_LAYERS):
            module.bfloat16()


def imagenet_names():
    """{wnid: readable name} in the usual order of the 1000 classes, that of the sorted wnids."""
    lines = (Path(__file__).parent / "assets" / "imagenet_classes.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def find_class(query, classes, names):
    """Index of a class given by index, folder name or readable name."""
    def plain(name):
        return name.lower().replace("_", " ")

    found = {i for i, pair in enumerate(zip(classes, names)) if plain(query) in map(plain, pair)}
    if query.isdecimal() and int(query) < len(names):
        if found - {int(query)}:
            raise ValueError(f"--class {query} is the index of {classes[int(query)]!r}, and the "
                             f"name of class {min(found - {int(query)})}: give that index")
        return int(query)
    if len(found) == 1:
        return min(found)
    if found:
        several = ", ".join(map(str, sorted(found)))
        raise ValueError(f"--class {query!r} names several classes: {several}; give an index")
    if query.isdecimal():
        raise ValueError(f"--class {query}: this model has classes 0 to {len(names) - 1}")
    close = difflib.get_close_matches(plain(query), names, 3, 0.4) or names[:5]
    raise ValueError(f"--class {query!r} is unknown; near it: {', '.join(map(repr, close))}; "
                     f"or an index from 0 to {len(names) - 1}")


# -------------------------------------------------------------------------------------------------
# Processes and devices: one, or many under torchrun


@dataclass(frozen=True)
class Processes:
    """The processes of a command.  Every method is collective: all of them call it."""

    rank: int
    world: int
    device: torch.device

    def barrier(self):
        """Nobody goes on before everybody has arrived."""
        if self.world > 1:
            dist.barrier()

    def gather(self, thing):
        """Everybody's thing, by rank."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    def on_first(self, function, *arguments):
        """What rank 0, and rank 0 alone, gets from the function; its errors are raised by all."""
        result = error = None
        if self.rank == 0:
            try:
                result = function(*arguments)
            except Exception as found:
                error = found
        result, error = self.gather((result, error))[0]
        if error:
            raise error
        return result

    def reduce(self, tensor):
        """The sum over the ranks, in place, and returned."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def read(self, value, flag):
        """(value as a float, whether the flag is set on any rank), with one wait for the device."""
        flags = self.reduce(torch.tensor(float(bool(flag)), device=self.device))
        value, flags = torch.stack([value.float(), flags]).tolist()
        return value, flags > 0


def start_processes(device="auto"):
    """This process among its peers, and its device, after joining torchrun's group if any."""
    many = "RANK" in os.environ                              # under torchrun
    rank = int(os.environ["RANK"]) if many else 0
    world = int(os.environ["WORLD_SIZE"]) if many else 1
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()                 # fails if it is absent, or "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if many and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return Processes(rank, world, device)


# -------------------------------------------------------------------------------------------------
# Command line: a dataclass whose fields carry their help


def parse_options(cls, manual, argv=None):
    """Fill the dataclass from the command line; `--help` is one screen, grouped, with defaults."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=manual, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=112))
    types, group = typing.get_type_hints(cls), parser
    for field in dataclasses.fields(cls):
        settings, kind = dict(field.metadata), types[field.name]
        if "group" in settings:
            group = parser.add_argument_group(settings.pop("group"))
        kind = next(k for k in (typing.get_args(kind) or (kind,)) if k is not type(None))
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif kind is not tuple:
            settings["type"] = kind
        if kind is not bool and "choices" not in settings:
            settings.setdefault("metavar", kind.__name__.upper())
        if kind is not bool and field.default not in (None, ()):
            default = field.default if isinstance(field.default, tuple) else (field.default,)
            settings["help"] += f" [{' '.join(map(str, default))}]"
        flag = "--" + field.name.strip("_").replace("_", "-")
        group.add_argument(flag, dest=field.name, **settings)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty: an unset variable? Leave it "
                             f"out, or name it")
    return cls(**given)


def at_least(minimum, **values):
    """Refuse options that are below their minimum or not finite, by name; None is not given."""
    for name, value in values.items():
        if value is not None and not minimum <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {minimum} "
                             f"and finite")


def progress(items, what, **settings):
    """A progress bar, also where the terminal does not know its own width."""
    return tqdm(items, what, ncols=shutil.get_terminal_size().columns, **settings)


def explain(error):
    """The line that tells the user what to mend, or None for an error that nobody expected."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    from_loader = lines[0].startswith("Caught ")             # by a worker: its last line counts
    line = lines[-1].removeprefix("ValueError: ") if from_loader else lines[0]
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if exhausted or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "out of memory; a smaller --micro-batch (training) or --batch (sampling) helps"
    if isinstance(error, RuntimeError):
        lost = dist.is_initialized() and re.search("[Cc]onnection (closed|reset)", line)
        return "another process of this command has ended" if lost else None
    return line if isinstance(error, (ValueError, OSError, FloatingPointError)) else None


def run_main(main):
    """Run a command; what the user can mend ends in one line and exit code 1, no traceback."""
    torch.set_flush_denormal(True)           # on a CPU subnormal numbers make a step slow
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = explain(error)
        if line is None and not dist.is_initialized():
            raise
        if line is None:
            traceback.print_exc()
        traceback.clear_frames(error.__traceback__)          # frees the DataLoader: its workers end
        code = f"{Path(sys.argv[0]).name}: error: {line or 'unexpected, see above'}"
    if dist.is_initialized():        # leave at once: a group that has lost a member may hang in its
        if not code:                 # teardown, and gloo's threads may abort Python's
            dist.destroy_process_group()
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    run_main(main)
