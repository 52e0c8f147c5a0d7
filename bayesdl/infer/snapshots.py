"""Posteriors from one trajectory of training: iterates that are kept on the way, and snapshot ensembles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Run
from bayesdl.infer.optimise import Training, as_posterior
from bayesdl.infer.schedules import Cyclical, Schedule
from bayesdl.infer.training import TrainingEngine
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem


@dataclass
class SnapshotEngine(TrainingEngine):
    """Training that keeps the latest of the iterates it reaches every so many updates.

    State besides that of training: snapshots ``[M, K, D]``, oldest first.

    Attributes:
        first: updates before the first interval.
        every: updates in an interval; its last iterate is kept.
        most: snapshots that are kept at most; older ones are forgotten.
    """

    first: int = 0
    every: int = 1
    most: int = 1

    def init(self) -> State:
        """Also no snapshots."""
        state = super().init()
        return state | {"snapshots": state["z"].new_empty(self.members, 0, state["z"].shape[1])}

    def step(self, state: State) -> State:
        """One update, and a snapshot at the end of an interval."""
        new = super().step(state)
        count = self.taken(state["step"] + 1)
        return new | self.keep(new, count) if count > self.taken(state["step"]) else new

    def taken(self, steps: int) -> int:
        """Snapshots after so many updates, those included that are forgotten."""
        return max(0, steps - self.first) // self.every

    def keep(self, state: State, count: int) -> State:
        """The entries of the state that change with snapshot number ``count``, counted from 1."""
        return {"snapshots": torch.cat([state["snapshots"], state["z"].unsqueeze(1)], 1)[:, -self.most :]}


@dataclass(frozen=True)
class SnapshotEnsemble(Training):
    """An ensemble for the price of one training: a member at the end of each cycle of the learning rate.

    The learning rate runs through ``cycles`` cosines, each from ``learning_rate`` towards 0 (Huang et al., 2017, eq. 2,
    with a restart before the first update of a cycle); each restart throws the network out of the mode that it has
    reached. Members are less different than those of a ``DeepEnsemble``, since each starts where the last one ended:
    after short cycles they lie in the same mode. Like any ensemble it is an equal mixture of modes, not a sample from
    the posterior, and on a model with one mode all members are the same.

    Args:
        cycles: members; ``steps`` is divided among them, and rounded up so that all cycles have the same length.
        learning_rate: at the start of each cycle, a number.
    """

    name: ClassVar[str] = "SnapshotEnsemble"

    cycles: int = 5

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, cycles=self.cycles)
        if isinstance(self.learning_rate, Schedule):
            raise MethodError(f"{self.name} has a schedule of its own: learning_rate must be a number.")
        if self.epochs is None and self.steps < self.cycles:
            raise MethodError(f"{self.name}(steps={self.steps}, cycles={self.cycles}): a cycle takes a step at least.")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        engine = CyclicalEngine(self, problem, run.seed, 1, self.begin(problem, run, 1))
        state = run.drive(engine, problem.density)
        if engine.taken(state["step"]) == 0:
            raise run.too_early("the end of the first cycle")
        return as_posterior(problem, state["snapshots"][0], engine.report(state), self.target, self.batch_size)


@dataclass
class CyclicalEngine(SnapshotEngine):
    """Training in cycles, with a snapshot at the end of each."""

    method: SnapshotEnsemble

    def __post_init__(self) -> None:
        """Cut the steps into cycles."""
        super().__post_init__()
        cycles, rate = self.method.cycles, self.method.learning_rate
        assert not isinstance(rate, Schedule)  # the method refuses one
        schedule = Cyclical(rate, max(self.total, cycles), cycles)
        self.schedule, self.every, self.most = schedule, schedule.length, cycles
        self.total = schedule.length * cycles
