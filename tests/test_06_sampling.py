"""
Chapter 6: from noise to images.

The law: an image is a function of (weights, seed, index, class) and of the settings that the user
names.  The integrator of that name draws it, step for step as in literal_sampling.py.
"""

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
from commands import Background, checkpoint, error_line, free_port, run
from helpers import SMALL, awake
from hooks import print_what_is_drawn, wait_for_go
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm

import sample
import train
from dip import DiP
from sample import (SAMPLERS, draw_grid, find_checkpoint, find_class, generate, guided, load_model,
                    random_stream, to_uint8)

ORDERS = {"euler": 1, "heun": 2, "ab2": 2}
LITERAL = {"euler": literal.euler, "heun": literal.heun, "ab2": literal.adams_bashforth}


@pytest.fixture(scope="module")
def model():
    return awake(SMALL).eval()


# --- integrators --------------------------------------------------------------------------------


def bent(x, t):
    """A field without symmetries, for numbers and tensors."""
    return (t - 0.3) * x + t**2 * (1 - x**2 / 9) + 0.2


@pytest.mark.parametrize("name", LITERAL)
@given(steps=st.integers(1, 12), x=st.floats(-3, 3))
def test_every_ode_sampler_is_its_formula(name, steps, x):
    """Catches a grid that stops early, a slope at the wrong end, and extrapolation backwards."""
    fast = SAMPLERS[name](bent, torch.tensor(x, dtype=torch.float64), steps)
    slow = LITERAL[name](bent, x, literal.time_grid(steps))
    assert fast.item() == pytest.approx(slow, rel=1e-9, abs=1e-9)


def test_heun_with_one_step_is_euler():
    """Catches a last step that evaluates the model at t = 0, which training hardly ever visits."""
    x = torch.tensor(0.7)
    assert SAMPLERS["heun"](bent, x, 1) == SAMPLERS["euler"](bent, x, 1)


@given(steps=st.integers(1, 12), x=st.floats(-3, 3), seed=st.integers(0, 99))
def test_euler_maruyama_is_its_formula(steps, x, seed):
    """Catches noise of another scale, as sqrt(dt), and noise in the last step."""
    normals = np.random.default_rng(seed).standard_normal(steps).tolist()
    left = iter(normals)
    fast = SAMPLERS["sde"](bent, torch.tensor(x, dtype=torch.float64), steps, lambda: next(left))
    slow = literal.euler_maruyama(bent, x, literal.time_grid(steps), normals)
    assert fast.item() == pytest.approx(slow, rel=1e-9, abs=1e-9)
    assert len(list(left)) == 1                              # one for each step except the last


def test_the_noise_of_the_sde_is_a_standard_normal_by_default():
    """Two steps with v = 0 add noise of variance t dt = 1/2."""
    torch.manual_seed(0)
    x = SAMPLERS["sde"](lambda x, t: 0 * x, torch.zeros(100_000), 2)
    assert x.mean().abs() < 0.01 and x.var().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_order_of_the_method(name):
    """dx/dt = cos 3t - x has a closed form; halving the step divides the error by 2^order."""
    def solution(t, c):
        return (math.cos(3 * t) + 3 * math.sin(3 * t)) / 10 + c * math.exp(-t)

    def error(steps):
        start = torch.tensor(solution(1, 0.7), dtype=torch.float64)
        x = SAMPLERS[name](lambda x, t: math.cos(3 * t) - x, start, steps)
        return abs(x.item() - solution(0, 0.7))

    assert error(80) / error(160) == pytest.approx(2 ** ORDERS[name], rel=0.1)


def gaussian_velocity(variance):
    """E[eps - x_0 | x_t] for x_0 ~ N(0, variance): Eq. (16) with one eigenvalue."""
    return lambda x, t: x * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)


@pytest.mark.parametrize("variance", [0.04, 1.0, 4.0])
def test_euler_maruyama_keeps_the_marginals_of_a_gaussian(variance):
    """Field and sampler are linear, so the variance of the result is computed, not estimated: x
    holds its coefficients on the independent normals drawn so far."""
    def error(steps):
        axes = iter(torch.eye(steps, dtype=torch.float64))   # start, then one for each noisy step
        x = SAMPLERS["sde"](gaussian_velocity(variance), next(axes), steps,
                            noise=lambda: next(axes))
        return abs(x.square().sum().item() - variance)

    assert error(400) < 0.02 * variance
    assert error(200) / error(400) == pytest.approx(2, rel=0.15)     # weak order 1


# --- guidance -----------------------------------------------------------------------------------


class Recorder:
    """A stand-in for the network that records its inputs: v = y everywhere."""

    config = SMALL

    def __init__(self):
        self.batches, self.times = [], []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        self.times += t.tolist()
        return torch.ones_like(x) * y[:, None, None, None]


@example(scale=1.0, label=2, t=0.5)
@given(scale=st.floats(0, 8), label=st.integers(0, 4), t=st.floats(0, 1))
def test_guidance_extrapolates_from_no_label_through_the_label(scale, label, t):
    """v_0 + scale (v_y - v_0) at the time of the step.  Catches label and null class exchanged, and
    a scale of 1 that costs two evaluations."""
    recorder = Recorder()
    v = guided(recorder, torch.tensor([label]), scale)(torch.zeros(1, 3, 4, 4), t)
    expected = label if scale == 1 else 5 + scale * (label - 5)
    torch.testing.assert_close(v, torch.full_like(v, expected))
    assert recorder.batches == ([1] if scale == 1 else [2])
    assert recorder.times == pytest.approx([t] * len(recorder.times))


def test_guidance_acts_on_both_ends_of_its_interval_and_in_t_not_in_1_minus_t():
    """The interval is not symmetric, and its ends are times of the grid."""
    recorder = Recorder()
    field = guided(recorder, torch.zeros(3, dtype=torch.long), 2.9, (0.2, 0.5))
    SAMPLERS["euler"](field, torch.zeros(3, 3, 4, 4), 10)
    assert recorder.batches == [3, 3, 3, 3, 3, 6, 6, 6, 6, 3]        # t = 1, 0.9, ..., 0.1


# --- images -------------------------------------------------------------------------------------

PLAIN = dict(seed=0, size=(16, 16), sampler="euler", steps=4, cfg=2.0, interval=(0.0, 1.0))


@pytest.mark.parametrize("change", [
    {}, {"seed": 7}, {"size": (8, 24)}, {"sampler": "heun"}, {"sampler": "ab2"}, {"sampler": "sde"},
    {"steps": 5}, {"cfg": 1.0}, {"cfg": 4.0}, {"interval": (0.3, 0.5)}, {"interval": (0.5, 0.8)},
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
    """Over the first indices.  Catches also a graph for gradients that is kept: it fills the
    memory."""
    ours = generate(model, [1, 2])
    full = dict(seed=0, size=(16, 16), sampler="euler", steps=100, cfg=1.0, interval=(0, 1))
    assert torch.equal(ours, generate(model, [1, 2], [0, 1], **full))
    assert not ours.requires_grad and next(model.parameters()).requires_grad


@pytest.mark.parametrize("change", [
    {"labels": torch.tensor([1, 4])}, {"labels": torch.tensor([1, 4], dtype=torch.uint8)},
    {"labels": np.array([1, 4])}, {"labels": (np.int64(1), 4)}, {"indices": np.array([5, 2])},
    {"indices": torch.tensor([5, 2])}, {"indices": (np.int32(5), np.uint8(2))},
    {"seed": np.int64(3)}, {"size": 16}, {"size": np.int64(16)}, {"size": [16, 16]},
    {"size": np.array([16, 16])}, {"steps": np.int64(4)}, {"cfg": np.float32(2)},
    {"interval": np.array([0.0, 1.0])},
], ids=str)
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
    start = torch.stack([torch.randn(3, 16, 16, generator=random_stream(0, "sample", i))
                         for i in (0, 1)])
    assert torch.equal(seen[0][1], start)
    t, x_t, v = seen[-1]
    torch.testing.assert_close(x_t - t * v, x)
    assert x_t.dtype == v.dtype == torch.float32


LABELS = "must be whole numbers from 0 to 5, the null class; find_class() turns a name into one"


@pytest.mark.parametrize("change, answer", [
    *[({"labels": labels}, LABELS) for labels in (
        ["striped disc"], "1", [6], [-1], [1.0], [None], 1, None, [[0, 1], [2, 3]],
        torch.tensor([[0], [1]]), torch.tensor([0.5]), np.array([0, 9] * 100), {})],
    ({"sampler": "ddim"}, "sampler='ddim' is not one of: euler, heun, ab2, sde"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"steps": -1}, "steps=-1 must be at least 1"),
    ({"cfg": math.nan}, "cfg=nan finite"),
    ({"cfg": math.inf}, "cfg=inf finite"),
    ({"interval": (0.9, 0.1)}, "interval=(0.9, 0.1) must be (low, high) with 0 <= low <= high"),
    ({"interval": (math.nan, 1)}, "interval=(nan, 1) must be"),
    ({"size": (16, 17)}, "size=17 is not a multiple of patch_size=4; nearest that fit: 16, 20"),
    ({"size": 0}, "size=0 is not a multiple of patch_size=4; nearest that fit: 4"),
    ({"size": -16}, "size=-16 is not a multiple of patch_size=4; nearest that fit: 4"),
    *[({"cfg": 1e38, "sampler": sampler}, "the images diverged by t = ") for sampler in SAMPLERS],
    ({"cfg": 1e38, "steps": 1}, "diverged by t = 0, step 1 of 1; try a cfg below 1e+38"),
], ids=str)
def test_generate_refuses(model, change, answer):
    """In one line that names the argument, as a notebook needs it; also images that diverge."""
    with pytest.raises((ValueError, FloatingPointError)) as refused:
        generate(model, **dict(labels=[1, 5], steps=2) | change)
    line = str(refused.value)
    assert answer in line and "\n" not in line and len(line) < 300


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


@given(name=st.text() | st.text(alphabet="Wi犬\n\udcff", min_size=20), W=st.integers(1, 200))
def test_a_label_is_no_wider_than_the_images_whatever_its_letters(name, W):
    """Catches a sheet of 20,000 pixels, and a class name that fails a finished command."""
    sheet, images = draw_grid(np.zeros((2, 200, W, 3), dtype=np.uint8), [name]), 2 * (W + 4)
    assert sheet.width <= 13 + images + max(images, 16)      # 16: one letter


@pytest.mark.parametrize("batch", [2, 32])
def test_a_row_of_the_grid_is_a_class_and_the_index_counts_through_the_grid(
        monkeypatch, trained, tmp_path, flat_images, batch):
    """Catches labels and indices in another order than the images, whatever --batch."""
    run(monkeypatch, sample, f"--ckpt {trained} --class 7 'dotted ring' --per-class 3",
        f"--batch {batch} --out {tmp_path}/g.png")
    assert colours(tmp_path / "g.png", 2, 3) == [[colour(7, j) for j in (0, 1, 2)],
                                                 [colour(3, j) for j in (3, 4, 5)]]
    assert all(len(labels) <= batch for labels, _, _ in flat_images)


def test_by_default_a_grid_holds_eight_images_of_each_class(monkeypatch, trained, tmp_path,
                                                            flat_images):
    run(monkeypatch, sample, f"--ckpt {trained} --out {tmp_path}/g.png")
    assert colours(tmp_path / "g.png", 10, 8) == [[colour(c, 8 * c + j) for j in range(8)]
                                                  for c in range(10)]


@pytest.mark.parametrize("words, changed", [
    ("", {}), ("--seed 3", {"seed": 3}), ("--size 8 24", {"size": [8, 24]}),
    ("--sampler heun", {"sampler": "heun"}), ("--steps 7", {"steps": 7}), ("--cfg 4", {"cfg": 4.0}),
    ("--interval 0.2 0.4", {"interval": [0.2, 0.4]}),
], ids=str)
def test_every_option_of_the_command_reaches_generate(monkeypatch, trained, tmp_path, flat_images,
                                                      words, changed):
    """Its defaults are the paper's: 100 Euler steps, guidance 2.9 for 1 - t in [0.11, 0.97]."""
    defaults = dict(seed=0, size=None, sampler="euler", steps=100, cfg=2.9, interval=(0.03, 0.89))
    run(monkeypatch, sample, f"--ckpt {trained} --class 1 --per-class 1", words,
        f"--out {tmp_path}/g.png")
    run(monkeypatch, sample, f"--ckpt {trained} --num-samples 1", words, f"--out {tmp_path}/g.npz")
    assert [how for _, _, how in flat_images] == [defaults | changed] * 2


def test_the_model_is_compiled_when_the_command_says_so(monkeypatch, trained, tmp_path,
                                                        flat_images):
    """Fails if --compile is ignored."""
    compiled = []
    monkeypatch.setattr(sample, "compile_blocks", compiled.append)
    for word, count in (("", 0), ("--compile", 1)):
        run(monkeypatch, sample, f"--ckpt {trained} --class 1 {word} --out {tmp_path}/g.png")
        assert [type(model) for model in compiled] == [DiP] * count


@pytest.mark.parametrize("batch, rows, columns", [(2, 1, 2), (4, 1, 3), (32, 2, 3)])
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


def test_a_default_name_says_what_the_picture_shows(monkeypatch, trained, tmp_path, flat_images):
    """The classes and the seed: the same command makes the same file, another one another file."""
    monkeypatch.chdir(tmp_path)
    for words in ("--class 1", "--class 1", "--class 7 'dotted ring' --seed 3", ""):
        run(monkeypatch, sample, f"--ckpt {trained} --per-class 1 --steps 1", words)
    assert sorted(os.listdir(tmp_path)) == [
        "samples-class1-seed0.png", "samples-class7-classdotted-ring-seed3.png",
        "samples-seed0.png"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_bar_counts_evaluations(monkeypatch, trained, tmp_path, capsys, sampler):
    """Of all batches.  Catches a bar that stands at 0/1 for an hour, and one that ends early."""
    monkeypatch.setattr(sample, "tqdm", partial(tqdm, mininterval=0))
    total = 2 * (2 * 3 - 1 if sampler == "heun" else 3)
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
    in another order than their labels."""
    file = export(monkeypatch, trained, tmp_path / "s.npz")
    assert file["arr_1"].tolist() == [i % 10 for i in range(23)]
    assert file["arr_0"].shape == (23, 16, 16, 3) and file["arr_0"].dtype == np.uint8
    assert file["arr_0"][:, 0, 0].tolist() == [colour(i % 10, i) for i in range(23)]
    assert [len(labels) for labels, _, _ in flat_images] == [5, 5, 5, 5, 3]
    assert os.listdir(tmp_path) == ["s.npz"]


def test_an_interrupted_export_continues_with_its_own_settings_and_weights_only(
        monkeypatch, trained, tmp_path, exported):
    """Catches a file that is half of one model and half of another, and batches drawn twice."""
    weights, out, drawn, limit = tmp_path / "w.pt", tmp_path / "s.npz", [], 2
    shutil.copy2(find_checkpoint(trained), weights)

    def until_the_limit(*arguments, **how):
        if len(drawn) == limit:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return generate(*arguments, **how)

    monkeypatch.setattr(sample, "generate", until_the_limit)
    with pytest.raises(KeyboardInterrupt):
        export(monkeypatch, weights, out)
    limit = None
    refused = pytest.raises(ValueError, match="unfinished export with other settings; delete it")
    for words in ("--seed 1", "--steps 4", "--batch 6", "--no-ema", "--cfg 1", "--size 8 8",
                  "--num-samples 24", "--interval 0 1", "--sampler ab2", f"--ckpt {trained}"):
        with refused:
            export(monkeypatch, weights, out, words)
    settings = tmp_path / "s.npz.parts" / "settings.json"
    text = settings.read_text()
    settings.write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    with refused:                            # the rest was drawn on another device
        export(monkeypatch, weights, out)
    settings.write_text(text)
    weights.rename(tmp_path / "same.pt")
    torch.save(checkpoint(trained) | {"step": 2}, weights)   # the run went on
    with refused:
        export(monkeypatch, weights, out)
    (tmp_path / "same.pt").rename(weights)
    assert not out.exists()
    export(monkeypatch, weights, out)
    assert_is_export(out, exported)
    assert len(drawn) == 5                                   # none twice
    with pytest.raises(ValueError, match="s.npz exists; delete it, or choose another name"):
        export(monkeypatch, weights, out, "--seed 1")
    assert_is_export(out, exported)


def test_a_batch_is_on_the_disk_before_it_is_marked_as_done(monkeypatch, trained, tmp_path):
    """Catches black images in a finished file, after a crash between the two."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(
        os.path.basename(os.readlink(f"/proc/self/fd/{number}"))) or fsync(number))
    export(monkeypatch, trained, tmp_path / "s.npz")
    assert [name for name in synced if name in ("images.npy", "done")] == ["images.npy", "done"] * 5


def test_an_export_that_died_as_it_began_is_begun_again(monkeypatch, trained, tmp_path, exported):
    """Catches settings that are written before the files they promise."""
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(np.lib.format, "open_memmap", full)
        export(patch, trained, tmp_path / "s.npz")
    export(monkeypatch, trained, tmp_path / "s.npz")
    assert_is_export(tmp_path / "s.npz", exported)


def test_any_number_of_processes_exports_the_file_of_one(trained, tmp_path, exported):
    """Bit for bit: three ranks share five batches.  Catches ranks that draw all of them, ranks that
    each look for themselves what is left to do: a late one passes over batches, and a file that is
    packed before a slow rank has drawn its part."""
    port, command = free_port(), f"{EXPORT} --ckpt {trained} --out {tmp_path}/three.npz"
    ranks = [Background("sample", command, rank=rank, world=3, port=port,
                        first=print_what_is_drawn) for rank in range(3)]
    ends = [rank.end() for rank in ranks]
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert "".join(text for _, text, _ in ends).count("wrote ") == 1
    assert [re.findall(r"drawn: (\d+)", text) for _, text, _ in ends] == [
        ["0", "15"], ["5", "20"], ["10"]]
    assert_is_export(tmp_path / "three.npz", exported)
    assert os.listdir(tmp_path) == ["three.npz"]


def test_of_two_exports_into_one_file_the_second_is_refused(monkeypatch, trained, tmp_path,
                                                            exported):
    """While the first one lives.  Catches two processes that write one array."""
    out = tmp_path / "s.npz"
    first = Background("sample", EXPORT, f"--ckpt {trained} --out {out}", cwd=tmp_path,
                       first=wait_for_go)
    while first.is_alive() and not (tmp_path / "s.npz.parts" / "settings.json").exists():
        time.sleep(0.05)
    line = error_line(monkeypatch, sample, EXPORT, f"--ckpt {trained} --out {out}")
    assert "another process is writing there; wait until it ends, or choose another" in line
    (tmp_path / "go").touch()
    assert first.end()[0] == 0
    assert_is_export(out, exported)


def test_ctrl_c_ends_an_export_with_the_code_of_shells(trained, tmp_path):
    """130, and no traceback."""
    process = Background("sample", EXPORT, f"--ckpt {trained} --out {tmp_path}/s.npz", cwd=tmp_path,
                         first=wait_for_go)
    while process.is_alive() and not (tmp_path / "s.npz.parts" / "settings.json").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    code, _, errors = process.end()
    assert code == 130 and "Traceback" not in errors


# --- which weights ------------------------------------------------------------------------------


def write_run(folder, trained, step, modified):
    """A checkpoint like that of `trained`, of another step and time of modification."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ckpt-{step:08d}.pt"
    torch.save(checkpoint(trained) | {"step": step}, path)
    os.utime(path, (modified, modified))
    return path


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


def test_a_loaded_model_is_ready_to_draw_and_says_what_it_is(trained):
    """In float32, in eval mode, without gradients; a folder is as good as a file."""
    model, info = load_model(str(trained))
    again, _ = load_model(find_checkpoint(trained))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert info["step"] == 1 and info["names"] == train.Shapes.names
    assert info["config"] == asdict(model.config) and info["options"]["batch_size"] == 4


def test_a_loaded_model_no_longer_needs_its_file(trained, tmp_path):
    """Catches weights that are mapped from a file which another command overwrites."""
    path = tmp_path / "w.pt"
    shutil.copy(find_checkpoint(trained), path)
    model, _ = load_model(path)
    before = [p.clone() for p in model.parameters()]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_the_newest_run_is_sampled_and_of_it_the_last_step(monkeypatch, trained, tmp_path):
    """Of three folders, whatever their names.  Catches the oldest, and the first."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "c", trained, 9, modified=1000)
    write_run(tmp_path / "runs" / "b" / "deep", trained, 3, modified=2000)
    newest = write_run(tmp_path / "runs" / "b" / "deep", trained, 4, modified=3000)
    write_run(tmp_path / "runs" / "a", trained, 7, modified=2500)
    assert find_checkpoint().resolve() == newest
    assert find_checkpoint("runs/a") == Path("runs/a/ckpt-00000007.pt")
    assert load_model(tmp_path / "runs")[1]["step"] == 4
    (newest.parent / "ckpt-00000005.pt").write_bytes(b"half a file")
    assert find_checkpoint().resolve() == newest


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
    assert "the small weights that come with the code" in capsys.readouterr().out
    (model, info), (before, same) = load_model(ours), load_model(trained)
    for name, weight in before.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), model.state_dict()[name])
        assert model.state_dict()[name].dtype == torch.float32
    assert model.config == before.config
    assert info == same | {"options": {"model": "DiP-Nano/16"}}
    write_run(tmp_path / "runs" / "mine", trained, 1, modified=1000)
    assert find_checkpoint().parts[0] == "runs"


# --- names --------------------------------------------------------------------------------------


def test_a_class_is_found_by_index_folder_or_name():
    """An index comes first, also where folders are called 0, 1, 10 and 2."""
    classes, names = ["n01443537", "n02012849", "n03126707"], ["goldfish", "crane", "crane"]
    assert find_class("0", classes, names) == 0
    assert find_class("n02012849", classes, names) == 1
    assert find_class("Goldfish", classes, names) == 0
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
