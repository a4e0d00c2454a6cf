"""
Fig. 5, Sec. 4.3: does it matter where the U-Net head stands?

    python -m experiments.placement     # embedded shapes

After the last block (post-hoc), between two blocks with its pixels projected back into the tokens
(intermediate; the model then ends as a plain DiT), or both (hybrid), against no head at all.
"""

from functools import partial

from experiments.harness import REGIMES, Claim, better, conduct, draw_dots
from sample import run_main

MODELS = {
    "no head": dict(head="none", head_width=0, head_depth=0),
    "post-hoc": {},
    "intermediate": dict(placement="intermediate"),
    "hybrid": dict(placement="hybrid"),
}


def measure(lab):
    return dict(rows=lab.rows_of_regimes(MODELS))


def claims(results):
    rows, found = results["rows"], []
    for regime in REGIMES:
        for name in ("post-hoc", "intermediate", "hybrid"):
            ours, verdict = better(rows, name, "no head", regime=regime)
            found.append(Claim(f"{name} placement is better than no head",
                               f"{regime}, {results['setting']}", "Sec. 4.3",
                               "better than FID 5.28", ours, verdict))
        ours, verdict = better(rows, "post-hoc", ("intermediate", "hybrid"), regime=regime)
        found.append(Claim("post-hoc placement is the best of the three",
                           f"{regime}, {results['setting']}", "Sec. 4.3", "no figure", ours,
                           verdict))
    return found


def draw(results, lab):
    return draw_dots(results)


main = partial(conduct, "placement")

if __name__ == "__main__":
    run_main(main)
