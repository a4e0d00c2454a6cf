"""
Fig. 4 and 8: do the tokens of a DiP separate the classes better than those of a DiT without a head?

The tokens after the last block, averaged over the image, of noisy held-out images (t = 0.3) without
a label.  We report the accuracy of a ridge regression to one-hot labels, fitted to the tokens of
training images.
"""

import numpy as np
import torch
from torch.utils.data import default_collate

from dip import interpolate
from train import Examples, draw_noise, to_model


@torch.no_grad()
def tokens(net, data, n):
    """(features (n, D), labels (n,)) of noisy images: tokens after the last block, averaged."""
    examples, seen = Examples(data, 0, "features"), []
    hook = net.output.register_forward_pre_hook(lambda _, args: seen.append(args[1].mean(dim=1)))
    pixels, y, _, _, k = default_collate([examples[k] for k in range(n)])
    x_0 = to_model(pixels, next(net.parameters()).device)
    t = torch.full((n,), 0.3, device=x_0.device)
    x_t = interpolate(x_0, draw_noise(x_0, 0, "features", k), t)
    net(x_t, t, torch.full_like(t, net.config.num_classes).long())
    hook.remove()
    return seen[0].double().cpu().numpy(), y.numpy()


def probe(x, y, x_new, y_new):
    """Fraction of y_new that a ridge regression to one-hot labels recognises.  It is fitted to x, y
    with each dimension of x standardised."""
    mean, std, share = x.mean(axis=0), x.std(axis=0) + 1e-9, np.bincount(y) / len(y)
    x, x_new = (x - mean) / std, (x_new - mean) / std
    targets = np.eye(y.max() + 1)[y] - share
    weights = np.linalg.solve(x.T @ x + 0.01 * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return float(((x_new @ weights + share).argmax(axis=1) == y_new).mean())


def measure(lab, model, net):
    training, held_out = lab.data(model.data, model.config.image_size)
    x, y = tokens(net, training, 60 if lab.quick else 1000)
    return dict(probe=probe(x, y, *tokens(net, held_out, 60 if lab.quick else 500)))
