"""Bounds that use the variance of the losses: tighter than Hoeffding's where the losses vary little."""

from __future__ import annotations

import numpy as np

from bayesdl.bounds._numbers import EPS, Values, arrays, like, require, up
from bayesdl.bounds.concentration.tails import checked


def bernstein(*, risk: Values, variance: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the mean of n independent losses in [0, 1] whose variance is known.

    .. math:: R \le \hat R + \sqrt{\frac{2 \sigma^2 \log(1 / \delta)}{n}} + \frac{\log(1 / \delta)}{3 n}
        \quad \text{with probability at least } 1 - \delta

    Assumption: the true variance is at most ``variance``. The sample variance is not the true one: for that there is
    ``empirical_bernstein``. Source: Bernstein (1946); Boucheron, Lugosi and Massart (2013), Theorem 2.10.

    Args:
        risk: Average loss in [0, 1].
        variance: Upper bound on the variance of a loss, in [0, 1/4].
        n: Number of independent losses, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    _, variance_ = arrays(risk=risk, variance=variance)
    require((variance_ >= 0) & (variance_ <= 0.25), "variance", "in [0, 1/4]", variance_)
    risk_, n_, delta_ = checked(risk=risk, n=n, delta=delta)
    log = -np.log(delta_) / n_
    slack = up(np.sqrt(2 * variance_ * log) + log / 3, 16 * EPS)
    return like(np.minimum(up(risk_ + slack), 1.0), risk, variance, n, delta)


def empirical_bernstein(*, risk: Values, variance: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the mean of n independent losses in [0, 1] from their average and sample variance.

    .. math:: R \le \hat R + \sqrt{\frac{2 V_n \log(2 / \delta)}{n}} + \frac{7 \log(2 / \delta)}{3 (n - 1)}
        \quad \text{with probability at least } 1 - \delta

    One-sided; log 2/delta pays for the variance. Source: Maurer and Pontil (2009), "Empirical Bernstein bounds and
    sample variance penalization", Theorem 4.

    Args:
        risk: Average loss in [0, 1].
        variance: Sample variance :math:`V_n = \sum_i (\ell_i - \hat R)^2 / (n - 1)`; at most n / (4 (n - 1)).
        n: Number of independent losses, at least 2.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    _, variance_, n_ = arrays(risk=risk, variance=variance, n=n)
    risk_, _, delta_ = checked(risk=risk, n=n, delta=delta, least=2)
    largest = n_ / (4 * (n_ - 1)) * (1 + 64 * EPS)
    require((variance_ >= 0) & (variance_ <= largest), "variance", "in [0, n / (4 (n - 1))]", variance_)
    log = np.log(2 / delta_)
    slack = up(np.sqrt(2 * variance_ * log / n_) + 7 * log / (3 * (n_ - 1)), 16 * EPS)
    return like(np.minimum(up(risk_ + slack), 1.0), risk, variance, n, delta)
