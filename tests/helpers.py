"""What several chapters need: a small network with nothing left at zero, and damaged files."""

import torch
from hypothesis import strategies as st

from dip import DiP, DiPConfig

SMALL = DiPConfig(
    image_size=16,
    patch_size=4,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=5,
    head_width=4,
    head_depth=2,
)
VARIANTS = {
    "none": SMALL.replace(head="none", head_width=0, head_depth=0),
    "unet": SMALL,
    "mlp": SMALL.replace(head="mlp", head_width=32, head_depth=2),
    "coordinate": SMALL.replace(head="coordinate", head_width=8, head_depth=2),
    "attention": SMALL.replace(head="attention", head_width=16, head_depth=2),
    "unet on the image": SMALL.replace(head_input="image"),
    "unet, intermediate": SMALL.replace(placement="intermediate"),
    "unet, hybrid": SMALL.replace(placement="hybrid"),
    "unet, shallow": SMALL.replace(head_depth=1),
    "unet, clean image": SMALL.replace(prediction="x"),
}


def awake(config, seed=0):
    """A model whose every parameter is moved off its start: adaLN-Zero leaves nothing to see."""
    torch.manual_seed(seed)
    model = DiP(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(config, B=2, size=None, seed=0):
    """x_t (B, 3, H, W), t (B,), y (B,)"""
    g = torch.Generator().manual_seed(seed)
    H, W = size or (config.image_size, config.image_size)
    return (
        torch.randn(B, 3, H, W, generator=g),
        torch.rand(B, generator=g),
        torch.randint(config.num_classes, (B,), generator=g),
    )


@st.composite
def damaged(draw, good):
    """Nothing but random bytes, or a good file cut short, or with some of its bytes replaced."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(good[: draw(st.integers(0, len(good)))] if draw(st.booleans()) else good)
    for _ in range(draw(st.integers(0, 8)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)
