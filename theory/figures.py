"""
The figures of theory/README.md: `python -m theory --draw` writes them into assets/.

No test compares their bytes: those depend on the fonts and the version of matplotlib.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from theory import tokens
from theory.claims import BASES, NORM_TIMES
from theory.model import GaussianModel, cost_passed_on, cost_unseen, image_decay

ASSETS = Path(__file__).parents[1] / "assets"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
TIME = "t, from data (0) to noise (1)"


def new_figure(**options):
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", **options)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def save(figure, name):
    figure.savefig(ASSETS / f"theory-{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"wrote assets/theory-{name}.png")


def draw_token():
    """Section 1 and 7: a frequency that is missing, and a token that is too narrow."""
    figure, (left, right) = new_figure()
    lam = np.logspace(-5, 1, 200)
    colours = (0.1, PINK), (0.3, ORANGE), (0.9, GREEN)
    for t, colour in colours:
        left.plot(lam, cost_unseen(lam, t), color=colour, linewidth=2, label=f"t = {t}")
        left.plot(lam, cost_passed_on(lam, t), color=colour, linewidth=2, linestyle=":")
    left.plot([], [], color=GREY, label="not seen")
    left.plot([], [], color=GREY, linestyle=":", label="not seen, but $x_t/t$ passed on")
    left.set(xscale="log", yscale="log", ylim=(1e-5, 1e4),
             xlabel=r"variance $\lambda$ of a frequency (high frequency: small)",
             ylabel="squared error added", title="One frequency that is missing")
    left.legend(fontsize=8, loc="upper left")
    widths = np.arange(0, 49)
    for how, label, style in (("v", "v from the token", "-"), ("x", "$x_0$ from the token", ":"),
                              ("skip", "v, linear skip", "--")):
        for t, colour in colours:
            costs = [tokens.gaussian_costs(int(k), t)[how] for k in widths]
            right.plot(widths, costs, color=colour, linestyle=style, linewidth=2)
        right.plot([], [], color=GREY, linestyle=style, label=label)
    for t, colour in colours:
        right.plot([], [], color=colour, label=f"t = {t}")
    right.set(yscale="log", ylim=(1e-5, 1e2), xlabel="dimensions of a token, for a patch of 48",
              ylabel="least squared error added, per value", title="A token that is narrow")
    right.legend(fontsize=8, ncols=2, loc="upper right")
    save(figure, "token")


def draw_bound():
    """Section 7: the bound for images of any kind, and what was measured on shapes."""
    figure, (left, right) = new_figure(sharey=True)
    tenths = np.arange(10) / 10 + 0.05
    for (k, side), colour in zip(tokens.TRAINED, (BLUE, ORANGE, GREEN, PINK)):
        left.plot(tokens.SHAPES_TIMES, tokens.shapes_bound(k, side)[0], color=colour, linewidth=2,
                  label=f"{k} for {3 * side**2}")
        left.plot(tenths, tokens.measured_gain(k, side), color=colour, marker="o", linestyle=":",
                  markersize=4)
    left.plot([], [], color=GREY, label="bound")
    left.plot([], [], color=GREY, linestyle=":", marker="o", label="measured gain of a head")
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel=TIME, ylabel="squared error in v, per value", title="Drawn shapes")
    left.legend(fontsize=8, ncols=2, loc="upper left", title_fontsize=8,
                title="dimensions of a token for values of a patch")
    times = np.linspace(0.01, 0.99, 99)
    for k, side, colour in ((384, 32, PINK), (768, 32, GREEN), (1152, 32, BLUE), (384, 16, ORANGE),
                            (1152, 16, GREY)):
        label = f"{k} for {3 * side**2}" + {(1152, 32): " (DiP-XL/32)",
                                            (1152, 16): " (DiP-XL/16)"}.get((k, side), "")
        for kind, style in (("256", "-"), ("native", "--")):
            bound = [tokens.photo_bounds(f"photos_{kind}_{side}", k, t)[0] for t in times]
            right.plot(times, bound, color=colour, linewidth=2, linestyle=style,
                       label=label if kind == "256" else None)
    right.set(xlabel=TIME, title="Photographs: bound", ylim=(-0.12, 1.3))
    right.plot([], [], color=GREY, label="cropped to 256 px")
    right.plot([], [], color=GREY, linestyle="--", label="as stored")
    right.legend(fontsize=8, loc="upper left", ncols=2)
    save(figure, "bound")


def draw_errors():
    """Section 5: smallest errors, by what is seen."""
    times = np.linspace(0.05, 0.95, 19)
    figure, panels = new_figure(sharey=True)
    U, patches = BASES["cosines"]
    for axes, r in zip(panels, (16, 4)):
        models = [GaussianModel(U, image_decay(64, 2.0), patches, 4, r, t) for t in times]
        best = [m.mean_error("DiP") for m in models]
        for who, label, colour, style in (
            ("patch", "own patch alone", GREY, "-."),
            ("patch and low", "own patch, low part of $x_t$", PINK, "--"),
            ("DiT", r"DiT: $\hat x_t$", ORANGE, "-"), ("both", r"both $x_t$ and $\hat x_t$",
                                                       GREEN, ":"),
        ):
            values = [m.mean_error(who) for m in models]
            axes.plot(times, np.array(values) / best, color=colour, linestyle=style, label=label,
                      linewidth=2)
        axes.axhline(1, color=BLUE, linewidth=2, label="DiP: all of $x_t$")
        axes.set(xlabel=TIME, title=f"{r} of 64 frequencies are low")
    panels[0].set_ylabel("smallest error, DiP = 1")
    panels[0].legend(fontsize=8, loc="lower right")
    save(figure, "errors")


def draw_norms():
    """Section 6: norms of the exact operators over t."""
    figure, panels = new_figure(sharey=True)
    for axes, name, curves in (
        (panels[0], "cosines", (("DiT, r = 16, border patch", GREEN, "-", 16, 0),
                                ("DiT, r = 16, middle patch", PINK, "-", 16, 4),
                                ("DiT, r = 4, middle patch", ORANGE, "-", 4, 4),
                                ("DiP, middle patch", BLUE, "--", None, 4))),
        (panels[1], "two dimensions", (("DiT, r = 16", PINK, "-", 16, 2),
                                       ("DiT, r = 4", ORANGE, "-", 4, 2),
                                       ("DiP", BLUE, "--", None, 2))),
    ):
        U, patches = BASES[name]
        for label, colour, style, r, s in curves:
            models = [GaussianModel(U, image_decay(64, 2.0), patches, s, r or 4, t)
                      for t in NORM_TIMES]
            norms = [np.linalg.norm(m.dit_by_gains if r else m.dip_operator, 2) for m in models]
            axes.plot(NORM_TIMES, norms, color=colour, linestyle=style, linewidth=2, label=label)
        axes.set(xscale="log", yscale="log", xlabel=TIME, xlim=(1e-7, 1))
        axes.legend(fontsize=8, loc="upper right")
    panels[0].set(ylabel="spectral norm of the operator", title="one dimension, patches of 8")
    panels[1].set(title="two dimensions, patches of 4 x 4")
    save(figure, "norms")


def draw():
    for figure in (draw_token, draw_bound, draw_errors, draw_norms):
        figure()
