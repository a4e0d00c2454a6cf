"""Chapter 6: what bad input gets: one line that names the field, the value and the way out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import TINY, run

import sample
import train
from sample import run_main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train, *TINY, "--steps", 1, "--out", out)
    return out


def complaint(monkeypatch, module, *arguments):
    """The one line that a command ends in."""
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: run(monkeypatch, module, *arguments))
    line = ended.value.code
    assert isinstance(line, str), f"ended with code {line} and no line"
    assert "\n" not in line and line.startswith(f"{module.__name__}.py: error: ")
    return line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--image-size", "250", "--model", "DiP-Nano/16"],
            "image_size=250 is not a multiple of patch_size=16",
        ),
        (["--model", "DiP-XXL"], "--model='DiP-XXL' is not one of: DiT-XL/16"),
        (["--set", "hat=2"], "--set='hat' is not one of: image_size"),
        (["--set", "depth=two"], "--set depth=two: depth is a int"),
        (["--data", "no/such/folder"], "--data no/such/folder is not a folder"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (
            ["--batch-size", "10", "--micro-batch", "4"],
            "--batch-size 10 is not a multiple of 1 processes x --micro-batch 4",
        ),
        (["--lr", "-1"], "--lr -1.0 must be at least 0"),
        (["--device", "abacus"], "--device abacus"),
        (
            ["--repa", "x", "--repa-repo", "no/folder", "--repa-source", "local"],
            "--repa x: cannot load it from no/folder",
        ),
    ],
)
def test_training_refuses(monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in complaint(monkeypatch, train, *arguments)


def test_training_refuses_a_folder_without_images(monkeypatch, tmp_path):
    (tmp_path / "train" / "empty class").mkdir(parents=True)
    assert "has no <class>/*.jpg below it" in complaint(monkeypatch, train, "--data", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_names_an_unreadable_image(monkeypatch, tmp_path, workers):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 not a JPEG")
    line = complaint(
        monkeypatch,
        train,
        *TINY,
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "run",
        "--workers",
        workers,
    )
    assert "broken.jpg: unreadable image" in line


def test_training_refuses_to_continue_another_configuration(monkeypatch, trained):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    line = complaint(
        monkeypatch,
        train,
        *TINY,
        "--set",
        "hidden_size=16",
        "depth=3",
        "num_heads=2",
        "head_depth=2",
        "head_width=4",
        "patch_size=4",
        "--steps",
        2,
        "--out",
        trained,
    )
    assert "is of another configuration (depth=2 there, 3 here); choose another --out" in line
    assert all(path.read_bytes() == data for path, data in before.items())


def test_training_refuses_a_folder_it_cannot_write(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in complaint(monkeypatch, train, *TINY, "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--class", "unicorn"], "--class 'unicorn' is unknown; near it: "),
        (["--class", "10"], "--class 10: this model has classes 0 to 9"),
        (["--interval", "0.9", "0.1"], "--interval 0.9 0.1 must have 0 <= LOW <= HIGH <= 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--num", "0"], "--num 0 must be at least 1"),
        (["--cfg", "nan"], "--cfg nan must be at least 0"),
        (["--time-shift", "0"], "--time-shift 0.0 must be above 0"),
        (
            ["--size", "16", "17"],
            "--size=17 is not a multiple of patch_size=4; nearest that fit: 16, 20",
        ),
        (["--num-samples", "4", "--out", "s.png"], "--out s.png must end in .npz"),
        (["--steps", "1", "--class", "1", "--out", "/proc/no/where.png"], "/proc/no"),
    ],
)
def test_sampling_refuses(monkeypatch, trained, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in complaint(monkeypatch, sample, "--ckpt", trained, "--device", "cpu", *arguments)


def test_sampling_without_a_checkpoint_says_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "`python train.py` makes one" in complaint(monkeypatch, sample)
    assert "no checkpoint at nothing.pt" in complaint(monkeypatch, sample, "--ckpt", "nothing.pt")


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemError('code from a checkpoint was run')",)


@pytest.mark.parametrize(
    "content", ["text", "empty", "other dict", "pickle that runs code", "wrong weights"]
)
def test_sampling_refuses_a_file_that_is_not_a_checkpoint(monkeypatch, trained, tmp_path, content):
    path = tmp_path / "ckpt-1.pt"
    if content == "text":
        path.write_text("hello")
    elif content == "empty":
        path.touch()
    elif content == "other dict":
        torch.save({"model": {}}, path)
    elif content == "pickle that runs code":
        torch.save(Hostile(), path)
    else:
        state = torch.load(sample.newest_checkpoint(trained), weights_only=True)
        state["config"]["depth"] = 1
        torch.save(state, path)
    line = complaint(monkeypatch, sample, "--ckpt", path)
    assert str(path) in line
    assert "is not a checkpoint of train.py" in line or "weights and configuration disagree" in line


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_is_one_screen(script):
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    lines = shown.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    assert "usage:" in lines[0]


def test_an_error_reaches_the_shell_as_one_line_and_a_code(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert (
        done.stderr.startswith("sample.py: error: no checkpoint under runs/")
        and done.stderr.count("\n") == 1
    )
