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
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from common import at_least, parse_options, run_main, save_atomically
from experiments.lab import Lab, Options
from experiments.report import claims_table, plot_rows, rows_table, write_json

NAMES = ("heads", "learning_rate", "crossover", "geometry", "kinds", "placement", "head_size",
         "patch_size", "patch_or_image", "toy", "features", "prediction", "head_init", "samplers",
         "gaussian", "overfit")
README = Path(__file__).parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def hardware(device):
    """The processor, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def load(name):
    return importlib.import_module(f"experiments.{name}")


def run(name, lab):
    """Run an experiment; add its rows to its JSON, and draw its PNG if all of them can be drawn."""
    experiment, options = load(name), lab.options
    path, picture = Path(options.results, f"{name}.json"), Path(options.pictures, f"{name}.png")
    made = dict(num=options.num, hardware=hardware(lab.processes.device),
                torch=torch.__version__, compiled=options.compile)
    rows = {key(row): row | made for row in lab.rows(experiment)}
    if not rows:
        print(f"{name}: left out, it needs --photos DIR")
        return
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "classifiers": {}}
    rows = {key(row): row for row in old["rows"]} | rows
    order = [(group, model) for group, models in experiment.MODELS.items() for model in models]
    known = [row for row in rows.values() if (row["group"], row["model"]) in order]
    known.sort(key=lambda row: (row["seed"], order.index((row["group"], row["model"]))))
    judged = any("frechet" in row for row in known)
    results = dict(classifiers=old["classifiers"] | (lab.calibrate(experiment) if judged else {}),
                   rows=known)
    write_json(path, results)
    print(f"{name}: wrote {path}", flush=True)
    if {row["group"] for row in known} > {group for group, *_ in lab.runs(experiment)}:
        print(f"{name}: {picture} stays as it is, it needs --photos DIR")
        return
    figure = getattr(experiment, "draw", plot_rows)(results, lab)
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
            options.seeds, options.num = 1, 20
            options.runs = options.results = options.pictures = scratch
        lab = Lab(options) if names else None
        for name in names:
            run(name, lab)
    if options.readme:
        text = into_readme(README.read_text())
        save_atomically(README, lambda path: path.write_text(text))
        print(f"wrote {README}")
    elif not names:
        for name, table in tables().items():
            print(f"{name}\n{table}\n")


if __name__ == "__main__":
    run_main(main)
