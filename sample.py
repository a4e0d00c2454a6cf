"""
Draw images with a trained DiP.

    python sample.py --class 1                              # newest run under runs/, class by index
    python sample.py --class "striped disc" 7 --num 8 --cfg 2.5 --seed 3
    python sample.py --class 1 --trajectory                 # what the model believes as t falls
    python sample.py --num-samples 50000 --out samples.npz  # for fid.py: uint8 NHWC, label i mod K
    torchrun --nproc_per_node=8 sample.py --num-samples 50000 --out samples.npz

Samplers are plain functions of a velocity field: they know nothing of images, models or guidance.
Picture i depends on (seed, i, class) alone, never on the batch size or the number of GPUs.
"""

import argparse
import dataclasses
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import traceback
import typing
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dip import DiP, DiPConfig, check_multiple

# -------------------------------------------------------------------------------------------------
# Samplers.  Each integrates dx/dt = velocity(x, t) from x at t = 1 down to t = 0.


def time_grid(steps, shift=1.0):
    """`steps + 1` times from 1 to 0; shift > 1 spends more of them near noise (SD3's shift)."""
    even = (k / steps for k in range(steps, -1, -1))
    return [shift * t / (shift * t + (1 - t)) for t in even]


def euler(velocity, x, steps, shift=1.0):
    """Order 1, one evaluation a step: the paper's sampler, with 100 steps (Table 4)."""
    for t, s in pairwise(time_grid(steps, shift)):
        x = x + (s - t) * velocity(x, t)
    return x


def heun(velocity, x, steps, shift=1.0):
    """Order 2, two evaluations a step: the mean of the slopes at both ends."""
    for t, s in pairwise(time_grid(steps, shift)):
        here = velocity(x, t)
        there = velocity(x + (s - t) * here, s)
        x = x + (s - t) * (here + there) / 2
    return x


def adams_bashforth(velocity, x, steps, shift=1.0):
    """Order 2, one evaluation a step: extrapolates the slope from the step before."""
    before = None
    for t, s in pairwise(time_grid(steps, shift)):
        here, h = velocity(x, t), s - t
        slope = here if before is None else here + h / (2 * h_before) * (here - before)
        x = x + h * slope
        before, h_before = here, h
    return x


def euler_maruyama(velocity, x, steps, shift=1.0, noise=None):
    """The reverse SDE with the same marginals as the ODE and diffusion coefficient w(t) = t:

        dx = [v - w/2 score] dt + sqrt(w) dW,    score = -eps_hat / t,    eps_hat = x + (1 - t) v

    Order 1 in law, one evaluation a step.  The last step, to t = 0, adds no noise.
    `noise()` draws a standard normal like x.
    """
    noise = noise or (lambda: torch.randn_like(x))
    for t, s in pairwise(time_grid(steps, shift)):
        v, h = velocity(x, t), t - s
        if s > 0:
            eps_hat = x + (1 - t) * v
            x = x - h * (v + eps_hat / 2) + math.sqrt(t * h) * noise()
        else:
            x = x - h * v
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
        T = torch.full((len(x),), t, device=x.device)
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return model(x, T, y)
        v_y, v_0 = model(x.repeat(2, 1, 1, 1), T.repeat(2), torch.cat([y, null])).chunk(2)
        return v_0 + scale * (v_y - v_0)

    return velocity


# -------------------------------------------------------------------------------------------------
# From labels to images


def random_stream(*key):
    """A CPU generator that is a function of its key alone: of (seed, what for, index), never of
    rank, batch size or number of workers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def autocast(device):
    """bf16 for the network where the device has it; the ODE state stays float32 outside of it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def generate(model, labels, indices, seed=0, size=None, sampler="euler", steps=100,
             cfg=1.0, interval=(0.0, 1.0), shift=1.0, watch=None):
    """Images for `labels`; image k is drawn from the randomness of (seed, indices[k]) alone.

    labels, indices: sequences of B ints -> float (B, 3, H, W) on the model's device.
    `watch(t, x)`, if given, is shown the predicted clean images x_t - t v at every evaluation.
    """
    device = next(model.parameters()).device
    H, W = size or (model.config.image_size, model.config.image_size)
    streams = [random_stream(seed, "sample", int(i)) for i in indices]

    def noise():
        return torch.stack([torch.randn(3, H, W, generator=g) for g in streams]).to(device)

    field = guided(model, torch.tensor(labels, device=device), cfg, interval)

    def velocity(x, t):
        with autocast(device):
            v = field(x, t)
        if watch:
            watch(t, x - t * v)
        return v

    own = {"noise": noise} if sampler == "sde" else {}
    return SAMPLERS[sampler](velocity, noise(), steps, shift, **own)


def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded"""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# -------------------------------------------------------------------------------------------------
# Pictures


def draw_grid(rows, labels, headers=None, cell=96):
    """A picture of rows of images, a label before each row and, if given, a header on each column.

    rows: list of uint8 arrays (columns, H, W, 3).  Images smaller than `cell` pixels are enlarged
    by a whole factor, without smoothing.
    """
    H, W = rows[0].shape[1:3]
    zoom, gap = max(1, round(cell / max(H, W))), 4
    font = ImageFont.load_default(size=15)
    left = 2 * gap + max(round(font.getlength(label)) for label in labels) + gap
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


# -------------------------------------------------------------------------------------------------
# Checkpoints: a dict of builtins and tensors, so that weights_only=True can open it

CHECKPOINT = {"model": dict, "ema": dict, "optimizer": dict, "step": int, "tally": torch.Tensor,
              "config": dict, "images": int, "classes": list, "names": list, "options": dict}


def is_of_the_system(error):
    """Whether reading failed for a reason that is not in the file, and may pass."""
    passing = errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in passing


def load_checkpoint(path, verify=False):
    """The dict that train.py saved, its tensors mapped from the file.  Runs no code from it.

    verify: also hold every byte against the checksums in the file, as nothing else does.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}; `python train.py` makes one under runs/")
    try:
        damaged = zipfile.ZipFile(path).testzip() if verify else None
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        wrong = [key for key, kind in CHECKPOINT.items() if not isinstance(state.get(key), kind)]
    except Exception as error:       # a hostile or broken file may fail anywhere inside the reader
        if is_of_the_system(error):
            raise
        kind = type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of train.py, or not all of it is there "
                         f"({kind})") from None
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} in it does not have its checksum")
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {', '.join(wrong)}")
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
        except ValueError as error:
            print(f"warning: {error}; passed over")
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} is intact")


def find_checkpoint(given=None):
    """Path of a checkpoint: the file given, or the newest below the folder given or runs/."""
    path = Path(given or "runs")
    if given and not path.is_dir():
        return path
    newest = max(path.glob("**/ckpt-*.pt"), key=lambda found: found.stat().st_mtime, default=None)
    if newest is None:
        raise FileNotFoundError(f"no checkpoint under {path}/; `python train.py` makes one")
    return newest_intact(newest.parent)


def load_model(path, device, ema=True):
    """(model in eval mode, checkpoint dict without its weights)"""
    state = load_checkpoint(path)
    weights, labels = state["ema" if ema else "model"], state["classes"] + state["names"]
    try:
        config = DiPConfig(**state["config"])
        if config.depth > len(weights):                      # before a hostile depth is built
            raise ValueError(f"{len(weights)} weights for a depth of {config.depth}")
        if len(labels) != 2 * config.num_classes or not all(isinstance(x, str) for x in labels):
            raise ValueError(f"classes and names are not {config.num_classes} texts each")
        model = DiP(config).to(device).eval()
        model.load_state_dict(weights)
    except Exception as error:       # whatever a configuration from a stranger may raise
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: weights and configuration disagree: {line}") from None
    del state["model"], state["ema"], state["optimizer"]
    return model.requires_grad_(False), state


def find_class(query, classes, names):
    """Index of a class given by index, folder name or readable name."""
    def plain(name):
        return name.lower().replace("_", " ")

    found = {i for i, pair in enumerate(zip(classes, names)) if plain(query) in map(plain, pair)}
    if query.isdigit():
        if int(query) >= len(names):
            raise ValueError(f"--class {query}: this model has classes 0 to {len(names) - 1}")
        if found - {int(query)}:
            raise ValueError(f"--class {query} is the index of {classes[int(query)]!r}, and the "
                             f"name of class {min(found - {int(query)})}: give that index")
        return int(query)
    if len(found) == 1:
        return min(found)
    if found:
        several = ", ".join(map(str, sorted(found)))
        raise ValueError(f"--class {query!r} names several classes: {several}; give an index")
    close = difflib.get_close_matches(plain(query), names, 3, 0.4) or names[:5]
    raise ValueError(f"--class {query!r} is unknown; near it: {', '.join(map(repr, close))}; "
                     f"or an index from 0 to {len(names) - 1}")


# -------------------------------------------------------------------------------------------------
# Processes and devices: one, or many under torchrun


@dataclass(frozen=True)
class Processes:
    """The processes of a command.  All of them call a method together; one alone need not wait."""

    rank: int
    world: int
    device: torch.device

    def barrier(self):
        """Nobody goes on before everybody is here."""
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
            except (ValueError, OSError) as found:
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

    def any(self, flag):
        """True for all of them if it is for any."""
        return self.reduce(torch.tensor(float(bool(flag)), device=self.device)).item() > 0


def start_processes(device="auto"):
    """This process among its peers, and its device, after joining torchrun's group if any."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world, device)


# -------------------------------------------------------------------------------------------------
# Command line: a dataclass whose fields carry their help


def option(default, help, **settings):
    """A dataclass field that is also a command line option; `group` starts a group of options."""
    return dataclasses.field(default=default, metadata={"help": help, **settings})


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
    return cls(**vars(parser.parse_args(argv)))


def at_least(minimum, **values):
    """Refuse numbers below their minimum, naming the option."""
    for name, value in values.items():
        if not value >= minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")


def run_main(main):
    """Run a command; what the user can mend ends in one line and exit code 1, no traceback."""
    try:
        code = main()
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        line = lines[-1 if lines[0].startswith("Caught ") else 0]    # from a loader process
        line = line.removeprefix("ValueError: ")
        if isinstance(error, MemoryError) or re.search("out of memory|t allocate memory", line):
            line = "out of memory; a smaller --micro-batch (training) or --batch (sampling) helps"
        elif isinstance(error, RuntimeError):
            if not (dist.is_initialized() and re.search("[Cc]onnection (closed|reset)", line)):
                raise
            line = "another process of this command has ended"
        traceback.clear_frames(error.__traceback__)          # loader processes end with their frame
        sys.exit(f"{Path(sys.argv[0]).name}: error: {line}")
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)          # gloo's threads sometimes abort an interpreter that shuts down
    sys.exit(code)


@dataclass
class SampleOptions:
    ckpt: str | None = option(None, "checkpoint, or folder of a run [newest under runs/]",
                              group="model", metavar="PATH")
    ema: bool = option(True, "the averaged weights [--ema], or the last ones")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")

    class_: tuple = option((), "classes by index or name [all, ten at most]",
                           group="what to draw", nargs="+", metavar="CLASS")
    num: int = option(8, "images per class")
    size: tuple = option((), "another height and width in pixels [as trained]",
                         nargs=2, type=int, metavar=("H", "W"))
    seed: int = option(0, "picture i depends on (seed, i, class) alone")
    out: str | None = option(None, "file to write [samples.png; samples.npz with --num-samples]",
                             metavar="FILE")
    trajectory: bool = option(False, "also a strip of predicted clean images as t falls")

    sampler: str = option("euler", "integrator", group="how to draw", choices=tuple(SAMPLERS))
    steps: int = option(100, "steps from t = 1 to t = 0")
    cfg: float = option(2.9, "guidance scale, 1 = off; Appendix C:")
    interval: tuple = option((0.03, 0.89), "guidance acts for t in it; paper: 1 - t in 0.11 0.97",
                             nargs=2, type=float, metavar=("LOW", "HIGH"))
    time_shift: float = option(1.0, "> 1 spends more steps near noise")
    batch: int = option(32, "images at a time, per process")

    num_samples: int = option(0, "export this many images, label i mod K; resumable",
                              group="evaluation")

    def __post_init__(self):
        at_least(1, num=self.num, steps=self.steps, batch=self.batch)
        at_least(0, num_samples=self.num_samples, cfg=self.cfg)
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"--interval {low} {high} must have 0 <= LOW <= HIGH <= 1")
        if not self.time_shift > 0:
            raise ValueError(f"--time-shift {self.time_shift} must be above 0")

    def settings(self):
        """What generate() needs to know."""
        return dict(seed=self.seed, size=self.size or None, sampler=self.sampler, steps=self.steps,
                    cfg=self.cfg, interval=tuple(self.interval), shift=self.time_shift)


# -------------------------------------------------------------------------------------------------
# The two things to do: a grid to look at, an .npz to measure


def sample_grid(model, names, options):
    """Rows of images, one class after another; those of a column share their noise."""
    labels = [c for c in options.class_ for _ in range(options.num)]
    indices = [j for _ in options.class_ for j in range(options.num)]
    seen, images = [], []
    for start in tqdm(range(0, len(labels), options.batch), "sampling", unit="batch"):
        part = slice(start, start + options.batch)
        first = options.trajectory and start == 0
        watch = (lambda t, x: seen.append((t, x[:1].clone()))) if first else None
        x = generate(model, labels[part], indices[part], **options.settings(), watch=watch)
        images.append(to_uint8(x))
    images = np.concatenate(images)
    columns = min(options.num, 10)
    rows, captions = [], []
    for k, c in enumerate(options.class_):
        for j in range(0, options.num, columns):
            start = k * options.num + j
            rows.append(images[start:start + min(columns, options.num - j)])
            captions.append(names[c] if j == 0 else "")
    out = Path(options.out or "samples.png")
    save_atomically(out, lambda path: draw_grid(rows, captions).save(path, "PNG"))
    print(f"wrote {out}: {len(images)} images, {', '.join(names[c] for c in options.class_)}")
    if options.trajectory:
        seen = list({t: x for t, x in seen}.items())         # Heun passes most times twice
        last = len(seen) - 1                                 # most happens near noise: squares
        chosen = [seen[k] for k in sorted({round(last * (j / 9) ** 2) for j in range(10)})]
        strip = to_uint8(torch.cat([x for _, x in chosen]))
        headers = [f"t={t:.2f}" for t, _ in chosen]
        path = out.with_name(out.stem + "-trajectory.png")
        sheet = draw_grid([strip], [names[labels[0]]], headers)
        save_atomically(path, lambda partial: sheet.save(partial, "PNG"))
        print(f"wrote {path}: the predicted clean image of the first sample, from noise to data")


def export(model, options, processes):
    """`--num-samples` images with label i mod K as uint8 NHWC `arr_0`, labels `arr_1`.

    The work is cut into batches of fixed composition, dealt to the ranks in turn, each saved when
    done: the same command goes on where it was stopped, and the ranks do not matter.
    """
    rank, world = processes.rank, processes.world
    N, K, out = options.num_samples, model.config.num_classes, Path(options.out or "samples.npz")
    if out.suffix != ".npz":
        raise ValueError(f"--out {out} must end in .npz with --num-samples")
    if out.exists():
        raise ValueError(f"--out {out} is there already; delete it, or choose another name")
    parts = out.with_name(out.name + ".parts")
    recipe = {**options.settings(), "num_samples": N, "batch": options.batch, "ema": options.ema,
              "ckpt": options.ckpt, "saved": Path(options.ckpt).stat().st_mtime}
    recipe = json.loads(json.dumps(recipe))                  # as read back: tuples become lists
    note = parts / "recipe.json"
    if rank == 0 and not note.exists():
        shutil.rmtree(parts, ignore_errors=True)
        save_atomically(note, lambda path: path.write_text(json.dumps(recipe)))
    processes.barrier()
    if read_recipe(note) != recipe:
        raise ValueError(f"{parts} holds a half-done export with other settings; "
                         f"delete it, or choose another --out")
    batches = [range(i, min(i + options.batch, N)) for i in range(0, N, options.batch)]
    files = [parts / f"{indices[0]:08d}.npy" for indices in batches]
    todo = processes.on_first(lambda: [(indices, file) for indices, file in zip(batches, files)
                                       if not file.exists()])
    if rank == 0 and len(todo) < len(files):
        print(f"continuing: {len(files) - len(todo)} of {len(files)} batches are already drawn")
    for indices, file in tqdm(todo[rank::world], "exporting", unit="batch", disable=rank > 0):
        x = generate(model, [i % K for i in indices], indices, **options.settings())
        save_atomically(file, lambda path: save_part(path, to_uint8(x)))
    processes.barrier()
    if rank == 0:
        size = options.size or [model.config.image_size] * 2
        shape = (N, *size, 3)
        parts_of = [(file, (len(indices), *size, 3)) for indices, file in zip(batches, files)]
        save_atomically(out, lambda path: write_npz(path, parts_of, shape, np.arange(N) % K))
        shutil.rmtree(parts)
        print(f"wrote {out}: arr_0 uint8 {shape}, {K} classes in turn")


def read_recipe(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged; delete {path.parent}, and draw again") from None


def save_part(path, images):
    with open(path, "wb") as file:
        np.save(file, images)


def read_part(path, shape):
    """uint8 of the shape (B, H, W, 3)"""
    try:
        images = np.load(path, allow_pickle=False)
        if images.dtype == np.uint8 and images.shape == shape:
            return images
    except Exception:                # numpy's reader raises nearly anything on a broken file
        pass
    raise ValueError(f"{path} is damaged; delete it, and the same command draws it again")


def write_npz(path, files, shape, labels):
    """An uncompressed .npz made from parts, (file, shape) each, with one in memory at a time."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for file, part in files:
                member.write(read_part(file, part).tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels.astype(np.int64))


def main():
    options = parse_options(SampleOptions, __doc__)
    processes = start_processes(options.device)
    options.ckpt = str(processes.on_first(find_checkpoint, options.ckpt))
    if options.num_samples and options.class_:
        raise ValueError("--num-samples takes the classes in turn; leave out --class")
    model, state = load_model(options.ckpt, processes.device, options.ema)
    for side in options.size:
        check_multiple("--size", side, model.config.patch_size, "patch_size")
    names = state["names"]
    options.class_ = [find_class(query, state["classes"], names) for query in options.class_]
    if processes.rank == 0:
        print(f"{options.ckpt}: step {state['step']}, {'EMA' if options.ema else 'last'} weights; "
              f"{options.sampler}, {options.steps} steps, cfg {options.cfg} for t in "
              f"{list(options.interval)}, seed {options.seed}")
    if options.num_samples:
        export(model, options, processes)
    elif processes.rank == 0:
        options.class_ = options.class_ or list(range(len(names)))[:10]
        sample_grid(model, names, options)


if __name__ == "__main__":
    run_main(main)
