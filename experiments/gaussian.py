"""
Do networks behave like the Gaussian model of Appendix A?  (theory/README.md has the theory.)

Images are drawn exactly from Assumptions A.3 and A.4, in the basis of the two-dimensional DCT, so
the best velocity is known, coefficient by coefficient (Eq. 16).  Measured: the excess of the loss
over the smallest possible one, by t.
"""

import numpy as np
import scipy.fft
import torch

from dip import DiPConfig
from sample import random_stream

SIZE, ALPHA, VARIANCE = 16, 1.5, 0.25        # pixels a side; decay; variance of a pixel
TIMES = 0.1, 0.3, 0.5, 0.7, 0.9
BASE = DiPConfig(image_size=SIZE, patch_size=4, depth=4, num_heads=4, num_classes=1, head="none")
TRAINING = dict(batch_size=64, micro_batch=64, warmup=100, label_dropout=0.0)


def eigenvalues():
    """(SIZE, SIZE): i^-alpha in the order of radial frequency, scaled to the variance of a pixel"""
    k = np.arange(SIZE)
    order = np.argsort(np.hypot(*np.meshgrid(k, k)).ravel(), kind="stable")
    values = np.empty(SIZE**2)
    values[order] = np.arange(1, SIZE**2 + 1) ** -ALPHA
    return (values * (VARIANCE * SIZE**2 / values.sum())).reshape(SIZE, SIZE)


def draw_image(index):
    """(SIZE, SIZE, 3): levels from 0 to 255, neither rounded nor clipped; independent channels"""
    normal = np.random.default_rng((2511, index)).standard_normal((SIZE, SIZE, 3))
    x_0 = scipy.fft.idctn(normal * np.sqrt(eigenvalues())[..., None], axes=(0, 1), norm="ortho")
    return ((x_0 + 1) * 127.5).astype(np.float32)


@torch.no_grad()
def measure(lab, name, model, net):
    """E |v - v*|^2 a value, over 1000 fresh images."""
    n, values, found = 32 if lab.quick else 1000, eigenvalues(), {}
    for t in TIMES:
        g = random_stream("Gaussian images", t)
        normal, noise = (torch.randn(n, 3, SIZE, SIZE, generator=g) for _ in range(2))
        x_0 = scipy.fft.idctn(normal.numpy() * np.sqrt(values), axes=(2, 3), norm="ortho")
        x_t = (1 - t) * torch.from_numpy(x_0).float() + t * noise
        v = net.cpu()(x_t, torch.full((n,), t), torch.zeros(n, dtype=torch.long))
        seen, guess = (scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho") for x in (x_t, v))
        best = seen * (t - (1 - t) * values) / ((1 - t) ** 2 * values + t**2)
        found[f"excess at t = {t}"] = float(((guess - best) ** 2).mean())
    return found
