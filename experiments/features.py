"""
Fig. 4 and 8: do the tokens of a DiP tell the classes apart better than those of a DiT-only?

    python -m experiments.features      # embedded shapes

Features are the tokens after the last block, averaged over the image, for noisy images (t = 0.3)
without their label: with it, the tokens would know the class from being told.  A linear probe is
fitted to the features of training images and names held-out ones; the silhouette (how much nearer
an image is to its own class than to the next, from -1 to 1) and the picture are of held-out images.
The picture's two axes are linear discriminants, fitted to the training images.
"""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import scipy.linalg
import torch
from scipy.spatial.distance import cdist

from dip import interpolate
from experiments.harness import COLOURS, REGIMES, Claim, DataOptions, better, conduct, numbers_of
from experiments.placement import MODELS
from sample import run_main
from train import Examples, default_collate

TIME, FITTED, HELD_OUT = 0.3, 1000, 500
Options = DataOptions


@torch.no_grad()
def tokens(model, examples, n):
    """(features (n, D), labels (n,)) of noisy images: tokens after the last block, averaged."""
    seen, labels = [], []
    hook = model.output.register_forward_pre_hook(lambda _, args: seen.append(args[1].mean(dim=1)))
    device = next(model.parameters()).device
    for start in range(0, n, 100):
        chunk = [examples[k] for k in range(start, min(start + 100, n))]
        x_0, y, noise, *_ = examples.on_device(default_collate(chunk), "cpu")
        t, null = torch.full((len(y),), TIME), torch.full_like(y, model.config.num_classes)
        model(interpolate(x_0, noise, t).to(device), t.to(device), null.to(device))
        labels.append(y)
    hook.remove()
    return torch.cat(seen).double().cpu().numpy(), torch.cat(labels).numpy()


def probe(x, y, x_new, y_new):
    """Share of y_new that a ridge regression to one-hot labels, fitted to x and y, names right."""
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
    nearest = means[np.unique(y, return_inverse=True)[1]]                # (n, D), of the own class
    inside = np.cov((x - nearest).T) + 0.01 * np.eye(x.shape[1])
    return scipy.linalg.eigh(np.cov(nearest.T), inside)[1][:, :-3:-1]


def measure(lab):
    training, held_out = (Examples(data, 0, "features") for data in lab.data)
    fitted, new = (60, 60) if lab.options.quick else (FITTED, HELD_OUT)
    rows, clouds = [], []
    for regime, base in REGIMES.items():
        for name, change in MODELS.items():
            config = base.replace(num_classes=len(lab.data[0].classes), **change)
            for seed in lab.seeds:
                model = lab.train(config, seed)[0]
                (x, y), (x_new, y_new) = (tokens(model, training, fitted),
                                          tokens(model, held_out, new))
                mean, std = x.mean(axis=0), x.std(axis=0) + 1e-9
                x, x_new = (x - mean) / std, (x_new - mean) / std
                rows.append(dict(regime=regime, model=name, seed=seed,
                                 probe=probe(x, y, x_new, y_new),
                                 silhouette=silhouette(x_new, y_new)))
                print(rows[-1], flush=True)
                if seed == 0:
                    flat = np.round(x_new @ discriminants(x, y), 2)
                    clouds.append(dict(regime=regime, model=name, labels=y_new.tolist(),
                                       x=flat[:, 0].tolist(), y=flat[:, 1].tolist()))
    return dict(time=TIME, fitted=fitted, held_out=new, names=lab.data[0].names, rows=rows,
                clouds=clouds)


def claims(results):
    rows, measures, found = results["rows"], ("probe", "silhouette"), []
    for regime in REGIMES:
        ours, verdict = better(rows, "post-hoc", "no head", measures, regime=regime)
        found.append(Claim("tokens of a DiP separate the classes better than those of a DiT-only",
                           f"{regime}, {results['setting']}", "Fig. 4", "a picture", ours,
                           verdict))
        for name in ("post-hoc", "intermediate"):
            ours, verdict = better(rows, name, "hybrid", measures, regime=regime)
            found.append(Claim(f"tokens of {name} placement separate the classes better than those "
                               f"of hybrid", f"{regime}, {results['setting']}", "Fig. 8",
                               "a picture", ours, verdict))
    return found


def draw(results, lab):
    """Held-out images in the plane of the discriminants: a row a regime, a column a model."""
    colours = [*COLOURS, "#F0E442", "#882255"]
    figure, panels = plt.subplots(len(REGIMES), len(MODELS), figsize=(10, 5.6),
                                  layout="constrained")
    for axes, cloud in zip(panels.ravel(), results["clouds"]):
        for k, name in enumerate(results["names"]):
            mine = np.array(cloud["labels"]) == k
            axes.plot(np.array(cloud["x"])[mine], np.array(cloud["y"])[mine], ".", markersize=3,
                      color=colours[k % len(colours)], label=name)
        accuracy, = numbers_of(results["rows"], "probe", regime=cloud["regime"],
                               model=cloud["model"], seed=0)
        axes.set_title(f"{cloud['model']}, {cloud['regime']} tokens\n"
                       f"seed 0, accuracy {accuracy:.2f}", size=9)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8, markerscale=3)
    return figure


main = partial(conduct, "features")

if __name__ == "__main__":
    run_main(main)
