"""
Fig. 3: does a DiT without a head learn a single image?

The photo is Grace Hopper's (public domain, in matplotlib).  We report the PSNR of four samples
against it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cbook import get_sample_data

from fid import read_image

SIZE = 96
PHOTO = read_image(get_sample_data("grace_hopper.jpg", asfileobj=False), SIZE)
TRAINING = dict(batch_size=4, micro_batch=4, label_dropout=0.0)


def psnr(images, truth):
    """Peak signal to noise ratio, dB, mean over the images (n, H, W, 3)."""
    errors = ((images.astype(float) - truth) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / errors)).mean())


def measure(lab, model, net):
    """The PSNR; the first sample is kept for draw()."""
    images = lab.sample(net, 4)
    head = "no head" if model.config.head == "none" else "U-Net"
    width = "wide" if model.config.hidden_size > 3 * model.config.patch_size**2 else "narrow"
    plt.imsave(Path(lab.options.runs, f"{head}, {width}.png"), images[0])
    return dict(psnr=psnr(images, PHOTO))


def draw(runs):
    """The photo and the samples that measure() kept, with crops; None without any."""
    samples = {path.stem: plt.imread(path) for path in sorted(Path(runs).glob("*, *.png"))}
    if samples:
        figure, panels = plt.subplots(2, 5, figsize=(10, 4.3), layout="constrained")
        for line, crop in zip(panels, (slice(None), (slice(4, 36), slice(32, 64)))):
            for axes, (name, image) in zip(line, ({"the photo": PHOTO} | samples).items()):
                axes.imshow(image[crop], interpolation="nearest")
                axes.set_title(name, size=10)
                axes.set_axis_off()
        return figure
