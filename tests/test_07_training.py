"""
Chapter 7: a run is a function of its options.

The law: fit() is the loop of literal_sampling.py, which sees one image after the other; and no
number of processes, micro-batches, workers or interruptions changes what it computes.
"""

import copy
import json
import math
import os
import warnings
from types import SimpleNamespace

import literal_sampling as literal
import numpy as np
import pytest
import torch
from commands import (ROOT, TINY, Background, alone, assert_same_state, checkpoint, free_port,
                      leaves, run)
from helpers import SMALL, VARIANTS, awake, batch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, default_collate

import common
import dataset
import sample
import train
from common import random_stream
from dataset import Examples, FolderData, ShapesData, micro_batches
from dip import PRESETS, DiP, flow_matching_loss
from fid import center_crop
from train import TrainOptions, learning_rate, update_ema

STATE = "model", "ema", "optimizer"


# --- the embedded data --------------------------------------------------------------------------


def test_neither_shape_nor_texture_alone_tells_the_class():
    """Every shape comes with two textures, every texture on two shapes, every pair once."""
    pairs = ShapesData.pairs
    assert len(set(pairs)) == len(set(ShapesData.names)) == 10
    for side in (0, 1):
        parts = [pair[side] for pair in pairs]
        assert all(parts.count(part) == 2 for part in parts)


@settings(max_examples=20)
@given(index=st.integers(0, 10**6), size=st.sampled_from([16, 48, 100]))
def test_an_embedded_image_is_a_function_of_its_index(index, size):
    image, label = ShapesData(size)[index]
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and label == index % 10
    assert np.array_equal(image, ShapesData(size)[index][0])
    assert not np.array_equal(image, ShapesData(size)[index + 10][0])


@pytest.mark.parametrize("index", range(10))
def test_embedded_images_are_antialiased(index):
    """A pixel is about the mean of what it covers: a drawing is nearer to a fine one averaged down
    than that fine one merely subsampled is, whose edges are jagged."""
    fine = ShapesData(512)[index][0].astype(float)
    coarse = ShapesData(64)[index][0].astype(float)
    averaged = fine.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(coarse - averaged).mean() < 0.5 * np.abs(fine[4::8, 4::8] - averaged).mean()


def test_training_and_validation_images_are_different():
    train_data, val_data = dataset.open_data(None, 16)
    seen = {val_data[j][0].tobytes() for j in range(20)}
    assert len(train_data) == 50_000 and len(val_data) == 1000
    assert not any(train_data[i][0].tobytes() in seen for i in range(20))


# --- the image folder ---------------------------------------------------------------------------


@settings(max_examples=40)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([1, 16, 63, 64]))
def test_the_crop_has_its_size_whatever_came_in(width, height, size):
    assert center_crop(Image.new("RGB", (width, height)), size).size == (size, size)


def test_the_crop_resizes_first_and_keeps_the_centre():
    """Forbids cropping without resizing: of three vertical bands the middle one stays whole."""
    bands = np.zeros((100, 300, 3), dtype=np.uint8)
    bands[:, 100:200] = 200
    cropped = np.asarray(center_crop(Image.fromarray(bands), 32))
    assert (cropped[:, 2:-2] >= 198).all()
    tall = np.asarray(center_crop(Image.fromarray(bands.transpose(1, 0, 2)), 32))
    assert np.array_equal(tall, cropped.transpose(1, 0, 2))


def test_an_image_of_the_right_size_is_untouched_and_one_of_twice_the_size_is_averaged():
    """ADM's first step is a box filter: 2 x 2 means, to the rounding of each of its two passes."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 64)), pixels)
    means = pixels.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(np.asarray(center_crop(Image.fromarray(pixels), 32)) - means).max() <= 1


@pytest.fixture
def folder(tmp_path):
    """Three classes of little pictures of many shapes and encodings, and a stray text file."""
    rng = np.random.default_rng(0)
    for name, mode in (("n01443537", "RGB"), ("n02509815", "L"), ("zebra finch", "CMYK")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(4):
            bands = len(Image.new(mode, (1, 1)).getbands())
            pixels = rng.integers(0, 256, (20 + k, 30, bands), dtype=np.uint8).squeeze()
            Image.fromarray(pixels, mode).save(tmp_path / "train" / name / f"{k}.jpg")
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    return tmp_path


def test_classes_are_the_sorted_folder_names_and_wnids_get_their_readable_name(folder):
    data, val = dataset.open_data(folder, 16)
    assert val is None
    assert data.classes == ["n01443537", "n02509815", "zebra finch"]
    assert data.names == ["goldfish", "lesser panda", "zebra finch"]
    assert [data[i][1] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(data[i][0].shape == (16, 16, 3) for i in range(12))
    assert dataset.open_data(folder / "train", 16)[0].files == data.files


def test_a_folder_of_images_without_folders_is_one_class_of_its_name(folder):
    """Unconditional training; also where DIR/train and DIR/val are such folders."""
    flat = folder / "train" / "zebra finch"
    data, val = dataset.open_data(flat, 16)
    assert (data.classes, data.labels, val) == (["zebra finch"], [0] * 4, None)
    for part in ("train", "val"):
        (folder / "birds" / part).mkdir(parents=True)
        (flat / "0.jpg").rename(folder / "birds" / part / "0.jpg")
        (flat / "1.jpg").exists() and (flat / "1.jpg").rename(flat / "0.jpg")
    data, val = dataset.open_data(folder / "birds", 16)
    assert data.classes == val.classes == ["birds"] and len(data) == len(val) == 1


def test_the_thousand_sorted_wnids_are_the_usual_imagenet_indices():
    """Class 1 is the goldfish, 387 the lesser panda, 964 the potpie (captions of Figs. 13 to 30).
    Two captions are off: Fig. 16's "tree frog" (30) is 31, Fig. 18's "teddy" (859) is 850."""
    wnids, names = zip(*common.imagenet_names().items())
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids)
    known = {1: "goldfish", 13: "junco", 19: "chickadee", 31: "tree frog", 35: "mud turtle",
             81: "ptarmigan", 107: "jellyfish", 153: "Maltese dog", 387: "lesser panda",
             425: "barn", 437: "beacon", 441: "beer glass", 850: "teddy", 911: "wool",
             927: "trifle", 938: "cauliflower", 964: "potpie", 997: "bolete"}
    assert {index: names[index] for index in known} == known


# --- order and randomness -----------------------------------------------------------------------


@settings(max_examples=30)
@given(world=st.integers(1, 4), count=st.integers(1, 3), micro=st.integers(1, 3),
       first=st.integers(0, 5))
def test_ranks_and_micro_batches_divide_the_same_global_batch(world, count, micro, first):
    """Whatever the machine, step n trains on examples n B ... (n + 1) B - 1, each once."""
    B = world * count * micro
    options = TrainOptions(steps=first + 2, batch_size=B, micro_batch=micro)
    dealt = [list(micro_batches(options, first, rank, world)) for rank in range(world)]
    for step in range(2):
        of_step = [part for parts in dealt for part in parts[step * count:(step + 1) * count]]
        assert all(len(part) == micro for part in of_step)
        assert sorted(sum(of_step, [])) == list(range((first + step) * B, (first + step + 1) * B))
    assert all(len(parts) == 2 * count for parts in dealt)


def test_every_epoch_is_a_new_permutation():
    """Forbids data that is never reshuffled, and sampling with replacement."""
    examples = Examples(ShapesData(8, length=30), seed=0)
    epochs = [[examples.index(e * 30 + k) for k in range(30)] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert examples.index(5) == epochs[0][5]                 # in any order of asking
    for other in (dict(seed=1), dict(seed=0, purpose="val")):
        again = Examples(ShapesData(8, length=30), **other)
        assert [again.index(k) for k in range(30)] != epochs[0]


def test_an_example_is_as_by_hand_and_no_two_share_a_random_number(folder):
    """Pixels scaled to [-1, 1], label of the image shown, noise of (seed, k) alone."""
    data = FolderData(folder / "train", 16)
    for purpose in ("train", "val"):
        examples = Examples(data, 3, purpose)
        order = [examples.index(k) for k in range(12)]
        whole = examples.on_device(default_collate([examples[k] for k in range(12)]),
                                   torch.device("cpu"))
        for k in range(12):
            expected = literal.example(data, order, k, 3, purpose, random_stream)
            for ours, theirs in zip(whole, expected):
                assert torch.equal(ours[k], torch.as_tensor(theirs))
        assert whole[0].min() >= -1 and whole[0].max() <= 1 and whole[0].std() > 0.3
        numbers = torch.cat([whole[2].flatten(1)[:, :9].flatten(), *whole[3:]])
        assert len(numbers.unique()) == 12 * 11
        assert whole[2].is_contiguous() and whole[2].dtype == torch.float32


def test_workers_do_not_change_the_examples():
    options = TrainOptions(steps=8, batch_size=4, micro_batch=2)
    loaders = [DataLoader(Examples(ShapesData(8), seed=0), num_workers=workers,
                          batch_sampler=list(micro_batches(options, 5, 0, 1)))
               for workers in (0, 2)]
    for one, two in zip(*loaders):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_the_folder_is_flipped_half_the_time_and_neither_shapes_nor_validation_ever(folder):
    data = FolderData(folder / "train", 16)
    examples, flipped = Examples(data, seed=0), 0
    for k in range(200):
        image, shown = data[examples.index(k)][0], examples[k][0]
        assert np.array_equal(shown, image) or np.array_equal(shown, image[:, ::-1])
        flipped += not np.array_equal(shown, image)
    assert 70 < flipped < 130                                # five standard deviations of a coin
    for steady in (Examples(data, 0, "val"), Examples(ShapesData(8), 0)):
        for k in range(20):
            assert np.array_equal(steady[k][0], steady.data[steady.index(k)][0])


# --- schedule and average -----------------------------------------------------------------------


@given(decay=st.floats(0, 1), values=st.lists(st.floats(-9, 9), min_size=2, max_size=30))
def test_the_average_of_weights_warms_up_to_its_decay(decay, values):
    """Forbids the decay ignored, a warm-up off by a step, and weights of d and 1 - d exchanged."""
    ema, model = (torch.nn.Linear(1, 1, bias=False).double() for _ in range(2))
    ema.weight.data.fill_(values[0])
    for step, value in enumerate(values[1:]):
        model.weight.data.fill_(value)
        update_ema(ema, model, step, decay)
    assert ema.weight.item() == pytest.approx(literal.moving_average(values, decay), abs=1e-9)


@given(steps=st.integers(1, 60), warmup=st.integers(0, 20), cooldown=st.floats(0, 1))
def test_the_learning_rate_is_that_of_its_formula(steps, warmup, cooldown):
    options = TrainOptions(steps=steps, lr=0.3, warmup=warmup, cooldown=cooldown)
    for step in range(steps):
        expected = literal.learning_rate(step, steps, 0.3, warmup, cooldown)
        assert learning_rate(options, step) == pytest.approx(expected, rel=1e-9)


def test_the_learning_rate_rises_stays_and_falls():
    options = TrainOptions(steps=100, lr=1.0, warmup=9, cooldown=0.2)
    rates = [learning_rate(options, step) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10:79] == [1.0] * 69
    assert rates[80:] == pytest.approx([k / 21 for k in range(20, 0, -1)])
    constant = TrainOptions(steps=100, lr=1e-4, warmup=0, cooldown=0.0)      # the paper's
    assert {learning_rate(constant, step) for step in range(100)} == {1e-4}


# --- the whole loop, by hand --------------------------------------------------------------------


class Pictures:
    """Eight random pictures of five classes that may be flipped, as an image folder's are."""

    flip, classes, names = True, list("abcde"), list("ABCDE")
    bad = torch.zeros(0, dtype=torch.bool)

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
    """Weights and average agree to 1e-5, a hundredth of a step of Adam.  Forbids: a schedule that
    never reaches the optimizer, gradients not clipped or not divided by the number of
    micro-batches, an average taken before the step or with another decay, --time-mean,
    --label-dropout or REPA's weight ignored, weight decay, validation of flipped images or of the
    raw weights, at other times."""
    settings = LOOP | change
    options = TrainOptions(**settings, out=str(tmp_path))
    config = SMALL.replace(repa_dim=3 if options.repa else 0)
    encoder = features if options.repa else None
    data, val_data, sampled = Pictures(0), Pictures(1, 7), []
    start = awake(config, seed=3)
    monkeypatch.setattr(train, "write_samples", lambda out, step, ema, *rest: sampled.append(
        copy.deepcopy(ema)))
    ema, done = train.fit(options, config, data, val_data, alone(), encoder,
                          build=lambda config: copy.deepcopy(start))
    order = [Examples(data, 5).index(k) for k in range(24)]  # three epochs of eight
    model = copy.deepcopy(start)
    average, log = literal.fit(model, data, order, options, random_stream, encoder)
    assert done == 6
    state = checkpoint(tmp_path)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(state["model"][name], weight, rtol=0, atol=1e-5)
    for fast in (ema, sampled[0]):
        for a, b in zip(fast.state_dict().values(), average.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    lines = [line for line in train.read_log(tmp_path) if "loss" in line]
    assert len(lines) == 6
    for line, expected in zip(lines, log):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-5), key
    clipped = [line["grad_norm"] > 0.5 for line in log]
    assert any(clipped)                                      # else there is nothing to see
    val_order = [Examples(val_data, 0, "val").index(k) for k in range(7)]
    (line,) = [line for line in train.read_log(tmp_path) if "val_loss" in line]
    expected = literal.validation_loss(average, val_data, val_order, random_stream)
    assert line["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_weights_are_drawn_from_the_seed_alone(tmp_path):
    torch.manual_seed(1)
    states = []
    for seed in (0, 0, 1):
        options = TrainOptions(**LOOP | {"seed": seed}, out=str(tmp_path / "none"))
        model, ema, *_ = train.begin_or_resume(options, SMALL, Pictures(0), alone())
        assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), model.parameters()))
        assert not any(p.requires_grad for p in ema.parameters())
        states.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_by_time_sums_losses_in_tenths_of_t():
    """Both ends count; a bin without images has no mean, and is null in the log."""
    t = torch.tensor([0.0, 0.05, 0.1, 0.95, 1.0])
    sums = train.by_time(t, torch.arange(5.0), torch.ones(5) / 2)
    assert sums[:, 0].tolist() == [1, 1, 2] and sums[:, 1].tolist() == [2, 0.5, 1]
    assert sums[:, 9].tolist() == [7, 1, 2] and sums[:, 2:9].abs().sum() == 0
    line = train.mean_losses(sums, "val_")
    assert line == {"val_loss": 2.0, "val_repa": 0.5, "val_loss_by_t": [0.5, 2.0] + [None] * 7
                    + [3.5]}
    assert "repa" not in train.mean_losses(sums * torch.tensor([[1], [0], [1]]))


def test_validation_sees_at_most_500_images_in_fixed_order(monkeypatch):
    """Fewer where there are fewer; every run the same."""
    model, seen = awake(SMALL), []
    monkeypatch.setattr(train, "flow_matching_loss", lambda model, x, y, t, noise: seen.append(
        y) or (torch.ones(len(x)), torch.zeros(len(x))))
    data = ShapesData(16, 1000, first=10**6)
    sums = train.validate(model, Examples(data, 0, "val"), torch.device("cpu"))
    assert sums[2].sum() == 500 and max(map(len, seen)) <= 50
    order = [Examples(data, 0, "val").index(k) % 10 for k in range(500)]
    assert torch.cat(seen).tolist() == order


# --- what a run is when little is said ----------------------------------------------------------


def test_without_a_gpu_and_without_a_model_the_model_is_small_and_that_is_said(capsys):
    """Recipes belong to presets: one that is asked for brings the paper's settings anywhere."""
    options = TrainOptions()
    config = train.configure(options, alone("cpu"))
    assert (options.model, options.steps, config.image_size) == ("DiP-Nano/16", 3500, 48)
    assert (options.batch_size, options.lr, options.warmup) == (16, 3e-3, 50)
    assert (options.cooldown, options.time_mean) == (0.3, 0.8)
    assert (options.sample_every, options.save_every, options.workers) == (700, 700, 0)
    assert options.out == "runs/DiP-Nano-16-48"
    assert "no CUDA and no --model: the small DiP-Nano/16" in capsys.readouterr().out
    options = TrainOptions()
    train.configure(options, alone("cuda"))                  # nor for drawings on a GPU
    assert options.model == "DiP-Nano/16"
    assert "no --data and no --model: the small DiP-Nano/16" in capsys.readouterr().out
    for device, chosen in (("cuda", None), ("cpu", "DiP-XL/16")):
        options = TrainOptions(model=chosen, data="photos")
        config = train.configure(options, alone(device))
        assert (options.model, options.batch_size, options.lr) == ("DiP-XL/16", 256, 1e-4)
        assert (options.steps, options.warmup, options.cooldown) == (1_600_000, 0, 0.0)
        assert (options.time_mean, options.sample_every) == (0.0, 10_000)
        assert options.workers == (8 if device == "cuda" else 0)
        assert config == PRESETS["DiP-XL/16"] and capsys.readouterr().out == ""


def test_what_the_user_says_comes_before_the_recipe_and_names_the_folder(capsys):
    options = TrainOptions(model="DiP-Nano/16", image_size=128, lr=1e-5, steps=3, sample_every=0,
                           save_every=2, set=("head=mlp", "depth=3"))
    config = train.configure(options, alone())
    assert (options.lr, options.steps, options.sample_every, options.save_every) == (1e-5, 3, 0, 2)
    assert options.batch_size == 4                           # 16 (64 / 128)^2
    shared = TrainOptions(model="DiP-Nano/16", image_size=96)
    train.configure(shared, common.Processes(0, 2, torch.device("cpu")))
    assert shared.batch_size == 8                            # 16 (64 / 96)^2 = 7, for two
    assert (config.head, config.head_width, config.depth, config.image_size) == ("mlp", 0, 3, 128)
    assert options.out == "runs/DiP-Nano-16-head-mlp-depth-3-128"
    said = capsys.readouterr().out
    assert "head=mlp: its own head_width and head_depth, unless --set gives them" in said
    options = TrainOptions(model="DiP-Ti/16", set=("head_width=16",), steps=10)
    assert train.configure(options, alone()).head_width == 16 and options.save_every == 2
    assert capsys.readouterr().out == ""


GIB = 2**30


def test_micro_batches_fit_the_memory_or_the_run_refuses(monkeypatch):
    """DiP-Ti/16 at 256 pixels has the paper's batch of 256: forbids it all at once."""
    config, chosen = PRESETS["DiP-Ti/16"], []
    fixed, per_image = common.memory_needed(config)
    for free in (1000 * GIB, fixed + 9 * per_image, fixed + 1.5 * per_image):
        monkeypatch.setattr(train, "available_memory", lambda device: free)
        monkeypatch.setattr(train, "memory_needed", lambda *_: (fixed, per_image))
        options = TrainOptions(batch_size=256)
        train.choose_micro_batch(options, config, alone())
        chosen.append(options.micro_batch)
    assert chosen == [32, 8, 1]
    options = TrainOptions(batch_size=24)
    monkeypatch.setattr(train, "available_memory", lambda device: fixed + 9 * per_image)
    train.choose_micro_batch(options, config, alone())
    assert options.micro_batch == 8                          # the largest divisor that fits
    monkeypatch.setattr(common.Processes, "gather", lambda self, mine: [mine, 3][:self.world])
    for batch_size, expected in ((12, 3), (4, 2)):           # of a process's part, and as its peer
        two = common.Processes(0, 2, torch.device("cpu"))
        train.choose_micro_batch(options := TrainOptions(batch_size=batch_size), config, two)
        assert options.micro_batch == expected
    options = TrainOptions(batch_size=256, micro_batch=64)
    with pytest.raises(ValueError, match=r"--micro-batch 64 needs about .* GiB, .* GiB are free; "
                                         r"a smaller --micro-batch, --image-size or --model, or "
                                         r"--grad-checkpoint, helps"):
        train.choose_micro_batch(options, config, alone())
    monkeypatch.setattr(train, "available_memory", lambda device: fixed)
    with pytest.raises(ValueError, match="--micro-batch 1 needs about"):
        train.choose_micro_batch(TrainOptions(batch_size=256), config, alone())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_memory_needed_is_what_a_step_keeps(name):
    """Against the tensors that a real step keeps for its backward pass; nothing is computed for
    the estimate.  Weights, gradients, two moments, average: five times the weights."""
    config, kept = VARIANTS[name], {}
    model = DiP(config)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x, t, y = batch(config, B=8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = flow_matching_loss(model, x, y, t, torch.ones_like(x))[0]
    activations = sum(size for place, size in kept.items() if place not in weights)
    fixed, per_image = common.memory_needed(config)
    assert 8 * per_image == pytest.approx(activations, rel=0.1)
    assert fixed == pytest.approx(5 * sum(p.nbytes for p in model.parameters()), rel=0.2)
    again = common.memory_needed(config, grad_checkpoint=True)
    assert again[1] < per_image and again[0] == fixed and loss.isfinite().all()


def test_the_free_memory_is_that_of_the_machine():
    """MemAvailable of Linux in bytes; forbids kilobytes taken for bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total / 1000 < common.available_memory(torch.device("cpu")) <= total


# --- whole runs ---------------------------------------------------------------------------------


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
    text = capsys.readouterr().out
    assert "resumed at step 10" in text and "changed since the checkpoint: --steps 10 -> 20" in text
    a, b = checkpoint(whole), checkpoint(tmp_path)
    assert a["step"] == b["step"] == 20
    assert_same_state(a, b, (*STATE, "unlogged"))
    assert loss_lines(whole) == loss_lines(tmp_path) and len(loss_lines(whole)) == 21
    written = {"ckpt-00000020.pt", "log.jsonl", "loss.png", "samples-00000020.png"}
    assert written <= set(os.listdir(tmp_path))
    assert (whole / "samples-00000020.png").read_bytes() == (
        tmp_path / "samples-00000020.png").read_bytes()


@pytest.mark.parametrize("crash", [2, 5])
def test_a_run_that_died_is_repeated_by_the_same_command(monkeypatch, tmp_path, crash):
    """Before the first checkpoint or after it, with accumulation: nothing is logged twice."""
    command = TINY, "--steps 6 --save-every 3 --log-every 1 --micro-batch 2"
    run(monkeypatch, train, *command, f"--out {tmp_path}/whole")
    calls = []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == crash:
            raise KeyboardInterrupt
        update_ema(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update_ema", dies)
        run(patch, train, *command, f"--out {tmp_path}/died")
    run(monkeypatch, train, *command, f"--out {tmp_path}/died")
    assert_same_state(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "died"), STATE)
    assert loss_lines(tmp_path / "whole") == loss_lines(tmp_path / "died")


def test_log_pictures_and_checkpoints_come_when_they_are_due(monkeypatch, tmp_path):
    """And at the end.  A line holds the mean since the line before, the rate and the norm."""
    looks = []
    monkeypatch.setattr(train, "write_pictures", lambda out, step, *rest: looks.append(step))
    run(monkeypatch, train, TINY, "--steps 7 --log-every 3 --sample-every 2 --save-every 5",
        f"--keep 9 --out {tmp_path}/a")
    run(monkeypatch, train, TINY, f"--steps 7 --log-every 1 --out {tmp_path}/b")
    coarse, fine = (train.read_log(tmp_path / name) for name in "ab")
    assert [line["step"] for line in coarse] == [3, 6, 7] and looks == [2, 4, 6, 7]
    steps = [int(path.stem[5:]) for path in sorted((tmp_path / "a").glob("ckpt-*.pt"))]
    assert steps == [5, 7]
    losses = [line["loss"] for line in fine]
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    assert [line["loss"] for line in coarse] == pytest.approx(means, rel=1e-5)
    for line in fine:
        assert line["lr"] == 1e-3 and line["grad_norm"] > 0 and line["images_per_s"] > 0
        assert len(line["loss_by_t"]) == 10 and "repa" not in line
    assert coarse[-1]["grad_norm"] == pytest.approx(fine[-1]["grad_norm"])


def test_a_checkpoint_is_builtins_and_tensors_and_says_what_it_is(monkeypatch, tmp_path, folder):
    run(monkeypatch, train, TINY, f"--steps 1 --data {folder} --out {tmp_path}/run")
    state = checkpoint(tmp_path / "run")                     # opens with weights_only=True
    assert state["config"]["num_classes"] == 3 and state["names"][0] == "goldfish"
    assert (state["step"], state["images"], state["options"]["seed"]) == (1, 12, 0)
    assert state["classes"] == ["n01443537", "n02509815", "zebra finch"]
    allowed = (torch.Tensor, int, float, str, bool, type(None))
    assert all(isinstance(leaf, allowed) for _, leaf in leaves(state))
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_old_checkpoints_are_dropped(monkeypatch, tmp_path):
    run(monkeypatch, train, TINY, f"--steps 4 --save-every 1 --keep 2 --out {tmp_path}")
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == ["ckpt-00000003.pt", "ckpt-00000004.pt"]


def test_the_grid_of_a_run_is_drawn_by_the_average_with_its_seed(monkeypatch, twenty):
    """A class a row, five images of it that share their noise along columns; large images on a CPU
    are fewer and take fewer steps.  Forbids samples of the raw weights."""
    _, folder = twenty
    ema, info = common.load_model(folder)
    calls = []
    monkeypatch.setattr(train, "generate", lambda model, labels, indices, seed, **how: (
        how.pop("watch")(), calls.append((list(labels), list(indices), seed, how)),
        sample.generate(model, labels, indices, seed, **how))[-1])
    before = (folder / "samples-00000020.png").read_bytes()
    train.write_samples(folder, 20, ema, info["names"], 0)
    assert (folder / "samples-00000020.png").read_bytes() == before
    how = dict(sampler="ab2", steps=20, cfg=2.0)
    assert calls == [([c] * 5, list(range(5)), 0, how) for c in range(10)]
    calls.clear()
    wide = SimpleNamespace(config=SMALL.replace(image_size=128), parameters=ema.parameters)
    monkeypatch.setattr(train, "generate", lambda model, labels, indices, seed, **how: calls.append(
        (list(labels), how["steps"])) or torch.zeros(len(labels), 3, 16, 16))
    train.write_samples(folder, 21, wide, [str(k) for k in range(1000)], 0)
    assert calls == [([c], 10) for c in (0, 250, 500, 750)]
    (folder / "samples-00000021.png").unlink()


def test_the_loss_curve_is_drawn_without_a_warning_whatever_is_logged(tmp_path, twenty):
    """Forbids a legend of nothing before the first loss.  Its captions tell the times apart."""
    import matplotlib.pyplot as plt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.draw_loss_curve(tmp_path)
        nothing = (tmp_path / "loss.png").read_bytes()
        (tmp_path / "log.jsonl").write_bytes((twenty[1] / "log.jsonl").read_bytes())
        shown = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plt, "close", shown.append)
            train.draw_loss_curve(tmp_path, 0.8)
        (figure,) = shown
        plt.close(figure)
    assert (tmp_path / "loss.png").read_bytes() != nothing
    for axes in figure.axes:
        assert axes.get_legend_handles_labels()[1] == [
            "training, logit t around 0.8", "validation, EMA, logit t around 0"]
    losses = [line["loss"] for line in train.read_log(tmp_path) if "loss" in line]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(losses)


# --- many processes, micro-batches, workers -------------------------------------------------------


def assert_same_curve(one, other, key, rel):
    losses = [[line[key] for line in train.read_log(run) if key in line] for run in (one, other)]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=rel)


def assert_same_training(one, other):
    """Up to the order of float sums."""
    assert_same_state(checkpoint(one), checkpoint(other), ["model", "ema"], atol=1e-5)
    assert_same_curve(one, other, "loss", 1e-5)
    assert_same_curve(one, other, "val_loss", 1e-5)


def test_four_micro_batches_train_the_run_of_one(monkeypatch, tmp_path, twenty):
    command, one = twenty
    run(monkeypatch, train, command, f"--micro-batch 1 --out {tmp_path}")
    assert_same_training(one, tmp_path)


def test_two_nodes_under_torchrun_train_the_run_of_one_process(tmp_path, twenty):
    """Two agents that meet on the loopback; forbids seeds by rank, and means of unequal parts."""
    command, one = twenty
    agent = (f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:{free_port()} "
             f"--rdzv-id=test --nproc_per_node=1")
    agents = [Background("torch.distributed.run", agent, ROOT / "train.py", command,
                         f"--out {tmp_path}") for _ in range(2)]
    ends = [agent.end() for agent in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert_same_training(one, tmp_path)


@pytest.mark.parametrize("words", ["--workers 2", "--grad-checkpoint"])
def test_neither_workers_nor_recomputed_activations_change_a_bit(monkeypatch, tmp_path, twenty,
                                                                 words):
    command, one = twenty
    run(monkeypatch, train, command, words, f"--sample-every 0 --out {tmp_path}")
    assert_same_state(checkpoint(one), checkpoint(tmp_path), STATE)


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputed_activations_give_the_very_same_gradients(name):
    gradients = []
    for recompute in (False, True):
        model = awake(VARIANTS[name])
        if recompute:
            train.prepare(model, TrainOptions(grad_checkpoint=True), alone())
        x, t, y = batch(model.config)
        flow_matching_loss(model, x, y, t, torch.ones_like(x))[0].mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients))


def test_every_block_and_every_head_is_compiled_and_recomputed_once():
    for name, config in VARIANTS.items():
        pieces = common.pieces(DiP(config))
        heads = {"none": 0, "attention": 2, "unet, hybrid": 2}.get(name, 1)
        assert len(pieces) == len(set(pieces)) == config.depth + heads


def test_the_compiled_model_trains_as_the_plain_one(monkeypatch, tmp_path):
    command = f"{TINY} --set depth=1 head=mlp head_width=8 head_depth=1 --steps 3 --log-every 1"
    for name, word in (("plain", ""), ("fast", "--compile")):
        run(monkeypatch, train, command, word, f"--out {tmp_path}/{name}")
    assert_same_curve(tmp_path / "plain", tmp_path / "fast", "loss", 1e-4)
    assert_same_state(checkpoint(tmp_path / "plain"), checkpoint(tmp_path / "fast"), ["model"],
                      atol=1e-4)


def test_512_pixels_in_patches_of_32_train_and_other_rectangles_are_drawn(monkeypatch, tmp_path):
    """Table 3, in small: the bottleneck of the U-Net is 2 x 2."""
    (tmp_path / "ants").mkdir()
    Image.new("RGB", (600, 520), "orange").save(tmp_path / "ants" / "0.png")
    run(monkeypatch, train, "--model DiP-XL/32 --set depth=1 hidden_size=8 num_heads=1",
        "head_width=1 --image-size 512 --steps 1 --batch-size 1 --device cpu --sample-every 0",
        f"--data {tmp_path}/ants --out {tmp_path}/run")
    assert checkpoint(tmp_path / "run")["config"]["patch_size"] == 32
    run(monkeypatch, sample, f"--ckpt {tmp_path}/run --class ants --num 1 --steps 2",
        f"--size 256 768 --device cpu --out {tmp_path}/wide.png")
    assert Image.open(tmp_path / "wide.png").width > 768


# --- REPA ---------------------------------------------------------------------------------------

ENCODER = """
import torch
dependencies = ["torch"]
class Tiny(torch.nn.Module):
    patch_size = 7
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 6, 7, 7)
    def forward_features(self, x):
        return {"x_norm_patchtokens": self.patch(x).flatten(2).transpose(1, 2)}
def tiny():
    torch.manual_seed(0)
    return Tiny()
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
    lines = train.read_log(tmp_path / "run")
    losses = [line["repa"] for line in lines if "repa" in line]
    assert len(losses) == 6 and 0 < losses[-1] < 0.8 * losses[0]
    state = checkpoint(tmp_path / "run")
    assert state["config"]["repa_dim"] == 6
    assert not any("patch" in name for name in state["model"])
    (tmp_path / "run" / "ckpt-00000060.pt").unlink()
    run(monkeypatch, train, TINY, "--steps 60", aligned, f"--out {tmp_path}/run")
    assert_same_state(state, checkpoint(tmp_path / "run"), STATE)


def test_the_encoder_is_frozen_and_sees_one_of_its_patches_for_16_pixels(tmp_path, aligned):
    """14 x 14 pixels for DINOv2: images of 256 are shown to it at 224 (REPA).  It sees ImageNet's
    mean colour as zero, and white by the standard deviations; forbids images left in [-1, 1]."""
    encoder = dataset.Encoder("tiny", tmp_path / "hub", "local", "cpu")
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


# --- starting from weights ------------------------------------------------------------------------


@pytest.fixture
def two_classes(tmp_path):
    """A folder of two classes."""
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (16, 16), (40 * k, 99, 0)).save(tmp_path / "pets" / name / f"{k}.png")
    return tmp_path / "pets"


def test_init_starts_from_the_average_with_a_new_label_table(monkeypatch, trained, tmp_path,
                                                              two_classes, capsys):
    """Of another number of classes only the null class is kept.  Architecture and image size come
    from the file; the run resumes bit for bit, and says so if it is given other weights then."""
    start = []
    fit = train.start_from
    monkeypatch.setattr(train, "start_from", lambda initial, model, *rest: (
        fit(initial, model, *rest), start.append(copy.deepcopy(model.state_dict()))))
    command = (f"--init {trained} --data {two_classes} --batch-size 4 --lr 1e-3 --sample-every 0 "
               f"--device cpu")
    run(monkeypatch, train, command, f"--steps 4 --out {tmp_path}/whole")
    text = capsys.readouterr().out
    assert "has 10 classes: a new label table for 2; the null class is kept" in text
    assert "no CUDA and no --model" not in text and "DiP-Nano/16: " in text
    given = checkpoint(trained)["ema"]
    for name, weight in start[0].items():
        if name == "label.weight":
            assert weight.shape[0] == 3 and torch.equal(weight[-1], given[name][-1])
            assert not torch.equal(weight[0], given[name][0])
        else:
            assert torch.equal(weight, given[name])
    config = checkpoint(tmp_path / "whole")["config"]
    assert config == checkpoint(trained)["config"] | {"num_classes": 2}

    run(monkeypatch, train, command, f"--steps 2 --out {tmp_path}/parts")
    assert "is not used" not in capsys.readouterr().out
    run(monkeypatch, train, command, f"--steps 4 --out {tmp_path}/parts")
    assert "is not used" not in capsys.readouterr().out      # the run began with it
    assert_same_state(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"), STATE)
    other = command.replace(str(trained), str(tmp_path / "whole"))
    run(monkeypatch, train, other, f"--steps 5 --out {tmp_path}/parts")
    assert f"--init {tmp_path}/whole is not used: the run continues from {tmp_path}/parts/" in (
        capsys.readouterr().out)
    assert len(start) == 2                                   # not at the resumed ones


def test_init_of_as_many_classes_keeps_the_label_table(monkeypatch, trained, tmp_path, capsys):
    """And says so if their names are others."""
    state, words = checkpoint(trained), "--lr 0 --steps 1 --batch-size 2 --sample-every 0"
    torch.save(state | {"classes": [f"other {k}" for k in range(10)]}, tmp_path / "other.pt")
    for file, said in ((trained, False), (tmp_path / "other.pt", True)):
        out = tmp_path / f"run{said}"
        run(monkeypatch, train, f"--init {file} {words} --device cpu --out {out}")
        text = capsys.readouterr().out
        assert "label table" not in text
        assert ("its classes have other names than those of --data" in text) == said
        now = checkpoint(out)["model"]
        assert all(torch.equal(now[name], weight) for name, weight in state["ema"].items())


def test_init_with_or_without_the_projector_of_repa(monkeypatch, trained, tmp_path, aligned):
    """A projector that the run needs is fresh; one that it does not need is left out."""
    often = "--steps 1 --batch-size 2 --sample-every 0 --device cpu"
    run(monkeypatch, train, f"--init {trained} {often}", aligned, f"--out {tmp_path}/with")
    projector = [name for name in checkpoint(tmp_path / "with")["model"] if "repa" in name]
    assert projector
    run(monkeypatch, train, f"--init {tmp_path}/with {often} --out {tmp_path}/without")
    assert not [name for name in checkpoint(tmp_path / "without")["model"] if "repa" in name]


def test_init_with_the_projector_of_another_encoder_makes_a_new_one():
    theirs, ours = (DiP(SMALL.replace(repa_dim=dim)) for dim in (6, 5))
    fresh = copy.deepcopy(ours.state_dict())
    train.start_from(theirs.state_dict(), ours, "FILE", 0)
    for name, weight in ours.state_dict().items():
        source = fresh if name.startswith("repa_projector.") else theirs.state_dict()
        assert torch.equal(weight, source[name]), name


def release_weights(D=8, heads=2, depth=2, classes=3, P=16):
    """Random weights under the names and in the shapes of the authors' network."""
    hidden, width, weights = 8 * D // 3, 64, {}

    def add(name, *shape, bias=True):
        weights[f"{name}.weight"] = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(shape[0]) / 10

    torch.manual_seed(0)
    add("s_embedder.proj", D, 3 * P * P)
    add("t_embedder.mlp.0", D, 256)
    add("t_embedder.mlp.2", D, D)
    add("y_embedder.embedding_table", classes + 1, D, bias=False)
    for i in range(depth):
        for name, *shape in (("norm1", D), ("norm2", D), ("attn.qkv", 3 * D, D),
                             ("attn.q_norm", D // heads), ("attn.k_norm", D // heads),
                             ("mlp.w1", hidden, D), ("mlp.w3", hidden, D), ("mlp.w2", D, hidden)):
            add(f"blocks.{i}.{name}", *shape, bias=False)
        add(f"blocks.{i}.attn.proj", D, D)
        add(f"blocks.{i}.adaLN_modulation.0", 6 * D, D)
    widths = [3, width, 2 * width, 4 * width, 8 * width]
    for i in (1, 2, 3, 4):
        add(f"local_decoder.enc{i}.0", widths[i], widths[i - 1], 3, 3)
        add(f"local_decoder.up{i}", widths[i], widths[i], 2, 2)
        add(f"local_decoder.dec{i}.0", max(width, widths[i - 1]), 2 * widths[i], 3, 3)
    add("local_decoder.bottleneck.0", widths[4], widths[4] + D, 1, 1)
    add("local_decoder.out_conv", 3, width, 1, 1)
    return weights


def lightning(weights, average):
    """The file that the authors' training writes, with both."""
    state = {f"denoiser.{name}": weight for name, weight in weights.items()}
    state |= {f"ema_denoiser.{name}": weight for name, weight in average.items()}
    return {"state_dict": state, "global_step": 5, "epoch": 1}


def test_the_authors_weights_are_opened_from_every_file_they_come_in(tmp_path):
    """Lightning's with and without average, and a bare state dict; forbids one taken for the
    other.  The classes of ImageNet have their names, any other number has numbers."""
    raw, average = release_weights(), {k: w + 1 for k, w in release_weights().items()}
    torch.save(lightning(raw, average), tmp_path / "full.ckpt")
    torch.save(average, tmp_path / "bare.pt")
    (ema, info), (last, _), (bare, bare_info) = (
        common.load_model(tmp_path / "full.ckpt"), common.load_model(tmp_path / "full.ckpt", "cpu",
                                                                      False),
        common.load_model(tmp_path / "bare.pt"))
    assert torch.equal(ema.embed.weight, average["s_embedder.proj.weight"])
    assert torch.equal(last.embed.weight, raw["s_embedder.proj.weight"])
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), bare.parameters()))
    assert (info["step"], bare_info["step"]) == (5, 0)
    assert info["names"] == ["class 0", "class 1", "class 2"]
    assert (ema.config.image_size, ema.config.depth, ema.config.num_classes) == (256, 2, 3)
    torch.save(release_weights(D=4, heads=1, depth=1, classes=1000), tmp_path / "imagenet.pt")
    _, info = common.load_model(tmp_path / "imagenet.pt")
    assert info["names"][1] == "goldfish" and info["classes"][1] == "n01443537"


def test_the_authors_weights_are_sampled_and_trained_from(monkeypatch, tmp_path, two_classes,
                                                          capsys):
    """At another image size here; the settings are the paper's where no preset names others."""
    torch.save(lightning(release_weights(), release_weights()), tmp_path / "dip.ckpt")
    run(monkeypatch, sample, f"--ckpt {tmp_path}/dip.ckpt --class 'class 1' --num 1 --steps 2",
        f"--size 32 48 --device cpu --out {tmp_path}/s.png")
    assert "--size 32 48 is far from the 256 x 256 of the training" in capsys.readouterr().out
    run(monkeypatch, train, f"--init {tmp_path}/dip.ckpt --image-size 32 --data {two_classes}",
        f"--batch-size 2 --steps 1 --sample-every 0 --device cpu --out {tmp_path}/run")
    state = checkpoint(tmp_path / "run")
    expected, _ = common.load_model(tmp_path / "dip.ckpt")
    assert state["config"] == {**state["config"], "image_size": 32, "num_classes": 2,
                               "hidden_size": 8, "head_width": 64, "prediction": "v"}
    assert state["options"]["lr"] == 1e-4 and state["options"]["cooldown"] == 0
    weights = expected.state_dict()
    torch.testing.assert_close(state["model"]["blocks.1.mlp.out.weight"],
                               weights["blocks.1.mlp.out.weight"], rtol=0, atol=2e-4)
    assert f"{tmp_path}/dip.ckpt: 6.39 M weights" in capsys.readouterr().out
