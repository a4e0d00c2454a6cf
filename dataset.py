"""
What training is fed with: examples, image folders, the features of REPA, the embedded shapes.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import imagenet_names, is_of_the_system, random_stream
from fid import ENDINGS, list_images, read_image

# -------------------------------------------------------------------------------------------------
# Examples: order, flip, time, noise and label dropout as a function of (seed, position in the run)


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
        """uint8 (H, W, 3), label, z () ~ N(0, 1) for the time, u () ~ U(0, 1) for label dropout,
        and k, from which the noise is drawn on the device: it need not leave a loader process"""
        index, g = self.index(k), random_stream(self.seed, self.purpose, k)
        z, (u, coin) = torch.randn((), generator=g), torch.rand(2, generator=g)
        pixels, label = self.data[index]
        if self.data.flip and self.purpose == "train" and coin < 0.5:
            pixels = pixels[:, ::-1].copy()
        return pixels, label, z, u, k

    def on_device(self, batch, device):
        """x_0 (B, 3, H, W) in [-1, 1], y (B,), noise (B, 3, H, W), z (B,), u (B,) of a batch; the
        noise of example k is drawn on the device from (seed, k)."""
        pixels, y, z, u, positions = batch
        pixels, y, z, u = (x.to(device, non_blocking=True) for x in (pixels, y, z, u))
        x_0 = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.empty(x_0.shape, device=device)        # contiguous, as x_0 is not
        for row, k in zip(noise, positions.tolist()):
            row.normal_(generator=random_stream(self.seed, self.purpose, k, "noise", device=device))
        return x_0, y, noise, z, u


def micro_batches(options, first_step, rank, world):
    """This rank's part of every global batch: lists of positions, one per micro-batch."""
    part = options.batch_size // world
    for step in range(first_step, options.steps):
        start = step * options.batch_size + rank * part
        for k in range(start, start + part, options.micro_batch):
            yield list(range(k, k + options.micro_batch))


def load_examples(options, data, processes, first_step):
    """This rank's micro-batches of the rest of the run, as on_device() describes them."""
    examples, device = Examples(data, options.seed), processes.device
    sampler = micro_batches(options, first_step, processes.rank, processes.world)
    for batch in DataLoader(examples, batch_sampler=sampler, num_workers=options.workers,
                            worker_init_fn=outlive_signals, pin_memory=device.type == "cuda"):
        yield examples.on_device(batch, device)


def outlive_signals(worker):
    """In a loader process.  A signal to the whole process group must not end it before the step is
    done: it ignores Ctrl-C and one SIGTERM; the DataLoader ends it with another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


# -------------------------------------------------------------------------------------------------
# The image folder

SPLITS = "train", "val", "test"


class FolderData:
    """<root>/<class>/**/*.jpg: classes are the sorted folder names, labels their positions; or
    <root>/*.jpg, one class.

    An unreadable file is named in a warning, once, and the next readable one stands in for it; more
    than 1 % of them are an error.
    """

    flip = True

    def __init__(self, root, size):
        self.root, self.size = Path(root), size
        if not self.root.is_dir():
            raise ValueError(f"--data {root} is not a folder")
        inside = sorted(path for path in self.root.iterdir() if path.name[0] != ".")
        files = {path.name: list_images(path) for path in inside if path.is_dir()}
        loose = [str(path) for path in inside if path.suffix.lower() in ENDINGS]
        empty = [name for name in files if not files[name]]
        if not loose and len(empty) == len(files):
            raise ValueError(f"--data {root} has no images below it; "
                             f"endings that are read: {' '.join(sorted(ENDINGS))}")
        if loose and files:
            raise ValueError(f"--data {root} has images beside class folders: {loose[0]}, "
                             f"{next(iter(files))}/; move one or the other")
        if empty:
            raise ValueError(f"--data {root}: class folders without images: "
                             f"{', '.join(empty[:5])}; remove them, they would shift the labels")
        if loose:                            # no classes: unconditional training
            named = self.root.resolve()      # DIR/train and DIR/val are both of class DIR
            files = {(named.parent if named.name in SPLITS else named).name: loose}
        self.classes = list(files)
        self.files = [file for name in files for file in files[name]]
        self.labels = [label for label, name in enumerate(files) for _ in files[name]]
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
        raise self.too_many_bad(self.bad.nonzero().flatten().tolist())

    def too_many_bad(self, bad):
        """The error that lists unreadable files, given their indices."""
        names = ", ".join(self.files[i] for i in sorted(bad)[:20])
        return ValueError(f"--data {self.root}: {len(bad)} of {len(self)} images unreadable, "
                          f"more than 1 %: {names}{', ...' if len(bad) > 20 else ''}")


def refuse_bad_files(datasets, processes):
    """End the run, on all ranks, if more than 1 % of the files turned out unreadable on any."""
    for data in filter(None, datasets):
        bad = set().union(*processes.gather(data.bad.nonzero().flatten().tolist()))
        if len(bad) > len(data) / 100:
            raise data.too_many_bad(bad)


def open_data(data, size):
    """(training set, validation set or None): DIR/train and DIR/val if there, else DIR itself."""
    if data is None:
        return ShapesData(size), ShapesData(size, 1000, first=10**6)
    train, val = Path(data) / "train", Path(data) / "val"
    if not train.is_dir():
        if val.is_dir():
            raise ValueError(f"--data {data} has val/ but no train/; give {val} itself to train "
                             f"on it")
        return FolderData(data, size), None
    others = sorted(path.name for path in Path(data).iterdir()
                    if path.is_dir() and path.name[0] != "." and path.name not in SPLITS)
    if others:
        raise ValueError(f"--data {data} has train/ beside {', '.join(others[:3])}: a class or "
                         f"a split? Rename it, or move the others")
    training = FolderData(train, size)
    if not val.is_dir():
        return training, None
    validation = FolderData(val, size)
    if differ := sorted(set(validation.classes) ^ set(training.classes)):
        raise ValueError(f"--data {data}: val/ and train/ have different classes; in one of them "
                         f"only: {', '.join(differ[:5])}{', ...' if len(differ) > 5 else ''}")
    return training, validation


# -------------------------------------------------------------------------------------------------
# REPA's targets


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
        """x_0 (B, 3, H, W) in [-1, 1] -> (B, dim, h, w): one feature for 16 x 16 pixels"""
        h, w = (max(1, round(side / 16)) for side in x_0.shape[-2:])
        P = self.net.patch_size
        x = F.interpolate((x_0 + 1) / 2, size=(h * P, w * P), mode="bicubic", antialias=True)
        tokens = self.net.forward_features((x - self.mean) / self.std)["x_norm_patchtokens"]
        return tokens.transpose(1, 2).unflatten(2, (h, w))


def load_encoder(options, processes):
    """The encoder of --repa or None; one process a node fills the cache of torch.hub."""
    if not options.repa:
        return None
    waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits:
        processes.barrier()
    encoder = Encoder(options.repa, options.repa_repo, options.repa_source, processes.device)
    if not waits:
        processes.barrier()
    return encoder


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
        distance = signed_distance(shape, x, y) * radius * self.size / 2     # in pixels
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        p, q = (2 * np.pi * (4.5 * axis + rng.uniform(-0.15, 0.15)) for axis in (self.x, self.y))
        sharpness = self.size / 53                           # a soft edge of about one pixel
        ink = np.clip(0.5 + sharpness * texture_wave(texture, p, q), 0, 1)[..., None]
        picture = background + inside * (dark + ink * (light - dark) - background)
        return (picture + 0.5).astype(np.uint8), index % 10
