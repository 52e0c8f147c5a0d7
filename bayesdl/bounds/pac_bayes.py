r"""PAC-Bayes bounds as plain functions of numbers.

Setting: a prior P over predictors that is fixed before the n rows of the bound are seen, rows that are independent
draws from one distribution, a loss with values in [0, 1]. With probability at least 1 - delta over the rows, the
bounds hold for all posteriors Q at once, whatever Q was fitted on. They bound the Gibbs risk
:math:`R(Q) = E_{h \sim Q} E[\ell(h, x, y)]` (the risk of a predictor drawn anew from Q for every prediction) by the
average loss :math:`\hat R(Q)` on the n rows and :math:`KL(Q \| P)`.

All four here rest on one event, the PAC-Bayes-kl inequality, so they hold together at one delta. The other three are
its relaxations: never tighter, but with a form that can be trained through or compared with published numbers.
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


def complexity(risk: Values, kl: Values, n: Values, delta: Values) -> tuple[Array, Array]:
    """The risk and ``(kl + log(2 sqrt(n) / delta)) / n``, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
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
    risk_, bound = complexity(risk, kl, n, delta)
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
    risk_, bound = complexity(risk, kl, n, delta)
    return like(np.minimum(up(risk_ + up(np.sqrt(bound / 2))), 1.0), risk, kl, n, delta)


def quadratic(*, risk: Values, kl: Values, n: Values, delta: Values) -> Values:
    r"""Quadratic bound: the PAC-Bayes-kl bound relaxed by the refined Pinsker inequality.

    .. math:: R(Q) \le \left( \sqrt{\hat R(Q) + B} + \sqrt{B} \right)^2, \qquad
        B = \frac{KL(Q \| P) + \log(2 \sqrt n / \delta)}{2 n}
        \quad \text{for all } Q \text{, with probability at least } 1 - \delta

    It uses :math:`kl(q \| p) \ge (p - q)^2 / (2 p)` for q <= p, which is sharper than Pinsker's inequality for p below
    1/4. Same event and assumptions as ``pac_bayes_kl``.
    Source: Rivasplata et al. (2019), "PAC-Bayes with backprop"; Perez-Ortiz et al. (2021), eq. 7.

    Args:
        risk: Average loss of Q on the rows of the bound, or an upper bound on it, in [0, 1].
        kl: KL(Q || P) in nats or an upper bound on it, non-negative; may be infinite (the bound is then 1).
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).

    Returns:
        Upper bound on R(Q), at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    risk_, bound = complexity(risk, kl, n, delta)
    half = bound / 2
    root = up(up(np.sqrt(up(risk_ + half))) + up(np.sqrt(half)))
    return like(np.minimum(up(root * root), 1.0), risk, kl, n, delta)


def thiemann(*, risk: Values, kl: Values, n: Values, delta: Values, trade_off: Values | None = None) -> Values:
    r"""Thiemann's bound, linear in risk and KL for a trade-off lambda.

    .. math:: R(Q) \le \frac{\hat R(Q)}{1 - \lambda / 2}
        + \frac{KL(Q \| P) + \log(2 \sqrt n / \delta)}{\lambda (1 - \lambda / 2) n}
        \quad \text{for all } Q \text{ and all } \lambda \in (0, 2) \text{ at once}

    Alternating steps in Q and lambda minimise it: for fixed lambda it is linear in Q, and the best lambda is
    :math:`2 / (1 + \sqrt{1 + 2 n \hat R / (KL + \log(2 \sqrt n / \delta))})`, where it equals ``quadratic``. Same event
    and assumptions as ``pac_bayes_kl``. Source: Thiemann et al. (2017), Theorem 3.

    Args:
        risk: Average loss of Q on the rows of the bound, or an upper bound on it, in [0, 1].
        kl: KL(Q || P) in nats or an upper bound on it, non-negative; may be infinite (the bound is then 1).
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).
        trade_off: lambda in (0, 2), which may depend on everything else; the best one if None.

    Returns:
        Upper bound on R(Q), at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    if trade_off is None:
        return quadratic(risk=risk, kl=kl, n=n, delta=delta)
    risk_, bound = complexity(risk, kl, n, delta)
    risk_, bound, lam = arrays(risk=risk_, bound=bound, trade_off=trade_off)
    require((lam > 0) & (lam < 2), "trade_off", "strictly between 0 and 2", lam)
    value = up(up(risk_ + up(bound / lam)) / (1 - lam / 2), 8 * EPS)
    return like(np.minimum(value, 1.0), risk, kl, n, delta, trade_off)
