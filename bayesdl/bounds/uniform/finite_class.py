r"""Classes with finitely many members, or with a weight for each: the union bound over Hoeffding's or Chernoff's.

The size enters as a natural logarithm, ``log_size``: classes of 2^1000 members are common, 1000 log 2 = 693.1.
Deviations and excess risks are not cut at 1; from 1 on they say nothing (they are vacuous).
"""

from __future__ import annotations

import numpy as np

from bayesdl.bounds._numbers import EPS, Array, Values, arrays, like, require, require_count, require_delta, up
from bayesdl.bounds.concentration import kl_inverse_upper
from bayesdl.bounds.concentration.tails import checked


def _log_pairs(log_size: Array, delta: Array) -> Array:
    """log(2 size / delta), checked."""
    require(np.isfinite(log_size) & (log_size >= 0), "log_size", "non-negative and finite", log_size)
    require_delta(delta)
    return np.asarray(log_size + np.log(2 / delta))


def finite_class_deviation(*, log_size: Values, n: Values, delta: Values) -> Values:
    r"""How far the average loss of any member is from its mean, at most, for all members at once.

    .. math:: \max_{f \in F} |\hat R(f) - R(f)| \le \sqrt{\frac{\log(2 |F| / \delta)}{2 n}}
        \quad \text{with probability at least } 1 - \delta

    Halving it takes four times the rows. With one member (``log_size=0``) it is Hoeffding's inequality on both sides.
    Assumptions: n independent and identically distributed rows, a loss in [0, 1], a class fixed before them.
    Source: Mohri, Rostamizadeh and Talwalkar (2018), Theorem 2.13.

    Args:
        log_size: Natural logarithm of the number of members, non-negative.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The deviation, rounded up; not cut at 1.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    log_size_, n_, delta_ = arrays(log_size=log_size, n=n, delta=delta)
    require_count("n", n_, 1)
    return like(up(np.sqrt(_log_pairs(log_size_, delta_) / (2 * n_)), 8 * EPS), log_size, n, delta)


def finite_class_excess_risk(*, log_size: Values, n: Values, delta: Values) -> Values:
    r"""How much worse than the best member the one with the least average loss is, at most.

    .. math:: R(\hat f) - \min_{f \in F} R(f) \le 2 \sqrt{\frac{\log(2 |F| / \delta)}{2 n}}
        \quad \text{with probability at least } 1 - \delta

    Both steps of the proof happen on the event of ``finite_class_deviation``, so delta is paid once: the textbook form
    with log(4 |F| / delta) is this one at delta / 2. The excess is an addition to the risk, no percentage of it.
    Assumptions and source as there (Mohri et al., 2018, section 2.4).

    Args:
        log_size: Natural logarithm of the number of members, non-negative.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The excess risk, rounded up; not cut at 1.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.

    Example:
        >>> round(finite_class_excess_risk(log_size=1000 * np.log(2), n=1000, delta=0.001), 3)
        1.184
    """
    return like(2 * np.asarray(finite_class_deviation(log_size=log_size, n=n, delta=delta)), log_size, n, delta)


def finite_class_sample_size(*, log_size: Values, epsilon: Values, delta: Values) -> Values:
    r"""Rows that suffice for all average losses of a finite class to be within epsilon of their means.

    .. math:: n = \Big\lceil \frac{\log(2 |F| / \delta)}{2 \epsilon^2} \Big\rceil

    Args:
        log_size: Natural logarithm of the number of members, non-negative.
        epsilon: Deviation, positive.
        delta: Failure probability in (0, 1).

    Returns:
        A whole number as float64; never below the exact ceiling.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    log_size_, epsilon_, delta_ = arrays(log_size=log_size, epsilon=epsilon, delta=delta)
    require((epsilon_ > 0) & np.isfinite(epsilon_), "epsilon", "positive and finite", epsilon_)
    n = up(_log_pairs(log_size_, delta_) / (2 * np.square(epsilon_)), 8 * EPS)
    return like(np.ceil(n), log_size, epsilon, delta)


def consistent_sample_size(*, log_size: Values, epsilon: Values, delta: Values) -> Values:
    r"""Rows that suffice for every member without an error on them to have a risk of at most epsilon.

    .. math:: n = \Big\lceil \frac{\log |F| + \log(1 / \delta)}{\epsilon} \Big\rceil

    The rate is 1 / epsilon, not 1 / epsilon^2, because a member with no error is required to exist (realizable case).
    Source: Blumer, Ehrenfeucht, Haussler and Warmuth (1987), "Occam's razor", Theorem 1.

    Args:
        log_size: Natural logarithm of the number of members, non-negative.
        epsilon: Risk, in (0, 1].
        delta: Failure probability in (0, 1).

    Returns:
        A whole number as float64; never below the exact ceiling.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    log_size_, epsilon_, delta_ = arrays(log_size=log_size, epsilon=epsilon, delta=delta)
    require((epsilon_ > 0) & (epsilon_ <= 1), "epsilon", "in (0, 1]", epsilon_)
    log = _log_pairs(log_size_, delta_) - np.log(2)
    return like(np.ceil(up(log / epsilon_, 16 * EPS)), log_size, epsilon, delta)


def occam(*, risk: Values, description: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the risk of any member of a countable class with weights: a short description costs little.

    .. math:: kl(\hat R(f) \| R(f)) \le \frac{\log(1 / w_f) + \log(1 / \delta)}{n} \quad \text{for all } f
        \text{, with probability at least } 1 - \delta

    The weights :math:`w_f` add up to at most 1 and are fixed before the rows; a prefix-free code of b bits has
    :math:`\log(1 / w_f) = b \log 2`. A finite class with equal weights has log(1 / w) = log_size. It is Chernoff's
    bound with the share :math:`w_f \delta` of delta for each member.
    Source: Langford (2005), "Tutorial on practical prediction theory for classification", Theorem 4.1 (kl form).

    Args:
        risk: Average loss of the member, in [0, 1].
        description: log(1 / w_f) in nats, non-negative.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    _, description_ = arrays(risk=risk, description=description)
    require(description_ >= 0, "description", "non-negative", description_)
    risk_, n_, delta_ = checked(risk=risk, n=n, delta=delta)
    bound = up((description_ - np.log(delta_)) / n_, 8 * EPS)
    return like(np.asarray(kl_inverse_upper(risk_, bound)), risk, description, n, delta)
