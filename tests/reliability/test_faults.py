"""
What a run survives.

The law: whatever happens to the machine, the disk, the data or the numbers, a file under its final
name is whole, a checkpoint that was good stays, and the same command goes on to the run that
nothing happened to; or it ends in one line, within seconds.
"""

import errno
import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import (TINY, Background, assert_same_state, checkpoint, error_line, leaves, run,
                      run_ranks)
from helpers import damaged
from hooks import (close_the_terminal, mount_tmpfs, move_to_a_small_disk, save_slowly, spoil_noise,
                   step_without_end, without_a_compiler)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train
from train import ImageFolder, read_log

STATE = "model", "ema", "optimizer"
OFTEN = "--save-every 1 --log-every 2"


def losses(folder):
    return [{**line, "images_per_s": 0} for line in read_log(folder) if "loss" in line]


def contents(folder, pattern="*"):
    return {path.name: path.read_bytes() for path in folder.glob(pattern) if path.name != ".lock"}


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


@pytest.fixture
def four(six, tmp_path):
    """A copy of the run that ended after four of six steps."""
    return Path(shutil.copytree(six.four, tmp_path / "four"))


def wait_for(condition, process, seconds=120):
    """Until the condition holds, while the process lives."""
    end = time.time() + seconds
    while not condition():
        assert process.is_alive(), process.texts()
        assert time.time() < end, f"nothing happened in {seconds} s"
        time.sleep(0.005)


# --- killed and signalled -------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_loses_only_the_steps_since_its_checkpoint(
        monkeypatch, tmp_path):
    """SIGKILL, twice; until then a second run in the folder is refused.  Every file under its final
    name is whole, what is half written is swept away, the lock on --out ends with the process
    though its loader still lives, and the same command ends in the run that was never killed."""
    command = f"{TINY} --save-every 2 --log-every 2 --keep 3 --workers 1 --steps"
    out, chance = tmp_path / "killed", random.Random(0)
    for _ in range(2):
        known = set(out.glob("ckpt-*.pt"))
        process = Background("train", command, f"9999 --out {out}")
        wait_for(lambda: set(out.glob("ckpt-*.pt")) - known, process)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGSTOP)
        line = error_line(monkeypatch, train, command, f"9 --out {out}")
        assert f"{out}: another process is writing there; wait until it ends, or choose" in line
        os.kill(process.pid, signal.SIGKILL)
        assert process.end()[0] == -signal.SIGKILL
        paths = sorted(out.glob("ckpt-*.pt"))
        assert paths
        for path in paths:
            assert zipfile.ZipFile(path).testzip() is None and sample.read_file(path)
    command += f" {checkpoint(out)['step'] + 3} --workers 0 --out"
    run(monkeypatch, train, command, out)
    run(monkeypatch, train, command, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob(".*.partial"))


def send_in_step(patch, step, number):
    """The step-th update of the next run sends the signal to its own process."""
    update, calls = train.training_step, []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return update(*arguments)

    patch.setattr(train, "training_step", signalled)


def test_a_signal_saves_and_ends_the_run_at_a_whole_step(monkeypatch, tmp_path, capfd, six):
    """Ctrl-C, a closed terminal, a scheduler: between two checkpoints, and before pictures, which
    take minutes.  It is acknowledged at once.  Catches a signal that kills without a checkpoint."""
    command = f"{six.command} --save-every 9 --log-every 1 --sample-every 3 --out"
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        number, out = getattr(signal, name), tmp_path / name
        handler = signal.getsignal(number)
        with monkeypatch.context() as patch:
            send_in_step(patch, 3, number)
            patch.setattr(train, "write_pictures", lambda *_: pytest.fail("it draws"))
            assert run(patch, train, command, out) == 128 + number
        printed = capfd.readouterr()
        assert "stopping: finishing the step and saving first" in printed.err
        assert "stopped by a signal after step 3; run the same command to continue" in printed.out
        assert "done" not in printed.out and signal.getsignal(number) == handler
        assert checkpoint(out)["step"] == 3
    run(monkeypatch, train, six.command, f"--out {out}")
    assert_same_run(six.whole, out)


@pytest.mark.parametrize("terminal, number", [(True, signal.SIGHUP), (False, signal.SIGINT)])
def test_a_closed_terminal_does_not_end_a_run_before_it_has_saved(tmp_path, terminal, number):
    """Also Ctrl-C with `| tee log`, which ends tee too.  Catches a message that nobody can read and
    that ends the run."""
    process = Background("train", TINY, f"--steps 99999 --log-every 1 --out {tmp_path}",
                         first=partial(close_the_terminal, terminal))
    wait_for(lambda: len(read_log(tmp_path)) > 2, process)
    os.kill(process.pid, number)
    assert process.end(20)[0] == 128 + number
    assert checkpoint(tmp_path)["step"] == read_log(tmp_path)[-1]["step"]


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            send_in_step(patch, 1, signal.SIGHUP)
            assert run(patch, train, TINY, f"--steps 2 --out {tmp_path}") is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint(tmp_path)["step"] == 2


def test_the_same_signal_again_after_a_second_ends_the_run_at_once(tmp_path):
    """Within a second it is the same one: a scheduler signals the agent and its processes."""
    process = Background("train", TINY, f"--steps 2 --workers 1 --out {tmp_path}",
                         first=step_without_end)
    wait_for(lambda: "in the step" in process.texts()[0], process)
    for k in (1, 2):
        os.kill(process.pid, signal.SIGINT)
        wait_for(lambda: process.texts()[1].count("stopping:") == k, process)
    time.sleep(1.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.end(20)[0] == 128 + signal.SIGINT


def test_a_signal_is_heard_by_all_ranks_and_makes_one_checkpoint(monkeypatch, tmp_path):
    """SIGTERM to one rank and its loader, and to the rank again: both ranks agree on one step to
    end at, and one process alone finishes what two began.  Catches a rank that ends before the
    checkpoint is saved: torchrun kills the others soon after."""
    command, out = f"{TINY} --save-every 5", tmp_path / "two"
    ranks = run_ranks(2, "train", command, f"--steps 4000 --workers 1 --out {out}",
                      first=save_slowly)
    wait_for(lambda: list(out.glob("ckpt-*.pt")), ranks[0])
    os.killpg(ranks[1].pid, signal.SIGTERM)
    os.kill(ranks[1].pid, signal.SIGTERM)
    code, text, errors = ranks[1].end()
    assert code == 128 + signal.SIGTERM and "stopped" not in text, errors
    stopped = checkpoint(out)["step"]
    code, text, errors = ranks[0].end()
    assert code == 128 + signal.SIGTERM, errors
    assert text.count(f"stopped by a signal after step {stopped};") == 1 and stopped < 4000
    command += f" --steps {stopped + 5} --out"
    run(monkeypatch, train, command, out)
    run(monkeypatch, train, command, tmp_path / "one")
    assert_same_state(checkpoint(out), checkpoint(tmp_path / "one"), ["model"], atol=1e-4)


def test_a_finished_run_started_again_says_so_and_changes_nothing(monkeypatch, six, four, capsys):
    """With the next command, and no exit code: `train && sample` goes on, and so does a job that is
    queued again.  The same where it has gone further than --steps."""
    before = contents(four, "*.pt"), losses(four)
    for steps in (4, 3):
        capsys.readouterr()
        assert run(monkeypatch, train, six.command, f"--steps {steps} --out {four}") is None
        text = capsys.readouterr().out
        assert f"done: {four} is at step 4" in text
        assert f"next:\n    python sample.py --ckpt {four} --class 0\n" in text
        assert (contents(four, "*.pt"), losses(four)) == before


# --- a crash while loader processes live ----------------------------------------------------------

LOADERS = f"{TINY} --workers 2 --steps 9999"


def test_without_a_compiler_a_run_with_loaders_ends_in_one_line(tmp_path):
    """Catches a command that prints its error and then waits forever for its own loaders."""
    code, _, errors = Background("train", f"{LOADERS} --compile --out {tmp_path}",
                                 first=without_a_compiler).end()
    assert code == 1 and "Traceback" not in errors, errors
    assert ("train.py: error: --compile needs a compiler; leave it out, or set CXX"
            in errors.splitlines()[-1])


def test_a_killed_loader_ends_every_rank_in_one_line(tmp_path):
    """As the system kills one when memory is short."""
    ranks = run_ranks(2, "train", LOADERS, f"--save-every 1 --out {tmp_path}")
    wait_for(lambda: list(tmp_path.glob("ckpt-*.pt")), ranks[0])
    pid = ranks[1].pid
    loader = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    os.kill(int(loader), signal.SIGKILL)
    for rank, answer in zip(ranks, ("another process of this command has ended",
                                    "a loader process was killed; out of memory? Fewer --worke")):
        code, _, errors = rank.end(60)
        assert code == 1 and "Traceback" not in errors, errors
        assert f"train.py: error: {answer}" in errors.splitlines()[-1]
    assert checkpoint(tmp_path)["step"] > 0


def test_too_little_shared_memory_is_said(tmp_path):
    """As in a container of docker: --shm-size is 64 MB there unless it is set."""
    code, _, errors = Background(
        "train", f"{LOADERS} --image-size 256 --batch-size 8 --out {tmp_path}",
        first=partial(mount_tmpfs, "/dev/shm", "1m")).end()
    if code == 77:
        pytest.skip("this machine lets nobody mount a tmpfs")
    assert code == 1 and "Traceback" not in errors, errors
    assert "out of shared memory: fewer --workers, or docker's --shm-size" in (
        errors.splitlines()[-1])


# --- disks ----------------------------------------------------------------------------------------


def limit_file_size(folder, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("shrink", [limit_file_size, move_to_a_small_disk])
def test_a_full_disk_ends_the_run_in_one_line_and_costs_no_checkpoint(monkeypatch, six, four,
                                                                      shrink):
    """By a limit on the size of files, and by a real file system that is too small for a third
    checkpoint.  Catches an old one that is dropped before the new one is written."""
    before = contents(four, "*.pt")
    code, _, errors = Background("train", six.command, f"--out {four}",
                                 first=partial(shrink, four, "800k")).end()
    if code == 77:
        pytest.skip("this machine lets nobody mount a tmpfs")
    assert code == 1
    assert "could not be written; is the disk full?" in errors.strip().splitlines()[-1]
    after = four.with_name("four-after") if shrink is move_to_a_small_disk else four
    assert contents(after, "*.pt") == before and not contents(after, "*.partial")
    run(monkeypatch, train, six.command, f"--out {after}")
    assert_same_run(six.whole, after)


def failing(number):
    """A function that fails as the system does."""
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


LOCKED = "another process is writing there"


@pytest.mark.parametrize("module, name, missing, errors", [
    (fcntl, "lockf", "ENOSYS EINVAL ENOLCK EOPNOTSUPP",
     {"EIO": "Input/output error", "EACCES": LOCKED, "EAGAIN": LOCKED}),
    (os, "fsync", "ENOSYS EINVAL EOPNOTSUPP", {"EIO": "Input/output error"})])
def test_a_service_that_a_disk_lacks_is_warned_of_and_an_error_of_the_disk_is_an_error(
        monkeypatch, four, six, module, name, missing, errors):
    """Lustre and FUSE without locks, shares without fsync: the run goes on.  NFS says EACCES for a
    lock of another process.  Catches EIO taken for a missing service: the next power loss would
    cost the run."""
    command = f"{six.command} --steps 5 --out {four}"
    for number in missing.split():
        monkeypatch.setattr(module, name, failing(getattr(errno, number)))
        with pytest.warns(UserWarning, match=f"no {name.removesuffix('f')}.* here"):
            run(monkeypatch, train, command)
    before = contents(four)
    assert checkpoint(four)["step"] == 5
    for number, answer in errors.items():
        monkeypatch.setattr(module, name, failing(getattr(errno, number)))
        assert answer in error_line(monkeypatch, train, command)
        assert contents(four) == before


def test_a_file_is_on_the_disk_before_it_has_its_name_and_half_of_it_never_has(monkeypatch,
                                                                               tmp_path):
    """Else a power loss leaves an empty file in the place of a good one.  A loader that is killed
    meanwhile is no full disk, wherever PyTorch reports it."""
    events = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *arguments, name=name, call=getattr(os, name): (
            events.append(name), call(*arguments)))
    sample.save_atomically(tmp_path / "file", lambda partial: partial.write_text("good"))
    assert events == ["fsync", "replace"] and contents(tmp_path) == {"file": b"good"}
    for error in (KeyboardInterrupt(), RuntimeError("DataLoader worker (pid 1) is killed")):
        def write(partial):
            partial.write_text("half")
            raise error

        with pytest.raises(type(error)):
            sample.save_atomically(tmp_path / "file", write)
        assert contents(tmp_path) == {"file": b"good"}


def out_of_memory(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate "
                       "memory: you tried to allocate 341269 bytes.")


def out_of_addresses(*_, **__):
    """As under `ulimit -v`."""
    raise RuntimeError("unable to mmap 341269 bytes from file <x>: Cannot allocate memory (12)")


def test_a_good_checkpoint_is_never_skipped_for_what_is_not_in_the_file(monkeypatch, six, four,
                                                                        capsys):
    """Catches an older checkpoint that is resumed, and the newer one overwritten, because the disk
    or the memory failed for a moment.  The same command goes on."""
    before = contents(four)
    for module, name, fail, answer in (
            (torch, "load", failing(errno.EIO), "Input/output error"),
            (torch, "load", failing(errno.EACCES), "Permission denied"),
            (torch, "load", failing(errno.ESTALE), "Stale file handle"),
            (torch, "load", out_of_memory, "out of memory"),
            (torch, "load", out_of_addresses, "out of memory"),
            (zipfile.ZipFile, "testzip", failing(errno.EIO), "Input/output error")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            assert answer in error_line(patch, train, six.command, f"--out {four}")
            if name == "load":
                assert answer in error_line(patch, sample, f"--ckpt {four} --device cpu")
        assert "skipped" not in capsys.readouterr().out and contents(four) == before
    run(monkeypatch, train, six.command, f"--out {four}")
    assert_same_run(six.whole, four)


# --- damaged files --------------------------------------------------------------------------------


def truncated(data):
    return data[:len(data) // 2]


def flipped(data):
    """One bit of one weight, as bad memory does it: still a zip, still a pickle, still a model."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b""])
def test_a_damaged_newest_checkpoint_is_skipped(monkeypatch, capsys, six, four, damage):
    """Sampling skips it too, except for a bit of a weight, which it does not look for."""
    newest = four / "ckpt-00000004.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert sample.find_checkpoint(four) == (
        newest if damage is flipped else four / "ckpt-00000003.pt")
    capsys.readouterr()
    run(monkeypatch, train, six.command, f"--out {four}")
    out, err = capsys.readouterr()
    assert f"warning: {newest} is " in err and "; skipped" in err and "resumed at step 3" in out
    assert_same_run(six.whole, four)


def test_a_later_checkpoint_that_is_broken_or_dropped_meanwhile_never_costs_a_good_one(
        monkeypatch, six, four):
    """Old ones are dropped from the checkpoint just written downwards, not from the last name.  A
    link to nowhere is in the list of files, and is no file when it is opened.  A user's own copy,
    by any name, is neither dropped nor resumed from."""
    for name in ("ckpt-00000001-good.pt", "ckpt-best.pt"):
        (four / name).write_bytes(b"a copy")
    (four / "ckpt-00000008.pt").symlink_to(four / "dropped")
    (four / "ckpt-00000009.pt").write_bytes(b"broken")
    run(monkeypatch, train, six.command, f"--steps 5 --keep 1 --out {four}")
    assert [path.stem[-1] for path in sorted(four.glob("*.pt"))] == ["d", "5", "8", "9", "t"]


def test_a_log_without_a_checkpoint_is_kept(monkeypatch, tmp_path):
    """It may be of a run whose checkpoints were moved, or no log of ours.  So are hidden files."""
    (tmp_path / "log.jsonl").write_bytes(before := b'{"step": 7}\n{"epoch": 1}\n')
    (tmp_path / ".big.partial").touch()
    run(monkeypatch, train, TINY, f"--steps 1 --out {tmp_path}")
    assert (tmp_path / "log.old.jsonl").read_bytes() == before
    assert (tmp_path / ".big.partial").exists()
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1]


def test_when_no_checkpoint_is_whole_no_rank_begins_anew(monkeypatch, four):
    """What rank 0 alone finds wrong ends all ranks in the same line."""
    for path in four.glob("ckpt-*.pt"):
        path.write_bytes(truncated(path.read_bytes()))
    before, answer = contents(four), "none of the 2 checkpoints in four is intact"
    monkeypatch.chdir(four.parent)
    assert error_line(monkeypatch, train, TINY, "--steps 9 --out four") == answer
    for rank in run_ranks(2, "train", TINY, "--out four", cwd=four.parent):
        code, _, errors = rank.end()
        assert code == 1 and errors.count(f"train.py: error: {answer}\n") == 1
    assert contents(four) == before


# --- bad images -----------------------------------------------------------------------------------


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
FLIPPED = bytearray(encoded(PICTURE))
FLIPPED[100] ^= 1        # one bit of the pixels: Pillow loads it at the second attempt
BAD = FLIPPED, b"", truncated(encoded(PICTURE)), b"\x89PNG this is none", encoded(
    Image.new("F", (8, 8)), "TIFF")


def album(root, count, *bad):
    """Good pictures in two classes, each of its own brightness, with bad ones at these indices."""
    for k in range(count):
        path = root / "album" / ("cats" if k < count // 2 else "dogs") / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        good = encoded(Image.new("L", (8, 8), k % 256))
        path.write_bytes(BAD[bad.index(k)] if k in bad else good)
    return root / "album"


def test_a_bad_image_is_named_once_and_the_next_one_stands_in_for_it(tmp_path, capsys):
    """Over the border of a class, and round the end.  The label is that of the image shown."""
    root = album(tmp_path, 300, 10, 149, 299)
    data = ImageFolder(root, 8)
    (root / "cats" / "010.png").unlink()                     # someone moved it meanwhile
    for index, other in ((10, 11), (149, 150), (299, 0)):
        for _ in range(2):
            pixels, label = data[index]
            assert (pixels == other % 256).all() and label == (other >= 150)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 3
    for name, line in zip(("cats/010.png", "cats/149.png", "dogs/299.png"), warned):
        assert f"warning: {root}/{name}: unreadable (" in line and "stands in for it" in line


@pytest.mark.parametrize("count, bad, ends", [
    (1, [0], True), (2, [0], False), (10, [3], False), (10, [3, 7], True),
    (250, [3, 120], False), (250, [3, 120, 240], True)])
def test_one_bad_image_or_one_percent_is_survived_and_more_is_an_error(tmp_path, count, bad, ends):
    """Of the folder.  A single one of a small album is survived, too."""
    data = ImageFolder(album(tmp_path, count, *bad), 8)
    read = (data[k][0].shape for _ in range(3) for k in range(count))
    if ends:
        with pytest.raises(ValueError, match=f"{len(bad)} of the first .* than 1 %: ") as ended:
            list(read)
        assert all(f"{k:03d}.png" in str(ended.value) for k in bad)
    else:
        assert set(read) == {(8, 8, 3)}


def test_chance_does_not_end_a_run_and_a_rotten_folder_does_so_soon(monkeypatch, tmp_path):
    """Of 99,999 images, 0.5 % are bad: the many processes of a large run start with a bad one, and
    none ends.  If all are bad, eleven are named.  Catches 1 % of the few that were read so far."""
    def read(path, size):
        if int(path) % every == 0:
            raise ValueError("bad")

    monkeypatch.setattr(train, "read_image", read)
    data = ImageFolder(album(tmp_path, 10), 8)
    data.files, data.labels, every = [*map(str, range(99_999))], [0] * 99_999, 200
    for k in range(0, 99_998, 2):
        data[k]
    data.bad, data.read, every = set(), 0, 1
    with pytest.raises(ValueError, match="11 of the first 11 images are unreadable"):
        data[0]


def test_bad_images_found_by_loader_processes_end_the_run(tmp_path):
    """Each of them counts its own; none is left behind."""
    code, _, errors = Background("train", TINY, f"--data {album(tmp_path, 10, 3, 7)} --steps 40 "
                                 f"--workers 2 --out {tmp_path}/run").end()
    assert code == 1 and "more than 1 %: " in errors.splitlines()[-1]
    assert "003.png" in errors and "007.png" in errors


def test_an_error_of_the_system_is_no_bad_image(monkeypatch, tmp_path):
    """Catches a network disk's hiccup taken for a broken file, and trained around."""
    root, command = album(tmp_path, 10), f"{TINY} --steps 2 --out {tmp_path}/run --data"
    for fail, answer in (
            *((failing(number), os.strerror(number)) for number in (
                errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE)),
            (out_of_memory, "out of memory")):
        monkeypatch.setattr(train, "read_image", fail)
        assert answer in error_line(monkeypatch, train, command, root)


# --- bad numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value, norm", [("nan", "nan"), ("1e18", "inf")])
def test_an_update_that_is_not_finite_is_skipped_logged_and_survived(monkeypatch, tmp_path, value,
                                                                     norm):
    """NaN in the noise of example 9, which is step 3: the other five updates are made."""
    spoil_noise(value, 9, setattr=monkeypatch.setattr)
    run(monkeypatch, train, f"{TINY} {OFTEN} --steps 6 --keep 9 --out {tmp_path}")
    (skipped,) = (line for line in read_log(tmp_path) if "skipped" in line)
    assert skipped == {"step": 3, "skipped": norm}
    saved = sorted(int(path.stem[-8:]) for path in tmp_path.glob("ckpt-*.pt"))
    assert saved == [1, 2, 4, 5, 6]
    state = checkpoint(tmp_path)
    assert all(leaf.isfinite().all() for key in STATE for _, leaf in leaves(state[key])
               if torch.is_tensor(leaf))
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {5}
    logged = [line["loss"] for line in losses(tmp_path)]
    assert len(logged) == 5 and np.isfinite(logged).all()


def test_two_ranks_continue_the_run_of_one_process_and_skip_where_either_meets_a_nan(monkeypatch,
                                                                                     tmp_path):
    """Two micro-batches each, from step 3 on.  Example 17 belongs to rank 0 of step 5, 23 to rank 1
    of step 6.  Catches pictures that every rank draws."""
    command = f"{TINY} {OFTEN} --keep 9 --sample-every 7 --steps 7 --out {tmp_path}"
    spoil = partial(spoil_noise, "nan", 17, 23, quick_pictures=True)
    spoil(setattr=monkeypatch.setattr)
    run(monkeypatch, train, f"{command}/one")
    run(monkeypatch, train, f"{command}/two --steps 3 --sample-every 0")
    ends = [rank.end() for rank in run_ranks(2, "train", f"{command}/two --micro-batch 1",
                                             first=spoil)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert_same_state(one, two, ["model", "ema"], atol=1e-5)
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "pictures", "grad_norm"):
        values = [[line[key] for line in log if key in line] for log in (one, two)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-5)
    skipped = [line for line in one if "skipped" in line]
    assert [line["step"] for line in skipped] == [5, 6]
    assert skipped == [line for line in two if "skipped" in line]


def test_a_run_that_stays_not_finite_ends_and_keeps_its_last_good_checkpoint(monkeypatch, tmp_path):
    """Even with --keep 1 and a checkpoint due at every step."""
    spoil_noise("nan", *range(16, 100), setattr=monkeypatch.setattr)
    line = error_line(monkeypatch, train, f"{TINY} {OFTEN} --keep 1 --steps 50 --out {tmp_path}")
    assert "10 updates in a row were not finite, the last at step 14; try a lower --lr" in line
    assert checkpoint(tmp_path)["step"] == 4
    sample.check_finite(checkpoint(tmp_path)["model"])


def test_samples_that_diverge_cost_their_picture_alone(monkeypatch, tmp_path, capsys):
    """Catches a run that ends with its first picture, of a model that has hardly learned."""
    def diverge(*_, **__):
        raise FloatingPointError("the images diverged")

    monkeypatch.setattr(train, "generate", diverge)
    run(monkeypatch, train, TINY, f"--steps 2 --sample-every 1 --out {tmp_path}")
    assert checkpoint(tmp_path)["step"] == 2
    assert "warning: no samples at step 1: the images diverged" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, four, six):
    """Catches "done" after a run that diverged."""
    before, update = set(contents(four)), train.training_step

    def overflow(net, *rest):
        answer = update(net, *rest)
        net.label.weight.data[0] = float("inf")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", overflow)
        line = error_line(patch, train, six.command, f"--out {four}")
    assert "weight label.weight is not finite; use an earlier checkpoint, or train again" in line
    assert set(contents(four)) == before


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    """JSON has no NaN and no infinity: null."""
    train.write_log(tmp_path, step=1, loss=float("nan"), lr=float("inf"), loss_by_t=[None])
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "loss": null, "lr": null, "loss_by_t": [null]}'


# --- untrusted files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("untrusted")


PICTURES = [*(encoded(PICTURE, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")),
            encoded(PICTURE.quantize(256))]


@settings(max_examples=200)
@given(data=st.sampled_from(PICTURES).flatmap(damaged))
def test_any_bytes_are_an_image_or_a_clean_error(scratch, data):
    (scratch / "images" / "cat").mkdir(parents=True, exist_ok=True)
    (scratch / "images" / "cat" / "0.png").write_bytes(data)
    try:
        pixels, label = ImageFolder(scratch / "images", 8)[0]
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 and label == 0
    except ValueError as error:
        assert "1 of the first 1 images are unreadable" in str(error) and "0.png" in str(error)


@pytest.fixture(scope="module")
def good_checkpoint(trained):
    return sample.find_checkpoint(trained).read_bytes()


def assert_loads_or_is_refused(path):
    try:
        _, info = sample.load_model(path)
        sample.find_class("0", info["classes"], info["names"])
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@settings(max_examples=100)
@given(draw=st.data())
def test_any_bytes_are_a_checkpoint_or_a_clean_error(scratch, good_checkpoint, draw):
    path = scratch / "ckpt-1.pt"
    path.write_bytes(draw.draw(damaged(good_checkpoint)))
    assert_loads_or_is_refused(path)


LEAVES = st.none() | st.booleans() | st.integers(-9, 10**18) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3)
                      | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)


@pytest.fixture(scope="module")
def small_state(good_checkpoint):
    """What sampling needs of a checkpoint."""
    state = torch.load(io.BytesIO(good_checkpoint), weights_only=True)
    return {key: state[key] for key in (*sample.INFO, "ema")}


@settings(max_examples=50)
@given(draw=st.data())
def test_a_checkpoint_of_nonsense_is_a_clean_error(scratch, small_state, draw):
    """A file that is formally right, with anything at all in place of a field or a setting."""
    state = {**small_state, "config": dict(small_state["config"])}
    place = draw.draw(st.sampled_from([state, state["config"]]))
    place[draw.draw(st.sampled_from(sorted(place)))] = draw.draw(VALUES)
    torch.save(state, scratch / "ckpt-2.pt")
    assert_loads_or_is_refused(scratch / "ckpt-2.pt")


@pytest.mark.parametrize("changes", [
    {"depth": 10**9}, {"head_depth": 10**15}, {"head_width": 10**18}, {"repa_dim": 10**18},
    {"hidden_size": 8 * 10**17}, {"head": "mlp", "head_depth": 10**9}, {"patch_size": 2**40},
    {"num_classes": 10**18}, {"hidden_size": [16]}, {"depth": "deep"}, {"unknown": 1},
], ids=str)
def test_a_hostile_configuration_is_refused_before_it_is_built(scratch, small_state, changes):
    """Fails, by the time limit of a test, if hours or gigabytes go into a file of kilobytes."""
    torch.save(small_state | {"config": small_state["config"] | changes}, scratch / "ckpt-3.pt")
    with pytest.raises(ValueError, match="ckpt-3.pt ") as refused:
        sample.load_model(scratch / "ckpt-3.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spoil, answer", [
    (lambda state: state.update(optimizer={"state": 3}), "does not fit"),
    (lambda state: state.update(run=3), "does not fit"),
    (lambda state: state["run"].update(classes=["one"]), "classes=['one'] there, ['striped disc'"),
    (lambda state: state["run"].update({"number of images": 7}), "images=7 there, 50000 here"),
])
def test_a_run_does_not_resume_from_nonsense(monkeypatch, trained, tmp_path, spoil, answer):
    state = checkpoint(trained)
    spoil(state)
    torch.save(state, tmp_path / "ckpt-00000001.pt")
    assert answer in error_line(monkeypatch, train, TINY, f"--steps 2 --out {tmp_path}")


LOG = b"".join(json.dumps({"step": k, "loss": 0.5}).encode() + b"\n" for k in range(9))


@settings(max_examples=100)
@given(data=damaged(LOG))
def test_a_damaged_log_is_read_as_far_as_it_goes(scratch, data):
    (scratch / "log.jsonl").write_bytes(data)
    assert all(isinstance(line["step"], int) for line in read_log(scratch))
    (scratch / "log.jsonl").write_bytes(LOG[:-5])
    assert [line["step"] for line in read_log(scratch)] == list(range(8))
