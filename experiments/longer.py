"""
Does the order of the models last?  Short runs mislead.

No head, the head in its place and beside DiT's own last layer, and as many FLOPs in a deeper DiT,
as in heads.py on shapes, trained four times as long.
"""

import matplotlib.pyplot as plt

from experiments import heads
from experiments.report import (LABELS, by_seed, colours_of, find, plot_curves, plot_dots,
                                plot_samples)

GROUP = "wide, shapes"
MODELS = {GROUP: {name: heads.MODELS[GROUP][name] for name in ("none", "unet", "sum", "deeper")}}
MARKS = 500, 1000, 2000, 4000, 8000
CLAIMS = [claim for claim in heads.CLAIMS if {claim.a, claim.b} <= MODELS[GROUP].keys()]


def draw(results, lab):
    """Losses over that of no head after as many steps; last distances; samples of seed 0."""
    rows, colours = results["rows"], colours_of(results["rows"])
    figure, axes = plt.subplot_mosaic("abc;ddd", figsize=(10, 5.6), layout="constrained",
                                      height_ratios=(1.2, 1))
    for panel, measure in (("a", "loss"), ("b", "detail")):
        curves = {name: {} for name in colours}
        for steps in MARKS:
            base = by_seed(rows, measure, model="none", steps=steps)
            for name in colours:
                found = by_seed(rows, measure, model=name, steps=steps)
                curves[name][steps] = [found[seed] / base[seed]
                                       for seed in found.keys() & base.keys()]
        plot_curves(axes[panel], curves, colours, "steps")
        axes[panel].set_title(f"{LABELS[measure]}, over that of none", size=10)
    axes["a"].legend(fontsize=8)
    plot_dots(axes["c"], find(rows, steps=MARKS[-1]), "frechet", colours)
    axes["c"].set_title(f"after {MARKS[-1]} steps", size=10)
    plot_samples(axes["d"], lab, MODELS[GROUP], MARKS[-1], 20)
    return figure
