"""
The Gaussian model of Appendix A: definitions and formulas as the paper writes them, and references
that do not use its formulas.

Letters are the paper's.  d numbers in an image, N patches of p, U (d, d) the orthonormal basis, lam
(d,) the eigenvalues, falling; r of them are "low" frequency; P (p, d) selects patch s; t in (0, 1),
where 0 is data and 1 is noise.  All covariances are exact matrices: nothing here is sampled, except
by `monte_carlo`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.fft
import scipy.stats

# -------------------------------------------------------------------------------------------------
# Bases: U (d, d), columns from low frequency to high, and the pixels of each patch (N, p)


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
    return (scipy.stats.ortho_group.rvs(d, random_state=seed) if d > 1 else np.eye(1),
            np.arange(d).reshape(-1, p))


# -------------------------------------------------------------------------------------------------
# The model, and the formulas of Theorem A.6 as printed


@dataclass(frozen=True)
class GaussianModel:
    """Assumptions A.3 to A.5 for one patch s and one t; x_0 ~ N(mu, U diag(lam) U^T)."""

    U: np.ndarray            # (d, d)
    lam: np.ndarray          # (d,)
    pixels: np.ndarray       # (p,) the pixels of patch s
    r: int
    t: float

    @property
    def d(self):
        return len(self.lam)

    @cached_property
    def P(self):
        """(p, d): P x is patch s of x (below Definition A.1)."""
        return np.eye(self.d)[self.pixels]

    @cached_property
    def Q(self):
        """(d, d): P^T P keeps patch s and blanks the rest."""
        return self.P.T @ self.P

    @cached_property
    def sigma_low(self):
        return self.U[:, :self.r] * self.lam[:self.r] @ self.U[:, :self.r].T

    @cached_property
    def sigma_high(self):
        return self.U[:, self.r:] * self.lam[self.r:] @ self.U[:, self.r:].T

    @property
    def sigma(self):
        return self.sigma_low + self.sigma_high

    @property
    def V(self):
        """(p, d): [v_1, ..., v_d] = P [u_1, ..., u_d]"""
        return self.P @ self.U

    # Observations as matrices: y = F_low x_low + F_high x_high + F_eps eps (+ a mean)

    def observation(self, who):
        """(F_low, F_high, F_eps) of what an estimator sees; x_0 = mu + x_low + x_high (Eq. 7)."""
        t, I, zero = self.t, np.eye(self.d), np.zeros((self.d, self.d))
        x_t = (1 - t) * I, (1 - t) * I, t * I                            # Eq. (8)
        x_hat = (1 - t) * I, (1 - t) * self.Q, t * I                     # Eq. (25), from (9), (10)
        L = self.U[:, :self.r] @ self.U[:, :self.r].T                    # keeps low frequencies
        low = tuple(L @ F for F in x_t)
        own = tuple(self.P @ F for F in x_t)
        both = {"DiP": [x_t], "DiT": [x_hat], "union": [x_t, x_hat], "patch": [own],
                "patch and low": [own, low], "nothing": [(zero, zero, zero)]}[who]
        return tuple(np.concatenate(parts) for parts in zip(*both))

    # Theorem A.6

    @property
    def M(self):
        """Eq. (14)"""
        return np.linalg.inv((1 - self.t) ** 2 * self.sigma + self.t**2 * np.eye(self.d))

    @property
    def A(self):
        """Eq. (14)"""
        return self.t * np.eye(self.d) - (1 - self.t) * self.sigma

    @property
    def M_hat(self):
        """Below Eq. (13)"""
        seen = self.sigma_low + self.Q @ self.sigma_high @ self.Q
        return np.linalg.inv((1 - self.t) ** 2 * seen + self.t**2 * np.eye(self.d))

    @property
    def B_hat(self):
        """Below Eq. (13)"""
        return self.t * np.eye(self.d) - (1 - self.t) * (self.sigma_low + self.sigma_high @ self.Q)

    @property
    def dip_operator(self):
        """P A M of Eq. (13)"""
        return self.P @ self.A @ self.M

    @property
    def dit_operator(self):
        """P B_hat M_hat of Eq. (12)"""
        return self.P @ self.B_hat @ self.M_hat

    @property
    def gains(self):
        """(d,): the factor of each frequency in Eq. (16)"""
        return gain(self.lam, self.t)

    # Eq. (33), and what is made of it

    @property
    def C1(self):
        low = self.U[:, :self.r]
        return low * (self.t - (1 - self.t) * self.lam[:self.r]) @ low.T

    def C2(self, as_printed):
        """Eq. (33): the first term is printed with lam_i; B_hat = t I - ... makes it t alone."""
        high, lam = self.U[:, self.r:], self.lam[self.r:]
        first = high * (lam if as_printed else 1.0) @ high.T
        return self.t * first - (1 - self.t) * self.sigma_high @ self.Q

    @property
    def D(self):
        t, lam = self.t, np.where(np.arange(self.d) < self.r, self.lam, 0)
        return self.U * ((1 - t) ** 2 * lam + t**2) @ self.U.T

    @property
    def E(self):
        return (1 - self.t) ** 2 * self.Q @ self.sigma_high @ self.Q

    def expansion(self, as_printed, order=0):
        """P (C1 + C2) D^-1, which is Eq. (15); order 1 adds the term that Eq. (34) has and (15)
        drops: - P (C1 + C2) D^-1 E D^-1."""
        inverse = np.linalg.inv(self.D)
        C = self.P @ (self.C1 + self.C2(as_printed))
        return C @ inverse - (C @ inverse @ self.E @ inverse if order else 0)

    def printed_sums(self, second_sum):
        """Eq. (15) summand by summand, with lam_i/t ("printed") or 1/t ("corrected") in the
        second sum: (p, d)."""
        t, lam, r, V, U = self.t, self.lam, self.r, self.V, self.U
        cross = U.T @ self.Q @ U                                         # u_i^T P^T P u_j
        first = V[:, :r] * self.gains[:r] @ U[:, :r].T
        factor = lam[r:] / t if second_sum == "printed" else np.full(self.d - r, 1 / t)
        second = V[:, r:] * factor @ U[:, r:].T
        weights = -(1 - t) * lam[r:, None] * cross[r:] / np.where(
            np.arange(self.d) < r, (1 - t) ** 2 * lam + t**2, t**2)      # I_1, then I_2
        return first + second + V[:, r:] @ weights @ U.T

    @property
    def smallness(self):
        """Spectral norm of D^-1 E: the expansion of Eq. (34) needs it to be small."""
        return np.linalg.norm(np.linalg.solve(self.D, self.E), 2)


def gain(lam, t):
    """(t - (1-t) lam) / ((1-t)^2 lam + t^2): Eq. (16), the optimal velocity of one frequency."""
    return (t - (1 - t) * lam) / ((1 - t) ** 2 * lam + t**2)


def gain_slope(lam, t):
    """Its derivative by lam: - t (1 - t) / ((1-t)^2 lam + t^2)^2, negative for 0 < t < 1."""
    return -t * (1 - t) / ((1 - t) ** 2 * lam + t**2) ** 2


# -------------------------------------------------------------------------------------------------
# References: they know the joint Gaussian of (x_low, x_high, eps), and nothing of Theorem A.6


def condition(model, who):
    """(K, error): the exact conditional expectation of eps - x_0 in patch s given an observation is
    K (y - E y) - P mu, and `error` (p, p) is its error covariance.

    The joint covariance of target and observation is built from the three independent parts of the
    model, and conditioned upon: S_vy S_yy^+.  The pseudo-inverse is for observations that repeat
    themselves.
    """
    F_low, F_high, F_eps = model.observation(who)
    low, high, d = model.sigma_low, model.sigma_high, model.d
    target = -model.P, -model.P, model.P                     # v = eps - x_low - x_high, in patch s
    parts = tuple(zip(target, (F_low, F_high, F_eps), (low, high, np.eye(d))))
    S_vv = sum(T @ S @ T.T for T, _, S in parts)
    S_vy = sum(T @ S @ F.T for T, F, S in parts)
    S_yy = sum(F @ S @ F.T for _, F, S in parts)
    K = S_vy @ np.linalg.pinv(S_yy, hermitian=True, rcond=1e-13)
    return K, S_vv - K @ S_vy.T


def error_of(model, K, who):
    """Mean squared error, a pixel, of the linear estimate K y of the centred target."""
    F_low, F_high, F_eps = model.observation(who)
    residual = ((-model.P - K @ F_low, model.sigma_low), (-model.P - K @ F_high, model.sigma_high),
                (model.P - K @ F_eps, np.eye(model.d)))
    return sum(np.trace(R @ S @ R.T) for R, S in residual) / len(model.P)


def monte_carlo(model, mu, n, seed=0):
    """Samples (x_0, eps, x_t, x_hat_t), each (n, d), drawn by their definitions, Eq. (6) and by
    taking x_hat_t patch by patch: x_t inside patch s, mean, low and noise outside (Eq. 9, 10)."""
    rng, t = np.random.default_rng(seed), model.t
    coefficients = rng.standard_normal((n, model.d)) * np.sqrt(model.lam)
    eps = rng.standard_normal((n, model.d))
    low = coefficients[:, :model.r] @ model.U[:, :model.r].T
    high = coefficients[:, model.r:] @ model.U[:, model.r:].T
    x_0 = mu + low + high
    x_t = (1 - t) * x_0 + t * eps
    x_hat = (1 - t) * (mu + low) + t * eps
    x_hat[:, model.pixels] = x_t[:, model.pixels]
    return x_0, eps, x_t, x_hat


def decay(d, alpha):
    """Assumption A.4: i^-alpha, i = 1 ... d"""
    return np.arange(1, d + 1) ** -float(alpha)
