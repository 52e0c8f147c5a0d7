"""Tables of an expectation: Chebyshev polynomials in the angle between two inputs and in their standard deviations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from bayesdl.infinite.polar import TOLERANCE, Function, grid, integrate, scale_of

DEGREES = (8, 12, 18, 27, 40, 60, 90)


def _chebyshev(degree: int) -> tuple[Tensor, Tensor]:
    """Return the Chebyshev points on [-1, 1] and the matrix from values there to coefficients."""
    k = torch.arange(degree + 1, dtype=torch.float64)
    phases = math.pi * (k + 0.5) / (degree + 1)
    matrix = torch.cos(k.unsqueeze(-1) * phases) * (2 / (degree + 1))
    matrix[0] /= 2
    return phases.cos(), matrix


def _basis(x: Tensor, degree: int) -> Tensor:
    """The Chebyshev polynomials ``[..., degree + 1]`` at x in [-1, 1], with derivatives at the ends too."""
    values = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        values.append(2 * x * values[-1] - values[-2])
    return torch.stack(values[: degree + 1], -1)


class Table:
    """Chebyshev interpolation of E[f(u) f(v)] in the angle and, where they vary, the two standard deviations.

    Args:
        f: elementwise.
        low: smallest standard deviation.
        high: largest standard deviation.
        order: of the quadrature.
        wave: a degree in the angle with which to begin.

    Where both variances are constant it is a table in the angle alone, and an entry costs one polynomial.
    """

    def __init__(self, f: Function, low: float, high: float, order: int) -> None:
        constant = high - low <= 1e-12 * high
        if not constant:  # room for the next rows
            low, high = 0.9 * low, 1.1 * high
        self.low, self.high = low * (1 - 1e-12), high * (1 + 1e-12)
        self.middle, self.half = (low + high) / 2, 1.0 if constant else (high - low) / 2
        stream = torch.Generator().manual_seed(0)
        probe = torch.rand(3, 24, generator=stream, dtype=torch.float64)
        t1, t2 = low + (high - low) * probe[:2]
        exact = integrate(f, t1, t2, math.pi * probe[2], order)
        scale = scale_of(exact)
        best = math.inf
        across, wave = 0 if constant else DEGREES[0], DEGREES[0]
        while True:
            self._build(f, across, wave, order)
            error = float((self.entries(t1, t2, math.pi * probe[2]) - exact).abs().max()) / scale
            tail = float(self.coefficients[..., -2:].abs().max()), float(self.coefficients[-2:].abs().max())
            if error <= TOLERANCE / 10:
                return
            if wave >= DEGREES[-1] or across >= DEGREES[-1]:
                best = error
                break
            if constant or tail[0] >= tail[1]:
                wave = DEGREES[DEGREES.index(wave) + 1]
            else:
                across = DEGREES[DEGREES.index(across) + 1]
        warnings.warn(f"The table of this activation's kernel is exact only to {best:.1e}.", stacklevel=2)

    def _build(self, f: Function, across: int, wave: int, order: int) -> None:
        points, to_wave = _chebyshev(wave)
        theta = (points + 1) * (math.pi / 2)
        x, to_across = _chebyshev(across)
        t = self.middle + self.half * x
        values = grid(f, t, theta, order)
        self.coefficients = torch.einsum("ax,by,kz,xyz->abk", to_across, to_across, to_wave, values)
        self.across, self.wave = across, wave

    def entries(self, t1: Tensor, t2: Tensor, theta: Tensor) -> Tensor:
        """The interpolant at ``[n]`` triples; differentiable."""
        waves = theta * (2 / math.pi) - 1
        if not self.across:
            return _clenshaw(reversed(self.coefficients[0, 0].unbind(0)), waves)
        left, right = (_basis((t - self.middle) / self.half, self.across) for t in (t1, t2))
        rows = torch.einsum("na,nb,abk->kn", left, right, self.coefficients)
        return _clenshaw(reversed(rows.unbind(0)), waves)

    def pairs(self, t1: Tensor, t2: Tensor, theta: Tensor) -> Tensor:
        """The interpolant at all pairs of ``t1 [N]`` and ``t2 [M]`` with angles ``[N, M]``: matrix products."""
        left, right = (_basis((t - self.middle) / self.half, self.across) for t in (t1, t2))
        rows = torch.einsum("na,abk->knb", left, self.coefficients)
        return _clenshaw((row @ right.T for row in reversed(rows.unbind(0))), theta * (2 / math.pi) - 1)


def _clenshaw(coefficients: Iterable[Tensor], x: Tensor) -> Tensor:
    """``sum_k c_k T_k(x)`` from the coefficients of highest degree downwards."""
    last, before = torch.zeros_like(x), torch.zeros_like(x)
    for c in coefficients:
        last, before = c + 2 * x * last - before, last
    return last - x * before
