"""Chapter 2.  The law of the network: every patch attends to every other, by content and relative
position, under one condition (time and label).  The network equals its formulas, has the size that
its configuration says, and a configuration either runs or is refused in one line."""

import dataclasses

import literal
import numpy as np
import pytest
import torch
from helpers import SMALL, VARIANTS, awake, batch, configurations, float64, influence
from hypothesis import given, settings
from hypothesis import strategies as st

from dip import HEADS, PRESETS, DiP, DiPConfig

# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["none", *HEADS])
@settings(max_examples=12)
@given(data=st.data(), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_network_is_its_formulas(head, data, rows, columns, seed):
    """On every rectangle, for every placement, input, prediction, width and depth, with REPA's
    tokens, with and without a label, and for t below 0.05, where prediction="x" divides by 0.05.

    Catches a wrong term anywhere: a missing SiLU, norm, bias or scale; parts of the condition or
    rows and columns exchanged; heads merged, skips taken or weights read in another order; a head
    one block off or with the wrong context; images of a batch that meet.
    """
    config = data.draw(configurations(heads=(head,)))
    size = config.patch_size * rows, config.patch_size * columns
    with float64(), torch.no_grad():
        model = awake(config, seed)
        x, t, y = batch(config, 2, size, seed)
        y[1], t[1] = config.num_classes, t[1] / 20
        answer = model(x, t, y, align=bool(config.repa_dim))
    v, tokens = answer if config.repa_dim else (answer, None)
    w = literal.weights_of(model)
    for b in range(2):
        slow, aligned = literal.dip(w, config, x[b].numpy(), t[b].item(), y[b].item())
        torch.testing.assert_close(v[b], torch.tensor(slow), rtol=1e-9, atol=1e-9)
        if config.repa_dim:
            aligned = torch.tensor(np.array(aligned).T.reshape(-1, rows, columns))
            torch.testing.assert_close(tokens[b], aligned, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["none", "unet"])
def test_every_patch_depends_on_every_other_through_the_backbone(name):
    """Catches attention over heads instead of tokens: a moved patch would change itself alone."""
    model = awake(VARIANTS[name])
    x, t, y = batch(model.config)
    with torch.no_grad():
        assert influence(lambda x: model(x, t, y), x, model.config.patch_size).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_times_of_any_precision_give_the_same_velocity(dtype):
    """Catches angles in bfloat16, and float64 angles that meet float32 weights in an error."""
    model = awake(SMALL.replace(prediction="x"))
    x, t, y = batch(SMALL)
    t = t.to(dtype)
    v = model(x, t.float(), y)
    torch.testing.assert_close(model(x, t, y).to(v.dtype), v)


# --- sizes ----------------------------------------------------------------------------------------

SIZES = {        # preset: image and patch size, attention heads, parameters, the paper's millions
    "DiT-XL/16": (256, 16, 16, 628_563_360, 629),
    "DiT-XL-deep/16": (256, 16, 16, 771_953_664, 772),
    "DiT-XL-1280/16": (256, 16, 16, 775_539_008, 776),
    "DiT-XL-1536/16": (256, 16, 16, 1_115_891_328, 1100),
    "DiP-XL/16": (256, 16, 16, 631_989_411, 631),
    "DiP-XL/16-mlp": (256, 16, 16, 630_103_712, 630),
    "DiP-XL/16-coordinate": (256, 16, 16, 700_523_683, 700),
    "DiP-XL/16-attention": (256, 16, 16, 629_941_859, 630),
    "DiP-XL/32": (512, 32, 16, 634_643_619, 631),
    "DiP-L/16": (256, 16, 16, 425_424_387, None),
    "DiP-B/16": (256, 16, 12, 131_426_179, None),
    "DiP-S/16": (256, 16, 6, 33_268_419, None),
    "DiP-Ti/16": (256, 16, 3, 8_523_619, None),
    "DiP-Nano/8": (48, 8, 4, 1_959_875, None),
}


@pytest.mark.parametrize("preset", {**SIZES, **PRESETS})
def test_the_presets_have_their_parameters(preset):
    """Exactly, and the paper's (Tables 1 to 3) to a million.  The paper leaves the larger patch
    embedding of DiP-XL/32 out, and gives 1.1 B to two digits."""
    image_size, patch_size, num_heads, parameters, paper = SIZES[preset]
    config = PRESETS[preset]
    with torch.device("meta"):
        model = DiP(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if paper:
        tolerance = {"DiP-XL/32": 1 + 3 * (32**2 - 16**2) * 1152 / 1e6, "DiT-XL-1536/16": 50}
        assert abs(parameters / 1e6 - paper) < tolerance.get(preset, 1)
    assert (config.image_size, config.patch_size, config.num_heads) == (
        image_size, patch_size, num_heads)
    assert config.prediction == ("x" if "Nano" in preset else "v")
    assert config.num_classes == (10 if "Nano" in preset else 1000)
    assert PRESETS["DiP-XL/16"] == DiPConfig()


# --- the configuration ----------------------------------------------------------------------------

REFUSED = [
    (dict(image_size=250), "image_size=250 is not a multiple of patch_size=16; nearest that fit: "
     "240, 256"),
    (dict(hidden_size=100), "hidden_size=100 is not a multiple of 4 * num_heads=64; nearest that "
     "fit: 64, 128"),
    (dict(head="unnet"), "head='unnet' is not one of: none, unet, mlp, coordinate, attention"),
    (dict(head_input="pixel"), "head_input='pixel' is not one of: patch, image"),
    (dict(placement="post"), "placement='post' is not one of: post-hoc, intermediate, hybrid"),
    (dict(prediction="eps"), "prediction='eps' is not one of: v, x"),
    (dict(patch_size=8, image_size=64), "patch_size=8 is not a multiple of 2 ** 4 (head_depth)=16; "
     "nearest that fit: 16"),
    (dict(head="mlp", head_input="image"), "head_input='image' needs head='unet', not head='mlp'"),
    (dict(head="none", head_width=4), "head='none' takes no head_width=4 or head_depth=0; leave "
     "them 0, or choose a head"),
    (dict(head="none", head_depth=4), "head='none' takes no head_width=0 or head_depth=4; leave "
     "them 0, or choose a head"),
    (dict(head="none", placement="hybrid"), "placement='hybrid' needs a head and depth >= 2; "
     "head='none', depth=26"),
    (dict(placement="intermediate", depth=1), "placement='intermediate' needs a head and depth >= "
     "2; head='unet', depth=1"),
    (dict(depth=0), "depth=0 must be a whole number, at least 1"),
    (dict(depth=True), "depth=True must be a whole number, at least 1"),
    (dict(head_depth="4"), "head_depth='4' must be a whole number, at least 0"),
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


WILD = {
    **{field: st.sampled_from([-4, 0, 1, 2, 3, 4, 5, 8, 16, 2.0, True, "2", None])
       for field in ("image_size", "patch_size", "hidden_size", "depth", "num_heads", "num_classes",
                     "head_width", "head_depth", "repa_dim")},
    **{field: st.sampled_from(["none", "unet", "mlp", "coordinate", "attention", "patch", "image",
                               "post-hoc", "intermediate", "hybrid", "v", "x", "", None, 3, []])
       for field in ("head", "head_input", "placement", "prediction")},
}


@settings(max_examples=50)
@given(config=configurations(), data=st.data())
def test_any_configuration_either_runs_or_is_refused_in_one_line(config, data):
    """Catches a configuration that passes the check and ends in a traceback of torch, and a check
    that is too strict: configurations() draws legal ones, at the limits too."""
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
    """Catches a model whose configuration is no longer the one that built it."""
    with pytest.raises(AttributeError):
        SMALL.depth = 4
