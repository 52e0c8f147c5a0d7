"""Warm-up: dual averaging of the step size, and windowed estimation of the metric.

Both are **pooled over the chains of a group** (normally all of them): one step size and one metric serve them all. C
chains bring C times the information of one, which makes short warm-ups possible, and chains that have not yet come
together widen the estimate of the metric instead of narrowing it. After warm-up nothing is adapted, so that the draws
come from one fixed kernel.

Until the last window has closed, dual averaging sees the **harmonic** mean of the chains' acceptance statistics: a
single chain that accepts nothing, far out where the density is steep, pulls the step size down until it moves, where
in the arithmetic mean of many it would be outvoted and stay. In the final stretch it sees the arithmetic mean, whose
target is the documented one.

Sources: dual averaging as in Hoffman & Gelman (2014), section 3.2; windows and regularisation as in the Stan reference
manual, "HMC algorithm parameters" (fast - slow, doubling - fast); the harmonic mean as in ChEES (Hoffman, Radul &
Sountsov, 2021, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bayesdl.infer import windows as window
from bayesdl.infer.checkpoint import State
from bayesdl.infer.hamiltonian import first_step_size
from bayesdl.infer.kernel import Floats, Statistics
from bayesdl.infer.metric import Metric, Shape

if TYPE_CHECKING:
    from bayesdl.infer.engine import MarkovEngine

GAMMA, DELAY, KAPPA = 0.05, 10.0, 0.75
"""Dual averaging: shrinkage towards its centre, iterations that count little, decay of the weights."""
LEAST = 1e-3
"""Acceptance statistic that a chain without any counts with in a harmonic mean."""


class Adaptation(Protocol):
    """What warm-up does to an engine's state."""

    def init(self, state: State, engine: MarkovEngine) -> State:
        """The entries that it adds: step_size ``[G]``, and length ``[G]`` for kernels that have one."""
        ...

    def update(self, state: State, statistics: Statistics, engine: MarkovEngine) -> State:
        """The state after a transition of warm-up, ``state["step"]``, whose statistics these are."""
        ...


class Windows(NamedTuple):
    """When the metric is estimated; the rest of warm-up adapts the step size alone."""

    start: int
    """First transition whose draw enters an estimate."""
    stop: int
    """First transition after the last window."""
    ends: tuple[int, ...]
    """Number of transitions done when each window closes, in increasing order; the last is ``stop``."""


def windows(warmup: int) -> Windows:
    """Stan's schedule: 75 fast, slow windows of 25, 50, 100, ... draws, 50 fast.

    The last slow window takes in what is left where its successor would not fit. Below 150 transitions the three parts
    are 15%, 75% and 10% of warm-up; below 20 the metric is not estimated.
    """
    first, last, size = 75, 50, 25
    if warmup < 20:
        return Windows(warmup, warmup, ())
    if first + size + last > warmup:
        first, last = int(0.15 * warmup), int(0.1 * warmup)
        size = warmup - first - last
    stop, ends, end = warmup - last, [], first
    while end < stop:
        end += size
        size *= 2
        if end + size > stop:
            end = stop
        ends.append(end)
    return Windows(first, stop, tuple(ends))


def start_averaging(step_size: Tensor) -> State:
    """State of dual averaging, centred on ten times ``step_size [G]``.

    The columns of ``averaging [G, 4]``: centre, number of updates, mean error of the acceptance, log of the averaged
    step size.
    """
    log_step = step_size.log()
    zeros = torch.zeros_like(log_step)
    averaging = torch.stack([log_step + math.log(10.0), zeros, zeros, log_step], 1)
    return {"averaging": averaging, "step_size": step_size}


def average(state: State, accepted: Tensor, target: float) -> State:
    """One update of dual averaging.

    With error ``h_t = target - accepted`` and its weighted mean ``H_t``, ``log eps_t = centre - sqrt(t)/GAMMA * H_t``,
    and the average that is used after warm-up weighs it by ``t^-KAPPA`` (Hoffman & Gelman, 2014, eq. 6).

    Args:
        state: as made by ``start_averaging``.
        accepted: ``[G]``, acceptance statistic of the last transition, averaged over the chains of each group.
        target: its wanted mean.

    Returns:
        The changed entries; ``step_size`` is for the next transition.
    """
    centre, count, error, averaged = state["averaging"].unbind(1)
    count = count + 1.0
    weight = 1.0 / (count + DELAY)
    error = (1.0 - weight) * error + weight * (target - accepted)
    log_step = centre - count.sqrt() / GAMMA * error
    weight = count**-KAPPA
    averaged = weight * log_step + (1.0 - weight) * averaged
    return {"averaging": torch.stack([centre, count, error, averaged], 1), "step_size": log_step.exp()}


def averaged_step_size(state: State) -> Tensor:
    """The step sizes ``[G]`` to keep after warm-up."""
    found: Tensor = state["averaging"][:, 3].exp()
    return found


def harmonic_mean(accepted: Tensor) -> Tensor:
    """Harmonic mean over the chains of every group, ``[G, K] -> [G]``."""
    return accepted.clamp(min=LEAST).reciprocal().mean(1).reciprocal()


@dataclass(frozen=True)
class StepAndMetric:
    """Dual averaging of the step size and, in windows, the metric: warm-up of HMC, NUTS and their like.

    Args:
        warmup: transitions.
        target: acceptance statistic that the step size is adapted to.
        shape: of the metric.
    """

    warmup: int
    target: float
    shape: Shape = "diag"

    def init(self, state: State, engine: MarkovEngine) -> State:
        """A first step size, and an empty window."""
        empty = window.start(self.shape, engine.everyone(state["z"]), engine.groups)
        return empty | self.restart(state, engine, np.ones(engine.groups))

    def update(self, state: State, statistics: Statistics, engine: MarkovEngine) -> State:
        """One update; at the end of a window a new metric, at the end of warm-up the averaged step size."""
        plan, done = self.plan(), state["step"] + 1
        accepted = engine.everyone(torch.from_numpy(statistics["acceptance"])).reshape(engine.groups, -1)
        state |= average(state, self.pooled(accepted, final=done > plan.stop), self.target)
        if plan.start < done <= plan.stop:
            metric = Metric.of(state)
            z = engine.everyone(metric.to_z(state["z"]))
            gradient = engine.everyone(metric.push(state["grad"])) if self.shape == "low_rank" else None
            state |= window.extend(self.shape, state, z, gradient, engine.groups)
        if done in plan.ends:
            state = engine.change_metric(state, window.estimate(self.shape, state, engine.begin.dtype))
            state |= window.start(self.shape, engine.everyone(state["z"]), engine.groups)
            state |= self.restart(state, engine, state["step_size"].numpy())
        if done == self.warmup:
            state["step_size"] = averaged_step_size(state)
        return state

    def plan(self) -> Windows:
        """When the metric is estimated."""
        return windows(self.warmup)

    def pooled(self, accepted: Tensor, *, final: bool) -> Tensor:
        """One acceptance statistic per group from those of its chains, ``[G, K] -> [G]``."""
        return accepted.mean(1) if final else harmonic_mean(accepted)

    def restart(self, state: State, engine: MarkovEngine, guess: Floats) -> State:
        """Dual averaging from a new first step size."""
        step = first_step_size(
            engine.point(state), guess, engine.group, engine.noise(state), engine.function(state), engine.everyone
        )
        return start_averaging(torch.from_numpy(step))
