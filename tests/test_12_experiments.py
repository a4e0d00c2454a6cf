"""Chapter 12: the experiments measure what they say, and their README repeats what they found."""

import json
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

import dip
from experiments import __main__ as table
from experiments import features, harness, head_init, heads, overfit, patch_or_image
from experiments.harness import (
    BASE,
    NOT_SEEN,
    SEEN,
    UNCLEAR,
    Lab,
    Options,
    all_of,
    better,
    changed,
    power_spectrum,
    seam_contrast,
    smaller,
)

RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))


def grey(x):
    """Levels (n, H, W) as images (n, H, W, 3)."""
    return np.repeat(np.asarray(x, dtype=float)[..., None], 3, axis=3)


# Measures


@given(st.integers(1, 8), st.booleans())
def test_a_wave_has_all_its_power_at_its_own_radius(k, down):
    wave = np.cos(2 * np.pi * k * np.arange(16) / 16) * 127.5 + 127.5
    image = np.broadcast_to(wave[:, None] if down else wave, (1, 16, 16))
    power = power_spectrum(grey(image))
    assert power.argmax() + 1 == k
    assert np.delete(power, k - 1).max() < 1e-20


def test_white_noise_has_the_same_power_at_every_radius():
    """The bug it forbids: sums over rings instead of means, which grow with the radius."""
    noise = np.random.default_rng(0).normal(127.5, 127.5 / 4, (400, 32, 32))
    assert power_spectrum(grey(noise)) == pytest.approx(np.full(16, 1 / 16), rel=0.05)


@given(st.sampled_from([4, 8]), st.integers(1, 50))
def test_seam_contrast_counts_the_steps_at_the_borders_of_patches(P, step):
    """A ramp of slope 1 with an extra step at every border: contrast 1 + step."""
    ramp = np.arange(32) + step * (np.arange(32) // P)
    image = ramp[:, None] + ramp[None, :]
    assert seam_contrast(grey(image[None]), P) == pytest.approx(1 + step)


def test_an_image_without_detail_has_an_error_of_detail_of_one():
    truth = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    flat = np.broadcast_to(truth.mean(axis=(0, 1)), truth.shape)[None]
    assert overfit.error_of_detail(flat, truth) == pytest.approx(1)
    assert overfit.error_of_detail(truth[None], truth) == 0
    assert overfit.error_of_detail(np.stack([truth, *flat]), truth) == pytest.approx(1 / 2)


def test_psnr_of_an_error_of_one_level_is_48_decibel():
    truth = np.full((8, 8, 3), 100)
    assert overfit.psnr(truth[None] + 1, truth) == pytest.approx(48.1308, abs=1e-4)


def test_separate_classes_have_silhouette_one_and_mixed_ones_zero():
    y = np.arange(200) % 2
    noise = np.random.default_rng(0).standard_normal((200, 3))
    assert features.silhouette(1e-6 * noise + y[:, None], y) == pytest.approx(1, abs=1e-4)
    assert features.silhouette(noise, y) == pytest.approx(0, abs=0.02)


def test_silhouette_is_that_of_its_definition():
    """Point by point, with loops."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((30, 2)), np.arange(30) % 3
    found = []
    for i in range(30):
        distance = [np.linalg.norm(x[i] - x[j]) for j in range(30)]
        a = np.mean([distance[j] for j in range(30) if y[j] == y[i] and j != i])
        b = min(np.mean([distance[j] for j in range(30) if y[j] == c]) for c in {0, 1, 2} - {y[i]})
        found.append((b - a) / max(a, b))
    assert features.silhouette(x, y) == pytest.approx(np.mean(found))


def test_the_probe_names_new_points_of_separate_classes_and_guesses_mixed_ones():
    rng = np.random.default_rng(0)
    y, y_new = np.arange(300) % 3, np.arange(3000) % 3
    corners = np.eye(5)[:3] * 9
    x, x_new = (corners[k] + rng.standard_normal((len(k), 5)) for k in (y, y_new))
    assert features.probe(x, y, x_new, y_new) > 0.99
    nothing, nothing_new = rng.standard_normal((300, 5)), rng.standard_normal((3000, 5))
    assert features.probe(nothing, y, nothing_new, y_new) == pytest.approx(1 / 3, abs=0.05)


# Verdicts


def test_a_claim_is_seen_only_if_every_seed_of_one_side_beats_every_seed_of_the_other():
    assert smaller([1, 2, 3], [4, 5, 6]) == SEEN
    assert smaller([4, 5, 6], [1, 2, 3]) == NOT_SEEN
    assert smaller([1, 2, 4], [3, 5, 6]) == UNCLEAR
    assert smaller([1, 2], [4, 5]) == UNCLEAR


def test_a_claim_of_two_measures_needs_both_and_one_of_two_parts_may_refute_it():
    rows = [
        {"model": name, "seed": seed, "frechet": a + seed, "loss": b + seed}
        for name, a, b in (("x", 0, 0), ("y", 10, 10), ("z", 10, -10), ("w", -10, -10))
        for seed in range(3)
    ]
    assert better(rows, "x", "y")[1] == SEEN
    assert better(rows, "x", "z")[1] == UNCLEAR
    assert better(rows, "x", ("y", "w"))[1] == NOT_SEEN
    assert all_of([SEEN, UNCLEAR]) == UNCLEAR


def test_more_psnr_is_better():
    rows = [{"model": name, "seed": k, "psnr": psnr + k} for name, psnr in (("x", 20), ("y", 10))
            for k in range(3)]
    assert better(rows, "x", "y", ("psnr",))[1] == SEEN
    assert better(rows, "y", "x", ("psnr",))[1] == NOT_SEEN


def test_in_brackets_is_how_many_pairs_of_one_seed_agree():
    rows = [{"model": name, "seed": seed, "loss": x, "psnr": x} for name, numbers in
            (("x", (1, 5, 3)), ("y", (2, 4, 6))) for seed, x in enumerate(numbers)]
    assert better(rows, "x", "y", ("loss",))[0] == "loss 3.00 ± 2.00 against 4.00 ± 2.00 (2/3)"
    assert better(rows, "x", "y", ("psnr",))[0].endswith("(1/3)")
    assert better(rows[::-1], "x", "y", ("loss",)) == better(rows, "x", "y", ("loss",))


# What is compared


@pytest.mark.parametrize("regime", heads.REGIMES)
def test_the_bigger_dits_are_the_smallest_that_cost_as_much_as_the_unet_head(regime):
    base = heads.REGIMES[regime]
    unet, plain = dip.cost(base)[1], base.replace(head="none", head_width=0, head_depth=0)
    bigger = heads.BIGGER[regime]
    depth, width = bigger["deeper"]["depth"], bigger["wider"]["hidden_size"]
    for field, size, step in (("depth", depth, 1), ("hidden_size", width, 4 * base.num_heads)):
        below = plain.replace(**{field: size - step})
        assert dip.cost(below)[1] < unet <= dip.cost(plain.replace(**{field: size}))[1]


def test_narrow_tokens_are_narrower_than_a_patch_and_wide_ones_wider():
    numbers = 3 * BASE.patch_size**2
    assert heads.REGIMES["narrow"].hidden_size < numbers < heads.REGIMES["wide"].hidden_size
    assert heads.BIGGER["narrow"]["wider"]["hidden_size"] < numbers


@pytest.mark.parametrize("build", head_init.VARIANTS.values(), ids=head_init.VARIANTS)
def test_beginnings_differ_in_the_head_alone(build):
    small = BASE.replace(hidden_size=32, depth=1)
    weights = []
    for kind in (dip.DiP, build):
        torch.manual_seed(0)
        weights.append(kind(small).state_dict())
    ours, theirs = weights
    differ = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert all(name.startswith("output.head") for name in differ)
    assert ("output.head.down.0.weight" in differ) == ("PyTorchDefault" in build.__name__)
    zero = not (theirs["output.head.out.weight"].any() or theirs["output.head.out.bias"].any())
    assert zero == ("LastLayerZero" in build.__name__)
    average = isinstance(build(small).output.head.pool, torch.nn.AvgPool2d)
    assert average == (build is head_init.AveragePooling)


def test_runs_are_shared_only_if_all_they_depend_on_is_the_same(tmp_path):
    def folder(
        config=BASE, seed=0, steps=10, build=dip.DiP, data=None, kind=None, **training
    ):
        lab = Lab(Options(runs=str(tmp_path), data=data))
        return lab.folder(config, seed, steps, build, kind, training)

    others = [
        folder(BASE.replace(depth=3)),
        folder(seed=1),
        folder(steps=11),
        folder(build=head_init.LastLayerZero),
        folder(data=str(tmp_path)),
        folder(kind=patch_or_image.TreeData(1)),
        folder(lr=1.0),
    ]
    assert folder() == folder()
    assert len({folder(), *others}) == 1 + len(others)


def test_results_are_named_by_what_differs_from_the_defaults():
    """The bug it forbids: rows of other settings written over those in the README."""
    assert changed(heads.Options()) == changed(heads.Options(regimes=["narrow", "wide"])) == []
    other = heads.Options(data="folder/my.photos", steps=7, regimes=["wide"])
    assert changed(other) == ["my.photos", "steps 7", "regimes wide"]
    assert changed(heads.Options(data="folder/shapes")) == ["shapes"]


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    lab = Lab(Options(runs=str(tmp_path), quick=True, num=20))
    config = BASE.replace(hidden_size=32, depth=1)
    first = lab.row("once", config, 0)
    monkeypatch.setattr(harness, "fit", None)
    assert lab.row("once", config, 0) == first


def test_the_toys_differ_in_what_the_head_sees_alone():
    """Moved by a whole cell, a point looks the same to the head that sees patches only."""
    models = {name: build(BASE) for name, build in patch_or_image.TOYS.items()}
    assert len({sum(p.numel() for p in model.parameters()) for model in models.values()}) == 1
    cell = patch_or_image.CELL
    x, centre = torch.tensor([[0.1, 0.2]]), torch.tensor([[cell / 2, cell / 2]])
    for name, model in models.items():
        same = torch.allclose(model.view(x, centre), model.view(x + cell, centre + cell), atol=1e-6)
        assert same == (name == "patch")


# What was found


def test_every_experiment_runs_to_its_end():
    """In the small: trains, measures, judges and draws everything once."""
    command = [sys.executable, "-m", "experiments", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in table.NAMES:
        wrote = rf"(?m)^{name}: wrote \S*/{name}\.json and \S*/{name}\.png$"
        assert re.search(wrote, done.stdout), done.stdout


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_no_seed_is_left_out(path):
    """Three seeds, the first three, of each model: nothing picked."""
    results = json.loads(path.read_text())
    assert results["seeds"] == [0, 1, 2]
    for rows in (results["rows"], results.get("toys", []), results.get("costs", [])):
        seeds = defaultdict(list)
        for row in rows:
            seeds[row.get("regime"), row.get("width"), row["model"]].append(row["seed"])
        assert all(sorted(found) == [0, 1, 2] for found in seeds.values()), seeds


def test_the_readme_repeats_the_results():
    """`python -m experiments --readme` writes this table; by hand it would drift."""
    text = (ROOT / "experiments" / "README.md").read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1
    assert table.into_readme(text) == text


def test_every_experiment_is_in_the_readme():
    text = (ROOT / "experiments" / "README.md").read_text()
    assert all(f"experiments.{name}" in text for name in table.NAMES)


