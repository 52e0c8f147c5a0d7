r"""Concentration inequalities and their inversions, rounded outwards in float64.

Every function with ``upper`` in its name returns a number that is never below the exact real value: the searches
keep the end of their bracket at which the defining inequality was verified with its rounding error counted against
it. (The midpoint of a bisection is below the exact inverse about half the time, and then the certificate is void.)

Sources: Hoeffding (1963), Theorem 1; Clopper and Pearson (1934); Langford (2005), "Tutorial on practical prediction
theory for classification", section 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from bayesdl.bounds._numbers import (
    EPS,
    Array,
    Values,
    arrays,
    like,
    require,
    require_count,
    require_delta,
    require_probability,
    up,
)

# Each product below is off by at most ten half-units of rounding (differences, quotient, log1p, factor); 8 eps is
# 16 of them. The absolute part covers products that underflow.
_SLACK = 8 * EPS
_UNDERFLOW = 1e-320


def _kl_parts(q: Array, p: Array) -> tuple[Array, Array]:
    """Two non-negative numbers whose difference is kl(q || p), each accurate to a few units of rounding.

    Both logarithms are taken as log1p of a non-negative number, which is well conditioned for all q and p.
    """
    gap = np.abs(p - q)
    above = p >= q
    with np.errstate(all="ignore"):
        far = _weighted_log1p(np.where(above, 1 - q, q), gap, np.where(above, 1 - p, p))
        weight = np.where(above, q, 1 - q)
        near = _weighted_log1p(weight, gap, weight)
    return far, near


def _weighted_log1p(weight: Array, gap: Array, base: Array) -> Array:
    """``weight * log(1 + gap / base)`` with 0 log(anything) = 0; the quotient may overflow."""
    ratio = gap / base
    log = np.where(np.isfinite(ratio) | (base == 0), np.log1p(ratio), np.log(gap) - np.log(base))
    return np.asarray(np.where((weight == 0) | (gap == 0), 0.0, weight * log))


def binary_kl(q: Values, p: Values) -> Values:
    r"""Kullback-Leibler divergence between two Bernoulli distributions.

    .. math:: kl(q \| p) = q \log(q / p) + (1 - q) \log((1 - q) / (1 - p)), \qquad 0 \log 0 = 0

    Args:
        q: Probability (an observed risk) in [0, 1].
        p: Probability (a true risk) in [0, 1]; the two broadcast.

    Returns:
        The divergence in nats, infinite where p is 0 or 1 and q is not.

    Raises:
        CertificateError: When an argument is NaN or outside [0, 1].
    """
    q_, p_ = arrays(q=q, p=p)
    require_probability("q", q_)
    require_probability("p", p_)
    far, near = _kl_parts(q_, p_)
    return like(np.maximum(far - near, 0.0), q, p)


def _verified(q: Array, p: Array, bound: Array) -> NDArray[np.bool_]:
    """Whether kl(q || p) >= bound holds for sure, rounding errors counted against it."""
    far, near = _kl_parts(q, p)
    return np.asarray(far * (1 - _SLACK) - near * (1 + _SLACK) - _UNDERFLOW >= bound)


def _search(q: Array, bound: Array, end: float) -> Array:
    """The float64 number nearest to q, on the side of ``end``, at which kl(q || p) >= bound is verified.

    Non-negative floats are ordered as their bit patterns are, so halving the integers between two patterns reaches
    neighbouring floats in at most 62 steps, whatever the magnitudes.
    """
    inner = np.abs(q).view(np.int64).copy()  # abs: -0.0 has the pattern of a negative integer
    outer = np.full(q.shape, end).view(np.int64).copy()
    while np.any(np.abs(outer - inner) > 1):
        middle = (inner + outer) >> 1
        holds = _verified(q, middle.view(np.float64), bound)
        outer, inner = np.where(holds, middle, outer), np.where(holds, inner, middle)
    return np.asarray(outer.view(np.float64))


def _kl_inverse(q: Values, bound: Values, end: float) -> Values:
    q_, bound_ = arrays(q=q, bound=bound)
    require_probability("q", q_)
    require(bound_ >= 0, "bound", "non-negative", bound_)
    flat = np.ascontiguousarray(q_).reshape(-1)
    limit = np.ascontiguousarray(bound_).reshape(-1)
    result = np.where(limit == 0, flat, np.where(flat == end, end, _search(flat, limit, end)))
    return like(result.reshape(q_.shape), q, bound)


def kl_inverse_upper(q: Values, bound: Values) -> Values:
    r"""Largest risk that a kl bound allows, never below the exact value and tight to about 1e-14 relative.

    .. math:: kl^{-1}(q, b) = \sup \{ p \in [q, 1] : kl(q \| p) \le b \}

    Args:
        q: Observed risk in [0, 1].
        bound: Right-hand side b >= 0 of the inequality, in nats; may be infinite.

    Returns:
        p: the smallest float64 number at which kl(q || p) >= b is verified; 1 for an infinite bound, q for b = 0.

    Raises:
        CertificateError: When an argument is NaN, q is outside [0, 1] or the bound is negative.

    Cost: at most 62 vectorised evaluations of kl.
    """
    return _kl_inverse(q, bound, 1.0)


def kl_inverse_lower(q: Values, bound: Values) -> Values:
    r"""Smallest risk that a kl bound allows, never above the exact value: inf { p in [0, q] : kl(q || p) <= bound }.

    Args:
        q: Observed risk in [0, 1].
        bound: Right-hand side of the inequality, in nats; non-negative, may be infinite.

    Returns:
        p in [0, q]; 0 for an infinite bound, q for a bound of 0.

    Raises:
        CertificateError: When an argument is NaN, q is outside [0, 1] or the bound is negative.
    """
    return _kl_inverse(q, bound, 0.0)


def hoeffding(*, risk: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the mean of n independent losses in [0, 1] whose average is ``risk`` (Hoeffding, 1963).

    .. math:: R \le \hat R + \sqrt{\log(1 / \delta) / (2 n)} \quad \text{with probability at least } 1 - \delta

    It holds for a predictor that is fixed before the n rows are seen; for one that was chosen with them it does not.

    Args:
        risk: Average loss in [0, 1].
        n: Number of independent losses, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    risk_, n_, delta_ = _checked(risk=risk, n=n, delta=delta)
    return like(np.minimum(up(risk_ + up(np.sqrt(-np.log(delta_) / (2 * n_)), 16 * EPS)), 1.0), risk, n, delta)


def chernoff_upper(*, risk: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the mean of n independent losses in [0, 1]: one-sided Chernoff bound in its kl form.

    .. math:: R \le kl^{-1}(\hat R, \log(1 / \delta) / n) \quad \text{with probability at least } 1 - \delta

    Never looser than ``hoeffding``. The deviation is one-sided, so log(1/delta) suffices, not log(2/delta).
    Source: Hoeffding (1963), Theorem 1, eq. 2.1.

    Args:
        risk: Average loss in [0, 1].
        n: Number of independent losses, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    risk_, n_, delta_ = _checked(risk=risk, n=n, delta=delta)
    return like(np.asarray(kl_inverse_upper(risk_, up(-np.log(delta_) / n_))), risk, n, delta)


def clopper_pearson_upper(*, errors: Values, n: Values, delta: Values) -> Values:
    r"""Exact binomial upper bound on an error probability (Clopper and Pearson, 1934; Langford, 2005, Theorem 3.3).

    .. math:: \bar p = \sup \{ p : P(\mathrm{Bin}(n, p) \le k) \ge \delta \}, \qquad
        P(p > \bar p) \le \delta

    Args:
        errors: Number k of errors among n independent trials, 0 <= k <= n.
        n: Number of trials, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, rounded up: the binomial tail at it is verified to be below delta by more than the tail's own
        rounding error (1e-10 relative, tested against high precision up to n = 1e6). 1 when every trial is an error.

    Raises:
        CertificateError: When an argument is NaN or outside its domain, or there are more errors than trials.
    """
    errors_, n_, delta_ = arrays(errors=errors, n=n, delta=delta)
    require_count("n", n_, 1)
    require_count("errors", errors_, 0)
    require(errors_ <= n_, "errors", "at most n", errors_)
    require_delta(delta_)
    open_ = errors_ < n_
    a, b = errors_ + 1, np.where(open_, n_ - errors_, 1.0)
    target = delta_ * (1 - 1e-10)
    p = np.asarray(np.where(open_, special.betainccinv(a, b, target), 1.0))
    step = 4 * EPS
    while np.any(wrong := open_ & (p < 1) & ~(special.betaincc(a, b, p) <= target)):
        p = np.where(wrong, np.minimum(up(p, step), 1.0), p)
        step *= 2
    return like(p, errors, n, delta)


def _checked(*, risk: Values, n: Values, delta: Values) -> list[Array]:
    checked = arrays(risk=risk, n=n, delta=delta)
    require_probability("risk", checked[0])
    require_count("n", checked[1], 1)
    require_delta(checked[2])
    return checked
