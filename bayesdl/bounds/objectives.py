r"""What is minimised in training for a bound: upper bounds on the risk as functions of empirical risk and KL.

With r the empirical risk, k the divergence in nats, n rows and ``c = log(2 sqrt(n) / delta)`` (Perez-Ortiz et al.,
2021, "Tighter risk certificates for neural networks", section 5):

- "kl": ``kl^{-1}(r, (k + c) / n)``, the PAC-Bayes-kl bound itself, differentiated implicitly;
- "quadratic": ``(sqrt(r + (k + c) / 2n) + sqrt((k + c) / 2n))^2`` (Rivasplata et al., 2019);
- "lambda": ``r / (1 - l/2) + (k + c) / (n l (1 - l/2))`` at its best l in (0, 2) (Thiemann et al., 2017);
- "classic": ``r + sqrt((k + c) / 2n)`` (McAllester's);
- "elbo": ``r + k / n``, the variational bound: no bound on the risk, for comparison.

All of these but the last are relaxations of the first. A step of training needs their slopes alone.
"""

from __future__ import annotations

import math
from typing import Literal

from bayesdl.bounds.concentration import kl_inverse_upper

Objective = Literal["kl", "quadratic", "lambda", "classic", "elbo"]

SMALLEST = 1e-6
"""Of the risk and its distance from 1, where slopes are taken: beyond, that by the risk has no limit."""


def value(objective: Objective, risk: float, kl: float, n: int, delta: float) -> float:
    """The bound."""
    risk, cost = _clipped(risk), _complexity(kl, n, delta)
    if objective == "kl":
        return float(kl_inverse_upper(risk, cost))
    if objective == "quadratic":
        return (math.sqrt(risk + cost / 2) + math.sqrt(cost / 2)) ** 2
    if objective == "lambda":
        at = _best_lambda(risk, cost)
        return risk / (1 - at / 2) + cost / (at * (1 - at / 2))
    return risk + math.sqrt(cost / 2) if objective == "classic" else risk + kl / n


def slopes(objective: Objective, risk: float, kl: float, n: int, delta: float) -> tuple[float, float]:
    """The bound's derivatives by the risk and by the divergence; both are positive.

    Args:
        objective: see the module.
        risk: of the rows, in [0, 1]; taken a little inside.
        kl: in nats.
        n: rows of the bound.
        delta: the bound's failure probability.
    """
    risk, cost = _clipped(risk), _complexity(kl, n, delta)
    if objective == "kl":
        p = min(float(kl_inverse_upper(risk, cost)), 1 - SMALLEST * (1 - risk))
        # kl(r || p) = cost: dp = (dcost - d kl/d r dr) / (d kl/d p).
        by_p = (1 - risk) / (1 - p) - risk / p
        by_risk = math.log(risk / p) - math.log((1 - risk) / (1 - p))
        return -by_risk / by_p, 1 / (n * by_p)
    if objective == "quadratic":
        root, tail = math.sqrt(risk + cost / 2), math.sqrt(cost / 2)
        return (root + tail) / root, (root + tail) * (1 / root + 1 / tail) / (2 * n)
    if objective == "lambda":  # at its optimum l has no slope of its own
        at = _best_lambda(risk, cost)
        return 1 / (1 - at / 2), 1 / (n * at * (1 - at / 2))
    return (1.0, 1 / (4 * n * math.sqrt(cost / 2))) if objective == "classic" else (1.0, 1 / n)


def _best_lambda(risk: float, cost: float) -> float:
    """Thiemann et al. (2017), equation 5."""
    return 2 / (math.sqrt(1 + 2 * risk / cost) + 1)


def _complexity(kl: float, n: int, delta: float) -> float:
    return (kl + math.log(2 * math.sqrt(n) / delta)) / n


def _clipped(risk: float) -> float:
    return min(max(risk, SMALLEST), 1 - SMALLEST)
