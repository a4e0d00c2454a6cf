"""
What bad input gets.

The law: one line that names the option, the value and the way out, exit code 1, and nothing lost
that was on the disk.  No option is silently left out.
"""

import importlib
import os
import random
import shlex
import zipfile

import pytest
import torch
from commands import TINY, checkpoint, error_line, launch, run
from PIL import Image
from torch.distributed.run import get_args_parser

import fid
import sample
import train

EMPTY = "it is empty; an unset variable?"


@pytest.mark.parametrize("words, answer", [
    ("--model DiP-Nano/16 --image-size 250",
     "image_size=250 is not a multiple of patch_size=16; nearest that fit: 240, 256"),
    ("--image-size 0", "--image-size: 0 must be finite, from 1 to inf; --help lists the options"),
    ("--model DiP-XXL", "--model: invalid choice: 'DiP-XXL' (choose from 'DiT-XL/16', "),
    ("--set hat=2", "--set='hat' is not one of: patch_size"),
    ("--set image_size=64", "--set='image_size' is not one of: patch_size"),
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
          ("--clip", "inf", 0), ("--ema", "nan", 0), ("--time-mean", "nan", -99),
          ("--label-dropout", 1, 0), ("--seed", -1, 0), ("--seed", 2**63, 0),
          ("--log-every", 0, 1), ("--sample-every", -5, 0), ("--save-every", 0, 1),
          ("--keep", 0, 1), ("--workers", -1, 0))],
    ("--steps two", "--steps: invalid number value: 'two'"),
    ("--stepz 3", "unrecognized arguments: --stepz 3; --help lists the options"),
    ("--step 3", "unrecognized arguments: --step 3"),
    ("--batch-size 10 --micro-batch 4", "10 is not a multiple of 1 processes x --micro-batch 4"),
    ("--steps 10 --warmup 10", "--warmup 10 must be below --steps 10"),
    ("--device abacus", "--device abacus: "),
    ("--device meta", "--device meta: "),
    ("--repa x --repa-repo no/folder --repa-source local", "--repa x: cannot use it from no/fo"),
])
def test_training_refuses(monkeypatch, tmp_path, words, answer):
    monkeypatch.chdir(tmp_path)
    assert answer in error_line(monkeypatch, train, words)
    assert not os.listdir(tmp_path)


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


def test_training_refuses_a_folder_it_cannot_write(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert f"{tmp_path}/file" in error_line(monkeypatch, train, TINY, f"--out {tmp_path}/file/run")


def test_a_batch_without_a_divisor_is_trained_and_the_command_says_what_is_slow(monkeypatch,
                                                                                tmp_path, capsys):
    """A prime number of images goes one by one."""
    for size, micro in ((37, 1), (34, 17), (4, 4)):
        run(monkeypatch, train, TINY, f"--batch-size {size} --steps 1 --out {tmp_path}/{size}")
        printed = capsys.readouterr().out
        assert f"1 steps of {size} images, {micro} at a time on each process, into" in printed
        note = f"note: {size} images per process have no larger divisor up to 32 than {micro}, "
        assert (note in printed) == (size == 37)


@pytest.mark.parametrize("out", ["runs/a run", "./runs/b", "."])
def test_the_last_line_of_a_run_works_as_it_is_printed(monkeypatch, tmp_path, capsys, out):
    """Also where --out needs quotes; only pictures that are there are named."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, train, f"{TINY} --steps 1 --out '{out}'")
    done, hint = capsys.readouterr().out.splitlines()[-2:]
    folder = out.removeprefix("./")
    assert done == f"done: {folder} is at step 1; look at {folder}; next:"
    assert hint == f"    python sample.py --ckpt {shlex.quote(folder)} --class 0"
    words = hint.split("sample.py")[1]
    run(monkeypatch, sample, f"{words} --per-class 1 --steps 1 --device cpu")
    assert (tmp_path / "samples-class0-seed0.png").exists()


def test_without_pictures_none_are_drawn_and_with_them_they_are_named(monkeypatch, tmp_path,
                                                                      capsys):
    """--sample-every 0 switches grids and validation off."""
    for every, pictures in ((0, []), (2, ["loss.png", "samples-00000002.png"])):
        out = tmp_path / str(every)
        run(monkeypatch, train, TINY, f"--steps 2 --sample-every {every} --out {out}")
        assert sorted(path.name for path in out.glob("*.png")) == pictures
        assert ("val_loss" in (out / "log.jsonl").read_text()) == bool(pictures)
    assert f"look at {out}/samples-00000002.png and {out}/loss.png; next" in capsys.readouterr().out


ALL = "--num-samples takes all classes in turn; leave out --class, --per-class, --trajectory and "


@pytest.mark.parametrize("words, answer", [
    *[(f"--class {name}", f"--class '{name}' is unknown; did you mean ")
      for name in ("unicorn", "10", "-1", "\u00b2")],
    ("--class unicorn", ", or an index from 0 to 9?"),
    ("--interval 0.9 0.1", "--interval [0.9, 0.1] must be LOW HIGH"),
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
    *[(f"--num-samples 4 {words}", ALL) for words in ("--class 1", "--per-class 2",
                                                      "--trajectory")],
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
    answer = f"no ckpt-*.pt of train.py under {tmp_path}; give a file of weights, or train; it "
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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module.", "ema_denoiser._orig_mod.",
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
    (with_weights(lambda w: w.pop("embed.bias")), '"embed.bias"'),
    (with_weights(lambda w: w.update(new=torch.ones(1))), '"new"'),
    (with_weights(lambda w: w.update({"embed.bias": torch.ones(3)})), "size mismatch for embed.b"),
    (with_weights(lambda w: w["embed.bias"].fill_(torch.nan)), "weight embed.bias is not finite"),
    (with_weights(lambda w: w.clear()), NO_WEIGHTS),
], ids=["text", "empty", "random", "zip", "list", "code", "other dict", "other weights", "names",
        "missing", "unexpected", "shape", "nan", "no weights"])
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


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 74.5 GiB for an array with shape (10000, 1)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you " + 9999 * "x"),
], ids=["Python", "numpy", "CUDA", "torch"])
def test_running_out_of_memory_ends_in_one_line(monkeypatch, trained, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(sample, "sample_grid", fail)
    line = error_line(monkeypatch, sample, f"--ckpt {trained} --class 1")
    assert "out of memory: a smaller --micro-batch (training) or --batch (sampling)" in line


@pytest.mark.parametrize("error", [
    EOFError(), ConnectionResetError(104, "Connection reset by peer"), BrokenPipeError(32, "pipe")],
    ids=repr)
def test_a_loader_that_ends_while_it_is_read_from_is_explained(error):
    """Whichever way the end of a pipe shows."""
    assert sample.explain(error).startswith("a loader process was killed; out of memory? Fewer")


@pytest.mark.parametrize("text", ["[pair.cc] Connection closed by peer [10.0.0.2]:31522",
                                  "failed to recv: connection reset by peer"])
def test_a_lost_peer_is_explained_in_gloos_words_and_in_the_stores(text):
    assert sample.explain(RuntimeError(text)).startswith("another process of this command has")


@pytest.mark.parametrize("module, option", [(train, "--data"), (train, "--set"), (train, "--seed"),
                                            (sample, "--class"), (sample, "--ckpt"),
                                            (sample, "--out")], ids=str)
def test_no_error_is_longer_than_500_letters(monkeypatch, module, option):
    error_line(monkeypatch, module, option, 99_999 * "x")    # looks at the length


def test_an_error_reaches_the_shell_as_one_line_and_a_code(monkeypatch, tmp_path):
    command = launch("sample.py", "--ckpt nothing.pt", cwd=tmp_path)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 1 and not out and err.count("\n") == 1
    assert err.startswith("sample.py: error: no checkpoint at nothing.pt")


@pytest.mark.parametrize("script", ["sample.py", "train.py", "fid.py"])
def test_a_console_without_the_letters_of_a_class_fails_no_command(monkeypatch, trained, tmp_path,
                                                                   script):
    """Windows' consoles often have cp1252.  Catches "'charmap' codec can't encode", exit code 1,
    at the end of a finished run."""
    torch.save(checkpoint(trained) | {"names": ["犬"] * 10}, tmp_path / "w.pt")
    (tmp_path / "犬" / "a").mkdir(parents=True)
    for k in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / "犬" / "a" / f"{k}.png")
    (tmp_path / "犬" / "notes.txt").touch()                  # fid.py names the folder
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    command = launch(script, {
        "sample.py": "--ckpt w.pt --class 0 --per-class 1 --steps 1 --device cpu",
        "train.py": f"{TINY} --data 犬 --steps 1 --out run",
        "fid.py": "犬 --save-stats s.npz --inception no.pth --device cpu"}[script], cwd=tmp_path)
    out, err = command.communicate(timeout=120)
    assert "?" in out and "codec" not in err, err
    if script == "fid.py":
        assert "no.pth" in err                               # what it was to fail of
    else:
        assert command.returncode == 0, err


MODULES = "train", "sample", "fid", "experiments.__main__", "experiments.speed"


@pytest.mark.parametrize("name", MODULES)
def test_help_is_one_screen(monkeypatch, capsys, name):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, module, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and "usage:" in lines[0]
    assert len(lines) <= 65 and max(map(len, lines)) <= 112


@pytest.mark.parametrize("module", [train, sample, fid], ids=lambda module: module.__name__)
def test_torchrun_takes_no_option_of_ours_for_its_own(monkeypatch, capsys, module):
    """It reads the beginning of its own options, such as --num of --numa-binding, even behind the
    name of the script."""
    with pytest.raises(SystemExit):
        run(monkeypatch, module, "--help")
    options = {word.strip(",[]") for word in capsys.readouterr().out.split() if word[:2] == "--"}
    assert len(options) > 8
    for option in options - {"--help"}:
        words = [f"{module.__name__}.py", option, "2"]
        parsed = get_args_parser().parse_args(words)
        assert [parsed.training_script, *parsed.training_script_args] == words, option
