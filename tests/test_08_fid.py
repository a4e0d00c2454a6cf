"""Chapter 8: how samples are judged.

literal_metrics.py holds every metric as its definition reads, slowly.  fid.py must agree with it.
"""

import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import literal_metrics as literal
import numpy as np
import pytest
import torch
from commands import ROOT, error_line, run, run_ranks
from helpers import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fid
import train
from fid import (Side, center_crop, frechet_distance, inception_score, list_images,
                 precision_recall, read_image, resize_tf1, squared_distances)

METRICS = "Inception Score", "FID", "sFID", "Precision", "Recall"
SEEDS = st.integers(0, 10**6)


def pictures(n, height, width, seed=0):
    """uint8 (n, height, width, 3): smooth, each with its own colours and directions."""
    phase, speed = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(seed)) * 6.28
    y, x = torch.meshgrid(torch.arange(height) / 9, torch.arange(width) / 11, indexing="ij")
    y, x = y[None, :, :, None], x[None, :, :, None]
    phase, speed = phase[:, None, None], speed[:, None, None]
    return (127.5 + 120 * torch.sin(phase + y * speed + x * (3 - speed))).byte().numpy()


def save_images(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k:02d}.png")


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# --- the network --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of fixed random weights, with the public file's names.  Batch norm's statistics are
    drawn, not measured: a measured sum depends on the number of threads.  Filters of mean zero keep
    images apart in deep layers."""
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
    state = {}
    for name, x in net.state_dict().items():
        name = re.sub(r"\.(\d)\.([ab])\.", r"_\1\2.", name)
        state[re.sub(r"\.(\d)\.(conv|bn)", r"_\1.\2", name)] = x
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({name: x for name, x in state.items() if "num_batches" not in name}, path)
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


def test_the_features_match_an_independent_implementation(net):
    """Catches half-pixel resizing, x / 127.5 - 1, padded averages, a mean where ADM's network takes
    a maximum, channels before rows in sFID, the bias of the last layer, and batch norm in training
    mode."""
    outputs = net(torch.from_numpy(pictures(2, 40, 56, seed=7)))
    assert not any(x.requires_grad for x in outputs)
    for (norm, sums), x in zip(PEER.values(), outputs, strict=True):
        got = x.double() @ torch.cos(torch.arange(x.shape[1], dtype=torch.float64))
        assert x.norm().item() == pytest.approx(norm, rel=2e-5)
        assert got.tolist() == pytest.approx(sums, abs=2e-5 * norm)


def test_the_weights_have_the_names_and_shapes_of_the_public_file(weights):
    """torchvision's names and shapes (inception_v3 of 0.29.1 with 1008 classes and no auxiliary
    ones: 23,850,960 parameters), without the counters of batch norm.  Catches branches that
    exchange their names: random weights would not show it, but public ones do."""
    state = torch.load(weights, weights_only=True)
    assert len(state) == 94 * 5 + 2 and state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7b.branch3x3_2a.conv.weight"].shape == (384, 384, 1, 3)
    assert sum(x.numel() for name, x in state.items() if "running" not in name) == 23_850_960
    layout = "\n".join(sorted(f"{name} {tuple(x.shape)}" for name, x in state.items()))
    assert hashlib.sha256(layout.encode()).hexdigest() == (
        "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0")


def test_other_weights_and_other_files_are_refused(weights, tmp_path):
    """Catches weights that are loaded in part."""
    with pytest.raises(ValueError, match="has SHA-256 .* not ADM's 6726825d0af5"):
        fid.load_inception(weights)
    path, state = tmp_path / "w.pth", io.BytesIO()
    torch.save(torch.load(weights, weights_only=True) | {"more": torch.zeros(1)}, state)
    for data in (state.getvalue(), weights.read_bytes()[:10_000]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a file of the network's weights"):
            fid.load_inception(path, any_weights=True)


def test_the_public_weights_are_fetched_once_and_checked(monkeypatch, weights, tmp_path):
    """Catches a download without its hash, a second download, and a traceback when offline."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()

    def offline(*arguments, **options):
        raise ConnectionError("no route to host")

    def download(url, path, hash_prefix, progress=True):
        assert url == fid.WEIGHTS_URL and fid.WEIGHTS_SHA256.startswith(hash_prefix)
        shutil.copy(weights, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="give the file with --inception .no route to host"):
        fid.load_inception()
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert fid.load_inception(any_weights=True)[1] == digest
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert fid.load_inception(any_weights=True)[1] == digest
    with pytest.raises(ValueError, match="not ADM's"):
        fid.load_inception()


# --- images: resized, cropped -------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=SEEDS, H=st.integers(1, 30), W=st.integers(1, 30), size=st.integers(1, 20))
def test_the_resize_is_tensorflows(seed, H, W, size):
    """Catches half pixels, averages, rows taken for columns, and a wrong last row or column."""
    image = np.random.default_rng(seed).random((H, W, 3))
    (got,) = resize_tf1(torch.from_numpy(image)[None], size).numpy()
    np.testing.assert_allclose(got, literal.resize_tf1(image, size), rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(data=st.data(), seed=SEEDS, size=st.integers(3, 12))
def test_the_crop_is_adms(data, seed, size):
    """Catches cropping without resizing, other filters, and any middle that is not the middle.
    Pillow rounds to whole levels four to six times; a cubic enlarges that by (5/4)^2 at most."""
    short = data.draw(st.integers(1, 2 * size - 1))
    H, W = data.draw(st.permutations((4 * short, 4 * data.draw(st.integers(short, 2 * short)))))
    image = np.random.default_rng(seed).integers(80, 176, (H, W, 3), dtype=np.uint8)
    got = np.asarray(center_crop(Image.fromarray(image), size)).astype(float)
    assert got.shape == (size, size, 3)
    assert np.abs(got - literal.center_crop(image.astype(float), size)).max() < 6 / 2 * (5 / 4) ** 2


def test_the_crop_rounds_the_longer_side_and_leaves_a_fitting_image_untouched():
    wide = Image.fromarray(pictures(1, 12, 29)[0])              # 8 x 19.33 -> 8 x 19, left = 5
    cropped = wide.resize((19, 8), Image.BICUBIC).crop((5, 0, 13, 8))
    assert center_crop(wide, 8) == cropped and center_crop(cropped, 8) == cropped
    odd = Image.fromarray(pictures(1, 17, 35)[0])               # 8 x 17 -> 4 x 8: the odd one goes
    half = odd.resize((17, 8), Image.BOX).resize((8, 4), Image.BOX)
    assert center_crop(odd, 4) == half.crop((2, 0, 6, 4))


# --- images: read -------------------------------------------------------------------------------


PNG = {                                      # kind: (number in the file, channels, depths)
    "grey": (0, 1, (1, 2, 4, 8, 16)), "palette": (3, 1, (1, 2, 4, 8)), "RGB": (2, 3, (8, 16)),
    "grey alpha": (4, 2, (8, 16)), "RGB alpha": (6, 4, (8, 16))}


def png(kind, depth, pixels, transparent=b"", palette=b""):
    """A PNG of one row, written by hand: Pillow does not write every depth."""
    bits = "".join(f"{value:0{depth}b}" for value in np.ravel(pixels))
    bits += "0" * (-len(bits) % 8)
    row = bytes([0, *(int(bits[i:i + 8], 2) for i in range(0, len(bits), 8))])
    header = struct.pack(">IIBBBBB", len(pixels), 1, depth, PNG[kind][0], 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"PLTE", palette), (b"tRNS", transparent),
                       (b"IDAT", zlib.compress(row)), (b"IEND", b"")):
        if body or name == b"IEND":
            file += struct.pack(">I", len(body)) + name + body
            file += struct.pack(">I", zlib.crc32(name + body))
    return io.BytesIO(file)


@pytest.mark.parametrize("kind, depth", [(kind, depth) for kind in PNG for depth in PNG[kind][2]])
@settings(max_examples=15)
@given(data=st.data())
def test_a_png_of_any_kind_and_depth_shows_its_colours_over_white(kind, depth, data):
    """Catches the hidden colour of transparent pixels, and 16 bits clipped to white.  Pillow
    misreads three kinds of transparency, which are therefore refused."""
    channels, top = PNG[kind][1], 2**depth - 1
    pixel = st.tuples(*[st.integers(0, top)] * channels)
    pixels = np.array(data.draw(st.lists(pixel, min_size=1, max_size=9)))
    pixels[0] = top                                          # 16-bit grey needs a bright pixel
    colour, alpha = pixels, np.ones((len(pixels), 1))
    transparent = palette = b""
    if kind.endswith("alpha"):
        colour, alpha = pixels[:, :-1], (pixels[:, -1:] >> depth - 8) / 255
    elif kind == "palette":
        colours = data.draw(st.binary(min_size=3 * (top + 1), max_size=3 * (top + 1)))
        transparent, palette = data.draw(st.binary(max_size=top + 1)), colours
        colour = np.array([*colours]).reshape(-1, 3)[pixels[:, 0]]
        alpha = np.array([*transparent, *[255] * (top + 1)])[pixels] / 255
    elif data.draw(st.booleans()):
        chosen = pixels[data.draw(st.integers(0, len(pixels) - 1))]
        transparent = struct.pack(f">{channels}H", *chosen.tolist())
        alpha = 1.0 - (pixels == chosen).all(axis=1, keepdims=True)
    file = png(kind, depth, pixels, transparent, palette)
    if transparent and (kind, depth) in (("grey", 2), ("grey", 4), ("RGB", 16)):
        with pytest.raises(ValueError, match="misreads this transparency; save it with"):
            read_image(file)
        return
    levels = 255 if kind == "palette" else top
    colour = colour >> 8 if depth == 16 else np.round(colour * 255 / levels)
    expected = (colour * alpha + 255 * (1 - alpha)) * np.ones(3)
    assert np.abs(read_image(file)[0] - expected).max() <= 1


GREY = (77, 77, 77)
MODES = [                                    # mode, pixel, formats that hold it, as it is read
    ("1", 255, "PNG BMP TIFF", (255, 255, 255)),
    ("L", 77, "PNG JPEG BMP TIFF", GREY),
    ("LA", (77, 51), "PNG TIFF", (219, 219, 219)),
    ("P", 1, "PNG BMP TIFF", (200, 100, 50)),
    ("PA", (1, 51), "TIFF", (244, 224, 214)),
    ("RGB", (200, 100, 50), "PNG WEBP JPEG BMP TIFF", (200, 100, 50)),
    ("RGBA", (200, 100, 50, 51), "PNG WEBP TIFF", (244, 224, 214)),
    ("RGBA", (200, 100, 50, 0), "PNG WEBP TIFF", (255, 255, 255)),
    ("CMYK", (0, 128, 255, 0), "JPEG TIFF", (255, 127, 0)),
    ("YCbCr", (77, 128, 128), "TIFF", GREY),
    ("LAB", (128, 128, 128), "TIFF", (119, 119, 119)),           # CIE L* = 50.2
    ("I;16", 77 * 257, "PNG TIFF", GREY),
    ("I;16B", 77 * 257, "TIFF", GREY),
    ("I", 77 * 257, "TIFF", GREY),
    ("I;16", 0, "PNG TIFF", (0, 0, 0)),
    ("I;16", 4095, "PNG TIFF", "mode I;16 with values up to 4095"),         # 12 bits, white
    ("I", 70_000, "TIFF", "mode I with values up to 70000"),
    ("F", 0.3, "TIFF", "mode F with values up to 0.3"),
]


@pytest.mark.parametrize("mode, pixel, formats, expected", MODES)
def test_an_image_of_any_mode_is_read_as_it_looks_or_refused(mode, pixel, formats, expected):
    """Pillow opens a file by its content: a TIFF may be called .png.  No file opens in the modes
    La, RGBa, RGBX or HSV.  Catches black where WebP is transparent, palettes read as grey, inverted
    inks, and values whose range nobody knows, read as black or white."""
    for name in formats.split():
        image, file = Image.new(mode, (16, 16), pixel), io.BytesIO()
        if mode in ("P", "PA"):
            image.putpalette([0, 255, 0, 200, 100, 50])
        image.save(file, name, **{"quality": 100, "lossless": True} if name != "PNG" else {})
        assert Image.open(file).mode == mode, name
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=f"{expected}.*save it as 8 bits"):
                read_image(file)
        else:
            got = read_image(file)
            assert got.dtype == np.uint8 and got.shape == (16, 16, 3)
            assert np.abs(got - np.array(expected, dtype=float)).max() <= 1, name


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_is_upright_also_when_it_is_cropped_or_its_exif_is_broken(tmp_path):
    """Catches pictures on their side, transparency lost in turning, and a refused good image."""
    image, exif = Image.fromarray(pictures(1, 6, 8)[0]), Image.Exif()
    exif[0x0112] = 6                                            # "turn clockwise to show"
    image.transpose(Image.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), image)
    assert np.array_equal(read_image(tmp_path / "turned.png", 4), center_crop(image, 4))
    odd = struct.pack("<2sHIHHHIIHHIIIii", b"II", 42, 8, 2, 0x0112, 3, 1, 6,    # the same, and a
                      0x011A, 10, 1, 38, 0, -1, 0)              # resolution Pillow cannot write
    image.transpose(Image.ROTATE_90).save(tmp_path / "odd.png", exif=b"Exif\0\0" + odd)
    assert np.array_equal(read_image(tmp_path / "odd.png"), image)
    corner = image.getpixel((0, 0))
    image.transpose(Image.ROTATE_90).save(tmp_path / "clear.png", exif=exif, transparency=corner)
    assert read_image(tmp_path / "clear.png")[0, 0].tolist() == [255, 255, 255]
    image.save(tmp_path / "good.jpg")
    image.save(tmp_path / "broken.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(read_image(tmp_path / "broken.jpg"), read_image(tmp_path / "good.jpg"))


def test_a_large_photo_is_read_cheaply_and_what_needs_gigabytes_is_refused(monkeypatch, tmp_path):
    """Catches photos of 108 megapixels refused as bombs, or decoded in full, and bombs that are
    not refused: a few kilobytes that unpack to gigabytes, at once or when they are scaled."""
    photo = Image.new("L", (12_000, 9000), 50)
    photo.paste(200, (6000, 0, 12_000, 9000))
    photo.save(tmp_path / "photo.jpg", quality=10)
    decoded = []
    monkeypatch.setattr(fid, "center_crop", lambda image, size: decoded.append(image.size)
                        or center_crop(image, size))
    got = read_image(tmp_path / "photo.jpg", 1024)
    assert np.abs(got[:, [5, -5], 0] - np.array([50.0, 200.0])).max() < 10
    assert decoded == [(12_000 // 4, 9000 // 4)]             # the boxes still have pixels to halve

    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, "JPEG")
    data = bytearray(data.getvalue())
    frame = data.index(b"\xff\xc0") + 5                         # where the header has its size
    data[frame:frame + 4] = struct.pack(">HH", 65_000, 65_000)
    (tmp_path / "huge.jpg").write_bytes(data)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("1", (2, 60_000)).save(tmp_path / "long.png")
    for name, crop in (("huge.jpg", None), ("huge.jpg", 10_000), ("huge.png", None),
                       ("huge.png", 64), ("long.png", 256)):
        with pytest.raises(ValueError, match="would need gigabytes"):
            read_image(tmp_path / name, crop)


# --- images: the folder -------------------------------------------------------------------------


def test_a_folder_holds_each_image_below_it_once(monkeypatch, tmp_path, capsys):
    """Catches hidden copies, an endless loop through a link, an unsorted list, and files of other
    kinds left out without a word."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "folder" / "b" / "c").mkdir(parents=True)
    (tmp_path / "folder" / "b" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "folder" / "a").symlink_to(tmp_path / "linked")
    (tmp_path / "folder" / "b" / "up").symlink_to(tmp_path / "folder")
    names = ["a/2.JPG", "a/3.webp", "b/1.png", "b/10.jpeg", "b/2.bmp", "b/c/1.jfif"]
    others = ["b/._1.png", "b/.ipynb_checkpoints/1.png", "b/notes.txt", "a/4.gif", "a/5.GIF", "a/x"]
    for name in (*names, *others):
        (tmp_path / "folder" / name).touch()
    os.mkfifo(tmp_path / "folder" / "a" / "pipe.jpg")        # reading it would wait without end
    expected = [str(tmp_path / "folder" / name) for name in names]
    assert list_images(tmp_path / "folder") == expected
    line = capsys.readouterr().out
    assert "read 6 images and skipped other files: 2 .gif, 1 .jpg, 1 no ending, 1 .txt\n" in line
    assert line.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert list_images(tmp_path / "folder") == expected and not capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_an_error(monkeypatch, tmp_path):
    """Catches images that are missing without a word, for instance from a disk with errors."""
    save_images(tmp_path / "good", pictures(2, 4, 4))
    (tmp_path / "bad").mkdir()
    scandir = os.scandir

    def failing(path):
        if Path(path).name == "bad":
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        list_images(tmp_path)


def test_training_and_evaluation_see_the_same_pixels(monkeypatch, small, tmp_path):
    """Catches a second way to read or crop an image, or another order."""
    for k, image in enumerate(pictures(5, 20, 31)):
        alpha = np.full((20, 31, 1), 50 * k, np.uint8)
        save_images(tmp_path / "album" / f"{k % 2}" / f"{k}", [np.concatenate([image, alpha], 2)])
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(tmp_path / "album/0/grey.png")
    seen = []
    monkeypatch.setattr(SmallNet, "__call__", lambda self, images: seen.append(images) or
                        self.forward(images))
    run(monkeypatch, fid, tmp_path / "album", "--crop 8 --batch 4 --save-stats", tmp_path / "s.npz")
    data = train.ImageFolder(tmp_path / "album", 8)
    assert len(data) == 6
    assert np.array_equal(torch.cat(seen), [data[k][0] for k in range(6)])


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


def changed(matrix, i, j, value):
    """The matrix with one entry replaced."""
    matrix = matrix.copy()
    matrix[i, j] = value
    return matrix


@pytest.mark.parametrize("mu, sigma, message", [
    (np.zeros(3), np.diag([1, 1, -1e-3]), "the covariance has a negative eigenvalue"),
    (np.zeros(3), changed(np.eye(3), 2, 0, 1e-3), "the covariance is not symmetric"),
    (np.zeros(3), np.eye(3) * 1j, "complex128"),
    (np.zeros(3) + 0j, np.eye(3), "complex128"),
    (np.zeros(3), changed(np.eye(3), 1, 1, np.inf), "mean or covariance is not finite"),
    (np.full(3, np.nan), np.eye(3), "mean or covariance is not finite"),
    (np.zeros(4), np.eye(3), "mean (4,) and covariance (3, 3) are not of shapes (d,) and (d, d)"),
    (np.zeros(2), np.eye(2), "dimensions have no distance"),
])
def test_only_a_mean_and_a_covariance_are_accepted_on_either_side(mu, sigma, message):
    good = np.zeros(3), np.eye(3)
    for arguments in ((mu, sigma, *good), (*good, mu, sigma)):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            frechet_distance(*arguments)


def test_small_variances_count_and_a_covariance_may_be_rounded_to_float32():
    """A few images have a singular covariance, and rounding makes some of its zeros negative.
    Catches variances that are dropped as rounding, and rounding that is taken for an error."""
    d, small, zero = 32, 1e-9, np.zeros(32)
    variances = np.array([1.0] + [small] * (d - 2) + [0.0])
    exact = ((variances**0.5 - 1) ** 2).sum()
    for sides in ((np.diag(variances), np.eye(d)), (np.eye(d), np.diag(variances))):
        assert frechet_distance(zero, sides[0], zero, sides[1]) == pytest.approx(exact, abs=1e-9)
    rng = np.random.default_rng(0)
    a, b = gaussian(rng, 5, 9), gaussian(rng, 5, 9)
    rounded = a[1].astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(float))[0] < -1e-8
    u = rng.random(400)                      # rounding of many features adds up
    fid.as_gaussian(u, np.outer(u, u).astype(np.float32))
    expected = literal.frechet(*a, *b)
    assert frechet_distance(a[0], rounded, *b) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(*b, a[0], rounded) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance([0, 0], np.eye(2, dtype=int), [1, 0], np.eye(2)) == pytest.approx(1)


# --- Inception Score ----------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=SEEDS, n=st.integers(1, 40), K=st.integers(1, 6), split=st.integers(1, 45))
def test_the_inception_score_is_its_definition_and_a_short_chunk_counts_in_full(seed, n, K, split):
    """Catches NaN from a probability of exactly 0, and sums in float32."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(K), n) * (rng.random((n, K)) < 0.7) + 1e-3 * np.eye(K)[[0] * n]
    p /= p.sum(axis=1, keepdims=True)
    for p in (p, p.astype(np.float32)):
        expected = literal.inception_score(p.astype(float), split)
        assert inception_score(p, split) == pytest.approx(expected, rel=1e-9)


def test_a_chunk_is_5000_images_in_the_order_of_the_file():
    """Sorted by class, every chunk scores 1; mixed, the number of classes.  Catches another size
    of a chunk."""
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


def test_a_ball_reaches_to_the_third_neighbour_by_default():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((40, 3)), rng.standard_normal((30, 3)) + 0.5
    expected = literal.precision_recall(real, fake, 3)
    assert expected not in (literal.precision_recall(real, fake, k) for k in (2, 4))
    assert precision_recall(real, fake) == pytest.approx(expected)
    for pair, sizes in (((real[:3], fake), "3 and 30"), ((real, fake[:3]), "40 and 3")):
        with pytest.raises(ValueError, match=f"more than 3 images on both sides, not {sizes}"):
            precision_recall(*pair)


def test_half_precision_rounds_as_tensorflow_does_and_no_distance_is_negative():
    """By hand: near 2057, float16 has steps of 2.  What overflows is computed in float32.  Catches
    rounding in |x|^2 - 2 x y + |y|^2 of equal points, far from zero."""
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 45.26]])
    assert squared_distances(a, b, half=True).item() == 2056
    assert squared_distances(a, b).item() == pytest.approx(9 + 45.26**2)
    far = torch.tensor([[300.3, 0.0]])                           # 300.25 in float16
    assert squared_distances(a, far, half=True).item() == pytest.approx(297.3**2)
    assert squared_distances(a * 1e5, a, half=True).isfinite().all()
    x = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) + 9
    assert ((x * x).sum(1)[:, None] - 2 * x @ x.T + (x * x).sum(1)).min() < 0
    for half in (False, True):
        assert squared_distances(x, x, half).min() == 0


# --- the images of one side, measured -----------------------------------------------------------


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
    take_small_net(monkeypatch.setattr)


def take_small_net(setattr=setattr):
    setattr(fid, "STATISTICS", SIZES)
    setattr(fid, "load_inception", lambda path, any_weights: (SmallNet().eval(), SHA))


def statistics(images):
    """mu, sigma, mu_s, sigma_s of SmallNet's features, by the definitions."""
    pool, spatial, _ = (x.double().numpy() for x in SmallNet()(torch.as_tensor(images)))
    return {"mu": literal.mean(pool), "sigma": literal.covariance(pool),
            "mu_s": literal.mean(spatial), "sigma_s": literal.covariance(spatial)}


def test_the_statistics_of_thousands_of_nearly_equal_images_are_exact(monkeypatch, tmp_path):
    """Catches the cancellation in sum x x^T - n mu mu^T, which leaves negative eigenvalues, and
    rows that a computation in parts leaves out."""
    monkeypatch.setattr(fid, "STATISTICS", SIZES)
    noise = torch.randn(2500, 11, generator=torch.Generator().manual_seed(0)) * 1e-5
    features = (1000 + noise.double()).float()
    side = Side(npz(tmp_path / "images.npz", arr_0=np.zeros((2500, 1, 1, 3), np.uint8)))
    side.measure(lambda images: (features[:, :6], features[:, 6:], features), 2500, "cpu")
    x = features.double().numpy()
    mu, sigma, _, sigma_s = side.statistics.values()
    np.testing.assert_allclose(mu, x[:, :6].mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x[:, :6].T), rtol=1e-9, atol=1e-16)
    np.testing.assert_allclose(sigma_s, np.cov(x[:, 6:].T), rtol=1e-9, atol=1e-16)


# --- the whole command --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Twelve images for reference and ten samples: as folders, as .npz, and as statistics."""
    folder = tmp_path_factory.mktemp("album")
    for name, n, seed in (("reference", 12, 0), ("samples", 10, 11)):
        images = pictures(n, 8, 6, seed)
        save_images(folder / name / "folder" / "within", images)
        (np.savez if name == "samples" else np.savez_compressed)(
            folder / name / "images.npz", images, np.arange(n))         # arr_1: labels, not read
        npz(folder / name / "statistics.npz", **statistics(images), n=n, extractor_sha256=SHA)
        others = pictures(7, 8, 6, seed + 1)                     # as in ADM's files
        npz(folder / name / "both.npz", arr_0=others, **statistics(images))
    return folder


@pytest.fixture
def result_of(monkeypatch, small, tmp_path):
    """Runs `python fid.py words --json FILE`; returns what the file holds."""
    def result_of(*words):
        (tmp_path / "r.json").unlink(missing_ok=True)
        run(monkeypatch, fid, *words, "--json", tmp_path / "r.json")
        return json.loads((tmp_path / "r.json").read_text())

    return result_of


def expected_result(a, b, distance=literal.half_squared_distance):
    """The metrics of two sides of the album by their definitions."""
    stats, outputs = [], []
    for kind, n, seed in ((a, 12, 0), (b, 10, 11)):
        images = pictures(n, 8, 6, seed)
        stats.append(statistics(images))
        if kind == "both.npz":
            images = pictures(7, 8, 6, seed + 1)
        outputs.append(None if kind == "statistics.npz" else
                       [x.double().numpy() for x in SmallNet()(torch.from_numpy(images))])
    found = {metric: literal.frechet(*(side[key] for side in stats for key in keys))
             for metric, keys in (("FID", ("mu", "sigma")), ("sFID", ("mu_s", "sigma_s")))}
    if outputs[1]:
        found["Inception Score"] = literal.inception_score(outputs[1][2], 5000)
    if all(outputs):
        found["Precision"], found["Recall"] = literal.precision_recall(
            *(pool for pool, _, _ in outputs), distance=distance)
    return found


KINDS = "folder", "images.npz", "statistics.npz", "both.npz"


@pytest.mark.parametrize("a, b, dtype", [
    *itertools.product(KINDS, KINDS, ["half"]), ("images.npz", "images.npz", "float")])
def test_the_command_gives_each_metric_by_its_definition(album, result_of, capsys, a, b, dtype):
    """Folder of images, .npz of images, of statistics, or of both, against each, to its JSON.
    Catches a crash after all the work, and statistics or images taken from the wrong side."""
    words = ["--pr-dtype float"] * (dtype == "float")        # on these images it differs from half
    result = result_of(album / "reference" / a, album / "samples" / b, "--batch 5", *words)
    expected = expected_result(a, b, literal.half_squared_distance if dtype == "half" else
                               literal.squared_distance)
    got = {name: result[name] for name in METRICS if name in result}
    assert got == pytest.approx(expected, rel=1e-6)
    assert dtype == "half" or got != pytest.approx(expected_result(a, b), rel=1e-3)
    assert result["n_reference"] == (None if a == "both.npz" else 12)
    assert result["n_samples"] == (None if b == "both.npz" else 10)
    assert result["extractor_sha256"] == SHA and result["pr_dtype"] == dtype
    assert result["torch"] == torch.__version__
    printed, caveats = capsys.readouterr().out, result["caveats"]
    for name, value in expected.items():
        assert re.search(f"\n{name}: +{re.escape(f'{value:.6g}')}\n", printed)
    for side, kind in (("reference", a), ("samples", b)):
        for line in (f"{side}: the file of statistics does not name its network",
                     f"{side}: statistics of an unknown number of images"):
            assert (line in caveats) == (kind == "both.npz")
    assert printed.count("caveat: ") == len(caveats)
    for line, holds in (
            ("statistics without images: no precision, no recall", "statistics.npz" in (a, b)),
            ("precision and recall are in float32, ADM's are in float16", dtype == "float")):
        assert (line in caveats) == holds


@pytest.mark.parametrize("kind", KINDS)
def test_saved_statistics_are_those_of_the_reference(monkeypatch, album, small, tmp_path, kind):
    """The keys are ADM's.  Catches a number of images or a network made up for a file that does not
    say them, and the statistics of the samples."""
    known = {"n": 0, "extractor_sha256": ""} if kind == "both.npz" else {
        "n": 12, "extractor_sha256": SHA}
    for name, samples in (("alone", ""), ("compared", album / "samples" / "folder")):
        path = tmp_path / f"{name}.npz"
        run(monkeypatch, fid, album / "reference" / kind, samples, "--save-stats", path)
        with np.load(path) as file:
            found = dict(file)
        for key, value in statistics(pictures(12, 8, 6, 0)).items():
            np.testing.assert_allclose(found.pop(key), value, rtol=1e-9, atol=1e-9)
        assert {key: value.item() for key, value in found.items()} == known
        read = Side(path)
        assert (read.n or 0, read.extractor or "") == (*known.values(),) and read.n != 0


def test_statistics_of_another_network_are_refused(monkeypatch, album, result_of, tmp_path):
    """Against images, against other statistics, and beside images in one file."""
    stats, images = statistics(pictures(12, 8, 6)), pictures(7, 8, 6)
    other = npz(tmp_path / "other.npz", **stats, n=12, extractor_sha256="f" * 64)
    both = npz(tmp_path / "both.npz", **stats, arr_0=images, extractor_sha256="f" * 64)
    nameless = npz(tmp_path / "nameless.npz", **stats, n=12)
    for path, words in ((other, (other, album / "samples" / "folder")),
                        (other, (album / "reference" / "statistics.npz", other)),
                        (both, (nameless, both))):
        line = error_line(monkeypatch, fid, *words)
        assert "features of different networks" in line
        assert f"{path} with ffffffffffff..." in line and "with 0123456789ab..." in line
    assert result_of(other, nameless)["extractor_sha256"] == "f" * 64
    result = result_of(nameless, nameless)
    assert result["extractor_sha256"] is None and result["FID"] == pytest.approx(0, abs=1e-6)
    assert "the network's weights are not ADM's" not in result["caveats"]     # nobody knows


def in_short_chunks():
    """The Inception Score now depends on the order of the images."""
    fid.inception_score = partial(inception_score, split=2)
    take_small_net()


def test_three_processes_give_the_numbers_of_one(monkeypatch, album, result_of, tmp_path):
    """Four batches, the last of them short, and two, so that one process has none.  Catches
    features out of order, batches measured twice, and a result that every process prints."""
    npz(tmp_path / "four.npz", arr_0=pictures(4, 8, 6))
    words = tmp_path / "four.npz", album / "samples" / "folder", "--batch 3 --device cpu"
    monkeypatch.setattr(fid, "inception_score", partial(inception_score, split=2))
    expected = result_of(*words)
    first, *others = (rank.end() for rank in run_ranks(
        3, "fid", *words, "--save-stats s.npz --json three.json", cwd=tmp_path,
        first=in_short_chunks))
    code, printed, errors = first
    assert code == 0 and printed.count("\nFID:") == printed.count("wrote s.npz") == 1, errors
    assert [other[:2] for other in others] == [(0, "")] * 2
    assert json.loads((tmp_path / "three.json").read_text()) == expected


@pytest.mark.parametrize("local", (0, 2))
def test_the_process_of_a_node_uses_its_own_gpu_without_tf32(monkeypatch, album, small, local):
    """Catches the rank of the whole job taken as the number of the GPU, TF32 left on, weights that
    every process of a node downloads at once, any weights accepted unasked, and a CPU that
    silently takes the place of the GPU."""
    events, images = [], album / "samples" / "images.npz"
    monkeypatch.setattr(fid, "load_inception", lambda *words: events.append(words) or (
        SmallNet(), SHA))
    monkeypatch.setattr(Side, "measure", lambda self, net, batch, device: events.append(
        (batch, device, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)))
    monkeypatch.setattr(fid.dist, "barrier", lambda: events.append("wait"))
    monkeypatch.setattr(fid.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(fid, "report", lambda *_: pytest.fail("rank 5 reports"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not choice)
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(size))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for name, value in (("RANK", 5), ("LOCAL_RANK", local), ("WORLD_SIZE", 6)):
        monkeypatch.setenv(name, str(value))
    for choice in ("", "--any-weights --device cuda"):       # a GPU that is named is never a CPU
        run(monkeypatch, fid, images, images, "--inception weights --batch 5", choice)
        load, measured = ("weights", bool(choice)), (5, f"cuda:{local}", False, False)
        turns = ["wait", load, "wait"] if local else [load, "wait", "wait"]
        assert events == [*turns, measured, measured]
        events.clear()


# --- what is printed beside the numbers ---------------------------------------------------------


@pytest.mark.parametrize("ending", (".JPG", ".jpeg", ".jfif"))
def test_every_reason_against_a_comparison_is_printed(monkeypatch, album, small, tmp_path, capsys,
                                                      ending):
    for k, image in enumerate(pictures(4, 9, 5)):
        Image.fromarray(image).save(tmp_path / f"{k}{ending}", "JPEG")
    run(monkeypatch, fid, album / "reference" / "images.npz", tmp_path, "--crop 4")
    printed = capsys.readouterr().out
    for line in ("the network's weights are not ADM's", "n = 4 samples, not 50,000",
                 "reference: n = 12 < 2048, the covariance is singular",
                 "samples: n = 4 < 2048, the covariance is singular",
                 "reference and samples differ in size", "--crop 4: images of folders were",
                 "samples are JPEG"):
        assert f"caveat: {line}" in printed
    assert "12 images of 6 x 8\n" in printed and "4 images of 4 x 4\n" in printed
    assert f" {SHA}\n" in printed


def test_a_comparison_like_the_published_ones_has_no_caveat(monkeypatch, result_of, tmp_path):
    """Except that statistics alone, which stand for the images here, give no precision."""
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", SHA)
    for n in (50_000, 49_999, 2048, 2047):
        path = npz(tmp_path / "s.npz", **statistics(pictures(12, 8, 6)), n=n, extractor_sha256=SHA)
        expected = ["statistics without images: no precision, no recall"]
        if n < 50_000:
            expected.insert(0, f"n = {n} samples, not 50,000: FID is larger the fewer there are")
        if n < 2048:
            expected += [f"{side}: n = 2047 < 2048, the covariance is singular"
                         for side in ("reference", "samples")]
        assert result_of(path, path)["caveats"] == expected


def test_samples_sorted_by_class_are_noticed(result_of, album, tmp_path):
    """Their Inception Score is that of chunks of one class; the caveat has that of mixed ones."""
    one, other = pictures(2, 8, 6, seed=3)
    images, rng = np.stack([one, other]).repeat(5000, axis=0), np.random.default_rng(0)
    reference, path = album / "reference" / "statistics.npz", tmp_path / "samples.npz"
    found = result_of(reference, npz(path, arr_0=images), "--batch 5000")
    assert found["Inception Score"] == pytest.approx(1)
    (line,) = (line for line in found["caveats"] if line.startswith("samples seem sorted by class"))
    mixed = result_of(reference, npz(path, arr_0=rng.permutation(images)), "--batch 5000")
    assert float(line.split()[-1]) == pytest.approx(mixed["Inception Score"], rel=0.01)
    assert mixed["Inception Score"] > 1.1 and "sorted" not in str(mixed["caveats"])


# --- bad input ----------------------------------------------------------------------------------


def claim(n, name="arr_0"):
    """Writes an .npz that promises n images and holds four."""
    def write(path):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (n, 2, 2, 3)})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(4 * 12))

    return write


IMAGES, MIXED = pictures(4, 8, 8), [*pictures(3, 8, 9), *pictures(1, 9, 8)]
KIND = "is not an .npz of images or of statistics ("
ARRAYS = [                                   # what an .npz holds, what the error says
    ({"a\nb": IMAGES}, KIND + "neither arr_0 nor mu, but a b)"),
    ({f"{k:0200d}": np.zeros(1) for k in range(300)}, KIND + "neither arr_0 nor mu, but 000"),
    (dict(arr_0=IMAGES / 255), "arr_0 has 6144 bytes, float64 (4, 8, 8, 3), fortran_order=False; "
                               "images are uint8 (N, H, W, 3), in C's order"),
    (dict(arr_0=IMAGES[..., :1]), "uint8 (4, 8, 8, 1), fortran_order=False; images are uint8"),
    (dict(arr_0=IMAGES[:0]), "uint8 (0, 8, 8, 3), fortran_order=False; images are uint8"),
    (dict(arr_0=IMAGES[0]), "uint8 (8, 8, 3), fortran_order=False; images are uint8"),
    (dict(arr_0=np.asfortranarray(IMAGES)), "uint8 (4, 8, 8, 3), fortran_order=True; images are"),
    (dict(arr_0=np.array([{}], dtype=object)), "images are uint8 (N, H, W, 3)"),
    (statistics(IMAGES) | dict(arr_0=IMAGES[:3]), "holds 3 images; precision and recall need four"),
    (dict(mu=np.zeros(6)), KIND + "statistics of shapes {'mu': (6,)}, not "),
    *[(statistics(IMAGES) | change, f"{KIND}{message}") for change, message in (
        (dict(mu=np.zeros(3)), "statistics of shapes {'mu': (3,)"),
        (dict(n="many"), "invalid literal"),
        (dict(sigma=1j * np.eye(6)), "Cannot cast"),
        (dict(sigma=np.triu(np.ones((6, 6)))), "the covariance is not symmetric)"),
        (dict(sigma_s=-np.eye(5)), "the covariance has a negative eigenvalue)"))],
]


@pytest.mark.parametrize("write, message", [
    (lambda path: None, "no file or folder at '"),
    (Path.mkdir, "holds 0 images; precision and recall need four"),
    (lambda path: [(path / name).mkdir(parents=True) for name in ("val", "train")],
     "holds train and val; give one of them"),
    (lambda path: save_images(path, IMAGES[:3]),
     "holds 3 images; precision and recall need four, a comparison 50,000"),
    (lambda path: save_images(path, MIXED),
     "have different sizes, 8 x 9 and 9 x 8; --crop SIZE makes them equal"),
    (lambda path: [save_images(path, IMAGES), (path / "00.png").write_bytes(b"no image")],
     "00.png: unreadable image"),
    (lambda path: path.write_text("hello"), KIND),
    (lambda path: np.save(path.open("wb"), IMAGES), KIND),
    (claim(5), "arr_0 has 48 bytes, uint8 (5, 2, 2, 3)"),
    (claim(10**30), "arr_0 has 48 bytes, uint8 (1000000"),
    *[(partial(npz, **arrays), message) for arrays, message in ARRAYS],
])
def test_bad_input_is_one_line_that_names_it(monkeypatch, album, small, tmp_path, write, message):
    write(tmp_path / "bad.npz")
    for sides in ((tmp_path / "bad.npz", album / "samples" / "images.npz"),
                  (album / "reference" / "statistics.npz", tmp_path / "bad.npz")):
        line = error_line(monkeypatch, fid, *sides)
        assert message in line and str(tmp_path / "bad.npz") in line


@pytest.mark.parametrize("words, message", [
    ("", "the following arguments are required: REFERENCE"),
    ("STATS", "SAMPLES is missing; without it, only --save-stats has something to do"),
    ("STATS --save-stats s.npz --json r.json", "SAMPLES is missing"),
    ("STATS STATS --save-stats x --json x", "--save-stats and --json are both 'x'; give two names"),
    ("STATS STATS --batch 0", "--batch and --crop must be at least 1"),
    ("STATS STATS --crop 0", "--batch and --crop must be at least 1"),
    ("STATS STATS --crop 8", "--crop 8 is for folders of images, and there is none"),
    ("STATS STATS --device foo", "--device foo ("),
    ("STATS STATS --device meta", "--device meta ("),
    # an unset $VARIABLE is neither the current folder nor an option that was not given
    ("'' STATS", "no file or folder at ''"),
    ("STATS ''", "no file or folder at ''"),
])
def test_an_option_that_cannot_act_is_refused_before_any_work(monkeypatch, album, small, tmp_path,
                                                              capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Side, "measure", lambda *_: pytest.fail("it started to work"))
    words = words.replace("STATS", f"{album / 'reference' / 'statistics.npz'}")
    with pytest.raises((ValueError, OSError, SystemExit)) as ended:
        run(monkeypatch, fid, words)
    line = capsys.readouterr().err if ended.type is SystemExit else str(ended.value)
    assert message in line.splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ("--save-stats", "--json"))
def test_no_file_is_replaced(monkeypatch, album, tmp_path, option):
    """Catches `--save-stats a.npz b.npz`, where the file's name was forgotten: the archive of
    images a.npz became statistics."""
    monkeypatch.setattr(Side, "measure", lambda *_: pytest.fail("it started to work"))
    (tmp_path / "old").write_bytes(b"old")
    for path in (tmp_path / "old", tmp_path, tmp_path / "nowhere" / "new", ""):
        line = error_line(monkeypatch, fid, album / "reference" / "folder",
                          album / "reference" / "both.npz", option, path or "''")
        assert f"{option} '{path}' exists, or its folder does not; choose another name" in line
    assert (tmp_path / "old").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_nothing_is_left_of_a_result_that_could_not_be_written(monkeypatch, album, small, tmp_path,
                                                               capsys):
    """Catches half a file under the final name after a full disk."""
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    stats = album / "reference" / "statistics.npz"
    line = error_line(monkeypatch, fid, stats, stats, "--save-stats", tmp_path / "s.npz")
    assert "No space left" in line and not list(tmp_path.iterdir())
    assert "FID:" in capsys.readouterr().out                 # what was measured is not lost


def npz_bytes(**arrays):
    return npz(io.BytesIO(), **arrays).getvalue()


GOOD = (npz_bytes(arr_0=pictures(4, 4, 4)),
        npz_bytes(**statistics(pictures(9, 4, 4)), n=9, extractor_sha256=SHA))


@settings(max_examples=150)
@given(data=st.sampled_from(GOOD).flatmap(damaged))
def test_any_bytes_are_images_or_statistics_or_end_in_one_line(tmp_path_factory, data):
    """Catches whatever numpy and zipfile raise for a damaged file, at once or while reading."""
    path = tmp_path_factory.getbasetemp() / "any.npz"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "STATISTICS", SIZES)
        try:
            side = Side(path)
            for start in range(0, side.count, 2):
                assert side.read(start, start + 2).shape == (2, *side.size, 3)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


SHELL = """
import os, runpy, sys, torch
for words in sys.argv[1:]:
    if not (child := os.fork()):                             # which imports torch no more
        sys.argv[1:] = words.split()
        runpy.run_path("fid.py", run_name="__main__")
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_the_file_alone_works_and_ends_in_one_line_in_the_shell(weights, net, tmp_path):
    """Copied to an empty folder, as it needs nothing else of this repository.  Catches a traceback
    where memory runs out, another answer for a name with "memory" in it, and "'charmap' codec can't
    encode" for a name whose letters the console lacks."""
    shutil.copy(ROOT / "fid.py", tmp_path)
    images = pictures(4, 24, 32)
    npz(tmp_path / "images.npz", arr_0=images)
    np.savez_compressed(tmp_path / "many.npz", arr_0=np.zeros((20_000, 1, 1, 3), np.uint8))
    claim(10**12, "mu")(tmp_path / "claim.npz")
    inception = f"--inception {weights} --any-weights --device cpu"
    done = subprocess.run(
        [sys.executable, "-c", SHELL, f"images.npz --save-stats s.npz {inception}", "memory犬 x",
         f"many.npz many.npz --batch 20000 {inception}", "claim.npz claim.npz"], cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"}, text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30)))
    no_memory = "fid.py: error: out of memory; a smaller --batch needs less"
    errors = [line for line in done.stderr.splitlines() if line.startswith("fid.py: error")]
    assert errors == ["fid.py: error: no file or folder at 'memory?'", no_memory, no_memory]
    assert "Traceback" not in done.stderr
    assert re.findall(r"exit code (\d)", done.stdout) == [*"0111"]
    assert "wrote s.npz: statistics of images.npz: 4 images of 32 x 24" in done.stdout
    pool, spatial, _ = (x.double().numpy() for x in net(torch.from_numpy(images)))
    with np.load(tmp_path / "s.npz") as file:
        for key, x in (("", pool), ("_s", spatial)):
            np.testing.assert_allclose(file[f"mu{key}"], x.mean(axis=0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(file[f"sigma{key}"], np.cov(x.T), rtol=1e-3, atol=1e-5)
        assert file["n"] == 4
        assert file["extractor_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
