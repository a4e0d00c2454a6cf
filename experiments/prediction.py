"""
Beyond the paper: is the head still needed when the network predicts the clean image?

JiT (arXiv 2511.13720) finds that a plain DiT on large patches works if its last layer draws the
clean image x instead of the velocity v, with the loss on the velocity as ever.
"""

from experiments.models import UNET, in_regimes, tuned
from experiments.report import Claim

KINDS = {"DiT-v": {}, "DiT-x": dict(prediction="x"), "DiP-v": UNET,
         "DiP-x": dict(prediction="x", **UNET)}
MODELS = in_regimes(lambda base: {name: tuned(base.replace(**changes))
                                  for name, changes in KINDS.items()})
CLAIMS = [Claim(text, a, b, source=source)
          for text, a, b, source in (
              ("a DiT that predicts x is better than one that predicts v", "DiT-x", "DiT-v", "JiT"),
              ("a DiP that predicts x is better than one that predicts v", "DiP-x", "DiP-v", "-"),
              ("a head improves on none when v is predicted", "DiP-v", "DiT-v", "Table 2"),
              ("a head still improves on none when x is predicted", "DiP-x", "DiT-x", "-"))]
