"""Chapter 4.  The law of the objective: on the straight line from an image to noise the network
learns the slope; labels are sometimes hidden, and REPA aligns the tokens of one block with the
features of a frozen encoder."""

import literal
import pytest
import torch
from helpers import SMALL, VARIANTS, awake, batch, float64
from hypothesis import given, settings
from hypothesis import strategies as st

from dip import (REPA_BLOCK, REPA_WEIGHT, DiP, drop_labels, flow_matching_loss, interpolate,
                 logit_normal_time)


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=g), torch.randn(4, 3, 16, 16, generator=g)


# --- the path and the loss ----------------------------------------------------------------------


def test_the_path_runs_from_data_at_0_to_noise_at_1_with_the_velocity_as_its_slope(pair):
    """Eq. (6), and v = d x_t / dt, the same everywhere on a straight line."""
    x_0, noise = pair
    assert torch.equal(interpolate(x_0, noise, torch.zeros(4)), x_0)
    assert torch.equal(interpolate(x_0, noise, torch.ones(4)), noise)
    late, early = (interpolate(x_0, noise, torch.full((4,), t)) for t in (0.75, 0.25))
    torch.testing.assert_close((late - early) / 0.5, noise - x_0)


@given(t=st.lists(st.floats(0, 1), min_size=1, max_size=3), rows=st.integers(1, 3),
       columns=st.integers(1, 3))
def test_every_image_is_mixed_by_its_own_time(t, rows, columns):
    """Forbids one time for a batch, and t and 1 - t exchanged."""
    x_0, noise = torch.randn(2, len(t), 3, rows, columns, dtype=torch.float64)
    mixed = interpolate(x_0, noise, torch.tensor(t, dtype=torch.float64))
    for b, value in enumerate(t):
        slow = literal.interpolate(x_0[b].numpy(), noise[b].numpy(), value)
        torch.testing.assert_close(mixed[b], torch.tensor(slow), rtol=0, atol=1e-12)


def test_the_loss_is_zero_for_the_true_velocity_and_the_mean_square_error_for_another(pair):
    """Eq. (5), image by image."""
    x_0, noise = pair
    t, y = torch.rand(4), torch.zeros(4, dtype=torch.long)
    off = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None, None]
    flow, repa = flow_matching_loss(lambda x_t, t, y: noise - x_0 + off, x_0, y, t, noise)
    torch.testing.assert_close(flow, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert repa.tolist() == [0, 0, 0, 0]


def test_the_model_is_shown_the_interpolated_image(pair):
    """And its own time and label, in that order."""
    x_0, noise = pair
    seen, t = [], torch.rand(4)
    flow_matching_loss(lambda *args: seen.append(args) or noise, x_0, torch.arange(4), t, noise)
    torch.testing.assert_close(seen[0][0], interpolate(x_0, noise, t))
    assert torch.equal(seen[0][1], t) and torch.equal(seen[0][2], torch.arange(4))


@settings(max_examples=8)
@given(name=st.sampled_from(["none", "unet", "unet, hybrid", "unet, clean image"]),
       rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99),
       aligned=st.booleans())
def test_the_loss_is_its_formulas(name, rows, columns, seed, aligned):
    """Eq. (5) and REPA through the whole network, on rectangles, with noise that is not the image.

    Forbids a cosine over positions instead of dimensions, losses of images mixed up, and another
    flow loss with REPA than without.  1e-6: the frequencies of time are float32.
    """
    config = VARIANTS[name].replace(repa_dim=5)
    with float64(), torch.no_grad():
        model = awake(config, seed)
        x_0, t, y = batch(config, B=2, size=(4 * rows, 4 * columns), seed=seed)
        noise, features = torch.randn_like(x_0), torch.randn(2, 5, rows, columns)
        flow, repa = flow_matching_loss(model, x_0, y, t, noise, features if aligned else None)
    w = literal.weights_of(model)
    for b in range(2):
        image, eps = x_0[b].numpy(), noise[b].numpy()
        x_t = literal.interpolate(image, eps, t[b].item())
        v, tokens = literal.dip(w, config, x_t, t[b].item(), y[b].item())
        assert flow[b].item() == pytest.approx(literal.flow_matching(v, image, eps), rel=1e-6)
        expected = literal.repa(tokens, features[b].numpy()) if aligned else 0
        assert repa[b].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


# --- times and labels ---------------------------------------------------------------------------


def test_the_logit_of_time_is_normal():
    """t is the sigmoid of a normal draw; its mean and deviation are those of the logit."""
    z = torch.linspace(-3, 3, 13)
    for mean, std in ((0, 1), (0.8, 0.5)):
        t = logit_normal_time(z, mean, std)
        assert ((0 < t) & (t < 1)).all()
        torch.testing.assert_close((torch.logit(t) - mean) / std, z)
    assert logit_normal_time(torch.zeros(1)).item() == 0.5


@given(z=st.floats(-5, 5), mean=st.floats(-2, 2), std=st.floats(0, 2))
def test_time_solves_the_logit(z, mean, std):
    """Without mean and deviation they are 0 and 1."""
    t = logit_normal_time(torch.tensor([z], dtype=torch.float64), mean, std).item()
    assert t == pytest.approx(literal.logit_normal_time(z, mean, std), rel=1e-9)
    plain = logit_normal_time(torch.tensor([z], dtype=torch.float64)).item()
    assert plain == pytest.approx(literal.logit_normal_time(z, 0, 1), rel=1e-9)


def test_labels_are_dropped_at_the_given_rate_and_become_the_null_class():
    """Forbids a hard-coded null class 1000."""
    y, u = torch.arange(1000) % 5, (torch.arange(1000) + 0.5) / 1000
    dropped = drop_labels(y, u, num_classes=5, rate=0.1)
    assert (dropped[:100] == 5).all() and torch.equal(dropped[100:], y[100:])
    assert torch.equal(drop_labels(y, u, num_classes=5), dropped)        # the paper's rate
    assert torch.equal(drop_labels(y, u, 5, rate=0.0), y)
    assert dropped.dtype == torch.long


@given(u=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99]), min_size=1, max_size=9),
       rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]), num_classes=st.integers(1, 4))
def test_a_label_is_dropped_where_its_own_draw_is_below_the_rate(u, rate, num_classes):
    """Forbids one draw for a batch, and u <= rate: at rate 0 nothing is dropped."""
    y = torch.arange(len(u)) % num_classes
    dropped = drop_labels(y, torch.tensor(u, dtype=torch.float64), num_classes, rate)
    assert dropped.tolist() == literal.drop_labels(y.tolist(), u, num_classes, rate)


# --- REPA ---------------------------------------------------------------------------------------


@pytest.fixture
def aligned():
    """A model with a projector, and what its loss needs on a rectangle of 3 x 2 patches"""
    model = awake(SMALL.replace(repa_dim=6))
    x_0, t, y = batch(SMALL, size=(12, 8))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, tokens = model(interpolate(x_0, noise, t), t, y, align=True)
    assert tokens.shape == (2, 6, 3, 2)
    return model, (x_0, y, t, noise), tokens


def test_alignment_is_zero_with_ones_own_tokens_and_two_with_their_negatives(aligned):
    """REPA: 1 - cosine similarity, which lengths do not change.  The tokens are those of x_t, not
    of the clean image or the noise; the flow loss is the one without features."""
    model, examples, tokens = aligned
    with torch.no_grad():
        for scale, expected in ((3.0, 0.0), (-0.5, 2.0)):
            flow, repa = flow_matching_loss(model, *examples, scale * tokens)
            torch.testing.assert_close(repa, torch.full((2,), expected), atol=1e-5, rtol=0)
            torch.testing.assert_close(flow, flow_matching_loss(model, *examples)[0])


def test_every_patch_of_an_image_counts_alike_and_for_its_image_alone(aligned):
    """One feature of 6 negated: 2/6 for that image, 0 for the other, wherever the patch lies."""
    model, examples, tokens = aligned
    for row in range(3):
        for column in range(2):
            features = tokens.clone()
            features[1, :, row, column] *= -1
            with torch.no_grad():
                _, repa = flow_matching_loss(model, *examples, features)
            torch.testing.assert_close(repa, torch.tensor([0, 2 / 6]), atol=1e-5, rtol=0)


@given(old=st.tuples(st.integers(1, 7), st.integers(1, 7)))
@settings(max_examples=20)
def test_features_of_another_grid_are_averaged_and_not_picked(old):
    """Resampled with a triangle as wide as the coarser spacing.  Forbids taking every k-th."""
    config = SMALL.replace(repa_dim=6)
    with float64(), torch.no_grad():
        model = awake(config)
        x_0, t, y = batch(config, size=(12, 8))
        noise, features = torch.randn_like(x_0), torch.randn(2, 6, *old)
        _, tokens = model(interpolate(x_0, noise, t), t, y, align=True)
        _, repa = flow_matching_loss(model, x_0, y, t, noise, features)
    for b in range(2):
        resampled = literal.resampled(features[b].numpy(), 3, 2)
        expected = literal.repa(list(tokens[b].flatten(1).T.numpy()), resampled)
        assert repa[b].item() == pytest.approx(expected, rel=1e-9)


def test_ripples_finer_than_the_grid_do_not_count(aligned):
    """A feature map four times as fine, with a checkerboard on it as large as the features.  Of it
    remains what the border cuts from a triangle, 1/14 for each axis: 1/196, where picking every
    fourth feature would keep all of it."""
    model, examples, tokens = aligned
    fine = tokens.repeat_interleave(4, 2).repeat_interleave(4, 3)
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(8), indexing="ij")
    with torch.no_grad():
        plain = flow_matching_loss(model, *examples, fine)[1]
        rippled = flow_matching_loss(model, *examples, fine + (-1.0) ** (rows + columns))[1]
    assert (rippled - plain).abs().max() < 1 / 196


def test_features_of_another_grid_are_resampled(aligned):
    """A constant map stays the same whatever its grid."""
    model, examples, _ = aligned
    direction = torch.randn(2, 6, 1, 1)
    losses = [flow_matching_loss(model, *examples, direction.expand(2, 6, h, w))[1]
              for h, w in ((3, 2), (2, 2), (7, 9))]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_features_of_a_low_precision_are_compared_in_float32(aligned):
    """An encoder under autocast answers in bfloat16: neither resampling nor cosine goes on in it,
    whose last digit is 1/256."""
    model, examples, _ = aligned
    features = torch.randn(2, 6, 7, 5).bfloat16()
    with torch.no_grad():
        _, repa = flow_matching_loss(model, *examples, features)
        _, exact = flow_matching_loss(model, *examples, features.float())
        with torch.autocast("cpu", torch.bfloat16):
            _, rough = flow_matching_loss(model, *examples, features)
    assert torch.equal(repa, exact)
    assert rough.dtype == torch.float32 and (rough - exact).abs().max() < 0.05


def test_the_block_and_the_weight_are_those_of_the_release():
    """The loss that is trained on is flow + 0.5 repa, after block 8."""
    assert (REPA_BLOCK, REPA_WEIGHT) == (8, 0.5)


@pytest.mark.parametrize("depth", [1, 7, 8, 10])
def test_alignment_trains_the_blocks_up_to_the_eighth_and_no_later_one(depth):
    """A network of fewer blocks is aligned after its last."""
    config = SMALL.replace(depth=depth, repa_dim=6)
    model = awake(config)
    x_0, t, y = batch(config)
    flow_matching_loss(model, x_0, y, t, x_0, torch.randn(2, 6, 4, 4))[1].mean().backward()
    moved = [any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
             for block in model.blocks]
    assert moved == [k < 8 for k in range(depth)]


def test_the_projector_is_there_only_for_alignment():
    """Three layers, D wide inside, to the encoder's width, as released."""
    model = DiP(SMALL.replace(repa_dim=6))
    names = dict(model.named_parameters())
    plain = dict(DiP(SMALL).named_parameters())
    assert {name.split(".")[0] for name in set(names) - set(plain)} == {"repa_projector"}
    layers = [layer for layer in model.repa_projector if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [
        (16, 16), (16, 16), (16, 6)]


# --- learning -----------------------------------------------------------------------------------


def learn_by_heart(config, blocks_learn):
    """What 200 steps of descent on one image leave of the first loss, on noise not trained on"""
    torch.manual_seed(0)
    model = DiP(config)
    model.blocks.requires_grad_(blocks_learn)
    x_0, t, y = batch(config, B=16)
    x_0, noise = x_0[:1].expand(16, -1, -1, -1), torch.randn_like(x_0)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-2, weight_decay=0)
    before = flow_matching_loss(model, x_0, y, t, noise)[0].mean().item()
    for _ in range(200):
        loss = flow_matching_loss(model, x_0, y, torch.rand(16), torch.randn_like(x_0))[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return flow_matching_loss(model, x_0, y, t, noise)[0].mean().item() / before


@pytest.mark.parametrize("head, bar", [("none", 0.55), ("unet", 0.6)])
def test_two_hundred_steps_of_descent_begin_to_learn_one_image_by_heart(head, bar):
    """Sec. 3.2's overfitting of a single image, in small.  The bar lies between a whole network
    (0.46 without a head, 0.57 with the U-Net) and one whose blocks are frozen (0.64, 0.65)."""
    assert learn_by_heart(VARIANTS[head], True) < bar < learn_by_heart(VARIANTS[head], False)
