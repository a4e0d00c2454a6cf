"""Chapter 9: the Gaussian model of Appendix A, in the order of theory/README.md, and what of the
appendix holds, on models drawn at random.  Each test's docstring gives the equation it is about;
that of a misprint asserts that the printed form is wrong and the other right.
"""

import json
import re

import numpy as np
import pytest
from commands import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import theory.__main__
from theory import claims
from theory.claims import BASES, MISPRINT, Row, mean_error, operator_norms, relative, token_costs
from theory.model import (GaussianModel, best_guess, cost_passed_on, cost_unseen, covariance,
                          dct_basis, decay, gain, gain_peak, gain_slope, image_basis, image_decay,
                          random_basis, two_pixels)

README = (ROOT / "theory" / "README.md").read_text()
WORDS = " ".join(README.replace("*", "").split())


@st.composite
def models(draw, low=0.05, high=0.95):
    """Any basis, size, patch, decay, scale, cut and time."""
    kind = draw(st.sampled_from(["DCT", "2-D DCT", "rotation"]))
    if kind == "2-D DCT":
        U, pixels = image_basis(*draw(st.sampled_from([(4, 2), (6, 2), (6, 3)])))
    else:
        p, N = draw(st.integers(1, 4)), draw(st.integers(2, 5))
        U, pixels = dct_basis(p * N, p) if kind == "DCT" else random_basis(
            p * N, p, draw(st.integers(0, 99)))
    d = len(U)
    lam = image_decay(d, draw(st.floats(1.05, 4)), draw(st.floats(0.05, 0.5)))
    return GaussianModel(U, lam, pixels[draw(st.integers(0, len(pixels) - 1))],
                         draw(st.integers(1, d - 1)), draw(st.floats(low, high)))


# --- Section 2: images --------------------------------------------------------------------------


@given(m=models())
def test_bases_are_orthonormal_and_patches_share_out_the_pixels(m):
    np.testing.assert_allclose(m.U.T @ m.U, np.eye(m.d), atol=1e-12)
    np.testing.assert_allclose(m.P @ m.P.T, np.eye(len(m.P)), atol=0)
    for _, pixels in BASES.values():
        assert sorted(pixels.ravel()) == list(range(64))


def test_low_index_is_low_frequency():
    """Half-waves of the one-dimensional basis, mean radial frequency of the other."""
    U, _ = dct_basis(32, 4)
    assert [(np.diff(np.sign(U[:, i])) != 0).sum() for i in range(32)] == list(range(32))
    U, pixels = image_basis(8, 4)
    assert np.ptp(U[:, 0]) < 1e-12 and pixels[1].tolist()[:5] == [4, 5, 6, 7, 12]
    roughness = [np.square(np.diff(u.reshape(8, 8), axis=0)).sum()
                 + np.square(np.diff(u.reshape(8, 8), axis=1)).sum() for u in U.T]
    assert np.corrcoef(roughness, np.arange(64))[0, 1] > 0.95


def test_a_pixel_has_the_variance_of_one_of_an_image():
    for U, _ in BASES.values():
        for alpha in (1.5, 2.0):
            lam = image_decay(64, alpha)
            assert np.diag(U * lam @ U.T).mean() == pytest.approx(0.25)
            np.testing.assert_allclose(lam / lam[0], decay(64, alpha))


def test_two_pixels_by_hand():
    """Every number of sections 2, 3, 5 and 6 about the images of two pixels."""
    m = two_pixels()
    shared = covariance(m.velocity, m.observation("DiP"), m.R) @ [0.5, -0.5]    # with half the
    np.testing.assert_allclose(shared, 1 / 2 * (1 / 6 + 1 / 6))                 # difference
    assert m.smallest_error("DiP") == pytest.approx(5 / 3 - 1 / 6)
    np.testing.assert_allclose(m.sigma, np.array([[2, 1], [1, 2]]) / 3)
    np.testing.assert_allclose(np.linalg.inv(m.M), np.array([[5, 1], [1, 5]]) / 12)
    errors = {who: m.smallest_error(who) for who in ("nothing", "patch", "DiP", "DiT", "both")}
    expected = {"nothing": 5 / 3, "patch": 8 / 5, "DiP": 3 / 2, "DiT": 4 / 3, "both": 1}
    assert errors == pytest.approx(expected)
    np.testing.assert_allclose(m.best_guess("patch")[0], [[0.4]])
    np.testing.assert_allclose(m.gains, [0, 1], atol=1e-15)
    np.testing.assert_allclose(m.dip_operator, [[0.5, -0.5]])
    np.testing.assert_allclose(m.dit_operator, [[2 / 3, -8 / 9]])
    for sums in (m.eq15(True), m.eq15(False), (*m.eq15(False), m.next_term), (m.dit_operator,)):
        a, b = sum(sums)[0]
        assert f"({a:.3f}, {b:.3f})" in WORDS


# --- Section 3: Gaussian conditioning -----------------------------------------------------------


@given(m=models(), seed=st.integers(0, 99))
def test_the_best_guess_is_uncorrelated_with_its_error_and_no_linear_guess_is_better(m, seed):
    """K = Cov(g, y) Cov(y)^-1, Cov(g - K y, y) = 0, Cov(g - K y) = Cov(g) - K Cov(y, g)"""
    target, seen = m.velocity, m.observation("DiT")
    K, error = best_guess(target, seen, m.R)
    rest = tuple(T - K @ F for T, F in zip(target, seen))
    np.testing.assert_allclose(covariance(rest, seen, m.R), 0, atol=1e-9)
    np.testing.assert_allclose(covariance(rest, rest, m.R), error, atol=1e-9)
    other = K + 0.1 * np.random.default_rng(seed).standard_normal(K.shape)
    assert m.error_of(other, "DiT") > m.error_of(K, "DiT")


@given(m=models())
def test_means_and_covariances(m):
    """(18) Cov(eps_s, x_t) = t P, (19) Cov(x_t) = (1-t)^2 Sigma + t^2 I, (21) Cov(x_0s, x_t) =
    (1-t) P Sigma, (26) Cov(eps_s, x-hat_t) = t P, (27) Cov(x-hat_t) = M-hat^-1, (29)
    Cov(x_0s, x-hat_t) = (1-t) P (Sigma_low + Sigma_high Q); by drawing images in the table."""
    zero, I, t = np.zeros((len(m.P), m.d)), np.eye(m.d), m.t
    eps, x_0 = (zero, zero, m.P), (m.P, m.P, zero)
    x_t, x_hat = m.observation("DiP"), m.observation("DiT")
    for a, b, expected in (
        (eps, x_t, t * m.P),
        (x_t, x_t, (1 - t) ** 2 * m.sigma + t**2 * I),
        (x_0, x_t, (1 - t) * m.P @ m.sigma),
        (eps, x_hat, t * m.P),
        (x_hat, x_hat, np.linalg.inv(m.M_hat)),
        (x_0, x_hat, (1 - t) * m.P @ (m.sigma_low + m.sigma_high @ m.Q)),
    ):
        np.testing.assert_allclose(covariance(a, b, m.R), expected, atol=1e-10)


@given(m=models())
def test_the_middle_line_of_29_lacks_a_factor_that_its_last_line_has(m):
    """Cov(P x_high, (1-t) Q x_high) = (1-t) P Sigma_high Q"""
    exact = covariance((0 * m.P, m.P, 0 * m.P), m.observation("DiT"), m.R)
    printed = m.P @ m.sigma_high @ m.Q
    np.testing.assert_allclose((1 - m.t) * printed, exact, atol=1e-12)
    assert relative(printed, exact) == pytest.approx(m.t / (1 - m.t))


# --- Section 4: DiP -----------------------------------------------------------------------------


@given(m=models())
def test_the_dip_operator_is_the_best_guess_given_x_t(m):
    """(13), (14): P A M, A = t I - (1-t) Sigma, M = [(1-t)^2 Sigma + t^2 I]^-1"""
    np.testing.assert_allclose(m.dip_operator, m.best_guess("DiP")[0], atol=1e-8)


@given(m=models())
def test_the_dip_operator_multiplies_each_frequency_by_its_gain(m):
    """(16): P A M = sum_i (t - (1-t) lam_i) / ((1-t)^2 lam_i + t^2) v_i u_i^T"""
    np.testing.assert_allclose(m.dip_operator, m.V * m.gains @ m.U.T, atol=1e-9)


def test_the_gain_tends_to_a_copy_as_lam_falls_and_to_plus_and_minus_1_over_t():
    assert gain(1e-9, 0.3) == pytest.approx(1 / 0.3, rel=1e-6)
    for lam in (0.01, 1, 5):
        assert gain(lam, 1 - 1e-6) == pytest.approx(1, abs=1e-4)
        assert gain(lam, 1e-6) == pytest.approx(-1, abs=1e-3)


@given(a=st.floats(1e-6, 100), b=st.floats(1e-6, 100), t=st.floats(0.01, 0.99))
def test_the_gain_falls_as_the_eigenvalue_grows(a, b, t):
    """Exactly: g(a) - g(b) = - t (1-t) (a - b) / (den(a) den(b)); the slope is its limit."""
    def den(x):
        return (1 - t) ** 2 * x + t**2

    difference = gain(a, t) - gain(b, t)
    assert difference == pytest.approx(-t * (1 - t) * (a - b) / (den(a) * den(b)), rel=1e-6,
                                       abs=1e-9 * abs(gain(a, t)) + 1e-12)
    assert gain(a + 1e-30j, t).imag / 1e-30 == pytest.approx(gain_slope(a, t), rel=1e-9)
    assert gain_slope(a, t) < 0


@given(m=models())
def test_the_first_term_of_13_is_noise_and_data_and_the_second_only_the_mean(m):
    """P A M = t P M - (1-t) P Sigma M, of which (20), E[eps | x_t], is only the first part"""
    zero = 0 * m.P
    noise = best_guess((zero, zero, m.P), m.observation("DiP"), m.R)[0]
    data = best_guess((m.P, m.P, zero), m.observation("DiP"), m.R)[0]
    np.testing.assert_allclose(noise, m.t * m.P @ m.M, atol=1e-8)
    np.testing.assert_allclose(noise - data, m.dip_operator, atol=1e-8)


# --- Section 5: what DiT sees -------------------------------------------------------------------


@given(m=models())
def test_the_two_observations_differ_by_the_detail_of_other_patches_free_of_noise(m):
    """x_t - x-hat_t = (1-t) (I - Q) x_high, by the definition of x-hat_t, (9), (10), (25)"""
    low, high, eps = (F - G for F, G in zip(m.observation("DiP"), m.observation("DiT")))
    np.testing.assert_allclose(low, 0)
    np.testing.assert_allclose(eps, 0)
    np.testing.assert_allclose(high, (1 - m.t) * (np.eye(m.d) - m.Q))


@settings(max_examples=40)
@given(m=models())
def test_both_observations_together_know_more_than_either(m):
    """On any model not less than either; strictly more below."""
    both, dip, dit = (m.smallest_error(who) for who in ("both", "DiP", "DiT"))
    assert both <= min(dip, dit) * (1 + 1e-6) + 1e-9


def test_on_cosines_both_observations_know_a_hundredth_more_than_x_t():
    """x-hat_t is no function of x_t, so Eq. (11) is not a union."""
    U, pixels = BASES["DCT"]
    m = GaussianModel(U, image_decay(64, 1.5), pixels[4], 4, 0.5)
    assert m.smallest_error("both") < 0.99 * m.smallest_error("DiP")


def test_neither_dip_nor_dit_is_always_lower():
    ratios = claims.error_ratios(image_decay)
    assert ratios[16, 2.0, "2-D DCT", 0.1] < 0.99 and ratios[4, 2.0, "2-D DCT", 0.1] > 1.05
    assert {r for (r, *_), ratio in ratios.items() if ratio >= 1.01} == {4}
    assert "The higher ones have r = 4" in WORDS


def test_low_frequencies_of_other_patches_help_and_the_rest_hardly():
    patch, low, full = (mean_error(BASES["DCT"], image_decay(64, 2.0), 16, 0.5, who)
                        for who in ("patch", "patch and low", "DiP"))
    assert patch > 1.3 * full and low == pytest.approx(full, rel=1e-3)


@settings(max_examples=40)
@given(m=models())
def test_nested_information_orders_the_errors(m):
    patch, low, full = (m.smallest_error(who) for who in ("patch", "patch and low", "DiP"))
    assert full <= low * (1 + 1e-7) + 1e-9 and low <= patch * (1 + 1e-7) + 1e-9
    nothing = m.smallest_error("nothing")
    assert patch <= nothing and nothing == pytest.approx(
        1 + np.trace(m.P @ m.sigma @ m.P.T) / len(m.P))


# --- Section 6: DiT, Eq. (15) and its limits ----------------------------------------------------


@given(m=models())
def test_dit_sees_the_noisy_version_of_an_image_that_is_x_0_in_the_patch(m):
    """x-hat_t = (1-t) x-hat_0 + t eps, x-hat_0 = x_low + Q x_high, P x-hat_0 = P x_0; its
    covariance is Sigma-hat = Sigma_low + Q Sigma_high Q"""
    image = np.eye(m.d), m.Q, np.zeros((m.d, m.d))
    noise = np.zeros((m.d, m.d)), np.zeros((m.d, m.d)), np.eye(m.d)
    for part, F, e in zip(m.observation("DiT"), image, noise):
        np.testing.assert_allclose(part, (1 - m.t) * F + m.t * e)
    for F, in_patch in zip(image, (m.P, m.P, 0 * m.P)):
        np.testing.assert_allclose(m.P @ F, in_patch)
    np.testing.assert_allclose(covariance(image, image, m.R), m.sigma_hat, atol=1e-12)


@given(m=models())
def test_the_dit_operator_is_the_gain_of_the_covariance_of_that_image(m):
    """P B-hat M-hat = P gain(Sigma-hat), each eigenvector times the gain of its eigenvalue"""
    nu, n = m.hat_modes
    np.testing.assert_allclose(n * nu @ n.T, m.sigma_hat, atol=1e-10)
    np.testing.assert_allclose(n.T @ n, np.eye(m.d), atol=1e-10)
    by_gains = m.P @ sum(gain(nu_i, m.t) * np.outer(n_i, n_i) for nu_i, n_i in zip(nu, n.T))
    np.testing.assert_allclose(by_gains, m.dit_operator, atol=1e-8)
    np.testing.assert_allclose(m.dit_by_gains, by_gains, atol=1e-8)


@settings(max_examples=20)
@given(m=models())
def test_the_peak_of_dit_is_at_least_that_of_one_eigenvector_and_hardly_more(m):
    """max over t of |P gain(Sigma-hat) n| = |P n| (1 + nu) / (2 sqrt(nu)) for nu < 1; in the table
    the peak of the norm is at most 1.02 times the largest of these."""
    nu, n = m.hat_modes
    i = max((i for i in range(m.d) if 1e-20 < nu[i] < 1),
            key=lambda i: np.linalg.norm(m.P @ n[:, i]) / np.sqrt(nu[i]), default=None)
    assume(i is not None)
    at, high = gain_peak(nu[i])
    best = GaussianModel(m.U, m.lam, m.pixels, m.r, at)
    along = np.linalg.norm(best.dit_by_gains @ n[:, i])
    assert along == pytest.approx(np.linalg.norm(m.P @ n[:, i]) * high, rel=1e-4)
    assert m.dit_peak >= along * (1 - 1e-4)
    assert np.linalg.norm(best.dit_by_gains, 2) >= along * (1 - 1e-9)
    ratio = operator_norms(image_decay)[:, 0].max(axis=1) / [
        case.dit_peak for case in claims.cases((0.5,))]
    assert 0.995 < ratio.min() and ratio.max() < 1.025


@given(m=models())
def test_the_dit_operator_is_the_best_guess_given_x_hat(m):
    """(12), (14), (31): P B-hat M-hat, B-hat = t I - (1-t) (Sigma_low + Sigma_high Q), M-hat =
    [(1-t)^2 (Sigma_low + Q Sigma_high Q) + t^2 I]^-1"""
    np.testing.assert_allclose(m.dit_operator, m.best_guess("DiT")[0], atol=1e-8)
    assert m.error_of(m.dit_operator, "DiT") == pytest.approx(m.smallest_error("DiT"), rel=1e-6)


@given(m=models())
def test_applied_to_x_t_as_printed_it_is_not(m):
    """(12), (30), (31) print x_t: never better than E[v | x_t], and far worse in one case."""
    assert m.error_of(m.dit_operator, "DiP") >= m.smallest_error("DiP") * (1 - 1e-9)
    U, pixels = BASES["rotation"]
    far = GaussianModel(U, image_decay(64, 1.5), pixels[4], 4, 0.1)
    assert relative(far.dit_operator, far.best_guess("DiP")[0]) > 0.1
    assert far.error_of(far.dit_operator, "DiP") > 1.05 * far.smallest_error("DiP")


@given(m=models())
def test_the_first_term_of_c_hat_2_is_t_and_not_t_lam(m):
    """(33): C-hat_1 + C-hat_2 = B-hat with t sum_high u_i u_i^T, not t sum_high lam_i u_i u_i^T"""
    np.testing.assert_allclose(m.C1 + m.C2(as_printed=False), m.B_hat, atol=1e-12)
    high = m.U[:, m.r:]
    off = (m.C1 + m.C2(as_printed=True) - m.B_hat) @ high
    np.testing.assert_allclose(off, high * (m.t * (m.lam[m.r:] - 1)), atol=1e-12)


@given(m=models())
def test_d_hat_and_e_hat_sum_to_the_inverse_of_m_hat(m):
    """(32), (33): D-hat + E-hat = M-hat^-1, D-hat diagonal in the basis U"""
    np.testing.assert_allclose((m.D + m.E) @ m.M_hat, np.eye(m.d), atol=1e-8)
    np.testing.assert_allclose(m.D @ m.D_inverse, np.eye(m.d), atol=1e-8)
    np.testing.assert_allclose(m.U.T @ m.D @ m.U, np.diag(m.D_eigenvalues), atol=1e-12)


@given(m=models())
def test_the_sums_of_15_are_the_zeroth_order_product(m):
    """(15) = P (C-hat_1 + C-hat_2) D-hat^-1 for both readings: I_1 and I_2 are as printed; and
    the first sum alone is P C-hat_1 D-hat^-1."""
    for as_printed in (True, False):
        product = m.P @ (m.C1 + m.C2(as_printed)) @ m.D_inverse
        np.testing.assert_allclose(sum(m.eq15(as_printed)), product, atol=1e-7)
    np.testing.assert_allclose(m.eq15(False)[0], m.P @ m.C1 @ m.D_inverse, atol=1e-8)


@given(m=models())
def test_the_second_sum_of_15_is_over_t_and_not_lam_over_t(m):
    """Printed less corrected is sum_high (lam_i - 1) / t v_i u_i^T.  The corrected one, less the
    exact K, is K E D^-1, on high frequencies at most (1-t)^2 lam_(r+1) / t^2 of K; so there DiT
    copies, K = P / t, up to that and (1-t) lam_(r+1) / t^2, and not negligibly, as DiP does."""
    high, K, V = m.U[:, m.r:], m.dit_operator, m.V[:, m.r:]
    printed, corrected = sum(m.eq15(True)), sum(m.eq15(False))
    np.testing.assert_allclose(printed - corrected, V * ((m.lam[m.r:] - 1) / m.t) @ high.T,
                               atol=1e-9)
    np.testing.assert_allclose(corrected - K, K @ m.E @ m.D_inverse, atol=1e-7)
    small = (1 - m.t) ** 2 * m.lam[m.r] / m.t**2 * np.linalg.norm(K) + 1e-9
    assert np.linalg.norm((corrected - K) @ high) <= small
    copy, detail = V / m.t, (1 - m.t) * m.lam[m.r] / m.t**2
    assert np.linalg.norm(K @ high - copy) <= small + detail * np.linalg.norm(V)
    assert np.linalg.norm(m.dip_operator @ high - copy) <= detail * np.linalg.norm(copy) + 1e-9


@given(m=models())
def test_the_last_term_of_34_has_one_factor_too_many(m):
    """(I - D^-1 E) D^-1 = D^-1 - D^-1 E D^-1, printed with a further D^-1 at the end"""
    term = m.D_inverse @ m.E @ m.D_inverse
    step_before = (np.eye(m.d) - m.D_inverse @ m.E) @ m.D_inverse
    np.testing.assert_allclose(m.D_inverse - term, step_before, rtol=1e-8, atol=1e-8)
    difference = np.linalg.norm(m.D_inverse - term @ m.D_inverse - step_before)
    assert difference > 0.05 * np.linalg.norm(term)


@given(m=models())
def test_the_next_term_matters_where_the_expansion_means_anything(m):
    """(34) has - P C D^-1 E D^-1, (15) drops it."""
    assume(m.smallness < 0.1)
    without = relative(sum(m.eq15(False)), m.dit_operator)
    assert relative(sum(m.eq15(False)) + m.next_term, m.dit_operator) <= 0.5 * without + 1e-9


@given(m=models(), factor=st.floats(0.1, 0.9))
def test_the_small_quantity_falls_with_t_and_is_bounded_by_the_first_high_eigenvalue(m, factor):
    """Norm of D^-1 E <= (1-t)^2 lam_(r+1) / t^2, so it is large as t -> 0, small as t -> 1."""
    bound = (1 - m.t) ** 2 * m.lam[m.r] / m.t**2
    assert m.smallness <= bound * (1 + 1e-9)
    nearer = GaussianModel(m.U, m.lam, m.pixels, m.r, m.t * factor)
    assert nearer.smallness >= m.smallness * (1 - 1e-9)


def test_the_limit_of_data_is_outside_the_expansion_and_that_of_noise_inside():
    """(34), alpha 1.5, 2, 4; and lam_p / lam_q, the paper's reason, is the same at both."""
    for alpha in (1.5, 2.0, 4.0):
        U, pixels = BASES["DCT"]
        small, large = (GaussianModel(U, image_decay(64, alpha), pixels[4], 16, t).smallness
                        for t in (0.99, 0.001))
        assert small < 1e-4 and large > 1


@given(m=models())
def test_guess_and_error_share_out_the_variance_so_a_large_norm_is_no_large_error(m):
    """Cov(v) = Cov(K y) + Cov(v - K y), whatever the norm of K"""
    for who, K in (("DiP", m.dip_operator), ("DiT", m.dit_operator)):
        guess = tuple(K @ F for F in m.observation(who))
        total = np.trace(covariance(guess, guess, m.R)) / len(m.P) + m.smallest_error(who)
        assert total == pytest.approx(m.smallest_error("nothing"), rel=1e-6)


def test_near_data_dit_has_the_larger_peak_in_some_settings_and_not_in_others():
    """Twelve cases: the norm is 1 at both ends of t, or falls towards it; DiP's peak is near its
    bound (1 + lam_d) / (2 sqrt(lam_d)), never above."""
    norms = operator_norms(image_decay)
    peaks = norms.max(axis=2)
    ratio = peaks[:, 0] / peaks[:, 1]
    assert (ratio > 50).sum() == 2 and ratio.min() < 0.9        
    assert (np.abs(norms[:, :, -1] - 1) < 0.03).all()
    ends = norms[:, :, 0]
    assert (np.abs(ends - 1) < 0.005).all(axis=1).sum() == 10
    assert ((np.abs(ends - 1) < 0.005) | (ends < peaks / 40)).all()
    for (_, dip), lam in zip(peaks, [image_decay(64, a)[-1] for a in (1.5, 1.5, 2, 2)] * 3):
        assert 0.7 * gain_peak(lam)[1] < dip <= gain_peak(lam)[1]


# --- Section 7: the rank of a token -------------------------------------------------------------


@given(lam=st.floats(1e-9, 10), t=st.floats(0.02, 0.98))
def test_what_an_unseen_frequency_costs(lam, t):
    """Variance of v, less its variance given x_t; and with x_t / t beside, the same of x_0 / t."""
    observed = (1 - t) ** 2 * lam + t**2
    given_x_t = lam / observed
    assert cost_unseen(lam, t) == pytest.approx(1 + lam - given_x_t, rel=1e-6, abs=1e-9)
    left = lam / t**2 - given_x_t                    # Var(x_0) / t^2, less Var(x_0 | x_t) / t^2
    assert cost_passed_on(lam, t) == pytest.approx(left, rel=1e-6, abs=1e-6 * lam / t**2)
    assert abs(cost_unseen(1e-9, t) - 1) < 1e-5 and cost_passed_on(1e-9, t) < 1e-5


@given(m=models(), data=st.data())
def test_no_token_of_k_dimensions_costs_less_and_one_attains_it(m, data):
    """E |v* - W token|^2 >= the p - k smallest eigenvalues of Cov(v*), for v, for x_0 (over t^2,
    as v = (x_t - x_0) / t), and beside G x_t for the best G; k = p costs nothing."""
    p = len(m.P)
    k = data.draw(st.integers(0, p - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    seen, costs = m.observation("DiP"), m.token_costs(k)
    best = m.best_guess("DiP")[0]
    G = best_guess(tuple(best @ F for F in seen), m.observation("patch"), m.R)[0] @ m.P
    for how, passed in (("v", 0 * m.P), ("x", m.P / m.t), ("skip", G)):
        rest = tuple((best - passed) @ F for F in seen)                  # what the token must hold
        cov = covariance(rest, rest, m.R)
        for W in (rng.standard_normal((p, k)), np.linalg.eigh(cov)[1][:, p - k:]):
            hold = np.eye(p) - W @ np.linalg.pinv(W)
            cost = np.trace(hold @ cov @ hold) / p                       # the best token for W
            assert cost >= costs[how] * (1 - 1e-6) - 1e-12
        assert cost == pytest.approx(costs[how], rel=1e-6, abs=1e-9)
    assert costs["skip"] <= min(costs["v"], costs["x"]) * (1 + 1e-9) + 1e-12
    assert set(m.token_costs(p).values()) == {0}


def test_the_table_of_tokens_is_what_theory_and_trained_networks_give():
    """Section 7 against token_costs and experiments/results/gaussian.json"""
    found = json.loads((ROOT / "experiments" / "results" / "gaussian.json").read_text())
    times = 0.1, 0.3, 0.5, 0.7, 0.9
    rows = {"theory, v from a token of 32": [token_costs(32, t)["v"] for t in times],
            "theory, x_0 from a token of 32": [token_costs(32, t)["x"] for t in times],
            "theory, linear skip, token of 32": [token_costs(32, t)["skip"] for t in times]}
    for model, width in (("DiT-only", 32), ("DiP", 32), ("DiT-only", 96), ("DiP", 96)):
        totals = [[row[f"excess at t = {t}"] for t in times] for row in found["rows"]
                  if (row["model"], row["group"]) == (model, f"tokens of {width}")]
        assert len(totals) == 3
        rows[f"trained {model[:3]}, v, tokens of {width}"] = np.mean(totals, axis=0)
    narrow = rows["trained DiT, v, tokens of 32"]
    bound = rows["theory, v from a token of 32"]
    for text, values in (("above its bound by {}", np.subtract(narrow, bound)),
                         ("the narrow DiP has an excess of {}",
                          rows["trained DiP, v, tokens of 32"])):
        assert text.format(f"{min(values):.3f} to {max(values):.3f}") in WORDS
    assert all(low > 0.5 * high for low, high in zip(bound[1:], narrow[1:]))
    for name, values in rows.items():
        assert f"| {name} | " + " | ".join(f"{x:.3f}" for x in values) + " |" in README


def test_the_losses_on_shapes_are_those_of_the_first_network():
    """Section 7 against the table of experiments/first_network.md"""
    table = (ROOT / "experiments" / "first_network.md").read_text()
    for regime, start in (("narrow", "with tokens of 96 the loss is {} for a DiT that predicts v, "
                           "{} if it predicts `x_0`, {} with a head"),
                          ("wide", "with tokens of 256, {}, {} and {}")):
        figures = [re.search(rf"\| {claim} \| {regime}, shapes \|.*?loss ([\d.]+) .*?against "
                             rf"([\d.]+)", table) for claim in
                   ("a DiT-only that predicts x is better than one that predicts v",
                    "a head improves on none when v is predicted")]
        predicts_x, predicts_v = figures[0].groups()
        with_head, plain = figures[1].groups()
        assert plain == predicts_v
        assert start.format(predicts_v, predicts_x, with_head) in WORDS


# --- Section 8: the exercises -------------------------------------------------------------------


def test_exercise_1_the_correction_is_0_at_one_ninth_so_its_size_is_not_monotone():
    """lam = t / (1-t) = 1/9; the gain is -0.98 at lam = 1: larger in size, for the larger lam."""
    assert gain(1 / 9, 0.1) == pytest.approx(0, abs=1e-15)
    assert gain(1, 0.1) == pytest.approx(-0.8 / 0.82)
    assert gain(0.01, 0.1) == pytest.approx(0.091 / 0.0181)


@given(lam=st.floats(1e-8, 0.99))
def test_exercise_2_the_largest_gain_over_t(lam):
    """With sqrt(lam) (1-t) = R sin a and t = R cos a the gain is cos 2a + (1-lam) / (2 sqrt(lam))
    sin 2a, so at most (1 + lam) / (2 sqrt(lam)): 512 for lam = 1024^-2."""
    at, peak = gain_peak(lam)
    assert 0 < at < 1 and gain(lam, at) == pytest.approx(peak, rel=1e-9)
    t = np.concatenate([np.linspace(0, 1, 999)[1:-1], at * np.linspace(0.9, 1.1, 99)])
    assert np.abs(gain(lam, t[t < 1])).max() <= peak * (1 + 1e-9)
    a = np.arctan2(np.sqrt(lam) * (1 - at), at)
    form = np.cos(2 * a) + (1 - lam) / (2 * np.sqrt(lam)) * np.sin(2 * a)
    assert form == pytest.approx(peak, rel=1e-9)
    assert gain_peak(1024.0**-2)[1] == pytest.approx(512, rel=1e-5)
    assert round(gain_peak(image_decay(1024, 2.0)[-1])[1]) == 41


@given(m=models())
def test_exercise_3_as_t_falls_both_operators_tend_to_minus_p(m):
    """If (Sigma_low + Q Sigma_high Q) n = 0, then n is orthogonal to the low frequencies and Q n
    has no high ones; so n^T Q n = 0 and P n = 0.  On all other directions K = -P at t = 0.
    If a unit n misses both by s at most, |P n|^2 <= 2 s."""
    low, high = m.U[:, :m.r].T, m.U[:, m.r:].T @ m.Q
    _, s, directions = np.linalg.svd(np.concatenate([low, high]))
    assert (np.square(m.P @ directions.T).sum(axis=0) <= 2 * s + 1e-12).all()
    pixels = two_pixels(1e-6)
    for K in (pixels.dip_operator, pixels.dit_operator):
        np.testing.assert_allclose(K, [[-1, 0]], atol=1e-5)


def test_exercise_4_two_pixels_both_observations_seen():
    """x_high of pixel b is x_t - x-hat_t over 1-t; that of a is its negative.  So along u_2 the
    velocity is known, along u_1 its variance given x_t is lam_1 / ((1-t)^2 lam_1 + t^2) = 2, and
    half of that falls on pixel a."""
    m = two_pixels()
    high = (np.zeros((1, 2)), m.P, np.zeros((1, 2)))                     # x_high in pixel a
    difference = tuple(F[1:] - G[1:] for F, G in zip(m.observation("DiP"), m.observation("DiT")))
    K, error = best_guess(high, difference, m.R)
    np.testing.assert_allclose(K, [[-1 / (1 - m.t)]])
    np.testing.assert_allclose(error, 0, atol=1e-12)
    assert m.smallest_error("both") == pytest.approx((0 + 2) / 2)


def test_exercise_5_two_pixels_as_one_patch():
    """Cov(v*) has 2/5 along u_1 and 16/21 along u_2: reading v loses 2/5 of squared error.  Cov(x*)
    over t^2 has 8/45 and 4/189: reading x_0 loses 4/189."""
    two = two_pixels(0.75)
    m = GaussianModel(two.U, two.lam, np.array([0, 1]), 1, 0.75)
    assert cost_unseen(m.lam, m.t) == pytest.approx([2 / 5, 16 / 21])
    assert cost_passed_on(m.lam, m.t) == pytest.approx([8 / 45, 4 / 189])
    assert 2 * m.token_costs(1)["v"] == pytest.approx(2 / 5)
    assert 2 * m.token_costs(1)["x"] == pytest.approx(4 / 189)


# --- Section 9: the verdicts --------------------------------------------------------------------


def test_the_readme_gives_verdicts_that_are_printed():
    """Its table is part of the printed one, in order, without the evidence; its counts are all."""
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|"))
            for line in README.split("## 9.")[1].splitlines() if line.startswith("| ")][1:]
    printed = [(row.equation, row.claim, row.verdict) for row in claims.table()]
    assert 8 <= len(rows) <= 12 and rows == [row for row in printed if row in rows]
    count = {verdict: sum(row[2] == verdict for row in printed) for *_, verdict in printed}
    assert f"prints all {len(printed)} and" in WORDS
    assert "{holds} hold, {does not hold} do not, {conditional} hold in a range".format(
        **count) in WORDS and f"{count[MISPRINT]} are misprints" in WORDS


@pytest.mark.parametrize("figure", [
    "by 1% or more lower in 18 (at best 7.6%), higher in 11 (up to 31%)", "of 60 cases",
    "1.4 to 18 (t 0.3), 320 to 7300 (t 0.9)", "worse up to t = 0.08 to 0.23",
    "DiT's are 0.89 to 1.06 (t 0.3), 0.99 to 1.02 (t 0.5)",
    "lam_17 / lam_16 = 0.886 (alpha 2)", "0.7 to 66 times DiP's",
    "25 in the middle, 519 at the border", "|P n| (1 + nu) / (2 sqrt(nu))", "0.69 (t 0.9)",
    "0.04 (t 0.1)", "9.5 at d 64, 38 at d 1024"])
def test_every_figure_that_the_readme_takes_from_the_table_is_there(figure):
    assert figure in WORDS
    assert any(figure in row.claim + row.evidence for row in claims.table())


def test_the_table_fits_a_terminal_and_the_command_writes_nothing(capsys):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "assets").iterdir()}
    theory.__main__.main([])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 50 and max(map(len, printed)) <= 100
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "assets").iterdir()}


def test_every_section_and_file_that_is_named_exists():
    sections = set(re.findall(r"^## (\d)", README, re.M))
    for path in (ROOT / "theory").glob("*.py"):
        assert set(re.findall(r"[Ss]ections? (\d)", path.read_text())) <= sections
    for link in re.findall(r"\]\(([^):]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "theory" / "".join(link)).exists()


def test_a_misprint_needs_a_wrong_and_a_right_form():
    assert claims.slip("(0)", "", [0.5], [1e-15], "", "").verdict == MISPRINT
    assert claims.slip("(0)", "", [1e-15], [1e-15], "", "").verdict == claims.HOLDS
    assert claims.slip("(0)", "", [0.5], [0.5], "", "").verdict == claims.FALSE
    assert isinstance(claims.equality("(0)", "", "", 1.0), Row)
    assert claims.equality("(0)", "", "", 1.0).verdict == claims.FALSE
