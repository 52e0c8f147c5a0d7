"""Hamiltonian Monte Carlo (Duane et al., 1987; Neal, 2011) with trajectories of a given length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.hamiltonian import MAX_ENERGY_ERROR, acceptance, kinetic, leapfrog
from bayesdl.infer.kernel import Floats, Noise, Point, Statistics, Tuning, ValueAndGrad, choose, column
from bayesdl.infer.method import ASSUMED_LEAPFROGS, Work
from bayesdl.infer.sampler import TunedSampler
from bayesdl.infer.target import advance
from bayesdl.posterior.problem import Problem

MAX_LEAPFROGS = 1024
"""Leapfrog steps of one trajectory at most, whatever its length: warm-up tries very small steps."""


def trajectory(
    start: Point, momentum: torch.Tensor, step: Floats, leapfrogs: Floats, value_and_grad: ValueAndGrad
) -> Point:
    """The ends of the chains' trajectories, with the momenta there.

    Args:
        start: where the chains stand, ``C`` chains of dimension ``D``.
        momentum: ``[C, D]`` standard normal draws.
        step: ``[C]`` step sizes of the leapfrog integrator.
        leapfrogs: ``[C]`` steps of the trajectories; a chain that has fewer than others waits at its end.
        value_and_grad: the log density; called as often as the longest trajectory has steps.
    """
    z, p, grad, full = start.z, momentum, start.grad, column(step, start.z)
    together = leapfrogs.min()
    for done in range(int(leapfrogs.max())):
        sizes = full if done < together else full * column(leapfrogs > done, full)
        z, p, value, grad = advance(leapfrog, value_and_grad, z, p, grad, sizes)
    return Point(z, value, grad, p)


def decide(start: Point, momentum: torch.Tensor, end: Point, uniform: Floats) -> tuple[Point, Statistics]:
    """Accept the end of a trajectory with probability ``min(1, exp(H - H'))``.

    A rejected chain stays, and its old state counts once more. An end whose energy is not finite is rejected.

    Args:
        start: where the trajectories began.
        momentum: ``[C, D]`` momenta there.
        end: where they end, as ``trajectory`` gives it.
        uniform: ``[C]`` draws from U(0, 1), for the decision.

    Returns:
        The new ``Point`` and, each ``[C]``: ``acceptance`` (the probability), ``energy`` (at the new state),
        ``divergent``, ``log_density``.
    """
    if end.momentum is None:
        raise AssertionError("a trajectory ends with a momentum")
    energies = torch.stack([kinetic(momentum), kinetic(end.momentum), end.value]).double().cpu().numpy()
    before, after = energies[0] - start.value.numpy(), energies[1] - energies[2]
    with np.errstate(invalid="ignore"):
        probability = acceptance(before - after)
        divergent = ~(after - before <= MAX_ENERGY_ERROR)
    accepted = uniform < probability
    point = choose(accepted, end._replace(value=torch.from_numpy(energies[2])), start)
    return point, {
        "acceptance": probability,
        "energy": np.where(accepted, after, before),
        "divergent": divergent.astype(np.float64),
        "log_density": point.value.numpy(),
    }


def hmc_transition(
    start: Point,
    momentum: torch.Tensor,
    step: Floats,
    leapfrogs: Floats,
    uniform: Floats,
    value_and_grad: ValueAndGrad,
) -> tuple[Point, Statistics]:
    """Move every chain along one trajectory and accept or refuse its end; see ``trajectory`` and ``decide``."""
    end = trajectory(start, momentum, step, leapfrogs, value_and_grad)
    point, statistics = decide(start, momentum, end, uniform)
    return point, statistics | {"leapfrogs": leapfrogs}


@dataclass(frozen=True)
class HMC(TunedSampler):
    """Hamiltonian Monte Carlo with a fixed, jittered trajectory length.

    The equations of motion are ``dz/dt = M^-1 v`` and ``dv/dt = grad log pi``, integrated by the leapfrog; momenta are
    drawn anew before every trajectory. With ``step_size=None`` the step size and the metric are adapted during warm-up
    (see ``bayesdl.infer.adaptation``); times and lengths are then in units of the posterior standard deviations.

    Acceptance alone is no diagnostic: a trajectory of half a period is always accepted and goes nowhere, which is why
    the length is jittered. The jitter is common to all chains, so that they move in lockstep; a trajectory has at most
    1,024 steps.

    The posterior's ``stats``, each ``[C, S]``: acceptance, energy, divergent, leapfrogs, log_density, step_size.

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: draws per chain that are kept.
        thin: transitions per kept draw.
        step_size: of the leapfrog integrator, or None to adapt it.
        target_accept: mean acceptance probability that the step size is adapted to.
        metric: "diag", "dense" or "low_rank".
        trajectory_length: integration time of a trajectory.
        leapfrog_steps: steps of a trajectory; replaces ``trajectory_length`` if given.
        jitter: the length is multiplied by a draw from U(1 - jitter, 1 + jitter).
    """

    name: ClassVar[str] = "HMC"
    statistics: ClassVar[tuple[str, ...]] = ("acceptance", "energy", "divergent", "leapfrogs", "log_density")

    warmup: int = 500
    draws: int = 500
    trajectory_length: float = 3.0
    leapfrog_steps: int | None = None
    jitter: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole_or_none(self.name, leapfrog_steps=self.leapfrog_steps)
        check.positive(self.name, trajectory_length=self.trajectory_length)
        if not 0 <= self.jitter < 1:
            raise MethodError(f"{self.name}(jitter={self.jitter!r}): jitter must be at least 0 and below 1.")

    def work(self, problem: Problem) -> Work:
        """Leapfrog steps, as many as the step size will ask for."""
        steps = ASSUMED_LEAPFROGS if self.step_size is None and self.leapfrog_steps is None else None
        each = steps or self.leapfrog_steps or math.ceil(self.trajectory_length / (self.step_size or 1.0))
        note = f"if a trajectory takes {each} leapfrog steps" if steps else ""
        return Work(self.chains, each * (self.warmup + self.draws * self.thin), self.chains * self.draws, note)

    def steps(self, step: Floats, uniform: float) -> Floats:
        """Leapfrog steps of the trajectories ``[C]``, with ``uniform`` from U(0, 1) for the jitter."""
        if self.leapfrog_steps is None:
            steps = self.trajectory_length / step
        else:
            steps = np.full_like(step, self.leapfrog_steps)
        jittered = np.minimum(steps * (1.0 + self.jitter * (2.0 * uniform - 1.0)), MAX_LEAPFROGS)
        return np.maximum(1.0, np.round(jittered))

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One trajectory of every chain."""
        leapfrogs = self.steps(tuning.step, noise.shared())
        return hmc_transition(point, noise.normal(), tuning.step, leapfrogs, noise.uniform(1)[0], value_and_grad)
