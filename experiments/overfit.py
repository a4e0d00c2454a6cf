"""
Fig. 3: does a DiT-only learn a single image?

The photo is Grace Hopper's (public domain, in matplotlib).  PSNR: of four samples against it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cbook import get_sample_data

from experiments.lab import OneClass
from fid import read_image

SIZE = 96
PHOTO = read_image(get_sample_data("grace_hopper.jpg", asfileobj=False), SIZE)
TRAINING = dict(batch_size=4, micro_batch=4, label_dropout=0.0)


class OnePhoto(OneClass):
    """A data set of one image."""

    def __getitem__(self, index):
        return PHOTO, 0


def psnr(images, truth):
    """Peak signal to noise ratio, dB, mean over the images (n, H, W, 3)."""
    errors = ((images.astype(float) - truth) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / errors)).mean())


def measure(lab, name, model, net):
    """The PSNR; the first sample is kept for draw()."""
    images = lab.sample(net, 4)
    words = "wide" if model.config.hidden_size > 192 else "narrow"
    plt.imsave(f"{lab.options.runs}/photo, {name}, {words}.png", images[0])
    return dict(psnr=psnr(images, PHOTO))


def draw(runs):
    """The photo and the samples that measure() kept, with crops."""
    samples = {path.stem[7:]: plt.imread(path)
               for path in sorted(Path(runs).glob("photo, *.png"))}
    figure, panels = plt.subplots(2, 1 + len(samples), figsize=(10, 4.3), layout="constrained")
    for (upper, lower), (name, image) in zip(panels.T, ({"the photo": PHOTO} | samples).items()):
        upper.imshow(image, interpolation="nearest")
        lower.imshow(image[4:36, 32:64], interpolation="nearest")
        upper.set_title(name, size=10)
        for axes in (upper, lower):
            axes.set_axis_off()
    return figure
