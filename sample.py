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

import difflib
import json
import math
import shutil
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import (OUR_WEIGHTS, at_least, autocast, compile_pieces, find_checkpoint, in_one_line,
                    keep_in_bf16, load_model, option, parse_options, progress, random_stream,
                    run_main, save_atomically, start_processes, write_weights)
from dip import check_multiple

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
    cfg: float = option(2.9, "guidance scale of Appendix C; 1 = off")
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
        if self.save_weights and not self.ema:
            raise ValueError("--save-weights keeps the averaged weights; leave out --no-ema")
        if self.out and not self.num_samples and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"--out {self.out} must end in .png; an .npz needs --num-samples")

    def settings(self):
        """What generate() needs to know."""
        return dict(seed=self.seed, size=self.size or None, sampler=self.sampler, steps=self.steps,
                    cfg=self.cfg, interval=tuple(self.interval), shift=self.time_shift)


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


def free_name(path):
    """The path, or the first of path-2, path-3, ... that is not taken."""
    path, k = Path(path), 1
    name = path
    while name.exists():
        k += 1
        name = path.with_stem(f"{path.stem}-{k}")
    return name


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


if __name__ == "__main__":
    run_main(main)
