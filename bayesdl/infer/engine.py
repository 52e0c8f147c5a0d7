"""The engine of all Markov chains: noise, transitions, warm-up, and the record of the draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesdl._distributed import Ranks
from bayesdl._rng import derive_seed, generator
from bayesdl.density import LogDensity
from bayesdl.errors import Divergence
from bayesdl.infer.checkpoint import State
from bayesdl.infer.kernel import Noise, Point, Tuning, evaluate
from bayesdl.infer.loop import Engine
from bayesdl.infer.metric import Metric
from bayesdl.infer.record import Record
from bayesdl.infer.target import Target

if TYPE_CHECKING:
    from bayesdl.infer.sampler import Sampler

POINT = ("z", "value", "grad", "momentum")
"""Entries of the state that have a row for every chain of this process."""
RETRIES = 10
"""How often a chain that starts where the density is not finite is given another start."""


@dataclass
class MarkovEngine(Engine):
    """Transitions of all chains, adapted during warm-up, recorded afterwards.

    State: z ``[C, D]`` (whitened), value ``[C]``, grad ``[C, D]`` and for some kernels momentum ``[C, D]`` (the point);
    step_size and length ``[G]``, metric.*, and count, the transitions so far, those of an extended run included (the
    kernel's tuning); what the adaptation adds; draws ``[C, S, D]`` (unconstrained) and statistics ``[K, C, S]`` (see
    ``Record``); normals and uniforms, two generators.

    Attributes:
        sampler: gives the kernel, its adaptation, and how many transitions there are.
        density: the target.
        begin: starting points ``[C, D]``, unconstrained.
        scale: ``[G, D]``, standard deviations as far as the start knows them: the first metric of samplers that adapt
            one.
        seed: seed of the streams; the method's name keeps those of different methods apart.
        restart: whether a start at which the density is not finite may be replaced.
        groups: G; the chains of a group, which stand side by side, share step size and metric.
        rows: batch of its own for every chain, ``[C, B, ...]`` by argument; None if all have the density's own data.
        last: the state, without its record, of a run that is to be extended; then ``sampler.draws`` more are drawn.
        ranks: the processes that the chains of a single group are spread over; the state holds those of this one.
        record: where the draws go.
    """

    sampler: Sampler
    density: LogDensity
    begin: Tensor
    seed: int
    restart: bool = True
    scale: Tensor | None = None
    groups: int = 1
    rows: Mapping[str, Any] | None = None
    last: State | None = None
    ranks: Ranks = field(default_factory=Ranks)
    record: Record = field(default_factory=Record)
    label: str = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the steps and the chains."""
        sampler = self.sampler
        self.label, self.names = sampler.name, sampler.statistics
        if hasattr(sampler, "step_size"):
            self.names = (*self.names, "step_size")
        self.warmup, self.thin = sampler.warmup, sampler.thin
        self.total = self.warmup + sampler.draws * self.thin
        self.chains = len(self.begin)
        self.own = self.ranks.share(self.chains)
        self.group = np.repeat(np.arange(self.groups), self.chains // self.groups)
        self.adaptation = sampler.adaptation()

    def expect(self, calls: int, execution: str | None = None) -> None:
        """Tell the density how many gradients of all chains are to come, so that it may compile itself.

        Args:
            calls: forecast of them; it must depend on the settings alone.
            execution: the way to evaluate, of a run that goes on.
        """
        z, rows = self.begin[self.own], self.rows
        self.density.expect(calls, z, rows, per_chain=rows is not None, execution=execution, fused=True)

    def init(self) -> State:
        """The start, an empty record, fresh generators, and the first tuning; or where an earlier run ended."""
        record = self.record.init(self.begin[self.own], self.names, self.sampler.draws)
        if self.last is not None:
            mine = {name: self.last[name][self.own] for name in POINT if name in self.last}
            return self.last | mine | record
        point = self._finite_start()
        state: State = {
            "z": point.z,
            "value": point.value,
            "grad": point.grad,
            "step_size": torch.full((self.groups,), torch.nan, dtype=torch.float64),
            "length": torch.full((self.groups,), torch.nan, dtype=torch.float64),
            "count": 0,
            **record,
            "normals": generator(self.seed, self.label, "normals", device=point.z.device),
            "uniforms": generator(self.seed, self.label, "uniforms"),
            **self._metric(point.z.new_ones(self.groups, point.z.shape[1])).state(),
        }
        state |= self.sampler.start(state, self)
        if self.adaptation is None:
            return state
        if self.scale is not None:
            state = self.change_metric(state, self._metric(self.scale))
        return state | self.adaptation.init(state, self)

    def step(self, state: State) -> State:
        """One transition of every chain; adaptation in warm-up, a column of the record afterwards."""
        point, statistics = self.sampler.transition(
            self.point(state), self.tuning(state), self.noise(state), self.function(state)
        )
        new = state | {"z": point.z, "value": point.value, "grad": point.grad, "count": state["count"] + 1}
        if point.momentum is not None:
            new["momentum"] = point.momentum
        after = state["step"] + 1 - self.warmup
        if after <= 0:
            return new if self.adaptation is None else self.adaptation.update(new, statistics, self)
        if after % self.thin == 0:
            statistics["step_size"] = self.tuning(state).step
            at = after // self.thin - 1
            values = torch.from_numpy(np.stack([statistics[name] for name in self.names]))
            self.record.add(new, at, Metric.of(state).to_z(point.z), values)
        return new

    def drawn(self, state: State) -> int:
        """How many draws of every chain are recorded."""
        return max(0, (int(state["step"]) - self.warmup) // self.thin)

    def without_record(self, state: State) -> State:
        """What a later run of any number of processes needs to go on from here; its first draw is the next one."""
        rest = Record.without(state)
        rest |= {name: self.everyone(rest[name]) for name in POINT if name in rest}
        return rest | {"step": self.warmup + (state["step"] - self.warmup) % self.thin}

    def status(self, state: State) -> str:
        """Phase, step size and divergences so far."""
        step_size = f"step size {float(state['step_size'].median()):.2g}"
        if state["step"] <= self.warmup:
            return f"warm-up, {step_size}"
        if "divergent" not in self.names:
            return step_size
        found = state["statistics"][self.names.index("divergent"), :, : self.drawn(state)]
        return f"{step_size}, {int(found.sum())} divergences"

    # -- what adaptations use ----------------------------------------------------------------------------------

    def point(self, state: State) -> Point:
        """Where the chains stand."""
        return Point(state["z"], state["value"], state["grad"], state.get("momentum"))

    def tuning(self, state: State) -> Tuning:
        """Step size and length of every chain."""
        mine = self.group[self.own]
        return Tuning(state["step_size"].numpy()[mine], state["length"].numpy()[mine], state["count"])

    def noise(self, state: State) -> Noise:
        """The streams of a transition."""
        return Noise(state["normals"], state["uniforms"], state["z"], self.chains, self.own)

    def function(self, state: State) -> Target:
        """The log density in the whitened coordinates of a state."""
        return Target(Metric.of(state), self.density, self.rows)

    def everyone(self, mine: Tensor) -> Tensor:
        """What all chains of all processes hold, ``[C, ...]``, from what those here do."""
        return self.ranks.gather(mine, self.chains)

    def change_metric(self, state: State, metric: Metric) -> State:
        """The same point in the coordinates of another metric."""
        old = Metric.of(state)
        z, gradient = old.to_z(state["z"]), old.push(state["grad"])
        return state | metric.state() | {"z": metric.to_u(z), "grad": metric.pull(gradient)}

    # -- inside ------------------------------------------------------------------------------------------------

    def _metric(self, scale: Tensor) -> Metric:
        """A diagonal metric in the shape of those that warm-up will find."""
        return Metric.diagonal(scale, "diag" if self.adaptation is None else getattr(self.sampler, "metric", "diag"))

    def _finite_start(self) -> Point:
        """The start, with new prior draws, ever closer to 0, where the density is not finite."""
        target = Target(Metric.diagonal(self.begin.new_ones(1, self.begin.shape[1])), self.density, self.rows)
        point = evaluate(self.begin[self.own], target)
        for attempt in range(RETRIES + 1):
            mine = point.value.isfinite() & point.grad.isfinite().all(-1).cpu()
            good = self.everyone(mine.to(point.z.device)).cpu()
            if good.all():
                return point
            if not self.restart or attempt == RETRIES:
                break
            fresh = self.density.prior_draws(len(good), derive_seed(self.seed, self.label, "restart", attempt))
            z = torch.where(mine.to(point.z.device)[:, None], point.z, fresh[self.own] * 0.5**attempt)
            point = evaluate(z, target)
        again = f", also after {RETRIES} other prior draws" if self.restart else ""
        raise Divergence(
            f"{self.label}: the log density or its gradient is not finite at the start of chains "
            f"{torch.nonzero(~good).flatten().tolist()}{again}. Check that the data lie where the likelihood has "
            "support and that scales are not extreme, or pass init= with values at which the density is finite."
        )
