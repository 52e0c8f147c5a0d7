"""Catoni's PAC-Bayes bound, with the union over the grid from which its parameter may be chosen by the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bayesdl.bounds._numbers import (
    EPS,
    Values,
    arrays,
    like,
    require,
    require_count,
    require_delta,
    require_probability,
    up,
)
from bayesdl.errors import CertificateError

GRID = tuple(2.0 ** (step / 2) for step in range(-12, 9))
"""21 values from 1/64 to 16, each sqrt(2) times the one before; the union over them costs log(21) = 3.04 nats."""


def catoni(*, risk: Values, kl: Values, n: Values, delta: Values, grid: Sequence[float] = GRID) -> Values:
    r"""Catoni's bound, the best over a grid of k parameters.

    .. math:: R(Q) \le \min_{C \in \text{grid}}
        \frac{1 - \exp\left( -C \hat R(Q) - (KL(Q \| P) + \log(k / \delta)) / n \right)}{1 - e^{-C}}
        \quad \text{for all } Q \text{, with probability at least } 1 - \delta

    For one C that was stated in advance the theorem holds at delta; C is chosen here by the data, so each of the k
    values gets delta / k. With the infimum over all C > 0 (which no union covers) and no price it would be the kl
    inversion of :math:`(KL + \log(1 / \delta)) / n`: the grid replaces Maurer's :math:`\log(2 \sqrt n)` by log k, which
    pays for n above about 100, where the best C lies near a value of the grid.

    Assumptions: n independent and identically distributed rows, a loss in [0, 1], a prior and a grid fixed before these
    rows. Its event is another than that of ``pac_bayes_kl``.
    Source: Catoni (2007), Theorem 1.2.1; Germain et al. (2009), Corollary 2.2.

    Args:
        risk: Average loss of Q on the rows of the bound, or an upper bound on it, in [0, 1].
        kl: KL(Q || P) in nats or an upper bound on it, non-negative; may be infinite (the bound is then 1).
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).
        grid: Positive parameters, fixed in advance; one value gives the theorem without a union.

    Returns:
        Upper bound on R(Q), at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain, or the grid is empty.
    """
    risk_, kl_, n_, delta_ = arrays(risk=risk, kl=kl, n=n, delta=delta)
    require_probability("risk", risk_)
    require(kl_ >= 0, "kl", "non-negative", kl_)
    require_count("n", n_, 1)
    require_delta(delta_)
    if not len(grid) or not all(0 < c < math.inf for c in grid):
        raise CertificateError(f"grid must hold positive finite parameters, at least one; got {tuple(grid)}.")
    price = up((kl_ + up(np.log(len(grid) / delta_), 8 * EPS)) / n_)
    best = np.ones_like(risk_)
    for c in grid:
        exponent = up(up(c * risk_) + price)
        best = np.minimum(best, up(-np.expm1(-exponent) / -np.expm1(-c), 16 * EPS))
    return like(best, risk, kl, n, delta)
