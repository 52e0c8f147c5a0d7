r"""Duals of any elementwise function, by quadrature in polar coordinates.

With u = t1 r cos(a) and v = t2 r cos(a - theta), where t is a standard deviation and cos(theta) the correlation,

    E[f(u) f(v)] = 1/(2 pi) int_0^inf r exp(-r^2/2) int_0^{2 pi} f(t1 r cos a) f(t2 r cos(a - theta)) da dr.

The angles at which u or v changes sign cut the circle into four arcs, and each is integrated by Gauss-Legendre nodes,
as is the radius. So a kink or jump of f at zero (elu, softshrink's neighbours, step-like functions) costs no accuracy,
correlation +-1 is no special case, and the nodes crowd where a steep f turns: Gauss-Hermite nodes miss the poles of
tanh(t z) near the real axis as soon as t is large. The result is a smooth function of (t1, t2, theta) also where it is
not smooth in the correlation, so that it can be interpolated in these by polynomials.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.dual import Dual
from bayesdl.infinite.piecewise import angle

TOLERANCE = 1e-7  # two orders must agree to this, relative to the largest value where that exceeds 1
RADIUS = 9.0  # the normal density beyond it is 3e-18
ORDERS = (24, 36, 54, 80, 120, 180, 270)
CELLS = 2**20  # function values held at once
DIRECT = 4096  # up to so many pairs are integrated one by one; more go through a table
DEGREES = (8, 12, 18, 27, 40, 60, 90)
FLAT = 1e-6  # angles below it have no derivative of their own

Function = Callable[[Tensor], Tensor]


@lru_cache
def _legendre(order: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.as_tensor((nodes + 1) / 2), torch.as_tensor(weights / 2)


def _arcs(theta: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Return angles ``[4, ..., order]`` of the nodes on the arcs between the zeros of u and v, and the arcs' widths."""
    half = torch.full_like(theta, math.pi / 2)
    start = torch.stack([theta - half, half, theta + half, 3 * half])
    width = torch.stack([math.pi - theta, theta, math.pi - theta, theta])
    return start.unsqueeze(-1) + width.unsqueeze(-1) * nodes, width


def _radii(order: int) -> tuple[Tensor, Tensor]:
    """Return nodes of the radius, and their weights with the density."""
    nodes, weights = _legendre(order)
    r = RADIUS * nodes
    return r, RADIUS * weights * r * torch.exp(-0.5 * r.square()) / (2 * math.pi)


def _polar(f: Function, t1: Tensor, t2: Tensor, theta: Tensor, order: int) -> Tensor:
    """The expectation at ``[n]`` triples with ``order`` nodes along the radius and each arc."""
    nodes, weights = _legendre(order)
    r, mass = _radii(order)
    total = torch.zeros_like(theta)
    for a, width in zip(*_arcs(theta, nodes), strict=True):
        u = f((t1.unsqueeze(-1) * a.cos()).unsqueeze(-1) * r)
        v = f((t2.unsqueeze(-1) * (a - theta.unsqueeze(-1)).cos()).unsqueeze(-1) * r)
        total = total + width * ((u * v) @ mass @ weights)
    return total


def _grid(f: Function, t: Tensor, theta: Tensor, order: int) -> Tensor:
    """The expectation on a grid, ``[A, A, K]``: the function is evaluated A times, not A^2 times, at every node."""
    nodes, weights = _legendre(order)
    r, mass = _radii(order)
    values = []
    for angles, width, one in zip(*(part.unbind(1) for part in _arcs(theta, nodes)), theta, strict=True):
        weight = (width.view(4, 1, 1) * weights.view(1, -1, 1) * mass).reshape(-1)
        u, v = (f(t.unsqueeze(-1) * (c.unsqueeze(-1) * r).reshape(-1)) for c in (angles.cos(), (angles - one).cos()))
        values.append((u * weight) @ v.T)
    return torch.stack(values, -1)


def _rows(order: int) -> int:
    return max(1, CELLS // order**2)


def integrate(f: Function, t1: Tensor, t2: Tensor, theta: Tensor, order: int) -> Tensor:
    """Return E[f(u) f(v)] at ``[n]`` standard deviations and angles, in blocks of bounded memory."""
    size = _rows(order)
    blocks = zip(t1.split(size), t2.split(size), theta.split(size), strict=True)
    return torch.cat([_polar(f, *block, order) for block in blocks])


def _scale(value: Tensor) -> float:
    return max(1.0, float(value.abs().max()))


def agreed_order(f: Function, high: float) -> int:
    """Return the order at which two orders agree to ``TOLERANCE``, for standard deviations up to ``high``.

    Raises:
        ModelError: f is not finite somewhere.

    Warns:
        UserWarning: they do not agree at the highest order, as for kinks away from zero; the reached accuracy is said.
    """
    theta = torch.tensor([0.0, 0.1, 0.7, math.pi / 2, 2.2, 3.0, math.pi], dtype=torch.float64).repeat(4)
    scale = torch.tensor([[1.0, 1.0], [1.0, 0.3], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64) * high
    t1, t2 = scale.repeat_interleave(7, 0).unbind(-1)
    last = integrate(f, t1, t2, theta, ORDERS[0])
    error = math.inf
    for order in ORDERS[1:]:
        value = integrate(f, t1, t2, theta, order)
        if not bool(value.isfinite().all()):
            raise ModelError(
                "The activation is not finite at inputs that a wide network gives it with positive probability, so it "
                "has no infinite-width limit. Choose one that is defined on the whole line."
            )
        error = float((value - last).abs().max()) / _scale(value)
        if error <= TOLERANCE:
            return order
        last = value
    warnings.warn(f"The quadrature of this activation agrees only to {error:.1e} between its two highest orders; "
                  "kinks and jumps away from zero converge slowly.", stacklevel=2)  # fmt: skip
    return ORDERS[-1]


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
        scale = _scale(exact)
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
        values = _grid(f, t, theta, order)
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


def derivative(f: Function) -> Function:
    """Return f', by automatic differentiation."""

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            value = f(leaf)
            if not value.requires_grad:
                return torch.zeros_like(x)
            (found,) = torch.autograd.grad(value.sum(), leaf, create_graph=x.requires_grad)
        return found

    return slope


class Expectation:
    """E[f(u) f(v)] for tensors of variances and covariances, with derivatives.

    Args:
        f: elementwise.
        slope: E[f'(u) f'(v)], which is the derivative by q12; without it that is read off the angle, and is zero at
            correlation +-1, where it may be infinite.
    """

    def __init__(self, f: Function, slope: Expectation | None = None) -> None:
        self.f, self.slope = f, slope
        self._orders: dict[int, int] = {}
        self._table: Table | None = None

    def __call__(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation, broadcast shape."""
        result: Tensor = _Evaluate.apply(self, *torch.broadcast_tensors(q1, q2, q12))
        return result

    def order(self, high: float) -> int:
        """The order that serves standard deviations up to the next power of two."""
        power = max(-3, math.ceil(math.log2(max(high, 1e-9))))
        if power not in self._orders:
            self._orders[power] = agreed_order(self.f, 2.0**power)
        return self._orders[power]

    def table(self, low: float, high: float) -> Table:
        """The table for standard deviations from ``low`` to ``high``, made anew, and wider, if they exceed it."""
        if self._table is None or low < self._table.low or high > self._table.high:
            if self._table is not None:
                low, high = min(low, self._table.low), max(high, self._table.high)
            self._table = Table(self.f, low, high, self.order(high))
        return self._table


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, expectation: Expectation, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad)
        t1, t2 = (q.double().clamp(min=0).sqrt() for q in (q1, q2))
        theta = angle(q1.double(), q2.double(), q12.double())[2]
        if not theta.numel():
            return torch.zeros_like(q12)
        low, high = float(min(t1.min(), t2.min())), float(max(t1.max(), t2.max()))
        many = theta.numel() > DIRECT
        table = expectation.table(low, high) if many else None
        if table is not None and not needed and theta.dim() == 2 and q1.stride(1) == q2.stride(0) == 0:
            return table.pairs(t1[:, 0], t2[0], theta).to(q12.dtype)
        order = expectation.order(high)
        at = table.entries if table is not None else partial(integrate, expectation.f, order=order)
        size = 2**12 if many else _rows(order)
        t1, t2, theta = (part.reshape(-1) for part in (t1, t2, theta))
        parts: list[Tensor] = []
        slopes: list[Tensor] = []
        for block in zip(t1.split(size), t2.split(size), theta.split(size), strict=True):
            if not needed:
                parts.append(at(*block))
                continue
            with torch.enable_grad():
                leaves = [part.detach().requires_grad_() for part in block]
                value = at(*leaves)
                grads = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
            parts.append(value.detach())
            slopes.append(torch.stack(grads).detach())
        ctx.expectation = expectation
        if needed:
            ctx.save_for_backward(q1, q2, q12, t1, t2, theta, torch.cat(slopes, -1))
        return torch.cat(parts).view(q12.shape).to(q12.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q1, q2, q12, t1, t2, theta, slopes = ctx.saved_tensors
        by_t1, by_t2, by_theta = slopes
        sine = theta.sin()
        both = (t1 > 0) & (t2 > 0)
        product = torch.where(both, t1 * t2, 1)
        if ctx.expectation.slope is None:
            turned = torch.where(sine > FLAT, -by_theta / torch.where(sine > FLAT, sine, 1), 0)
            inner = torch.where(both, turned / product, 0)
        else:
            with torch.no_grad():
                inner = ctx.expectation.slope(q1, q2, q12).double().reshape(-1)
        cosine = theta.cos()
        # The covariance follows the variances at a given correlation; that part belongs to q12.
        by_q1, by_q2 = (
            torch.where(t > 1e-9, (by - cosine * other * inner) / (2 * torch.where(t > 1e-9, t, 1)), 0)
            for t, other, by in ((t1, t2, by_t1), (t2, t1, by_t2))
        )
        found = (part.view(grad.shape).to(grad.dtype) * grad for part in (by_q1, by_q2, inner))
        return (None, *found)


class Quadrature(Dual):
    """The dual of any elementwise function that is smooth but at zero.

    Args:
        phi: maps a tensor to a tensor of its shape, one entry at a time, by differentiable operations.

    Raises:
        ModelError: phi changes the shape, or mixes entries, or jumps.
    """

    def __init__(self, phi: Function) -> None:
        x = torch.linspace(-3, 3, 13, dtype=torch.float64)
        with torch.no_grad():
            whole = phi(x)
            alone = torch.cat([phi(x[i : i + 1]) for i in range(len(x))]) if whole.shape == x.shape else None
        if alone is None or not torch.allclose(whole, alone, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise ModelError("The activation is not elementwise: it mixes entries or changes the shape of its input.")
        self._slope = Expectation(derivative(phi))
        self._value = Expectation(phi, self._slope)
        self._checked = False

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi."""
        return self._value(q1, q2, q12)

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi' phi'.

        Raises:
            ModelError: it is not the derivative of ``covariance``: phi jumps somewhere, and its NTK does not exist.
        """
        if not self._checked:
            self._check()
        return self._slope(q1, q2, q12)

    def _check(self) -> None:
        """Compare the slope with differences of the covariance (Price's theorem), which jumps of phi break."""
        one = torch.ones(1, dtype=torch.float64)
        with torch.no_grad():
            ends = [float(self._value(one, one, one * (0.4 + step))) for step in (-1e-3, 1e-3)]
            slope = float(self._slope(one, one, one * 0.4))
        if abs((ends[1] - ends[0]) / 2e-3 - slope) > 1e-3 * max(1.0, abs(slope)):
            raise ModelError("The activation jumps, so gradient descent on a wide network has no limiting kernel.")
        self._checked = True
