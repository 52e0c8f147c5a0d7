r"""The kl divergence between two Bernoulli distributions and its inverses, rounded outwards in float64.

The searches keep the end of their bracket at which the defining inequality was verified with its rounding error
counted against it. (The midpoint of a bisection is below the exact inverse about half the time, and then the
certificate is void.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bayesdl.bounds._numbers import EPS, Array, Values, arrays, like, outermost, require, require_probability, up

# A product below is off by at most ten half-units of rounding (differences, quotient, log1p, factor); 8 eps is 16 of
# them. The logarithm of a large quotient forgets the quotient's errors, which leaves four. Products that underflow
# are off by a few of the smallest floats, 5e-324.
_SLACK, _SLACK_FAR, _FAR = 8 * EPS, 4 * EPS, 1e6
_UNDERFLOW = 1e-322


def _kl_parts(q: Array, p: Array) -> tuple[Array, Array, Array]:
    """Two non-negative numbers whose difference is kl(q || p), and the relative error of the first.

    Both logarithms are taken as log1p of a non-negative number, which is well conditioned for all q and p.
    """
    gap = np.abs(p - q)
    above = p >= q
    base = np.where(above, 1 - p, p)
    with np.errstate(all="ignore"):
        far = _weighted_log1p(np.where(above, 1 - q, q), gap, base)
        weight = np.where(above, q, 1 - q)
        near = _weighted_log1p(weight, gap, weight)
        slack = np.where(gap / base > _FAR, _SLACK_FAR, _SLACK)
    return far, near, slack


def _weighted_log1p(weight: Array, gap: Array, base: Array) -> Array:
    """``weight * log(1 + gap / base)`` with 0 log(anything) = 0; the quotient may overflow."""
    ratio = gap / base
    log = np.where(np.isfinite(ratio) | (base == 0), np.log1p(ratio), np.log(gap) - np.log(base))
    return np.asarray(np.where((weight == 0) | (gap == 0), 0.0, weight * log))


def binary_kl(q: Values, p: Values) -> Values:
    r"""Kullback-Leibler divergence between two Bernoulli distributions.

    .. math:: kl(q \| p) = q \log(q / p) + (1 - q) \log((1 - q) / (1 - p)), \qquad 0 \log 0 = 0

    Args:
        q: Probability (an observed risk) in [0, 1].
        p: Probability (a true risk) in [0, 1]; the two broadcast.

    Returns:
        The divergence in nats, infinite where p is 0 or 1 and q is not.

    Raises:
        CertificateError: When an argument is NaN or outside [0, 1].
    """
    q_, p_ = arrays(q=q, p=p)
    require_probability("q", q_)
    require_probability("p", p_)
    far, near, _ = _kl_parts(q_, p_)
    return like(np.maximum(far - near, 0.0), q, p)


def _verified(q: Array, p: Array, bound: Array) -> NDArray[np.bool_]:
    """Whether kl(q || p) >= bound holds for sure, rounding errors counted against it."""
    far, near, slack = _kl_parts(q, p)
    return np.asarray(far * (1 - slack) - near * (1 + _SLACK) - _UNDERFLOW >= bound)


def _invert(q: Array, bound: Array, end: float) -> Array:
    """The float64 number nearest to q, on the side of ``end``, at which kl(q || p) >= bound is verified."""
    found = outermost(q, np.full(q.shape, end), lambda p: _verified(q, p, bound))
    if end == 1.0:
        found = np.where(q == 0, np.minimum(up(-np.expm1(-bound)), 1.0), found)  # closed form, for subnormal bounds
    return np.where(bound == 0, q, np.where(q == end, end, found))


def _kl_inverse(q: Values, bound: Values, end: float) -> Values:
    q_, bound_ = arrays(q=q, bound=bound)
    require_probability("q", q_)
    require(bound_ >= 0, "bound", "non-negative", bound_)
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in (q, bound)):
        device = next(value.device for value in (q, bound) if isinstance(value, Tensor))
        both = (torch.as_tensor(value, dtype=torch.float64, device=device) for value in (q, bound))
        q64, bound64 = torch.broadcast_tensors(*both)
        inverse: Tensor = _Inverse.apply(q64, bound64, end)
        return inverse
    return like(_invert(q_, bound_, end), q, bound)


class _Inverse(Function):
    """The inverse with its gradient by the implicit function theorem: kl(q || p(q, b)) = b along both arguments."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, bound: Tensor, end: float) -> Tensor:
        q_, bound_ = arrays(q=q, bound=bound)
        p = torch.from_numpy(np.array(_invert(q_, bound_, end))).to(q.device)
        ctx.save_for_backward(q, p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        q, p = ctx.saved_tensors
        smallest = torch.finfo(q.dtype).tiny
        spread, gap = p * (1 - p), p - q
        by_bound = torch.where(spread == 0, 0.0, spread / gap)  # 1 / (d kl / d p)
        inner = q.clamp(smallest, 1 - EPS)
        slope = torch.log1p(-gap / (1 - inner)) - torch.log1p(gap / inner)  # d kl / d q
        by_q = torch.where(spread == 0, 0.0, torch.where(gap == 0, 1.0, -slope * by_bound))
        return gradient * by_q, gradient * by_bound, None


def kl_inverse_upper(q: Values, bound: Values) -> Values:
    r"""Largest risk that a kl bound allows, never below the exact value and within 1e-12 of it, relative.

    .. math:: kl^{-1}(q, b) = \sup \{ p \in [q, 1] : kl(q \| p) \le b \}

    For tensors that require gradients the result has them, by implicit differentiation:
    :math:`dp = (db - \partial_q kl \, dq) / \partial_p kl`; at p = 1, where the bound is vacuous, they are zero.

    Args:
        q: Observed risk in [0, 1].
        bound: Right-hand side b >= 0 of the inequality, in nats; may be infinite.

    Returns:
        p: the smallest float64 number at which kl(q || p) >= b is verified; 1 for an infinite bound, q for b = 0.

    Raises:
        CertificateError: When an argument is NaN, q is outside [0, 1] or the bound is negative.

    Cost: at most 62 vectorised evaluations of kl; the gradient costs one.
    """
    return _kl_inverse(q, bound, 1.0)


def kl_inverse_lower(q: Values, bound: Values) -> Values:
    r"""Smallest risk that a kl bound allows, never above the exact value: inf { p in [0, q] : kl(q || p) <= bound }.

    Args:
        q: Observed risk in [0, 1].
        bound: Right-hand side of the inequality, in nats; non-negative, may be infinite.

    Returns:
        p in [0, q], within 1e-12 of the exact value, relative, unless that is below 1e-300; 0 for an infinite bound,
        q for a bound of 0. With gradients as ``kl_inverse_upper`` has them.

    Raises:
        CertificateError: When an argument is NaN, q is outside [0, 1] or the bound is negative.
    """
    return _kl_inverse(q, bound, 0.0)
