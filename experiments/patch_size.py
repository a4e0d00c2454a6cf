"""
Fig. 10b: small patches without a head, or large ones with it?

Tokens of 256 for patches of 4, 8 and 16 pixels a side (48, 192 and 768 dimensions), with and
without a U-Net head in the paper's proportion.
"""

from experiments.models import WIDE, tuned
from experiments.report import Claim

UNETS = {4: (16, 2), 8: (32, 3), 16: (64, 4)}                # P: base channels, stages
MODELS = {"shapes": {
    **{f"DiT, {P}": tuned(WIDE.replace(patch_size=P)) for P in UNETS},
    **{f"DiP, {P}": tuned(WIDE.replace(patch_size=P, head="unet", head_width=C, head_depth=n))
       for P, (C, n) in UNETS.items()}}}
CLAIMS = [Claim(f"{a} is better than {b}", a, b, source="Fig. 10b", paper="a curve")
          for a, b in (("DiT, 4", "DiT, 8"), ("DiT, 8", "DiT, 16"), ("DiP, 8", "DiP, 16"),
                       ("DiP, 8", "DiT, 4"), ("DiP, 16", "DiT, 8"), ("DiP, 16", "DiT, 16"))]
