"""
The models of every experiment.

A token of 96 dimensions is narrower than its patch, which has 192 values.  One of 256 is wider, as
in the paper (1152 for 768).  The U-Net head has the paper's proportion: its bottleneck has 2/3 as
many channels as the patch has values, 128 for 192, as in DiP-XL/16 (512 for 768).
"""

from dataclasses import dataclass, field
from functools import partial

import torch.nn as nn
import torch.nn.functional as F

from dip import PRESETS, DiP, DiPConfig, FinalLayer, PatchDetailerHead, patchify, unpatchify
from experiments import features, gaussian, overfit, samplers, toy
from experiments.lab import Drawn
from sample import OUR_WEIGHTS, load_model
from theory.model import gain

WIDE = DiPConfig(image_size=32, patch_size=8, hidden_size=256, depth=4, num_heads=4, num_classes=10,
                 head="none")
NARROW = WIDE.replace(hidden_size=96)


@dataclass(frozen=True)
class Model:
    """All that a row of results depends on, except its seed."""

    config: DiPConfig
    lr: float | None = 3e-3                  # None: the best of the experiment's RATES
    data: object = "shapes"                  # or "photos", or an object with what Shapes has
    build: object = DiP                      # makes the network from the configuration
    training: dict = field(default_factory=dict)             # changes to lab.TRAINING
    steps: tuple = (500,)                    # after which it is measured
    measure: object = None                   # measure(lab, name, model, net), else Lab.measure


# -------------------------------------------------------------------------------------------------
# Networks that dip.py does not have


def zero(*layers):
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class ScalarPath(DiP):
    """v = gain(t) x_t + DiT's last layer: EDM's c_skip (arXiv 2206.00364), which has no weights."""

    def forward(self, x_t, t, y):
        best = gain(0.25, t)[:, None, None, None]            # for pixels of variance 0.25
        return best * x_t + super().forward(x_t, t, y)


class NoisyImage(nn.Identity):
    """Gives x_t."""

    def forward(self, x_t, s, time, c):
        return x_t


class LinearPath(nn.Module):
    """B diag(g(c)) C patch, g linear in the condition c; x_t at first.

    as_head: the form that fits HEADS, W s + B diag(g(s)) C patch with s = SiLU(token + time).
    """

    def __init__(self, config, as_head=False):
        super().__init__()
        D, self.P, self.as_head = config.hidden_size, config.patch_size, as_head
        size = 3 * self.P**2
        self.down, self.up = (nn.Linear(size, size, bias=False) for _ in range(2))   # C, B
        self.gain = nn.Linear(D, size)                                   # g
        zero(self.gain)
        nn.init.ones_(self.gain.bias)
        nn.init.eye_(self.down.weight)
        nn.init.eye_(self.up.weight)
        if as_head:
            self.plain = nn.Linear(D, size)                              # W
            zero(self.plain)

    def forward(self, x_t, s, time, c):
        """x_t (B, 3, H, W), s (B, N, D), time and c (B, D) -> (B, 3, H, W)"""
        c = F.silu(s + time[:, None]) if self.as_head else c[:, None]    # (B, N or 1, D)
        patches = patchify(x_t, self.P).flatten(2)                       # (B, N, 3PP)
        pixels = self.up(self.gain(c) * self.down(patches))              # (B, N, 3PP)
        if self.as_head:
            pixels = pixels + self.plain(c)
        return unpatchify(pixels.unflatten(2, (3, self.P, self.P)), x_t.shape[-2:])


class Sum(nn.Module):
    """Outputs, added.  DiT's last layer and a head among them give 0 at first."""

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
OUTPUTS = {"no head, starts at x_t": (FinalLayer, NoisyImage),
           "linear path": (FinalLayer, LinearPath),
           "linear path, head": (PATH_HEAD,),
           "U-Net + last layer": (FinalLayer, PatchDetailerHead),
           "U-Net + linear path": (FinalLayer, LinearPath, PatchDetailerHead),
           "U-Net + linear path, head": (PATH_HEAD, PatchDetailerHead)}


def build(name, config):
    """The network that a model's name stands for."""
    net = (ScalarPath if name == "scalar path" else DiP)(config)
    if name in OUTPUTS:
        net.output = Sum(config, OUTPUTS[name])
    elif name == "U-Net, blind":             # it sees the token alone
        net.output.head.register_forward_pre_hook(lambda head, inputs: (0 * inputs[0], inputs[1]))
    elif name == "U-Net, last layer from 0":
        zero(net.output.head.out)
    elif name == "U-Net, random upsampling":
        for up in net.output.head.up:
            nn.init.kaiming_normal_(up.weight, nonlinearity="relu")
    elif name == "U-Net, PyTorch's default":
        net.output.head.apply(lambda module: getattr(module, "reset_parameters", int)())
    return net


def fine_tuned(config):
    """DiP-Nano/8 with the weights of drawn shapes."""
    net = DiP(config)
    net.load_state_dict(load_model(OUR_WEIGHTS)[0].state_dict())
    return net


# -------------------------------------------------------------------------------------------------
# Who is compared with whom


def changes_of(name, P):
    """The changes to a configuration without a head that a model's name stands for."""
    C, n = {4: (16, 2), 8: (32, 3), 16: (64, 4)}[P]          # channels and stages of the U-Net
    unet = dict(head="unet", head_width=C, head_depth=n)
    if name.endswith(("stage", "stages", "channels")):
        what = "head_width" if name.endswith("channels") else "head_depth"
        return unet | {"head_width": 32, what: int(name.split()[0])}
    known = {
        "deeper": dict(depth=8), "272 wide": dict(hidden_size=272),      # the U-Net's FLOPs
        "368 wide": dict(hidden_size=368), "no head, predicts x": dict(prediction="x"),
        "MLP": dict(head="mlp", head_width=320, head_depth=2),
        "coordinate": dict(head="coordinate", head_width=32, head_depth=4),
        "attention": dict(head="attention", head_width=48, head_depth=2),
        "U-Net between blocks": dict(unet, placement="intermediate"),
        "U-Net in both places": dict(unet, placement="hybrid"),
        "U-Net on the image": dict(unet, head_input="image"),
        "U-Net, predicts x": dict(unet, prediction="x")}
    return known.get(name, unet if name.startswith(("U-Net", "DiP")) else {})


def models(base, rates, data="shapes", steps=(500,), measure=None, **training):
    """{name: Model} of {name: learning rate}."""
    return {name: Model(base.replace(**changes_of(name, base.patch_size)), lr, data,
                        partial(build, name), training, steps, measure)
            for name, lr in rates.items()}


REGIMES = {"narrow": NARROW, "wide": WIDE}
PATCHES = {P: WIDE.replace(patch_size=P) for P in (4, 8, 16)}
OF_64 = PATCHES[4].replace(image_size=64, hidden_size=72, num_heads=3)   # the paper's geometry
paths = partial(models, steps=(2000,), cooldown=0.3)
PATHS = dict.fromkeys(("U-Net", "no head", "scalar path", "linear path", "linear path, head",
                       "U-Net + linear path"))
CONTROLS = PATHS | dict.fromkeys(("no head, starts at x_t", "no head, predicts x", "coordinate"))
BOTH = {"no head": 6e-3, "U-Net": 3e-3}
FOUR = BOTH | {"U-Net + last layer": 6e-3, "deeper": 6e-3}
PLACES = BOTH | {"U-Net between blocks": 3e-3, "U-Net in both places": 3e-3}
SHORT = PLACES | {"no head, predicts x": 6e-3, "coordinate": 6e-3} | dict.fromkeys((
    "MLP", "attention", "U-Net on the image", "U-Net, predicts x", "U-Net, last layer from 0",
    "U-Net, random upsampling", "U-Net, PyTorch's default"), 3e-3)


def recipe(steps, name="U-Net", lr=3e-3, data="shapes", start=None, time_mean=0.4, **changes):
    """{name: Model}: DiP-Nano/8 with changes to its configuration, so many steps of its recipe."""
    return {name: Model(PRESETS["DiP-Nano/8"].replace(**changes), lr, data,
                        start or partial(build, name), dict(cooldown=0.3, time_mean=time_mean),
                        (steps,))}


W192 = dict(hidden_size=192, num_heads=6)
WITH_PATH = dict(name="U-Net + linear path, head", prediction="v")
PHOTOS = dict(steps=1000, lr=1.5e-3, data="photos", image_size=64)
OF_4 = dict(PHOTOS, patch_size=4, head_depth=2, hidden_size=96, num_heads=3, depth=4)
RECIPES = {              # of drawn shapes: the steps of ten minutes of CPU time
    "DiP-Nano/8": recipe(3023),
    "96 wide": recipe(3500, hidden_size=96, num_heads=3),
    "64 wide": recipe(4350, hidden_size=64, num_heads=2),
    "4 blocks": recipe(3550, depth=4),
    "mean of logit t: 0": recipe(3023, time_mean=0.0),
    "predicts v": recipe(3285, prediction="v"),
    "a linear path too, predicts v": recipe(2462, **WITH_PATH),
    "192 wide": recipe(2045, **W192),
    "192 wide, 8 channels": recipe(2370, **W192, head_width=8),
    "192 wide, 2 stages": recipe(2255, **W192, head_depth=2),
    "192 wide, a linear path too, predicts v": recipe(2242, **W192, **WITH_PATH),
    "before: DiP-Nano/16": recipe(4593, time_mean=0.8, patch_size=16, **W192, head_width=8,
                                  head_depth=4),
    "photos, rate 3e-3": recipe(**PHOTOS | dict(lr=3e-3)),
    "photos, rate 1.5e-3": recipe(**PHOTOS),
    "photos, rate 1.5e-3, predicts v": recipe(**PHOTOS, prediction="v"),
    "photos, rate 1.5e-3, from the weights in assets": recipe(**PHOTOS | dict(start=fine_tuned)),
    "photos, rate 1.5e-3, patches of 4": recipe(**OF_4),
    "photos, rate 1.5e-3, patches of 4, longer": recipe(**OF_4 | dict(steps=6000))}

EXPERIMENTS = {          # {experiment: {group: {name: Model}}}; the first of a group: its reference
    "paths": {
        "narrow, shapes": paths(NARROW, PATHS),
        "wide, shapes": paths(WIDE, CONTROLS | {"U-Net, blind": 3e-3}),          # the U-Net's rate
        "narrow, photos": paths(NARROW, PATHS, "photos"),
        "wide, photos": paths(WIDE, CONTROLS | {"U-Net, blind": 1.5e-3}, "photos"),
        "photos of 64": paths(OF_64, dict.fromkeys(("U-Net", "no head", "linear path")), "photos",
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
        "photos of 64": models(OF_64, BOTH, "photos", (2000, 10_000), batch_size=8, micro_batch=8)},
    "short": {
        "narrow, shapes": models(NARROW, SHORT | {"272 wide": 3e-3}),
        "wide, shapes": models(WIDE, SHORT | {"368 wide": 3e-3}),
        "stages, patches of 16": models(PATCHES[16], dict.fromkeys(
            ("1 stage", "2 stages", "3 stages", "4 stages"), 3e-3)),
        "channels, patches of 8": models(WIDE, dict.fromkeys(
            ("8 channels", "16 channels", "32 channels", "64 channels"), 3e-3)),
        **{f"patches of {P}": models(base, BOTH) for P, base in PATCHES.items()}},
    "overfit": {f"{name}, one photo": models(
        base.replace(image_size=overfit.SIZE, num_classes=1), dict.fromkeys(BOTH, 3e-3),
        Drawn(1, lambda _: overfit.PHOTO), (500, 1000), overfit.measure, **overfit.TRAINING)
        for name, base in REGIMES.items()},
    "features": {f"{name}, shapes": models(base, PLACES, measure=features.measure)
                 for name, base in REGIMES.items()},
    "toy": {"toy": {name: Model(WIDE.replace(num_classes=1), 3e-3, Drawn(100_000, toy.draw_point),
                                partial(toy.ToyNet, view=view), toy.TRAINING, (2500,), toy.measure)
                    for name, view in toy.VIEWS.items()}},
    "samplers": {"narrow, shapes": {
        name: Model(NARROW.replace(**changes_of("U-Net", 8)), measure=samplers.measure)
        for name in samplers.METHODS}},
    "gaussian": {f"tokens of {D}": models(
        gaussian.BASE.replace(hidden_size=D), {"DiT-only": 1e-3, "DiP": 1e-3},
        Drawn(200_000, gaussian.draw_image), (1500,), gaussian.measure, **gaussian.TRAINING)
        for D in (32, 96)}}
