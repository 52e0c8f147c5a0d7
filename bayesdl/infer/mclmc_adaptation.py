"""Warm-up of microcanonical Langevin Monte Carlo: step size, metric, and length, pooled over chains.

**Step size.** With an accept step, dual averaging of the acceptance. Without, dual averaging of

    log(D * energy_variance / (mean over chains of the mean square energy change of a step)) / 6

to 0: then the variance of the energy change per dimension is the one asked for (Robnik et al., 2023, section 5).

**Metric.** The windows of ``bayesdl.infer.adaptation``.

**Length.** The root of the trace of the whitened covariance is that of D, which at speed sqrt(D) is a time of 1: the
length after the first window, when whitening begins. Before, it is the root mean square of the prior's scales, at most
1. At the end of every later window it is multiplied by ``sqrt(0.3 tau)``, where tau is the autocorrelation time in
transitions, averaged over the coordinates. (Robnik, Cohn-Gordon & Seljak, 2025, section 4, take 0.3 tau transitions. A
walk in steps of length l along a direction of standard deviation s has tau = 3 (s / l)^2; so the root makes the new
length 0.95 s, whatever the old one was, and can be repeated.) tau is estimated from the means of consecutive batches of
each chain: chains that are held by different modes do not lengthen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl.infer.adaptation import StepAndMetric, start_averaging
from bayesdl.infer.checkpoint import State
from bayesdl.infer.kernel import Floats, Statistics
from bayesdl.infer.metric import Metric

if TYPE_CHECKING:
    from bayesdl.density import LogDensity
    from bayesdl.infer.engine import MarkovEngine

WHITENED = 1.0
"""Length when whitening begins: the root of the trace of the whitened covariance, at speed sqrt(D)."""
TRANSITIONS = 0.3
"""The inverse of the autocorrelation time, in transitions, that is aimed at."""
BATCH = 8
"""Transitions whose mean enters the autocorrelation time."""
MOST = 2.0
"""By which factor a window changes the length at most, either way."""
ORDER = 6
"""The variance of a step's energy change grows with this power of its size."""
DAMPING = 0.2
"""Errors of the logarithm of the step size, times this, are about as large as those of an acceptance."""


def first_length(density: LogDensity) -> float:
    """Length before anything but the prior is known."""
    return min(float(density.prior_scale.double().square().mean().sqrt()), WHITENED)


def empty_batches(z: Tensor, groups: int) -> State:
    """No batch yet, of the chains ``z [C, D]``.

    The rows of ``batch [3, C, D]``: sum and sum of squares of the batch that is being filled, mean of the one before.
    Those of ``batches [2, G, D]``: squared differences of consecutive means, and variances within, added up.
    """
    return {
        "batch": z.new_zeros(3, *z.shape, dtype=torch.float64),
        "batches": z.new_zeros(2, groups, z.shape[1], dtype=torch.float64),
        "batch.count": 0,
    }


def add_to_batches(state: State, z: Tensor, groups: int) -> State:
    """The entries of ``empty_batches`` after one more transition, to ``z [C, D]``."""
    sums, squares, before = state["batch"]
    z, count, batches = z.double(), state["batch.count"] + 1, state["batches"]
    sums, squares = sums + z, squares + z.square()
    if count % BATCH == 0:
        mean = sums / BATCH
        within = (squares - BATCH * mean.square()) / (BATCH - 1)
        if count > BATCH:
            parts = torch.stack([(mean - before).square(), within])
            batches = batches + parts.reshape(2, groups, -1, z.shape[1]).mean(2)
        sums, squares, before = torch.zeros_like(sums), torch.zeros_like(sums), mean
    return {"batch": torch.stack([sums, squares, before]), "batches": batches, "batch.count": count}


def autocorrelation_time(batches: Tensor) -> Tensor:
    """Autocorrelation time in transitions ``[G]``, averaged over the coordinates; NaN if there is no batch yet.

    Half of B times the mean square difference of the means of consecutive batches of B, over the variance within them.
    """
    between, within = batches
    found: Tensor = (0.5 * BATCH * between / within).nanmean(1)
    return found


@dataclass(frozen=True)
class MicrocanonicalAdaptation(StepAndMetric):
    """Step size, metric and length of ``MCLMC``.

    Args:
        length: None to adapt it.
    """

    length: float | None = None

    def init(self, state: State, engine: MarkovEngine) -> State:
        """The first step size, an empty window, and no batches."""
        return super().init(state, engine) | self.no_batches(state, engine)

    def update(self, state: State, statistics: Statistics, engine: MarkovEngine) -> State:
        """One update; at the end of a window a new length, from what it held."""
        if self.length is None:
            state |= self.lengthen(state, engine)
        return super().update(state, statistics, engine)

    def lengthen(self, state: State, engine: MarkovEngine) -> State:
        """The entries that hold the length and what it is made from."""
        plan, done, new = self.plan(), state["step"] + 1, {}
        if plan.start < done <= plan.stop:
            new = add_to_batches(state, engine.everyone(Metric.of(state).to_z(state["z"])), engine.groups)
        if done in plan.ends:
            change = (TRANSITIONS * autocorrelation_time(new["batches"])).sqrt().nan_to_num(1.0)
            length = state["length"] * change.clamp(1.0 / MOST, MOST).cpu()
            new = {"length": torch.full_like(length, WHITENED) if done == plan.ends[0] else length}
            new |= self.no_batches(state, engine)
        return new

    def no_batches(self, state: State, engine: MarkovEngine) -> State:
        """Empty batches, if the length is adapted."""
        return {} if self.length is not None else empty_batches(engine.everyone(state["z"]), engine.groups)


@dataclass(frozen=True)
class UnadjustedAdaptation(MicrocanonicalAdaptation):
    """The same for chains without an accept step, whose step size comes from the energy.

    Args:
        energy_variance: wanted mean square of a step's energy change, per dimension.
    """

    energy_variance: float = 5e-4

    def update(self, state: State, statistics: Statistics, engine: MarkovEngine) -> State:
        """One update."""
        wanted = self.energy_variance * state["z"].shape[1]
        return super().update(state, statistics | {"acceptance": statistics["energy_change"] ** 2 / wanted}, engine)

    def pooled(self, accepted: Tensor, *, final: bool) -> Tensor:
        """By how much the logarithm of the step size is too small, from the energy's variance over the wanted one."""
        missing = -accepted.mean(1).clamp(min=torch.finfo(accepted.dtype).tiny).log() / ORDER
        return DAMPING * missing.clamp(-1.0, 1.0)

    def restart(self, state: State, engine: MarkovEngine, guess: Floats) -> State:
        """Dual averaging centred on the first step size itself: nothing here holds back chains that go too far."""
        return start_averaging(super().restart(state, engine, guess)["step_size"] / 10.0)
