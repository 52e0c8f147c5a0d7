r"""Rademacher complexity: how well a class fits random signs on the very rows at hand.

.. math:: \hat{\mathfrak R}(F) = E_\sigma \sup_{f \in F} \frac1n \sum_{i=1}^n \sigma_i f(x_i), \qquad
    \sigma_i = \pm 1 \text{ independent and fair}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bayesdl.bounds._numbers import EPS, Array, Values, arrays, like, require, require_count, require_delta, up
from bayesdl.bounds.concentration.tails import checked
from bayesdl.errors import CertificateError


@dataclass(frozen=True)
class RademacherComplexity:
    """A Monte-Carlo estimate with its own confidence bound.

    Args:
        estimate: Mean over the draws of signs.
        upper: Upper bound on the complexity that holds with probability 1 - delta over the signs.
        draws: Number of draws of signs.
        delta: Failure probability of ``upper``.
    """

    estimate: float
    upper: float
    draws: int
    delta: float


def empirical_rademacher(
    supremum: Callable[[Array], Array], *, n: int, draws: int = 1000, delta: float = 0.01, seed: int = 0
) -> RademacherComplexity:
    r"""Empirical Rademacher complexity of a class with values in [-1, 1], by Monte Carlo.

    A sign moves the supremum by at most 2 / n, so McDiarmid's inequality over all n x draws signs gives

    .. math:: \hat{\mathfrak R} \le \text{estimate} + \sqrt{\frac{2 \log(1 / \delta)}{n \cdot \text{draws}}}

    which is much less than the spread of the draws would suggest. For the members of a finite class as rows of a
    matrix f ``[H, n]`` the supremum is ``lambda signs: (signs @ f.T).max(-1)``.

    Args:
        supremum: From signs ``[draws, n]`` to :math:`\sup_f \sum_i \sigma_i f(x_i)` ``[draws]``; an upper bound on it
            will do, a heuristic search that falls short of it will not.
        n: Number of rows.
        draws: Number of draws of signs.
        delta: Failure probability of the bound over the signs, in (0, 1).
        seed: Seed of the signs.

    Raises:
        CertificateError: When an argument is outside its domain, or a supremum is NaN, not of shape [draws] or outside
            [-n, n].

    Example:
        >>> identity_or_zero = empirical_rademacher(lambda s: np.maximum(s.sum(-1), 0), n=100)
        >>> round(identity_or_zero.estimate, 2)
        0.04
    """
    n_, draws_, delta_ = arrays(n=n, draws=draws, delta=delta)
    require_count("n", n_, 1)
    require_count("draws", draws_, 1)
    require_delta(delta_)
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (draws, n))
    (sums,) = arrays(supremum=supremum(signs))
    if sums.shape != (draws,):
        raise CertificateError(f"supremum must return one number for each of {draws} draws, got shape {sums.shape}")
    require(np.abs(sums) <= n * (1 + 1e-12), "supremum", "within n of zero for a class in [-1, 1]", sums)
    estimate = float(sums.mean() / n)
    deviation = np.sqrt(-2 * np.log(delta_) / (n * draws))
    rounding = 64 * EPS * float(np.abs(sums).mean() / n)  # the estimate may be of either sign
    return RademacherComplexity(estimate, float(estimate + rounding + up(deviation, 16 * EPS)), draws, delta)


def massart(*, log_size: Values, n: Values) -> Values:
    r"""Massart's lemma: the complexity of a finite class with values in [-1, 1].

    .. math:: \hat{\mathfrak R} \le \sqrt{2 \log |F| / n}

    |F| counts the different members on the n rows, so the log of the growth function serves as well.
    Source: Mohri, Rostamizadeh and Talwalkar (2018), Theorem 3.7.

    Args:
        log_size: Natural logarithm of the number of members, non-negative.
        n: Number of rows, at least 1.

    Returns:
        The bound, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    log_size_, n_ = arrays(log_size=log_size, n=n)
    require(log_size_ >= 0, "log_size", "non-negative", log_size_)
    require_count("n", n_, 1)
    return like(up(np.sqrt(2 * log_size_ / n_)), log_size, n)


def linear_rademacher(x: Values, *, norm: float = 1.0) -> float:
    r"""Bound on the complexity of linear functions :math:`w^T x` with :math:`\|w\| \le` ``norm``, from the rows.

    .. math:: \hat{\mathfrak R} = \frac{B}{n} E \Big\|\sum_i \sigma_i x_i\Big\|
        \le \frac Bn \sqrt{\textstyle\sum_i \|x_i\|^2}

    By Jensen's inequality; the two differ by a factor of at most sqrt(2) (Khinchine, Kahane). Source: Mohri,
    Rostamizadeh and Talwalkar (2018), Theorem 5.10.

    Args:
        x: Rows ``[n, d]``.
        norm: Largest norm B of the weights, non-negative.

    Returns:
        The bound, rounded up.

    Raises:
        CertificateError: When a number is NaN or infinite, or the norm is negative.
    """
    (x_,), (norm_,) = arrays(x=x), arrays(norm=norm)
    if x_.ndim != 2 or not len(x_):
        raise CertificateError(f"x must be [n, d] with n >= 1, got {x_.shape}")
    require(np.isfinite(x_), "x", "finite", x_)
    require((norm_ >= 0) & np.isfinite(norm_), "norm", "non-negative and finite", norm_)
    return float(up(norm_ * np.linalg.norm(x_) / len(x_), (32 + np.log2(x_.size + 1)) * EPS))


def rademacher_bound(*, risk: Values, complexity: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the risk of every member of a class of losses in [0, 1], by its empirical complexity.

    .. math:: R(f) \le \hat R(f) + 2 \hat{\mathfrak R} + 3 \sqrt{\frac{\log(2 / \delta)}{2 n}}
        \quad \text{for all } f \text{, with probability at least } 1 - \delta

    The complexity is that of the losses :math:`\ell(f(x), y)`; for the 0-1 loss of classifiers with values -1, 1 it is
    half the complexity of the classifiers. A Monte-Carlo ``upper`` adds its own delta to this one. Assumptions:
    independent and identically distributed rows. Source: Mohri, Rostamizadeh and Talwalkar (2018), Theorem 3.3.

    Args:
        risk: Average loss of the member, in [0, 1].
        complexity: Empirical Rademacher complexity of the losses or an upper bound on it, non-negative.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    _, complexity_ = arrays(risk=risk, complexity=complexity)
    require(complexity_ >= 0, "complexity", "non-negative", complexity_)
    risk_, n_, delta_ = checked(risk=risk, n=n, delta=delta)
    bound = up(risk_ + 2 * complexity_ + 3 * np.sqrt(np.log(2 / delta_) / (2 * n_)), 16 * EPS)
    return like(np.minimum(bound, 1.0), risk, complexity, n, delta)
