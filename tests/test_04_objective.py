"""Chapter 4.  The law of the objective: on the straight line from an image to noise the network
learns the slope.  Labels are sometimes hidden, REPA aligns the tokens of one block with the
features of a frozen encoder, and every weight follows the true gradient of this loss."""

import literal
import pytest
import torch
from helpers import SMALL, VARIANTS, awake, batch, float64
from hypothesis import given, settings
from hypothesis import strategies as st

from dip import (HEADS, REPA_BLOCK, REPA_WEIGHT, drop_labels, flow_matching_loss, interpolate,
                 logit_normal_time)

# --- the path and the loss ------------------------------------------------------------------------


@settings(max_examples=30)
@given(t=st.lists(st.floats(0, 1), min_size=1, max_size=3), rows=st.integers(1, 3),
       columns=st.integers(1, 3))
def test_the_path_runs_from_data_at_0_to_noise_at_1_with_the_velocity_as_its_slope(
        t, rows, columns):
    """Eq. (6), for each image at its own time.  Catches one time for a batch, and t and 1 - t
    exchanged."""
    x_0, noise = torch.randn(2, len(t), 3, rows, columns, dtype=torch.float64)
    t = torch.tensor(t, dtype=torch.float64)
    mixed = interpolate(x_0, noise, t)
    for b, value in enumerate(t.tolist()):
        slow = literal.interpolate(x_0[b].numpy(), noise[b].numpy(), value)
        torch.testing.assert_close(mixed[b], torch.tensor(slow), rtol=0, atol=1e-12)
    assert torch.equal(interpolate(x_0, noise, 0 * t), x_0)
    late, early = interpolate(x_0, noise, 0 * t + 0.75), interpolate(x_0, noise, 0 * t + 0.25)
    torch.testing.assert_close((late - early) / 0.5, noise - x_0)


@settings(max_examples=12)
@given(name=st.sampled_from(["none", "unet", "unet, hybrid", "unet, clean image"]),
       rows=st.integers(1, 3), columns=st.integers(2, 3), seed=st.integers(0, 99),
       grid=st.none() | st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_the_loss_is_its_formulas(name, rows, columns, seed, grid):
    """Eq. (5) and REPA through the whole network, on rectangles, with noise that is not the image
    and features of any grid, resampled by a triangle as wide as the coarser spacing.

    Catches a cosine over positions instead of dimensions, features picked instead of averaged,
    images mixed up, tokens of another image than x_t, and another flow loss with REPA than without.
    (On a CPU, torch 2.13 resamples to several rows of one column wrongly; images of that shape can
    be drawn but not trained on.)
    """
    config = VARIANTS[name].replace(repa_dim=5)
    with float64(), torch.no_grad():
        model = awake(config, seed)
        x_0, t, y = batch(config, B=2, size=(4 * rows, 4 * columns), seed=seed)
        noise, features = torch.randn_like(x_0), grid and torch.randn(2, 5, *grid)
        flow, repa = flow_matching_loss(model, x_0, y, t, noise, features)
    w = literal.weights_of(model)
    for b in range(2):
        image, eps = x_0[b].numpy(), noise[b].numpy()
        x_t = literal.interpolate(image, eps, t[b].item())
        v, tokens = literal.dip(w, config, x_t, t[b].item(), y[b].item())
        assert flow[b].item() == pytest.approx(literal.flow_matching(v, image, eps), rel=1e-9)
        expected = grid and literal.repa(
            tokens, literal.resampled(features[b].numpy(), rows, columns)) or 0
        assert repa[b].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# --- times and labels -----------------------------------------------------------------------------


@settings(max_examples=30)
@given(z=st.floats(-5, 5), mean=st.floats(-2, 2), std=st.floats(0, 2))
def test_the_logit_of_time_is_normal(z, mean, std):
    """log(t / (1 - t)) = mean + std z; by default mean 0 and deviation 1."""
    one = torch.tensor([z], dtype=torch.float64)
    for t, expected in ((logit_normal_time(one, mean, std), mean + std * z),
                        (logit_normal_time(one), z)):
        assert torch.logit(t).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=50)
@given(u=st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 0.99]), min_size=1, max_size=9),
       rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]), num_classes=st.integers(1, 4))
def test_a_label_becomes_the_null_class_where_its_own_draw_is_below_the_rate(u, rate, num_classes):
    """Catches a null class of 1000, one draw for a batch, and u <= rate: at rate 0 no label is
    dropped.  The default is the paper's 0.1."""
    y, draws = torch.arange(len(u)) % num_classes, torch.tensor(u, dtype=torch.float64)
    dropped = drop_labels(y, draws, num_classes, rate)
    assert dropped.tolist() == [num_classes if draw < rate else k % num_classes
                                for k, draw in enumerate(u)]
    assert dropped.dtype == torch.long
    assert torch.equal(drop_labels(y, draws, num_classes), drop_labels(y, draws, num_classes, 0.1))


# --- REPA -----------------------------------------------------------------------------------------


def test_features_in_low_precision_are_compared_in_float32():
    """An encoder under autocast returns bfloat16.  Catches resampling or a cosine in that
    precision."""
    x_0, t, y = batch(SMALL, size=(12, 8))
    model, features = awake(SMALL.replace(repa_dim=6)), torch.randn(2, 6, 7, 5).bfloat16()
    with torch.no_grad():
        _, repa = flow_matching_loss(model, x_0, y, t, x_0, features)
        _, exact = flow_matching_loss(model, x_0, y, t, x_0, features.float())
    assert torch.equal(repa, exact)


@pytest.mark.parametrize("depth", [1, 8, 9])
def test_alignment_trains_the_blocks_up_to_the_eighth_and_no_later_one(depth):
    """As in the release, whose loss is flow + 0.5 repa.  A short network aligns its last block.
    Catches tokens that are aligned only after detail was injected."""
    assert (REPA_BLOCK, REPA_WEIGHT) == (8, 0.5)
    config = SMALL.replace(depth=depth, repa_dim=6)
    model = awake(config)
    assert [layer.out_features for layer in model.repa_projector[::2]] == [16, 16, 6]
    x_0, t, y = batch(config)
    flow_matching_loss(model, x_0, y, t, x_0, torch.randn(2, 6, 4, 4))[1].mean().backward()
    moved = [any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
             for block in model.blocks]
    assert moved == [k < 8 for k in range(depth)]
    model = awake(config.replace(depth=depth + 1, placement="hybrid"))
    model.repa_after = model.inject_after                    # as with 16 blocks: no detail yet
    flow_matching_loss(model, x_0, y, t, x_0, torch.randn(2, 6, 4, 4))[1].mean().backward()
    assert model.inject_embed.weight.grad is None


# --- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head, placement, prediction", [
    ("none", "post-hoc", "v"), ("none", "post-hoc", "x"), ("unet on the image", "hybrid", "x"),
    ("unet", "intermediate", "v"), ("coordinate", "post-hoc", "x"),
    *((head, "hybrid", "v") for head in HEADS)])
def test_every_parameter_gets_the_gradient_of_finite_differences(head, placement, prediction):
    """Training's loss L, flow + 0.5 repa, of one image with a label and one without.  Each
    parameter p moves along a random u of length 1: grad . u = (L(p + hu) - L(p - hu)) / 2h, where
    the third derivative and the rounding of L together add less than 1e-9.

    Catches a detach or a no_grad anywhere (queries, gates, the time in the head, injected tokens),
    a null class that never learns (padding_idx), and branches that are never used.
    """
    config = VARIANTS[head].replace(placement=placement, depth=2, num_classes=2,
                                    prediction=prediction, repa_dim=5)
    with float64():
        model = awake(config)
        x_0, noise, features = (torch.randn(2, channels, 8, 8) for channels in (3, 3, 5))
        t, y = torch.tensor([0.3, 0.8]), torch.tensor([1, 2])            # 2: no label

        def loss():
            flow, repa = flow_matching_loss(model, x_0, y, t, noise, features)
            return (flow + REPA_WEIGHT * repa).mean()

        loss().backward()
        h, wrong = 1e-4, []
        for name, p in model.named_parameters():
            u, start, losses = torch.randn(p.shape), p.detach().clone(), []
            u = u / u.norm()
            with torch.no_grad():
                for moved in (start + h * u, start - h * u):
                    p.copy_(moved)
                    losses.append(loss().item())
                p.copy_(start)
            slope = (losses[0] - losses[1]) / (2 * h)
            grad = 0 if p.grad is None else (p.grad * u).sum().item()
            if abs(slope) < 1e-8 or grad != pytest.approx(slope, rel=1e-5, abs=2e-9):
                wrong.append((name, grad, slope))
    assert wrong == []
