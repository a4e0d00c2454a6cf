"""
What is compared: models, and how they are trained.

An experiment is a module with MODELS, {group: {name: Model}}, and CLAIMS.  It may have MARKS (the
steps after which its models are measured), SEEDS, SAMPLED = False (losses only), a measure() of its
own in the place of those of lab.py, and a draw() in the place of report.plot_rows.

Here a token narrower than the 192 dimensions of its patch cannot even carry the noise through; a
wide one can, as the paper's (1152 > 768).  The head has the paper's proportion: as in DiP-XL/16
(512 of 768) its bottleneck has 2/3 of a patch's dimensions, 128 of 192.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

import torch

from dip import DiP, DiPConfig

WIDE = DiPConfig(image_size=32, patch_size=8, hidden_size=256, depth=4, num_heads=4, num_classes=10,
                 head="none")
NARROW = WIDE.replace(hidden_size=96)
UNET = dict(head="unet", head_width=32, head_depth=3)
TRAINING = dict(batch_size=16, micro_batch=16, warmup=50, cooldown=0.0, time_mean=0.0, workers=0,
                keep=1, log_every=100)
STEPS = 500                                  # of a training, where an experiment has no MARKS


@dataclass(frozen=True)
class Model:
    """All that a training depends on, except its seed and its length."""

    config: DiPConfig
    lr: float = 3e-3
    data: object = "shapes"                  # or "photos", or an object with what ShapesData has
    build: type = DiP                        # the class of the network
    token_loss: bool = False                 # tokens aligned with a classifier's features
    training: dict = field(default_factory=dict)             # changes to TRAINING

    @property
    def data_name(self):
        return self.data if isinstance(self.data, str) else type(self.data).__name__

    def digest(self):
        """Ten hexadecimal digits that stand for all of it."""
        settings = [dataclasses.asdict(self.config), self.lr, self.data_name, self.build.__name__,
                    self.token_loss, TRAINING | self.training]
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=5).hexdigest()


def tuned(config, **settings):
    """The Model at the rate that was best for its kind of head in heads.py and kinds.py, on a seed
    not judged (learning_rate.py)."""
    return Model(config, 6e-3 if config.head in ("none", "coordinate") else 3e-3, **settings)


def marks_of(experiment):
    """The numbers of steps after which its models are measured."""
    return getattr(experiment, "MARKS", (STEPS,))


def in_regimes(models):
    """{group: {name: Model}} of models(configuration without head), for narrow and wide tokens."""
    return {"narrow, shapes": models(NARROW), "wide, shapes": models(WIDE)}


class OneClass:
    """What a data set of one class has beside its images."""

    classes = names = ["-"]
    flip = False
    bad = torch.zeros(0, dtype=torch.bool)

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length
