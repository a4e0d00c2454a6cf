"""Chapter 5.  The law of the release: the authors' weights, in their names and conventions, give
the authors' velocities through dip.py.  release.npz holds the outputs of their network."""

import dataclasses
import sys
import types
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lightning, release_shapes, release_weights

import dip
from dip import DiP, DiPConfig, from_release
from sample import imagenet_names, load_model

RECORDED = np.load(Path(__file__).with_name("release.npz"))
SIZES = dict(zip(("D", "heads", "depth", "classes", "P"), RECORDED["config"].tolist()))
H, W = RECORDED["config"][5:].tolist()
SMALL = dict(D=16, heads=2, depth=2, classes=3, P=16, C=4)


def recorded_inputs():
    """x_t (3, 3, H, W), t (3,) in our time, y (3,), the null class among them"""
    x_t = np.random.default_rng(1).standard_normal((3, 3, H, W)).astype(np.float32)
    K = SIZES["classes"]
    return torch.from_numpy(x_t), torch.tensor([0.07, 0.5, 0.93]), torch.tensor([0, K, K // 2])


# --- the recorded outputs -------------------------------------------------------------------------


def test_the_authors_weights_give_the_authors_velocities(tmp_path):
    """From a bare state dict, from torch.compile or from DataParallel too, and from a Lightning
    file.  Catches raw weights in the place of averaged ones, and a wrong sign, time, rotary pair or
    order of rows and columns in the conversion."""
    weights = release_weights(**SIZES)
    doubled = {name: 2 * weight for name, weight in weights.items()}
    compiled, parallel = ({f"{prefix}.{name}": weight for name, weight in weights.items()}
                          for prefix in ("_orig_mod", "module"))
    known = from_release(weights)[1]
    for state, ema in ((parallel, True), (lightning(weights, doubled), False),
                       (lightning(doubled, compiled), True)):
        torch.save(state, tmp_path / "file.ckpt")
        model, info = load_model(tmp_path / "file.ckpt", ema=ema)
        assert all(torch.equal(w, known[name]) for name, w in model.state_dict().items())
        assert info["step"] == state.get("global_step", 0)
    assert (model(*recorded_inputs()) - torch.tensor(RECORDED["v"])).abs().max() <= 2e-5
    assert info["config"] == dataclasses.asdict(model.config)
    assert info["classes"] == info["names"] == [f"class {k}" for k in range(SIZES["classes"])]
    assert not model.training and not any(p.requires_grad for p in model.parameters())


# --- sizes and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(), dict(heads=1, depth=11, classes=1), dict(D=24, heads=3, P=32, C=6)])
def test_the_configuration_is_read_off_the_shapes_and_the_weights_stay_as_they_are(changes):
    """Catches sizes of DiP-XL/16 taken for granted, a weight without a place, and weights that are
    converted in place: a second conversion would give another network."""
    sizes = SMALL | changes
    weights = release_weights(**sizes)
    config, ours = from_release(weights)
    assert config == DiPConfig(
        image_size=16 * sizes["P"], patch_size=sizes["P"], hidden_size=sizes["D"],
        depth=sizes["depth"], num_heads=sizes["heads"], num_classes=sizes["classes"],
        head_width=sizes["C"])
    DiP(config).load_state_dict(ours)
    assert all(weight.dtype == torch.float32 for weight in ours.values())
    before = release_weights(**sizes)
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("preset, D, depth, P", [
    ("DiP-XL/16", 1152, 26, 16), ("DiP-L/16", 1024, 22, 16), ("DiP-XL/32", 1152, 26, 32)])
def test_the_presets_of_the_release_take_the_authors_weights(preset, D, depth, P):
    """Weight by weight, on the meta device.  This is Table 4's U-Net too: its channels, kernels and
    the 1 x 1 bottleneck."""
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in
                   release_shapes(D, 16, depth, 1000, P).items()}
        config, ours = from_release(weights)
        DiP(dip.PRESETS[preset]).load_state_dict(ours)
    assert config.replace(head_width=0) == dip.PRESETS[preset]


def test_a_thousand_classes_are_those_of_imagenet(tmp_path):
    """Class 1 is the goldfish, 387 the lesser panda, 964 the potpie (captions of Figs. 13 to 30).
    Two captions are off: Fig. 16's "tree frog" (30) is 31, Fig. 18's "teddy" (859) is 850."""
    torch.save(release_weights(**SMALL | dict(classes=1000)), tmp_path / "bare.pt")
    info = load_model(tmp_path / "bare.pt")[1]
    assert info["classes"] == sorted(info["classes"]) == list(imagenet_names())
    known = {1: "goldfish", 31: "tree frog", 387: "lesser panda", 850: "teddy", 964: "potpie"}
    assert {index: info["names"][index] for index in known} == known


# --- files ----------------------------------------------------------------------------------------


def line_of(path, state=None, **options):
    """The one line in which loading the file ends"""
    if state is not None:
        torch.save(state, path)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_model(path, **options)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    return str(refused.value)


def test_safetensors_are_read_where_the_package_is_installed(tmp_path, monkeypatch):
    """Its one function is replaced by a stand-in.  Without the package, the line names it."""
    path, weights = tmp_path / "model.safetensors", release_weights(**SMALL)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "safetensors" in line_of(path, weights).removeprefix(str(path))
    module = types.SimpleNamespace(load_file=lambda path: torch.load(BytesIO(path.read_bytes())))
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    expected = from_release(weights)[1]
    for name, weight in load_model(path)[0].state_dict().items():
        assert torch.equal(weight, expected[name]), name
    path.write_bytes(path.read_bytes()[:1000])
    assert "is not a checkpoint, or not all of it is there" in line_of(path)


def without(name):
    return {key: weight for key, weight in release_weights(**SMALL).items() if key != name}


@pytest.mark.parametrize("state, answer, ema", [
    (without("s_embedder.proj.weight"), "embed.weight", True),           # in our names
    (without("blocks.0.attn.q_norm.weight"), "blocks.0.attention.q_norm.weight", True),
    (without("local_decoder.dec2.0.weight"), '"output.head.merge.2.weight"', True),
    (without("") | {"local_decoder.enc5.0.weight": torch.ones(4)}, "Unexpected", True),
    (without("") | {"blocks.1.norm2.weight": torch.full((16,), torch.nan)},
     "weight blocks.1.norm2.weight is not finite", True),
    (lightning({}, without("")) | {"hyper_parameters": Path("x")}, "which may run code", True),
    (lightning({}, without("")), "no weights named denoiser.*", False),
    (lightning(without(""), {}), "no weights named ema_denoiser.*", True),
    (from_release(without(""))[1], "its names are those of dip.py", True),
    (without(""), "it does not say whether its weights are averaged", False),
    ({"state_dict": {}}, "nor weights of a released DiP", True),
    ({"state_dict": 7}, "nor weights of a released DiP", True)], ids=range(12))
def test_other_weights_are_refused_by_name(state, answer, ema, tmp_path):
    """Catches a guess in the place of a missing weight, what fits loaded from an edited network,
    and raw weights in the place of averaged ones."""
    assert answer in line_of(tmp_path / "file.pt", state, ema=ema)


def test_shapes_that_contradict_each_other_end_in_one_line(tmp_path):
    """Weights that tell the sizes, or are converted.  Catches taking the first rows, and reshaping
    what has the right size by accident, such as the norm of two heads at once."""
    weights = without("")
    for name in ("s_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.attn.qkv.weight",
                 "y_embedder.embedding_table.weight", "blocks.1.attn.q_norm.weight",
                 "blocks.1.attn.k_norm.weight", "local_decoder.out_conv.weight"):
        weight = weights[name]
        for changed in (weight[:1], weight.flatten(), torch.cat([weight, weight], dim=-1)):
            if changed.shape != weight.shape:
                line_of(tmp_path / "file.pt", weights | {name: changed})
