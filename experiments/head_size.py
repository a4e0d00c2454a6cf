"""
Fig. 10a: how deep, how wide should the U-Net head be?

Deep: patches of 16 x 16, so that there may be one to four stages; tokens of 256 are narrow there.
Broad: patches of 8 x 8, whose head of 32 base channels has the paper's proportion, 128 channels at
the bottleneck for 192 dimensions; 64 are twice as many.
"""

from experiments.models import WIDE, tuned
from experiments.report import Claim

DEEP, BROAD = WIDE.replace(patch_size=16, head="unet"), WIDE.replace(head="unet", head_depth=3)
MODELS = {
    "stages, patches of 16": {
        f"{n} stage{'s' * (n > 1)}": tuned(DEEP.replace(head_width=32, head_depth=n))
        for n in (1, 2, 3, 4)},
    "channels, patches of 8": {f"{C} channels": tuned(BROAD.replace(head_width=C))
                               for C in (8, 16, 32, 64)}}
CLAIMS = [Claim(f"{a} are better than {b}", a, b, source="Fig. 10a", paper=paper)
          for a, b, paper in (("2 stages", "1 stage", "yes"), ("3 stages", "2 stages", "yes"),
                              ("4 stages", "3 stages", "hardly: saturates"),
                              ("16 channels", "8 channels", "a curve"),
                              ("32 channels", "16 channels", "a curve"),
                              ("64 channels", "32 channels", "no sustained gain"))]
