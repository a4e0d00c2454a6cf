"""
The paper's claims at laptop scale: what was claimed, what was measured, and the verdict.

    python -m experiments               # the table of what was run
    python -m experiments --run         # run everything, one after the other; resumes
    python -m experiments --quick       # a smoke run of everything, in minutes
    python -m experiments --readme      # write the table into experiments/README.md

A verdict is "seen" if every seed of the one side beats every seed of the other, by each measure;
"not seen at this scale" if it is the other way round; "unclear" otherwise.
"""

import importlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from experiments.harness import NOT_RUN, SEEN, Claim, conduct
from sample import option, parse_options, run_main, save_atomically

NAMES = ("overfit", "heads", "placement", "head_size", "patch_size", "patch_or_image", "features",
         "prediction", "head_init", "samplers", "gaussian")
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- python -m experiments --readme -->", "<!-- end -->"


@dataclass
class Options:
    run: bool = option(False, "run all experiments on the embedded set, and heads on --data")
    data: str | None = option(None, "image folder, with --run", metavar="DIR")
    quick: bool = option(False, "a smoke run of each; writes nothing")
    readme: bool = option(False, "write the table into experiments/README.md")


def all_claims():
    """Every experiment's claims, in the order of NAMES, judged by the results that are there."""
    results = [json.loads(path.read_text())
               for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem)]
    found = []
    for name in NAMES:
        mine = [result for result in results if result["experiment"] == name]
        for result in mine:
            found += importlib.import_module(f"experiments.{name}").claims(result)
        if not mine:
            found.append(Claim(f"`python -m experiments.{name}`", "-", "-", "-", NOT_RUN, NOT_RUN))
    if not any(row.get("regime") == "S" for result in results for row in result["rows"]):
        found.append(Claim("a U-Net head is better than none", "DiP-S's size, a hundred classes at "
                           "64 x 64, on a GPU", "Table 2", "FID 2.16 against 5.28", NOT_RUN,
                           NOT_RUN))
    return found


def table():
    """The table as Markdown."""
    lines = ["| claim | our models and images | source | paper | ours | verdict |",
             "|---|---|---|---|---|---|"]
    for claim in all_claims():
        verdict = f"**{claim.verdict}**" if claim.verdict == SEEN else claim.verdict
        lines.append(f"| {claim.claim} | {claim.models} | {claim.source} | {claim.paper} "
                     f"| {claim.ours} | {verdict} |")
    return "\n".join(lines)


def into_readme(text):
    """README.md's text with the table between its marks."""
    return re.sub(f"(?s)({re.escape(BEGIN)}\n).*(\n{re.escape(END)})",
                  lambda m: m[1] + table() + m[2], text)


def main():
    options = parse_options(Options, __doc__)
    if options.data and not options.run:
        raise ValueError("--data is for --run")
    if options.run and options.quick:
        raise ValueError("--run and --quick: one of them")
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            for name in NAMES:
                conduct(name, ["--quick"], folder)
    elif options.run:
        if options.data:                                     # first: what is wrong shows at once
            photos = ["--data", options.data, "--no-costs"]
            conduct("heads", photos)
            conduct("heads", [*photos, "--steps", "2000", "--regimes", "wide"])
        for name in NAMES:
            conduct(name, [])
    if options.readme:
        text = into_readme(README.read_text())
        save_atomically(README, lambda path: path.write_text(text))
        print(f"wrote {README}")
    elif not options.quick:
        print(table())


if __name__ == "__main__":
    run_main(main)
