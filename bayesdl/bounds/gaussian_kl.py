"""The divergence between two Gaussians with independent coordinates, as a plain function, rounded up."""

from __future__ import annotations

import numpy as np

from bayesdl.bounds._numbers import EPS, Values, arrays, require, up


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
