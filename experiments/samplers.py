"""
Table 1: how many evaluations does a sampler need, and what does guidance do?

    python -m experiments.samplers      # embedded shapes

DiP with narrow tokens, sampled by Euler, Heun and the two-step Adams-Bashforth method, without
guidance, with guidance of scale 2 everywhere, and with it inside the paper's interval only.  An
evaluation of the field counts once, guided or not: the paper's "100x2" is 100 here.
"""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from experiments.harness import AXES, COLOURS, REGIMES, Claim, better, conduct
from sample import SampleOptions, run_main

EVALUATIONS = (6, 12, 24, 48)
METHODS = {"euler": ("Euler", 1), "heun": ("Heun", 2), "ab2": ("Adams-Bashforth 2", 1)}
GUIDANCE = {
    "none": dict(cfg=1.0),
    "everywhere": dict(cfg=2.0),
    "interval": dict(cfg=2.0, interval=SampleOptions.interval),
}


def measure(lab):
    config = REGIMES["narrow"].replace(num_classes=len(lab.data[0].classes))
    rows = []
    for seed in lab.seeds:
        model = lab.train(config, seed)[0]
        for guidance, settings in GUIDANCE.items():
            for sampler, (_, order) in METHODS.items():
                for evaluations in EVALUATIONS[:1] if lab.options.quick else EVALUATIONS:
                    images = lab.sample(model, sampler=sampler, steps=evaluations // order,
                                        **settings)
                    name = f"{sampler} {evaluations} {guidance}"
                    rows.append(dict(model=name, seed=seed, sampler=sampler, guidance=guidance,
                                     evaluations=evaluations,
                                     **lab.judge(images, config.patch_size)))
                    print(f"{name}, seed {seed}: FD {rows[-1]['frechet']:.2f}", flush=True)
    return dict(rows=rows)


def claims(results):
    found, last = [], EVALUATIONS[-1]
    for claim, source, paper, a, b in (
        ("Euler: 48 evaluations are better than 24", "Table 1", "FID 1.90 (100) against 1.98 (75)",
         "euler 48 none", "euler 24 none"),
        ("12 evaluations: Adams-Bashforth is better than Euler", "-", "-", "ab2 12 none",
         "euler 12 none"),
        ("12 evaluations: Heun is better than Euler", "-", "-", "heun 12 none", "euler 12 none"),
        ("guidance everywhere is better than none", "-", "-", f"euler {last} everywhere",
         f"euler {last} none"),
        ("guidance in the interval is better than everywhere", "-", "-",
         f"euler {last} interval", f"euler {last} everywhere"),
    ):
        ours, verdict = better(results["rows"], a, b, ("frechet",))
        found.append(Claim(claim, f"DiP, narrow, {results['setting']}", source, paper, ours,
                           verdict))
    return found


def draw(results, lab):
    """Distance over evaluations: a panel a kind of guidance."""
    figure, panels = plt.subplots(1, len(GUIDANCE), figsize=(10, 3), sharey=True,
                                  layout="constrained")
    for axes, guidance in zip(panels, GUIDANCE):
        for colour, (sampler, (label, _)) in zip(COLOURS, METHODS.items()):
            found = [[row["frechet"] for row in results["rows"]
                      if row["model"] == f"{sampler} {n} {guidance}"] for n in EVALUATIONS]
            found = [(n, points) for n, points in zip(EVALUATIONS, found) if points]
            axes.plot([n for n, _ in found], [np.mean(points) for _, points in found],
                      color=colour, label=label)
            for n, points in found:
                axes.plot([n] * len(points), points, "o", color=colour, alpha=0.6, markersize=4)
        axes.set(title=f"guidance: {guidance}", xlabel="evaluations", xscale="log")
        axes.set_xticks(EVALUATIONS, EVALUATIONS)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(AXES["frechet"])
    panels[-1].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run_main(partial(conduct, "samplers"))
