"""Chapter 12: the experiments measure what they say, and their page repeats what they found."""

import itertools
import json
import re
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.fft
import torch
from commands import ROOT, error_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dip
import train
from experiments import __main__ as command
from experiments import features, gaussian, lab, models, overfit, report, speed, toy
from experiments.lab import Judge, Lab, seam_contrast
from experiments.models import EXPERIMENTS, NARROW, SAMPLERS, WIDE, Model
from experiments.report import (by_seed, differences, format_mean, rates_table, read_rows,
                                table)
from experiments.speed import cost
from sample import OUR_WEIGHTS, load_model
from theory.model import variance_of_v, image_decay

PAGE = (ROOT / "experiments" / "README.md").read_text()
UNET = models.changes_of("U-Net", 8)
SMALL = NARROW.replace(hidden_size=16, num_heads=1, depth=1)


def options(folder, **changes):
    """The options of a smoke run that writes into a folder."""
    return SimpleNamespace(**dict(photos=None, results=folder, runs=folder, device="cpu",
                                  compile=False, quick=True) | changes)


def some_rows(**losses):
    """Rows of group g after 500 steps: {model: losses, one a seed}."""
    return [dict(group="g", model=name, seed=seed, steps=500, lr=1.0, loss=loss)
            for name, found in losses.items() for seed, loss in enumerate(found)]


GROUPS = {"g": {"x": Model(SMALL), "y": Model(SMALL)}}

# Measures


@given(st.sampled_from([4, 8]), st.integers(1, 50))
def test_seam_contrast_counts_the_steps_at_the_borders_of_patches(P, step):
    """A ramp of slope 1 with an extra step at every border has contrast 1 + step."""
    ramp = np.arange(32) + step * (np.arange(32) // P)
    image = (ramp[:, None] + ramp[None, :]).astype(float)
    assert seam_contrast(np.repeat(image[None, ..., None], 3, axis=3), P) == pytest.approx(1 + step)


def test_the_probe_recognises_new_points_of_separate_classes_and_guesses_mixed_ones():
    """Fails if it is judged on the points that it was fitted to."""
    rng, y, y_new = np.random.default_rng(0), np.arange(300) % 3, np.arange(3000) % 3
    noise, noise_new = rng.standard_normal((300, 5)), rng.standard_normal((3000, 5))
    corners = np.eye(5)[:3] * 9
    assert features.probe(corners[y] + noise, y, corners[y_new] + noise_new, y_new) > 0.99
    assert features.probe(noise, y, noise_new, y_new) == pytest.approx(1 / 3, abs=0.05)


def test_the_loss_of_detail_is_that_of_small_times(monkeypatch, tmp_path):
    """Fails if tenths count alike: an image counts once, whatever its tenth."""
    sums = torch.zeros(3, 10)
    sums[0, :4], sums[2, :4] = torch.tensor([1.0, 2, 3, 100]), torch.tensor([1.0, 1, 4, 5])
    monkeypatch.setattr(train, "validate", lambda *_, **settings: sums)
    found = Lab(options(tmp_path)).losses(Model(WIDE), dip.DiP(SMALL))
    assert found["detail"] == 1 and found["loss"] == pytest.approx(106 / 11)


@pytest.fixture(scope="module")
def judge():
    return Judge(train.Shapes(32), list(train.Shapes(32, 50, first=10**6)[k] for k in range(50)), 1)


def test_samples_like_the_held_out_images_are_judged_perfect(judge):
    """Also: other images are at a distance, and classes are expected in turn."""
    found = judge.measure(judge.real, P=8)
    assert found["frechet"] == pytest.approx(0, abs=1e-6) and found["seam"] == 0
    assert judge.measure(judge.real[:, ::-1] // 2, P=8)["frechet"] > 1e-3
    assert found["recognised"] == judge.accuracy             # held-out images have labels in turn


# Models


def test_the_models_of_equal_flops_are_the_smallest_that_cost_as_much_as_the_unet_head():
    """Deeper and wider DiTs that the head is compared with; one step smaller costs less."""
    for base, name, field, step in ((WIDE, "deeper", "depth", 1), (WIDE, "368 wide",
                                    "hidden_size", 16), (NARROW, "272 wide", "hidden_size", 16)):
        config = base.replace(**models.changes_of(name, 8))
        below = config.replace(**{field: getattr(config, field) - step})
        assert cost(below)[1] < cost(base.replace(**UNET))[1] <= cost(config)[1]


def test_products_are_counted_in_the_time_of_a_pass():
    """Fails if convolutions, or what surrounds the products, are not told apart."""
    x, image = torch.ones(600, 600), torch.ones(1, 16, 128, 128)
    passes = dict(product=lambda: x @ x, sine=lambda: x.sin(),
                  convolution=lambda: torch.conv2d(image, torch.ones(16, 16, 3, 3)))
    found = {name: speed.products(one_pass, x.device) for name, one_pass in passes.items()}
    assert found["sine"] == 0 and min(found["product"], found["convolution"]) > 0.5


def test_narrow_tokens_are_narrower_than_a_patch_and_the_head_has_the_papers_proportion():
    assert NARROW.hidden_size < 3 * WIDE.patch_size**2 < WIDE.hidden_size
    for config in (WIDE.replace(**UNET), dip.PRESETS["DiP-XL/16"]):
        bottleneck = dip.DiP(config.replace(depth=1)).output.head.bottleneck.out_channels
        assert bottleneck == 3 * config.patch_size**2 * 2 / 3


def run_model(name, seed=0):
    """(network, x_t, its output) of a small model of models.py on random input."""
    torch.manual_seed(seed)
    config = SMALL.replace(**models.changes_of(name, 8))
    net = models.build(name, config)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.25, 0.75])
    return net, x, net(x, t, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("name", ["linear path", "linear path, head"])
def test_a_linear_path_begins_as_the_noisy_image_and_is_linear_in_its_own_patch(name):
    """U diag(g) V patch, written out for two patches.  Catches a path that mixes patches, and one
    that adds the token from the start."""
    net, x, v = run_model(name)
    torch.testing.assert_close(v, x, rtol=1e-5, atol=1e-5)
    layer, D = net.output.parts[-1], SMALL.hidden_size
    for weight in (layer.mix_in.weight, layer.mix_out.weight, layer.gain.weight):
        torch.nn.init.normal_(weight, std=0.1)
    s, time, c = torch.randn(2, 16, D), torch.randn(2, D), torch.randn(2, D)
    v, patches = (dip.patchify(image, 8).flatten(2) for image in (layer(x, s, time, c), x))
    for b, n in ((0, 3), (1, 15)):
        condition = torch.nn.functional.silu(s[b, n] + time[b]) if layer.as_head else c[b]
        gain = layer.gain.weight @ condition + layer.gain.bias
        expected = layer.mix_out.weight @ (gain * (layer.mix_in.weight @ patches[b, n]))
        torch.testing.assert_close(v[b, n], expected, rtol=1e-4, atol=1e-4)


def test_the_scalar_path_is_the_best_guess_from_one_pixel():
    """Data of variance 1/4: Cov(v, x_t) / Var(x_t), from a million draws."""
    net, x, v = run_model("scalar path")
    for parameter in net.output.parameters():
        torch.nn.init.zeros_(parameter)
    x_0, eps = 0.5 * torch.randn(10**6), torch.randn(10**6)
    for b, t in enumerate((0.25, 0.75)):
        x_t = (1 - t) * x_0 + t * eps
        best = ((eps - x_0) * x_t).mean() / (x_t**2).mean()
        gain = net(x, torch.full((2,), t), torch.zeros(2, dtype=torch.long)) / x
        assert gain.mean().item() == pytest.approx(best.item(), abs=0.01)


def test_a_dit_that_starts_at_x_t_adds_its_last_layer():
    net, x, v = run_model("no head, starts at x_t")
    torch.testing.assert_close(v, x)
    torch.nn.init.ones_(net.output.linear.bias)
    torch.testing.assert_close(net(x, torch.ones(2), torch.zeros(2, dtype=torch.long)), x + 1)


def test_a_blind_unet_sees_the_token_alone():
    """Pixels cannot reach it; its weights and its token's are still trained."""
    net, x, _ = run_model("U-Net, blind")
    s, time, c = torch.randn(2, 16, 16), torch.randn(2, 16), torch.randn(2, 16)
    blank, v = (net.output(image, s, time, c) for image in (torch.zeros_like(x), x))
    assert torch.equal(v, blank) and not torch.equal(v, net.output(x, 2 * s, time, c))


@pytest.mark.parametrize("name", ["U-Net + last layer", "U-Net + linear path"])
def test_outputs_are_added_and_the_head_and_the_last_layer_give_0_at_first(name):
    net, x, v = run_model(name)
    torch.testing.assert_close(v, x if "path" in name else 0 * x, rtol=1e-5, atol=1e-5)
    whole, sums = net.output, []
    torch.nn.init.normal_(whole.parts[0].linear.weight)
    torch.nn.init.normal_(whole.parts[-1].head.out.weight)
    for net.output in (whole, *whole.parts):
        sums.append(net(x, torch.ones(2), torch.zeros(2, dtype=torch.long)))
    assert all(part.any() for part in sums)
    torch.testing.assert_close(sums[0], sum(sums[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [
    "U-Net, last layer from 0", "U-Net, random upsampling", "U-Net, PyTorch's default"])
def test_initialisations_differ_in_the_head_alone(name):
    """Fails if a variant changes the backbone, or changes nothing."""
    ours, theirs = run_model("U-Net")[0].state_dict(), run_model(name)[0].state_dict()
    differ = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    assert differ and all(key.startswith("output.head") for key in differ)


def test_the_toys_differ_in_what_the_head_sees_alone():
    """Moved by a whole cell, a point looks the same to the head that sees its patch only."""
    x, centre = torch.tensor([[0.1, 0.2]]), torch.full((1, 2), toy.CELL / 2)
    for name, view in toy.VIEWS.items():
        moved = view(x + toy.CELL, centre + toy.CELL)
        assert torch.allclose(view(x, centre), moved, atol=1e-6) == (name == "patch")


# The laboratory, without training


def test_a_training_obeys_its_model_and_seed_and_gives_the_average(tmp_path, monkeypatch):
    """Fails if a schedule, a rate or a seed is ignored, if raw weights are measured, or if held-out
    images are trained on."""
    calls = []
    monkeypatch.setattr(train, "fit", lambda net, options, data: (
        calls.append((vars(options), data, net.embed.weight.sum().item())) or ("average", 0)))
    here = Lab(options(tmp_path, quick=False))
    model = Model(SMALL, 0.5, training=dict(cooldown=0.3, time_mean=-1.0, label_dropout=0.0))
    for seed in (1, 1, 2):
        assert here.train(model, tmp_path / "run", seed, 7) == "average"
    assert [given["seed"] for given, *_ in calls] == [1, 1, 2]
    expected = lab.TRAINING | model.training | dict(steps=7, lr=0.5)
    assert all(expected.items() <= given.items() for given, *_ in calls)
    assert all(data is here.data("shapes", 32)[0] and data.first == 0 for _, data, _ in calls)
    assert calls[0][2] == calls[1][2] != calls[2][2]
    assert (lab.TRAINING["cooldown"], lab.TRAINING["time_mean"]) == (0, 0)       # the page says so


def test_no_two_runs_share_a_folder(tmp_path, monkeypatch):
    """A finished run of another rate, seed or model with the same weights would be taken over."""
    folders = []
    monkeypatch.setattr(Lab, "train", lambda self, model, out, seed, steps: folders.append(out))
    monkeypatch.setattr(Lab, "losses", lambda *_: dict(loss=1.0))
    monkeypatch.setattr(Lab, "judge_samples", lambda *_: {})
    here = Lab(options(tmp_path))
    for group, name, lr, seed in itertools.product("gh", "ab", (0.1, 0.2), (0, 1)):
        here.row("x", group, name, Model(SMALL, lr), seed, 500)
    assert len(set(folders)) == 16


def test_losses_are_of_500_held_out_images_and_costs_of_the_whole_network(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(train, "validate", lambda net, data, limit: (
        given.append((data, limit)) or torch.ones(3, 10)))
    here = Lab(options(tmp_path, quick=False))
    model = EXPERIMENTS["paths"]["wide, shapes"]["linear path"]
    net = model.build(model.config)
    found = here.losses(model, net)
    assert given == [(here.data("shapes", 32)[1], 500)] and given[0][0].first == 10**6
    assert found["parameters"] == sum(p.numel() for p in net.parameters())
    assert found["gflops"] == cost(model.config, model.build)[1] / 1e9 > cost(WIDE)[1] / 1e9


def test_samples_are_drawn_as_the_sampler_says_and_none_twice(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(lab, "generate", lambda net, labels, indices, seed, **settings: (
        calls.append((seed, *zip(labels, indices), settings)) or torch.zeros(len(labels), 3, 8, 8)))
    here, net = Lab(options(tmp_path, quick=False)), dip.DiP(SMALL)
    here.judge = lambda *given: SimpleNamespace(measure=lambda images, P: (given, len(images), P))
    assert here.judge_samples(Model(SMALL.replace(image_size=64), data="photos"), net) == (
        ("photos", 64), 1000, 8)
    drawn = [(seed, *pair) for seed, *pairs, _ in calls for pair in pairs]
    assert drawn == [(seed, i % 10, i) for seed in (0, 1) for i in range(500)]
    assert all(call[-1] == dict(sampler="ab2", steps=12) for call in calls)
    for name, model in EXPERIMENTS["samplers"]["narrow, shapes"].items():
        calls.clear()
        model.measure(here, model, net)
        assert all(call[-1] == SAMPLERS[name] for call in calls)


def test_the_judge_is_trained_on_images_that_are_not_held_out(tmp_path, monkeypatch):
    """Nor on drawings that a model has seen; of photos, on all classes in turn."""
    monkeypatch.setattr(lab, "Judge", lambda *given: given)
    here = Lab(options(tmp_path, quick=False))
    training, held_out, steps = here.judge("shapes", 16)
    numbers = set(range(training.first, training.first + 64 * steps))
    assert not numbers & {*range(50_000), *range(10**6, 10**6 + 1000)}
    real = here.data("shapes", 16)[1]
    assert len(held_out) == 1000 and all((held_out[k][0] == real[k][0]).all() for k in (0, 999))
    here = Lab(options(tmp_path, quick=False))
    here.data = lambda name, size: ([(f"train {k}", k // 50) for k in range(500)], ["val"] * 500)
    training, held_out, steps = here.judge("photos", 16)
    assert held_out == ["val"] * 500 and len({training[k][0] for k in range(500)}) == 500
    assert {training[k][1] for k in range(64)} == set(range(10))


def test_the_judge_does_not_mind_which_images_it_sees_together(judge):
    """Fails if batch norm is left in training mode."""
    halves = [judge.predict(half)[1][0] for half in np.split(judge.real, 2)]
    np.testing.assert_allclose(np.mean(halves, axis=0), judge.moments[0], rtol=1e-4, atol=1e-6)


def ramp(down, right):
    """A ramp of slope 1 with extra steps at every border of patches of 8."""
    a, b = (np.arange(32) + step * (np.arange(32) // 8) for step in (down, right))
    return np.repeat((a[:, None] + b)[None, ..., None].astype(float), 3, axis=3)


def test_seams_count_in_both_directions_and_against_real_images():
    assert seam_contrast(ramp(2, 6), 8) == pytest.approx(1 + 4)
    moments = np.zeros(2), np.eye(2)
    fake = SimpleNamespace(real=ramp(3, 3), moments=moments,
                           predict=lambda images: (np.arange(len(images)) % 10, moments))
    found = Judge.measure(fake, np.repeat(ramp(1, 1), 20, axis=0), 8)
    assert found == dict(frechet=0, recognised=1, seam=pytest.approx(0.5))


def test_psnr_of_bytes_is_the_mean_over_images():
    truth = np.full((8, 8, 3), 100, np.uint8)
    images = np.stack([truth - 20, truth + 10])
    assert overfit.psnr(images, truth) == pytest.approx((22.1102 + 28.1308) / 2, abs=1e-3)


def test_the_photos_of_the_figure_bear_their_models_names(tmp_path):
    here = SimpleNamespace(options=SimpleNamespace(runs=tmp_path),
                           sample=lambda net, n: np.repeat(overfit.PHOTO[None], n, axis=0) // 2)
    for group, of_group in EXPERIMENTS["overfit"].items():
        for name, model in of_group.items():
            model.measure(here, model, None)
            (tmp_path / f"{name}, {group.split(',')[0]}.png").unlink()           # it is there


def test_the_probe_is_given_no_labels_and_judged_on_held_out_images(monkeypatch):
    net = dip.DiP(SMALL).requires_grad_(False)
    net.label.weight[:10] = torch.nan
    found, y = features.tokens(net, train.Shapes(32), 20)
    assert np.isfinite(found).all() and found.std(axis=0).min() > 0 and set(y) <= set(range(10))
    calls = []
    monkeypatch.setattr(features, "tokens", lambda net, data, n: calls.append((data, n)) or (1, 2))
    monkeypatch.setattr(features, "probe", lambda *_: 0.5)
    here = SimpleNamespace(quick=False, data=lambda *_: ("training", "held out"))
    features.measure(here, Model(SMALL), None)
    assert calls == [("training", 1000), ("held out", 500)]


class Velocity:
    """A stand-in for a network."""

    def __init__(self, function):
        self.function = function

    def cpu(self):
        return self

    def __call__(self, x, t, y):
        return self.function(x, t)


def test_gaussian_images_have_their_variances_and_a_network_of_zeros_its_excess():
    """The excess of 0 is the variance of v*, which theory/ knows."""
    order = np.hypot(*np.indices((16, 16))).ravel().argsort(kind="stable")
    np.testing.assert_allclose(gaussian.VARIANCES.ravel()[order], image_decay(256, 1.5))
    x_0 = np.stack([gaussian.draw_image(k) for k in range(1000)]) / 127.5 - 1
    seen = (scipy.fft.dctn(x_0, axes=(1, 2), norm="ortho") ** 2).mean(axis=(0, 3))
    np.testing.assert_allclose(seen, gaussian.VARIANCES, rtol=0.2)
    found = gaussian.measure(SimpleNamespace(quick=False), None, Velocity(lambda x, t: 0 * x))
    for t in gaussian.TIMES:
        expected = variance_of_v(gaussian.VARIANCES, t).mean()
        assert found[f"excess at t = {t}"] == pytest.approx(expected, rel=0.02)


def test_distances_to_and_from_the_tree_are_not_mixed_up():
    """Of samples that all lie on one point of it."""
    point = toy.on_the_tree(100_000, 0)[7]
    pixels = torch.from_numpy(toy.draw_point(7))[None]
    np.testing.assert_allclose(train.to_model(pixels, "cpu").flatten(), point, atol=1e-5)
    there = torch.tensor(point).float()[None, :, None, None]
    found = toy.measure(SimpleNamespace(quick=True), None,
                        Velocity(lambda x, t: (x - there) / t[:, None, None, None]))
    far = np.linalg.norm(toy.on_the_tree(2000, 1)[:100] - point, axis=1).mean()
    assert found["to_tree"] < 0.02 and found["from_tree"] == pytest.approx(far, abs=1e-3)


def test_names_say_what_is_compared():
    """Rows do not hold the data set, the configuration or the schedule: only names do."""
    for experiment, groups in EXPERIMENTS.items():
        for group, of_group in groups.items():
            for name, model in of_group.items():
                config, words, number = model.config, f"{group}, {name}", group.split(" ")[0]
                patch = 3 * config.patch_size**2
                if isinstance(model.data, str):
                    assert model.data == ("photos" if "photos" in group else "shapes")
                if group.startswith(("narrow", "wide")) and not name.endswith(" wide"):
                    assert (config.hidden_size > patch) == group.startswith("wide")
                if words.startswith("photos of 64"):
                    assert config.image_size == 64
                if experiment == "crossover":
                    assert (config.hidden_size, patch) == (int(number), 48)
                if experiment in ("paths", "recipes"):
                    assert model.training["cooldown"] == 0.3
                else:
                    assert "cooldown" not in model.training
                if experiment in ("paths", "heads", "short") and not name[0].isdigit():
                    head = name.split(" ")[0].split(",")[0]
                    assert config.head == {"U-Net": "unet", "MLP": "mlp", "coordinate": head,
                                           "attention": head}.get(head, "none")
                    assert config.placement == {
                        "U-Net between blocks": "intermediate",
                        "U-Net in both places": "hybrid"}.get(name, "post-hoc")
                    assert (config.head_input == "image") == name.endswith("on the image")
                for prediction in "xv":
                    if f"predicts {prediction}" in words:
                        assert config.prediction == prediction


def test_pretrained_begins_with_the_weights_in_assets():
    found, *_ = EXPERIMENTS["recipes"]["photos, rate 1.5e-3, from the weights in assets"].values()
    ours = load_model(OUR_WEIGHTS)[0].state_dict()
    for name, weight in found.build(found.config).state_dict().items():
        assert torch.equal(weight, ours[name])


@pytest.mark.parametrize("name", ["paths", "heads", "short"])
def test_dots_are_rows(name):
    rows = [row for row in read_rows(name) if row["seed"] in (0, 1, 2)
            and row["model"] != "U-Net, blind"]
    figure = report.draw(name, rows)
    groups = list(dict.fromkeys(row["group"] for row in rows))[:2 if name == "short" else 4]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axes, (measure, group) in zip(figure.axes, itertools.product(("loss", "frechet"), groups)):
        last = max(row["steps"] for row in rows if row["group"] == group)
        expected = {(row[measure], names.index(row["model"])) for row in rows
                    if row["group"] == group and row["steps"] == last
                    and row.get(measure) is not None}
        assert expected == {pair for line in axes.lines for pair in zip(*line.get_data())}
        assert axes.get_xlabel() == report.LABELS[measure]
        assert axes.get_title() == f"{group}, {last} steps"
    plt.close(figure)


def test_the_curves_of_the_crossover_are_means():
    rows = read_rows("crossover")
    figure = report.crossover(rows)
    for axes, measure in zip(figure.axes, ("loss", "detail", "frechet")):
        curves = {line.get_label(): line for line in axes.lines}
        for name in ("no head", "U-Net"):
            found = dict(zip(*curves[name].get_data()))
            assert found == {int(group.split()[0]) / 48: pytest.approx(np.mean(list(
                by_seed(rows, measure, group=group, model=name).values())))
                for group in EXPERIMENTS["crossover"]}
        assert axes.get_title() == report.LABELS[measure]
    ratios, bound = {line.get_label(): line for line in figure.axes[0].lines}[
        "bound for no head"].get_data()
    np.testing.assert_allclose(bound, 1 - ratios)
    plt.close(figure)


def test_the_plan_counts_every_copy_of_a_weight():
    """Itself, gradient, two moments, EMA and the update's: six times four bytes, where activations
    weigh nothing.  Catches a plan without one of them."""
    config = dip.DiPConfig(image_size=8, patch_size=8, hidden_size=192, depth=2, num_heads=6,
                           num_classes=10, head="none")
    assert speed.plan(config, 1, False) / cost(config)[0] >= 24


def test_a_toy_tells_all_cells_apart():
    net, seen = toy.ToyNet(WIDE, toy.VIEWS["patch"]), []
    net.place.register_forward_hook(lambda layer, inputs, s: seen.extend(inputs[0].tolist()))
    centres = torch.cartesian_prod(*2 * [(torch.arange(-16, 16) + 0.5) * toy.CELL])
    net(centres[:, :, None, None], torch.ones(len(centres)), None)
    assert sorted(seen) == list(range(toy.GRID**2))
    x = torch.tensor([[0.1, 0.2]])
    torch.testing.assert_close(toy.VIEWS["image, enlarged"](x, x), x / (toy.CELL / 2))


# Tables


def test_models_are_compared_in_pairs_of_one_seed():
    """Catches means of differences over different seeds, and seed 9 among the judged."""
    rows = some_rows(x=[1.0, 2.0, 3.0], y=[1.5, None, 3.25])
    rows += [row | dict(seed=9, loss=100.0) for row in rows[:1] + rows[3:4]]
    assert differences(rows[::-1], "loss", "y", "x", group="g") == [0.5, 0.25]
    line = "|  | y | - | 2.38 ± 1.24 (2 of 3) | +0.38 ± 0.12 (2 of 3) |"
    assert line in table(GROUPS, rows)


@pytest.mark.parametrize("numbers, text", [
    ([0.1234, 0.1249, 0.1264], "0.125 ± 0.002"), ([12.345], "12.3 (1 of 3)"), ([], "-"),
    ([0.2312, 0.2304], "0.2308 ± 0.0006 (2 of 3)")])
def test_means_have_the_digits_that_mean_something(numbers, text):
    assert format_mean(numbers) == text
    equal = [1.0 - 0.999, 0.9 - 0.899, 0.5 - 0.499]          # but for rounding
    assert format_mean(equal, paired=True) == "**+0.0010 ± 0.0000**"


@given(st.floats(0.1, 10), st.floats(1e-3, 1))
def test_bold_is_what_lies_beyond_three_standard_errors(mean, spread):
    numbers = [mean - spread, mean, mean + spread]
    assert format_mean(numbers, paired=True).startswith("**") == (mean > 3 * spread / 3**0.5)
    assert "**" not in format_mean(numbers[:2], paired=True)             # two seeds are too few


def test_a_training_that_diverged_is_infinitely_bad_at_its_rate():
    rows = [row | dict(seed=9, lr=lr) for row, lr in zip(some_rows(x=[0.2, None]), (0.1, 0.2))]
    assert report.rates_of(rows, "g", "x") == {0.1: 0.2, 0.2: np.inf}
    assert "| g | x | 0.2000 | inf |" in rates_table(GROUPS, rows)


# Runs


def test_a_row_is_measured_once_and_a_longer_training_goes_on(tmp_path, monkeypatch):
    """Fails if a finished training starts anew, or if a shorter one is thrown away."""
    trained, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda net, options, data: (
        trained.append(options.steps) or fit(net, options, data)))
    monkeypatch.setitem(EXPERIMENTS, "x", {"g": {"m": Model(SMALL, steps=(1, 2))}})
    monkeypatch.setattr(lab, "SEEDS", (0,))
    monkeypatch.setattr(Lab, "losses", lambda *_: dict(loss=1.0))
    monkeypatch.setattr(Lab, "judge_samples", lambda *_: dict(frechet=2.0))
    for _ in range(2):
        command.train_missing("x", Lab(options(tmp_path, quick=False)))
    assert trained == [1, 2]
    rows = read_rows("x", tmp_path)
    assert [(row["steps"], row.get("frechet")) for row in rows] == [(1, None), (2, 2.0)]
    log = [json.loads(line) for line in next(tmp_path.glob("x-g-m-*/log.jsonl")).open()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2]


@pytest.mark.parametrize("losses, best", [
    ({3e-3: 0.5, 6e-3: 0.4, 1.2e-2: None}, 6e-3),
    ({3e-3: 0.4, 6e-3: 0.5, 1.2e-2: None, 1.5e-3: 0.3}, 1.5e-3),
    ({3e-3: 0.6, 6e-3: 0.5, 1.2e-2: 0.4, 2.4e-2: None}, 1.2e-2)])
def test_a_model_without_a_rate_gets_the_best_on_seed_9(tmp_path, monkeypatch, losses, best):
    """One beyond the edge is tried if the best lies there.  Fails if the judged seeds choose, or a
    rate that diverged wins."""
    monkeypatch.setattr(Lab, "row", lambda self, experiment, group, name, model, seed, steps: dict(
        group=group, model=name, seed=seed, steps=steps, lr=model.lr, loss=losses[model.lr]))
    groups, rows = {"g": {"m": Model(SMALL, None)}}, []
    for row in Lab(options(tmp_path, quick=False)).missing("x", groups, rows):
        rows.append(row)
    assert [(row["seed"], row["lr"]) for row in rows if row["seed"] != 9] == [
        (seed, best) for seed in (0, 1, 2)]
    assert [row["lr"] for row in rows if row["seed"] == 9] == list(losses)
    assert {row["steps"] for row in rows if row["seed"] == 9} == {1000}


def test_a_training_that_diverges_is_a_row_without_a_loss(tmp_path, monkeypatch):
    def diverge(*_):
        raise FloatingPointError
    monkeypatch.setattr(train, "fit", diverge)
    here = Lab(options(tmp_path))
    for model in (Model(SMALL), Model(SMALL, measure=overfit.measure)):
        assert here.row("x", "g", "m", model, 0, 500)["loss"] is None


def test_photos_are_counted(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cats").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / split / "cats" / "a.png")
    with pytest.raises(ValueError, match="must have train/ and val/ of 10 classes"):
        Lab(options(tmp_path, photos=tmp_path, quick=False)).data("photos", 32)


def test_measure_measures_a_checkpoint(tmp_path, monkeypatch):
    """Catches a call that loading or sampling no longer takes."""
    monkeypatch.setattr(lab, "Judge", lambda *_: SimpleNamespace(
        measure=lambda images, P: dict(shape=images.shape, P=P)))
    _, found = Lab(options(tmp_path)).measure(ROOT / "assets" / "dip-nano.pt")
    assert (found["shape"], found["P"]) == ((20, 48, 48, 3), 8) and 0 < found["loss"] < 1


def test_python_sample_py_does_not_draw_with_the_newest_experiment():
    """It looks for the newest checkpoint below runs/."""
    assert not command.parse([]).runs.startswith("runs")


def test_an_unknown_name_ends_in_one_line(monkeypatch):
    assert "'head' is not one of: paths," in error_line(monkeypatch, command, "head")
    assert "'DiT-S/16' is not one of: DiT-XL/16," in error_line(monkeypatch, speed, "DiT-S/16")


def test_costs_are_measured_and_predicted(monkeypatch, capsys):
    """Of a weight, --plan counts at least 20 bytes: itself, gradient, two moments and EMA."""
    small = dip.PRESETS["DiP-Nano/8"].replace(depth=1, head_depth=1)
    monkeypatch.setitem(dip.PRESETS, "DiP-Nano/8", small)
    peaks, plan = [], speed.plan
    monkeypatch.setattr(speed, "plan", lambda *given: peaks.append(plan(*given)) or peaks[-1])
    for arguments in (["--repeat", "2", "--train"], ["--batch", "16", "--plan"]):
        monkeypatch.setattr(sys, "argv", ["speed.py", *arguments, "DiP-Nano/8"])
        speed.main()
    measured, planned = capsys.readouterr().out.split("| micro-batch 16")
    assert re.search(r"\| DiP-Nano/8 \| \d.*%", measured) and "--grad-checkpoint" in planned
    plain, recomputed = peaks
    assert plain > recomputed > 20 * cost(small)[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_to_its_end(name, tmp_path, monkeypatch, capsys):
    """In the small: trains, measures and draws the first two models of its first group."""
    here = Lab(options(tmp_path))
    group, found = next(iter(EXPERIMENTS[name].items()))
    two = dict(itertools.islice(found.items(), 2))
    monkeypatch.setitem(EXPERIMENTS, name, {group: two})
    monkeypatch.setattr(lab, "Judge", lambda *_: SimpleNamespace(
        measure=lambda images, P: dict(frechet=1.0)))
    command.train_missing(name, here)
    command.show(name, tmp_path, tmp_path, tmp_path)
    rows = read_rows(name, tmp_path)
    assert [(row["group"], row["model"]) for row in rows] == [(group, model) for model in two]
    drawn = name in ("paths", "crossover", "heads", "short", "overfit")
    assert (tmp_path / f"{name}.png").exists() == drawn
    assert all(f"| {model} |" in (tmp_path / f"{name}.md").read_text() for model in two)


# What was found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_seed_is_left_out_and_no_row_is_of_an_unknown_model(name):
    """Fails if rows were picked, or if a model has none and the page does not say "not run yet".
    Of the recipes, most have one seed."""
    seeds = {}
    for row in read_rows(name):
        model = EXPERIMENTS[name][row["group"]][row["model"]]
        if row["seed"] == 9:
            continue
        assert row["steps"] in model.steps and row.get("lr", model.lr) == (model.lr or row["lr"])
        seeds.setdefault((row["group"], row["model"], row["steps"]), set()).add(row["seed"])
    allowed = ({0}, {0, 1, 2}) if name == "recipes" else ({0, 1, 2},)
    assert all(found in allowed for found in seeds.values())
    not_run = "".join(re.findall(r"(?s)Not run yet.*?\n\* ", PAGE)).replace("\n ", "")
    found = {place[:2] for place in seeds}
    for group, of_group in EXPERIMENTS[name].items():
        for model in of_group:
            assert (group, model) in found or name == "paths" and f"*{model}*" in not_run


def test_each_model_is_trained_at_its_best_rate():
    """On seed 9, or at one whose loss is at most 0.3 % above the best."""
    for name in EXPERIMENTS:
        rows = read_rows(name)
        for row in rows:
            tried = report.rates_of(rows, row["group"], row["model"])
            if tried and row["seed"] != 9:
                assert tried[row["lr"]] <= 1.003 * min(tried.values()), row


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tables_are_those_of_the_results(name, tmp_path, monkeypatch, capsys):
    """`python -m experiments` writes results/NAME.md; by hand it would drift."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    (tmp_path / f"{name}.json").write_text((report.HERE / f"results/{name}.json").read_text())
    command.show(name, tmp_path, tmp_path, tmp_path / "no runs")
    written = (tmp_path / f"{name}.md").read_text()
    assert (report.HERE / f"results/{name}.md").read_text() == written


def test_the_tables_of_the_page_are_those_of_the_results():
    """`python -m experiments --page` writes them."""
    assert command.fill(PAGE) == PAGE
    assert all(f"results/{name}.md" in PAGE for name in EXPERIMENTS)


def test_every_number_on_the_page_stands_in_the_results():
    """Each decimal in the text of a section is in the results that the section names."""
    widths = [int(group.split()[0]) / 48 for group in EXPERIMENTS["crossover"]]
    ratios = {*(f"{x:.2f}" for x in widths), *(f"{1 - x:.2f}" for x in widths), "1.5"}
    for section in PAGE.split("\n## "):
        files = re.findall(r"results/([a-z]+\.\w+)", section) or [f"{n}.md" for n in EXPERIMENTS]
        found = " ".join((report.HERE / "results" / file).read_text() for file in files)
        text = re.sub(r"(?s)<!-- \w+ -->.*?<!-- end -->|```.*?```|`[^`]*`|\(.*?\.md\)", "", section)
        known = ratios | set(re.findall(r"\d+\.\d+", found))
        missing = set(re.findall(r"\d+\.\d+", text)) - known
        assert not missing, (section[:40], missing)


def test_the_page_is_short_and_its_figures_exist():
    assert len(PAGE.encode()) <= 16_384
    for path in re.findall(r'src="\.\./(assets/\S+?)"', PAGE):
        assert (ROOT / path).exists()
