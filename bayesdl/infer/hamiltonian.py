"""Hamiltonian dynamics of all chains at once: kinetic energy, leapfrog, and a first guess of the step size.

With the inverse mass matrix M^-1 = A A^T and momenta v ~ N(0, M), the whitened coordinates u = A^-1 z and p = A^T v
obey

    du/dt = p,        dp/dt = A^T grad log pi(z) = grad_u log pi,

with p ~ N(0, I) and kinetic energy |p|^2 / 2: dz/dt = M^-1 v without a matrix in sight (Neal, 2011, "MCMC using
Hamiltonian dynamics", sections 2.3 and 4.1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import Divergence
from bayesdl.infer.kernel import Floats, Noise, Point, ValueAndGrad, column

MAX_ENERGY_ERROR = 1000.0
"""An energy error above this is called a divergence (the value that Stan uses)."""


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
        momentum: ``[C, D]`` momenta.
        grad: ``[C, D]`` gradient at ``z``.
        step: ``[C, 1]`` step sizes; negative runs back in time, 0 stands still.
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


def acceptance(log_ratio: Floats) -> Floats:
    """Metropolis probability ``min(1, exp(log_ratio))``; a ratio that is not finite is a rejection."""
    finite = np.isfinite(log_ratio)
    return np.where(finite, np.exp(np.minimum(np.where(finite, log_ratio, 0.0), 0.0)), 0.0)


def first_step_size(
    point: Point,
    step: Floats,
    group: np.ndarray[tuple[int], np.dtype[np.int64]],
    noise: Noise,
    value_and_grad: ValueAndGrad,
    everyone: Callable[[Tensor], Tensor] = lambda mine: mine,
    target: float = 0.8,
    attempts: int = 60,
) -> Floats:
    """Step sizes at which a single leapfrog step is accepted with probability of about ``target``.

    A group's step size is doubled, or halved, until the acceptance probability, averaged over the group's chains,
    crosses ``target`` (Hoffman & Gelman, 2014, algorithm 4, pooled over chains).

    Args:
        point: where the chains stand.
        step: ``[G]`` where to begin.
        group: number of each chain's group, for the chains of all processes.
        noise: for the momenta.
        value_and_grad: the log density.
        everyone: what the chains of all processes hold, from what those here do.
        target: of the acceptance probability.
        attempts: doublings at most.

    Returns:
        ``[G]``.

    Raises:
        Divergence: no step size within ``2^attempts`` is good enough.
    """
    step = step.copy()
    sizes = np.bincount(group)
    growing: np.ndarray[tuple[int], np.dtype[np.bool_]] | None = None
    going = np.ones(len(step), dtype=bool)
    for _ in range(attempts):
        momentum = noise.normal()
        sizes_now = column(step[group][noise.own], point.z)
        # A few steps in a whole run, which not every sampler goes by: they are not worth compiling.
        _, moved, value, _ = leapfrog(point.z, momentum, point.grad, sizes_now, value_and_grad)
        change = (kinetic(momentum) - kinetic(moved)).double().cpu() + value.double().cpu() - point.value
        accepted = everyone(torch.from_numpy(acceptance(change.numpy()))).numpy()
        good = np.bincount(group, accepted) / sizes > target
        if growing is None:
            growing = good
        crossed = going & (growing != good)
        # The last size tried on the way up failed: step back to the one before, which was good.
        step = np.where(crossed & growing, step / 2.0, step)
        going = going & ~crossed
        if not going.any():
            return step
        step = np.where(going, np.where(growing, step * 2.0, step / 2.0), step)
    raise Divergence(
        f"no leapfrog step size between {step[going].min():.3g} and its start is accepted: the log density is flat, "
        "discontinuous or not finite around the starting point. Check the model's scales, or pass another init."
    )
