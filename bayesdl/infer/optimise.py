"""Maximum likelihood and MAP: members side by side in one ``[M, D]`` buffer, each with its own data order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.density.log_density import Target
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.lbfgs import LBFGSEngine
from bayesdl.infer.loop import Engine, Run
from bayesdl.infer.method import Method
from bayesdl.infer.optimisers import OPTIMISERS, slots_like, update
from bayesdl.infer.schedules import Cosine, Schedule
from bayesdl.infer.starts import start
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem

AVERAGES = (None, "polyak", "ema")
EMA_DECAY = 0.999
CHECK_EVERY = 10  # steps between two looks at the validation rows, where a step sees all rows
TRACE = 200  # points of the loss curve that are kept in ``posterior.info``


@dataclass(frozen=True)
class Optimiser(Method):
    """Settings and engine of the methods that look for a maximum.

    The loss is -(log joint) / N, with N the number of rows, so that a learning rate suits small and large data alike.
    It is minimised in unconstrained coordinates; for MAP the density is the one in the constrained space (no Jacobian),
    so the mode is that of p(theta | y).

    Args:
        steps: updates of each member; with ``"lbfgs"`` iterations of each member.
        epochs: passes through the rows; replaces ``steps`` if given.
        batch_size: rows in a mini-batch, drawn without replacement, the last incomplete one of an epoch left out; None
            or at least N takes all rows.
        optimizer: "adam", "rmsprop", "sgd" (momentum 0.9), or "lbfgs" (full batch, members one by one). Weight decay is
            no setting: the prior is what decays weights.
        learning_rate: a number, from which a cosine falls to zero over the run, or a Schedule.
        clip_norm: largest norm of a member's gradient of the loss; longer ones are shortened to it.
        validation: fraction of the rows that are not trained on; the values with the least negative log likelihood on
            them are returned.
        patience: looks at the validation rows without improvement after which a member stops; a look is taken once an
            epoch, or every 10 steps with full batches.
        average: "polyak" returns the mean of the iterates of the second half (Polyak & Juditsky, 1992), "ema" their
            exponential mean with decay 0.999 and the start's weight removed; None returns the last iterate.
    """

    tempered: ClassVar[bool] = False
    takes_parameters: ClassVar[bool] = True
    target: ClassVar[Target] = "joint"

    steps: int = 2000
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: str = "adam"
    learning_rate: float | Schedule = 0.02
    clip_norm: float | None = None
    validation: float | None = None
    patience: int = 20
    average: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, steps=self.steps, epochs=self.epochs, batch_size=self.batch_size, patience=self.patience)
        check.one_of(self.name, (*OPTIMISERS, "lbfgs"), optimizer=self.optimizer)
        check.one_of(self.name, AVERAGES, average=self.average)
        check.rate(self.name, learning_rate=self.learning_rate)
        if self.clip_norm is not None:
            check.positive(self.name, clip_norm=self.clip_norm)
        if self.validation is not None:
            check.fraction(self.name, validation=self.validation)
        if self.optimizer == "lbfgs":
            given = {name: getattr(self, name) for name in ("epochs", "batch_size", "clip_norm", "validation", "average")}
            wrong = [name for name, value in given.items() if value is not None]
            if wrong:
                raise MethodError(f"{self.name}(optimizer='lbfgs') uses all rows at every step; {wrong} must stay None.")

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        if self.validation is not None and not density.factorised:
            return "early stopping needs a log likelihood per row; use validation=None"
        return super().applies_to(density)

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        z, info = self.optimise(problem, run, members=1)
        return as_posterior(problem, z, info, self.target)

    def optimise(self, problem: Problem, run: Run, members: int) -> tuple[Tensor, dict[str, Any]]:
        """Train members side by side.

        Returns:
            Their values ``[M, D]`` in unconstrained coordinates, and what to tell of the run.

        Raises:
            Divergence: a member's loss or gradient is not finite.
        """

        def begin() -> Tensor:
            return start(problem, run, members, default="network", batch_size=self.batch_size)

        training, held_out = self._split(problem, run)
        engine: Engine
        if self.optimizer == "lbfgs":
            engine = LBFGSEngine(self.name, problem, self.target, self.steps, begin)
            note = {"members_in_parallel": members == 1}
        else:
            engine = OptimiserEngine(self, training, held_out, run.seed, members, begin)
            note = {"members_in_parallel": True}
        state = run.drive(engine, training.density)
        return engine.result(state), note | engine.report(state)

    def _split(self, problem: Problem, run: Run) -> tuple[Problem, dict[str, Any] | None]:
        """The rows to train on, and the held-out rows as a batch."""
        if self.validation is None:
            return problem, None
        count = round(self.validation * problem.n)
        if not 1 <= count < problem.n:
            raise MethodError(
                f"{self.name}(validation={self.validation}): that leaves {problem.n - count} of {problem.n} rows to train "
                f"on and {count} to validate with; both need at least one."
            )
        order = torch.randperm(problem.n, generator=generator(run.seed, "validation"))
        return problem.restrict(order[count:].sort().values), problem.minibatch(order[:count].sort().values)


@dataclass(frozen=True)
class MaximumLikelihood(Optimiser):
    """Maximises the likelihood alone; priors only give the start of what the network does not initialise."""

    name: ClassVar[str] = "MaximumLikelihood"
    target: ClassVar[Target] = "likelihood"


@dataclass(frozen=True)
class MAP(Optimiser):
    """Maximises log p(theta, y): standard training, the prior being the regulariser (weight decay for a normal prior)."""

    name: ClassVar[str] = "MAP"


@dataclass
class OptimiserEngine(Engine):
    """One update of all members at once; every state entry has the member's dimension first.

    State: z ``[M, D]`` the iterate; slot.* ``[M, D]`` the optimiser's moments; average ``[M, D]``; best ``[M, D]`` and
    best_loss ``[M]`` on the validation rows; stale ``[M]`` looks without improvement; active ``[M]`` not yet stopped;
    trace ``[M, total]`` the losses; order.* the data order.
    """

    method: Optimiser
    problem: Problem
    held_out: dict[str, Any] | None
    seed: int
    members: int
    begin: Callable[[], Tensor]
    label: str = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive the data order, the number of steps and the learning rates."""
        method = self.method
        self.label = method.name
        self.order = DataOrder(self.problem, method.batch_size, self.members, self.seed)
        self.total = method.steps if method.epochs is None else method.epochs * self.order.batches
        rate = method.learning_rate
        self.schedule = rate if isinstance(rate, Schedule) else Cosine(rate, self.total)
        self.look_every = self.order.batches if self.order.batches > 1 else CHECK_EVERY

    def init(self) -> State:
        """The members' starts, zero moments, fresh data orders."""
        z = self.begin()
        state: State = {"z": z, "trace": z.new_full((self.members, self.total), math.nan)}
        state |= slots_like(self.method.optimizer, z) | self.order.init()
        if self.method.average:
            state["average"] = z.clone()
        if self.held_out is not None:
            state["best"] = z.clone()
            state["best_loss"] = z.new_full((self.members,), math.inf)
            state["stale"] = torch.zeros(self.members, dtype=torch.int64)
            state["active"] = torch.ones(self.members, dtype=torch.bool)
        return state

    def step(self, state: State) -> State:
        """One update; stopped members stay as they are."""
        step, n = state["step"], self.problem.density.n or 1
        batch, moved = self.order.next(state)
        value, gradient = self.problem.density.value_and_grad(
            state["z"], batch, target=self.method.target, per_chain=batch is not None
        )
        loss, gradient = -value / n, -gradient / n
        rate = self.schedule(step)
        self._require_finite(loss, gradient, step, rate)
        if self.method.clip_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient = gradient * (self.method.clip_norm / norm).clamp(max=1.0)
        direction, slots = update(self.method.optimizer, gradient, state, step)
        if self.held_out is not None:
            direction = direction * state["active"].unsqueeze(1)
        new = state | moved | slots | {"z": state["z"] - rate * direction}
        new["trace"][:, step] = loss
        if self.method.average:
            new["average"] = state["average"].lerp(new["z"], self._weight(step))
        if self.held_out is not None and (step + 1) % self.look_every == 0:
            new |= self._look(new)
        return new

    def done(self, state: State) -> bool:
        """After all steps, or when every member has stopped."""
        return bool(state["step"] >= self.total or (self.held_out is not None and not state["active"].any()))

    def status(self, state: State) -> str:
        """The mean loss of the members."""
        return f"loss {float(state['trace'][:, max(state['step'] - 1, 0)].mean()):.4g}"

    def result(self, state: State) -> Tensor:
        """The values to return: the best on the validation rows, the average, or the last."""
        if self.held_out is not None and bool(state["best_loss"].isfinite().all()):
            return state["best"]  # type: ignore[no-any-return]  # a state's values are typed Any
        return state.get("average", state["z"])  # type: ignore[no-any-return]  # as above

    def report(self, state: State) -> dict[str, Any]:
        """Steps taken, the loss curve (thinned), and the validation loss."""
        taken = state["step"]
        info: dict[str, Any] = {"steps": taken, "loss_trace": thinned(state["trace"][:, :taken])}
        if self.held_out is not None:
            info["validation_nll"] = state["best_loss"].tolist()
        return info

    def _weight(self, step: int) -> float:
        """Weight of the newest iterate w_1, w_2, ... in the average: a mean of iterates, in which the start has none."""
        if self.method.average == "ema":
            return (1 - EMA_DECAY) / (1 - EMA_DECAY ** (step + 1))
        return 1 / max(step + 1 - self.total // 2, 1)

    def _look(self, state: State) -> State:
        """Evaluate the candidates on the validation rows and keep the best; members without progress stop."""
        candidate = state.get("average", state["z"])
        loss = -self.problem.density.log_likelihood(candidate, self.held_out).mean(-1)
        better = state["active"] & (loss < state["best_loss"])
        stale = torch.where(better, 0, state["stale"] + 1)
        return {
            "best": torch.where(better.unsqueeze(1), candidate, state["best"]),
            "best_loss": torch.where(better, loss, state["best_loss"]),
            "stale": stale,
            "active": state["active"] & (stale < self.method.patience),
        }

    def _require_finite(self, loss: Tensor, gradient: Tensor, step: int, rate: float) -> None:
        finite = loss.isfinite() & gradient.isfinite().all(1)
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
            f"{self.label}: {who} left the finite numbers at step {step} of {self.total} (loss {loss[members[0]]:.4g}); "
            f"{cause}."
        )


def thinned(trace: Tensor) -> list[list[float]]:
    """At most TRACE evenly spaced points of each row, as numbers for JSON."""
    every = max(1, math.ceil(trace.shape[1] / TRACE))
    return trace[:, ::every].tolist()  # type: ignore[no-any-return]  # tolist gives Any


def as_posterior(problem: Problem, z: Tensor, info: dict[str, Any], target: Target) -> DrawsPosterior:
    """Members ``[M, D]`` as a posterior of M chains of one draw each."""
    value = problem.density.log_density(z, target=target)
    return DrawsPosterior(problem, z.unsqueeze(1), {"log_joint": value.unsqueeze(1)}, info)


def find_mode(problem: Problem, run: Run, chains: int, batch_size: int | None = None) -> Tensor:
    """A short MAP for every chain, ``[chains, D]``, for engines that start near a mode."""
    return MAP(steps=500, batch_size=batch_size, learning_rate=0.05).optimise(problem, run, chains)[0]
