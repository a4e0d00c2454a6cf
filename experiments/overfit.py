"""
Fig. 3: can a DiT on large patches learn a single detailed image by heart?  Can a DiP?

Models are trained on nothing but one photo of 96 x 96 (144 patches of 8 x 8; it comes with
matplotlib), and draw it from noise.  PSNR: of four such drawings against the photo.  Error of
detail: power of the difference over power of the photo, both in the upper half of the frequencies;
an image without any detail has 1, one with detail that is wrong has more.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cbook import get_sample_data

from experiments.models import NARROW, UNET, WIDE, Model, OneClass
from experiments.report import Claim
from fid import read_image

SIZE = 96
PHOTO = read_image(get_sample_data("grace_hopper.jpg", asfileobj=False), SIZE)


class OnePhoto(OneClass):
    """A data set of one image."""

    def __getitem__(self, index):
        return PHOTO, 0


def models(base):
    base = base.replace(image_size=SIZE, num_classes=1)
    training = dict(batch_size=4, micro_batch=4, label_dropout=0.0)
    return {name: Model(config, data=OnePhoto(1), training=training)
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


def measure(lab, name, model, net):
    images = lab.sample(net, 4)
    return dict(psnr=psnr(images, PHOTO), error=error_of_detail(images, PHOTO))


def draw(results, lab):
    """The photo and what was learned of it, with crops."""
    images = {"the photo": PHOTO}
    for group, models in MODELS.items():
        for name, model in models.items():
            net, _ = lab.train(model, 0, MARKS[-1])
            images[f"{name}, {group.split(',')[0]}"] = lab.sample(net, 1)[0]
    figure, panels = plt.subplots(2, 5, figsize=(10, 4.3), layout="constrained")
    crop = slice(4, 36), slice(32, 64)
    for column, (name, image) in zip(panels.T, images.items()):
        column[0].imshow(image, interpolation="nearest")
        column[1].imshow(image[crop], interpolation="nearest")
        column[0].set_title(name, size=10)
        for axes in column:
            axes.set_axis_off()
    return figure
