"""
Beyond the paper: is the head still needed when the network predicts the clean image?

    python -m experiments.prediction    # embedded shapes

JiT (arXiv 2511.13720) finds that a plain DiT on large patches works if its last layer draws the
clean image x instead of the velocity v, with the loss on the velocity as ever.
"""

from functools import partial

from experiments.harness import REGIMES, Claim, better, conduct, draw_dots
from sample import run_main

MODELS = {
    "DiT-v": dict(head="none", head_width=0, head_depth=0),
    "DiT-x": dict(head="none", head_width=0, head_depth=0, prediction="x"),
    "DiP-v": {},
    "DiP-x": dict(prediction="x"),
}


def measure(lab):
    return dict(rows=lab.rows_of_regimes(MODELS))


def claims(results):
    rows, found = results["rows"], []
    for regime in REGIMES:
        for claim, source, a, b in (
            ("a DiT-only that predicts x is better than one that predicts v", "JiT", "DiT-x",
             "DiT-v"),
            ("a DiP that predicts x is better than one that predicts v", "-", "DiP-x", "DiP-v"),
            ("a head improves on none when v is predicted", "Table 2", "DiP-v", "DiT-v"),
            ("a head still improves on none when x is predicted", "-", "DiP-x", "DiT-x"),
        ):
            ours, verdict = better(rows, a, b, regime=regime)
            found.append(Claim(claim, f"{regime}, {results['setting']}", source, "-", ours,
                               verdict))
    return found


def draw(results, lab):
    return draw_dots(results)


main = partial(conduct, "prediction")

if __name__ == "__main__":
    run_main(main)
