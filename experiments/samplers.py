"""
Table 1: how many evaluations does a sampler need, and what does guidance do?

A DiP with narrow tokens, sampled without guidance by Euler, Heun and the two-step Adams-Bashforth
method; and by Euler with guidance of scale 2, everywhere and inside the paper's interval only.  An
evaluation of the field counts once, guided or not: the paper's "100x2" is 100 here.
"""

import matplotlib.pyplot as plt

from experiments.models import NARROW, UNET, tuned
from experiments.report import COLOURS, LABELS, Claim, by_seed, plot_curves
from sample import SampleOptions

METHODS = {    # label, evaluations a step, settings, numbers of evaluations
    "euler": ("Euler", 1, dict(sampler="euler"), (6, 12, 24)),
    "heun": ("Heun", 2, dict(sampler="heun"), (6, 12, 24)),
    "ab2": ("Adams-Bashforth 2", 1, dict(sampler="ab2"), (6, 12, 24)),
    "everywhere": ("Euler, guided everywhere", 1, dict(sampler="euler", cfg=2.0), (24,)),
    "interval": ("Euler, guided in the interval", 1,
                 dict(sampler="euler", cfg=2.0, interval=SampleOptions.interval), (24,))}
MODELS = {"narrow, shapes": {f"{method} {evaluations}": tuned(NARROW.replace(**UNET))
                             for method, (*_, numbers) in METHODS.items()
                             for evaluations in numbers}}
CLAIMS = [Claim(text, a, b, ("frechet",), source, paper) for text, a, b, source, paper in (
    ("Euler: 24 evaluations are better than 12", "euler 24", "euler 12", "Table 1",
     "FID 1.90 (100) against 1.98 (75)"),
    ("12 evaluations: Adams-Bashforth is better than Euler", "ab2 12", "euler 12", "-", "-"),
    ("12 evaluations: Heun is better than Euler", "heun 12", "euler 12", "-", "-"),
    ("guidance everywhere is better than none (Euler, 24)", "everywhere 24", "euler 24", "-", "-"),
    ("guidance in the interval is better than everywhere (Euler, 24)", "interval 24",
     "everywhere 24", "-", "-"))]


def measure(lab, name, model, net):
    method, evaluations = name.split()
    _, order, settings, _ = METHODS[method]
    return lab.judge(model, lab.samples(net, **settings, steps=int(evaluations) // order))


def draw(results, lab):
    """Distance over evaluations."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    curves = {label: {
        n: list(by_seed(results["rows"], "frechet", model=f"{method} {n}").values())
        for n in numbers} for method, (label, _, _, numbers) in METHODS.items()}
    plot_curves(axes, curves, dict(zip(curves, COLOURS)), "evaluations")
    axes.set_ylabel(LABELS["frechet"])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
