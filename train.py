r"""
Train a DiP.

    python train.py                     # embedded shapes; on a CPU a small model, in minutes
    python train.py --data IMAGES       # IMAGES/train/<class>/*.jpg, or IMAGES/<class>/*.jpg
    torchrun --nproc_per_node=8 train.py --image-size 256 --data IMAGENET       # DiP-XL/16
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        train.py --image-size 256 --data IMAGENET

The same command resumes.  A run is a function of its options alone: example k of it draws image,
flip, time, noise and label dropout from (seed, k), whatever the processes, passes and workers.
A run writes ckpt-*.pt, log.jsonl, loss.png and samples-*.png into --out.  SIGTERM and Ctrl-C save
a checkpoint and end it; an update that is not finite is skipped; an unreadable image is replaced.
[CPU: ...] in the options below is the default without CUDA and --model.
"""

import copy
import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from dip import (PRESETS, REPA_WEIGHT, DiP, check_choice, cost, drop_labels, flow_matching_loss,
                 logit_normal_time)
from fid import ENDINGS, list_images, read_image
from sample import (at_least, autocast, draw_grid, generate, is_of_the_system, load_checkpoint,
                    newest_intact, option, parse_options, random_stream, run_main, save_atomically,
                    start_processes, to_uint8)

# -------------------------------------------------------------------------------------------------
# The embedded data: drawn, not downloaded.  A class is a shape that spans many patches, filled
# with a texture finer than a patch.  Every shape comes with two textures and every texture on two
# shapes, so neither the global structure nor the local detail alone tells the class.

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
    """Distance to the outline of a shape of radius about 1, negative inside.  x, y (H, W)"""
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
    """A field whose sign is the texture, of slope about 1.  p, q (H, W): phases across and down."""
    if texture == "striped":
        return np.sin((p + q) * 0.6)
    if texture == "checked":
        return 1.6 * np.sin(0.7 * p) * np.sin(0.7 * q)
    if texture == "dotted":
        return np.cos(0.85 * p) + np.cos(0.85 * q) - 0.55
    if texture == "zigzag":
        return np.sin(0.8 * q + 1.8 * np.arcsin(np.sin(0.45 * p)))
    return 1.8 * np.maximum(np.cos(0.85 * p), np.cos(0.85 * q)) - 1.1    # gridded


class ShapesData:
    """Ten classes of textured shapes, deterministic by index, at any resolution, antialiased."""

    pairs = [(SHAPES[k // 2], TEXTURES[(k // 2 + k % 2) % 5]) for k in range(10)]
    names = [f"{texture} {shape}" for shape, texture in pairs]
    classes = names
    flip = False
    bad = torch.zeros(0, dtype=torch.bool)                   # a drawing is never unreadable

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
        pixels = signed_distance(shape, x, y) * radius * self.size / 2
        inside = np.clip(0.5 - pixels, 0, 1)[..., None]
        p, q = (2 * np.pi * (4.5 * side + rng.uniform(-0.15, 0.15)) for side in (self.x, self.y))
        sharpness = self.size / 53                           # a soft edge of about one pixel
        ink = np.clip(0.5 + sharpness * texture_wave(texture, p, q), 0, 1)[..., None]
        picture = background + inside * (dark + ink * (light - dark) - background)
        return (picture + 0.5).astype(np.uint8), index % 10


# -------------------------------------------------------------------------------------------------
# The image folder


def imagenet_names():
    """{wnid: readable name} in the usual order of the 1000 classes, that of the sorted wnids."""
    lines = (Path(__file__).parent / "assets" / "imagenet_classes.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


class FolderData:
    """<root>/<class>/**/*.jpg: classes are the sorted folder names, labels their positions.

    An unreadable file is named in a warning, once, and the next readable one stands in for it.
    """

    flip = True

    def __init__(self, root, size):
        self.root, self.size = Path(root), size
        if not self.root.is_dir():
            raise ValueError(f"--data {root} is not a folder")
        self.files, self.labels, self.classes = [], [], []
        for folder in sorted(path for path in self.root.iterdir() if path.is_dir()):
            files = list_images(folder)
            if files:
                self.files += files
                self.labels += [len(self.classes)] * len(files)
                self.classes.append(folder.name)
        if not self.files:
            raise ValueError(f"--data {root} has no <class>/*.jpg below it; "
                             f"endings that are read: {' '.join(sorted(ENDINGS))}")
        known = imagenet_names()
        self.names = [known.get(name, name) for name in self.classes]
        self.bad = torch.zeros(len(self), dtype=torch.bool).share_memory_()      # with the workers

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        """uint8 (size, size, 3), label"""
        allowed = len(self) // 100
        for i in ((index + k) % len(self) for k in range(allowed + 1)):
            try:
                return read_image(self.files[i], self.size), self.labels[i]
            except Exception as error:
                if is_of_the_system(error):
                    raise
                if not self.bad[i]:
                    self.bad[i] = True
                    tqdm.write(f"warning: {self.files[i]}: unreadable ({error}); the next image "
                               f"stands in for it", file=sys.stderr)
        raise self.complaint(self.bad.nonzero().flatten().tolist())

    def complaint(self, bad):
        """The error that lists unreadable files, given their indices."""
        names = ", ".join(self.files[i] for i in sorted(bad)[:20])
        return ValueError(f"--data {self.root}: {len(bad)} of {len(self)} images unreadable, "
                          f"more than 1 %: {names}{', ...' if len(bad) > 20 else ''}")


def open_data(data, size):
    """(training set, validation set or None): DIR/train and DIR/val if there, else DIR itself."""
    if data is None:
        return ShapesData(size), ShapesData(size, 1000, first=10**6)
    train, val = Path(data) / "train", Path(data) / "val"
    if not train.is_dir():
        return FolderData(data, size), None
    training = FolderData(train, size)
    if not val.is_dir():
        return training, None
    validation = FolderData(val, size)
    if validation.classes != training.classes:
        raise ValueError(f"--data {data}: val/ and train/ have different classes")
    return training, validation


# -------------------------------------------------------------------------------------------------
# Examples: everything random in training, as a function of (seed, position in the run)


class Examples(Dataset):
    """Example k of a run: image, label, and the random numbers it is to be noised with."""

    def __init__(self, data, seed, purpose="train"):
        self.data, self.seed, self.purpose, self.epoch = data, seed, purpose, None

    def index(self, k):
        """Which image example k shows: every epoch is a new permutation."""
        epoch, place = divmod(k, len(self.data))
        if epoch != self.epoch:
            generator = random_stream(self.seed, self.purpose, "epoch", epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator)
        return int(self.order[place])

    def __getitem__(self, k):
        """x_0 (3, H, W) in [-1, 1], y (), noise (3, H, W), z () ~ N(0, 1) for the time, and
        u () ~ U(0, 1) for label dropout"""
        index, g = self.index(k), random_stream(self.seed, self.purpose, k)
        z, (u, coin) = torch.randn((), generator=g), torch.rand(2, generator=g)
        pixels, label = self.data[index]
        x_0 = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        if self.data.flip and self.purpose == "train" and coin < 0.5:
            x_0 = x_0.flip(-1)
        return x_0, label, torch.randn(x_0.shape, generator=g), z, u


def positions(first_step, last_step, batch, micro_batch, rank, world):
    """Step by step this rank's share of the global batch, one list of positions per micro-batch."""
    share = batch // world
    for step in range(first_step, last_step):
        start = step * batch + rank * share
        for k in range(start, start + share, micro_batch):
            yield list(range(k, k + micro_batch))


# -------------------------------------------------------------------------------------------------
# Options

PAPER = dict(image_size=256, steps=1_600_000, batch_size=256, lr=1e-4, warmup=0, cooldown=0.0,
             time_mean=0.0)                  # Table 4; steps: 320 epochs of ImageNet
LAPTOP = dict(image_size=48, steps=3500, batch_size=16, lr=3e-3, warmup=50, cooldown=0.3,
              time_mean=0.8)                 # minutes on two cores


@dataclass
class TrainOptions:
    data: str | None = option(None, "image folder [embedded shapes]", group="data", metavar="DIR")
    image_size: int | None = option(None, "height and width in pixels [256; CPU: 48]")
    workers: int | None = option(None, "loader processes [8 with CUDA and --data, else 0]")

    model: str | None = option(None, "preset of dip.py [DiP-XL/16; CPU: DiP-Nano/16]",
                               group="model", metavar="NAME")
    set: tuple = option((), "other DiPConfig fields, as head=mlp depth=4", nargs="+",
                        action="extend", metavar="FIELD=VALUE")
    repa: str | None = option(None, "align with this encoder, as dinov2_vitb14 [no REPA]",
                              metavar="ENCODER")
    repa_repo: str = option("facebookresearch/dinov2", "torch.hub repository of the encoder")
    repa_source: str = option("github", "local: --repa-repo is a folder",
                              choices=("github", "local"))

    steps: int | None = option(None, "updates [1600000; CPU: 3500]", group="training")
    batch_size: int | None = option(None, "images an update, over all processes [256; CPU: 16]")
    micro_batch: int | None = option(None, "images a pass and process; the rest accumulates [all]")
    lr: float | None = option(None, "AdamW's learning rate [1e-4; CPU: 3e-3]")
    warmup: int | None = option(None, "steps in which lr rises [0; CPU: 50]")
    cooldown: float | None = option(None, "last share of steps, in which lr falls [0; CPU: 0.3]")
    clip: float = option(1.0, "largest gradient norm; 0 = no limit")
    ema: float = option(0.9999, "decay of the averaged weights, reached by warm-up")
    time_mean: float | None = option(None, "mean of logit t, whose deviation is 1 [0; CPU: 0.8]")
    label_dropout: float = option(0.1, "share of labels hidden, for guidance")
    seed: int = option(0, "of weights, order and noise: the run is a function of it")

    out: str | None = option(None, "folder of the run [runs/MODEL-SIZE]", group="output",
                             metavar="DIR")
    log_every: int = option(50, "steps between lines of log.jsonl")
    sample_every: int = option(0, "steps between grids and validations; 0: five a run or 10000")
    save_every: int = option(0, "steps between checkpoints; 0: as --sample-every")
    keep: int = option(2, "newest checkpoints kept")

    device: str = option("auto", "auto, cpu, cuda, mps", group="machine")
    compile: bool = option(False, "torch.compile the model")
    grad_checkpoint: bool = option(False, "recompute activations: less memory, more time")


def configure(options, processes):
    """Fill in what the user left open; returns the DiPConfig, but for num_classes and repa_dim."""
    device, world = processes.device, processes.world
    laptop = device.type != "cuda" and options.model is None
    defaults = LAPTOP if laptop else PAPER
    if laptop and (options.image_size or 0) > 64:            # fewer images: steps stay short
        defaults = LAPTOP | {"batch_size": max(4, 16 * 64**2 // options.image_size**2)}
    if laptop and processes.rank == 0:
        print("no CUDA and no --model: a small model with settings for minutes, not the paper's")
    options.model = options.model or ("DiP-Nano/16" if laptop else "DiP-XL/16")
    check_choice("--model", options.model, PRESETS)
    for field, value in defaults.items():
        if getattr(options, field) is None:
            setattr(options, field, value)
    options.sample_every = options.sample_every or min(10_000, max(1, options.steps // 5))
    options.save_every = options.save_every or options.sample_every
    if options.workers is None:
        options.workers = 8 if device.type == "cuda" and options.data else 0
    at_least(1, steps=options.steps, batch_size=options.batch_size, image_size=options.image_size,
             log_every=options.log_every, save_every=options.save_every, keep=options.keep,
             sample_every=options.sample_every,
             micro_batch=1 if options.micro_batch is None else options.micro_batch)
    if options.micro_batch is None:
        options.micro_batch = max(1, options.batch_size // world)
    if options.batch_size % (world * options.micro_batch):
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of "
                         f"{world} processes x --micro-batch {options.micro_batch}")
    at_least(0, lr=options.lr, warmup=options.warmup, clip=options.clip, workers=options.workers,
             seed=options.seed)
    if not abs(options.time_mean) < 100 or options.seed >= 2**63:
        raise ValueError(f"--time-mean {options.time_mean}, --seed {options.seed}: out of range")
    for field in ("cooldown", "ema", "label_dropout"):
        if not 0 <= getattr(options, field) <= 1:
            name, value = field.replace("_", "-"), getattr(options, field)
            raise ValueError(f"--{name} {value} is a share: it must be from 0 to 1")
    config = PRESETS[options.model]
    fields = {field: type(value) for field, value in asdict(config).items()
              if field not in ("image_size", "num_classes", "repa_dim")}     # flag, data, encoder
    changes = {}
    for pair in options.set:
        field, _, value = pair.partition("=")
        check_choice("--set", field, fields)
        try:
            changes[field] = fields[field](value)
        except ValueError:
            raise ValueError(f"--set {pair}: {field} is a {fields[field].__name__}") from None
    config = config.replace(image_size=options.image_size, **changes)
    name = "-".join([options.model, *options.set, str(options.image_size)])
    options.out = options.out or "runs/" + re.sub(r"[^\w.-]+", "-", name)
    return config


# -------------------------------------------------------------------------------------------------
# Pieces of the loop


def learning_rate(options, step):
    """Linear up over `warmup` steps, constant, linear down over the last `cooldown` share."""
    up = (step + 1) / (options.warmup + 1)
    down = (options.steps - step) / (options.cooldown * options.steps + 1)
    return options.lr * min(1, up, down)


class Encoder:
    """REPA's frozen teacher: a vision transformer from torch.hub with the interface of DINOv2."""

    def __init__(self, name, repo, source, device):
        mean_and_std = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]    # ImageNet's, DINOv2
        self.mean, self.std = torch.tensor(mean_and_std, device=device)[:, :, None, None]
        try:
            net = torch.hub.load(repo, name, source=source)
            self.net = net.to(device).eval().requires_grad_(False)
            self.dim = self(torch.zeros(1, 3, 32, 32, device=device)).shape[1]
        except Exception as error:       # the repository's own code may raise anything
            raise ValueError(f"--repa {name}: cannot use it from {repo}: {error}") from None

    @torch.no_grad()
    def __call__(self, x_0):
        """x_0 (B, 3, H, W) in [-1, 1] -> (B, dim, h, w), one patch for 16 x 16 pixels (REPA)"""
        h, w = (max(1, round(side / 16)) for side in x_0.shape[-2:])
        P = self.net.patch_size
        x = F.interpolate((x_0 + 1) / 2, size=(h * P, w * P), mode="bicubic", antialias=True)
        tokens = self.net.forward_features((x - self.mean) / self.std)["x_norm_patchtokens"]
        return tokens.transpose(1, 2).unflatten(2, (h, w))


def checkpoint_activations(model):
    """Let the backward pass compute the inside of each block and of the head once more, instead of
    keeping it: the same gradients for less memory and more time."""
    for module in (*model.blocks, model.output):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)): a short run
    averages over about its last tenth."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)


TIME_BINS = 10           # of t, in which losses are logged
MAX_SKIPPED = 10         # updates in a row that may be not finite


def by_time(t, flow, repa):
    """Sums over the images whose t is in each tenth: of flow, of repa, of 1.  (B,) -> (3, 10)"""
    bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    values = torch.stack([flow, repa, torch.ones_like(flow)]).detach()
    return torch.zeros(3, TIME_BINS, device=t.device).index_add(1, bins, values)


def mean_losses(tally, prefix=""):
    """What by_time() added up as a line of the log: means over all images, and over each tenth."""
    flow, repa, count = tally.sum(1).tolist()
    tenths = [round(total / n, 6) if n else None for total, _, n in tally.T.tolist()]
    aligned = {f"{prefix}repa": repa / count} if repa else {}
    return {f"{prefix}loss": flow / count, **aligned, f"{prefix}loss_by_t": tenths}


@torch.no_grad()
def validate(model, examples, device, batch=50, limit=500):
    """Flow matching losses of `limit` fixed validation images and their fixed noise, by time."""
    tally, count = torch.zeros(3, TIME_BINS, device=device), min(limit, len(examples.data))
    for start in range(0, count, batch):
        chunk = [examples[k] for k in range(start, min(start + batch, count))]
        x_0, y, noise, z, _ = (x.to(device) for x in default_collate(chunk))
        t = logit_normal_time(z)
        with autocast(device):
            tally += by_time(t, *flow_matching_loss(model, x_0, y, t, noise))
    return tally


@contextmanager
def noted_signals():
    """Inside, SIGTERM and SIGINT are only written down: the loop ends itself at a whole step."""
    noted = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def spare(worker):
    """In a loader process: who is signalled along with its parent goes on serving it.  A second
    SIGTERM is the parent's own, at its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def saved(out, step):
    """The newest checkpoint up to a step, or None: a later one is broken, or resume() had it."""
    name = f"ckpt-{step:08d}.pt"
    return max((path for path in out.glob("ckpt-*.pt") if path.name <= name), default=None)


def write_checkpoint(out, keep, **state):
    """Save ckpt-<step>.pt whole or not at all, then drop the oldest beyond `keep`."""
    path = out / f"ckpt-{state['step']:08d}.pt"
    save_atomically(path, lambda partial: torch.save(state, partial))
    for old in sorted(old for old in out.glob("ckpt-*.pt") if old <= path)[:-keep]:
        old.unlink()


def write_samples(out, step, ema, names, seed):
    """A grid of the EMA's images, a class a row: samples-<step>.png"""
    count = min(10, len(names))
    classes = [k * len(names) // count for k in range(count)]            # evenly among many
    rows = [to_uint8(generate(ema, [c] * 5, range(5), seed, sampler="ab2", steps=20, cfg=2.0))
            for c in classes]
    picture = draw_grid(rows, [names[c] for c in classes])
    save_atomically(out / f"samples-{step:08d}.png", lambda path: picture.save(path, "PNG"))


def write_log(out, **line):
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())              # a later checkpoint must not outlive it


def read_log(out):
    """The lines of log.jsonl, but for those that a crash or a full disk cut short."""
    path, lines = out / "log.jsonl", []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def draw_loss_curve(out):
    """loss.png: the loss by step, and by time at the end; of training, and of the EMA held out."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (by_step, by_t) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines = read_log(out)
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation, EMA", "o-")):
        points = [(line["step"], line[key], line[f"{key}_by_t"]) for line in lines if key in line]
        if points:
            steps, losses, tenths = zip(*points)
            by_step.plot(steps, losses, style, label=label, markersize=3, linewidth=1)
            heights = np.array(tenths[-1], dtype=float)
            by_t.stairs(heights, np.linspace(0, 1, TIME_BINS + 1), label=label, baseline=None)
    by_step.set(xlabel="step", ylabel="flow matching loss, Eq. (5)", yscale="log")
    by_t.set(xlabel="t, from data to noise; at the last step", yscale="log")
    for axes in (by_step, by_t):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    save_atomically(out / "loss.png", lambda path: figure.savefig(path, format="png", dpi=120))
    plt.close(figure)


def resume(path, options, config, data, model, ema, optimizer, rank):
    """Put a checkpoint's state where it belongs; returns (steps already done, unlogged losses)."""
    state = load_checkpoint(path)
    old, new = state["config"], asdict(config)
    differ = [f"{key}={old.get(key)!r} there, {new[key]!r} here"
              for key in new if old.get(key) != new[key]]
    for field in ("seed", "batch_size", "time_mean", "label_dropout", "ema"):
        if state["options"].get(field) != getattr(options, field):
            differ.append(f"--{field.replace('_', '-')} {state['options'].get(field)} there, "
                          f"{getattr(options, field)} here")
    if state["classes"] != data.classes:
        differ.append("other classes")
    if state["images"] != len(data):         # another order of images
        differ.append(f"{state['images']} images there, {len(data)} here")
    if differ:
        raise ValueError(f"{path} is of another configuration ({'; '.join(differ)}); "
                         f"choose another --out")
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        moments = {**optimizer.state_dict(), "state": state["optimizer"]["state"]}
        optimizer.load_state_dict(moments)   # whose settings are the options'
        tally = torch.zeros(3, TIME_BINS).copy_(state["tally"] if rank == 0 else torch.zeros(()))
    except Exception as error:               # whatever a file from a stranger may raise
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} does not fit: {line}") from None
    for field in ("steps", "lr", "warmup", "cooldown", "clip", "data", "repa"):      # may change
        before, now = state["options"].get(field), getattr(options, field)
        if before != now and rank == 0:
            print(f"changed since the checkpoint: --{field} {before} -> {now}")
    if rank == 0:
        print(f"resumed at step {state['step']}")
    return state["step"], tally


def tidy(out, step):
    """Drop what a killed run left: half-written files, and log lines of steps to be run again."""
    for path in out.glob(".*.partial"):
        path.unlink()
    kept = [line for line in read_log(out) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    save_atomically(out / "log.jsonl", lambda path: path.write_text(text))


# -------------------------------------------------------------------------------------------------
# The run


def announce(options, config, data, processes):
    """The first lines: what is going to happen, and every setting."""
    parameters, flops = cost(config)
    world, passes = processes.world, options.batch_size // processes.world // options.micro_batch
    print(f"{options.model}: {parameters / 1e6:.2f} M weights, {flops / 1e9:.3g} GFLOPs a forward, "
          f"{processes.device}, {world} process{'es' * (world > 1)}")
    print(f"{options.data or 'embedded shapes'}: {len(data)} images of {options.image_size} x "
          f"{options.image_size} in {len(data.classes)} classes")
    print(f"{options.steps} steps of {options.batch_size} images in {passes} "
          f"pass{'es' * (passes > 1)}, into {options.out}")
    for kind, settings in (("options", options), ("config", config)):
        pairs = asdict(settings).items()
        print(f"{kind}: " + " ".join(f"{key}={value}" for key, value in pairs if value is not None))


def refuse_bad_files(data, processes):
    """End the run, on all ranks, if more than 1 % of the files turned out unreadable on any."""
    bad = set().union(*processes.gather(data.bad.nonzero().flatten().tolist()))
    if len(bad) > len(data) / 100:
        raise data.complaint(bad)


def show(out, step, ema, data, val_data, seed):
    """Validation loss into the log, a grid of samples, the loss curve."""
    if val_data:
        device = next(ema.parameters()).device
        losses = validate(ema, Examples(val_data, 0, "val"), device)
        write_log(out, step=step, **mean_losses(losses, "val_"))
    write_samples(out, step, ema, data.names, seed)
    draw_loss_curve(out)


def report_skipped(out, step, skipped, losses, processes):
    """Say where an update was not finite; end the run after too many in a row."""
    flow = processes.reduce(losses)[0].tolist()
    where = [f"{k / TIME_BINS:.1f} to {(k + 1) / TIME_BINS:.1f}" for k in range(TIME_BINS)
             if not np.isfinite(flow[k])]
    what = f"the loss for t in {', '.join(where)}" if where else "the gradient, and no loss,"
    if processes.rank == 0:
        tqdm.write(f"warning: step {step}: {what} is not finite: update skipped", file=sys.stderr)
        write_log(out, step=step, skipped=what)
    if skipped == MAX_SKIPPED:
        raise FloatingPointError(f"{skipped} updates in a row were not finite, the last at step "
                                 f"{step}: {what}; last good checkpoint: {saved(out, step)}; "
                                 f"try a lower --lr")


def begin(options, config, data, processes, build):
    """Model, its average and optimizer, steps done and unlogged losses: new, or from --out."""
    out, rank, device = Path(options.out), processes.rank, processes.device
    torch.manual_seed(options.seed)                          # the same weights on every rank
    model = build(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0, fused=True)
    first_step, tally = 0, torch.zeros(3, TIME_BINS)
    if path := processes.on_first(newest_intact, out, True):
        first_step, tally = resume(path, options, config, data, model, ema, optimizer, rank)
    if first_step >= options.steps:
        raise ValueError(f"{out} is already at step {first_step} of --steps {options.steps}; "
                         f"a larger --steps trains on")
    if rank == 0:
        tidy(out, first_step)
    return model, ema, optimizer, first_step, tally.to(device)


def load(options, data, processes, first_step):
    """This rank's passes through the rest of the run, as Examples describes them, on its device."""
    device = processes.device
    shares = positions(first_step, options.steps, options.batch_size, options.micro_batch,
                       processes.rank, processes.world)
    for batch in DataLoader(Examples(data, options.seed), batch_sampler=shares,
                            num_workers=options.workers, worker_init_fn=spare,
                            pin_memory=device.type == "cuda"):
        yield [x.to(device, non_blocking=True) for x in batch]


def fit(options, config, data, val_data, processes, encoder=None, signals=(), build=DiP, look=show):
    """Train from the newest checkpoint in --out, if any, to --steps, or until there is a signal.

    build(config) makes the fresh model; look(out, step, ema, data, val_data, seed) is what happens
    every --sample-every steps.  Returns the averaged model and the steps it has been trained for.
    """
    out, rank, world, device = Path(options.out), processes.rank, processes.world, processes.device
    model, ema, optimizer, first_step, tally = begin(options, config, data, processes, build)
    if options.grad_checkpoint:
        checkpoint_activations(model)
    net = torch.compile(model) if options.compile else model
    net = DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    batches, seconds, skipped = load(options, data, processes, first_step), [], 0
    passes = options.batch_size // (world * options.micro_batch)
    progress = tqdm(range(first_step, options.steps), initial=first_step, total=options.steps,
                    disable=rank > 0, unit="step", dynamic_ncols=True)
    for step in progress:
        start = time.time()
        lr = learning_rate(options, step)
        optimizer.param_groups[0]["lr"] = lr
        losses = torch.zeros_like(tally)
        for k in range(passes):
            x_0, y, noise, z, u = next(batches)
            y = drop_labels(y, u, config.num_classes, options.label_dropout)
            t = logit_normal_time(z, options.time_mean)
            early = world > 1 and k < passes - 1             # ranks meet in the last pass only
            with net.no_sync() if early else nullcontext():
                with autocast(device):
                    features = encoder(x_0) if encoder else None
                    flow, repa = flow_matching_loss(net, x_0, y, t, noise, features)
                ((flow + REPA_WEIGHT * repa).mean() / passes).backward()
            losses += by_time(t, flow, repa)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or float("inf"))
        if norm.isfinite():                                  # the same on all ranks
            optimizer.step()
            update_ema(ema, model, step, options.ema)
            tally, skipped = tally + losses, 0
        else:
            skipped += 1
            report_skipped(out, step + 1, skipped, losses, processes)
        optimizer.zero_grad()
        seconds.append(time.time() - start)

        done, last, stop = step + 1, step + 1 == options.steps, processes.any(signals)
        log, sample, save = (last or done % every == 0 for every in
                             (options.log_every, options.sample_every, options.save_every))
        save = last or (save or stop) and not skipped        # none but the last in a bad stretch
        if log or save:
            tally = processes.reduce(tally) * (rank == 0)    # rank 0 keeps what all have seen
        for part in filter(None, (data, val_data) if log else ()):
            refuse_bad_files(part, processes)
        if rank == 0 and log and tally.any():
            means, speed = mean_losses(tally), options.batch_size * len(seconds) / sum(seconds)
            write_log(out, step=done, **means, lr=lr, images_per_s=round(speed, 1),
                      grad_norm=None if skipped else norm.item())
            progress.set_postfix_str(f"loss {means['loss']:.4f}, {speed:.0f} images/s")
            tally, seconds = torch.zeros_like(tally), []
        if rank == 0 and sample:
            look(out, done, ema, data, val_data, options.seed)
        if rank == 0 and save:
            write_checkpoint(
                out, options.keep, model=model.state_dict(), ema=ema.state_dict(),
                optimizer=optimizer.state_dict(), step=done, tally=tally, config=asdict(config),
                options=asdict(options), images=len(data), classes=data.classes, names=data.names)
        if stop:
            processes.barrier()                              # nobody leaves before it is saved
            break
    return ema, done


def main():
    options = parse_options(TrainOptions, __doc__)
    processes = start_processes(options.device)
    config = configure(options, processes)
    data, val_data = open_data(options.data, options.image_size)
    encoder = None
    if options.repa:                             # one process a node fills the cache of torch.hub
        waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
        if waits:
            processes.barrier()
        encoder = Encoder(options.repa, options.repa_repo, options.repa_source, processes.device)
        if not waits:
            processes.barrier()
    config = config.replace(num_classes=len(data.classes), repa_dim=encoder.dim if encoder else 0)
    if processes.rank == 0:
        announce(options, config, data, processes)
    with noted_signals() as signals:
        _, done = fit(options, config, data, val_data, processes, encoder, signals)
    if done < options.steps:
        if processes.rank == 0:
            print(f"stopped by a signal after step {done}; the same command goes on from "
                  f"{saved(Path(options.out), done) or 'the beginning'}")
        return 128 + max(signals, default=signal.SIGTERM)    # as a shell counts
    if processes.rank == 0:
        print(f"done: look at {options.out}/samples-{done:08d}.png and {options.out}/loss.png; "
              f'next:\n    python sample.py --class "{data.names[0]}"')


if __name__ == "__main__":
    run_main(main)
