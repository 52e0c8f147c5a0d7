"""Underdamped Langevin dynamics in the BAOAB splitting (Leimkuhler & Matthews, 2013)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State
from bayesdl.infer.stochastic_engine import Turn
from bayesdl.infer.underdamped import Underdamped


def baoab_step(
    z: Tensor, momentum: Tensor, gradient: Tensor, noise: Tensor, step_size: float, friction: float
) -> tuple[Tensor, Tensor]:
    """Kick (B), half a drift (A), friction and noise (O, exactly), half a drift (A).

    BAOAB ends with half a kick, whose gradient is that with which the next step begins. Both are one kick here: the
    positions are BAOAB's, one gradient a step is enough, and a mini-batch's error enters once. On a Gaussian with exact
    gradients the positions have exactly the right covariance, whatever step size (times the root of the curvature below
    2) and friction, and the momenta that are returned have variance 1.

    Args:
        z: ``[C, D]``.
        momentum: ``[C, D]``.
        gradient: ``[C, D]`` of the log density at ``z``.
        noise: ``[C, D]`` with mean 0 and variance 1.
        step_size: a step in time.
        friction: per unit of time.

    Returns:
        The new position and momentum.
    """
    kept = math.exp(-friction * step_size)
    momentum = torch.add(momentum, gradient, alpha=step_size)
    z = torch.add(z, momentum, alpha=0.5 * step_size)
    momentum.mul_(kept).add_(noise, alpha=math.sqrt(1.0 - kept * kept))
    return z.add_(momentum, alpha=0.5 * step_size), momentum


def baoab_variance(curvature: float, step_size: float, friction: float, gradient_noise: float = 0.0) -> float:
    """Stationary variance on a Gaussian: ``(1/a) (1 + (eta^2 V/4) coth(gamma eta/2) / (1 - eta^2 a/4))``.

    Infinite at ``eta^2 a >= 4``.

    Args:
        curvature: a, the inverse of the exact variance.
        step_size: eta.
        friction: gamma.
        gradient_noise: V, the variance of the gradient over independent mini-batches.
    """
    room = 1.0 - 0.25 * step_size**2 * curvature
    heat = 0.25 * step_size**2 * gradient_noise / math.tanh(0.5 * friction * step_size)
    return (1.0 + heat / room) / curvature if room > 0 else math.inf


@dataclass(frozen=True)
class BAOAB(Underdamped):
    """Underdamped Langevin dynamics whose positions are exact on Gaussians.

    Along a direction of curvature a, with independent mini-batches of gradient variance V, the variance is
    ``(1/a) (1 + (step_size^2 V/4) coth(friction step_size / 2) / (1 - step_size^2 a/4))``: without mini-batches there
    is no bias on a Gaussian, and elsewhere it is O(step_size^2) with a small constant. The first choice among the
    samplers with momenta.

    Settings: see ``Underdamped`` and ``StochasticSampler``.
    """

    name: ClassVar[str] = "BAOAB"

    def move(self, state: State, turn: Turn) -> State:
        """One step."""
        size, friction = turn.step_size, self.friction_at(state, turn)
        z, momentum = baoab_step(state["z"], state["momentum"], turn.gradient, turn.noise(), size, friction)
        return {"z": z, "momentum": momentum}
