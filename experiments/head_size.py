"""
Fig. 10a: how deep and how wide should the U-Net head be?

    python -m experiments.head_size     # embedded shapes

Patches of 16 (4 tokens an image), so that the head may have one to four down/up-sampling stages;
its width is the number of base channels.  Tokens of 256 are narrower than such a patch's 768.
"""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from experiments.harness import AXES, BASE, COLOURS, Claim, better, conduct, numbers_of
from sample import run_main

PATCH_16 = BASE.replace(patch_size=16, head_depth=4)
DEPTHS, WIDTHS = (1, 2, 3, 4), (4, 8, 16, 32)


def measure(lab):
    models = {(depth, 16): PATCH_16.replace(head_depth=depth) for depth in DEPTHS}
    models |= {(4, width): PATCH_16.replace(head_width=width) for width in WIDTHS}
    rows = []
    for (depth, width), config in models.items():
        rows += lab.rows({f"depth {depth}, width {width}": config}, depth=depth, width=width)
    return dict(rows=rows)


def claims(results):
    rows, found = results["rows"], []
    for claim, paper, a, b in (
        ("2 stages are better than 1", "yes", (2, 16), (1, 16)),
        ("3 stages are better than 2", "yes, by less", (3, 16), (2, 16)),
        ("4 stages are better than 3", "hardly: saturates", (4, 16), (3, 16)),
        ("a width of 16 is better than 4", "a curve", (4, 16), (4, 4)),
        ("a width of 32 is better than 16", "no: no sustained gain", (4, 32), (4, 16)),
    ):
        a, b = (f"depth {depth}, width {width}" for depth, width in (a, b))
        found.append(Claim(f"U-Net head: {claim}", f"patch 16, {results['setting']}", "Fig. 10a",
                           paper, *better(rows, a, b)))
    return found


def draw(results, lab):
    """Both distances over depth at width 16, and over width at depth 4."""
    drawn, panels = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
    sweeps = [("down/up-sampling stages", DEPTHS, [dict(depth=d, width=16) for d in DEPTHS]),
              ("base channels", WIDTHS, [dict(depth=4, width=w) for w in WIDTHS])]
    for k, measure in enumerate(("loss", "frechet")):
        for axes, (label, values, where) in zip(panels[k::2], sweeps):
            found = [numbers_of(results["rows"], measure, **w) for w in where]
            places = range(len(values))
            for place, points in zip(places, found):
                axes.plot([place] * len(points), points, "o", color=COLOURS[k], alpha=0.7)
            axes.plot(places, [np.mean(points) for points in found], color=COLOURS[k])
            axes.set_xticks(places, values)
            axes.set(xlabel=label, ylabel=AXES[measure])
            axes.grid(alpha=0.3)
    return drawn


main = partial(conduct, "head_size")

if __name__ == "__main__":
    run_main(main)
