"""Chapter 2: the backbone, the heads, and who can see whom."""

import pytest
import torch
from helpers import SMALL, VARIANTS, awake, batch
from hypothesis import given, settings
from hypothesis import strategies as st

from dip import (HEADS, PRESETS, Attention, Block, PatchDetailerHead, DiP, DiPConfig, TimeEmbedding, cost,
                 patchify, rope_angles)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- information --------------------------------------------------------------------------------


def listens(f, x, P):
    """(N, N) booleans: does output patch i change when input patch j does?"""
    N = patchify(x, P).shape[1]
    quiet, heard = patchify(f(x), P), torch.zeros(N, N, dtype=torch.bool)
    columns = x.shape[-1] // P
    for j in range(N):
        moved = x.clone()
        row, column = j // columns * P, j % columns * P
        moved[:, :, row : row + P, column : column + P] += 1
        heard[:, j] = (patchify(f(moved), P) - quiet).abs().amax(dim=(0, 2, 3, 4)) > 1e-6
    return heard


@pytest.mark.parametrize("name", VARIANTS)
def test_every_patch_hears_every_other_through_the_backbone(name):
    """Forbids attention over heads instead of tokens: moving a patch would change it alone."""
    model = awake(VARIANTS[name])
    x, t, y = batch(model.config)
    with torch.no_grad():
        assert listens(lambda x: model(x, t, y), x, model.config.patch_size).all()


@pytest.mark.parametrize("name", HEADS)
def test_the_head_alone_is_deaf_to_other_patches(name):
    """With tokens held fixed, moving patch j changes output patch j and no other (Sec. 3.3)."""
    model = awake(VARIANTS[name])
    x, _, _ = batch(model.config)
    s, time = torch.randn(2, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        heard = listens(lambda x: model.output(x, s, time, None), x, 4)
    assert torch.equal(heard, torch.eye(16, dtype=torch.bool))


def test_the_head_on_the_whole_image_hears_its_neighbours():
    """Image-level input (Fig. 11): the same U-Net now crosses patch borders."""
    model = awake(VARIANTS["unet on the image"])
    x, _, _ = batch(model.config)
    s, time = torch.randn(2, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        heard = listens(lambda x: model.output(x, s, time, None), x, 4)
    for j in range(16):
        neighbours = [i for i in range(16) if abs(i // 4 - j // 4) <= 1 and abs(i % 4 - j % 4) <= 1]
        assert heard[neighbours, j].all()


@pytest.mark.parametrize("name", HEADS)
def test_the_head_listens_to_its_token(name):
    """Moving token j changes output patch j and no other."""
    model = awake(VARIANTS[name])
    x, _, _ = batch(model.config)
    s, time = torch.randn(2, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        before = patchify(model.output(x, s, time, None), 4)
        moved = s.clone()
        moved[:, 5] = torch.randn(2, 16)
        change = (patchify(model.output(x, moved, time, None), 4) - before).abs().amax(dim=(0, 2, 3, 4))
    assert change[5] > 1e-4 and change[torch.arange(16) != 5].max() == 0


def rope(angles):
    """cos and sin of angles (..., d/2), grid flattened to tokens."""
    angles = angles.flatten(0, -2)
    return angles.cos(), angles.sin()


# --- the block ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_block_is_the_identity(name):
    """Forbids a later initialisation sweep that undoes adaLN-Zero."""
    model = DiP(VARIANTS[name])
    s, c = torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in model.blocks:
        assert torch.equal(block(s, c, rope(rope_angles(4, 4, 8))), s)


@pytest.mark.parametrize("rule, layer, std", [
    ("Xavier", lambda model: model.blocks[0].attention.qkv, (2 / (256 + 768)) ** 0.5),
    ("N(0, 0.02)", lambda model: model.label, 0.02),
    ("He, U-Net", lambda model: model.output.head.down[1], (2 / (64 * 9)) ** 0.5),
    ("He, U-Net's last", lambda model: model.output.head.out, (2 / 64) ** 0.5),
    ("He, MLP", lambda model: model.output.head.layers[1], (2 / 1280) ** 0.5),
    ("He, MLP's last", lambda model: model.output.head.out, (2 / 1280) ** 0.5),
])
def test_the_table_of_initialisation_is_what_happens(rule, layer, std):
    """Forbids a later sweep that overrides an earlier one; 5 % is 3 deviations of 2000."""
    head = "mlp" if "MLP" in rule else "unet"
    model = DiP(PRESETS["DiP-XL/16"].replace(hidden_size=256, depth=1, num_classes=10, head=head))
    weight = layer(model).weight
    assert weight.std().item() == pytest.approx(std, rel=0.05 if weight.numel() > 2000 else 0.25)


def test_a_fresh_dit_predicts_zero_and_a_fresh_detailer_does_not():
    x, t, y = batch(SMALL)
    assert DiP(VARIANTS["none"])(x, t, y).abs().max() == 0
    assert DiP(VARIANTS["unet"])(x, t, y).std() > 0.1


@settings(max_examples=20)
@given(row=st.integers(0, 5), column=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_rope_makes_attention_depend_on_relative_position_only(row, column, seed):
    """A 3 x 4 window gives the same answer wherever it lies, and another if it is turned."""
    torch.manual_seed(seed)
    attention = Attention(32, 2)
    s = torch.randn(2, 12, 32)
    grid = rope_angles(8, 9, 16).view(8, 9, 8)
    here = attention(s, rope(grid[:3, :4]))
    there = attention(s, rope(grid[row : row + 3, column : column + 4]))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    turned = attention(s, rope(grid[:4, :3].transpose(0, 1)))
    assert (turned - here).abs().max() > 1e-4


def test_rows_and_columns_turn_different_pairs():
    angles = rope_angles(3, 5, 16).view(3, 5, 8)
    assert torch.equal(angles[0, :, :4], angles[2, :, :4] * 0) and angles[2, 0, 0] == 2
    assert torch.equal(angles[:, 0, 4:], angles[:, 4, 4:] * 0) and angles[0, 4, 4] == 4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    """Forbids dead branches: each head and each placement trains everywhere."""
    model = awake(VARIANTS[name].replace(repa_dim=6))
    v, tokens = model(*batch(model.config, B=8), align=True)
    (v.square().mean() + tokens.square().mean()).backward()
    dead = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert dead == []


# --- the model ----------------------------------------------------------------------------------


@settings(max_examples=10)
@given(name=st.sampled_from(sorted(VARIANTS)), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_any_rectangle_of_whole_patches_is_legal(name, rows, columns):
    """A model built for one size gives a velocity for every pixel of another."""
    model = awake(VARIANTS[name])
    x, t, y = batch(model.config, size=(4 * rows, 4 * columns))
    v = model(x, t, y)
    assert v.shape == x.shape and v.isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_images_in_a_batch_do_not_meet(name):
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


def test_a_clean_image_prediction_is_returned_as_the_velocity_that_leads_there():
    """prediction="x": x_t - t v is what the last layer drew, as long as t is not below 0.05."""
    drawn, velocity = awake(SMALL), awake(SMALL.replace(prediction="x"))
    x, _, y = batch(SMALL)
    t = torch.tensor([0.05, 0.9])
    with torch.no_grad():
        image = x - t[:, None, None, None] * velocity(x, t, y)
        torch.testing.assert_close(image, drawn(x, t, y), rtol=1e-4, atol=1e-5)
        assert velocity(x, t * 0, y).isfinite().all()


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
    model = awake(SMALL)
    x, t, y = batch(SMALL)
    with torch.no_grad():
        v = model(x, t, y)
        assert (model(x, t + 0.01, y) - v).abs().max() > 1e-4
        assert (model(x, t, (y + 1) % 5) - v).abs().max() > 1e-4
        assert (
            model(x, t, torch.full_like(y, 5)) - v
        ).abs().max() > 1e-4  # "no label" is one more class


def test_the_head_has_the_depth_and_width_it_is_told():
    """Fig. 10a: depth counts down/up-sampling stages, width the channels of the first."""
    head = PatchDetailerHead(PRESETS["DiP-XL/16"].replace(head_depth=3, head_width=8)).head
    assert [(conv.in_channels, conv.out_channels) for conv in head.down] == [
        (3, 8),
        (8, 16),
        (16, 32),
    ]
    assert [(conv.in_channels, conv.out_channels) for conv in head.up] == [
        (64, 16),
        (32, 8),
        (16, 8),
    ]


def test_the_unet_is_the_one_of_table_4():
    head = PatchDetailerHead(PRESETS["DiP-XL/16"]).head
    assert [conv.out_channels for conv in head.down] == [64, 128, 256, 512]
    assert (head.bottleneck.in_channels, head.bottleneck.out_channels) == (512 + 1152, 512)
    assert [conv.out_channels for conv in head.up] == [256, 128, 64, 64]
    assert (head.out.in_channels, head.out.out_channels, head.out.kernel_size) == (64, 3, (1, 1))
    assert sum(p.numel() for p in head.parameters()) == 5_574_467


@pytest.mark.parametrize(
    "preset, millions",
    [
        ("DiT-XL/16", 628.56),
        ("DiT-XL-deep/16", 771.95),
        ("DiT-XL-1280/16", 775.54),
        ("DiT-XL-1536/16", 1115.9),
        ("DiP-XL/16", 630.6),
        ("DiP-XL/32", 633.3),
        ("DiP-XL/16-mlp", 630.1),
        ("DiP-XL/16-coordinate", 700.5),
        ("DiP-XL/16-attention", 629.9),
    ],
)
def test_the_presets_have_the_papers_parameters(preset, millions):
    """Tables 1 and 2; the design's arithmetic to the last digit it gives."""
    assert cost(PRESETS[preset])[0] / 1e6 == pytest.approx(millions, abs=0.051)


def test_the_operations_of_the_dit_are_those_counted_by_hand():
    """Two a multiply-add: what meets every token, attention's products, what meets the image."""
    L, N, D, pixels = 26, 256, 1152, 768
    tokens = 2 * N * (L * 12 * D**2 + 2 * pixels * D)
    attention = L * 2 * 2 * N**2 * D
    condition = 2 * (256 * D + D**2 + L * 6 * D**2 + 2 * D**2)
    assert cost(PRESETS["DiT-XL/16"])[1] == tokens + attention + condition


def test_the_unet_head_adds_0_3_percent():
    with_head, _ = cost(PRESETS["DiP-XL/16"])
    without, _ = cost(PRESETS["DiT-XL/16"])
    assert round(100 * (with_head / without - 1), 1) == 0.3


# --- the configuration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(image_size=250),
            r"image_size=250 is not a multiple of patch_size=16; nearest that fit: 240, 256",
        ),
        (dict(hidden_size=100), r"hidden_size=100 is not a multiple of 4 \* num_heads=64"),
        (dict(head="unnet"), r"head='unnet' is not one of: none, unet, mlp, coordinate, attention"),
        (dict(placement="post"), r"placement='post' is not one of: post-hoc, intermediate, hybrid"),
        (dict(prediction="eps"), r"prediction='eps' is not one of: v, x"),
        (dict(head_depth=5), r"patch_size=16 is not a multiple of 2 \*\* head_depth=32"),
        (dict(head="mlp", head_input="image"), r"head_input='image' needs head='unet'"),
        (dict(head="none", placement="hybrid"), r"placement='hybrid' needs a head"),
        (dict(depth=0), r"depth=0 must be a whole number, at least 1"),
        (dict(depth=2.5), r"depth=2.5 must be a whole number"),
        (dict(head_depth="4"), r"head_depth='4' must be a whole number"),
        (dict(repa_dim=-1), r"repa_dim=-1 must be a whole number, at least 0"),
        (dict(head_width=0), r"head_width=0 must be a whole number, at least 1"),
        (
            dict(head="attention", head_width=20),
            r"head_width=20 is not a multiple of its head size=16",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        DiPConfig(**change)
    assert "\n" not in str(caught.value)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        SMALL.depth = 4
