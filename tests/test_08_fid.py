"""Chapter 8: how samples are judged.

literal_metrics.py holds every metric as its definition reads, slowly.  fid.py must agree with it.
"""

import hashlib
import io
import itertools
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import literal_metrics as literal
import numpy as np
import pytest
import torch
from commands import ROOT, launch
from helpers import damaged
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import fid
from fid import (FolderImages, Moments, NpzImages, Side, center_crop, frechet_distance,
                 inception_score, list_images, precision_recall, read_image, resize_tf1,
                 squared_distances)

METRICS = "Inception Score", "FID", "sFID", "Precision", "Recall"
SEEDS = st.integers(0, 10**6)


def pictures(n, height, width, seed=0):
    """uint8 (n, height, width, 3): smooth, each with its own colours and directions."""
    phase, speed = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(seed)) * 6.28
    y, x = torch.meshgrid(torch.arange(height) / 9, torch.arange(width) / 11, indexing="ij")
    y, x = y[None, :, :, None], x[None, :, :, None]
    phase, speed = phase[:, None, None], speed[:, None, None]
    return (127.5 + 120 * torch.sin(phase + y * speed + x * (3 - speed))).byte()


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# --- the network --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of fixed random weights.  Batch norm's statistics are drawn, not measured: a measured
    sum depends on the number of threads.  Filters of mean zero keep images apart in deep layers."""
    generator = torch.Generator().manual_seed(0)
    net = fid.InceptionV3().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            filters = module.weight
            filters.normal_(0, (2 / filters[0].numel()) ** 0.5, generator=generator)
            filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    net.fc.weight.normal_(0, 0.1, generator=generator)
    net.fc.bias.normal_(generator=generator)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({key: x for key, x in net.state_dict().items() if "num_batches" not in key}, path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return fid.load_inception(weights, any_weights=True)[0]


# torch-fidelity 0.4.0 on these weights and pictures(2, 40, 56, seed=7), float32 on a CPU:
# FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]), softmax of the
# logits, and a forward hook on Mixed_6d for [:, :7] in the order H, W, C.  Of each output its norm,
# and for either image its sum with the weights cos 0, cos 1, cos 2, ...
PEER = {
    "pool": (14.190435, [-3.5451580, -2.7918990]),
    "spatial": (10.691662, [-4.0944901, -0.76747317]),
    "probabilities": (0.068138749, [-0.0013450580, 0.0015895340]),
}


def test_the_outputs_are_those_of_an_independent_implementation(net):
    """Forbids half-pixel resizing, x / 127.5 - 1, padded averages, a mean where ADM's network takes
    a maximum, channels before rows in sFID, and the bias of the last layer."""
    outputs = net(pictures(2, 40, 56, seed=7))
    assert [x.shape[1:] for x in outputs[:2]] == [fid.STATISTICS["mu"], fid.STATISTICS["mu_s"]]
    for (norm, sums), x in zip(PEER.values(), outputs, strict=True):
        got = x.double() @ torch.cos(torch.arange(x.shape[1], dtype=torch.float64))
        assert x.norm().item() == pytest.approx(norm, rel=2e-5)
        assert got.tolist() == pytest.approx(sums, abs=2e-5 * norm)


def test_an_image_is_seen_alone(net):
    """Forbids batch norm in training mode: features would depend on the neighbours."""
    images = pictures(3, 24, 40)
    for alone, together in zip(net(images[1:2]), net(images)):
        torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    assert not net.training and not any(x.requires_grad for x in net.parameters())


def test_the_key_layout_is_that_of_the_public_file(weights):
    """torchvision's names and shapes (inception_v3 of 0.29.1 with 1008 classes and no auxiliary
    ones: 23,850,960 parameters), without the counters of batch norm; the digest is of its layout.
    Forbids branches that exchange their names: random weights would not show it, public ones do."""
    state = torch.load(weights, weights_only=True)
    assert len(state) == 94 * 5 + 2 and state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7b.branch3x3_2a.conv.weight"].shape == (384, 384, 1, 3)
    assert sum(x.numel() for key, x in state.items() if "running" not in key) == 23_850_960
    layout = "\n".join(sorted(f"{key} {tuple(x.shape)}" for key, x in state.items()))
    assert hashlib.sha256(layout.encode()).hexdigest() == (
        "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0")


def test_other_weights_are_refused_and_so_is_what_is_none(weights, tmp_path):
    with pytest.raises(ValueError, match="has SHA-256 .* not ADM's 6726825d0af5"):
        fid.load_inception(weights)
    state = torch.load(weights, weights_only=True)
    for change in ({"fc.weight": torch.zeros(1)}, {"fc.weight": None}, {"more": torch.zeros(1)}):
        other = {key: x for key, x in (state | change).items() if x is not None}
        torch.save(other, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="is not a file of the network's weights"):
            fid.load_inception(tmp_path / "w.pth", any_weights=True)


def test_the_public_weights_are_fetched_once_and_checked(monkeypatch, weights, tmp_path):
    """Forbids a download without its hash, a second one, and a bare traceback when offline."""
    cached = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()

    def offline(*arguments, **options):
        raise ConnectionError("no route to host")

    def download(url, path, hash_prefix):
        assert url == fid.WEIGHTS_URL and path == str(cached) and hash_prefix == digest
        cached.symlink_to(weights)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", digest)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match="no route to host.*give it with --inception FILE"):
        fid.load_inception()
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert fid.load_inception()[1] == digest
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert fid.load_inception()[1] == digest


# --- images -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=SEEDS, H=st.integers(1, 30), W=st.integers(1, 30), size=st.integers(1, 20))
def test_the_resize_is_tensorflows(seed, H, W, size):
    """Forbids half pixels, averages, rows taken for columns, and edges mixed with anything."""
    image = np.random.default_rng(seed).random((H, W, 3))
    (got,) = resize_tf1(torch.from_numpy(image)[None], size).numpy()
    np.testing.assert_allclose(got, literal.resize_tf1(image, size), rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(data=st.data(), seed=SEEDS, size=st.integers(3, 12))
def test_the_crop_is_adms(data, seed, size):
    """Forbids cropping without resizing, other filters, and any middle that is not the middle.
    Pillow rounds to whole levels four to six times; a cubic enlarges that by (5/4)^2 at most."""
    short = data.draw(st.integers(1, 2 * size - 1))
    H, W = data.draw(st.permutations((4 * short, 4 * data.draw(st.integers(short, 2 * short)))))
    image = np.random.default_rng(seed).integers(80, 176, (H, W, 3), dtype=np.uint8)
    got = np.asarray(center_crop(Image.fromarray(image), size)).astype(float)
    assert got.shape == (size, size, 3)
    assert np.abs(got - literal.center_crop(image.astype(float), size)).max() < 6 / 2 * (5 / 4) ** 2


def test_the_crop_rounds_the_longer_side_and_leaves_what_fits_untouched():
    pixels = pictures(1, 8, 8)[0].numpy()
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 8)), pixels)
    wide = pictures(1, 12, 29)[0].numpy()                       # 8 x 19.33 -> 8 x 19, left = 5
    expected = Image.fromarray(wide).resize((19, 8), Image.BICUBIC).crop((5, 0, 13, 8))
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(wide), 8)), np.asarray(expected))
    odd = pictures(1, 17, 35)[0].numpy()                        # 8 x 17 -> 4 x 8: the odd one goes
    expected = Image.fromarray(odd).resize((17, 8), Image.BOX).resize((8, 4), Image.BOX)
    expected = expected.crop((2, 0, 6, 4))
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(odd), 4)), np.asarray(expected))


def upright_and_turned():
    """An image, and the same stored on its side with the EXIF tag that says so."""
    image = Image.fromarray(pictures(1, 6, 8)[0].numpy())
    turned, exif = image.transpose(Image.ROTATE_90), Image.Exif()
    exif[0x0112] = 6                                            # "turn clockwise to show"
    return image, turned, exif


def test_an_image_is_upright_rgb_whatever_its_encoding(tmp_path):
    """Forbids BGR, pictures on their side, 16 bits clipped to white, palettes read as grey."""
    image, turned, exif = upright_and_turned()
    pixels = np.asarray(image)
    image.save(tmp_path / "rgb.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    image.convert("RGBA").save(tmp_path / "rgba.png")
    for name in ("rgb", "turned", "rgba"):
        got = read_image(tmp_path / f"{name}.png")
        assert got.dtype == np.uint8 and np.array_equal(got, pixels), name
    image.quantize(8).save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), image.quantize(8).convert("RGB"))
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "16.png")
    image.getchannel(0).save(tmp_path / "grey.png")
    for name in ("16", "grey"):
        assert np.array_equal(read_image(tmp_path / f"{name}.png"), pixels[..., [0, 0, 0]]), name
    assert np.array_equal(read_image(tmp_path / "turned.png", 4), center_crop(image, 4))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_is_no_broken_image(tmp_path):
    image = Image.fromarray(pictures(1, 6, 8)[0].numpy())
    image.save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(tmp_path / "exif.jpg").shape == (6, 8, 3)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path):
    """A few kilobytes that unpack to 100 million pixels, or would once they are scaled."""
    for size, message in (((10_000, 10_000), "bomb"), ((2, 60_000), "too long to be scaled")):
        Image.new("1", size).save(tmp_path / "bomb.png")
        with pytest.raises(Exception, match=message):
            read_image(tmp_path / "bomb.png", 256)


def test_a_folder_is_all_images_below_it_sorted_by_path(tmp_path):
    """Links to folders are followed; hidden files and other endings are none of them."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "folder" / "b").mkdir(parents=True)
    (tmp_path / "folder" / "a").symlink_to(tmp_path / "linked")
    names = ["a/2.JPG", "a/3.webp", "b/1.png", "b/10.jpeg", "b/2.bmp"]
    for name in (*names, "b/._1.png", "b/notes.txt", "a/4.gif"):
        (tmp_path / "folder" / name).touch()
    assert list_images(tmp_path / "folder") == [str(tmp_path / "folder" / name) for name in names]


@settings(max_examples=30)
@given(n=st.integers(1, 23), batch=st.integers(1, 9), world=st.integers(1, 4),
       kind=st.sampled_from(("folder", "npz", "compressed")))
@example(n=11, batch=2, world=3, kind="folder")
@example(n=11, batch=2, world=3, kind="npz")
def test_ranks_divide_the_batches_among_them_in_turn(tmp_path_factory, n, batch, world, kind):
    """Batch b belongs to rank b mod world, and is images b * batch and following: none twice."""
    path, images = tmp_path_factory.mktemp("images"), pictures(n, 3, 5).numpy()
    if kind == "folder":
        for k, image in enumerate(images):
            Image.fromarray(image).save(path / f"{k:02d}.png")
        source = FolderImages(path)
    else:
        save = np.savez if kind == "npz" else np.savez_compressed
        save(path / "images.npz", images, np.arange(n))         # arr_1: the labels, not read
        source = NpzImages(path / "images.npz")
    assert len(source) == n and tuple(source.size) == (3, 5)
    expected = [images[start:start + batch] for start in range(0, n, batch)]
    for rank in range(world):
        got = list(source.batches(batch, rank, world))
        assert len(got) == len(expected[rank::world])
        assert all(map(np.array_equal, got, expected[rank::world]))


# --- Frechet distance ---------------------------------------------------------------------------


def gaussian(rng, n, d):
    """Mean and covariance of n points in d dimensions, no two directions alike."""
    points = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)
    return points.mean(axis=0), np.cov(points.T).reshape(d, d)


@settings(max_examples=60)
@given(seed=SEEDS, d=st.integers(1, 12), n=st.integers(2, 30), m=st.integers(2, 30))
def test_the_frechet_distance_is_its_definition(seed, d, n, m):
    """Also for fewer points than dimensions, on one side or both, and whichever comes first."""
    rng = np.random.default_rng(seed)
    a, b = gaussian(rng, n, d), gaussian(rng, m, d)
    expected, scale = literal.frechet(*a, *b), 1 + np.trace(a[1]) + np.trace(b[1])
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=0, abs=1e-6 * scale)
    assert frechet_distance(*b, *a) == pytest.approx(expected, rel=0, abs=1e-6 * scale)
    assert 0 <= frechet_distance(*a, *a) < 1e-6 * scale


@given(mean=st.floats(-9, 9), a=st.floats(0, 9), b=st.floats(0, 9))
def test_in_one_dimension_it_is_that_of_means_and_standard_deviations(mean, a, b):
    got = frechet_distance([0], [[a * a]], [mean], [[b * b]])
    assert got == pytest.approx(mean**2 + (a - b) ** 2, abs=1e-9)


@settings(max_examples=30)
@given(seed=SEEDS, d=st.integers(1, 12))
def test_commuting_covariances_differ_by_the_roots_of_their_eigenvalues(seed, d):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a, b = rng.uniform(0, 4, (2, d)) * (rng.random((2, d)) < 0.7)    # some exactly 0
    got = frechet_distance(np.zeros(d), basis * a @ basis.T, np.zeros(d), basis * b @ basis.T)
    assert got == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-6)


def test_fewer_images_than_dimensions_are_no_trouble():
    """Where a general matrix root turns complex: 20 and 30 points in 64 dimensions."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 64)), rng.standard_normal((30, 64)) + 1
    got = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert got == pytest.approx(literal.frechet_of_points(x, y), rel=1e-6)


def changed(matrix, i, j, value):
    """The matrix with one entry replaced."""
    matrix = matrix.copy()
    matrix[i, j] = value
    return matrix


@pytest.mark.parametrize("mu, sigma, message", [
    (np.zeros(3), -np.eye(3), "sigma{} is no covariance: it has the eigenvalue -1"),
    (np.zeros(3), np.diag([1, 1, -1e-3]), "sigma{} is no covariance: it has the eigenvalue -0.001"),
    (np.zeros(3), changed(np.eye(3), 0, 2, 0.1), "entries (i, j) and (j, i) differ by 0.1"),
    (np.zeros(3), changed(np.eye(3), 0, 2, 1e-3), "entries (i, j) and (j, i) differ by 0.001"),
    (np.zeros(3), np.eye(3) * 1j, "sigma{} is complex128, not real"),
    (np.zeros(3) + 0j, np.eye(3), "mu{} is complex128, not real"),
    (np.zeros(3), changed(np.eye(3), 1, 1, np.inf), "sigma{} is not finite"),
    (np.full(3, np.nan), np.eye(3), "mu{} is not finite"),
    (np.zeros(4), np.eye(3), "mu{} (4,) and sigma{} (3, 3) are not of shapes (d,) and (d, d)"),
    (np.zeros((3, 1)), np.eye(3), "are not of shapes (d,) and (d, d)"),
    (np.zeros(2), np.eye(2), "dimensions have no distance"),
])
def test_what_is_no_mean_and_covariance_is_refused_on_either_side(mu, sigma, message):
    """Forbids a distance of 0 between -I and I."""
    good = np.zeros(3), np.eye(3)
    for number, arguments in ((1, (mu, sigma, *good)), (2, (*good, mu, sigma))):
        with pytest.raises(ValueError) as error:
            frechet_distance(*arguments)
        assert message.replace("{}", str(number)) in str(error.value)


def test_a_covariance_may_be_rounded_to_float32():
    """Of 5 points in 9 dimensions: rounding makes eigenvalues of 0 negative, and is forgiven."""
    rng = np.random.default_rng(0)
    a, b = gaussian(rng, 5, 9), gaussian(rng, 5, 9)
    rounded = a[1].astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(float))[0] < -1e-8
    expected = literal.frechet(*a, *b)
    assert frechet_distance(a[0], rounded, *b) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(*b, a[0], rounded) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance([0, 0], np.eye(2, dtype=int), [1, 0], np.eye(2)) == pytest.approx(1)


# --- Inception Score ----------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=SEEDS, n=st.integers(1, 40), K=st.integers(1, 6), split=st.integers(1, 45))
def test_the_inception_score_is_its_definition_and_a_short_chunk_counts_in_full(seed, n, K, split):
    """Some probabilities are exactly 0, which must not give NaN."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(K), n) * (rng.random((n, K)) < 0.7) + 1e-3 * np.eye(K)[[0] * n]
    p /= p.sum(axis=1, keepdims=True)
    assert inception_score(p, split) == pytest.approx(literal.inception_score(p, split), rel=1e-9)


@given(K=st.integers(1, 50), times=st.integers(1, 5))
def test_the_score_is_1_when_nothing_is_said_and_the_number_of_classes_when_all_is(K, times):
    assert inception_score(np.full((7, K), 1 / K)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(K), (times, 1))) == pytest.approx(K)


def test_a_chunk_is_5000_images_in_the_order_of_the_file():
    """Sorted by class, every chunk is dull."""
    p = np.repeat(np.eye(4), 5000, axis=0)
    assert inception_score(p) == pytest.approx(1)
    shuffled = p[np.random.default_rng(0).permutation(20_000)]
    assert inception_score(shuffled) == pytest.approx(4, rel=1e-2)
    short = np.concatenate([np.tile(np.eye(4), (1250, 1)), np.eye(4)[:2]])
    assert inception_score(short) == pytest.approx((4 + 2) / 2)


# --- precision and recall -----------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=SEEDS, n=st.integers(6, 25), m=st.integers(6, 25), d=st.integers(1, 4),
       k=st.integers(1, 5), block=st.integers(1, 30), half=st.booleans())
def test_precision_and_recall_are_fractions_of_points_in_balls(seed, n, m, d, k, block, half):
    """Points of a grid: many are exactly as far as a ball reaches, and belong to it.  In float16
    the grid lies far from zero, where |x|^2 is rounded to multiples of 2."""
    rng, scale = np.random.default_rng(seed), 16 if half else 1
    real, fake = (rng.integers(0, 6, (size, d)) / scale + 25 * half for size in (n, m))
    fake = fake + rng.integers(0, 3) / scale
    distance = literal.half_squared_distance if half else literal.squared_distance
    expected = literal.precision_recall(real, fake, k, distance)
    points = (torch.from_numpy(x).float() if half else x for x in (real, fake))
    assert precision_recall(*points, k, half, block) == pytest.approx(expected, abs=1e-12)


def test_the_third_neighbour_is_meant_where_nothing_is_said():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((40, 3)), rng.standard_normal((30, 3)) + 0.5
    expected = literal.precision_recall(real, fake, 3)
    assert expected not in (literal.precision_recall(real, fake, k) for k in (2, 4))
    assert precision_recall(real, fake) == pytest.approx(expected)


def test_equal_sets_give_one_and_distant_ones_zero():
    x = np.random.default_rng(0).standard_normal((50, 8))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 images on both sides, not 3 and 50"):
        precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="more than 3 images on both sides, not 50 and 3"):
        precision_recall(x, x[:3])


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


def test_a_distance_is_never_negative():
    """Forbids the root of rounding: |x|^2 - 2 x y + |y|^2 of equal points, far from zero."""
    x = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) + 9
    assert ((x * x).sum(1)[:, None] - 2 * x @ x.T + (x * x).sum(1)).min() < 0
    for half in (False, True):
        assert squared_distances(x, x, half).min() == 0


# --- statistics of images -----------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=SEEDS, n=st.integers(2, 20), d=st.integers(1, 5), data=st.data())
def test_streamed_moments_are_mean_and_covariance_of_all_at_once(seed, n, d, data):
    """In any order and in batches of any size, empty ones too."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float32) + 3
    cuts = data.draw(st.lists(st.integers(0, n), max_size=6))
    moments = Moments(d)
    for part in np.split(rng.permutation(x), sorted(cuts)):
        moments.add(torch.from_numpy(part))
    mu, sigma = moments.finish()
    np.testing.assert_allclose(mu, literal.mean(x.astype(float)), rtol=1e-12)
    expected = literal.covariance(x.astype(float))
    np.testing.assert_allclose(sigma, expected, rtol=1e-9, atol=1e-12)


class SmallNet(torch.nn.Module):
    """Stands where Inception does, with 6 pool and 5 spatial features and 4 classes.  Features are
    multiples of 1/16 around 24: |x|^2 is rounded in float16, but sums of squares are exact."""

    def forward(self, images):
        x = images.flatten(1).double() / 255
        waves = torch.cos(torch.outer(torch.arange(x.shape[1]), torch.arange(1, 16) ** 1.5))
        x = x @ waves.double()
        features = 24 + (x[:, :11] * 16).round().clamp(-100, 100) / 16
        return features[:, :6].float(), features[:, 6:].float(), x[:, 11:].float().softmax(dim=1)


SIZES = {"mu": (6,), "sigma": (6, 6), "mu_s": (5,), "sigma_s": (5, 5)}
SHA = "0123456789abcdef" * 4


@pytest.fixture
def small(monkeypatch):
    """fid.py with SmallNet instead of Inception."""
    monkeypatch.setattr(fid, "STATISTICS", SIZES)
    monkeypatch.setattr(fid, "load_inception", lambda path, any_weights: (SmallNet().eval(), SHA))


def statistics(images):
    """mu, sigma, mu_s, sigma_s of SmallNet's features, by the definitions."""
    pool, spatial, _ = (x.double().numpy() for x in SmallNet()(torch.as_tensor(images)))
    return {"mu": literal.mean(pool), "sigma": literal.covariance(pool),
            "mu_s": literal.mean(spatial), "sigma_s": literal.covariance(spatial)}


class FakeRanks:
    """Threads instead of processes: what fid.py uses of torch.distributed."""

    def __init__(self, world):
        self.barrier, self.parts, self.local = threading.Barrier(world), {}, threading.local()

    def exchange(self, part):
        self.parts[self.local.rank] = part
        self.barrier.wait(10)
        parts = [self.parts[rank] for rank in sorted(self.parts)]
        self.barrier.wait(10)
        return parts

    def all_reduce(self, x):
        total = sum(self.exchange(x.clone()))
        x.copy_(total)

    def gather_object(self, part, parts):
        everything = self.exchange(part)
        assert (parts is not None) == (self.local.rank == 0)
        if parts is not None:
            parts[:] = everything


@settings(max_examples=25)
@given(n=st.integers(4, 23), batch=st.integers(1, 9), world=st.integers(1, 4))
@example(n=11, batch=2, world=3)
def test_any_number_of_ranks_measures_what_one_does(tmp_path_factory, n, batch, world):
    """Forbids features out of order, batches counted twice, a mean of means, and ranks without a
    batch that spoil the sum."""
    images, fake = pictures(n, 4, 6).numpy(), FakeRanks(world)
    path = npz(tmp_path_factory.mktemp("ranks") / "images.npz", arr_0=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "dist", fake)
        patch.setattr(fid, "STATISTICS", SIZES)
        sides = [Side(path) for _ in range(world)]

        def measure(rank):
            fake.local.rank = rank
            sides[rank].measure(SmallNet(), batch, "cpu", rank, world)

        threads = [threading.Thread(target=measure, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    pool, _, probabilities = SmallNet()(torch.from_numpy(images))
    assert torch.equal(sides[0].pool, pool) and torch.equal(sides[0].probs, probabilities)
    assert all(side.pool is None for side in sides[1:])
    for name, expected in statistics(images).items():
        np.testing.assert_allclose(sides[0].statistics[name], expected, rtol=1e-9, atol=1e-9)


def test_the_first_process_of_a_node_fetches_the_weights_and_the_others_wait(monkeypatch):
    options = SimpleNamespace(inception=None, any_weights=False)
    for rank, world, expected in ((0, 1, ["load"]), (0, 2, ["load", "wait"]),
                                  (1, 2, ["wait", "load"])):
        events = []
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(fid, "load_inception", lambda *_: events.append("load") or (1, 2))
        monkeypatch.setattr(fid.dist, "barrier", lambda: events.append("wait"))
        assert fid.load_with_one_download(options, world) == (1, 2)
        assert events == expected


# --- the whole command --------------------------------------------------------------------------


def command(monkeypatch, *words):
    """`python fid.py words`, in this process."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, words)])
    fid.run()


def error_line(monkeypatch, *words):
    """The one line that the command ends in."""
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *words)
    line = ended.value.code
    assert isinstance(line, str) and line.startswith("fid.py: error: ") and "\n" not in line
    return line


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Twelve images for reference and ten samples: as folders, as .npz, and as statistics."""
    folder = tmp_path_factory.mktemp("album")
    for name, n, seed in (("reference", 12, 0), ("samples", 10, 11)):
        images = pictures(n, 8, 6, seed).numpy()
        (folder / name / "folder").mkdir(parents=True)
        for k, image in enumerate(images):
            Image.fromarray(image).save(folder / name / "folder" / f"{k:02d}.png")
        npz(folder / name / "images.npz", arr_0=images)
        npz(folder / name / "statistics.npz", **statistics(images), n=n, extractor_sha256=SHA)
        others = pictures(7, 8, 6, seed + 1).numpy()             # as in ADM's files
        npz(folder / name / "both.npz", arr_0=others, **statistics(images))
    return folder


def expected_result(album, a, b):
    """The metrics of two sides by their definitions; images of both.npz are those of a subset."""
    numbers, found = {"reference": 12, "samples": 10}, {}
    stats, images = {}, {}
    for name, seed, kind in (("reference", 0, a), ("samples", 11, b)):
        everything = pictures(numbers[name], 8, 6, seed)
        stats[name] = statistics(everything)
        if kind != "statistics.npz":
            images[name] = pictures(7, 8, 6, seed + 1) if kind == "both.npz" else everything
    for metric, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        found[metric] = literal.frechet(*(stats[name][key] for name in numbers
                                          for key in (mu, sigma)))
    if "samples" in images:
        probabilities = SmallNet()(images["samples"])[2].double().numpy()
        found["Inception Score"] = literal.inception_score(probabilities, 5000)
    if len(images) == 2:
        pools = (SmallNet()(images[name])[0].numpy() for name in numbers)
        found["Precision"], found["Recall"] = literal.precision_recall(
            *pools, distance=literal.half_squared_distance)
    return found


KINDS = "folder", "images.npz", "statistics.npz", "both.npz"


@pytest.mark.parametrize("a, b", list(itertools.product(KINDS, KINDS)))
def test_the_command_gives_each_metric_by_its_definition(monkeypatch, album, small, tmp_path,
                                                         capsys, a, b):
    """Folder of images, .npz of images, of statistics, or of both, against each, to its JSON.
    Forbids a crash after all the work, and statistics or images taken from the wrong side."""
    paths = album / "reference" / a, album / "samples" / b
    command(monkeypatch, *paths, "--json", tmp_path / "r.json", "--batch", 5)
    result = json.loads((tmp_path / "r.json").read_text())
    expected = expected_result(album, a, b)
    got = {name: result[name] for name in METRICS if name in result}
    assert got == pytest.approx(expected, rel=1e-6)
    assert result["n_reference"] == (None if a == "both.npz" else 12)
    assert result["n_samples"] == (None if b == "both.npz" else 10)
    assert result["extractor_sha256"] == SHA and result["pr_dtype"] == "half"
    assert result["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for name, value in expected.items():
        assert f"\n{name + ':':<17}{value:.6g}\n" in printed
    for side, kind in (("reference", a), ("samples", b)):
        unknown = [f"{side}: extractor unknown, the file of statistics does not name it",
                   f"{side}: statistics of an unknown number of images"]
        for line in unknown:
            assert (line in result["caveats"]) == (kind == "both.npz")
    assert printed.count("caveat: ") == len(result["caveats"])
    without = "statistics without images: no precision, no recall"
    assert (without in result["caveats"]) == ("statistics.npz" in (a, b))


def test_a_folder_that_is_not_there_any_more_leaves_the_old_result(monkeypatch, album, small,
                                                                    tmp_path):
    """And so does a failure while writing: the file changes in one step or not at all."""
    (tmp_path / "r.json").write_text("old")
    error_line(monkeypatch, album / "nowhere", album / "samples" / "folder",
               "--json", tmp_path / "r.json")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fid.write(tmp_path / "r.json", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "old"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_statistics_give_the_same_distances_and_name_their_network(monkeypatch, album, small,
                                                                         tmp_path, capsys, kind):
    """The keys are ADM's.  What the file did not know is not made up."""
    path = tmp_path / "statistics.npz"
    command(monkeypatch, album / "reference" / kind, "--save-stats", path)
    assert f"wrote {path}\n" in capsys.readouterr().out
    with np.load(path) as file:
        found = {key: file[key] for key in file.files}
    said = {} if kind == "both.npz" else {"n": 12, "extractor_sha256": SHA}
    assert {key: found.pop(key).item() for key in said} == said
    expected = statistics(pictures(12, 8, 6, 0))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-9, atol=1e-9)
    command(monkeypatch, path, album / "samples" / "folder", "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    distances = expected_result(album, "statistics.npz", "folder")
    assert {key: result[key] for key in distances} == pytest.approx(distances, rel=1e-6)


def test_statistics_of_another_network_are_refused(monkeypatch, album, small, tmp_path):
    """Against images, against other statistics, and against the weights on the command line."""
    stats = statistics(pictures(12, 8, 6))
    other = npz(tmp_path / "other.npz", **stats, n=12, extractor_sha256="f" * 64)
    nameless = npz(tmp_path / "nameless.npz", **stats, n=12)
    for words in ((other, album / "samples" / "folder"),
                  (album / "samples" / "images.npz", other),
                  (album / "reference" / "statistics.npz", other),
                  (other, nameless, "--inception", "weights")):
        line = error_line(monkeypatch, *words)
        assert "features of different networks" in line
        assert f"{other} with ffffffffffff..." in line and "with 0123456789ab..." in line
    command(monkeypatch, other, nameless, "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["extractor_sha256"] == "f" * 64
    assert "samples: extractor unknown, the file of statistics does not name it" in (
        result["caveats"])
    command(monkeypatch, nameless, nameless, "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["extractor_sha256"] is None and result["FID"] == pytest.approx(0, abs=1e-6)


def test_the_precision_that_is_asked_for_arrives(monkeypatch, album, small, tmp_path):
    """Forbids a --pr-dtype that changes nothing: on these images float16 and float32 differ."""
    pools = [SmallNet()(pictures(n, 8, 6, seed))[0].double().numpy()
             for n, seed in ((12, 0), (10, 11))]
    results = {}
    for name, distance in (("half", literal.half_squared_distance),
                           ("float", literal.squared_distance)):
        command(monkeypatch, *(album / side / "images.npz" for side in ("reference", "samples")),
                "--json", tmp_path / "r.json", "--pr-dtype", name)
        result = json.loads((tmp_path / "r.json").read_text())
        results[name] = result["Precision"], result["Recall"]
        assert results[name] == pytest.approx(literal.precision_recall(*pools, distance=distance))
        said = "precision and recall are in float32, ADM's are in float16" in result["caveats"]
        assert said == (name == "float") and result["pr_dtype"] == name
    assert results["half"] != results["float"]


def test_two_processes_give_the_numbers_of_the_features(weights, net, tmp_path):
    """The command as it is, Inception too, under torchrun against its features taken at once."""
    images = [pictures(7, 24, 32, seed).numpy() for seed in (0, 1)]
    paths = [npz(tmp_path / name, arr_0=x) for name, x in zip(("a.npz", "b.npz"), images)]
    process = launch("fid.py", *paths, f"--json two.json --inception {weights} --any-weights",
                     "--batch 2 --device cpu --save-stats stats.npz", processes=2, cwd=tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert printed.count("FID:") == 2 and printed.count("wrote stats.npz") == 1
    result = json.loads((tmp_path / "two.json").read_text())
    (pool, spatial, _), (pool2, spatial2, probabilities) = (
        [x.double().numpy() for x in net(torch.from_numpy(x))] for x in images)
    assert result["FID"] == pytest.approx(literal.frechet_of_points(pool, pool2), rel=1e-4)
    assert result["sFID"] == pytest.approx(literal.frechet_of_points(spatial, spatial2), rel=1e-4)
    score = literal.inception_score(probabilities, 5000)
    assert result["Inception Score"] == pytest.approx(score, rel=1e-5)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert result["extractor_sha256"] == digest
    with np.load(tmp_path / "stats.npz") as file:
        assert {key: file[key].shape for key in fid.STATISTICS} == fid.STATISTICS
        assert file["n"] == 7 and file["extractor_sha256"] == digest


def test_every_option_and_the_rank_arrive_where_they_act(monkeypatch, album, small):
    """Forbids ranks that each measure everything, any weights unasked, a batch of its own choice,
    and a report of every rank."""
    calls = []
    monkeypatch.setattr(fid, "load_inception", lambda *words: calls.append(words) or (
        SmallNet(), SHA))
    monkeypatch.setattr(Side, "measure", lambda self, net, *words: calls.append(words))
    monkeypatch.setattr(fid.dist, "init_process_group", calls.append)
    monkeypatch.setattr(fid.dist, "barrier", lambda: None)
    monkeypatch.setattr(fid, "report", lambda *_: pytest.fail("rank 1 reports"))
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 3)):
        monkeypatch.setenv(name, str(value))
    images = album / "samples" / "images.npz"
    words = images, images, "--inception", "weights", "--device", "cpu", "--batch", 5
    command(monkeypatch, *words)
    assert calls == ["gloo", ("weights", False), (5, "cpu", 1, 3), (5, "cpu", 1, 3)]
    command(monkeypatch, *words, "--any-weights")
    assert calls[5] == ("weights", True)


def test_what_makes_numbers_incomparable_is_said(monkeypatch, album, small, tmp_path, capsys):
    (tmp_path / "jpegs").mkdir()
    for k, image in enumerate(pictures(4, 9, 5).numpy()):
        Image.fromarray(image).save(tmp_path / "jpegs" / f"{k}.JPG")
    command(monkeypatch, album / "reference" / "images.npz", tmp_path / "jpegs", "--crop", 4)
    printed = capsys.readouterr().out
    for line in ("the network's weights are not ADM's", "n = 4 samples, not 50,000",
                 "reference: n = 12 < 2048, the covariance is singular",
                 "samples: n = 4 < 2048, the covariance is singular",
                 "reference and samples differ in size", "--crop 4: images of folders were",
                 "samples are JPEG"):
        assert f"caveat: {line}" in printed
    assert "12 images of 6 x 8\n" in printed and "4 images of 4 x 4\n" in printed
    assert f"extractor: Inception v3 of 2015, SHA-256 {SHA}\n" in printed


def test_a_comparison_like_the_published_ones_has_no_caveat():
    side = SimpleNamespace(n=50_000, extractor=fid.WEIGHTS_SHA256)
    side.images = type("Images", (), {"size": (8, 8), "__len__": lambda self: 4})()
    options = SimpleNamespace(crop=None, pr_dtype="half")
    assert fid.caveats(side, side, options, fid.WEIGHTS_SHA256) == []
    side.n = 49_999
    (line,) = fid.caveats(side, side, options, fid.WEIGHTS_SHA256)
    assert line.startswith("n = 49999 samples, not 50,000")
    side.n = 2047
    found = fid.caveats(side, side, options, fid.WEIGHTS_SHA256)
    assert "reference: n = 2047 < 2048, the covariance is singular" in found
    side.n = 2048
    (line,) = fid.caveats(side, side, options, fid.WEIGHTS_SHA256)
    assert line.startswith("n = 2048 samples, not 50,000")


def test_samples_sorted_by_class_are_noticed():
    side = SimpleNamespace(n=10_000, extractor=fid.WEIGHTS_SHA256)
    side.images = type("Images", (), {"size": (8, 8), "__len__": lambda self: 10_000})()
    side.probs = torch.eye(4).repeat_interleave(2500, dim=0) * 0.9 + 0.025
    options = SimpleNamespace(crop=None, pr_dtype="half")
    (line,) = (line for line in fid.caveats(side, side, options, fid.WEIGHTS_SHA256)
               if line.startswith("samples seem sorted by class; shuffled, Inception Score "))
    side.probs = side.probs[torch.randperm(10_000)]
    assert float(line.split()[-1]) == pytest.approx(inception_score(side.probs), rel=0.02)
    assert not any("sorted" in line for line in
                   fid.caveats(side, side, options, fid.WEIGHTS_SHA256))


# --- bad input ----------------------------------------------------------------------------------


def bad_inputs(folder):
    (folder / "empty").mkdir()
    for name, sizes in (("three", [(9, 8)] * 3), ("mixed", [(9, 8)] * 3 + [(8, 9)])):
        (folder / name).mkdir()
        for k, size in enumerate(sizes):
            Image.new("RGB", size).save(folder / name / f"{k}.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_bytes(b"no image")
    images = pictures(4, 8, 8).numpy()
    npz(folder / "key.npz", images=images)
    npz(folder / "float.npz", arr_0=images / 255)
    npz(folder / "grey.npz", arr_0=images[..., :1])
    npz(folder / "none.npz", arr_0=images[:0])
    npz(folder / "thin.npz", arr_0=images[:, :0])
    npz(folder / "flat.npz", arr_0=images[0])
    npz(folder / "few.npz", arr_0=images[:3])
    npz(folder / "fortran.npz", arr_0=np.asfortranarray(images))
    npz(folder / "pickle.npz", arr_0=np.array([{}], dtype=object))
    (folder / "text.npz").write_text("hello")
    stats = statistics(images)
    for name, change in {
        "shape": {"mu": np.zeros(3)}, "indefinite": {"sigma_s": -np.eye(5)},
        "asymmetric": {"sigma": changed(np.eye(6), 0, 1, 0.5)},
        "complex": {"sigma": 1j * np.eye(6)},
        "infinite": {"mu_s": np.full(5, np.inf)}, "single": {"n": 1}, "words": {"n": "many"},
    }.items():
        npz(folder / f"{name}.npz", **stats | change)
    npz(folder / "part.npz", mu=stats["mu"])


@pytest.mark.parametrize("name, message", [
    ("nothing", "no file or folder at '"),
    ("empty", "holds no images"),
    ("three", "holds 3 images; precision and recall need four, a comparison 50,000"),
    ("few.npz", "holds 3 images; precision and recall need four, a comparison 50,000"),
    ("mixed", "are of different sizes, 8 x 9 and 9 x 8; --crop SIZE makes them one"),
    ("broken", "0.png: unreadable image"),
    ("key.npz", "has neither arr_0 nor mu; it has images"),
    ("float.npz", "arr_0 is float64 (4, 8, 8, 3); images are uint8 (N, H, W, 3)"),
    ("grey.npz", "arr_0 is uint8 (4, 8, 8, 1); images are uint8"),
    ("none.npz", "arr_0 is uint8 (0, 8, 8, 3); images are uint8"),
    ("thin.npz", "arr_0 is uint8 (4, 0, 8, 3); images are uint8"),
    ("flat.npz", "arr_0 is uint8 (8, 8, 3); images are uint8"),
    ("fortran.npz", "arr_0 is in Fortran's order; save it in C's"),
    ("pickle.npz", "images are uint8 (N, H, W, 3)"),
    ("text.npz", "is not a readable .npz (BadZipFile)"),
    ("words.npz", "is not a readable .npz (ValueError)"),
    ("part.npz", "has mu, not all of mu, sigma, mu_s, sigma_s"),
    ("shape.npz", "has statistics of shapes {'mu': (3,)"),
    ("indefinite.npz", "sigma_s is no covariance: it has the eigenvalue -1; make the file again"),
    ("asymmetric.npz", "sigma is no covariance: entries (i, j) and (j, i) differ by 0.5"),
    ("complex.npz", "sigma is complex128, not real"),
    ("infinite.npz", "mu_s is not finite; make the file again, from images, with --save-stats"),
    ("single.npz", "n is 1; a covariance needs 2 images"),
])
def test_bad_input_is_one_line_that_names_it(monkeypatch, album, small, tmp_path, name, message):
    bad_inputs(tmp_path)
    for sides in ((tmp_path / name, album / "samples" / "images.npz"),
                  (album / "reference" / "statistics.npz", tmp_path / name)):
        line = error_line(monkeypatch, *sides)
        assert message in line and str(tmp_path / name) in line


@pytest.mark.parametrize("words, message", [
    ("", "the following arguments are required: REFERENCE; --help lists the options"),
    ("STATS", "nothing to do: give SAMPLES, or --save-stats FILE"),
    ("STATS --save-stats s.npz --json r.json", "--json needs SAMPLES"),
    ("STATS STATS --batch 0", "--batch 0 must be at least 1"),
    ("STATS STATS --batch few", "argument --batch: invalid int value: 'few'"),
    ("STATS STATS --crop 0", "--crop 0 must be at least 1"),
    ("STATS STATS --crop 8", "--crop 8 is for folders of images, and there is none"),
    ("STATS STATS --device foo", "--device foo: "),
    ("STATS STATS --device meta", "--device meta: "),
    ("STATS STATS --json nowhere/r.json", "--json 'nowhere/r.json' cannot be written"),
    ("STATS STATS --json .", "--json '.' cannot be written: it must be a file in a folder"),
    ("STATS STATS --save-stats nowhere/s.npz", "--save-stats 'nowhere/s.npz' cannot be written"),
    ("STATS STATS --save-stats STATS", "would overwrite what is compared"),
    ("IMAGES STATS --json STATS", "would overwrite what is compared"),
    ("STATS STATS --pr-dtype double", "invalid choice: 'double'"),
    ("STATS STATS --colour", "unrecognized arguments: --colour"),
])
def test_an_option_that_cannot_act_is_refused_before_any_work(monkeypatch, album, small, tmp_path,
                                                              words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Side, "measure", lambda *_: pytest.fail("it started to work"))
    words = words.replace("STATS", f"{album / 'reference' / 'statistics.npz'}")
    words = words.replace("IMAGES", f"{album / 'samples' / 'images.npz'}")
    assert message in error_line(monkeypatch, *words.split())
    assert not list(tmp_path.iterdir())


def test_an_empty_word_is_not_a_path(monkeypatch, album, small, tmp_path):
    """An unset $VARIABLE is neither the current folder nor an option that was not given."""
    monkeypatch.chdir(tmp_path)
    stats = album / "reference" / "statistics.npz"
    for words in (("", stats), (stats, "")):
        assert "no file or folder at ''" in error_line(monkeypatch, *words)
    for option in ("--json", "--save-stats"):
        assert f"{option} '' cannot be written" in error_line(monkeypatch, stats, stats, option, "")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_out_of_memory_names_the_option_that_helps(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(fid, "main", fail)
    assert error_line(monkeypatch).endswith("out of memory; a smaller --batch needs less")
    error = RuntimeError("a bug of ours")
    with pytest.raises(RuntimeError, match="a bug of ours"):    # keeps its traceback
        command(monkeypatch)


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


GOOD = (npz_bytes(arr_0=pictures(4, 4, 4).numpy()),
        npz_bytes(**statistics(pictures(9, 4, 4)), n=9, extractor_sha256=SHA), b"\x80 weights")


def test_an_array_whose_name_holds_a_line_break_is_refused_in_one_line(tmp_path):
    (tmp_path / "any.npz").write_bytes(npz_bytes(**{"a\nb": np.zeros(3)}))
    with pytest.raises(ValueError, match="neither arr_0 nor mu; it has a b$"):
        Side(tmp_path / "any.npz")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=150)
@given(data=st.sampled_from(GOOD).flatmap(damaged), world=st.integers(1, 2))
def test_any_bytes_are_images_statistics_weights_or_a_clean_error(tmp_path_factory, data, world):
    path = tmp_path_factory.getbasetemp() / "any.npz"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "STATISTICS", SIZES)
        try:
            side = Side(path)
            for images in side.images.batches(2, 0, world) if side.images else ():
                assert images.dtype == np.uint8 and images.shape[3] == 3
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    with pytest.raises(ValueError, match="is not a file of the network's weights"):
        fid.load_inception(path, any_weights=True)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    """Forbids an error after an hour, or one of Python's about numbers too large for len()."""
    for n in (5, 10**30):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (n, 2, 2, 3)})
        with fid.zipfile.ZipFile(tmp_path / "long.npz", "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue() + bytes(4 * 12))
        with pytest.raises(ValueError, match=f"arr_0 has 48 bytes, not the {n * 12} of its shape"):
            Side(tmp_path / "long.npz")


def test_the_file_alone_works_and_ends_in_one_line_in_the_shell(monkeypatch, tmp_path, capsys):
    """Copied to an empty folder: it needs nothing else of this repository."""
    (tmp_path / "fid.py").write_text((ROOT / "fid.py").read_text())
    done = subprocess.run([sys.executable, "fid.py", "a", "b"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr == "fid.py: error: no file or folder at 'a'\n"
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--help")
    assert ended.value.code == 0 and "REFERENCE" in capsys.readouterr().out
