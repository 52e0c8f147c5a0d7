"""Duals of any elementwise function: integrated pair by pair, or, for many pairs, by a table."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.dual import Dual
from bayesdl.infinite.piecewise import angle
from bayesdl.infinite.polar import Function, agreed_order, integrate, rows
from bayesdl.infinite.table import Table

DIRECT = 4096  # up to so many pairs are integrated one by one; more go through a table
FLAT = 1e-6  # angles below it have no derivative of their own


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
        size = 2**12 if many else rows(order)
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
