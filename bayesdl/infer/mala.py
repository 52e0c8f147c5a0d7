"""The Metropolis-adjusted Langevin algorithm (Besag, 1994; Roberts & Tweedie, 1996)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesdl.infer.hamiltonian import MAX_ENERGY_ERROR, acceptance
from bayesdl.infer.kernel import Floats, Noise, Point, Statistics, Tuning, ValueAndGrad, choose, column
from bayesdl.infer.method import Work
from bayesdl.infer.sampler import TunedSampler
from bayesdl.infer.target import advance, gradient_at
from bayesdl.posterior.problem import Problem


def log_proposal(target: Tensor, start: Point, step: Tensor) -> Tensor:
    """``log q(target | start) + const``, ``[C]`` in float64; q is N(start + step^2 / 2 grad, step^2).

    Args:
        target: ``[C, D]``.
        start: where the proposal starts from, with the gradient there.
        step: ``[C, 1]``.
    """
    away = (target - start.z) / step - 0.5 * step * start.grad
    return -0.5 * torch.linalg.vecdot(away, away).double().cpu()


def mala_transition(
    start: Point, noise: Tensor, step: Floats, uniform: Floats, value_and_grad: ValueAndGrad
) -> tuple[Point, Statistics]:
    """Propose a step of the Langevin diffusion and accept it as its own reverse demands.

    ``u' = u + step^2 / 2 grad log pi(u) + step * noise``, accepted with probability

        min(1, pi(u') q(u | u') / (pi(u) q(u' | u))).

    The drift makes the proposal asymmetric: without the factor q the chain would not leave pi invariant. A rejected
    chain stays, and its old state counts once more.

    Args:
        start: where the chains stand, ``C`` chains of dimension ``D``.
        noise: ``[C, D]`` standard normal draws.
        step: ``[C]`` step sizes, the standard deviation of the noise.
        uniform: ``[C]`` draws from U(0, 1), for the decision.
        value_and_grad: the log density; called once.

    Returns:
        The new ``Point`` and, each ``[C]``: ``acceptance`` (the probability), ``divergent``, ``log_density``.
    """
    size = column(step, start.z)
    moved = torch.addcmul(start.z, size, noise + 0.5 * size * start.grad)
    value, grad = advance(gradient_at, value_and_grad, moved)
    proposal = Point(moved, value.double().cpu(), grad)
    there = log_proposal(moved, start, size)
    back = log_proposal(start.z, proposal, size)
    log_ratio = (proposal.value - start.value + back - there).numpy()
    with np.errstate(invalid="ignore"):
        probability = acceptance(log_ratio)
        divergent = ~(log_ratio >= -MAX_ENERGY_ERROR)
    point = choose(uniform < probability, proposal, start)
    return point, {
        "acceptance": probability,
        "divergent": divergent.astype(np.float64),
        "log_density": point.value.numpy(),
    }


@dataclass(frozen=True)
class MALA(TunedSampler):
    """Langevin steps with a Metropolis correction: ``u' = u + step^2 / 2 grad log pi(u) + step * noise``.

    The exact counterpart of full-batch ``SGLD``: the same proposal, without its bias. It is HMC with trajectories of
    one leapfrog step, and mixes like a random walk of large strides: of the order of D^(1/3) transitions per effective
    draw in D well-scaled dimensions, more where scales or correlations are left that the metric does not catch.

    An acceptance of 0.574 is best in many dimensions (Roberts & Rosenthal, 1998).

    The posterior's ``stats``, each ``[C, S]``: acceptance, divergent, log_density, step_size.

    Cost: one gradient of all rows a transition.

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: draws per chain that are kept.
        thin: transitions per kept draw.
        step_size: standard deviation of the proposals' noise, or None to adapt it.
        target_accept: mean acceptance probability that the step size is adapted to.
        metric: "diag", "dense" or "low_rank".
    """

    name: ClassVar[str] = "MALA"
    statistics: ClassVar[tuple[str, ...]] = ("acceptance", "divergent", "log_density")

    target_accept: float = 0.574

    def work(self, problem: Problem) -> Work:
        """One gradient a transition."""
        return Work(self.chains, self.warmup + self.draws * self.thin, self.chains * self.draws)

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One Langevin step of every chain."""
        return mala_transition(point, noise.normal(), tuning.step, noise.uniform(1)[0], value_and_grad)
