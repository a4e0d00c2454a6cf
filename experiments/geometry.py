"""
Does the head help in the paper's geometry: 256 tokens, each 1.5 times as wide as its patch?

Photos of 64 x 64 in patches of 4 x 4 (48 dimensions), tokens of 72, a U-Net head with 32 channels
at its bottleneck: N = 256, D / (3 P^2) = 1.5 and 2/3, as in DiP-XL/16.
"""

import matplotlib.pyplot as plt

from experiments.crossover import SMALL_UNET
from experiments.models import WIDE, Model
from experiments.report import Claim, plot_by_t, plot_samples

BASE = WIDE.replace(image_size=64, patch_size=4, hidden_size=72, num_heads=3)
SMALL = dict(batch_size=8, micro_batch=8)
MODELS = {"64 x 64 photos": {"none": Model(BASE, 6e-3, "photos", training=SMALL),
                             "unet": Model(BASE.replace(**SMALL_UNET), 3e-3, "photos",
                                           training=SMALL)}}
MARKS = 2000, 10_000
CLAIMS = [Claim("the U-Net head is better than none", "unet", "none",
                ("frechet", "loss", "detail", "high", "seam"), "Table 2", "FID 2.16 against 5.28")]


def draw(results, lab):
    """Loss by t over that of no head, and samples."""
    (group, models), = MODELS.items()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained",
                                         width_ratios=(1, 1.6))
    plot_by_t(left, results, "none", group, MARKS[-1])
    left.legend(fontsize=8)
    plot_samples(right, lab, models, MARKS[-1])
    return figure
