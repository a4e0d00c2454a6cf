"""
FID, sFID, Inception Score, Precision and Recall, as OpenAI's evaluator of ADM computes them.

    python fid.py REFERENCE SAMPLES
    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz --json result.json
    python fid.py IMAGES --crop 256 --save-stats reference.npz      # a reference of your own
    torchrun --nproc_per_node=8 fid.py REFERENCE SAMPLES            # the same numbers, sooner

Each side is a folder of images, an .npz of images (`arr_0`, uint8 (N, H, W, 3)), or an .npz of
statistics (`mu`, `sigma` of the pool features, `mu_s`, `sigma_s` of the spatial ones).  A file may
hold both: then FID and sFID use its statistics, and precision and recall use its images (ADM).

This file needs torch, numpy, Pillow and tqdm and nothing else of this repository: copy it.  It
follows guided-diffusion/evaluations/evaluator.py; `ADM` marks behaviour that you would not guess.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import traceback
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# The metrics, on arrays


def as_gaussian(mu, sigma):
    """mu (d,) and sigma (d, d) as float64 tensors.  Raises ValueError unless sigma is symmetric
    and has no negative eigenvalue, up to rounding to float32."""
    mu, sigma = (torch.tensor(np.asarray(x).astype(np.float64, casting="same_kind"))
                 for x in (mu, sigma))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(f"mean {tuple(mu.shape)} and covariance {tuple(sigma.shape)} are not of "
                         f"shapes (d,) and (d, d)")
    if not mu.isfinite().all() or not sigma.isfinite().all():
        raise ValueError("mean or covariance is not finite")
    rounding = len(mu) * torch.finfo(torch.float32).eps * sigma.abs().max()
    if (sigma - sigma.T).abs().max() > rounding:
        raise ValueError("the covariance is not symmetric")
    if rounding > 0 and torch.linalg.cholesky_ex(sigma + rounding * torch.eye(len(mu)))[1]:
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

    Precision is the fraction of fake points in a ball around some real point.  Recall is the
    fraction of real points in a ball around some fake point.  A ball reaches to the k-th nearest
    neighbour in its own set.  real (N, d), fake (M, d) -> two floats.  half: with ADM's float16
    rounding.  With it, `block` rows against 50,000 points take 0.8 GB.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on both sides, not "
                         f"{len(real)} and {len(fake)}")

    def radii(x):                                            # the nearest is the point itself
        return torch.cat([squared_distances(rows, x, half).topk(k + 1, largest=False)[0][:, k]
                          for rows in x.split(block)])

    real_radii, fake_radii = radii(real), radii(fake)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, row_radii in zip(fake.split(block), fake_radii.split(block)):
        D = squared_distances(rows, real, half)
        inside += (D <= real_radii).any(dim=1).sum().item()
        covered |= (D <= row_radii[:, None]).any(dim=0)
    return inside / len(fake), covered.sum().item() / len(real)


# -------------------------------------------------------------------------------------------------
# The network: Inception v3 of 2015, TensorFlow's graph as ported to PyTorch, 1008 classes

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


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

    def __init__(self, i, o, kernel, stride=1, padding="same", pool=nn.Identity()):
        super().__init__()
        self.pool = pool                                     # before the convolution
        self.conv = nn.Conv2d(i, o, kernel, stride, padding if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(self.pool(x))))


class Branches(nn.ModuleDict):
    """Layers, or lists of layers, side by side on one input; their outputs are concatenated."""

    def __init__(self, **branches):
        super().__init__({name: branch if isinstance(branch, nn.Module) else
                          nn.Sequential(nn.Identity(), *branch)    # the file's names count from 1
                          for name, branch in branches.items()})

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], dim=1)


SHRINK = nn.MaxPool2d(3, stride=2)
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)                  # ADM
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)


def mixed_5(i, pooled):
    return Branches(
        branch1x1=Conv(i, 64, 1),
        branch5x5=[Conv(i, 48, 1), Conv(48, 64, 5)],
        branch3x3dbl=[Conv(i, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)],
        branch_pool=Conv(i, pooled, 1, pool=AVERAGE))


def mixed_6(i, C):
    return Branches(
        branch1x1=Conv(i, 192, 1),
        branch7x7=[Conv(i, C, 1), Conv(C, C, (1, 7)), Conv(C, 192, (7, 1))],
        branch7x7dbl=[Conv(i, C, 1), Conv(C, C, (7, 1)), Conv(C, C, (1, 7)), Conv(C, C, (7, 1)),
                      Conv(C, 192, (1, 7))],
        branch_pool=Conv(i, 192, 1, pool=AVERAGE))


def mixed_7(i, pool):
    def fork():
        return Branches(a=Conv(384, 384, (1, 3)), b=Conv(384, 384, (3, 1)))

    return Branches(
        branch1x1=Conv(i, 320, 1),
        branch3x3=[Conv(i, 384, 1), fork()],
        branch3x3dbl=[Conv(i, 448, 1), Conv(448, 384, 3), fork()],
        branch_pool=Conv(i, 192, 1, pool=pool))


class InceptionV3(nn.ModuleDict):
    """uint8 images -> what ADM's evaluator reads off the graph."""

    def __init__(self):
        super().__init__(dict(                                                   # image of 299
            Conv2d_1a_3x3=Conv(3, 32, 3, stride=2),                              # (32, 149, 149)
            Conv2d_2a_3x3=Conv(32, 32, 3, padding="valid"),
            Conv2d_2b_3x3=Conv(32, 64, 3),                                       # (64, 147, 147)
            Conv2d_3b_1x1=Conv(64, 80, 1, pool=SHRINK),                          # (80, 73, 73)
            Conv2d_4a_3x3=Conv(80, 192, 3, padding="valid"),                     # (192, 71, 71)
            shrink=SHRINK,
            Mixed_5b=mixed_5(192, 32),                                           # (256, 35, 35)
            Mixed_5c=mixed_5(256, 64),
            Mixed_5d=mixed_5(288, 64),                                           # (288, 35, 35)
            Mixed_6a=Branches(
                branch3x3=Conv(288, 384, 3, stride=2),
                branch3x3dbl=[Conv(288, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, stride=2)],
                branch_pool=SHRINK),                                             # (768, 17, 17)
            Mixed_6b=mixed_6(768, 128),
            Mixed_6c=mixed_6(768, 160),
            Mixed_6d=mixed_6(768, 160),                                          # sFID
            Mixed_6e=mixed_6(768, 192),
            Mixed_7a=Branches(
                branch3x3=[Conv(768, 192, 1), Conv(192, 320, 3, stride=2)],
                branch7x7x3=[Conv(768, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)),
                             Conv(192, 192, 3, stride=2)],
                branch_pool=SHRINK),                                             # (1280, 8, 8)
            Mixed_7b=mixed_7(1280, AVERAGE),
            Mixed_7c=mixed_7(2048, MAXIMUM)))                                    # FID; ADM
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        """uint8 (B, H, W, 3) -> pool (B, 2048), spatial (B, 2023), probabilities (B, 1008)"""
        x = (resize_tf1(images.float()) - 128) / 128
        x = x.permute(0, 3, 1, 2)                            # channels_last in memory
        for name, layer in list(self.items())[:-1]:          # all but fc
            x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)        # ADM: H, W, then C
        pool = x.mean(dim=(2, 3))
        return pool, spatial, (pool @ self.fc.weight.T).softmax(dim=1)   # ADM: without its bias


def load_inception(path=None, any_weights=False):
    """(network in eval mode, SHA-256 of its weights).  path: a file; None: the public weights,
    which are fetched once into torch hub's cache.  Only `any_weights` takes other weights."""
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)
        with in_one_line(f"cannot fetch {WEIGHTS_URL}; give the file with --inception"):
            torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True,
                                               weights_only=True)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256 and not any_weights:
        raise ValueError(f"--inception {path} has SHA-256 {digest[:12]}..., not ADM's "
                         f"{WEIGHTS_SHA256[:12]}...; --any-weights takes it, for other numbers")
    net = InceptionV3()
    with in_one_line(f"--inception {path} is not a file of the network's weights"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for name in list(weights):           # branch3x3_2a.conv in the file is branch3x3.2.a.conv
            ours = re.sub(r"(branch\w+)_(\d)([ab]?)\.", r"\1.\2.\3.", name).replace("..", ".")
            weights[ours] = weights.pop(name)
        net.load_state_dict(weights)
    return net.eval().requires_grad_(False), digest


@contextmanager
def in_one_line(message):
    """Report any error from a bad file in one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{message} ({line})") from None


# -------------------------------------------------------------------------------------------------
# Images.  train.py reads its folders with list_images() and read_image() too.

ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp"}
Image.MAX_IMAGE_PIXELS = None                # read_image() has a limit of its own,
MAX_PIXELS = 180_000_000                     # twice Pillow's: 0.5 GB as RGB


def list_images(folder):
    """Sorted paths of all images below a folder.  Hidden files and folders are left out, linked
    folders are followed once, and errors are raised.  Prints how many other files there are."""
    images, others, seen = [], Counter(), set()
    folders = [folder]
    for path in folders:                                     # which grows meanwhile
        if os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            ending = Path(entry.name).suffix.lower()
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif ending in ENDINGS and (entry.is_file() or entry.is_symlink()):  # no named pipe
                images.append(entry.path)
            else:
                others[ending or "no ending"] += 1
    if others and os.environ.get("RANK", "0") == "0":
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
        if "transparency" in image.info and image.tile[0].args in ("L;2", "L;4", "RGB;16B"):
            raise ValueError("Pillow misreads this transparency; save it with an alpha channel")
        image.load()                         # broken pixels are an error the first time only
        with suppress(Exception):            # after turning; broken EXIF says nothing of the image
            ImageOps.exif_transpose(image, in_place=True)
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


# -------------------------------------------------------------------------------------------------
# The two sides of a comparison

STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


class Side:
    """Reference or samples: images, statistics, or both; once measured, features of the images.

    count, size: number and (H, W) of the images; files: their paths in a folder.  n: how many
    images the statistics describe; extractor: SHA-256 of the network that measured them; None: a
    file of statistics does not say.
    """

    def __init__(self, path, crop=None):
        self.path, self.crop, self.count, self.files = str(path), crop, 0, []
        self.statistics = self.size = self.n = self.extractor = None
        if not self.path or not Path(path).exists():
            raise FileNotFoundError(f"no file or folder at '{path}'")
        if Path(path).is_dir():
            splits = [name for name in ("train", "val", "test") if Path(path, name).is_dir()]
            if splits[1:]:
                raise ValueError(f"{path} holds {' and '.join(splits)}; give one of them")
            self.files, self.threads = list_images(path), ThreadPoolExecutor()
            self.count = len(self.files)
        else:
            with (in_one_line(f"{path} is not an .npz of images or of statistics"),
                  np.load(path, allow_pickle=False) as file):
                self.open_npz(file)
        if self.count < 4 and (self.count or not self.statistics):
            raise ValueError(f"{path} holds {self.count} images; precision and recall need four, "
                             f"a comparison 50,000")
        if self.files:
            self.read_file(self.files[0])                    # sets the size
        if not self.statistics:
            self.n = self.count

    def open_npz(self, file):
        """Read and check the statistics, and find out where the images begin."""
        found = {key: file[key] for key in STATISTICS if key in file}
        if "arr_0" not in file and not found:
            raise ValueError(f"neither arr_0 nor mu, but {', '.join(file)[:100]}")
        if found:
            shapes = {key: x.shape for key, x in found.items()}
            if shapes != STATISTICS:
                raise ValueError(f"statistics of shapes {shapes}, not {STATISTICS}")
            as_gaussian(found["mu"], found["sigma"])
            as_gaussian(found["mu_s"], found["sigma_s"])
            self.statistics = found
            self.n = int(file["n"]) or None if "n" in file else None
            self.extractor = str(file.get("extractor_sha256", "")) or None
        if "arr_0" in file:                                  # may be larger than the memory
            archive = zipfile.ZipFile(self.path)
            self.array = archive.open("arr_0.npy")
            np.lib.format.read_magic(self.array)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.array)
            self.start = self.array.tell()
            stored = archive.getinfo("arr_0.npy").file_size - self.start
            if (dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not stored
                    or math.prod(shape) != stored):
                raise ValueError(f"arr_0 has {stored} bytes, {dtype} {shape}, fortran_order="
                                 f"{fortran}; images are uint8 (N, H, W, 3), in C's order")
            self.count, self.size = shape[0], shape[1:3]

    def read(self, start, stop):
        """uint8 (stop - start, H, W, 3), fewer at the end"""
        if self.files:
            return np.stack(list(self.threads.map(self.read_file, self.files[start:stop])))
        with in_one_line(f"{self.path}: arr_0 cannot be read"):
            image = 3 * math.prod(self.size)                 # bytes
            self.array.seek(self.start + start * image)
            data = self.array.read((stop - start) * image)
            return np.frombuffer(data, np.uint8).reshape(-1, *self.size, 3)

    def read_file(self, file):
        with in_one_line(f"{file}: unreadable image"):
            image = read_image(file, self.crop)
        self.size = self.size or image.shape[:2]
        if image.shape[:2] != self.size:
            sizes = " and ".join(f"{W} x {H}" for H, W in (image.shape[:2], self.size))
            raise ValueError(f"{file} and {self.files[0]} have different sizes, {sizes}; --crop "
                             f"SIZE makes them equal")
        return image

    def measure(self, net, batch, device):
        """Run the images through the network; leaves pool, probs and statistics on rank 0."""
        rank, world = dist.get_rank(), dist.get_world_size()
        features = [], [], []
        starts = range(rank * batch, self.count, world * batch)
        for start in tqdm(starts, Path(self.path).name, unit="batch", disable=rank > 0):
            images = torch.tensor(self.read(start, start + batch)).to(device)
            for batches, x in zip(features, net(images)):
                batches.append(x.float().cpu())
        self.pool, spatial, self.probs = map(gather, features)
        if rank == 0 and not self.statistics:
            (mu, sigma), (mu_s, sigma_s) = map(mean_and_covariance, (self.pool, spatial))
            self.statistics = dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)

    def __str__(self):
        parts = []
        if self.count:
            parts.append(f"{self.count} images of {self.size[1]} x {self.size[0]}")
        if self.n != self.count:
            parts.append(f"statistics of {self.n or 'an unknown number of'} images")
        return f"{self.path}: {', '.join(parts)}"


def gather(batches):
    """All ranks' batches in the order of the images, on rank 0; elsewhere None."""
    ranks = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(batches, ranks)
    if ranks:
        return torch.cat([ranks[b % len(ranks)][b // len(ranks)]
                          for b in range(sum(map(len, ranks)))])


def mean_and_covariance(x):
    """x (n, d) -> mu (d,), sigma (d, d) in float64; 1000 rows at a time, so as not to copy x"""
    mu = x.mean(dim=0, dtype=torch.float64)
    centred = (rows - mu for rows in x.split(1000))
    return mu.numpy(), (sum(rows.T @ rows for rows in centred) / (len(x) - 1)).numpy()


def caveats(reference, samples, options, extractor):
    """Why the numbers may not be compared with published ones."""
    both = reference.count and samples.count
    checks = [
        (extractor not in (None, WEIGHTS_SHA256), "the network's weights are not ADM's"),
        (samples.n is not None and samples.n < 50_000,
         f"n = {samples.n} samples, not 50,000: FID is larger the fewer there are"),
        (not both, "statistics without images: no precision, no recall"),
        (both and reference.size != samples.size,
         "reference and samples differ in size"),
        (options.pr_dtype == "float", "precision and recall are in float32, ADM's are in float16"),
        (options.crop, f"--crop {options.crop}: images of folders were resized here"),
        (any(file.lower().endswith((".jpg", ".jpeg", ".jfif")) for file in samples.files),
         "samples are JPEG: its artefacts are measured too"),
    ]
    for name, side in (("reference", reference), ("samples", samples)):
        checks += [
            (side.extractor is None,
             f"{name}: the file of statistics does not name its network"),
            (side.n is None, f"{name}: statistics of an unknown number of images"),
            (side.n and side.n < 2048, f"{name}: n = {side.n} < 2048, the covariance is singular")]
    if samples.count > 5000:
        order = torch.randperm(len(samples.probs), generator=torch.Generator().manual_seed(0))
        ordered, mixed = inception_score(samples.probs), inception_score(samples.probs[order])
        checks.append((abs(ordered - mixed) > 0.05 * mixed, f"samples seem sorted by class; "
                       f"shuffled, Inception Score {mixed:.2f}"))
    return [text for holds, text in checks if holds]


# -------------------------------------------------------------------------------------------------
# The command


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
    if options.samples is None and (options.save_stats is None or options.json is not None):
        parser.error("SAMPLES is missing; without it, only --save-stats has something to do")
    for name, file in (("--save-stats", options.save_stats), ("--json", options.json)):
        if file is not None and (Path(file).exists() or not Path(file).parent.is_dir()):
            raise ValueError(f"{name} '{file}' exists, or its folder does not; choose another name")
    if options.save_stats and options.save_stats == options.json:
        raise ValueError(f"--save-stats and --json are both '{options.json}'; give two names")
    if options.batch < 1 or options.crop is not None and options.crop < 1:
        parser.error("--batch and --crop must be at least 1")
    return options


def write(path, fill):
    """Call fill(file), and only then let the file take the path's name: never half a file."""
    unfinished = Path(f"{path}.partial")
    try:
        with unfinished.open("wb") as file:
            fill(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main():
    options = parse()
    alone, local = "RANK" not in os.environ, int(os.environ.get("LOCAL_RANK", 0))
    if not dist.is_initialized():            # gloo will do: little is exchanged
        dist.init_process_group("gloo", **dict(store=dist.HashStore(), rank=0, world_size=1)
                                if alone else {})
    device = options.device
    if device in ("auto", "cuda"):
        device = f"cuda:{local}" if torch.cuda.is_available() or device == "cuda" else "cpu"
    with in_one_line(f"--device {options.device}"):
        torch.ones(1, device=device).item()                  # fails if it is absent, or "meta"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    sides = [Side(path, options.crop) for path in (options.reference, options.samples)
             if path is not None]
    if options.crop and not any(side.files for side in sides):
        raise ValueError(f"--crop {options.crop} is for folders of images, and there is none")
    net = digest = None
    if options.inception or any(side.count for side in sides):
        for turn in (True, False):                           # one process of a node downloads
            if turn == (local == 0):
                net, digest = load_inception(options.inception, options.any_weights)
            dist.barrier()
    for side in sides:
        if not side.statistics:
            side.extractor = digest
    known = {side.extractor: side.path for side in sides} | {digest: "--inception"}
    known.pop(None, None)
    if len(known) > 1:
        made = " and ".join(f"{path} with {sha[:12]}..." for sha, path in known.items())
        raise ValueError(f"features of different networks, {made}; measure both sides with one")
    for side in sides:
        if side.count:
            side.measure(net.to(device), options.batch, device)
    if dist.get_rank() == 0 and len(sides) == 2:
        report(*sides, options, next(iter(known), None), device)
    if dist.get_rank() == 0 and options.save_stats:
        side = sides[0]
        about = dict(n=side.n or 0, extractor_sha256=side.extractor or "")
        write(options.save_stats, lambda file: np.savez(file, **side.statistics, **about))
        print(f"wrote {options.save_stats}: statistics of {side}")


def report(reference, samples, options, extractor, device):
    """Print the result, and write the file of --json."""
    a, b = reference.statistics, samples.statistics
    result = dict(reference=str(reference), samples=str(samples), extractor_sha256=extractor)
    if samples.count:
        result["Inception Score"] = inception_score(samples.probs)
    result["FID"] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    result["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
    if reference.count and samples.count:
        pools = (side.pool.to(device) for side in (reference, samples))
        result["Precision"], result["Recall"] = precision_recall(
            *pools, half=options.pr_dtype == "half")
    for name, value in result.items():
        print(f"{name + ':':<18}{f'{value:.6g}' if isinstance(value, float) else value}")
    found = caveats(reference, samples, options, extractor)
    for line in found:
        print(f"caveat: {line}")
    if options.json:
        result |= dict(n_reference=reference.n, n_samples=samples.n, pr_dtype=options.pr_dtype,
                       caveats=found, torch=torch.__version__)
        text = json.dumps(result, indent=1) + "\n"
        write(options.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")                 # a console may lack a path's letters
    try:
        main()
        code = 0
    except (ValueError, OSError) as error:
        print(f"fid.py: error: {str(error)[:500]}", file=sys.stderr)
    except Exception as error:
        if "memory" in repr(error).lower():
            print("fid.py: error: out of memory; a smaller --batch needs less", file=sys.stderr)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)                           # what is left of a process group might hang
