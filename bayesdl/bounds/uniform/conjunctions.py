"""Learning a monotone conjunction by elimination: the first example of a class that is learnable in Valiant's sense."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayesdl.bounds._numbers import EPS, Array, Values, arrays, like, require, require_count, require_delta, up
from bayesdl.errors import CertificateError


@dataclass(frozen=True)
class MonotoneConjunction:
    """The classifier that says 1 where all its variables are 1.

    Args:
        variables: ``[d]`` bool, which variables it asks for.
    """

    variables: NDArray[np.bool_]

    def __call__(self, x: Values) -> NDArray[np.bool_]:
        """Labels ``[N]`` of Boolean rows ``[N, d]``."""
        return np.asarray((_boolean("x", x) | ~self.variables).all(-1))

    @classmethod
    def learn(cls, x: Values, y: Values) -> MonotoneConjunction:
        """Begin with all variables and drop each that is 0 in some positive row.

        The result has every variable of the true conjunction, so it never says 1 where that says 0 (no false
        positives, on any row), and it is right on all rows it has seen.

        Args:
            x: Boolean rows ``[N, d]``.
            y: Labels ``[N]`` of a monotone conjunction.

        Raises:
            CertificateError: When a number is neither 0 nor 1, or no monotone conjunction gives these labels.
        """
        rows, labels = _boolean("x", x), _boolean("y", y)
        if rows.ndim != 2 or labels.shape != rows.shape[:1]:
            raise CertificateError(f"x must be [N, d] and y [N], got {rows.shape} and {labels.shape}")
        learnt = cls(np.asarray(rows[labels].all(0)))
        if (learnt(rows.astype(np.float64)) != labels).any():
            raise CertificateError("no monotone conjunction gives these labels: a negative row has all its variables")
        return learnt


def conjunction_sample_size(*, d: Values, epsilon: Values, delta: Values) -> Values:
    r"""Rows that suffice for elimination to have a risk of at most epsilon with probability 1 - delta.

    .. math:: n = \Big\lceil \frac d\epsilon \log \frac d\delta \Big\rceil

    A variable that is wrongly kept, and that a positive row would drop with probability epsilon / d or more, survives
    n rows with probability at most :math:`(1 - \epsilon / d)^n \le \delta / d`. Assumptions: independent rows from any
    distribution, labels by a monotone conjunction. Source: Valiant (1984); the constants are those of this argument.
    ``consistent_sample_size(log_size=d * log(2))`` is smaller for large d.

    Args:
        d: Number of Boolean variables, at least 1.
        epsilon: Risk, in (0, 1].
        delta: Failure probability in (0, 1).

    Returns:
        A whole number as float64; never below the exact ceiling.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.

    Example:
        >>> conjunction_sample_size(d=8, epsilon=0.1, delta=0.1)
        351.0
    """
    d_, epsilon_, delta_ = arrays(d=d, epsilon=epsilon, delta=delta)
    require_count("d", d_, 1)
    require((epsilon_ > 0) & (epsilon_ <= 1), "epsilon", "in (0, 1]", epsilon_)
    require_delta(delta_)
    return like(np.ceil(up(d_ / epsilon_ * np.log(d_ / delta_), 8 * EPS)), d, epsilon, delta)


def _boolean(name: str, value: Values) -> NDArray[np.bool_]:
    numbers: Array
    (numbers,) = arrays(**{name: value})
    require((numbers == 0) | (numbers == 1), name, "0 or 1", numbers)
    return np.asarray(numbers == 1)
