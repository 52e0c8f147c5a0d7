r"""Vapnik-Chervonenkis bounds: the class counts by the labellings it can give to the rows, not by its members.

The growth function :math:`\Pi(m)` is the largest number of ways in which a class labels m points, and the VC dimension
V = max { m : Pi(m) = 2^m }. Sauer's lemma bounds the growth by V alone. Deviations are not cut at 1; from 1 on they say
nothing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import special

from bayesdl.bounds._numbers import EPS, Array, Values, arrays, like, require, require_count, require_delta, up

Growth = Literal["sum", "power"]

TERMS = 2**20
"""Largest VC dimension for which the binomials of Sauer's sum are added up."""


def log_growth(m: Values, *, dimension: Values, form: Growth = "sum") -> Values:
    r"""Natural logarithm of Sauer's bound on the number of labellings of m points (Sauer, 1972; Shelah, 1972).

    .. math:: \Pi(m) \le \sum_{i=0}^{V} \binom mi \le \Big(\frac{e m}{V}\Big)^V

    The sum is 2^m for m <= V. The power holds for m >= V >= 1 only and would be below 2^m (even below 1) otherwise;
    2^m is returned there.

    Args:
        m: Number of points, at least 1.
        dimension: VC dimension V, a whole number.
        form: "sum", or the looser "power" of the textbooks.

    Returns:
        log Pi(m) in nats, rounded up; for "sum" by V + 16 units of float64 rounding, relative.

    Raises:
        CertificateError: When an argument is NaN or no whole number.
        ValueError: For another form.

    Cost: "sum" adds V + 1 terms, at most 2^20 of them; for a larger V and m > V it is the power.
    """
    if form not in ("sum", "power"):
        raise ValueError(f"form must be 'sum' or 'power', got {form!r}")
    m_, v = arrays(m=m, dimension=dimension)
    require_count("m", m_, 1)
    require_count("dimension", v, 0)
    every = m_ * np.log(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.where(v == 0, 0.0, v * (np.log(m_ / v) + 1))
    rounding = np.full(m_.shape, 16 * EPS)
    if form == "sum":
        summed = (v < m_) & (v <= TERMS)
        log = np.where(summed, np.vectorize(_log_sum, otypes=[float])(m_, np.where(summed, v, 0)), log)
        rounding = (16 + np.where(summed, v, 0)) * EPS
    return like(up(np.where(m_ <= v, every, np.minimum(log, every)), rounding), m, dimension)


def _log_sum(m: float, v: float) -> float:
    """Log of the sum of the binomials of m over 0, ..., v, by the logs of their ratios."""
    i = np.arange(1.0, v + 1)
    return float(special.logsumexp(np.concatenate([[0.0], np.cumsum(np.log((m - i + 1) / i))])))


def vc_deviation(*, dimension: Values, n: Values, delta: Values) -> Values:
    r"""How far the average 0-1 loss of any member of a class is from its mean, for all members at once.

    .. math:: \sup_{f \in F} |\hat R(f) - R(f)| \le \sqrt{\frac{8}{n} \Big(\log \Pi(2 n) + \log \frac4\delta\Big)}
        \quad \text{with probability at least } 1 - \delta

    with Sauer's sum for the growth function. Valid for every n. Assumptions: n independent and identically distributed
    rows, a 0-1 loss. Source: Vapnik and Chervonenkis (1971), Theorem 2.

    Args:
        dimension: VC dimension of the class, a whole number.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The deviation, rounded up; not cut at 1.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    complexity = _per_row(dimension, n, delta, "sum")
    return like(up(np.sqrt(8 * complexity), 8 * EPS), dimension, n, delta)


def vapnik_deviation(*, dimension: Values, n: Values, delta: Values, growth: Growth = "sum") -> Values:
    r"""Vapnik's refinement, with nearly 1 instead of 8 and a small addition.

    .. math:: \sup_{f \in F} |\hat R(f) - R(f)| \le
        \sqrt{\frac{n + 1}{n} \cdot \frac{\log \Pi(2 n) + \log(4 / \delta)}{n}} + \frac1n
        \quad \text{with probability at least } 1 - \delta

    A second sample of n rows takes the place of the true risk (the median of a binomial lies within 1 of its mean:
    2 and 1 / n), and for each of the :math:`\Pi(2 n)` labellings Serfling's inequality for sampling without
    replacement bounds the difference of the two halves (2 and (n + 1) / n).

    Textbooks leave out the last two terms and have twice the root as the excess risk of the member that fits best,
    :math:`2 \sqrt{(V (\log(2n / V) + 1) + \log(4 / \delta)) / n}`. That expression needs 2 n >= V (below, the radicand
    becomes negative); here 2^(2n) takes the place of the power, and the value exceeds 1, as it should.
    Assumptions as for ``vc_deviation``. Source: Vapnik (1998), "Statistical Learning Theory", chapter 4; Serfling
    (1974), "Probability inequalities for the sum in sampling without replacement", Corollary 1.1.

    Args:
        dimension: VC dimension of the class, a whole number.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).
        growth: "sum" or "power", the form of Sauer's bound.

    Returns:
        The deviation, rounded up; not cut at 1.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    complexity = _per_row(dimension, n, delta, growth)
    (n_,) = arrays(n=n)
    return like(up(np.sqrt((n_ + 1) / n_ * complexity) + 1 / n_, 16 * EPS), dimension, n, delta)


def _per_row(dimension: Values, n: Values, delta: Values, growth: Growth) -> Array:
    """(log growth at 2 n + log(4 / delta)) / n."""
    dimension_, n_, delta_ = arrays(dimension=dimension, n=n, delta=delta)
    require_count("n", n_, 1)
    require_delta(delta_)
    return np.asarray((log_growth(2 * n_, dimension=dimension_, form=growth) + np.log(4 / delta_)) / n_)


def vc_tail(*, epsilon: Values, dimension: Values, n: Values, growth: Growth = "sum") -> Values:
    r"""Probability that the average 0-1 loss of some member of a class is off by more than epsilon.

    .. math:: P\Big(\sup_{f \in F} |\hat R(f) - R(f)| > \epsilon\Big) \le 8\, \Pi(n)\, e^{-n \epsilon^2 / 32}

    The growth function is taken at n instead of 2 n, at the price of a worse exponent. Source: Devroye, Gyorfi and
    Lugosi (1996), "A Probabilistic Theory of Pattern Recognition", Theorem 12.5.

    Args:
        epsilon: Deviation, non-negative.
        dimension: VC dimension of the class, a whole number.
        n: Number of rows, at least 1.
        growth: "sum" or "power", the form of Sauer's bound.

    Returns:
        The right-hand side, rounded up; not cut at 1.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    epsilon_, dimension_, n_ = arrays(epsilon=epsilon, dimension=dimension, n=n)
    require(epsilon_ >= 0, "epsilon", "non-negative", epsilon_)
    log = np.log(8) + np.asarray(log_growth(n_, dimension=dimension_, form=growth))
    exponent = n_ * np.square(epsilon_) / 32
    with np.errstate(over="ignore"):
        # exp magnifies the error of its argument, which is relative to both parts.
        return like(up(np.exp(log - exponent), 8 * EPS * (1 + log + exponent)), epsilon, dimension, n)


def vc_sample_size(*, epsilon: float, dimension: int, delta: float, growth: Growth = "sum") -> int:
    r"""Smallest number n of rows from which on ``vc_tail`` stays at most delta.

    It suffices for all average losses of the class to be within epsilon of their means; that many are not necessary.

    Args:
        epsilon: Deviation, in (0, 1].
        dimension: VC dimension of the class.
        delta: Failure probability in (0, 1).
        growth: "sum" or "power", the form of Sauer's bound.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.

    Example:
        >>> vc_sample_size(epsilon=0.1, dimension=3, delta=0.05, growth="power")
        128204
    """
    epsilon_, delta_ = arrays(epsilon=epsilon, delta=delta)
    require((epsilon_ > 0) & (epsilon_ <= 1), "epsilon", "in (0, 1]", epsilon_)
    require_delta(delta_)
    # The log of the tail is concave in n and starts above log delta, so it crosses once.
    low, high = 0, 1
    while vc_tail(epsilon=epsilon, dimension=dimension, n=high, growth=growth) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = vc_tail(epsilon=epsilon, dimension=dimension, n=middle, growth=growth) <= delta
        low, high = (low, middle) if enough else (middle, high)
    return high


def vc_rule_of_thumb(*, dimension: Values, n: Values, delta: Values) -> Values:
    r"""The textbook's coarse excess risk :math:`2 \sqrt{(2 V - \log \delta) / n}`: a rule of thumb, not a bound.

    It is smaller than the refined form as soon as n > e V / 2 and follows from no theorem; it shows orders of
    magnitude. For V = 1e8 and n = 50,000 (a convolutional network on CIFAR-10) it gives 126.5.

    Args:
        dimension: VC dimension of the class, a whole number.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    dimension_, n_, delta_ = arrays(dimension=dimension, n=n, delta=delta)
    require_count("dimension", dimension_, 0)
    require_count("n", n_, 1)
    require_delta(delta_)
    return like(2 * np.sqrt((2 * dimension_ - np.log(delta_)) / n_), dimension, n, delta)
