"""Chapter 5.  The law of the release: the authors' weights, in their names and conventions, give
the authors' velocities through dip.py; release.npz holds what their network answered."""

import dataclasses
import sys
import types
import zlib
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import literal
import numpy as np
import pytest
import torch

import dip
from sample import imagenet_names, load_model
from dip import DiP, DiPConfig, from_release
from sample import euler, generate, guided

RECORDED = np.load(Path(__file__).with_name("release.npz"))
D, HEADS, DEPTH, CLASSES, P, H, W = RECORDED["config"].tolist()


# --- their layout -------------------------------------------------------------------------------


def layout(D, heads, depth, classes, P, C=64):
    """{name in the release: shape}; C channels at the first stage of the head"""
    hidden, channels, shapes = 8 * D // 3, [C, 2 * C, 4 * C, 8 * C], {}

    def layer(name, *shape, outputs=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (outputs or shape[0],)

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
    for k, c in enumerate(channels, start=1):
        layer(f"local_decoder.enc{k}.0", c, 3 if k == 1 else c // 2, 3, 3)
        layer(f"local_decoder.up{k}", c, c, 2, 2)
        layer(f"local_decoder.dec{k}.0", C if k == 1 else c // 2, 2 * c, 3, 3)
    layer("local_decoder.bottleneck.0", 8 * C, 8 * C + D, 1, 1)
    layer("local_decoder.out_conv", 3, C, 1, 1)
    return shapes


def drawn(name, shape):
    """A weight as a function of its name: norms around 1, small biases, the others by fan-in"""
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
    return torch.from_numpy(z.astype(np.float32))


def released(*sizes, **changes):
    """A state dict in the release's layout"""
    return {name: drawn(name, shape) for name, shape in layout(*sizes, **changes).items()}


SMALL = dict(D=16, heads=2, depth=2, classes=3, P=16, C=4)


def recorded_inputs():
    """x_t (3, 3, H, W), t (3,) in our time, y (3,), the null class among them"""
    x_t = np.random.default_rng(1).standard_normal((3, 3, H, W)).astype(np.float32)
    return (torch.from_numpy(x_t), torch.tensor([0.07, 0.5, 0.93]),
            torch.tensor([0, CLASSES, CLASSES // 2]))


@pytest.fixture(scope="module")
def weights():
    return released(D, HEADS, DEPTH, CLASSES, P)


def lightning(averaged, raw):
    """What the authors' training framework saves"""
    state = {f"ema_denoiser.{name}": weight for name, weight in averaged.items()}
    state |= {f"denoiser.{name}": weight for name, weight in raw.items()}
    state["diffusion_trainer.proj.0.weight"] = torch.zeros(2, 2)
    return {"state_dict": state, "epoch": 3, "global_step": 1234, "optimizer_states": [],
            "hyper_parameters": {"lr": 1e-4}, "pytorch-lightning_version": "2.5"}


def difference(model, weights=None):
    """The largest, between a model and the recorded velocities"""
    with torch.no_grad():
        return (model(*recorded_inputs()) - torch.tensor(RECORDED["v"])).abs().max().item()


# --- the recorded outputs -----------------------------------------------------------------------


def test_the_authors_weights_give_the_authors_velocities(weights, tmp_path):
    """Bare and in a Lightning file, where the averaged weights and the raw ones are told apart."""
    torch.save(weights, tmp_path / "bare.pt")
    doubled = {name: 2 * weight for name, weight in weights.items()}
    torch.save(lightning(weights, doubled), tmp_path / "averaged.ckpt")
    torch.save(lightning(doubled, weights), tmp_path / "raw.ckpt")
    for name, ema, same in (("bare.pt", True, True), ("bare.pt", False, True),
                            ("averaged.ckpt", True, True), ("averaged.ckpt", False, False),
                            ("raw.ckpt", False, True), ("raw.ckpt", True, False)):
        model, info = load_model(tmp_path / name, ema=ema)
        assert (difference(model) <= 2e-5) == same, (name, ema)
        assert info["step"] == (0 if name == "bare.pt" else 1234)
    assert model.config == DiPConfig(image_size=256, patch_size=P, hidden_size=D, depth=DEPTH,
                                     num_heads=HEADS, num_classes=CLASSES, head_width=64)
    assert info["classes"] == info["names"] == [f"class {k}" for k in range(CLASSES)]


def test_the_authors_conventions_read_literally_give_the_authors_velocities(weights):
    """t' = 1 - t, v' = -v, neighbouring rotary pairs: the recorded figures, without dip.py."""
    arrays = {name: weight.double().numpy() for name, weight in weights.items()}
    x_t, t, y = recorded_inputs()
    for b in range(3):
        v = -literal.release(arrays, HEADS, x_t[b].double().numpy(), 1 - t[b].item(), y[b].item())
        assert np.abs(v - RECORDED["v"][b]).max() < 2e-5


def undo_time(ours, weights):
    ours["time.mlp.0.weight"] = weights["t_embedder.mlp.0.weight"]


def undo_half_of_time(ours, weights):
    ours["time.mlp.0.weight"][:, 128:] *= -1


def undo_sign(ours, weights):
    ours["output.head.out.weight"] = weights["local_decoder.out_conv.weight"]


def undo_sign_of_bias(ours, weights):
    ours["output.head.out.bias"] = weights["local_decoder.out_conv.bias"]


def undo_rotary_pairs(ours, weights):
    for i in range(DEPTH):
        ours[f"blocks.{i}.attention.qkv.weight"] = weights[f"blocks.{i}.attn.qkv.weight"]
        for norm in ("q_norm", "k_norm"):
            ours[f"blocks.{i}.attention.{norm}.weight"] = weights[f"blocks.{i}.attn.{norm}.weight"]


def undo_order_of_norms(ours, weights):
    name = "blocks.1.attention.k_norm.weight"
    ours[name] = weights["blocks.1.attn.k_norm.weight"]


def columns_first(ours, weights):
    for name in ours:
        if "qkv" in name:
            qk = ours[name][:2 * D].view(2, HEADS, 2, 2, -1, D).flip(3).reshape(2 * D, D)
            ours[name] = torch.cat([qk, ours[name][2 * D:]])
        if "q_norm" in name or "k_norm" in name:
            ours[name] = ours[name].view(2, 2, -1).flip(1).flatten()


def exchange_gate_and_value(ours, weights):
    ours["blocks.2.mlp.gate.weight"] = weights["blocks.2.mlp.w3.weight"]
    ours["blocks.2.mlp.value.weight"] = weights["blocks.2.mlp.w1.weight"]


@pytest.mark.parametrize("undo", [
    undo_time, undo_half_of_time, undo_sign, undo_sign_of_bias, undo_rotary_pairs,
    undo_order_of_norms, columns_first, exchange_gate_and_value])
def test_without_any_one_step_of_the_map_the_velocities_are_others(weights, undo):
    """So the recorded figures do see each step."""
    config, ours = from_release(weights)
    model = DiP(config)
    model.load_state_dict(ours)
    assert difference(model) <= 2e-5
    undo(ours, weights)
    model.load_state_dict(ours)
    assert difference(model) > 1e-3


def test_the_map_leaves_the_authors_weights_as_they_are():
    """Forbids turning them in place: a second conversion would be another network."""
    weights = released(**SMALL)
    before = {name: weight.clone() for name, weight in weights.items()}
    first, second = from_release(weights)[1], from_release(weights)[1]
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("changes", [
    dict(), dict(heads=1), dict(D=24, heads=3), dict(depth=11), dict(classes=1), dict(P=32),
    dict(C=6)])
def test_the_configuration_is_read_off_the_shapes(changes):
    """Forbids sizes of DiP-XL/16 taken for granted; every weight finds its place."""
    sizes = SMALL | changes
    config, ours = from_release(released(**sizes))
    assert config == DiPConfig(
        image_size=16 * sizes["P"], patch_size=sizes["P"], hidden_size=sizes["D"],
        depth=sizes["depth"], num_heads=sizes["heads"], num_classes=sizes["classes"],
        head_width=sizes["C"])
    model = DiP(config)
    model.load_state_dict(ours)
    assert all(weight.dtype == torch.float32 for weight in ours.values())


def test_the_presets_of_the_release_have_its_shapes():
    """DiP-XL/16 and DiP-L/16 take the authors' checkpoints, weight for weight."""
    for preset, D, depth, P in (("DiP-XL/16", 1152, 26, 16), ("DiP-L/16", 1024, 22, 16),
                                ("DiP-XL/32", 1152, 26, 32)):
        count = sum(np.prod(shape) for shape in layout(D, 16, depth, 1000, P).values())
        with torch.device("meta"):
            model = DiP(dip.PRESETS[preset])
        assert sum(p.numel() for p in model.parameters()) == count


# --- sampling in both conventions ---------------------------------------------------------------


def test_sampling_is_stepping_the_other_way_in_the_authors_convention(tmp_path):
    """Theirs: x + v' dt from noise at t' = 0, guidance where 0.1 < t' < 1, by literal loops; ours:
    Euler from t = 1 down.  Forbids a sign, a time or an interval read the wrong way round."""
    weights = released(**SMALL)
    torch.save(weights, tmp_path / "bare.pt")
    model, _ = load_model(tmp_path / "bare.pt")
    arrays = {name: weight.double().numpy() for name, weight in weights.items()}
    noise, y, steps, scale = torch.randn(1, 3, 16, 32), 2, 5, 2.9

    x, null = noise[0].double().numpy(), SMALL["classes"]
    for k in range(steps):
        t = k / steps
        v = literal.release(arrays, SMALL["heads"], x, t, y)
        if 0.1 < t < 1:
            v_0 = literal.release(arrays, SMALL["heads"], x, t, null)
            v = v_0 + scale * (v - v_0)
        x = x + v / steps

    with torch.no_grad():
        field = guided(model, torch.tensor([y]), scale, (0.0, 0.9))
        ours = euler(field, noise, steps)
        torch.testing.assert_close(ours[0].double(), torch.tensor(x), rtol=1e-4, atol=1e-4)
        everywhere = euler(guided(model, torch.tensor([y]), scale), noise, steps)
    assert (ours - everywhere).abs().max() > 1e-2        # the interval is felt


def test_a_thousand_classes_are_those_of_imagenet(tmp_path):
    """In the order of their sorted folders: class 1 is the goldfish."""
    torch.save(released(**SMALL | dict(classes=1000)), tmp_path / "bare.pt")
    model, info = load_model(tmp_path / "bare.pt")
    assert info["names"][1] == "goldfish" and info["classes"][1] == "n01443537"
    assert info["classes"] == sorted(info["classes"]) == list(imagenet_names())
    assert len(info["names"]) == 1000 == model.config.num_classes


def test_a_model_of_the_release_draws_with_its_null_class(tmp_path):
    torch.save(released(**SMALL), tmp_path / "bare.pt")
    model, info = load_model(tmp_path / "bare.pt")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert info["config"] == dataclasses.asdict(model.config)
    images = generate(model, [0, SMALL["classes"]], size=(16, 32), steps=2)
    assert images.shape == (2, 3, 16, 32) and images.isfinite().all()


# --- files --------------------------------------------------------------------------------------


def line_of(path, **options):
    """The one line in which loading a file ends"""
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_model(path, **options)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    return str(refused.value)


def test_safetensors_are_read_where_the_package_is_and_asked_for_where_not(tmp_path, monkeypatch):
    """The package is stood in for by one with its function alone."""
    weights = released(**SMALL)
    path = tmp_path / "model.safetensors"
    torch.save(weights, path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert line_of(path) == (f"{path}: reading it needs the safetensors package; "
                             f"`pip install safetensors`, or give a .pt file")
    package, module = types.ModuleType("safetensors"), types.ModuleType("safetensors.torch")
    package.torch, module.load_file = module, lambda path: torch.load(BytesIO(path.read_bytes()))
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    torch.save(weights, tmp_path / "model.pt")
    ours = load_model(path)[0].state_dict()
    bare = load_model(tmp_path / "model.pt")[0].state_dict()
    assert all(torch.equal(ours[name], bare[name]) for name in bare)
    path.write_bytes(path.read_bytes()[:1000])
    assert "is not a .safetensors file, or not all of it is there" in line_of(path)


def test_files_that_are_something_else_end_in_one_line(tmp_path):
    path = tmp_path / "file.pt"
    for content in ({"a": torch.ones(2)}, {}, [torch.ones(2)], torch.ones(2), 7, "text",
                    {"state_dict": {}}, {"state_dict": 7}, {"state_dict": {"denoiser.x": 1}}):
        torch.save(content, path)
        assert "neither a checkpoint of train.py nor weights of a released DiP" in line_of(path)
    assert "no checkpoint at" in line_of(tmp_path / "none.pt")


def test_a_truncated_file_ends_in_one_line(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(released(**SMALL), path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is not a checkpoint, or not all of it is there" in line_of(path)


@pytest.mark.parametrize("missing", [
    "s_embedder.proj.weight", "y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight",
    "local_decoder.out_conv.weight", "blocks.0.attn.q_norm.weight"])
def test_without_the_weights_that_say_the_sizes_nothing_is_guessed(missing, tmp_path):
    """The line names what is missing, in our names."""
    weights = released(**SMALL)
    del weights[missing]
    ours = {"s_embedder.proj.weight": "embed.weight", "t_embedder.mlp.0.weight":
            "time.mlp.0.weight", "y_embedder.embedding_table.weight": "label.weight",
            "local_decoder.out_conv.weight": "output.head.out.weight",
            "blocks.0.attn.q_norm.weight": "blocks.0.attention.q_norm.weight"}[missing]
    torch.save(weights, tmp_path / "file.pt")
    line = line_of(tmp_path / "file.pt")
    assert "nor weights of a released DiP" in line and ours in line


@pytest.mark.parametrize("change, expected", [
    (dict(remove="blocks.1.mlp.w2.weight"), "missing: blocks.1.mlp.out.weight"),
    (dict(remove="local_decoder.up3.bias"), "missing: output.head.up.1.bias"),
    (dict(remove="blocks.1."), "missing: blocks.1."),
    (dict(add="local_decoder.enc5.0.weight"), "unexpected: output.head."),
    (dict(add="x_embedder.proj.weight"), "unexpected: x_embedder.proj.weight"),
    (dict(reshape="local_decoder.dec2.0.weight"), "of another shape: output.head.merge.2.weight"),
    (dict(reshape="local_decoder.out_conv.bias"), "of another shape: output.head.out.bias")])
def test_weights_that_fit_by_half_are_named(change, expected, tmp_path):
    """Forbids loading what fits and leaving the rest at random."""
    weights, path = released(**SMALL), tmp_path / "file.pt"
    if "remove" in change:
        for name in [name for name in weights if name.startswith(change["remove"])]:
            if change["remove"] != "blocks.1." or "norm1" in name:
                del weights[name]
    if "add" in change:
        weights[change["add"]] = torch.ones(4)
    if "reshape" in change:
        weights[change["reshape"]] = torch.cat([weights[change["reshape"]]] * 2)
    torch.save(weights, path)
    assert expected in line_of(path)


def test_shapes_that_contradict_each_other_end_in_one_line(tmp_path):
    """From a patch that is no square to a norm of two heads at once, weight by weight.  Forbids
    taking what lies in front, and reshaping what has the right size by accident."""
    weights, path = released(**SMALL), tmp_path / "file.pt"
    for name, weight in weights.items():
        for changed in (weight[:1], weight.flatten(), weight[..., None],
                        torch.cat([weight, weight], dim=-1)):
            if changed.shape != weight.shape:
                torch.save(weights | {name: changed}, path)
                line_of(path)


def test_a_lightning_file_without_the_weights_asked_for_is_refused(tmp_path):
    """Forbids raw weights in the place of averaged ones."""
    state, path = lightning(released(**SMALL), {}), tmp_path / "file.ckpt"
    torch.save(state, path)
    load_model(path)
    assert "no weights named denoiser.*; try --ema" in line_of(path, ema=False)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = released(**SMALL)
    weights["blocks.1.norm2.weight"][3] = float("nan")
    torch.save(weights, tmp_path / "file.pt")
    assert "weight blocks.1.norm2.weight is not finite" in line_of(tmp_path / "file.pt")


class Foreign:
    """An object of a class that a weights file has no business with"""

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_file_that_would_run_code_is_not_run_and_the_way_out_is_said(tmp_path):
    """weights_only stays on: nothing in the file is executed."""
    path, trap = tmp_path / "file.ckpt", tmp_path / "trap"
    foreign = Foreign()
    foreign.path = str(trap)
    state = lightning(released(**SMALL), released(**SMALL)) | {"hyper_parameters": foreign}
    torch.save(state, path)
    line = line_of(path)
    assert not trap.exists()
    assert "holds more than tensors" in line and "may run code when opened" in line
    command = line.split('python -c "')[1].split('"')[0]
    assert "weights_only=False" in command and "['state_dict'], 'weights.pt')" in command
    torch.save(OrderedDict(torch.load(path, weights_only=False)["state_dict"]),
               tmp_path / "weights.pt")                      # what the command does
    assert trap.exists()
    load_model(tmp_path / "weights.pt")
