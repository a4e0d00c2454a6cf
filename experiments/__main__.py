"""
The paper's questions at laptop scale.

    python -m experiments                       # print the tables of all results
    python -m experiments heads short           # of some, into results/NAME.md too; draw figures
    python -m experiments heads --run --photos IMAGES        # first train what is missing
    python -m experiments --page                # write the tables of README.md
    python -m experiments --quick               # a smoke run of all, which leaves nothing
    python -m experiments --measure             # loss and samples of our weights, or the newest run
"""

import json
import re
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from dip import check_choice
from experiments import overfit, report
from experiments.lab import Lab
from experiments.models import EXPERIMENTS
from sample import Parser, run, save_atomically

PAGE, ASSETS = report.HERE / "README.md", report.HERE.parent / "assets"


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} [all]")
    add("--run", action="store_true", help="train and measure what is missing")
    add("--photos", metavar="DIR", help="folder with train/ and val/ of ten classes of images")
    add("--results", default=report.HERE / "results", metavar="DIR", help="folder of the results")
    add("--runs", default="experiments/runs", metavar="DIR", help="folder of the trainings")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--page", action="store_true", help="write the tables of README.md")
    add("--quick", action="store_true", help="a smoke run, which leaves nothing")
    add("--measure", nargs="?", const="", metavar="CKPT", help="measure a model of drawn shapes")
    options = parser.parse_args(argv)
    for name in options.names:
        check_choice("experiment", name, EXPERIMENTS)
    return options


def write(path, text):
    save_atomically(path, lambda partial: partial.write_text(text))


def train_missing(name, lab):
    """Train and measure what results/NAME.json lacks; write it after every row."""
    rows = report.read_rows(name, lab.options.results)
    for row in lab.missing(name, EXPERIMENTS[name], rows):
        print({key: x for key, x in row.items() if not isinstance(x, list)}, flush=True)
        rows.append(row)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        write(Path(lab.options.results, f"{name}.json"), f'{{"rows": [\n{lines}\n]}}\n')


def show(name, folder, pictures, runs):
    """Print the tables, write them into results/NAME.md, and draw the figure."""
    rows, groups = report.read_rows(name, folder), EXPERIMENTS[name]
    text = f"# {name}\n\n{report.table(groups, rows)}\n{report.rates_table(groups, rows)}"
    print(text)
    write(Path(folder, f"{name}.md"), text)
    figure = overfit.draw(runs) if name == "overfit" else report.draw(name, rows)
    if figure:
        save_atomically(Path(pictures, f"{name}.png"),
                        lambda partial: figure.savefig(partial, format="png", dpi=120))
        plt.close(figure)


def fill(page):
    """The page with its tables, each between <!-- NAME --> and <!-- end -->."""
    def written(match):
        name = match[1]
        if name == "answer":
            text = report.answer()
        else:                                # in each group, the models that the first has
            first, *_ = EXPERIMENTS[name].values()
            groups = {group: {model: models[model] for model in first if model in models}
                      for group, models in EXPERIMENTS[name].items()}
            text = report.table(groups, report.read_rows(name), ("loss", "frechet"), last=True)
        return f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"(?s)<!-- (\w+) -->\n.*?<!-- end -->", written, page)


def main():
    options, pictures = parse(), ASSETS
    plt.switch_backend("Agg")
    if options.measure is not None:
        return print(*Lab(options).measure(options.measure or None))
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            options.run, options.runs, options.results, pictures = True, scratch, scratch, scratch
        lab = Lab(options) if options.run else None
        for name in options.names or EXPERIMENTS:
            if lab:
                train_missing(name, lab)
            show(name, options.results, pictures, options.runs)
    if options.page:
        write(PAGE, fill(PAGE.read_text()))


if __name__ == "__main__":
    run(main)
