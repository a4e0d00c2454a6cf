"""Chapter 3.  The law of heads: a head sees one patch at a time, its noisy pixels and its token,
and returns its pixels.  Every parameter starts by one table, and a new head is a class and a line.

Chapter 2 compares each head, at each placement, with its formula."""

import re

import pytest
import torch
import torch.nn as nn
from commands import TINY, run
from helpers import SMALL, VARIANTS, awake, batch, influence

import train
from dip import HEADS, DiP, patchify
from sample import load_model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- what a pixel depends on ----------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_head_sees_the_pixels_and_the_token_of_its_own_patch_alone(name):
    """Sec. 3.3: moving the pixels or the token of patch j changes output patch j and no other.  The
    condition, which knows the label, is not used.  Catches patches that meet in a head."""
    model = awake(VARIANTS[name])
    x, s, time = batch(model.config)[0], torch.randn(2, 16, 16), torch.randn(2, 16)
    own = torch.eye(16, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(influence(lambda x: model.output(x, s, time, None), x, 4), own)
        before = patchify(model.output(x, s, time, None), 4)
        for j in range(16):
            moved = s.clone()
            moved[:, j] = torch.randn(2, 16)
            change = patchify(model.output(x, moved, time, None), 4) - before
            assert torch.equal(change.abs().amax(dim=(0, 2, 3, 4)) > 1e-5, own[j])


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, layers", [
    ("unet", "down"), ("mlp", "layers"), ("coordinate", "generators"), ("attention", "blocks")])
def test_a_head_has_the_width_and_depth_of_the_configuration(name, layers):
    """Fig. 10a.  Catches head_width or head_depth ignored.  The presets have each head's own."""
    head = HEADS[name](SMALL.replace(patch_size=16, head=name, head_width=48, head_depth=3))
    assert (head.out.weight.shape[1], len(getattr(head, layers))) == (48, 3)


# --- initialisation -------------------------------------------------------------------------------


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
    """Catches a rule that overrides another, and a layer that no rule was meant for.

    A deviation estimated from n values is off by 1 / sqrt(2n), and five times that is allowed.  A
    uniform value lies within sqrt(3) deviations; 1000 normal ones do not.
    """
    config = SMALL.replace(hidden_size=96, head=head, repa_dim=40, placement=placement,
                           head_width=0 if head == "none" else 32,
                           head_depth=0 if head == "none" else 2)
    weights = dict(DiP(config).named_parameters())
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


# --- a head of one's own --------------------------------------------------------------------------


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
    """It is legal, trains a step, and loads from its checkpoint.  Catches a second list of heads;
    without its line in HEADS the same command is refused."""
    words = [train, TINY.replace("head_depth=2 head_width=4", "head=toy"), "--steps 1 --out",
             tmp_path]
    with pytest.raises(ValueError, match="head='toy' is not one of: none, unet, mlp"):
        run(monkeypatch, *words)
    monkeypatch.setitem(HEADS, "toy", ToyHead)
    run(monkeypatch, *words)
    model, _ = load_model(tmp_path)
    assert type(model.output.head) is ToyHead
    x, t, y = batch(model.config, size=(8, 12))
    assert influence(lambda x: model(x, t, y), x, 4).all()
