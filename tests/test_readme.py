"""Chapter 11: the README tells the truth."""

import re
import shlex

import pytest
from commands import ROOT

import dip
import sample
import train
from sample import parse_options

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()
]


def test_the_parameter_table_is_that_of_the_code():
    rows = re.findall(r"^\| (Di[TP]-[^ |]+) +\| ([\d.]+) M +\| ([\d.]+) +\|", README, re.M)
    assert len(rows) >= 9
    for preset, millions, gflops in rows:
        parameters, flops = dip.cost(dip.PRESETS[preset])
        assert millions == f"{parameters / 1e6:.1f}" and gflops == f"{flops / 1e9:.1f}"


def test_every_choice_marked_in_the_code_is_explained_in_the_readme():
    """Nothing is decided in secret: each `# paper silent [what]` is a row of the table."""
    marks = re.findall(r"# paper silent(?: \[(.*?)\])?", (ROOT / "dip.py").read_text())
    table = README.split("## Where the paper is silent")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", table, re.M)
    assert len(marks) > 10 and set(marks) <= set(rows), set(marks) - set(rows)


@pytest.mark.parametrize(
    "script, options", [("train.py", train.TrainOptions), ("sample.py", sample.SampleOptions)]
)
def test_every_option_in_the_readme_exists(script, options):
    """Each command of the README is parsed as it stands."""
    lines = [line.split("#")[0] for line in COMMANDS if f" {script}" in line]
    assert lines
    for line in lines:
        for part in re.split(r"&&|;", line):
            words = shlex.split(part)
            if script in words:
                parse_options(options, "", words[words.index(script) + 1 :])


def test_every_file_the_readme_names_exists():
    linked = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", README)
    assert linked
    for pair in linked:
        assert (ROOT / next(filter(None, pair))).exists()


def test_the_requirements_are_pinned_to_the_digit():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in lines)
    assert {line.split("==")[0] for line in lines} == {
        "torch",
        "numpy",
        "scipy",
        "tqdm",
        "pillow",
        "matplotlib",
        "pytest",
        "hypothesis",
    }
