"""What several chapters need: small networks with nothing left at zero, and damaged files."""

from contextlib import contextmanager

import literal
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from dip import DiP, DiPConfig, patchify

SMALL = DiPConfig(image_size=16, patch_size=4, hidden_size=16, depth=3, num_heads=2,
                  num_classes=5, head_width=4, head_depth=2)
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


def shake(module, seed=0):
    """Move every parameter off its start, so that no weight is 0, no norm 1, no bias 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def awake(config, seed=0):
    """A model whose every parameter is moved off its start: a term that a zero hides is seen."""
    torch.manual_seed(seed)
    return shake(DiP(config), seed)


def batch(config, B=2, size=None, seed=0):
    """x_t (B, 3, H, W), t (B,), y (B,)"""
    g = torch.Generator().manual_seed(seed)
    H, W = size or (config.image_size, config.image_size)
    return (torch.randn(B, 3, H, W, generator=g), torch.rand(B, generator=g),
            torch.randint(config.num_classes, (B,), generator=g))


@contextmanager
def float64():
    """Everything inside is computed in float64, also what the network insists on in float32: then a
    wrong term cannot hide behind rounding."""
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@st.composite
def configurations(draw, heads=("none", "unet", "mlp", "coordinate", "attention"), **fixed):
    """A small legal configuration, of every head, input, placement and prediction."""
    head = draw(st.sampled_from(heads))
    stages = draw(st.integers(1, 2))
    P = draw(st.sampled_from([2**stages, 2 * 2**stages, 3 * 2**stages] if head == "unet"
                             else [1, 2, 3, 4, 5]))
    num_heads = draw(st.integers(1, 3))
    placements = ("post-hoc",) if head == "none" else ("post-hoc", "intermediate", "hybrid")
    placement = draw(st.sampled_from(placements))
    width = draw(st.integers(1, 5))
    width = {"none": 0, "attention": 16 * min(width, 2)}.get(head, width)
    return DiPConfig(**dict(
        image_size=2 * P, patch_size=P, num_heads=num_heads,
        hidden_size=4 * num_heads * draw(st.integers(1, 3)),
        depth=draw(st.integers(1 if placement == "post-hoc" else 2, 4)),
        num_classes=draw(st.integers(1, 4)), head=head, head_width=width,
        head_depth=0 if head == "none" else stages, placement=placement,
        head_input=draw(st.sampled_from(["patch", "image"])) if head == "unet" else "patch",
        prediction=draw(st.sampled_from(["v", "x"])), repa_dim=draw(st.sampled_from([0, 6])),
    ) | fixed)


def assert_is_its_formula(config, rows, columns, B, seed):
    """The network and its literal reading give the same velocity and the same aligned tokens.

    1e-6: the frequencies of time are float32 in either precision.
    """
    size = config.patch_size * rows, config.patch_size * columns
    with float64(), torch.no_grad():
        model = awake(config, seed)
        x, t, y = batch(config, B, size, seed)
        answer = model(x, t, y, align=bool(config.repa_dim))
    v, tokens = answer if config.repa_dim else (answer, None)
    w = literal.weights_of(model)
    for b in range(B):
        slow, aligned = literal.dip(w, config, x[b].numpy(), t[b].item(), y[b].item())
        torch.testing.assert_close(v[b], torch.tensor(slow), rtol=1e-6, atol=1e-6)
        if config.repa_dim:
            aligned = torch.tensor(np.array(aligned).T.reshape(-1, rows, columns))
            torch.testing.assert_close(tokens[b], aligned, rtol=1e-6, atol=1e-6)


def influence(f, x, P):
    """(N, N) booleans: does output patch i change when input patch j does?"""
    N, columns = patchify(x, P).shape[1], x.shape[-1] // P
    before, changed = patchify(f(x), P), torch.zeros(N, N, dtype=torch.bool)
    for j in range(N):
        moved = x.clone()
        row, column = j // columns * P, j % columns * P
        moved[:, :, row : row + P, column : column + P] += 1
        changed[:, j] = (patchify(f(moved), P) - before).abs().amax(dim=(0, 2, 3, 4)) > 1e-6
    return changed


@st.composite
def damaged(draw, good):
    """Nothing but random bytes, or a good file cut short, or with some of its bytes replaced."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(good[: draw(st.integers(0, len(good)))] if draw(st.booleans()) else good)
    for _ in range(draw(st.integers(0, 8)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)
