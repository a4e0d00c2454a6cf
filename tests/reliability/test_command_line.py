"""
What bad input gets.

The law: one line that names the option, the value and the way out, exit code 1, and nothing lost
that was on the disk.  Nothing that was asked for is silently left out.
"""

import importlib
import os
import platform
import subprocess
import sys

import pytest
import torch
from commands import ROOT, TINY, checkpoint, error_line, run
from PIL import Image

import common
import sample
import train


@pytest.mark.parametrize("words, answer", [
    ("--model DiP-Nano/16 --image-size 250", "image_size=250 is not a multiple of patch_size=16"),
    ("--model DiP-XXL", "--model='DiP-XXL' is not one of: DiT-XL/16"),
    ("--set hat=2", "--set='hat' is not one of: patch_size"),
    ("--set depth=two", "--set depth=two: must be depth=VALUE, and depth is a int"),
    ("--set depth", "--set depth: must be depth=VALUE, and depth is a int"),
    ("--set image_size=64", "--set='image_size' is not one of: patch_size"),
    ("--set head=none head_width=3", "head='none' takes no head_width=3"),
    ("--data no/such/folder", "--data no/such/folder is not a folder"),
    ("--data ''", "--data is empty: an unset variable? Leave it out, or name it"),
    ("--model ''", "--model is empty: an unset variable?"),
    ("--init ''", "--init is empty: an unset variable?"),
    ("--out ''", "--out is empty: an unset variable?"),
    ("--init no.pt", "no checkpoint at no.pt"),
    ("--batch-size 0", "--batch-size 0 must be at least 1"),
    ("--micro-batch -4", "--micro-batch -4 must be at least 1"),
    ("--sample-every -5", "--sample-every -5 must be at least 0"),
    ("--save-every 0", "--save-every 0 must be at least 1"),
    ("--keep 0", "--keep 0 must be at least 1"),
    ("--cooldown 500", "--cooldown 500.0 is a fraction: it must be from 0 to 1"),
    ("--ema nan", "--ema nan is a fraction: it must be from 0 to 1"),
    ("--label-dropout 1", "--label-dropout 1 drops every label"),
    ("--batch-size 10 --micro-batch 4", "10 is not a multiple of 1 processes x --micro-batch 4"),
    ("--lr -1", "--lr -1.0 must be at least 0"),
    ("--lr inf", "--lr inf must be at least 0 and finite"),
    ("--lr nan", "--lr nan must be at least 0"),
    ("--clip inf", "--clip inf must be at least 0 and finite"),
    ("--time-mean nan", "--time-mean nan must be between -100 and 100"),
    ("--seed 12345678901234567890", "--seed 12345678901234567890 must be below 2^63"),
    ("--seed -1", "--seed -1 must be at least 0"),
    ("--device abacus", "--device abacus"),
    ("--device meta", "--device meta: "),
    ("--repa x --repa-repo no/folder --repa-source local", "--repa x: cannot use it from no/fo"),
])
def test_training_refuses(monkeypatch, tmp_path, words, answer):
    monkeypatch.chdir(tmp_path)
    assert answer in error_line(monkeypatch, train, words)
    assert not os.listdir(tmp_path)


def folders(root, *names):
    """Folders with an image each; a name that ends in / has none."""
    for name in names:
        (root / name).mkdir(parents=True)
        if not name.endswith("/"):
            Image.new("RGB", (4, 4)).save(root / name / "0.png")
    return root


@pytest.mark.parametrize("names, answer", [
    (["train/empty class/"], "has no images below it; endings that are read: "),
    (["val/cats", "val/dogs"], "has val/ but no train/; give "),
    (["train/cats", "train/dogs/", "train/emus/"], "class folders without images: dogs, emus; "
                                                   "remove them, they would shift the labels"),
    (["train/cats", "train/dogs", "val/cats", "val/emus"],
     "val/ and train/ have different classes; in one of them only: dogs, emus"),
], ids=["no images", "val alone", "empty classes", "different classes"])
def test_training_refuses_a_folder_that_is_not_what_it_seems(monkeypatch, tmp_path, names, answer):
    line = error_line(monkeypatch, train, "--data", folders(tmp_path, *names))
    assert f"--data {tmp_path}" in line and answer in line


def test_training_refuses_to_continue_another_run(monkeypatch, trained):
    """Nothing in its folder changes."""
    before = {path: path.read_bytes() for path in trained.iterdir()}
    for command, answer in (
            (TINY.replace("depth=2", "depth=3", 1), "depth=2 there, 3 here"),
            (f"{TINY} --seed 7", "--seed=0 there, 7 here"),
            (f"{TINY} --batch-size 8", "--batch-size=4 there, 8 here"),
            (f"{TINY} --ema 0.5", "--ema=0.9999 there, 0.5 here"),
            (f"{TINY} --label-dropout 0", "--label-dropout=0.1 there, 0.0 here"),
            (f"{TINY} --time-mean 1", "--time-mean=0.0 there, 1.0 here")):
        line = error_line(monkeypatch, train, command, "--steps 2 --out", trained)
        assert f"is of another configuration ({answer}); choose another --out" in line
    line = error_line(monkeypatch, train, TINY, "--steps 1 --out", trained)
    assert "is already at step 1 of --steps 1; a larger --steps trains on" in line
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


def test_training_refuses_a_folder_it_cannot_write(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert f"{tmp_path}/file" in error_line(monkeypatch, train, TINY, f"--out {tmp_path}/file/run")


def test_a_preset_that_does_not_fit_the_memory_is_refused_before_the_first_step(monkeypatch,
                                                                                tmp_path):
    """DiP-Ti/16 at 256 pixels: forbids 23 GB and a kernel that kills without a word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "available_memory", lambda device: 2**27)
    line = error_line(monkeypatch, train, "--model DiP-Ti/16 --device cpu")
    assert "--micro-batch 1 needs about 0." in line and "0.1 GiB are free; a smaller" in line
    assert "--model, or --grad-checkpoint, helps" in line and not os.listdir(tmp_path)


def test_a_preset_on_a_cpu_is_announced_with_micro_batches_that_fit(monkeypatch, tmp_path, capsys):
    """And with the days it takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "available_memory", lambda device: 2**31)
    monkeypatch.setattr(train, "fit", lambda options, *rest, **more: (None, options.steps))
    run(monkeypatch, train, "--model DiP-Ti/16 --device cpu")
    text = capsys.readouterr().out
    count, micro = text.split("steps of 256 images in ")[1].split(" micro-batches of ")
    micro = int(micro.split()[0])
    assert int(count) * micro == 256 and micro < 32
    assert "1600000 steps of 256 images" in text and "days of a CPU at 50 GFLOP/s; --steps" in text
    assert f"micro_batch={micro}" in text and "hidden_size=192" in text


@pytest.mark.parametrize("out, ckpt", [
    ("runs/a run", ""), ("./runs/b", ""), (".", " --ckpt ."),
    ("else where", " --ckpt 'else where'"),
])
def test_the_last_line_of_a_run_works_as_it_is_printed(monkeypatch, tmp_path, capsys, out, ckpt):
    """Also where --out is not under runs/; only pictures that are there are named."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, train, f"{TINY} --steps 1 --out '{out}'")
    done, hint = capsys.readouterr().out.splitlines()[-2:]
    assert done == "done; next:" and hint == f"    python sample.py{ckpt} --class 'striped disc'"
    words = hint.split("sample.py")[1]
    run(monkeypatch, sample, f"{words} --num 1 --steps 1 --device cpu")
    assert (tmp_path / "samples.png").exists()


def test_without_pictures_none_are_drawn_and_with_them_they_are_named(monkeypatch, tmp_path,
                                                                      capsys):
    """--sample-every 0 switches grids and validation off."""
    for every, pictures in ((0, []), (2, ["loss.png", "samples-00000002.png"])):
        out = tmp_path / str(every)
        run(monkeypatch, train, TINY, f"--steps 2 --sample-every {every} --out {out}")
        assert sorted(path.name for path in out.glob("*.png")) == pictures
        log = (out / "log.jsonl").read_text()
        assert ("val_loss" in log) == bool(pictures)
    assert f"done: look at {out}/samples-00000002.png and {out}/loss.png; next" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("words, answer", [
    ("--class unicorn", "--class 'unicorn' is unknown; near it: "),
    ("--class 10", "--class 10: this model has classes 0 to 9"),
    ("--class \u00b2", "--class '\u00b2' is unknown; near it: "),
    ("--interval 0.9 0.1", "--interval 0.9 0.1 must have 0 <= LOW <= HIGH <= 1"),
    ("--interval nan 1", "--interval nan 1.0 must have 0 <= LOW"),
    ("--steps 0", "--steps 0 must be at least 1"),
    ("--batch 0", "--batch 0 must be at least 1"),
    ("--num 0", "--num 0 must be at least 1"),
    ("--num 1000000000", "a picture of more than 10,000 images; --num-samples exports as many"),
    ("--num-samples -1", "--num-samples -1 must be at least 0"),
    ("--cfg nan", "--cfg nan must be at least 0"),
    ("--cfg inf", "--cfg inf must be at least 0 and finite"),
    ("--time-shift 0", "--time-shift 0.0 must be above 0 and finite"),
    ("--time-shift inf", "--time-shift inf must be above 0 and finite"),
    ("--size 16 17", "--size=17 is not a multiple of patch_size=4; nearest that fit: 16, 20"),
    ("--size -16 -16", "--size=-16 is not a multiple of patch_size=4"),
    ("--num-samples 4 --out s.png", "--out s.png must end in .npz"),
    ("--out s.jpg", "--out s.jpg must end in .png; an .npz needs --num-samples"),
    ("--num-samples 4 --class 1", "--num-samples takes the classes in turn; leave out --class"),
    ("--num-samples 4 --num 2", "leave out --class, --num and --trajectory"),
    ("--num-samples 4 --trajectory", "leave out --class, --num and --trajectory"),
    ("--steps 1 --class 1 --num 1 --out /proc/no/where.png", "/proc/no"),
    ("--device meta", "--device meta: "),
    ("--ckpt ''", "--ckpt is empty: an unset variable? Leave it out, or name it"),
    ("--out ''", "--out is empty: an unset variable?"),
    ("--save-weights ''", "--save-weights is empty: an unset variable?"),
    ("--save-weights w.pt --no-ema", "--save-weights keeps the averaged weights; leave out --no-"),
])
def test_sampling_refuses(monkeypatch, trained, tmp_path, words, answer):
    monkeypatch.chdir(tmp_path)
    assert answer in error_line(monkeypatch, sample, f"--ckpt {trained} --device cpu", words)
    assert not os.listdir(tmp_path)


def test_a_size_far_from_the_training_is_warned_of(monkeypatch, trained, tmp_path, capsys):
    """More than twice or less than half of a side."""
    monkeypatch.setattr(sample, "sample_grid", lambda *_: None)
    for size, warned in (("8 32", False), ("4 16", True), ("16 36", True)):
        run(monkeypatch, sample, f"--ckpt {trained} --size {size} --device cpu")
        warning = f"warning: --size {size} is far from the 16 x 16 of the training"
        assert (warning in capsys.readouterr().out) == warned


def test_sampling_without_a_checkpoint_says_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "OUR_WEIGHTS", tmp_path / "not there.pt")
    line = error_line(monkeypatch, sample)
    assert "no checkpoint under runs/; `python train.py` makes one" in line
    assert "no checkpoint at nothing.pt" in error_line(monkeypatch, sample, "--ckpt nothing.pt")


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemError('code from a checkpoint was run')",)


def changed(**changes):
    """A writer of the checkpoint of a run with some entries changed."""
    return lambda path, run: torch.save(checkpoint(run) | changes, path)


def with_weights(change):
    """A writer of the checkpoint of a run after change(weights)."""
    def write(path, run):
        state = checkpoint(run)
        change(state["ema"])
        torch.save(state, path)
    return write


@pytest.mark.parametrize("write, answer", [
    (lambda path, _: path.write_text("hello"), "is not a checkpoint, or not all of it is there"),
    (lambda path, _: path.touch(), "is not a checkpoint, or not all of it is there"),
    (lambda path, _: torch.save({"config": {}}, path), "it has no ema, step, classes, names, opti"),
    (lambda path, _: torch.save([1, 2], path), "neither a checkpoint of train.py nor weights of a"),
    (lambda path, _: torch.save({"w": torch.ones(2)}, path), "nor weights of a released DiP"),
    (lambda path, _: torch.save(Hostile(), path),
     "exec) and may run code when opened; if you trust "
                                                  "it: python -c "),
    (changed(classes=["one"]), "classes and names are not 10 texts each"),
    (with_weights(lambda w: w.pop("embed.bias")), "do not fit; missing: embed.bias"),
    (with_weights(lambda w: w.update(new=torch.ones(1))), "do not fit; unexpected: new"),
    (with_weights(lambda w: w.update({"embed.bias": torch.ones(3)})),
     "do not fit; of another shape: embed.bias (3,) there, (16,) here"),
    (with_weights(lambda w: [w.pop(name) for name in list(w)[:5]]),
     "missing: embed.weight, embed.bias, time.mlp.0.weight, ..."),
], ids=["text", "empty", "other dict", "list", "other weights", "code", "names", "missing",
        "unexpected", "shape", "many"])
def test_sampling_refuses_what_is_not_a_checkpoint_of_its_model(monkeypatch, trained, tmp_path,
                                                                write, answer):
    """Weights that differ are named, the first few; no code of the file is run."""
    path = tmp_path / "ckpt-1.pt"
    write(path, trained)
    line = error_line(monkeypatch, sample, "--ckpt", path)
    assert str(path) in line and answer in line


def test_init_names_the_weights_that_do_not_fit(monkeypatch, trained, tmp_path):
    """After another --model, or another layer; nothing is written."""
    command = TINY.replace("depth=2", "depth=3", 1).replace("head_width=4", "head_width=2", 1)
    line = error_line(monkeypatch, train, command, f"--init {trained} --out {tmp_path}/run")
    assert f"{trained}: weights and model do not fit; missing: blocks.2." in line
    assert "of another shape: output.head.down.0.weight (4, 3, 3, 3) there, (2, 3, 3, 3) here" in (
        line)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_safetensors_without_their_package_are_refused_with_the_way_to_it(monkeypatch, tmp_path):
    (tmp_path / "dip.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    line = error_line(monkeypatch, sample, f"--ckpt {tmp_path}/dip.safetensors")
    assert "needs the safetensors package; `pip install safetensors`, or give a .pt file" in line


def test_there_is_a_bar_where_the_terminal_does_not_know_its_width(monkeypatch, capsys):
    """Some report 0 columns."""
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    monkeypatch.setenv("COLUMNS", "0")
    for _ in common.progress(range(3), "work"):
        pass
    assert "work: 100%" in capsys.readouterr().err


def test_running_out_of_memory_ends_in_one_line(monkeypatch, trained):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                  RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you")):
        def fail(*_):
            raise error

        monkeypatch.setattr(sample, "sample_grid", fail)
        line = error_line(monkeypatch, sample, f"--ckpt {trained} --class 1")
        assert "out of memory; a smaller --micro-batch (training) or --batch (sampling)" in line


SCRIPTS = ["train", "sample", "fid", "experiments.__main__", "experiments.speed",
           "experiments.recognise", "experiments.frechet"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_one_screen(monkeypatch, capsys, name):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, module, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and "usage:" in lines[0]
    assert len(lines) <= 60 and max(map(len, lines)) <= 112


def test_an_error_reaches_the_shell_as_one_line_and_a_code(tmp_path):
    command = [sys.executable, ROOT / "sample.py", "--ckpt", "nothing.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sample.py: error: no checkpoint at nothing.pt")


FAULTS = """
import resource, torch
from common import run_main
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
run_main(lambda: print(faults(20), faults(5)))"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_kept_and_not_faulted_in_again():
    """A tensor of 64 MiB has 16384 pages: after a while none of them comes from the system."""
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True)
    first, later = map(int, done.stdout.split())
    assert first > 16000 and later < 1000, done.stderr
