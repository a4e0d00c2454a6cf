"""
Fig. 3: can a DiT on large patches learn a single detailed image by heart?  Can a DiP?

Models are trained on nothing but one photo of 96 x 96 (144 patches of 8 x 8; it comes with
matplotlib), and draw it from noise.  PSNR: of four such drawings against the photo.  Error of
detail: power of the difference over power of the photo, both in the upper half of the frequencies;
an image without any detail has 1, one with detail that is wrong has more.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from experiments.lab import NARROW, UNET, WIDE, Model
from experiments.report import Claim
from fid import read_image

SIZE = 96


class OnePhoto:
    """A data set of one image."""

    classes = names = ["the photo"]
    flip = False
    bad = torch.zeros(1, dtype=torch.bool)

    def __init__(self):
        path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        self.image = read_image(path, SIZE)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.image, 0


def models(base):
    base = base.replace(image_size=SIZE, num_classes=1)
    training = dict(batch_size=4, micro_batch=4, label_dropout=0.0)
    return {name: Model(config, data=OnePhoto(), training=training)
            for name, config in (("DiT-only", base), ("DiP", base.replace(**UNET)))}


MODELS = {"narrow, one photo": models(NARROW), "wide, one photo": models(WIDE)}
MARKS = 500, 1000
CLAIMS = [Claim("a DiP learns more of a single image than a DiT-only", "DiP", "DiT-only",
                ("psnr", "error"), "Fig. 3", "a picture")]


def psnr(images, truth):
    """Peak signal to noise ratio, dB, mean over the images (n, H, W, 3)."""
    errors = ((images.astype(float) - truth) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / errors)).mean())


def error_of_detail(images, truth):
    """Power of the error over that of the truth, in all frequencies above H/4 cycles an image."""
    H, W = truth.shape[:2]
    detail = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)) > 1 / 4     # cycles a pixel

    def power(x):
        return (np.abs(np.fft.fft2(x, axes=(-3, -2))) ** 2)[..., detail, :].sum(axis=(-2, -1))

    return float(power(images.astype(float) - truth).mean() / power(truth.astype(float)))


def measure(lab, name, model, net, out):
    images, truth = lab.sample(net, 4), model.data.image
    return dict(psnr=psnr(images, truth), error=error_of_detail(images, truth))


def draw(results, lab):
    """The photo and what was learned of it, with crops."""
    images = {f"{name}, {group.split(',')[0]}": lab.sample(lab.train(model, 0, MARKS[-1])[0], 1)[0]
              for group, models in MODELS.items() for name, model in models.items()}
    figure, panels = plt.subplots(2, 5, figsize=(10, 4.3), layout="constrained")
    corner = slice(4, 36), slice(32, 64)                     # of the crop
    for column, (name, image) in zip(panels.T, {"the photo": OnePhoto().image, **images}.items()):
        column[0].imshow(image, interpolation="nearest")
        column[1].imshow(image[corner], interpolation="nearest")
        column[0].set_title(name, size=10)
        for axes in column:
            axes.set_axis_off()
    return figure
