r"""What the kernel recursions need of an activation phi.

The covariance of (u, v) is ``[[q1, q12], [q12, q2]]``. The three arguments of every function are tensors that
broadcast against each other; all operations are elementwise, so any leading batch shape works. Rounding may make
``q12**2`` exceed ``q1 * q2`` a little; the functions treat that as correlation one, and neither value nor gradient is
ever NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Dual(ABC):
    """Expectations under a zero-mean bivariate normal (u, v) with variances q1, q2 and covariance q12."""

    @abstractmethod
    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """E[phi(u) phi(v)], broadcast shape."""

    @abstractmethod
    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """E[phi'(u) phi'(v)], broadcast shape: the derivative of ``covariance`` by q12 (Price, 1958)."""

    def variance(self, q: Tensor) -> Tensor:
        """E[phi(u)^2] for a variance q: ``covariance(q, q, q)``, exact to the last digit."""
        return self.covariance(q, q, q)

    def both(self, q1: Tensor, q2: Tensor, q12: Tensor) -> tuple[Tensor, Tensor]:
        """``covariance`` and ``slope`` in one pass."""
        return self.covariance(q1, q2, q12), self.slope(q1, q2, q12)
