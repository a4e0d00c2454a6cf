"""
Do networks behave like the Gaussian model of Appendix A?  (theory/README.md has the theory.)

Images are drawn exactly from Assumptions A.3 and A.4, in the basis of the two-dimensional DCT, so
the best velocity is known, coefficient by coefficient (Eq. 16).  A DiT-only and a DiP, with tokens
narrower (32) and wider (96) than the 48 values of a patch, are trained alike.  Measured: the excess
of their loss over the smallest possible one, by t.
"""

import numpy as np
import scipy.fft
import torch

from dip import DiPConfig
from experiments.lab import OneClass
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


class GaussianData(OneClass):
    """Independent images; three independent channels."""

    def __getitem__(self, index):
        """float (SIZE, SIZE, 3), as levels from 0 to 255, neither rounded nor clipped; label 0"""
        normal = np.random.default_rng((2511, index)).standard_normal((SIZE, SIZE, 3))
        deviations = np.sqrt(eigenvalues())[..., None]
        x_0 = scipy.fft.idctn(normal * deviations, axes=(0, 1), norm="ortho")
        return ((x_0 + 1) * 127.5).astype(np.float32), 0


def spectrum(x):
    """(B, 3, SIZE, SIZE) -> DCT coefficients"""
    return scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")


@torch.no_grad()
def excess(net, n):
    """(times, SIZE, SIZE): E |v - v*|^2 per coefficient, over n fresh images and three channels."""
    values, result = eigenvalues(), []
    for t in TIMES:
        g = random_stream("Gaussian images", t)
        x_0 = torch.randn(n, 3, SIZE, SIZE, generator=g).numpy() * np.sqrt(values)
        noise = torch.randn(n, 3, SIZE, SIZE, generator=g)
        x_0 = torch.from_numpy(scipy.fft.idctn(x_0, axes=(2, 3), norm="ortho")).float()
        x_t = (1 - t) * x_0 + t * noise
        v = net(x_t, torch.full((n,), t), torch.zeros(n, dtype=torch.long))
        best = spectrum(x_t) * (t - (1 - t) * values) / ((1 - t) ** 2 * values + t**2)
        result.append(((spectrum(v) - best) ** 2).mean(axis=(0, 1)))
    return np.stack(result)


def measure(lab, name, model, net):
    found = excess(net.cpu(), 32 if lab.quick else 1000).mean(axis=(1, 2)).tolist()
    return {f"excess at t = {t}": x for t, x in zip(TIMES, found)}
