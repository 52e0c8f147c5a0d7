"""Stochastic-gradient Langevin dynamics (Welling & Teh, 2011, eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State
from bayesdl.infer.stochastic import StochasticSampler
from bayesdl.infer.stochastic_engine import Turn

COURANT = 1.0
"""Default step size times the largest curvature; 4 is the limit of stability."""


def sgld_step(z: Tensor, gradient: Tensor, noise: Tensor, step_size: float) -> Tensor:
    """``z + step_size/2 gradient + sqrt(step_size) noise``.

    On N(0, 1) with exact gradients the stationary variance is 1/(1 - step_size/4).

    Args:
        z: ``[C, D]``.
        gradient: ``[C, D]`` of the log density, with temperature and the factor N/B already in it.
        noise: ``[C, D]`` with mean 0 and variance 1.
        step_size: in units of z squared.
    """
    return torch.add(z, gradient, alpha=0.5 * step_size).add_(noise, alpha=math.sqrt(step_size))


def sgld_variance(curvature: float, step_size: float, gradient_noise: float = 0.0) -> float:
    """Stationary variance on a Gaussian: ``(1/a) (1 + h V/4) / (1 - h a/4)``; infinite at ``h a >= 4``.

    Args:
        curvature: a, the inverse of the exact variance.
        step_size: h.
        gradient_noise: V, the variance of the gradient over independent mini-batches.
    """
    room = 1.0 - 0.25 * step_size * curvature
    return (1.0 + 0.25 * step_size * gradient_noise) / room / curvature if room > 0 else math.inf


@dataclass(frozen=True)
class SGLD(StochasticSampler):
    """Langevin dynamics with full or mini-batch gradients and no accept step.

    Each step adds half the step size times the gradient of the log density, and noise whose variance is the step size
    (in units of the prior's variance). The stationary law is biased by O(step_size): along a direction of curvature a
    its variance is ``(1/a) (1 + step_size V/4) / (1 - step_size a/4)``, with V the gradient's variance over independent
    mini-batches.

    ``step_size=None`` sets ``1 / max(lambda, V/4)``, with lambda the largest curvature (power iteration on gradient
    differences, largest over the chains) and V the largest gradient variance of a coordinate, at the start and again
    after 10, 20, 40, ... steps of warm-up and at its end; it at most doubles at each and is constant afterwards. The
    variance along the stiffest direction is then about a third too large, that along others less.

    Mini-batches, schedules and all settings are described at ``StochasticSampler``.
    """

    name: ClassVar[str] = "SGLD"
    tolerated: ClassVar[float] = 4.0

    def begin(self, z: Tensor, noise: Callable[[], Tensor], gradient: Callable[[], Tensor]) -> State:
        """Nothing but the position."""
        return {}

    def move(self, state: State, turn: Turn) -> State:
        """One step."""
        return {"z": sgld_step(state["z"], turn.gradient, turn.noise(), turn.step_size)}

    def default_step(self, stiffness: float) -> float:
        """``1 / stiffness``."""
        return COURANT / stiffness
