"""Chapter 5.  The law of the release: the authors' weights, in their names and conventions, give
the authors' velocities through dip.py.  release.npz holds the outputs of their network."""

import dataclasses
import sys
import types
from io import BytesIO
from pathlib import Path

import literal
import numpy as np
import pytest
import torch
from helpers import lightning, release_shapes, release_weights

import dip
from dip import DiP, DiPConfig, from_release
from sample import euler, guided, imagenet_names, load_model

RECORDED = np.load(Path(__file__).with_name("release.npz"))
SIZES = dict(zip(("D", "heads", "depth", "classes", "P"), RECORDED["config"].tolist()))
H, W = RECORDED["config"][5:].tolist()
SMALL = dict(D=16, heads=2, depth=2, classes=3, P=16, C=4)


def recorded_inputs():
    """x_t (3, 3, H, W), t (3,) in our time, y (3,), the null class among them"""
    x_t = np.random.default_rng(1).standard_normal((3, 3, H, W)).astype(np.float32)
    K = SIZES["classes"]
    return torch.from_numpy(x_t), torch.tensor([0.07, 0.5, 0.93]), torch.tensor([0, K, K // 2])


@pytest.fixture(scope="module")
def weights():
    return release_weights(**SIZES)


# --- the recorded outputs -------------------------------------------------------------------------


def test_the_authors_weights_give_the_authors_velocities(weights, tmp_path):
    """In a bare state dict, from torch.compile or from DataParallel too, and in a Lightning file.
    Catches raw weights in the place of averaged ones, and a wrong sign, time, rotary pair or order
    of rows and columns in the conversion."""
    doubled = {name: 2 * weight for name, weight in weights.items()}
    compiled = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    for name, state, ema, same in (
            ("bare.pt", weights, True, True),
            ("parallel.pt", {f"module.{name}": w for name, w in weights.items()}, False, True),
            ("averaged.ckpt", lightning(doubled, compiled), True, True),
            ("averaged.ckpt", lightning(doubled, weights), False, False),
            ("raw.ckpt", lightning(weights, doubled), False, True),
            ("raw.ckpt", lightning(weights, doubled), True, False)):
        torch.save(state, tmp_path / name)
        model, info = load_model(tmp_path / name, ema=ema)
        v = model(*recorded_inputs())
        assert ((v - torch.tensor(RECORDED["v"])).abs().max() <= 2e-5) == same, (name, ema)
        assert info["step"] == (1234 if name.endswith(".ckpt") else 0)
    assert model.config == DiPConfig(
        image_size=256, patch_size=16, hidden_size=SIZES["D"], depth=SIZES["depth"],
        num_heads=SIZES["heads"], num_classes=SIZES["classes"], head_width=64)
    assert info["config"] == dataclasses.asdict(model.config)
    assert info["classes"] == info["names"] == [f"class {k}" for k in range(SIZES["classes"])]
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_authors_conventions_read_literally_give_the_authors_velocities(weights):
    """t' = 1 - t, v' = -v, neighbouring rotary pairs: the recorded values, without dip.py."""
    arrays = {name: weight.double().numpy() for name, weight in weights.items()}
    x_t, t, y = recorded_inputs()
    for b in (0, 1):
        v = -literal.release(arrays, SIZES["heads"], x_t[b].double().numpy(), 1 - t[b].item(),
                             y[b].item())
        assert np.abs(v - RECORDED["v"][b]).max() < 2e-5


def test_sampling_is_stepping_the_other_way_in_the_authors_convention(tmp_path):
    """Theirs: x + v' dt from noise at t' = 0, guidance where 0.1 < t' < 1, by literal loops.  Ours:
    Euler from t = 1 down.  Catches a sign, a time or an interval read the wrong way round."""
    weights = release_weights(**SMALL)
    torch.save(weights, tmp_path / "bare.pt")
    model, _ = load_model(tmp_path / "bare.pt")
    arrays = {name: weight.double().numpy() for name, weight in weights.items()}
    torch.manual_seed(0)
    noise, y, null, steps, scale = torch.randn(1, 3, 16, 32), 2, 3, 5, 2.9
    x = noise[0].double().numpy()
    for k in range(steps):
        t = k / steps
        v = literal.release(arrays, SMALL["heads"], x, t, y)
        if 0.1 < t < 1:
            v_0 = literal.release(arrays, SMALL["heads"], x, t, null)
            v = v_0 + scale * (v - v_0)
        x = x + v / steps
    ours = euler(guided(model, torch.tensor([y]), scale, (0.0, 0.9)), noise, steps)
    torch.testing.assert_close(ours[0].double(), torch.tensor(x), rtol=1e-4, atol=1e-4)
    everywhere = euler(guided(model, torch.tensor([y]), scale), noise, steps)
    assert (ours - everywhere).abs().max() > 1e-2        # the interval matters


# --- sizes and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(), dict(heads=1), dict(D=24, heads=3), dict(depth=11), dict(classes=1), dict(P=32),
    dict(C=6)])
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
    """In the order of their sorted folders: class 1 is the goldfish."""
    torch.save(release_weights(**SMALL | dict(classes=1000)), tmp_path / "bare.pt")
    model, info = load_model(tmp_path / "bare.pt")
    assert info["names"][1] == "goldfish" and info["classes"][1] == "n01443537"
    assert info["classes"] == sorted(info["classes"]) == list(imagenet_names())
    assert len(info["names"]) == 1000 == model.config.num_classes


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
    weights = release_weights(**SMALL)
    path = tmp_path / "model.safetensors"
    torch.save(weights, path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "safetensors" in line_of(path).removeprefix(str(path))
    package, module = types.ModuleType("safetensors"), types.ModuleType("safetensors.torch")
    package.torch, module.load_file = module, lambda path: torch.load(BytesIO(path.read_bytes()))
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    _, expected = from_release(weights)
    for name, weight in load_model(path)[0].state_dict().items():
        assert torch.equal(weight, expected[name]), name
    path.write_bytes(path.read_bytes()[:1000])
    assert "is not a checkpoint, or not all of it is there" in line_of(path)


@pytest.mark.parametrize("content", [
    {"a": torch.ones(2)}, {}, [torch.ones(2)], torch.ones(2), 7, "text", {"state_dict": {}},
    {"state_dict": 7}, {"state_dict": {"denoiser.x": 1}}])
def test_a_file_that_holds_something_else_ends_in_one_line(content, tmp_path):
    line = line_of(tmp_path / "file.pt", content)
    assert "neither a checkpoint of train.py nor weights of a released DiP" in line or (
        "is not a checkpoint" in line and f"it holds a {type(content).__name__}" in line)


def test_a_truncated_or_missing_file_ends_in_one_line(tmp_path):
    path = tmp_path / "file.pt"
    assert "no checkpoint at" in line_of(path)
    torch.save(release_weights(**SMALL), path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is not a checkpoint, or not all of it is there" in line_of(path)


@pytest.mark.parametrize("name, ours", {
    "s_embedder.proj.weight": "embed.weight", "t_embedder.mlp.0.weight": "time.mlp.0.weight",
    "y_embedder.embedding_table.weight": "label.weight",
    "local_decoder.out_conv.weight": "output.head.out.weight",
    "blocks.0.attn.q_norm.weight": "blocks.0.attention.q_norm.weight",
    "blocks.1.mlp.w2.weight": "blocks.1.mlp.out.weight", "blocks.1.norm1.weight": "blocks.1.norm1",
    "local_decoder.up3.bias": "output.head.up.1.bias",
    "local_decoder.dec2.0.weight": "output.head.merge.2.weight"}.items())
def test_a_missing_weight_is_named_in_our_names(name, ours, tmp_path):
    """Also one that tells the sizes.  Catches a guess in its place, and weights left at random."""
    weights = release_weights(**SMALL)
    del weights[name]
    line = line_of(tmp_path / "file.pt", weights)
    assert "nor weights of a released DiP" in line and ours in line


@pytest.mark.parametrize("name", ["local_decoder.enc5.0.weight", "x_embedder.proj.weight"])
def test_a_weight_too_many_is_named(name, tmp_path):
    """Catches loading what fits from an edited network."""
    line = line_of(tmp_path / "file.pt", release_weights(**SMALL) | {name: torch.ones(4)})
    assert "Unexpected" in line and name.replace("local_decoder", "output.head") in line


def test_shapes_that_contradict_each_other_end_in_one_line(tmp_path):
    """From a patch that is no square to a norm of two heads at once, weight by weight.  Catches
    taking the first rows, and reshaping what has the right size by accident."""
    weights, path = release_weights(**SMALL | dict(depth=1, C=1)), tmp_path / "file.pt"
    for name, weight in weights.items():
        for changed in (weight[:1], weight.flatten(),
                        torch.cat([weight, weight], dim=-1)):
            if changed.shape != weight.shape:
                line_of(path, weights | {name: changed})


def test_a_lightning_file_without_the_requested_weights_is_refused(tmp_path):
    """Catches raw weights in the place of averaged ones, and the reverse."""
    path, weights = tmp_path / "file.ckpt", release_weights(**SMALL)
    assert "no weights named denoiser.*" in line_of(path, lightning({}, weights), ema=False)
    assert "no weights named ema_denoiser.*" in line_of(path, lightning(weights, {}))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = release_weights(**SMALL)
    weights["blocks.1.norm2.weight"][3] = float("nan")
    assert "weight blocks.1.norm2.weight is not finite" in line_of(tmp_path / "file.pt", weights)


class Foreign:
    """An object of a class that a weights file has no business with"""

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_file_is_not_run(archive, tmp_path):
    """Catches weights_only=False: opening this file would make another one.  Files of old
    versions of PyTorch are no archives, and cannot be mapped."""
    path, foreign = tmp_path / "file.ckpt", Foreign()
    foreign.path = str(tmp_path / "trap")
    state = lightning({}, release_weights(**SMALL)) | {"hyper_parameters": foreign}
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    assert ("which may run code" if archive else "is not a checkpoint") in line_of(path)
    assert not (tmp_path / "trap").exists()
    torch.load(path, weights_only=False)                     # the trap works
    assert (tmp_path / "trap").exists()
