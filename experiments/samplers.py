"""
Table 1: how many evaluations does a sampler need, and what does guidance do?

A DiP with narrow tokens, without guidance, and with a scale of 2 everywhere or in the paper's
interval.  An evaluation of the velocity counts once, guided or not: the paper's "100x2" is 100.
"""

METHODS = {              # sampler, evaluations: settings
    **{f"{sampler} {n}": dict(sampler=sampler, steps=n)
       for sampler in ("euler", "ab2") for n in (6, 12, 24)},
    "everywhere 24": dict(sampler="euler", steps=24, cfg=2.0),
    "interval 24": dict(sampler="euler", steps=24, cfg=2.0, interval=(0.03, 0.89))}


def measure(lab, name, model, net):
    """Every measure of samples."""
    return lab.judge_samples(model, net, **METHODS[name])
