"""
Section 7 in numbers: what a token narrower than its patch costs, on Gaussian images, on the drawn
shapes and on photographs.  Costs are squared errors in v beyond that of v*, per value of a patch.
"""

import json
from bisect import bisect_left
from functools import cache
from pathlib import Path

import numpy as np

from theory.model import GaussianModel, variance_of_v, image_basis, image_decay, token_cost

SHAPES_TIMES = np.arange(1, 20) / 20         # every other one is the middle of a tenth of t
RESULTS = Path(__file__).parents[1] / "experiments" / "results"
TRAINED = {(16, 4): ("crossover", "16 of 48"), (36, 4): ("crossover", "36 of 48"),
           (96, 8): ("short", "narrow, shapes"), (48, 4): ("crossover", "48 of 48")}


@cache
def token_models(t, alpha=1.5):
    """The images of experiments/gaussian.py: 16 x 16 cosines, patches of 4 x 4 in each of three
    channels, which are independent"""
    U, patches = image_basis(16, 4)
    return [GaussianModel(U, image_decay(256, alpha), patches, s, 1, t) for s in range(16)]


def gaussian_costs(k, t, alpha=1.5):
    """{"v", "x", "skip"}, mean over patches"""
    costs = [m.token_costs(k, channels=3) for m in token_models(t, alpha)]
    return {how: float(np.mean([c[how] for c in costs])) for how in costs[0]}


def x_cheaper_from(alpha, k=32):
    """The t from which on x_0 costs less than v"""
    def is_cheaper(t):
        costs = gaussian_costs(k, t, alpha)
        return costs["x"] < costs["v"]

    times = np.arange(10, 700) / 1000
    return times[bisect_left(times, True, key=is_cheaper)]


@cache
def spectra():
    """Eigenvalues by name, as theory/patches.py explains"""
    arrays = np.load(Path(__file__).with_name("patches.npz"))
    return {name: values.astype(float) for name, values in arrays.items()}


def shapes_bound(k, side):
    """(2, times): v costs at least this, if each patch has its own W, and if all share one"""
    return token_cost(spectra()[f"shapes_{side}"], k)


def measured_gain(k, side):
    """(10,): loss without a head less loss with the U-Net head, by tenths of t, mean over seeds"""
    name, group = TRAINED[k, side]
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    without, with_head = (np.mean([row["loss_by_t"] for row in rows if row["seed"] < 3
                                   and (row["group"], row["model"]) == (group, model)], axis=0)
                          for model in ("no head", "U-Net"))             # seed 9 chose the rates
    return without - with_head


def photo_bounds(name, k, t):
    """(at least, at most): v costs at least the first; x_0 at most the second, as E[x_0 | x_t]
    varies at most as much as x_0."""
    values = spectra()[name]
    return token_cost(variance_of_v(values, t), k), token_cost(values, k) / t**2
