"""
Fig. 4 and 8: do the tokens of a DiP tell the classes apart better than those of a DiT-only?

The tokens after the last block, averaged over the image, of noisy held-out images (t = 0.3) without
a label.  Accuracy: of a ridge regression to one-hot labels, fitted to tokens of training images.
Silhouette: from -1 to 1, above 0 for clusters.  The picture shows the plane of the two linear
discriminants, fitted to training images; the paper draws t-SNE, which needs no labels and shows
clusters that linear discriminants may not.
"""

import matplotlib.pyplot as plt
import numpy as np
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from torch.utils.data import default_collate

from dataset import Examples, ShapesData
from dip import interpolate
from experiments.models import STEPS
from experiments.placement import MODELS
from experiments.report import COLOURS, Claim, find

TIME = 0.3
CLAIMS = [Claim(f"tokens of {a} tell the classes apart better than those of {b}", a, b,
                ("probe", "silhouette"), source, "a picture")
          for a, b, source in (("post-hoc", "no head", "Fig. 4"), ("post-hoc", "hybrid", "Fig. 8"),
                               ("intermediate", "hybrid", "Fig. 8"))]


@torch.no_grad()
def tokens(net, examples, n):
    """(features (n, D), labels (n,)) of noisy images: tokens after the last block, averaged."""
    seen, labels, device = [], [], next(net.parameters()).device
    hook = net.output.register_forward_pre_hook(lambda _, args: seen.append(args[1].mean(dim=1)))
    for start in range(0, n, 100):
        chunk = [examples[k] for k in range(start, min(start + 100, n))]
        x_0, y, noise, *_ = examples.on_device(default_collate(chunk), device)
        t = torch.full((len(y),), TIME, device=device)
        null = torch.full_like(y, net.config.num_classes)
        net(interpolate(x_0, noise, t), t, null)
        labels.append(y)
    hook.remove()
    return torch.cat(seen).double().cpu().numpy(), torch.cat(labels).cpu().numpy()


def probe(x, y, x_new, y_new):
    """Fraction of y_new that a ridge regression to one-hot labels, fitted to x and y, names."""
    targets = np.eye(y.max() + 1)[y] - np.bincount(y) / len(y)
    weights = np.linalg.solve(x.T @ x + 0.01 * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return float(((x_new @ weights + np.bincount(y) / len(y)).argmax(axis=1) == y_new).mean())


def silhouette(x, y):
    """Mean over points of (b - a) / max(a, b): a, b the mean distances to the own class (without
    the point itself) and to the nearest other class; 0 for one alone (Rousseeuw, 1987)."""
    classes, distances = np.unique(y), cdist(x, x)
    to_class = np.stack([distances[:, y == c].mean(axis=1) for c in classes], axis=1)
    own = y[:, None] == classes
    counts = own.sum(axis=0)[own.argmax(axis=1)]
    a = to_class[own] * counts / np.maximum(counts - 1, 1)
    b = np.where(own, np.inf, to_class).min(axis=1)
    return float(np.where(counts > 1, (b - a) / np.maximum(a, b), 0).mean())


def discriminants(x, y):
    """The two directions of largest variance between classes over variance inside them.  (D, 2)"""
    means = np.stack([x[y == c].mean(axis=0) for c in np.unique(y)])
    own = means[np.unique(y, return_inverse=True)[1]]                    # (n, D)
    inside = np.cov((x - own).T) + 0.01 * np.eye(x.shape[1])
    return scipy.linalg.eigh(np.cov(own.T), inside)[1][:, :-3:-1]


def both_sets(lab, model, net):
    """(tokens, labels) of training images and of held-out ones, each dimension standardised."""
    sets = [Examples(data, 0, "features") for data in lab.data(model.data, model.config.image_size)]
    (x, y), (x_new, y_new) = (tokens(net, examples, 60 if lab.quick else n)
                              for examples, n in zip(sets, (1000, 500)))
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-9
    return (x - mean) / std, y, (x_new - mean) / std, y_new


def measure(lab, name, model, net):
    x, y, x_new, y_new = both_sets(lab, model, net)
    return dict(probe=probe(x, y, x_new, y_new), silhouette=silhouette(x_new, y_new))


def draw(results, lab):
    """Held-out images of seed 0 in the plane of the discriminants: a row a group."""
    colours = [*COLOURS, "#F0E442", "#882255"]
    figure, panels = plt.subplots(len(MODELS), 4, figsize=(10, 5.6), layout="constrained")
    for line, (group, models) in zip(panels, MODELS.items()):
        for axes, (name, model) in zip(line, models.items()):
            x, y, x_new, y_new = both_sets(lab, model, lab.train(model, 0, STEPS)[0])
            flat = x_new @ discriminants(x, y)
            for k, label in enumerate(ShapesData.names):
                axes.plot(*flat[y_new == k].T, ".", markersize=3, color=colours[k], label=label)
            row = find(results["rows"], group=group, model=name, seed=0)[0]
            axes.set_title(f"{name}, {group}\naccuracy {row['probe']:.2f}", size=9)
            axes.set(xticks=[], yticks=[])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center",
                  fontsize=8, markerscale=3)
    return figure
