"""Chapter 6: what bad input gets: one line that names the field, the value and the way out."""

import importlib
import subprocess
import sys

import pytest
import torch
from commands import ROOT, TINY, checkpoint, complaint, run

import sample
import train


@pytest.mark.parametrize("words, answer", [
    ("--model DiP-Nano/16 --image-size 250", "image_size=250 is not a multiple of patch_size=16"),
    ("--model DiP-XXL", "--model='DiP-XXL' is not one of: DiT-XL/16"),
    ("--set hat=2", "--set='hat' is not one of: patch_size"),
    ("--set depth=two", "--set depth=two: depth is a int"),
    ("--data no/such/folder", "--data no/such/folder is not a folder"),
    ("--set image_size=64", "--set='image_size' is not one of: patch_size"),
    ("--batch-size 0", "--batch-size 0 must be at least 1"),
    ("--micro-batch -4", "--micro-batch -4 must be at least 1"),
    ("--cooldown 500", "--cooldown 500.0 is a share: it must be from 0 to 1"),
    ("--batch-size 10 --micro-batch 4", "10 is not a multiple of 1 processes x --micro-batch 4"),
    ("--lr -1", "--lr -1.0 must be at least 0"),
    ("--device abacus", "--device abacus"),
    ("--repa x --repa-repo no/folder --repa-source local", "--repa x: cannot use it from no/fo"),
])
def test_training_refuses(monkeypatch, tmp_path, words, answer):
    monkeypatch.chdir(tmp_path)
    assert answer in complaint(monkeypatch, train, words)


def test_training_refuses_a_folder_without_images(monkeypatch, tmp_path):
    (tmp_path / "train" / "empty class").mkdir(parents=True)
    assert "has no <class>/*.jpg below it" in complaint(monkeypatch, train, "--data", tmp_path)


def test_training_refuses_to_continue_another_configuration(monkeypatch, trained):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    line = complaint(monkeypatch, train, TINY.replace("depth=2", "depth=3", 1), "--out", trained)
    assert "is of another configuration (depth=2 there, 3 here); choose another --out" in line
    assert all(path.read_bytes() == data for path, data in before.items())


def test_training_refuses_to_continue_with_another_seed(monkeypatch, trained):
    line = complaint(monkeypatch, train, TINY, "--steps 2 --seed 7 --out", trained)
    assert "--seed 0 there, 7 here" in line
    line = complaint(monkeypatch, train, TINY, "--steps 1 --out", trained)
    assert "is already at step 1 of --steps 1" in line


def test_training_refuses_a_folder_it_cannot_write(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert f"{tmp_path}/file" in complaint(monkeypatch, train, TINY, f"--out {tmp_path}/file/run")


@pytest.mark.parametrize("words, answer", [
    ("--class unicorn", "--class 'unicorn' is unknown; near it: "),
    ("--class 10", "--class 10: this model has classes 0 to 9"),
    ("--interval 0.9 0.1", "--interval 0.9 0.1 must have 0 <= LOW <= HIGH <= 1"),
    ("--steps 0", "--steps 0 must be at least 1"),
    ("--num 0", "--num 0 must be at least 1"),
    ("--cfg nan", "--cfg nan must be at least 0"),
    ("--time-shift 0", "--time-shift 0.0 must be above 0"),
    ("--size 16 17", "--size=17 is not a multiple of patch_size=4; nearest that fit: 16, 20"),
    ("--num-samples 4 --out s.png", "--out s.png must end in .npz"),
    ("--num-samples 4 --class 1", "--num-samples takes the classes in turn; leave out --class"),
    ("--steps 1 --class 1 --out /proc/no/where.png", "/proc/no"),
])
def test_sampling_refuses(monkeypatch, trained, tmp_path, words, answer):
    monkeypatch.chdir(tmp_path)
    assert answer in complaint(monkeypatch, sample, f"--ckpt {trained} --device cpu", words)


def test_sampling_without_a_checkpoint_says_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "`python train.py` makes one" in complaint(monkeypatch, sample)
    assert "no checkpoint at nothing.pt" in complaint(monkeypatch, sample, "--ckpt nothing.pt")


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemError('code from a checkpoint was run')",)


def wrong_weights(trained):
    state = checkpoint(trained)
    state["config"]["depth"] = 1
    return state


@pytest.mark.parametrize("write, answer", [
    (lambda path, _: path.write_text("hello"), "is not a checkpoint of train.py"),
    (lambda path, _: path.touch(), "is not a checkpoint of train.py"),
    (lambda path, _: torch.save({"model": {}}, path), "has no ema, optimizer, step, tally, config"),
    (lambda path, _: torch.save(Hostile(), path), "or not all of it is there (Unpickling"),
    (lambda path, run: torch.save(wrong_weights(run), path), "weights and configuration disagree"),
], ids=["text", "empty", "other dict", "pickle that runs code", "wrong weights"])
def test_sampling_refuses_what_is_not_a_checkpoint(monkeypatch, trained, tmp_path, write, answer):
    path = tmp_path / "ckpt-1.pt"
    write(path, trained)
    line = complaint(monkeypatch, sample, "--ckpt", path)
    assert str(path) in line and answer in line


SCRIPTS = ["train", "sample", "fid", *sorted(f"experiments.{path.stem}" for path in
                                     (ROOT / "experiments").glob("[!_]*.py")
                                     if path.stem != "harness")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_one_screen(monkeypatch, capsys, name):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, module, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and "usage:" in lines[0]
    assert len(lines) <= 60 and max(map(len, lines)) <= 112


def test_an_error_reaches_the_shell_as_one_line_and_a_code(tmp_path):
    command = [sys.executable, ROOT / "sample.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("sample.py: error: no checkpoint under runs/")
    assert done.stderr.count("\n") == 1
