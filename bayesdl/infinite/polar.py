r"""Expectations of two correlated normal variables, by quadrature in polar coordinates.

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
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ModelError

TOLERANCE = 1e-7  # two orders must agree to this, relative to the largest value where that exceeds 1
RADIUS = 9.0  # the normal density beyond it is 3e-18
ORDERS = (24, 36, 54, 80, 120, 180, 270)
CELLS = 2**20  # function values held at once

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


def grid(f: Function, t: Tensor, theta: Tensor, order: int) -> Tensor:
    """The expectation on a grid, ``[A, A, K]``: the function is evaluated A times, not A^2 times, at every node."""
    nodes, weights = _legendre(order)
    r, mass = _radii(order)
    values = []
    for angles, width, one in zip(*(part.unbind(1) for part in _arcs(theta, nodes)), theta, strict=True):
        weight = (width.view(4, 1, 1) * weights.view(1, -1, 1) * mass).reshape(-1)
        u, v = (f(t.unsqueeze(-1) * (c.unsqueeze(-1) * r).reshape(-1)) for c in (angles.cos(), (angles - one).cos()))
        values.append((u * weight) @ v.T)
    return torch.stack(values, -1)


def rows(order: int) -> int:
    """How many triples are integrated at once."""
    return max(1, CELLS // order**2)


def integrate(f: Function, t1: Tensor, t2: Tensor, theta: Tensor, order: int) -> Tensor:
    """Return E[f(u) f(v)] at ``[n]`` standard deviations and angles, in blocks of bounded memory."""
    size = rows(order)
    blocks = zip(t1.split(size), t2.split(size), theta.split(size), strict=True)
    return torch.cat([_polar(f, *block, order) for block in blocks])


def scale_of(value: Tensor) -> float:
    """What errors are relative to."""
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
        error = float((value - last).abs().max()) / scale_of(value)
        if error <= TOLERANCE:
            return order
        last = value
    warnings.warn(f"The quadrature of this activation agrees only to {error:.1e} between its two highest orders; "
                  "kinks and jumps away from zero converge slowly.", stacklevel=2)  # fmt: skip
    return ORDERS[-1]
