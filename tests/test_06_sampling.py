"""
Chapter 6: from noise to images.

The law: an image is a function of (weights, seed, index, class) and of the settings that the user
names, and of nothing else; and what draws it is the integrator of that name, step for step as in
literal_sampling.py.
"""

import math
import os
from dataclasses import asdict

import literal_sampling as literal
import numpy as np
import pytest
import torch
from commands import checkpoint, run, run_ranks
from helpers import SMALL, awake
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import common
import dataset
import sample
from common import random_stream
from sample import SAMPLERS, draw_grid, find_class, generate, guided, time_grid, to_uint8

ORDERS = {"euler": 1, "heun": 2, "ab2": 2}
LITERAL = {"euler": literal.euler, "heun": literal.heun, "ab2": literal.adams_bashforth}
SHIFTS = st.floats(0.2, 5)


@pytest.fixture(scope="module")
def model():
    return awake(SMALL).eval()


# --- integrators --------------------------------------------------------------------------------


@given(steps=st.integers(1, 20), shift=SHIFTS)
def test_the_time_grid_falls_from_1_to_0_as_by_hand(steps, shift):
    """Forbids a shift that is divided by, one that acts on 1 - t, and a grid that stops early."""
    grid = time_grid(steps, shift)
    assert grid[0] == 1 and grid[-1] == 0 and all(t > s for t, s in zip(grid, grid[1:]))
    assert grid == pytest.approx(literal.time_grid(steps, shift), abs=1e-12)


def test_a_time_shift_above_one_spends_more_steps_near_noise():
    assert time_grid(2, 1.0) == [1, 0.5, 0]
    assert time_grid(2, 3.0) == [1, 0.75, 0]


def bent(x, t):
    """A field without symmetries, for numbers and tensors."""
    return (t - 0.3) * x + t**2 * (1 - x**2 / 9) + 0.2


@pytest.mark.parametrize("name", LITERAL)
@given(steps=st.integers(1, 12), shift=SHIFTS, x=st.floats(-3, 3))
def test_every_ode_sampler_is_its_formula_on_one_number(name, steps, shift, x):
    """On uneven grids too; forbids Adams-Bashforth's ratio of steps upside down."""
    fast = SAMPLERS[name](bent, torch.tensor(x, dtype=torch.float64), steps, shift)
    assert fast.item() == pytest.approx(LITERAL[name](bent, x, literal.time_grid(steps, shift)),
                                        rel=1e-9, abs=1e-9)


@given(steps=st.integers(1, 12), shift=SHIFTS, x=st.floats(-3, 3), seed=st.integers(0, 99))
def test_euler_maruyama_is_its_formula_on_one_number(steps, shift, x, seed):
    """Forbids noise of another scale, as sqrt(dt), and noise in the last step."""
    normals = np.random.default_rng(seed).standard_normal(steps).tolist()
    left = iter(normals)
    fast = SAMPLERS["sde"](bent, torch.tensor(x, dtype=torch.float64), steps, shift,
                           lambda: next(left))
    slow = literal.euler_maruyama(bent, x, literal.time_grid(steps, shift), normals)
    assert fast.item() == pytest.approx(slow, rel=1e-9, abs=1e-9)
    assert len(list(left)) == 1                              # one for each step except the last


def test_one_step_of_the_sde_by_hand():
    """From 1 to 1/2 with v = 0: eps = x, drift -x/4, variance t dt = 1/2."""
    x = SAMPLERS["sde"](lambda x, t: 0 * x, torch.tensor(2.0), 2, noise=lambda: 1.0)
    assert x.item() == pytest.approx(2 - 2 / 4 + math.sqrt(0.5))


def test_the_noise_of_the_sde_is_a_standard_normal_like_x():
    torch.manual_seed(0)
    x = SAMPLERS["sde"](lambda x, t: 0 * x, torch.zeros(100_000), 2)
    assert x.mean().abs() < 0.01 and x.var().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_ode_sampler_is_exact_on_a_straight_path(name, shift):
    """The path of Eq. (6) between two fixed ends; forbids steps of the wrong length or sign."""
    x_0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for steps in (1, 2, 7):
        torch.testing.assert_close(SAMPLERS[name](lambda x, t: noise - x_0, noise, steps, shift),
                                   x_0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_adams_bashforth_is_exact_on_a_velocity_linear_in_time_after_its_first_step(shift):
    """The integral of v = t; only the Euler step from 1 to t_1 is off, by (1 - t_1)^2 / 2."""
    x = SAMPLERS["ab2"](lambda x, t: t + 0 * x, torch.zeros((), dtype=torch.float64), 9, shift)
    first = 1 - time_grid(9, shift)[1]
    assert x.item() == pytest.approx(-1 / 2 - first**2 / 2, abs=1e-12)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_error_falls_with_the_order_of_the_method(name, shift):
    """dx/dt = cos 3t - x has a closed form; halving the step divides the error by 2^order."""
    def solution(t, c):
        return (math.cos(3 * t) + 3 * math.sin(3 * t)) / 10 + c * math.exp(-t)

    def error(steps):
        start = torch.tensor(solution(1, 0.7), dtype=torch.float64)
        x = SAMPLERS[name](lambda x, t: math.cos(3 * t) - x, start, steps, shift)
        return abs(x.item() - solution(0, 0.7))

    assert error(80) / error(160) == pytest.approx(2 ** ORDERS[name], rel=0.1)


@pytest.mark.parametrize("name, per_step", [("euler", 1), ("heun", 2), ("ab2", 1), ("sde", 1)])
def test_evaluations_per_step(name, per_step):
    calls = []
    SAMPLERS[name](lambda x, t: calls.append(t) or x, torch.randn(2), 10)
    assert len(calls) == 10 * per_step


def gaussian_velocity(variance):
    """E[eps - x_0 | x_t] for x_0 ~ N(0, variance): Eq. (16) with one eigenvalue."""
    return lambda x, t: x * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)


@pytest.mark.parametrize("variance", [0.04, 1.0, 4.0])
def test_euler_maruyama_keeps_the_marginals_of_a_gaussian(variance):
    """Field and sampler are linear, so the law of the result is computed and not estimated: x holds
    its coefficients on the independent normals drawn so far, and its square is the variance."""
    def error(steps):
        axes = iter(torch.eye(steps, dtype=torch.float64))   # start, then one for each noisy step
        x = SAMPLERS["sde"](gaussian_velocity(variance), next(axes), steps,
                            noise=lambda: next(axes))
        return abs(x.square().sum().item() - variance)

    assert error(400) < 0.02 * variance
    assert error(200) / error(400) == pytest.approx(2, rel=0.15)     # order 1 in law


def test_the_ode_keeps_the_marginals_of_a_gaussian():
    x = SAMPLERS["heun"](gaussian_velocity(0.25), torch.ones(1, dtype=torch.float64), 200)
    assert x.item() == pytest.approx(0.5, rel=1e-3)


# --- guidance -----------------------------------------------------------------------------------


class Recorder:
    """A stand-in for the network that writes down how it is asked: v = y everywhere."""

    config = SMALL

    def __init__(self):
        self.batches, self.times = [], []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        self.times.append(t.tolist())
        return torch.ones_like(x) * y[:, None, None, None]


def test_guidance_of_scale_one_is_no_guidance(model):
    with torch.no_grad():
        x, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 4])
        assert torch.equal(guided(model, y, 1.0)(x, 0.5), model(x, torch.full((3,), 0.5), y))
    recorder = Recorder()
    guided(recorder, y)(x, 0.5)
    assert recorder.batches == [3]                           # and costs one evaluation


@given(scale=st.floats(0, 8), label=st.integers(0, 4), t=st.floats(0, 1))
def test_guidance_extrapolates_from_no_label_through_the_label(scale, label, t):
    """v_0 + scale (v_y - v_0), with the null class of the configuration, at the time of the step;
    forbids label and null class exchanged."""
    recorder = Recorder()
    v = guided(recorder, torch.tensor([label]), scale)(torch.zeros(1, 3, 4, 4), t)
    expected = label if scale == 1 else 5 + scale * (label - 5)
    torch.testing.assert_close(v, torch.full_like(v, expected))
    assert recorder.times[0] == pytest.approx([t] * len(recorder.times[0]))


def test_guidance_acts_on_both_ends_of_its_interval_and_in_t_not_in_1_minus_t():
    """An interval that is not symmetric, whose ends are times of the grid."""
    recorder = Recorder()
    field = guided(recorder, torch.zeros(3, dtype=torch.long), 2.9, (0.2, 0.5))
    SAMPLERS["euler"](field, torch.zeros(3, 3, 4, 4), 10)
    assert recorder.batches == [3, 3, 3, 3, 3, 6, 6, 6, 6, 3]        # t = 1, 0.9, ..., 0.1


def test_every_image_of_a_guided_batch_is_guided_by_itself(model):
    """Forbids halves of the doubled batch that are mixed up."""
    x, labels = torch.randn(3, 3, 16, 16), [4, 0, 2]
    with torch.no_grad():
        together = guided(model, torch.tensor(labels), 2.5, (0.1, 0.7))(x, 0.7)
        for k in range(3):
            alone = literal.guided_velocity(model, x[k], 0.7, labels[k], 2.5, (0.1, 0.7))
            torch.testing.assert_close(together[k], alone, rtol=0, atol=1e-5)


# --- images -------------------------------------------------------------------------------------

PLAIN = dict(seed=0, size=(16, 16), sampler="euler", steps=4, cfg=2.0, interval=(0.0, 1.0),
             shift=1.0)


@pytest.mark.parametrize("change", [
    {}, {"seed": 7}, {"size": (8, 24)}, {"sampler": "heun"}, {"sampler": "ab2"}, {"sampler": "sde"},
    {"steps": 5}, {"cfg": 1.0}, {"cfg": 4.0}, {"interval": (0.3, 0.5)}, {"interval": (0.5, 0.8)},
    {"shift": 3.0}, {"sampler": "ab2", "shift": 0.4, "interval": (0.1, 0.6), "steps": 6},
], ids=str)
def test_generate_draws_what_its_arguments_say(model, change):
    """Each argument, changed alone, arrives: forbids a time shift or an interval that is forgotten.
    Image k has the noise of index k and its own label."""
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


def test_the_defaults_of_generate_are_a_plain_euler_run_over_the_first_indices(model):
    ours = generate(model, [1, 2])
    full = dict(seed=0, size=(16, 16), sampler="euler", steps=100, cfg=1.0, interval=(0, 1),
                shift=1.0)
    assert torch.equal(ours, generate(model, [1, 2], [0, 1], **full))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_i_is_the_same_picture_for_any_batch_size(model, sampler):
    """Forbids noise drawn for the batch as a whole, in the start and in every step of the SDE."""
    how = dict(seed=3, sampler=sampler, steps=4, cfg=1.5)
    labels = [0, 1, 2, 3, 4, 0]
    together = generate(model, labels, range(6), **how)
    apart = torch.cat([generate(model, labels[k:k + 2], range(k, k + 2), **how)
                       for k in (0, 2, 4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    backwards = generate(model, labels[::-1], range(5, -1, -1), **how)
    torch.testing.assert_close(together, backwards.flip(0), rtol=1e-4, atol=1e-4)


def test_streams_differ_in_every_part_of_their_key_and_are_the_same_everywhere():
    """Recorded: sample 1 of seed 0 begins with this number on any machine, in any process."""
    keys = [(0, "sample", 1), (1, "sample", 1), (0, "train", 1), (0, "sample", 2)]
    draws = [torch.randn((), generator=random_stream(*key)).item() for key in keys]
    assert len(set(draws)) == 4
    assert draws == pytest.approx([-0.5516037, -0.1439345, -0.067245, -0.2877698], abs=1e-6)
    assert torch.randn((), generator=random_stream(*keys[0])).item() == draws[0]


def test_watch_sees_every_evaluation_and_the_last_prediction_is_the_sample(model):
    """x_t - t v is the predicted clean image; Euler's last step goes there."""
    seen = []
    x = generate(model, [1, 2], [0, 1], steps=6, shift=2.0,
                 watch=lambda t, x, v: seen.append((t, x, v)))
    assert [t for t, _, _ in seen] == time_grid(6, 2.0)[:-1]
    start = torch.stack([torch.randn(3, 16, 16, generator=random_stream(0, "sample", i))
                         for i in (0, 1)])
    assert torch.equal(seen[0][1], start)
    t, x_t, v = seen[-1]
    torch.testing.assert_close(x_t - t * v, x)
    assert x_t.dtype == v.dtype == torch.float32


@pytest.mark.parametrize("labels", [["striped disc"], [6], [-1], [1.0], [None]], ids=str)
def test_labels_that_are_no_classes_end_in_one_line(model, labels):
    """Forbids a raw error of torch in a notebook.  5 is the null class of five classes."""
    with pytest.raises(ValueError, match=r"must be whole numbers from 0 to 5, the null class"):
        generate(model, labels)
    assert generate(model, [5, np.int64(0)], steps=1).shape == (2, 3, 16, 16)


def test_pixels_are_rounded_and_clamped_and_keep_their_place():
    """Forbids truncation, which darkens every picture by half a level, at both signs."""
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


def colour(label, index):
    """The colour, in uint8, of the flat image that `flat_images` draws for them."""
    return [10 * label, 10 * index, 200]


@pytest.fixture
def flat_images(monkeypatch):
    """sample.generate replaced: an image has one colour, of its label and index.  Returns the list
    of its calls, as (labels, indices, settings)."""
    calls = []

    def draw(model, labels, indices, watch=None, **how):
        calls.append((list(labels), list(indices), how))
        colours = torch.tensor([colour(*pair) for pair in zip(labels, indices)])
        x = (colours / 127.5 - 1)[:, :, None, None].expand(-1, -1, *(how["size"] or (16, 16)))
        if watch:
            for t in (1.0, 0.5):
                watch(t, x * (1 - t), -x)
        return x

    monkeypatch.setattr(sample, "generate", draw)
    return calls


def cells(path, rows, columns, side=96, gap=4, headers=False):
    """The colours in the middle of the cells of a grid, counted from its right lower corner."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    bottom, right = picture.shape[0] - gap - side // 2, picture.shape[1] - gap - side // 2
    step = side + gap
    return [[picture[bottom - (rows - 1 - i) * step, right - (columns - 1 - j) * step].tolist()
             for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("batch", [2, 32])
def test_a_row_of_the_grid_is_a_class_and_a_column_one_noise(monkeypatch, trained, tmp_path,
                                                             flat_images, batch):
    """Forbids labels and indices that are handed on in another order than the pictures are laid
    out, whatever --batch."""
    run(monkeypatch, sample, f"--ckpt {trained} --class 7 'dotted ring' --num 3 --batch {batch}",
        f"--seed 5 --out {tmp_path}/g.png")
    assert cells(tmp_path / "g.png", 2, 3) == [[colour(7, j) for j in range(3)],
                                               [colour(3, j) for j in range(3)]]
    assert all(len(labels) <= batch for labels, _, _ in flat_images)
    assert {how["seed"] for _, _, how in flat_images} == {5}


def test_without_words_a_grid_holds_eight_images_of_each_class(monkeypatch, trained, tmp_path,
                                                               flat_images):
    """Ten classes at most; a class of more than ten images goes on in the next line."""
    run(monkeypatch, sample, f"--ckpt {trained} --out {tmp_path}/g.png")
    assert cells(tmp_path / "g.png", 10, 8) == [[colour(c, j) for j in range(8)]
                                                for c in range(10)]
    run(monkeypatch, sample, f"--ckpt {trained} --class 1 --num 12 --out {tmp_path}/h.png")
    assert cells(tmp_path / "h.png", 2, 10)[0] == [colour(1, j) for j in range(10)]
    assert cells(tmp_path / "h.png", 2, 10)[1][:2] == [colour(1, 10), colour(1, 11)]


@pytest.mark.parametrize("words, changed", [
    ("", {}), ("--seed 3", {"seed": 3}), ("--size 8 24", {"size": [8, 24]}),
    ("--sampler heun", {"sampler": "heun"}), ("--steps 7", {"steps": 7}), ("--cfg 4", {"cfg": 4.0}),
    ("--interval 0.2 0.4", {"interval": (0.2, 0.4)}), ("--time-shift 2", {"shift": 2.0}),
], ids=str)
def test_every_option_of_the_command_reaches_generate(monkeypatch, trained, tmp_path, flat_images,
                                                      words, changed):
    """Its defaults are the paper's: 100 Euler steps, guidance 2.9 for 1 - t in [0.11, 0.97]."""
    defaults = dict(seed=0, size=None, sampler="euler", steps=100, cfg=2.9, interval=(0.03, 0.89),
                    shift=1.0)
    run(monkeypatch, sample, f"--ckpt {trained} --class 1 --num 1", words,
        f"--out {tmp_path}/g.png")
    run(monkeypatch, sample, f"--ckpt {trained} --num-samples 1", words, f"--out {tmp_path}/g.npz")
    assert [how for _, _, how in flat_images] == [defaults | changed] * 2


def test_the_grid_enlarges_without_smoothing_and_labels_rows_and_columns():
    rows = [np.full((3, 8, 8, 3), 10 * (k + 1), dtype=np.uint8) for k in range(2)]
    sheet = np.asarray(draw_grid(rows, ["a", "long label"], cell=16))
    for k in range(2):
        assert (sheet == 10 * (k + 1)).all(-1).sum() >= 3 * 16 * 16
    assert sheet[0, 0].tolist() == [255, 255, 255]
    headed = np.asarray(draw_grid(rows, ["a", "long label"], ["x", "y", "z"], cell=16))
    assert headed.shape[0] == sheet.shape[0] + 20 and (headed[:20] < 128).any()
    large = draw_grid([np.zeros((1, 200, 100, 3), np.uint8)], ["a"])
    assert large.height == 200 + 2 * 4                       # never made smaller


def test_a_trajectory_is_a_strip_of_predictions_and_a_film(monkeypatch, trained, tmp_path, capsys):
    run(monkeypatch, sample, f"--ckpt {trained} --class 1 'dotted ring' --num 3 --steps 12",
        f"--sampler heun --trajectory --out {tmp_path}/g.png")
    grid = Image.open(tmp_path / "g.png")
    strip = Image.open(tmp_path / "g-trajectory.png")
    film = Image.open(tmp_path / "g-trajectory.gif")
    shown = np.asarray(film.convert("RGB"), dtype=int)
    film.seek(film.n_frames - 1)
    last = np.asarray(film.convert("RGB"), dtype=int)
    assert film.n_frames == 14 and film.size == grid.size and film.info["duration"] == 2500
    difference = np.abs(last - np.asarray(grid, dtype=int)).mean()
    assert difference < 6                                    # 256 colours; ends in the grid itself
    assert np.abs(shown - np.asarray(grid, dtype=int)).mean() > 3 * difference      # from noise
    assert strip.width > 9 * 96 and "14 frames" in capsys.readouterr().out


def test_the_strip_shows_x_t_minus_t_v_from_noise_to_data(monkeypatch, trained, tmp_path,
                                                          flat_images):
    """Of the flat images it is the image itself at every t; forbids x_t + t v, and x_t."""
    run(monkeypatch, sample, f"--ckpt {trained} --class 7 --num 2 --trajectory",
        f"--out {tmp_path}/g.png")
    assert cells(tmp_path / "g-trajectory.png", 1, 2) == [[colour(7, 0)] * 2]


# --- export -------------------------------------------------------------------------------------

EXPORT = "--num-samples 23 --steps 3 --batch 5 --device cpu"


def export(monkeypatch, trained, out, *more):
    run(monkeypatch, sample, EXPORT, "--ckpt", trained, "--out", out, *more)
    return np.load(out)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The file that one process exports without interruption."""
    out = tmp_path_factory.mktemp("export") / "whole.npz"
    with pytest.MonkeyPatch.context() as patch:
        export(patch, trained, out)
    return np.load(out)


def test_the_export_is_labelled_as_it_is_drawn_and_takes_the_classes_in_turn(
        monkeypatch, trained, tmp_path, flat_images):
    """Label i mod K: forbids uneven counts, class order, which spoils Inception Score, and images
    in another order than their labels."""
    file = export(monkeypatch, trained, tmp_path / "s.npz")
    assert file["arr_1"].tolist() == [i % 10 for i in range(23)]
    assert file["arr_0"].shape == (23, 16, 16, 3) and file["arr_0"].dtype == np.uint8
    assert file["arr_0"][:, 0, 0].tolist() == [colour(i % 10, i) for i in range(23)]
    assert [len(labels) for labels, _, _ in flat_images] == [5, 5, 5, 5, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_the_export_holds_the_images_of_generate(trained, exported):
    model, _ = common.load_model(trained)
    how = dict(steps=3, cfg=2.9, interval=(0.03, 0.89))
    images = to_uint8(generate(model, [i % 10 for i in range(23)], **how))
    assert np.abs(images.astype(int) - exported["arr_0"]).max() <= 1     # other batches: rounding


def test_an_interrupted_export_continues(monkeypatch, trained, tmp_path, exported, capsys):
    """And refuses to mix what is there with other settings, weights or a damaged part."""
    drawn, limit = [], 2

    def until_the_limit(*arguments, **how):
        if len(drawn) == limit:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return generate(*arguments, **how)

    monkeypatch.setattr(sample, "generate", until_the_limit)
    with pytest.raises(KeyboardInterrupt):
        export(monkeypatch, trained, tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()
    for words in ("--seed 1", "--steps 4", "--batch 6", "--no-ema", "--cfg 1", "--size 16 16"):
        with pytest.raises(ValueError, match="unfinished export with other settings"):
            export(monkeypatch, trained, tmp_path / "s.npz", words)
    limit = None
    part = tmp_path / "s.npz.parts" / "00000000.npy"
    good = part.read_bytes()
    part.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=f"{part} is damaged; delete it, and the same command"):
        export(monkeypatch, trained, tmp_path / "s.npz")
    part.write_bytes(good)
    capsys.readouterr()
    file = export(monkeypatch, trained, tmp_path / "s.npz")
    assert "continuing: 5 of 5 batches are already drawn" in capsys.readouterr().out
    assert np.array_equal(file["arr_0"], exported["arr_0"])
    assert np.array_equal(file["arr_1"], exported["arr_1"])
    assert len(drawn) == 5                                   # none twice
    with pytest.raises(ValueError, match="is there already"):
        export(monkeypatch, trained, tmp_path / "s.npz")


def test_any_number_of_processes_exports_the_file_of_one(trained, tmp_path, exported):
    """Bit for bit, three ranks that share five batches."""
    ranks = run_ranks(3, "sample", EXPORT, f"--ckpt {trained} --out {tmp_path}/three.npz")
    ends = [rank.end() for rank in ranks]
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert "".join(text for _, text, _ in ends).count("wrote ") == 1
    file = np.load(tmp_path / "three.npz")
    assert np.array_equal(file["arr_0"], exported["arr_0"])
    assert np.array_equal(file["arr_1"], exported["arr_1"])
    assert [path.name for path in tmp_path.iterdir()] == ["three.npz"]


# --- which weights ------------------------------------------------------------------------------


def write_run(folder, trained, step, modified, **changes):
    """A checkpoint like that of `trained`, of another step and time of modification."""
    state = checkpoint(trained) | {"step": step} | changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ckpt-{step:08d}.pt"
    torch.save(state, path)
    os.utime(path, (modified, modified))
    return path


def test_averaged_and_last_weights_are_told_apart(monkeypatch, trained, tmp_path, capsys):
    """Forbids --ema and --no-ema exchanged, in load_model and in the command."""
    state = checkpoint(trained)
    for ema, key in ((True, "ema"), (False, "model")):
        model, info = common.load_model(trained, "cpu", ema)
        assert all(torch.equal(weight, state[key][name])
                   for name, weight in model.state_dict().items())
    assert not torch.equal(state["ema"]["embed.weight"], state["model"]["embed.weight"])
    seen = []
    monkeypatch.setattr(sample, "sample_grid", lambda model, names, options: seen.append(model))
    for word, key, said in (("", "ema", "EMA"), ("--ema", "ema", "EMA"),
                            ("--no-ema", "model", "last")):
        run(monkeypatch, sample, f"--ckpt {trained} --class 1", word)
        assert torch.equal(seen[-1].embed.weight, state[key]["embed.weight"])
        assert f"step 1, {said} weights" in capsys.readouterr().out


def test_a_loaded_model_is_ready_to_draw_and_says_what_it_is(trained):
    """In float32, in eval mode, without gradients; a folder is as good as a file."""
    model, info = common.load_model(str(trained))
    again, _ = common.load_model(common.find_checkpoint(trained))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert info["step"] == 1 and info["names"] == dataset.ShapesData.names
    assert info["config"] == asdict(model.config) and info["options"]["batch_size"] == 4


def test_the_newest_run_is_sampled_and_of_it_the_last_step(monkeypatch, trained, tmp_path):
    """Of three folders, whatever their names; forbids the oldest, and the first."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "c", trained, 9, modified=1000)
    write_run(tmp_path / "runs" / "b" / "deep", trained, 3, modified=2000)
    newest = write_run(tmp_path / "runs" / "b" / "deep", trained, 4, modified=3000)
    write_run(tmp_path / "runs" / "a", trained, 7, modified=2500)
    assert common.find_checkpoint().resolve() == newest
    assert common.find_checkpoint("runs/a") == (newest.parents[2] / "a" / "ckpt-00000007.pt"
                                                ).relative_to(tmp_path)
    assert common.load_model(tmp_path / "runs")[1]["step"] == 4
    (newest.parent / "ckpt-00000005.pt").write_bytes(b"half a file")
    assert common.find_checkpoint().resolve() == newest


def test_without_a_run_our_own_weights_are_drawn_with_and_it_is_said(monkeypatch, trained, tmp_path,
                                                                      flat_images, capsys):
    """Written by --save-weights in bfloat16, which load_model opens; a folder that is named and
    empty is an error all the same."""
    monkeypatch.chdir(tmp_path)
    ours = tmp_path / "assets" / "dip-nano.pt"
    run(monkeypatch, sample, f"--ckpt {trained} --save-weights {ours}")
    assert f"wrote {ours}" in capsys.readouterr().out and not flat_images
    weights = torch.load(ours, weights_only=True)["ema"]
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for module in (common, sample):
        monkeypatch.setattr(module, "OUR_WEIGHTS", ours)
    run(monkeypatch, sample, "--class 1 --num 1")
    assert "the small weights that come with the code" in capsys.readouterr().out
    assert (tmp_path / "samples.png").exists()
    model, info = common.load_model(ours)
    expected, before = common.load_model(trained)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name].bfloat16().float())
    assert model.config == expected.config and info["options"] == {"model": "DiP-Nano/16"}
    assert [info[key] for key in ("step", "names")] == [before[key] for key in ("step", "names")]
    with pytest.raises(ValueError, match="has the averaged weights alone: leave out --no-ema"):
        common.load_model(ours, ema=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint under empty/"):
        common.find_checkpoint("empty")
    write_run(tmp_path / "runs" / "mine", trained, 1, modified=1000)
    assert common.find_checkpoint().parts[0] == "runs"


def test_a_picture_never_overwrites_another_that_was_not_named(monkeypatch, trained, tmp_path,
                                                               flat_images):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        run(monkeypatch, sample, f"--ckpt {trained} --class 1 --num 1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "samples-2.png", "samples-3.png", "samples.png"]


# --- names --------------------------------------------------------------------------------------


def test_a_class_is_found_by_index_folder_or_name():
    classes, names = ["n01443537", "n02012849", "n03126707"], ["goldfish", "crane", "crane"]
    assert find_class("0", classes, names) == 0
    assert find_class("n02012849", classes, names) == 1
    assert find_class("Goldfish", classes, names) == 0
    with pytest.raises(ValueError, match="several classes: 1, 2"):
        find_class("crane", classes, names)
    with pytest.raises(ValueError, match="unknown; near it: 'goldfish'"):
        find_class("goldfisch", classes, names)
    for query in ("²", "xyzzy"):                             # a digit that is no number
        with pytest.raises(ValueError, match="'goldfish', 'crane', 'crane'; or an index from 0 to"):
            find_class(query, classes, names)
    with pytest.raises(ValueError, match="classes 0 to 2"):
        find_class("3", classes, names)
    assert find_class("zebra finch", ["zebra_finch"], ["zebra_finch"]) == 0
    digits = ["0", "1", "10", "2"]                           # sorted as folder names are
    assert find_class("1", digits, digits) == 1
    with pytest.raises(ValueError, match="is the index of '10', and the name of class 3"):
        find_class("2", digits, digits)
