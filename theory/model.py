"""
The Gaussian model of Appendix A, in the order of theory/README.md, whose sections are named below.

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
import scipy.stats

# -------------------------------------------------------------------------------------------------
# Section 2: images.  A basis is U (d, d), columns from low frequency to high, and the pixels of
# each patch (N, p).


def dct_basis(d, p):
    """One dimension: column i is the cosine of DCT-II that has i half-waves; patches are runs."""
    return scipy.fft.idct(np.eye(d), axis=0, norm="ortho"), np.arange(d).reshape(-1, p)


def image_basis(side, patch):
    """Two dimensions: products of cosines by radial frequency; patches are squares."""
    one = scipy.fft.idct(np.eye(side), axis=0, norm="ortho")
    k = np.arange(side)
    order = np.argsort(np.hypot(*np.meshgrid(k, k, indexing="ij")).ravel(), kind="stable")
    n = side // patch
    pixels = np.arange(side**2).reshape(n, patch, n, patch).swapaxes(1, 2).reshape(n * n, -1)
    return np.kron(one, one)[:, order], pixels


def random_basis(d, p, seed=0):
    """A random rotation: "frequency" without any smoothness."""
    return scipy.stats.ortho_group.rvs(d, random_state=seed), np.arange(d).reshape(-1, p)


def decay(d, alpha):
    """Assumption A.4: i^-alpha, i = 1 ... d"""
    return np.arange(1, d + 1) ** -float(alpha)


def image_decay(d, alpha, variance=0.25):
    """The same, scaled so that a pixel has the variance of one of an image in [-1, 1]."""
    lam = decay(d, alpha)
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
# Section 4: what the best guess does to one frequency of variance lam


def gain(lam, t):
    """(t - (1-t) lam) / ((1-t)^2 lam + t^2): Eq. (16), best velocity over noisy coefficient."""
    return (t - (1 - t) * lam) / ((1 - t) ** 2 * lam + t**2)


# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GaussianModel:
    """Assumptions A.3 to A.5 for one patch s and one t; x_0 = x_low + x_high ~ N(0, sigma)."""

    U: np.ndarray            # (d, d)
    lam: np.ndarray          # (d,)
    patches: np.ndarray      # (N, p) the pixels of each patch
    s: int                   # the patch whose velocity is guessed
    r: int
    t: float

    # Section 2: images and patches

    @property
    def d(self):
        return len(self.lam)

    @cached_property
    def P(self):
        """(p, d): P x is patch s of x (below Definition A.1)."""
        return np.eye(self.d)[self.patches[self.s]]

    @cached_property
    def Q(self):
        """(d, d): P^T P keeps patch s and sets the rest to 0."""
        return self.P.T @ self.P

    @property
    def V(self):
        """(p, d): P u_i, part of frequency i in patch s; the paper calls it v_i, like a velocity"""
        return self.P @ self.U

    @cached_property
    def sigma_low(self):
        return self.U[:, :self.r] * self.lam[:self.r] @ self.U[:, :self.r].T

    @cached_property
    def sigma_high(self):
        return self.U[:, self.r:] * self.lam[self.r:] @ self.U[:, self.r:].T

    @property
    def sigma(self):
        return self.sigma_low + self.sigma_high

    @cached_property
    def R(self):
        """Roots of the covariances of the independent parts (x_low, x_high, eps)"""
        root = self.U * np.sqrt(self.lam)
        return root[:, :self.r], root[:, self.r:], np.eye(self.d)

    @property
    def velocity(self):
        """eps - x_0 in patch s, from (x_low, x_high, eps)"""
        return -self.P, -self.P, self.P

    # Section 4: DiP, Eq. (13), (14), (16)

    @property
    def M(self):
        """Eq. (14)"""
        return np.linalg.inv((1 - self.t) ** 2 * self.sigma + self.t**2 * np.eye(self.d))

    @cached_property
    def dip_operator(self):
        """P A M of Eq. (13), with A of Eq. (14)"""
        A = self.t * np.eye(self.d) - (1 - self.t) * self.sigma
        return self.P @ A @ self.M

    @property
    def gains(self):
        """(d,): the factor of each frequency in Eq. (16)"""
        return gain(self.lam, self.t)

    # Section 5: what an estimator sees

    def observation(self, who):
        """What is seen, from (x_low, x_high, eps)"""
        t, I, zero = self.t, np.eye(self.d), np.zeros((self.d, self.d))
        x_t = (1 - t) * I, (1 - t) * I, t * I                            # Eq. (8)
        x_hat = (1 - t) * I, (1 - t) * self.Q, t * I                     # Eq. (25), from (9), (10)
        detail = zero, I - self.Q, zero                                  # x_t - x_hat over 1 - t
        L = self.U[:, :self.r] @ self.U[:, :self.r].T                    # keeps low frequencies
        low = tuple(L @ F for F in x_t)
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

    # Section 6: DiT, Theorem A.6

    @property
    def sigma_hat(self):
        """Covariance of x-hat_0 = x_low + Q x_high, the image whose noisy version is x-hat_t"""
        return self.sigma_low + self.Q @ self.sigma_high @ self.Q

    @cached_property
    def hat_modes(self):
        """(nu, n): eigenvalues of sigma_hat, falling, and its eigenvectors, columns of n; from a
        root of it, so that an eigenvalue may be as small as 1e-24 and still have its digits."""
        low, high, _ = self.R
        n, root, _ = np.linalg.svd(np.concatenate([low, self.Q @ high], axis=1))
        return root**2, n

    @property
    def dit_by_gains(self):
        """P gain(sigma_hat): each eigenvector of sigma_hat times the gain of its eigenvalue"""
        nu, n = self.hat_modes
        return self.P @ n * gain(nu, self.t) @ n.T

    @property
    def B(self):
        """Eq. (14)"""
        return self.sigma_low + self.sigma_high @ self.Q

    @property
    def B_hat(self):
        """Eq. (14)"""
        return self.t * np.eye(self.d) - (1 - self.t) * self.B

    @cached_property
    def M_hat(self):
        """Eq. (14)"""
        return np.linalg.inv((1 - self.t) ** 2 * self.sigma_hat + self.t**2 * np.eye(self.d))

    @cached_property
    def dit_operator(self):
        """P B_hat M_hat of Eq. (12)"""
        return self.P @ self.B_hat @ self.M_hat

    def C(self, as_printed):
        """C_hat_1 + C_hat_2 of Eq. (33), should be B_hat: for t at high frequency, t lam_i."""
        low, high, t = self.U[:, :self.r], self.U[:, self.r:], self.t
        first = self.sigma_high if as_printed else high @ high.T
        return (low * (t - (1 - t) * self.lam[:self.r]) @ low.T
                + t * first - (1 - t) * self.sigma_high @ self.Q)

    @property
    def D(self):
        """D_hat of Eq. (33)"""
        return (1 - self.t) ** 2 * self.sigma_low + self.t**2 * np.eye(self.d)

    @cached_property
    def D_inverse(self):
        return np.linalg.inv(self.D)

    @property
    def E(self):
        """E_hat of Eq. (33)"""
        return (1 - self.t) ** 2 * self.Q @ self.sigma_high @ self.Q

    def eq15(self, as_printed):
        """The four sums of Eq. (15), each (p, d): low, high, I_1, I_2.  As printed the second has
        lam_i / t, else 1 / t."""
        low, high = self.U[:, :self.r], self.U[:, self.r:]
        factor = self.lam[self.r:] / self.t if as_printed else 1 / self.t
        both = -(1 - self.t) * self.P @ self.sigma_high @ self.Q @ self.D_inverse
        return (self.P @ low * self.gains[:self.r] @ low.T, self.P @ high * factor @ high.T,
                both @ low @ low.T, both @ high @ high.T)

    @property
    def smallness(self):
        """Spectral norm of D^-1 E: the expansion of Eq. (34) needs it to be small."""
        return np.linalg.norm(self.D_inverse @ self.E, 2)

    # Section 7: a token of k dimensions

    def token_costs(self, k, channels=1):
        """The least that a k-dimensional token adds to the error, per value of the patch, when
        DiP's best guess v* is read from it by W token ("v"), by (x_t - W token) / t ("x"), or by
        G x_t + W token with the patch's own noisy pixels x_t ("skip": a linear skip).  Channels are
        independent."""
        V, g, t = self.V, self.gains, self.t
        noisy = (1 - t) ** 2 * self.lam + t**2                          # variances of x_t
        cov_v = V * cost_unseen(self.lam, t) @ V.T                      # of v*
        cov_x = V * cost_passed_on(self.lam, t) @ V.T                   # of E[x_0 | x_t] / t
        cross = V * (g * noisy) @ V.T                                   # of v* and x_t
        cov_rest = cov_v - cross @ np.linalg.solve(V * noisy @ V.T, cross.T)
        return {name: token_cost(np.repeat(np.linalg.eigvalsh(cov), channels), k)
                for name, cov in (("v", cov_v), ("x", cov_x), ("skip", cov_rest))}

    def narrow_input_cost(self, k):
        """What a guess of x_0 loses, over t^2, per value, if of each patch of x_t only the k
        directions are seen in which the images vary most."""
        x_0, x_t = (np.eye(self.d), np.eye(self.d), 0 * self.Q), self.observation("DiP")
        keep = np.concatenate([np.linalg.eigh(self.sigma[np.ix_(p, p)])[1][:, -k:].T
                               @ np.eye(self.d)[p] for p in self.patches])
        error = [np.trace(best_guess(x_0, tuple(S @ F for F in x_t), self.R)[1])
                 for S in (keep, np.eye(self.d))]
        return (error[0] - error[1]) / self.d / self.t**2


def token_cost(eigenvalues, k):
    """The least that a token of k dimensions loses, per value: the sum of all but the k largest
    eigenvalues of the covariance of what it must hold, over their number; over the last axis."""
    p = eigenvalues.shape[-1]
    return np.sort(eigenvalues)[..., :max(0, p - k)].sum(axis=-1) / p


def cost_unseen(lam, t):
    """What it costs to know nothing of a frequency: the variance of v*, gain^2 Var(x_t)"""
    return (t - (1 - t) * lam) ** 2 / ((1 - t) ** 2 * lam + t**2)


def cost_passed_on(lam, t):
    """The same if x_t / t is passed on, so that only E[x_0 | x_t] / t is missing"""
    return ((1 - t) * lam) ** 2 / ((1 - t) ** 2 * lam + t**2) / t**2


def two_pixels(t=0.5):
    """The example of section 2: two patches of one pixel each; patch 1, r = 1."""
    U = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    return GaussianModel(U, np.array([1, 1 / 3]), np.array([[0], [1]]), s=0, r=1, t=t)
