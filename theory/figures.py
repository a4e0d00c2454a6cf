"""
The figures of theory/README.md: `python -m theory --draw` writes them into assets/.

No test compares their bytes: those depend on the fonts and the version of matplotlib.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from theory import tokens
from theory.claims import BASES, NORM_TIMES
from theory.model import GaussianModel, image_decay

ASSETS = Path(__file__).parents[1] / "assets"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
TIME = "t, from data (0) to noise (1)"


def new_figure(**options):
    plt.switch_backend("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", **options)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def save(figure, name):
    figure.savefig(ASSETS / f"theory-{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"wrote assets/theory-{name}.png")


def draw_bound():
    """Section 7: the bound for images of any kind, and what was measured on shapes."""
    figure, (left, right) = new_figure(sharey=True)
    tenths = np.arange(10) / 10 + 0.05
    for (k, side), colour in zip(tokens.TRAINED, (BLUE, ORANGE, GREEN, PINK)):
        left.plot(tokens.SHAPES_TIMES, tokens.shapes_bound(k, side)[0], color=colour, linewidth=2,
                  label=f"{k} for {3 * side**2}")
        left.plot(tenths, tokens.measured_gain(k, side), "o:", color=colour, markersize=4)
    left.plot([], [], color=GREY, label="bound")
    left.plot([], [], "o:", color=GREY, label="measured gain of a head")
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel=TIME, ylabel="squared error in v, per value", title="Drawn shapes")
    left.legend(fontsize=8, ncols=2, loc="upper left", title_fontsize=8,
                title="dimensions of a token for values of a patch")
    times = np.linspace(0.01, 0.99, 99)
    for k, side, colour, model in (
            (384, 32, PINK, ""), (768, 32, GREEN, ""), (1152, 32, BLUE, " (DiP-XL/32)"),
            (384, 16, ORANGE, ""), (1152, 16, GREY, " (DiP-XL/16)")):
        for kind, style, label in (("256", "-", f"{k} for {3 * side**2}{model}"),
                                   ("native", "--", None)):
            bound = [tokens.photo_bounds(f"photos_{kind}_{side}", k, t)[0] for t in times]
            right.plot(times, bound, style, color=colour, linewidth=2, label=label)
    right.set(xlabel=TIME, title="Photographs: bound", ylim=(-0.12, 1.3))
    right.plot([], [], color=GREY, label="cropped to 256 px")
    right.plot([], [], "--", color=GREY, label="as stored")
    right.legend(fontsize=8, loc="upper left", ncols=2)
    save(figure, "bound")


def draw_limits():
    """Sections 5 and 6: smallest errors by what is seen, and norms of the exact operators."""
    figure, (left, right) = new_figure()
    (U, patches), lam = BASES["cosines"], image_decay(64, 2.0)
    models = [GaussianModel(U, lam, patches, 4, 4, t) for t in np.linspace(0.05, 0.95, 19)]
    for who, label, colour, style in (
            ("patch", "own patch alone", GREY, "-."),
            ("patch and low", "own patch, low part of $x_t$", PINK, "--"),
            ("DiT", r"DiT: $\hat x_t$", ORANGE, "-"),
            ("both", r"both $x_t$ and $\hat x_t$", GREEN, ":")):
        left.plot([m.t for m in models], [m.mean_error(who) / m.mean_error("DiP") for m in models],
                  style, color=colour, label=label, linewidth=2)
    left.axhline(1, color=BLUE, linewidth=2, label="DiP: all of $x_t$")
    left.set(xlabel=TIME, ylabel="smallest error, DiP = 1", title="What is seen (r = 4)")
    left.legend(fontsize=8, loc="lower right")
    for label, colour, style, r, s in (
            ("DiT, r = 16, border patch", GREEN, "-", 16, 0),
            ("DiT, r = 16, middle patch", PINK, "-", 16, 4),
            ("DiT, r = 4, middle patch", ORANGE, "-", 4, 4),
            ("DiP, middle patch", BLUE, "--", None, 4)):
        models = [GaussianModel(U, lam, patches, s, r or 4, t) for t in NORM_TIMES]
        norms = [np.linalg.norm(m.dit_by_gains if r else m.dip_operator, 2) for m in models]
        right.plot(NORM_TIMES, norms, style, color=colour, linewidth=2, label=label)
    right.set(xscale="log", yscale="log", xlabel=TIME, xlim=(1e-7, 1),
              ylabel="spectral norm of the operator", title="How much the guess amplifies")
    right.legend(fontsize=8, loc="upper right")
    save(figure, "limits")


def draw():
    draw_bound()
    draw_limits()
