r"""Duals of functions that are linear, or constant, on either side of zero: the arc-cosine kernels of order 1 and 0.

Everything goes through the angle theta between the two inputs, ``cos(theta) = q12 / sqrt(q1 q2)``. Derivatives are
written by hand: term by term they are infinity minus infinity at correlation one, which is every diagonal entry of a
kernel matrix, and summed by hand the infinite parts cancel or vanish.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesdl.infinite.dual import Dual

SNAP = 8  # units of rounding within which the square of a correlation counts as 1


def angle(q1: Tensor, q2: Tensor, q12: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``sqrt(q1 q2)``, and sine and value of the angle ``arccos(q12 / sqrt(q1 q2))``; pi/2 where that is 0/0.

    The product of roots neither overflows nor underflows where the root of the product would, and the two-argument
    arctangent keeps full precision near correlation +-1, where arccos does not. The angle of two equal rows is the
    square root of a rounding error, 1e-8; squared correlations within ``SNAP`` units of rounding of 1 therefore count
    as 1, so that the angle is exactly 0 or pi there.
    """
    product = q1.sqrt() * q2.sqrt()
    cosine = q12 / product.clamp_min(torch.finfo(q12.dtype).tiny)
    sine = torch.rsub(cosine * cosine, 1)
    sine = torch.threshold_(sine, SNAP * torch.finfo(q12.dtype).eps, 0.0)
    sine = sine.rsqrt_().reciprocal()  # a third faster than the root itself, and 0 at 0 too
    return product, sine, torch.atan2(sine, cosine)


def _over(value: Tensor, by: Tensor) -> Tensor:
    """``value / by``, and 0 where ``by`` is 0."""
    return torch.where(by > 0, value / torch.where(by > 0, by, 1), 0)


class _Bent(torch.autograd.Function):
    """``(sqrt(q1 q2 - q12^2) - theta q12) / (2 pi)``: what a kink of unit size at zero adds to a linear function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        product, sine, theta = angle(q1, q2, q12)
        return (product * sine - q12 * theta) / (2 * math.pi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q1, q2, q12 = ctx.saved_tensors
        product, sine, _ = angle(q1, q2, q12)
        by_variance = grad * (product * sine) / (4 * math.pi)
        # A point of zero variance is the kink of the kernel: like relu's own derivative at 0, it is taken as 0.
        return _over(by_variance, q1), _over(by_variance, q2), -grad * _apply(_Turn, q1, q2, q12)


class _Turn(torch.autograd.Function):
    """``theta / (2 pi)``: what a jump of unit size in the derivative takes from the slope.

    Its derivative is infinite at correlation +-1 and is taken as 0 there: on the diagonal of a kernel matrix, where
    q1 = q2 = q12 move together, that is the derivative along every path.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        return angle(q1, q2, q12)[2] / (2 * math.pi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q1, q2, q12 = ctx.saved_tensors
        product, sine, _ = angle(q1, q2, q12)
        by_covariance = _over(-grad, product * sine) / (2 * math.pi)
        by_variance = -by_covariance * q12 / 2
        return _over(by_variance, q1), _over(by_variance, q2), by_covariance


def _apply(function: type[torch.autograd.Function], q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
    result: Tensor = function.apply(*torch.broadcast_tensors(q1, q2, q12))
    return result


def _taped(*parts: Tensor) -> bool:
    return torch.is_grad_enabled() and any(part.requires_grad for part in parts)


class PiecewiseLinear(Dual):
    r"""The dual of ``phi(x) = below * min(x, 0) + above * max(x, 0)``; relu is (0, 1), abs is (-1, 1).

    ``E[phi phi] = (a^2 + b^2) q12 / 2 + (a - b)^2 (sqrt(q1 q2 - q12^2) - theta q12) / (2 pi)`` and
    ``E[phi' phi'] = (a^2 + b^2) / 2 - (a - b)^2 theta / (2 pi)``.

    Source: Cho and Saul (2009), Kernel methods for deep learning, eq. 1, n = 1 (there without the factor 1/2).
    """

    def __init__(self, below: float, above: float) -> None:
        self.line, self.kink = (below**2 + above**2) / 2, (below - above) ** 2

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi."""
        if _taped(q1, q2, q12):
            return self.line * q12 + self.kink * _apply(_Bent, q1, q2, q12)
        return self.both(q1, q2, q12)[0]

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi' phi'."""
        return self.line - self.kink * _apply(_Turn, q1, q2, q12)

    def variance(self, q: Tensor) -> Tensor:
        """``(a^2 + b^2) q / 2``."""
        return self.line * q

    def both(self, q1: Tensor, q2: Tensor, q12: Tensor) -> tuple[Tensor, Tensor]:
        """Both expectations, with one angle where no derivative is asked for."""
        if _taped(q1, q2, q12):
            return super().both(q1, q2, q12)
        kink = self.kink / (2 * math.pi)
        product, sine, theta = angle(q1, q2, q12)
        slope = theta.mul_(-kink).add_(self.line)
        return (q12 * slope).addcmul_(sine, product, value=kink), slope


class Jump(Dual):
    r"""The dual of ``phi(x) = low (x < 0), high (x > 0)``, zero at 0 if it is "sign" or "step".

    ``E[phi phi] = (low^2 + high^2) / 2 - (high - low)^2 theta / (2 pi)``. The derivative is zero almost everywhere, so
    training moves only the layers after the jump, and the slope is 0 as for the gradient of a finite network.

    Source: Cho and Saul (2009), eq. 1, n = 0.
    """

    def __init__(self, low: float, high: float) -> None:
        self.line, self.kink = (low**2 + high**2) / 2, (high - low) ** 2

    def covariance(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """The expectation of phi phi; 0 where a variance is 0."""
        return torch.where((q1 > 0) & (q2 > 0), self.line - self.kink * _apply(_Turn, q1, q2, q12), 0)

    def slope(self, q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        """Zero, also to automatic differentiation."""
        return 0 * (q1 + q2 + q12)

    def variance(self, q: Tensor) -> Tensor:
        """``(low^2 + high^2) / 2``; 0 where the variance is 0."""
        return torch.where(q > 0, torch.full_like(q, self.line), 0)
