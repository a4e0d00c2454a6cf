"""Chapter 5: a run is a function of its options."""

import os
import socket

import numpy as np
import pytest
import torch
from commands import TINY, alone, assert_same, checkpoint, flat, launch, run, torchrun
from helpers import VARIANTS, awake, batch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import sample
import train
from dip import PRESETS, flow_matching_loss
from fid import center_crop
from train import (Examples, FolderData, ShapesData, TrainOptions, learning_rate, micro_batches,
                   update_ema)


# --- the embedded data --------------------------------------------------------------------------


def test_neither_shape_nor_texture_alone_tells_the_class():
    """Every shape comes with two textures, every texture on two shapes, every pair once."""
    pairs = ShapesData.pairs
    assert len(set(pairs)) == len(set(ShapesData.names)) == 10
    for side in (0, 1):
        parts = [pair[side] for pair in pairs]
        assert all(parts.count(part) == 2 for part in parts)


@settings(max_examples=20)
@given(index=st.integers(0, 10**6), size=st.sampled_from([16, 48, 100]))
def test_an_embedded_image_is_a_function_of_its_index(index, size):
    image = ShapesData(size)[index][0]
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert np.array_equal(image, ShapesData(size)[index][0])
    assert not np.array_equal(image, ShapesData(size)[index + 10][0])


@pytest.mark.parametrize("index", range(10))
def test_embedded_images_are_antialiased(index):
    """A pixel is about the mean of what it covers: a drawing is nearer to a fine one averaged down
    than that fine one merely subsampled is, whose edges are jagged."""
    fine = ShapesData(512)[index][0].astype(float)
    coarse = ShapesData(64)[index][0].astype(float)
    averaged = fine.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(coarse - averaged).mean() < 0.5 * np.abs(fine[4::8, 4::8] - averaged).mean()


def test_training_and_validation_images_are_different():
    train_data, val_data = train.open_data(None, 16)
    assert not any(
        np.array_equal(train_data[i][0], val_data[j][0]) for i in range(20) for j in range(20)
    )


# --- the image folder ---------------------------------------------------------------------------


@settings(max_examples=40)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([1, 16, 63, 64]))
def test_the_crop_has_its_size_whatever_came_in(width, height, size):
    assert center_crop(Image.new("RGB", (width, height)), size).size == (size, size)


def test_the_crop_resizes_first_and_keeps_the_centre():
    """Forbids cropping without resizing: of three vertical bands the middle one stays whole."""
    bands = np.zeros((100, 300, 3), dtype=np.uint8)
    bands[:, 100:200] = 200
    cropped = np.asarray(center_crop(Image.fromarray(bands), 32))
    assert (cropped[:, 2:-2] >= 198).all()
    tall = np.asarray(center_crop(Image.fromarray(bands.transpose(1, 0, 2)), 32))
    assert np.array_equal(tall, cropped.transpose(1, 0, 2))


def test_an_image_of_the_right_size_is_untouched_and_one_of_twice_the_size_is_averaged():
    """ADM's first step is a box filter: 2 x 2 means, to the rounding of each of its two passes."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 64)), pixels)
    means = pixels.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(np.asarray(center_crop(Image.fromarray(pixels), 32)) - means).max() <= 1


@pytest.fixture
def folder(tmp_path):
    """Three classes of little pictures of many shapes and encodings, and a stray text file."""
    rng = np.random.default_rng(0)
    for name, mode in (("n01443537", "RGB"), ("n02509815", "L"), ("zebra finch", "CMYK")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(4):
            bands = len(Image.new(mode, (1, 1)).getbands())
            pixels = rng.integers(0, 256, (20 + k, 30, bands), dtype=np.uint8).squeeze()
            Image.fromarray(pixels, mode).save(tmp_path / "train" / name / f"{k}.jpg")
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    return tmp_path


def test_classes_are_the_sorted_folder_names_and_wnids_get_their_readable_name(folder):
    data, val = train.open_data(folder, 16)
    assert val is None
    assert data.classes == ["n01443537", "n02509815", "zebra finch"]
    assert data.names == ["goldfish", "lesser panda", "zebra finch"]
    assert [data[i][1] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(data[i][0].shape == (16, 16, 3) for i in range(12))
    assert train.open_data(folder / "train", 16)[0].files == data.files


def test_the_thousand_sorted_wnids_are_the_usual_imagenet_indices():
    """Class 1 is the goldfish, 387 the lesser panda, 964 the potpie (captions of Figs. 13 to 30).
    Two captions are off: Fig. 16's "tree frog" (30) is 31, Fig. 18's "teddy" (859) is 850."""
    wnids, names = zip(*train.imagenet_names().items())
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids)
    for index, name in (
        (1, "goldfish"),
        (13, "junco"),
        (19, "chickadee"),
        (31, "tree frog"),
        (35, "mud turtle"),
        (81, "ptarmigan"),
        (107, "jellyfish"),
        (153, "Maltese dog"),
        (387, "lesser panda"),
        (425, "barn"),
        (437, "beacon"),
        (441, "beer glass"),
        (850, "teddy"),
        (911, "wool"),
        (927, "trifle"),
        (938, "cauliflower"),
        (964, "potpie"),
        (997, "bolete"),
    ):
        assert names[index] == name


# --- order and randomness -----------------------------------------------------------------------


@settings(max_examples=30)
@given(
    world=st.integers(1, 4),
    passes=st.integers(1, 3),
    micro=st.integers(1, 3),
    first=st.integers(0, 5),
)
def test_ranks_and_passes_share_out_the_same_global_batch(world, passes, micro, first):
    """Whatever the machine, step n trains on examples n B ... (n + 1) B - 1, each once."""
    B = world * passes * micro
    options = TrainOptions(steps=first + 2, batch_size=B, micro_batch=micro)
    shares = [list(micro_batches(options, first, rank, world)) for rank in range(world)]
    for step in range(2):
        dealt = [
            k
            for share in shares
            for part in share[step * passes : (step + 1) * passes]
            for k in part
        ]
        assert sorted(dealt) == list(range((first + step) * B, (first + step + 1) * B))


def test_every_epoch_is_a_new_permutation():
    """Forbids data that is never reshuffled, and sampling with replacement."""
    examples = Examples(ShapesData(8, length=30), seed=0)
    epochs = [[examples.index(e * 30 + k) for k in range(30)] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Examples(ShapesData(8, length=30), seed=1).index(k) for k in range(30)] != epochs[0]


def test_workers_do_not_change_the_examples():
    options = TrainOptions(steps=8, batch_size=4, micro_batch=2)
    loaders = [
        DataLoader(
            Examples(ShapesData(8), seed=0),
            num_workers=workers,
            batch_sampler=list(micro_batches(options, 5, 0, 1)),
        )
        for workers in (0, 2)
    ]
    for one, two in zip(*loaders):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_the_folder_is_flipped_half_the_time_and_the_shapes_never(folder):
    data = FolderData(folder / "train", 16)
    examples = Examples(data, seed=0)
    flipped = 0
    for k in range(200):
        image, shown = data[examples.index(k)][0], examples[k][0]
        assert np.array_equal(shown, image) or np.array_equal(shown, image[:, ::-1])
        flipped += not np.array_equal(shown, image)
    assert 70 < flipped < 130  # five standard deviations of a fair coin
    val = Examples(data, 0, "val")
    for k in range(20):
        assert np.array_equal(val[k][0], data[val.index(k)][0])


def test_the_average_of_weights_warms_up():
    """decay = min(0.9999, (1 + n) / (10 + n)): the first update keeps a tenth."""
    ema, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    ema.weight.data.fill_(0.0)
    expected = 0.0
    for step in range(50):
        model.weight.data.fill_(float(step))
        update_ema(ema, model, step, 0.8)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema.weight.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_learning_rate_rises_stays_and_falls():
    options = TrainOptions(steps=100, lr=1.0, warmup=9, cooldown=0.2)
    rates = [learning_rate(options, step) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10:79] == [1.0] * 69
    assert rates[80:] == pytest.approx([k / 21 for k in range(20, 0, -1)])
    constant = TrainOptions(steps=100, lr=1e-4, warmup=0, cooldown=0.0)  # the paper's
    assert {learning_rate(constant, step) for step in range(100)} == {1e-4}


def test_without_a_gpu_and_without_a_model_the_settings_are_a_laptops(capsys):
    """Announced, and only then: a preset that is asked for brings the paper's settings."""
    options = TrainOptions()
    config = train.configure(options, alone("cpu"))
    assert (options.model, options.steps, config.image_size) == ("DiP-Nano/16", 3500, 48)
    assert "no CUDA and no --model: the small DiP-Nano/16" in capsys.readouterr().out
    for device, chosen in (("cuda", None), ("cpu", "DiP-XL/16")):
        options = TrainOptions(model=chosen)
        config = train.configure(options, alone(device))
        assert (options.model, options.batch_size, options.lr) == ("DiP-XL/16", 256, 1e-4)
        assert config == PRESETS["DiP-XL/16"] and capsys.readouterr().out == ""


# --- whole runs ---------------------------------------------------------------------------------


def test_three_steps_and_three_more_are_six_bit_for_bit(monkeypatch, tmp_path, capsys):
    """Weights, averaged weights, optimizer and log: the same command resumes the same run."""
    often = "--sample-every 3 --log-every 3"
    run(monkeypatch, train, TINY, often, f"--steps 6 --out {tmp_path}/six")
    run(monkeypatch, train, TINY, often, f"--steps 3 --out {tmp_path}/two")
    run(monkeypatch, train, TINY, often, f"--steps 6 --out {tmp_path}/two")
    assert "resumed at step 3" in capsys.readouterr().out
    six, two = checkpoint(tmp_path / "six"), checkpoint(tmp_path / "two")
    assert six["step"] == two["step"] == 6
    for key in ("model", "ema", "optimizer"):
        assert_same(six[key], two[key], rtol=0, atol=0)
    logs = [train.read_log(tmp_path / name) for name in ("six", "two")]
    for line in logs[0] + logs[1]:
        line.pop("images_per_s", None)
    assert logs[0] == logs[1] and len(logs[0]) == 4
    written = {"ckpt-00000006.pt", "log.jsonl", "loss.png", "samples-00000006.png"}
    assert written <= set(os.listdir(tmp_path / "two"))


@pytest.mark.parametrize("crash", [2, 5])
def test_a_run_that_died_is_repeated_by_the_same_command(monkeypatch, tmp_path, crash):
    """Before the first checkpoint or after it, with accumulation: nothing is logged twice."""
    command = TINY, "--steps 6 --sample-every 3 --log-every 1 --micro-batch 2"
    run(monkeypatch, train, *command, f"--out {tmp_path}/whole")
    honest, calls = train.update_ema, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == crash:
            raise KeyboardInterrupt
        honest(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update_ema", dies)
        run(patch, train, *command, f"--out {tmp_path}/died")
    run(monkeypatch, train, *command, f"--out {tmp_path}/died")
    whole, died = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "died")
    for key in ("model", "ema", "optimizer"):
        assert_same(whole[key], died[key], rtol=0, atol=0)
    logs = [train.read_log(tmp_path / name) for name in ("whole", "died")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]


def test_a_checkpoint_is_builtins_and_tensors_and_says_what_it_is(monkeypatch, tmp_path, folder):
    run(monkeypatch, train, TINY, f"--steps 1 --data {folder} --out {tmp_path}/run")
    state = checkpoint(tmp_path / "run")  # weights_only=True
    assert state["config"]["num_classes"] == 3 and state["names"][0] == "goldfish"
    leaves = [leaf for key in state for leaf in flat(state[key]).values()]
    allowed = (torch.Tensor, int, float, str, bool, type(None))
    assert all(isinstance(leaf, allowed) for leaf in leaves)


def test_old_checkpoints_are_dropped(monkeypatch, tmp_path):
    run(monkeypatch, train, TINY, "--steps 4 --save-every 1 --sample-every 4 --keep 2",
        f"--out {tmp_path}")
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == ["ckpt-00000003.pt", "ckpt-00000004.pt"]


def assert_same_curve(one, other, key, rel):
    losses = [[line[key] for line in train.read_log(run) if key in line] for run in (one, other)]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=rel)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """The command of a run of 20 steps, and its folder when one process made it in one pass."""
    out = tmp_path_factory.mktemp("twenty") / "one"
    command = f"{TINY} --steps 20 --sample-every 20 --log-every 1"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train, command, "--out", out)
    return command, out


@pytest.mark.parametrize("processes, agent, words", [
    (1, "", "--micro-batch 1"),
    (2, "--standalone", ""),
    (2, "--standalone", "--micro-batch 1"),
    (1, "two nodes", ""),
], ids=["4 passes", "2 processes", "2 processes, 2 passes", "2 nodes"])
def test_processes_and_passes_train_the_same_run(
    monkeypatch, tmp_path, twenty, processes, agent, words
):
    """Up to the order of float sums: forbids seeds by rank, and means of unequal shares.

    Two nodes are two agents of torchrun that meet on the loopback."""
    command, one = twenty
    command = f"{command} {words} --out {tmp_path}/many"
    if agent == "two nodes":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        agent = f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-id=test"
        agents = [launch("train.py", command, agent=agent) for _ in range(2)]
        errors = [process.communicate()[1] for process in agents]
        assert [process.returncode for process in agents] == [0, 0], errors
    elif processes > 1:
        torchrun(processes, "train.py", command, cwd=tmp_path)
    else:
        run(monkeypatch, train, command)
    assert_same(checkpoint(one)["model"], checkpoint(tmp_path / "many")["model"], rtol=0, atol=1e-5)
    assert_same_curve(one, tmp_path / "many", "loss", 1e-5)
    assert_same_curve(one, tmp_path / "many", "val_loss", 1e-5)


@pytest.mark.parametrize("words", ["--workers 2", "--grad-checkpoint"])
def test_neither_workers_nor_recomputed_activations_change_a_bit(
    monkeypatch, tmp_path, twenty, words
):
    command, one = twenty
    run(monkeypatch, train, command, words, f"--out {tmp_path}")
    for key in ("model", "ema", "optimizer"):
        assert_same(checkpoint(one)[key], checkpoint(tmp_path)[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputed_activations_give_the_very_same_gradients(name):
    gradients = []
    for recompute in (False, True):
        model = awake(VARIANTS[name])
        if recompute:
            train.prepare(model, TrainOptions(grad_checkpoint=True), alone())
        x, t, y = batch(model.config)
        flow_matching_loss(model, x, y, t, torch.ones_like(x))[0].mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients))


def test_the_compiled_model_trains_as_the_plain_one(monkeypatch, tmp_path, twenty):
    command, one = twenty
    run(monkeypatch, train, command, f"--compile --out {tmp_path}")
    assert_same_curve(one, tmp_path, "loss", 1e-4)
    assert_same(checkpoint(one)["model"], checkpoint(tmp_path)["model"], rtol=0, atol=1e-4)


def test_512_pixels_in_patches_of_32_train_and_other_rectangles_are_drawn(monkeypatch, tmp_path):
    """Table 3, in small: the bottleneck of the U-Net is 2 x 2."""
    (tmp_path / "data" / "ants").mkdir(parents=True)
    Image.new("RGB", (600, 520), "orange").save(tmp_path / "data" / "ants" / "0.png")
    run(monkeypatch, train, "--model DiP-XL/32 --set depth=2 hidden_size=32 num_heads=2",
        "head_width=4 --image-size 512 --steps 1 --batch-size 2 --device cpu",
        f"--data {tmp_path}/data --out {tmp_path}/run")
    assert checkpoint(tmp_path / "run")["config"]["patch_size"] == 32
    run(monkeypatch, sample, f"--ckpt {tmp_path}/run --class ants --num 1 --steps 2",
        f"--size 256 768 --device cpu --out {tmp_path}/wide.png")
    assert Image.open(tmp_path / "wide.png").width > 768


ENCODER = """
import torch
dependencies = ["torch"]
class Tiny(torch.nn.Module):
    patch_size = 7
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 6, 7, 7)
    def forward_features(self, x):
        return {"x_norm_patchtokens": self.patch(x).flatten(2).transpose(1, 2)}
def tiny():
    torch.manual_seed(0)
    return Tiny()
"""


@pytest.fixture
def aligned(tmp_path):
    """The words that align a run with a small encoder in a local repository."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(ENCODER)
    return f"--repa tiny --repa-repo {tmp_path}/hub --repa-source local --lr 3e-3 --log-every 10"


def test_repa_aligns_with_a_local_encoder_that_stays_out_of_the_checkpoint(
    monkeypatch, tmp_path, aligned
):
    run(monkeypatch, train, TINY, "--steps 60 --sample-every 60", aligned, f"--out {tmp_path}/run")
    losses = [line["repa"] for line in train.read_log(tmp_path / "run") if "repa" in line]
    assert 0 < losses[-1] < 0.8 * losses[0]
    state = checkpoint(tmp_path / "run")
    assert state["config"]["repa_dim"] == 6
    assert not any("patch" in key for key in state["model"])


def test_the_encoder_is_frozen_and_sees_one_of_its_patches_for_16_pixels(tmp_path, aligned):
    """14 x 14 pixels for DINOv2: images of 256 are shown to it at 224 (REPA).  A constant picture
    in ImageNet's mean colour is zero to it."""
    encoder = train.Encoder("tiny", tmp_path / "hub", "local", "cpu")
    assert not any(p.requires_grad for p in encoder.net.parameters()) and not encoder.net.training
    assert encoder(torch.zeros(2, 3, 64, 96)).shape == (2, 6, 4, 6)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(1, 3, 32, 32)
    bias = encoder.net.patch.bias[:, None, None].expand(1, 6, 2, 2)
    torch.testing.assert_close(encoder(mean * 2 - 1), bias, rtol=0, atol=1e-5)


def test_an_aligned_run_resumes_bit_for_bit(monkeypatch, tmp_path, aligned):
    often = "--sample-every 3"
    run(monkeypatch, train, TINY, aligned, often, f"--steps 6 --out {tmp_path}/six")
    run(monkeypatch, train, TINY, aligned, often, f"--steps 3 --out {tmp_path}/two")
    run(monkeypatch, train, TINY, aligned, often, f"--steps 6 --out {tmp_path}/two")
    for key in ("model", "ema", "optimizer"):
        assert_same(checkpoint(tmp_path / "six")[key], checkpoint(tmp_path / "two")[key],
                    rtol=0, atol=0)


# --- samples from a run -------------------------------------------------------------------------

EXPORT = "--num-samples 23 --steps 3 --batch 5 --device cpu"


def export(monkeypatch, trained, out, *more):
    run(monkeypatch, sample, EXPORT, "--ckpt", trained, "--out", out, *more)
    return np.load(out)


def test_the_export_has_balanced_labels_in_turn(monkeypatch, trained, tmp_path):
    """label = i mod K: forbids uneven counts, and class order, which spoils Inception Score."""
    file = export(monkeypatch, trained, tmp_path / "s.npz")
    assert file["arr_0"].shape == (23, 16, 16, 3) and file["arr_0"].dtype == np.uint8
    assert file["arr_1"].tolist() == [i % 10 for i in range(23)]
    assert os.listdir(tmp_path) == ["s.npz"]


def test_an_interrupted_export_continues(monkeypatch, trained, tmp_path):
    whole = export(monkeypatch, trained, tmp_path / "whole.npz")["arr_0"]
    honest, drawn, limit = sample.generate, [], 2

    def counted(*arguments, **settings):
        if len(drawn) == limit:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return honest(*arguments, **settings)

    monkeypatch.setattr(sample, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        export(monkeypatch, trained, tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()
    with pytest.raises(ValueError, match="half-done export with other settings"):
        export(monkeypatch, trained, tmp_path / "s.npz", "--seed 1")
    limit = None
    assert np.array_equal(export(monkeypatch, trained, tmp_path / "s.npz")["arr_0"], whole)
    assert len(drawn) == 5  # two before, three after: none twice
    with pytest.raises(ValueError, match="is there already"):
        export(monkeypatch, trained, tmp_path / "s.npz")


def test_any_number_of_processes_exports_the_array_of_one(monkeypatch, trained, tmp_path):
    """Bit for bit with batches of the same size; with others, to the rounding of a level."""
    one = export(monkeypatch, trained, tmp_path / "one.npz")["arr_0"]
    torchrun(3, "sample.py", EXPORT, f"--ckpt {trained} --out {tmp_path}/three.npz", cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "three.npz")["arr_0"], one)
    other = export(monkeypatch, trained, tmp_path / "other.npz", "--batch 9")["arr_0"]
    assert np.abs(one.astype(int) - other).max() <= 1


def test_a_grid_and_a_trajectory_are_drawn(monkeypatch, trained, tmp_path, capsys):
    run(monkeypatch, sample, f"--ckpt {trained} --class 1 'dotted ring' --num 3 --steps 4",
        f"--size 8 24 --trajectory --out {tmp_path}/g.png")
    assert Image.open(tmp_path / "g.png").width > 3 * 24
    assert Image.open(tmp_path / "g-trajectory.png").width > 4 * 24
    assert "checked disc, dotted ring" in capsys.readouterr().out
