"""
The paper's claims at laptop scale: what was claimed, what was measured, and the verdict.

    python -m experiments               # the table of what was run
    python -m experiments --run         # run everything, one after the other; resumes
    python -m experiments --quick       # a smoke run of everything, in minutes
    python -m experiments --readme      # write the table into README.md

A verdict is "seen" if every seed of the one side beats every seed of the other, by each measure;
"not seen at this scale" if it is the other way round; "unclear" otherwise.
"""

import importlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from experiments.harness import conduct, results_name
from sample import option, parse_options, run_main, save_atomically

NAMES = ("overfit", "heads", "placement", "head_size", "patch_size", "patch_or_image", "features",
         "prediction", "head_init", "samplers", "gaussian")
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- python -m experiments --readme -->", "<!-- end -->"


@dataclass
class Options:
    run: bool = option(False, "run all experiments on the embedded set, and heads on --data too")
    data: str | None = option(None, "image folder, with --run", metavar="DIR")
    quick: bool = option(False, "a smoke run of each; writes nothing")
    readme: bool = option(False, "write the table into README.md")


def all_claims():
    """[(results, [Claim])] of every experiment that was run, in the order of NAMES."""
    found = []
    for name in NAMES:
        module = importlib.import_module(f"experiments.{name}")
        for path in sorted(RESULTS.glob(f"{name}*.json")):
            results = json.loads(path.read_text())
            if results.get("experiment") == name:
                found.append((results, module.claims(results)))
    return found


def table():
    """The table as Markdown."""
    lines = ["| claim | source | paper | ours | verdict |", "|---|---|---|---|---|"]
    for _, claims in all_claims():
        for claim in claims:
            verdict = f"**{claim.verdict}**" if claim.verdict == "seen" else claim.verdict
            lines.append(f"| {claim.claim} | {claim.source} | {claim.paper} | {claim.ours} "
                         f"| {verdict} |")
    return "\n".join(lines)


def into_readme(text):
    """README.md's text with the table between its marks."""
    return re.sub(f"(?s)({re.escape(BEGIN)}\n).*(\n{re.escape(END)})",
                  lambda m: m[1] + table() + m[2], text)


def main():
    options = parse_options(Options, __doc__)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            for name in NAMES:
                conduct(name, ["--quick"], folder)
    elif options.run:
        for name in NAMES:
            conduct(name, [])
        if options.data:
            conduct("heads", ["--data", options.data])
    if options.readme:
        text = into_readme(README.read_text())
        save_atomically(README, lambda path: path.write_text(text))
        print(f"wrote {README}")
    elif not options.quick:
        print(table())


if __name__ == "__main__":
    run_main(main)
