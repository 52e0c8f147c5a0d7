"""Random-walk Metropolis (Metropolis et al., 1953; Roberts, Gelman & Gilks, 1997)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesdl.density.blocks import Step
from bayesdl.infer.adaptation import Adaptation, StepAndMetric, start_averaging
from bayesdl.infer.checkpoint import State
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hamiltonian import acceptance
from bayesdl.infer.kernel import Floats, Noise, Point, Statistics, Tuning, ValueAndGrad, choose, column
from bayesdl.infer.method import Work
from bayesdl.infer.sampler import TunedSampler
from bayesdl.infer.target import advance, gradient_at, value_at
from bayesdl.posterior.problem import Problem

OPTIMUM = 2.38
"""Best step size times sqrt(D) on a standard normal in many dimensions (Roberts, Gelman & Gilks, 1997)."""


def random_walk_transition(
    start: Point, noise: Tensor, step: Floats, uniform: Floats, value_and_grad: ValueAndGrad, look: Step = value_at
) -> tuple[Point, Statistics]:
    """Propose ``u' = u + step * noise`` and accept it with probability ``min(1, pi(u') / pi(u))``.

    The proposal is symmetric, so that its density cancels. A rejected chain stays, and its old state counts once more.

    Args:
        start: where the chains stand, ``C`` chains of dimension ``D``.
        noise: ``[C, D]`` standard normal draws.
        step: ``[C]`` standard deviations of the proposal.
        uniform: ``[C]`` draws from U(0, 1), for the decision.
        value_and_grad: the log density; called once.
        look: what is asked of it, ``value_at`` or ``gradient_at``; without a gradient, the ``Point`` keeps the old one.

    Returns:
        The new ``Point`` and, each ``[C]``: ``acceptance`` (the probability), ``log_density``.
    """
    moved = torch.addcmul(start.z, column(step, start.z), noise)
    value, *grad = advance(look, value_and_grad, moved)
    proposal = Point(moved, value.double().cpu(), grad[0] if grad else start.grad)
    with np.errstate(invalid="ignore"):
        probability = acceptance((proposal.value - start.value).numpy())
    point = choose(uniform < probability, proposal, start)
    return point, {"acceptance": probability, "log_density": point.value.numpy()}


@dataclass(frozen=True)
class RandomWalkAdaptation(StepAndMetric):
    """Warm-up that starts from the step size which is best on a standard normal.

    Acceptance is averaged arithmetically throughout: the proposals of a good random walk are mostly hopeless, and a
    harmonic mean would be that of the hopeless ones.
    """

    def pooled(self, accepted: Tensor, *, final: bool) -> Tensor:
        """The arithmetic mean over the chains of every group."""
        return accepted.mean(1)

    def restart(self, state: State, engine: MarkovEngine, guess: Floats) -> State:
        """Dual averaging from ``OPTIMUM / sqrt(D)`` in whitened coordinates."""
        best = OPTIMUM / math.sqrt(state["z"].shape[1])
        return start_averaging(torch.full((engine.groups,), best, dtype=torch.float64))


@dataclass(frozen=True)
class RandomWalk(TunedSampler):
    """Metropolis' algorithm with Gaussian proposals around the present state.

    The proposals have the shape of the metric, which warm-up estimates together with their size. Mixing takes of the
    order of D transitions per effective draw, against D^(1/3) of MALA and D^(1/4) of HMC: this is the yardstick, and
    the sampler for densities whose gradient says nothing.

    An acceptance of 0.234 is best in many dimensions, 0.44 in one (Roberts, Gelman & Gilks, 1997; Gelman, Roberts &
    Gilks, 1996): pass ``target_accept=0.44`` for a single unknown. Mixing hardly depends on it between 0.15 and 0.5.

    The posterior's ``stats``, each ``[C, S]``: acceptance, log_density, step_size.

    Cost: one evaluation of all rows a transition, without its gradient where the density is compiled (except for
    ``metric="low_rank"``, whose estimate needs gradients).

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: draws per chain that are kept.
        thin: transitions per kept draw.
        step_size: standard deviation of the proposals, or None to adapt it.
        target_accept: mean acceptance probability that the step size is adapted to.
        metric: shape of the proposals: "diag", "dense" or "low_rank".
    """

    name: ClassVar[str] = "RandomWalk"
    statistics: ClassVar[tuple[str, ...]] = ("acceptance", "log_density")

    warmup: int = 2000
    draws: int = 2000
    target_accept: float = 0.234

    def work(self, problem: Problem) -> Work:
        """One evaluation a transition."""
        return Work(self.chains, self.warmup + self.draws * self.thin, self.chains * self.draws)

    def adaptation(self) -> Adaptation | None:
        """Dual averaging and windows, unless the step size is given."""
        if self.step_size is not None:
            return None
        return RandomWalkAdaptation(self.warmup, self.target_accept, self.metric)

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One proposal of every chain."""
        look = gradient_at if self.metric == "low_rank" else value_at
        return random_walk_transition(point, noise.normal(), tuning.step, noise.uniform(1)[0], value_and_grad, look)
