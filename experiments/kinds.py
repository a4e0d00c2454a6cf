"""
Table 2: which kind of head?  And is it better than a wider DiT?

The heads' FLOPs stand to each other about as in DiP-XL: over those of the U-Net head 0.1 (MLP), 1.4
(attention; there 3.4), 0.9 to 1.7 (coordinate; there 1.5).  "Wider" is a DiT without a head that
has the FLOPs of the U-Net head's model or more.  Each is trained at its own rate
(learning_rate.py).  Time and memory: `python -m experiments.speed`, at the paper's own sizes.
"""

from experiments.models import NARROW, UNET, WIDE, Model, in_regimes, tuned
from experiments.report import Claim

HEADS = {"none": {}, "mlp": dict(head="mlp", head_width=320, head_depth=2),
         "coordinate": dict(head="coordinate", head_width=32, head_depth=4),
         "attention": dict(head="attention", head_width=48, head_depth=2), "unet": UNET}
WIDER = {NARROW: 272, WIDE: 368}
MODELS = in_regimes(lambda base: {
    **{name: tuned(base.replace(**changes)) for name, changes in HEADS.items()},
    "wider": Model(base.replace(hidden_size=WIDER[base]), 3e-3)})
CLAIMS = [
    Claim(text, a, b, source="Table 2", paper=paper)
    for text, a, b, paper in (
        ("a U-Net head is better than none", "unet", "none", "FID 2.16 against 5.28"),
        ("a U-Net head is better than as many FLOPs in wider tokens", "unet", "wider",
         "FID 2.16 against 4.28"),
        ("no head is better than an MLP head", "none", "mlp", "FID 5.28 against 6.92"),
        ("an attention head is better than none", "attention", "none", "FID 2.98 against 5.28"),
        ("a coordinate head is better than none", "coordinate", "none", "FID 2.20 against 5.28"),
        ("a U-Net head is better than an attention head", "unet", "attention",
         "FID 2.16 against 2.98"),
        ("a U-Net head is better than a coordinate head", "unet", "coordinate",
         "FID 2.16 against 2.20"))]
