"""Stochastic-gradient Nosé-Hoover thermostat (Ding et al., 2014), in the splitting of Leimkuhler & Shang (2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State
from bayesdl.infer.stochastic import mean_square
from bayesdl.infer.stochastic_engine import Turn
from bayesdl.infer.underdamped import Underdamped


def sgnht_step(
    z: Tensor,
    momentum: Tensor,
    thermostat: Tensor,
    gradient: Tensor,
    noise: Tensor,
    step_size: float,
    friction: float,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kick (B), half a drift (A), thermostat (D), friction and noise (O, exactly), thermostat (D), half a drift (A).

    ``dz = v dt, dv = gradient dt - xi v dt + sqrt(2 friction) dW, dxi = friction^2 (|v|^2/D - 1) dt``. The thermostat
    looks at the momenta where on a Gaussian BAOAB's are exact; in the Euler scheme that Ding et al. print it looks at
    others, and the variance is off by ``-xi step_size / 2`` (see ``docs/stochastic-gradients.md``).

    Args:
        z: ``[C, D]``.
        momentum: ``[C, D]``.
        thermostat: xi ``[C]``, the friction that is in force.
        gradient: ``[C, D]`` of the log density at ``z``.
        noise: ``[C, D]`` with mean 0 and variance 1.
        step_size: a step in time.
        friction: the noise that is put in, and the friction that balances it where gradients are exact.
        frozen: keep the thermostat as it is (without noise it would ask for negative friction).

    Returns:
        The new position, momentum and thermostat.
    """
    speed = 0.0 if frozen else 0.5 * step_size * friction**2
    momentum = torch.add(momentum, gradient, alpha=step_size)
    z = torch.add(z, momentum, alpha=0.5 * step_size)
    thermostat = torch.add(thermostat, mean_square(momentum) - 1.0, alpha=speed)
    # (1 - exp(-2 xi eta)) / xi, also where xi is zero or negative
    safe = torch.where(thermostat == 0.0, torch.full_like(thermostat, torch.finfo(z.dtype).tiny), thermostat)
    variance = -friction * torch.expm1(-2.0 * step_size * safe) / safe
    momentum.mul_(torch.exp(-step_size * thermostat)[:, None]).addcmul_(noise, variance.sqrt()[:, None])
    thermostat = torch.add(thermostat, mean_square(momentum) - 1.0, alpha=speed)
    return z.add_(momentum, alpha=0.5 * step_size), momentum, thermostat


@dataclass(frozen=True)
class SGNHT(Underdamped):
    """Langevin dynamics whose friction finds by itself how much heat the mini-batches bring.

    The thermostat, one number a chain, raises the friction while the momenta's mean square is above 1 and lowers it
    while it is below. Where the gradient noise is the same in all directions, its heat is taken out exactly, without
    being measured; where it is not, the mean over the directions is right: noisy ones stay too wide and others become
    too narrow. The thermostat's inertia is ``D / friction^2``, with friction 1 that of Ding et al.

    The posterior's ``stats`` also hold thermostat ``[C, S]``: the friction in force, in multiples of ``friction``.

    Settings: see ``Underdamped`` and ``StochasticSampler``.
    """

    name: ClassVar[str] = "SGNHT"
    statistics: ClassVar[tuple[str, ...]] = ("kinetic", "thermostat")

    def begin(self, z: Tensor, noise: Callable[[], Tensor], gradient: Callable[[], Tensor]) -> State:
        """Momenta from their stationary law; the thermostat starts without heat to take out."""
        return super().begin(z, noise, gradient) | {"thermostat": torch.ones_like(z[:, 0])}

    def observe(self, state: State) -> dict[str, Tensor]:
        """Temperature and thermostat."""
        return super().observe(state) | {"thermostat": state["thermostat"]}

    def move(self, state: State, turn: Turn) -> State:
        """One step."""
        friction = self.friction_at(state, turn)
        z, momentum, thermostat = sgnht_step(
            state["z"],
            state["momentum"],
            state["thermostat"] * friction,
            turn.gradient,
            turn.noise(),
            turn.step_size,
            friction,
            turn.exploring or turn.warmth < 0.5,  # the heat of a bad start is none that will be there later
        )
        return {"z": z, "momentum": momentum, "thermostat": thermostat / friction}
