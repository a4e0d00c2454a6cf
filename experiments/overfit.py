"""
Fig. 3: can a DiT on large patches learn a single detailed image by heart?  Can a DiP?

    python -m experiments.overfit               # a photo that comes with matplotlib
    python -m experiments.overfit --data PHOTO

Models are trained on nothing but one image of 96 x 96 (144 patches of 8 x 8), and draw it from
noise.  PSNR: of four such drawings against the image.  Error of detail: power of the difference
over power of the image, both in the upper half of the frequencies; an image without any detail has
1, one with detail that is wrong has more.
"""

import json
from dataclasses import dataclass
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from experiments import harness
from experiments.harness import (COLOURS, REGIMES, SAMPLING, Claim, RunOptions, better, conduct,
                                 write_json)
from fid import read_image
from sample import generate, option, run_main, to_uint8

DATA, SIZE, STEPS, LOOKS = "one photo", 96, 800, 8
TRAINING = dict(batch_size=4, micro_batch=4, label_dropout=0.0)
MODELS = {"DiT-only": dict(head="none", head_width=0, head_depth=0), "DiP": {}}


@dataclass
class Options(RunOptions):
    data: str | None = option(None, "a photo [one that comes with matplotlib]", metavar="PHOTO")


class OneImage:
    """A data set of one image."""

    classes = names = ["the image"]
    flip = False
    bad = torch.zeros(1, dtype=torch.bool)

    def __init__(self, path):
        self.image = read_image(path or matplotlib.cbook.get_sample_data(
            "grace_hopper.jpg", asfileobj=False), SIZE)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.image, 0


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


def look(out, step, ema, data, val_data, options, signals):
    """Draw the image four times; note how well."""
    images = to_uint8(generate(ema, [0] * 4, range(4), options.seed, **SAMPLING))
    write_json(out / f"look-{step:08d}.json", dict(
        step=step, psnr=psnr(images, data.image), detail=error_of_detail(images, data.image),
        image=images[0].tolist()))


def measure(lab):
    data, rows, pictures = OneImage(lab.options.data), [], {}
    steps = lab.steps(STEPS)
    for regime, base in REGIMES.items():
        for name, change in MODELS.items():
            config = base.replace(image_size=SIZE, num_classes=1, **change)
            for seed in lab.seeds:
                _, clock, out = lab.train(
                    config, seed, steps, data=data, look=look, every=max(1, steps // LOOKS),
                    **TRAINING)
                looks = [json.loads(p.read_text()) for p in sorted(out.glob("look-*.json"))]
                images = [x.pop("image") for x in looks]
                rows.append(dict(regime=regime, model=name, seed=seed, looks=looks, **clock,
                                 **looks[-1]))
                print({key: x for key, x in rows[-1].items() if key != "looks"}, flush=True)
                if seed == 0:
                    pictures[f"{name}, {regime}"] = np.array(images[-1], dtype=np.uint8)
    lab.pictures = data.image, pictures
    return dict(size=SIZE, training=harness.TRAINING | TRAINING, rows=rows)


def claims(results):
    found = []
    for regime in REGIMES:
        ours, verdict = better(results["rows"], "DiP", "DiT-only", ("psnr", "detail"),
                               regime=regime)
        found.append(Claim("a DiP learns more of the detail of a single image than a DiT-only",
                           f"{regime}, {results['setting']}", "Fig. 3", "a picture", ours, verdict))
    return found


def draw(results, lab):
    """The image and what was learned of it, with crops; PSNR and error over steps."""
    truth, pictures = lab.pictures
    figure = plt.figure(figsize=(10, 6.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.55, 1))
    panels = upper.subplots(2, 5)
    corner = slice(4, 36), slice(32, 64)                     # of the crop
    for column, (name, image) in zip(panels.T, {"the image": truth, **pictures}.items()):
        column[0].imshow(image, interpolation="nearest")
        column[1].imshow(image[corner], interpolation="nearest")
        column[0].set_title(name, size=10)
        for axes in column:
            axes.set_axis_off()
    for axes, measure, label in zip(lower.subplots(1, 2), ("psnr", "detail"),
                                    ("PSNR, dB", "error of detail")):
        for k, (name, regime) in enumerate(dict.fromkeys(
                (row["model"], row["regime"]) for row in results["rows"])):
            for row in results["rows"]:
                if (row["model"], row["regime"]) == (name, regime):
                    axes.plot([x["step"] for x in row["looks"]],
                              [x[measure] for x in row["looks"]], color=COLOURS[k], alpha=0.7,
                              label=f"{name}, {regime}" if row["seed"] == 0 else None)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


main = partial(conduct, "overfit")

if __name__ == "__main__":
    run_main(main)
