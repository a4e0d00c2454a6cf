"""
Which learning rate suits which model?

The models of heads.py, geometry.py, crossover.py and kinds.py on seed 9, which no verdict uses.
Each is then trained at the rate whose loss was lowest after 500 steps, except the deeper DiT on
photos, which has the next (0.3 % higher).
"""

from dataclasses import replace

from experiments import crossover, geometry, heads, kinds

RATES = {heads: (1e-3, 3e-3, 6e-3), geometry: (1e-3, 3e-3, 6e-3), crossover: (1e-3, 3e-3, 6e-3),
         kinds: (3e-3, 6e-3)}
SEEDS = (9,)
SAMPLED = False                              # judged by losses alone
MODELS = {}
for experiment, rates in RATES.items():
    for group, models in experiment.MODELS.items():
        for lr in rates:
            MODELS.setdefault(f"{group}, lr {lr:g}", {}).update(
                {name: replace(model, lr=lr) for name, model in models.items()})
CLAIMS = []
