"""
Do FID and sFID grow with the damage done to images, even without trained weights?

    python -m experiments.distortions --data PHOTOS
    python -m experiments.distortions --data PHOTOS --inception pt_inception-2015-12-05-6726825d.pth

The photos are the reference; the samples are the same photos with noise, blur or JPEG compression
of growing strength.  Without --inception the network's weights are random: distances say less then,
but resizing, features, statistics and distances are the same.  Draws assets/distortions.png.
"""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

import fid
from sample import at_least, option, parse_options, run_main, save_atomically, start_processes


def noise(image, sigma):
    """Normal, of that many levels."""
    pixels = np.asarray(image, dtype=np.float32)
    drawn = np.random.default_rng(0).standard_normal(pixels.shape) * sigma
    return Image.fromarray((pixels + drawn).round().clip(0, 255).astype(np.uint8))


def blur(image, radius):
    """Gaussian, of that many pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def jpeg(image, loss):
    """Quality 100 - loss."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=100 - loss)
    return Image.open(file)


DISTORTIONS = {    # name of the strength, the strengths
    noise: ("standard deviation, levels", (5, 10, 20, 40, 80)),
    blur: ("radius, pixels", (0.5, 1, 2, 4, 8)),
    jpeg: ("100 - quality", (20, 50, 70, 85, 95)),
}


def random_weights(images, seed=0):
    """A state dict of fid.InceptionV3: He-normal, with batch norms that have seen the images
    (uint8 (B, H, W, 3)), and a bias in the last layer, which ADM's evaluator does not use."""
    torch.manual_seed(seed)
    net = fid.InceptionV3()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = None
    torch.nn.init.normal_(net.fc.weight, 0, 0.05)
    torch.nn.init.normal_(net.fc.bias)
    with torch.no_grad():
        net.train()(images)
    return {key: x for key, x in net.state_dict().items() if "num_batches_tracked" not in key}


@dataclass
class Options:
    data: str | None = option(None, "folder of photos", metavar="DIR")
    num: int = option(150, "photos")
    size: int = option(128, "pixels they are cropped to")
    inception: str | None = option(None, "the network's weights [random]", metavar="FILE")
    out: str = option("assets/distortions.png", "picture to write", metavar="FILE")


def measured(images, net, device):
    """The images, saved as a folder of PNGs and seen by the network: a fid.Side."""
    with tempfile.TemporaryDirectory() as folder:
        for k, image in enumerate(images):
            image.convert("RGB").save(Path(folder, f"{k:05d}.png"))
        side = fid.Side(folder)
        side.measure(net, 50, device)
    return side


def draw(result, n, size, weights):
    """One panel a distortion, both distances over strength; returns the figure."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, len(result), figsize=(9, 3), sharey=True, layout="constrained")
    for axes, (distort, points) in zip(panels, result.items()):
        name, strengths = DISTORTIONS[distort]
        places = range(len(points))
        for metric, colour, marker in (("FID", "#0072B2", "o"), ("sFID", "#D55E00", "s")):
            values = [point[metric] for point in points]
            axes.plot(places, values, color=colour, marker=marker, label=metric)
        axes.set(title=distort.__name__, xlabel=name, yscale="log")
        axes.set_xticks(places, strengths)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance to the photos")
    panels[0].legend()
    figure.suptitle(f"{n} photos of {size} x {size}, {weights} weights", size=10)
    return figure


def main():
    options = parse_options(Options, __doc__)
    at_least(4, num=options.num)
    at_least(16, size=options.size)
    if options.data is None:
        raise ValueError("--data DIR is needed: a folder of photos")
    files = fid.FolderImages(options.data, options.size)
    chosen = np.random.default_rng(0).permutation(len(files))[:options.num]
    photos = [Image.fromarray(files.read(files.files[k])) for k in tqdm(chosen, "reading")]
    device = start_processes().device
    if options.inception:
        net = fid.load_inception(options.inception)[0]
    else:
        net = fid.InceptionV3().eval().requires_grad_(False)
        first = torch.from_numpy(np.stack([np.asarray(photo) for photo in photos[:16]]))
        net.load_state_dict(random_weights(first))
    net = net.to(device)
    reference = measured(photos, net, device)
    result = {}
    for distort, (name, strengths) in DISTORTIONS.items():
        sides = (measured([distort(photo, s) for photo in photos], net, device) for s in strengths)
        result[distort] = [fid.compare(reference, side) for side in sides]
        for metric in ("FID", "sFID"):
            values = ", ".join(f"{point[metric]:.4g}" for point in result[distort])
            print(f"{distort.__name__:<6}{metric:<5} at {str(strengths)[1:-1]}: {values}",
                  flush=True)
    weights = "ADM's" if options.inception else "random"
    figure = draw(result, len(photos), options.size, weights)
    save_atomically(options.out, lambda path: figure.savefig(path, format="png", dpi=120))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_main(main)
