"""
Does a classifier recognise the samples of a model of the ten drawn classes?

    python -m experiments.recognise [CHECKPOINT]     # newest run under runs/, or our weights

500 samples (Euler, 100 steps, guided as `python sample.py` does it), and the judge of lab.py.
"""

import sys
from types import SimpleNamespace

import numpy as np

import sample
from experiments.lab import Lab
from train import Shapes


def main():
    lab, options = Lab(SimpleNamespace(device="auto", quick=False)), sample.parse([])
    path = sample.find_checkpoint(*sys.argv[1:2])
    model, info = sample.load_model(path, lab.device)
    if info["classes"] != Shapes.classes:
        raise ValueError(f"{path} was not trained on the drawn shapes")
    judge = lab.judge("shapes", model.config.image_size)
    images = lab.sample(model, 500, **options.settings)
    right = judge.classes_of(images) == np.arange(500) % 10
    print(f"{path}, step {info['step']}: the judge recognises {right.mean():.1%} of 500 samples as "
          f"the requested class, and {judge.accuracy:.1%} of 1000 held-out drawings")


if __name__ == "__main__":
    sample.run(main)
