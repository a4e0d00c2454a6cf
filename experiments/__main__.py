"""
The paper's questions at laptop scale.

    python -m experiments                       # print the tables of all results
    python -m experiments heads short           # of some, and draw their figures
    python -m experiments heads --run --photos IMAGES        # first train and measure what is missing
    python -m experiments --page                # write the tables into README.md
    python -m experiments --quick               # a smoke run of all, which leaves nothing
"""

import re
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from dip import check_choice
from experiments import overfit
from experiments.lab import Lab
from experiments.models import EXPERIMENTS, RATES
from experiments.report import FIGURES, HERE, answer, rates_table, read_rows, table, write_rows
from sample import Parser, number, run, save_atomically


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} [all]")
    add("--run", action="store_true", help="train and measure what is missing")
    add("--photos", metavar="DIR", help="folder with train/ and val/ of ten classes of images")
    add("--seeds", type=number(int, 1, 3), default=3, help="trainings of each model [3]")
    add("--samples", type=number(int, 20), default=1000, help="samples that are measured [1000]")
    add("--results", default=str(HERE / "results"), metavar="DIR", help="folder of the rows")
    add("--runs", default="experiments/runs", metavar="DIR", help="folder of the trainings")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--page", action="store_true", help="write the tables into README.md")
    add("--quick", action="store_true", help="a smoke run, which leaves nothing")
    options = parser.parse_args(argv)
    for name in options.names:
        check_choice("experiment", name, EXPERIMENTS)
    options.names = options.names or list(EXPERIMENTS)
    return options


def train_missing(name, lab):
    """Train and measure what results/NAME.json lacks, and write it after every row."""
    groups, folder = EXPERIMENTS[name], lab.options.results
    rows = read_rows(name, folder)
    for row in lab.missing(name, groups, RATES.get(name, ((), 0)), rows):
        print(", ".join(f"{key} {x}" for key, x in row.items() if not isinstance(x, list)))
        rows.append(row)
        write_rows(name, rows, folder)


def show(name, lab, folder, pictures):
    """Print the tables, write them into results/NAME.md, and draw the figure."""
    rows = read_rows(name, folder)
    rates = rates_table(EXPERIMENTS[name], rows)
    text = f"# {name}\n\n{table(EXPERIMENTS[name], rows)}\n" + (
        f"\nLoss on seed 9 at each learning rate:\n\n{rates}\n" if rates else "")
    print(text)
    save_atomically(Path(folder, f"{name}.md"), lambda partial: partial.write_text(text))
    if name in FIGURES or (name == "overfit" and lab):
        figure = FIGURES[name](rows) if name in FIGURES else overfit.draw(lab.options.runs)
        save_atomically(Path(pictures, f"{name}.png"),
                        lambda partial: figure.savefig(partial, format="png", dpi=120))
        plt.close(figure)


def fill(page, read=read_rows):
    """The page with its tables, each between <!-- NAME --> and <!-- end -->."""
    def written(match):
        name = match[1]
        found = answer(read) if name == "answer" else table(
            EXPERIMENTS[name], read(name), ("loss", "frechet"), last=True)
        return f"<!-- {name} -->\n\n{found}\n\n<!-- end -->"

    return re.sub(r"(?s)<!-- (\w+) -->\n.*?<!-- end -->", written, page)


def main():
    options = parse()
    plt.switch_backend("Agg")
    with tempfile.TemporaryDirectory() as scratch:
        folder, pictures = options.results, HERE.parent / "assets"
        if options.quick:
            options.seeds, options.samples, options.run = 1, 20, True
            options.runs = options.results = folder = pictures = scratch
        lab = Lab(options) if options.run else None
        for name in options.names:
            if lab:
                train_missing(name, lab)
            show(name, lab, folder, pictures)
    if options.page:
        page = fill((HERE / "README.md").read_text())
        save_atomically(HERE / "README.md", lambda partial: partial.write_text(page))


if __name__ == "__main__":
    run(main)
