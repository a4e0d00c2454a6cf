"""
What a run survives.

The law: whatever happens to the machine, the disk, the data or the numbers, a file under its final
name is whole, a checkpoint that was good stays, and the same command goes on to the run that
nothing happened to; or it ends in one line.

    pytest tests/reliability/test_faults.py --kills 20       # twenty SIGKILLs instead of three
"""

import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import planted
import pytest
import torch
from commands import (ROOT, TINY, Background, alone, assert_same_state, checkpoint, error_line,
                      leaves, run, run_ranks)
from helpers import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
import dataset
import dip
import sample
import train
from dataset import FolderData
from fid import read_image
from train import read_log

STATE = "model", "ema", "optimizer", "unlogged"
OFTEN = "--save-every 1 --log-every 2"


def losses(folder):
    return [{**line, "images_per_s": 0} for line in read_log(folder) if "loss" in line]


def assert_same_run(one, other):
    """Same weights, averages and optimizer, and the same losses in the log: bit for bit."""
    a, b = checkpoint(one), checkpoint(other)
    assert a["step"] == b["step"]
    assert_same_state(a, b, STATE)
    assert losses(one) == losses(other)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A command of six steps with a checkpoint each, its run, and one that ended after four."""
    folder, command = tmp_path_factory.mktemp("six"), f"{TINY} {OFTEN} --steps 6"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train, command, f"--out {folder}/whole")
        run(patch, train, command, f"--steps 4 --out {folder}/four")
    return SimpleNamespace(command=command, whole=folder / "whole", four=folder / "four")


def wait_for(condition, process, seconds=120):
    """Until the condition holds, while the process lives."""
    end = time.time() + seconds
    while not condition():
        assert process.is_alive(), process.texts()
        assert time.time() < end, f"nothing happened in {seconds} s"
        time.sleep(0.005)


# --- interrupted --------------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_loses_only_the_steps_since_its_checkpoint(
        monkeypatch, tmp_path, kills):
    """SIGKILL, again and again: every file under its final name is whole, what is half written is
    swept away, the lock on --out ends with the process though its loader still lives, and the same
    command ends in the run that was never killed."""
    command = f"{TINY} --save-every 2 --log-every 2 --keep 3 --steps {20 * kills} --workers 1"
    run(monkeypatch, train, command, f"--workers 0 --out {tmp_path}/whole")
    out, chance = tmp_path / "killed", random.Random(0)
    for _ in range(kills):
        known = set(out.glob("ckpt-*.pt"))
        process = Background("train", command, f"--out {out}")
        wait_for(lambda: set(out.glob("ckpt-*.pt")) - known, process)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        assert process.end()[0] == -signal.SIGKILL
        paths = sorted(out.glob("ckpt-*.pt"))
        assert paths
        for path in paths:
            common.load_checkpoint(path, verify=True)
    run(monkeypatch, train, command, f"--workers 0 --out {out}")
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob(".*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_at_a_whole_step(monkeypatch, tmp_path, capfd, number):
    """A pre-empted job, or Ctrl-C: between two checkpoints and two lines of the log.  It is
    acknowledged at once."""
    command = f"{TINY} --steps 8 --log-every 4 --out"
    run(monkeypatch, train, command, tmp_path / "whole")
    average, calls, handler = train.update_ema, [], signal.getsignal(number)

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
            assert "stopping: the step is finished and saved first" in capfd.readouterr().err
        average(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", signalled)
        code = run(patch, train, command, tmp_path / "stopped")
    assert code == 128 + number
    out = capfd.readouterr().out
    assert "stopped by a signal after step 4; the same command continues from " in out
    assert f"{tmp_path}/stopped/ckpt-00000004.pt" in out and "done" not in out
    assert checkpoint(tmp_path / "stopped")["step"] == 4
    assert signal.getsignal(number) == handler
    run(monkeypatch, train, command, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("where", ["flow_matching_loss", "generate"])
def test_a_signal_ends_validation_and_sampling_within_a_step(monkeypatch, tmp_path, capsys, where):
    """Forbids a Ctrl-C that waits for minutes of pictures.  The run is saved and goes on."""
    calls, work = [], getattr(train, where)

    def signalled(*arguments, **settings):
        if where == "generate" or not arguments[0].training:
            calls.append(arguments)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
        return work(*arguments, **settings)

    command = f"{TINY} --steps 4 --sample-every 2 --save-every 3 --out {tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(train, where, signalled)
        assert run(patch, train, command) == 130
    assert len(calls) == 1                                   # no second batch, no second class
    assert "stopped by a signal after step 3" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == 3
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png"]
    run(monkeypatch, train, command)
    assert (tmp_path / "samples-00000004.png").exists()


def test_a_signal_during_the_last_pictures_names_no_picture_that_is_not_there(
        monkeypatch, tmp_path, capsys):
    draw = sample.generate
    monkeypatch.setattr(train, "generate", lambda *arguments, **settings: (
        os.kill(os.getpid(), signal.SIGINT), draw(*arguments, **settings))[-1])
    run(monkeypatch, train, TINY, f"--steps 1 --sample-every 1 --out {tmp_path}")
    text = capsys.readouterr().out
    assert f"done: look at {tmp_path}/loss.png" in text and "samples-" not in text
    assert checkpoint(tmp_path)["step"] == 1


def test_a_cluster_that_signals_every_process_gets_one_checkpoint(monkeypatch, tmp_path):
    """SIGTERM to both ranks and their loaders, and to the ranks again, at whatever steps they are:
    they agree on one to end at, and one process alone finishes what two began."""
    command = f"{TINY} --steps 4000 --save-every 5"
    out = tmp_path / "two"
    ranks = run_ranks(2, "train", command, f"--workers 1 --out {out}")
    wait_for(lambda: list(out.glob("ckpt-*.pt")), ranks[0])
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGTERM)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    ends = [rank.end() for rank in ranks]
    assert [code for code, _, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    text = ends[0][1]
    assert text.count("stopped by a signal after step") == 1 and "stopped" not in ends[1][1]
    stopped = int(text.split("stopped by a signal after step ")[1].split(";")[0])
    assert checkpoint(out)["step"] == stopped < 4000
    command += f" --steps {stopped + 5}"
    run(monkeypatch, train, command, f"--out {out}")
    run(monkeypatch, train, command, f"--out {tmp_path}/one")
    assert_same_state(checkpoint(out), checkpoint(tmp_path / "one"), ["model"], atol=1e-4)


def test_a_second_run_in_one_folder_is_refused_while_the_first_one_lives(monkeypatch, tmp_path):
    """And not a moment longer, however it ends; forbids two runs that prune each other's
    checkpoints, and a lock that a crash leaves behind."""
    out = tmp_path / "run"
    first = Background("train", TINY, f"--steps 9999 --save-every 1 --workers 1 --out {out}")
    wait_for(lambda: list(out.glob("ckpt-*.pt")), first)
    line = error_line(monkeypatch, train, TINY, f"--steps 9999 --out {out}")
    assert f"--out {out}: another run is writing there; wait for its end, or choose" in line
    os.kill(first.pid, signal.SIGKILL)
    first.end()
    steps = checkpoint(out)["step"] + 1
    run(monkeypatch, train, TINY, f"--steps {steps} --out {out}")
    assert checkpoint(out)["step"] == steps


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=500k tmpfs {disk} || exit 77
cp {out}/*.* {disk} && {command} --out {disk}
code=$?
ls -A {disk} > {out}/listing
cp {disk}/*.* {out}
exit $code
"""


@pytest.mark.parametrize("kind", ["largest file", "tmpfs"])
def test_a_full_disk_ends_the_run_in_one_line_and_costs_no_checkpoint(monkeypatch, tmp_path, six,
                                                                      kind):
    """By a limit on the size of files, and by a real file system that is too small."""
    out = tmp_path / "full"
    shutil.copytree(six.four, out)
    for path in sorted(out.glob("ckpt-*.pt"))[:-1]:
        path.unlink()
    before = {path: path.read_bytes() for path in out.glob("ckpt-*.pt")}
    if kind == "tmpfs":
        (tmp_path / "disk").mkdir()
        words = shlex.join([sys.executable, f"{ROOT}/train.py", *shlex.split(six.command)])
        script = ON_A_SMALL_DISK.format(disk=tmp_path / "disk", out=out, command=words)
        words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
        process = subprocess.run(words, capture_output=True, text=True)
        code, errors = process.returncode, process.stderr
        if "unshare" in errors or code == 77:
            pytest.skip("this machine lets nobody mount a tmpfs")
    else:
        process = Background("train", six.command, f"--out {out}", first=limit_file_size)
        code, _, errors = process.end()
    assert code == 1
    assert "could not be written; is the disk full?" in errors.strip().splitlines()[-1]
    assert {path: path.read_bytes() for path in out.glob("ckpt-*.pt")} == before
    assert not [name for name in os.listdir(out) if name.endswith(".partial")]
    run(monkeypatch, train, six.command, f"--out {out}")
    assert_same_run(six.whole, out)


# --- damaged ------------------------------------------------------------------------------------


def truncated(data):
    return data[:len(data) // 2]


def flipped(data):
    """One bit of one weight, as bad memory does it: still a zip, still a pickle, still a model."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b""])
def test_a_damaged_newest_checkpoint_is_passed_over(monkeypatch, tmp_path, capsys, six, damage):
    shutil.copytree(six.four, tmp_path / "run")
    newest = tmp_path / "run" / "ckpt-00000004.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    run(monkeypatch, train, six.command, f"--out {tmp_path}/run")
    text = capsys.readouterr().out
    assert f"warning: {newest} is " in text and "passed over" in text
    assert "resumed at step 3" in text
    assert_same_run(six.whole, tmp_path / "run")


def test_when_no_checkpoint_is_whole_the_run_does_not_begin_anew(monkeypatch, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run").glob("ckpt-*.pt"):
        path.write_bytes(truncated(path.read_bytes()))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    line = error_line(monkeypatch, train, TINY, f"--steps 2 --out {tmp_path}/run")
    assert "none of the 1 checkpoints in" in line and "is intact" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_broken_later_checkpoint_never_costs_a_good_one(tmp_path):
    """Pruning counts back from the checkpoint just written, not from the highest number."""
    (tmp_path / "ckpt-00000009.pt").write_bytes(b"broken")
    for step in (5, 6, 7):
        common.write_checkpoint(tmp_path, 1, step=step, model={})
    assert sorted(os.listdir(tmp_path)) == ["ckpt-00000007.pt", "ckpt-00000009.pt"]


def test_sampling_passes_over_a_damaged_checkpoint_too(monkeypatch, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "ckpt-00000002.pt").write_bytes(b"PK half a file")
    run(monkeypatch, sample, f"--ckpt {tmp_path}/run --class 1 --num 1 --steps 1 --device cpu",
        f"--out {tmp_path}/s.png")
    assert "passed over" in capsys.readouterr().out


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    """The file under the name stays what it was."""
    (tmp_path / "file").write_text("good")

    def write(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.save_atomically(tmp_path / "file", write)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "good"


def test_leftovers_of_a_killed_run_are_swept_away(tmp_path):
    """Half-written files, and lines of the log that are going to be written again."""
    (tmp_path / ".ckpt-00000009.pt.123.partial").write_bytes(b"half")
    for step in (3, 6, 9):
        train.write_log(tmp_path, step=step, loss=0.5)
    train.remove_leftovers(tmp_path, 6)
    assert os.listdir(tmp_path) == ["log.jsonl"]
    assert [line["step"] for line in read_log(tmp_path)] == [3, 6]


# --- bad images ---------------------------------------------------------------------------------


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned(image):
    """Stored lying on its side, with the EXIF that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6                                         # turn it clockwise to see it
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


GRADIENT = np.add.outer(np.arange(16) * 4, np.arange(16) * 3).astype(np.uint8) + 60
COLOUR = np.stack([GRADIENT, GRADIENT[::-1], 255 - GRADIENT], axis=-1)
GREY = Image.fromarray(GRADIENT)
PICTURE = Image.fromarray(COLOUR)


@pytest.mark.parametrize("data, expected, within", [
    (encoded(PICTURE), COLOUR, 0),
    (turned(PICTURE), COLOUR, 0),
    (encoded(GREY), GRADIENT[..., None], 0),
    (encoded(Image.fromarray(GRADIENT.astype(np.uint16) * 257)), GRADIENT[..., None], 0),
    (encoded(PICTURE.quantize(256)), COLOUR, 4),
    (encoded(PICTURE.convert("CMYK"), "JPEG", quality=100), COLOUR, 8),
    (encoded(PICTURE.convert("RGBA")), COLOUR, 0),
    (encoded(PICTURE, "WEBP", lossless=True), COLOUR, 0),
], ids=["RGB", "turned by EXIF", "grey", "16 bits", "palette", "CMYK", "RGBA", "WebP"])
def test_an_image_is_read_whatever_its_encoding(tmp_path, data, expected, within):
    """Forbids 16 bits clipped to white, pictures on their side, and inverted inks."""
    (tmp_path / "image").write_bytes(data)
    pixels = read_image(tmp_path / "image", 16)
    assert np.abs(pixels.astype(int) - expected).max() <= within


@pytest.mark.parametrize("size, answer", [
    ((10_000, 10_000), "could be decompression bomb"),
    ((20_000, 20_000), "could be decompression bomb"),
    ((2, 60_000), "2 x 60000 is too long to be scaled"),
])
def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, size, answer):
    """A few kilobytes that unpack to 100 million pixels, or would once they are scaled."""
    data = encoded(Image.new("1", size))
    assert len(data) < 100_000
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(Exception, match=answer):
        read_image(tmp_path / "bomb.png", 256)


@pytest.fixture
def album(tmp_path):
    """300 good pictures in two classes, each of its own brightness, and things to be ignored."""
    for k in range(300):
        folder = tmp_path / "album" / ("cats" if k < 150 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), k % 256).save(folder / f"{k:03d}.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / "._298.png").write_bytes(b"what a Mac leaves behind")
    return tmp_path / "album"


BAD = {"cats/010.png": b"", "cats/149.png": truncated(encoded(PICTURE)),
       "dogs/299.png": b"\x89PNG this is none"}


def test_a_bad_image_is_named_and_the_next_one_stands_in_for_it(album, capsys):
    good = FolderData(album, 8)
    assert len(good) == 300 and not good.bad.any()
    for name, data in BAD.items():
        (album / name).write_bytes(data)
    data = FolderData(album, 8)
    for index, other in ((10, 11), (149, 150), (299, 0)):    # over the border of a class, and round
        for _ in range(2):
            pixels, label = data[index]
            assert np.array_equal(pixels, good[other][0]) and label == good.labels[other]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3                                   # each is named once
    for name, line in zip(BAD, lines):
        assert f"warning: {album / name}: unreadable (" in line
    assert data.bad.nonzero().flatten().tolist() == [10, 149, 299]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_percent_of_bad_images_is_survived_and_more_ends_the_run(monkeypatch, tmp_path, album,
                                                                     workers):
    """With loader processes too, whose finds count together; the list is in the line."""
    command = f"{TINY} --data {album} --steps 80 --workers {workers}"
    for name, data in BAD.items():
        (album / name).write_bytes(data)
    run(monkeypatch, train, command, f"--out {tmp_path}/run")
    (album / "dogs" / "200.png").write_bytes(b"one too many")
    line = error_line(monkeypatch, train, command, f"--out {tmp_path}/more")
    assert "4 of 300 images unreadable, more than 1 %: " in line
    assert all(name in line for name in [*BAD, "dogs/200.png"])


def test_bad_images_of_all_ranks_count_together(album):
    class Two(type(alone())):
        def gather(self, thing):
            return [thing, [7, 8, 9]]

    two, data = Two(rank=0, world=2, device=torch.device("cpu")), FolderData(album, 8)
    dataset.refuse_bad_files([data, None], two)
    data.bad[7] = True
    dataset.refuse_bad_files([None, data], two)                # the same file, found twice
    data.bad[0] = True
    with pytest.raises(ValueError, match="4 of 300 images unreadable"):
        dataset.refuse_bad_files([None, data], two)


def test_an_error_leaves_no_loader_process_behind(tmp_path, album):
    """Forbids a command that says its line and then waits forever for its own workers."""
    for k in range(4):
        (album / "cats" / f"00{k}.png").write_bytes(b"")
    process = Background("train", TINY, f"--data {album} --steps 200 --workers 2 --out run",
                         cwd=tmp_path)
    code, _, errors = process.end()
    assert code == 1 and "more than 1 %" in errors.splitlines()[-1]
    with pytest.raises(ProcessLookupError):                  # its session has no process left
        os.killpg(process.pid, 0)


def test_an_answer_of_the_system_is_no_bad_image(monkeypatch, album):
    """Forbids a network disk's hiccup being taken for a broken file, and trained around."""
    def busy(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(dataset, "read_image", busy)
    data = FolderData(album, 8)
    with pytest.raises(OSError, match="Input/output error"):
        data[0]
    assert not data.bad.any()


# --- bad numbers --------------------------------------------------------------------------------


def skipped_lines(folder):
    return [line for line in read_log(folder) if "skipped" in line]


@pytest.mark.parametrize("value, what", [("nan", "the loss for t in "), ("1e18", "the gradient")])
def test_an_update_that_is_not_finite_is_skipped_logged_and_survived(monkeypatch, tmp_path, value,
                                                                     what):
    """NaN in the noise of example 9, which is step 3: the other five updates are made."""
    run(monkeypatch, planted, f"{value} 9 -- {TINY} {OFTEN} --steps 6 --keep 9 --out {tmp_path}")
    skipped = skipped_lines(tmp_path)
    assert [line["step"] for line in skipped] == [3] and what in skipped[0]["skipped"]
    saved = sorted(int(path.stem[-8:]) for path in tmp_path.glob("ckpt-*.pt"))
    assert saved == [1, 2, 4, 5, 6]
    state = checkpoint(tmp_path)
    assert all(leaf.isfinite().all() for key in STATE for _, leaf in leaves(state[key])
               if torch.is_tensor(leaf))
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {5}
    logged = [line["loss"] for line in read_log(tmp_path) if "loss" in line]
    assert len(logged) == 3 and np.isfinite(logged).all()


def test_the_time_of_a_loss_that_is_not_finite_is_named(monkeypatch, tmp_path):
    run(monkeypatch, planted, f"nan 9 -- {TINY} {OFTEN} --steps 3 --out {tmp_path}")
    z = dataset.Examples(dataset.ShapesData(16), 0)[9][2]
    tenth = int(dip.logit_normal_time(z) * 10)
    (line,) = skipped_lines(tmp_path)
    assert line["skipped"] == f"the loss for t in {tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"


def test_two_ranks_train_the_run_of_one_process_and_skip_where_either_meets_a_nan(monkeypatch,
                                                                                  tmp_path):
    """Two micro-batches each.  Example 9 belongs to rank 0 of step 3, 15 to rank 1 of step 4."""
    command = f"nan 9 15 -- {TINY} {OFTEN} --sample-every 6 --steps 6 --out {tmp_path}"
    run(monkeypatch, planted, f"{command}/one")
    ends = [rank.end() for rank in run_ranks(2, "planted", f"{command}/two --micro-batch 1")]
    assert [code for code, _, _ in ends] == [0, 0], ends
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert_same_state(one, two, ["model", "ema"], atol=1e-5)
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "val_loss", "grad_norm"):
        values = [[line[key] for line in log if key in line] for log in (one, two)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-5)
    assert [line["step"] for line in one if "skipped" in line] == [3, 4]
    assert [line for line in one if "skipped" in line] == [line for line in two
                                                           if "skipped" in line]


def test_a_run_that_stays_not_finite_ends_and_keeps_its_last_good_checkpoint(monkeypatch, tmp_path):
    """Even with --keep 1 and a checkpoint due at every step."""
    bad = " ".join(map(str, range(16, 100)))
    line = error_line(monkeypatch, planted,
                      f"nan {bad} -- {TINY} {OFTEN} --keep 1 --steps 50 --out {tmp_path}")
    assert "10 updates in a row were not finite, the last at step 14: the loss for t in" in line
    assert f"last good checkpoint: {tmp_path}/ckpt-00000004.pt" in line
    (tmp_path / "ckpt-00000099.pt").write_bytes(b"broken")
    assert train.newest_up_to(tmp_path, 14) == tmp_path / "ckpt-00000004.pt"
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path)["model"].values())


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(monkeypatch, trained, tmp_path):
    """Forbids "done" after a run that diverged, and black pictures without a word."""
    shutil.copytree(trained, tmp_path / "run")
    average = train.update_ema

    def overflow(ema, model, *rest):
        average(ema, model, *rest)
        model.label.weight.data[0] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", overflow)
        line = error_line(patch, train, TINY, f"--steps 2 --out {tmp_path}/run")
    assert (f"{tmp_path}/run: weight label.weight is not finite; use an earlier checkpoint, or "
            f"train again with a lower --lr") in line
    assert [path.name for path in (tmp_path / "run").glob("ckpt-*")] == ["ckpt-00000001.pt"]
    state = checkpoint(trained)
    state["ema"]["blocks.0.norm1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    line = error_line(monkeypatch, sample, f"--ckpt {tmp_path}/nan.pt --class 1")
    assert f"{tmp_path}/nan.pt: weight blocks.0.norm1.weight is not finite" in line
    common.load_model(tmp_path / "nan.pt", ema=False)        # the others are good


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    """JSON has no NaN and no infinity: null."""
    train.write_log(tmp_path, step=1, loss=float("nan"), lr=float("inf"), loss_by_t=[None])
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "loss": null, "lr": null, "loss_by_t": [null]}'


# --- untrusted files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("untrusted")


PICTURES = [*(encoded(PICTURE, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")),
            encoded(PICTURE.quantize(256)), turned(PICTURE)]


@settings(max_examples=200)
@given(data=st.sampled_from(PICTURES).flatmap(damaged))
def test_any_bytes_are_an_image_or_a_clean_error(scratch, data):
    (scratch / "images" / "cat").mkdir(parents=True, exist_ok=True)
    (scratch / "images" / "cat" / "0.png").write_bytes(data)
    try:
        pixels, label = FolderData(scratch / "images", 8)[0]
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 and label == 0
    except ValueError as error:
        assert "1 of 1 images unreadable" in str(error) and "0.png" in str(error)


@pytest.fixture(scope="module")
def good_checkpoint(trained):
    return common.find_checkpoint(trained).read_bytes()


@settings(max_examples=100)
@given(draw=st.data())
def test_any_bytes_are_a_checkpoint_or_a_clean_error(scratch, good_checkpoint, draw):
    path = scratch / "ckpt-1.pt"
    path.write_bytes(draw.draw(damaged(good_checkpoint)))
    try:
        common.load_model(path, torch.device("cpu"))
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


LEAVES = st.none() | st.booleans() | st.integers(-9, 10**18) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3)
                      | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)


def assert_loads_or_is_refused(path, state):
    torch.save(state, path)
    try:
        _, info = common.load_model(path, torch.device("cpu"))
        sample.find_class("0", info["classes"], info["names"])
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def small_state(good_checkpoint):
    """What sampling needs of a checkpoint."""
    state = torch.load(io.BytesIO(good_checkpoint), weights_only=True)
    return {key: state[key] for key in common.CHECKPOINT}


@settings(max_examples=100)
@given(draw=st.data())
def test_a_checkpoint_of_nonsense_is_a_clean_error(scratch, small_state, draw):
    """A file that is formally right, with anything at all in place of a field or a setting."""
    state = {**small_state, "config": dict(small_state["config"])}
    place = draw.draw(st.sampled_from([state, state["config"]]))
    place[draw.draw(st.sampled_from(sorted(place)))] = draw.draw(VALUES)
    assert_loads_or_is_refused(scratch / "ckpt-2.pt", state)


def test_a_weight_whose_name_holds_a_line_break_is_refused_in_one_line(scratch, small_state):
    weights = small_state["ema"] | {"a\nb": torch.ones(1)}
    with pytest.raises(ValueError, match="unexpected: a b$"):
        torch.save(small_state | {"ema": weights}, scratch / "ckpt-2.pt")
        common.load_model(scratch / "ckpt-2.pt")


@pytest.mark.parametrize("changes", [
    {"depth": 10**9}, {"head_depth": 10**15}, {"head_width": 10**18}, {"repa_dim": 10**18},
    {"hidden_size": 8 * 10**17},
    {"head": "mlp", "head_depth": 10**9}, {"patch_size": 2**40}, {"num_classes": 10**18},
    {"hidden_size": [16]}, {"depth": "deep"}, {"unknown": 1},
], ids=str)
def test_a_hostile_configuration_is_refused_before_it_is_built(scratch, small_state, changes):
    """Forbids hours and gigabytes spent on a file of a few kilobytes."""
    state = {**small_state, "config": small_state["config"] | changes}
    torch.save(state, scratch / "ckpt-3.pt")
    started = time.time()
    with pytest.raises(ValueError, match="ckpt-3.pt: ") as refused:
        common.load_model(scratch / "ckpt-3.pt")
    assert "\n" not in str(refused.value) and time.time() - started < 5


@settings(max_examples=100)
@given(data=damaged(b"\x93NUMPY\x01\x00" + encoded(PICTURE)) | damaged(b'{"seed": 0}'))
def test_any_bytes_in_a_half_done_export_are_a_clean_error(scratch, trained, data):
    """In a part, and in the recipe beside the parts."""
    part, recipe = scratch / "00000000.npy", scratch / "recipe.json"
    part.write_bytes(data)
    recipe.write_bytes(data)
    options = sample.SampleOptions(ckpt=str(common.find_checkpoint(trained)))
    for read in (lambda: sample.write_npz(scratch / "x.npz", {part: range(1)}, (1, 2, 2, 3),
                                          np.zeros(1)),
                 lambda: sample.check_recipe(scratch, options, alone())):
        with pytest.raises(ValueError) as refused:
            read()
        assert str(scratch) in str(refused.value) and "delete" in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("array", [
    np.array([{"a": 1}]), np.zeros((2, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3)),
], ids=["pickles", "too many images", "floats"])
def test_a_part_of_an_export_that_is_not_what_it_should_be_is_refused(tmp_path, array):
    """Forbids running its code, and an .npz whose header promises other images."""
    np.save(tmp_path / "0.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="0.npy is damaged; delete it, and the same command draws"):
        sample.write_npz(tmp_path / "x.npz", {tmp_path / "0.npy": range(1)}, (1, 2, 2, 3),
                         np.zeros(1))


@pytest.mark.parametrize("key, value, answer", [
    ("optimizer", {"state": 3}, "does not fit"), ("unlogged", torch.zeros(2), "does not fit"),
    ("images", 7, "the number of images=7 there, 50000 here"),
    ("classes", ["one"], "the classes=['one'] there, ['striped disc'"),
])
def test_a_run_does_not_resume_from_nonsense(monkeypatch, trained, tmp_path, key, value, answer):
    (tmp_path / "run").mkdir()
    torch.save(checkpoint(trained) | {key: value}, tmp_path / "run" / "ckpt-00000001.pt")
    assert answer in error_line(monkeypatch, train, TINY, f"--steps 2 --out {tmp_path}/run")


def test_the_settings_of_the_optimizer_are_those_of_the_command_not_of_the_file(
        monkeypatch, trained, tmp_path):
    """A checkpoint brings Adam's moments alone."""
    (tmp_path / "run").mkdir()
    state = checkpoint(trained)
    state["optimizer"]["param_groups"] = 5
    torch.save(state, tmp_path / "run" / "ckpt-00000001.pt")
    run(monkeypatch, train, TINY, f"--steps 2 --lr 0 --out {tmp_path}/run")
    resumed = checkpoint(tmp_path / "run")
    assert_same_state(resumed, state, ["model"])
    assert resumed["optimizer"]["param_groups"][0]["weight_decay"] == 0


def test_what_rank_0_alone_finds_wrong_ends_all_ranks_in_the_same_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt-00000001.pt").write_bytes(b"broken")
    ends = [rank.end() for rank in run_ranks(2, "train", TINY, "--out run", cwd=tmp_path)]
    for code, _, errors in ends:
        assert code == 1
        assert errors.count("train.py: error: none of the 1 checkpoints in run is intact") == 1


LOG = b"".join(json.dumps({"step": k, "loss": 0.5}).encode() + b"\n" for k in range(9))


@settings(max_examples=100)
@given(data=damaged(LOG))
def test_a_damaged_log_is_read_as_far_as_it_goes(scratch, data):
    (scratch / "log.jsonl").write_bytes(data)
    assert all(isinstance(line["step"], int) for line in read_log(scratch))
    (scratch / "log.jsonl").write_bytes(LOG[:-5])
    assert [line["step"] for line in read_log(scratch)] == list(range(8))
