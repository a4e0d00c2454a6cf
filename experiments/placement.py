"""
Fig. 5, Sec. 4.3: where should the U-Net head stand?

After the last block (post-hoc), between two blocks with its pixels projected back into the tokens
(intermediate; the model then ends as a plain DiT), or both (hybrid), against no head at all.
"""

from experiments.models import UNET, in_regimes, tuned
from experiments.report import Claim

PLACES = {"no head": {}, "post-hoc": UNET, "intermediate": dict(placement="intermediate", **UNET),
          "hybrid": dict(placement="hybrid", **UNET)}
MODELS = in_regimes(lambda base: {name: tuned(base.replace(**changes))
                                  for name, changes in PLACES.items()})
CLAIMS = [Claim(f"{a} placement is better than {b}", a, b, source="Sec. 4.3",
                paper="better than FID 5.28" if b == "no head" else "-")
          for a, b in (("post-hoc", "no head"), ("intermediate", "no head"), ("hybrid", "no head"),
                       ("post-hoc", "intermediate"), ("post-hoc", "hybrid"))]
