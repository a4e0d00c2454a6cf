"""
Measures of images, uint8 (n, H, W, 3), that need no download, and the classifier behind some.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import progress


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


def as_input(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_classifier(classes=10):
    """A CNN of four layers, each of four modules; untrained."""
    widths = [3, 16, 32, 64, 64]
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(),
                         nn.Linear(4 * 64, classes)).to(memory_format=torch.channels_last)


def train_classifier(data, classes, steps, batch=64, lr=2e-3):
    """The CNN, trained on images with a little noise on them, so that it does not hang on
    pixel-perfect edges."""
    torch.manual_seed(0)
    net = make_classifier(classes)
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    for step in progress(range(steps), "classifier", unit="step"):
        indices = range(step * batch, (step + 1) * batch)
        images, labels = zip(*(data[i % len(data)] for i in indices))
        x = as_input(np.stack(images))
        x = x + 0.1 * torch.rand(()) * torch.randn_like(x)
        loss = F.cross_entropy(net(x), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
    return net.eval()


@torch.no_grad()
def predict(net, images):
    """uint8 (B, H, W, 3) -> class indices (B,)"""
    return np.concatenate(
        [net(as_input(part)).argmax(1).numpy() for part in np.array_split(images, 10)]
    )


@torch.no_grad()
def moments(net, images):
    """Mean (64,) and covariance (64, 64) of what the classifier sees: its last maps, averaged."""
    maps = [net[:-3](as_input(part)).mean(dim=(2, 3)) for part in np.array_split(images, 10)]
    features = torch.cat(maps).double().numpy()
    return features.mean(axis=0), np.cov(features, rowvar=False)
