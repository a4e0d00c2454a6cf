"""
Every claim of Eq. (1) to (5) and of Appendix A and B that a computation can settle, in the order of
theory/README.md: a row of the table of `python -m theory`.

A claim is a function that returns a Row.  Its verdict is computed, not written down: from the
largest error over all cases tried, or from the counterexample in `evidence`.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.integrate import quad

from theory.model import (GaussianModel, cost_passed_on, cost_unseen, dct_basis, decay,
                          draw_images, gain, gain_peak, gain_slope, image_basis, image_decay,
                          random_basis)

HOLDS, MISPRINT, FALSE, CONDITIONAL = "holds", "misprint", "does not hold", "conditional"
ROUNDING = 1e-9                              # what float64 may lose in these sums and inverses

TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)             # for identities
COMPARED = (0.3, 0.5, 0.7, 0.9)                           # for sizes: at 0.98 all models copy
ERROR_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)                   # for errors
NORM_TIMES = np.logspace(-7, np.log10(0.98), 141)
BASES = {"DCT": dct_basis(64, 8), "2-D DCT": image_basis(8, 4), "rotation": random_basis(64, 8)}


@dataclass
class Row:
    equation: str
    claim: str
    evidence: str
    verdict: str


def cases(times=TIMES, alphas=(1.5, 2.0), cuts=(4, 16), spectrum=image_decay):
    """Models over bases, decays, cuts and times: the twelve of the README at each time.  Patch 4
    of 8, in the middle; of an image's four, which are alike, one."""
    for U, pixels in BASES.values():
        for alpha in alphas:
            for r in cuts:
                for t in times:
                    yield GaussianModel(U, spectrum(len(U), alpha), pixels[len(pixels) // 2], r, t)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def mean_error(basis, lam, r, t, who):
    """Smallest mean squared error of the velocity, a pixel, averaged over all patches."""
    U, pixels = basis
    return np.mean([GaussianModel(U, lam, p, r, t).smallest_error(who) for p in pixels])


def span(values, digits=2):
    """The least and the largest"""
    return " to ".join(f"{float(f'{x:.{digits}g}'):g}" for x in (min(values), max(values)))


def percent(values):
    """The same of fractions"""
    return span([100 * x for x in values]) + "%"


def equality(equation, claim, how, worst):
    """The row of an equation that should hold exactly"""
    holds = worst < ROUNDING
    text = "equal up to rounding" if holds else f"off by {worst:.1e}"
    return Row(equation, claim, f"{text}: {how}", HOLDS if holds else FALSE)


def slip(equation, claim, printed, corrected, what, form):
    """The row of a misprint: `printed` errors, all large, and those of the corrected form, all
    rounding"""
    found = min(printed) > 0.01 and max(corrected) < ROUNDING
    return Row(equation, claim, f"{what}: as printed off by {min(printed):.0%} or more; {form}, "
               "equal up to rounding",
               MISPRINT if found else HOLDS if max(printed) < ROUNDING else FALSE)


# -------------------------------------------------------------------------------------------------
# Before the appendix: Eq. (1) to (5)


def noising_steps():
    """(1) is what single steps compose to; (4) is least at a multiple of the score's gradient."""
    lam, kept, variance, worst = 0.25, 1.0, 0.25, 0.0
    for beta in np.linspace(1e-4, 0.02, 1000):
        kept, variance = kept * (1 - beta), (1 - beta) * variance + beta
        marginal = kept * lam + 1 - kept                                # variance of x_t by (1)
        regression = np.sqrt(1 - kept) / variance                       # of eps on x_t
        score = (-(0.7 + 1e-30j) ** 2 / 2 / marginal).imag / 1e-30      # gradient of log p at 0.7
        worst = max(worst, abs(variance - marginal),
                    abs(regression * 0.7 + np.sqrt(1 - kept) * score))
    return equality("(1), (4)", "steps of noise compose to x_t; the best eps_theta gives the score",
                    "it is -sqrt(1 - alpha-bar) times the gradient of log p_t, which the line "
                    "below (3) lacks; one dimension, 1000 steps", worst)


def flow_variance(factor, start=0.25):
    """Variance at time 1 of dx/dt = f - factor g^2 grad log p_t, with f = -x/2 and g = 1, started
    from N(0, start); grad log p_t = -x / (1 + (start - 1) e^-t)."""
    growth = quad(lambda t: -1 + 2 * factor / (1 + (start - 1) * np.exp(-t)), 0, 1)[0]
    return start * np.exp(growth)


def probability_flow():
    exact = 1 - 0.75 * np.exp(-1)
    return slip("(3)", "the drift of the probability flow ODE is f - g^2 grad log p_t (should be "
                "g^2 / 2)",
                [abs(flow_variance(1) / exact - 1)], [abs(flow_variance(0.5) / exact - 1)],
                "as a variance", "with g^2 / 2")


# -------------------------------------------------------------------------------------------------
# Sections 3 to 5: moments and the two best guesses


def moments():
    """(17)-(19), (21), (26), (27), (29), by drawing images as the definitions say."""
    worst, entries, n = 0.0, 0, 50_000
    U, pixels = BASES["DCT"]
    model = GaussianModel(U, image_decay(64, 1.5), pixels[3], 8, 0.4)
    mu = np.linspace(-1, 1, 64)
    x_0, eps, x_t, x_hat = draw_images(model, mu, n)
    t, P, I = model.t, model.P, np.eye(64)
    low_high = model.sigma_low + model.sigma_high @ model.Q
    for a, b, expected in (
        (eps, x_t, t * P),                                                           # (18)
        (x_t, x_t, (1 - t) ** 2 * model.sigma + t**2 * I),                           # (19)
        (x_0, x_t, (1 - t) * P @ model.sigma),                                       # (21)
        (eps, x_hat, t * P),                                                         # (26)
        (x_hat, x_hat, np.linalg.inv(model.M_hat)),                                  # (27)
        (x_0, x_hat, (1 - t) * P @ low_high),                                        # (29)
    ):
        if len(expected) < 64:
            a = a[:, model.pixels]
        a, b = a - a.mean(0), b - b.mean(0)
        got = a.T @ b / n
        spread = np.sqrt((np.outer(a.var(0), b.var(0)) + expected**2) / n)     # of a covariance
        worst, entries = max(worst, np.abs((got - expected) / spread).max()), entries + got.size
    for x, expected in ((eps, np.zeros(64)), (x_t, (1 - t) * mu)):                   # (17)
        spread = x.std(0) / np.sqrt(n)
        worst, entries = max(worst, np.abs((x.mean(0) - expected) / spread).max()), entries + 64
    return Row("(17)-(19), (21), (26), (27), (29)", "means, covariances of eps, x_0, x_t, "
               "x-hat_t", f"{n:,} images drawn by (6), (9), (10): the largest of {entries:,} "
               f"deviations is {worst:.1f} standard errors", HOLDS if worst < 5.5 else FALSE)


def second_line_of_29():
    """It lacks the factor 1 - t on its second covariance; the last line has it."""
    printed, corrected = [], []
    for m in cases((0.3, 0.7)):
        exact = m.P @ m.sigma_high @ m.observation("DiT")[1].T
        printed.append(relative(m.P @ m.sigma_high @ m.Q, exact))
        corrected.append(relative((1 - m.t) * m.P @ m.sigma_high @ m.Q, exact))
    return slip("(29), second line", "its last term is Cov(P x_high, Q x_high) (should be (1 - t) "
                "times this)", printed, corrected, "covariance with x-hat_t",
                "times 1 - t, as in the last line")


def dip_is_exact():
    worst = max(relative(m.dip_operator, m.best_guess("DiP")[0]) for m in cases())
    return equality("(13), (14)", "P A M is the best guess given x_t", "joint Gaussian, "
                    "conditioned", worst)


def eigen_form():
    worst = max(relative(m.dip_operator, m.V * m.gains @ m.U.T) for m in cases())
    return equality("(16)", "P A M multiplies each frequency by its gain", "matrices of (14)",
                    worst)


def noise_alone():
    """Remark A.7 reads the first term of (13) as the noise: it is E[eps] and E[x_0] - mu."""
    exact, part = [], []
    for m in cases(COMPARED):
        noise = m.t * m.P @ m.M                                          # Eq. (20)
        data = (1 - m.t) * m.P @ m.sigma @ m.M                           # Eq. (22), without P mu
        exact.append(relative(noise - data, m.dip_operator))
        root = np.sqrt((1 - m.t) ** 2 * m.lam + m.t**2)                  # of the variance of x_t
        part.append(np.square(data @ m.U * root).sum()
                    / np.square(m.dip_operator @ m.U * root).sum())
    holds = max(exact) > ROUNDING or max(part) < 0.01
    return Row("Remark A.7", "in (12), (13) the first term is the noise, the second the data",
               "the first is E[eps | .] - (E[x_0 | .] - mu) in the patch, the second only "
               f"-P mu; E[x_0 | .] - mu has {percent(part)} of the mean square of the first, t 0.3 "
               "to 0.9",
               HOLDS if holds else FALSE)


def monotone():
    lam, worst, steepest = np.logspace(-6, 2, 400), 0.0, -np.inf
    for t in TIMES:
        slope = gain(lam + 1e-30j, t).imag / 1e-30               # by complex step: no cancellation
        worst = max(worst, relative(slope, gain_slope(lam, t)))
        steepest = max(steepest, slope.max())
    row = equality("Remark A.7", "the gain rises as lam falls", "its slope in lam is "
                   "-t (1-t) / ((1-t)^2 lam + t^2)^2, negative", worst)
    return row if steepest < 0 else Row(row.equation, row.claim, f"slope {steepest:.1e}", FALSE)


def magnitude():
    sizes = [gain(lam, 0.1) for lam in (1, 1 / 9, 0.01)]
    rising = abs(sizes[0]) <= abs(sizes[1]) <= abs(sizes[2])
    return Row("Remark A.7", "so its size grows as lam falls", "the gain changes sign at "
               f"lam = t / (1-t): at t = 0.1 it is {sizes[0]:.2f} at lam 1, {abs(sizes[1]):.0f} at "
               f"1/9, {sizes[2]:.1f} at 0.01. Only the signed gain is monotone",
               HOLDS if rising else FALSE)


def dit_given_x_hat():
    worst = max(relative(m.dit_operator, m.best_guess("DiT")[0]) for m in cases())
    return equality("(12), (31)", "P B-hat M-hat is the best guess given x-hat_t",
                    "joint Gaussian, conditioned", worst)


def dit_given_x_t():
    """The theorem, (30) and (31) print x_t where the proof conditions on x-hat_t."""
    ratios = [(m.error_of(m.dit_operator, "DiP") / m.smallest_error("DiP"), m.t)
              for m in cases(ERROR_TIMES)]
    worst, t = max(ratios)
    return Row("(12), (30), (31)", "and is applied to x_t (should be x-hat_t)",
               "then its error is up to "
               f"{worst:.2f} times the smallest given x_t (t = {t}); the proof conditions on "
               "x-hat_t", MISPRINT if worst > 1.01 else HOLDS)


def seeing_both():
    """x-hat_t is not a function of x_t: seeing both is worth more than x_t."""
    found = {t: [1 - mean_error(basis, image_decay(64, 2.0), 16, t, "both")
                 / mean_error(basis, image_decay(64, 2.0), 16, t, "DiP")
                 for basis in BASES.values()] for t in (0.3, 0.9)}
    return Row("(11)", "x_t and what DiT sees are together x_t", "given both, the smallest "
               f"error is lower by {percent(found[0.3])} (t 0.3), {percent(found[0.9])} (t 0.9), "
               "alpha 2, r 16: x_t - x-hat_t = (1-t) x_high outside the patch, free of noise",
               FALSE if min(found[0.3]) > 0.01 else HOLDS)


@cache
def error_ratios(spectrum):
    """{(r, alpha, basis, t): DiT's smallest error over DiP's}, as the paper defines what they see;
    means over all patches"""
    found = {}
    for name, basis in BASES.items():
        for alpha in (1.5, 2.0):
            for t in ERROR_TIMES:
                full = mean_error(basis, spectrum(64, alpha), 1, t, "DiP")
                for r in (4, 16):
                    dit = mean_error(basis, spectrum(64, alpha), r, t, "DiT")
                    found[r, alpha, name, t] = dit / full
    return found


def who_is_lower():
    def sizes(spectrum):
        x = np.array(list(error_ratios(spectrum).values()))
        return (f"by 1% or more lower in {(x <= 0.99).sum()} (at best {1 - x.min():.1%}), higher "
                f"in {(x >= 1.01).sum()} (up to {x.max() - 1:.0%})")

    holds = min(error_ratios(image_decay).values()) > 0.99
    return Row("(11), Remark A.7", "DiP sees more, so its error is never larger than DiT's", "of "
               f"{len(error_ratios(decay))} cases DiT's error is {sizes(image_decay)}, else "
               f"within 1%; with lam_1 = 1 {sizes(decay)}. Alpha 1.5 and 2, r 4 and 16, t 0.1 to "
               "0.9",
               HOLDS if holds else FALSE)


def nested():
    """Where information is nested, errors are ordered."""
    worst, gains = 0.0, []
    for basis in BASES.values():
        for t in COMPARED:
            patch, low, full = (mean_error(basis, image_decay(64, 2.0), 16, t, who)
                                for who in ("patch", "patch and low", "DiP"))
            worst = max(worst, full / low - 1, low / patch - 1)
            gains.append(1 - full / low)
    return Row("ours", "error given x_t <= given patch and low part of x_t <= given patch",
               f"in every case, alpha 2, r 16, t 0.3 to 0.9; all of x_t is at most "
               f"{max(gains):.1%} better than patch and low", HOLDS if worst < ROUNDING else FALSE)


# -------------------------------------------------------------------------------------------------
# Section 6: Theorem A.6 is section 4 for another image; Eq. (15) and its proof


def gain_of_sigma_hat():
    worst = max(relative(m.dit_by_gains, m.dit_operator) for m in cases())
    return equality("ours", "P B-hat M-hat = P gain(Sigma-hat)", "Sigma-hat = Sigma_low + Q "
                    "Sigma_high Q is the covariance of x-hat_0, which is x_0 in the patch; the "
                    "gain of each of its eigenvalues", worst)


def c_hat():
    printed, corrected = ([relative((m.C1 + m.C2(which)) @ m.U[:, m.r:], m.B_hat @ m.U[:, m.r:])
                           for m in cases(COMPARED)] for which in (True, False))
    return slip("(33)", "B-hat = C-hat_1 + C-hat_2, of which C-hat_2 begins with t lam_i "
                "(should be t)",
                printed, corrected, "at high frequency", "with t alone")


def d_and_e():
    worst = max(relative(np.linalg.inv(m.D + m.E), m.M_hat) for m in cases())
    return equality("(32), (33)", "M-hat^-1 = D-hat + E-hat", "matrices of (14)", worst)


def diagonal():
    rotated, outside = 0.0, []
    for m in cases(COMPARED):
        in_U = m.U.T @ m.D @ m.U
        rotated = max(rotated, relative(np.diag(np.diag(in_U)), in_U))
        outside.append(relative(np.diag(np.diag(m.D)), m.D))
    found = (CONDITIONAL if max(outside) > 0.01 else HOLDS) if rotated < ROUNDING else FALSE
    return Row("(34)", "D-hat is diagonal", "only in the basis U; between pixels "
               f"{percent(outside)} of its norm is off the diagonal, t 0.3 to 0.9", found)


def last_term_of_34():
    printed, corrected = [], []
    for m in cases((0.3, 0.7)):
        term = m.D_inverse @ m.E @ m.D_inverse
        exact = m.D_inverse - (np.eye(m.d) - m.D_inverse @ m.E) @ m.D_inverse
        printed.append(relative(term @ m.D_inverse, exact))
        corrected.append(relative(term, exact))
    return slip("(34)", "its last term is D^-1 E D^-1 D^-1 (should be D^-1 E D^-1)", printed,
                corrected, "the step before it", "with one D^-1 less")


def reason_for_34():
    lam, (U, pixels) = image_decay(64, 2.0), BASES["DCT"]
    at = {t: GaussianModel(U, lam, pixels[4], 16, t).smallness for t in (0.1, 0.9)}
    return Row("(34)", "D^-1 E is small because lam_j / lam_i is, i <= r < j",
               f"lam_17 / lam_16 = {lam[16] / lam[15]:.3f} (alpha 2) at every t, while the norm of "
               f"D^-1 E is {at[0.1]:.2g} at t = 0.1 and {at[0.9]:.1g} at 0.9: what matters is "
               "lam_(r+1) / t^2", FALSE if lam[16] / lam[15] > 0.1 > at[0.9] else HOLDS)


def smallness():
    """D^-1 E is small: where?"""
    def border(spectrum, alpha):
        U, pixels = BASES["DCT"]
        small = [GaussianModel(U, spectrum(64, alpha), pixels[4], 16, t).smallness < 0.1
                 for t in np.arange(1, 100) / 100]
        return 1 + int(np.flatnonzero(np.diff([False] + small))[-1])    # in hundredths

    found = {spectrum: [border(spectrum, alpha) for alpha in (1.5, 2.0, 4.0)]
             for spectrum in (image_decay, decay)}
    text = {key: ", ".join(f"{t / 100:g}" for t in value) for key, value in found.items()}
    return Row("(34)", "D^-1 E is small", f"norm below 0.1 from t = {text[image_decay]} on (alpha "
               f"1.5, 2, 4; DCT, r 16); with lam_1 = 1 {text[decay]}. So t -> 0 is outside",
               CONDITIONAL if max(found[image_decay]) > 1 else HOLDS)


def second_sum():
    printed, corrected = ({t: [relative(sum(m.eq15(which)), m.dit_operator)
                               for m in cases((t,))] for t in (0.3, 0.9)}
                          for which in (True, False))
    found = min(printed[0.9]) > 0.1 > max(corrected[0.9])
    return Row("(15), second sum", "it has lam_i / t (should be 1 / t)",
               "as printed (15) is off by "
               f"{percent(printed[0.3])} (t 0.3), {percent(printed[0.9])} (t 0.9) of P B-hat "
               f"M-hat; with 1 / t by {percent(corrected[0.3])}, {percent(corrected[0.9])}",
               MISPRINT if found else HOLDS)


def first_sum():
    """P C1 D^-1 in exact algebra; and what the exact operator does at low frequency."""
    worst, sizes = 0.0, {}
    for m in cases(COMPARED):
        low, _, i_1, _ = m.eq15(as_printed=False)
        worst = max(worst, relative(low, m.P @ m.C1 @ m.D_inverse))
        exact = m.dit_operator @ m.U[:, :m.r] @ m.U[:, :m.r].T
        sizes.setdefault(m.t, []).append([
            relative(low, exact), relative(low + i_1, exact),
            np.linalg.norm(i_1) / np.linalg.norm(low)])
    near, far = (list(zip(*sizes[t])) for t in (0.3, 0.9))
    return Row("(15), first sum", "with I_1 = o(1) it is what DiT does to low frequencies",
               "alone it is off "
               f"by {percent(near[0])} (t 0.3), {percent(far[0])} (t 0.9), with I_1 by "
               f"{percent(near[1])}, {percent(far[1])}; I_1 has {percent(near[2])}, "
               f"{percent(far[2])} of its norm",
               FALSE if worst > ROUNDING else CONDITIONAL if max(near[2]) > 0.01 else HOLDS)


def next_term():
    """(34) is of first order, (15) uses its zeroth term only."""
    gains = {t: [relative(sum(m.eq15(False)), m.dit_operator)
                 / relative(sum(m.eq15(False)) + m.next_term, m.dit_operator)
                 for m in cases((t,))] for t in (0.3, 0.9)}
    worse = [max(m.t for m in models if relative(sum(m.eq15(False)) + m.next_term, m.dit_operator)
                 > relative(sum(m.eq15(False)), m.dit_operator))
             for models in zip(*(cases((t,)) for t in np.arange(6, 27) / 100))]
    return Row("(15)", "with 1 / t it approximates P B-hat M-hat", "to zeroth order in "
               "D^-1 E, with the errors above (Frobenius norm); the next term, - P C D^-1 E D^-1, "
               f"divides them by {span(gains[0.3])} (t 0.3), {span(gains[0.9])} (t 0.9), and makes "
               f"them worse up to t = {span(worse)}",
               CONDITIONAL if min(gains[0.3]) > 1 else FALSE)


def limit_of_noise():
    """Corrections by DiT at high frequency against those by DiP, of the velocity and of x_0."""
    velocity, data = {}, {}
    for m in cases(COMPARED):
        high = m.U[:, m.r:]
        seen = (1 - m.t) * m.P @ (m.sigma_low + m.sigma_high @ m.Q) @ m.M_hat        # Eq. (30)
        full = (1 - m.t) * m.P @ m.sigma @ m.M                                       # Eq. (22)
        velocity.setdefault(m.t, []).append(np.linalg.norm(m.dit_operator @ high)
                                            / np.linalg.norm(m.dip_operator @ high))
        data.setdefault(m.t, []).append(np.linalg.norm(seen @ high)
                                        / np.linalg.norm(full @ high))
    text = ", ".join(f"{min(x):.2f} to {max(x):.2f} (t {t})" for t, x in velocity.items()
                     if t != 0.7)
    return Row("Remark A.7, t -> 1", "DiT's corrections of high frequencies are negligible",
               f"DiT's are {text} times DiP's. Only its estimate of x_0, a small part of the "
               f"velocity there, is smaller: {percent(data[0.9])} of DiP's (t 0.9)",
               FALSE if min(velocity[0.9]) > 0.9 else HOLDS)


# -------------------------------------------------------------------------------------------------
# Section 6, t -> 0: the norms of the exact operators


@cache
def operator_norms(spectrum):
    """(12 cases, 2, times): spectral norms of DiT's and DiP's operators over NORM_TIMES"""
    norms = [[np.linalg.norm(m.dit_operator, 2), np.linalg.norm(m.dip_operator, 2)]
             for m in cases(NORM_TIMES, spectrum=spectrum)]
    return np.array(norms).reshape(12, len(NORM_TIMES), 2).swapaxes(1, 2)


def limit_of_data():
    found = {}
    for spectrum in (image_decay, decay):
        norms = operator_norms(spectrum)
        peaks = norms.max(axis=2)
        found[spectrum] = (np.abs(norms[:, :, 0] - 1).max(axis=1) < 0.005).sum(), peaks[:, 0] / \
            peaks[:, 1]
    (ones, ratio), (_, unscaled) = found[image_decay], found[decay]
    limit = ones > 6 and operator_norms(image_decay)[:, :, :2].argmax(axis=2).max() == 1
    return Row("Remark A.7, t -> 0", "DiT's corrections of high frequencies lose stability", "both "
               f"operators tend to -P, norm 1 (at t = 1e-7 both have 1.00 in {ones} of 12 cases, "
               f"the others still fall). In between both have a peak: DiT's is {span(ratio)} times "
               f"DiP's, more than 1% above it in {(ratio > 1.01).sum()}; with lam_1 = 1 "
               f"{span(unscaled)}, {(unscaled > 1.01).sum()}",
               CONDITIONAL if limit else HOLDS)


def peak_of_dit():
    """The peak over t of one eigenvector of Sigma-hat, against that of the whole operator"""
    models = list(cases((0.5,)))
    ratio = operator_norms(image_decay)[:, 0].max(axis=1) / [m.dit_peak for m in models]
    U, pixels = BASES["DCT"]
    middle, border = (GaussianModel(U, image_decay(64, 2.0), pixels[s], 16, 0.5).dit_peak
                      for s in (4, 0))
    holds = 0.995 < ratio.min() and ratio.max() < 1.05
    return Row("ours", "DiT's peak is that of one eigenvector n of Sigma-hat, |P n| (1 + nu) / "
               "(2 sqrt(nu))", f"the norm's peak is {span(ratio, 3)} times the largest of these, "
               f"of 12. It depends on the patch: DCT, alpha 2, r 16: {middle:.0f} in the middle, "
               f"{border:.0f} at the border", HOLDS if holds else FALSE)


def dip_peak(d, spectrum, p=8):
    """(norm, bound): the largest norm over t of DiP's operator, middle patch, DCT, alpha 2"""
    U, pixels = dct_basis(d, p)
    lam, V = spectrum(d, 2.0), U[pixels[len(pixels) // 2]]
    near = gain_peak(lam[-1])[0] * np.logspace(-0.5, 0.5, 81)
    squares = [np.linalg.eigvalsh((V * gain(lam, t) ** 2) @ V.T)[-1] for t in near]
    return np.sqrt(max(squares)), gain_peak(lam[-1])[1]


def dip_robust():
    text, worst = [], []
    for spectrum in (image_decay, decay):
        peaks = operator_norms(spectrum)[:, 1].max(axis=1)
        large, bound = dip_peak(1024, spectrum)
        worst.append(large)
        text.append(f"{span(peaks, 3)}; DCT, alpha 2: {dip_peak(64, spectrum)[0]:.1f} at d 64, "
                    f"{large:.0f} at d 1024 (at most (1 + lam_d) / (2 sqrt(lam_d)) = {bound:.0f})")
    return Row("Remark A.7", "DiP's corrections are robust", "its norm has a peak "
               f"near t = sqrt(lam_d): {text[0]}; with lam_1 = 1 {text[1]}. A large norm is not a "
               "large error, for DiT as for DiP", CONDITIONAL if max(worst) > 10 else HOLDS)


# -------------------------------------------------------------------------------------------------
# Section 7: the rank of a token


def high_frequency_costs():
    worst = max(max(abs(cost_unseen(1e-10, t) - 1), cost_passed_on(1e-10, t)) for t in TIMES)
    return Row("ours", "not to see a frequency with lam -> 0 costs 1, but 0 if x_t / t is passed "
               "on", "(t - (1-t) lam)^2 / ((1-t)^2 lam + t^2) and ((1-t) lam)^2 / "
               "(t^2 ((1-t)^2 lam + t^2)): at lam 1e-10 within "
               f"{worst:.0e}, t 0.02 to 0.98", HOLDS if worst < 1e-5 else FALSE)


def token_models(t):
    """The images of experiments/gaussian.py: 16 x 16 cosines, alpha 1.5, each patch of 4 x 4 (in
    each of three channels, which are independent)"""
    U, patches = image_basis(16, 4)
    return [GaussianModel(U, image_decay(256, 1.5), pixels, 1, t) for pixels in patches]


@cache
def token_costs(k, t):
    """{"v", "x", "skip"} for these images, mean over patches"""
    costs = [m.token_costs(k, channels=3) for m in token_models(t)]
    return {how: float(np.mean([c[how] for c in costs])) for how in costs[0]}


def narrow_token():
    found = {t: token_costs(32, t) for t in ERROR_TIMES}
    text = {how: ", ".join(f"{found[t][how]:.{digits}f}" for t in ERROR_TIMES)
            for how, digits in (("v", 3), ("x", 4), ("skip", 4))}
    ordered = all(c["skip"] <= min(c["v"], c["x"]) * (1 + ROUNDING) for c in found.values())
    wide = max(max(token_costs(48, t).values()) for t in ERROR_TIMES)
    least = {t: min(np.linalg.eigvalsh(m.cov_v)[0] for m in token_models(t)) for t in ERROR_TIMES}
    return Row("ours", "a narrow token costs much for v, little for x_0 (t 0.3 on) or a linear "
               "skip", "least squared errors added, per value, 32 dimensions for a patch of "
               "48, t = 0.1, 0.3, 0.5, 0.7, 0.9: "
               f"v {text['v']}; x_0 {text['x']}; v with a linear skip {text['skip']}; with 48 "
               "dimensions all are 0. Smallest eigenvalue of Cov(v*) over patches "
               f"{least[0.1]:.2f} (t 0.1), {least[0.3]:.2f} (t 0.3), {least[0.9]:.2f} (t 0.9)",
               HOLDS if ordered and wide == 0 else FALSE)


CLAIMS = (
    noising_steps, probability_flow, moments, second_line_of_29, dip_is_exact, eigen_form,
    noise_alone, monotone, magnitude, dit_given_x_hat, dit_given_x_t, seeing_both, who_is_lower,
    nested, gain_of_sigma_hat, c_hat, d_and_e, diagonal, last_term_of_34, reason_for_34, smallness,
    second_sum, first_sum, next_term, limit_of_noise, limit_of_data, peak_of_dit, dip_robust,
    high_frequency_costs, narrow_token)


@cache
def table():
    return [claim() for claim in CLAIMS]
