"""Chapter 8: how samples are judged."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ROOT, launch
from helpers import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fid
from experiments.distortions import random_weights
from fid import (FolderImages, Moments, NpzImages, Side, frechet_distance,
                 inception_score, precision_recall, resize_tf1, squared_distances)


def pictures(n, height, width, seed=0):
    """uint8 (n, height, width, 3): smooth, each with its own colours and directions."""
    phase, speed = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(seed)) * 6.28
    y, x = torch.meshgrid(torch.arange(height) / 9, torch.arange(width) / 11, indexing="ij")
    y, x = y[None, :, :, None], x[None, :, :, None]
    phase, speed = phase[:, None, None], speed[:, None, None]
    return (127.5 + 120 * torch.sin(phase + y * speed + x * (3 - speed))).byte()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_weights(pictures(8, 96, 96)), path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return fid.load_inception(weights, any_weights=True)[0]


def spd(rng, d, rank=None):
    a = rng.standard_normal((d, rank or d))
    return a @ a.T


# --- the network --------------------------------------------------------------------------------

# torch-fidelity 0.4.0 on the weights above and pictures(2, 40, 56, seed=7), float32 on a CPU:
# FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]), softmax of the
# logits, and a forward hook on Mixed_6d for [:, :7] in the order H, W, C.
PEER = {
    "pool": {(0, 0): 0.1349997, (0, 1): 0.06864787, (1, 1000): 0.09410547, (1, 2047): 0.6053556},
    "pool norm": 46.40191,
    "spatial": {(0, 0): 0.3630706, (0, 1): 0, (0, 10): 0, (0, 1500): 0, (1, 2000): 0},
    "spatial norm": 66.86861,
    "probabilities": {(0, 0): 0.0001002054, (0, 500): 0.0003872768, (1, 1007): 0.0002418886},
    "probabilities norm": 0.1361572,
}


def test_the_outputs_are_those_of_an_independent_implementation(net):
    """Forbids half-pixel resizing, x / 127.5 - 1, padded averages, a mean where the suite takes a
    maximum, channels before rows in sFID, and the bias of the last layer."""
    pool, spatial, probabilities = net(pictures(2, 40, 56, seed=7))
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023)
    for name, x in (("pool", pool), ("spatial", spatial), ("probabilities", probabilities)):
        for place, value in PEER[name].items():
            assert x[place].item() == pytest.approx(value, rel=1e-4), (name, place)
        assert x.norm().item() == pytest.approx(PEER[name + " norm"], rel=1e-4)


def test_the_key_layout_is_that_of_the_public_file(weights):
    """torchvision's names and shapes (inception_v3 of 0.28.0 with 1008 classes and no auxiliary
    ones: 23,850,960 parameters), without the counters of batch norm."""
    state = torch.load(weights, weights_only=True)
    assert len(state) == 94 * 5 + 2 and state["fc.weight"].shape == (1008, 2048)
    for key in ("Conv2d_1a_3x3.conv.weight", "Mixed_5d.branch3x3dbl_3.bn.running_var",
                "Mixed_6b.branch7x7dbl_5.conv.weight", "Mixed_7a.branch7x7x3_4.bn.bias",
                "Mixed_7c.branch3x3dbl_3b.conv.weight"):
        assert key in state
    assert sum(x.numel() for key, x in state.items() if "running" not in key) == 23_850_960


def test_the_resize_reads_pixel_i_at_i_times_the_scale():
    """TensorFlow 1: a ramp stays a ramp from its first pixel on, and nothing is averaged."""
    ramp = torch.arange(100.0).expand(1, 50, 100).unsqueeze(-1)
    out = resize_tf1(ramp)[0, 0, :, 0]
    expected = (torch.arange(299) * (100 / 299)).clamp(max=99)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    stripes = (torch.arange(598.0) % 2).expand(1, 598, 598).unsqueeze(-1)
    assert resize_tf1(stripes).abs().max() == 0                  # every second pixel, aliased
    same = torch.rand(1, 299, 299, 3)
    assert torch.equal(resize_tf1(same), same)


# --- Frechet distance ---------------------------------------------------------------------------


@given(mean=st.floats(-9, 9), a=st.floats(0, 9), b=st.floats(0, 9))
def test_in_one_dimension_it_is_the_distance_of_means_and_deviations(mean, a, b):
    got = frechet_distance([0], [[a * a]], [mean], [[b * b]])
    assert got == pytest.approx(mean**2 + (a - b) ** 2, abs=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 12))
def test_commuting_covariances_differ_by_the_roots_of_their_eigenvalues(seed, d):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a, b = rng.uniform(0, 4, (2, d)) * (rng.random((2, d)) < 0.7)    # some exactly 0
    got = frechet_distance(np.zeros(d), basis * a @ basis.T, np.zeros(d), basis * b @ basis.T)
    assert got == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-6)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 12), missing=st.integers(0, 11))
def test_equal_covariances_leave_the_distance_of_the_means(seed, d, missing):
    """Of any rank; with equal means it is zero, and never less."""
    rng = np.random.default_rng(seed)
    sigma, shift = spd(rng, d, max(1, d - missing)), rng.standard_normal(d)
    got = frechet_distance(shift, sigma, 0 * shift, sigma)
    assert got == pytest.approx(shift @ shift, abs=1e-5 * (1 + sigma.trace()))
    assert 0 <= frechet_distance(shift, sigma, shift, sigma) < 1e-5 * sigma.trace()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 12), rank=st.integers(1, 12))
def test_it_is_symmetric_and_agrees_with_the_nuclear_norm(seed, d, rank):
    """tr (S1 S2)^(1/2) is the sum of singular values of A^T B where S1 = A A^T, S2 = B B^T:
    another route, also where S1, S2 or both are singular."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((d, min(d, rank))), rng.standard_normal((d, d))
    zero, s1, s2 = np.zeros(d), A @ A.T, B @ B.T
    expected = s1.trace() + s2.trace() - 2 * np.linalg.svd(A.T @ B, compute_uv=False).sum()
    for pair in ((s1, s2), (s2, s1)):
        got = frechet_distance(zero, pair[0], zero, pair[1])
        assert got == pytest.approx(expected, abs=1e-5 * (s1.trace() + s2.trace()))


def test_fewer_images_than_dimensions_are_no_trouble():
    """Where the suite's sqrtm turns complex: 20 points in 64 dimensions."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 64)), rng.standard_normal((20, 64)) + 1
    a, b = (z - z.mean(0) for z in (x, y))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum() / 19
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.cov(x.T).trace() + np.cov(y.T).trace()
    got = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert got == pytest.approx(expected - 2 * root, rel=1e-5)


def test_statistics_of_wrong_shape_or_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"are not \(d,\) and \(d, d\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(3), np.eye(3), np.full(3, np.nan), np.eye(3))


# --- Inception Score ----------------------------------------------------------------------------


@given(K=st.integers(1, 50), times=st.integers(1, 5))
def test_the_score_is_1_when_nothing_is_said_and_the_number_of_classes_when_all_is(K, times):
    assert inception_score(np.full((7, K), 1 / K)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(K), (times, 1))) == pytest.approx(K)


def test_the_score_is_the_mean_over_chunks_in_file_order():
    """5000 images each, the last as it is: sorted by class, every chunk is dull (suite)."""
    p = np.repeat(np.eye(4), 5000, axis=0)
    assert inception_score(p) == pytest.approx(1)
    shuffled = p[np.random.default_rng(0).permutation(20_000)]
    assert inception_score(shuffled) == pytest.approx(4, rel=1e-2)
    short = np.concatenate([np.tile(np.eye(4), (1250, 1)), np.eye(4)[:2]])
    assert inception_score(short) == pytest.approx((4 + 2) / 2)
    p = np.random.default_rng(0).dirichlet(np.ones(5), 30)
    kl = (p * np.log(p / p.mean(0))).sum(1).mean()
    assert inception_score(p) == pytest.approx(math.exp(kl))


# --- precision and recall -----------------------------------------------------------------------


def by_loops(real, fake, k):
    def radius(points, i):
        return sorted(np.sum((points - points[i]) ** 2, axis=1))[k]

    def share(centres, points):
        radii = [radius(centres, i) for i in range(len(centres))]
        return np.mean([any(np.sum((c - x) ** 2) <= r for c, r in zip(centres, radii))
                        for x in points])

    return share(real, fake), share(fake, real)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 25), m=st.integers(4, 25), d=st.integers(1, 5),
       shift=st.floats(0, 2), block=st.integers(1, 30))
def test_precision_and_recall_are_shares_of_points_in_balls(seed, n, m, d, shift, block):
    rng = np.random.default_rng(seed)
    real, fake = rng.standard_normal((n, d)), rng.standard_normal((m, d)) + shift
    assert precision_recall(real, fake, block=block) == pytest.approx(by_loops(real, fake, 3))


def test_equal_sets_give_one_and_distant_ones_zero():
    x = np.random.default_rng(0).standard_normal((50, 8))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(x[:3], x)


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    """Samples from one of two modes: all of them look real, half of the real is missed."""
    rng = np.random.default_rng(0)
    fake = rng.standard_normal((100, 2))
    real = np.concatenate([rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + 100])
    precision, recall = precision_recall(real, fake)
    assert precision > 0.9 and 0.4 < recall <= 0.5


def test_half_precision_rounds_as_tensorflow_does():
    """By hand: 9 + 2048 is a multiple of 2 there; and what overflows is done in float32."""
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 45.26]])
    assert squared_distances(a, b, half=True).item() == 2056         # float16 has steps of 2 there
    assert squared_distances(a, b).item() == pytest.approx(9 + 45.26**2)
    far = torch.tensor([[300.3, 0.0]])                           # 300.25 in float16
    assert squared_distances(a, far, half=True).item() == pytest.approx(297.3**2)
    assert squared_distances(a * 1e5, a, half=True).isfinite().all()


# --- statistics of images -----------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_streamed_moments_are_those_of_all_at_once_in_any_order(seed, cuts):
    x = np.random.default_rng(seed).standard_normal((40, 5)).astype(np.float32) + 3
    moments = Moments(5)
    for part in np.split(np.random.default_rng(seed).permutation(x), sorted(cuts)):
        moments.add(torch.from_numpy(part))
    mu, sigma = moments.finish()
    np.testing.assert_allclose(mu, x.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(float).T), rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(n=st.integers(1, 23), batch=st.integers(1, 9), world=st.integers(1, 4),
       compressed=st.booleans())
def test_ranks_share_out_the_images_of_an_npz(tmp_path_factory, n, batch, world, compressed):
    path = tmp_path_factory.mktemp("npz") / "images.npz"
    images = pictures(n, 3, 5).numpy()
    (np.savez_compressed if compressed else np.savez)(path, images, np.arange(n))
    source = NpzImages(path)
    shares = [list(source.batches(batch, rank, world)) for rank in range(world)]
    count = sum(map(len, shares))
    assert np.array_equal(
        np.concatenate([shares[b % world][b // world] for b in range(count)]), images
    )


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Twelve reference images, as a folder and as an .npz, and ten samples as an .npz."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "reference").mkdir()
    images = pictures(12, 32, 32).numpy()
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / "reference" / f"{k:02d}.png")
    np.savez(folder / "reference.npz", images)
    np.savez(folder / "samples.npz", pictures(10, 32, 32, seed=1).numpy())
    return folder


def command(monkeypatch, weights, *words):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, words), "--inception", str(weights),
                                      "--any-weights", "--batch", "5", "--device", "cpu"])
    fid.main()


@pytest.fixture(scope="module")
def measured(album, weights):
    """The result for the folder against the samples, and the reference's statistics."""
    with pytest.MonkeyPatch.context() as patch:
        command(patch, weights, album / "reference", album / "samples.npz",
                "--json", album / "r.json", "--save-stats", album / "statistics.npz")
    return json.loads((album / "r.json").read_text())


METRICS = "Inception Score", "FID", "sFID", "Precision", "Recall"


def test_a_folder_an_npz_and_saved_statistics_give_the_same_numbers(
    monkeypatch, album, weights, measured, capsys
):
    assert all(np.isfinite(measured[name]) for name in METRICS)
    assert measured["FID"] > 1 and measured["n_reference"] == 12 and measured["n_samples"] == 10
    for reference, names in (("reference.npz", METRICS), ("statistics.npz", METRICS[:3])):
        command(monkeypatch, weights, album / reference, album / "samples.npz",
                "--json", album / "other.json")
        other = json.loads((album / "other.json").read_text())
        other = {name: other[name] for name in METRICS if name in other}
        assert other == pytest.approx({name: measured[name] for name in names}, rel=1e-9)
    assert "statistics without images: no precision, no recall" in capsys.readouterr().out


def test_the_numbers_are_those_of_the_features(album, net, measured):
    """The whole command against numpy on all features at once."""
    features = []
    for name in ("reference", "samples"):
        with np.load(album / f"{name}.npz") as file:
            features.append([x.double().numpy() for x in net(torch.from_numpy(file["arr_0"]))])
    (pool, spatial, _), (pool2, spatial2, probabilities) = features
    for name, a, b in (("FID", pool, pool2), ("sFID", spatial, spatial2)):
        expected = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert measured[name] == pytest.approx(expected, rel=1e-4)
    assert measured["Inception Score"] == pytest.approx(inception_score(probabilities), rel=1e-5)


def test_saved_statistics_have_the_keys_of_adm(album, measured):
    with np.load(album / "statistics.npz") as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        assert file["mu"].shape == (2048,) and file["sigma_s"].shape == (2023, 2023)


def test_two_ranks_give_the_numbers_of_one(album, weights, measured, tmp_path):
    process = launch("fid.py", album / "reference.npz", album / "samples.npz", "--json two.json",
                     f"--inception {weights} --any-weights --batch 3 --device cpu", processes=2,
                     cwd=tmp_path)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    two = json.loads((tmp_path / "two.json").read_text())
    assert {n: two[n] for n in METRICS} == pytest.approx({n: measured[n] for n in METRICS}, 1e-4)


def test_what_makes_numbers_incomparable_is_said(monkeypatch, album, weights, capsys):
    np.savez(album / "small.npz", pictures(10, 16, 16).numpy())
    command(monkeypatch, weights, album / "reference", album / "small.npz", "--crop", 24)
    text = capsys.readouterr().out
    for line in ("the network's weights are not the suite's", "n = 10 samples, not 50,000",
                 "reference: n = 12 < 2048, the covariance is singular",
                 "reference and samples differ in size", "--crop 24: images of folders were"):
        assert f"not comparable: {line}" in text
    assert "12 images of 24 x 24" in text and "SHA-256 " in text


def test_samples_sorted_by_class_are_noticed(weights):
    side = Side.__new__(Side)
    side.probs = torch.eye(4).repeat_interleave(2500, dim=0) * 0.9 + 0.025
    side.n, side.images = 10_000, range(10_000)
    options = type("Options", (), {"crop": None, "pr_dtype": "half"})
    side.images = type("Images", (), {"size": (8, 8), "__len__": lambda self: 10_000})()
    assert any("seem sorted by class" in line
               for line in fid.doubts(side, side, options, fid.WEIGHTS_SHA256))
    side.probs = side.probs[torch.randperm(10_000)]
    assert not any("sorted" in line for line in
                   fid.doubts(side, side, options, fid.WEIGHTS_SHA256))


def test_grey_files_become_rgb_in_linked_folders_too(tmp_path):
    (tmp_path / "there").mkdir()
    Image.new("L", (8, 6), 77).save(tmp_path / "there" / "grey.png")
    Image.fromarray(np.full((6, 8), 77 * 257, np.uint16)).save(tmp_path / "there" / "16.png")
    (tmp_path / "there" / "._grey.png").write_bytes(b"what a Mac leaves behind")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "class").symlink_to(tmp_path / "there")
    (batch,) = FolderImages(tmp_path / "here").batches(4, 0, 1)
    assert batch.shape == (2, 6, 8, 3) and (batch == 77).all()


# --- bad input ----------------------------------------------------------------------------------


def bad_inputs(folder):
    (folder / "empty").mkdir()
    for name, sizes in (("one", [8]), ("mixed", [8, 9])):
        (folder / name).mkdir()
        for k, size in enumerate(sizes):
            Image.new("RGB", (size, 8)).save(folder / name / f"{k}.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_bytes(b"no image")
    images = pictures(3, 8, 8).numpy()
    np.savez(folder / "key.npz", images=images)
    np.savez(folder / "float.npz", images / 255)
    np.savez(folder / "grey.npz", images[..., :1])
    np.savez(folder / "part.npz", mu=np.zeros(2048))
    np.savez(folder / "pickle.npz", np.array([{}], dtype=object))
    np.savez(folder / "shape.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(3),
             sigma_s=np.eye(3))
    (folder / "text.npz").write_text("hello")


@pytest.mark.parametrize("name, answer", [
    ("nothing", "no file or folder at"),
    ("empty", "holds no images"),
    ("one", "holds 1 image; a covariance needs two"),
    ("mixed", "are of different sizes, 9 x 8 and 8 x 8; --crop SIZE makes them one"),
    ("broken", "0.png: unreadable image"),
    ("key.npz", "has neither arr_0 nor mu; it has images"),
    ("float.npz", "arr_0 is float64 (3, 8, 8, 3); images are uint8 (N, H, W, 3)"),
    ("grey.npz", "arr_0 is uint8 (3, 8, 8, 1); images are uint8"),
    ("part.npz", "has mu, not all of mu, sigma, mu_s, sigma_s"),
    ("pickle.npz", "images are uint8 (N, H, W, 3)"),
    ("shape.npz", "has statistics of shapes"),
    ("text.npz", "is not a readable .npz (BadZipFile)"),
])
def test_bad_input_is_one_line(monkeypatch, album, weights, tmp_path, name, answer):
    bad_inputs(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        command(monkeypatch, weights, tmp_path / name, album / "samples.npz")
    assert answer in str(error.value) and "\n" not in str(error.value)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


STATISTICS = {"mu": np.ones(2), "sigma": np.eye(2), "mu_s": np.ones(2), "sigma_s": np.eye(2)}
GOOD = npz(arr_0=pictures(3, 4, 4).numpy()), npz(**STATISTICS, n=5), b"\x80 weights"


@settings(max_examples=150)
@given(data=st.sampled_from(GOOD).flatmap(damaged), world=st.integers(1, 2))
def test_any_bytes_are_images_statistics_weights_or_a_clean_error(tmp_path_factory, data, world):
    path = tmp_path_factory.getbasetemp() / "any.npz"
    path.write_bytes(data)
    try:
        side = Side(path)
        for images in side.images.batches(2, 0, world) if side.images else ():
            assert images.dtype == np.uint8 and images.shape[3] == 3
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    with pytest.raises(ValueError, match="is not a file of the network's weights"):
        fid.load_inception(path, any_weights=True)


def test_other_weights_are_refused_and_so_is_what_is_none(weights, tmp_path):
    with pytest.raises(ValueError, match="has SHA-256 .* not the suite's 6726825d0af5"):
        fid.load_inception(weights)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is not a file of the network's weights"):
        fid.load_inception(tmp_path / "w.pth", any_weights=True)


def test_an_error_is_one_line_in_the_shell(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "fid.py", "a", "b"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "fid.py: error: no file or folder at a\n"


def test_it_needs_nothing_else_of_this_repository(tmp_path):
    """Copied to an empty folder, it still shows its help."""
    (tmp_path / "fid.py").write_text((ROOT / "fid.py").read_text())
    done = subprocess.run([sys.executable, "fid.py", "--help"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "REFERENCE" in done.stdout
