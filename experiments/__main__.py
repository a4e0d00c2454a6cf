"""
The paper's claims at laptop scale: what was claimed, what was measured, and the verdict.

    python -m experiments                       # the verdicts on what was run
    python -m experiments heads [NAME ...]      # run experiments; they resume, and share trainings
    python -m experiments --photos IMAGES all   # all of them, in the order below
    python -m experiments --quick               # a smoke run of all, in a minute
    python -m experiments --readme              # write the tables into experiments/README.md
"""

import importlib
import json
import re
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from common import at_least, parse_options, run_main, save_atomically
from experiments.lab import Lab, Options
from experiments.report import claims_table, plot_rows, rows_table, write_json

NAMES = ("heads", "longer", "learning_rate", "crossover", "geometry", "kinds", "placement",
         "head_size", "patch_size", "patch_or_image", "toy", "features", "prediction", "head_init",
         "samplers", "gaussian", "overfit")
HERE = Path(__file__).parent
README, RESULTS, PICTURES = HERE / "README.md", HERE / "results", HERE.parent / "assets"


def load(name):
    return importlib.import_module(f"experiments.{name}")


def run(name, lab, results=RESULTS, pictures=PICTURES):
    """Run an experiment; add its rows to its JSON, and draw its PNG if all of them can be drawn."""
    experiment = load(name)
    path, picture = Path(results, f"{name}.json"), Path(pictures, f"{name}.png")
    rows = {key(row): row for row in lab.rows(experiment)}
    if not rows:
        print(f"{name}: left out, it needs --photos DIR")
        return
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "classifiers": {}}
    rows = {key(row): row for row in old["rows"]} | rows
    rates = {(group, kind): model.lr for group, models in experiment.MODELS.items()
             for kind, model in models.items()}
    # of models that are still there, trained at the rate that they still have
    known = [row for place, lr in rates.items() for row in rows.values()
             if (row["group"], row["model"]) == place and row.get("lr", lr) == lr]
    known.sort(key=lambda row: row["seed"])
    judged = any("frechet" in row for row in known)
    results = dict(classifiers=old["classifiers"] | (lab.calibrate(experiment) if judged else {}),
                   rows=known)
    write_json(path, results)
    print(f"{name}: wrote {path}", flush=True)
    if {row["group"] for row in known} > {group for group, *_ in lab.runs(experiment)}:
        # there are rows of photos, but no photos to draw new samples of
        print(f"{name}: {picture} stays as it is, it needs --photos DIR")
        return
    try:
        figure = getattr(experiment, "draw", plot_rows)(results, lab)
    except FloatingPointError:
        print(f"{name}: {picture} stays as it is, a training of seed 0 diverged")
        return
    save_atomically(picture, lambda partial: figure.savefig(partial, format="png", dpi=120))
    plt.close(figure)
    print(f"{name}: wrote {picture}", flush=True)


def key(row):
    """What tells one row from another."""
    return row["group"], row["model"], row["seed"], row["steps"]


def tables():
    """{name: its claims and its rows as Markdown}, of every experiment that was run."""
    found = {}
    for name in NAMES:
        path = RESULTS / f"{name}.json"
        if path.exists():
            results = json.loads(path.read_text())
            found[name] = f"{claims_table(load(name), results)}\n\n{rows_table(results)}".strip()
    return found


def into_readme(text):
    """README.md's text with the tables between their marks."""
    for name, table in tables().items():
        text, found = re.subn(rf"(?s)<!-- {name} -->\n.*?<!-- end -->",
                              lambda _: f"<!-- {name} -->\n\n{table}\n\n<!-- end -->", text)
        if found != 1:
            raise ValueError(f"{README} needs one pair of <!-- {name} --> and <!-- end -->")
    return text


def main():
    names = [word for word in sys.argv[1:] if word in ("all", *NAMES)]
    options = parse_options(Options, __doc__, [w for w in sys.argv[1:] if w not in names])
    at_least(1, seeds=options.seeds)
    at_least(20, num=options.num)
    plt.switch_backend("Agg")
    if "all" in names:
        names = NAMES
    elif options.quick and not names:                        # learning_rate has heads' models
        names = [name for name in NAMES if name != "learning_rate"]
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            options.seeds, options.num, options.runs = 1, 20, scratch
        lab = Lab(options) if names else None
        for name in names:
            run(name, lab, *[scratch, scratch] if options.quick else [])
    if options.readme:
        text = into_readme(README.read_text())
        save_atomically(README, lambda path: path.write_text(text))
        print(f"wrote {README}")
    elif not names:
        for name, table in tables().items():
            print(f"{name}\n{table}\n")


if __name__ == "__main__":
    run_main(main)
