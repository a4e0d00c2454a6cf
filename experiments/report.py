"""
From measured rows to verdicts, tables and plots.

The rule for a verdict was written down before the runs.  A claim says that model a is better than
model b, and is judged by each of its measures: unless it names others, the Frechet distance (it is
about samples), the loss, and the loss at t < 0.3 (`detail`).  By a measure it is

    seen      if every seed of a is better than every seed of b (of three and three, by chance in
              one case of twenty), and their means differ by the margin or more
    opposite  if it is so the other way round
    level     if the means differ by less than the margin
    unclear   otherwise; always with fewer than three seeds, or if a run of a or b collapsed

Margins, of b's mean: 2 % for losses, 5 % for other measures; 0.5 dB for PSNR, 0.02 for fractions
and silhouettes.  A run has collapsed if its loss is not finite or more than 1.5 times the median of
its seeds, or if its samples are named right less than half as often as the median; it is named
beside the figures and left out of the means.  The column "paper" says what the paper found.
"""

import json
import math
import re
import statistics
from dataclasses import dataclass
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np

from common import save_atomically

SEEN, OPPOSITE, LEVEL, UNCLEAR = "seen", "opposite", "level", "unclear"
MARGINS = {"loss": 0.02, "detail": 0.02, "excess": 0.02}     # relative; others 0.05
ABSOLUTE = {"psnr": 0.5, "probe": 0.02, "silhouette": 0.02, "named": 0.02}
MORE_IS_BETTER = "psnr", "probe", "silhouette", "named"
LABELS = {"loss": "loss", "detail": "loss at t < 0.3", "frechet": "Fréchet distance",
          "high": "error of high frequencies, dB", "psnr": "PSNR, dB", "probe": "accuracy",
          "to_tree": "to the manifold", "from_tree": "from it", "error": "error of detail"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#999933")


@dataclass(frozen=True)
class Claim:
    """That model a is better than model b, in every group that has both."""

    text: str
    a: str
    b: str
    measures: tuple = ("frechet", "loss", "detail")
    source: str = "-"                        # in the paper
    paper: str = "-"                         # the figures there


# -------------------------------------------------------------------------------------------------
# Verdicts


def find(rows, **where):
    """The rows that agree with `where`, in the order of the seeds."""
    return sorted((row for row in rows if all(row.get(key) == x for key, x in where.items())),
                  key=lambda row: row["seed"])


def split_collapsed(rows):
    """(rows, seeds that collapsed)"""
    if not rows:
        return [], []
    losses = [row.get("loss", 0) for row in rows]            # None if the training diverged
    losses = [math.inf if x is None or math.isnan(x) else x for x in losses]
    named = [row["named"] for row in rows if "named" in row]
    highest, fewest = 1.5 * statistics.median(losses), statistics.median(named or [0]) / 2
    good = [row for row, loss in zip(rows, losses)
            if loss < math.inf and loss <= highest and row.get("named", fewest) >= fewest]
    return good, [row["seed"] for row in rows if row not in good]


def by_seed(rows, measure, **where):
    """{seed: figure} of the rows that agree with `where`, have it, and have not collapsed."""
    good, _ = split_collapsed(find(rows, **where))
    return {row["seed"]: row[measure] for row in good if measure in row}


def told(numbers):
    """Mean and standard deviation over the seeds, to three digits, or more if the spread has none
    of them."""
    if not numbers:
        return "-"
    mean, spread = statistics.mean(numbers), statistics.stdev(numbers) if numbers[1:] else 0
    digits = max(0, *(places - math.floor(math.log10(abs(x)))
                      for x, places in ((mean, 2), (spread, 0)) if x))
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if numbers[1:] else "")


def compare(a, b, measure):
    """The verdict on "a is better than b", of figures one a seed."""
    if min(len(a), len(b)) < 3:
        return UNCLEAR
    if measure in MORE_IS_BETTER:
        a, b = [-x for x in a], [-x for x in b]
    gain, kind = statistics.mean(b) - statistics.mean(a), measure.split()[0]
    margin = ABSOLUTE.get(kind) or MARGINS.get(kind, 0.05) * abs(statistics.mean(b))
    if abs(gain) < margin:
        return LEVEL
    if max(a) < min(b):
        return SEEN
    return OPPOSITE if min(a) > max(b) else UNCLEAR


def judge(claim, rows):
    """(group, steps, {measure: (figures, verdict)}) of a claim, wherever both models are."""
    names = claim.a, claim.b
    for group, steps in dict.fromkeys((row["group"], row["steps"]) for row in rows):
        here = find(rows, group=group, steps=steps)
        collapsed = [split_collapsed(find(here, model=name))[1] for name in names]
        notes = "".join(f"; {name} collapsed: seed {', '.join(map(str, seeds))}"
                        for name, seeds in zip(names, collapsed) if seeds)
        found = {}
        for measure in claim.measures:
            a, b = (by_seed(here, measure, model=name) for name in names)
            if not (a or collapsed[0]) or not (b or collapsed[1]):
                continue                                     # not measured
            sign, both = -1 if measure in MORE_IS_BETTER else 1, a.keys() & b.keys()
            wins = sum(sign * a[seed] < sign * b[seed] for seed in both)
            a, b = list(a.values()), list(b.values())
            verdict = UNCLEAR if notes else compare(a, b, measure)
            found[measure] = f"{told(a)} against {told(b)} ({wins}/{len(both)}){notes}", verdict
        if found:
            yield group, steps, found


def claims_table(experiment, results):
    """Markdown: a line a claim, group and number of steps, a column a measure."""
    measures = list(dict.fromkeys(m for claim in experiment.CLAIMS for m in claim.measures))
    names = " | ".join(LABELS.get(m, m) for m in measures)
    lines = [f"| claim | models | source | paper | {names} |", "|" + "---|" * (4 + len(measures))]
    for claim in experiment.CLAIMS:
        for group, steps, found in judge(claim, results["rows"]):
            cells = [claim.text, f"{group}, {steps} steps", claim.source, claim.paper]
            for measure in measures:
                figures, verdict = found.get(measure, ("", ""))
                bold = "**" if verdict in (SEEN, OPPOSITE) else ""
                cells.append(f"{bold}{verdict}{bold}: {figures}" if figures else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if experiment.CLAIMS else ""


def rows_table(results):
    """Markdown: every model and what was measured, mean ± standard deviation."""
    rows, settings = results["rows"], ("lr", "gflops")
    measures = list(dict.fromkeys(key for row in rows for key, x in row.items()
                                  if isinstance(x, float) and key not in settings))
    names = " | ".join(LABELS.get(m, m) for m in measures)
    lines = [f"| models | | steps | lr | GFLOPs | {names} |", "|" + "---|" * (5 + len(measures))]
    for group, name, steps in dict.fromkeys((r["group"], r["model"], r["steps"]) for r in rows):
        found, collapsed = split_collapsed(find(rows, group=group, model=name, steps=steps))
        first = find(rows, group=group, model=name, steps=steps)[0]
        figures = [told([row[m] for row in found if m in row]) for m in measures]
        name += f" ({len(collapsed)} collapsed)" if collapsed else ""
        lines.append(f"| {group} | {name} | {steps} | {first.get('lr', '-')} | "
                     f"{first.get('gflops', '-')} | {' | '.join(figures)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Plots


def colours_of(rows):
    """{model: its colour}, the same in all panels of a figure."""
    return dict(zip(dict.fromkeys(row["model"] for row in rows), cycle(COLOURS)))


def plot_dots(axes, rows, measure, colours):
    """A line a model, a dot a seed."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    for place, name in enumerate(names):
        found = [row[measure] for row in find(rows, model=name) if row.get(measure) is not None]
        axes.plot(found, [place] * len(found), "o", alpha=0.7, markersize=5, color=colours[name])
    axes.grid(alpha=0.3)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=LABELS[measure])
    axes.set_yticks(range(len(names)), names)


def plot_curves(axes, curves, colours, xlabel):
    """A line a curve, through means, and a dot a seed: {name: {x: figures, one a seed}}, x > 0."""
    for name, points in curves.items():
        points = {x: figures for x, figures in points.items() if figures}
        axes.plot(list(points), list(map(statistics.mean, points.values())), label=name,
                  color=colours[name])
        for x, figures in points.items():
            axes.plot([x] * len(figures), figures, "o", color=colours[name], alpha=0.5,
                      markersize=4)
    ticks = sorted({x for points in curves.values() for x in points})
    axes.set(xlabel=xlabel, xscale="log")
    axes.set_xticks(ticks, [f"{x:.2g}" if x < 10 else x for x in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def plot_band(axes, x, curves, colour, **settings):
    """The mean of curves, one a seed, and a band from the lowest to the highest."""
    axes.plot(x, np.mean(curves, axis=0), color=colour, **settings)
    axes.fill_between(x, np.min(curves, axis=0), np.max(curves, axis=0), color=colour, alpha=0.2)


def plot_rows(results, lab):
    """What an experiment without a picture of its own draws: a row of panels a group, a panel a
    measure, after the last step."""
    last = max(row["steps"] for row in results["rows"])
    rows = find(results["rows"], steps=last)
    measures = [m for m in ("loss", "detail", "frechet") if any(m in row for row in rows)]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    heights = [0.27 * len({row["model"] for row in find(rows, group=group)}) + 0.6
               for group in groups]
    figure, panels = plt.subplots(len(groups), len(measures), figsize=(9, sum(heights) + 0.5),
                                  squeeze=False, sharey="row", layout="constrained",
                                  height_ratios=heights)
    for line, group in zip(panels, groups):
        for axes, measure in zip(line, measures):
            plot_dots(axes, find(rows, group=group), measure, colours_of(rows))
            axes.set_xlabel(LABELS[measure] if group == groups[-1] else "")
        line[0].set_title(f"{group}, {last} steps", loc="left", size=10)
    return figure


def plot_by_t(axes, results, reference, group, steps):
    """Loss in tenths of t over that of the reference model: a line a model."""
    rows = find(results["rows"], group=group, steps=steps)
    base = by_seed(rows, "loss_by_t", model=reference)
    for name, colour in colours_of(results["rows"]).items():
        found = by_seed(rows, "loss_by_t", model=name)
        ratios = [np.array(found[seed], float) / np.array(base[seed], float)
                  for seed in found.keys() & base.keys()]
        if ratios:
            plot_band(axes, np.arange(10) / 10 + 0.05, ratios, colour, marker="o", markersize=3,
                      label=name)
    axes.set(title=f"{group}, {steps} steps", xlabel="t, from data to noise",
             ylabel=f"loss over that of {reference}")
    axes.grid(alpha=0.3)


def plot_samples(axes, lab, models, steps, num=10):
    """Samples of seed 0 of {name: Model}, a row a model."""
    rows = []
    for model in models.values():
        images = lab.sample(lab.train(model, 0, steps)[0], num)
        framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        rows.append(np.concatenate(list(framed), axis=1))
    axes.imshow(np.concatenate(rows), interpolation="nearest")
    axes.set_yticks([len(rows[0]) * (k + 0.5) for k in range(len(rows))], models)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_title(f"samples of seed 0 after {steps} steps", size=10)


def write_json(path, content):
    """Indented, with lists of numbers on one line."""
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]),
                  json.dumps(content, indent=1))
    save_atomically(path, lambda partial: partial.write_text(text + "\n"))
