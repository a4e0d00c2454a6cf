"""
FID, sFID, Inception Score, Precision and Recall, as OpenAI's evaluator of ADM computes them.

    python fid.py REFERENCE SAMPLES
    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz --json result.json
    python fid.py IMAGES --crop 256 --save-stats reference.npz      # a reference of your own
    torchrun --nproc_per_node=8 fid.py REFERENCE SAMPLES            # the same numbers, sooner

Either side is a folder of images, an .npz of images (`arr_0`, uint8 (N, H, W, 3)), or an .npz of
statistics (`mu`, `sigma` of the pool features, `mu_s`, `sigma_s` of the spatial ones), with or
without images.  As in ADM's evaluator: FID and sFID take a file's statistics where it has them,
precision and recall its images.

This file needs torch, numpy, Pillow and tqdm, and nothing else of this repository: copy it.
The semantics are those of guided-diffusion/evaluations/evaluator.py; a comment `ADM` stands where
they are not what one would guess.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
# The network: Inception v3 of 2015, TensorFlow's graph as ported to PyTorch, 1008 classes


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize: pixel i is read at i * scale, no half-pixel offset, and no
    averaging when it shrinks (ADM).  x float (B, H, W, C) -> (B, size, size, C)"""
    for axis in (2, 1):                                      # along rows, then along columns
        n = x.shape[axis]
        position = torch.arange(size, device=x.device) * torch.tensor(n / size).float()
        low = position.long()
        fraction = (position - low).view((-1, 1, 1) if axis == 1 else (-1, 1))
        a, b = (x.index_select(axis, i) for i in (low, (low + 1).clamp(max=n - 1)))
        x = a + (b - a) * fraction
    return x


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; keeps the size unless it has a stride."""

    def __init__(self, i, o, kernel, stride=1, padding=None):
        super().__init__()
        padding = padding or ("same" if stride == 1 else "valid")
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Chains of layers side by side on one input, their outputs concatenated.

    A layer is (channels, kernel) or (channels, kernel, stride), and a list of two of them a fork,
    whose outputs are concatenated.  The chain "_pool" begins with the pooling.  The names are those
    of the public file: layer k of a chain ends in _k, the arms of a fork in _ka and _kb.
    """

    def __init__(self, i, pool, chains):
        super().__init__()
        self.pool, self.chains = pool, {chain: [] for chain in chains}
        for chain, layers in chains.items():
            width = i
            for k, layer in enumerate(layers, 1):
                name = f"branch{chain}" + (f"_{k}" if len(layers) > 1 else "")
                arms = dict(zip((name + "a", name + "b"), layer)) if isinstance(layer, list) else {
                    name: layer}
                for name, arm in arms.items():
                    self.add_module(name, Conv(width, *arm))
                self.chains[chain].append(list(arms))
                width = arm[0]

    def forward(self, x):
        outputs = []
        for chain, layers in self.chains.items():
            y = self.pool(x) if chain == "_pool" else x
            for names in layers:
                y = torch.cat([getattr(self, name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # ADM
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
shrink = partial(F.max_pool2d, kernel_size=3, stride=2)


def inception_a(i, pooled):
    return Block(i, average, {
        "1x1": [(64, 1)],
        "5x5": [(48, 1), (64, 5)],
        "3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "_pool": [(pooled, 1)]})


def inception_b(i):
    return Block(i, shrink, {
        "3x3": [(384, 3, 2)],
        "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
        "_pool": []})


def inception_c(i, C, across=(1, 7), down=(7, 1)):
    return Block(i, average, {
        "1x1": [(192, 1)],
        "7x7": [(C, 1), (C, across), (192, down)],
        "7x7dbl": [(C, 1), (C, down), (C, across), (C, down), (192, across)],
        "_pool": [(192, 1)]})


def inception_d(i):
    return Block(i, shrink, {
        "3x3": [(192, 1), (320, 3, 2)],
        "7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        "_pool": []})


def inception_e(i, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Block(i, pool, {
        "1x1": [(320, 1)],
        "3x3": [(384, 1), fork],
        "3x3dbl": [(448, 1), (384, 3), fork],
        "_pool": [(192, 1)]})


class InceptionV3(nn.Module):
    """uint8 images -> what ADM's evaluator reads off the graph.  Names: the public file's."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = inception_a(192, 32)
        self.Mixed_5c = inception_a(256, 64)
        self.Mixed_5d = inception_a(288, 64)
        self.Mixed_6a = inception_b(288)
        self.Mixed_6b = inception_c(768, 128)
        self.Mixed_6c = inception_c(768, 160)
        self.Mixed_6d = inception_c(768, 160)
        self.Mixed_6e = inception_c(768, 192)
        self.Mixed_7a = inception_d(768)
        self.Mixed_7b = inception_e(1280, average)
        self.Mixed_7c = inception_e(2048, maximum)                        # ADM
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        """uint8 (B, H, W, 3) -> pool (B, 2048), spatial (B, 2023), probabilities (B, 1008)"""
        x = (resize_tf1(images.float()) - 128) / 128                     # (B, 299, 299, 3)
        x = x.permute(0, 3, 1, 2)                                        # channels_last in memory
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))        # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(shrink(x)))                     # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(shrink(x))))                # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))        # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                # ADM: H, W, then C
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))        # (B, 2048, 8, 8)
        pool = x.mean(dim=(2, 3))
        return pool, spatial, (pool @ self.fc.weight.T).softmax(dim=1)   # ADM: without its bias


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
                raise OSError(f"cannot fetch {WEIGHTS_URL} ({error}); "
                              f"fetch it elsewhere, and give it with --inception FILE") from None
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256 and not any_weights:
        raise ValueError(f"--inception {path} has SHA-256 {digest[:12]}..., not ADM's "
                         f"{WEIGHTS_SHA256[:12]}...; --any-weights takes it, for other numbers")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = InceptionV3()
        net.load_state_dict(state)
    except Exception as error:                               # an untrusted file may raise anything
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--inception {path} is not a file of the network's weights: "
                         f"{line}") from None
    return net.eval().requires_grad_(False), digest


# -------------------------------------------------------------------------------------------------
# The metrics, on arrays


def as_gaussian(mu, sigma, names=("mu", "sigma")):
    """(d,), (d, d) as float64 tensors.  ValueError where they are no mean and covariance: symmetric
    and without negative eigenvalues, up to what rounding its entries to float32 may change."""
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(f"{names[0]} {mu.shape} and {names[1]} {sigma.shape} are not of shapes "
                         f"(d,) and (d, d)")
    for name, x in zip(names, (mu, sigma)):
        if x.dtype.kind not in "iuf" or not np.isfinite(x).all():
            problem = "is not finite" if x.dtype.kind in "iuf" else f"is {x.dtype}, not real"
            raise ValueError(f"{name} {problem}")
    mu, sigma = (torch.from_numpy(x.astype(np.float64)) for x in (mu, sigma))
    rounding = len(mu) * torch.finfo(torch.float32).eps * sigma.abs().max()
    asymmetry = (sigma - sigma.T).abs().max()
    if asymmetry > rounding:
        raise ValueError(f"{names[1]} is no covariance: entries (i, j) and (j, i) differ by "
                         f"{asymmetry:.3g}")
    if torch.linalg.cholesky_ex(sigma + rounding * torch.eye(len(mu)))[1]:   # cheap, then exact
        lowest = torch.linalg.eigvalsh(sigma)[0]
        if lowest < -rounding:
            raise ValueError(f"{names[1]} is no covariance: it has the eigenvalue {lowest:.3g}")
    return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The eigenvalues of S1 S2 are those of the symmetric A^T S2 A for any A A^T = S1: A is S1's
    Cholesky factor, or, where S1 is singular, comes from its eigenvectors.  Never complex, and no
    diagonal is added to anything.
    mu (d,), sigma (d, d) -> float, at least 0
    """
    mu1, sigma1 = as_gaussian(mu1, sigma1, ("mu1", "sigma1"))
    mu2, sigma2 = as_gaussian(mu2, sigma2, ("mu2", "sigma2"))
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
    """exp of the mean KL divergence from p(class | image) to p(class), over consecutive chunks of
    `split` images; the mean of the chunks (ADM: the last may be short, and counts like the rest).
    probs (N, K), rows summing to 1 -> float from 1 to K"""
    probs, scores = torch.as_tensor(probs), []
    for p in probs.split(split):
        p = p.double()
        entropy = -torch.special.xlogy(p, p).sum(dim=1).mean()
        mean = p.mean(dim=0)
        scores.append((-torch.special.xlogy(mean, mean).sum() - entropy).exp().item())
    return float(np.mean(scores))


def squared_distances(a, b, half=False):
    """(M, d), (N, d) -> (M, N).  half: as TensorFlow computes them in float16 (ADM)."""
    if half:
        u, v = a.half(), b.half()
        product = (u.float() @ v.float().T).half()           # sums in float32, rounded once
        D = u.square().sum(1)[:, None] - 2 * product + v.square().sum(1)
        if D.isfinite().all():
            return D.clamp(min=0).float()                    # else all in float32 (ADM)
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def precision_recall(real, fake, k=3, half=False, block=1000):
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    Precision is the fraction of fake points in a ball of some real point, recall that of real
    points in a ball of some fake one; a ball reaches to the k-th nearest neighbour in its own set.
    real (N, d), fake (M, d) -> two floats.  Holds `block` rows of distances to all of a set at a
    time: 200 MB in float32 for 50,000 points.  half: with ADM's float16 rounding.
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
# Images, in batches, dealt to the ranks in turn: batch b belongs to rank b mod world

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


def list_images(folder):
    """Paths of all images below a folder, sorted; hidden files are none."""
    return sorted(os.path.join(path, name) for path, _, names in os.walk(folder, followlinks=True)
                  for name in names
                  if Path(name).suffix.lower() in ENDINGS and not name.startswith("."))


def read_image(path, crop=None):
    """uint8 (H, W, 3) of a file: grey, CMYK, palette or 16 bits, upright by its EXIF, and with
    `crop`, (crop, crop, 3).  Refuses what would need gigabytes.

    A broken file may raise nearly anything.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if crop and max(image.size) / min(image.size) * crop**2 > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} is too long to be scaled")
            try:
                upright = ImageOps.exif_transpose(image)
            except Exception:                                # of the EXIF alone; the image may live
                upright = image
            if upright.mode.startswith("I"):                 # 16 bits: keep the upper 8
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            upright = upright.convert("RGB")
            return np.array(center_crop(upright, crop) if crop else upright)


class FolderImages:
    """All images below a folder, by name; grey ones become RGB."""

    def __init__(self, path, crop=None):
        self.path, self.crop = path, crop
        self.files = list_images(path)
        if not self.files:
            raise ValueError(f"{path} holds no images ({' '.join(sorted(ENDINGS))})")
        self.size = self.read(self.files[0]).shape[:2]

    def __len__(self):
        return len(self.files)

    def read(self, file):
        try:
            return read_image(file, self.crop)
        except Exception as error:                           # an untrusted file may raise anything
            raise ValueError(f"{file}: unreadable image ({error})") from None

    def batches(self, batch, rank, world):
        """uint8 (B, H, W, 3)"""
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
        with self.member() as (_, shape, dtype, stored):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
                raise ValueError(f"{path}: arr_0 is {dtype} {shape}; images are uint8 (N, H, W, 3)")
            if math.prod(shape) != stored:
                raise ValueError(f"{path}: arr_0 has {stored} bytes, not the {math.prod(shape)} of "
                                 f"its shape {shape}; save it again")
            self.n, self.size = shape[0], shape[1:3]

    def __len__(self):
        return self.n

    @contextmanager
    def member(self):
        """(open file of the array's bytes, shape, dtype, number of bytes)"""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                read = {1: np.lib.format.read_array_header_1_0,
                        2: np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(file)[0]]
                shape, fortran, dtype = read(file)
                if fortran:
                    raise ValueError(f"{self.path}: arr_0 is in Fortran's order; save it in C's")
                yield file, shape, dtype, archive.getinfo("arr_0.npy").file_size - file.tell()
        except Exception as error:                           # an untrusted file may raise anything
            if str(self.path) in str(error):
                raise
            raise ValueError(f"{self.path}: arr_0 is damaged ({type(error).__name__})") from None

    def batches(self, batch, rank, world):
        """uint8 (B, H, W, 3)"""
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
        self.n, self.sum = 0, torch.zeros(d, dtype=torch.float64)
        self.products = torch.zeros(d, d, dtype=torch.float64)

    def add(self, x):
        """x (B, d)"""
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(dim=0)
        self.products += x.T @ x

    def finish(self, world=1):
        """mu (d,), sigma (d, d), of the features of all ranks"""
        n = torch.tensor(self.n)
        if world > 1:
            for x in (n, self.sum, self.products):
                dist.all_reduce(x)
        mu = self.sum / n
        return mu.numpy(), ((self.products - n * mu.outer(mu)) / (n - 1)).numpy()


def gather_batches(batches, rank, world):
    """All ranks' batches in the order of the images, on rank 0; elsewhere None."""
    if world == 1:
        return torch.cat(batches)
    ranks = [None] * world if rank == 0 else None
    dist.gather_object(batches, ranks)
    if rank > 0:
        return None
    return torch.cat([ranks[b % world][b // world] for b in range(sum(map(len, ranks)))])


STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


class Side:
    """Reference or samples: statistics, and features of its images if it has any.

    n is the number of images behind the statistics, extractor the SHA-256 of the network; either is
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
        try:
            with zipfile.ZipFile(path) as archive:
                keys = [name.removesuffix(".npy") for name in archive.namelist()]
            with np.load(path, allow_pickle=False) as file:
                found = {key: file[key] for key in STATISTICS if key in keys}
                if "n" in keys:
                    self.n = int(file["n"])
                if "extractor_sha256" in keys:
                    self.extractor = str(file["extractor_sha256"]) or None
        except Exception as error:                           # an untrusted file may raise anything
            raise ValueError(f"{path} is not a readable .npz ({type(error).__name__})") from None
        if "arr_0" in keys:
            self.images = NpzImages(path)
        if not found and self.images is None:
            line = " ".join(", ".join(keys).split())         # a foreign name may hold line breaks
            raise ValueError(f"{path} has neither arr_0 nor mu; it has {line}")
        if found:
            self.check_statistics(found)
        self.statistics = found or None

    def check_statistics(self, found):
        """ValueError where they are not the means and covariances of two images or more."""
        if len(found) < 4:
            raise ValueError(f"{self.path} has {', '.join(found)}, not all of "
                             f"{', '.join(STATISTICS)}")
        shapes = {key: x.shape for key, x in found.items()}
        if shapes != STATISTICS:
            raise ValueError(f"{self.path} has statistics of shapes {shapes}, not {STATISTICS}")
        if self.n is not None and self.n < 2:
            raise ValueError(f"{self.path}: n is {self.n}; a covariance needs 2 images")
        for names in (("mu", "sigma"), ("mu_s", "sigma_s")):
            try:
                as_gaussian(*(found[name] for name in names), names)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}; make the file again, from images, with "
                                 f"--save-stats") from None

    def measure(self, net, batch, device, rank=0, world=1):
        """Run the images through the network; leaves pool, probabilities, statistics on rank 0."""
        pools, probs, moments = [], [], [Moments(*STATISTICS[key]) for key in ("mu", "mu_s")]
        with tqdm(total=len(self.images), desc=Path(self.path).name, unit="image",
                  disable=rank > 0) as progress:
            for images in self.images.batches(batch, rank, world):
                features = net(torch.tensor(images).to(device))
                pool, spatial, p = (x.float().cpu() for x in features)
                moments[0].add(pool)
                moments[1].add(spatial)
                pools.append(pool)
                probs.append(p)
                progress.update(min(world * len(images), progress.total - progress.n))
        self.pool, self.probs = (gather_batches(x, rank, world) for x in (pools, probs))
        (mu, sigma), (mu_s, sigma_s) = (m.finish(world) for m in moments)
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

    digest: of the network that measures the images.  Two networks are refused: no distance between
    their features means anything.
    """
    known = {}
    for side in sides:
        if side.images and not side.statistics:
            side.extractor = digest
        if side.extractor:
            known[side.extractor] = side.path
    if digest:
        known.setdefault(digest, "--inception")
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
        precision, recall = precision_recall(*pools, half=half)
        result |= {"Precision": precision, "Recall": recall}
    return result


def caveats(reference, samples, options, extractor):
    """Why the numbers may not be compared with published ones."""
    found = []
    if extractor not in (None, WEIGHTS_SHA256):
        found.append("the network's weights are not ADM's")
    for name, side in (("reference", reference), ("samples", samples)):
        if side.extractor is None:
            found.append(f"{name}: extractor unknown, the file of statistics does not name it")
        if side.n is None:
            found.append(f"{name}: statistics of an unknown number of images")
        elif side.n < 2048:
            found.append(f"{name}: n = {side.n} < 2048, the covariance is singular")
    if samples.n is not None and samples.n < 50_000:
        found.append(f"n = {samples.n} samples, not 50,000: FID is larger the fewer there are")
    if not (reference.images and samples.images):
        found.append("statistics without images: no precision, no recall")
    elif reference.images.size != samples.images.size:
        found.append("reference and samples differ in size")
    if options.pr_dtype == "float":
        found.append("precision and recall are in float32, ADM's are in float16")
    if options.crop:
        found.append(f"--crop {options.crop}: images of folders were resized here")
    files = getattr(samples.images, "files", ())
    if any(file.lower().endswith((".jpg", ".jpeg")) for file in files):
        found.append("samples are JPEG: its artefacts are measured too")
    if samples.images and len(samples.images) > 5000:
        order = torch.randperm(len(samples.probs), generator=torch.Generator().manual_seed(0))
        ordered, mixed = inception_score(samples.probs), inception_score(samples.probs[order])
        if abs(ordered - mixed) > 0.05 * mixed:
            found.append(f"samples seem sorted by class; shuffled, Inception Score {mixed:.2f}")
    return found


def write(path, fill):
    """Call fill(file), and only then let it take the path's name: never half a file."""
    unfinished = f"{path}.partial"
    try:
        with open(unfinished, "wb") as file:
            fill(file)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def report(sides, options, extractor, device):
    """Print the result, write what was asked for."""
    reference = sides[0]
    print(f"reference: {reference}")
    if options.save_stats is not None:
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
    if options.json is not None:
        facts = dict(reference=str(reference), samples=str(samples), n_reference=reference.n,
                     n_samples=samples.n, extractor_sha256=extractor, pr_dtype=options.pr_dtype,
                     caveats=found, torch=torch.__version__)
        text = json.dumps({**result, **facts}, indent=1) + "\n"
        write(options.json, lambda file: file.write(text.encode()))


# -------------------------------------------------------------------------------------------------
# The command


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; --help lists the options")


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="%(prog)s [options] REFERENCE [SAMPLES]")
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="folder or .npz")
    add("samples", metavar="SAMPLES", nargs="?", help="folder or .npz")
    add("--save-stats", metavar="FILE", help="write the reference's statistics")
    add("--json", metavar="FILE", help="write the result as JSON too")
    add("--crop", type=int, metavar="SIZE", help="resize and crop images of folders, as ADM does")
    add("--pr-dtype", choices=("half", "float"), default="half",
        help="distances for precision and recall: float16 as in ADM's evaluator [half], or float32")
    add("--inception", metavar="FILE", help="the network's weights [downloaded]")
    add("--any-weights", action="store_true", help="even if they are not ADM's")
    add("--batch", type=int, default=64, metavar="INT", help="images at a time [64]")
    add("--device", default="auto", metavar="STR", help="auto, cpu, cuda, mps")
    return parser.parse_args()


def check_options(options):
    """ValueError for what cannot be done, before hours of work rather than after."""
    if options.samples is None and options.save_stats is None:
        raise ValueError("nothing to do: give SAMPLES, or --save-stats FILE")
    if options.samples is None and options.json is not None:
        raise ValueError("--json needs SAMPLES: there is no result without a comparison")
    for name in ("batch", "crop"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    inputs = [Path(path).resolve() for path in (options.reference, options.samples or ".")]
    for name, file in (("--save-stats", options.save_stats), ("--json", options.json)):
        if file is not None:
            if Path(file).is_dir() or not Path(file).parent.is_dir():
                raise ValueError(f"{name} '{file}' cannot be written: it must be a file in a "
                                 f"folder that exists")
            if Path(file).resolve() in inputs:
                raise ValueError(f"{name} {file} would overwrite what is compared; name another")


def choose_device(name):
    """torch's name of the device; ValueError where it does not compute."""
    cuda = name in ("auto", "cuda") and torch.cuda.is_available()
    device = (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else
              "cpu" if name == "auto" else name)
    try:
        torch.ones(1, device=device).item()
    except Exception as error:                               # each kind of device has its own
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def load_with_one_download(options, world):
    """load_inception; where there are many ranks, the first of each node fetches the weights."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if world > 1 and local > 0:
        dist.barrier()
    net, digest = load_inception(options.inception, options.any_weights)
    if world > 1 and local == 0:
        dist.barrier()
    return net, digest


def main():
    options = parse()
    check_options(options)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")                      # a few sums at the end: gloo will do
    device = choose_device(options.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    paths = (options.reference, options.samples)
    sides = [Side(path, options.crop) for path in paths if path is not None]
    if options.crop and not any(isinstance(side.images, FolderImages) for side in sides):
        raise ValueError(f"--crop {options.crop} is for folders of images, and there is none")
    net = digest = None
    if options.inception is not None or any(side.images for side in sides):
        net, digest = load_with_one_download(options, world)
    extractor = common_extractor(sides, digest)
    for side in sides:
        if side.images:
            side.measure(net.to(device), options.batch, device, rank, world)
    if rank == 0:
        report(sides, options, extractor, device)


def run():
    """main(); what the user can mend ends in one line and exit code 1."""
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in line:
            line = "out of memory; a smaller --batch needs less"
        elif isinstance(error, RuntimeError):
            raise
        sys.exit(f"fid.py: error: {line}")
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)                  # gloo's threads sometimes abort an interpreter that shuts down


if __name__ == "__main__":
    run()
