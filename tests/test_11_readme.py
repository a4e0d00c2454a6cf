"""Chapter 11: the README tells the truth."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT

import fid
import sample
import train
from dip import PRESETS
from experiments.speed import PAPER_MILLIONS, cost

PAGES = {path: path.read_text() for path in (
    ROOT / folder / "README.md" for folder in ("", "tests", "theory", "experiments"))}
README = PAGES[ROOT / "README.md"]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)           # (language, text)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [part.split("#")[0] for language, text in BLOCKS if language in ("", "bash")
            for line in text.replace("\\\n", " ").splitlines() for part in line.split("&&")]


def test_it_is_short():
    assert len(README.splitlines()) <= 160 and len(README.encode()) <= 11 * 1024


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_holds_their_parameters_and_costs(name):
    """Catches a preset that was changed, and one of the paper without a row."""
    rows = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
    if name not in PAPER_MILLIONS and not rows:
        return
    config = PRESETS[name]
    one, two = (np.array(cost(config.replace(depth=L))) for L in (1, 2))
    parameters, flops = one + (config.depth - 1) * (two - one)           # all blocks cost the same
    paper = f"{PAPER_MILLIONS[name]} M" if name in PAPER_MILLIONS else "-"
    size = f"{parameters / 1e6:.1f} M | {flops / 1e9:.1f}"
    assert rows == [f"| {name} | {size} | {paper} |"]


def test_every_choice_marked_in_the_code_is_explained_in_the_table():
    """Nothing is decided in secret: the marks in dip.py are the rows with a star."""
    code = (ROOT / "dip.py").read_text()
    marks = re.findall(r"(?<!`)# (?:unspecified|differs) \[(.*?)\]", code)
    table = re.search(r"^## Where .* differ\n(.*?)^## ", README, re.S | re.M)[1]
    assert set(marks) == set(re.findall(r"^\| ([^|]+?) \* \|", table, re.M)) and len(marks) > 10
    assert len(re.findall(r"(?<!`)# ?(unspecified|differs)", code)) == len(marks)    # none unnamed


@pytest.mark.parametrize("script", ["train.py", "sample.py", "fid.py"])
def test_every_command_parses(monkeypatch, script):
    """Catches an option that was renamed."""
    commands = [shlex.split(command) for command in COMMANDS if f" {script}" in command]
    assert commands
    for words in commands:
        arguments = words[words.index(script) + 1:]
        monkeypatch.setattr(sys, "argv", [script, *arguments])       # fid.py reads it there
        {"train.py": train, "sample.py": sample, "fid.py": fid}[script].parse()


def test_every_option_in_the_text_exists(capsys):
    for module in (train, sample, fid):
        with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["a command", "--help"])
            module.parse()
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    known |= {"--nproc_per_node", "--shutdown-timeout", "--local-dir"}           # of torchrun, hf
    known |= {"--presets"}                                   # of experiments.speed
    assert set(re.findall(r"--[a-z][a-z_-]+", README)) <= known


def test_its_python_runs_as_it_stands(monkeypatch, tmp_path):
    """In a folder with the weights."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    for code in PYTHON:
        exec(code, {})
    assert len(PYTHON) == 2 and (tmp_path / "three.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_linked_file_exists(page):
    linked = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", PAGES[page])
    assert linked
    for pair in linked:
        assert (page.parent / next(filter(None, pair))).exists(), pair


def test_the_requirements_are_pinned_to_the_digit():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in lines)
    assert {line.split("==")[0] for line in lines} == {
        "torch", "numpy", "scipy", "tqdm", "pillow", "matplotlib", "pytest", "hypothesis"}


def test_the_house_has_four_files_of_code():
    """Catches a fifth one at the top, where it would become a drawer for everything."""
    found = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                           timeout=60).stdout.split() or [path.name for path in ROOT.glob("*.py")]
    assert {path for path in found if "/" not in path} == {
        "dip.py", "train.py", "sample.py", "fid.py"}
