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
from theory.model import gain, image_decay

SIZE, TIMES = 16, (0.1, 0.3, 0.5, 0.7, 0.9)
BASE = DiPConfig(image_size=SIZE, patch_size=4, depth=4, num_heads=4, num_classes=1, head="none")
TRAINING = dict(batch_size=64, micro_batch=64, warmup=100, label_dropout=0.0)
RANK = np.hypot(*np.indices((SIZE, SIZE))).ravel().argsort(kind="stable").argsort()
VARIANCES = image_decay(SIZE**2, alpha=1.5)[RANK].reshape(SIZE, SIZE)    # of the coefficients


def draw_image(index):
    """(SIZE, SIZE, 3): levels from 0 to 255, neither rounded nor clipped; independent channels"""
    normal = np.random.default_rng((2511, index)).standard_normal((SIZE, SIZE, 3))
    x_0 = scipy.fft.idctn(normal * np.sqrt(VARIANCES)[..., None], axes=(0, 1), norm="ortho")
    return ((x_0 + 1) * 127.5).astype(np.float32)


@torch.no_grad()
def measure(lab, model, net):
    """E |v - v*|^2 per value, over 1000 fresh images."""
    n, found = 32 if lab.quick else 1000, {}
    for t in TIMES:
        g = random_stream("Gaussian images", t)
        normal, noise = (torch.randn(n, 3, SIZE, SIZE, generator=g) for _ in range(2))
        x_0 = scipy.fft.idctn(normal.numpy() * np.sqrt(VARIANCES), axes=(2, 3), norm="ortho")
        x_t = (1 - t) * torch.from_numpy(x_0).float() + t * noise
        v = net.cpu()(x_t, torch.full((n,), t), torch.zeros(n, dtype=torch.long))
        seen, guess = (scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho") for x in (x_t, v))
        found[f"excess at t = {t}"] = float(((guess - gain(VARIANCES, t) * seen) ** 2).mean())
    return found
