"""
The models of every experiment.

NARROW has tokens of 96 dimensions for patches of 192 values.  WIDE has tokens of 256 dimensions,
more than the patch has values, as in the paper (1152 for 768).  The U-Net head has the paper's
proportion: its bottleneck has 2/3 as many channels as the patch has values, 128 for 192, as in
DiP-XL/16 (512 for 768).
"""

from functools import partial

import torch.nn as nn
import torch.nn.functional as F

from dip import PRESETS, DiP, DiPConfig, FinalLayer, PatchDetailerHead, patchify, unpatchify
from experiments import features, gaussian, overfit, toy
from experiments.lab import Drawn, Lab, Model
from sample import OUR_WEIGHTS, load_model
from theory.model import gain

WIDE = DiPConfig(image_size=32, patch_size=8, hidden_size=256, depth=4, num_heads=4, num_classes=10,
                 head="none")
NARROW = WIDE.replace(hidden_size=96)


# -------------------------------------------------------------------------------------------------
# Networks that dip.py does not have


def zero(*layers):
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class ScalarPath(DiP):
    """v = gain(t) x_t + DiT's last layer: EDM's c_skip (arXiv 2206.00364), which has no weights."""

    def forward(self, x_t, t, y):
        c_skip = gain(0.25, t)[:, None, None, None]          # for pixels of variance 0.25
        return c_skip * x_t + super().forward(x_t, t, y)


class LinearPath(nn.Module):
    """U diag(g(c)) V patch, g linear in the condition c; x_t at first.

    as_head: the form that fits HEADS, W s + U diag(g(s)) V patch with s = SiLU(token + time).
    """

    def __init__(self, config, as_head=False):
        super().__init__()
        D, self.P, self.as_head = config.hidden_size, config.patch_size, as_head
        size = 3 * self.P**2
        self.mix_in, self.mix_out = (nn.Linear(size, size, bias=False) for _ in range(2))  # V, U
        self.gain = nn.Linear(D, size)                                   # g
        zero(self.gain)
        nn.init.ones_(self.gain.bias)
        nn.init.eye_(self.mix_in.weight)
        nn.init.eye_(self.mix_out.weight)
        if as_head:
            self.plain = nn.Linear(D, size)                              # W
            zero(self.plain)

    def forward(self, x_t, s, time, c):
        """x_t (B, 3, H, W), s (B, N, D), time and c (B, D) -> (B, 3, H, W)"""
        c = F.silu(s + time[:, None]) if self.as_head else c[:, None]    # (B, N or 1, D)
        patches = patchify(x_t, self.P).flatten(2)                       # (B, N, 3PP)
        pixels = self.mix_out(self.gain(c) * self.mix_in(patches))       # (B, N, 3PP)
        if self.as_head:
            pixels = pixels + self.plain(c)
        return unpatchify(pixels.unflatten(2, (3, self.P, self.P)), x_t.shape[-2:])


class Sum(nn.Module):
    """Adds the outputs of its parts.  DiT's last layer and a head among them start at 0."""

    def __init__(self, config, parts):
        super().__init__()
        self.parts = nn.ModuleList(part(config) for part in parts)
        for part in self.parts:
            if isinstance(part, FinalLayer):
                zero(part.linear)
            elif isinstance(part, PatchDetailerHead):
                zero(part.head.out)

    def forward(self, *inputs):
        return sum(part(*inputs) for part in self.parts)


PATH_HEAD = partial(LinearPath, as_head=True)
OUTPUTS = {"linear path": (FinalLayer, LinearPath),
           "linear path, head": (PATH_HEAD,),
           "U-Net + last layer": (FinalLayer, PatchDetailerHead),
           "U-Net + linear path": (FinalLayer, LinearPath, PatchDetailerHead),
           "U-Net + linear path, head": (PATH_HEAD, PatchDetailerHead)}


def build(name, config):
    """The network that a model's name stands for."""
    net = (ScalarPath if name == "scalar path" else DiP)(config)
    if name in OUTPUTS:
        net.output = Sum(config, OUTPUTS[name])
    elif name == "no head, starts at x_t":
        zero(net.output.linear)
        net.output.register_forward_hook(lambda layer, inputs, pixels: inputs[0] + pixels)
    elif name == "U-Net, blind":             # it sees the token alone
        net.output.head.register_forward_pre_hook(lambda head, inputs: (0 * inputs[0], inputs[1]))
    elif name == "U-Net, last layer from 0":
        zero(net.output.head.out)
    elif name == "U-Net, random upsampling":
        for up in net.output.head.up:
            nn.init.kaiming_normal_(up.weight, nonlinearity="relu")
    elif name == "U-Net, PyTorch's default":
        for module in net.output.head.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    elif name == "pretrained":               # on shapes
        net.load_state_dict(load_model(OUR_WEIGHTS)[0].state_dict())
    return net


# -------------------------------------------------------------------------------------------------
# Which models are compared

SAMPLERS = {             # Table 1: sampler and evaluations.  A guided step counts once, as in 100x2
    **{f"{sampler} {n}": dict(sampler=sampler, steps=n)
       for sampler in ("euler", "ab2") for n in (6, 12, 24)},
    "everywhere 24": dict(sampler="euler", steps=24, cfg=2.0),
    "interval 24": dict(sampler="euler", steps=24, cfg=2.0, interval=(0.03, 0.89))}  # the paper's


def changes_of(name, P):
    """How a model's name changes a configuration without a head, for patches of side P."""
    C, n = {4: (16, 2), 8: (32, 3), 16: (64, 4)}[P]          # channels and stages of the U-Net
    unet = dict(head="unet", head_width=C, head_depth=n)
    changes = dict.fromkeys(("no head", "no head, starts at x_t", "scalar path", "linear path",
                             "linear path, head"), {}) | {
        "no head, predicts x": dict(prediction="x"),
        "deeper": dict(depth=8),             # this and the two wider ones: the U-Net's FLOPs
        "272 wide": dict(hidden_size=272),
        "368 wide": dict(hidden_size=368),
        "MLP": dict(head="mlp", head_width=320, head_depth=2),
        "coordinate": dict(head="coordinate", head_width=32, head_depth=4),
        "attention": dict(head="attention", head_width=48, head_depth=2),
        "U-Net between blocks": dict(unet, placement="intermediate"),
        "U-Net in both places": dict(unet, placement="hybrid"),
        "U-Net on the image": dict(unet, head_input="image"),
        "U-Net, predicts x": dict(unet, prediction="x")}
    return changes.get(name, unet) if name.startswith("U-Net") else changes[name]


def models(base, rates, data="shapes", steps=(500,), measure=None, **training):
    """{name: Model} of {name: learning rate}."""
    return {name: Model(base.replace(**changes_of(name, base.patch_size)), lr, data,
                        partial(build, name), training, steps, measure)
            for name, lr in rates.items()}


PATCHES = {P: WIDE.replace(patch_size=P) for P in (4, 8, 16)}
# as in the paper: 256 tokens, 1.5 times as wide as their patch
PAPER = PATCHES[4].replace(image_size=64, hidden_size=72, num_heads=3)
paths = partial(models, steps=(2000,), cooldown=0.3)
PATHS = dict.fromkeys(("U-Net", "no head", "scalar path", "linear path", "linear path, head",
                       "U-Net + linear path"))               # no rates: they are tuned
CONTROLS = PATHS | dict.fromkeys(("no head, starts at x_t", "no head, predicts x", "coordinate"))
BOTH = {"no head": 6e-3, "U-Net": 3e-3}
FOUR = BOTH | {"U-Net + last layer": 6e-3, "deeper": 6e-3}
PLACES = BOTH | {"U-Net between blocks": 3e-3, "U-Net in both places": 3e-3}
SHORT = PLACES | {"no head, predicts x": 6e-3, "coordinate": 6e-3} | dict.fromkeys((
    "MLP", "attention", "U-Net on the image", "U-Net, predicts x", "U-Net, last layer from 0",
    "U-Net, random upsampling", "U-Net, PyTorch's default"), 3e-3)


def recipe(steps, name="U-Net", lr=3e-3, data="shapes", time_mean=0.4, **changes):
    """{name: Model}: DiP-Nano/8 with these changes, trained by its recipe for `steps` steps."""
    return {name: Model(PRESETS["DiP-Nano/8"].replace(**changes), lr, data, partial(build, name),
                        dict(cooldown=0.3, time_mean=time_mean), (steps,))}


of_192 = partial(recipe, hidden_size=192, num_heads=6)
with_path = dict(name="U-Net + linear path, head", prediction="v")
on_photos = partial(recipe, steps=1000, lr=1.5e-3, data="photos", image_size=64)
patches_of_4 = partial(on_photos, patch_size=4, head_depth=2, hidden_size=96, num_heads=3, depth=4)
RECIPES = {              # on shapes: as many steps as fit into ten minutes of CPU time
    "DiP-Nano/8": recipe(3023),
    "96 wide": recipe(3500, hidden_size=96, num_heads=3),
    "64 wide": recipe(4350, hidden_size=64, num_heads=2),
    "4 blocks": recipe(3550, depth=4),
    "mean of logit t: 0": recipe(3023, time_mean=0.0),
    "predicts v": recipe(3285, prediction="v"),
    "a linear path too, predicts v": recipe(2462, **with_path),
    "192 wide": of_192(2045),
    "192 wide, 8 channels": of_192(2370, head_width=8),
    "192 wide, 2 stages": of_192(2255, head_depth=2),
    "192 wide, a linear path too, predicts v": of_192(2242, **with_path),
    "before: DiP-Nano/16": of_192(4593, time_mean=0.8, patch_size=16, head_width=8, head_depth=4),
    "photos, rate 3e-3": on_photos(lr=3e-3),
    "photos, rate 1.5e-3": on_photos(),
    "photos, rate 1.5e-3, predicts v": on_photos(prediction="v"),
    "photos, rate 1.5e-3, from the weights in assets": on_photos(name="pretrained"),
    "photos, rate 1.5e-3, patches of 4": patches_of_4(),
    "photos, rate 1.5e-3, patches of 4, longer": patches_of_4(steps=6000)}

EXPERIMENTS = {          # {experiment: {group: {name: Model}}}; differences are to a group's first
    "paths": {
        "narrow, shapes": paths(NARROW, PATHS),
        "wide, shapes": paths(WIDE, CONTROLS | {"U-Net, blind": 3e-3}),      # at the U-Net's rate
        "narrow, photos": paths(NARROW, PATHS, "photos"),
        "wide, photos": paths(WIDE, CONTROLS | {"U-Net, blind": 1.5e-3}, "photos"),
        "wide, shapes, longer": paths(                       # at the rates of "wide, shapes"
            WIDE, {"U-Net": 3e-3, "no head": 6e-3, "linear path": 3e-3,
                   "U-Net + linear path": 1.5e-3}, steps=(8000,)),
        "photos of 64": paths(PAPER, dict.fromkeys(("U-Net", "no head", "linear path")), "photos",
                              steps=(10_000,), batch_size=8, micro_batch=8)},
    "recipes": RECIPES,
    "crossover": {f"{D} of 48": models(PATCHES[4].replace(hidden_size=D, num_heads=num_heads),
                                       {"no head": 6e-3, "U-Net": 6e-3}, steps=(1000,))
                  for D, num_heads in ((16, 1), (36, 3), (48, 3), (72, 3), (144, 6))},
    "heads": {
        "wide, shapes": models(WIDE, FOUR | {"coordinate": 6e-3}, steps=(500, 2000)),
        "wide, photos": models(WIDE, FOUR | {"no head": 3e-3, "deeper": 3e-3, "coordinate": 6e-3},
                               "photos", (500, 2000)),
        "wide, shapes, longer": models(WIDE, FOUR, steps=(500, 1000, 2000, 4000, 8000)),
        "photos of 64": models(PAPER, BOTH, "photos", (2000, 10_000), batch_size=8, micro_batch=8)},
    "short": {
        "narrow, shapes": models(NARROW, SHORT | {"272 wide": 3e-3}),
        "wide, shapes": models(WIDE, SHORT | {"368 wide": 3e-3}),
        "stages, patches of 16": {
            name: Model(PATCHES[16].replace(head="unet", head_width=32, head_depth=n))
            for n, name in enumerate(("1 stage", "2 stages", "3 stages", "4 stages"), start=1)},
        "channels, patches of 8": {
            f"{C} channels": Model(WIDE.replace(head="unet", head_width=C, head_depth=3))
            for C in (8, 16, 32, 64)},
        **{f"patches of {P}": models(base, BOTH) for P, base in PATCHES.items()}},
    "overfit": {f"{name}, one photo": models(
        base.replace(image_size=overfit.SIZE, num_classes=1), dict.fromkeys(BOTH, 3e-3),
        Drawn(1, lambda _: overfit.PHOTO), (500, 1000), overfit.measure, **overfit.TRAINING)
        for name, base in (("narrow", NARROW), ("wide", WIDE))},
    "features": {f"{name}, shapes": models(base, PLACES, measure=features.measure)
                 for name, base in (("narrow", NARROW), ("wide", WIDE))},
    "toy": {"toy": {name: Model(WIDE.replace(num_classes=1), 3e-3, Drawn(100_000, toy.draw_point),
                                partial(toy.ToyNet, view=view), toy.TRAINING, (2500,), toy.measure)
                    for name, view in toy.VIEWS.items()}},
    "samplers": {"narrow, shapes": {
        name: Model(NARROW.replace(**changes_of("U-Net", 8)),
                    measure=partial(Lab.judge_samples, **settings))
        for name, settings in SAMPLERS.items()}},
    "gaussian": {f"tokens of {D}": models(
        gaussian.BASE.replace(hidden_size=D), {"no head": 1e-3, "U-Net": 1e-3},
        Drawn(200_000, gaussian.draw_image), (1500,), gaussian.measure, **gaussian.TRAINING)
        for D in (32, 96)}}
