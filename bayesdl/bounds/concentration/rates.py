r"""Cramer's rate functions: how fast the probability of a large deviation of an average falls.

.. math:: I(x) = \sup_s \, (s x - \log E e^{s X}), \qquad P(\bar X_n \ge x) \le e^{-n I(x)} \text{ for } x \ge E X

The second formula is Chernoff's bound, true for every n; Cramer's theorem (1938) says that no larger rate is,
:math:`-\log P(\bar X_n \ge x) / n \to I(x)`, from above and as slowly as log(n) / n. These functions give the number
I(x) to rounding error, not rounded to a side.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from bayesdl.bounds._numbers import Values, arrays, like, require
from bayesdl.bounds.concentration.kl_inversion import binary_kl

STEPS = 64


def bernoulli_rate(x: Values, *, p: Values) -> Values:
    """Rate function of a Bernoulli variable: kl(x || p), infinite outside [0, 1].

    Args:
        x: Value of the average.
        p: Probability of a one, in [0, 1].

    Raises:
        CertificateError: When an argument is NaN or p is outside [0, 1].
    """
    x_, p_ = arrays(x=x, p=p)
    inside = (x_ >= 0) & (x_ <= 1)
    return like(np.where(inside, binary_kl(np.where(inside, x_, 0.0), p_), np.inf), x, p)


def gaussian_rate(x: Values, *, mean: Values = 0.0, sd: Values = 1.0) -> Values:
    """Rate function of a normal variable: (x - mean)^2 / (2 sd^2).

    Args:
        x: Value of the average.
        mean: Mean, finite.
        sd: Standard deviation, positive and finite.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    x_, mean_, sd_ = arrays(x=x, mean=mean, sd=sd)
    require(np.isfinite(mean_), "mean", "finite", mean_)
    require(np.isfinite(sd_) & (sd_ > 0), "sd", "positive and finite", sd_)
    return like(np.square((x_ - mean_) / sd_) / 2, x, mean, sd)


def sample_rate(x: Values, *, samples: Values) -> Values:
    r"""Rate function of the law that puts equal weight on each sample.

    .. math:: \hat I(x) = \sup_s \Big( s x - \log \frac1n \sum_i e^{s X_i} \Big)

    It is exact for resampling from the samples. As an estimate of the rate of the law that they came from it is biased
    and infinite beyond the largest sample: no bound follows from it.

    Args:
        x: Values of the average, any shape.
        samples: ``[n]`` finite samples, at least one.

    Returns:
        The rate at each x: 0 at the samples' mean, the negative log share of the largest (smallest) samples at their
        maximum (minimum), infinite outside.

    Raises:
        CertificateError: When an argument is NaN or a sample is infinite or missing.

    Cost: 64 passes over the samples for each x (a bisection on the slope of a convex function).
    """
    (x_,), (values,) = arrays(x=x), arrays(samples=samples)
    values = values.reshape(-1)
    require(np.asarray(values.size > 0), "the number of samples", "at least 1", np.asarray(values.size))
    require(np.isfinite(values), "samples", "finite", values)
    low, high = values.min(), values.max()
    inside = (x_ > low) & (x_ < high)
    gap = (np.where(inside, x_, values.mean())[..., None] - values) / ((high - low) or 1.0)
    # The supremum over s = sinh(t) of -log mean exp(-s (x - X_i)), a concave function whose slope is a weighted mean.
    left, right = np.full(x_.shape, -700.0), np.full(x_.shape, 700.0)
    for _ in range(STEPS):
        middle = (left + right) / 2
        rises = np.sum(gap * special.softmax(-np.sinh(middle)[..., None] * gap, -1), -1) > 0
        left, right = np.where(rises, middle, left), np.where(rises, right, middle)
    rate = np.log(values.size) - special.logsumexp(-np.sinh((left + right) / 2)[..., None] * gap, -1)
    edge = np.where(x_ == low, -np.log(np.mean(values == low)), -np.log(np.mean(values == high)))
    edge = np.where((x_ == low) | (x_ == high), edge, np.inf)
    return like(np.where(inside, np.maximum(rate, 0.0), edge), x, samples)
