"""What HMC and NUTS share: the engine that refreshes momenta, makes transitions, adapts, and records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesdl._rng import derive_seed, generator
from bayesdl.density import LogDensity
from bayesdl.errors import Divergence
from bayesdl.infer import adaptation
from bayesdl.infer.checkpoint import State
from bayesdl.infer.hamiltonian import Point, ValueAndGrad, evaluate, first_step_size
from bayesdl.infer.loop import Engine, Run
from bayesdl.infer.starts import start
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem

Statistics: TypeAlias = dict[str, NDArray[np.float64]]
Transition: TypeAlias = Callable[
    [Point, Tensor, float, Tensor, torch.Generator, ValueAndGrad], tuple[Point, Statistics]
]
"""``(point, momentum [C, D], step size, scale [D], generator, value_and_grad) -> (point, statistics, each [C])``."""

RETRIES = 10
"""How often a chain that starts where the density is not finite is given another start."""
STUCK = 20
"""Draws after which a chain that has accepted nothing at all is an error."""


@dataclass
class HamiltonianEngine(Engine):
    """Transitions of all chains, adapted during warm-up, recorded afterwards.

    State: z ``[C, D]``, value ``[C]``, grad ``[C, D]`` (the point); step_size and scale ``[D]`` (the kernel);
    averaging, window_count, window_mean, window_squares (see adaptation.py); draws ``[C, S, D]`` and statistics
    ``[K, C, S]`` (the record); momentum and choice, two generators.

    Attributes:
        label: the method's name; it also keeps the random streams of different methods apart.
        density: the target.
        begin: starting points ``[C, D]``.
        transition: one step of the Markov chain.
        names: the K statistics that the transition returns, in the order of the record.
        warmup: transitions that adapt and are not recorded.
        draws: transitions that are recorded.
        step_size: fixed size in units of the unconstrained parameters (then nothing is adapted), or None.
        target_accept: acceptance statistic that the step size is adapted to.
        seed: seed of the streams.
        restart: whether a start at which the density is not finite may be replaced.
    """

    label: str
    density: LogDensity
    begin: Tensor
    transition: Transition
    names: tuple[str, ...]
    warmup: int
    draws: int
    step_size: float | None
    target_accept: float
    seed: int
    restart: bool = True
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the steps and plan the windows."""
        self.total = self.warmup + self.draws
        self.windows = adaptation.windows(self.warmup)

    def init(self) -> State:
        """The start, a first step size, an empty record, fresh generators."""
        point = self._finite_start()
        chains, dim = point.z.shape
        state: State = {
            "z": point.z,
            "value": point.value,
            "grad": point.grad,
            "scale": torch.ones_like(point.z[0]),
            "draws": point.z.new_zeros((chains, self.draws, dim)),
            "statistics": torch.zeros((len(self.names), chains, self.draws), dtype=torch.float64),
            "momentum": generator(self.seed, self.label, "momentum", device=point.z.device),
            "choice": generator(self.seed, self.label, "choice"),
        }
        state |= adaptation.start_window(point.z)
        if self.step_size is None:
            return state | self._restart_averaging(state, 1.0)
        return state | adaptation.start_averaging(self.step_size)

    def step(self, state: State) -> State:
        """One transition of every chain; adaptation in warm-up, a column of the record afterwards."""
        z, scale, step_size = state["z"], state["scale"], state["step_size"]
        momentum = torch.randn(z.shape, generator=state["momentum"], dtype=z.dtype, device=z.device)
        point, statistics = self.transition(
            Point(z, state["value"], state["grad"]),
            momentum,
            step_size,
            scale,
            state["choice"],
            self.density.value_and_grad,
        )
        new = state | {"z": point.z, "value": point.value, "grad": point.grad}
        if state["step"] < self.warmup:
            return self._adapt(new, float(statistics["acceptance"].mean())) if self.step_size is None else new
        statistics["step_size"] = np.full(len(z), step_size)
        column = state["step"] - self.warmup
        new["draws"][:, column] = point.z
        new["statistics"][:, :, column] = torch.from_numpy(np.stack([statistics[name] for name in self.names]))
        return new

    def status(self, state: State) -> str:
        """Phase, step size and divergences so far."""
        drawn = state["step"] - self.warmup
        step_size = f"step size {state['step_size']:.2g}"
        if drawn <= 0:
            return f"warm-up, {step_size}"
        divergences = int(state["statistics"][self.names.index("divergent"), :, :drawn].sum())
        return f"{step_size}, {divergences} divergences"

    def _adapt(self, state: State, accepted: float) -> State:
        done = state["step"] + 1
        state |= adaptation.average(state, accepted, self.target_accept)
        if self.windows.start < done <= self.windows.stop:
            state |= adaptation.extend_window(state, state["z"])
        if done in self.windows.ends:
            state["scale"] = adaptation.window_scale(state).to(state["scale"].dtype)
            state |= adaptation.start_window(state["z"]) | self._restart_averaging(state, state["step_size"])
        if done == self.warmup:
            state["step_size"] = adaptation.averaged_step_size(state)
        return state

    def _restart_averaging(self, state: State, guess: float) -> State:
        point = Point(state["z"], state["value"], state["grad"])
        size = first_step_size(point, state["scale"], guess, state["momentum"], self.density.value_and_grad)
        return adaptation.start_averaging(size)

    def _finite_start(self) -> Point:
        """The start, with new prior draws, ever closer to 0, where the density is not finite."""
        point = evaluate(self.begin, self.density.value_and_grad)
        for attempt in range(RETRIES + 1):
            good = point.value.isfinite() & point.grad.isfinite().all(-1).cpu()
            if good.all():
                return point
            if not self.restart or attempt == RETRIES:
                break
            fresh = self.density.prior_draws(len(good), derive_seed(self.seed, self.label, "restart", attempt))
            z = torch.where(good.to(point.z.device)[:, None], point.z, fresh * 0.5**attempt)
            point = evaluate(z, self.density.value_and_grad)
        again = f", also after {RETRIES} other prior draws" if self.restart else ""
        raise Divergence(
            f"{self.label}: the log density or its gradient is not finite at the start of chains "
            f"{torch.nonzero(~good).flatten().tolist()}{again}. Check that the data lie where the likelihood has "
            "support and that scales are not extreme, or pass init= with values at which the density is finite."
        )


def sample(engine: HamiltonianEngine, problem: Problem, run: Run) -> DrawsPosterior:
    """Drive an engine and wrap the draws that it reached.

    Raises:
        Divergence: a chain accepted nothing at all after warm-up.
        KeyboardInterrupt: interrupted before the first draw.
    """
    state = run.drive(engine, problem.density)
    drawn = state["step"] - engine.warmup
    if drawn < 1:
        raise run.too_early("the first draw after warm-up")
    record = dict(zip(engine.names, state["statistics"][:, :, :drawn].clone(), strict=True))
    stuck = torch.nonzero(record["acceptance"].amax(1) == 0).flatten().tolist()
    if drawn >= STUCK and stuck:
        raise Divergence(
            f"{engine.label}: chains {stuck} accepted nothing after warm-up (step size {state['step_size']:.3g}). Use "
            "a longer warmup, a smaller step, or another init; a hierarchical model may need a non-centred form."
        )
    divergences = int(record["divergent"].sum())
    info = {"step_size": state["step_size"], "divergences": divergences, "warmup": engine.warmup}
    return DrawsPosterior(problem, state["draws"][:, :drawn].clone(), record, info)


def begin(problem: Problem, run: Run, chains: int) -> Tensor:
    """Starting points ``[C, D]``; prior draws unless the caller asks for something else."""
    return start(problem, run, chains, default="prior").to(problem.density.dtype)
