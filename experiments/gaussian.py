"""
Do networks behave like the Gaussian model of Appendix A?  (theory/README.md has the theory.)

    python -m experiments.gaussian              # 12 runs, about 25 minutes on 2 cores; resumes

Images are drawn exactly from Assumptions A.3 and A.4, in the basis of the two-dimensional DCT, so
the optimal velocity is known in closed form: coefficient by coefficient, Eq. (16).  A DiT-only and
a DiP, with tokens narrower (32) and wider (96) than the 48 values of a patch, are trained alike
from three seeds.  What is measured is the excess of their loss over the smallest possible one, by
frequency and by t.  Writes experiments/results/gaussian.json and assets/gaussian.png.
"""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import scipy.fft
import torch

from dip import DiPConfig
from experiments import harness
from experiments.harness import COLOURS, Claim, RunOptions, better, conduct
from sample import random_stream, run_main

SIZE, ALPHA, VARIANCE = 16, 1.5, 0.25        # pixels a side; decay; variance of a pixel
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
WIDTHS, STEPS = (32, 96), 1500
TRAINING = dict(batch_size=64, micro_batch=64, lr=1e-3, warmup=100, label_dropout=0.0)
BANDS = (0, 1, 4, 16, 64, 128, 256)          # borders of the bands, in the order of frequency
MODELS = "DiT-only", "DiP"
DATA, Options = "Gaussian images", RunOptions


def eigenvalues():
    """(SIZE, SIZE): i^-alpha in the order of radial frequency, scaled to the variance of a pixel;
    and the order itself, flat."""
    k = np.arange(SIZE)
    order = np.argsort(np.hypot(*np.meshgrid(k, k)).ravel(), kind="stable")
    values = np.empty(SIZE**2)
    values[order] = np.arange(1, SIZE**2 + 1) ** -ALPHA
    return (values * (VARIANCE * SIZE**2 / values.sum())).reshape(SIZE, SIZE), order


class GaussianData:
    """Independent images; three independent channels."""

    classes = names = ["Gaussian"]
    flip = False
    bad = torch.zeros(0, dtype=torch.bool)

    def __init__(self, length=200_000):
        self.length, self.deviations = length, np.sqrt(eigenvalues()[0])[..., None]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        """float (SIZE, SIZE, 3), as levels from 0 to 255, neither rounded nor clipped; label 0"""
        normal = np.random.default_rng((2511, index)).standard_normal((SIZE, SIZE, 3))
        x_0 = scipy.fft.idctn(normal * self.deviations, axes=(0, 1), norm="ortho")
        return ((x_0 + 1) * 127.5).astype(np.float32), 0


def spectrum(x):
    """(B, 3, SIZE, SIZE) -> DCT coefficients"""
    return scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")


@torch.no_grad()
def excess(model, n):
    """(times, SIZE, SIZE): E |v - v*|^2 per coefficient, over n fresh images and three channels."""
    values, result = eigenvalues()[0], []
    for t in TIMES:
        g = random_stream("Gaussian images", t)
        x_0 = torch.randn(n, 3, SIZE, SIZE, generator=g).numpy() * np.sqrt(values)
        noise = torch.randn(n, 3, SIZE, SIZE, generator=g)
        x_0 = torch.from_numpy(scipy.fft.idctn(x_0, axes=(2, 3), norm="ortho")).float()
        x_t = (1 - t) * x_0 + t * noise
        v = model(x_t, torch.full((n,), t), torch.zeros(n, dtype=torch.long))
        best = spectrum(x_t) * (t - (1 - t) * values) / ((1 - t) ** 2 * values + t**2)
        result.append(((spectrum(v) - best) ** 2).mean(axis=(0, 1)))
    return np.stack(result)


def smallest_loss():
    """(times, SIZE, SIZE): Var(v | x_t) of each coefficient."""
    values, t = eigenvalues()[0], np.array(TIMES)[:, None, None]
    return values / ((1 - t) ** 2 * values + t**2)


def width_bound(width):
    """(times,): the least excess, a coefficient, of any model whose last layer is linear in tokens
    of that width, as DiT's is: of the 48 directions of v* in a patch it must miss the weakest."""
    values, basis = eigenvalues()[0].ravel(), scipy.fft.idct(np.eye(SIZE), axis=0, norm="ortho")
    U, found = np.kron(basis, basis), []
    patches = np.arange(SIZE**2).reshape(SIZE // 4, 4, SIZE // 4, 4).swapaxes(1, 2).reshape(-1, 16)
    for t in TIMES:
        variance = (t - (1 - t) * values) ** 2 / ((1 - t) ** 2 * values + t**2)      # of v*
        per_patch = [np.linalg.eigvalsh((U[p] * variance) @ U[p].T) for p in patches]
        missed = [np.sort(np.tile(x, 3))[:max(0, 48 - width)].sum() / 48 for x in per_patch]
        found.append(float(np.mean(missed)))
    return found


def in_bands(x):
    """(times, SIZE, SIZE) -> (times, bands), means over the coefficients of a band"""
    order = eigenvalues()[1]
    x = x.reshape(len(TIMES), -1)[:, order]
    return [[float(row[a:b].mean()) for a, b in zip(BANDS, BANDS[1:])] for row in x]


def measure(lab):
    rows, n = [], 32 if lab.options.quick else 1000
    for width in WIDTHS:
        for kind in MODELS:
            head = dict(head="unet", head_width=16, head_depth=2) if kind == "DiP" else dict(
                head="none", head_width=0, head_depth=0)
            config = DiPConfig(image_size=SIZE, patch_size=4, hidden_size=width, depth=4,
                               num_heads=4, num_classes=1, **head)
            for seed in lab.seeds:
                model = lab.train(config, seed, lab.steps(STEPS), data=GaussianData(),
                                  **TRAINING)[0].cpu()
                weights = sum(p.numel() for p in model.parameters())
                found = excess(model, n)
                rows.append(dict(model=kind, width=width, seed=seed, parameters=weights,
                                 excess=in_bands(found), total=found.mean(axis=(1, 2)).tolist()))
                print(f"{kind:<9} tokens of {width:<3} seed {seed}: excess by t "
                      + " ".join(f"{x:.4f}" for x in rows[-1]["total"]), flush=True)
    return dict(
        size=SIZE, times=TIMES, bands=BANDS,
        training=harness.TRAINING | TRAINING, n=n, alpha=ALPHA, pixel_variance=VARIANCE,
        rows=rows, smallest_loss=in_bands(smallest_loss()),
        width_bound={str(width): width_bound(width) for width in WIDTHS})


def claims(results):
    """Appendix A: what the head is said to do, where t is not small and where it is."""
    found = []
    for width, regime in zip(WIDTHS, ("narrow", "wide")):
        for t in (0.9, 0.5, 0.1):
            rows = [row | {"excess": row["total"][TIMES.index(t)]} for row in results["rows"]]
            ours, verdict = better(rows, "DiP", "DiT-only", ("excess",), width=width)
            found.append(Claim(
                f"a DiP is nearer to the optimal velocity than a DiT-only at t = {t}",
                f"{regime} ({width}), {results['setting']}", "Remark A.7", "no figure", ours,
                verdict))
    return found


def draw(results, lab):
    """Excess by frequency: a row for each width, a column for some times."""
    columns = [TIMES.index(t) for t in (0.1, 0.5, 0.9)]
    figure, panels = plt.subplots(len(WIDTHS), len(columns), figsize=(9, 5), sharex=True,
                                  sharey=True, layout="constrained")
    names = [f"{a + 1}-{b}" if b > a + 1 else str(b) for a, b in zip(BANDS, BANDS[1:])]
    for row, width in zip(panels, WIDTHS):
        for axes, k in zip(row, columns):
            for kind, colour, marker in zip(MODELS, (COLOURS[1], COLOURS[0]), "so"):
                runs = np.array([r["excess"] for r in results["rows"]
                                 if (r["model"], r["width"]) == (kind, width)])[:, k]
                axes.plot(names, runs.mean(0), color=colour, marker=marker, label=kind)
                axes.fill_between(names, runs.min(0), runs.max(0), color=colour, alpha=0.25)
            axes.plot(names, results["smallest_loss"][k], "k:", label="smallest possible loss")
            axes.set(yscale="log", title=f"t = {TIMES[k]}, tokens of {width}")
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("frequency, in order")
        axes.tick_params(axis="x", rotation=45)
    for row in panels:
        row[0].set_ylabel("excess loss a coefficient")
    panels[0][0].legend(fontsize=8)
    return figure


main = partial(conduct, "gaussian")

if __name__ == "__main__":
    run_main(main)
