"""
How the U-Net head is initialised decides early training: pooling, last layer, and kind of weights.

    python -m experiments.head_init          # embedded shapes
    python -m experiments.head_init --data IMAGES   # an image folder with train/ and val/

Small models (patch 8, D = 128, 6 blocks) are trained alike from three seeds; printed is the flow
matching loss of the last weights on the same validation images and noise, mean and range.
"""

import statistics
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dip import DiP, DiPConfig, flow_matching_loss, logit_normal_time
from sample import option, parse_options, run_main
from train import Examples, mean_losses, open_data, positions, validate

BASE = DiPConfig(
    image_size=32,
    patch_size=8,
    hidden_size=128,
    depth=6,
    num_heads=4,
    num_classes=10,
    head_width=16,
    head_depth=3,
)


def head_with(pool, zero_last=False, redraw=False):
    """A change to a fresh model: its pooling, its last layer zeroed, its convolutions drawn anew
    as PyTorch does by default."""
    def change(model):
        head = model.last.head
        head.pool = pool(2)
        if redraw:
            for module in head.modules():
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()
        if zero_last:
            nn.init.zeros_(head.out.weight)
    return change


VARIANTS = {
    "max pooling, He everywhere": (BASE, head_with(nn.MaxPool2d)),
    "average pooling, He everywhere": (BASE, head_with(nn.AvgPool2d)),
    "max pooling, He, last layer 0": (BASE, head_with(nn.MaxPool2d, zero_last=True)),
    "average pooling, He, last layer 0": (BASE, head_with(nn.AvgPool2d, zero_last=True)),
    "max pooling, PyTorch's default": (BASE, head_with(nn.MaxPool2d, redraw=True)),
    "max pooling, He, predicts x": (BASE.replace(prediction="x"), head_with(nn.MaxPool2d)),
    "no head (DiT-only)": (BASE.replace(head="none"), lambda model: None),
}


@dataclass
class Options:
    data: str | None = option(None, "image folder with train/ and val/ [embedded]", metavar="DIR")
    steps: int = option(500, "updates of 32 images")
    lr: float = option(5e-4, "AdamW's learning rate")
    seeds: int = option(3, "runs of each variant")


def final_loss(config, change, data, val_data, options, seed):
    torch.manual_seed(seed)
    model = DiP(config)
    change(model)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0)
    batches = DataLoader(Examples(data, seed),
                         batch_sampler=list(positions(0, options.steps, 32, 32, 0, 1)))
    for x_0, y, noise, z, _ in tqdm(batches, leave=False, unit="step"):
        flow_matching_loss(model, x_0, y, logit_normal_time(z), noise)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses = validate(model, Examples(val_data, 0, "val"), torch.device("cpu"))
    return mean_losses(losses)["loss"]


def main():
    options = parse_options(Options, __doc__)
    data, val_data = open_data(options.data, BASE.image_size)
    if val_data is None:
        raise ValueError(f"--data {options.data} has no val/ with the classes of its train/")
    print(f"{options.data or 'embedded shapes'} at 32 x 32, {options.steps} steps of 32, "
          f"lr {options.lr:g}, {options.seeds} seeds; validation loss, "
          f"n = {min(500, len(val_data))}", flush=True)
    for name, (config, change) in VARIANTS.items():
        config = config.replace(num_classes=len(data.classes))
        losses = [final_loss(config, change, data, val_data, options, seed)
                  for seed in range(options.seeds)]
        print(f"{name:<34} {statistics.mean(losses):.4f}   "
              f"({min(losses):.4f} to {max(losses):.4f})", flush=True)


if __name__ == "__main__":
    run_main(main)
