"""Chapter 11: the README tells the truth."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from commands import ROOT

import dip
import sample
import train
from common import parse_options

PAGES = {path: path.read_text() for path in (
    ROOT / folder / "README.md" for folder in ("", "tests", "theory", "experiments"))}
README = PAGES[ROOT / "README.md"]
BLOCKS = re.findall(r"```(?:bash)?\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_table_of_presets_is_what_dip_prints(capsys):
    """Every preset, its parameters, GFLOPs and tokens, and the paper's count."""
    dip.main()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    printed = [(name, millions, gflops, tokens, paper)
               for name, _, tokens, gflops, millions, _, paper, *_ in printed]
    rows = re.findall(r"^\| (Di[TP]-\S+) \| ([\d.]+) M \| ([\d.]+) \| (\d+) \| (\S+)", README, re.M)
    assert [row[0] for row in rows] == list(dip.PRESETS) and rows == printed
    parameters, flops = dip.cost(dip.PRESETS["DiP-XL/16"])
    assert (f"{parameters / 1e6:.1f}", f"{flops / 1e9:.1f}") == dict(
        (row[0], row[1:3]) for row in rows)["DiP-XL/16"]


def test_every_choice_marked_in_the_code_is_explained_in_the_readme():
    """Nothing is decided in secret: the `# paper silent [what]` are the rows with a star."""
    marks = re.findall(r"# paper silent \[(.*?)\]", (ROOT / "dip.py").read_text())
    table = README.split("## Where paper, release and we differ")[1].split("\n## ")[0]
    assert set(marks) == set(re.findall(r"^\| ([^|]+?) \* \|", table, re.M))
    assert (ROOT / "dip.py").read_text().count("# paper silent") == len(marks) > 10


@pytest.mark.parametrize("script, options", [("train.py", train.TrainOptions),
                                             ("sample.py", sample.SampleOptions)])
def test_every_command_in_the_readme_parses(script, options):
    """Each command as it stands, and each option the text names."""
    lines = [line.split("#")[0] for line in COMMANDS if f" {script}" in line]
    assert lines
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part)
            if script in words:
                parse_options(options, "", words[words.index(script) + 1:])


def test_every_option_named_in_the_text_exists():
    known = {"--" + field.name.strip("_").replace("_", "-")
             for options in (train.TrainOptions, sample.SampleOptions) for field in fields(options)}
    known |= {f"--no-{name[2:]}" for name in known}
    known |= {"--crop", "--save-stats", "--json"}                                # of fid.py
    known |= {"--nproc_per_node", "--shutdown-timeout", "--local-dir"}            # of torchrun, hf
    assert set(re.findall(r"--[a-z][a-z_-]+", README)) <= known


@pytest.mark.parametrize("code", PYTHON, ids=["method", "notebook"])
def test_the_python_of_the_readme_runs_as_it_stands(code, tmp_path):
    """In a fresh interpreter, in a folder that holds the code: the method, and the notebook."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "three.png" not in code or (tmp_path / "three.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_linked_exists(page):
    linked = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", PAGES[page])
    assert linked
    for pair in linked:
        assert (page.parent / next(filter(None, pair))).exists(), pair


def test_the_requirements_are_pinned_to_the_digit():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in lines)
    assert {line.split("==")[0] for line in lines} == {
        "torch", "numpy", "scipy", "tqdm", "pillow", "matplotlib", "pytest", "hypothesis"}


def test_the_code_can_be_installed_with_every_module_it_has():
    """Forbids a new file that `pip install .` forgets."""
    text = (ROOT / "pyproject.toml").read_text()
    modules = re.search(r"py-modules = \[(.*?)\]", text)[1]
    assert set(re.findall(r"\w+", modules)) == {path.stem for path in ROOT.glob("*.py")}
    packages = re.search(r"packages = \[(.*?)\]", text)[1]
    assert set(re.findall(r"\w+", packages)) == {
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "tests"
        and (path / "__init__.py").exists()} | {"assets"}
