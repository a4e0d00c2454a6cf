"""
From measured rows to tables and figures.

A row of results/NAME.json is one run, measured after some steps.  Seeds 0, 1 and 2 are judged; seed
9 only chooses learning rates.  Models are compared seed by seed: a run minus that of the group's
first model, which saw the same images, times and noise.  Tables show the mean ± standard error of
these differences, in bold beyond three standard errors.  With three seeds, chance alone makes one
comparison in ten bold.
"""

import itertools
import json
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

HERE, SEEDS, RATE_SEED = Path(__file__).parent, (0, 1, 2), 9
LABELS = {"loss": "loss", "detail": "loss at t < 0.3", "frechet": "Fréchet distance",
          "recognised": "recognised", "seam": "seam", "psnr": "PSNR, dB", "probe": "accuracy",
          "to_tree": "distance to the tree", "from_tree": "distance from the tree",
          **{f"excess at t = {t}": f"excess at t = {t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)}}
ANSWER = {               # columns of the first table of README.md
    "ratio 0.33, shapes, 1000 steps": ("crossover", "16 of 48", 1000),
    "wide, shapes, 2000 steps": ("paths", "wide, shapes", 2000),
    "wide, photos, 2000 steps": ("paths", "wide, photos", 2000),
    "wide, shapes, 8000 steps": ("paths", "wide, shapes, longer", 8000),
    "paper's geometry, photos, 10,000 steps": ("paths", "photos of 64", 10_000)}


def read_rows(name, folder=HERE / "results"):
    path = Path(folder, f"{name}.json")
    return json.loads(path.read_text())["rows"] if path.exists() else []


def find(rows, **where):
    return [row for row in rows if all(row.get(key) == x for key, x in where.items())]


def by_seed(rows, measure, **where):
    """{seed: value} of a measure, from the judged rows that match `where`."""
    return {row["seed"]: row[measure] for row in find(rows, **where)
            if row["seed"] in SEEDS and row.get(measure) is not None}


def differences(rows, measure, model, reference, **where):
    """model - reference, for each seed that both have."""
    a, b = (by_seed(rows, measure, model=name, **where) for name in (model, reference))
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def rates_of(rows, group, model):
    """{learning rate: loss} on seed 9; infinite where the training diverged."""
    return {row["lr"]: math.inf if row["loss"] is None else row["loss"]
            for row in find(rows, group=group, model=model, seed=RATE_SEED)}


def format_mean(values, paired=False):
    """Mean ± standard deviation; of paired differences, ± standard error, bold beyond three."""
    values = [round(x, 12) for x in values]                  # or 1.0 - 0.9 is not 0.9 - 0.8
    n = len(values)
    if n < 1 + paired:
        return "" if paired else "-"
    mean, spread = statistics.mean(values), statistics.stdev(values) if n > 1 else 0
    if paired:
        spread /= math.sqrt(n)
    # significant digits after the first: whichever needs more decimals decides
    wanted = [(spread or mean, 1)] if paired else [(mean, 2), (spread, 0)]
    decimals = max([0, *(digits - math.floor(math.log10(abs(x))) for x, digits in wanted if x)])
    text = f"{mean:+.{decimals}f}" if paired else f"{mean:.{decimals}f}"
    text += f" ± {spread:.{decimals}f}" if n > 1 else ""
    text += f" ({n} of 3)" if n < 3 else ""
    bold = "**" if paired and n > 2 and abs(mean) > 3 * spread else ""
    return f"{bold}{text}{bold}".replace("-", "−")


def markdown(header, lines):
    lines = (header, ["-"] * len(header), *lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(groups, rows, measures=tuple(LABELS), last=False):
    """One line per model and number of steps, or the last number only.  Two columns per measure:
    its mean, and the difference to the first model of the group, if groups have several."""
    measures, lines = [m for m in measures if any(m in row for row in rows)], []
    references = {next(iter(models)) for models in groups.values()}
    reference = references.pop() if len(references) == 1 else "the first"
    compared = max(len(models) for models in groups.values()) > 1
    for group, models in groups.items():
        first, *_ = models
        for steps in models[first].steps[-1 if last else 0:]:
            title = f"{group}, {steps} steps"
            for name in models:
                where = dict(group=group, model=name, steps=steps)
                judged = [row for row in find(rows, **where) if row["seed"] in SEEDS]
                if not judged:
                    continue
                line = [title, name, f"{judged[0]['gflops']:.3f}" if "gflops" in judged[0] else "-"]
                for m in measures:
                    line.append(format_mean(by_seed(rows, m, **where).values()))
                    if compared:
                        pairs = differences(rows, m, reference=first, **where)
                        line.append(format_mean(pairs, paired=True) if name != first else "")
                lines.append(line)
                title = ""
    columns = [label for m in measures
               for label in (LABELS[m], f"minus {reference}")[:1 + compared]]
    return markdown(["group", "model", "GFLOPs", *columns], lines)


def rates_table(groups, rows):
    """Loss on seed 9 at each learning rate, if some were tried."""
    rates, lines = sorted({row["lr"] for row in find(rows, seed=RATE_SEED)}), []
    for group, models in groups.items():
        for name in models:
            losses = rates_of(rows, group, name)
            if losses:
                cells = [f"{losses[lr]:.4f}" if lr in losses else "-" for lr in rates]
                lines.append([group, name, *cells])
    text = markdown(["group", "model", *map("{:g}".format, rates)], lines)
    return f"\nLoss on seed 9 at each learning rate:\n\n{text}\n" if rates else ""


def answer():
    """U-Net minus no head: one line per measure, in its own units."""
    lines = []
    for m in ("loss", "detail", "frechet", "recognised", "seam"):
        pairs = [differences(read_rows(name), m, "U-Net", "no head", group=group, steps=steps)
                 for name, group, steps in ANSWER.values()]
        lines.append([LABELS[m], *(format_mean(pair, paired=True) for pair in pairs)])
    return markdown(["U-Net minus no head", *ANSWER], lines)


# -------------------------------------------------------------------------------------------------
# Figures


def dots(rows, groups, measures=("loss", "frechet")):
    """A panel for each measure and group: one line per model, one dot per seed, last step."""
    names = list(dict.fromkeys(row["model"] for row in rows if row["group"] in groups))
    figure, panels = plt.subplots(len(measures), len(groups), sharey=True, layout="constrained",
                                  squeeze=False, figsize=(11, 0.45 * len(names) + 1.8))
    for axes, (measure, group) in zip(panels.flat, itertools.product(measures, groups)):
        steps = max(row["steps"] for row in find(rows, group=group))
        values = [list(by_seed(rows, measure, group=group, model=name, steps=steps).values())
                  for name in names]
        for place, of_model in enumerate(values):
            axes.plot(of_model, [place] * len(of_model), "o", alpha=0.7, markersize=5)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=LABELS[measure])
        wide = max(sum(values, [])) > 4 * min(sum(values, []))
        axes.set_xscale("log" if wide else "linear")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{group}, {steps} steps", size=9)
        axes.set_yticks(range(len(names)), names, size=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    return figure


def crossover(rows):
    """Losses and distance over the width of tokens.  Dashed: the least loss without a head."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    widths = {row["group"]: int(row["group"].split()[0]) / 48 for row in rows}
    for axes, measure in zip(panels, ("loss", "detail", "frechet")):
        for name, colour in (("no head", "C1"), ("U-Net", "C0")):
            values = [list(by_seed(rows, measure, group=group, model=name).values())
                      for group in widths]
            axes.plot(widths.values(), values, "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(widths.values(), np.mean(values, axis=1), color=colour, label=name)
        for ratio, name in ((0.375, "DiP-XL/32"), (1.5, "DiP-XL/16")):
            axes.axvline(ratio, color="grey", linestyle=":")
            axes.text(ratio, 1.01, name, transform=axes.get_xaxis_transform(), size=8, ha="center")
        axes.set(xscale="log", yscale="log", xlabel="width of a token / values of its patch")
        axes.set_title(LABELS[measure], size=10, pad=16)
        axes.set_xticks(list(widths.values()), [f"{x:.2g}" for x in widths.values()])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.grid(alpha=0.3, which="both")
    ratios = np.linspace(1 / 3, 0.88)
    panels[0].plot(ratios, 1 - ratios, "k--", label="bound for no head")
    panels[0].legend(fontsize=8)
    return figure


def draw(name, rows):
    """The figure of an experiment, or None."""
    rows = [row for row in rows if row["seed"] in SEEDS
            and row["model"] != "U-Net, blind"]              # far off, it would squeeze the others
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if name in ("paths", "heads", "short"):
        return dots(rows, groups[:2 if name == "short" else 4])
    return crossover(rows) if name == "crossover" else None
