"""Probabilities of unions and intersections of events, however the events depend on each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from bayesdl.bounds._numbers import Values, arrays, require, require_probability


def union_bound(probabilities: Values) -> float:
    r"""Upper bound on the probability that any of the events occurs (Boole's inequality).

    .. math:: P(\cup_i A_i) \le \sum_i P(A_i)

    Read backwards it says how to split delta: k bounds that fail with probability delta / k each, or with shares that
    add up to delta, hold together with probability at least 1 - delta.

    Args:
        probabilities: One for each event, in [0, 1].

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When a probability is NaN or outside [0, 1].
    """
    (p,) = arrays(probabilities=probabilities)
    require_probability("probabilities", p)
    return min(1.0, _sum(p.flat, math.inf))


def intersection_lower(failures: Values) -> float:
    r"""Lower bound on the probability that all events occur: :math:`P(\cap_i A_i) \ge 1 - \sum_i P(A_i^c)`.

    Args:
        failures: The probability of each event's complement, in [0, 1].

    Returns:
        The bound, at least 0, rounded down.

    Raises:
        CertificateError: When a probability is NaN or outside [0, 1].
    """
    (p,) = arrays(failures=failures)
    require_probability("failures", p)
    return max(0.0, _sum([1.0, *(-p).flat], -math.inf))


def bonferroni(sums: Values) -> list[float]:
    r"""Partial sums of inclusion and exclusion, which bound the probability of a union from both sides.

    .. math:: B_k = \sum_{j=1}^k (-1)^{j-1} S_j, \qquad
        S_j = \sum_{i_1 < \dots < i_j} P(A_{i_1} \cap \dots \cap A_{i_j})

    For odd k it is an upper bound, for even k a lower one. They do not become better with k: for 12 identical sure
    events they are 12, -54, 166, -329, 463, ... around the truth 1, which the last one, with all 12 sums, attains. The
    smallest of the odd and the largest of the even ones are the bounds to use. Source: Bonferroni (1936).

    Args:
        sums: ``[k]`` numbers S_1, S_2, ..., non-negative; :math:`S_j = E \binom{N}{j}` for the number N of events that
            occur.

    Returns:
        B_1, ..., B_k; the odd ones rounded up, the even ones down.

    Raises:
        CertificateError: When a sum is NaN, negative or infinite.
    """
    (s,) = arrays(sums=sums)
    require(np.isfinite(s) & (s >= 0), "sums", "non-negative and finite", s)
    signed = [float(value) if j % 2 == 0 else -float(value) for j, value in enumerate(np.ravel(s))]
    return [_sum(signed[: j + 1], math.inf if j % 2 == 0 else -math.inf) for j in range(len(signed))]


def _sum(terms: Iterable[float], direction: float) -> float:
    """The exact sum, rounded towards ``direction``."""
    total = sum(map(Fraction, terms), Fraction(0))
    nearest = float(total)
    wrong = Fraction(nearest) < total if direction > 0 else Fraction(nearest) > total
    return math.nextafter(nearest, direction) if wrong else nearest
