"""
How the U-Net head is initialised: pooling, last layer, and kind of weights.

    python -m experiments.head_init     # embedded shapes

The same models from the same seeds, except the weights that the head begins with (and its
pooling).  Ours: He-normal everywhere, the last layer too, max pooling.
"""

from functools import partial

import torch.nn as nn

from dip import DiP
from experiments.harness import REGIMES, Claim, better, conduct, draw_dots
from sample import run_main


class AveragePooling(DiP):
    def __init__(self, config):
        super().__init__(config)
        self.output.head.pool = nn.AvgPool2d(2)


class LastLayerZero(DiP):
    def initialize_weights(self):
        super().initialize_weights()
        nn.init.zeros_(self.output.head.out.weight)
        nn.init.zeros_(self.output.head.out.bias)


class PyTorchDefault(DiP):
    def initialize_weights(self):
        super().initialize_weights()
        for module in self.output.head.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.reset_parameters()


class PyTorchDefaultLastLayerZero(LastLayerZero, PyTorchDefault):
    """PyTorch's default first, then the zeros."""


VARIANTS = {"He-normal (ours)": DiP, "He-normal, average pooling": AveragePooling,
            "He-normal, last layer 0": LastLayerZero, "PyTorch's default": PyTorchDefault,
            "PyTorch's default, last layer 0": PyTorchDefaultLastLayerZero}


def measure(lab):
    rows = lab.rows({"no head": REGIMES["narrow"].replace(head="none", head_width=0, head_depth=0)})
    for name, build in VARIANTS.items():
        rows += lab.rows({name: REGIMES["narrow"]}, build)
    return dict(rows=rows)


def claims(results):
    rows, ours, found = results["rows"], "He-normal (ours)", []
    for claim, a, b in (
        ("He-normal weights are better than PyTorch's default", ours, "PyTorch's default"),
        ("a last layer that starts He-normal is better than one that starts at 0", ours,
         "He-normal, last layer 0"),
        ("max pooling is better than average pooling", ours, "He-normal, average pooling"),
        ("PyTorch's default with a last layer of 0 is still better than no head",
         "PyTorch's default, last layer 0", "no head"),
    ):
        text, verdict = better(rows, a, b)
        found.append(Claim(f"U-Net head: {claim}", f"narrow, {results['setting']}", "-", "-",
                           text, verdict))
    return found


def draw(results, lab):
    return draw_dots(results)


main = partial(conduct, "head_init")

if __name__ == "__main__":
    run_main(main)
