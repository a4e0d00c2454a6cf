"""
The Frechet distance by Cholesky factor or eigenvectors, against scipy.linalg.sqrtm.

    python -m experiments.frechet

At 2048 dimensions, as FID needs it, twice: with more points than dimensions (Cholesky applies), and
with fewer (singular: eigenvectors).  The two methods take turns, so that whatever else the machine
does touches both.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from common import at_least, option, parse_options, run_main
from fid import frechet_distance


@dataclass
class Options:
    dim: int = option(2048, "dimensions")
    repeat: int = option(3, "turns")
    seed: int = option(0, "of the points")


def by_sqrtm(mu1, sigma1, mu2, sigma2):
    """As ADM's evaluator does it, except its retry with a diagonal added; the root's real part."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root.real))


def main():
    options = parse_options(Options, __doc__)
    at_least(1, repeat=options.repeat)
    at_least(4, dim=options.dim)                             # covariances of dim / 2 points
    rng, d = np.random.default_rng(options.seed), options.dim
    scale = np.arange(1, d + 1) ** -0.5                      # a falling spectrum
    print(f"{d} dimensions, seed {options.seed}, n = {options.repeat}")
    for n in (5 * d, d // 2):
        pair = [rng.standard_normal((n, d)) * scale + shift for shift in (0, 0.02)]
        arguments = [x for points in pair for x in (points.mean(axis=0), np.cov(points.T))]
        times, values = {frechet_distance: [], by_sqrtm: []}, {}
        for _ in range(options.repeat):
            for method in times:
                start = time.perf_counter()
                values[method] = method(*arguments)
                times[method].append(time.perf_counter() - start)
        ours, theirs = (statistics.median(seconds) for seconds in times.values())
        a, b = values.values()
        print(f"{n:>6} points: {ours:6.2f} s, sqrtm {theirs:6.2f} s, {theirs / ours:5.1f} times "
              f"faster; {a:.8f} and {b:.8f}, relative difference {abs(a - b) / b:.1e}", flush=True)
        if n < d:                                            # another exact route: singular values
            X, Y = (points - points.mean(axis=0) for points in pair)
            root = np.linalg.svd(X @ Y.T, compute_uv=False).sum() / (n - 1)
            exact = ((arguments[0] - arguments[2]) ** 2).sum() - 2 * root + sum(
                np.trace(x) for x in arguments[1::2])
            print(f"   by the singular values of the points: {exact:.8f}; relative errors "
                  f"{abs(a - exact) / exact:.1e} and, of sqrtm, {abs(b - exact) / exact:.1e}")


if __name__ == "__main__":
    run_main(main)
