"""
How should the U-Net head be initialised?

The same models from the same seeds, except the weights that the head begins with, or its pooling.
Ours: He normal, the last layer too, transposed convolutions as nearest upsampling, max pooling.
"""

import torch.nn as nn

from dip import DiP
from experiments.models import UNET, Model, in_regimes
from experiments.report import Claim


class AveragePooling(DiP):
    def __init__(self, config):
        super().__init__(config)
        self.output.head.pool = nn.AvgPool2d(2)


class LastLayerZero(DiP):
    def initialize_weights(self):
        super().initialize_weights()
        nn.init.zeros_(self.output.head.out.weight)
        nn.init.zeros_(self.output.head.out.bias)


class RandomUpsampling(DiP):
    def initialize_weights(self):
        super().initialize_weights()
        for layer in self.output.head.up:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


class PyTorchDefault(DiP):
    def initialize_weights(self):
        super().initialize_weights()
        for module in self.output.head.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.reset_parameters()


VARIANTS = {"ours": DiP, "average pooling": AveragePooling, "last layer 0": LastLayerZero,
            "random upsampling": RandomUpsampling, "PyTorch's default": PyTorchDefault}
MODELS = in_regimes(lambda base: {name: Model(base.replace(**UNET), build=build)
                                  for name, build in VARIANTS.items()})
CLAIMS = [Claim(f"our initialisation is better than {other}", "ours", other)
          for other in list(VARIANTS)[1:]]
