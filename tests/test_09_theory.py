"""Chapter 9: the Gaussian model of Appendix A, in the order of theory/README.md.

We write the paper's operators and sums down a second time and compare on models drawn at random.
Each verdict of theory/claims.py is given something for which it must come out otherwise.
"""

import inspect
import json
import re
import zipfile

import numpy as np
import pytest
from commands import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import theory.__main__
import train
from experiments.report import read_rows
from theory import claims, patches, tokens
from theory.claims import BASES, CONDITIONAL, FALSE, HOLDS, MISPRINT
from theory.model import (GaussianModel, best_guess, variance_of_x, variance_of_v, covariance,
                          dct_basis, gain, image_basis, image_decay, random_basis, token_cost,
                          two_pixels)

README = (ROOT / "theory" / "README.md").read_text()
WORDS = " ".join(README.replace("*", "").replace("`", "").split())
TIMES = claims.ERROR_TIMES


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
    return GaussianModel(U, lam, pixels, draw(st.integers(0, len(pixels) - 1)),
                         draw(st.integers(1, d - 1)), draw(st.floats(low, high)))


def gain_peak(lam):
    """(t, gain): for lam < 1, where in t the gain is largest, and how large (exercise 1)"""
    root = np.sqrt(lam)
    return root * (1 + root) / (1 + lam), (1 + lam) / (2 * root)


def literal(m, x_low, x_high, eps):
    """(x_t, x-hat_t, v in patch s), columns are images: Eq. (6), (8) to (10), patch by patch"""
    x_t = (1 - m.t) * (x_low + x_high) + m.t * eps
    x_hat = np.empty_like(x_t)
    for number, pixels in enumerate(m.patches):
        others = (1 - m.t) * x_low[pixels] + m.t * eps[pixels]           # Eq. (10)
        x_hat[pixels] = x_t[pixels] if number == m.s else others         # Eq. (9)
    return x_t, x_hat, (eps - x_low - x_high)[m.patches[m.s]]


def conditioned(m):
    """(operator on x_t, operator on x-hat_t) of the best guess of v, by the covariance of all"""
    parts = np.split(np.eye(2 * m.d), [m.r, m.d], axis=0)                # coefficients, then noise
    z = (m.U[:, :m.r] * np.sqrt(m.lam[:m.r]) @ parts[0],
         m.U[:, m.r:] * np.sqrt(m.lam[m.r:]) @ parts[1], parts[2])
    x_t, x_hat, v = literal(m, *z)
    return [v @ x.T @ np.linalg.inv(x @ x.T) for x in (x_t, x_hat)]


# --- Section 2: images --------------------------------------------------------------------------


@given(m=models())
def test_bases_are_orthonormal_and_patches_share_out_the_pixels(m):
    np.testing.assert_allclose(m.U.T @ m.U, np.eye(m.d), atol=1e-12)
    np.testing.assert_allclose(m.P @ m.P.T, np.eye(len(m.P)), atol=0)
    assert sorted(m.patches.ravel()) == list(range(m.d))


def test_low_index_is_low_frequency():
    """Half-waves of the one-dimensional basis, roughness of the other."""
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
            np.testing.assert_allclose(lam / lam[0], np.arange(1, 65) ** -alpha)


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
    for operator in (m.dit_operator, sum(m.eq15(True)), sum(m.eq15(False))):
        assert "({:.3f}, {:.3f})".format(*operator[0]) in WORDS
    for sigma, figure in ((m.sigma, "0.5"), (m.sigma_hat, "0.87")):
        correlation = sigma[0, 1] / np.sqrt(sigma[0, 0] * sigma[1, 1])
        assert f"{correlation:.2g}" == figure and figure in WORDS


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
def test_what_a_model_is_said_to_see_is_what_the_definitions_say(m):
    """observation() against (6), (8), (9), (10), patch by patch"""
    z = np.random.default_rng(0).standard_normal((3, m.d, 2))
    x_t, x_hat, v = literal(m, *z)
    for quantity, expected in ((m.observation("DiP"), x_t), (m.observation("DiT"), x_hat),
                               (m.velocity, v),
                               (m.observation("both"), [*x_t, *(x_t - x_hat) / (1 - m.t)])):
        np.testing.assert_allclose(sum(F @ part for F, part in zip(quantity, z)), expected,
                                   atol=1e-12)


# --- Section 4: DiP -----------------------------------------------------------------------------


@given(m=models())
def test_both_operators_of_theorem_a6_are_the_best_guesses(m):
    """(12), (13), (31) against a covariance that is inverted, without any formula of the paper"""
    for operator, best in zip((m.dip_operator, m.dit_operator), conditioned(m)):
        np.testing.assert_allclose(operator, best, atol=1e-7)


@given(m=models())
def test_every_identity_holds_on_any_model(m):
    """The list of claims.py, on models that the claims do not try"""
    for name, sides in claims.IDENTITIES.items():
        a, b = sides(m)
        np.testing.assert_allclose(a, b, atol=1e-7, err_msg=name)


def test_the_gain_tends_to_a_copy_as_lam_falls_and_to_plus_and_minus_1_over_t():
    assert gain(1e-9, 0.3) == pytest.approx(1 / 0.3, rel=1e-6)
    for lam in (0.01, 1, 5):
        assert gain(lam, 1 - 1e-6) == pytest.approx(1, abs=1e-4)
        assert gain(lam, 1e-6) == pytest.approx(-1, abs=1e-3)


@given(lam=st.lists(st.floats(1e-6, 10), min_size=3, max_size=9, unique=True),
       t=st.floats(0.01, 0.99))
def test_the_gain_grows_over_the_frequencies_and_its_size_does_from_a_time_on(lam, t):
    """Its size grows where t > lam_1 / (1 + lam_1), 0.5 for lam_1 = 1; it is 0 at t / (1-t)."""
    lam = np.sort(lam)[::-1]
    assume(np.diff(lam).max() < -1e-9 and abs(t - lam[0] / (1 + lam[0])) > 1e-6)
    assert (np.diff(gain(lam, t)) > 0).all()
    if t > lam[0] / (1 + lam[0]):
        assert (np.diff(np.abs(gain(lam, t))) > 0).all()
    assert gain(t / (1 - t), t) == pytest.approx(0, abs=1e-9)


# --- Section 5: what DiT sees -------------------------------------------------------------------


@settings(max_examples=40)
@given(m=models())
def test_who_sees_more_has_the_smaller_error(m):
    """Both observations against either; all of x_t, patch and low part, patch, nothing"""
    order = "both", "DiP", "patch and low", "patch", "nothing"
    error = {who: m.smallest_error(who) for who in (*order, "DiT")}
    for more, less in (("both", "DiT"), *zip(order, order[1:])):
        assert error[more] <= error[less] * (1 + 1e-6) + 1e-9
    assert error["nothing"] == pytest.approx(1 + np.trace(m.P @ m.sigma @ m.P.T) / len(m.P))


def test_seeing_both_is_exact_where_the_detail_can_be_solved_for():
    """48 coefficients from 56 pixels that have no noise: only the low ones are left to guess.  A
    solver that cuts off singular values at 1e-10 gives 0.215 in the place of 0.219."""
    for name in ("cosines", "rotation"):
        U, pixels = BASES[name]
        m = GaussianModel(U, image_decay(64, 2.0), pixels, 0, 16, 0.3)
        low = m.lam[:16] / (0.7**2 * m.lam[:16] + 0.3**2)
        left = np.mean([(U[p][:, :16] ** 2 * low).sum() / len(p) for p in pixels])
        assert m.mean_error("both") == pytest.approx(left, rel=1e-6)
        assert 1 - left / m.mean_error("DiP") == pytest.approx(0.219, abs=5e-4)


def test_where_dit_has_the_larger_error_few_frequencies_are_low():
    higher = {m.r for m in claims.at(claims.CASES, *TIMES)
              if m.mean_error("DiT") > 1.01 * m.mean_error("DiP")}
    assert higher == {4} and "All 11 have r = 4" in WORDS


# --- Section 6: DiT, Eq. (15) and its limits ----------------------------------------------------


@settings(max_examples=30)
@given(m=models())
def test_the_sums_of_15_literally_and_which_second_sum_is_right(m):
    """Corrected less exact is K E D^-1, on high frequencies at most (1-t)^2 lam_(r+1) / t^2 of K;
    with lam_i / t the operator is off by (lam_i - 1) / t at each high frequency."""
    t, lam, r, U, P = m.t, m.lam, m.r, m.U, m.P
    K, weight = conditioned(m)[1], P.T @ P
    sums = {True: 0, False: 0}
    for i in range(m.d):
        for printed in sums:
            factor = gain(lam[i], t) if i < r else (lam[i] if printed else 1) / t
            sums[printed] = sums[printed] + factor * np.outer(P @ U[:, i], U[:, i])
            for j in range(m.d if i >= r else 0):
                below = (1 - t) ** 2 * lam[j] + t**2 if j < r else t**2
                sums[printed] = sums[printed] - (1 - t) * lam[i] / below * (
                    U[:, i] @ weight @ U[:, j]) * np.outer(P @ U[:, i], U[:, j])
    for printed, total in sums.items():
        np.testing.assert_allclose(sum(m.eq15(printed)), total, atol=1e-7)
    high, bound = U[:, r:], (1 - t) ** 2 * lam[r] / t**2
    assert np.linalg.norm((sums[False] - K) @ high) <= bound * np.linalg.norm(K) + 1e-7
    low = np.where(np.arange(m.d) < r, lam, 0)
    D = (1 - t) ** 2 * U * low @ U.T + t**2 * np.eye(m.d)
    E = (1 - t) ** 2 * weight @ (U * (lam - low) @ U.T) @ weight
    assert m.smallness == pytest.approx(np.linalg.norm(np.linalg.solve(D, E), 2), rel=1e-6)
    assert m.smallness <= bound * (1 + 1e-9)
    np.testing.assert_allclose((sums[True] - sums[False]) @ high,
                               P @ high * ((lam[r:] - 1) / t), atol=1e-9)


@settings(max_examples=20)
@given(m=models())
def test_the_peak_of_dit_is_at_least_that_of_one_eigenvector(m):
    """max over t of |P gain(Sigma-hat) n| = |P n| (1 + nu) / (2 sqrt(nu)) for nu < 1"""
    nu, n = m.hat_modes
    i = max((i for i in range(m.d) if 1e-20 < nu[i] < 1),
            key=lambda i: np.linalg.norm(m.P @ n[:, i]) / np.sqrt(nu[i]), default=None)
    assume(i is not None)
    at, high = gain_peak(nu[i])
    best = GaussianModel(m.U, m.lam, m.patches, m.s, m.r, at)
    along = np.linalg.norm(best.dit_by_gains @ n[:, i])
    assert along == pytest.approx(np.linalg.norm(m.P @ n[:, i]) * high, rel=1e-4)
    assert np.linalg.norm(best.dit_by_gains, 2) >= along * (1 - 1e-9)


# --- Section 7: the rank of a token -------------------------------------------------------------


@given(m=models(), data=st.data())
def test_no_token_of_k_dimensions_costs_less_and_one_attains_it(m, data):
    """E |v* - W token|^2 >= the p - k smallest eigenvalues of Cov(v*), for v, for x_0 (over t^2,
    as v = (x_t - x_0) / t), and beside G x_t for the best G; k = p costs nothing."""
    p = len(m.P)
    k = data.draw(st.integers(0, p - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    seen, costs, best = m.observation("DiP"), m.token_costs(k), conditioned(m)[0]
    G = best_guess(tuple(best @ F for F in seen), m.observation("patch"), m.R)[0] @ m.P
    for how, passed in (("v", 0 * m.P), ("x", m.P / m.t), ("skip", G)):
        rest = tuple((best - passed) @ F for F in seen)                  # what the token must hold
        cov = covariance(rest, rest, m.R)
        for W in (rng.standard_normal((p, k)), np.linalg.eigh(cov)[1][:, p - k:]):
            hold = np.eye(p) - W @ np.linalg.pinv(W)
            cost = np.trace(hold @ cov @ hold) / p                       # the best token for W
            assert cost >= costs[how] * (1 - 1e-6) - 1e-9
        assert cost == pytest.approx(costs[how], rel=1e-6, abs=1e-8)
    assert costs["skip"] <= min(costs["v"], costs["x"]) * (1 + 1e-9) + 1e-12
    assert set(m.token_costs(p).values()) == {0}


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_bound_holds_for_images_that_are_not_gaussian(t):
    """Images U c with c_i = +- sqrt(lam_i): E[x_0 | x_t] in closed form, variances by integration.
    The eigenvalues of Cov(v*) in a patch are at least, those of E[x_0 | x_t] at most, what the
    covariance of the images gives."""
    z, (U, pixels) = np.linspace(-12, 12, 9601)[:, None], BASES["two dimensions"]
    lam, density = image_decay(64, 1.5), np.exp(-z**2 / 2) / np.exp(-z**2 / 2).sum()
    c = np.sqrt(lam)
    x = (1 - t) * c + t * z                          # for +; - gives the same
    x_0 = c * np.tanh((1 - t) * c * x / t**2)        # E[c | x]
    of_v, of_x = ((values**2 * density).sum(axis=0) for values in ((x - x_0) / t, x_0))
    assert of_v.sum() > variance_of_v(lam, t).sum() + 1e-3     # so it is an inequality
    for V in (U[p] for p in pixels):
        found, bound, x_t, most = (np.linalg.eigvalsh(V * each @ V.T)
                                   for each in (of_v, variance_of_v(lam, t), of_x, lam))
        assert (found > bound - 1e-9).all() and (x_t < most + 1e-9).all()
        assert token_cost(found, 4) > token_cost(bound, 4) - 1e-9


def test_the_table_of_tokens_is_what_theory_and_trained_networks_give():
    """Catches a table of section 7 that differs from gaussian_costs or from gaussian.json."""
    found = json.loads((tokens.RESULTS / "gaussian.json").read_text())["rows"]
    costs = [tokens.gaussian_costs(32, t) for t in TIMES]
    rows = {name: np.array([cost[how] for cost in costs]) for how, name in (
        ("v", "theory, v from a token of 32"), ("x", "theory, x_0 from a token of 32"),
        ("skip", "theory, linear skip, token of 32"))}
    for model, label in (("no head", "DiT"), ("U-Net", "DiP")):
        rows[f"trained {label}, v, tokens of 32"] = np.mean([
            [row[f"excess at t = {t}"] for t in TIMES] for row in found
            if (row["model"], row["group"]) == (model, "tokens of 32")], axis=0)
    for name, values in rows.items():
        assert f"| {name} | " + " | ".join(f"{x:.3f}" for x in values) + " |" in README
    narrow, bound = rows["trained DiT, v, tokens of 32"], rows["theory, v from a token of 32"]
    assert (narrow > bound).all() and (bound > narrow / 2)[1:].all()


def test_the_table_of_shapes_is_what_the_file_and_the_trained_networks_give():
    """Catches a table of section 7 that differs from patches.npz or from the results."""
    for k, side in tokens.TRAINED:
        own, one = tokens.shapes_bound(k, side)[:, ::2].mean(axis=1)
        gain = tokens.measured_gain(k, side).mean()
        assert f"| {k} / {3 * side**2} | {own:.3f} | {one:.3f} | {gain:.3f} |" in README
        assert own <= one * (1 + 1e-6)                       # one W for all patches costs more
    assert own == 0
    loss = {place: np.mean([row["loss"] for row in read_rows("crossover") if row["seed"] < 3
                            and (row["group"], row["model"]) == place])
            for place in ((f"{D} of 48", name) for D in (48, 72) for name in ("no head", "U-Net"))}
    assert f"by {1 - loss['48 of 48', 'U-Net'] / loss['48 of 48', 'no head']:.0%}" in WORDS
    assert "With 72 for 48 the bound is 0 too, and the DiT without a head is ahead." in WORDS
    assert loss["72 of 48", "no head"] < loss["72 of 48", "U-Net"]


def test_the_table_of_photographs_is_what_the_file_gives():
    """Section 7: v at least, x_0 at most; cropped to 256 px, and as stored"""
    rows = re.findall(r"^\| (\d+) / (\d+), (256 px|as stored) \| (.*) \|$", README, re.M)
    assert len(rows) == 4
    for k, values, label, cells in rows:
        name = f"photos_{'256' if label == '256 px' else 'native'}_{round((int(values) / 3)**0.5)}"
        assert cells == " | ".join(f"{tokens.photo_bounds(name, int(k), t)[0]:.3f}" for t in TIMES)
    v, x = zip(*(tokens.photo_bounds("photos_native_32", 1152, t) for t in (0.1, 0.5, 0.9)))
    for text in ("must lose {:.2f} at t = 0.1, {:.2f} at 0.5 and {:.2f} at 0.9".format(*v),
                 "at most {:.3f} at t = 0.1 and {:.4f} at t = 0.5".format(*x)):
        assert text in WORDS
    for kind in ("256", "native"):
        assert tokens.photo_bounds(f"photos_{kind}_16", 1152, 0.5) == (0, 0)


def test_the_file_is_made_of_patches_of_photos_that_are_never_enlarged(tmp_path, capsys):
    """A zip of photos, some with a side below 256 pixels; against np.cov.  Catches a photo that is
    enlarged or squeezed."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        sizes = {"a/1.JPEG": (300, 260), "b/2.jpg": (256, 512), "3.JPEG": (200, 99),
                 "4.jpg": (300, 200)}
        for name, size in sizes.items():
            pixels = np.random.default_rng(len(name)).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            with archive.open(name, "w") as file:
                Image.fromarray(pixels).resize(size).save(file, "JPEG")
        archive.writestr("readme.txt", "no photo")
    native = list(patches.photos(tmp_path / "photos.zip", native=True))
    assert [x.shape for x in native] == [(99, 200, 3), (200, 300, 3), (260, 300, 3), (512, 256, 3)]
    small, tall = patches.photos(tmp_path / "photos.zip", native=False)
    assert small.shape == (256, 256, 3)
    np.testing.assert_array_equal(tall, native[3][128:384])  # the middle, as it is
    rows = [x[i:i + 4, j:j + 4].ravel() / 127.5 - 1 for x in native
            for i in range(0, len(x) - 3, 4) for j in range(0, x.shape[1] - 3, 4)]
    values = patches.of_photos(tmp_path / "photos.zip", "native", 4)
    expected = np.linalg.eigvalsh(np.cov(np.array(rows).T, bias=True))
    np.testing.assert_allclose(values, np.maximum(expected, 0), atol=1e-9 * expected.max())
    assert f"{len(rows)} patches" in capsys.readouterr().out


def test_the_bound_of_shapes_is_that_of_the_best_linear_guess(monkeypatch):
    """Against A M of (14) with the sample covariance of drawings that are noise with a pattern"""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((48, 48)) / 7
    drawings = np.clip(127.5 + 60 * rng.standard_normal((1000, 48)) @ mix, 0, 255)
    images = [(row.reshape(4, 4, 3), 0) for row in drawings]
    monkeypatch.setattr(train, "Shapes", lambda size: images)
    (own, one), = patches.of_shapes(number=1000, size=4, sides=(2,)).values()
    sigma, t = np.cov(drawings.T / 127.5, bias=True), tokens.SHAPES_TIMES[6]
    K = (t * np.eye(48) - (1 - t) * sigma) @ np.linalg.inv((1 - t) ** 2 * sigma + t**2 * np.eye(48))
    cov = K @ ((1 - t) ** 2 * sigma + t**2 * np.eye(48)) @ K.T
    pixels = [[(i + a) * 12 + (j + b) * 3 + c for a in range(2) for b in range(2) for c in range(3)]
              for i in (0, 2) for j in (0, 2)]
    blocks = [cov[np.ix_(p, p)] for p in pixels]
    np.testing.assert_allclose(own[6], np.mean([np.linalg.eigvalsh(b) for b in blocks], axis=0))
    np.testing.assert_allclose(one[6], np.linalg.eigvalsh(np.mean(blocks, axis=0)))


# --- Section 8: the exercises -------------------------------------------------------------------


@given(lam=st.floats(1e-8, 0.99))
def test_exercise_1_the_largest_gain_over_t(lam):
    """It is (1 + lam) / (2 sqrt(lam)): 512 for lam = 1024^-2."""
    at, peak = gain_peak(lam)
    assert 0 < at < 1 and gain(lam, at) == pytest.approx(peak, rel=1e-9)
    t = np.concatenate([np.linspace(0, 1, 999)[1:-1], at * np.linspace(0.9, 1.1, 99)])
    assert np.abs(gain(lam, t[t < 1])).max() <= peak * (1 + 1e-9)
    assert gain_peak(1024.0**-2)[1] == pytest.approx(512, rel=1e-5)


@given(m=models())
def test_exercise_2_as_t_falls_both_operators_tend_to_minus_p(m):
    """If (Sigma_low + Q Sigma_high Q) n = 0, then n is orthogonal to the low frequencies and Q n
    has no high ones; so n^T Q n = 0 and P n = 0.  On all other directions K = -P at t = 0.
    If a unit n misses both by s at most, |P n|^2 <= 2 s."""
    low, high = m.U[:, :m.r].T, m.U[:, m.r:].T @ m.Q
    _, s, directions = np.linalg.svd(np.concatenate([low, high]))
    assert (np.square(m.P @ directions.T).sum(axis=0) <= 2 * s + 1e-12).all()
    pixels = two_pixels(1e-6)
    for K in (pixels.dip_operator, pixels.dit_operator):
        np.testing.assert_allclose(K, [[-1, 0]], atol=1e-5)


def test_exercise_3_two_pixels_both_observations_seen():
    """x_t - x-hat_t gives x_high of pixel b, and that of pixel a is its negative.  So only the part
    along u_1 is unknown; its variance, 2, falls on pixel a by half."""
    m = two_pixels()
    high = (np.zeros((1, 2)), m.P, np.zeros((1, 2)))                     # x_high in pixel a
    difference = tuple(F[1:] - G[1:] for F, G in zip(m.observation("DiP"), m.observation("DiT")))
    K, error = best_guess(high, difference, m.R)
    np.testing.assert_allclose(K, [[-1 / (1 - m.t)]])
    np.testing.assert_allclose(error, 0, atol=1e-12)


def test_exercise_4_two_pixels_as_one_patch():
    """Cov(v*) has 2/5 along u_1 and 16/21 along u_2: reading v loses 2/5 of squared error.  Cov(x*)
    over t^2 has 8/45 and 4/189: reading x_0 loses 4/189."""
    two = two_pixels(0.75)
    m = GaussianModel(two.U, two.lam, np.array([[0, 1]]), 0, 1, 0.75)
    assert variance_of_v(m.lam, m.t) == pytest.approx([2 / 5, 16 / 21])
    assert variance_of_x(m.lam, m.t) == pytest.approx([8 / 45, 4 / 189])
    assert 2 * m.token_costs(1)["v"] == pytest.approx(2 / 5)
    assert 2 * m.token_costs(1)["x"] == pytest.approx(4 / 189)


# --- Section 9: the verdicts, and what must change them -----------------------------------------


def on(spectrum=image_decay, **broken):
    """The models of the claims, of a class in which the named attributes are others"""
    return dict(models=claims.cases(type("Planted", (GaussianModel,), broken), spectrum))


def variance(value):
    return lambda d, alpha: image_decay(d, alpha, value)


def falls_after(*cuts, scale=1):
    """A spectrum that falls by a factor of 1e4 after each cut"""
    return lambda d, alpha: scale * 10.0 ** -np.array([4 * sum(i >= cut for cut in cuts) + i / d
                                                      for i in range(d)])


def sees(**changed):
    """An observation in which who = "DiT" sees what another does, and so on"""
    changed = {who.replace("_", " "): other for who, other in changed.items()}
    return lambda m, who: GaussianModel.observation(m, changed.get(who, who))


def times(factor, name):
    """The operator `name` of the true model, times a factor"""
    return property(lambda m: factor * vars(GaussianModel)[name].func(m))


@pytest.mark.parametrize("name, attribute", [
    ("(13)", "dip_operator"), ("(16)", "gains"), ("(18), (19), (21), (26), (27), (29)", "B"),
    ("(12), (31) of x-hat_t", "dit_operator"), ("(32)", "E"), ("(33), D-hat diagonal in U", "D"),
    ("(35)", "D_inverse"), ("P gain(Sigma-hat)", "dit_by_gains")])
def test_an_identity_that_is_broken_does_not_hold(name, attribute):
    """Each operator doubled: the row of the exact identities must fail, and say which"""
    evidence, verdict = claims.exact(on(**{attribute: times(2, attribute)})["models"][:1])
    assert verdict == FALSE and f"{name} off by" in evidence


def test_the_equations_before_the_appendix_can_fail(monkeypatch):
    """A formula (1) in which noise grows twice as fast as the steps add it"""
    monkeypatch.setattr(claims, "marginal", lambda lam, t: 1 + (lam - 1) * np.exp(-2 * t))
    evidence, _ = claims.exact(claims.CASES[:1])
    for name in ("(1)", "(2)", "(3) as reverse SDE", "(4)"):
        assert f"{name} off by" in evidence


@pytest.mark.parametrize("printed, corrected, exact", claims.SLIPS.values(), ids=claims.SLIPS)
def test_a_misprint_needs_a_wrong_and_a_right_form(printed, corrected, exact):
    for first, second, verdict in ((printed, corrected, MISPRINT), (corrected, corrected, HOLDS),
                                   (printed, printed, FALSE)):
        assert claims.slip(first, second, exact)[1] == verdict


PLANTED = [
    # claim, what is planted, how, the verdict that the claim must have then
    ("noise_alone", "images almost without variance", on(variance(1e-4)), HOLDS),
    ("monotone", "a gain without sign",
     on(gains=property(lambda m: np.abs(gain(m.lam, m.t)))), FALSE),
    ("magnitude", "every lam below t / (1-t)", on(variance(1e-5)), HOLDS),
    ("magnitude", "every lam above t / (1-t)", on(variance(1e9)), FALSE),
    ("seeing_both", "nothing but x_t is seen", on(observation=sees(both="DiP")), HOLDS),
    ("who_is_lower", "DiT sees a part of x_t", on(observation=sees(DiT="patch and low")), HOLDS),
    ("nested", "DiT sees more than x_t", on(observation=sees(patch_and_low="both")), FALSE),
    ("nested", "DiT sees x_t", on(observation=sees(patch_and_low="DiP")), FALSE),
    ("second_sum", "(33) printed rightly", on(C=lambda m, _: GaussianModel.C(m, False)), HOLDS),
    ("second_sum", "a correction that is wrong",
     on(C=lambda m, printed: 2 * GaussianModel.C(m, printed)), FALSE),
    ("second_sum", "lam_i that are not small", on(variance(50)), MISPRINT),
    ("reason_for_34", "a gap at both cuts", on(falls_after(4, 16)), HOLDS),
    ("reason_for_34", "a gap at one cut", on(falls_after(16)), CONDITIONAL),
    ("smallness", "tiny detail", on(falls_after(4, 4)), HOLDS),
    ("smallness", "huge detail", on(variance(1e9)), FALSE),
    ("first_sum", "tiny detail", on(falls_after(4, 4)), HOLDS),
    ("first_sum", "huge detail", on(variance(1e4)), FALSE),
    ("first_sum", "a gap at one cut, large images", on(falls_after(16, scale=100)), FALSE),
    ("approximation", "tiny detail", on(falls_after(4, 4)), HOLDS),
    ("approximation", "(15) as printed", on(eq15=lambda m, _: GaussianModel.eq15(m, True)), FALSE),
    ("limit_of_noise", "DiT does what (15) prints",
     on(dit_operator=property(lambda m: sum(GaussianModel.eq15(m, True)))), HOLDS),
    ("limit_of_data", "DiT does what DiP does", on(dit_operator=times(1, "dip_operator")), FALSE),
    ("limit_of_data", "DiT amplifies twice as much",
     on(dit_operator=times(2, "dip_operator")), HOLDS),
    ("narrow_token", "alpha 1: x_0 costs 0.051, v 0.073", dict(alpha=1.0), FALSE),
    ("narrow_token", "alpha 0.2: x_0 costs 0.42, v 0.015", dict(alpha=0.2), FALSE),
    ("narrow_token", "alpha 1.2: v costs enough, x_0 too much", dict(alpha=1.2), FALSE),
    ("narrow_token", "a token of 46 for 48: x_0 costs little, v too", dict(k=46), FALSE),
    ("narrow_input", "alpha 1: much detail is not seen", dict(alpha=1.0), FALSE),
    ("narrow_input", "alpha 3: there is hardly any detail", dict(alpha=3.0), FALSE),
]

DATA = [
    # claim, what is planted, the spectrum it replaces, how, the verdict that the claim must have
    ("on_shapes", "a bound that explains little", "shapes_4", lambda x: 0.1 * x, CONDITIONAL),
    ("on_shapes", "a bound above what was measured", "shapes_8", lambda x: 2 * x, CONDITIONAL),
    ("on_photos", "photographs of variance 1 everywhere", "photos_256_32", np.ones_like, FALSE),
    ("on_photos", "patches of 3072 values for both", "photos_256_16", lambda x: np.tile(x, 4),
     FALSE),
]


@pytest.fixture(scope="module")
def verdicts():
    """{name of a claim: its verdict}"""
    found = claims.table()[-len(claims.CLAIMS):]
    return {claim.__name__: verdict for claim, (*_, verdict) in zip(claims.CLAIMS, found)}


@pytest.mark.parametrize("name, what, plant, planted", PLANTED,
                         ids=[" ".join(row[:2]) for row in PLANTED])
def test_every_verdict_on_models_can_come_out_otherwise(name, what, plant, planted, verdicts):
    """Models, operators or tokens for which the claim is as true, or as false, as it is not here"""
    assert verdicts[name] != planted == getattr(claims, name)(**plant)[1]


@pytest.mark.parametrize("name, what, spectrum, change, planted", DATA,
                         ids=[" ".join(row[:2]) for row in DATA])
def test_every_verdict_on_data_can_come_out_otherwise(name, what, spectrum, change, planted,
                                                      verdicts, monkeypatch):
    changed = dict(tokens.spectra())
    changed[spectrum] = change(changed[spectrum])
    monkeypatch.setattr(tokens, "spectra", lambda: changed)
    assert verdicts[name] != planted == getattr(claims, name)()[1]


def test_something_is_planted_for_every_claim():
    planted = {name for name, *_ in PLANTED + DATA}
    assert planted == {claim.__name__ for claim in claims.CLAIMS}


def test_every_verdict_is_the_same_at_the_scale_of_assumption_a4(verdicts):
    """lam_1 = 1, as printed there, in the place of an image's variance"""
    unscaled = on(lambda d, alpha: np.arange(1, d + 1) ** -alpha)
    for claim in claims.CLAIMS:
        if "models" in inspect.signature(claim).parameters:
            assert claim(**unscaled)[1] == verdicts[claim.__name__], claim.__name__
    assert claims.exact(**unscaled)[1] == HOLDS


def test_the_readme_gives_verdicts_that_are_printed():
    """Its table is part of the printed one, in order, without the evidence; its counts are all."""
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|"))
            for line in README.split("## 9.")[1].splitlines() if line.startswith("| ")][1:]
    printed = [(equation, claim, verdict) for equation, claim, _, verdict in claims.table()]
    assert 8 <= len(rows) <= 12 and rows == [row for row in printed if row in rows]
    count = {verdict: sum(row[2] == verdict for row in printed) for *_, verdict in printed}
    assert (f"all {len(printed)} verdicts") in WORDS
    assert ("{holds} hold, {does not hold} do not, {conditional} hold in part, {misprint} are "
            "misprints, {error} is an error").format(**count) in WORDS


@pytest.mark.parametrize("figure", [
    "in 18 of 60 cases DiT's error is at least 1% lower (at most 7.6%), in 11 at least 1% higher "
    "(at most 31%)", "better by at least 1% in 22 of 60 cases, all at t <= 0.5", "4.7% (cosines",
    "5.5% (two dimensions", "26.3% (rotation", "1.2 to 15%",
    "0.64 to 0.91", "15 to 1200 times", "0.89 to 1.06", "3.3 to 15%", "0.7 to 66 times DiP's",
    "7 of 12", "0.05, 0.13, 0.20, 0.25"])
def test_every_figure_that_the_readme_takes_from_the_table_is_there(figure):
    assert figure in WORDS and any(figure in " ".join(row) for row in claims.table())


def test_numbers_that_only_the_command_prints():
    """Mean square of E[x_0 | x_t] over that of (13); the border of `magnitude`; means of tenths"""
    share = []
    for m in claims.at(claims.CASES, 0.3, 0.5, 0.7, 0.9):
        errors = [best_guess(target, m.observation("DiP"), m.R)[1] for target in (
            (m.P, m.P, 0 * m.P), m.velocity)]                # of x_0, and of v, in the patch
        of_patch = np.trace(m.P @ m.sigma @ m.P.T)
        share.append((of_patch - np.trace(errors[0])) / (of_patch + len(m.P) - np.trace(errors[1])))
    assert f"square is {claims.percent(share)} of" in claims.noise_alone()[0]
    border = [lam / (1 + lam) for alpha in (1.5, 2.0) for lam in [image_decay(64, alpha)[0]]]
    assert f"{min(border):.2f} to {max(border):.2f} in these images" in claims.magnitude()[0]
    for k, side in list(tokens.TRAINED)[:3]:
        bound = np.mean([tokens.shapes_bound(k, side)[0][i] for i in range(0, 19, 2)])
        gain = tokens.measured_gain(k, side).mean()
        assert f"{bound:.3f} of {gain:.3f} ({k} for {3 * side**2})" in claims.on_shapes()[0]


def test_the_cost_of_a_narrow_input():
    """11 of 16 directions of each patch are seen; against a covariance that is inverted"""
    costs = []
    for t in (0.1, 0.3):
        m, I = tokens.token_models(t)[0], np.eye(256)
        seen = np.concatenate([np.linalg.svd(m.sigma[np.ix_(p, p)])[0][:, :11].T @ I[p]
                               for p in m.patches])
        noisy = (1 - t) ** 2 * m.sigma + t**2 * I
        known = [(1 - t) ** 2 * m.sigma @ E.T @ np.linalg.inv(E @ noisy @ E.T) @ E @ m.sigma
                 for E in (I, seen)]
        costs.append(np.trace(known[0] - known[1]) / 256 / t**2)
        assert m.narrow_input_cost(11) == pytest.approx(costs[-1], rel=1e-6)
    assert "loses {:.3f} at t = 0.1 and {:.3f} at t = 0.3".format(*costs) in WORDS


def test_the_table_fits_a_terminal_and_the_command_writes_nothing(capsys):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "assets").iterdir()}
    theory.__main__.main([])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 50 and max(map(len, printed)) <= 100
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "assets").iterdir()}


def test_every_section_that_the_code_names_exists():
    sections = set(re.findall(r"^## (\d)", README, re.M))
    for path in (ROOT / "theory").glob("*.py"):
        assert set(re.findall(r"[Ss]ections? (\d)", path.read_text())) <= sections
