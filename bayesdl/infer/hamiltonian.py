"""Hamiltonian dynamics of all chains at once: kinetic energy, leapfrog, and a first guess of the step size.

The inverse mass matrix is diagonal, ``M^-1 = diag(scale^2)``, and momenta are kept whitened: ``p = scale * v`` with
``v ~ N(0, M)``, so ``p ~ N(0, I)``. In these coordinates the equations of motion are

    dz/dt = M^-1 v = scale * p,        dp/dt = scale * grad log pi(z),

the kinetic energy is ``|p|^2 / 2``, and every ``v' M^-1 w`` of the textbook formulas is a plain inner product.
(Neal, 2011, "MCMC using Hamiltonian dynamics", sections 2.3 and 4.1.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import Divergence

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``z [C, D] -> (log density [C], gradient [C, D])``; non-finite numbers are returned, not raised."""

MAX_ENERGY_ERROR = 1000.0
"""An energy error above this is called a divergence (the value that Stan uses)."""


class Point(NamedTuple):
    """Where the chains stand, with everything the next trajectory needs so that no gradient is computed twice."""

    z: Tensor
    """``[C, D]`` unconstrained positions."""
    value: Tensor
    """``[C]`` log density, float64 on the CPU: energies are compared there."""
    grad: Tensor
    """``[C, D]`` gradient of the log density."""


def evaluate(z: Tensor, value_and_grad: ValueAndGrad) -> Point:
    """The ``Point`` at ``z [C, D]``; one gradient a chain."""
    value, grad = value_and_grad(z)
    return Point(z, value.double().cpu(), grad)


def kinetic(momentum: Tensor) -> Tensor:
    """Kinetic energy ``|p|^2 / 2 [...]`` of whitened momenta ``[..., D]``."""
    square: Tensor = torch.linalg.vecdot(momentum, momentum)
    return 0.5 * square


def leapfrog(
    z: Tensor, momentum: Tensor, grad: Tensor, step: Tensor, value_and_grad: ValueAndGrad
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the leapfrog (Stormer-Verlet) integrator: half a kick, a drift, half a kick.

    Args:
        z: ``[C, D]`` positions.
        momentum: ``[C, D]`` whitened momenta.
        grad: ``[C, D]`` gradient at ``z``.
        step: ``[D]`` or ``[C, D]``: the step size times ``scale``; negative runs back in time, 0 stands still.
        value_and_grad: the log density of all chains; called once.

    Returns:
        ``(z, momentum, value [C], grad)`` after the step. The map is volume preserving and is undone exactly (up to
        rounding) by the same call with ``-step``.
    """
    momentum = torch.addcmul(momentum, step, grad, value=0.5)
    z = torch.addcmul(z, step, momentum)
    value, grad = value_and_grad(z)
    momentum = torch.addcmul(momentum, step, grad, value=0.5)
    return z, momentum, value, grad


def acceptance(log_ratio: Tensor) -> Tensor:
    """Metropolis probability ``min(1, exp(log_ratio))``; a ratio that is not finite is a rejection."""
    return torch.where(log_ratio.isfinite(), log_ratio.clamp(max=0.0).exp(), 0.0)


def first_step_size(
    point: Point,
    scale: Tensor,
    step_size: float,
    generator: torch.Generator,
    value_and_grad: ValueAndGrad,
    target: float = 0.8,
    attempts: int = 60,
) -> float:
    """A step size at which a single leapfrog step is accepted with probability of about ``target``.

    ``step_size`` is doubled, or halved, until the acceptance probability, averaged over the chains, crosses ``target``
    (Hoffman & Gelman, 2014, algorithm 4, pooled over chains).

    Raises:
        Divergence: no step size within ``2^attempts`` is good enough.
    """
    growing: bool | None = None
    for _ in range(attempts):
        momentum = torch.randn(point.z.shape, generator=generator, dtype=point.z.dtype, device=point.z.device)
        _, moved, value, _ = leapfrog(point.z, momentum, point.grad, step_size * scale, value_and_grad)
        change = (kinetic(momentum) - kinetic(moved)).double().cpu() + value.double().cpu() - point.value
        good = float(acceptance(change).mean()) > target
        if growing is None:
            growing = good
        elif growing != good:
            # The last size tried on the way up failed: step back to the one before, which was good.
            return step_size / 2.0 if growing else step_size
        step_size = step_size * 2.0 if growing else step_size / 2.0
    raise Divergence(
        f"no leapfrog step size between {step_size:.3g} and its start is accepted: the log density is flat, "
        "discontinuous or not finite around the starting point. Check the model's scales, or pass another init."
    )
