"""
Chapter 6: from noise to images.

The law: an image is a function of (weights, seed, index, class) and of the settings that the user
names.  The integrator of that name draws it, step for step as in literal_sampling.py.
"""

import copy
import math
import os
import re
import shutil
import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import literal_sampling as literal
import numpy as np
import pytest
import torch
from commands import Background, checkpoint, error_line, run, run_ranks
from helpers import SMALL, awake
from hooks import draw_without_end, print_what_is_drawn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm

import sample
from dip import DiP
from sample import (SAMPLERS, draw_grid, find_checkpoint, find_class, generate, guided, load_model,
                    random_stream, to_uint8)
from train import Shapes

@pytest.fixture(scope="module")
def model():
    return awake(SMALL).eval()


# --- integrators --------------------------------------------------------------------------------


def bent(x, t):
    """A field without symmetries, for numbers and tensors."""
    return (t - 0.3) * x + t**2 * (1 - x**2 / 9) + 0.2


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=30)
@given(steps=st.integers(1, 12), x=st.floats(-3, 3), seed=st.integers(0, 99))
def test_every_sampler_is_its_formula(name, steps, x, seed):
    """Catches a grid that stops early, a slope at the wrong end, extrapolation backwards, noise of
    another scale, and a last step that draws noise or evaluates the model at t = 0."""
    normals = np.random.default_rng(seed).standard_normal(steps - 1).tolist()
    noise = {"noise": iter(normals).__next__} if name == "sde" else {}
    fast = SAMPLERS[name](bent, torch.tensor(x, dtype=torch.float64), steps, **noise)
    slow = literal.integrate(name, bent, x, literal.time_grid(steps), normals)
    assert fast.item() == pytest.approx(slow, rel=1e-9, abs=1e-9)


def test_the_noise_of_the_sde_is_a_standard_normal_by_default():
    """Two steps with v = 0 add noise of variance t dt = 1/2."""
    torch.manual_seed(0)
    x = SAMPLERS["sde"](lambda x, t: 0 * x, torch.zeros(100_000), 2)
    assert x.mean().abs() < 0.01 and x.var().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_the_error_falls_with_the_order_of_the_method(name, order):
    """dx/dt = t - x has the solution t - 1 + c exp(-t); half the step, error / 2^order."""
    def error(steps):
        start = torch.tensor(math.exp(-1), dtype=torch.float64)
        return SAMPLERS[name](lambda x, t: t - x, start, steps).item()       # it is 0 at t = 0

    assert error(80) / error(160) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("variance", [0.04, 4.0])
def test_euler_maruyama_keeps_the_marginals_of_a_gaussian(variance):
    """The field is E[eps - x_0 | x_t] for x_0 ~ N(0, variance): Eq. (16) with one eigenvalue.  All
    is linear, so x holds its coefficients on the independent normals drawn so far."""
    def velocity(x, t):
        return x * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)

    def error(steps):
        axes = iter(torch.eye(steps, dtype=torch.float64))   # start, then one for each noisy step
        x = SAMPLERS["sde"](velocity, next(axes), steps, noise=lambda: next(axes))
        return abs(x.square().sum().item() - variance)

    assert error(100) < 0.08 * variance
    assert error(100) / error(200) == pytest.approx(2, rel=0.15)     # weak order 1


# --- guidance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, costs", [
    (2.9, [3, 3, 3, 3, 3, 6, 6, 6, 6, 3]), (1.0, [3] * 10)])        # t = 1, 0.9, ..., 0.1
def test_guidance_acts_on_both_ends_of_its_interval_and_in_t_not_in_1_minus_t(scale, costs):
    """The interval is not symmetric, and its ends are times of the grid.  Scale 1 costs nothing."""
    batches = []

    def model(x, t, y):
        batches.append(len(x))
        return x

    model.config = SMALL
    field = guided(model, torch.zeros(3, dtype=torch.long), scale, (0.2, 0.5))
    SAMPLERS["euler"](field, torch.zeros(3, 3, 4, 4), 10)
    assert batches == costs


# --- images -------------------------------------------------------------------------------------

PLAIN = dict(seed=0, size=(16, 16), sampler="euler", steps=4, cfg=2.0, interval=(0.0, 1.0))


@pytest.mark.parametrize("change", [
    {}, {"seed": 7}, {"size": (8, 24)}, {"sampler": "heun"}, {"sampler": "sde"}, {"steps": 5},
    {"cfg": 1.0}, {"cfg": 0.5}, {"cfg": 4.0},
    {"sampler": "ab2", "interval": (0.1, 0.6), "steps": 6},
], ids=str)
def test_generate_draws_what_its_arguments_say(model, change):
    """Catches an argument that is forgotten, noise that is drawn for the batch as a whole, and
    halves of the doubled batch that are exchanged: image k depends on index k and its label."""
    arguments, labels, indices = PLAIN | change, [1, 4, 1], [5, 0, 17]
    images = generate(model, labels, indices, **arguments)
    for image, label, index in zip(images, labels, indices):
        rest = {key: value for key, value in arguments.items() if key != "seed"}
        stream = random_stream(arguments["seed"], "sample", index)
        torch.testing.assert_close(image, literal.sample(model, label, stream, **rest),
                                   rtol=1e-5, atol=1e-5)
    assert (images[0] - images[2]).abs().max() > 0.1         # one label, two indices
    if change:
        other = generate(model, labels, indices, **PLAIN)
        assert images.shape != other.shape or (images - other).abs().max() > 1e-3


def test_generate_takes_100_euler_steps_without_guidance_by_default(model):
    """Over the first indices.  Catches also a graph for gradients that fills the memory."""
    ours = generate(model, [1])
    full = dict(seed=0, size=(16, 16), sampler="euler", steps=100, cfg=1.0, interval=(0, 1))
    assert torch.equal(ours, generate(model, [1], [0], **full))
    assert not ours.requires_grad and next(model.parameters()).requires_grad


@pytest.mark.parametrize("change", [
    {"labels": torch.tensor([1, 4], dtype=torch.uint8), "indices": torch.tensor([5, 2])},
    {"labels": (np.int64(1), 4), "indices": (np.int32(5), np.uint8(2)), "size": 16},
    {"labels": np.array([1, 4]), "indices": np.array([5, 2]), "size": np.array([16, 16])},
    {"seed": np.int64(3), "steps": np.int64(4), "cfg": np.float32(2), "size": np.int64(16),
     "interval": np.array([0.0, 1.0])},
], ids=range(4))
def test_numbers_may_come_from_lists_numpy_or_torch(model, change):
    """Catches numpy's 5 that begins from other noise than Python's 5."""
    plain = PLAIN | {"labels": [1, 4], "indices": [5, 2], "seed": 3}
    assert torch.equal(generate(model, **plain), generate(model, **plain | change))


def test_streams_differ_in_every_part_of_their_key_and_are_the_same_everywhere():
    """Recorded: sample 1 of seed 0 begins with this number on any machine, in any process."""
    keys = [(0, "sample", 1), (1, "sample", 1), (0, "train", 1), (0, "sample", 2)]
    draws = [torch.randn((), generator=random_stream(*key)).item() for key in keys]
    assert draws == pytest.approx([-0.5516037, -0.1439345, -0.067245, -0.2877698], abs=1e-6)
    assert torch.randn((), generator=random_stream(*keys[0])).item() == draws[0]


def test_watch_sees_every_evaluation_and_the_last_prediction_is_the_sample(model):
    """x_t - t v is the predicted clean image; Euler's last step goes there."""
    seen = []
    x = generate(model, [1, 2], [0, 1], steps=6, watch=lambda t, x, v: seen.append((t, x, v)))
    assert [t for t, _, _ in seen] == pytest.approx([1, 5/6, 4/6, 3/6, 2/6, 1/6])
    t, x_t, v = seen[-1]
    torch.testing.assert_close(x_t - t * v, x)
    assert x_t.dtype == v.dtype == torch.float32


LABELS = "must be whole numbers from 0 to 5, the null class; find_class() turns a name into one"


@pytest.mark.parametrize("change, answer", [
    *[({"labels": labels}, LABELS) for labels in (
        ["striped disc"], [6], [-1], [1.0], 1, None, [[0, 1], [2, 3]], torch.tensor([[0], [1]]),
        np.array([0, 9] * 100))],
    ({"sampler": "ddim"}, "sampler='ddim' is not one of: euler, heun, ab2, sde"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"cfg": math.nan}, "cfg=nan finite"),
    ({"cfg": math.inf}, "cfg=inf finite"),
    ({"interval": (0.1, 1.5)}, "interval=(0.1, 1.5) must be"),
    ({"interval": (0.9, 0.1)}, "interval=(0.9, 0.1) must be (low, high) with 0 <= low <= high"),
    ({"interval": (math.nan, 1)}, "interval=(nan, 1) must be"),
    ({"size": (16, 17)}, "size=17 is not a multiple of patch_size=4; nearest that fit: 16, 20"),
    ({"size": -16}, "size=-16 is not a multiple of patch_size=4; nearest that fit: 4"),
    ({"cfg": 1e38, "sampler": "sde"}, "the images diverged by t = "),
    ({"cfg": 1e38, "steps": 1}, "diverged by t = 0, step 1 of 1; try a cfg below 1e+38"),
    # in floats, (1 - 0.93) * 100 is a little less than 7
    ({"cfg": 1e38, "steps": 100, "interval": (0, 0.94)}, "diverged by t = 0.93, step 7 of 100"),
], ids=str)
def test_generate_refuses(model, change, answer):
    """In one line that names the argument, as a notebook needs it; also images that diverge."""
    with pytest.raises((ValueError, FloatingPointError)) as refused:
        generate(model, **dict(labels=[1, 5], steps=2) | change)
    line = str(refused.value)
    assert answer in line and "\n" not in line and len(line) < 300


@pytest.mark.parametrize("bias", [math.nan, 1e6])
def test_images_that_are_not_numbers_or_are_far_off_have_diverged(model, bias):
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.output.head.out.bias, bias)
    with pytest.raises(FloatingPointError, match="diverged by t = 0.5, step 1 of 2"):
        generate(broken, [1], steps=2)


def test_pixels_are_rounded_and_clamped_and_keep_their_place():
    """Catches truncation, which darkens every picture by half a level."""
    levels = torch.arange(256) / 127.5 - 1
    for off in (-0.4, 0.4):
        x = levels.repeat(3, 1)[None, :, None, :] + off / 127.5
        assert np.array_equal(to_uint8(x)[0, 0, :, 0], np.arange(256))
    assert to_uint8(torch.full((1, 3, 1, 1), -9.0)).item(0) == 0
    assert to_uint8(torch.full((1, 3, 1, 1), 9.0)).item(0) == 255
    x = torch.zeros(2, 3, 4, 5)
    x[1, 2, 3, 4] = 1
    assert np.argwhere(to_uint8(x) == 255).tolist() == [[1, 3, 4, 2]]        # (B, H, W, 3)


# --- pictures: which image stands where ---------------------------------------------------------


def cells(sheet, rows, columns, H=96, W=96):
    """The images of a grid (rows, columns, H, W, 3).  They end 4 pixels from its lower right."""
    picture = np.asarray(sheet.convert("RGB"))[-rows * (H + 4):, -columns * (W + 4):]
    picture = picture.reshape(rows, H + 4, columns, W + 4, 3)
    return picture[:, :H, :, :W].transpose(0, 2, 1, 3, 4)


def colours(path, rows, columns):
    """The colour of each image of a grid of flat images."""
    return cells(Image.open(path), rows, columns)[:, :, 48, 48].tolist()


def colour(label, index):
    """The colour of the image that `flat_images` draws."""
    return [10 * label, 3 * index, 200]


@pytest.fixture
def flat_images(monkeypatch):
    """sample.generate replaced: an image has one colour, of its label and index, and comes in a
    straight line from grey.  Returns the list of its calls, as (labels, indices, settings)."""
    calls = []

    def draw(model, labels, indices, watch=None, **how):
        calls.append((list(labels), list(indices), how))
        flat = torch.tensor([colour(*pair) for pair in zip(labels, indices)])
        x = (flat / 127.5 - 1)[:, :, None, None].expand(-1, -1, *(how["size"] or (16, 16)))
        for k in range(how["steps"] if watch else 0):
            t = 1 - k / how["steps"]
            watch(t, x * (1 - t), -x)
        return x

    monkeypatch.setattr(sample, "generate", draw)
    return calls


@settings(max_examples=30)
@example(n=20, names=2, H=9, W=9, headers=False)
@given(n=st.integers(1, 23), names=st.integers(1, 3), H=st.integers(1, 40), W=st.integers(1, 40),
       headers=st.booleans())
def test_a_grid_shows_every_pixel_as_a_square_in_the_order_of_the_images(n, names, H, W, headers):
    """A class of more than ten images goes on in the next row.  Catches smoothing, height and width
    exchanged, and a missing name or header."""
    images = np.random.default_rng(n).integers(0, 256, (names * n, H, W, 3), dtype=np.uint8)
    columns, rows = min(n, 10), -(-n // 10)
    sheet = draw_grid(images, ["name"] * names, ["x"] * columns if headers else None)
    zoom = max(1, round(96 / max(H, W)))
    shown = cells(sheet, names * rows, columns, H * zoom, W * zoom)
    for k, image in enumerate(images):
        large = np.kron(image, np.ones((zoom, zoom, 1), dtype=np.uint8))
        assert np.array_equal(shown[k // n * rows + k % n // 10, k % n % 10], large)
    left, top = sheet.width - columns * (W * zoom + 4), sheet.height - names * rows * (H * zoom + 4)
    margin = np.asarray(sheet) < 128
    assert margin[:, :left].any() and margin[:top, left:].any() == headers
    assert top == (24 if headers else 4)                     # no empty row


def test_every_row_has_its_own_name_and_every_column_its_header_in_its_middle():
    """Catches the first class's name beside every row, and headers that drift off their columns."""
    images = np.zeros((20, 9, 9, 3), dtype=np.uint8)         # of 99 x 99 pixels in the grid
    one, two = (np.asarray(draw_grid(images, names, ["x"] * 10))
                for names in (["disc", "ring"], ["ring", "disc"]))
    assert np.array_equal(one[-103:], two[-206:-103]) and not np.array_equal(one[-103:], two[-103:])
    headers = one[:24, -1030:].reshape(24, 10, 103, 3)
    assert (headers == headers[:, :1]).all()
    twenty = np.asarray(draw_grid(images, ["disc"]))         # two rows of one class: one name
    assert (twenty[-103:, :-1030] == 255).all()


@settings(max_examples=20)
@given(name=st.text() | st.text(alphabet="Wi犬\n\udcff", min_size=20), W=st.integers(1, 200),
       n=st.integers(1, 30))
@example(name="W" * 99, W=20, n=30)
def test_a_label_is_no_wider_than_the_images_whatever_its_letters(name, W, n):
    """Catches a sheet of 20,000 pixels, a class name that fails a finished command, and the width
    of all images of a class where a row holds ten."""
    sheet = draw_grid(np.zeros((n, 200, W, 3), dtype=np.uint8), [name])
    images = min(n, 10) * (W + 4)
    assert sheet.width <= 13 + images + max(images, 16)      # 16: one letter


@pytest.mark.parametrize("words, classes, n", [
    ("--class 7 'dotted ring' --per-class 3 --batch 2", [7, 3], 3), ("", range(10), 8)])
def test_a_row_of_the_grid_is_a_class_and_the_index_counts_through_the_grid(
        monkeypatch, trained, tmp_path, flat_images, capsys, words, classes, n):
    """Catches labels and indices in another order than the images, whatever --batch, and names of
    other classes beside them."""
    named = []
    monkeypatch.setattr(sample, "draw_grid", lambda images, names: named.extend(
        names) or draw_grid(images, names))
    run(monkeypatch, sample, f"--ckpt {trained} --out {tmp_path}/g.png", words)
    assert named == [Shapes.names[c] for c in classes]
    assert f": {len(classes) * n} images, {', '.join(named)}\n" in capsys.readouterr().out
    assert colours(tmp_path / "g.png", len(classes), n) == [
        [colour(c, n * row + j) for j in range(n)] for row, c in enumerate(classes)]
    assert max(len(labels) for labels, _, _ in flat_images) == (2 if words else 32)


@pytest.mark.parametrize("K, drawn", [(3, [0, 1, 2]), (12, list(range(10)))])
def test_at_most_ten_classes_are_drawn_and_a_folder_names_one(monkeypatch, tmp_path, flat_images,
                                                              K, drawn):
    model = DiP(SMALL.replace(num_classes=K))
    torch.save(dict(config=asdict(model.config), step=1, options={}, model=model.state_dict(),
                    ema=model.state_dict(), classes=[f"n{k}" for k in range(K)],
                    names=[f"bird {k}" for k in range(K)]), tmp_path / "w.pt")
    for words, expected in (("", drawn), ("--class n2", [2]), ("--class 'bird 1'", [1])):
        flat_images.clear()
        run(monkeypatch, sample, f"--ckpt {tmp_path}/w.pt --per-class 1 --out {tmp_path}/g.png",
            words)
        assert [label for labels, _, _ in flat_images for label in labels] == expected


@pytest.mark.parametrize("words, compiled, expected", [
    ("", [], dict(seed=0, size=None, sampler="euler", steps=100, cfg=2.9, interval=(0.03, 0.89))),
    ("--seed 3 --size 8 24 --sampler heun --steps 7 --cfg 4 --interval 0.2 0.4 --compile", [DiP],
     dict(seed=3, size=[8, 24], sampler="heun", steps=7, cfg=4.0, interval=[0.2, 0.4]))],
    ids=["defaults", "all options"])
def test_every_option_of_the_command_reaches_generate(monkeypatch, trained, tmp_path, flat_images,
                                                      words, compiled, expected):
    """Its defaults are the paper's: 100 Euler steps, guidance 2.9 for 1 - t in [0.11, 0.97]."""
    models = []
    monkeypatch.setattr(sample, "compile_blocks", lambda model: models.append(type(model)))
    for out in ("--class 1 --per-class 1 --out g.png", "--num-samples 1 --out g.npz"):
        monkeypatch.chdir(tmp_path)
        run(monkeypatch, sample, f"--ckpt {trained}", words, out)
    with np.load("g.npz") as file:
        assert file["arr_0"].shape == (1, *(expected["size"] or (16, 16)), 3)
    assert [how for _, _, how in flat_images] == [expected] * 2 and models == compiled * 2


def test_a_picture_is_drawn_by_one_process_alone(monkeypatch, trained, tmp_path, flat_images):
    """Under torchrun.  Catches ranks that draw and write the same picture."""
    monkeypatch.setattr(sample, "on_rank_0", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(sample.dist, "get_rank", lambda: 1)
    run(monkeypatch, sample, f"--ckpt {trained} --class 1 --out {tmp_path}/g.png")
    run(monkeypatch, sample, f"--ckpt {trained} --save-weights {tmp_path}/w.pt")
    assert not flat_images and not os.listdir(tmp_path)


@pytest.mark.parametrize("batch, rows, columns", [(2, 1, 2), (32, 2, 3)])
def test_a_trajectory_is_a_strip_of_predictions_and_a_film_of_the_first_batch(
        monkeypatch, trained, tmp_path, flat_images, batch, rows, columns):
    """x_t - t v of a flat image is that image at every t.  Catches x_t + t v, x_t itself, and
    pictures of the last batch instead of the first.  The strip is densest near t = 1."""
    headers = []
    monkeypatch.setattr(sample, "draw_grid", lambda images, names, above=None: headers.append(
        above) or draw_grid(images, names, above))
    run(monkeypatch, sample, f"--ckpt {trained} --class 7 4 --per-class 3 --steps 96 --trajectory",
        f"--batch {batch} --out {tmp_path}/g.png")
    assert headers[1] == [f"t={1 - k / 96:.2f}" for k in (0, 1, 5, 11, 19, 29, 42, 57, 75, 95)]
    assert colours(tmp_path / "g-trajectory.png", 1, 10) == [[colour(7, 0)] * 10]
    film = Image.open(tmp_path / "g-trajectory.gif")
    ends = np.array([[colour(7, j) for j in (0, 1, 2)], [colour(4, j) for j in (3, 4, 5)]])
    assert film.n_frames == 33
    for k in range(33):                                      # every third step, then the images
        film.seek(k)
        t = 1 - k / 32
        shown = cells(film, rows, columns)[:, :, 48, 48]
        assert np.abs(shown - 127.5 * t - ends[:rows, :columns] * (1 - t)).max() <= 4
    assert film.info["duration"] == 2500                     # the last frame stays
    assert film.info["loop"] == 0                            # and then it begins again


def test_a_default_name_says_what_the_picture_shows():
    """The classes and the seed: another command makes another file."""
    for words, name in ((["--class", "1"], "samples-class1-seed0.png"),
                        (["--class", "7", "dotted ring", "--seed", "3"],
                         "samples-class7-classdotted-ring-seed3.png"), ([], "samples-seed0.png")):
        assert str(sample.parse(words).out) == name
    long = sample.parse(["--class", *["\u00fc" * 40] * 9, "--seed", "7"]).out
    assert len(long.name.encode()) < 200 and long.name.endswith("-seed7.png")


@pytest.mark.parametrize("sampler, total", [("euler", 6), ("heun", 10)])
def test_the_bar_counts_evaluations(monkeypatch, trained, tmp_path, capsys, sampler, total):
    """Of all batches.  Catches a bar that stands at 0/1 for an hour, and one that ends early."""
    monkeypatch.setattr(sample, "tqdm", partial(tqdm, mininterval=0))
    for words in (f"--class 1 --per-class 4 --out {tmp_path}/g.png",
                  f"--num-samples 4 --out {tmp_path}/g.npz"):
        run(monkeypatch, sample, f"--ckpt {trained} --steps 3 --batch 2 --sampler {sampler}", words)
        counts = re.findall(r"(\d+)/(\d+) \[", capsys.readouterr().err)
        assert list(dict.fromkeys(counts)) == [(str(k), str(total)) for k in range(total + 1)]


# --- export -------------------------------------------------------------------------------------

EXPORT = "--num-samples 23 --steps 3 --batch 5 --device cpu"


def export(monkeypatch, ckpt, out, *more):
    run(monkeypatch, sample, EXPORT, "--ckpt", ckpt, "--out", out, *more)
    return np.load(out)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The file that one process exports without interruption."""
    out = tmp_path_factory.mktemp("export") / "whole.npz"
    with pytest.MonkeyPatch.context() as patch:
        return dict(export(patch, trained, out))


def assert_is_export(path, expected):
    with np.load(path) as file:
        assert all(np.array_equal(file[key], expected[key]) for key in ("arr_0", "arr_1"))


def test_the_export_is_labelled_as_it_is_drawn_and_takes_the_classes_in_turn(
        monkeypatch, trained, tmp_path, flat_images):
    """Label i mod K.  Catches uneven counts, class order, which spoils Inception Score, and images
    in another order than their labels.  An export that died as it began is begun again."""
    for module, step in ((np.lib.format, "open_memmap"), (Path, "write_bytes")):
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(module, step, None)
            export(patch, trained, tmp_path / "s.npz")
    file = export(monkeypatch, trained, tmp_path / "s.npz")
    assert file["arr_1"].tolist() == [i % 10 for i in range(23)]
    assert file["arr_0"].shape == (23, 16, 16, 3) and file["arr_0"].dtype == np.uint8
    assert file["arr_0"][:, 0, 0].tolist() == [colour(i % 10, i) for i in range(23)]
    assert [len(labels) for labels, _, _ in flat_images] == [5, 5, 5, 5, 3]
    assert os.listdir(tmp_path) == ["s.npz"]


def test_an_interrupted_export_continues_with_its_own_settings_and_weights_only(
        monkeypatch, trained, tmp_path, exported):
    """Catches a file that is half of one model and half of another, and batches drawn twice."""
    weights, out, drawn = tmp_path / "w.pt", tmp_path / "s.npz", []
    shutil.copy(find_checkpoint(trained), weights)

    def until_the_second(*arguments, **how):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return generate(*arguments, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "generate", until_the_second)
        export(patch, weights, out, "--device cpu:0")        # which is the same device
    refused = pytest.raises(ValueError, match="unfinished export with other settings; delete it")
    for words in ("--seed 1", "--steps 4", "--batch 6", "--no-ema", "--cfg 1", "--size 8 8",
                  "--num-samples 24", "--interval 0.5 0.5", "--sampler ab2", f"--ckpt {trained}"):
        with refused:
            export(monkeypatch, weights, out, words)
    settings = tmp_path / "s.npz.parts" / "settings.json"
    text = settings.read_text()
    settings.write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    with refused:                            # the rest was drawn on another device
        export(monkeypatch, weights, out)
    settings.write_text(text)
    saved = weights.stat()
    weights.touch()
    with refused:                            # the run went on
        export(monkeypatch, weights, out)
    os.utime(weights, ns=(saved.st_atime_ns, saved.st_mtime_ns))
    marks = settings.with_name("done").read_bytes()
    settings.with_name("done").write_bytes(marks[:-1])
    with pytest.raises(ValueError, match="done is damaged; delete"):     # or black images
        export(monkeypatch, weights, out)
    settings.with_name("done").write_bytes(marks)
    monkeypatch.setattr(sample, "generate", lambda *arguments, **how: drawn.append(
        arguments) or generate(*arguments, **how))
    export(monkeypatch, weights, out)
    assert_is_export(out, exported)
    assert len(drawn) == 5                                   # none twice
    with pytest.raises(ValueError, match="s.npz exists; delete it, or choose another name"):
        export(monkeypatch, weights, out, "--seed 1")
    assert_is_export(out, exported)


def test_a_folder_that_is_no_export_is_not_deleted(monkeypatch, trained, tmp_path):
    (tmp_path / "s.npz.parts").mkdir()
    (tmp_path / "s.npz.parts" / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds mine.txt, and the export would delete that"):
        export(monkeypatch, trained, tmp_path / "s.npz")
    assert os.listdir(tmp_path) == ["s.npz.parts"]


def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(monkeypatch, trained,
                                                                        tmp_path, flat_images):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "g.png", "/proc/g.png"):
        assert error_line(monkeypatch, sample, f"--ckpt {trained} --class 1 --out {out}")
    assert not flat_images


def test_a_batch_is_on_the_disk_before_it_is_marked_as_done(monkeypatch, trained, tmp_path):
    """Catches black images in a finished file, after a crash between the two, and bytes that are
    still in Python's buffer."""
    synced, fsync = [], os.fsync

    def note(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.name == "images.npy":
            synced.append(int(np.load(path).any(axis=(1, 2, 3)).sum()))
        if path.name == "done":
            synced.append(path.read_bytes().rstrip(b"\0"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    export(monkeypatch, trained, tmp_path / "s.npz")
    assert synced == [5, b"\1", 10, b"\1" * 2, 15, b"\1" * 3, 20, b"\1" * 4, 23, b"\1" * 5]


def test_any_number_of_processes_exports_the_file_of_one(trained, tmp_path, exported):
    """Bit for bit.  Catches ranks that draw all batches, ranks that each look for themselves what
    is left to do, and a file that is packed before a slow rank has drawn its part."""
    ranks = run_ranks(2, "sample", f"{EXPORT} --ckpt {trained} --out {tmp_path}/two.npz",
                      first=print_what_is_drawn)
    ends = [rank.end() for rank in ranks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "".join(text for _, text, _ in ends).count("wrote ") == 1
    assert [re.findall(r"drawn: (\d+)", text) for _, text, _ in ends] == [
        ["0", "10", "20"], ["5", "15"]]
    assert_is_export(tmp_path / "two.npz", exported)
    assert os.listdir(tmp_path) == ["two.npz"]


def test_of_two_exports_into_one_file_the_second_is_refused_while_the_first_lives(
        monkeypatch, trained, tmp_path, exported):
    """Catches two processes that write one array.  Ctrl-C ends the first with the code of shells
    and no traceback, and the second goes on from there."""
    out = tmp_path / "s.npz"
    first = Background("sample", EXPORT, f"--ckpt {trained} --out {out}", first=draw_without_end)
    while first.is_alive() and not (tmp_path / "s.npz.parts" / "settings.json").exists():
        time.sleep(0.05)
    line = error_line(monkeypatch, sample, EXPORT, f"--ckpt {trained} --out {out}")
    assert "another process is writing there; wait until it ends, or choose another" in line
    os.kill(first.pid, signal.SIGINT)
    code, _, errors = first.end()
    assert code == 130 and "Traceback" not in errors
    export(monkeypatch, trained, out)
    assert_is_export(out, exported)


# --- which weights ------------------------------------------------------------------------------


def test_averaged_and_last_weights_are_told_apart(monkeypatch, trained, capsys):
    """Catches --no-ema without effect, in load_model and in the command."""
    state, seen = checkpoint(trained), []
    assert not torch.equal(state["ema"]["embed.weight"], state["model"]["embed.weight"])
    monkeypatch.setattr(sample, "sample_grid", lambda model, *_: seen.append(model))
    for word, key, printed in (("", "ema", "EMA"), ("--no-ema", "model", "last")):
        run(monkeypatch, sample, f"--ckpt {trained} --class 1", word)
        assert f"step 1, {printed} weights" in capsys.readouterr().out
        for model in (load_model(trained, ema=key == "ema")[0], seen[-1]):
            assert all(torch.equal(weight, state[key][name])
                       for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="it has the averaged weights alone; leave out --no-ema"):
        load_model(sample.OUR_WEIGHTS, ema=False)


def test_a_loaded_model_no_longer_needs_its_file(trained, tmp_path):
    """Catches weights that are mapped from a file which another command overwrites."""
    path = tmp_path / "w.pt"
    shutil.copy(find_checkpoint(trained), path)
    model, _ = load_model(path)
    before = [p.clone() for p in model.parameters()]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_the_newest_run_is_sampled_and_of_it_the_last_step(monkeypatch, trained, tmp_path):
    """Of three folders, whatever their names.  Catches the oldest, and the first."""
    monkeypatch.chdir(tmp_path)
    for name, step, modified in (("c", 9, 1000), ("b/deep", 3, 2000), ("b/deep", 4, 3000),
                                 ("a", 7, 2500)):
        path = Path("runs", name, f"ckpt-{step:08d}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(find_checkpoint(trained), path)
        os.utime(path, (modified, modified))
    newest = Path("runs/b/deep/ckpt-00000004.pt")
    assert find_checkpoint() == find_checkpoint("runs") == newest
    assert find_checkpoint("runs/a") == path
    newest.with_name("ckpt-00000005.pt").write_bytes(b"half a file")
    newest.with_name("ckpt-best.pt").write_bytes(b"a user's own copy")
    assert find_checkpoint() == newest
    Path("elsewhere").mkdir()
    shutil.copy(newest, "elsewhere")
    os.utime("elsewhere/ckpt-00000004.pt", (5e9, 5e9))      # newer than the one just written
    Path("runs/linked").symlink_to("../elsewhere")
    assert find_checkpoint() == Path("runs/linked/ckpt-00000004.pt")


def test_without_a_run_our_own_weights_are_used_and_the_command_says_so(
        monkeypatch, trained, tmp_path, flat_images, capsys):
    """--save-weights writes them in bfloat16, and load_model opens them."""
    monkeypatch.chdir(tmp_path)
    ours = tmp_path / "assets" / "dip-nano.pt"
    run(monkeypatch, sample, f"--ckpt {trained} --save-weights {ours}")
    assert f"wrote {ours}" in capsys.readouterr().out and not flat_images
    before = ours.read_bytes()
    line = error_line(monkeypatch, sample, f"--ckpt {trained} --save-weights {ours}")
    assert f"{ours} exists; delete it, or choose another name" in line
    assert ours.read_bytes() == before
    weights = torch.load(ours, weights_only=True)["ema"]
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    monkeypatch.setattr(sample, "OUR_WEIGHTS", ours)
    run(monkeypatch, sample, "--class 1 --per-class 1")
    assert "the small model's weights in assets/" in capsys.readouterr().out
    (model, info), (before, same) = load_model(ours), load_model(trained)
    for name, weight in before.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), model.state_dict()[name])
        assert model.state_dict()[name].dtype == torch.float32
    assert model.config == before.config
    assert info == same | {"options": {"model": "DiP-Nano/8"}}


# --- names --------------------------------------------------------------------------------------


def test_a_class_is_found_by_index_folder_or_name():
    """An index comes first, also where folders are called 0, 1, 10 and 2."""
    classes, names = ["n01443537", "n02012849", "n03126707"], ["goldfish", "crane", "crane"]
    for query, index in (("0", 0), ("n02012849", 1), ("Goldfish", 0)):
        assert find_class(query, classes, names) == index
    assert find_class("zebra finch", ["zebra_finch"], ["zebra_finch"]) == 0
    digits = ["0", "1", "10", "2"]                           # sorted as folder names are
    assert [find_class(query, digits, digits) for query in ("2", "10")] == [2, 2]
    with pytest.raises(ValueError, match=r"matches several classes; give an index: \[1, 2\]"):
        find_class("crane", classes, names)
    with pytest.raises(ValueError, match="unknown; did you mean 'goldfish', or an"):
        find_class("goldfisch", classes, names)
    for query in ("\u00b2", "xyzzy", "3"):                   # a digit that is no number
        with pytest.raises(ValueError, match="'goldfish', 'crane', 'crane', or an index from 0 to"):
            find_class(query, classes, names)
