"""
Fig. 4 and 8: do the tokens of a DiP separate the classes better than those of a DiT-only?

The tokens after the last block, averaged over the image, of noisy held-out images (t = 0.3) without
a label.  Accuracy: of a ridge regression to one-hot labels, fitted to tokens of training images.
"""

import numpy as np
import torch
from torch.utils.data import default_collate

from dip import interpolate
from train import Examples, draw_noise, to_model

TIME = 0.3


@torch.no_grad()
def tokens(net, data, n):
    """(features (n, D), labels (n,)) of noisy images: tokens after the last block, averaged."""
    examples, seen, labels = Examples(data, 0, "features"), [], []
    device = next(net.parameters()).device
    hook = net.output.register_forward_pre_hook(lambda _, args: seen.append(args[1].mean(dim=1)))
    for start in range(0, n, 100):
        pixels, y, _, _, k = default_collate(
            [examples[k] for k in range(start, min(start + 100, n))])
        x_0, t = to_model(pixels, device), torch.full((len(y),), TIME, device=device)
        noise = draw_noise(x_0, 0, "features", k)
        net(interpolate(x_0, noise, t), t, torch.full_like(t, net.config.num_classes).long())
        labels.append(y)
    hook.remove()
    return torch.cat(seen).double().cpu().numpy(), torch.cat(labels).numpy()


def probe(x, y, x_new, y_new):
    """Fraction of y_new that a ridge regression to one-hot labels, fitted to x and y, recognises."""
    targets = np.eye(y.max() + 1)[y] - np.bincount(y) / len(y)
    weights = np.linalg.solve(x.T @ x + 0.01 * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return float(((x_new @ weights + np.bincount(y) / len(y)).argmax(axis=1) == y_new).mean())


def measure(lab, name, model, net):
    sizes = (60, 60) if lab.quick else (1000, 500)
    (x, y), (x_new, y_new) = (tokens(net, data, n) for data, n in zip(
        lab.data(model.data, model.config.image_size), sizes))
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-9         # each dimension standardised
    x, x_new = (x - mean) / std, (x_new - mean) / std
    return dict(probe=probe(x, y, x_new, y_new))
