"""
Fig. 11, Appendix D: should the head see one patch at a time, or the whole image?
"""

from experiments.models import UNET, in_regimes, tuned
from experiments.report import Claim

MODELS = in_regimes(lambda base: {
    "patch": tuned(base.replace(**UNET)),
    "image": tuned(base.replace(head_input="image", **UNET))})
CLAIMS = [Claim("a head that sees one patch is better than one that sees the image", "patch",
                "image", source="App. D", paper="no figure")]
