"""The engines of the optimising methods: one update of all members at once in one ``[M, D]`` buffer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayesdl.density.log_density import Batch
from bayesdl.errors import Divergence
from bayesdl.infer.checkpoint import State
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.loop import Engine
from bayesdl.infer.optimisers import AdamStep, ascend, slots_like
from bayesdl.infer.schedules import Cosine, Schedule
from bayesdl.infer.stochastic_gradient import ESTIMATES, PlainGradient
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.infer.optimise import Optimiser, Training

EMA_DECAY = 0.999
CHECK_EVERY = 10  # steps between two looks at the validation rows, where a step sees all rows
TRACE = 200  # points of a curve that are kept in ``posterior.info``


@dataclass
class TrainingEngine(Engine):
    """Stochastic gradient descent on -(log density) / N for all members; every state entry has the members first.

    State: z ``[M, D]`` the iterate; slot.* ``[M, D]`` the optimiser's moments; trace ``[M, total]`` the losses; order.*
    the data order.

    What another method does otherwise is one of ``data_order``, ``batch``, ``value_and_grad``, ``estimate`` and
    ``rate``.
    """

    method: Training
    problem: Problem
    seed: int
    members: int
    begin: Callable[[], Tensor]
    own_batches: ClassVar[bool] = True  # every member has rows of its own
    label: str = field(init=False)
    total: int = field(init=False)
    _announced: set[int | None] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        """Derive the data order, the number of steps and the learning rates."""
        method = self.method
        self.label = method.name
        self.density = self.problem.density
        self.order = self.data_order()
        self.total = method.steps if method.epochs is None else method.epochs * self.order.batches
        rate = method.learning_rate
        self.schedule = rate if isinstance(rate, Schedule) else Cosine(rate, self.total)

    def data_order(self) -> DataOrder:
        """Which rows come when."""
        return DataOrder(self.problem, self.method.batch_size, self.members, self.seed)

    def init(self) -> State:
        """The members' starts, zero moments, fresh data orders."""
        z = self.begin()
        state: State = {"z": z, "trace": z.new_full((self.members, self.total), math.nan)}
        return state | slots_like(self.method.optimizer, z) | self.order.init()

    def batch(self, state: State, rows: Tensor | None) -> Batch | None:
        """The arguments of the program for a step, members first: those of the rows ``[M, B]``; None for all rows."""
        return None if rows is None else self.problem.minibatch(rows)

    def value_and_grad(self, z: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """What is maximised, ``[M]``, and its gradient ``[M, D]``."""
        per_chain = batch is not None and self.own_batches
        return self.density.value_and_grad(z, batch, target=self.method.target, per_chain=per_chain)

    def on_rows(self, state: State, z: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """``value_and_grad`` on the rows ``[M, B]``, or on all of them."""
        batch, size = self.batch(state, rows), None if rows is None else rows.shape[1]
        if size not in self._announced:  # so that the density may compile itself
            calls = self.total // self.order.batches if size is None else self.total
            per_chain = batch is not None and self.own_batches
            self.density.expect(calls, z, batch, target=self.method.target, per_chain=per_chain)
            self._announced.add(size)
        return self.value_and_grad(z, batch)

    def estimate(self, state: State) -> tuple[Tensor, Tensor, State]:
        """What is maximised, on the next mini-batch, ``[M]``; the direction to go; and what changes in the state."""
        rows, moved = self.order.next(state)
        return *self.on_rows(state, state["z"], rows), moved

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.schedule(step)

    def update(self, state: State, rate: float) -> tuple[Tensor, Tensor, State]:
        """What is maximised ``[M]`` and the sum of its gradient ``[M]`` before an update; and what that changes."""
        n = self.problem.density.n or 1
        value, gradient, moved = self.estimate(state)
        if self.method.clip_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True) / n
            gradient = gradient * (self.method.clip_norm / norm).clamp(max=1.0)
        z, slots = ascend(self.method.optimizer, state["z"], gradient, state, state["step"], rate, times=n)
        return value, gradient.sum(1), moved | slots | {"z": z}

    def step(self, state: State) -> State:
        """One update of every member."""
        step = state["step"]
        rate = self.rate(step)
        value, slope, changed = self.update(state, rate)
        loss = value / -(self.problem.density.n or 1)
        self._require_finite(loss, slope, step, rate)
        new = state | changed
        new["trace"][:, step] = loss
        return new

    def status(self, state: State) -> str:
        """The mean loss of the members."""
        return f"loss {float(state['trace'][:, max(state['step'] - 1, 0)].mean()):.4g}"

    def result(self, state: State) -> Tensor:
        """The values to return, ``[M, D]``."""
        values: Tensor = state["z"]
        return values

    def report(self, state: State) -> dict[str, Any]:
        """Steps taken, and the loss curve (thinned)."""
        taken = state["step"]
        return {"steps": taken, "loss_trace": thinned(state["trace"][:, :taken])}

    def _require_finite(self, loss: Tensor, slope: Tensor, step: int, rate: float) -> None:
        finite = (loss + slope).isfinite()  # a sum of finite numbers is finite, but for overflow
        if bool(finite.all()):
            return
        members = [k for k, ok in enumerate(finite.tolist()) if not ok]
        who = f"member {members} of {self.members}" if self.members > 1 else "the fit"
        cause = (
            "the start itself has no finite density: check the data's scale and the prior, or pass init="
            if step == 0
            else f"the learning rate was {rate:.3g}: try {rate / 10:.1g}, or clip_norm=1.0"
        )
        raise Divergence(
            f"{self.label}: {who} left the finite numbers at step {step} of {self.total} "
            f"(loss {loss[members[0]]:.4g}); {cause}."
        )


@dataclass
class OptimiserEngine(TrainingEngine):
    """Training that may average its iterates, and stop early by rows that it does not see.

    State besides that of training: average ``[M, D]``; best ``[M, D]`` and best_loss ``[M]`` on the validation rows;
    stale ``[M]`` looks without improvement; active ``[M]`` not yet stopped.
    """

    method: Optimiser
    held_out: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Also say when to look at the validation rows."""
        super().__post_init__()
        self.look_every = self.order.batches if self.order.batches > 1 else CHECK_EVERY

    def init(self) -> State:
        """Also the average, and the best so far."""
        state = super().init()
        z = state["z"]
        if self.method.average:
            state["average"] = z.clone()
        if self.held_out is not None:
            state["best"] = z.clone()
            state["best_loss"] = z.new_full((self.members,), math.inf)
            state["stale"] = torch.zeros(self.members, dtype=torch.int64, device=z.device)
            state["active"] = torch.ones(self.members, dtype=torch.bool, device=z.device)
        return state | self._variate(state).init(state)

    def update(self, state: State, rate: float) -> tuple[Tensor, Tensor, State]:
        """Compiled along with the gradient, where that is compiled."""
        if not self._fuses:
            return super().update(state, rate)
        rows, moved = self.order.next(state)
        batch, names = self.batch(state, rows), ("slot.first", "slot.second")
        given = (state["z"], *(state[name] for name in names))
        step = self.density.fused(
            AdamStep(self.problem.density.n or 1),
            given,
            (AdamStep.settings(state["z"], state["step"], rate),),
            batch,
            target=self.method.target,
            per_chain=batch is not None,
        )
        value, slope, z, *slots = step(*given)
        return value, slope, moved | {"z": z} | dict(zip(names, slots, strict=True))

    @cached_property
    def _fuses(self) -> bool:
        """Whether the density compiles itself, and nothing but its gradient and Adam is in a step."""
        method, size = self.method, self.order.size
        # A subclass may have a gradient of its own.
        if type(self) is not OptimiserEngine or method.optimizer != "adam" or method.clip_norm is not None:
            return False
        if method.gradient != "plain" and size is not None:
            return False
        batch = None
        if size is not None:
            batch = self.problem.minibatch(torch.arange(size).expand(self.members, size))
        z = torch.zeros(self.members, self.density.dim, dtype=self.density.dtype, device=self.density.device)
        self._announced.add(size)
        way = self.density.expect(self.total, z, batch, target=method.target, per_chain=batch is not None, fused=True)
        return way == "compile"

    def estimate(self, state: State) -> tuple[Tensor, Tensor, State]:
        """With the method's control variate."""
        changed = dict(state)
        value, gradient, _ = self._variate(state).estimate(changed)
        return value, gradient, changed

    def step(self, state: State) -> State:
        """One update; stopped members stay as they are."""
        step, new = state["step"], super().step(state)
        if self.held_out is not None:
            new["z"] = torch.where(state["active"].unsqueeze(1), new["z"], state["z"])
        if self.method.average:
            new["average"] = state["average"].lerp(new["z"], self._weight(step))
        if self.held_out is not None and (step + 1) % self.look_every == 0:
            new |= self._look(new)
        return new

    def done(self, state: State) -> bool:
        """After all steps, or when every member has stopped."""
        return bool(state["step"] >= self.total or (self.held_out is not None and not state["active"].any()))

    def result(self, state: State) -> Tensor:
        """The values to return: the best on the validation rows, the average, or the last."""
        if self.held_out is not None and bool(state["best_loss"].isfinite().all()):
            best: Tensor = state["best"]
            return best
        return self._candidate(state)

    def report(self, state: State) -> dict[str, Any]:
        """Also the validation loss."""
        info = super().report(state)
        if self.held_out is not None:
            info["validation_nll"] = state["best_loss"].tolist()
        return info

    def _variate(self, state: State) -> PlainGradient:
        kind = self.method.gradient if self.order.size is not None else "plain"
        return ESTIMATES[kind](self.order, partial(self.on_rows, state))

    def _candidate(self, state: State) -> Tensor:
        """The values that would be returned if the run ended here."""
        values: Tensor = state["average" if self.method.average else "z"]
        return values

    def _weight(self, step: int) -> float:
        """Weight of the newest of the iterates w_1, w_2, ... in their average; the start has none."""
        if self.method.average == "ema":
            return (1 - EMA_DECAY) / (1 - EMA_DECAY ** (step + 1))
        return 1 / max(step + 1 - self.total // 2, 1)

    def _look(self, state: State) -> State:
        """Evaluate the candidates on the validation rows and keep the best; members without progress stop."""
        candidate = self._candidate(state)
        loss = -self.problem.density.log_likelihood(candidate, self.held_out).mean(-1)
        better = state["active"] & (loss < state["best_loss"])
        stale = torch.where(better, 0, state["stale"] + 1)
        return {
            "best": torch.where(better.unsqueeze(1), candidate, state["best"]),
            "best_loss": torch.where(better, loss, state["best_loss"]),
            "stale": stale,
            "active": state["active"] & (stale < self.method.patience),
        }


def thinned(trace: Tensor) -> list[list[float]]:
    """At most TRACE evenly spaced points of each row, as numbers for JSON."""
    every = max(1, math.ceil(trace.shape[1] / TRACE))
    points: list[list[float]] = trace[:, ::every].tolist()
    return points
