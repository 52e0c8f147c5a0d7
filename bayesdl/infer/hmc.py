"""Hamiltonian Monte Carlo (Duane et al., 1987; Neal, 2011) with trajectories of a given length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.hamiltonian import MAX_ENERGY_ERROR, Point, ValueAndGrad, acceptance, kinetic, leapfrog
from bayesdl.infer.hamiltonian_engine import HamiltonianEngine, Statistics, begin, sample
from bayesdl.infer.loop import Run
from bayesdl.infer.method import ASSUMED_LEAPFROGS, Method, Work
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem

STATISTICS = ("acceptance", "energy", "divergent", "leapfrogs", "log_density", "step_size")
MAX_LEAPFROGS = 1024
"""Leapfrog steps of one trajectory at most, whatever its length: warm-up tries very small steps."""


def hmc_transition(
    start: Point,
    momentum: Tensor,
    step_size: float,
    scale: Tensor,
    leapfrogs: int,
    uniform: Tensor,
    value_and_grad: ValueAndGrad,
) -> tuple[Point, Statistics]:
    """Move every chain along one trajectory and accept its end with probability ``min(1, exp(H - H'))``.

    A rejected chain stays, and its old state counts once more. An end whose energy is not finite is rejected.

    Args:
        start: where the chains stand, ``C`` chains of dimension ``D``.
        momentum: ``[C, D]`` standard normal draws (whitened momenta).
        step_size: of the leapfrog integrator.
        scale: ``[D]`` square root of the diagonal of the inverse mass matrix.
        leapfrogs: steps of the trajectory.
        uniform: ``[C]`` draws from U(0, 1) on the CPU, for the decision.
        value_and_grad: the log density; called once a step.

    Returns:
        The new ``Point`` and, each ``[C]``: ``acceptance`` (the probability), ``energy`` (at the new state),
        ``divergent``, ``leapfrogs``, ``log_density``.
    """
    z, p, grad, step = start.z, momentum, start.grad, step_size * scale
    for _ in range(leapfrogs):
        z, p, value, grad = leapfrog(z, p, grad, step, value_and_grad)
    energies = torch.stack([kinetic(momentum), kinetic(p), value]).double().cpu()
    before, after = energies[0] - start.value, energies[1] - energies[2]
    probability = acceptance(before - after)
    accepted = uniform < probability
    mask = accepted.to(z.device)[:, None]
    end_value = torch.where(accepted, energies[2], start.value)
    point = Point(torch.where(mask, z, start.z), end_value, torch.where(mask, grad, start.grad))
    divergent = ~(after - before <= MAX_ENERGY_ERROR)
    return point, {
        "acceptance": probability.numpy(),
        "energy": torch.where(accepted, after, before).numpy(),
        "divergent": divergent.double().numpy(),
        "leapfrogs": torch.full_like(probability, leapfrogs).numpy(),
        "log_density": end_value.numpy(),
    }


@dataclass(frozen=True)
class HMC(Method):
    """Hamiltonian Monte Carlo with a fixed, jittered trajectory length.

    The equations of motion are ``dz/dt = M^-1 v`` and ``dv/dt = grad log pi``, integrated by the leapfrog; momenta are
    drawn anew before every trajectory. With ``step_size=None`` the step size and a diagonal mass matrix are adapted
    during warm-up (see ``bayesdl.infer.adaptation``); times and lengths are then in units of the posterior standard
    deviations. A given ``step_size`` is used as it is, with M = 1, and warm-up only burns in.

    Acceptance alone is no diagnostic: a trajectory of half a period is always accepted and goes nowhere, which is why
    the length is jittered. All chains share the number of steps, length / step size, which is at most 1,024.

    The posterior's ``stats``, each ``[C, S]``: acceptance, energy, divergent, leapfrogs, log_density, step_size.

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: transitions per chain that are kept.
        step_size: of the leapfrog integrator, or None to adapt it.
        trajectory_length: integration time of a trajectory.
        leapfrog_steps: steps of a trajectory; replaces ``trajectory_length`` if given.
        jitter: the length is multiplied by a draw from U(1 - jitter, 1 + jitter).
        target_accept: mean acceptance probability that the step size is adapted to.
    """

    name: ClassVar[str] = "HMC"

    chains: int = 4
    warmup: int = 500
    draws: int = 500
    step_size: float | None = None
    trajectory_length: float = 3.0
    leapfrog_steps: int | None = None
    jitter: float = 0.5
    target_accept: float = 0.8

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, chains=self.chains, draws=self.draws)
        check.whole_or_none(self.name, leapfrog_steps=self.leapfrog_steps)
        check.whole(self.name, at_least=0, warmup=self.warmup)
        check.positive(self.name, trajectory_length=self.trajectory_length)
        check.fraction(self.name, target_accept=self.target_accept)
        if self.step_size is not None:
            check.positive(self.name, step_size=self.step_size)
        if not 0 <= self.jitter < 1:
            raise MethodError(f"{self.name}(jitter={self.jitter!r}): jitter must be at least 0 and below 1.")

    def work(self, problem: Problem) -> Work:
        """Leapfrog steps, as many as the step size will ask for."""
        steps = ASSUMED_LEAPFROGS if self.step_size is None and self.leapfrog_steps is None else None
        each = steps or self.leapfrog_steps or math.ceil(self.trajectory_length / (self.step_size or 1.0))
        note = f"if a trajectory takes {each} leapfrog steps" if steps else ""
        return Work(self.chains, each * (self.warmup + self.draws), self.chains * self.draws, note)

    def steps(self, step_size: float, uniform: float) -> int:
        """Leapfrog steps of a trajectory, with ``uniform`` from U(0, 1) for the jitter."""
        steps = self.trajectory_length / step_size if self.leapfrog_steps is None else float(self.leapfrog_steps)
        return max(1, round(min(steps * (1.0 + self.jitter * (2.0 * uniform - 1.0)), MAX_LEAPFROGS)))

    def transition(
        self,
        point: Point,
        momentum: Tensor,
        step_size: float,
        scale: Tensor,
        stream: torch.Generator,
        value_and_grad: ValueAndGrad,
    ) -> tuple[Point, Statistics]:
        """One trajectory of every chain, of a common random length."""
        uniform = torch.rand(len(momentum) + 1, generator=stream, dtype=torch.float64)
        leapfrogs = self.steps(step_size, float(uniform[-1]))
        return hmc_transition(point, momentum, step_size, scale, leapfrogs, uniform[:-1], value_and_grad)

    def _fit(self, problem: Problem, run: Run) -> DrawsPosterior:
        engine = HamiltonianEngine(
            label=self.name,
            density=problem.density,
            begin=begin(problem, run, self.chains),
            transition=self.transition,
            names=STATISTICS,
            warmup=self.warmup,
            draws=self.draws,
            step_size=self.step_size,
            target_accept=self.target_accept,
            seed=run.seed,
            restart=run.init in (None, "prior"),
        )
        return sample(engine, problem, run)
