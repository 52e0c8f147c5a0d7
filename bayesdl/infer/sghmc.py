"""Stochastic-gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin, 2014, eq. 15)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.infer.checkpoint import State
from bayesdl.infer.stochastic_engine import Turn
from bayesdl.infer.underdamped import Underdamped


def sghmc_step(
    z: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    noise: Tensor,
    step_size: float,
    friction: float,
    gradient_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``v' = (1 - friction eta) v + eta gradient + sqrt(2 (friction - eta V/2) eta) noise``, then ``z' = z + eta v'``.

    The position moves with the **new** momentum: with the old one the variance on N(0, 1) would be 1.114 instead of
    1.003 at eta = 0.1, friction = 1. A gradient of variance V adds eta^2 V by itself; taking as much away from the
    noise leaves the sum at ``2 friction eta``.

    Args:
        z: ``[C, D]``.
        momentum: ``[C, D]``.
        gradient: ``[C, D]`` of the log density.
        noise: ``[C, D]`` with mean 0 and variance 1.
        step_size: eta, a step in time.
        friction: per unit of time.
        gradient_noise: V ``[D]``, or None for 0. Where ``eta V/2`` exceeds the friction, no noise is left to add.

    Returns:
        The new position and momentum.
    """
    momentum = torch.mul(momentum, 1.0 - friction * step_size).add_(gradient, alpha=step_size)
    if gradient_noise is None:
        momentum.add_(noise, alpha=math.sqrt(2.0 * friction * step_size))
    else:
        left = (friction - 0.5 * step_size * gradient_noise).clamp_(min=0.0)
        momentum.addcmul_(noise, left.sqrt_(), value=math.sqrt(2.0 * step_size))
    return torch.add(z, momentum, alpha=step_size), momentum


def sghmc_variance(curvature: float, step_size: float, friction: float, gradient_noise: float = 0.0) -> float:
    """Stationary variance on a Gaussian: ``(1/a) (1 + eta V/(2 gamma)) / (1 - eta^2 a / (2 (2 - gamma eta)))``.

    Infinite where the scheme is unstable: ``eta^2 a >= 2 (2 - gamma eta)``. Mini-batches whose noise was taken out by
    an exact estimate have ``gradient_noise=0`` here.

    Args:
        curvature: a, the inverse of the exact variance.
        step_size: eta.
        friction: gamma.
        gradient_noise: V, the variance of the gradient over independent mini-batches.
    """
    room = 1.0 - step_size**2 * curvature / (2.0 * (2.0 - friction * step_size))
    stable = room > 0 and friction * step_size < 2.0
    return (1.0 + step_size * gradient_noise / (2.0 * friction)) / room / curvature if stable else math.inf


@dataclass(frozen=True)
class SGHMC(Underdamped):
    """Langevin dynamics with momentum, as SGD with momentum plus noise.

    Along a direction of curvature a, with independent mini-batches of gradient variance V, the variance is
    ``(1/a) (1 + step_size V/(2 friction)) / (1 - step_size^2 a / (2 (2 - friction step_size)))``. In terms of SGD with
    momentum the learning rate is ``step_size^2`` and the momentum ``1 - friction step_size``, which must stay above -1.

    ``noise_estimate`` takes the heat of the mini-batches out of the noise: V is measured per coordinate (see
    ``gradient_noise``) and the noise has the variance ``2 (friction - step_size V/2) step_size``. This is right for
    **independent** mini-batches only. Those of an epoch without replacement heat slow directions hardly at all, and the
    subtraction would cool them; so it is refused there.

    Settings: see ``Underdamped`` and ``StochasticSampler``.

    Args:
        noise_estimate: as said; needs ``replacement=True``.
    """

    name: ClassVar[str] = "SGHMC"

    noise_estimate: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.noise_estimate and (self.batch_size is None or not self.replacement or self.gradient != "plain"):
            raise MethodError(
                f"{self.name}(noise_estimate=True) subtracts the noise of independent mini-batches, so it needs "
                "batch_size=, replacement=True and gradient='plain'. Mini-batches without replacement add hardly any "
                "heat to slow directions."
            )

    @property
    def looks(self) -> bool:
        """Also for the noise estimate."""
        return super().looks or self.noise_estimate

    @property
    def batches_compared(self) -> int:
        """The noise estimate enters the law of the draws, not only their step size."""
        return 64 if self.noise_estimate else super().batches_compared

    def move(self, state: State, turn: Turn) -> State:
        """One step."""
        z, momentum = sghmc_step(
            state["z"],
            state["momentum"],
            turn.gradient,
            turn.noise(),
            turn.step_size,
            self.friction_at(state, turn),
            state["gradient_noise"] if self.noise_estimate and not turn.exploring else None,
        )
        return {"z": z, "momentum": momentum}
