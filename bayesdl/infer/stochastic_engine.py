"""The engine of all stochastic-gradient samplers: default step sizes, rescues, draws at equal distances of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.checkpoint import State
from bayesdl.infer.curvature import gradient_noise, largest_curvature
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.kernel import ValueAndGrad
from bayesdl.infer.langevin_noise import draw_noise
from bayesdl.infer.loop import Engine
from bayesdl.infer.record import Record
from bayesdl.infer.schedules import as_schedule
from bayesdl.infer.stochastic_gradient import ESTIMATES
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.infer.stochastic import StochasticSampler

FIRST_LOOK = 10
"""Curvature and gradient noise are measured at the start, after 10, 20, 40, ... steps of warm-up, and at its end."""
CHECK_EVERY = 10
"""Steps of warm-up between two looks at whether all numbers are finite; afterwards every stored draw is looked at."""
RESCUES = 20
"""How often warm-up with a default step size may go back and make it smaller."""


class Turn(NamedTuple):
    """What a sampler is given for one step, beside the state.

    Positions, gradients and momenta are in coordinates divided by the prior's standard deviations.
    """

    step_size: float
    """Of this step."""
    gradient: Tensor
    """``[C, D]``, of the log density at ``state["z"]``, with the temperature and the factor N/B already in it."""
    density: ValueAndGrad
    """The log density on the mini-batch that the gradient came from."""
    noise: Callable[[], Tensor]
    """New noise ``[C, D]`` at every call, with mean 0 and variance 1; zero while a schedule explores."""
    warmth: float
    """Share of the warm-up that is done; 1 afterwards, when a sampler learns nothing any more."""
    exploring: bool
    """Whether the schedule explores: no noise, no draws."""


@dataclass
class StochasticEngine(Engine):
    """Steps of all chains; their states at equal distances of time are the draws.

    State: z ``[C, D]``, in units of the prior's sd, and the sampler's own entries beside it; step_size; curvature, from
    which its default is made; gradient_noise ``[D]``, the variance of the mini-batch gradient where it was last
    measured, and heat, its largest entry; anchor ``[C, D]`` and rescues, for going back; draws ``[C, S, D]`` and
    statistics ``[2 + K, C, S]`` (see ``Record``); noise and probe, two generators; order.*, the data order; saga.* or
    svrg.*, the control variate.

    Attributes:
        method: gives the step and its settings.
        problem: the model and its data.
        seed: seed of the streams.
        begin: starting points ``[C, D]``, unconstrained.
        record: where the draws go.
        last: the state, without its record, of a run that is to be extended.
        before: draws of that run, which are counted but not recorded again.
    """

    method: StochasticSampler
    problem: Problem
    seed: int
    begin: Tensor
    record: Record = field(default_factory=Record)
    last: State | None = None
    before: int = 0
    label: str = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive the schedule, the data order, and which steps are recorded."""
        method = self.method
        self.label, self.total = method.name, method.warmup + method.draws * method.thin
        self.names = ("log_density", "step_size", *method.statistics)
        self.unit = self.problem.density.prior_scale
        order = DataOrder(self.problem, method.batch_size, method.chains, self.seed, method.replacement)
        self.batches = order.size is not None
        self.gradient = ESTIMATES[method.gradient if self.batches else "plain"](order, self.on_rows)
        self.schedule = None if method.step_size is None else as_schedule(method.step_size)
        looks = [FIRST_LOOK << k for k in range(64) if FIRST_LOOK << k < method.warmup]
        self.looks = frozenset([0, *looks, method.warmup] if method.looks else [])
        # How far time has come after each step behind warm-up; steps that explore take none.
        sizes = np.ones(self.total - method.warmup)
        if self.schedule is not None:
            steps = range(method.warmup, self.total)
            sizes = np.array([self.schedule(step) * self.schedule.samples(step) for step in steps])
        if not sizes.max() > 0:
            raise MethodError(f"{self.label}: no step behind the warm-up takes draws under {self.schedule}.")
        # In units in which steps of one size take exactly 1: draws of a longer run then come at the same steps.
        times = (sizes / sizes.max()).cumsum()
        wanted = (np.arange(method.draws) + 0.5) * (times[-1] / method.draws)
        self._filled = np.searchsorted(wanted, times, side="right")

    def on_rows(self, u: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The log density ``[C]`` and its gradient ``[C, D]`` on the rows ``[C, B]``, in units of the prior's sd."""
        batch = None if rows is None else self.problem.minibatch(rows)
        value, gradient = self.problem.density.value_and_grad(u * self.unit, batch, per_chain=batch is not None)
        return value, gradient.mul_(self.unit)  # in place: it was made for us

    def expect(self, execution: str | None = None) -> None:
        """Tell the density how many gradients on mini-batches are to come, so that it may compile itself.

        Args:
            execution: the way to evaluate, of a run that goes on.
        """
        size = self.gradient.order.size
        rows = None if size is None else torch.arange(size).expand(len(self.begin), size)
        batch = None if rows is None else self.problem.minibatch(rows)
        density = self.problem.density
        density.expect(self.total, self.begin, batch, per_chain=batch is not None, execution=execution)

    def drawn(self, step: int) -> int:
        """How many draws are recorded once ``step`` steps are done."""
        return int(self._filled[step - self.method.warmup - 1]) if step > self.method.warmup else 0

    def init(self) -> State:
        """The start, an empty record, fresh generators; the first step sets the default step size."""
        record = self.record.init(self.begin, self.names, self.method.draws - self.before)
        if self.last is not None:
            return self.last | record
        begin = self.begin / self.unit
        state = {
            "z": begin,
            "anchor": begin,
            "step_size": math.nan if self.schedule is None else self.schedule(0),
            "curvature": 0.0,
            "gradient_noise": torch.zeros_like(begin[0]),
            "heat": 0.0,
            "rescues": 0,
            **record,
            "noise": generator(self.seed, self.label, "noise", device=begin.device),
            "probe": generator(self.seed, self.label, "probe", device=begin.device),
            **self.gradient.order.init(),
        }
        return self._started(state)

    def step(self, state: State) -> State:
        """One step of every chain; the state that it starts from is recorded where its time has come."""
        step, new = state["step"], dict(state)
        value, gradient, density = self.gradient.estimate(new)
        first, last = self.drawn(step), self.drawn(step + 1)
        warm = step < self.method.warmup
        if (last > first or step in self.looks or (warm and step % CHECK_EVERY == 0)) and not value.isfinite().all():
            return self._rescue(new, value)
        if step in self.looks:
            self._look(new, density)
        exploring = False
        if self.schedule is not None:
            new["step_size"], exploring = self.schedule(step), not self.schedule.samples(step)
        if last > first:
            observed = self.method.observe(state)
            found = [value, *(observed[name] for name in self.method.statistics)]
            rows = torch.stack([row.to("cpu", torch.float64) for row in found])
            rows = torch.cat([rows[:1], torch.full_like(rows[:1], new["step_size"]), rows[1:]])
            for at in range(first, last):
                self.record.add(new, at - self.before, state["z"] * self.unit, rows)

        def noise() -> Tensor:
            z = state["z"]
            return torch.zeros_like(z) if exploring else draw_noise(self.method.noise, z, state["noise"])

        warmth = step / self.method.warmup if warm else 1.0
        turn = Turn(new["step_size"], gradient, density, noise, warmth, exploring)
        return new | self.method.move(new, turn)

    def status(self, state: State) -> str:
        """Phase and step size."""
        phase = "warm-up, " if state["step"] <= self.method.warmup else ""
        return f"{phase}step size {state['step_size']:.2g}"

    def _started(self, state: State) -> State:
        """The state with what belongs to chains that start at its z."""
        state |= self.gradient.init(state)
        return state | self.method.begin(
            state["z"],
            lambda: draw_noise(self.method.noise, state["z"], state["noise"]),
            lambda: self.gradient.estimate(state)[1],
        )

    def _look(self, state: State, density: ValueAndGrad) -> None:
        z, scale = state["z"], self.method.scale(state)

        def behind(function: ValueAndGrad) -> ValueAndGrad:
            """The density as the sampler sees it behind its preconditioner."""
            if scale is None:
                return function

            def scaled(w: Tensor) -> tuple[Tensor, Tensor]:
                value, gradient = function(w * scale)
                return value, gradient * scale

            return scaled

        w = z if scale is None else z / scale
        if self.batches and self.method.gradient == "plain":
            compared = self.method.batches_compared
            state["gradient_noise"] = gradient_noise(w, lambda: behind(self.gradient.next_batch(state)), compared)
            state["heat"] = float(state["gradient_noise"].max())
        if self.schedule is not None:
            return
        stiffest = largest_curvature(w, behind(density), state["probe"])
        stiffest = max(stiffest, state["heat"] / self.method.tolerated)
        if math.isfinite(stiffest):
            # Memory, because where the chains happen to stand at this look may be flatter than where they go next.
            state["curvature"] = max(stiffest, state["curvature"] / 2.0)
            state["anchor"] = z
        if not state["curvature"] > 0.0:
            raise Divergence(
                f"{self.label}: the curvature at the start is {stiffest}, so there is no default step size; pass "
                "step_size= or another init."
            )
        state["step_size"] = self.method.default_step(state["curvature"])

    def _rescue(self, state: State, value: Tensor) -> State:
        """Back to the last good point with a smaller step, if this is warm-up with a default step size."""
        step = state["step"]
        if self.schedule is None and 0 < step < self.method.warmup and state["rescues"] < RESCUES:
            curvature = 2.0 * state["curvature"]
            back = {"z": state["anchor"], "curvature": curvature, "rescues": state["rescues"] + 1}
            return self._started(state | back | {"step_size": self.method.default_step(curvature)})
        lost = torch.nonzero(~value.isfinite()).flatten().tolist()
        raise Divergence(
            f"{self.label}: the log density of chains {lost} left the finite numbers at step {step} of {self.total} "
            f"(step size {state['step_size']:.3g}). Use a smaller step_size, a longer warmup with step_size=None, or "
            "init= with values at which the density is finite."
        )
