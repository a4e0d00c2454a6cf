"""Chapter 3: what is minimised."""

import pytest
import torch
from helpers import SMALL, awake, batch

from dip import DiP, drop_labels, flow_matching_loss, interpolate, logit_normal_time


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=g), torch.randn(4, 3, 16, 16, generator=g)


def test_the_path_runs_from_data_at_0_to_noise_at_1_with_the_velocity_as_its_slope(pair):
    """Eq. (6), and v = d x_t / dt, the same everywhere on a straight line."""
    x_0, noise = pair
    assert torch.equal(interpolate(x_0, noise, torch.zeros(4)), x_0)
    assert torch.equal(interpolate(x_0, noise, torch.ones(4)), noise)
    late, early = (interpolate(x_0, noise, torch.full((4,), t)) for t in (0.75, 0.25))
    torch.testing.assert_close((late - early) / 0.5, noise - x_0)


def test_the_loss_is_zero_for_the_true_velocity_and_the_mean_square_error_for_another(pair):
    """Eq. (5), image by image."""
    x_0, noise = pair
    t, y = torch.rand(4), torch.zeros(4, dtype=torch.long)
    off = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None, None]
    flow, repa = flow_matching_loss(lambda x_t, t, y: noise - x_0 + off, x_0, y, t, noise)
    torch.testing.assert_close(flow, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert repa.tolist() == [0, 0, 0, 0]


def test_the_model_is_shown_the_interpolated_image(pair):
    x_0, noise = pair
    seen = []
    flow_matching_loss(
        lambda *args: seen.append(args) or noise, x_0, torch.arange(4), torch.rand(4), noise
    )
    x_t, t, y = seen[0]
    torch.testing.assert_close(x_t, interpolate(x_0, noise, t))
    assert torch.equal(y, torch.arange(4))


def test_the_logit_of_time_is_normal():
    z = torch.linspace(-3, 3, 13)
    for mean, std in ((0, 1), (0.8, 0.5)):
        t = logit_normal_time(z, mean, std)
        assert ((0 < t) & (t < 1)).all()
        torch.testing.assert_close((torch.logit(t) - mean) / std, z)
    assert logit_normal_time(torch.zeros(1)).item() == 0.5


def test_labels_are_dropped_at_the_given_rate_and_become_the_null_class():
    """Forbids a hard-coded null class 1000."""
    y, u = torch.arange(1000) % 5, (torch.arange(1000) + 0.5) / 1000
    dropped = drop_labels(y, u, num_classes=5, rate=0.1)
    assert (dropped[:100] == 5).all() and torch.equal(dropped[100:], y[100:])
    assert torch.equal(drop_labels(y, u, 5, rate=0.0), y)


def test_alignment_is_zero_with_ones_own_tokens_and_two_with_their_negatives():
    """REPA: 1 - cosine similarity, which lengths do not change."""
    model = awake(SMALL.replace(repa_dim=6))
    x_0, t, y = batch(SMALL)
    with torch.no_grad():
        _, tokens = model(interpolate(x_0, x_0, t), t, y, align=True)
        for scale, expected in ((3.0, 0.0), (-0.5, 2.0)):
            flow, repa = flow_matching_loss(model, x_0, y, t, x_0, scale * tokens)
            torch.testing.assert_close(repa, torch.full((2,), expected), atol=1e-5, rtol=0)
            torch.testing.assert_close(flow, flow_matching_loss(model, x_0, y, t, x_0)[0])


def test_features_of_another_grid_are_resampled():
    """A constant map stays the same whatever its grid; one that varies is averaged, not cut."""
    model = awake(SMALL.replace(repa_dim=6))
    x_0, t, y = batch(SMALL)
    direction = torch.randn(2, 6, 1, 1)
    losses = [
        flow_matching_loss(model, x_0, y, t, x_0, direction.expand(2, 6, h, w))[1]
        for h, w in ((4, 4), (2, 2), (7, 9))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_alignment_trains_the_blocks_up_to_the_eighth_and_no_later_one():
    config = SMALL.replace(depth=10, repa_dim=6)
    model = awake(config)
    x_0, t, y = batch(config)
    flow_matching_loss(model, x_0, y, t, x_0, torch.randn(2, 6, 4, 4))[1].mean().backward()
    moved = [
        any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
        for block in model.blocks
    ]
    assert moved == [True] * 8 + [False] * 2


def test_the_projector_is_there_only_for_alignment():
    names = dict(DiP(SMALL.replace(repa_dim=6)).named_parameters())
    plain = dict(DiP(SMALL).named_parameters())
    assert {name.split(".")[0] for name in set(names) - set(plain)} == {"repa_projector"}


def test_two_hundred_steps_of_descent_begin_to_learn_one_image_by_heart():
    """Sec. 3.2's overfitting of a single image, in small, judged on noise not trained on."""
    torch.manual_seed(0)
    model = DiP(SMALL)
    x_0, t, y = batch(SMALL, B=16)
    x_0, noise = x_0[:1].expand(16, -1, -1, -1), torch.randn_like(x_0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    before = flow_matching_loss(model, x_0, y, t, noise)[0].mean().item()
    for _ in range(200):
        loss = flow_matching_loss(model, x_0, y, torch.rand(16), torch.randn_like(x_0))[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert flow_matching_loss(model, x_0, y, t, noise)[0].mean().item() < 0.7 * before
