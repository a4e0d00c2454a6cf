"""
Fig. 10b: a DiT on small patches, or a DiP on large ones?

    python -m experiments.patch_size    # embedded shapes

Tokens have 256 numbers: more than a patch of 4 or 8 (48, 192), fewer than one of 16 (768).
"""

from functools import partial

import matplotlib.pyplot as plt

from experiments.harness import AXES, BASE, COLOURS, Claim, better, conduct
from experiments.head_size import PATCH_16
from sample import run_main

MODELS = {f"DiT-only/{P}": BASE.replace(patch_size=P, head="none", head_width=0, head_depth=0)
          for P in (4, 8, 16)}
MODELS |= {"DiP/8": BASE, "DiP/16": PATCH_16}


def measure(lab):
    return dict(rows=lab.rows(MODELS))


def claims(results):
    rows, found = results["rows"], []
    cost = {row["model"]: row["gflops"] for row in rows}
    for claim, a, b in (
        ("a DiT-only is better with patches of 4 than of 8", "DiT-only/4", "DiT-only/8"),
        ("a DiT-only is better with patches of 8 than of 16", "DiT-only/8", "DiT-only/16"),
        ("a DiP is better with patches of 8 than of 16", "DiP/8", "DiP/16"),
        ("a DiP with patches of 8 is better than a DiT-only with 4", "DiP/8", "DiT-only/4"),
        ("a DiP with patches of 16 is better than a DiT-only with 8", "DiP/16", "DiT-only/8"),
    ):
        ours, verdict = better(rows, a, b)
        ours += f"; {cost[a]:.3f} against {cost[b]:.3f} GFLOPs"
        found.append(Claim(claim, results["setting"], "Fig. 10b", "a curve", ours, verdict))
    return found


def draw(results, lab):
    """Quality over FLOPs: a colour for each kind of model, a dot a seed."""
    drawn, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, measure in zip(panels, ("loss", "frechet")):
        for kind, colour in zip(("DiT-only", "DiP"), COLOURS):
            rows = [row for row in results["rows"] if row["model"].startswith(kind)]
            axes.plot([row["gflops"] for row in rows], [row[measure] for row in rows], "o",
                      color=colour, alpha=0.7, label=kind)
            for name in dict.fromkeys(row["model"] for row in rows):
                mine = [row for row in rows if row["model"] == name]
                axes.annotate("P = " + name.split("/")[1],
                              (mine[0]["gflops"], max(row[measure] for row in mine)),
                              textcoords="offset points", xytext=(0, 6), ha="center", size=8,
                              color=colour)
        axes.set(xlabel="GFLOPs per forward pass", ylabel=AXES[measure], xscale="log")
        axes.set_xticks((0.03, 0.1, 0.3), ("0.03", "0.1", "0.3"))
        axes.minorticks_off()
        axes.margins(0.15, 0.2)
        axes.grid(alpha=0.3, which="both")
    panels[0].legend()
    return drawn


main = partial(conduct, "patch_size")

if __name__ == "__main__":
    run_main(main)
