r"""PAC-Bayes bounds as plain functions of numbers.

Setting: a prior P over predictors that is fixed before the n rows of the bound are seen, rows that are independent
draws from one distribution, a loss with values in [0, 1]. With probability at least 1 - delta over the rows, the
bounds hold for all posteriors Q at once, whatever Q was fitted on. They bound the Gibbs risk
:math:`R(Q) = E_{h \sim Q} E[\ell(h, x, y)]` (the risk of a predictor drawn anew from Q for every prediction) by the
average loss :math:`\hat R(Q)` on the n rows and :math:`KL(Q \| P)`.
"""

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
from bayesdl.bounds.concentration import kl_inverse_upper


def _complexity(risk: Values, kl: Values, n: Values, delta: Values) -> tuple[Array, Array]:
    """The risk and ``(kl + log(2 sqrt(n) / delta)) / n``, rounded up."""
    risk_, kl_, n_, delta_ = arrays(risk=risk, kl=kl, n=n, delta=delta)
    require_probability("risk", risk_)
    require(kl_ >= 0, "kl", "non-negative", kl_)
    require_count("n", n_, 1)
    require_delta(delta_)
    return risk_, up((kl_ + up(np.log(2 * np.sqrt(n_) / delta_), 8 * EPS)) / n_)


def pac_bayes_kl(*, risk: Values, kl: Values, n: Values, delta: Values) -> Values:
    r"""PAC-Bayes-kl bound with Maurer's constant.

    .. math:: kl(\hat R(Q) \| R(Q)) \le \frac{KL(Q \| P) + \log(2 \sqrt n / \delta)}{n}
        \quad \text{for all } Q \text{, with probability at least } 1 - \delta

    Assumptions: n independent and identically distributed rows, a loss in [0, 1], a prior fixed before these rows.
    The constant is the bound :math:`E e^{n\,kl(\hat p \| p)} \le 2 \sqrt n`; Maurer proves it for n >= 8, and the
    smaller n follow by evaluating the expectation, which does not depend on p.
    Source: Seeger (2002), Theorem 1; Maurer (2004), "A note on the PAC Bayesian theorem", Theorem 5.

    Args:
        risk: Average loss of Q on the rows of the bound, or an upper bound on it, in [0, 1].
        kl: KL(Q || P) in nats or an upper bound on it, non-negative; may be infinite (the bound is then 1).
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).

    Returns:
        Upper bound on R(Q), inverted and rounded upwards.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.

    Example:
        >>> round(float(pac_bayes_kl(risk=0.03, kl=5000.0, n=60_000, delta=0.05)), 3)
        0.154
    """
    risk_, bound = _complexity(risk, kl, n, delta)
    return like(np.asarray(kl_inverse_upper(risk_, bound)), risk, kl, n, delta)


def mcallester(*, risk: Values, kl: Values, n: Values, delta: Values) -> Values:
    r"""McAllester's bound with Maurer's constant: the PAC-Bayes-kl bound relaxed by Pinsker's inequality.

    .. math:: R(Q) \le \hat R(Q) + \sqrt{\frac{KL(Q \| P) + \log(2 \sqrt n / \delta)}{2 n}}
        \quad \text{for all } Q \text{, with probability at least } 1 - \delta

    It holds on the same event as ``pac_bayes_kl`` and is never tighter; it is here for comparison with published
    numbers. Assumptions as there. Source: McAllester (1999); Maurer (2004).

    Args:
        risk: Average loss of Q on the rows of the bound, or an upper bound on it, in [0, 1].
        kl: KL(Q || P) in nats or an upper bound on it, non-negative; may be infinite (the bound is then 1).
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).

    Returns:
        Upper bound on R(Q), at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.

    Example:
        >>> round(float(mcallester(risk=0.03, kl=5000.0, n=60_000, delta=0.05)), 3)
        0.234
    """
    risk_, bound = _complexity(risk, kl, n, delta)
    return like(np.minimum(up(risk_ + up(np.sqrt(bound / 2))), 1.0), risk, kl, n, delta)


def kl_divergence_gaussian(mean: Values, sd: Values, prior_mean: Values, prior_sd: Values) -> float:
    r"""KL divergence between two Gaussians with diagonal covariance, rounded up.

    .. math:: KL = \sum_d \frac12 \left[ \frac{(m_d - m^0_d)^2}{(s^0_d)^2} + \frac{s_d^2}{(s^0_d)^2} - 1
        - \log \frac{s_d^2}{(s^0_d)^2} \right]

    Args:
        mean: Means ``[D]`` of the posterior.
        sd: Standard deviations ``[D]`` of the posterior, positive.
        prior_mean: Means ``[D]`` of the prior; broadcasts.
        prior_sd: Standard deviations ``[D]`` of the prior, positive; broadcasts.

    Returns:
        The divergence in nats, summed over all coordinates; never below the exact value and at most about 1e-14
        relative above the sum of its terms' magnitudes.

    Raises:
        CertificateError: When an argument is NaN, a mean is infinite, or a standard deviation is not positive and
            finite.
    """
    m, s, m0, s0 = arrays(mean=mean, sd=sd, prior_mean=prior_mean, prior_sd=prior_sd)
    for name, value in (("mean", m), ("prior_mean", m0)):
        require(np.isfinite(value), name, "finite", value)
    for name, value in (("sd", s), ("prior_sd", s0)):
        require(np.isfinite(value) & (value > 0), name, "positive and finite", value)
    with np.errstate(over="ignore", divide="ignore", under="ignore", invalid="ignore"):
        shift = ((m - m0) / s0) ** 2
        # r^2 - 1 and log r^2 cancel where the posterior keeps the prior's width r = 1: take both from r - 1 there.
        widening = (s - s0) / s0
        excess = widening * ((s + s0) / s0)
        log = 2 * np.where(np.abs(widening) < 0.5, np.log1p(widening), np.log(s / s0))
        total = float(np.sum(shift + excess - log))
        magnitude = float(np.sum(shift + np.abs(excess) + np.abs(log)))
    if not np.isfinite(total):
        return float("inf")
    rounding = (32 + np.log2(m.size + 2)) * EPS * magnitude
    return float(up(np.asarray(max(total + rounding, 0.0) / 2))) if magnitude else 0.0
