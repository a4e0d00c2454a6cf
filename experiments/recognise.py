"""
Can the ten embedded classes be told apart in a model's samples?

    python -m experiments.recognise     # newest run under runs/, or our weights; 500 samples

A small classifier, trained on drawings that no model has seen and checked on others, names the
samples: Euler, 100 steps, guided as `python sample.py` does it.
"""

from dataclasses import dataclass

import numpy as np

from common import at_least, find_checkpoint, load_model, option, parse_options, run_main
from dataset import ShapesData
from experiments import lab
from experiments.measures import predict
from sample import SampleOptions


@dataclass
class Options:
    ckpt: str | None = option(None, "checkpoint [newest under runs/]", metavar="PATH")
    num: int = option(500, "samples, label i mod 10")


def main():
    options = parse_options(Options, __doc__)
    at_least(10, num=options.num)
    here, path = lab.Lab(lab.Options()), find_checkpoint(options.ckpt)
    model, state = load_model(path, here.processes.device)
    if state["classes"] != ShapesData.classes:
        raise ValueError(f"{path} was not trained on the embedded shapes")
    net, accuracy, *_ = here.eyes("shapes", model.config.image_size)
    images = here.sample(model, options.num, sampler="euler", steps=100, cfg=SampleOptions.cfg,
                         interval=SampleOptions.interval)
    right = predict(net, images) == np.arange(options.num) % 10
    print(f"{path}, step {state['step']}, n = {options.num}: {right.mean():.1%} of the samples are "
          f"named as the class asked for, {accuracy:.1%} of 1000 held-out drawings rightly")
    for c, name in enumerate(ShapesData.names):
        print(f"    {name:<16} {right[c::10].mean():6.1%}")


if __name__ == "__main__":
    run_main(main)
