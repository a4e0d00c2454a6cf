"""
Do networks behave like the Gaussian model of Appendix A?  (theory/README.md has the theory.)

Images are drawn exactly from Assumptions A.3 and A.4, in the basis of the two-dimensional DCT, so
the optimal velocity is known in closed form: coefficient by coefficient, Eq. (16).  A DiT-only and
a DiP, with tokens narrower (32) and wider (96) than the 48 dimensions of a patch, are trained
alike.  What is measured is the excess of their loss over the smallest possible one, by frequency
and by t.
"""

import matplotlib.pyplot as plt
import numpy as np
import scipy.fft
import torch

from common import random_stream
from dip import DiPConfig
from experiments.models import Model, OneClass
from experiments.report import COLOURS, Claim, by_seed, plot_band

SIZE, ALPHA, VARIANCE = 16, 1.5, 0.25        # pixels a side; decay; variance of a pixel
TIMES = 0.1, 0.3, 0.5, 0.7, 0.9
BANDS = 0, 1, 4, 16, 64, 128, 256            # borders of the bands, in the order of frequency


def eigenvalues():
    """(SIZE, SIZE): i^-alpha in the order of radial frequency, scaled to the variance of a pixel;
    and the order itself, flat."""
    k = np.arange(SIZE)
    order = np.argsort(np.hypot(*np.meshgrid(k, k)).ravel(), kind="stable")
    values = np.empty(SIZE**2)
    values[order] = np.arange(1, SIZE**2 + 1) ** -ALPHA
    return (values * (VARIANCE * SIZE**2 / values.sum())).reshape(SIZE, SIZE), order


class GaussianData(OneClass):
    """Independent images; three independent channels."""

    deviations = np.sqrt(eigenvalues()[0])[..., None]

    def __getitem__(self, index):
        """float (SIZE, SIZE, 3), as levels from 0 to 255, neither rounded nor clipped; label 0"""
        normal = np.random.default_rng((2511, index)).standard_normal((SIZE, SIZE, 3))
        x_0 = scipy.fft.idctn(normal * self.deviations, axes=(0, 1), norm="ortho")
        return ((x_0 + 1) * 127.5).astype(np.float32), 0


def models(width):
    base = DiPConfig(image_size=SIZE, patch_size=4, hidden_size=width, depth=4, num_heads=4,
                     num_classes=1, head="none")
    training = dict(batch_size=64, micro_batch=64, warmup=100, label_dropout=0.0)
    unet = base.replace(head="unet", head_width=16, head_depth=2)
    return {kind: Model(config, 1e-3, GaussianData(200_000), training=training)
            for kind, config in (("DiT-only", base), ("DiP", unet))}


MODELS = {f"tokens of {width}": models(width) for width in (32, 96)}
MARKS = 1500,
CLAIMS = [Claim("a DiP is nearer to the optimal velocity", "DiP", "DiT-only",
                tuple(f"excess at t = {t}" for t in (0.9, 0.5, 0.1)), "Remark A.7", "no figure")]


def spectrum(x):
    """(B, 3, SIZE, SIZE) -> DCT coefficients"""
    return scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")


@torch.no_grad()
def excess(net, n):
    """(times, SIZE, SIZE): E |v - v*|^2 per coefficient, over n fresh images and three channels."""
    values, result = eigenvalues()[0], []
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


def smallest_loss():
    """(times, SIZE, SIZE): Var(v | x_t) of each coefficient."""
    values, t = eigenvalues()[0], np.array(TIMES)[:, None, None]
    return values / ((1 - t) ** 2 * values + t**2)


def in_bands(x):
    """(times, SIZE, SIZE) -> (times, bands), means over the coefficients of a band"""
    x = x.reshape(len(TIMES), -1)[:, eigenvalues()[1]]
    return [[float(row[a:b].mean()) for a, b in zip(BANDS, BANDS[1:])] for row in x]


def measure(lab, name, model, net):
    found = excess(net.cpu(), 32 if lab.quick else 1000)
    total = found.mean(axis=(1, 2)).tolist()
    return dict(excess=in_bands(found), **{f"excess at t = {t}": x for t, x in zip(TIMES, total)})


def draw(results, lab):
    """Excess by frequency: a row for each width, a column for some times."""
    columns = [TIMES.index(t) for t in (0.1, 0.5, 0.9)]
    figure, panels = plt.subplots(len(MODELS), len(columns), figsize=(9, 5), sharex=True,
                                  sharey=True, layout="constrained")
    names = [f"{a + 1}-{b}" if b > a + 1 else str(b) for a, b in zip(BANDS, BANDS[1:])]
    for line, group in zip(panels, MODELS):
        for axes, k in zip(line, columns):
            for kind, colour, marker in (("DiT-only", COLOURS[1], "s"), ("DiP", COLOURS[0], "o")):
                found = by_seed(results["rows"], "excess", group=group, model=kind).values()
                plot_band(axes, names, [bands[k] for bands in found], colour, marker=marker,
                          label=kind)
            axes.plot(names, in_bands(smallest_loss())[k], "k:", label="smallest possible loss")
            axes.set(yscale="log", title=f"t = {TIMES[k]}, {group}")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("excess loss a coefficient")
    for axes in panels[-1]:
        axes.set_xlabel("frequency, in order")
        axes.tick_params(axis="x", rotation=45)
    panels[0][0].legend(fontsize=8)
    return figure
