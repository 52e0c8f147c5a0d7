r"""Duals in closed form of smooth activations.

All are functions of ``s - q12`` and ``s + q12`` with ``s^2 = (h + q1)(h + q2)``; because ``|q12| <= sqrt(q1 q2)``, both
are at least h, so that nothing here has a singular derivative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesdl.infinite.dual import Dual


def _root(q: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    return torch.where(q > 0, torch.where(q > 0, q, 1).sqrt(), 0)


def _rest(q1: Tensor, q2: Tensor, q12: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """Return the roots of ``s - q12`` and of ``s + q12``."""
    s = (h + q1).sqrt() * (h + q2).sqrt()
    return (s - q12).clamp(min=h).sqrt(), (s + q12).clamp(min=h).sqrt()


class Erf(Dual):
    r"""The dual of ``phi(x) = a erf(b x) + c``; erf itself is (1, 1, 0).

    With ``s^2 = (h + q1)(h + q2)``, ``h = 1 / (2 b^2)`` and ``r = q12 / s``, which is always below 1:
    ``E[phi phi] = a^2 (2/pi) arcsin(r) + c^2``, evaluated as ``arctan2(r, sqrt(1 - r^2))``, and
    ``E[phi' phi'] = a^2 (2/pi) / (s sqrt(1 - r^2))``.

    Source: Williams (1997), Computing with infinite networks, eq. 11.
    """

    def __init__(self, a: float = 1.0, b: float = 1.0, c: float = 0.0) -> None:
        self.a, self.b, self.c = a, b, c

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi."""
        return self.both(q1, q2, q12)[0]

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi' phi'."""
        return self.both(q1, q2, q12)[1]

    def variance(self, q: Tensor) -> Tensor:
        """The expectation of phi^2, without the cancellation in ``s - q``."""
        q = self.b**2 * q
        return torch.atan2(2 * q, (1 + 4 * q).sqrt()) * (2 / math.pi * self.a**2) + self.c**2

    def both(self, q1: Tensor, q2: Tensor, q12: Tensor) -> tuple[Tensor, Tensor]:
        """Both expectations."""
        h, scale = 0.5 / self.b**2, 2 / math.pi * self.a**2
        s = (h + q1).sqrt() * (h + q2).sqrt()
        r = q12 / s
        steepness = torch.rsub(r * r, 1).clamp(min=torch.finfo(r.dtype).eps).rsqrt()
        value = torch.atan2(r, steepness.reciprocal()) * scale
        return value + self.c**2 if self.c else value, steepness * (scale / s)


class Wave(Dual):
    r"""The dual of ``phi(x) = a sin(b x + c)``.

    ``E[phi phi] = a^2/2 (exp(-b^2 (q1 + q2 - 2 q12) / 2) - cos(2 c) exp(-b^2 (q1 + q2 + 2 q12) / 2))``, and with a
    plus sign, times b^2, E[phi' phi']. With a = sqrt(2), b = sqrt(2), c = pi/4 it is ``exp(-(q1 + q2 - 2 q12))``, the
    Gaussian kernel (Rahimi and Recht, 2007).
    """

    def __init__(self, a: float = 1.0, b: float = 1.0, c: float = 0.0) -> None:
        self.half, self.b2, self.twice = a**2 / 2, b**2, 0.0 if c == math.pi / 4 else math.cos(2 * c)

    def _waves(self, q1: Tensor, q2: Tensor, q12: Tensor) -> tuple[Tensor, Tensor]:
        total = (q1 + q2) * (self.b2 / 2)
        difference = (total - self.b2 * q12).clamp(min=0)
        return torch.exp(-difference), torch.exp(-(total + self.b2 * q12).clamp(min=0)) * self.twice

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi."""
        near, far = self._waves(q1, q2, q12)
        return self.half * (near - far)

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi' phi'."""
        near, far = self._waves(q1, q2, q12)
        return self.half * self.b2 * (near + far)


class Gaussian(Dual):
    r"""The dual of ``exp(-x^2)``: ``1 / sqrt(D)`` with D = (1 + 2 q1)(1 + 2 q2) - 4 q12^2; slope ``4 q12 / D^1.5``."""

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi."""
        low, high = _rest(q1, q2, q12, 0.5)
        return 0.5 / (low * high)

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi' phi'."""
        low, high = _rest(q1, q2, q12, 0.5)
        return 0.5 * (q12 / (low * high)) / (low.square() * high.square())


class Gelu(Dual):
    r"""The dual of ``phi(x) = x Phi(x)``, Phi the normal distribution function, by Gaussian integration by parts.

    With ``P = 1/4 + arcsin(q12 / s) / (2 pi)`` = E[Phi Phi], ``N = 1 / (2 pi sqrt(s^2 - q12^2))`` = E[Phi' Phi'],
    ``s^2 = (1 + q1)(1 + q2)`` and ``R = 1/(1 + q1) + 1/(1 + q2)``:
    ``E[phi phi] = q12 P + N (q1 q2 - q12^2 + q12^2 R)`` and
    ``E[phi' phi'] = P + N q12 (R + 1 / (s^2 - q12^2))``.
    """

    def _parts(self, q1: Tensor, q2: Tensor, q12: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = _rest(q1, q2, q12, 1.0)
        p = 0.25 + torch.atan2(q12, low * high) / (2 * math.pi)
        return low, high, p, q12 / (1 + q1) + q12 / (1 + q2)

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi."""
        low, high, p, share = self._parts(q1, q2, q12)
        product = _root(q1) * _root(q2)
        spread = ((product - q12).clamp(min=0) / low) * ((product + q12).clamp(min=0) / high)
        return q12 * p + (spread + share * (q12 / (low * high))) / (2 * math.pi)

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi' phi'."""
        low, high, p, share = self._parts(q1, q2, q12)
        return p + (share + q12 / low.square() / high.square()) / (low * high) / (2 * math.pi)


class Monomial(Dual):
    r"""The dual of ``phi(x) = x^n``: the sum over the number j of pairings of u with v.

    ``E[u^n v^n] = sum_j C(n, j)^2 j! ((n - j - 1)!!)^2 (q1 q2)^((n - j)/2) q12^j``, j of n's parity (Isserlis);
    the slope is n^2 times the same with n - 1.
    """

    def __init__(self, n: int) -> None:
        self.n = int(n)

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi."""
        return _moment(self.n, q1, q2, q12)

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi' phi'."""
        return self.n**2 * _moment(self.n - 1, q1, q2, q12) if self.n else torch.zeros_like(q1 + q2 + q12)


def _moment(n: int, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
    """E[u^n v^n]."""
    total = torch.zeros_like(q1 + q2 + q12)
    for j in range(n % 2, n + 1, 2):
        pairs = (n - j) // 2
        alone = math.factorial(2 * pairs) // (2**pairs * math.factorial(pairs))
        total = total + math.comb(n, j) ** 2 * math.factorial(j) * alone**2 * (q1 * q2) ** pairs * q12**j
    return total
