"""
Chapter 7: a run is a function of its options.

The law: fit() is the loop of literal_sampling.py, which sees one image after the other; and no
number of processes, micro-batches, workers or interruptions changes what it computes.
"""

import copy
import multiprocessing
import os
import warnings
from functools import partial
from types import SimpleNamespace

import literal_sampling as literal
import numpy as np
import pytest
import torch
from commands import TINY, assert_same_state, checkpoint, error_line, launch, outcome, run
from helpers import SMALL, VARIANTS, awake, batch, lightning, release_weights
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image
from torch._dynamo.testing import CompileCounter

import sample
import train
from dip import HEADS, PRESETS, DiP, DiPConfig, flow_matching_loss
from sample import blocks_of, draw_grid, load_model, random_stream
from train import Examples, Shapes

STATE = "model", "ema", "optimizer"

# --- the drawn shapes -----------------------------------------------------------------------------


def test_neither_shape_nor_texture_alone_tells_the_class():
    """Every shape comes with two textures, every texture on two shapes, every pair once."""
    assert len(set(Shapes.pairs)) == len(set(Shapes.names)) == 10
    for parts in zip(*Shapes.pairs):
        assert all(parts.count(part) == 2 for part in parts)


def test_the_drawn_images_stay_as_they_were():
    """Recorded at two sizes: the level of an image, where later pixels count more.  Our weights
    learned these.  Catches any change of a shape, a texture, a palette or the random numbers, and
    jagged edges."""
    for index, level in enumerate([172.30, 187.84, 180.34, 172.74, 193.38, 193.67, 205.03,
                                   207.50, 202.32, 213.80]):
        image, label = Shapes((48, 128)[index % 2])[index]
        weights = np.arange(image.size).reshape(image.shape)
        assert np.average(image, weights=weights) == pytest.approx(level, abs=0.02), index
        assert label == index and image.dtype == np.uint8


def test_training_and_validation_images_are_different():
    train_data, val_data = train.open_data(None, 16)
    seen = {val_data[j][0].tobytes() for j in range(20)}
    assert len(train_data) == 50_000 and len(val_data) == 1000
    assert val_data.first >= train_data.first + len(train_data)          # no drawing is in both
    assert not any(train_data[i][0].tobytes() in seen for i in range(20))


# --- image folders --------------------------------------------------------------------------------


def place(root, *names):
    """Images (.png, .jpg) and other files; a name that ends in / is an empty folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            Image.new("RGB", (20, 24), (len(name) * 9, 99, 0)).save(path)
        elif not name.endswith("/"):
            path.write_text("no image")
    return root


LAYOUTS = {          # as people download them: files -> classes, or what the message names
    "classes": ("a/0.png b/0.png b/1.jpg", "a b"),
    "classes with folders inside": ("a/x/0.png a/0.png b/y/0.png b/z/0.png", "a b"),
    "train and val": ("train/a/0.png train/b/0.png val/a/0.png val/b/0.png", "a b"),
    "train and test": ("train/a/0.png train/b/0.png test/0.png", "a b"),
    "no folders": ("0.png 1.png readme.txt", "DATA"),
    "no folders, split": ("train/0.png val/1.png", "DATA"),
    "one folder": ("birds/0.png birds/1.png", "birds"),
    "what tools leave beside splits": ("train/a/0.png train/b/0.png .git/c/0.png", "a b"),
    "what tools leave": ("a/0.png a/.ipynb_checkpoints/0.png b/0.png .git/c/0.png a/._0.png",
                         "a b"),
    "digits": ("train/0/0.png train/1/0.png train/10/0.png", "0 1 10"),
    "words that are numbers": ("12345/0.png cat/0.png", "12345 cat"),
    "one folder in one": ("birds/all/0.png birds/all/1.png", "birds"),
    "words like splits": ("bullet_train/0.png train_station/0.png valley/0.png",
                          "bullet_train train_station valley"),
    "nothing": ("readme.txt", "!no images"),
    "empty classes": ("train/a/0.png train/b/ train/c/", "!folders without images: b, c"),
    "a class of val/ alone": ("train/a/0.png val/a/0.png val/b/0.png",
                              "!only one of them has b"),
    "another class in val/": ("train/a/0.png val/b/0.png", "!only one of them has a, b"),
    "ImageNet's flat val": ("train/a/0.png train/b/0.png val/0.jpg",
                            "!train/ and val/ have different classes"),
    "capital splits": ("Train/a/0.png Train/b/0.png Val/a/0.png",
                       "!splits where classes should be: Train, Val"),
    "MNIST": ("training/0/0.png testing/0/0.png",
              "!splits where classes should be: testing, training"),
    "COCO": ("train2017/0.jpg val2017/0.jpg",
             "!splits where classes should be: train2017, val2017"),
    "Kaggle": ("training_set/training_set/cats/0.jpg test_set/test_set/cats/0.jpg",
               "!splits where classes should be: test_set, training_set"),
    "Kaggle's ImageNet": ("ILSVRC/Data/CLS-LOC/train/a/0.jpg ILSVRC/Data/CLS-LOC/val/0.jpg",
                          "!splits where classes should be: train, val"),
    "classes beside train": ("train/a/0.png b/0.png c/0.png d/0.png e/0.png",
                             "!found train/ beside b, c, d"),
    "YOLO": ("images/train/0.jpg labels/train/0.txt", "!folders without images: labels"),
    "EDM": ("00000/img00000000.png 00001/img00001000.png dataset.json", "!numbered folders"),
    "EDM, words": ("a/img00000000.png b/img00001000.png dataset.json", "!numbered folders"),
    "FFHQ": ("00000/00000.png 01000/01000.png", "!put a letter before each name): 00000, 01000"),
    "one level too many": ("archive/cats/0.jpg archive/dogs/0.jpg", "!folders, archive: give that"),
    "loose images": ("a/0.png b/0.png cover.png", "!images beside folders: cover.png, a"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_right_or_refused_by_what_was_found(tmp_path, name):
    """Catches splits taken for classes, validation images that are trained on, hidden folders,
    shards taken for classes, and classes beside train/ that are silently left out."""
    files, expected = LAYOUTS[name]
    root = place(tmp_path / "DATA", *files.split(" "))
    if expected[0] == "!":
        with pytest.raises(ValueError) as refused:
            train.open_data(root, 16)
        line = str(refused.value)
        assert f"--data {root}" in line and "\n" not in line
        assert expected[1:].replace("DATA", str(root)) in line and "xpected train/<class>" in line
    else:
        data, val = train.open_data(root, 16)
        assert data.classes == expected.split(" ") and (val is None) == ("val/" not in files)
        read = [file for file in files.split(" ") if file[-4:] in (".png", ".jpg")
                and "/." not in f"/{file}" and not file.startswith(("val/", "test/"))]
        assert len(data) == len(read) and data[0][0].shape == (16, 16, 3)


def test_a_run_inside_its_own_data_is_refused(monkeypatch, tmp_path):
    """Else its pictures are the next run's training images, of a class called "run".  By any path,
    and before anything is written."""
    data = place(tmp_path / "photos", "a/0.png", "b/0.png")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(data)
    for root, out in ((data, data), (data, data / "run"), (".", "runs/x"),
                      (data, tmp_path / "link" / "run"), (tmp_path / "link", data / "a" / "run")):
        line = error_line(monkeypatch, train, TINY, f"--data {root} --out {out}")
        assert f"--out {out} is inside --data {root}" in line and "choose another --out" in line
    assert sorted(os.listdir(data)) == ["a", "b"]
    run(monkeypatch, train, TINY, f"--steps 1 --data {data} --out {data}-run")   # beside is fine


def test_a_folder_without_classes_may_be_moved(monkeypatch, tmp_path):
    """Its name is its only class; resuming does not depend on it.  Nor need train/ and val/ be
    links to folders of one name."""
    for k in (1, 2):
        data = place(tmp_path / f"job{k}", "0.png", "1.png")
        run(monkeypatch, train, TINY, f"--steps {k} --data {data} --out {tmp_path}/run")
    assert checkpoint(tmp_path / "run")["step"] == 2
    (tmp_path / "both").mkdir()
    for split, name in (("train", "job1"), ("val", "job2")):
        (tmp_path / "both" / split).symlink_to(tmp_path / name)
    assert len(train.open_data(tmp_path / "both", 16)[1]) == 2


@pytest.fixture
def folder(tmp_path):
    """Three classes of four random pictures each."""
    rng = np.random.default_rng(0)
    for name in ("n01443537", "n02509815", "zebra finch"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{k}.png")
    return tmp_path


def test_classes_are_the_sorted_folder_names_and_wnids_get_their_readable_name(folder):
    data = train.open_data(folder, 16)[0]
    assert data.classes == ["n01443537", "n02509815", "zebra finch"]
    assert data.names == ["goldfish", "lesser panda", "zebra finch"]
    assert [data[i][1] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert data.flip and not Shapes.flip


# --- order and randomness -------------------------------------------------------------------------


def options_for(words="", **changes):
    """The options of a command, some of them changed."""
    options = train.parse(words.split())
    vars(options).update(changes)
    return options


def test_every_epoch_is_a_new_permutation():
    """Catches data that is never reshuffled, and sampling with replacement."""
    examples = Examples(Shapes(8, length=30), seed=0)
    epochs = [[examples.index(e * 30 + k) for k in range(30)] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert examples.index(5) == epochs[0][5]                 # in any order of asking
    for other in (dict(seed=1), dict(seed=0, purpose="val")):
        again = Examples(Shapes(8, length=30), **other)
        assert [again.index(k) for k in range(30)] != epochs[0]


# --- the whole loop, by hand ----------------------------------------------------------------------


def features(x_0):
    """A stand-in for REPA's encoder: three features a patch of 4 x 4."""
    return torch.nn.functional.avg_pool2d(x_0, 4)


LOOP = dict(steps=6, batch_size=4, micro_batch=2, lr=1e-3, warmup=1, cooldown=0.4, clip=0.5,
            ema=0.3, time_mean=0.7, label_dropout=0.5, seed=5, workers=0, log_every=1,
            sample_every=6, save_every=6, image_size=16)


@pytest.mark.parametrize("change", [
    {}, {"clip": 0.0, "time_mean": 0.0, "label_dropout": 0.0},
    {"ema": 0.9999, "warmup": 4, "cooldown": 0.0}, {"repa": "features", "warmup": 0, "cooldown": 1},
], ids=str)
def test_fit_is_the_loop_written_by_hand(monkeypatch, tmp_path, folder, change):
    """Weights and average agree to 1e-5, a hundredth of a step of Adam.  Catches another schedule,
    gradients not clipped or not divided by the number of micro-batches, an average taken before the
    step or with another decay, --time-mean, --label-dropout or REPA's weight ignored, weight decay,
    noise, flips or times of another example, validation of flipped images, pictures of the raw
    weights."""
    options, sampled = options_for(**LOOP | change, out=str(tmp_path / "run")), []
    encoder, data = features if options.repa else None, train.open_data(folder, 16)[0]
    model = awake(SMALL.replace(num_classes=3, repa_dim=3 if encoder else 0), seed=3)
    start = copy.deepcopy(model)
    monkeypatch.setattr(train, "draw_losses", lambda *_: None)
    monkeypatch.setattr(train, "generate", lambda model, labels, *rest, **how: sampled.append(
        copy.deepcopy(model)) or torch.zeros(len(labels), 3, 16, 16))
    ema, done = train.fit(model, options, data, data, encoder)
    order = [Examples(data, 5).index(k) for k in range(24)]  # two epochs of twelve
    average, log = literal.fit(start, data, order, options, random_stream, encoder)
    state, lines = checkpoint(tmp_path / "run"), train.read_log(tmp_path / "run")
    assert done == state["step"] == 6
    for fast, slow in ((model.state_dict(), start), (state["model"], start),
                       (ema.state_dict(), average), (state["ema"], average),
                       (sampled[0].state_dict(), average)):
        for name, weight in slow.state_dict().items():
            torch.testing.assert_close(fast[name], weight, rtol=0, atol=1e-5)
    losses = [line for line in lines if "loss" in line]
    for line, expected in zip(losses, log, strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-5), key
    assert any(line["grad_norm"] > 0.5 for line in log)      # else there is nothing to clip
    order = [Examples(data, 0, "val").index(k) for k in range(12)]
    (validation,) = [line["val_loss"] for line in lines if "val_loss" in line]
    expected = literal.validation_loss(average, data, order, random_stream)
    assert validation == pytest.approx(expected, rel=1e-5)


def test_the_ranks_exchange_gradients_once_a_step(monkeypatch):
    """With the last micro-batch.  Catches a first one whose gradients alone are shared, and three
    times the traffic."""
    model, synced, loss = awake(SMALL.replace(num_classes=10)), [], flow_matching_loss
    options = options_for(**LOOP | dict(batch_size=6, steps=1))
    monkeypatch.setattr(train, "flow_matching_loss", lambda net, *rest: synced.append(
        net.require_backward_grad_sync) or loss(net, *rest))
    train.training_step(model, copy.deepcopy(model).requires_grad_(False),
                        torch.optim.AdamW(model.parameters()),
                        train.load_batches(options, Shapes(16), 0), 0, options)
    assert synced == [False, False, True]


def test_the_weights_are_drawn_from_the_seed_alone(monkeypatch, tmp_path):
    """So all ranks begin alike, and so does the average.  With --lr 0 both stay what they were."""
    run(monkeypatch, train, TINY, f"--lr 0 --steps 1 --seed 1 --out {tmp_path}")
    state = checkpoint(tmp_path)
    torch.manual_seed(1)
    fresh = DiP(DiPConfig(**state["config"])).state_dict()
    assert_same_state(state, {"model": fresh, "ema": fresh}, ["model", "ema"])


def test_by_time_sums_losses_in_tenths_of_t():
    """Both ends count; a bin without images has no mean, and is null in the log.  Catches the
    nearest tenth, and sums that keep the graphs of all steps since the last line of the log."""
    t = torch.tensor([0.0, 0.09, 0.1, 0.95, 1.0])
    sums = train.by_time(t, torch.arange(5.0, requires_grad=True), torch.ones(5) / 2)
    assert not sums.requires_grad
    assert sums[:, 0].tolist() == [1, 1, 2] and sums[:, 1].tolist() == [2, 0.5, 1]
    assert sums[:, 9].tolist() == [7, 1, 2] and sums[:, 2:9].abs().sum() == 0
    line = train.mean_losses(sums, "val_")
    assert line == {"val_loss": 2.0, "val_repa": 0.5, "val_loss_by_t": [0.5, 2.0] + [None] * 7
                    + [3.5]}
    assert "repa" not in train.mean_losses(sums * torch.tensor([[1], [0], [1]]))


def test_validation_sees_at_most_500_images(monkeypatch):
    """In batches of the requested size."""
    seen = []
    monkeypatch.setattr(train, "flow_matching_loss", lambda model, x, *rest: seen.append(
        len(x)) or (torch.ones(len(x)), torch.zeros(len(x))))
    assert train.validate(DiP(SMALL), Shapes(16, 1000), 9)[2].sum() == 500
    assert seen == [9] * 55 + [5]


# --- what a run is when little is said ------------------------------------------------------------


def configured(words="", device="cpu", world=1):
    """(options, DiPConfig) that a command means on a device, with so many processes."""
    options = options_for(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.dist, "get_world_size", lambda: world)
        return options, train.configure(options, torch.device(device))


def test_the_model_is_small_on_a_cpu_or_without_data_and_recipes_belong_to_presets():
    nano = dict(model="DiP-Nano/8", image_size=48, steps=3000, batch_size=16, lr=3e-3, warmup=50,
                cooldown=0.3, time_mean=0.4, sample_every=600, save_every=600, workers=0,
                out="runs/DiP-Nano-8-48", clip=1, label_dropout=0.1, keep=2, log_every=50)
    paper = dict(model="DiP-XL/16", image_size=256, steps=1_600_000, batch_size=256, lr=1e-4,
                 warmup=0, cooldown=0.0, time_mean=0.0, sample_every=10_000, save_every=10_000)
    for words, device, expected in (
            ("", "cpu", nano), ("", "cuda", nano), ("--data photos", "cpu", nano),
            ("--data photos", "cuda", paper | {"workers": 8}),
            ("--model DiP-XL/16", "cpu", paper | {"workers": 0})):
        options, config = configured(words, device)
        assert config == PRESETS[options.model] and expected.items() <= vars(options).items()


def test_what_the_user_says_comes_before_the_recipe_and_names_the_folder():
    options, config = configured("--model DiP-Nano/8 --image-size 128 --lr 1e-5 --steps 30 "
                                 "--sample-every 0 --save-every 2 --set head=mlp depth=3")
    assert (options.lr, options.steps, options.warmup) == (1e-5, 30, 3)
    assert (options.sample_every, options.save_every) == (0, 2)
    assert options.batch_size == 4                           # 16 (64 / 128)^2
    assert configured("--image-size 96", world=2)[0].batch_size == 8     # 7, for two processes
    # another head has its own default size, unless it is said
    assert (config.head, config.head_width, config.depth, config.image_size) == ("mlp", 0, 3, 128)
    assert config.head_depth == 0
    assert configured("--set head=mlp head_width=16")[1].head_width == 16
    assert options.out == "runs/DiP-Nano-8-head-mlp-depth-3-128"
    assert configured("--set head=mlp --set depth=3 --image-size 128")[1] == config
    short = configured("--init FILE --steps 30")[0]          # no picture every six steps
    assert (short.sample_every, short.out) == (250, "runs/init-FILE-DiP-Nano-8-48")
    chosen = options_for("--init FILE --model DiP-S/16")     # before what the file holds
    assert train.configure(chosen, torch.device("cpu"), (SMALL, "")) == PRESETS["DiP-S/16"]
    old = options_for("--init FILE")                         # of a preset that is no more
    assert train.configure(old, torch.device("cpu"), (SMALL, "DiP-Nano/16")) == SMALL
    assert old.steps == 3000


@pytest.mark.parametrize("words, world, micro", [
    ("--batch-size 256", 1, 32), ("--batch-size 24", 1, 24), ("--batch-size 24", 2, 12),
    ("--batch-size 66", 1, 22), ("--batch-size 256 --micro-batch 64", 2, 64)])
def test_a_micro_batch_is_the_largest_part_of_a_process_up_to_32(words, world, micro):
    assert configured(words, world=world)[0].micro_batch == micro


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_slow_is_noted_by_one_rank_alone(monkeypatch, capsys, rank):
    monkeypatch.setattr(train.dist, "get_rank", lambda: rank)
    configured("--batch-size 12", world=2)                   # no part of six could be larger
    configured("--batch-size 74", world=2)
    notes = capsys.readouterr().out.splitlines()
    assert ["note: 37 images per process" in line for line in notes] == [True] * (rank == 0)


# --- whole runs -----------------------------------------------------------------------------------


def loss_lines(folder):
    """The lines of the log with a loss, without the speed."""
    return [{**line, "images_per_s": 0} for line in train.read_log(folder)
            if "loss" in line or "val_loss" in line]


def test_ten_steps_and_ten_more_are_twenty_bit_for_bit(monkeypatch, tmp_path, twenty, capsys):
    """Weights, averaged weights, optimizer and log: the same command resumes the same run, also one
    that died: its half-written files go, and no step is logged twice."""
    command, whole = twenty
    for steps in (10, 20):
        (tmp_path / f".ckpt-{steps:08d}.pt.123.partial").write_bytes(b"half")
        train.write_log(tmp_path, step=steps - 5, loss=1.0)
        run(monkeypatch, train, command, f"--steps {steps} --sample-every 0 --out {tmp_path}")
        assert not list(tmp_path.glob(".*.partial"))
    assert "resumed at step 10; --steps 10 -> 20" in capsys.readouterr().out
    a, b = checkpoint(whole), checkpoint(tmp_path)
    assert a["step"] == b["step"] == 20
    assert_same_state(a, b, STATE)
    *training, validation = loss_lines(whole)
    assert training == loss_lines(tmp_path) and len(training) == 20 and "val_loss" in validation
    written = {"ckpt-00000020.pt", "log.jsonl", "loss.png", "samples-00000020.png"}
    assert written <= set(os.listdir(whole))
    run(monkeypatch, train, command, f"--lr 1 --warmup 2 --cooldown 1 --clip 3 --out {tmp_path}")
    assert ("resumed at step 20; --lr 0.001 -> 1.0; --warmup 0 -> 2; --cooldown 0.0 -> 1.0; "
            "--clip 1.0 -> 3.0\n") in capsys.readouterr().out


def test_log_pictures_and_checkpoints_come_when_they_are_due(monkeypatch, tmp_path):
    """And at the end; a checkpoint is saved before its pictures are drawn, and the newest --keep
    stay.  A line of the log holds the mean since the line before; every checkpoint has a line."""
    looks = []
    monkeypatch.setattr(train, "write_pictures", lambda out, step, *rest: looks.append(
        [step, sorted(int(path.stem[5:]) for path in out.glob("ckpt-*.pt"))]))
    run(monkeypatch, train, TINY, "--steps 7 --log-every 3 --sample-every 2 --save-every 5",
        f"--keep 3 --out {tmp_path}/a")
    run(monkeypatch, train, TINY, f"--steps 7 --log-every 1 --keep 1 --out {tmp_path}/b")
    assert looks == [[2, [2]], [4, [2, 4]], [6, [4, 5, 6]], [7, [5, 6, 7]]]
    assert [path.name for path in (tmp_path / "b").glob("*.pt")] == ["ckpt-00000007.pt"]
    coarse, fine = (loss_lines(tmp_path / name) for name in "ab")
    assert [line["step"] for line in coarse] == [2, 3, 4, 5, 6, 7]
    losses = [line["loss"] for line in fine]
    means = [np.mean(losses[:2]), *losses[2:]]
    assert [line["loss"] for line in coarse] == pytest.approx(means, rel=1e-5)
    assert len(fine[0]["loss_by_t"]) == 10 and "repa" not in fine[0]


def test_the_speed_is_that_of_the_steps_alone(monkeypatch, tmp_path):
    """By a clock on which a step takes half a second, a checkpoint a minute and pictures ten.
    Catches steps before a resumption that are counted too."""
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: now[-1], monotonic=lambda: 0))
    for name, seconds, call in (("training_step", 0.5, train.training_step),
                                ("save_checkpoint", 60, train.save_checkpoint),
                                ("write_pictures", 600, lambda *_: None)):
        monkeypatch.setattr(train, name, lambda *arguments, seconds=seconds, call=call: now.append(
            now[-1] + seconds) or call(*arguments))
    for steps in (4, 8):
        run(monkeypatch, train, TINY, f"--steps {steps} --log-every 2 --sample-every 3",
            f"--save-every 5 --out {tmp_path}")
    speeds = [line["images_per_s"] for line in train.read_log(tmp_path) if "loss" in line]
    assert speeds == [8.0] * 6


def test_a_checkpoint_and_the_log_say_what_the_run_is(monkeypatch, tmp_path, folder):
    run(monkeypatch, train, TINY, f"--steps 1 --data {folder}/train --out {tmp_path}/run")
    state, (begin, line) = checkpoint(tmp_path / "run"), train.read_log(tmp_path / "run")
    assert state["config"]["num_classes"] == 3 and state["names"][0] == "goldfish"
    assert state["classes"] == ["n01443537", "n02509815", "zebra finch"]
    assert (begin["options"], begin["config"]) == (state["options"], state["config"])
    assert line["step"] == state["step"] == 1 and state["options"]["seed"] == 0


@pytest.mark.parametrize("size, classes, steps, drawn", [
    (64, 45, 12, [[45 * row // 10] * 4 for row in range(10)]), (128, 3, 10, [[0], [1], [2]])])
def test_a_picture_shows_four_images_of_at_most_ten_classes(monkeypatch, tmp_path, size, classes,
                                                            steps, drawn):
    """Each image has an index, and so a noise, of its own, and each row the name of its class.
    Large images on a CPU are fewer.  Validation takes as many images at once as training, but no
    more than 50."""
    calls, sizes, named = [], [], []
    monkeypatch.setattr(train, "draw_grid", lambda images, names: named.extend(
        names) or draw_grid(images, names))
    monkeypatch.setattr(train, "validate", lambda ema, data, size: sizes.append(
        size) or torch.ones(3, 10))
    monkeypatch.setattr(train, "generate", lambda model, labels, *rest, **how: calls.append(
        (model, labels, *rest, how)) or torch.zeros(len(labels), 3, 16, 16))
    ema = DiP(SMALL.replace(image_size=size))
    data = SimpleNamespace(names=[f"class {k}" for k in range(classes)])
    options = options_for(time_mean=0.8, seed=4, micro_batch=size // 2)
    train.write_pictures(tmp_path, 3, ema, data, data, options)
    models, labels, indices, seeds, hows = zip(*calls)
    assert [*labels] == drawn and {*models} == {ema} and {*seeds} == {4}
    assert sizes == [min(size // 2, 50)] and named == [f"class {c[0]}" for c in drawn]
    assert sum(map(list, indices), []) == list(range(sum(map(len, drawn))))
    assert all(how == dict(sampler="ab2", steps=steps, cfg=2.0) for how in hows)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "loss.png", "samples-00000003.png"]


def test_loss_png_shows_both_losses_and_both_by_t(tmp_path, twenty):
    """Lines by step, stairs by t at the last step.  Catches a warning on an empty log."""
    shown = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(train, "Figure", lambda *a, **k: shown.append(Figure(*a, **k)) or shown[-1])
        train.draw_losses(tmp_path, 0)
        (tmp_path / "log.jsonl").write_bytes((twenty[1] / "log.jsonl").read_bytes() + (
            b'{"step": 21, "loss": null}\n'))               # all of it was NaN
        train.draw_losses(tmp_path, 0.8)
    *panels, by_t = shown[-1].axes
    stairs = [patch for patch in by_t.patches if isinstance(patch, StepPatch)]
    for panel, step, key, title in zip(panels, stairs, ("loss", "val_loss"), (
            "training, mean logit t = 0.8", "validation, EMA, mean logit t = 0"), strict=True):
        lines = [line for line in train.read_log(tmp_path) if line.get(key) is not None]
        assert panel.get_title() == step.get_label() == title
        assert panel.lines[0].get_xydata().tolist() == [[line["step"], line[key]] for line in lines]
        values = np.array(lines[-1][f"{key}_by_t"], dtype=float)
        np.testing.assert_array_equal(step.get_data().values, values)
        np.testing.assert_allclose(step.get_data().edges, np.arange(11) / 10)


# --- many processes, micro-batches, workers -------------------------------------------------------


def test_workers_do_not_change_a_bit(monkeypatch, tmp_path, twenty):
    """Two loader processes live at the end of the run; fails if --workers is ignored."""
    command, one = twenty
    alive = []
    monkeypatch.setattr(train, "write_pictures", lambda *_: alive.append(
        len(multiprocessing.active_children())))
    run(monkeypatch, train, command, f"--workers 2 --out {tmp_path}")
    assert alive == [2]
    assert_same_state(checkpoint(one), checkpoint(tmp_path), STATE)


@pytest.mark.parametrize("name", HEADS)
def test_recomputed_activations_give_the_very_same_gradients(monkeypatch, name):
    """And fewer of them are kept; fails if --grad-checkpoint is ignored, or leaves out a block."""
    gradients, kept = [], []

    def keep(tensor):
        kept[-1] += tensor.untyped_storage().nbytes()
        return tensor

    for recompute in (False, True):
        kept.append(0)
        model = awake(VARIANTS[name])
        options = options_for("--grad-checkpoint" * recompute)
        net = train.prepare(model, options)
        x, t, y = batch(model.config)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = flow_matching_loss(net, x, y, t, torch.ones_like(x))[0].mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients))
    assert kept[1] < 0.7 * kept[0]


def test_the_compiled_model_trains_as_the_plain_one(monkeypatch, tmp_path):
    """Every block and the head run as compiled programs, without a break in any of them.  The
    backend counts, and runs what it is given; fails if --compile is ignored."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    for name, word in (("plain", ""), ("fast", "--compile --grad-checkpoint")):
        run(monkeypatch, train, TINY, f"--steps 3 {word} --out {tmp_path}/{name}")
    kinds = {type(block) for block in blocks_of(DiP(PRESETS["DiP-Nano/8"]))}
    assert counter.frame_count >= len(kinds) == 2
    assert_same_state(*(checkpoint(tmp_path / name) for name in ("plain", "fast")), STATE[:2],
                      atol=1e-5)


# --- REPA -----------------------------------------------------------------------------------------

ENCODER = """
import os, time, torch
from pathlib import Path
dependencies = ["torch"]
class Tiny(torch.nn.Conv2d):
    patch_size = 7
    def forward_features(self, x):
        return {"x_norm_patchtokens": self(x).flatten(2).transpose(1, 2)}
def tiny():
    torch.manual_seed(0)
    cache, net = Path(__file__).with_name("cache.pt"), Tiny(3, 6, 7, 7)
    if os.environ.get("RANK", "0") == "0":                   # the others find the file or fail
        time.sleep(0.5)
        torch.save(net.state_dict(), cache)
    net.load_state_dict(torch.load(cache))
    return net
twin = tiny
"""


@pytest.fixture
def aligned(tmp_path):
    """The words of a run that aligns with a small encoder in a local repository."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(ENCODER)
    return f"--repa tiny --repa-repo {tmp_path}/hub --repa-source local --steps 4 --log-every 1"


def test_two_processes_under_torchrun_train_the_run_of_one(monkeypatch, tmp_path, aligned):
    """With REPA: rank 0 fills the cache of torch.hub while rank 1 waits.  Catches seeds by rank,
    means of unequal parts, and lines of the log from both ranks."""
    one, two = tmp_path / "one", tmp_path / "two"
    code, *texts = outcome(launch("train.py", TINY, aligned, f"--out {two}", processes=2))
    assert code == 0, texts
    run(monkeypatch, train, TINY, aligned, f"--out {one}")
    assert_same_state(checkpoint(one), checkpoint(two), ["model", "ema"], atol=1e-5)
    for key in ("loss", "repa", "grad_norm"):
        losses = [[line[key] for line in loss_lines(folder)] for folder in (one, two)]
        assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    line = error_line(monkeypatch, train, TINY, aligned, f"--repa twin --out {one}")
    assert "does not fit; choose another --out (repa=tiny there, twin here)" in line


@pytest.mark.parametrize("local, turns", [(0, ["load", "wait", "wait"]),
                                          (2, ["wait", "load", "wait"])])
def test_the_first_process_of_every_node_fills_the_cache_of_torch_hub(monkeypatch, local, turns):
    """Catches RANK: on a second node all would fetch the encoder at once, into one file."""
    events = []
    monkeypatch.setenv("RANK", str(8 + local))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(train, "Encoder", lambda *_: events.append("load"))
    monkeypatch.setattr(train.dist, "barrier", lambda: events.append("wait"))
    train.load_encoder(options_for("--repa tiny"), torch.device("cpu"))
    assert events == turns


def test_the_encoder_is_frozen_and_sees_one_of_its_patches_for_16_pixels(tmp_path, aligned):
    """14 x 14 pixels for DINOv2: images of 256 are shown to it at 224 (REPA).  It sees ImageNet's
    mean colour as zero, and white by the standard deviations.  Catches images left in [-1, 1]."""
    encoder = train.Encoder("tiny", tmp_path / "hub", "local", "cpu")
    assert not any(p.requires_grad for p in encoder.net.parameters()) and not encoder.net.training
    assert encoder.dim == 6 and encoder(torch.zeros(2, 3, 64, 90)).shape == (2, 6, 4, 6)
    shown = []
    encoder.net.forward_features = lambda x: shown.append(x) or {
        "x_norm_patchtokens": torch.zeros(len(x), x[0, 0].numel() // 49, 6)}
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    for x_0, expected in ((mean * 2 - 1, 0 * mean), (torch.ones(1, 3, 1, 1), (1 - mean) / std)):
        encoder(x_0.expand(1, 3, 32, 32))
        torch.testing.assert_close(shown[-1], expected.expand(1, 3, 14, 14), rtol=0, atol=1e-5)
    encoder(torch.zeros(1, 3, 32, 64))                       # two patches high, four wide
    assert shown[-1].shape == (1, 3, 14, 28)
    fine = torch.arange(32) % 3 - 1.0                        # stripes finer than its pixels
    encoder(fine.expand(1, 3, 32, 32))
    assert shown[-1][..., 2:-2].std(dim=-1).max() < 0.5
    dot = torch.zeros(1, 3, 32, 32)
    dot[..., 16, 16] = 1                                     # a cubic falls below zero around it
    encoder(dot)
    assert (shown[-1].amin(dim=(2, 3)) < shown[-1][..., 0, 0] - 1e-3).all()


# --- starting from weights ------------------------------------------------------------------------

STAY = "--lr 0 --batch-size 2 --sample-every 0 --device cpu"     # what --init gives, stays


def test_init_gives_the_average_and_a_new_label_table_for_other_classes(monkeypatch, trained,
                                                                        tmp_path, capsys):
    """Of another number of classes only the null class is kept.  Architecture, image size and the
    recipe come from the file.  Catches the run's own average copied before --init, and a resumed
    run that begins again with --init."""
    data, out = place(tmp_path / "pets", "cats/0.png", "dogs/0.png"), tmp_path / "run"
    given = checkpoint(trained)
    run(monkeypatch, train, f"--init {trained} --data {data} --steps 1 {STAY} --out {out}")
    assert "has 10 classes: a new label table for 2; the null class is kept" in (
        capsys.readouterr().out)
    state = checkpoint(out)
    assert state["config"] == given["config"] | {"num_classes": 2}
    assert (state["options"]["model"], state["options"]["cooldown"]) == ("DiP-Nano/8", 0.3)
    for key in ("model", "ema"):
        table, old = state[key].pop("label.weight"), given["ema"]["label.weight"]
        assert len(table) == 3 and torch.equal(table[-1], old[-1])
        assert not torch.equal(table[0], old[0])
        assert_same_state({"w": state[key]}, {"w": {
            name: w for name, w in given["ema"].items() if name != "label.weight"}}, ["w"])
    torch.save(given | {"ema": given["model"] | {"embed.bias": torch.ones(16)}},
               tmp_path / "other.pt")
    run(monkeypatch, train, f"--init {tmp_path}/other.pt --data {data} --steps 2 {STAY}",
        f"--out {out}")
    assert torch.equal(checkpoint(out)["model"]["embed.bias"], state["model"]["embed.bias"])


@pytest.mark.parametrize("theirs, ours", [(6, 5), (6, 0), (0, 5), (6, 6)])
def test_init_keeps_the_projector_of_repa_for_the_same_encoder_alone(theirs, ours):
    """For another encoder it is new; without REPA it is left out."""
    given, model = (awake(SMALL.replace(repa_dim=dim), seed=dim) for dim in (theirs, ours))
    fresh = copy.deepcopy(model.state_dict())
    train.start_from(model, given, "FILE")
    for name, weight in model.state_dict().items():
        new = name.startswith("repa_projector.") and theirs != ours
        assert torch.equal(weight, (fresh if new else given.state_dict())[name]), name


def test_the_authors_weights_are_trained_on(monkeypatch, tmp_path, capsys):
    """From the file their framework writes, at another image size.  The settings are the paper's
    where no preset names others."""
    weights = release_weights(D=16, heads=2, depth=2, classes=3, P=16, C=4)
    torch.save(lightning(weights, weights), tmp_path / "dip.ckpt")
    data = place(tmp_path / "pets", "cats/0.png", "dogs/0.png")
    run(monkeypatch, train, f"--init {tmp_path}/dip.ckpt --image-size 32 --data {data} --steps 1",
        f"--batch-size 2 --sample-every 0 --device cpu --out {tmp_path}/run")
    state, (given, _) = checkpoint(tmp_path / "run"), load_model(tmp_path / "dip.ckpt")
    assert DiPConfig(**state["config"]) == given.config.replace(image_size=32, num_classes=2)
    assert (state["options"]["lr"], state["options"]["cooldown"]) == (1e-4, 0)
    for name, weight in given.state_dict().items():          # a step of Adam moves by lr
        if name != "label.weight":
            torch.testing.assert_close(state["model"][name], weight, rtol=0, atol=1.1e-4)
    run(monkeypatch, sample, f"--ckpt {tmp_path}/dip.ckpt --save-weights {tmp_path}/small.pt")
    assert load_model(tmp_path / "small.pt")[0].config == given.config
    assert f"{tmp_path}/dip.ckpt: 0.0" in capsys.readouterr().out
