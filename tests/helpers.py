"""What several chapters need: small networks, the layout of the release, damaged files."""

import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import dip
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
    """A model with every parameter moved off its start: no zero hides a term."""
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
    """Everything inside is computed in float64, even what the network insists on in float32.  So a
    wrong term cannot hide behind rounding."""
    before, frequencies = torch.get_default_dtype(), dip.time_frequencies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(dip, "time_frequencies", lambda device: frequencies(device, torch.float64))
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
        image_size=P * draw(st.integers(1, 2)), patch_size=P, num_heads=num_heads,
        hidden_size=4 * num_heads * draw(st.integers(1, 3)),
        depth=draw(st.integers(1 if placement == "post-hoc" else 2, 4)),
        num_classes=draw(st.integers(1, 4)), head=head, head_width=width,
        head_depth=0 if head == "none" else stages, placement=placement,
        head_input=draw(st.sampled_from(["patch", "image"])) if head == "unet" else "patch",
        prediction=draw(st.sampled_from(["v", "x"])), repa_dim=draw(st.sampled_from([0, 6])),
    ) | fixed)


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


def release_shapes(D=8, heads=2, depth=2, classes=3, P=16, C=64):
    """{name in the authors' state dict: shape}.  C: channels of the head's first stage"""
    hidden, shapes = 8 * D // 3, {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    layer("s_embedder.proj", D, 3 * P * P)
    layer("t_embedder.mlp.0", D, 256)
    layer("t_embedder.mlp.2", D, D)
    shapes["y_embedder.embedding_table.weight"] = classes + 1, D
    for i in range(depth):
        layer(f"blocks.{i}.attn.proj", D, D)
        layer(f"blocks.{i}.adaLN_modulation.0", 6 * D, D)
        for name, shape in {"norm1": (D,), "norm2": (D,), "attn.qkv": (3 * D, D),
                            "attn.q_norm": (D // heads,), "attn.k_norm": (D // heads,),
                            "mlp.w1": (hidden, D), "mlp.w2": (D, hidden),
                            "mlp.w3": (hidden, D)}.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
    for k, c in enumerate((C, 2 * C, 4 * C, 8 * C), start=1):
        layer(f"local_decoder.enc{k}.0", c, 3 if k == 1 else c // 2, 3, 3)
        layer(f"local_decoder.up{k}", c, c, 2, 2)
        layer(f"local_decoder.dec{k}.0", C if k == 1 else c // 2, 2 * c, 3, 3)
    layer("local_decoder.bottleneck.0", 8 * C, 8 * C + D, 1, 1)
    layer("local_decoder.out_conv", 3, C, 1, 1)
    return shapes


def release_weights(**sizes):
    """A state dict like the authors'.  release.npz was recorded with these weights, so each is a
    function of its name: norms around 1, small biases, the others scaled by their inputs."""
    weights = {}
    for name, shape in release_shapes(**sizes).items():
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if "norm" in name:
            z = 1 + 0.2 * z
        elif len(shape) == 1:
            z = 0.1 * z
        elif "embedding_table" in name:
            z = 0.5 * z
        elif "local_decoder.up" in name:
            z = z * (1 / shape[0]) ** 0.5
        else:
            z = z * (1.5 / np.prod(shape[1:])) ** 0.5
        weights[name] = torch.from_numpy(z.astype(np.float32))
    return weights


def lightning(raw, average):
    """The file that the authors' training writes, with both kinds of weights."""
    state = {f"denoiser.{name}": weight for name, weight in raw.items()}
    state |= {f"ema_denoiser.{name}": weight for name, weight in average.items()}
    state["diffusion_trainer.proj.0.weight"] = torch.zeros(2, 2)
    return {"state_dict": state, "epoch": 3, "global_step": 1234, "optimizer_states": [],
            "hyper_parameters": {"lr": 1e-4}, "pytorch-lightning_version": "2.5"}


@st.composite
def damaged(draw, good):
    """Nothing but random bytes, or a good file cut short, or with some of its bytes replaced."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(good[: draw(st.integers(0, len(good)))] if draw(st.booleans()) else good)
    for _ in range(draw(st.integers(0, 8)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)
