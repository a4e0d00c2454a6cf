"""Chapter 3.  The law of heads: a head sees one patch at a time, its noisy pixels and its token,
and returns its pixels; where it stands and what it is shown is laid out in one place; every
parameter starts by one rule."""

import re

import literal
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from commands import TINY, run
from helpers import (SMALL, VARIANTS, assert_is_its_formula, awake, batch, configurations, float64,
                     influence, shake)
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import dip
import train
from dip import HEADS, PRESETS, DiP, PatchDetailerHead, cosine_basis, cost, patchify


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- each head is its formula -------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=15)
@given(data=st.data(), M=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_head_is_its_formula(head, data, M, seed):
    """Pixel by pixel, whatever patch, widths and depth.  Forbids a skip of another stage, rows and
    columns exchanged, a missing SiLU, norm or bias, weights read in another order."""
    config = data.draw(configurations(heads=(head,), head_input="patch"))
    with float64(), torch.no_grad():
        fast = shake(HEADS[head](config), seed)
        x = torch.randn(M, 3, config.patch_size, config.patch_size)
        s = torch.randn(M, config.hidden_size, 1, 1)
        answer = fast(x, s)
    w = literal.weights_of(fast)
    for m in range(M):
        slow = literal.HEADS[head](w, x[m].numpy(), s[m].numpy())
        torch.testing.assert_close(answer[m], torch.tensor(slow), rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(data=st.data(), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_unet_on_an_image_is_its_formula(data, rows, columns, seed):
    """A bottleneck of more than one pixel, each under the token whose square it lies in."""
    config = data.draw(configurations(heads=("unet",)))
    with float64(), torch.no_grad():
        fast = shake(HEADS["unet"](config), seed)
        x = torch.randn(1, 3, rows * config.patch_size, columns * config.patch_size)
        s = torch.randn(1, config.hidden_size, rows, columns)
        answer = fast(x, s)
    slow = literal.unet(literal.weights_of(fast), x[0].numpy(), s[0].numpy())
    torch.testing.assert_close(answer[0], torch.tensor(slow), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=8)
@given(data=st.data(), rows=st.integers(1, 2), columns=st.integers(1, 2), B=st.integers(1, 2),
       seed=st.integers(0, 99))
def test_the_network_with_a_head_is_its_formulas(head, data, rows, columns, B, seed):
    """Every placement, input and prediction, with REPA's tokens.  Forbids a placement one block
    off, the wrong context for the head, a token map transposed."""
    config = data.draw(configurations(heads=(head,)))
    assert_is_its_formula(config, rows, columns, B, seed)


# --- who can see whom ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_the_head_alone_is_independent_of_other_patches(name):
    """With tokens held fixed, moving patch j changes output patch j and no other (Sec. 3.3)."""
    model = awake(VARIANTS[name])
    x, _, _ = batch(model.config)
    s, time = torch.randn(2, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        changed = influence(lambda x: model.output(x, s, time, None), x, 4)
    assert torch.equal(changed, torch.eye(16, dtype=torch.bool))


def test_the_head_on_the_whole_image_sees_its_neighbours():
    """Image-level input (Fig. 11): the same U-Net now crosses patch borders."""
    model = awake(VARIANTS["unet on the image"])
    x, _, _ = batch(model.config)
    s, time = torch.randn(2, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        changed = influence(lambda x: model.output(x, s, time, None), x, 4)
    for j in range(16):
        neighbours = [i for i in range(16) if abs(i // 4 - j // 4) <= 1 and abs(i % 4 - j % 4) <= 1]
        assert changed[neighbours, j].all()


@pytest.mark.parametrize("name", HEADS)
def test_the_head_depends_on_its_token(name):
    """Moving token j changes output patch j and no other."""
    model = awake(VARIANTS[name])
    x, _, _ = batch(model.config)
    s, time = torch.randn(2, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        before = patchify(model.output(x, s, time, None), 4)
        moved = s.clone()
        moved[:, 5] = torch.randn(2, 16)
        after = patchify(model.output(x, moved, time, None), 4)
    change = (after - before).abs().amax(dim=(0, 2, 3, 4))
    assert change[5] > 1e-4 and change[torch.arange(16) != 5].max() == 0


@pytest.mark.parametrize("name", HEADS)
def test_the_head_sees_the_sum_of_token_and_time_and_no_label(name):
    """The context is silu(token + time), as released; c, which knows the label, is not used."""
    output, (x, _, _) = awake(VARIANTS[name]).output, batch(SMALL)
    s, time, c = torch.randn(2, 16, 16), torch.randn(2, 16), torch.randn(2, 16)
    seen = []
    output.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[1]))
    v = output(x, s, time, c)
    assert torch.equal(output(x, s, time, None), v)
    torch.testing.assert_close(output(x, s + time[:, None], 0 * time, c), v)
    expected = F.silu(s + time[:, None]).reshape(32, 16, 1, 1)
    torch.testing.assert_close(seen[0], expected)


@settings(max_examples=15)
@given(rows=st.integers(1, 3), columns=st.integers(1, 4), data=st.data())
def test_on_an_image_a_token_lies_where_its_patch_does(rows, columns, data):
    """Moving a token moves the middle of its own patch and of no other: the U-Net's kernels reach
    over the borders, but not that far.  Forbids a token map with rows and columns exchanged, which
    a square image does not show."""
    config = SMALL.replace(patch_size=16, head_input="image", head_depth=2)
    output = shake(PatchDetailerHead(config))
    x, _, _ = batch(config, B=1, size=(16 * rows, 16 * columns))
    s, time = torch.randn(1, rows * columns, 16), torch.randn(1, 16)
    n, moved = data.draw(st.integers(0, rows * columns - 1)), s.clone()
    moved[:, n] += 1
    with torch.no_grad():
        change = (output(x, moved, time, None) - output(x, s, time, None)).abs()
    middle = patchify(change, 16)[0, :, :, 6:10, 6:10].amax(dim=(1, 2, 3))
    assert (middle > 0).nonzero().tolist() == [[n]]


# --- the U-Net ----------------------------------------------------------------------------------


def test_every_way_up_meets_the_skip_of_its_own_size():
    """The second half of what a merging convolution is shown is what the way down left there."""
    head, left, merged, pooled = shake(HEADS["unet"](PRESETS["DiP-Ti/16"])), [], [], []
    for conv in head.down:
        conv.register_forward_hook(lambda conv, inputs, output: left.append(F.silu(output)))
    head.pool.register_forward_hook(lambda pool, inputs, output: pooled.append(output))
    for conv in head.merge:
        conv.register_forward_pre_hook(lambda conv, inputs: merged.append(inputs[0]))
    with torch.no_grad():
        head(torch.randn(2, 3, 16, 16), torch.randn(2, 192, 1, 1))
    assert [x.shape[-1] for x in left] == [16, 8, 4, 2] and pooled[-1].shape[-1] == 1
    for skip, x in zip(left[::-1], merged, strict=True):
        assert torch.equal(x.chunk(2, dim=1)[1], skip)
    for full, half in zip(left, pooled, strict=True):
        assert torch.equal(half, F.max_pool2d(full, 2))


def test_the_head_has_the_depth_and_width_it_is_told():
    """Fig. 10a: depth counts down/up-sampling stages, width the channels of the first."""
    head = PatchDetailerHead(PRESETS["DiP-XL/16"].replace(head_depth=3, head_width=8)).head
    channels = {name: [(conv.in_channels, conv.out_channels) for conv in getattr(head, name)]
                for name in ("down", "up", "merge")}
    assert channels["down"] == [(3, 8), (8, 16), (16, 32)]
    assert channels["up"] == [(32, 32), (16, 16), (8, 8)]
    assert channels["merge"] == [(64, 16), (32, 8), (16, 8)]


@pytest.mark.parametrize("head, layers, default", [
    ("mlp", "layers", (1280, 2)), ("coordinate", "generators", (64, 4)),
    ("attention", "blocks", (64, 10))])
def test_the_other_heads_have_the_depth_and_width_they_are_told(head, layers, default):
    """Forbids head_depth or head_width ignored: 0 alone stands for the head's own default."""
    for head_width, head_depth in ((48, 3), (0, 0)):
        config = SMALL.replace(head=head, head_width=head_width, head_depth=head_depth)
        built = HEADS[head](config)
        expected = (head_width, head_depth) if head_width else default
        assert (built.out.in_features, len(getattr(built, layers))) == expected


def test_the_unet_is_the_one_of_table_4():
    head = PatchDetailerHead(PRESETS["DiP-XL/16"]).head
    assert [conv.out_channels for conv in head.down] == [64, 128, 256, 512]
    assert (head.bottleneck.in_channels, head.bottleneck.out_channels) == (512 + 1152, 512)
    assert [conv.out_channels for conv in head.up] == [512, 256, 128, 64]
    assert [conv.out_channels for conv in head.merge] == [256, 128, 64, 64]
    assert (head.out.in_channels, head.out.out_channels, head.out.kernel_size) == (64, 3, (1, 1))
    for conv in (*head.down, *head.merge):
        assert conv.kernel_size == (3, 3) and conv.padding == (1, 1)
    for conv in head.up:
        assert conv.kernel_size == conv.stride == (2, 2)


def test_the_unet_head_costs_what_is_counted_by_hand():
    """Its convolutions at every size from 16 to 1; it stands in place of DiT's final layer."""
    with_head, flops = cost(PRESETS["DiP-XL/16"])
    without, flops_without = cost(PRESETS["DiT-XL/16"])
    weights = {16: 9 * (3 * 64 + 128 * 64) + 64 * 3, 8: 9 * (64 * 128 + 256 * 64),
               4: 9 * (128 * 256 + 512 * 128), 2: 9 * (256 * 512 + 1024 * 256),
               1: (512 + 1152) * 512}
    ups = {1: 4 * 512 * 512, 2: 4 * 256 * 256, 4: 4 * 128 * 128, 8: 4 * 64 * 64}
    products = sum(n * n * count for table in (weights, ups) for n, count in table.items())
    final = 2 * 1152 * 2 * 1152 + 2 * 256 * 1152 * 768           # DiT's last layer, not there
    assert flops == flops_without - final + 2 * 256 * products
    biases = (64 + 128 + 256 + 512) + 512 + (512 + 256 + 128 + 64) + (256 + 128 + 64 + 64) + 3
    head = sum(weights.values()) + sum(ups.values()) + biases
    assert with_head == without - (2 * 1152**2 + 2 * 1152 + 1152 * 768 + 768) + head


# --- the coordinate head ------------------------------------------------------------------------


@pytest.mark.parametrize("P", [8, 11, 16])
def test_the_basis_is_orthogonal_and_separable(P):
    """DCT-II: products of different frequencies vanish, and a function of row times one of column
    is that product.  Forbids positions at the pixels' corners, and frequencies left out."""
    basis = cosine_basis(P).double()
    gram = basis.T @ basis
    norms = [P if a == 0 else P / 2 for a in range(8)]
    expected = torch.tensor([p * q for p in norms for q in norms], dtype=torch.float64)
    torch.testing.assert_close(gram, expected.diag(), rtol=0, atol=1e-4)
    grid = basis.view(P, P, 8, 8)
    row, column = grid[:, :1, :, :1], grid[:1, :, :1, :]         # the other frequency is 0
    torch.testing.assert_close(row * column, grid)
    assert grid[0, P - 1, 0, 1] < 0 < grid[0, 0, 0, 1] and grid[P - 1, 0, 1, 0] < 0   # who is who


def test_a_pixel_of_the_coordinate_head_depends_on_itself_alone():
    """Forbids pixels in another order on the way in than on the way out."""
    head, x = shake(HEADS["coordinate"](VARIANTS["coordinate"])), torch.randn(1, 3, 4, 4)
    s = torch.randn(1, 16, 1, 1)
    for i in range(4):
        for j in range(4):
            moved = x.clone()
            moved[0, :, i, j] += 1
            with torch.no_grad():
                changed = (head(moved, s) - head(x, s)).abs().amax(dim=(0, 1)) > 1e-6
            assert changed.nonzero().tolist() == [[i, j]]


def test_the_coordinate_head_does_not_see_the_length_of_its_token():
    """The columns of the written matrices have length 1, whatever the token's is."""
    head, x = shake(HEADS["coordinate"](VARIANTS["coordinate"])), torch.randn(2, 3, 4, 4)
    s = torch.randn(2, 16, 1, 1)
    torch.testing.assert_close(head(x, 7 * s), head(x, s))
    assert (head(x, -s) - head(x, s)).abs().max() > 1e-3


# --- the attention head -------------------------------------------------------------------------


def test_the_attention_head_sees_all_pixels_and_where_they_are(monkeypatch):
    """Without positions, shuffled pixels give shuffled answers; with them, others.  One moved pixel
    moves every pixel of its patch."""
    head, x = shake(HEADS["attention"](VARIANTS["attention"])), torch.randn(2, 3, 4, 4)
    s, order = torch.randn(2, 16, 1, 1), torch.randperm(16)

    def shuffled(x):
        return x.flatten(2)[:, :, order].view(x.shape)

    with torch.no_grad():
        assert (head(shuffled(x), s) - shuffled(head(x, s))).abs().max() > 1e-3
        moved = x.clone()
        moved[:, :, 1, 2] += 1
        assert ((head(moved, s) - head(x, s)).abs().amax(dim=1) > 1e-6).all()
        monkeypatch.setattr(dip, "rope_angles", lambda rows, columns, d, device: torch.zeros(
            rows * columns, d // 2))
        torch.testing.assert_close(head(shuffled(x), s), shuffled(head(x, s)))


# --- placements ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("placement, order", [
    ("post-hoc", "blocks, then output"),
    ("intermediate", "half the blocks, inject_detail, inject_embed, the others, then output"),
    ("hybrid", "half the blocks, inject_detail, inject_embed, the others, then output")])
def test_the_head_stands_where_its_placement_says(placement, order, depth):
    """Fig. 5.  Forbids a placement one block off, and an injection that is never used."""
    model, called = awake(SMALL.replace(placement=placement, depth=depth)), []
    for name, module in model.named_modules():
        if name.startswith("blocks.") and name.count(".") == 1 or name in (
                "inject_detail", "inject_embed", "output"):
            module.register_forward_hook(lambda module, i, o, name=name: called.append(name))
    model(*batch(SMALL))
    blocks = [f"blocks.{k}" for k in range(depth)]
    half = depth // 2
    expected = [*blocks, "output"] if order.startswith("blocks") else [
        *blocks[:half], "inject_detail", "inject_embed", *blocks[half:], "output"]
    assert called == expected
    kind = dip.FinalLayer if placement == "intermediate" else PatchDetailerHead
    assert type(model.output) is kind


def test_a_fresh_hybrid_is_a_fresh_post_hoc():
    """The way back of an injection starts at 0: at first it adds nothing."""
    hybrid, post_hoc = DiP(SMALL.replace(placement="hybrid")), DiP(SMALL)
    missing = post_hoc.load_state_dict(hybrid.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert all(name.startswith("inject_") for name in missing.unexpected_keys)
    x, t, y = batch(SMALL)
    assert torch.equal(hybrid(x, t, y), post_hoc(x, t, y))
    assert (awake(SMALL.replace(placement="hybrid"))(x, t, y)
            - awake(SMALL)(x, t, y)).abs().max() > 1e-3


# --- initialisation -----------------------------------------------------------------------------


def fan_in(weight):
    return weight[0].numel()


# (pattern of "parameter of head", distribution, its deviation): the first that matches
RULES = [
    (r"^inject_embed\.", "constant", lambda w: 0),
    (r"^embed\.bias", "constant", lambda w: 0),
    (r"^embed\.weight", "uniform", lambda w: (2 / sum(w.shape)) ** 0.5),                 # Xavier
    (r"^(label|time\.mlp\.[02])\.weight", "normal", lambda w: 0.02),
    (r"head\..*bias of (unet|mlp)$", "constant", lambda w: 0),
    (r"head\.up\.\d\.weight of unet$", "constant",         # 1 where a channel meets itself
     lambda w: torch.eye(len(w))[:, :, None, None].expand_as(w).flatten()),
    (r"head\..*weight of (unet|mlp)$", "normal", lambda w: (2 / fan_in(w)) ** 0.5),      # He
    (r"norms?\d?\.", "constant", lambda w: 1),
    (r"", "uniform", lambda w: (3 * fan_in(w)) ** -0.5),      # PyTorch's: within 1 / sqrt(fan in)
]


@pytest.mark.parametrize("head, placement", [
    ("none", "post-hoc"), *((head, "hybrid") for head in HEADS), ("mlp", "intermediate")])
def test_every_parameter_starts_by_the_table_of_initialisation(head, placement):
    """Forbids a later rule that overrides an earlier one, and a layer that no rule was meant for.

    Deviation and largest value: a deviation estimated from n values is off by 1 / sqrt(2n), and
    five times that is allowed; a uniform value lies within sqrt(3) deviations, 1000 normal ones do
    not.
    """
    config = SMALL.replace(hidden_size=96, head=head, repa_dim=40, placement=placement,
                           head_width=0 if head == "none" else 32,
                           head_depth=0 if head == "none" else 2)
    model = DiP(config)
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        _, kind, rule = next(row for row in RULES if re.search(row[0], f"{name} of {head}"))
        own = weights.get(name.replace("bias", "weight"), parameter)     # a bias has its layer's
        values, std = parameter.detach().double().flatten(), rule(own)
        if kind == "constant":
            assert (values == std).all(), name
            continue
        n = values.numel()
        assert values.unique().numel() > n / 2, name
        assert abs(values.square().mean().sqrt() / std - 1) < 5 / (2 * n) ** 0.5, name
        assert abs(values.mean()) < 5 * std / n**0.5, name
        largest = values.abs().max() / std
        assert largest <= 3**0.5 + 1e-6 if kind == "uniform" else largest > 3**0.5 or n < 1000, name


def test_two_seeds_start_differently_and_one_seed_alike():
    """Forbids weights that are not a function of the seed alone."""
    def fresh(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in DiP(SMALL).parameters()])
    assert torch.equal(fresh(0), fresh(0)) and not torch.equal(fresh(0), fresh(1))


def test_a_fresh_network_draws_something():
    """No head and no final layer starts closed: the first gradients reach every block."""
    for name in VARIANTS:
        x, t, y = batch(VARIANTS[name])
        assert DiP(VARIANTS[name])(x, t, y).std() > 0.01


# --- a head of one's own ------------------------------------------------------------------------


class ToyHead(nn.Module):
    """One linear layer on the colours of a pixel and its patch's token: all that a head must be."""

    WIDTH, DEPTH = 1, 1

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(3 + config.hidden_size, 3)

    def forward(self, x, s):
        s = s.expand(-1, -1, *x.shape[2:])
        return self.out(torch.cat([x, s], dim=1).movedim(1, -1)).movedim(-1, 1)


def test_a_new_head_is_a_class_and_a_line(monkeypatch, tmp_path):
    """It is legal, trains a step, and is loaded from its checkpoint.  Forbids a second list of
    heads: without its line in HEADS the same command is refused."""
    words = [train, TINY.replace("head_depth=2 head_width=4", "head=toy"), "--steps 1 --out",
             tmp_path / "run"]
    with pytest.raises(ValueError, match="head='toy' is not one of: none, unet, mlp"):
        run(monkeypatch, *words)
    monkeypatch.setitem(HEADS, "toy", ToyHead)
    run(monkeypatch, *words)
    model, info = common.load_model(tmp_path / "run", ema=False)
    assert type(model.output.head) is ToyHead and info["step"] == 1
    torch.manual_seed(0)
    config = model.config
    assert not torch.equal(model.output.head.out.weight, DiP(config).output.head.out.weight)
    x, t, y = batch(config, size=(8, 12))
    assert influence(lambda x: model(x, t, y), x, 4).all()
