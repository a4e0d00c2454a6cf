"""
The figures of theory/README.md: `python -m theory --draw` writes them into assets/.

No test compares their bytes: those depend on the fonts and the version of matplotlib.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from theory.claims import (BASES, NORM_TIMES, mean_error, operator_norms, relative,
                           token_costs)
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
    for t, colour in ((0.3, ORANGE), (0.6, BLUE), (0.9, GREEN)):
        left.plot(lam, cost_unseen(lam, t), color=colour, linewidth=2, label=f"t = {t}")
        left.plot(lam, cost_passed_on(lam, t), color=colour, linewidth=2, linestyle=":")
    left.plot([], [], color=GREY, label="not seen")
    left.plot([], [], color=GREY, linestyle=":", label="not seen, but $x_t/t$ passed on")
    left.set(xscale="log", yscale="log", ylim=(1e-5, 1e4),
             xlabel=r"variance $\lambda$ of a frequency (high frequency: small)",
             ylabel="squared error added", title="One frequency that is missing")
    left.legend(fontsize=8, loc="upper left")
    widths = np.arange(0, 49)
    for how, label, style in (("v", "v predicted", "-"), ("x", "x predicted", ":"),
                              ("head", "v, linear head\nbeside noisy pixels", "--")):
        for t, colour in ((0.1, PINK), (0.3, ORANGE), (0.9, GREEN)):
            costs = [token_costs(int(k), t)[how] for k in widths]
            right.plot(widths, costs, color=colour, linestyle=style, linewidth=2)
        right.plot([], [], color=GREY, linestyle=style, label=label)
    for t, colour in ((0.1, PINK), (0.3, ORANGE), (0.9, GREEN)):
        right.plot([], [], color=colour, label=f"t = {t}")
    right.set(yscale="log", ylim=(1e-5, 1e2), xlabel="dimensions of a token, for a patch of 48",
              ylabel="least squared error added, a coefficient", title="A token that is narrow")
    right.legend(fontsize=8, ncols=2, loc="upper right")
    save(figure, "token")


def draw_errors():
    """Section 5: smallest errors, by what is seen."""
    times = np.linspace(0.05, 0.95, 19)
    figure, panels = new_figure(sharey=True)
    lam = image_decay(64, 2.0)
    for axes, r in zip(panels, (16, 1)):
        best = [mean_error(BASES["DCT"], lam, r, t, "DiP") for t in times]
        for who, label, colour, style in (
            ("patch", "own patch alone", GREY, "-."),
            ("patch and low", "own patch, low part of $x_t$", PINK, "--"),
            ("DiT", r"DiT: $\hat x_t$", ORANGE, "-"), ("both", r"both $x_t$ and $\hat x_t$",
                                                       GREEN, ":"),
        ):
            values = [mean_error(BASES["DCT"], lam, r, t, who) for t in times]
            axes.plot(times, np.array(values) / best, color=colour, linestyle=style, label=label,
                      linewidth=2)
        axes.axhline(1, color=BLUE, linewidth=2, label="DiP: all of $x_t$")
        axes.set(xlabel=TIME, title=f"{r} of 64 frequencies are low")
    panels[0].set_ylabel("smallest error, DiP = 1")
    panels[0].legend(fontsize=8, loc="lower right")
    save(figure, "errors")


def draw_expansion():
    """Section 6: Eq. (15) against the exact operator, and where the expansion is one."""
    U, pixels = BASES["DCT"]
    times = np.linspace(0.02, 0.98, 97)
    models = [GaussianModel(U, image_decay(64, 2.0), pixels[4], 16, t) for t in times]
    figure, (left, right) = new_figure()
    for label, colour, style, operator in (
        (r"Eq. (15) as printed, $\lambda_i/t$", ORANGE, "-", lambda m: sum(m.eq15(True))),
        ("Eq. (15) with $1/t$", BLUE, "--", lambda m: sum(m.eq15(False))),
        ("and the next term", GREEN, ":", lambda m: sum(m.eq15(False)) + m.next_term),
    ):
        left.plot(times, [relative(operator(m), m.dit_operator) for m in models], color=colour,
                  linestyle=style, label=label, linewidth=2)
    left.set(yscale="log", ylim=(1e-8, 1e4), xlabel=TIME,
             ylabel="relative error of DiT's operator")
    for alpha, colour, style in ((1.5, PINK, "-"), (2.0, BLUE, "--"), (4.0, GREEN, ":")):
        values = [GaussianModel(U, image_decay(64, alpha), pixels[4], 16, t).smallness
                  for t in times]
        right.plot(times, values, color=colour, linestyle=style, linewidth=2,
                   label=rf"$\alpha = {alpha:g}$")
    right.axhline(0.1, color=GREY, linewidth=1)
    right.text(0.98, 0.13, "small below this line", ha="right", color=GREY, size=8)
    right.set(yscale="log", xlabel=TIME, ylabel=r"norm of $\hat D^{-1} \hat E$")
    for axes in (left, right):
        axes.legend(fontsize=8)
    save(figure, "expansion")


def draw_norms():
    """Section 6: norms of the exact operators over t."""
    figure, panels = new_figure(sharey=True)
    names = [(basis, alpha, r) for basis in BASES for alpha in (1.5, 2.0) for r in (4, 16)]
    for axes, alpha in zip(panels, (1.5, 2.0)):
        for (basis, its_alpha, r), (dit, dip) in zip(names, operator_norms(image_decay)):
            if its_alpha == alpha:
                style = {"DCT": "-", "2-D DCT": "--", "rotation": ":"}[basis]
                axes.plot(NORM_TIMES, dip, color=BLUE, linestyle=style)
                axes.plot(NORM_TIMES, dit, color={4: ORANGE, 16: PINK}[r], linestyle=style)
        axes.set(xscale="log", yscale="log", xlabel=TIME, xlim=(1e-7, 1),
                 title=rf"$\alpha = {alpha:g}$")
    for label, colour, style in (
        ("DiP", BLUE, "-"), ("DiT, 4 of 64 frequencies low", ORANGE, "-"),
        ("DiT, 16 of 64 low", PINK, "-"), ("DCT", GREY, "-"), ("2-D DCT", GREY, "--"),
        ("rotation", GREY, ":"),
    ):
        panels[1].plot([], [], color=colour, linestyle=style, label=label)
    panels[0].set_ylabel("spectral norm of the operator")
    panels[1].legend(fontsize=8)
    save(figure, "norms")


def draw():
    draw_token()
    draw_errors()
    draw_expansion()
    draw_norms()
