"""Chapter 4: from noise to images."""

import math

import numpy as np
import pytest
import torch
from helpers import SMALL, awake
from hypothesis import given, settings
from hypothesis import strategies as st

from sample import (
    SAMPLERS,
    adams_bashforth,
    draw_grid,
    euler,
    euler_maruyama,
    find_class,
    generate,
    guided,
    heun,
    random_stream,
    time_grid,
    to_uint8,
)

ORDERS = {"euler": 1, "heun": 2, "ab2": 2}


class Counting:
    """A stand-in for the network that writes down how it is asked: v = y everywhere."""

    config = SMALL

    def __init__(self):
        self.batches, self.times = [], []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        self.times.append(t[0].item())
        return torch.ones_like(x) * y[:, None, None, None]


# --- integrators --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(steps=st.integers(1, 20), shift=st.floats(0.2, 5))
def test_the_time_grid_falls_from_1_to_0(steps, shift):
    grid = time_grid(steps, shift)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert all(t > s for t, s in zip(grid, grid[1:]))


def test_a_time_shift_above_one_lingers_near_noise():
    assert time_grid(2, 1.0) == [1, 0.5, 0]
    assert time_grid(2, 3.0) == [1, 0.75, 0]


@pytest.mark.parametrize("sampler", [euler, heun, adams_bashforth])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_ode_sampler_is_exact_on_a_straight_path(sampler, shift):
    """The path of Eq. (6) between two fixed ends; forbids steps of the wrong length or sign."""
    x_0, noise = (
        torch.randn(2, 3, 4, 4, dtype=torch.float64),
        torch.randn(2, 3, 4, 4, dtype=torch.float64),
    )
    for steps in (1, 2, 7):
        torch.testing.assert_close(sampler(lambda x, t: noise - x_0, noise, steps, shift), x_0)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_error_falls_with_the_order_of_the_method(name, shift):
    """dx/dt = cos 3t - x has a closed form; halving the step divides the error by 2^order."""

    def solution(t, c):
        return (math.cos(3 * t) + 3 * math.sin(3 * t)) / 10 + c * math.exp(-t)

    c = 0.7
    start = torch.tensor([solution(1, c)], dtype=torch.float64)
    errors = [
        abs(
            SAMPLERS[name](lambda x, t: math.cos(3 * t) - x, start, steps, shift).item()
            - solution(0, c)
        )
        for steps in (80, 160)
    ]
    assert errors[0] / errors[1] == pytest.approx(2 ** ORDERS[name], rel=0.1)


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
        axes = iter(torch.eye(steps, dtype=torch.float64))  # start, then one for each noisy step
        x = euler_maruyama(gaussian_velocity(variance), next(axes), steps, noise=lambda: next(axes))
        return abs(x.square().sum().item() - variance)

    assert error(400) < 0.02 * variance
    assert error(200) / error(400) == pytest.approx(2, rel=0.15)  # order 1 in law


def test_the_ode_keeps_the_marginals_of_a_gaussian():
    x = heun(gaussian_velocity(0.25), torch.ones(1, dtype=torch.float64), 200)
    assert x.item() == pytest.approx(0.5, rel=1e-3)


# --- guidance -----------------------------------------------------------------------------------


def test_guidance_of_scale_one_is_no_guidance():
    """In pictures, and by the formula: scale -> 1 from above is continuous."""
    model = awake(SMALL)
    with torch.no_grad():
        x, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 4])
        plain = model(x, torch.full((3,), 0.5), y)
        assert torch.equal(guided(model, y, 1.0)(x, 0.5), plain)
        torch.testing.assert_close(guided(model, y, 1 + 1e-6)(x, 0.5), plain, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(scale=st.floats(0, 8), label=st.integers(0, 4))
def test_guidance_extrapolates_from_no_label_through_the_label(scale, label):
    """v_0 + scale (v_y - v_0), with the null class of the configuration."""
    v = guided(Counting(), torch.tensor([label]), scale)(torch.zeros(1, 3, 4, 4), 0.5)
    expected = label if scale == 1 else 5 + scale * (label - 5)
    torch.testing.assert_close(v, torch.full_like(v, expected))


def test_outside_the_interval_a_step_costs_one_evaluation_and_inside_one_double():
    model = Counting()
    euler(
        guided(model, torch.zeros(3, dtype=torch.long), 2.9, (0.25, 0.75)),
        torch.zeros(3, 3, 4, 4),
        10,
    )
    assert len(model.batches) == 10
    for rows, t in zip(model.batches, model.times):
        assert rows == (6 if 0.25 <= t <= 0.75 else 3)
    assert model.batches.count(6) == 5  # t = 0.7, 0.6, 0.5, 0.4, 0.3


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_i_is_the_same_picture_for_any_batch_size(sampler):
    """Forbids noise drawn for the batch as a whole, in the start and in every step of the SDE."""
    model = awake(SMALL)
    settings = dict(seed=3, sampler=sampler, steps=4, cfg=1.5)
    labels = [0, 1, 2, 3, 4, 0]
    together = generate(model, labels, range(6), **settings)
    apart = torch.cat(
        [generate(model, labels[k : k + 2], range(k, k + 2), **settings) for k in (0, 2, 4)]
    )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    backwards = generate(model, labels[::-1], range(5, -1, -1), **settings)
    torch.testing.assert_close(together, backwards.flip(0), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[5]).abs().max() > 0.1  # same label, another picture


def test_streams_differ_in_every_part_of_their_key():
    draws = {
        torch.randn((), generator=random_stream(*key)).item()
        for key in [
            (0, "sample", 1),
            (1, "sample", 1),
            (0, "train", 1),
            (0, "sample", 2),
            (0, "sample", 1),
        ]
    }
    assert len(draws) == 4


def test_the_trajectory_shows_the_predicted_clean_image_and_ends_at_the_sample():
    """x_t - t v: on a straight path it is the sample itself, at every t."""
    seen = []
    model = awake(SMALL)
    x = generate(model, [1, 2], [0, 1], steps=6, watch=lambda t, image: seen.append((t, image)))
    assert [t for t, _ in seen] == time_grid(6)[:-1]
    torch.testing.assert_close(seen[-1][1], x)  # Euler's last step goes to its own prediction


def test_pixels_are_rounded_and_clamped():
    """Forbids truncation, which darkens every picture by half a level."""
    levels = torch.arange(256) / 127.5 - 1
    x = levels.repeat(3, 1)[None, :, None, :] + 0.4 / 127.5
    assert np.array_equal(to_uint8(x)[0, 0, :, 0], np.arange(256))
    assert to_uint8(torch.full((1, 3, 1, 1), -9.0)).item(0) == 0
    assert to_uint8(torch.full((1, 3, 1, 1), 9.0)).item(0) == 255


def test_the_grid_holds_every_picture_enlarged_without_smoothing():
    rows = [np.full((3, 8, 8, 3), 10 * (k + 1), dtype=np.uint8) for k in range(2)]
    sheet = np.asarray(draw_grid(rows, ["a", "long label"], cell=16))
    for k in range(2):
        assert (sheet == 10 * (k + 1)).all(-1).sum() >= 3 * 16 * 16
    assert sheet[0, 0].tolist() == [255, 255, 255]


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
    with pytest.raises(ValueError, match="classes 0 to 2"):
        find_class("3", classes, names)
    assert find_class("zebra finch", ["zebra_finch"], ["zebra_finch"]) == 0
    digits = ["0", "1", "10", "2"]  # sorted as folder names are
    assert find_class("1", digits, digits) == 1
    with pytest.raises(ValueError, match="is the index of '10', and the name of class 3"):
        find_class("2", digits, digits)
