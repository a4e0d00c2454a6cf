"""
FID, sFID, Inception Score, Precision and Recall, as OpenAI's evaluator of ADM computes them.

    python fid.py REFERENCE SAMPLES
    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz --json result.json
    python fid.py IMAGES --crop 256 --save-stats reference.npz      # a reference of your own
    torchrun --nproc_per_node=8 fid.py REFERENCE SAMPLES            # the same numbers, sooner

Each side is a folder of images, an .npz of images (`arr_0`, uint8 (N, H, W, 3)), or an .npz of
statistics (`mu`, `sigma` of the pool features, `mu_s`, `sigma_s` of the spatial ones), perhaps with
images too.  As in ADM's evaluator, FID and sFID use a file's statistics where it has them, and
precision and recall its images.

This file needs torch, numpy, Pillow and tqdm and nothing else of this repository: copy it.  It
follows guided-diffusion/evaluations/evaluator.py; `ADM` marks what one would not guess.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# -------------------------------------------------------------------------------------------------
# The metrics, on arrays


def as_gaussian(mu, sigma):
    """mu (d,), sigma (d, d) as float64 tensors.  Raises ValueError unless they are a mean and a
    covariance: symmetric, without negative eigenvalues, up to rounding to float32."""
    mu, sigma = (torch.as_tensor(np.asarray(x, dtype=np.float64)) for x in (mu, sigma))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(f"mean {tuple(mu.shape)} and covariance {tuple(sigma.shape)} are not of "
                         f"shapes (d,) and (d, d)")
    if not mu.isfinite().all() or not sigma.isfinite().all():
        raise ValueError("mean or covariance is not finite")
    rounding = len(mu) * torch.finfo(torch.float32).eps * sigma.abs().max()
    if (sigma - sigma.T).abs().max() > rounding:
        raise ValueError("the covariance is not symmetric")
    shifted = sigma + rounding * torch.eye(len(mu))          # Cholesky is cheap: try it first
    if torch.linalg.cholesky_ex(shifted)[1] and torch.linalg.eigvalsh(sigma)[0] < -rounding:
        raise ValueError("the covariance has a negative eigenvalue")
    return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    S1 S2 has the eigenvalues of the symmetric A^T S2 A for any A with A A^T = S1.  A is S1's
    Cholesky factor or, where S1 is singular, comes from its eigenvectors.  So nothing becomes
    complex, and nothing is added to a diagonal.  mu (d,), sigma (d, d) -> float, at least 0
    """
    mu1, sigma1 = as_gaussian(mu1, sigma1)
    mu2, sigma2 = as_gaussian(mu2, sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"Gaussians in {len(mu1)} and {len(mu2)} dimensions have no distance")
    A, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        values, vectors = torch.linalg.eigh(sigma1)
        kept = values > values.max() * len(mu1) * torch.finfo(torch.float64).eps
        A = vectors[:, kept] * values[kept].sqrt()           # (d, rank)
    root = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root
    return max(0.0, distance.item())


def inception_score(probs, split=5000):
    """exp of the mean KL divergence from p(class | image) to p(class), in chunks of `split` images;
    returns the mean of the chunks (ADM: the last may be short, and counts like the rest).
    probs (N, K), rows summing to 1 -> float from 1 to K"""
    scores = []
    for p in torch.as_tensor(probs).split(split):
        p = p.double()
        entropy = -torch.special.xlogy(p, p).sum(dim=1).mean()
        mean = p.mean(dim=0)
        scores.append((-torch.special.xlogy(mean, mean).sum() - entropy).exp().item())
    return float(np.mean(scores))


def squared_distances(a, b, half=False):
    """a (M, d), b (N, d) -> (M, N).  half: as TensorFlow computes them in float16 (ADM)."""
    if half:
        u, v = a.half(), b.half()
        product = (u.float() @ v.float().T).half()           # sums in float32, rounded once
        D = u.square().sum(1)[:, None] - 2 * product + v.square().sum(1)
        if D.isfinite().all():
            return D.clamp(min=0).float()                    # else all in float32 (ADM)
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def precision_recall(real, fake, k=3, half=False, block=1000):
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    Precision is the fraction of fake points in a ball around some real point, recall that of real
    points in a ball around some fake one; a ball reaches to the k-th nearest neighbour in its own
    set.  real (N, d), fake (M, d) -> two floats.  half: with ADM's float16 rounding.  Takes `block`
    rows at a time: 200 MB in float32 for 50,000 points.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on both sides, not "
                         f"{len(real)} and {len(fake)}")

    def radii(x):                                            # the nearest is the point itself
        return torch.cat([squared_distances(rows, x, half).topk(k + 1, largest=False)[0][:, k]
                          for rows in x.split(block)])

    real_radii, fake_radii = radii(real), radii(fake)
    inside, covered = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, row_radii in zip(fake.split(block), fake_radii.split(block)):
        D = squared_distances(rows, real, half)
        inside.append((D <= real_radii).any(dim=1))
        covered |= (D <= row_radii[:, None]).any(dim=0)
    return int(torch.cat(inside).sum()) / len(fake), int(covered.sum()) / len(real)


# -------------------------------------------------------------------------------------------------
# The network: Inception v3 of 2015, TensorFlow's graph as ported to PyTorch, 1008 classes


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize: pixel i is read at i * scale, without a half-pixel offset,
    and without averaging when it shrinks (ADM).  x float (B, H, W, C) -> (B, size, size, C)"""
    for axis in (2, 1):                                      # along rows, then along columns
        n = x.shape[axis]
        position = torch.arange(size, device=x.device) * torch.tensor(n / size).float()
        low = position.long()
        fraction = (position - low).view((-1, 1, 1) if axis == 1 else (-1, 1))
        a, b = (x.index_select(axis, i) for i in (low, (low + 1).clamp(max=n - 1)))
        x = a + (b - a) * fraction
    return x


class Conv(nn.Module):
    """Convolution, batch norm, ReLU.  Keeps the size, unless it has a stride or is "valid"."""

    def __init__(self, i, o, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.ModuleDict):
    """Modules side by side on one input; their outputs are concatenated."""

    def __init__(self, **branches):
        super().__init__({name: nn.Sequential(*chain) for name, chain in branches.items()})

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], dim=1)


def average():
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)                # ADM


def mixed_a(i, pooled):
    return Branches(
        branch1x1=[Conv(i, 64, 1)],
        branch5x5=[Conv(i, 48, 1), Conv(48, 64, 5)],
        branch3x3dbl=[Conv(i, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)],
        branch_pool=[average(), Conv(i, pooled, 1)])


def mixed_b(i):
    return Branches(
        branch3x3=[Conv(i, 384, 3, stride=2)],
        branch3x3dbl=[Conv(i, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, stride=2)],
        branch_pool=[nn.MaxPool2d(3, stride=2)])


def mixed_c(i, C):
    return Branches(
        branch1x1=[Conv(i, 192, 1)],
        branch7x7=[Conv(i, C, 1), Conv(C, C, (1, 7)), Conv(C, 192, (7, 1))],
        branch7x7dbl=[Conv(i, C, 1), Conv(C, C, (7, 1)), Conv(C, C, (1, 7)), Conv(C, C, (7, 1)),
                      Conv(C, 192, (1, 7))],
        branch_pool=[average(), Conv(i, 192, 1)])


def mixed_d(i):
    return Branches(
        branch3x3=[Conv(i, 192, 1), Conv(192, 320, 3, stride=2)],
        branch7x7x3=[Conv(i, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)),
                     Conv(192, 192, 3, stride=2)],
        branch_pool=[nn.MaxPool2d(3, stride=2)])


def mixed_e(i, pool):
    def fork():
        return Branches(a=[Conv(384, 384, (1, 3))], b=[Conv(384, 384, (3, 1))])

    return Branches(
        branch1x1=[Conv(i, 320, 1)],
        branch3x3=[Conv(i, 384, 1), fork()],
        branch3x3dbl=[Conv(i, 448, 1), Conv(448, 384, 3), fork()],
        branch_pool=[pool, Conv(i, 192, 1)])


class InceptionV3(nn.Module):
    """uint8 images -> what ADM's evaluator reads off the graph."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = mixed_b(288)
        self.Mixed_6b = mixed_c(768, 128)
        self.Mixed_6c = mixed_c(768, 160)
        self.Mixed_6d = mixed_c(768, 160)
        self.Mixed_6e = mixed_c(768, 192)
        self.Mixed_7a = mixed_d(768)
        self.Mixed_7b = mixed_e(1280, average())
        self.Mixed_7c = mixed_e(2048, nn.MaxPool2d(3, stride=1, padding=1))              # ADM
        self.fc = nn.Linear(2048, 1008)
        self.shrink = nn.MaxPool2d(3, stride=2)

    def forward(self, images):
        """uint8 (B, H, W, 3) -> pool (B, 2048), spatial (B, 2023), probabilities (B, 1008)"""
        x = (resize_tf1(images.float()) - 128) / 128                     # (B, 299, 299, 3)
        x = x.permute(0, 3, 1, 2)                                        # channels_last in memory
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))        # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.shrink(x)))               # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.shrink(x))))          # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))        # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                # ADM: H, W, then C
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))        # (B, 2048, 8, 8)
        pool = x.mean(dim=(2, 3))
        return pool, spatial, (pool @ self.fc.weight.T).softmax(dim=1)   # ADM: without its bias


def our_name(name):
    """Of a weight in the public file: layer k of a branch ends in _k there, arms of a fork in _ka
    and _kb, as in Mixed_7b.branch3x3_2a.conv.weight."""
    name = re.sub(r"_(\d)([ab]?)\.(conv|bn)", lambda m: f".{int(m[1]) - 1}.{m[2]}.0.{m[3]}" if m[2]
                  else f".{int(m[1]) - 1}.{m[3]}", name)
    return re.sub(r"(branch1x1|Mixed_6a.branch3x3|branch_pool)\.(conv|bn)", lambda m: (
        f"{m[1]}.{int(m[1] == 'branch_pool')}.{m[2]}"), name)


def load_inception(path=None, any_weights=False):
    """(network in eval mode, SHA-256 of its weights): the file given, or the public one, which is
    fetched once into torch hub's cache.  Other weights are refused unless `any_weights`."""
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256)
            except Exception as error:
                raise OSError(f"cannot fetch {WEIGHTS_URL} ({error}); fetch it elsewhere, and give "
                              f"it with --inception FILE") from None
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256 and not any_weights:
        raise ValueError(f"--inception {path} has SHA-256 {digest[:12]}..., not ADM's "
                         f"{WEIGHTS_SHA256[:12]}...; --any-weights takes it, for other numbers")
    net = InceptionV3()
    with in_one_line(f"--inception {path} is not a file of the network's weights"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({our_name(name): weight for name, weight in weights.items()})
    return net.eval().requires_grad_(False), digest


# -------------------------------------------------------------------------------------------------
# Images.  train.py reads its folders with the same three functions.

ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp"}
Image.MAX_IMAGE_PIXELS = None                # read_image() has a limit of its own,
MAX_PIXELS = 180_000_000                     # twice Pillow's: 0.5 GB as RGB


def list_images(folder):
    """Sorted paths of all images below a folder.  Hidden files and folders are left out, linked
    folders are followed once, and errors are raised.  Says how many other files there are."""
    def refuse(error):
        raise error

    images, others, seen = [], Counter(), set()
    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if os.path.realpath(path) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(path))
        for name in sorted(names):
            ending = Path(name).suffix.lower()
            if ending in ENDINGS and name[0] != ".":
                images.append(os.path.join(path, name))
            elif name[0] != ".":
                others[ending or "no ending"] += 1
    if others and int(os.environ.get("RANK", 0)) == 0:
        found = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        print(f"note: {folder}: read {len(images)} images and skipped other files: {found}")
    return sorted(images)


def read_image(path, crop=None):
    """uint8 (H, W, 3) of an image file, upright by its EXIF, transparency over white; with `crop`,
    (crop, crop, 3).  A broken file may raise nearly any exception."""
    with Image.open(path) as image:
        if crop and math.prod(image.size) > MAX_PIXELS // 2:         # JPEG: decode fewer pixels
            image.draft("RGB", [2 * crop * side // min(image.size) for side in image.size])
        if math.prod(image.size) > MAX_PIXELS or crop and (
                max(image.size) / min(image.size) * crop**2 > MAX_PIXELS):
            raise ValueError(f"{image.width} x {image.height} pixels would need gigabytes")
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:                    # broken EXIF says nothing of the image
            pass
        if image.mode == "F" or image.mode.startswith("I"):
            image = eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return np.array(center_crop(image, crop) if crop else image)


def eight_bits(image):
    """The upper 8 bits of a 16-bit grey image.  Raises ValueError where the range is unknown."""
    grey = np.asarray(image)
    highest = grey.max()
    if image.mode == "F" or not (highest == 0 or 2**12 <= highest < 2**16):
        raise ValueError(f"mode {image.mode} with values up to {highest}: not 16 bits; save it as "
                         f"8 bits")
    opaque = grey != image.info.get("transparency", -1)
    return Image.fromarray(np.where(opaque, grey >> 8, 255).astype(np.uint8))


def center_crop(image, size):
    """ADM's crop: halve by boxes while twice too large, bicubic to the size, cut out the centre.
    Pillow image of any size -> (size, size)"""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class FolderImages:
    """All images below a folder, by name."""

    def __init__(self, path, crop=None):
        self.path, self.crop, self.files = path, crop, list_images(path)
        if not self.files:
            raise ValueError(f"{path} holds no images ({' '.join(sorted(ENDINGS))})")
        self.size = self.read(self.files[0]).shape[:2]

    def __len__(self):
        return len(self.files)

    def read(self, file):
        with in_one_line(f"{file}: unreadable image"):
            return read_image(file, self.crop)

    def batches(self, batch, rank, world):
        """This rank's batches, every world-th: uint8 (B, H, W, 3)"""
        with ThreadPoolExecutor() as threads:
            for start in range(rank * batch, len(self), world * batch):
                files = self.files[start:start + batch]
                images = list(threads.map(self.read, files))
                for file, image in zip(files, images):
                    if image.shape[:2] != self.size:
                        sizes = " and ".join(f"{w} x {h}" for h, w in (image.shape[:2], self.size))
                        raise ValueError(f"{file} and {self.files[0]} are of different sizes, "
                                         f"{sizes}; --crop SIZE makes them one")
                yield np.stack(images)


class NpzImages:
    """`arr_0` of an .npz, streamed: it is never in memory as a whole."""

    def __init__(self, path):
        self.path = path
        with self.member() as (file, shape, dtype, stored):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or math.prod(shape) != stored:
                raise ValueError(f"{stored} bytes of {dtype} {shape}, where images are uint8 "
                                 f"(N, H, W, 3)")
            self.n, self.size = shape[0], shape[1:3]

    def __len__(self):
        return self.n

    @contextmanager
    def member(self):
        """(open file of the array's bytes, shape, dtype, number of bytes)"""
        with (in_one_line(f"{self.path}: arr_0 cannot be read"),
              zipfile.ZipFile(self.path) as archive):
            with archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if fortran:
                    raise ValueError("it is in Fortran's order; save it in C's")
                yield file, shape, dtype, archive.getinfo("arr_0.npy").file_size - file.tell()

    def batches(self, batch, rank, world):
        """This rank's batches, every world-th: uint8 (B, H, W, 3)"""
        with self.member() as (file, *_):
            for b, start in enumerate(range(0, self.n, batch)):
                count = min(batch, self.n - start)
                data = file.read(count * math.prod(self.size) * 3)
                if b % world == rank:
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.size, 3)


# -------------------------------------------------------------------------------------------------
# One side of the comparison


class Moments:
    """Mean and covariance of features that come in batches, in float64."""

    def __init__(self, d):
        self.n = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(d, dtype=torch.float64)
        self.products = torch.zeros(d, d, dtype=torch.float64)

    def add(self, x):
        """x (B, d)"""
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(dim=0)
        self.products += x.T @ x

    def finish(self):
        """mu (d,), sigma (d, d), of the features of all ranks"""
        for x in (self.n, self.sum, self.products):
            dist.all_reduce(x)
        mu = self.sum / self.n
        return mu.numpy(), ((self.products - self.n * mu.outer(mu)) / (self.n - 1)).numpy()


def gather_batches(batches):
    """All ranks' batches in the order of the images, on rank 0; elsewhere None."""
    ranks = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(batches, ranks)
    if ranks:
        return torch.cat([ranks[b % len(ranks)][b // len(ranks)]
                          for b in range(sum(map(len, ranks)))])


STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


class Side:
    """Reference or samples: statistics, images, and once measured, features of the images.

    n: the number of images behind the statistics; extractor: the SHA-256 of the network.  Either is
    None where a file of statistics does not say it.
    """

    def __init__(self, path, crop=None):
        self.path, self.statistics, self.images = str(path), None, None
        self.n = self.extractor = None
        if not self.path or not Path(path).exists():
            raise FileNotFoundError(f"no file or folder at '{path}'")
        if Path(path).is_dir():
            self.images = FolderImages(path, crop)
        else:
            self.open_npz(path)
        if self.images and len(self.images) < 4:
            raise ValueError(f"{path} holds {len(self.images)} images; precision and recall need "
                             f"four, a comparison 50,000")
        if self.images and not self.statistics:
            self.n = len(self.images)

    def open_npz(self, path):
        with in_one_line(f"{path} is not an .npz of images or of statistics"):
            with np.load(path, allow_pickle=False) as file:
                found = {key: file[key] for key in STATISTICS if key in file}
                if "n" in file:
                    self.n = int(file["n"])
                if "extractor_sha256" in file:
                    self.extractor = str(file["extractor_sha256"]) or None
                if "arr_0" not in file and not found:
                    raise ValueError(f"neither arr_0 nor mu, but {', '.join(file)[:100]}")
                has_images = "arr_0" in file
            shapes = {key: x.shape for key, x in found.items()}
            if found and shapes != STATISTICS:
                raise ValueError(f"statistics of shapes {shapes}, not {STATISTICS}")
            if self.n is not None and self.n < 2:
                raise ValueError(f"n is {self.n}, and a covariance needs 2 images")
            if found:
                as_gaussian(found["mu"], found["sigma"])
                as_gaussian(found["mu_s"], found["sigma_s"])
                self.statistics = found
        if has_images:
            self.images = NpzImages(path)

    def measure(self, net, batch, device):
        """Run the images through the network; leaves pool, probs and statistics on rank 0."""
        rank, world = dist.get_rank(), dist.get_world_size()
        pools, probs, moments = [], [], [Moments(*STATISTICS[key]) for key in ("mu", "mu_s")]
        with tqdm(total=len(self.images), desc=Path(self.path).name, unit="image",
                  disable=rank > 0) as bar:
            for images in self.images.batches(batch, rank, world):
                features = net(torch.tensor(images).to(device))
                pool, spatial, p = (x.float().cpu() for x in features)
                moments[0].add(pool)
                moments[1].add(spatial)
                pools.append(pool)
                probs.append(p)
                bar.update(min(world * len(images), bar.total - bar.n))
        self.pool, self.probs = gather_batches(pools), gather_batches(probs)
        (mu, sigma), (mu_s, sigma_s) = (m.finish() for m in moments)
        self.statistics = self.statistics or dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)

    def __str__(self):
        parts = []
        if self.images:
            H, W = self.images.size
            parts.append(f"{len(self.images)} images of {W} x {H}")
        if self.statistics and (not self.images or self.n != len(self.images)):
            parts.append(f"statistics of {self.n or 'an unknown number of'} images")
        return f"{self.path}: {', '.join(parts)}"


# -------------------------------------------------------------------------------------------------
# The comparison


def common_extractor(sides, digest=None):
    """SHA-256 of the network behind the features of all sides, None where none is known.

    digest: that of the network which measures the images.  Raises ValueError for two networks: no
    distance between their features means anything.
    """
    known = {digest: "--inception"} if digest else {}
    for side in sides:
        if side.images and not side.statistics:
            side.extractor = digest
        if side.extractor:
            known[side.extractor] = side.path
    if len(known) > 1:
        made = " and ".join(f"{path} with {sha[:12]}..." for sha, path in known.items())
        raise ValueError(f"features of different networks, {made}; measure both sides with one")
    return next(iter(known), None)


def compare(reference, samples, half=True, device="cpu"):
    """{metric: value} of two measured sides, with the names of ADM's evaluator."""
    a, b = reference.statistics, samples.statistics
    result = {}
    if samples.images:
        result["Inception Score"] = inception_score(samples.probs)
    result["FID"] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    result["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
    if reference.images and samples.images:
        pools = (side.pool.to(device) for side in (reference, samples))
        result["Precision"], result["Recall"] = precision_recall(*pools, half=half)
    return result


def caveats(reference, samples, options, extractor):
    """Why the numbers may not be compared with published ones."""
    both = bool(reference.images and samples.images)
    files = getattr(samples.images, "files", ())
    found = {
        "the network's weights are not ADM's": extractor not in (None, WEIGHTS_SHA256),
        f"n = {samples.n} samples, not 50,000: FID is larger the fewer there are":
            samples.n is not None and samples.n < 50_000,
        "statistics without images: no precision, no recall": not both,
        "reference and samples differ in size":
            both and reference.images.size != samples.images.size,
        "precision and recall are in float32, ADM's are in float16": options.pr_dtype == "float",
        f"--crop {options.crop}: images of folders were resized here": options.crop,
        "samples are JPEG: its artefacts are measured too":
            any(file.lower().endswith((".jpg", ".jpeg", ".jfif")) for file in files),
    }
    for name, side in (("reference", reference), ("samples", samples)):
        found |= {
            f"{name}: the file of statistics does not name its network": side.extractor is None,
            f"{name}: statistics of an unknown number of images": side.n is None,
            f"{name}: n = {side.n} < 2048, the covariance is singular": (side.n or 2048) < 2048}
    if samples.images and len(samples.images) > 5000:
        order = torch.randperm(len(samples.probs), generator=torch.Generator().manual_seed(0))
        ordered, mixed = inception_score(samples.probs), inception_score(samples.probs[order])
        found[f"samples seem sorted by class; shuffled, Inception Score {mixed:.2f}"] = (
            abs(ordered - mixed) > 0.05 * mixed)
    return [text for text, holds in found.items() if holds]


def report(sides, options, extractor, device):
    """Print the result, and write the files of --save-stats and --json."""
    reference = sides[0]
    print(f"reference: {reference}")
    if options.save_stats:
        known = {"n": reference.n, "extractor_sha256": reference.extractor}
        known = {key: value for key, value in known.items() if value is not None}
        write(options.save_stats, lambda file: np.savez(file, **reference.statistics, **known))
        print(f"wrote {options.save_stats}")
    if len(sides) == 1:
        return
    samples = sides[1]
    print(f"samples:   {samples}")
    print(f"extractor: Inception v3 of 2015, SHA-256 {extractor or 'unknown'}")
    result = compare(reference, samples, options.pr_dtype == "half", device)
    for name, value in result.items():
        print(f"{name + ':':<17}{value:.6g}")
    found = caveats(reference, samples, options, extractor)
    for line in found:
        print(f"caveat: {line}")
    if options.json:
        facts = dict(reference=str(reference), samples=str(samples), n_reference=reference.n,
                     n_samples=samples.n, extractor_sha256=extractor, pr_dtype=options.pr_dtype,
                     caveats=found, torch=torch.__version__)
        text = json.dumps({**result, **facts}, indent=1) + "\n"
        write(options.json, lambda file: file.write(text.encode()))


def write(path, fill):
    """Call fill(file), and only then let the file take the path's name: never half a file."""
    unfinished = f"{path}.partial"
    try:
        with open(unfinished, "wb") as file:
            fill(file)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# The command


@contextmanager
def in_one_line(message):
    """Report any error from a bad file in one line."""
    try:
        yield
    except (MemoryError, GeneratorExit):
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{message} ({line})") from None


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [options] REFERENCE [SAMPLES]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="folder or .npz")
    add("samples", metavar="SAMPLES", nargs="?", help="folder or .npz")
    add("--save-stats", metavar="FILE", help="write the reference's statistics")
    add("--json", metavar="FILE", help="also write the result as JSON")
    add("--crop", type=int, metavar="SIZE", help="resize and crop images of folders, as ADM does")
    add("--pr-dtype", choices=("half", "float"), default="half",
        help="distances for precision and recall: float16 as in ADM's evaluator [half], or float32")
    add("--inception", metavar="FILE", help="the network's weights [downloaded]")
    add("--any-weights", action="store_true", help="even if they are not ADM's")
    add("--batch", type=int, default=64, metavar="INT", help="images at a time [64]")
    add("--device", default="auto", metavar="STR", help="auto, cpu, cuda, mps")
    options = parser.parse_args()
    if not options.samples and not options.save_stats:
        parser.error("nothing to do: give SAMPLES, or --save-stats FILE")
    if not options.samples and options.json:
        parser.error("--json needs SAMPLES: there is no result without a comparison")
    if options.batch < 1 or (options.crop or 1) < 1:
        parser.error("--batch and --crop must be at least 1")
    return options


def check_output(option, path, recognise):
    """Before hours of work: ValueError if the file cannot be written, or would replace another
    kind of file."""
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"{option} '{path}': there is no folder {Path(path).parent}")
    if path and Path(path).exists():
        with in_one_line(f"{option} {path} would replace a file of another kind; rename it"):
            assert recognise(path)


def main():
    options = parse()
    check_output("--save-stats", options.save_stats,
                 lambda path: {*np.load(path)} <= {*STATISTICS, "n", "extractor_sha256"})
    check_output("--json", options.json,
                 lambda path: "extractor_sha256" in json.loads(Path(path).read_text()))
    alone, local = "RANK" not in os.environ, int(os.environ.get("LOCAL_RANK", 0))
    dist.init_process_group("gloo", **dict(store=dist.HashStore(), rank=0, world_size=1) if alone
                            else {})                         # a few sums at the end: gloo will do
    device = options.device
    if device in ("auto", "cuda"):
        device = f"cuda:{local}" if torch.cuda.is_available() or device == "cuda" else "cpu"
    with in_one_line(f"--device {options.device}"):
        torch.ones(1, device=device).item()                  # fails if it is absent, or "meta"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    sides = [Side(path, options.crop) for path in (options.reference, options.samples) if path]
    if options.crop and not any(isinstance(side.images, FolderImages) for side in sides):
        raise ValueError(f"--crop {options.crop} is for folders of images, and there is none")
    net = digest = None
    if options.inception or any(side.images for side in sides):
        for turn in (True, False):                           # one process of a node downloads
            if turn == (local == 0):
                net, digest = load_inception(options.inception, options.any_weights)
            dist.barrier()
    extractor = common_extractor(sides, digest)
    for side in sides:
        if side.images:
            side.measure(net.to(device), options.batch, device)
    if dist.get_rank() == 0:
        report(sides, options, extractor, device)


if __name__ == "__main__":
    code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")                 # a console may lack a path's letters
    try:
        main()
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        line = "out of memory; a smaller --batch needs less" if memory else str(error)[:500]
        print(f"fid.py: error: {line}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)                           # what is left of a process group might hang
