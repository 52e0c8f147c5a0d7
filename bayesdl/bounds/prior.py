"""The prior of a bound, learnt: a network that keeps its accuracy while its weights tremble."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.infer.checkpoint import State
from bayesdl.infer.gaussian_objective import Objective
from bayesdl.infer.loop import Run
from bayesdl.infer.optimise import MAP
from bayesdl.infer.training import OptimiserEngine
from bayesdl.infer.variational import MeanFieldVI
from bayesdl.infer.variational_engine import OBJECTIVES
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class UnderNoise(MAP):
    """Maximises the expected log density of ``z + sd e``, e standard normal, over z: MAP of a network with noise.

    It is variational inference with a spread that is fixed. What a Gaussian prior promises is the risk of its draws and
    not that of its mean; trained for them, the mean bears a wider prior, under which the posterior moves at a smaller
    price.

    Args:
        share: sd, as a share of that of the model's prior.
        gradients: gives estimator and number of draws.
    """

    share: float = 0.1
    gradients: MeanFieldVI = field(default_factory=MeanFieldVI)

    def engine(
        self, problem: Problem, run: Run, members: int, begin: Callable[[], Tensor], held_out: dict[str, Any] | None
    ) -> OptimiserEngine:
        """See the base class."""
        assert members == 1
        return UnderNoiseEngine(self, problem, run.seed, members, begin, held_out)


@dataclass
class UnderNoiseEngine(OptimiserEngine):
    """Training with gradients of variational inference.

    State besides that of training: noise, the generator of the draws.
    """

    method: UnderNoise

    def __post_init__(self) -> None:
        """Make what gives the gradients."""
        super().__post_init__()
        density, inner = self.problem.density, self.method.gradients
        everything = torch.ones(density.dim, dtype=torch.bool, device=density.device)
        kind, family = OBJECTIVES[inner.estimator], inner.family(density)
        self.objective: Objective = kind(inner, self.problem, everything, family, self.order.size)
        self.log_sd = (self.method.share * density.prior_scale).log()
        self.density = self.objective.density
        self.objective.expect(self.total)

    def init(self) -> State:
        """Also a fresh generator."""
        state = super().init()
        return state | {"noise": generator(self.seed, self.label, "noise", device=state["z"].device)}

    def estimate(self, state: State) -> tuple[Tensor, Tensor, State]:
        """By draws."""
        rows, moved = self.order.next(state)
        batch = None if rows is None else self.problem.minibatch(rows[0])
        noise = self.objective.noise(self.method.gradients.samples, state["noise"])
        bound, gradient = self.objective.estimate(torch.cat([state["z"][0], self.log_sd]), noise, batch)
        return bound.mean()[None], gradient[None, : len(self.log_sd)], moved
