"""Underdamped Langevin dynamics, common part of SGHMC, SGNHT and BAOAB: momenta, friction, and their defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.stochastic import StochasticSampler, mean_square
from bayesdl.infer.stochastic_engine import Turn

COURANT = 0.5
"""Default step size times the root of the largest curvature; 2 is the limit of stability. With 1, a chain that later
meets a curvature four times larger than where it was measured is shaken, and stays hot for long.
"""
EARLY = 0.3
"""Default friction, per step, in the first half of warm-up."""


@dataclass(frozen=True)
class Underdamped(StochasticSampler):
    """Position and momentum: ``dz = v dt, dv = gradient dt - friction v dt + sqrt(2 friction) dW``, v ~ N(0, 1).

    Step sizes are steps in time, in units of the prior's sd: SGLD's step size is twice the square of such a step where
    ``friction * step_size`` is 1. A direction of curvature a oscillates with the frequency sqrt(a) and forgets at the
    rate of about friction / 2, so slow directions need about as many steps as the square root of what SGLD needs.
    Independent mini-batches of gradient variance V heat the system: along every direction the variance grows by about
    ``step_size V / (2 friction)``.

    ``step_size=None`` sets ``0.5 / sqrt(max(lambda, V/2))``, with lambda the largest curvature and V the largest
    gradient variance of a coordinate, measured as in ``SGLD``.

    The posterior's ``stats`` also hold kinetic ``[C, S]``: the mean square of the momenta, 1 if the temperature is
    right, up to the integrator's error.

    Args:
        friction: gamma, per unit of time. None sets ``max(1, step_size V/2)``, and at most ``1 / step_size``, so that
            independent mini-batches would at most double the variance; in the first half of warm-up at least
            ``0.3 / step_size``, so that the energy that chains bring from a bad start soon leaves them.
    """

    statistics: ClassVar[tuple[str, ...]] = ("kinetic",)
    tolerated: ClassVar[float] = 2.0

    friction: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.friction is not None:
            check.positive(self.name, friction=self.friction)

    def begin(self, z: Tensor, noise: Callable[[], Tensor], gradient: Callable[[], Tensor]) -> State:
        """Momenta from their stationary law."""
        return {"momentum": noise()}

    def default_step(self, stiffness: float) -> float:
        """``0.5 / sqrt(stiffness)``."""
        return COURANT / math.sqrt(stiffness)

    @property
    def looks(self) -> bool:
        """Also where the friction depends on the gradient noise."""
        return super().looks or (self.friction is None and self.batch_size is not None)

    def observe(self, state: State) -> dict[str, Tensor]:
        """The mean square of the momenta."""
        return {"kinetic": mean_square(state["momentum"])}

    def friction_at(self, state: State, turn: Turn) -> float:
        """The friction of a step."""
        if self.friction is not None:
            return self.friction
        least = EARLY / turn.step_size if turn.warmth < 0.5 else 1.0
        return min(max(1.0, least, 0.5 * turn.step_size * state["heat"]), 1.0 / turn.step_size)
