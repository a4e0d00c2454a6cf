"""
Chapter 7: a run is a function of its options.

The law: fit() is the loop of literal_sampling.py, which sees one image after the other; and no
number of processes, micro-batches, workers or interruptions changes what it computes.
"""

import copy
import json
import math
import multiprocessing
import os
import warnings
from functools import partial
from types import SimpleNamespace

import literal_sampling as literal
import numpy as np
import pytest
import torch
from commands import (TINY, assert_same_state, checkpoint, error_line, free_port, launch, leaves,
                      outcome, run, run_ranks)
from helpers import SMALL, VARIANTS, awake, batch, lightning, release_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.path import Path as Polygon
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.utils.data import default_collate

import sample
import train
from dip import PRESETS, DiP, DiPConfig, flow_matching_loss
from sample import blocks_of, load_model, random_stream
from train import Examples, ImageFolder, Shapes

STATE = "model", "ema", "optimizer"

# --- the drawn shapes -----------------------------------------------------------------------------


def test_neither_shape_nor_texture_alone_tells_the_class():
    """Every shape comes with two textures, every texture on two shapes, every pair once."""
    assert len(set(Shapes.pairs)) == len(set(Shapes.names)) == 10
    for parts in zip(*Shapes.pairs):
        assert all(parts.count(part) == 2 for part in parts)


@settings(max_examples=20)
@given(index=st.integers(0, 10**6), size=st.sampled_from([16, 48, 100]))
def test_a_drawn_image_is_a_function_of_its_index(index, size):
    image, label = Shapes(size)[index]
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and label == index % 10
    assert np.array_equal(image, Shapes(size)[index][0])
    assert not np.array_equal(image, Shapes(size)[index + 10][0])


@pytest.mark.parametrize("index", range(10))
def test_drawn_images_are_antialiased(index):
    """A drawing is nearer to the mean of a fine drawing than every eighth pixel of that is.
    Fails if edges are jagged."""
    fine, coarse = (Shapes(size)[index][0].astype(float) for size in (512, 64))
    averaged = fine.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(coarse - averaged).mean() < 0.5 * np.abs(fine[4::8, 4::8] - averaged).mean()


def star(points, inner):
    """The corners of a star of radius 1, or of a regular polygon with inner = 1; one points up."""
    angles = math.pi * np.arange(2 * points) / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def test_a_shape_is_what_its_name_says():
    """Membership of a point against polygons and circles; a triangle is a star whose inner corners
    lie on its sides.  The tolerance is the width of the outline."""
    x, y = (axis.ravel() for axis in np.meshgrid(*[np.linspace(-1.2, 1.2, 97)] * 2))
    r = np.hypot(x, y)
    bar, beam = [[-0.95, -0.32], [0.95, -0.32], [0.95, 0.32], [-0.95, 0.32]], np.array([x, y]).T
    inside = {
        "disc": r < 1, "ring": (0.44 < r) & (r < 1),
        "triangle": Polygon(1.2 * star(3, 0.5)).contains_points(beam),
        "cross": Polygon(bar).contains_points(beam) | Polygon(bar).contains_points(beam[:, ::-1]),
        "star": Polygon(star(5, 0.48)).contains_points(beam)}
    for shape, expected in inside.items():
        distance = train.signed_distance(shape, x, y)
        clear = np.abs(distance) > 0.03
        assert np.array_equal(distance[clear] < 0, expected[clear]), shape
        assert 0.1 < expected.mean() < 0.6


def test_a_texture_is_what_its_name_says():
    """By its symmetries.  Catches the checked texture with a plus for its product."""
    p, q = np.meshgrid(*[np.linspace(0, 12, 61)] * 2)
    wave = train.texture_wave
    same = partial(np.testing.assert_allclose, atol=1e-5)
    same(wave("striped", p + 0.5, q - 0.5), wave("striped", p, q))       # lines of p + q
    same(wave("checked", p + math.pi / 0.7, q), -wave("checked", p, q))  # half a period swaps
    same(wave("checked", p, q + math.pi / 0.7), -wave("checked", p, q))
    dark = math.pi / 0.85                    # half a period of dots and of grids
    assert (wave("dotted", p, dark) < 0).all() and (wave("dotted", dark, q) < 0).all()
    assert wave("dotted", 0, 0) > 0          # a dot, surrounded by ground
    assert (wave("gridded", p, 0) > 0).all() and (wave("gridded", 0, q) > 0).all()
    assert wave("gridded", dark, dark) < 0   # a hole, surrounded by lines
    peak = math.pi / 2 / 0.45
    same(wave("zigzag", peak + p, q), wave("zigzag", peak - p, q))       # turns back at its peaks
    same(wave("zigzag", p / 10, q - 0.45 * 1.8 / 0.8 * p / 10), wave("zigzag", 0, q))
    for texture in train.TEXTURES:
        assert 0.2 < (wave(texture, p, q) > 0).mean() < 0.8


def test_training_and_validation_images_are_different():
    train_data, val_data = train.open_data(None, 16)
    seen = {val_data[j][0].tobytes() for j in range(20)}
    assert len(train_data) == 50_000 and len(val_data) == 1000
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
    "what tools leave": ("a/0.png a/.ipynb_checkpoints/0.png b/0.png .git/c/0.png a/._0.png",
                         "a b"),
    "digits": ("train/0/0.png train/1/0.png train/10/0.png", "0 1 10"),
    "words like splits": ("bullet_train/0.png train_station/0.png valley/0.png",
                          "bullet_train train_station valley"),
    "nothing": ("readme.txt", "!no images"),
    "train is empty": ("train/a/", "!no images"),
    "val alone": ("val/a/0.png val/b/0.png", "!one folder of folders, val: give that"),
    "empty classes": ("train/a/0.png train/b/ train/c/", "!folders without images: b, c"),
    "ImageNet's flat val": ("train/a/0.png train/b/0.png val/0.jpg",
                            "!train/ and val/ have different classes"),
    "another class in val": ("train/a/0.png train/b/0.png val/a/0.png val/c/0.png",
                             "!only one of them has b, c"),
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
    "validation beside train": ("train/a/0.png validation/a/0.png",
                                "!found train/ beside validation"),
    "one class beside train": ("train/a/0.png dogs/0.png", "!found train/ beside dogs"),
    "classes beside train": ("train/a/0.png b/0.png c/0.png d/0.png e/0.png",
                             "!found train/ beside b, c, d"),
    "YOLO": ("images/train/0.jpg labels/train/0.txt", "!folders without images: labels"),
    "YOLO, splits first": ("train/images/0.jpg train/labels/0.txt",
                           "!folders without images: labels"),
    "EDM": ("00000/img00000000.png 00001/img00001000.png dataset.json", "!numbered folders"),
    "FFHQ": ("00000/00000.png 01000/01000.png", "!numbered folders"),
    "one level too many": ("archive/cats/0.jpg archive/dogs/0.jpg", "!folders, archive: give that"),
    "loose images": ("a/0.png b/0.png cover.png", "!images beside folders: cover.png, a"),
    "annotations": ("images/0.jpg annotations/0.xml", "!folders without images: annotations"),
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


def test_the_thousand_sorted_wnids_are_the_usual_imagenet_indices():
    """Class 1 is the goldfish, 387 the lesser panda, 964 the potpie (captions of Figs. 13 to 30).
    Two captions are off: Fig. 16's "tree frog" (30) is 31, Fig. 18's "teddy" (859) is 850."""
    wnids, names = zip(*sample.imagenet_names().items())
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids)
    known = {1: "goldfish", 13: "junco", 19: "chickadee", 31: "tree frog", 35: "mud turtle",
             81: "ptarmigan", 107: "jellyfish", 153: "Maltese dog", 387: "lesser panda",
             425: "barn", 437: "beacon", 441: "beer glass", 850: "teddy", 911: "wool",
             927: "trifle", 938: "cauliflower", 964: "potpie", 997: "bolete"}
    assert {index: names[index] for index in known} == known


# --- order and randomness -------------------------------------------------------------------------


def options_for(words="", **changes):
    """The options of a command, some of them changed."""
    options = train.parse(words.split())
    vars(options).update(changes)
    return options


@settings(max_examples=30)
@given(world=st.integers(1, 4), count=st.integers(1, 3), micro=st.integers(1, 3),
       first=st.integers(0, 5))
def test_ranks_and_micro_batches_divide_the_same_global_batch(world, count, micro, first):
    """Whatever the machine, step n trains on examples n B ... (n + 1) B - 1, each once."""
    B, dealt = world * count * micro, []
    options = options_for(steps=first + 2, batch_size=B, micro_batch=micro, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.dist, "get_world_size", lambda: world)
        for rank in range(world):
            patch.setattr(train.dist, "get_rank", lambda: rank)
            dealt.append([k.tolist() for *_, k in train.load_batches(options, Shapes(8), first)])
    for step in range(2):
        of_step = [part for parts in dealt for part in parts[step * count:(step + 1) * count]]
        assert all(len(part) == micro for part in of_step)
        assert sorted(sum(of_step, [])) == list(range((first + step) * B, (first + step + 1) * B))
    assert all(len(parts) == 2 * count for parts in dealt)


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


def test_an_example_is_as_by_hand_and_no_two_share_a_random_number(folder):
    """Pixels scaled to [-1, 1], label of the image shown, noise of (seed, k) alone."""
    data = ImageFolder(folder / "train", 16)
    for purpose in ("train", "val"):
        examples = Examples(data, 3, purpose)
        order = [examples.index(k) for k in range(12)]
        pixels, y, z, u, k = default_collate([examples[k] for k in range(12)])
        x_0 = train.to_model(pixels, torch.device("cpu"))
        noise = train.draw_noise(x_0, 3, purpose, k)
        for k in range(12):
            expected = literal.example(data, order, k, 3, purpose, random_stream)
            for ours, theirs in zip((x_0, y, noise, z, u), expected):
                assert torch.equal(ours[k], torch.as_tensor(theirs))
        assert x_0.min() >= -1 and x_0.max() <= 1 and x_0.std() > 0.3
        numbers = torch.cat([noise.flatten(1)[:, :9].flatten(), z, u])
        assert len(numbers.unique()) == 12 * 11


def test_the_folder_is_flipped_half_the_time_and_neither_shapes_nor_validation_ever(folder):
    data = ImageFolder(folder / "train", 16)
    examples, flipped = Examples(data, seed=0), 0
    for k in range(200):
        image, shown = data[examples.index(k)][0], examples[k][0]
        assert np.array_equal(shown, image) or np.array_equal(shown, image[:, ::-1])
        flipped += not np.array_equal(shown, image)
    assert 65 < flipped < 135                                # five standard deviations of a coin
    for steady in (Examples(data, 0, "val"), Examples(Shapes(8), 0)):
        for k in range(20):
            assert np.array_equal(steady[k][0], steady.data[steady.index(k)][0])


# --- schedule and average -------------------------------------------------------------------------


def updates_of_no_images(values, **options):
    """After each update: (learning rate, average of a weight that is set to the values in turn)."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    model.config, ema = None, copy.deepcopy(model).requires_grad_(False)
    options = options_for(**dict(batch_size=0, micro_batch=1, steps=len(values), lr=1.0, warmup=0,
                                 cooldown=0.0) | options)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    ema.weight.fill_(values[0])
    for step, value in enumerate(values):
        model.weight.data.fill_(value)
        train.training_step(model, ema, optimizer, None, step, options)
        yield optimizer.param_groups[0]["lr"], ema.weight.item()


@given(decay=st.floats(0, 1), values=st.lists(st.floats(-9, 9), min_size=1, max_size=30))
def test_the_average_of_weights_warms_up_to_its_decay(decay, values):
    """Catches the decay ignored, a warm-up off by a step, and weights of d and 1 - d exchanged."""
    *_, (_, average) = updates_of_no_images(values, ema=decay)
    assert average == pytest.approx(literal.moving_average(values[:1] + values, decay), abs=1e-9)


@given(steps=st.integers(1, 60), warmup=st.integers(0, 20), cooldown=st.floats(0, 1))
def test_the_learning_rate_is_that_of_its_formula(steps, warmup, cooldown):
    rates = updates_of_no_images([0.0] * steps, lr=0.3, warmup=warmup, cooldown=cooldown)
    for step, (rate, _) in enumerate(rates):
        expected = literal.learning_rate(step, steps, 0.3, warmup, cooldown)
        assert rate == pytest.approx(expected, rel=1e-9)


# --- the whole loop, by hand ----------------------------------------------------------------------


class Pictures:
    """Random pictures of five classes that may be flipped, as an image folder's are."""

    flip, classes, names = True, list("abcde"), list("ABCDE")

    def __init__(self, seed, count=8):
        rng = np.random.default_rng(seed)
        self.pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index], index % 5


def features(x_0):
    """A stand-in for REPA's encoder: three features a patch of 4 x 4."""
    return torch.nn.functional.avg_pool2d(x_0, 4)


LOOP = dict(steps=6, batch_size=4, micro_batch=2, lr=1e-3, warmup=1, cooldown=0.4, clip=0.5,
            ema=0.3, time_mean=0.7, label_dropout=0.5, seed=5, workers=0, log_every=1,
            sample_every=6, save_every=6, image_size=16)


@pytest.mark.parametrize("change", [
    {}, {"clip": 0.0}, {"time_mean": 0.0}, {"label_dropout": 0.0}, {"ema": 0.9999},
    {"repa": "features"},
], ids=str)
def test_fit_is_the_loop_written_by_hand(monkeypatch, tmp_path, change):
    """Weights and average agree to 1e-5, a hundredth of a step of Adam.  Catches: a schedule that
    never reaches the optimizer, gradients not clipped or not divided by the number of
    micro-batches, an average taken before the step or with another decay, --time-mean,
    --label-dropout or REPA's weight ignored, weight decay, validation of flipped images, pictures
    of the raw weights."""
    options, sampled = options_for(**LOOP | change, out=str(tmp_path)), []
    config = SMALL.replace(repa_dim=3 if options.repa else 0)
    encoder = features if options.repa else None
    data, val_data = Pictures(0), Pictures(1, 7)
    model = awake(config, seed=3)
    start = copy.deepcopy(model)
    monkeypatch.setattr(train, "draw_losses", lambda *_: None)
    monkeypatch.setattr(train, "generate", lambda model, labels, *rest, **how: sampled.append(
        copy.deepcopy(model)) or torch.zeros(len(labels), 3, 16, 16))
    ema, done = train.fit(model, options, data, val_data, encoder)
    order = [Examples(data, 5).index(k) for k in range(24)]  # three epochs of eight
    average, log = literal.fit(start, data, order, options, random_stream, encoder)
    state = checkpoint(tmp_path)
    assert done == state["step"] == 6
    for fast, slow in ((model.state_dict(), start), (state["model"], start),
                       (ema.state_dict(), average), (state["ema"], average),
                       (sampled[0].state_dict(), average)):
        for name, weight in slow.state_dict().items():
            torch.testing.assert_close(fast[name], weight, rtol=0, atol=1e-5)
    lines = [line for line in train.read_log(tmp_path) if "loss" in line]
    assert len(lines) == 6
    for line, expected in zip(lines, log):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-5), key
    assert any(line["grad_norm"] > 0.5 for line in log)      # else there is nothing to clip
    val_order = [Examples(val_data, 0, "val").index(k) for k in range(7)]
    (line,) = [line for line in train.read_log(tmp_path) if "val_loss" in line]
    expected = literal.validation_loss(average, val_data, val_order, random_stream)
    assert line["val_loss"] == pytest.approx(expected, rel=1e-5)


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
    """The average begins as the same weights.  With --lr 0 both stay what they were."""
    states = []
    for k, seed in enumerate((0, 0, 1)):
        torch.manual_seed(k + 7)
        run(monkeypatch, train, TINY, f"--lr 0 --steps 1 --seed {seed} --out {tmp_path}/{k}")
        states.append(checkpoint(tmp_path / str(k)))
        assert_same_state(states[-1], {"model": states[-1]["ema"]}, ["model"])
    assert_same_state(states[0], states[1], ["model"])
    name = "blocks.0.mlp.out.weight"
    assert not torch.equal(states[0]["model"][name], states[2]["model"][name])


def test_by_time_sums_losses_in_tenths_of_t():
    """Both ends count; a bin without images has no mean, and is null in the log.  Catches the
    nearest tenth."""
    t = torch.tensor([0.0, 0.09, 0.1, 0.95, 1.0])
    sums = train.by_time(t, torch.arange(5.0), torch.ones(5) / 2)
    assert sums[:, 0].tolist() == [1, 1, 2] and sums[:, 1].tolist() == [2, 0.5, 1]
    assert sums[:, 9].tolist() == [7, 1, 2] and sums[:, 2:9].abs().sum() == 0
    line = train.mean_losses(sums, "val_")
    assert line == {"val_loss": 2.0, "val_repa": 0.5, "val_loss_by_t": [0.5, 2.0] + [None] * 7
                    + [3.5]}
    assert "repa" not in train.mean_losses(sums * torch.tensor([[1], [0], [1]]))


def test_validation_sees_at_most_500_images_in_fixed_order(monkeypatch):
    """In batches of the requested size, on which the losses do not depend."""
    model, data, seen = awake(SMALL.replace(num_classes=10)), Shapes(16, 1000, first=10**6), []
    small, large = (train.validate(model, data, B, limit=20) for B in (3, 50))
    torch.testing.assert_close(small, large)
    monkeypatch.setattr(train, "flow_matching_loss", lambda model, x, y, t, noise: seen.append(
        y) or (torch.ones(len(x)), torch.zeros(len(x))))
    assert train.validate(model, data, 9)[2].sum() == 500
    assert [len(y) for y in seen] == [9] * 55 + [5]
    order = [Examples(data, 0, "val").index(k) % 10 for k in range(500)]
    assert torch.cat(seen).tolist() == order


# --- what a run is when little is said ------------------------------------------------------------


def configured(words="", device="cpu", world=1):
    """(options, DiPConfig) that a command means on a device, with so many processes."""
    options = options_for(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.dist, "get_world_size", lambda: world)
        return options, train.configure(options, torch.device(device))


def test_the_model_is_small_on_a_cpu_or_without_data_and_recipes_belong_to_presets():
    for words, device in (("", "cpu"), ("", "cuda"), ("--data photos", "cpu")):
        options, config = configured(words, device)
        assert config == PRESETS["DiP-Nano/16"] and options.model == "DiP-Nano/16"
        assert (options.steps, options.batch_size, options.image_size) == (3500, 16, 48)
        assert (options.lr, options.warmup, options.cooldown) == (3e-3, 50, 0.3)
        assert (options.time_mean, options.sample_every, options.save_every) == (0.8, 700, 700)
        assert options.out == "runs/DiP-Nano-16-48" and options.workers == 0
    for words, device, workers in (("--data photos", "cuda", 8), ("--model DiP-XL/16", "cpu", 0)):
        options, config = configured(words, device)
        assert config == PRESETS["DiP-XL/16"] and options.model == "DiP-XL/16"
        assert (options.steps, options.batch_size, options.lr) == (1_600_000, 256, 1e-4)
        assert (options.warmup, options.cooldown, options.time_mean) == (0, 0.0, 0.0)
        assert (options.sample_every, options.save_every) == (10_000, 10_000)
        assert options.workers == workers


def test_what_the_user_says_comes_before_the_recipe_and_names_the_folder():
    options, config = configured("--model DiP-Nano/16 --image-size 128 --lr 1e-5 --steps 30 "
                                 "--sample-every 0 --save-every 2 --set head=mlp depth=3")
    assert (options.lr, options.steps, options.warmup) == (1e-5, 30, 3)
    assert (options.sample_every, options.save_every) == (0, 2)
    assert options.batch_size == 4                           # 16 (64 / 128)^2
    assert configured("--image-size 96", world=2)[0].batch_size == 8     # 7, for two processes
    # another head has its own default size, unless it is said
    assert (config.head, config.head_width, config.depth, config.image_size) == ("mlp", 0, 3, 128)
    assert configured("--set head=mlp head_width=16")[1].head_width == 16
    assert options.out == "runs/DiP-Nano-16-head-mlp-depth-3-128"
    assert configured("--set head=mlp --set depth=3 --image-size 128")[1] == config


@pytest.mark.parametrize("words, world, micro", [
    ("--batch-size 256", 1, 32), ("--batch-size 24", 1, 24), ("--batch-size 37", 1, 1),
    ("--batch-size 24", 2, 12), ("--batch-size 256", 4, 32), ("--batch-size 66", 1, 22),
    ("--batch-size 256 --micro-batch 64", 2, 64)])
def test_a_micro_batch_is_the_largest_part_of_a_process_up_to_32(words, world, micro):
    assert configured(words, world=world)[0].micro_batch == micro


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_slow_is_noted_by_one_rank_alone(monkeypatch, capsys, rank):
    monkeypatch.setattr(train.dist, "get_rank", lambda: rank)
    configured("--batch-size 74", world=2)
    assert capsys.readouterr().out.count("note: 37 images per process") == (rank == 0)


# --- whole runs -----------------------------------------------------------------------------------


def loss_lines(folder):
    """The lines of the log with a loss, without the speed."""
    return [{**line, "images_per_s": 0} for line in train.read_log(folder)
            if "loss" in line or "val_loss" in line]


def test_ten_steps_and_ten_more_are_twenty_bit_for_bit(monkeypatch, tmp_path, twenty, capsys):
    """Weights, averaged weights, optimizer and log: the same command resumes the same run."""
    command, whole = twenty
    run(monkeypatch, train, command, f"--steps 10 --sample-every 0 --out {tmp_path}")
    assert sorted(os.listdir(tmp_path)) == [".lock", "ckpt-00000010.pt", "log.jsonl"]
    run(monkeypatch, train, command, f"--out {tmp_path}")
    assert "resumed at step 10; --steps 10 -> 20" in capsys.readouterr().out
    a, b = checkpoint(whole), checkpoint(tmp_path)
    assert a["step"] == b["step"] == 20
    assert_same_state(a, b, STATE)
    assert loss_lines(whole) == loss_lines(tmp_path) and len(loss_lines(whole)) == 21
    written = {"ckpt-00000020.pt", "log.jsonl", "loss.png", "samples-00000020.png"}
    assert written <= set(os.listdir(tmp_path))
    for name in ("samples-00000020.png", "loss.png"):
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("crash", [2, 5])
def test_a_run_that_died_is_repeated_by_the_same_command(monkeypatch, tmp_path, crash):
    """Before the first checkpoint or after it, with accumulation.  Fails if a step is logged twice
    or if half-written files stay."""
    command = TINY, "--steps 6 --save-every 3 --log-every 1 --micro-batch 2"
    run(monkeypatch, train, *command, f"--out {tmp_path}/whole")
    average, calls = train.get_ema_multi_avg_fn, []

    def dies(decay):
        calls.append(decay)
        if len(calls) == crash:
            raise KeyboardInterrupt
        return average(decay)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "get_ema_multi_avg_fn", dies)
        run(patch, train, *command, f"--out {tmp_path}/died")
    (tmp_path / "died" / ".ckpt-00000006.pt.123.partial").write_bytes(b"half")
    run(monkeypatch, train, *command, f"--out {tmp_path}/died")
    assert_same_state(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "died"), STATE)
    assert loss_lines(tmp_path / "whole") == loss_lines(tmp_path / "died")
    assert not list((tmp_path / "died").glob(".*.partial"))


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
    for line in fine:
        assert line["lr"] == 1e-3 and line["grad_norm"] > 0
        assert len(line["loss_by_t"]) == 10 and "repa" not in line
    assert coarse[-1]["grad_norm"] == pytest.approx(fine[-1]["grad_norm"])


def test_the_speed_is_that_of_the_steps_alone(monkeypatch, tmp_path):
    """By a clock on which a step takes half a second, a checkpoint a minute and pictures ten.
    Catches steps before a resumption that are counted too."""
    now = [0.0]

    def takes(seconds, function):
        def timed(*arguments):
            now[0] += seconds
            return function(*arguments)
        return timed

    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: 0))
    monkeypatch.setattr(train, "write_pictures", lambda *_: None)
    for name, seconds in (("training_step", 0.5), ("save_checkpoint", 60), ("write_pictures", 600)):
        monkeypatch.setattr(train, name, takes(seconds, getattr(train, name)))
    for steps in (4, 8):
        run(monkeypatch, train, TINY, f"--steps {steps} --log-every 2 --sample-every 3",
            f"--save-every 5 --out {tmp_path}")
    speeds = [line["images_per_s"] for line in train.read_log(tmp_path) if "loss" in line]
    assert speeds == [8.0] * 6


def test_a_checkpoint_is_builtins_and_tensors_and_says_what_it_is(monkeypatch, tmp_path, folder):
    run(monkeypatch, train, TINY, f"--steps 1 --data {folder}/train --out {tmp_path}/run")
    state = checkpoint(tmp_path / "run")                     # opens with weights_only=True
    assert state["config"]["num_classes"] == 3 and state["names"][0] == "goldfish"
    assert (state["step"], state["options"]["seed"]) == (1, 0)
    assert state["classes"] == ["n01443537", "n02509815", "zebra finch"]
    allowed = (torch.Tensor, int, float, str, bool, type(None))
    assert all(isinstance(leaf, allowed) for _, leaf in leaves(state))
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    begin, line = map(json.loads, lines)     # what the run is, and its losses
    assert (begin["options"], begin["config"]) == (state["options"], state["config"])
    assert line["step"] == 1 and line["loss"] > 0


@pytest.mark.parametrize("size, classes, drawn", [
    (16, 3, [[c] * 5 for c in range(3)]), (16, 40, [[4 * c] * 5 for c in range(10)]),
    (128, 1000, [[0], [250], [500], [750]])])
def test_a_picture_shows_five_images_of_at_most_ten_classes(monkeypatch, tmp_path, size, classes,
                                                            drawn):
    """Each image has an index, and so a noise, of its own.  Large images on a CPU are fewer.
    Validation takes as many images at once as training."""
    ema = awake(SMALL.replace(num_classes=classes, image_size=size)).requires_grad_(False)
    calls, sizes, loss = [], [], train.flow_matching_loss
    monkeypatch.setattr(train, "generate", lambda model, labels, indices, seed, **how: calls.append(
        (model is ema, labels, list(indices), seed, (how["steps"], how["cfg"])))
        or torch.zeros(len(labels), 3, 16, 16))
    monkeypatch.setattr(train, "flow_matching_loss", lambda model, x, *rest: sizes.append(
        len(x)) or loss(model, x, *rest))
    data, val_data = Shapes(size), Shapes(size, 5)
    data.names = data.classes = [f"class {k}" for k in range(classes)]
    if classes < 10:                                         # labels are below 3
        val_data = None
    options = options_for(time_mean=0.8, seed=4, micro_batch=2)
    train.write_pictures(tmp_path, 3, ema, data, val_data, options)
    assert [labels for _, labels, *_ in calls] == drawn
    assert sum([indices for _, _, indices, *_ in calls], []) == list(range(len(sum(drawn, []))))
    assert {(averaged, seed, steps) for averaged, _, _, seed, steps in calls} == {
        (True, 4, (10 if size > 64 else 20, 2.0))}
    assert sizes == ([2, 2, 1] if val_data else [])
    assert len(train.read_log(tmp_path)) == bool(val_data)
    assert {path.name for path in tmp_path.glob("*.png")} == {"samples-00000003.png", "loss.png"}


def test_loss_png_shows_both_losses_and_both_by_t(tmp_path, twenty):
    """Lines by step, stairs by t at the last step.  Catches a warning on an empty log."""
    shown = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(train, "Figure", lambda *a, **k: shown.append(Figure(*a, **k)) or shown[-1])
        train.draw_losses(tmp_path, 0)
        (tmp_path / "log.jsonl").write_bytes((twenty[1] / "log.jsonl").read_bytes())
        train.draw_losses(tmp_path, 0.8)
    figure = shown[-1]
    *panels, by_t = figure.axes
    stairs = [patch for patch in by_t.patches if isinstance(patch, StepPatch)]
    assert len(stairs) == 2 and (tmp_path / "loss.png").exists()
    for panel, step, key, title in zip(panels, stairs, ("loss", "val_loss"), (
            "training, mean logit t = 0.8", "validation, EMA, mean logit t = 0")):
        lines = [line for line in train.read_log(tmp_path) if key in line]
        assert panel.get_title() == step.get_label() == title
        assert list(panel.lines[0].get_xdata()) == [line["step"] for line in lines]
        assert list(panel.lines[0].get_ydata()) == [line[key] for line in lines]
        values, edges, _ = step.get_data()
        np.testing.assert_array_equal(values, np.array(lines[-1][f"{key}_by_t"], dtype=float))
        np.testing.assert_allclose(edges, np.arange(11) / 10)


# --- many processes, micro-batches, workers -------------------------------------------------------


def assert_same_training(one, other, *keys):
    """Up to the order of float sums, with the same values under these keys of the log."""
    assert_same_state(checkpoint(one), checkpoint(other), ["model", "ema"], atol=1e-5)
    for key in keys:
        losses = [[line[key] for line in train.read_log(run) if key in line]
                  for run in (one, other)]
        assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_nodes_under_torchrun_train_the_run_of_one_process(tmp_path, twenty):
    """Two agents that meet on the loopback.  Catches seeds by rank, means of unequal parts, and
    pictures or lines of the log from both ranks."""
    command, one = twenty
    agent = f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:{free_port()} --rdzv-id=test"
    agents = [launch("train.py", command, f"--out {tmp_path}", agent=agent) for _ in range(2)]
    ends = [outcome(agent) for agent in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert_same_training(one, tmp_path, "loss", "grad_norm", "val_loss")
    assert sum("options" in line for line in train.read_log(tmp_path)) == 1


def test_a_rank_takes_the_gpu_of_its_place_on_its_node(monkeypatch):
    """LOCAL_RANK; catches RANK, which counts over all nodes.  No machine has a hundred GPUs."""
    monkeypatch.setenv("RANK", "199")
    monkeypatch.setenv("LOCAL_RANK", "99")
    for device in ("auto", "cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match="--device cuda:99: "):
            sample.start_processes(device)


def test_workers_do_not_change_a_bit(monkeypatch, tmp_path, twenty):
    """Two loader processes live at the end of the run; fails if --workers is ignored."""
    command, one = twenty
    alive = []
    monkeypatch.setattr(train, "write_pictures", lambda *_: alive.append(
        len(multiprocessing.active_children())))
    run(monkeypatch, train, command, f"--workers 2 --out {tmp_path}")
    assert alive == [2]
    assert_same_state(checkpoint(one), checkpoint(tmp_path), STATE)


@pytest.mark.parametrize("name", VARIANTS)
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
    kinds = {type(block) for block in blocks_of(DiP(PRESETS["DiP-Nano/16"]))}
    assert counter.frame_count >= len(kinds) == 2
    assert_same_state(*(checkpoint(tmp_path / name) for name in ("plain", "fast")), STATE[:2],
                      atol=1e-5)


# --- REPA -----------------------------------------------------------------------------------------

ENCODER = """
import os, time, torch
from pathlib import Path
dependencies = ["torch"]
class Tiny(torch.nn.Module):
    patch_size = 7
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 6, 7, 7)
    def forward_features(self, x):
        return {"x_norm_patchtokens": self.patch(x).flatten(2).transpose(1, 2)}
def tiny():
    torch.manual_seed(int(os.environ.get("RANK", 0)))        # a cache that only rank 0 can fill
    cache = Path(__file__).with_name("cache.pt")
    if "RANK" not in os.environ or os.environ["RANK"] == "0":
        time.sleep(0.5)
        torch.manual_seed(0)
        torch.save(Tiny().state_dict(), cache)
    net = Tiny()
    net.load_state_dict(torch.load(cache))
    return net
twin = tiny
"""


@pytest.fixture
def aligned(tmp_path):
    """The words that align a run with a small encoder in a local repository."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(ENCODER)
    return f"--repa tiny --repa-repo {tmp_path}/hub --repa-source local --lr 3e-3 --log-every 10"


def test_repa_aligns_with_a_local_encoder_and_resumes_bit_for_bit(monkeypatch, tmp_path, aligned):
    """The encoder stays out of the checkpoint."""
    run(monkeypatch, train, TINY, "--steps 60 --save-every 20 --keep 3", aligned,
        f"--out {tmp_path}/run")
    losses = [line["repa"] for line in loss_lines(tmp_path / "run")]
    assert len(losses) == 6 and 0 < losses[-1] < 0.8 * losses[0]
    state = checkpoint(tmp_path / "run")
    assert state["config"]["repa_dim"] == 6
    assert not any("patch" in name for name in state["model"])
    (tmp_path / "run" / "ckpt-00000060.pt").unlink()
    run(monkeypatch, train, TINY, "--steps 60", aligned, f"--out {tmp_path}/run")
    assert_same_state(state, checkpoint(tmp_path / "run"), STATE)
    line = error_line(monkeypatch, train, TINY, "--steps 80", aligned, "--repa twin",
                      f"--out {tmp_path}/run")               # of the same width
    assert "does not fit; choose another --out (repa=tiny there, twin here)" in line


def test_two_ranks_with_an_encoder_train_the_run_of_one(monkeypatch, tmp_path, aligned):
    """Rank 0 fills the cache of torch.hub while rank 1 waits."""
    words = TINY, "--steps 4", aligned, "--log-every 1"
    ends = [rank.end() for rank in run_ranks(2, "train", *words, f"--out {tmp_path}/two")]
    assert [code for code, _, _ in ends] == [0, 0], ends
    run(monkeypatch, train, *words, f"--out {tmp_path}/one")
    assert_same_training(tmp_path / "one", tmp_path / "two", "loss", "repa")


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
    assert encoder.dim == 6 and encoder(torch.zeros(2, 3, 64, 96)).shape == (2, 6, 4, 6)
    mean = torch.tensor([0.485, 0.456, 0.406])
    shown = []
    encoder.net.forward_features = lambda x: shown.append(x) or {
        "x_norm_patchtokens": torch.zeros(len(x), 4, 6)}
    for colour, expected in (
            (mean * 2 - 1, torch.zeros(3)),
            (torch.ones(3), (1 - mean) / torch.tensor([0.229, 0.224, 0.225]))):
        encoder(colour[None, :, None, None].expand(1, 3, 32, 32))
        assert shown[-1].shape == (1, 3, 14, 14)
        torch.testing.assert_close(shown[-1], expected[None, :, None, None].expand(1, 3, 14, 14),
                                   rtol=0, atol=1e-5)
    fine = torch.arange(32) % 3 - 1.0                        # stripes finer than its pixels
    encoder(fine.expand(1, 3, 32, 32))
    assert shown[-1][..., 2:-2].std(dim=-1).max() < 0.5


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
    assert (state["options"]["model"], state["options"]["cooldown"]) == ("DiP-Nano/16", 0.3)
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
    assert f"{tmp_path}/dip.ckpt: 0.0" in capsys.readouterr().out
