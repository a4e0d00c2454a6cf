r"""
Train a DiP.

    python train.py                     # embedded shapes; on a CPU a small model, in minutes
    python train.py --data IMAGES       # IMAGES/train/<class>/*.jpg, or IMAGES/<class>/*.jpg
    torchrun --nproc_per_node=8 train.py --image-size 256 --data IMAGENET       # DiP-XL/16
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        train.py --image-size 256 --data IMAGENET

The same command resumes.  A run is a function of its options alone: example k of it draws image,
flip, time, noise and label dropout from (seed, k), whatever the processes, passes and workers.
A run writes ckpt-*.pt, log.jsonl, loss.png and samples-*.png into --out.
[CPU: ...] in the options below is the default without CUDA and --model.
"""

import copy
import dataclasses
import json
import os
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from dip import (PRESETS, REPA_WEIGHT, DiP, check_choice, cost, drop_labels, flow_matching_loss,
                 logit_normal_time)
from sample import (at_least, autocast, draw_grid, generate, load_checkpoint, option,
                    parse_options, random_stream, run_main, save_atomically, start_processes,
                    to_uint8)

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

    def __init__(self, size, length=50_000, first=0):
        self.size, self.length, self.first = size, length, first
        side = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
        self.x, self.y = np.meshgrid(side, side)

    def __len__(self):
        return self.length

    def label(self, index):
        return index % 10

    def image(self, index):
        """uint8 (size, size, 3)"""
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
        return (picture + 0.5).astype(np.uint8)


# -------------------------------------------------------------------------------------------------
# The image folder

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def center_crop(image, size):
    """ADM's crop: halve by boxes while twice too large, bicubic to the size, cut out the centre.

    Pillow image of any size -> (size, size).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def imagenet_names():
    """{wnid: readable name} in the usual order of the 1000 classes, that of the sorted wnids."""
    lines = (Path(__file__).parent / "assets" / "imagenet_classes.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


class FolderData:
    """<root>/<class>/**/*.jpg: classes are the sorted folder names, labels their positions."""

    flip = True

    def __init__(self, root, size):
        root, self.size = Path(root), size
        if not root.is_dir():
            raise ValueError(f"--data {root} is not a folder")
        self.files, self.labels, self.classes = [], [], []
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
            if files:
                self.files += map(str, files)
                self.labels += [len(self.classes)] * len(files)
                self.classes.append(folder.name)
        if not self.files:
            raise ValueError(f"--data {root} has no <class>/*.jpg below it; "
                             f"endings that are read: {' '.join(sorted(ENDINGS))}")
        known = imagenet_names()
        self.names = [known.get(name, name) for name in self.classes]

    def __len__(self):
        return len(self.files)

    def label(self, index):
        return self.labels[index]

    def image(self, index):
        """uint8 (size, size, 3)"""
        try:
            with Image.open(self.files[index]) as image:
                return np.array(center_crop(image.convert("RGB"), self.size))
        except Exception as error:       # Pillow's plugins raise nearly anything on a broken file
            raise ValueError(f"{self.files[index]}: unreadable image ({error})") from None


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
        x_0 = torch.from_numpy(self.data.image(index)).permute(2, 0, 1).float() / 127.5 - 1
        if self.data.flip and self.purpose == "train" and coin < 0.5:
            x_0 = x_0.flip(-1)
        return x_0, self.data.label(index), torch.randn(x_0.shape, generator=g), z, u


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


def configure(options, device, rank=0):
    """Fill in what the user left open; returns the DiPConfig, but for num_classes and repa_dim."""
    laptop = device.type != "cuda" and options.model is None
    defaults = LAPTOP if laptop else PAPER
    if laptop and (options.image_size or 0) > 64:            # fewer images: steps stay short
        defaults = LAPTOP | {"batch_size": max(4, 16 * 64**2 // options.image_size**2)}
    if laptop and rank == 0:
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
    at_least(0, lr=options.lr, warmup=options.warmup, clip=options.clip)
    for field in ("cooldown", "ema", "label_dropout"):
        if not 0 <= getattr(options, field) <= 1:
            name, value = field.replace("_", "-"), getattr(options, field)
            raise ValueError(f"--{name} {value} is a share: it must be from 0 to 1")
    config = PRESETS[options.model]
    fields = {field: type(value) for field, value in dataclasses.asdict(config).items()
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


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)): a short run
    averages over about its last tenth."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)


@torch.no_grad()
def validate(model, examples, device, batch=50, limit=500):
    """Mean flow matching loss over `limit` fixed validation images and their fixed noise."""
    total, count = 0.0, min(limit, len(examples.data))
    for start in range(0, count, batch):
        chunk = [examples[k] for k in range(start, min(start + batch, count))]
        x_0, y, noise, z, _ = (x.to(device) for x in default_collate(chunk))
        with autocast(device):
            total += flow_matching_loss(model, x_0, y, logit_normal_time(z), noise)[0].sum().item()
    return total / count


def write_checkpoint(out, keep, **state):
    """Save ckpt-<step>.pt whole or not at all, then drop the oldest beyond `keep`."""
    save_atomically(out / f"ckpt-{state['step']:08d}.pt", lambda path: torch.save(state, path))
    for old in sorted(out.glob("ckpt-*.pt"))[:-keep]:
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


def read_log(out):
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_loss_curve(out):
    """loss.png: training loss and validation loss of the EMA by step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = read_log(out)
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation, EMA", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="flow matching loss, Eq. (5)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_atomically(out / "loss.png", lambda path: figure.savefig(path, format="png", dpi=120))
    plt.close(figure)


def resume(out, options, config, data, model, ema, optimizer, rank):
    """Load the newest checkpoint of the run, if any; returns the number of steps already done."""
    path = max(out.glob("ckpt-*.pt"), default=None)
    if path is None:
        return 0
    state = load_checkpoint(path)
    old, new = state["config"], dataclasses.asdict(config)
    differ = [f"{key}={old.get(key)!r} there, {new[key]!r} here"
              for key in new if old.get(key) != new[key]]
    for field in ("seed", "batch_size", "time_mean", "label_dropout", "ema"):
        if state["options"].get(field) != getattr(options, field):
            differ.append(f"--{field.replace('_', '-')} {state['options'].get(field)} there, "
                          f"{getattr(options, field)} here")
    if state["classes"] != data.classes:
        differ.append("other classes")
    if differ:
        raise ValueError(f"{path} is of another configuration ({'; '.join(differ)}); "
                         f"choose another --out")
    for field in ("steps", "lr", "warmup", "cooldown", "clip", "data", "repa"):      # may change
        before, now = state["options"].get(field), getattr(options, field)
        if before != now and rank == 0:
            print(f"changed since the checkpoint: --{field} {before} -> {now}")
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit: {str(error).splitlines()[0]}") from None
    if rank == 0:
        print(f"resumed at step {state['step']}")
    return state["step"]


def trim_log(out, step):
    """Drop the lines after `step`: those steps will be run again."""
    kept = [line for line in read_log(out) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    save_atomically(out / "log.jsonl", lambda path: path.write_text(text))


# -------------------------------------------------------------------------------------------------
# The run


def announce(options, config, data, device, world, accumulation):
    """The first lines: what is going to happen, and every setting."""
    parameters, flops = cost(config)
    print(f"{options.model}: {parameters / 1e6:.2f} M weights, {flops / 1e9:.3g} GFLOPs a forward, "
          f"{device}, {world} process{'es' * (world > 1)}")
    print(f"{options.data or 'embedded shapes'}: {len(data)} images of {options.image_size} x "
          f"{options.image_size} in {len(data.classes)} classes")
    print(f"{options.steps} steps of {options.batch_size} images in {accumulation} "
          f"pass{'es' * (accumulation > 1)}, into {options.out}")
    for kind, settings in (("options", options), ("config", config)):
        pairs = dataclasses.asdict(settings).items()
        print(f"{kind}: " + " ".join(f"{key}={value}" for key, value in pairs if value is not None))


def main():
    options = parse_options(TrainOptions, __doc__)
    rank, world, device = start_processes(options.device)
    config = configure(options, device, rank)
    out = Path(options.out)

    micro_batch = max(1, options.batch_size // world if options.micro_batch is None
                      else options.micro_batch)
    accumulation = options.batch_size // (world * micro_batch)
    if options.batch_size % (world * micro_batch):
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of "
                         f"{world} processes x --micro-batch {micro_batch}")

    data, val_data = open_data(options.data, options.image_size)
    encoder = None
    if options.repa:                             # one process a node fills the cache of torch.hub
        waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
        if waits:
            dist.barrier()
        encoder = Encoder(options.repa, options.repa_repo, options.repa_source, device)
        if world > 1 and not waits:
            dist.barrier()
    config = config.replace(num_classes=len(data.classes), repa_dim=encoder.dim if encoder else 0)
    if rank == 0:
        announce(options, config, data, device, world, accumulation)

    torch.manual_seed(options.seed)                          # the same weights on every rank
    model = DiP(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0, fused=True)
    first_step = resume(out, options, config, data, model, ema, optimizer, rank)
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, first_step)
        if len(set(steps)) > 1:
            raise ValueError(f"--out {out} is not the same folder for all processes: steps {steps}")
    if first_step >= options.steps:
        raise ValueError(f"{out} is already at step {first_step} of --steps {options.steps}; "
                         f"a larger --steps trains on")
    if rank == 0:
        trim_log(out, first_step)
    net = torch.compile(model) if options.compile else model
    net = DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net

    shares = positions(first_step, options.steps, options.batch_size, micro_batch, rank, world)
    batches = iter(DataLoader(Examples(data, options.seed), batch_sampler=shares,
                              num_workers=options.workers, pin_memory=device.type == "cuda"))
    progress = tqdm(range(first_step, options.steps), initial=first_step, total=options.steps,
                    disable=rank > 0, unit="step", dynamic_ncols=True)
    sums, since = torch.zeros(3, device=device), time.time()     # of flow, of repa, of passes
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        for k in range(accumulation):
            x_0, y, noise, z, u = (x.to(device, non_blocking=True) for x in next(batches))
            y = drop_labels(y, u, config.num_classes, options.label_dropout)
            t = logit_normal_time(z, options.time_mean)
            early = world > 1 and k < accumulation - 1           # ranks meet in the last pass only
            with net.no_sync() if early else nullcontext():
                with autocast(device):
                    features = encoder(x_0) if encoder else None
                    flow, repa = flow_matching_loss(net, x_0, y, t, noise, features)
                ((flow + REPA_WEIGHT * repa).mean() / accumulation).backward()
            sums += torch.stack([flow.mean(), repa.mean(), torch.ones_like(flow[0])]).detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, step, options.ema)

        done, last = step + 1, step + 1 == options.steps
        if last or done % options.log_every == 0:
            if world > 1:
                dist.all_reduce(sums)
            if rank == 0:
                flow, repa, passes = sums.tolist()
                speed = passes * micro_batch / (time.time() - since)
                write_log(out, step=done, loss=flow / passes, repa=repa / passes, lr=group["lr"],
                          grad_norm=norm.item(), images_per_s=round(speed, 1))
                progress.set_postfix_str(f"loss {flow / passes:.4f}, {speed:.0f} images/s")
            sums, since = torch.zeros_like(sums), time.time()
        if rank == 0 and (last or done % options.sample_every == 0):
            pause = time.time()
            if val_data:
                loss = validate(ema, Examples(val_data, 0, "val"), device)
                write_log(out, step=done, val_loss=loss)
            write_samples(out, done, ema, data.names, options.seed)
            draw_loss_curve(out)
            since += time.time() - pause
        if rank == 0 and (last or done % options.save_every == 0):
            write_checkpoint(
                out, options.keep, model=model.state_dict(), ema=ema.state_dict(),
                optimizer=optimizer.state_dict(), step=done, config=dataclasses.asdict(config),
                classes=data.classes, names=data.names, options=dataclasses.asdict(options))

    if rank == 0:
        print(f"done: look at {out}/samples-{options.steps:08d}.png and {out}/loss.png; next:\n"
              f'    python sample.py --class "{data.names[0]}"')


if __name__ == "__main__":
    run_main(main)
