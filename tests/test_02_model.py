"""Chapter 2.  The law of the backbone: every patch talks to every other, by content and by relative
position, under one condition (time and label); it is the network its formulas say, of the size that
its configuration says, and a configuration either runs or is refused in one line."""

import dataclasses

import literal
import numpy as np
import pytest
import torch
from helpers import (SMALL, VARIANTS, assert_is_its_formula, awake, batch, configurations, float64,
                     influence, shake)
from hypothesis import given, settings
from hypothesis import strategies as st

import dip
from dip import (PAPER_MILLIONS, PRESETS, Attention, Block, DiP, DiPConfig, SwiGLU, TimeEmbedding,
                 cost, modulate, rope_angles)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rope(angles):
    """cos and sin of angles (..., d/2), grid flattened to tokens"""
    angles = angles.flatten(0, -2)
    return angles.cos(), angles.sin()


def turns(rows, columns, d):
    return [literal.turns(row, column, d) for row, column in literal.positions(rows, columns)]


# --- where: rotary positions --------------------------------------------------------------------


def test_frequencies_are_powers_of_ten_thousand():
    """Forbids another base, and exponents that are fractions of d instead of d/4."""
    frequencies = torch.tensor([1, 0.1, 0.01, 0.001])
    torch.testing.assert_close(rope_angles(2, 1, 16)[1, :4], 16 * frequencies)
    torch.testing.assert_close(rope_angles(1, 2, 16)[1, 4:], 16 * frequencies)


def test_rows_and_columns_turn_different_pairs():
    angles = rope_angles(3, 5, 16).view(3, 5, 8)
    assert torch.equal(angles[0, :, :4], angles[2, :, :4] * 0) and angles[2, 0, 0] == 16
    assert torch.equal(angles[:, 0, 4:], angles[:, 4, 4:] * 0) and angles[0, 4, 4] == 16


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), quarter=st.integers(1, 4))
def test_positions_are_spread_over_the_same_stretch_whatever_the_grid(rows, columns, quarter):
    """[0, 16], as in the release; a single row or column lies at 0."""
    angles = rope_angles(rows, columns, 4 * quarter)
    expected = [[angle for _, _, angle in turn] for turn in turns(rows, columns, 4 * quarter)]
    torch.testing.assert_close(angles, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@settings(max_examples=10)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_every_block_receives_the_angles_of_the_image_it_is_shown(rows, columns):
    """Forbids rows and columns exchanged, which a square image does not show."""
    model, received = awake(VARIANTS["none"]), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: received.append(inputs[2]))
    model(*batch(SMALL, size=(4 * rows, 4 * columns)))
    expected = torch.tensor([[angle for _, _, angle in turn] for turn in turns(rows, columns, 8)])
    assert len(received) == 3
    for cos, sin in received:
        torch.testing.assert_close(cos, expected.cos())
        torch.testing.assert_close(sin, expected.sin())


@settings(max_examples=20)
@given(row=st.integers(0, 5), column=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_rope_makes_attention_depend_on_relative_position_only(row, column, seed):
    """A 3 x 4 window gives the same answer wherever it lies, and another if it is turned."""
    torch.manual_seed(seed)
    attention = shake(Attention(32, 2), seed)
    s = torch.randn(2, 12, 32)
    grid = rope_angles(9, 9, 16).view(9, 9, 8)               # spaced 2 apart
    first = attention(s, rope(grid[:3, :4]))
    moved = attention(s, rope(grid[row : row + 3, column : column + 4]))
    torch.testing.assert_close(first, moved, rtol=1e-4, atol=1e-5)
    turned = attention(s, rope(grid[:4, :3].transpose(0, 1)))
    assert (turned - first).abs().max() > 1e-4


def test_attention_without_positions_is_permutation_equivariant():
    """Forbids an order of tokens that enters by any other way than their positions."""
    attention, s, order = shake(Attention(32, 2)), torch.randn(2, 12, 32), torch.randperm(12)
    nowhere = rope(torch.zeros(12, 8))
    torch.testing.assert_close(attention(s[:, order], nowhere), attention(s, nowhere)[:, order])
    here = rope(rope_angles(3, 4, 16))
    assert (attention(s[:, order], here) - attention(s, here)[:, order]).abs().max() > 1e-3


# --- the block ----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(num_heads=st.integers(1, 3), quarter=st.integers(1, 3), rows=st.integers(1, 3),
       columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_attention_is_softmax_of_turned_queries_and_keys(num_heads, quarter, rows, columns, seed):
    """Forbids rotation the other way, heads merged in another order, norms and scales left out."""
    D = 4 * quarter * num_heads
    with float64():
        attention = shake(Attention(D, num_heads), seed)
        s = torch.randn(2, rows * columns, D)
        fast = attention(s, rope(rope_angles(rows, columns, 4 * quarter)))
    for b in range(2):
        slow = literal.attention(literal.weights_of(attention), num_heads, list(s[b].numpy()),
                                 turns(rows, columns, 4 * quarter))
        torch.testing.assert_close(fast[b], torch.tensor(np.array(slow)), rtol=0, atol=1e-9)


@settings(max_examples=15)
@given(num_heads=st.integers(1, 2), rows=st.integers(1, 3), columns=st.integers(1, 3),
       condition_dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_block_is_its_formula(num_heads, rows, columns, condition_dim, seed):
    """Forbids shift, scale and gate in another order, and a missing SiLU or norm."""
    D = 8 * num_heads
    with float64():
        block = shake(Block(D, num_heads, condition_dim), seed)
        s, c = torch.randn(2, rows * columns, D), torch.randn(2, condition_dim)
        fast = block(s, c, rope(rope_angles(rows, columns, 8)))
    for b in range(2):
        slow = literal.block(literal.weights_of(block), num_heads, list(s[b].numpy()),
                             c[b].numpy(), turns(rows, columns, 8))
        torch.testing.assert_close(fast[b], torch.tensor(np.array(slow)), rtol=0, atol=1e-9)


def test_modulation_by_nothing_is_nothing():
    """Forbids `scale` for `1 + scale`, and shift and scale exchanged."""
    s, other, zero = torch.randn(2, 3, 4), torch.randn(2, 4), torch.zeros(2, 4)
    assert torch.equal(modulate(s, zero, zero), s)
    assert torch.equal(modulate(s, other, zero), s + other[:, None])
    torch.testing.assert_close(modulate(s, zero, other), s + s * other[:, None])


def test_a_block_whose_gates_are_closed_is_the_identity():
    """Forbids gates that do not close, and a branch that goes around its gate (adaLN)."""
    block = shake(Block(16, 2, 5))
    with torch.no_grad():
        for gate in (2, 5):                                  # shift, scale, gate; twice
            block.adaLN.weight[16 * gate : 16 * (gate + 1)] = 0
            block.adaLN.bias[16 * gate : 16 * (gate + 1)] = 0
    s = torch.randn(2, 12, 16)
    assert torch.equal(block(s, torch.randn(2, 5), rope(rope_angles(3, 4, 8))), s)


def test_a_gated_mlp_has_as_many_weights_as_a_plain_one():
    """Two thirds of 4D, rounded down: 3 x 2/3 = 2 matrices of D x 4D."""
    for D in (12, 192, 1152):
        assert sum(p.numel() for p in SwiGLU(D).parameters()) == 2 * D * 4 * D
    assert SwiGLU(16).gate.out_features == 42                # 2/3 of 64 is 42.67


# --- when, and what -----------------------------------------------------------------------------


def features_of_time(t):
    """What the MLP of the time embedding is shown, (B, 256)"""
    embedding, seen = TimeEmbedding(8), []
    embedding.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(inputs[0]))
    embedding(t)
    return seen[0]


def test_time_is_shown_as_cosines_and_sines():
    """Forbids cosines twice: cos^2 + sin^2 = 1 for each of 128 frequencies, from 1 to 0.1018."""
    t = torch.linspace(0, 1, 11)
    cos, sin = features_of_time(t).chunk(2, dim=1)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(11, 128))
    ends = torch.tensor([1, 10 ** (-127 / 128)])
    torch.testing.assert_close(torch.atan2(sin, cos)[-1, [0, -1]], ends)
    expected = np.array([literal.time_features(value) for value in t.tolist()])
    torch.testing.assert_close(features_of_time(t).double(), torch.tensor(expected),
                               rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_times_of_any_precision_are_embedded_in_float32(dtype):
    """Forbids angles in bfloat16, whose steps near t = 1 are 1/256, and float64 where the weights
    are float32."""
    t = torch.tensor([0.9, 0.95], dtype=dtype)
    assert features_of_time(t).dtype == torch.float32
    assert torch.equal(features_of_time(t), features_of_time(t.float()))


def test_neighbouring_times_are_embedded_alike():
    """Forbids wavelengths far below the spacing of the sampler's steps.  With frequencies to 1000
    short runs at high learning rates blew up in narrow windows of t and forgot the label there."""
    t = torch.linspace(0, 1, 101)
    with torch.no_grad():
        embedded = TimeEmbedding(64)(t)
    step = (embedded[1:] - embedded[:-1]).norm(dim=1)
    assert (step < 0.05 * embedded[1:].norm(dim=1)).all()
    assert (embedded[-1] - embedded[0]).norm() > 10 * step.mean()


def test_the_time_and_the_label_matter():
    """"No label" is one more class, the last row of the table."""
    model = awake(SMALL)
    x, t, y = batch(SMALL)
    with torch.no_grad():
        v = model(x, t, y)
        assert (model(x, t + 0.01, y) - v).abs().max() > 1e-4
        assert (model(x, t, (y + 1) % 5) - v).abs().max() > 1e-4
        assert (model(x, t, torch.full_like(y, 5)) - v).abs().max() > 1e-4
        with pytest.raises(IndexError):
            model(x, t, torch.full_like(y, 6))


# --- the whole backbone -------------------------------------------------------------------------


@settings(max_examples=15)
@given(config=configurations(heads=("none",)), rows=st.integers(1, 3), columns=st.integers(1, 3),
       B=st.integers(1, 2), seed=st.integers(0, 99))
def test_the_dit_is_its_formulas(config, rows, columns, B, seed):
    """Forbids whatever no other law of this chapter sees, in the backbone and the final layer."""
    assert_is_its_formula(config, rows, columns, B, seed)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_patch_depends_on_every_other_through_the_backbone(name):
    """Forbids attention over heads instead of tokens: moving a patch would change it alone."""
    model = awake(VARIANTS[name])
    x, t, y = batch(model.config)
    with torch.no_grad():
        assert influence(lambda x: model(x, t, y), x, model.config.patch_size).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    """Forbids dead branches: each head and each placement trains everywhere."""
    model = awake(VARIANTS[name].replace(repa_dim=6))
    v, tokens = model(*batch(model.config, B=8), align=True)
    (v.square().mean() + tokens.square().mean()).backward()
    dead = [name for name, p in model.named_parameters()
            if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


@settings(max_examples=20)
@given(name=st.sampled_from(sorted(VARIANTS)), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_any_rectangle_of_whole_patches_is_legal(name, rows, columns):
    """A model built for one size gives a velocity for every pixel of another."""
    model = awake(VARIANTS[name])
    x, t, y = batch(model.config, size=(4 * rows, 4 * columns))
    v = model(x, t, y)
    assert v.shape == x.shape and v.isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_images_in_a_batch_do_not_meet(name):
    """Forbids a norm or an attention over the batch."""
    model = awake(VARIANTS[name])
    x, t, y = batch(model.config, B=3)
    with torch.no_grad():
        alone = torch.cat([model(x[k : k + 1], t[k : k + 1], y[k : k + 1]) for k in range(3)])
        torch.testing.assert_close(model(x, t, y), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("error")
def test_under_bf16_autocast_norms_residuals_and_velocity_stay_float32(name):
    """Forbids rounding the residual stream to 8 bits at every block, and a bf16 ODE state."""
    model = awake(VARIANTS[name])
    kinds = (Block, torch.nn.RMSNorm, torch.nn.LayerNorm)
    watched = [module for module in model.modules() if isinstance(module, kinds)]
    seen = set()
    for module in watched:
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    x, t, y = batch(model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        v = model(x, t, y)
    assert seen == {torch.float32} and v.dtype == torch.float32
    exact = model(x, t, y)
    assert (v - exact).norm() < 0.05 * exact.norm()      # bf16 keeps 8 bits of every product


# --- a clean image instead of a velocity --------------------------------------------------------


def test_a_clean_image_prediction_is_returned_as_the_velocity_that_leads_there():
    """prediction="x": x_t - t v is what the last layer drew, as long as t is not below 0.05."""
    drawn, velocity = awake(SMALL), awake(SMALL.replace(prediction="x"))
    x, _, y = batch(SMALL)
    t = torch.tensor([0.05, 0.9])
    with torch.no_grad():
        image = x - t[:, None, None, None] * velocity(x, t, y)
        torch.testing.assert_close(image, drawn(x, t, y), rtol=1e-4, atol=1e-5)
        for t in (torch.zeros(2), torch.full((2,), 0.03)):   # there it drew x_t - 0.05 v
            expected = (x - drawn(x, t, y)) / 0.05
            torch.testing.assert_close(velocity(x, t, y), expected, rtol=1e-4, atol=1e-4)


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, image_size, patch_size, num_heads, parameters, paper", [
    ("DiT-XL/16", 256, 16, 16, 628_563_360, 629),
    ("DiT-XL-deep/16", 256, 16, 16, 771_953_664, 772),
    ("DiT-XL-1280/16", 256, 16, 16, 775_539_008, 776),
    ("DiT-XL-1536/16", 256, 16, 16, 1_115_891_328, 1100),
    ("DiP-XL/16", 256, 16, 16, 631_989_411, 631),
    ("DiP-XL/16-mlp", 256, 16, 16, 630_103_712, 630),
    ("DiP-XL/16-coordinate", 256, 16, 16, 700_523_683, 700),
    ("DiP-XL/16-attention", 256, 16, 16, 629_941_859, 630),
    ("DiP-XL/32", 512, 32, 16, 634_643_619, 631),
    ("DiP-L/16", 256, 16, 16, 425_424_387, None),
    ("DiP-B/16", 256, 16, 12, 131_426_179, None),
    ("DiP-S/16", 256, 16, 6, 33_268_419, None),
    ("DiP-Ti/16", 256, 16, 3, 8_523_619, None),
    ("DiP-Nano/16", 48, 16, 6, 4_340_707, None),
])
def test_the_presets_have_their_parameters(
        preset, image_size, patch_size, num_heads, parameters, paper):
    """To the last one, and the paper's (Tables 1 to 3) to a million.  DiP-XL/16 is the released
    network, which the paper calls 631 M; its Table 3 leaves the larger patch embedding of DiP-XL/32
    out, and gives 1.1 B to two digits."""
    config = PRESETS[preset]
    with torch.device("meta"):
        model = DiP(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert PAPER_MILLIONS.get(preset) == paper
    if paper:
        tolerance = {"DiP-XL/32": 1 + 3 * (32**2 - 16**2) * 1152 / 1e6, "DiT-XL-1536/16": 50}
        assert abs(parameters / 1e6 - paper) < tolerance.get(preset, 1)
    assert (config.image_size, config.patch_size, config.num_heads) == (
        image_size, patch_size, num_heads)
    assert config.prediction == ("x" if "Nano" in preset else "v")
    assert config.num_classes == (10 if "Nano" in preset else 1000)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("DiT")])
def test_the_parameters_of_a_dit_are_those_counted_by_hand(preset):
    """Layer by layer, as the design says: biases in the embedders, adaLN and two outputs only."""
    config = PRESETS[preset]
    L, D, d, pixels, K = config.depth, config.hidden_size, config.hidden_size // 16, 768, 1000
    embedders = pixels * D + D + 256 * D + D + D * D + D + (K + 1) * D
    block = 2 * D + 3 * D * D + 2 * d + D * D + D + 3 * D * (8 * D // 3) + 6 * D * D + 6 * D
    final = 2 * D * D + 2 * D + D * pixels + pixels
    with torch.device("meta"):
        model = DiP(config)
    assert sum(p.numel() for p in model.parameters()) == embedders + L * block + final


def test_there_are_no_other_presets():
    assert list(PRESETS)[4] == "DiP-XL/16" and len(PRESETS) == 14
    assert PRESETS["DiP-XL/16"] == DiPConfig()


def test_the_flops_of_the_dit_are_those_counted_by_hand():
    """Two a multiply-add: what meets every token, attention's products, what meets the image."""
    L, N, D, pixels = 26, 256, 1152, 768
    tokens = 2 * N * (L * 12 * D**2 + 2 * pixels * D)
    attention = L * 2 * 2 * N**2 * D
    condition = 2 * (256 * D + D**2 + L * 6 * D**2 + 2 * D**2)
    assert cost(PRESETS["DiT-XL/16"]) == (628_563_360, tokens + attention + condition)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cost_counts_every_parameter(name):
    """Also those of a head, and without memory: nothing that cost() builds is kept or computed."""
    model = DiP(VARIANTS[name])
    assert cost(VARIANTS[name])[0] == sum(p.numel() for p in model.parameters())


def test_the_table_of_costs_has_a_row_for_every_preset(monkeypatch, capsys):
    """`python dip.py`: image side, tokens, GFLOPs and parameters, the paper's where it has them."""
    monkeypatch.setattr(dip, "PRESETS", {"DiT-XL/16": VARIANTS["none"].replace(image_size=20),
                                         "mine": SMALL})
    dip.main()
    header, first, second, legend = capsys.readouterr().out.splitlines()
    assert header.split() == "preset image tokens GFLOPs parameters paper".split()
    for line, name, side, tokens, paper in ((first, "DiT-XL/16", 20, 25, "629 M"),
                                            (second, "mine", 16, 16, "-")):
        parameters, flops = cost(dip.PRESETS[name])
        assert line.split(None, 5) == [name, str(side), str(tokens), f"{flops / 1e9:.1f}",
                                       f"{parameters / 1e6:.1f}", f"M{paper:>9}"]
    assert len({len(line) for line in (header, first, second)}) == 1     # columns
    assert legend == ("GFLOPs: forward pass of one image, a multiply-add counted as 2; paper: "
                      "Tables 1 to 3")


# --- the configuration --------------------------------------------------------------------------

REFUSED = [
    (dict(image_size=250), "image_size=250 is not a multiple of patch_size=16; nearest that fit: "
     "240, 256"),
    (dict(image_size=8), "image_size=8 is not a multiple of patch_size=16; nearest that fit: 16"),
    (dict(hidden_size=100), "hidden_size=100 is not a multiple of 4 * num_heads=64; nearest that "
     "fit: 64, 128"),
    (dict(head="unnet"), "head='unnet' is not one of: none, unet, mlp, coordinate, attention"),
    (dict(head_input="pixel"), "head_input='pixel' is not one of: patch, image"),
    (dict(placement="post"), "placement='post' is not one of: post-hoc, intermediate, hybrid"),
    (dict(prediction="eps"), "prediction='eps' is not one of: v, x"),
    (dict(head_depth=5), "patch_size=16 is not a multiple of 2 ** 5 (head_depth)=32; nearest that "
     "fit: 32"),
    (dict(patch_size=8, image_size=64), "patch_size=8 is not a multiple of 2 ** 4 (head_depth)=16; "
     "nearest that fit: 16"),
    (dict(head="mlp", head_input="image"), "head_input='image' needs head='unet', not head='mlp'"),
    (dict(head="none", head_width=4), "head='none' takes no head_width=4 or head_depth=0; leave "
     "them 0, or name a head"),
    (dict(head="none", head_depth=4), "head='none' takes no head_width=0 or head_depth=4; leave "
     "them 0, or name a head"),
    (dict(head="none", placement="hybrid"), "placement='hybrid' needs a head and depth >= 2; "
     "head='none', depth=26"),
    (dict(placement="intermediate", depth=1), "placement='intermediate' needs a head and depth >= "
     "2; head='unet', depth=1"),
    (dict(depth=0), "depth=0 must be a whole number, at least 1"),
    (dict(depth=2.5), "depth=2.5 must be a whole number, at least 1"),
    (dict(depth=True), "depth=True must be a whole number, at least 1"),
    (dict(num_classes=0), "num_classes=0 must be a whole number, at least 1"),
    (dict(head_depth="4"), "head_depth='4' must be a whole number, at least 0"),
    (dict(head_width=-1), "head_width=-1 must be a whole number, at least 0"),
    (dict(repa_dim=-1), "repa_dim=-1 must be a whole number, at least 0"),
    (dict(head="attention", head_width=20), "head_width=20 is not a multiple of "
     "AttentionHead.HEAD_DIM=16; nearest that fit: 16, 32"),
]


@pytest.mark.parametrize("change, line", REFUSED, ids=[line.split(" ")[0] for _, line in REFUSED])
def test_a_wrong_configuration_is_refused_in_one_line(change, line):
    """It names the field, the value and the way out; so does a copy with a field changed."""
    for build in (DiPConfig, DiPConfig().replace):
        with pytest.raises(ValueError) as refused:
            build(**change)
        assert str(refused.value) == line


@pytest.mark.parametrize("change", [
    dict(head_depth=3), dict(head_depth=4), dict(head="none"), dict(head="attention"),
    dict(placement="intermediate", depth=2), dict(placement="hybrid"), dict(head="mlp"),
    dict(head_input="image"), dict(patch_size=32), dict(head="attention", head_width=32),
    dict(image_size=16), dict(depth=1), dict(num_classes=1), dict(head="mlp", patch_size=1),
])
def test_what_is_legal_is_not_refused(change):
    """Forbids a check that is too strict at its own border."""
    config = DiPConfig().replace(**change)
    assert dataclasses.asdict(config) == dataclasses.asdict(DiPConfig()) | change


WILD = {
    **{field: st.sampled_from([-4, 0, 1, 2, 3, 4, 5, 8, 16, 2.0, True, "2", None])
       for field in ("image_size", "patch_size", "hidden_size", "depth", "num_heads", "num_classes",
                     "head_width", "head_depth", "repa_dim")},
    **{field: st.sampled_from(["none", "unet", "mlp", "coordinate", "attention", "patch", "image",
                               "post-hoc", "intermediate", "hybrid", "v", "x", "", None, 3, []])
       for field in ("head", "head_input", "placement", "prediction")},
}


@settings(max_examples=150)
@given(config=configurations(), data=st.data())
def test_any_configuration_either_runs_or_is_refused_in_one_line(config, data):
    """Forbids a configuration that passes the check and ends in a traceback of torch."""
    for field in data.draw(st.lists(st.sampled_from(sorted(WILD)), max_size=3)):
        changed = {**dataclasses.asdict(config), field: data.draw(WILD[field])}
        try:
            config = DiPConfig(**changed)
        except ValueError as error:
            assert "\n" not in str(error) and field in str(error)
    x, t, y = batch(config, B=1)
    v = DiP(config)(x, t, y)
    assert v.shape == x.shape and v.isfinite().all()


def test_a_configuration_cannot_be_changed():
    """Forbids a model whose configuration is no longer the one that built it."""
    with pytest.raises(AttributeError):
        SMALL.depth = 4
