"""
Which learning rate suits which model?

    python -m experiments learning_rate --photos IMAGES

The models of heads.py and of geometry.py at three rates, on seed 9, which no verdict uses.  Each
model is then trained, for longer, at the rate whose loss was lowest after 500 steps.

Cost: 33 trainings of 500 steps, about 50 minutes of one core.
"""

from dataclasses import replace

from experiments import geometry, heads

RATES = 1e-3, 3e-3, 6e-3
SEEDS = 9,
MODELS = {f"{group}, lr {lr:g}": {name: replace(model, lr=lr) for name, model in models.items()}
          for group, models in {**heads.MODELS, **geometry.MODELS}.items() for lr in RATES}
CLAIMS = []


def measure(lab, experiment):
    """Losses alone: nothing is sampled."""
    return dict(rows=lab.rows(experiment, sampled=False))
