"""
`python -m theory`: the table of claims, and the figures of theory/README.md into assets/.

    python -m theory            # under a minute; --table alone leaves the figures as they are
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from theory.claims import BASES, CLAIMS, mean_error, relative, value_passed_on, value_unseen
from theory.model import GaussianModel, decay, gain

ASSETS = Path(__file__).parents[1] / "assets"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
WIDTHS = 21, 30, 26, 40, 12                          # columns of the table, in characters


def print_table():
    def line(cells):
        parts = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, WIDTHS)]
        for k in range(max(map(len, parts))):
            print(" | ".join((part[k] if k < len(part) else "").ljust(width)
                             for part, width in zip(parts, WIDTHS)).rstrip())
        print("-+-".join("-" * width for width in WIDTHS), flush=True)

    line(("equation", "claim", "how checked", "worst error or counterexample", "verdict"))
    for claim in CLAIMS:
        row = claim()
        line((row.equation, row.claim, row.how, row.worst, row.verdict))


def save(figure, name):
    figure.savefig(ASSETS / f"theory-{name}.png", dpi=120)
    plt.close(figure)
    print(f"wrote assets/theory-{name}.png")


def draw_expansion():
    """Claims 3 and 4: Eq. (15) against the exact operator, and where the expansion is one."""
    U, pixels = BASES["DCT"]
    times = np.linspace(0.01, 0.99, 99)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    errors = {"printed": [], "zeroth": [], "first": []}
    for t in times:
        m = GaussianModel(U, decay(64, 2.0), pixels[4], 16, t)
        for name, operator in (("printed", m.printed_sums("printed")),
                               ("zeroth", m.printed_sums("corrected")),
                               ("first", m.expansion(as_printed=False, order=1))):
            errors[name].append(relative(operator, m.dit_operator))
    for name, label, colour, style in (
        ("printed", r"Eq. (15) as printed, $\lambda_i/t$", ORANGE, "-"),
        ("zeroth", "Eq. (15) with $1/t$", BLUE, "--"),
        ("first", "and the first-order term", GREEN, ":"),
    ):
        left.plot(times, errors[name], color=colour, linestyle=style, label=label, linewidth=2)
    left.set(yscale="log", ylim=(1e-10, 1e2), xlabel="t, from data to noise",
             ylabel="relative error of DiT's operator")
    for alpha, colour, style in ((1.5, PINK, "-"), (2.0, BLUE, "--"), (4.0, GREEN, ":")):
        values = [GaussianModel(U, decay(64, alpha), pixels[4], 16, t).smallness for t in times]
        right.plot(times, values, color=colour, linestyle=style, linewidth=2,
                   label=rf"$\alpha = {alpha:g}$")
    right.axhline(0.1, color=GREY, linewidth=1)
    right.text(0.98, 0.13, "small below this line", ha="right", color=GREY, size=8)
    right.set(yscale="log", xlabel="t, from data to noise",
              ylabel=r"norm of $\hat D^{-1} \hat E$")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, "expansion")


def draw_errors():
    """Claim 6: smallest mean squared errors over DiP's."""
    times = np.linspace(0.02, 0.98, 25)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, r in zip(panels, (16, 1)):
        best = [mean_error(BASES["DCT"], decay(64, 2.0), r, t, "DiP") for t in times]
        for who, label, colour, style in (
            ("patch", "own patch alone", GREY, "-."), ("DiT", "DiT: Eq. (9)", ORANGE, "-"),
            ("patch and low", "own patch, low part of $x_t$", PINK, "--"),
            ("union", "both $x_t$ and Eq. (9)", GREEN, ":"),
        ):
            values = [mean_error(BASES["DCT"], decay(64, 2.0), r, t, who) for t in times]
            axes.plot(times, np.array(values) / best, color=colour, linestyle=style, label=label,
                      linewidth=2)
        axes.axhline(1, color=BLUE, linewidth=2, label="DiP: all of $x_t$")
        axes.set(xlabel="t, from data to noise", title=f"r = {r} of 64 frequencies are low")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("smallest error, DiP = 1")
    panels[0].legend(fontsize=8)
    save(figure, "errors")


def draw_worth():
    """Claim 7: the gain, and what it costs not to see a frequency."""
    lam = np.logspace(-5, 1, 200)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for t, colour in ((0.1, ORANGE), (0.5, BLUE), (0.9, GREEN)):         # data, middle, noise
        left.plot(lam, t * gain(lam, t), color=colour, linewidth=2, label=f"t = {t}")
        right.plot(lam, value_unseen(lam, t), color=colour, linewidth=2)
        right.plot(lam, value_passed_on(lam, t), color=colour, linewidth=2, linestyle=":")
    right.plot([], [], color=GREY, label="unseen")
    right.plot([], [], color=GREY, linestyle=":", label="unseen, but noisy pixels passed on")
    left.axhline(1, color=GREY, linewidth=1)
    left.text(1e-5, 1.06, "copy the noisy input, over t", color=GREY, size=8)
    left.set(xscale="log", xlabel="eigenvalue: low variance is high frequency",
             ylabel="t times the gain of Eq. (16)", ylim=(-1, 1.3))
    right.set(xscale="log", yscale="log", ylim=(1e-4, 1e2), xlabel="eigenvalue",
              ylabel="loss added by not seeing it")
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, "worth")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table, draw nothing")
    options = parser.parse_args()
    print_table()
    if not options.table:
        draw_expansion()
        draw_errors()
        draw_worth()


if __name__ == "__main__":
    main()
