"""
Table 2: which head, if any, and is it better than a bigger DiT?

    python -m experiments.heads                     # embedded shapes
    python -m experiments.heads --data IMAGES       # an image folder with train/ and val/
    python -m experiments.heads --data IMAGES --size 64 --regimes S --steps 5000      # for a GPU

The same backbone ends plainly (none), or in each of the four heads; beside it stand DiTs without a
head, made deeper and wider until they cost what the U-Net head costs, or more.  All of it with
tokens narrower than a patch's 192 numbers, and with wider ones.  Time and memory are those of
forward and backward of a batch of 32, in turns, in fresh processes.
"""

import statistics
from dataclasses import dataclass
from functools import partial

from experiments import harness, speed
from experiments.harness import Claim, better, conduct, draw_dots
from sample import option, run_main

MODELS = {
    "none": dict(head="none"),
    "mlp": dict(head="mlp", head_width=320, head_depth=2),
    "coordinate": dict(head="coordinate", head_width=16, head_depth=2),
    "attention": dict(head="attention", head_width=32, head_depth=1),
    "unet": dict(head="unet"),
    "deeper": dict(head="none"),
    "wider": dict(head="none"),
}
BIGGER = {    # the smallest that reach the operations of the same regime's "unet"
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


def models(regime, lab):
    base = REGIMES[regime].replace(image_size=lab.size, num_classes=len(lab.data[0].classes))
    return {name: base.replace(**(changes | BIGGER[regime].get(name, {})))
            for name, changes in MODELS.items()}


def measure_costs(regime, configs, lab):
    """Rows of time and memory: three rounds, as with seeds."""
    quick = lab.options.quick
    timing = speed.Options(batch=2 if quick else BATCH, train=True)
    passes = [speed.prepare(config, False, timing, lab.device) for config in configs.values()]
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
    lab.size, costs, rows = lab.options.size, [], []
    for regime in lab.options.regimes:
        configs = models(regime, lab)
        costs += measure_costs(regime, configs, lab)
        rows += lab.rows(configs, regime=regime)
    return dict(size=lab.size, costs=costs, calibration=lab.calibrate(), rows=rows)


def claims(results):
    """Table 2, and the costs of the same table; nothing where a regime was not run."""
    rows, costs, found = results["rows"], results["costs"], []
    shown = "shapes" if results["data"] is None else results["data"]
    for regime in dict.fromkeys(row["regime"] for row in rows):
        for claim, paper, a, b in (
            ("a U-Net head is better than none", "FID 2.16 against 5.28", "unet", "none"),
            ("a U-Net head is better than a deeper DiT of the same cost",
             "FID 2.16 against 4.91", "unet", "deeper"),
            ("a U-Net head is better than a wider DiT of the same cost",
             "FID 2.16 against 4.28, 2.83", "unet", "wider"),
            ("a wider DiT is better than a deeper one", "FID 4.28 against 4.91", "wider", "deeper"),
            ("no head is better than an MLP head", "FID 5.28 against 6.92", "none", "mlp"),
            ("an attention head is better than none", "FID 2.98 against 5.28", "attention", "none"),
            ("a coordinate head is better than none", "FID 2.20 against 5.28", "coordinate",
             "none"),
            ("a U-Net head is better than MLP, attention and coordinate heads",
             "FID 2.16 against 6.92, 2.98, 2.20", "unet", ("mlp", "attention", "coordinate")),
        ):
            ours, verdict = better(rows, a, b, regime=regime)
            found.append(Claim(f"{claim} ({regime}, {shown})", "Table 2", paper, ours, verdict))
        for claim, paper, measure, b in (
            ("a step with a U-Net head takes less time than with attention or coordinate heads",
             "92 against 96, 123 GPU hours x 8", "ms", ("attention", "coordinate")),
            ("a U-Net head needs less memory than an attention head", "about half", "memory_mib",
             "attention"),
        ):
            ours, verdict = better(costs, "unet", b, (measure,), regime=regime)
            found.append(Claim(f"{claim} ({regime}, {shown})", "Table 2", paper, ours, verdict))
    return found


def draw(results, lab):
    """Measures of every model, and the first samples of seed 0."""
    strips = {}
    for regime in lab.options.regimes:
        trained = {name: lab.train(config, 0)[0] for name, config in models(regime, lab).items()}
        strips[f"{regime} tokens, samples of seed 0"] = {
            name: lab.sample(model, 12) for name, model in trained.items()}
    return draw_dots(results, strips=strips)


if __name__ == "__main__":
    run_main(partial(conduct, "heads"))
