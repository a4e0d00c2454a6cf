"""
Measures of images, uint8 (n, H, W, 3), that need no download.
"""

import numpy as np
import torch

from experiments.recognise import as_input


def power_spectrum(images):
    """Radially averaged power, per pixel and channel, at 1 to H/2 cycles an image.  -> (H/2,)"""
    x = np.asarray(images, dtype=np.float64) / 127.5 - 1
    H, W = x.shape[1:3]
    power = (np.abs(np.fft.fft2(x, axes=(1, 2))) ** 2).mean(axis=(0, 3)) / (H * W)
    down, across = np.fft.fftfreq(H) * H, np.fft.fftfreq(W) * W
    radius = np.hypot(down[:, None], across * H / W).round().astype(int).ravel()
    sums, counts = np.bincount(radius, power.ravel()), np.bincount(radius)
    return sums[1:H // 2 + 1] / counts[1:H // 2 + 1]


def seam_contrast(images, P):
    """Mean |step| between neighbours across patch borders over the mean |step| inside patches."""
    x = np.asarray(images, dtype=np.float64)
    across = inside = 0.0
    for axis in (1, 2):
        steps = np.abs(np.diff(x, axis=axis)).mean(axis=(0, 3 - axis, 3))      # by position
        border = np.arange(1, x.shape[axis]) % P == 0
        across, inside = across + steps[border].mean(), inside + steps[~border].mean()
    return across / inside


@torch.no_grad()
def moments(net, images):
    """Mean (64,) and covariance (64, 64) of what the classifier sees: its last maps, averaged."""
    maps = [net[:-3](as_input(part)).mean(dim=(2, 3)) for part in np.array_split(images, 10)]
    features = torch.cat(maps).double().numpy()
    return features.mean(axis=0), np.cov(features, rowvar=False)
