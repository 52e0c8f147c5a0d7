"""Bounds that use nothing of the losses but their range: Hoeffding, Chernoff in kl form, McDiarmid."""

from __future__ import annotations

import numpy as np

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
from bayesdl.bounds.concentration.kl_inversion import kl_inverse_lower, kl_inverse_upper


def checked(*, risk: Values, n: Values, delta: Values, least: int = 1) -> list[Array]:
    """The three numbers of every bound on a mean, as arrays of one shape and in their domains."""
    risk_, n_, delta_ = arrays(risk=risk, n=n, delta=delta)
    require_probability("risk", risk_)
    require_count("n", n_, least)
    require_delta(delta_)
    return [risk_, n_, delta_]


def hoeffding(*, risk: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the mean of n independent losses in [0, 1] whose average is ``risk`` (Hoeffding, 1963).

    .. math:: R \le \hat R + \sqrt{\log(1 / \delta) / (2 n)} \quad \text{with probability at least } 1 - \delta

    It holds for a predictor that is fixed before the n rows are seen; for one that was chosen with them it does not.
    Source: Hoeffding (1963), Theorem 1, eq. 2.3.

    Args:
        risk: Average loss in [0, 1].
        n: Number of independent losses, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    risk_, n_, delta_ = checked(risk=risk, n=n, delta=delta)
    return like(np.minimum(up(risk_ + up(np.sqrt(-np.log(delta_) / (2 * n_)), 16 * EPS)), 1.0), risk, n, delta)


def hoeffding_tail(*, epsilon: Values, n: Values) -> Values:
    r"""Probability that the average of n independent losses in [0, 1] is off by epsilon or more, on either side.

    .. math:: P(|\hat R - R| \ge \epsilon) \le 2 e^{-2 n \epsilon^2}

    The Gaussian tail :math:`2 e^{-n \epsilon^2 / (2 \sigma^2)}` of the central limit theorem is smaller and wrong: at
    p = 0.01, n = 5, epsilon = 0.583 it says 1e-37 where the probability is 1e-5. The number of rows for a wanted
    epsilon is ``finite_class_sample_size`` with one member. Source: Hoeffding (1963), Theorem 1, eq. 2.3, both sides.

    Args:
        epsilon: Deviation, non-negative.
        n: Number of independent losses, at least 1.

    Returns:
        The probability's bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    epsilon_, n_ = arrays(epsilon=epsilon, n=n)
    require(epsilon_ >= 0, "epsilon", "non-negative", epsilon_)
    require_count("n", n_, 1)
    exponent = 2 * n_ * np.square(epsilon_)
    # exp magnifies the relative error of its argument by the argument.
    return like(np.minimum(up(2 * np.exp(-exponent * (1 - 4 * EPS))), 1.0), epsilon, n)


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
    risk_, n_, delta_ = checked(risk=risk, n=n, delta=delta)
    return like(np.asarray(kl_inverse_upper(risk_, up(-np.log(delta_) / n_))), risk, n, delta)


def chernoff_lower(*, risk: Values, n: Values, delta: Values) -> Values:
    r"""Lower bound on the mean of n independent losses in [0, 1], the mirror image of ``chernoff_upper``.

    .. math:: R \ge \inf \{ p \le \hat R : kl(\hat R \| p) \le \log(1 / \delta) / n \}

    Each side fails with probability at most delta; an interval from both is a statement at 2 delta.
    Source: Hoeffding (1963), Theorem 1, eq. 2.1.

    Args:
        risk: Average loss in [0, 1].
        n: Number of independent losses, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, rounded down.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    risk_, n_, delta_ = checked(risk=risk, n=n, delta=delta)
    return like(np.asarray(kl_inverse_lower(risk_, up(-np.log(delta_) / n_))), risk, n, delta)


def mcdiarmid(*, differences: Values, delta: Values) -> float:
    r"""Deviation of a function of independent variables from its mean, each of which can move it a little only.

    .. math:: f(X) \le E f(X) + \sqrt{\tfrac12 \textstyle\sum_i c_i^2 \log(1 / \delta)}
        \quad \text{with probability at least } 1 - \delta

    Assumption: changing the i-th variable alone changes f by at most :math:`c_i`. With c_i = 1 / n for an average of
    losses this is Hoeffding's inequality. Source: McDiarmid (1989), "On the method of bounded differences".

    Args:
        differences: The numbers c_i, non-negative, one for each variable.
        delta: Failure probability in (0, 1), a single number.

    Returns:
        The deviation (one-sided), rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    (c,), (delta_,) = arrays(differences=differences), arrays(delta=delta)
    require(np.isfinite(c) & (c >= 0), "differences", "non-negative and finite", c)
    require_delta(delta_)
    scale = float(c.max(initial=0.0))
    if scale == 0:
        return 0.0
    squares = np.sum(np.square(c / scale))  # scaled: no square overflows or underflows to nothing that matters
    deviation = scale * np.sqrt(squares * -np.log(delta_) / 2)
    return float(up(deviation, (16 + np.log2(c.size)) * EPS))
