"""The engine of Gaussian variational inference: one step of stochastic gradient ascent, for every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import Divergence
from bayesdl.infer.checkpoint import State
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.gaussian_families import Family
from bayesdl.infer.gaussian_objective import Objective, PathObjective
from bayesdl.infer.loop import Engine
from bayesdl.infer.optimisers import ascend, slots_like
from bayesdl.infer.row_noise import RowNoiseObjective
from bayesdl.infer.schedules import Cosine, Schedule, as_schedule
from bayesdl.infer.score_objective import ScoreObjective
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.infer.gaussian_vi import GaussianVI

OBJECTIVES: dict[str, type[Objective]] = {
    "sticking": PathObjective,
    "reparameterisation": PathObjective,
    "local": RowNoiseObjective,
    "flipout": RowNoiseObjective,
    "score": ScoreObjective,
}
"""Estimators of the gradient by name."""


@dataclass
class GaussianEngine(Engine):
    """One gradient estimate and one update of Adam a step.

    State: parameters ``[P]``, the mean ``[D]`` and then the family's spread; average ``[P]`` over the last quarter;
    slot.* ``[P]``; trace ``[2, total]``, the bound's estimates and their standard errors; noise, the generator of the
    draws; order.*, the data order.

    Attributes:
        method: the settings.
        problem: the model and its data.
        random: which coordinates are Gaussian, booleans ``[D]``; the others are points.
        family: of the random coordinates.
        seed: seed of the streams.
        begin: the parameters to start from.
    """

    method: GaussianVI
    problem: Problem
    random: Tensor
    family: Family
    seed: int
    begin: Callable[[], Tensor]
    label: str = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive the data order, the schedules, and what is maximised."""
        method = self.method
        self.label, self.total = method.name, method.steps
        self.order = DataOrder(self.problem, method.batch_size, 1, self.seed)
        rate = method.learning_rate
        self.schedule = rate if isinstance(rate, Schedule) else Cosine(rate, self.total)
        self.kl_weight = as_schedule(method.kl_weight, "kl_weight")
        kind = OBJECTIVES[method.estimator]
        self.objective = kind(method, self.problem, self.random, self.family, self.order.size)

    def expect(self) -> None:
        """Tell the density how many gradients are to come, so that it may compile itself."""
        self.objective.expect(self.total)

    def init(self) -> State:
        """The start, zero moments, fresh generators."""
        parameters = self.begin()
        state: State = {
            "parameters": parameters,
            "average": parameters,
            "trace": parameters.new_full((2, self.total), math.nan),
            "noise": generator(self.seed, self.label, "noise", device=parameters.device),
        }
        return state | self.slots(parameters) | self.order.init()

    def step(self, state: State) -> State:
        """Draw, take the gradient, move, average."""
        step = state["step"]
        batch, moved = self._next_batch(state)
        noise = self.objective.noise(self.method.samples, state["noise"])
        log_weights, gradient = self.objective.estimate(state["parameters"], noise, batch, self.weight(state))
        bound, error = self.objective.bound(log_weights)
        if not bound.isfinite():  # a gradient that is not finite makes the next one so
            raise self.diverged(step)
        new = state | moved | self.move(state, gradient)
        new["trace"][0, step], new["trace"][1, step] = bound, error
        tail = step + 1 - self.total * 3 // 4
        new["average"] = state["average"].lerp(new["parameters"], 1 / tail) if tail > 1 else new["parameters"]
        return new

    def status(self, state: State) -> str:
        """The latest estimate of the bound."""
        return f"ELBO {float(state['trace'][0, max(state['step'] - 1, 0)]):.5g}"

    def diverged(self, step: int) -> Divergence:
        """The error to raise when the bound is not finite."""
        rate = self.schedule(min(step, self.total - 1))
        return Divergence(
            f"{self.label}: the ELBO left the finite numbers at step {step} of {self.total} (learning rate "
            f"{rate:.3g}); try learning_rate={rate / 10:.1g}, a smaller initial_scale, or check the data's scale."
        )

    def weight(self, state: State) -> float:
        """Of the KL in this step."""
        return self.kl_weight(state["step"])

    # -- how the parameters move -------------------------------------------------------------------------------

    def slots(self, parameters: Tensor) -> State:
        """What ``move`` keeps in the state."""
        return slots_like("adam", parameters)

    def move(self, state: State, gradient: Tensor) -> State:
        """The parameters and slots after one update uphill along a gradient ``[P]``."""
        step, parameters = state["step"], state["parameters"]
        moved, slots = ascend("adam", parameters, gradient, state, step, self.schedule(step))
        return slots | {"parameters": moved}

    # -- inside ------------------------------------------------------------------------------------------------

    def _next_batch(self, state: State) -> tuple[dict[str, Any] | None, State]:
        rows, moved = self.order.next(state)
        return None if rows is None else self.problem.minibatch(rows[0]), moved
