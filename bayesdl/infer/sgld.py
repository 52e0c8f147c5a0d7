"""Stochastic-gradient Langevin dynamics (Welling & Teh, 2011, eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import Divergence
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.curvature import gradient_noise, largest_curvature
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.loop import Engine, Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.schedules import Schedule, as_schedule
from bayesdl.infer.starts import start
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem

COURANT = 1.0
"""Default step size times the largest curvature; 4 is the limit of stability."""
FIRST_LOOK = 10
"""The default step size is set anew after 10, 20, 40, ... steps of warm-up and at its end."""
CHECK_EVERY = 10
"""Steps of warm-up between two looks at whether all numbers are finite; afterwards every stored draw is looked at."""
RESCUES = 20
"""How often warm-up with a default step size may go back and halve it."""


def sgld_step(z: Tensor, gradient: Tensor, noise: Tensor, step_size: float) -> Tensor:
    """``z + step_size/2 gradient + sqrt(step_size) noise``.

    On N(0, 1) with exact gradients the stationary variance is 1/(1 - step_size/4).

    Args:
        z: ``[C, D]``.
        gradient: ``[C, D]`` of the log density, with temperature and the factor N/B already in it.
        noise: ``[C, D]`` standard normal.
        step_size: in units of z squared.
    """
    return torch.add(z, gradient, alpha=0.5 * step_size).add_(noise, alpha=math.sqrt(step_size))


@dataclass(frozen=True)
class SGLD(Method):
    """Langevin dynamics with full or mini-batch gradients and no accept step.

    It moves in coordinates divided by the prior's standard deviations (where the prior is Gaussian), a constant
    preconditioner that does not change the target: a network's layers come to one scale. Each step adds half the step
    size times the gradient of the log density, and noise whose variance is the step size. The stationary law is biased
    by O(step_size): along a direction of curvature a its variance is
    ``(1/a) (1 + step_size V/4) / (1 - step_size a/4)``, with V the gradient's variance over independent mini-batches.

    Mini-batches are drawn **without replacement** within an epoch, for each chain its own: their errors cancel over the
    epoch, so slow directions feel far less of V than the formula says. Rows that do not fill the last batch of an epoch
    are left out of it. The factor N/B and the temperature come with the gradient, from the log density alone.

    ``step_size=None`` sets ``1 / max(lambda, V/4)``, with lambda the largest curvature (power iteration on gradient
    differences, largest over the chains) and V the largest gradient variance of a coordinate, at the start and again
    after 10, 20, 40, ... steps of warm-up and at its end; it at most doubles at each and is constant afterwards. The
    variance along the stiffest direction is then about a third too large, that along others less. Should warm-up
    explode, it goes back to its last good point with half the step.

    Under a schedule the states are weighted by their step sizes, as they must be: the draws are taken at equal
    distances of Langevin time (the sum of step sizes), so that the posterior's draws have equal weights.

    The posterior's ``stats``, each ``[C, S]``: log_density (an estimate, with mini-batches), step_size.

    Args:
        chains: chains C.
        warmup: steps per chain before the first draw.
        draws: states per chain that are kept.
        thin: steps per kept draw.
        step_size: a number, a Schedule (of the step number, warm-up included), or None; in units of the prior's
            variance.
        batch_size: rows in a mini-batch; None takes all rows.
    """

    name: ClassVar[str] = "SGLD"

    chains: int = 4
    warmup: int = 5000
    draws: int = 1000
    thin: int = 50
    step_size: float | Schedule | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, chains=self.chains, draws=self.draws, thin=self.thin)
        check.whole_or_none(self.name, batch_size=self.batch_size)
        check.whole(self.name, at_least=0, warmup=self.warmup)
        if self.step_size is not None:
            check.rate(self.name, step_size=self.step_size)

    def work(self, problem: Problem) -> Work:
        """One gradient of all chains a step."""
        return Work(self.chains, self.warmup + self.draws * self.thin, self.chains * self.draws)

    def _fit(self, problem: Problem, run: Run) -> DrawsPosterior:
        begin = start(problem, run, self.chains, default="prior").to(problem.density.dtype)
        engine = SGLDEngine(self, problem, run.seed, begin)
        state = run.drive(engine, problem.density)
        drawn = engine.drawn(state["step"])
        if drawn < 1:
            raise run.too_early("the first draw after warm-up")
        record = dict(zip(engine.names, state["statistics"][:, :, :drawn].clone(), strict=True))
        info = {"step_size": state["step_size"], "warmup": self.warmup, "thin": self.thin}
        return DrawsPosterior(problem, state["draws"][:, :drawn].clone(), record, info)


@dataclass
class SGLDEngine(Engine):
    """Steps of all chains; their states at equal distances of Langevin time are the draws.

    State: z ``[C, D]``, in units of the prior's sd; step_size; curvature, from which the default is made; anchor
    ``[C, D]`` and rescues, for going back; draws ``[C, S, D]`` and statistics ``[2, C, S]``, the record; noise and
    probe, two generators; order.*, the data order.
    """

    method: SGLD
    problem: Problem
    seed: int
    begin: Tensor
    label: str = field(init=False)
    total: int = field(init=False)

    names: ClassVar[tuple[str, ...]] = ("log_density", "step_size")

    def __post_init__(self) -> None:
        """Derive the schedule, the data order, and which steps are recorded."""
        method = self.method
        self.label, self.total = method.name, method.warmup + method.draws * method.thin
        self.unit = self.problem.density.prior_scale
        self.order = DataOrder(self.problem, method.batch_size, method.chains, self.seed)
        self.schedule = None if method.step_size is None else as_schedule(method.step_size)
        looks = [FIRST_LOOK << k for k in range(64) if FIRST_LOOK << k < method.warmup]
        self.looks = frozenset([0, *looks, method.warmup] if self.schedule is None else [])
        steps = range(method.warmup, self.total)
        sizes = np.ones(len(steps)) if self.schedule is None else np.array([self.schedule(step) for step in steps])
        times = sizes.cumsum()
        self._filled = np.searchsorted((np.arange(method.draws) + 0.5) / method.draws * times[-1], times, side="right")

    def drawn(self, step: int) -> int:
        """How many draws are recorded once ``step`` steps are done."""
        return int(self._filled[step - self.method.warmup - 1]) if step > self.method.warmup else 0

    def init(self) -> State:
        """The start, an empty record, fresh generators; the first step sets the default step size."""
        chains, dim = self.begin.shape
        begin = self.begin / self.unit
        return {
            "z": begin,
            "anchor": begin,
            "step_size": math.nan if self.schedule is None else self.schedule(0),
            "curvature": 0.0,
            "rescues": 0,
            "draws": self.begin.new_zeros((chains, self.method.draws, dim)),
            "statistics": torch.zeros((len(self.names), chains, self.method.draws), dtype=torch.float64),
            "noise": generator(self.seed, self.label, "noise", device=self.begin.device),
            "probe": generator(self.seed, self.label, "probe", device=self.begin.device),
            **self.order.init(),
        }

    def step(self, state: State) -> State:
        """One step of every chain; the state that it starts from is recorded where its time has come."""
        step, new = state["step"], dict(state)
        gradient_of = self._batch(new)
        value, gradient = gradient_of(state["z"])
        first, last = self.drawn(step), self.drawn(step + 1)
        warm = step < self.method.warmup
        if (last > first or step in self.looks or (warm and step % CHECK_EVERY == 0)) and not value.isfinite().all():
            return self._rescue(new, value)
        if step in self.looks:
            self._look(new, gradient_of)
        if self.schedule is not None:
            new["step_size"] = self.schedule(step)
        if last > first:
            new["draws"][:, first:last] = (state["z"] * self.unit)[:, None]
            new["statistics"][0, :, first:last] = value[:, None]
            new["statistics"][1, :, first:last] = new["step_size"]
        z = state["z"]
        noise = torch.randn(z.shape, generator=state["noise"], dtype=z.dtype, device=z.device)
        new["z"] = sgld_step(z, gradient, noise, new["step_size"])
        return new

    def status(self, state: State) -> str:
        """Phase and step size."""
        phase = "warm-up, " if state["step"] <= self.method.warmup else ""
        return f"{phase}step size {state['step_size']:.2g}"

    def _batch(self, state: State) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The log density on the next mini-batches; the data order in ``state`` moves on."""
        rows, moved = self.order.next(state)
        state.update(moved)
        batch = None if rows is None else self.problem.minibatch(rows)

        def gradient_of(u: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = self.problem.density.value_and_grad(u * self.unit, batch, per_chain=batch is not None)
            return value, gradient * self.unit

        return gradient_of

    def _look(self, state: State, gradient_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        z = state["z"]
        stiffest = largest_curvature(z, gradient_of, state["probe"])
        if self.order.size is not None:
            stiffest = max(stiffest, gradient_noise(z, lambda: self._batch(state)) / 4.0)
        if math.isfinite(stiffest):
            # Memory, because where the chains happen to stand at this look may be flatter than where they go next.
            state["curvature"] = max(stiffest, state["curvature"] / 2.0)
            state["anchor"] = z
        if not state["curvature"] > 0.0:
            raise Divergence(
                f"{self.label}: the curvature at the start is {stiffest}, so there is no default step size; pass "
                "step_size= or another init."
            )
        state["step_size"] = COURANT / state["curvature"]

    def _rescue(self, state: State, value: Tensor) -> State:
        """Back to the last good point with half the step, if this is warm-up with a default step size."""
        step = state["step"]
        if self.schedule is None and 0 < step < self.method.warmup and state["rescues"] < RESCUES:
            return state | {
                "z": state["anchor"],
                "step_size": state["step_size"] / 2.0,
                "curvature": state["curvature"] * 2.0,
                "rescues": state["rescues"] + 1,
            }
        lost = torch.nonzero(~value.isfinite()).flatten().tolist()
        raise Divergence(
            f"{self.label}: the log density of chains {lost} left the finite numbers at step {step} of {self.total} "
            f"(step size {state['step_size']:.3g}). Use a smaller step_size, a longer warmup with step_size=None, or "
            "init= with values at which the density is finite."
        )
