"""
Table 2: which head, if any, and is it better than a bigger DiT?

    python -m experiments.heads                     # embedded shapes
    python -m experiments.heads --data IMAGES       # an image folder with train/ and val/
    python -m experiments.heads --data IMAGES --size 64 --regimes S --steps 5000      # for a GPU

The same backbone ends plainly (none), or in each of the four heads; beside it stand DiTs without a
head, made deeper and wider until they cost what the U-Net head costs, or more.  All of it with
tokens narrower than a patch's 192 numbers, and with wider ones.

At its lowest level the U-Net has 64 channels, a third of a patch's numbers; in DiP-XL it is two
thirds (512 of 768), and so it is in the U-Net twice as wide, for four times the FLOPs.  The
MLP's hidden layers have 5/3 of a patch's dimensions, as in DiP-XL.  FLOPs of a head over those of
the U-Net head, narrow (DiP-XL): MLP 0.3 (0.1), coordinate 0.5 (1.5), attention 1.4 (3.4).  Time is
that of forward and backward of a batch of 32, medians of three rounds of turns; memory what the
same adds to a fresh process.
"""

import statistics
from dataclasses import dataclass
from functools import partial

from experiments import harness, speed
from experiments.harness import Claim, better, conduct, draw_dots, title_of
from sample import at_least, option, run_main

MODELS = {
    "none": dict(head="none", head_width=0, head_depth=0),
    "mlp": dict(head="mlp", head_width=320, head_depth=2),
    "coordinate": dict(head="coordinate", head_width=16, head_depth=2),
    "attention": dict(head="attention", head_width=32, head_depth=1),
    "unet": dict(head="unet"),
    "unet, twice as wide": dict(head="unet", head_width=2 * harness.BASE.head_width),
    "deeper": dict(head="none", head_width=0, head_depth=0),
    "wider": dict(head="none", head_width=0, head_depth=0),
}
BIGGER = {    # the smallest that reach the FLOPs of the same regime's "unet"
    "narrow": {"deeper": dict(depth=11), "wider": dict(hidden_size=160)},
    "wide": {"deeper": dict(depth=5), "wider": dict(hidden_size=288)},
    "S": {"deeper": dict(depth=13), "wider": dict(hidden_size=408)},
}
BATCH = 32               # of the timing
REGIMES = harness.REGIMES | {
    "S": harness.BASE.replace(image_size=64, hidden_size=384, depth=12, num_heads=6)}


@dataclass
class Options(harness.Options):
    size: int = option(32, "height and width in pixels")
    regimes: tuple = option(("narrow", "wide"), "narrow, wide, S", nargs="+",
                            choices=tuple(REGIMES))
    costs: bool = option(True, "measure time and memory, which do not depend on the data")


def models(regime, lab):
    base = REGIMES[regime].replace(image_size=lab.size, num_classes=len(lab.data[0].classes))
    return {name: base.replace(**(changes | BIGGER[regime].get(name, {})))
            for name, changes in MODELS.items()}


def measure_costs(regime, configs, lab):
    """Rows of time and memory: three rounds, as with seeds."""
    quick = lab.options.quick
    timing = speed.Options(batch=2 if quick else BATCH, train=True)
    passes = [speed.prepare(config, False, timing, lab.device) for config in configs.values()]
    speed.take_turns(passes, 2)              # warm up
    rows = []
    for turn in lab.seeds:
        turns = speed.take_turns(passes, 2 if quick else 6)
        for (name, config), seconds in zip(configs.items(), zip(*turns)):
            before = peak = 0
            if not quick or name == "none":
                before, peak = speed.peak_memory(config, False, timing, lab.device)
            rows.append(dict(regime=regime, model=name, seed=turn,
                             ms=1000 * statistics.median(seconds),
                             memory_mib=(peak - before) / 2**20))
    return rows


def measure(lab):
    at_least(16, size=lab.size)
    costs, rows = [], []
    for regime in lab.options.regimes:
        configs = models(regime, lab)
        costs += measure_costs(regime, configs, lab) if lab.options.costs else []
        rows += lab.rows(configs, regime=regime)
    return dict(costs=costs, calibration=lab.calibrate(), rows=rows)


QUALITY = (    # claim, the paper's figures, the better model, the worse
    ("a U-Net head is better than none", "FID 2.16 against 5.28", "unet", "none"),
    ("a U-Net head is better than a deeper DiT of as many FLOPs", "FID 2.16 against 4.91",
     "unet", "deeper"),
    ("a U-Net head is better than a wider DiT of as many FLOPs", "FID 2.16 against 4.28",
     "unet", "wider"),
    ("a U-Net head twice as wide is better than none", "FID 2.16 against 5.28",
     "unet, twice as wide", "none"),
    ("a wider DiT is better than a deeper one", "FID 4.28 against 4.91", "wider", "deeper"),
    ("no head is better than an MLP head", "FID 5.28 against 6.92", "none", "mlp"),
    ("an attention head is better than none", "FID 2.98 against 5.28", "attention", "none"),
    ("a coordinate head is better than none", "FID 2.20 against 5.28", "coordinate", "none"),
    ("a U-Net head is better than MLP, attention and coordinate heads",
     "FID 2.16 against 6.92, 2.98, 2.20", "unet", ("mlp", "attention", "coordinate")),
)
COST = (
    ("a step with a U-Net head takes less time than with MLP, attention, coordinate heads",
     "92 against 93, 96, 123 x 8 GPU hours", "ms", ("mlp", "attention", "coordinate")),
    ("a U-Net head needs less memory than an attention head", "about half", "memory_mib",
     "attention"),
)


def claims(results):
    found, setting = [], results["setting"].split(", regimes")[0]
    for regime in dict.fromkeys(row["regime"] for row in results["rows"]):
        judged = [(claim, paper, better(results["rows"], a, b, regime=regime))
                  for claim, paper, a, b in QUALITY]
        if results["costs"]:
            judged += [(claim, paper, better(results["costs"], "unet", b, (measure,),
                                             regime=regime)) for claim, paper, measure, b in COST]
        found += [Claim(claim, f"{regime}, {setting}", "Table 2", paper, *found_here)
                  for claim, paper, found_here in judged]
    return found


def draw(results, lab):
    """Measures of every model, and the first samples of seed 0."""
    strips = {}
    for regime in lab.options.regimes:
        trained = {name: lab.train(config, 0)[0] for name, config in models(regime, lab).items()}
        strips[f"{title_of(regime)}, samples of seed 0"] = {
            name: lab.sample(model, 12) for name, model in trained.items()}
    return draw_dots(results, strips=strips)


main = partial(conduct, "heads")

if __name__ == "__main__":
    run_main(main)
