"""Chapter 7: what a run survives.

    pytest tests/test_faults.py --kills 20      # a night's worth of SIGKILL instead of three
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

import numpy as np
import planted
import pytest
import torch
from commands import ROOT, TINY, alone, assert_same, checkpoint, complaint, flat, launch, run
from commands import torchrun
from helpers import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train
from fid import read_image
from train import FolderData, read_log

STATE = "model", "ema", "optimizer", "unlogged"
OFTEN = "--save-every 1 --sample-every 1000 --log-every 2"


def assert_same_run(one, other):
    """Same weights, averages and optimizer, and the same losses in the log: bit for bit."""
    a, b = checkpoint(one), checkpoint(other)
    assert a["step"] == b["step"]
    assert_same({key: a[key] for key in STATE}, {key: b[key] for key in STATE}, rtol=0, atol=0)
    logs = [[{**line, "images_per_s": 0} for line in read_log(folder) if "loss" in line]
            for folder in (one, other)]
    assert logs[0] == logs[1]


def wait_for(condition, process, seconds=120):
    """Until the condition holds, while the process lives."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, f"nothing happened in {seconds} s"
        time.sleep(0.01)


# --- interrupted --------------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_loses_only_the_steps_since_its_checkpoint(
    monkeypatch, tmp_path, kills
):
    """SIGKILL, again and again: every file under its final name is whole, what is half written is
    swept away, and the same command ends in the run that was never killed."""
    command = f"{TINY} {OFTEN} --keep 3 --steps {50 * kills}"
    run(monkeypatch, train, command, f"--out {tmp_path}/whole")
    out, chance = tmp_path / "killed", random.Random(0)
    for _ in range(kills):
        known = set(out.glob("ckpt-*.pt"))
        process = launch("train.py", command, f"--out {out}")
        wait_for(lambda: set(out.glob("ckpt-*.pt")) - known, process)
        time.sleep(chance.uniform(0, 0.7))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        paths = sorted(out.glob("ckpt-*.pt"))
        assert paths
        for path in paths:
            sample.load_checkpoint(path, verify=True)
    run(monkeypatch, train, command, f"--out {out}")
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_at_a_whole_step(monkeypatch, tmp_path, capsys, number):
    """A pre-empted job, or Ctrl-C: between two checkpoints and two lines of the log."""
    command = f"{TINY} --steps 8 --sample-every 1000 --log-every 4 --out"
    run(monkeypatch, train, command, tmp_path / "whole")
    honest, calls, before = train.update_ema, [], signal.getsignal(number)

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", signalled)
        code = run(patch, train, command, tmp_path / "stopped")
    assert code == 128 + number
    assert "stopped by a signal after step 3; the same command continues" in capsys.readouterr().out
    assert checkpoint(tmp_path / "stopped")["step"] == 3
    assert signal.getsignal(number) == before
    run(monkeypatch, train, command, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_cluster_that_signals_every_process_gets_one_checkpoint(monkeypatch, tmp_path):
    """SIGTERM to torchrun, both ranks and their loaders, at whatever steps they are: they agree on
    one to end at, and one process alone finishes what two began."""
    command = f"{TINY} --steps 400 --sample-every 1000 --save-every 5"
    out = tmp_path / "two"
    process = launch(
        "train.py", command, f"--workers 1 --out {out}", processes=2, start_new_session=True
    )
    wait_for(lambda: list(out.glob("ckpt-*.pt")), process)
    os.killpg(process.pid, signal.SIGTERM)
    text = process.communicate()[0]
    assert text.count("stopped by a signal after step") == 1
    stopped = int(text.split("stopped by a signal after step ")[1].split(";")[0])
    assert checkpoint(out)["step"] == stopped < 400
    command = command.replace("--steps 400", f"--steps {stopped + 5}")
    run(monkeypatch, train, command, f"--out {out}")
    run(monkeypatch, train, command, f"--out {tmp_path}/one")
    assert_same(
        checkpoint(out)["model"], checkpoint(tmp_path / "one")["model"], rtol=0, atol=1e-4
    )


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=500k tmpfs {disk} || exit 77
cp {out}/* {disk} && {command} --out {disk}
code=$?
ls -A {disk} > {out}/listing
cp {disk}/* {out}
exit $code
"""


@pytest.mark.parametrize("kind", ["largest file", "tmpfs"])
def test_a_full_disk_ends_the_run_in_one_line_and_costs_no_checkpoint(monkeypatch, tmp_path, kind):
    """By a limit on the size of files, and by a real file system that is too small."""
    command, out = f"{TINY} {OFTEN} --steps 6", tmp_path / "full"
    run(monkeypatch, train, command, f"--out {tmp_path}/whole")
    run(monkeypatch, train, command.replace("--steps 6", "--steps 4"), f"--out {out}")
    for path in sorted(out.glob("ckpt-*.pt"))[:-1]:
        path.unlink()
    before = {path: path.read_bytes() for path in out.glob("ckpt-*.pt")}
    if kind == "tmpfs":
        (tmp_path / "disk").mkdir()
        words = shlex.join([sys.executable, f"{ROOT}/train.py", *shlex.split(command)])
        script = ON_A_SMALL_DISK.format(disk=tmp_path / "disk", out=out, command=words)
        words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
        process = subprocess.Popen(words, stdout=-1, stderr=-1, text=True)
    else:
        process = launch("train.py", command, f"--out {out}", preexec_fn=limit_file_size)
    errors = process.communicate()[1].strip()
    if kind == "tmpfs" and ("unshare" in errors or process.returncode == 77):
        pytest.skip("this machine lets nobody mount a tmpfs")
    assert process.returncode == 1
    assert "could not be written; is the disk full?" in errors.splitlines()[-1]
    assert {path: path.read_bytes() for path in out.glob("ckpt-*.pt")} == before
    assert not [name for name in os.listdir(out) if name.endswith(".partial")]
    run(monkeypatch, train, command, f"--out {out}")
    assert_same_run(tmp_path / "whole", out)


# --- damaged ------------------------------------------------------------------------------------


def truncated(data):
    return data[: len(data) // 2]


def flipped(data):
    """One bit of one weight, as bad memory does it: still a zip, still a pickle, still a model."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b""])
def test_a_damaged_newest_checkpoint_is_passed_over(monkeypatch, tmp_path, capsys, damage):
    command = f"{TINY} {OFTEN} --steps 6"
    run(monkeypatch, train, command, f"--out {tmp_path}/whole")
    run(monkeypatch, train, command.replace("--steps 6", "--steps 4"), f"--out {tmp_path}/run")
    newest = tmp_path / "run" / "ckpt-00000004.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    run(monkeypatch, train, command, f"--out {tmp_path}/run")
    text = capsys.readouterr().out
    assert f"warning: {newest} is " in text and "passed over" in text
    assert "resumed at step 3" in text
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_when_no_checkpoint_is_whole_the_run_does_not_begin_anew(monkeypatch, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run").glob("ckpt-*.pt"):
        path.write_bytes(truncated(path.read_bytes()))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    line = complaint(monkeypatch, train, TINY, f"--steps 2 --out {tmp_path}/run")
    assert "none of the 1 checkpoints in" in line and "is intact" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_broken_later_checkpoint_never_costs_a_good_one(tmp_path):
    """Pruning counts back from the checkpoint just written, not from the highest number."""
    (tmp_path / "ckpt-00000009.pt").write_bytes(b"broken")
    for step in (5, 6, 7):
        train.write_checkpoint(tmp_path, 1, step=step)
    assert sorted(os.listdir(tmp_path)) == ["ckpt-00000007.pt", "ckpt-00000009.pt"]


def test_sampling_passes_over_a_damaged_checkpoint_too(monkeypatch, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "ckpt-00000002.pt").write_bytes(b"PK half a file")
    run(monkeypatch, sample, f"--ckpt {tmp_path}/run --class 1 --num 1 --steps 1 --device cpu",
        f"--out {tmp_path}/s.png")
    assert "passed over" in capsys.readouterr().out


# --- bad images ---------------------------------------------------------------------------------


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned(image):
    """Stored lying on its side, with the EXIF that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


GRADIENT = np.add.outer(np.arange(16) * 4, np.arange(16) * 3).astype(np.uint8) + 60
COLOUR = np.stack([GRADIENT, GRADIENT[::-1], 255 - GRADIENT], axis=-1)
GREY = Image.fromarray(GRADIENT)
PICTURE = Image.fromarray(COLOUR)


@pytest.mark.parametrize(
    "data, expected, within",
    [
        (encoded(PICTURE), COLOUR, 0),
        (turned(PICTURE), COLOUR, 0),
        (encoded(GREY), GRADIENT[..., None], 0),
        (encoded(Image.fromarray(GRADIENT.astype(np.uint16) * 257)), GRADIENT[..., None], 0),
        (encoded(PICTURE.quantize(256)), COLOUR, 4),
        (encoded(PICTURE.convert("CMYK"), "JPEG", quality=100), COLOUR, 8),
        (encoded(PICTURE.convert("RGBA")), COLOUR, 0),
        (encoded(PICTURE, "WEBP", lossless=True), COLOUR, 0),
    ],
    ids=["RGB", "turned by EXIF", "grey", "16 bits", "palette", "CMYK", "RGBA", "WebP"],
)
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


BAD = {
    "cats/010.png": b"",
    "cats/149.png": truncated(encoded(PICTURE)),
    "dogs/299.png": b"\x89PNG this is none",
}


def test_a_bad_image_is_named_and_the_next_one_stands_in_for_it(album, capsys):
    good = FolderData(album, 8)
    assert len(good) == 300 and not good.bad.any()
    for name, data in BAD.items():
        (album / name).write_bytes(data)
    data = FolderData(album, 8)
    for index, other in ((10, 11), (149, 150), (299, 0)):  # over the border of a class, and round
        for _ in range(2):
            pixels, label = data[index]
            assert np.array_equal(pixels, good[other][0]) and label == good.labels[other]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # each is named once
    for name, line in zip(BAD, lines):
        assert f"warning: {album / name}: unreadable (" in line
    assert data.bad.nonzero().flatten().tolist() == [10, 149, 299]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_percent_of_bad_images_is_survived_and_more_ends_the_run(
    monkeypatch, tmp_path, album, workers
):
    """With loader processes too, whose finds count together; the list is in the line."""
    command = f"{TINY} --data {album} --steps 80 --sample-every 1000 --workers {workers}"
    for name, data in BAD.items():
        (album / name).write_bytes(data)
    run(monkeypatch, train, command, f"--out {tmp_path}/run")
    (album / "dogs" / "200.png").write_bytes(b"one too many")
    line = complaint(monkeypatch, train, command, f"--out {tmp_path}/more")
    assert "4 of 300 images unreadable, more than 1 %: " in line
    assert all(name in line for name in [*BAD, "dogs/200.png"])


def test_bad_images_of_all_ranks_count_together(album):
    class Two(type(alone())):
        def gather(self, thing):
            return [thing, [7, 8, 9]]

    two, data = Two(rank=0, world=2, device=torch.device("cpu")), FolderData(album, 8)
    train.refuse_bad_files(data, two)
    data.bad[7] = True
    train.refuse_bad_files(data, two)  # the same file, found twice
    data.bad[0] = True
    with pytest.raises(ValueError, match="4 of 300 images unreadable"):
        train.refuse_bad_files(data, two)


# --- bad numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("value, what", [("nan", "the loss for t in "), ("1e18", "the gradient")])
def test_an_update_that_is_not_finite_is_skipped_logged_and_survived(
    monkeypatch, tmp_path, value, what
):
    """NaN in the noise of example 9, which is step 3: the other five updates are made."""
    command = f"{value} 9 -- {TINY} {OFTEN} --steps 6 --keep 9 --out {tmp_path}"
    run(monkeypatch, planted, command)
    log = read_log(tmp_path)
    skipped = [line for line in log if "skipped" in line]
    assert [line["step"] for line in skipped] == [3] and what in skipped[0]["skipped"]
    saved = sorted(int(path.stem[-8:]) for path in tmp_path.glob("ckpt-*.pt"))
    assert saved == [1, 2, 4, 5, 6]
    state = checkpoint(tmp_path)
    assert all(x.isfinite().all() for key in STATE for x in flat(state[key]).values()
               if torch.is_tensor(x))
    steps = {entry["step"].item() for entry in state["optimizer"]["state"].values()}
    assert steps == {5}
    assert all(np.isfinite(line["loss"]) for line in log if "loss" in line)


def test_the_time_of_a_loss_that_is_not_finite_is_named(monkeypatch, tmp_path):
    run(monkeypatch, planted, f"nan 9 -- {TINY} {OFTEN} --steps 3 --out {tmp_path}")
    z = train.Examples(train.ShapesData(16), 0)[9][2]
    tenth = int(train.logit_normal_time(z) * 10)
    (line,) = [line for line in read_log(tmp_path) if "skipped" in line]
    assert line["skipped"] == f"the loss for t in {tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"


def test_every_rank_skips_where_one_meets_a_nan(monkeypatch, tmp_path):
    """Example 9 belongs to rank 0 of step 3, 15 to rank 1 of step 4: two processes = one."""
    command = f"nan 9 15 -- {TINY} {OFTEN} --steps 6 --out {tmp_path}"
    run(monkeypatch, planted, f"{command}/one")
    torchrun(2, "tests/planted.py", f"{command}/two", cwd=tmp_path)
    one, two = (checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    assert_same(one, two, rtol=0, atol=1e-5)
    logs = [[line for line in read_log(tmp_path / name) if "skipped" in line]
            for name in ("one", "two")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [3, 4]


def test_a_run_that_stays_not_finite_ends_and_keeps_its_last_good_checkpoint(monkeypatch, tmp_path):
    """Even with --keep 1 and a checkpoint due at every step."""
    bad = " ".join(map(str, range(16, 100)))
    line = complaint(monkeypatch, planted,
                     f"nan {bad} -- {TINY} {OFTEN} --keep 1 --steps 50 --out {tmp_path}")
    assert "10 updates in a row were not finite, the last at step 14: the loss for t in" in line
    assert f"last good checkpoint: {tmp_path}/ckpt-00000004.pt" in line
    (tmp_path / "ckpt-00000099.pt").write_bytes(b"broken")
    assert train.newest_up_to(tmp_path, 14) == tmp_path / "ckpt-00000004.pt"
    assert all(x.isfinite().all() for x in checkpoint(tmp_path)["model"].values())


# --- files from strangers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers")


PICTURES = [
    *(encoded(PICTURE, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")),
    encoded(PICTURE.quantize(256)),
    turned(PICTURE),
]


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
    return sample.find_checkpoint(trained).read_bytes()


@settings(max_examples=100)
@given(draw=st.data())
def test_any_bytes_are_a_checkpoint_or_a_clean_error(scratch, good_checkpoint, draw):
    path = scratch / "ckpt-1.pt"
    path.write_bytes(draw.draw(damaged(good_checkpoint)))
    try:
        sample.load_model(path, torch.device("cpu"))
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


LEAVES = st.none() | st.booleans() | st.integers(-9, 10**18) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3)
                      | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)


@settings(max_examples=100)
@given(draw=st.data())
def test_a_checkpoint_of_nonsense_is_a_clean_error(scratch, trained, draw):
    """A file that is formally right, with anything at all in place of a field or a setting."""
    state = checkpoint(trained)
    place = draw.draw(st.sampled_from([state, state["config"]]))
    place[draw.draw(st.sampled_from(sorted(place)))] = draw.draw(VALUES)
    path = scratch / "ckpt-2.pt"
    torch.save(state, path)
    try:
        _, state = sample.load_model(path, torch.device("cpu"))
        sample.find_class("0", state["classes"], state["names"])
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@settings(max_examples=100)
@given(data=damaged(b"\x93NUMPY\x01\x00" + encoded(PICTURE)) | damaged(b'{"seed": 0}'))
def test_any_bytes_in_a_half_done_export_are_a_clean_error(scratch, data):
    path = scratch / "00000000.npy"
    path.write_bytes(data)
    for read, *shape in ((sample.read_part, (1, 2, 2, 3)), (sample.read_recipe,)):
        try:
            read(path, *shape)
        except ValueError as error:
            assert str(path) in str(error) and "delete" in str(error)


@pytest.mark.parametrize("array", [
    np.array([{"a": 1}]), np.zeros((2, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3)),
], ids=["pickles", "too many images", "floats"])
def test_a_part_of_an_export_that_is_not_what_it_should_be_is_refused(tmp_path, array):
    """Forbids running its code, and an .npz whose header promises other images."""
    np.save(tmp_path / "0.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="0.npy is damaged"):
        sample.read_part(tmp_path / "0.npy", (1, 2, 2, 3))


@pytest.mark.parametrize("key, value", [
    ("optimizer", {"state": {}, "param_groups": 5}), ("optimizer", {"state": 3}),
    ("unlogged", torch.zeros(2)), ("images", 7),
])
def test_a_run_does_not_resume_from_nonsense(monkeypatch, trained, tmp_path, key, value):
    state = checkpoint(trained)
    state[key] = value
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "ckpt-00000001.pt")
    if value == {"state": {}, "param_groups": 5}:            # settings come from the options
        run(monkeypatch, train, TINY, f"--steps 2 --out {tmp_path}/run")
    else:
        line = complaint(monkeypatch, train, TINY, f"--steps 2 --out {tmp_path}/run")
        assert "does not fit" in line or "7 images there, 50000 here" in line


def test_an_error_leaves_no_loader_process_behind(tmp_path, album):
    """Forbids a command that says its line and then waits forever for its own workers."""
    for k in range(4):
        (album / "cats" / f"00{k}.png").write_bytes(b"")
    process = launch("train.py", TINY, f"--data {album} --steps 200 --workers 2 --out run",
                     cwd=tmp_path)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "more than 1 %" in errors.splitlines()[-1]


def test_an_answer_of_the_system_is_no_bad_image(monkeypatch, album):
    """Forbids a network disk's hiccup being taken for a broken file, and trained around."""
    def busy(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(train, "read_image", busy)
    data = FolderData(album, 8)
    with pytest.raises(OSError, match="Input/output error"):
        data[0]
    assert not data.bad.any()


def test_what_rank_0_alone_finds_wrong_ends_all_ranks_in_the_same_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt-00000001.pt").write_bytes(b"broken")
    process = launch("train.py", TINY, "--out run", processes=2, cwd=tmp_path)
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert errors.count("train.py: error: none of the 1 checkpoints in run is intact") == 2


LOG = b"".join(json.dumps({"step": k, "loss": 0.5}).encode() + b"\n" for k in range(9))


@settings(max_examples=100)
@given(data=damaged(LOG))
def test_a_damaged_log_is_read_as_far_as_it_goes(scratch, data):
    (scratch / "log.jsonl").write_bytes(data)
    assert all(isinstance(line["step"], int) for line in read_log(scratch))
    (scratch / "log.jsonl").write_bytes(LOG[:-5])
    assert [line["step"] for line in read_log(scratch)] == list(range(8))
