"""
Fig. 11, Appendix D: should the head see one patch at a time, or the whole image?

    python -m experiments patch_or_image

Cost: 12 trainings of 500 steps, half an hour of one core.  (Fig. 12's toy is toy.py.)
"""

from experiments.lab import UNET, in_regimes, tuned
from experiments.report import Claim

MODELS = in_regimes(lambda base: {
    "patch": tuned(base.replace(**UNET)),
    "image": tuned(base.replace(head_input="image", **UNET))})
CLAIMS = [Claim("a head that sees one patch is better than one that sees the image", "patch",
                "image", measure, "App. D", "no figure") for measure in ("frechet", "detail")]
