"""
The verdict on every claim of Eq. (1) to (5) and of Appendix A and B that a computation can settle:
what is exact, what is misprinted, and what sections 4 to 7 of theory/README.md discuss.

A claim is a function that returns a Row.  It computes a figure over all models it is given and
compares it with one of the thresholds below.  tests/test_09_theory.py gives every claim something
for which its verdict must come out otherwise.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from theory import tokens
from theory.model import (GaussianModel, covariance, dct_basis, image_basis, image_decay,
                          random_basis)

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


@dataclass
class Row:
    equation: str
    claim: str
    evidence: str
    verdict: str


@cache
def cases(kind=GaussianModel, spectrum=image_decay):
    """The twelve models of the README at each of TIMES: three bases, two decays, two cuts; of the
    patches one in the middle"""
    return tuple(kind(U, spectrum(64, alpha), patches, len(patches) // 2, r, t)
                 for U, patches in BASES.values() for alpha in (1.5, 2.0) for r in (4, 16)
                 for t in TIMES)


CASES = cases()


def at(models, *times):
    return [m for m in models if m.t in times]


def relative(a, b):
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)


def span(values, digits=2):
    """The least and the largest"""
    return " to ".join(f"{float(f'{x:.{digits}g}'):g}" for x in (min(values), max(values)))


def percent(values):
    """The same of fractions"""
    return span([100 * x for x in values]) + "%"


def by_time(figure, models, times):
    """{t: [figure of each model]}"""
    return {t: [figure(m) for m in at(models, t)] for t in times}


def show(found, form=percent):
    """These in words"""
    return ", ".join(f"{form(values)} (t {t})" for t, values in found.items())


def over(found):
    """Verdict from a list of truths, one for each case or time"""
    return HOLDS if all(found) else CONDITIONAL if any(found) else FALSE


# -------------------------------------------------------------------------------------------------
# What is exact.  Each identity is a function of a model that returns its two sides.


def marginal(lam, t):
    """Variance of x_t, started from variance lam, under dx = -x/2 dt + dw: (1), alpha-bar = e^-t"""
    return 1 + (lam - 1) * np.exp(-t)


def rate(f, t):
    """Its derivative, by a complex step"""
    return f(t + 1e-30j).imag / 1e-30


def steps_of_noise(m):
    """x_t after a thousand steps x -> sqrt(1 - beta) x + sqrt(beta) eps, beta = 1 - e^(-t/1000)"""
    variance, beta = m.lam, -np.expm1(-m.t / 1000)
    for _ in range(1000):
        variance = (1 - beta) * variance + beta
    return variance


def drift(factor):
    """Rate of the variance under dx/dt = -x/2 - factor grad log p_t, where the gradient is
    -x / marginal"""
    return lambda m: 2 * (factor / marginal(m.lam, m.t) - 0.5) * marginal(m.lam, m.t)


def covariances(m):
    """(18), (19), (21), (26), (27), (29): in the parts (x_low, x_high, eps), and as printed"""
    zero, x_t, x_hat = 0 * m.P, m.observation("DiP"), m.observation("DiT")
    eps, x_0, t = (zero, zero, m.P), (m.P, m.P, zero), m.t
    pairs = ((eps, x_t, t * m.P), (x_t, x_t, (1 - t) ** 2 * m.sigma + t**2 * np.eye(m.d)),
             (x_0, x_t, (1 - t) * m.P @ m.sigma), (eps, x_hat, t * m.P),
             (x_hat, x_hat, np.linalg.inv(m.M_hat)), (x_0, x_hat, (1 - t) * m.P @ m.B))
    return [np.concatenate(side) for side in zip(*(
        (covariance(a, b, m.R), printed) for a, b, printed in pairs))]


IDENTITIES = {
    "(1)": lambda m: (steps_of_noise(m), marginal(m.lam, m.t)),
    "(2)": lambda m: (1 - marginal(m.lam, m.t), rate(lambda t: marginal(m.lam, t), m.t)),
    "(3) as reverse SDE": lambda m: (
        drift(1)(m) - 1, rate(lambda t: marginal(m.lam, t), m.t)),
    "(4)": lambda m: (np.sqrt(-np.expm1(-m.t)) / steps_of_noise(m),             # of eps on x_t
                      np.sqrt(-np.expm1(-m.t)) * rate(                          # score at x = -1
                          lambda x: -x**2 / 2 / marginal(m.lam, m.t), -1)),
    "(13)": lambda m: (m.dip_operator, m.best_guess("DiP")[0]),
    "(16)": lambda m: (m.dip_operator, m.V * m.gains @ m.U.T),
    "(18), (19), (21), (26), (27), (29)": covariances,
    "(12), (31)": lambda m: (m.dit_operator, m.best_guess("DiT")[0]),
    "(32)": lambda m: (np.linalg.inv(m.D + m.E), m.M_hat),
    "(33), D-hat diagonal in U": lambda m: (
        m.U.T @ m.D @ m.U, np.diag((1 - m.t) ** 2 * m.lam * (np.arange(m.d) < m.r) + m.t**2)),
    "(35)": lambda m: (sum(m.eq15(True)), m.P @ m.C(as_printed=True) @ m.D_inverse),
    "P gain(Sigma-hat)": lambda m: (m.dit_by_gains, m.dit_operator),
}


def exact(models=CASES):
    worst = {name: max(relative(*sides(m)) for m in models) for name, sides in IDENTITIES.items()}
    wrong = [f"{name} off by {x:.1e}" for name, x in worst.items() if not x < ROUNDING]
    return Row("exact", ", ".join(IDENTITIES), ", ".join(wrong) or "equal up to rounding, all "
               "models, t 0.02 to 0.98", FALSE if wrong else HOLDS)


# -------------------------------------------------------------------------------------------------
# What is printed wrongly: (equation, claim, printed, corrected, exact), of a model


def high(m):
    return m.U[:, m.r:]


SLIPS = (
    ("(3)", "the ODE's drift is f - g^2 grad log p_t, which is that of the reverse SDE (should be "
     "g^2 / 2)", drift(1), drift(0.5), lambda m: rate(lambda t: marginal(m.lam, t), m.t)),
    ("(5)", "the target is u_t(x), the field that is sought; so the least loss is 0 (should be "
     "u_t(x | x_0); the best v is the same)",
     lambda m: 0, lambda m: (m.lam / ((1 - m.t) ** 2 * m.lam + m.t**2) * m.V**2).sum() / len(m.P),
     lambda m: m.error_of(m.dip_operator, "DiP")),
    ("(12), (30), (31)", "DiT's operator is applied to x_t (should be x-hat_t)",
     lambda m: m.error_of(m.dit_operator, "DiP"), lambda m: m.error_of(m.dit_operator, "DiT"),
     lambda m: m.smallest_error("DiT")),
    ("(29), second line", "its last term is Cov(P x_high, Q x_high) (should be (1 - t) times this)",
     lambda m: m.P @ m.sigma_high @ m.Q, lambda m: (1 - m.t) * m.P @ m.sigma_high @ m.Q,
     lambda m: covariance((0 * m.P, m.P, 0 * m.P), m.observation("DiT"), m.R)),
    ("(34)", "its last term is D^-1 E D^-1 D^-1 (should be D^-1 E D^-1)",
     lambda m: m.D_inverse @ m.E @ m.D_inverse @ m.D_inverse,
     lambda m: m.D_inverse @ m.E @ m.D_inverse,
     lambda m: m.D_inverse - (np.eye(m.d) - m.D_inverse @ m.E) @ m.D_inverse),
)


def slip(which, models=CASES):
    equation, claim, *sides = which
    printed, corrected = (max(relative(side(m), sides[2](m)) for m in models)
                          for side in sides[:2])
    found = (HOLDS if printed < ROUNDING else
             MISPRINT if corrected < ROUNDING and printed > NOTICEABLE else FALSE)
    return Row(equation, claim, f"as printed off by up to {printed:.0%}; corrected by up to "
               f"{corrected:.0e}", found)


def share_of_dip(correction, m):
    """Norm of a correction of high frequencies over that of DiP"""
    return np.linalg.norm(correction) / np.linalg.norm(m.dip_operator @ high(m))


def second_sum(models=CASES):
    """(33) and (15): one slip, and the conclusion for t -> 1 is read off it."""
    off = {printed: max(relative(m.C(printed) @ high(m), m.B_hat @ high(m)) for m in models)
           for printed in (True, False)}
    size = {printed: [share_of_dip(m.eq15(printed)[1], m) for m in at(models, 0.9, 0.98)]
            for printed in (True, False)}
    found = (HOLDS if off[True] < ROUNDING else FALSE if off[False] > ROUNDING else
             ERROR if max(size[True]) < NEGLIGIBLE < min(size[False]) else MISPRINT)
    return Row("(33), (15)", "DiT's second sum has lam_i / t, as (33) has t lam_i (should be 1 / t "
               "and t)", f"(33) is off by up to {off[True]:.0%}; with t by {off[False]:.0e}. At "
               f"t = 0.9, 0.98 the sum is {percent(size[True])} of DiP's corrections as printed, "
               f"{percent(size[False])} with 1 / t. The conclusion for t -> 1 rests on it", found)


# -------------------------------------------------------------------------------------------------
# Sections 4 and 5: what Remark A.7 reads off (16), and what the two models see


def noise_alone(models=CASES):
    part = []
    for m in at(models, 0.3, 0.5, 0.7, 0.9):
        root = np.sqrt((1 - m.t) ** 2 * m.lam + m.t**2)                  # of the variance of x_t
        data = (1 - m.t) * m.P @ m.sigma @ m.M                           # Eq. (22) without P mu
        part.append(np.square(data @ m.U * root).sum()
                    / np.square(m.dip_operator @ m.U * root).sum())
    return Row("Remark A.7", "in (12), (13) the first term is the noise, the second the data",
               "the second term is -P mu, a constant; the guess of x_0 - mu is in the first, with "
               f"{percent(part)} of its mean square, t 0.3 to 0.9",
               HOLDS if max(part) < NOTICEABLE else FALSE)


def monotone(models=CASES):
    least = min(np.diff(m.gains).min() for m in models)
    return Row("Remark A.7", "the gain rises as lam falls", f"from each frequency to the next by "
               f"at least {least:.1e}", HOLDS if least > 0 else FALSE)


def magnitude(models=CASES):
    border = {m.lam[0] / (1 + m.lam[0]) for m in models}
    return Row("Remark A.7", "so its size grows as lam falls", "the gain is 0 at lam = t / (1-t), "
               "so its size grows over all lam only if t > lam_1 / (1 + lam_1): "
               f"0.5 with lam_1 = 1 as in A.4, {span(border)} in these images",
               over([(np.diff(abs(m.gains)) > 0).all() for m in models]))


def seeing_both(models=CASES):
    gain = by_time(lambda m: 1 - m.mean_error("both") / m.mean_error("DiP"), models, (0.3, 0.9))
    return Row("(11)", "x_t and what DiT sees are together x_t", "given both, the smallest error "
               f"is lower by {show(gain)}: x_t - x-hat_t = (1-t) x_high outside the patch, free of "
               "noise", FALSE if max(gain[0.3]) > NOTICEABLE else HOLDS)


def who_is_lower(models=CASES):
    x = np.array([m.mean_error("DiT") / m.mean_error("DiP") for m in at(models, *ERROR_TIMES)])
    return Row("(11), Remark A.7", "DiP sees more, so its error is never larger than DiT's",
               f"of {len(x)} cases DiT's error is by 1% or more lower in {(x < 0.99).sum()} (at "
               f"best {1 - x.min():.1%}), higher in {(x > 1.01).sum()} (up to {x.max() - 1:.0%})",
               HOLDS if x.min() > 1 - NOTICEABLE else FALSE)


def nested(models=CASES):
    """Section 5's repair: what DiT sees is part of x_t."""
    best, least, clear = {}, np.inf, 0
    for m in at(models, *ERROR_TIMES):
        patch, low, full = (m.mean_error(who) for who in ("patch", "patch and low", "DiP"))
        least = min(least, 1 - full / low, 1 - low / patch)
        clear += 1 - full / low > NOTICEABLE
        name = next(name for name, (U, _) in BASES.items() if U is m.U)
        best[name] = max(best.get(name, (0, m.r, m.t)), (1 - full / low, m.r, m.t))
    text = ", ".join(f"{gain:.1%} ({name}, r {r}, t {t})" for name, (gain, r, t) in best.items())
    return Row("(11), repaired", "if DiT sees its patch and the low part of x_t, DiP is better",
               f"in every case, by 1% or more in {clear}; by up to {text}",
               HOLDS if least > -ROUNDING and clear else FALSE)


# -------------------------------------------------------------------------------------------------
# Section 6: Eq. (15) and its limits


def reason_for_34(models=CASES):
    at_cut = {(m.lam[m.r] / m.lam[m.r - 1]) for m in models}
    return Row("(34)", "lam_j / lam_i is small for all i <= r < j", f"lam_(r+1) / lam_r is "
               f"{span(at_cut)}, at every t", over([x < SMALL for x in at_cut]))


def smallness(models=CASES):
    times = np.arange(1, 50) / 50
    norms = np.array([[replace(m, t=t).smallness for t in times] for m in at(models, 0.5)])
    first = [times[np.argmax(row < SMALL)] for row in norms]
    return Row("(34)", "D^-1 E is small", f"its norm is below {SMALL} from t = {span(first)} on; "
               "it is at most (1-t)^2 lam_(r+1) / t^2", over(norms.ravel() < SMALL))


def first_sum(models=CASES):
    def share(m):
        low, _, i_1, _ = m.eq15(as_printed=False)
        return np.linalg.norm(i_1) / np.linalg.norm(low)

    early = [replace(m, t=0.001) for m in at(models, 0.5)]
    size = by_time(share, [*early, *models], (0.001, 0.3, 0.98))
    return Row("(15)", "I_1 = o(1), next to the first sum", "the paper names no limit; I_1 has "
               f"{show(size)} of its norm", over([max(x) < NOTICEABLE for x in size.values()]))


def approximation(models=CASES):
    off = by_time(lambda m: relative(sum(m.eq15(False)), m.dit_operator), models, ERROR_TIMES)
    early = [replace(m, t=0.01) for m in at(models, 0.5)]
    i_2 = [np.linalg.norm(m.eq15(False)[3]) / np.linalg.norm(m.dit_operator) for m in early]
    return Row("(15)", "with 1 / t it approximates P B-hat M-hat", f"off by {show(off)}; I_2 grows "
               f"as 1 / t^2, to {span(i_2)} times the norm of P B-hat M-hat at t = 0.01",
               over([max(x) < SMALL for x in off.values()]))


def limit_of_noise(models=CASES):
    size = by_time(lambda m: share_of_dip(m.dit_operator @ high(m), m), models, (0.3, 0.5, 0.9))
    return Row("Remark A.7, t -> 1", "DiT's corrections of high frequencies are negligible",
               f"they are {show(size, lambda x: f'{min(x):.2f} to {max(x):.2f}')} times DiP's",
               over([x < NEGLIGIBLE for x in size[0.9]]))


@cache
def norms(models):
    """(cases, 2, times): spectral norms of DiT's and DiP's operators over NORM_TIMES"""
    later = [[replace(m, t=t) for t in NORM_TIMES] for m in at(models, 0.5)]
    return np.array([[[np.linalg.norm(m.dit_operator, 2) for m in row],
                      [np.linalg.norm(m.dip_operator, 2) for m in row]] for row in later])


def limit_of_data(models=CASES):
    found = norms(models)
    ratio = np.divide(*found.max(axis=2).T)
    return Row("Remark A.7, t -> 0", "DiT's corrections lose stability, DiP's are robust",
               "neither is defined. Read as: DiT's norm has the higher peak over t. It is "
               f"{span(ratio)} times DiP's, higher in {(ratio > 1 + NOTICEABLE).sum()} of "
               f"{len(ratio)} cases; at t = 1e-7 both are {span(found[:, :, 0].ravel())}",
               over(ratio > 1 + NOTICEABLE))


# -------------------------------------------------------------------------------------------------
# Section 7: the rank of a token


def narrow_token(alpha=1.5, k=32):
    found = {t: tokens.gaussian_costs(k, t, alpha) for t in ERROR_TIMES}
    text = {how: ", ".join(f"{costs[how]:.4f}" for costs in found.values()) for how in found[0.1]}
    late = [costs for t, costs in found.items() if t >= 0.3]
    dear = all(costs["v"] > SMALL for costs in late)
    cheap = all(max(costs["x"], costs["skip"]) < SMALL * costs["v"] for costs in late)
    return Row("ours", "a narrow token costs much for v, little for x_0 (t 0.3 on) or a linear "
               "skip", f"{k} dimensions for 48 values, Gaussian images, t = 0.1, 0.3, 0.5, 0.7, "
               f"0.9: v {text['v']}; x_0 {text['x']}; linear skip {text['skip']}",
               over([dear and cheap]))


def narrow_input(alpha=1.5):
    costs = [tokens.token_models(t, alpha)[0].narrow_input_cost(11) for t in (0.1, 0.3)]
    decays = 2, 1.5, 1.25, 1.1
    return Row("ours", "a narrow input costs x_0 much at t = 0.1, little at t = 0.3",
               f"{costs[0]:.3f} and {costs[1]:.3f} in v, if 11 of 16 directions of each patch are "
               "seen. x_0 is the cheaper target from t = "
               + ", ".join(f"{tokens.x_cheaper_from(a):.2f}" for a in decays)
               + f" on, alpha {', '.join(map(str, decays))}",
               over([costs[0] > SMALL and costs[1] < NOTICEABLE]))


def on_shapes():
    narrow = [key for key in tokens.TRAINED if key[0] < 3 * key[1] ** 2]
    share, text = [], []
    for k, side in narrow:
        bound = tokens.shapes_bound(k, side)[0, ::2].mean()
        gain = tokens.measured_gain(k, side).mean()
        share.append(bound / gain)
        text.append(f"{bound:.3f} of {gain:.3f} ({k} for {3 * side**2})")
    return Row("ours", "on drawn shapes the bound explains most of what a head gains", "bound of "
               f"measured gain: {', '.join(text)}", over([MOST < x < 1 + SMALL for x in share]))


def on_photos():
    bounds = {side: [tokens.photo_bounds(f"photos_256_{side}", 1152, t) for t in ERROR_TIMES]
              for side in (16, 32)}
    least, most = zip(*bounds[32])
    text = ", ".join(f"{x:.2f}" for x in least), ", ".join(f"{x:.4f}" for x in most)
    return Row("ours", "on photographs the tokens of DiP-XL/32 cost a plain DiT much, those of "
               "DiP-XL/16 nothing", "1152 for 3072 values, t = 0.1, 0.3, 0.5, 0.7, 0.9: v at "
               f"least {text[0]}, x_0 at most {text[1]}; 1152 for 768 values: "
               f"{max(bounds[16])[0]:.0f}",
               over([min(least) > SMALL and max(bounds[16])[0] == 0]))


CLAIMS = (noise_alone, monotone, magnitude, seeing_both, who_is_lower, nested, second_sum,
          reason_for_34, smallness, first_sum, approximation, limit_of_noise, limit_of_data,
          narrow_token, narrow_input, on_shapes, on_photos)


@cache
def table():
    return [exact(), *map(slip, SLIPS), *(claim() for claim in CLAIMS)]
