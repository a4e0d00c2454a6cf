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
    losses = [math.inf if row.get("loss", 0) is None else row.get("loss", 0) for row in rows]
    named = [row.get("named", 1) for row in rows]
    highest, fewest = 1.5 * statistics.median(losses), statistics.median(named) / 2
    good = [row for row, loss, right in zip(rows, losses, named)
            if loss < math.inf and loss <= highest and right >= fewest]
    return good, [row["seed"] for row in rows if row not in good]


def by_seed(rows, measure):
    """{seed: figure} of the rows that have it."""
    return {row["seed"]: row[measure] for row in rows if measure in row}


def told(numbers):
    """Mean and standard deviation over the seeds, to the digits that mean something."""
    if not numbers:
        return "-"
    mean, spread = statistics.mean(numbers), statistics.stdev(numbers) if numbers[1:] else 0
    digits = max(0, 2 - math.floor(math.log10(abs(mean) or 1)))
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
    for group, steps in dict.fromkeys((row["group"], row["steps"]) for row in rows):
        pair = [find(rows, group=group, steps=steps, model=name) for name in (claim.a, claim.b)]
        kept, collapsed = zip(*map(split_collapsed, pair))
        found, notes = {}, "".join(
            f"; {name} collapsed: seed {', '.join(map(str, seeds))}"
            for name, seeds in zip((claim.a, claim.b), collapsed) if seeds)
        for measure in claim.measures:
            a, b = (by_seed(side, measure) for side in kept)
            if not (a or collapsed[0]) or not (b or collapsed[1]):
                continue
            sign, both = -1 if measure in MORE_IS_BETTER else 1, a.keys() & b.keys()
            wins = sum(sign * a[seed] < sign * b[seed] for seed in both)
            verdict = UNCLEAR if notes else compare([*a.values()], [*b.values()], measure)
            found[measure] = (f"{told([*a.values()])} against {told([*b.values()])} "
                              f"({wins}/{len(both)}){notes}", verdict)
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
                                  squeeze=False, layout="constrained", height_ratios=heights)
    for line, group in zip(panels, groups):
        for axes, measure in zip(line, measures):
            plot_dots(axes, find(rows, group=group), measure, colours_of(rows))
            axes.set_xlabel(LABELS[measure] if group == groups[-1] else "")
            axes.set_yticklabels(axes.get_yticklabels() if axes is line[0] else [])
        line[0].set_title(f"{group}, {last} steps", loc="left", size=10)
    return figure


def plot_by_t(axes, results, reference, group, steps):
    """Loss in tenths of t over that of the reference model: a line a model, a band from the lowest
    to the highest seed."""
    rows, middles = find(results["rows"], group=group, steps=steps), np.arange(10) / 10 + 0.05
    base = {row["seed"]: np.array(row["loss_by_t"], float) for row in find(rows, model=reference)}
    for name, colour in colours_of(results["rows"]).items():
        if not find(rows, model=name):
            continue
        kept = split_collapsed(find(rows, model=name))[0]
        ratios = np.array([np.array(row["loss_by_t"], float) / base[row["seed"]] for row in kept])
        axes.plot(middles, ratios.mean(0), "o-", color=colour, markersize=3, label=name)
        axes.fill_between(middles, ratios.min(0), ratios.max(0), color=colour, alpha=0.2)
    axes.set(title=f"{group}, {steps} steps", xlabel="t, from data to noise",
             ylabel=f"loss over that of {reference}")
    axes.grid(alpha=0.3)


def plot_strip(axes, title, strip):
    """Rows of samples, a model each: {model: uint8 (n, H, W, 3)}."""
    padded = [np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
              for images in strip.values()]
    axes.imshow(np.concatenate([np.concatenate(list(row), axis=1) for row in padded]),
                interpolation="nearest")
    height = padded[0].shape[1]
    axes.set_yticks([height * (k + 0.5) for k in range(len(strip))], strip)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_title(title, size=10)


def write_json(path, content):
    """Indented, with lists of numbers on one line."""
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]),
                  json.dumps(content, indent=1))
    save_atomically(path, lambda partial: partial.write_text(text + "\n"))
