r"""Dual activations: E[phi(u) phi(v)] when (u, v) is a zero-mean bivariate normal.

The covariance of (u, v) is ``[[q1, q12], [q12, q2]]``. The three arguments of every function are tensors that
broadcast against each other; all operations are elementwise, so any leading batch shape works. Rounding may make
``q12**2`` exceed ``q1 * q2`` a little; the functions treat that as correlation one, and neither value nor gradient is
ever NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _angle(q1: Tensor, q2: Tensor, q12: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sqrt(q1 q2 - q12**2)`` and the angle ``arccos(q12 / sqrt(q1 q2))``.

    The factored difference of squares neither overflows nor underflows where the square would, and the two-argument
    arctangent keeps full precision at correlation +-1, where arccos does not.
    """
    product = q1.sqrt() * q2.sqrt()
    root = (product - q12).clamp(min=0).sqrt() * (product + q12).clamp(min=0).sqrt()
    return root, torch.atan2(root, q12)


class _ReLU(torch.autograd.Function):
    """The arc-cosine kernel of order 1 with its derivatives in closed form.

    Differentiating the formula term by term gives infinity minus infinity at correlation one, which is every diagonal
    entry of a kernel matrix. Summed by hand the infinite parts cancel:
    ``d/dq12 = (pi - theta) / (2 pi)`` and ``d/dq1 = sqrt(q1 q2 - q12**2) / (4 pi q1)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
        root, theta = _angle(q1, q2, q12)
        return (root + q12 * (math.pi - theta)) / (2 * math.pi)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.BackwardCFunction, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        q1, q2, q12 = saved[0], saved[1], saved[2]
        root, theta = _angle(q1, q2, q12)
        by_variance = grad * root / (4 * math.pi)
        # A point of zero variance is the kink of the kernel: like relu's own derivative at 0, it is taken as 0.
        by_q1 = torch.where(q1 > 0, by_variance / torch.where(q1 > 0, q1, 1), 0)
        by_q2 = torch.where(q2 > 0, by_variance / torch.where(q2 > 0, q2, 1), 0)
        return by_q1, by_q2, grad * (math.pi - theta) / (2 * math.pi)


def relu(q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
    r"""The dual of relu: (sqrt(q1 q2 - q12^2) + q12 (pi - theta)) / (2 pi), with cos(theta) the correlation.

    Args:
        q1: variance of u, ``[...]``, not negative.
        q2: variance of v, ``[...]``, not negative.
        q12: covariance of u and v, ``[...]``.

    Returns:
        the expectation, broadcast shape.

    Source: Cho and Saul (2009), Kernel methods for deep learning, eq. 1 with n = 1 (there without the factor 1/2).
    """
    shaped = torch.broadcast_tensors(q1, q2, q12)
    result: Tensor = _ReLU.apply(*shaped)
    return result


def erf(q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
    r"""The dual of erf: (2/pi) arcsin(2 q12 / sqrt((1 + 2 q1)(1 + 2 q2))).

    It is evaluated as ``arctan2(2 q12, sqrt(s - 2 q12) sqrt(s + 2 q12))`` with ``s = sqrt((1 + 2 q1)(1 + 2 q2))``.
    Because ``|q12| <= sqrt(q1 q2)``, both differences are at least 1/2, so the derivative is finite everywhere.

    Args:
        q1: variance of u, ``[...]``, not negative.
        q2: variance of v, ``[...]``, not negative.
        q12: covariance of u and v, ``[...]``.

    Returns:
        the expectation, broadcast shape.

    Source: Williams (1997), Computing with infinite networks, eq. 11.
    """
    s = (1 + 2 * q1).sqrt() * (1 + 2 * q2).sqrt()
    rest = (s - 2 * q12).clamp(min=0.5).sqrt() * (s + 2 * q12).clamp(min=0.5).sqrt()
    return torch.atan2(2 * q12, rest) * (2 / math.pi)


def linear(q1: Tensor, q2: Tensor, q12: Tensor) -> Tensor:
    """The dual of the identity: q12."""
    return q12


def _relu_variance(q: Tensor) -> Tensor:
    return q / 2


def _erf_variance(q: Tensor) -> Tensor:
    return torch.atan2(2 * q, (1 + 4 * q).sqrt()) * (2 / math.pi)


def _linear_variance(q: Tensor) -> Tensor:
    return q


@dataclass(frozen=True)
class Dual:
    """The two expectations that the kernel recursion needs of one activation.

    ``covariance(q1, q2, q12)`` is E[phi(u) phi(v)]; ``variance(q)`` is E[phi(u)^2], which equals
    ``covariance(q, q, q)`` but is exact to the last digit.
    """

    covariance: Callable[[Tensor, Tensor, Tensor], Tensor]
    variance: Callable[[Tensor], Tensor]


DUALS: dict[str, Dual] = {
    "relu": Dual(relu, _relu_variance),
    "erf": Dual(erf, _erf_variance),
    "linear": Dual(linear, _linear_variance),
}
