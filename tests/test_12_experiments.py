"""Chapter 12: the experiments measure what they say, and their README repeats what they found."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dip
from experiments import __main__ as table
from experiments import features, head_init, heads, kinds, lab, learning_rate, overfit, toy
from experiments.lab import Lab, Options
from experiments.measures import power_spectrum, seam_contrast
from experiments.models import NARROW, UNET, WIDE, Model
from experiments.report import (LEVEL, MARGINS, OPPOSITE, SEEN, UNCLEAR, Claim, claims_table,
                                compare, judge, plot_by_t, split_collapsed, told)

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


def test_the_loss_of_detail_is_that_of_small_times(tmp_path, monkeypatch):
    """Images whose t is below 0.3 count, each once."""
    sums = torch.zeros(3, 10)
    sums[0, :4], sums[2, :4] = torch.tensor([1.0, 2, 3, 100]), torch.tensor([1.0, 1, 4, 5])
    monkeypatch.setattr(lab, "validate", lambda *_, **settings: sums)
    found = Lab(Options(runs=str(tmp_path), quick=True)).losses(Model(WIDE), None)
    assert found["detail"] == 1
    assert found["loss"] == pytest.approx(106 / 11)


def test_samples_like_the_held_out_images_are_judged_perfect(tmp_path):
    here, model = Lab(Options(runs=str(tmp_path), quick=True)), Model(WIDE)
    real = here.eyes("shapes", 32)[2]
    found = here.judge(model, real)
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["high"] == 0 and found["seam"] == 0
    assert here.judge(model, real[:, ::-1] // 2)["frechet"] > 1e-3


def test_half_of_the_samples_are_of_each_of_two_seeds_and_classes_take_turns(tmp_path, monkeypatch):
    here, calls = Lab(Options(runs=str(tmp_path), num=45)), []
    monkeypatch.setattr(lab, "generate", lambda net, labels, indices, seed, **settings: (
        calls.append((seed, labels, list(indices))) or torch.zeros(len(labels), 3, 2, 2)))
    assert len(here.samples(dip.DiP(WIDE.replace(hidden_size=16, depth=1)))) == 40
    assert [seed for seed, *_ in calls] == [0, 1]
    assert calls[0][1:] == calls[1][1:] == ([i % 10 for i in range(20)], list(range(20)))


# Verdicts


def test_a_claim_is_seen_only_if_every_seed_of_one_side_beats_every_seed_of_the_other():
    assert compare([1, 2, 3], [4, 5, 6], "loss") == SEEN
    assert compare([4, 5, 6], [1, 2, 3], "loss") == OPPOSITE
    assert compare([1, 2, 4], [3, 5, 6], "loss") == UNCLEAR
    assert compare([1, 2], [4, 5], "loss") == UNCLEAR
    assert compare([4, 5, 6], [1, 2, 3], "psnr") == SEEN


@pytest.mark.parametrize(("measure", "margin"), [("loss", 0.02), ("detail", 0.02),
                                                 ("excess at t = 0.1", 0.02), ("frechet", 0.05)])
def test_means_that_differ_by_less_than_the_margin_are_level(measure, margin):
    below, above = 1 - margin + 1e-3, 1 - margin - 1e-3
    assert compare([below] * 3, [1] * 3, measure) == LEVEL
    assert compare([above] * 3, [1] * 3, measure) == SEEN


def judged(rows, a="x", b="y"):
    """(figures, verdict) of "a is better than b" by the loss."""
    (_, _, found), = judge(Claim("", a, b, ("loss",)), rows)
    return found["loss"]


def some_rows(**losses):
    return [dict(group="g", model=name, seed=seed, steps=500, loss=loss)
            for name, found in losses.items() for seed, loss in enumerate(found)]


def test_margins_of_decibel_and_fractions_are_absolute():
    assert compare([20.4] * 3, [20] * 3, "psnr") == compare([0.51] * 3, [0.5] * 3, "probe") == LEVEL
    assert compare([20.6] * 3, [20] * 3, "psnr") == compare([0.53] * 3, [0.5] * 3, "probe") == SEEN
    assert compare([0.001] * 3, [-0.002] * 3, "silhouette") == LEVEL


def test_a_run_whose_samples_nobody_recognises_has_collapsed():
    rows = [dict(seed=seed, loss=0.2, named=named) for seed, named in enumerate((0.9, 0.1, 0.8))]
    assert split_collapsed(rows) == ([rows[0], rows[2]], [1])


def test_diverged_runs_do_not_make_the_others_collapse():
    """Neither a loss that is not a number, nor runs that were never sampled."""
    rows = [dict(seed=seed, loss=loss) for seed, loss in enumerate((float("nan"), 0.2, 0.2))]
    assert split_collapsed(rows) == (rows[1:], [0])
    rows = [dict(seed=0, loss=None), dict(seed=1, loss=0.2, named=0.3), dict(seed=2, loss=0.2)]
    assert split_collapsed(rows) == (rows[1:], [0])


def test_a_diverged_run_is_left_out_of_the_plot_by_t():
    losses = dict(none=[1.0, None, 2.0], x=[3.0, 3.0, None], y=[None] * 3)
    rows = [dict(group="g", model=model, seed=seed, steps=5, loss=loss,
                 **({} if loss is None else {"loss_by_t": [loss] * 10}))
            for model, found in losses.items() for seed, loss in enumerate(found)]
    axes = plt.figure().subplots()
    plot_by_t(axes, dict(rows=rows), "none", "g", 5)
    plt.close()
    assert [line.get_label() for line in axes.lines] == ["none", "x"]
    assert list(axes.lines[1].get_ydata()) == [3.0] * 10     # of seed 0, which both have


def test_pairs_are_of_one_seed_also_where_one_has_collapsed():
    rows = some_rows(x=[9, 0.10, 0.11], y=[0.2, 0.09, 0.2])
    assert "(1/2); x collapsed: seed 0" in judged(rows)[0]
    figures, verdict = judged(some_rows(x=[None] * 3, y=[0.2] * 3))
    assert "x collapsed: seed 0, 1, 2" in figures and verdict == UNCLEAR


def test_a_collapsed_run_is_named_and_not_averaged():
    rows = some_rows(x=[0.1, 0.3, 0.1], y=[0.2, 0.2, 0.2], z=[0.3, None, 0.3])
    assert split_collapsed(rows[:3]) == ([rows[0], rows[2]], [1])
    assert judged(rows) == ("0.100 ± 0.000 against 0.200 ± 0.000 (2/2); x collapsed: seed 1",
                            UNCLEAR)
    assert judged(rows, "y", "z")[0].endswith("(2/2); z collapsed: seed 1")


def test_in_brackets_is_how_many_pairs_of_one_seed_agree():
    rows = some_rows(x=(3, 5, 4), y=(4, 4.5, 6))
    assert judged(rows[::-1])[0] == "4.00 ± 1.00 against 4.83 ± 1.04 (2/3)"


def test_a_claim_is_judged_in_every_group_and_after_every_number_of_steps_that_has_both():
    rows = [row | changes for row in some_rows(x=(1, 2, 3), y=(4, 5, 6))
            for changes in ({}, {"steps": 900}, {"group": "h"})]
    rows += [dict(group="i", model="x", seed=0, steps=500, loss=1.0)]
    found = list(judge(Claim("", "x", "y", ("frechet", "loss")), rows))
    assert [(group, steps) for group, steps, _ in found] == [("g", 500), ("g", 900), ("h", 500)]
    assert all(cells == {"loss": ("2.00 ± 1.00 against 5.00 ± 1.00 (3/3)", SEEN)}
               for *_, cells in found)


def test_figures_have_the_digits_that_mean_something():
    assert told([0.1234, 0.1264]) == "0.125 ± 0.002"
    assert told([12.345]) == "12.3"
    assert told([]) == "-"
    assert told([0.2312, 0.2304]) == "0.2308 ± 0.0006"


# What is compared


@pytest.mark.parametrize("regime", ["narrow", "wide"])
def test_the_wider_dits_are_the_smallest_that_cost_as_much_as_the_unet_head(regime):
    models = kinds.MODELS[f"{regime}, shapes"]
    unet, wider = (dip.cost(models[name].config)[1] for name in ("unet", "wider"))
    config = models["wider"].config
    below = config.replace(hidden_size=config.hidden_size - 4 * config.num_heads)
    assert dip.cost(below)[1] < unet <= wider


def test_the_deeper_dit_is_the_smallest_that_costs_as_much_as_the_unet_head():
    models = heads.MODELS["wide, shapes"]
    unet, deeper = (dip.cost(models[name].config)[1] for name in ("unet", "deeper"))
    assert dip.cost(WIDE.replace(depth=7))[1] < unet <= deeper


def test_narrow_tokens_are_narrower_than_a_patch_and_the_head_has_the_papers_proportion():
    numbers = 3 * WIDE.patch_size**2
    assert NARROW.hidden_size < numbers < WIDE.hidden_size
    for config in (WIDE.replace(**UNET), dip.PRESETS["DiP-XL/16"]):
        bottleneck = dip.DiP(config.replace(depth=1)).output.head.bottleneck.out_channels
        assert bottleneck == 3 * config.patch_size**2 * 2 / 3


def test_the_sum_starts_at_zero_and_is_the_plain_layer_and_the_head():
    torch.manual_seed(0)
    net = heads.Sum(WIDE.replace(hidden_size=32, depth=1, **UNET))
    x, t, y = torch.randn(2, 3, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.long)
    assert not net(x, t, y).any()
    output = net.output
    for layer in (output.plain.linear, output.detailer.head.out):
        torch.nn.init.normal_(layer.weight)
    both = net(x, t, y)
    net.output = output.plain
    plain = net(x, t, y)
    net.output = output.detailer
    assert torch.allclose(both, plain + net(x, t, y), atol=1e-5)
    net.output = output
    assert dip.cost(net.config, heads.Sum)[0] == sum(p.numel() for p in net.parameters())


def test_each_model_is_trained_at_its_own_best_learning_rate():
    """As results/learning_rate.json says, on a seed that is not judged; one at a rate that is level
    with it by the margin of all verdicts."""
    rows = json.loads((ROOT / "experiments/results/learning_rate.json").read_text())["rows"]
    assert {row["seed"] for row in rows}.isdisjoint(range(3))
    compared = [pair for name in ("heads", "geometry", "crossover", "kinds")
                for pair in table.load(name).MODELS.items()]
    for group, models in compared:
        for name, model in models.items():
            losses = {row["lr"]: row["loss"] for row in rows if row["model"] == name
                      and row["group"].startswith(f"{group}, lr ")}
            assert losses[model.lr] < min(losses.values()) * (1 + MARGINS["loss"]), (group, name)
            assert (losses[model.lr] == min(losses.values())) == (
                (group, name) != ("wide, photos", "deeper"))


@pytest.mark.parametrize("build", head_init.VARIANTS.values(), ids=head_init.VARIANTS)
def test_beginnings_differ_in_the_head_alone(build):
    small = NARROW.replace(hidden_size=32, depth=1, **UNET)
    weights = []
    for kind in (dip.DiP, build):
        torch.manual_seed(0)
        weights.append(kind(small).state_dict())
    ours, theirs = weights
    differ = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert all(name.startswith("output.head") for name in differ)
    assert ("output.head.down.0.weight" in differ) == (build is head_init.PyTorchDefault)
    random = build in (head_init.PyTorchDefault, head_init.RandomUpsampling)
    assert ("output.head.up.0.weight" in differ) == random
    zero = not (theirs["output.head.out.weight"].any() or theirs["output.head.out.bias"].any())
    assert zero == (build is head_init.LastLayerZero)
    average = isinstance(build(small).output.head.pool, torch.nn.AvgPool2d)
    assert average == (build is head_init.AveragePooling)


def test_runs_are_shared_only_if_all_they_depend_on_is_the_same(tmp_path, monkeypatch):
    def folder(model, **options):
        found = []
        monkeypatch.setattr(Lab, "fit", lambda *arguments: found.append(arguments[-1]) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Lab(Options(runs=str(tmp_path), **options)).train(model, 0, 500)
        return found[0]

    model, photos = Model(WIDE), Model(WIDE, data="photos")
    others = [replace(model, config=WIDE.replace(depth=3)), replace(model, lr=1.0),
              replace(model, data=toy.TreeData(1)), replace(model, build=heads.Sum),
              replace(model, token_loss=True), replace(model, training=dict(batch_size=8))]
    folders = [folder(other) for other in (model, *others)] + [
        folder(photos, photos=name) for name in ("cats", "dogs")]
    assert folder(Model(WIDE)) == folders[0]
    assert len(set(folders)) == len(folders)


def test_a_finished_run_is_not_trained_again_and_a_longer_one_goes_on(tmp_path, monkeypatch):
    """Nor is one that was killed between its checkpoint and its weights."""
    here = Lab(Options(runs=str(tmp_path)))
    model, trained = Model(NARROW.replace(hidden_size=32, depth=1)), []
    fit = lab.fit
    monkeypatch.setattr(lab, "fit", lambda options, *args, **settings: (
        trained.append(options.steps) or fit(options, *args, **settings)))
    first = here.row(learning_rate, "m", model, 0, 2)
    assert here.row(learning_rate, "m", model, 0, 2) == first
    assert not first["compiled"]                             # the row says how it was made
    assert Lab(Options(runs=str(tmp_path), compile=True)).row(
        learning_rate, "m", model, 0, 2) == first
    here.row(learning_rate, "m", model, 0, 4)
    assert trained == [2, 4]
    log = [json.loads(line)["step"] for line in next(tmp_path.glob("none-*/log.jsonl")).open()]
    assert log == [2, 4]
    weights = next(tmp_path.glob("none-*/ema-4.pt"))
    kept = torch.load(weights)
    weights.unlink()
    net, _ = here.train(model, 0, 4)
    assert trained == [2, 4]
    assert all(torch.equal(x, kept[name]) for name, x in net.state_dict().items())


OTHER = """
import sys, time
from pathlib import Path
from common import locked
folder, path = map(Path, sys.argv[1:])
with locked(folder):
    print("held", flush=True)
    time.sleep(1)
    path.with_suffix(".other").rename(path)"""


def test_two_commands_do_not_train_the_same_model(tmp_path, monkeypatch):
    """The second waits, and takes what the first has made."""
    here, model = Lab(Options(runs=str(tmp_path))), Model(NARROW.replace(hidden_size=32, depth=1))
    _, out = here.train(model, 0, 2)
    path = out / "ema-2.pt"
    path.rename(path.with_suffix(".other"))
    (out / "ckpt-00000002.pt").unlink()
    monkeypatch.setattr(lab, "fit", None)
    with subprocess.Popen([sys.executable, "-c", OTHER, out, path], stdout=subprocess.PIPE,
                          cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        here.train(model, 0, 2)
    assert other.returncode == 0


def test_python_sample_py_does_not_draw_with_the_newest_experiment():
    assert not Path(Options().runs).is_relative_to("runs")


def a_run(tmp_path, monkeypatch, draw=lambda *_: plt.figure()):
    """table.run of one model at rate 2, whose seed 0 is new, beside old rows."""
    experiment = SimpleNamespace(MODELS={"g": {"m": Model(NARROW, 2.0)}}, CLAIMS=[], draw=draw)
    monkeypatch.setattr(table, "load", lambda _: experiment)
    row = dict(group="g", model="m", steps=500, lr=2.0, loss=1.0)
    old = [row | dict(seed=0, loss=9.0), row | dict(seed=1), row | dict(seed=2, lr=1.0),
           row | dict(seed=1, model="gone")]
    (tmp_path / "x.json").write_text(json.dumps(dict(rows=old, classifiers={})))
    table.run("x", SimpleNamespace(rows=lambda _: [row | dict(seed=0)], runs=lambda _: [("g",)]),
              tmp_path, tmp_path)
    return json.loads((tmp_path / "x.json").read_text())["rows"]


def test_a_run_replaces_its_own_rows_and_those_of_models_that_have_changed(tmp_path, monkeypatch):
    rows = a_run(tmp_path, monkeypatch)
    assert [(row["seed"], row["loss"], row["lr"]) for row in rows] == [(0, 1, 2), (1, 1, 2)]
    assert (tmp_path / "x.png").exists()


def test_a_training_that_diverged_costs_its_picture_alone(tmp_path, monkeypatch, capsys):
    def draw(*_):
        raise FloatingPointError
    assert a_run(tmp_path, monkeypatch, draw)
    assert "x.png stays as it is" in capsys.readouterr().out


def test_photos_are_asked_for_and_counted(tmp_path):
    with pytest.raises(ValueError, match="models of photos need --photos DIR"):
        Lab(Options()).train(Model(WIDE, data="photos"), 0, 2)
    for split in ("train", "val"):
        (tmp_path / split / "cats").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / split / "cats" / "a.png")
    with pytest.raises(ValueError, match="must have train/ and val/ of 10 classes"):
        Lab(Options(photos=str(tmp_path))).data("photos", 32)


def test_a_training_that_diverges_is_a_row_without_a_loss(tmp_path, monkeypatch):
    def diverge(*_, **settings):
        raise FloatingPointError
    monkeypatch.setattr(lab, "fit", diverge)
    for experiment in (heads, overfit):                      # also one that measures by itself
        here = Lab(Options(runs=str(tmp_path)))
        assert here.row(experiment, "none", Model(WIDE), 0, 500) == {"loss": None}


def test_the_toys_differ_in_what_the_head_sees_alone():
    """Moved by a whole cell, a point looks the same to the head that sees patches only."""
    models = {name: model.build(model.config) for name, model in toy.MODELS["toy"].items()}
    assert len({sum(p.numel() for p in model.parameters()) for model in models.values()}) == 1
    cell = toy.CELL
    x, centre = torch.tensor([[0.1, 0.2]]), torch.tensor([[cell / 2, cell / 2]])
    for name, model in models.items():
        same = torch.allclose(model.view(x, centre), model.view(x + cell, centre + cell), atol=1e-6)
        assert same == (name == "patch")


# What was found


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The options of --quick, all of whose experiments share their trainings."""
    return Options(runs=str(tmp_path_factory.mktemp("quick")), quick=True, seeds=1, num=20)


@pytest.mark.parametrize("name", table.NAMES)
def test_every_experiment_runs_to_its_end(capsys, monkeypatch, quick, name):
    """In the small: trains, measures, judges and draws everything once."""
    if name == "learning_rate":                              # heads' models, each at three rates
        monkeypatch.setattr(learning_rate, "MODELS", dict([*learning_rate.MODELS.items()][:1]))
    folder = Path(quick.runs)
    table.run(name, Lab(quick), folder, folder)
    assert capsys.readouterr().out.splitlines()[-1] == f"{name}: wrote {folder / name}.png"
    found = json.loads((folder / f"{name}.json").read_text())
    assert table.load(name).CLAIMS == [] or "unclear: " in claims_table(table.load(name), found)
    for group, models in table.load(name).MODELS.items():
        assert {row["model"] for row in found["rows"] if row["group"] == group} == set(models)


def test_the_quick_command_runs_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "experiments", "toy", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "toy: wrote" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_no_seed_is_left_out(path):
    """The seeds that the experiment names, of each model: nothing picked."""
    rows, seeds = json.loads(path.read_text())["rows"], defaultdict(list)
    for row in rows:
        seeds[row["group"], row["model"], row["steps"]].append(row["seed"])
    named = list(getattr(table.load(path.stem), "SEEDS", range(3)))
    assert all(sorted(found) == named for found in seeds.values()), seeds
    assert set(table.load(path.stem).MODELS) == {group for group, *_ in seeds}


def test_the_readme_repeats_the_results():
    """`python -m experiments --readme` writes these tables; by hand they would drift."""
    text = (ROOT / "experiments" / "README.md").read_text()
    assert table.into_readme(text) == text
    for name in table.tables():
        assert text.count(f"<!-- {name} -->\n") == 1


def test_every_experiment_is_in_the_readme():
    text = (ROOT / "experiments" / "README.md").read_text()
    assert all(f"experiments {name}" in text for name in table.NAMES)


def test_learning_rates_are_compared_by_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(learning_rate, "MODELS", {"g": {"m": Model(NARROW.replace(depth=1), 0.5)}})
    here = Lab(Options(runs=str(tmp_path), quick=True))
    row, = here.rows(learning_rate)
    assert (row["seed"], row["lr"]) == (9, 0.5)
    assert row["loss"] > 0 and "frechet" not in row


def test_every_learning_rate_is_tried_for_every_model():
    for experiment, rates in learning_rate.RATES.items():
        for group in experiment.MODELS:
            for lr in rates:
                models = learning_rate.MODELS[f"{group}, lr {lr:g}"]
                assert {model.lr for model in models.values()} == {lr}
                assert experiment.MODELS[group].keys() <= models.keys()
