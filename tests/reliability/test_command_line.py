"""
What bad input gets.

The law: one line that names the option, the value and the way out, exit code 1, and nothing lost
that was on the disk.  No option is silently left out.
"""

import importlib
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, checkpoint, error_line, launch, outcome, run
from torch.distributed.run import get_args_parser

import sample
import train

EMPTY = "it is empty; an unset variable?"


@pytest.mark.parametrize("words, answer", [
    ("--model DiP-Nano/8 --image-size 250",
     "image_size=250 is not a multiple of patch_size=8; nearest that fit: 248, 256"),
    ("--image-size 0", "--image-size: 0 must be finite, from 1 to inf; --help lists the options"),
    ("--model DiP-XXL", "--model: invalid choice: 'DiP-XXL' (choose from 'DiT-XL/16', "),
    ("--set hat=2", "--set='hat' is not one of: patch_size"),
    *[(f"--set {name}=64", f"--set='{name}' is not one of: patch_size")
      for name in ("image_size", "num_classes", "repa_dim")],
    *[(f"--set depth{value}", f"--set depth{value}: depth must be a whole number")
      for value in ("=two", "=2.5", "")],
    ("--set depth=-1", "depth=-1 must be a whole number, at least 1"),
    ("--set head=none head_width=3", "head='none' takes no head_width=3"),
    ("--data no/such/folder", "--data no/such/folder is not a folder"),
    ("--init no.pt", "no checkpoint at no.pt; `python train.py` makes one under runs/"),
    ("--model ''", "--model: invalid choice: ''"),
    *[(f"{option} ''", f"{option}: {EMPTY}")
      for option in ("--data", "--init", "--out", "--repa", "--repa-repo")],
    *[(f"{option} {value}", f"{option}: {value} must be finite, from {low} to ")
      for option, value, low in (
          ("--steps", 0, 1), ("--batch-size", 0, 1), ("--micro-batch", -4, 1), ("--lr", -1, 0),
          ("--lr", "inf", 0), ("--lr", "nan", 0), ("--warmup", -1, 0), ("--cooldown", 500, 0),
          ("--clip", "inf", 0), ("--ema", "nan", 0), ("--ema", 1.5, 0), ("--time-mean", "nan", -99),
          ("--label-dropout", 1, 0), ("--seed", -1, 0), ("--seed", 2**63, 0),
          ("--log-every", 0, 1), ("--sample-every", -5, 0), ("--save-every", 0, 1),
          ("--keep", 0, 1), ("--workers", -1, 0))],
    ("--steps two", "--steps: invalid number value: 'two'"),
    ("--stepz 3", "unrecognized arguments: --stepz 3; --help lists the options"),
    ("--step 3", "unrecognized arguments: --step 3"),
    pytest.param(f"--set {9999 * 'x'}", f"--set='{300 * 'x'}", id="long"),
    ("--batch-size 10 --micro-batch 4", "10 is not a multiple of 1 processes x --micro-batch 4"),
    ("--steps 10 --warmup 10", "--warmup 10 must be below --steps 10"),
    ("--device abacus", "--device abacus: "),
    ("--device meta", "--device meta: "),
    ("--repa x --repa-repo no/folder --repa-source local", "--repa x: cannot use it from no/fo"),
    ("--out file/run", "file/run"),
])
def test_training_refuses(monkeypatch, tmp_path, words, answer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert answer in error_line(monkeypatch, train, words)
    assert os.listdir(tmp_path) == ["file"]


def test_training_refuses_to_continue_another_run(monkeypatch, trained):
    """Nothing in its folder changes."""
    before = {path: path.read_bytes() for path in trained.iterdir()}
    for command, answer in (
            (TINY.replace("depth=2", "depth=3", 1), "depth=2 there, 3 here"),
            (f"{TINY} --seed 7", "seed=0 there, 7 here"),
            (f"{TINY} --batch-size 8", "batch_size=4 there, 8 here"),
            (f"{TINY} --ema 0.5", "ema=0.9999 there, 0.5 here"),
            (f"{TINY} --label-dropout 0", "label_dropout=0.1 there, 0.0 here"),
            (f"{TINY} --time-mean 1", "time_mean=0.0 there, 1.0 here")):
        line = error_line(monkeypatch, train, command, "--steps 2 --out", trained)
        assert f"does not fit; choose another --out ({answer})" in line
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


@pytest.mark.parametrize("out", ["runs/a run", "."])
def test_the_last_line_of_a_run_works_as_it_is_printed(monkeypatch, tmp_path, capsys, out):
    """Also where --out needs quotes."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, train, f"{TINY} --steps 1 --out '{out}'")
    done, hint = capsys.readouterr().out.splitlines()[-2:]
    assert done == f"done: {out} is at step 1; look at {out}; next:"
    assert hint == f"    python sample.py --ckpt {shlex.quote(out)} --class 0"
    words = hint.split("sample.py")[1]
    run(monkeypatch, sample, f"{words} --per-class 1 --steps 1 --device cpu")
    assert (tmp_path / "samples-class0-seed0.png").exists()


def test_without_pictures_none_are_drawn_and_with_them_they_are_named(monkeypatch, trained, twenty,
                                                                      tmp_path, capsys):
    """--sample-every 0 switches grids and validation off."""
    command, out = twenty[0], Path(shutil.copytree(twenty[1], tmp_path / "twenty"))
    for folder, pictures in ((trained, []), (out, ["loss.png", "samples-00000020.png"])):
        assert sorted(path.name for path in folder.glob("*.png")) == pictures
        assert ("val_loss" in (folder / "log.jsonl").read_text()) == bool(pictures)
    run(monkeypatch, train, command, f"--out {out}")         # it is finished, and says so again
    assert f"look at {out}/samples-00000020.png and {out}/loss.png; next" in capsys.readouterr().out


ALL = "--num-samples takes all classes in turn; leave out --class, --per-class, --trajectory and "


@pytest.mark.parametrize("words, answer", [
    *[(f"--class {name}", f"--class '{name}' is unknown; did you mean ")
      for name in ("unicorn", "10", "-1", "\u00b2")],
    ("--class unicorn", ", or an index from 0 to 9?"),
    pytest.param(f"--class {9999 * 'x'}", f"--class '{300 * 'x'}", id="long"),
    ("--interval 0.9 0.1", "--interval [0.9, 0.1] must be LOW HIGH with LOW <= HIGH"),
    ("--num-samples 3 --interval 0.9 0.1", "--interval [0.9, 0.1] must be LOW HIGH"),
    *[(f"{option} {value}", f"{option.split()[0]}: {value.split()[0]} must be finite, from ")
      for option, value in (
          ("--interval", "nan 1"), ("--steps", "0"), ("--batch", "0"), ("--per-class", "0"),
          ("--per-class", "1000000000"), ("--num-samples", "-1"), ("--num-samples", "0"),
          ("--cfg", "nan"), ("--cfg", "inf"), ("--size", "-16 16"))],
    ("--size 16 17", "--size=17 is not a multiple of patch_size=4; nearest that fit: 16, 20"),
    ("--seed 1.5", "--seed: invalid number value: '1.5'"),
    ("--sampler ddim", "--sampler: invalid choice: 'ddim' (choose from 'euler', "),
    ("--class 1 --cfg 1e38", "the images diverged by t = 0.88, step 12 of 100; try a cfg below 1e"),
    ("--num-samples 4 --out s.png", "--out s.png must end in .png, or in .npz with --num-samples"),
    ("--out s.jpg", "--out s.jpg must end in .png, or in .npz with --num-samples"),
    *[(f"--num-samples 4 {words}", ALL) for words in ("--class 1", "--per-class 2", "--trajectory",
                                                      "--save-weights w.pt")],
    ("--steps 1 --class 1 --per-class 1 --out /proc/no/where.png", "/proc/no"),
    ("--device meta", "--device meta: "),
    *[(f"{option} ''", f"{option}: {EMPTY}") for option in ("--ckpt", "--out", "--save-weights")],
    ("--save-weights w.pth", "--save-weights w.pth must end in .pt"),
    ("--save-weights w.pt --no-ema", "it writes the averaged weights, so leave out --no-ema"),
])
def test_sampling_refuses(monkeypatch, trained, tmp_path, words, answer):
    monkeypatch.chdir(tmp_path)
    assert answer in error_line(monkeypatch, sample, f"--ckpt {trained} --device cpu", words)
    assert not os.listdir(tmp_path)


def test_a_size_far_from_the_training_is_warned_of(monkeypatch, trained, capsys):
    """More than twice or less than half of a side."""
    monkeypatch.setattr(sample, "sample_grid", lambda *_: None)
    for size, warned in (("8 32", False), ("4 16", True), ("16 36", True)):
        run(monkeypatch, sample, f"--ckpt {trained} --size {size} --device cpu")
        warning = f"warning: --size {size} is far from the training's 16 x 16"
        assert (warning in capsys.readouterr().out) == warned


# --- weights ------------------------------------------------------------------------------------


def test_a_folder_without_a_checkpoint_is_listed(monkeypatch, tmp_path):
    """After a download the weights lie there under another name.  Catches a folder that is called
    empty, and a message that is cut before the way out."""
    assert "no checkpoint at nothing.pt" in error_line(monkeypatch, sample, "--ckpt nothing.pt")
    answer = f"no ckpt-STEP.pt of train.py under {tmp_path}; give a file of weights, or train; it "
    assert f"{answer}holds no file" in error_line(monkeypatch, sample, f"--ckpt {tmp_path}")
    for name in ("dip.ckpt", "config.json", "deep/down.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    line = error_line(monkeypatch, sample, f"--ckpt {tmp_path}")
    assert f"{answer}holds {tmp_path}/config.json, {tmp_path}/deep" in line


@pytest.mark.parametrize("path", [{}, [], 3, b"w.pt", torch.ones(1)], ids=repr)
def test_what_is_no_path_is_not_loaded(path):
    """Catches load_model({}) that returns our own weights."""
    with pytest.raises((TypeError, ValueError), match="os.PathLike object"):
        sample.load_model(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "ema_denoiser._orig_mod.",
                                    "ema_denoiser.module.", "blocks"])
def test_prefixes_of_parallel_and_compiled_models_are_stripped(monkeypatch, trained, tmp_path,
                                                               prefix):
    """Of all weights, or of the blocks that were compiled one by one."""
    model, _ = sample.load_model(trained)
    state = {name.replace("blocks.0.", "blocks.0._orig_mod.") if prefix == "blocks" else
             f"{prefix}{name}": weight for name, weight in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    monkeypatch.setattr(sample, "from_release", lambda weights: (model.config, weights))
    loaded, _ = sample.load_model(tmp_path / "w.pt")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


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


def archive(path, _):
    """A .zip with names of 200,000 letters in all."""
    with zipfile.ZipFile(path, "w") as file:
        for k in range(1000):
            file.writestr(f"{k}-{'x' * 200}", b"")


NO_FILE, NO_WEIGHTS = "is not a checkpoint, or not all of it is there", "is neither a checkpoint of"


@pytest.mark.parametrize("write, answer", [
    (lambda path, _: path.write_text("hello"), NO_FILE),
    (lambda path, _: path.touch(), NO_FILE),
    (lambda path, _: path.write_bytes(random.Random(0).randbytes(100_000)), NO_FILE),
    (archive, NO_FILE),
    (lambda path, _: torch.save([1, 2], path), "it holds a list"),
    (lambda path, _: torch.save(Hostile(), path), NO_FILE),
    (lambda path, _: torch.save({"config": {}}, path), NO_WEIGHTS),
    (lambda path, _: torch.save({"w": torch.ones(2)}, path), NO_WEIGHTS),
    (changed(classes=["one"]), "classes and names are not 10 texts each"),
    (changed(names=[*range(10)]), "classes and names are not 10 texts each"),
    (with_weights(lambda w: w.pop("embed.bias")), '"embed.bias"'),
    (with_weights(lambda w: w.update(new=torch.ones(1))), '"new"'),
    (with_weights(lambda w: w.update({"embed.bias": torch.ones(3)})), "size mismatch for embed.b"),
    (with_weights(lambda w: w["embed.bias"].fill_(torch.nan)), "weight embed.bias is not finite"),
    (with_weights(lambda w: w.clear()), NO_WEIGHTS),
], ids=["text", "empty", "random", "zip", "list", "code", "other dict", "other weights", "classes",
        "names", "missing", "unexpected", "shape", "nan", "no weights"])
def test_sampling_refuses_what_is_not_a_checkpoint_of_its_model(monkeypatch, trained, tmp_path,
                                                                write, answer):
    """In one line of at most 500 letters; no code of the file is run."""
    path = tmp_path / "ckpt-1.pt"
    write(path, trained)
    line = error_line(monkeypatch, sample, "--ckpt", path)
    assert str(path) in line and answer in line


def test_init_names_the_weights_that_do_not_fit(monkeypatch, trained, tmp_path):
    """After another --set.  Catches blocks that silently start from new weights."""
    command = TINY.replace("depth=2", "depth=3", 1)
    line = error_line(monkeypatch, train, command, "--steps 1 --init", trained, "--out", tmp_path)
    assert f"--init {trained} does not fit the model" in line
    assert 'Missing key(s) in state_dict: "blocks.2.' in line
    assert not list(tmp_path.glob("*.pt"))


# --- errors, consoles, launchers ----------------------------------------------------------------


MEMORY = "out of memory: a smaller --micro-batch (training) or --batch (sampling)"
LOADER = "a loader process was killed; out of memory? Fewer"
PEER = "another process of this command has ended"


@pytest.mark.parametrize("error, answer", [
    (MemoryError(), MEMORY),
    (MemoryError("Unable to allocate 74.5 GiB for an array with shape (10000, 1)"), MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MEMORY),
    (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: " + 9999 * "x"),
     MEMORY),
    (EOFError(), LOADER),                                    # the end of a pipe shows in many ways
    (ConnectionResetError(104, "Connection reset by peer"), LOADER),
    (BrokenPipeError(32, "pipe"), LOADER),
    (RuntimeError("[pair.cc] Connection closed by peer [10.0.0.2]:31522"), PEER),        # gloo
    (RuntimeError("failed to recv: connection reset by peer"), PEER),        # the store of torchrun
], ids=lambda value: repr(value)[:30])
def test_what_a_machine_runs_out_of_or_loses_ends_in_one_line(monkeypatch, trained, error, answer):
    def fail(*_):
        raise error

    monkeypatch.setattr(sample, "sample_grid", fail)
    assert error_line(monkeypatch, sample, f"--ckpt {trained} --class 1").startswith(answer)


def test_in_a_shell_an_error_is_one_line_and_a_code_whatever_letters_the_console_lacks(
        monkeypatch, trained, tmp_path):
    """Windows' consoles often have cp1252.  Catches "'charmap' codec can't encode" where a class, a
    folder or a file has a name in other letters."""
    shutil.copytree(trained, tmp_path / "犬")
    (tmp_path / "犬" / "ckpt-00000002.pt").touch()
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    code, out, err = outcome(launch("sample.py", "--ckpt 犬 --class 犬", cwd=tmp_path))
    warning, error = err.splitlines()
    assert code == 1 and warning.startswith("warning: ?/ckpt-00000002.pt is not a checkpoint")
    assert error.startswith("sample.py: error: --class '?' is unknown; did you mean ")


def test_a_command_whose_terminal_was_closed_before_it_began_does_its_work(tmp_path, trained):
    """As a daemon starts it: then sys.stdout and sys.stderr are None."""
    command = f"{sys.executable} {ROOT}/sample.py --ckpt {trained} --class 1 --steps 1 --out g.png"
    assert subprocess.run(f"{command} >&- 2>&-", shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "g.png").exists()


@pytest.mark.parametrize("name", ["train", "sample", "fid", "experiments.__main__",
                                  "experiments.speed"])
def test_help_is_one_screen_and_torchrun_takes_no_option_of_ours_for_its_own(monkeypatch, capsys,
                                                                             name):
    """It reads the beginning of its own options, such as --num of --numa-binding, even behind the
    name of the script."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, importlib.import_module(name), "--help")
    printed = capsys.readouterr().out
    lines, options = printed.splitlines(), set(re.findall(r"^ +(--[a-z-]+)", printed, re.M))
    assert ended.value.code == 0 and "usage:" in lines[0]
    assert len(lines) <= 65 and max(map(len, lines)) <= 112
    assert len(options) > 7 or "experiments" in name
    for option in options if "experiments" not in name else ():
        words = [f"{name}.py", option, "2"]
        parsed = get_args_parser().parse_args(words)
        assert [parsed.training_script, *parsed.training_script_args] == words, option
