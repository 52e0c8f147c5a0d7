"""The PAC-Bayes bound in terms of the variance of the losses (Tolstikhin and Seldin, 2013)."""

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

RATIO = 1.15  # of neighbours in the two grids, c_1 = c_2, as in the paper
_E2 = float(np.e) - 2


def pac_bayes_bernstein(
    *, risk: Values, variance: Values | None = None, kl: Values, n: Values, delta: Values
) -> Values:
    r"""PAC-Bayes empirical Bernstein bound: small where the losses of each predictor vary little over the rows.

    .. math:: R(Q) \le \hat R(Q) + \min\left( (1 + c) \sqrt{\frac{(e - 2) \bar V K_1}{n}},\
        (e - 2) \bar V + \frac{K_1}{n} \right), \qquad
        \bar V = \min\left( \frac14,\ V_n + (1 + c) \sqrt{\frac{V_n K_2}{2 (n - 1)}} + \frac{2 c K_2}{n - 1} \right)

    with :math:`K_i = KL(Q \| P) + \log(2 \nu_i / \delta)`, c = 1.15, and :math:`V_n` the average over h from Q of the
    sample variance (divisor n - 1) of the losses of h; where :math:`K_1 > (e - 2) \bar V n` only the second of the
    two holds (the paper gives it as :math:`2 K_1 / n` there, which is larger). The grids of the two unions have

    .. math:: \nu_1 = \left\lceil \frac{1}{\log c} \log \sqrt{\frac{(e - 2) n}{4 \log(2 / \delta)}} \right\rceil + 1,
        \qquad \nu_2 = \left\lceil \frac{1}{\log c} \log\left( \frac12 \sqrt{\frac{n - 1}{\log(2 / \delta)} + 1}
        + \frac12 \right) \right\rceil

    values (at least 1). Half of delta goes to the variance, half to the risk.

    Assumptions: n independent and identically distributed rows, a loss in [0, 1], a prior fixed before these rows. For
    0-1 losses it gains nothing over ``pac_bayes_kl``, which knows their variance already.
    Source: Tolstikhin and Seldin (2013), Theorems 2 to 4; the variance cannot exceed 1/4.

    Args:
        risk: Average loss of Q on the rows of the bound, or an upper bound on it, in [0, 1].
        variance: V_n, or an upper bound on it; if None the largest that the risk allows, n / (n - 1) r (1 - r) with r
            = min(risk, 1/2), which is exact for a 0-1 loss and a Q of one predictor.
        kl: KL(Q || P) in nats or an upper bound on it, non-negative; may be infinite (the bound is then 1).
        n: Number of rows of the bound, at least 2.
        delta: Failure probability in (0, 1).

    Returns:
        Upper bound on R(Q), at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    risk_, kl_, n_, delta_ = arrays(risk=risk, kl=kl, n=n, delta=delta)
    require_probability("risk", risk_)
    require(kl_ >= 0, "kl", "non-negative", kl_)
    require_count("n", n_, 2)
    require_delta(delta_)
    r = np.minimum(risk_, 0.5)
    given = up(r * (1 - r) * n_ / (n_ - 1), 8 * EPS) * (r > 0) if variance is None else variance
    risk_, kl_, n_, delta_, v = arrays(risk=risk_, kl=kl_, n=n_, delta=delta_, variance=given)
    require((v >= 0) & (v <= 0.5), "variance", "in [0, 1/2]", v)
    half = np.log(2 / delta_)
    nu1 = _count(np.sqrt(_E2 * n_ / (4 * half))) + 1
    nu2 = _count(0.5 * np.sqrt((n_ - 1) / half + 1) + 0.5)
    k1, k2 = (up(kl_ + up(np.log(2 * np.maximum(nu, 1) / delta_), 8 * EPS)) for nu in (nu1, nu2))
    k2_ = np.where(np.isinf(k2), np.finfo(np.float64).max, k2)  # infinity times a variance of 0 would be NaN
    with np.errstate(over="ignore"):
        spread = up((1 + RATIO) * np.sqrt(v * (k2_ / (2 * (n_ - 1)))), 16 * EPS)
        v_upper = np.minimum(up(v + up(spread + up(2 * RATIO * (k2_ / (n_ - 1)), 8 * EPS))), 0.25)
    slow = up((1 + RATIO) * np.sqrt(_E2 * v_upper * k1 / n_), 16 * EPS)
    fast = k1 > _E2 * v_upper * n_ * (1 - 16 * EPS)  # at the border the second is the smaller of the two anyway
    last = up(up(_E2 * v_upper) + up(k1 / n_), 8 * EPS)  # the largest parameter of the grid
    excess = np.where(fast, last, np.minimum(slow, last))
    return like(np.minimum(up(risk_ + excess), 1.0), risk, kl, n, delta, *(() if variance is None else (variance,)))


def _count(reach: Array) -> Array:
    """How many steps of the ratio reach so far, rounded up in a way that rounding errors cannot make too few."""
    return np.asarray(np.ceil(np.log(reach) / np.log(RATIO) * (1 + 8 * EPS)))
