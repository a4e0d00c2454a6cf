"""
From measured rows to tables and figures.

A row of results/NAME.json is one training after some steps.  Seeds 0, 1 and 2 are judged; seed 9
only chooses learning rates.  Models are compared in pairs of one seed, which see the same images,
times and noise: the mean of the differences to the first model of the group ± its standard error.
Bold: beyond three standard errors, of three seeds.  By chance that is so in one comparison of ten
(Student's t with two degrees of freedom).
"""

import json
import math
import re
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from sample import save_atomically

HERE, SEEDS, RATE_SEED = Path(__file__).parent, (0, 1, 2), 9
LABELS = {"loss": "loss", "detail": "loss at t < 0.3", "frechet": "Fréchet distance",
          "recognised": "recognised", "seam": "seam", "psnr": "PSNR, dB", "probe": "accuracy",
          "to_tree": "distance to the tree", "from_tree": "distance from the tree",
          **{f"excess at t = {t}": f"excess at t = {t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)}}
ANSWER = {               # what the first table of the page compares
    "narrow, 1000 steps": ("crossover", "16 of 48", 1000),
    "wide, 2000 steps": ("heads", "wide, shapes", 2000),
    "wide, 8000 steps": ("heads", "wide, shapes, longer", 8000),
    "photos, 2000 steps": ("heads", "wide, photos", 2000),
    "photos of 64, 10,000 steps": ("heads", "photos of 64", 10_000)}


def read_rows(name, folder=HERE / "results"):
    path = Path(folder, f"{name}.json")
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write_rows(name, rows, folder):
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    save_atomically(Path(folder, f"{name}.json"),
                    lambda partial: partial.write_text('{"rows": [\n' + text + "\n]}\n"))


def find(rows, **where):
    return [row for row in rows if all(row.get(key) == x for key, x in where.items())]


def by_seed(rows, measure, **where):
    """{seed: figure} of the judged rows that agree with `where` and have it."""
    return {row["seed"]: row[measure] for row in find(rows, **where)
            if row["seed"] in SEEDS and row.get(measure) is not None}


def differences(rows, measure, model, reference, **where):
    """model - reference, one a seed that both have."""
    a, b = (by_seed(rows, measure, model=name, **where) for name in (model, reference))
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def rates_of(rows, group, model):
    """{learning rate: loss} on seed 9; infinite where the training diverged."""
    return {row["lr"]: math.inf if row["loss"] is None else row["loss"]
            for row in find(rows, group=group, model=model, seed=RATE_SEED)}


def format_mean(numbers):
    """Mean ± standard deviation over the seeds, to three digits or to the first of the spread."""
    if not numbers:
        return "-"
    mean, spread = statistics.mean(numbers), statistics.stdev(numbers) if numbers[1:] else 0
    n = max(0, *(digits - math.floor(math.log10(abs(x)))
                 for x, digits in ((mean, 2), (spread, 0)) if x))
    return f"{mean:.{n}f}" + (f" ± {spread:.{n}f}" if numbers[1:] else " (1 seed)")


def format_difference(numbers):
    """Mean ± standard error; bold beyond three standard errors, of three seeds."""
    if len(numbers) < 2:
        return ""
    mean, error = statistics.mean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))
    n = max(0, 1 - math.floor(math.log10(error))) if error else 3
    bold = "**" if abs(mean) > 3 * error and numbers[2:] else ""
    return f"{bold}{mean:+.{n}f} ± {error:.{n}f}{bold}".replace("-", "−")


def markdown(header, lines):
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def table(groups, rows, measures=tuple(LABELS), last=False):
    """A line a model, after all numbers of steps or the last; a column a measure, and one of its
    differences to the first model of the group."""
    measures, lines = [m for m in measures if any(m in row for row in rows)], []
    for group, models in groups.items():
        first = next(iter(models))
        for steps in models[first].steps[-1 if last else 0:]:
            for model in models:
                place = dict(group=group, steps=steps)
                found = [row for row in find(rows, model=model, **place) if row["seed"] in SEEDS]
                if not found:
                    continue
                cells = [group, model, str(steps), f"{found[0].get('gflops', 0):.3f}"]
                for m in measures:
                    cells.append(format_mean([row[m] for row in found if row.get(m) is not None]))
                    cells.append(format_difference(differences(rows, m, model, first, **place)))
                lines.append(cells)
    columns = [name for m in measures for name in (LABELS[m], "to the first")]
    return markdown(["group", "model", "steps", "GFLOPs", *columns], lines)


def rates_table(groups, rows):
    """Loss on seed 9 at each learning rate; bold: the lowest."""
    rates = sorted({row["lr"] for row in find(rows, seed=RATE_SEED)})
    lines = []
    for group, models in groups.items():
        for model in models:
            if tried := rates_of(rows, group, model):
                cells = [f"{tried[lr]:.4f}" if lr in tried else "-" for lr in rates]
                best = rates.index(min(tried, key=tried.get))
                cells[best] = f"**{cells[best]}**"
                lines.append([group, model, *cells])
    return markdown(["group", "model", *map("{:g}".format, rates)], lines) if lines else ""


def answer(read=read_rows):
    """The differences U-Net - no head, in units of each measure: a line a measure."""
    lines = []
    for m in ("loss", "detail", "frechet", "recognised", "seam"):
        found = [differences(read(name), m, "U-Net", "no head", group=group, steps=steps)
                 for name, group, steps in ANSWER.values()]
        lines.append([LABELS[m], *map(format_difference, found)])
    return markdown(["U-Net minus no head", *ANSWER], lines)


# -------------------------------------------------------------------------------------------------
# Figures


def dots(rows, groups, measures=("loss", "frechet")):
    """A panel for each measure and group, after the group's last step: a line a model, a dot a
    seed."""
    rows = [row for row in rows if row["group"] in groups and row["seed"] in SEEDS]
    models = list(dict.fromkeys(row["model"] for row in rows))
    height = len(measures) * (0.2 * len(models) + 0.7)
    figure, panels = plt.subplots(len(measures), len(groups), figsize=(10, height), sharey=True,
                                  squeeze=False, layout="constrained")
    for line, measure in zip(panels, measures):
        for axes, group in zip(line, groups):
            steps = max(row["steps"] for row in find(rows, group=group))
            for place, model in enumerate(models):
                found = by_seed(rows, measure, group=group, model=model, steps=steps).values()
                axes.plot(list(found), [place] * len(found), "o", alpha=0.7, markersize=5)
            axes.set(xscale="log", ylim=(len(models) - 0.5, -0.5), xlabel=LABELS[measure])
            axes.set_yticks(range(len(models)), models)
            for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                axis("{x:.3g}")
            axes.tick_params(axis="x", which="both", labelsize=7, rotation=60)
            axes.grid(alpha=0.3, which="both")
            axes.set_title(f"{group}, {steps} steps", size=9)
    return figure


def crossover(rows):
    """Losses and distance over the width of tokens, with the least loss that a token allows."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    widths = {f"{D} of 48": D / 48 for D in (16, 36, 48, 72, 144)}
    for axes, measure in zip(panels, ("loss", "detail", "frechet")):
        for model, colour in (("no head", "C1"), ("U-Net", "C0")):
            found = [list(by_seed(rows, measure, group=group, model=model).values())
                     for group in widths]
            axes.plot(widths.values(), found, "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(widths.values(), np.mean(found, axis=1), color=colour, label=model)
        for ratio, name in ((0.375, "DiP-XL/32"), (1.5, "DiP-XL/16")):
            axes.axvline(ratio, color="grey", linestyle=":")
            axes.text(ratio, 1.01, name, transform=axes.get_xaxis_transform(), size=8, ha="center",
                      color="grey")
        axes.set(xscale="log", yscale="log", xlabel="width of a token / values of a patch")
        axes.set_title(LABELS[measure], size=10, pad=16)
        axes.set_xticks(list(widths.values()), ["0.33", "0.75", "1", "1.5", "3"])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.grid(alpha=0.3)
    ratios = np.linspace(1 / 3, 0.95)
    panels[0].plot(ratios, 1 - ratios, "k--", label="bound for no head")
    panels[0].legend(fontsize=8)
    return figure


FIGURES = {"paths": lambda rows: dots(rows, list(dict.fromkeys(row["group"] for row in rows))),
           "heads": lambda rows: dots(rows, list(dict.fromkeys(row["group"] for row in rows))),
           "short": lambda rows: dots(rows, ("narrow, shapes", "wide, shapes")),
           "crossover": crossover}
