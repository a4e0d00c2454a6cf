"""
The Gaussian model of Appendix A.  "Section" means a section of theory/README.md.

Letters are the paper's: d values in an image, N patches of p, U (d, d) the orthonormal basis,
lam (d,) the eigenvalues, falling; the first r are "low" frequency; t in (0, 1), where 0 is data and
1 is noise.  The mean is 0: it shifts everything and changes no operator.  All covariances are exact
matrices.  `best_guess` conditions a joint Gaussian and knows none of the paper's formulas.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import scipy.fft
import scipy.linalg

# -------------------------------------------------------------------------------------------------
# Section 2: images.  A basis is U (d, d), columns from low frequency to high, and the pixels of
# each patch (N, p).


def dct_basis(d, p):
    """One dimension: column i is the cosine of DCT-II that has i half-waves; patches are runs."""
    return scipy.fft.idct(np.eye(d), axis=0, norm="ortho"), np.arange(d).reshape(-1, p)


def image_basis(side, patch):
    """Two dimensions: products of cosines by radial frequency; patches are squares."""
    one, _ = dct_basis(side, 1)
    order = np.argsort(np.hypot(*np.indices((side, side))).ravel(), kind="stable")
    n = side // patch
    pixels = np.arange(side**2).reshape(n, patch, n, patch).swapaxes(1, 2).reshape(n * n, -1)
    return np.kron(one, one)[:, order], pixels


def random_basis(d, p, seed=0):
    """A random rotation: "frequency" without any smoothness."""
    q, r = np.linalg.qr(np.random.RandomState(seed).normal(size=(d, d)))
    return q * np.sign(np.diag(r)), np.arange(d).reshape(-1, p)


def image_decay(d, alpha, variance=0.25):
    """Assumption A.4, i^-alpha, scaled so that a pixel has the variance of one in [-1, 1]."""
    lam = np.arange(1, d + 1) ** -float(alpha)
    return lam * (variance * d / lam.sum())


# -------------------------------------------------------------------------------------------------
# Section 3: Gaussian conditioning.  A quantity is a tuple of matrices (F_1, F_2, ...): it is
# F_1 z_1 + F_2 z_2 + ..., where the parts z_i are independent, centred, and have the covariance
# R_i R_i^T; R = (R_1, R_2, ...).


def spread(quantity, R):
    """(rows, n): the same quantity as a matrix times n independent standard normal variables"""
    return np.concatenate([F @ R_i for F, R_i in zip(quantity, R)], axis=1)


def covariance(a, b, R):
    return spread(a, R) @ spread(b, R).T


def best_guess(target, seen, R):
    """(K, error): E[target | seen] is K seen, and `error` is the covariance of target - K seen.

    K = Cov(target, seen) Cov(seen)^-1 by least squares, which loses half the digits that the
    inverse would, and may be given observations that repeat themselves."""
    g, y = spread(target, R), spread(seen, R)
    K = scipy.linalg.lstsq(y.T, g.T, cond=1e-12, lapack_driver="gelsy")[0].T
    rest = g - K @ y
    return K, rest @ rest.T


# -------------------------------------------------------------------------------------------------
# Sections 4 and 7: one frequency of variance lam


def gain(lam, t):
    """(t - (1-t) lam) / ((1-t)^2 lam + t^2): Eq. (16), best velocity over noisy coefficient."""
    return (t - (1 - t) * lam) / ((1 - t) ** 2 * lam + t**2)


def variance_of_v(lam, t):
    """Of the best velocity: gain^2 Var(x_t), the cost of knowing nothing of a frequency"""
    return (t - (1 - t) * lam) ** 2 / ((1 - t) ** 2 * lam + t**2)


def variance_of_x(lam, t):
    """Of E[x_0 | x_t] / t: the cost of knowing nothing if x_t / t is passed on"""
    return ((1 - t) * lam) ** 2 / ((1 - t) ** 2 * lam + t**2) / t**2


def token_cost(eigenvalues, k):
    """The least that a token of k dimensions loses, per value: the sum of all but the k largest
    eigenvalues of the covariance of what it must hold, over their number; over the last axis."""
    p = eigenvalues.shape[-1]
    return np.sort(eigenvalues)[..., :max(0, p - k)].sum(axis=-1) / p


# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GaussianModel:
    """Assumptions A.3 to A.5 for one patch s and one t; x_0 = x_low + x_high ~ N(0, sigma).
    A cached property is a formula of the model m, computed when it is first read."""

    U: np.ndarray            # (d, d)
    lam: np.ndarray          # (d,)
    patches: np.ndarray      # (N, p) the pixels of each patch
    s: int                   # the patch whose velocity is guessed
    r: int
    t: float

    # Section 2.  P x is patch s of x (below Definition A.1), Q keeps it and sets the rest to 0, and
    # V has the columns P u_i; the paper calls them v_i, like a velocity.
    d = cached_property(lambda m: len(m.lam))
    I = cached_property(lambda m: np.eye(m.d))
    P = cached_property(lambda m: m.I[m.patches[m.s]])                   # (p, d)
    Q = cached_property(lambda m: m.P.T @ m.P)                           # (d, d)
    V = cached_property(lambda m: m.P @ m.U)                             # (p, d)
    low = cached_property(lambda m: m.U[:, :m.r])                        # (d, r)
    high = cached_property(lambda m: m.U[:, m.r:])                       # (d, d - r)
    sigma_low = cached_property(lambda m: m.low * m.lam[:m.r] @ m.low.T)
    sigma_high = cached_property(lambda m: m.high * m.lam[m.r:] @ m.high.T)
    sigma = cached_property(lambda m: m.sigma_low + m.sigma_high)

    # In the independent parts (x_low, x_high, eps): v = eps - x_0 in patch s, and the roots of the
    # covariances of the parts
    velocity = cached_property(lambda m: (-m.P, -m.P, m.P))
    R = cached_property(lambda m: (*np.split(m.U * np.sqrt(m.lam), [m.r], axis=1), m.I))

    # Section 4: DiP, Eq. (14), (13), (16)
    M = cached_property(lambda m: np.linalg.inv((1 - m.t) ** 2 * m.sigma + m.t**2 * m.I))
    A = cached_property(lambda m: m.t * m.I - (1 - m.t) * m.sigma)
    dip_operator = cached_property(lambda m: m.P @ m.A @ m.M)
    gains = cached_property(lambda m: gain(m.lam, m.t))                  # (d,)

    # Section 6: DiT, Eq. (14), (12).  sigma_hat is the covariance of x-hat_0 = x_low + Q x_high.
    sigma_hat = cached_property(lambda m: m.sigma_low + m.Q @ m.sigma_high @ m.Q)
    M_hat = cached_property(lambda m: np.linalg.inv((1 - m.t) ** 2 * m.sigma_hat + m.t**2 * m.I))
    B = cached_property(lambda m: m.sigma_low + m.sigma_high @ m.Q)
    B_hat = cached_property(lambda m: m.t * m.I - (1 - m.t) * m.B)
    dit_operator = cached_property(lambda m: m.P @ m.B_hat @ m.M_hat)

    # Eq. (33), D_hat and E_hat.  The expansion of (34) needs a small norm of D^-1 E.
    D = cached_property(lambda m: (1 - m.t) ** 2 * m.sigma_low + m.t**2 * m.I)
    D_inverse = cached_property(lambda m: np.linalg.inv(m.D))
    E = cached_property(lambda m: (1 - m.t) ** 2 * m.Q @ m.sigma_high @ m.Q)
    smallness = cached_property(lambda m: np.linalg.norm(m.D_inverse @ m.E, 2))

    # Section 5: what an estimator sees

    def observation(self, who):
        """What is seen, from (x_low, x_high, eps)"""
        t, I, zero = self.t, self.I, 0 * self.I
        x_t = (1 - t) * I, (1 - t) * I, t * I                            # Eq. (8)
        x_hat = (1 - t) * I, (1 - t) * self.Q, t * I                     # Eq. (25), from (9), (10)
        detail = zero, I - self.Q, zero                                  # x_t - x_hat over 1 - t
        low = tuple(self.low @ self.low.T @ F for F in x_t)
        own = tuple(self.P @ F for F in x_t)
        seen = {"DiP": [x_t], "DiT": [x_hat], "both": [x_t, detail], "patch": [own],
                "patch and low": [own, low], "nothing": [(zero, zero, zero)]}[who]
        return tuple(np.concatenate(parts) for parts in zip(*seen))

    def best_guess(self, who):
        """(K, error covariance) of the velocity in patch s; knows nothing of Theorem A.6"""
        return best_guess(self.velocity, self.observation(who), self.R)

    def smallest_error(self, who):
        """Mean squared error of the best guess, a pixel"""
        return np.trace(self.best_guess(who)[1]) / len(self.P)

    @cache
    def mean_error(self, who):
        """The same, averaged over all patches"""
        return np.mean([replace(self, s=s).smallest_error(who) for s in range(len(self.patches))])

    def error_of(self, K, who):
        """Mean squared error, a pixel, of any linear guess K seen."""
        off = tuple(T - K @ F for T, F in zip(self.velocity, self.observation(who)))
        return np.trace(covariance(off, off, self.R)) / len(self.P)

    # Section 6: the same operator again, and the sums of Eq. (15)

    @cached_property
    def hat_modes(self):
        """(nu, n): eigenvalues of sigma_hat, falling, and its eigenvectors, columns of n; from a
        root of it, which keeps digits of eigenvalues as small as 1e-24."""
        low, high, _ = self.R
        n, root, _ = np.linalg.svd(np.concatenate([low, self.Q @ high], axis=1))
        return root**2, n

    @cached_property
    def dit_by_gains(self):
        """P gain(sigma_hat): each eigenvector of sigma_hat times the gain of its eigenvalue"""
        nu, n = self.hat_modes
        return self.P @ n * gain(nu, self.t) @ n.T

    def C(self, as_printed):
        """C_hat_1 + C_hat_2 of Eq. (33), should be B_hat: for t at high frequency, t lam_i."""
        first = self.sigma_high if as_printed else self.high @ self.high.T
        return (self.low * (self.t - (1 - self.t) * self.lam[:self.r]) @ self.low.T
                + self.t * first - (1 - self.t) * self.sigma_high @ self.Q)

    def eq15(self, as_printed):
        """The four sums of Eq. (15), each (p, d): low, high, I_1, I_2.  As printed the second has
        lam_i / t, else 1 / t."""
        low, high = self.low, self.high
        factor = self.lam[self.r:] / self.t if as_printed else 1 / self.t
        both = -(1 - self.t) * self.P @ self.sigma_high @ self.Q @ self.D_inverse
        return (self.P @ low * self.gains[:self.r] @ low.T, self.P @ high * factor @ high.T,
                both @ low @ low.T, both @ high @ high.T)

    # Section 7: a token of k dimensions

    def token_costs(self, k, channels=1):
        """The least that a k-dimensional token adds to the error, per value of the patch, when
        DiP's best guess v* is read from it by W token ("v"), by (x_t - W token) / t ("x"), or by
        G x_t + W token with the patch's own noisy pixels x_t ("skip": a linear skip).  Channels are
        independent."""
        V, t = self.V, self.t
        noisy = (1 - t) ** 2 * self.lam + t**2                           # variances of x_t
        cov_v = V * variance_of_v(self.lam, t) @ V.T                       # of v*
        cov_x = V * variance_of_x(self.lam, t) @ V.T                    # of E[x_0 | x_t] / t
        cross = V * (self.gains * noisy) @ V.T                           # of v* and x_t
        cov_rest = cov_v - cross @ np.linalg.solve(V * noisy @ V.T, cross.T)
        return {name: token_cost(np.repeat(np.linalg.eigvalsh(cov), channels), k)
                for name, cov in (("v", cov_v), ("x", cov_x), ("skip", cov_rest))}

    def narrow_input_cost(self, k):
        """What a guess of x_0 loses, over t^2, per value, if of each patch of x_t only the k
        directions are seen in which the images vary most."""
        x_0 = self.I, self.I, 0 * self.I
        keep = np.concatenate([np.linalg.eigh(self.sigma[np.ix_(p, p)])[1][:, -k:].T @ self.I[p]
                               for p in self.patches])
        some, all_seen = (np.trace(best_guess(x_0, tuple(
            S @ F for F in self.observation("DiP")), self.R)[1]) for S in (keep, self.I))
        return (some - all_seen) / self.d / self.t**2


def two_pixels(t=0.5):
    """The example of section 2: two patches of one pixel each; the first, r = 1."""
    U = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    return GaussianModel(U, np.array([1, 1 / 3]), np.array([[0], [1]]), s=0, r=1, t=t)
