"""
The verdict on every claim of Eq. (1) to (5) and of Appendix A and B that a computation can settle.

A claim is a function; its docstring says what the paper claims, or what we do ("ours").  It
computes a number for every model it is given, compares it with one of the thresholds below, and
returns what was found, in words, and the verdict.  A test gives every claim something that changes
its verdict.
"""

from dataclasses import replace
from functools import cache, lru_cache

import numpy as np
from numpy.linalg import inv, norm

from theory import tokens
from theory.model import (GaussianModel, best_guess, covariance, dct_basis, image_basis,
                          image_decay, random_basis)

HOLDS, CONDITIONAL, FALSE = "holds", "conditional", "does not hold"
MISPRINT, ERROR = "misprint", "error"        # wrong as printed; on an error a conclusion rests
ROUNDING = 1e-9                              # what float64 may lose in these sums and inverses
NOTICEABLE = 0.01                            # a difference of 1% counts
SMALL = 0.1                                  # "small", "little", "approximately": up to a tenth
NEGLIGIBLE = 0.2                             # of DiP's corrections; generous to Remark A.7
MOST = 0.5                                   # more than half

TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
ERROR_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
NORM_TIMES = np.logspace(-7, np.log10(0.98), 71)
BASES = {"cosines": dct_basis(64, 8), "two dimensions": image_basis(8, 4),
         "rotation": random_basis(64, 8)}


def cases(kind=GaussianModel, spectrum=image_decay):
    """The twelve models of the README: three bases, two decays, two cuts; a patch in the middle"""
    return tuple(kind(U, spectrum(64, alpha), patches, len(patches) // 2, r, 0.5)
                 for U, patches in BASES.values() for alpha in (1.5, 2.0) for r in (4, 16))


CASES = cases()


@lru_cache(maxsize=2)                        # two claims in a row ask for the same errors
def at(models, *times):
    return [replace(m, t=t) for t in times for m in models]


def relative(a, b):
    return norm(np.subtract(a, b)) / norm(b)


def span(values):
    """The least and the largest"""
    ends = (f"{float(f'{x:.2g}'):g}" for x in (min(values), max(values)))
    return " to ".join(dict.fromkeys(ends))                  # one, if they are the same


def percent(values):
    return span([100 * x for x in values]) + "%"


def by_time(number, models, times, form=percent):
    """A number for each model at each time, and the same in words"""
    found = [[number(m) for m in at(models, t)] for t in times]
    return found, ", ".join(f"{form(values)} (t {t})" for t, values in zip(times, found))


def over(found):
    """Verdict from a list of truths, one for each case or time"""
    return HOLDS if all(found) else CONDITIONAL if any(found) else FALSE


# What is exact.  Each identity is a function of a model that returns its two sides.

def marginal(lam, t):
    """Variance of x_t, started from variance lam, under dx = -x/2 dt + dw: (1), alpha-bar = e^-t"""
    return 1 + (lam - 1) * np.exp(-t)


def growth(m):
    """The rate at which this variance grows, by a complex step"""
    return marginal(m.lam, m.t + 1e-30j).imag / 1e-30


def drift(factor):
    """Growth under dx/dt = -x/2 - factor grad log p_t, where the gradient is -x / marginal"""
    return lambda m: 2 * (factor / marginal(m.lam, m.t) - 0.5) * marginal(m.lam, m.t)


def steps_of_noise(m):
    """x_t after a thousand steps x -> sqrt(1 - beta) x + sqrt(beta) eps, beta = 1 - e^(-t/1000)"""
    variance, beta = m.lam, -np.expm1(-m.t / 1000)
    for _ in range(1000):
        variance = (1 - beta) * variance + beta
    return variance


def guess_of_noise(m):
    """E[eps | x_t] over x_t, for each frequency; x_t = e^(-t/2) x_0 + sqrt(1 - e^-t) eps"""
    x_t = np.exp(-m.t / 2) * m.I, np.sqrt(-np.expm1(-m.t)) * m.I
    K, _ = best_guess((0 * m.I, m.I), x_t, (np.diag(np.sqrt(m.lam)), m.I))
    return K


def score(m):
    """d log p_t / dx at x = 1, for each frequency, by a complex step"""
    return (-(1 + 1e-30j) ** 2 / 2 / marginal(m.lam, m.t)).imag / 1e-30


def covariances(m):
    """(18), (19), (21), (26), (27), (29): in the parts (x_low, x_high, eps), and as printed"""
    zero, x_t, x_hat = 0 * m.P, m.observation("DiP"), m.observation("DiT")
    eps, x_0, t = (zero, zero, m.P), (m.P, m.P, zero), m.t
    pairs = ((eps, x_t, t * m.P), (x_t, x_t, inv(m.M)), (x_0, x_t, (1 - t) * m.P @ m.sigma),
             (eps, x_hat, t * m.P), (x_hat, x_hat, inv(m.M_hat)), (x_0, x_hat, (1 - t) * m.P @ m.B))
    return [np.concatenate(side) for side in zip(*(
        (covariance(a, b, m.R), printed) for a, b, printed in pairs))]


IDENTITIES = {
    "(1)": lambda m: (steps_of_noise(m), marginal(m.lam, m.t)),
    "(2)": lambda m: (1 - marginal(m.lam, m.t), growth(m)),
    "(3) as reverse SDE": lambda m: (drift(1)(m) - 1, growth(m)),
    "(4)": lambda m: (guess_of_noise(m), -np.sqrt(-np.expm1(-m.t)) * np.diag(score(m))),
    "(13)": lambda m: (m.dip_operator, m.best_guess("DiP")[0]),
    "(16)": lambda m: (m.dip_operator, m.V * m.gains @ m.U.T),
    "(18), (19), (21), (26), (27), (29)": covariances,
    "(12), (31) of x-hat_t": lambda m: (m.dit_operator, m.best_guess("DiT")[0]),
    "(32)": lambda m: (inv(m.D + m.E), m.M_hat),
    "(33), D-hat diagonal in U": lambda m: (
        m.U.T @ m.D @ m.U, np.diag((1 - m.t) ** 2 * m.lam * (np.arange(m.d) < m.r) + m.t**2)),
    "(35)": lambda m: (sum(m.eq15(True)), m.P @ m.C(as_printed=True) @ m.D_inverse),
    "P gain(Sigma-hat)": lambda m: (m.dit_by_gains, m.dit_operator)}


def exact(models=CASES):
    worst = {name: max(relative(*sides(m)) for m in at(models, *TIMES))
             for name, sides in IDENTITIES.items()}
    wrong = [f"{name} off by {x:.1e}" for name, x in worst.items() if not x < ROUNDING]
    return (", ".join(wrong) or "equal up to rounding, all models, t 0.02 to 0.98",
            FALSE if wrong else HOLDS)


# -------------------------------------------------------------------------------------------------
# What is printed wrongly

SLIPS = {    # claim: what is printed, what is corrected, what is exact, of a model
    "(3): the ODE's drift is f - g^2 grad log p_t, which is that of the reverse SDE (should be "
    "g^2 / 2)": (drift(1), drift(0.5), growth),
    "(5): the target is u_t(x), the field that is sought; so the least loss is 0 (should be "
    "u_t(x | x_0); the best v is the same)": (
        lambda m: 0,
        lambda m: (m.lam / ((1 - m.t) ** 2 * m.lam + m.t**2) * m.V**2).sum() / len(m.P),
        lambda m: m.error_of(m.dip_operator, "DiP")),
    "(12), (30), (31): DiT's operator is applied to x_t (should be x-hat_t)": (
        lambda m: m.error_of(m.dit_operator, "DiP"), lambda m: m.error_of(m.dit_operator, "DiT"),
        lambda m: m.smallest_error("DiT")),
    "(29), second line: its last term is Cov(P x_high, Q x_high) (should be (1 - t) times this)": (
        lambda m: m.P @ m.sigma_high @ m.Q, lambda m: (1 - m.t) * m.P @ m.sigma_high @ m.Q,
        lambda m: covariance((0 * m.P, m.P, 0 * m.P), m.observation("DiT"), m.R)),
    "(34): its last term is D^-1 E D^-1 D^-1 (should be D^-1 E D^-1)": (
        lambda m: m.D_inverse @ m.E @ m.D_inverse @ m.D_inverse,
        lambda m: m.D_inverse @ m.E @ m.D_inverse,
        lambda m: m.D_inverse - (m.I - m.D_inverse @ m.E) @ m.D_inverse)}


def slip(*sides):
    printed, corrected = (max(relative(side(m), sides[2](m)) for m in at(CASES, *TIMES))
                          for side in sides[:2])
    return (f"as printed off by up to {printed:.0%}; corrected by up to {corrected:.0e}",
            HOLDS if printed < ROUNDING else
            MISPRINT if corrected < ROUNDING and printed > NOTICEABLE else FALSE)


def share_of_dip(correction, m):
    """Norm of a correction of high frequencies over that of DiP"""
    return norm(correction) / norm(m.dip_operator @ m.high)


def second_sum(models=CASES):
    """(33), (15): DiT's second sum has lam_i / t, as (33) has t lam_i (should be 1 / t and t)"""
    printed, corrected = (
        max(relative(m.C(as_printed) @ m.high, m.B_hat @ m.high) for m in at(models, *TIMES))
        for as_printed in (True, False))
    small, whole = ([share_of_dip(m.eq15(as_printed)[1], m) for m in at(models, 0.9, 0.98)]
                    for as_printed in (True, False))
    return (f"(33) is off by up to {printed:.0%}; with t by {corrected:.0e}. At t = 0.9, 0.98 the "
            f"sum is {percent(small)} of DiP's corrections as printed, {percent(whole)} with "
            "1 / t. The conclusion for t -> 1 rests on it",
            HOLDS if printed < ROUNDING else FALSE if corrected > ROUNDING else
            ERROR if max(small) < NEGLIGIBLE < min(whole) else MISPRINT)


# Sections 4 and 5: what Remark A.7 reads off (16), and what the two models see

def noise_alone(models=CASES):
    """Remark A.7: in (12), (13) the first term is the noise, the second the data"""
    part = []
    for m in at(models, 0.3, 0.5, 0.7, 0.9):
        root = m.U * np.sqrt((1 - m.t) ** 2 * m.lam + m.t**2)            # of Cov(x_t)
        data = (1 - m.t) * m.P @ m.sigma @ m.M                           # Eq. (22) without P mu
        part.append((norm(data @ root) / norm(m.dip_operator @ root)) ** 2)
    return ("the second term is -P mu, a constant; the guess of x_0 - mu is in the first: its mean "
            f"square is {percent(part)} of that of the term, t 0.3 to 0.9",
            HOLDS if max(part) < NOTICEABLE else FALSE)


def monotone(models=CASES):
    """Remark A.7: the gain rises as lam falls"""
    least = min(np.diff(m.gains).min() for m in at(models, *TIMES))
    return (f"from each frequency to the next by at least {least:.1e}",
            HOLDS if least > 0 else FALSE)


def magnitude(models=CASES):
    """Remark A.7: so its size grows as lam falls"""
    border = span([m.lam[0] / (1 + m.lam[0]) for m in models])
    return ("the gain is 0 at lam = t / (1-t), so its size surely grows over all lam if t >= lam_1 "
            f"/ (1 + lam_1): 0.5 with lam_1 = 1 as in A.4, {border} in these images",
            over([(np.diff(abs(m.gains)) > 0).all() for m in at(models, *TIMES)]))


def seeing_both(models=CASES):
    """(11): x_t and what DiT sees are together x_t"""
    gain, text = by_time(lambda m: 1 - m.mean_error("both") / m.mean_error("DiP"), models,
                         (0.3, 0.9))
    return (f"given both, the smallest error is lower by {text}: x_t - x-hat_t = (1-t) x_high "
            "outside the patch, free of noise", FALSE if max(gain[0]) > NOTICEABLE else HOLDS)


def who_is_lower(models=CASES):
    """(11), Remark A.7, read as: DiP's error is never larger than DiT's"""
    x = np.array([m.mean_error("DiT") / m.mean_error("DiP") for m in at(models, *ERROR_TIMES)])
    return (f"in {(x < 0.99).sum()} of {len(x)} cases DiT's error is at least 1% lower (at most "
            f"{1 - x.min():.1%}), in {(x > 1.01).sum()} at least 1% higher (at most "
            f"{x.max() - 1:.0%})",
            HOLDS if x.min() > 1 - NOTICEABLE else FALSE)


def nested(models=CASES):
    """(11), repaired: if DiT sees its patch and the low part of x_t, DiP is never worse"""
    found = [(1 - m.mean_error("DiP") / m.mean_error("patch and low"), m)
             for m in at(models, *ERROR_TIMES)]
    least, clear = min(gain for gain, _ in found), [m.t for gain, m in found if gain > NOTICEABLE]
    best = [max((gain, name, m.r, m.t) for gain, m in found if m.U is U)
            for name, (U, _) in BASES.items()]
    text = ", ".join("{:.1%} ({}, r {}, t {})".format(*each) for each in best)
    return (f"better by at least 1% in {len(clear)} of {len(found)} cases, all at t <= "
            f"{max(clear, default=0)}; by up to {text}",
            HOLDS if least > -ROUNDING and clear else FALSE)


# Section 6: Eq. (15) and its limits

def reason_for_34(models=CASES):
    """(34): lam_j / lam_i is small for all i <= r < j"""
    at_cut = [m.lam[m.r] / m.lam[m.r - 1] for m in models]
    return (f"lam_(r+1) / lam_r is {span(at_cut)}, at every t", over([x < SMALL for x in at_cut]))


def smallness(models=CASES):
    """(34): D^-1 E is small"""
    times = np.arange(1, 50) / 50
    small = np.array([[m.smallness < SMALL for m in at(models, t)] for t in times])
    return (f"its norm is below {SMALL} from t = {span(times[small.argmax(axis=0)])} on; it is at "
            "most (1-t)^2 lam_(r+1) / t^2", over(small.ravel()))


def first_sum(models=CASES):
    """(15): I_1 = o(1), next to the first sum"""
    size, text = by_time(lambda m: norm(m.eq15(False)[2]) / norm(m.eq15(False)[0]), models,
                         (0.001, 0.3, 0.98))
    return (f"the paper names no limit; I_1 has {text} of its norm",
            over([max(x) < NOTICEABLE for x in size]))


def approximation(models=CASES):
    """(15): with 1 / t it approximates P B-hat M-hat"""
    off, text = by_time(lambda m: relative(sum(m.eq15(False)), m.dit_operator), models, ERROR_TIMES)
    i_2 = span([norm(m.eq15(False)[3]) / norm(m.dit_operator) for m in at(models, 0.01)])
    return (f"off by {text}; I_2 grows as 1 / t^2, to {i_2} times the norm of P B-hat M-hat at "
            "t = 0.01", over([max(x) < SMALL for x in off]))


def limit_of_noise(models=CASES):
    """Remark A.7, t -> 1: DiT's corrections of high frequencies are negligible"""
    size, text = by_time(lambda m: share_of_dip(m.dit_operator @ m.high, m), models,
                         (0.3, 0.5, 0.9), lambda x: f"{min(x):.2f} to {max(x):.2f}")
    return f"they are {text} times DiP's", over([x < NEGLIGIBLE for x in size[-1]])


def limit_of_data(models=CASES):
    """Remark A.7, t -> 0: DiT's corrections lose stability, DiP's are robust"""
    norms = np.array([[[norm(m.dit_operator, 2), norm(m.dip_operator, 2)] for m in at(models, t)]
                      for t in NORM_TIMES])                              # (times, cases, 2)
    ratio = np.divide(*norms.max(axis=0).T)
    return ("neither is defined. Read as: DiT's norm has the higher peak over t. It is "
            f"{span(ratio)} times DiP's, higher in {(ratio > 1 + NOTICEABLE).sum()} of "
            f"{len(ratio)} cases; at t = 1e-7 both are {span(norms[0].ravel())}",
            over(ratio > 1 + NOTICEABLE))


# Section 7: the rank of a token

def narrow_token(alpha=1.5, k=32):
    """ours: a narrow token costs much for v, little for x_0 (t 0.3 on) or a linear skip"""
    found = [tokens.gaussian_costs(k, t, alpha) for t in ERROR_TIMES]
    v, x, skip = (", ".join(f"{costs[how]:.4f}" for costs in found) for how in ("v", "x", "skip"))
    good = [max(costs["x"], costs["skip"]) < SMALL * costs["v"] and costs["v"] > SMALL
            for costs in found[1:]]
    return (f"{k} dimensions for 48 values, Gaussian images, t = 0.1, 0.3, 0.5, 0.7, 0.9: v {v}; "
            f"x_0 {x}; linear skip {skip}", HOLDS if all(good) else FALSE)


def narrow_input(alpha=1.5):
    """ours: a narrow input costs x_0 much at t = 0.1, little at t = 0.3"""
    early, late = (tokens.token_models(t, alpha)[0].narrow_input_cost(11) for t in (0.1, 0.3))
    cheaper = ", ".join(f"{tokens.x_cheaper_from(a):.2f}" for a in (2, 1.5, 1.25, 1.1))
    return (f"{early:.3f} and {late:.3f} in v, if 11 of 16 directions of each patch are seen. x_0 "
            f"is the cheaper target from t = {cheaper} on, alpha 2, 1.5, 1.25, 1.1",
            HOLDS if early > SMALL and late < NOTICEABLE else FALSE)


def on_shapes():
    """ours: on drawn shapes the bound explains most of what a head gains"""
    found = [(tokens.shapes_bound(k, side)[0, ::2].mean(), tokens.measured_gain(k, side).mean(),
              k, 3 * side**2) for k, side in tokens.TRAINED if k < 3 * side**2]
    text = ", ".join("{:.3f} of {:.3f} ({} for {})".format(*each) for each in found)
    return (f"bound of measured gain: {text}",
            over([MOST < bound / gain < 1 + SMALL for bound, gain, *_ in found]))


def on_photos():
    """ours: on photographs the tokens of DiP-XL/32 cost a plain DiT much, those of DiP-XL/16
    nothing"""
    wide, narrow = ([tokens.photo_bounds(f"photos_256_{side}", 1152, t) for t in ERROR_TIMES]
                    for side in (16, 32))
    v, x = ", ".join(f"{v:.2f}" for v, _ in narrow), ", ".join(f"{x:.4f}" for _, x in narrow)
    return (f"1152 for 3072 values, t = 0.1, 0.3, 0.5, 0.7, 0.9: v at least {v}, x_0 at most {x}; "
            f"1152 for 768 values: {max(wide)[0]:.0f}",
            HOLDS if min(narrow)[0] > SMALL and max(wide)[0] == 0 else FALSE)


CLAIMS = (noise_alone, monotone, magnitude, seeing_both, who_is_lower, nested, second_sum,
          reason_for_34, smallness, first_sum, approximation, limit_of_noise, limit_of_data,
          narrow_token, narrow_input, on_shapes, on_photos)


@cache
def table():
    """Rows of equation, claim, evidence, verdict"""
    return [(*" ".join(claim.split()).split(": ", 1), *found) for claim, found in (
        (f"exact: {', '.join(IDENTITIES)}", exact()),
        *((claim, slip(*sides)) for claim, sides in SLIPS.items()),
        *((claim.__doc__, claim()) for claim in CLAIMS))]
