"""
How wide, relative to its patch, must a token be for the head to stop helping?

Tokens of D dimensions for patches of 4 x 4, which have 48: D / (3 P^2) from 1/3 to 3.  DiP-XL/16
has 1152 / 768 = 1.5; DiP-XL/32, which the paper uses for 512 x 512, has 1152 / 3072 = 0.375: its
tokens are narrow.  The head has the paper's proportion, 32 channels at the bottleneck for 48
dimensions, at every width; so its part of the FLOPs falls as the tokens grow.
"""

import matplotlib.pyplot as plt

from experiments.models import WIDE, Model
from experiments.report import COLOURS, LABELS, Claim, by_seed, plot_curves

WIDTHS = {16: 1, 36: 3, 48: 3, 72: 3, 144: 6}                # D: attention heads
RATE = 6e-3                                  # the best of three for all ten (learning_rate.py)
SMALL_UNET = dict(head="unet", head_width=16, head_depth=2)
BASE = WIDE.replace(patch_size=4)


def pair(D, heads):
    base = BASE.replace(hidden_size=D, num_heads=heads)
    return {"none": Model(base, RATE), "unet": Model(base.replace(**SMALL_UNET), RATE)}


MODELS = {f"{D} of 48": pair(D, heads) for D, heads in WIDTHS.items()}
MARKS = 1000,
CLAIMS = [Claim("the U-Net head is better than none", "unet", "none", source="Table 2",
                paper="FID 2.16 against 5.28 (1.5)")]


def draw(results, lab):
    """Gain of the head over the ratio: a panel a measure."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.3), sharex=True, layout="constrained")
    for axes, measure, colour in zip(panels, ("loss", "detail", "frechet"), COLOURS):
        gains = {}
        for group, D in zip(MODELS, WIDTHS):
            none, unet = (by_seed(results["rows"], measure, group=group, model=model)
                          for model in ("none", "unet"))
            gains[D / 48] = [100 * (1 - unet[seed] / none[seed])
                             for seed in none.keys() & unet.keys()]
        plot_curves(axes, {measure: gains}, {measure: colour}, "D / (3 P²)")
        axes.axhline(0, color="black", linewidth=1)
        for ratio, name in ((0.375, "DiP-XL/32"), (1.5, "DiP-XL/16")):
            axes.axvline(ratio, color="grey", linestyle=":")
            axes.text(ratio, 1.01, name, transform=axes.get_xaxis_transform(), size=8, ha="center",
                      color="grey")
        axes.set_title(LABELS[measure], size=10, pad=16)
    panels[0].set_ylabel("gain of the head, %")
    return figure
