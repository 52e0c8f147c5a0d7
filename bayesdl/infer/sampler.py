"""What all full-batch samplers share: chains, warm-up, draws, and the fit that drives their engine."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bayesdl.errors import Divergence
from bayesdl.infer import method as check
from bayesdl.infer.adaptation import Adaptation, StepAndMetric
from bayesdl.infer.checkpoint import State
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.kernel import Noise, Point, Statistics, Tuning, ValueAndGrad
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method
from bayesdl.infer.metric import SHAPES, Shape
from bayesdl.infer.starts import start
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem

STUCK = 20
"""Draws after which a chain that has accepted nothing at all is an error."""


@dataclass(frozen=True)
class Sampler(Method):
    """A Markov chain over all rows of the data; a subclass gives its kernel.

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: transitions per chain that are kept.
        thin: transitions per kept draw.
    """

    statistics: ClassVar[tuple[str, ...]]
    """Names of what ``transition`` tells; ``step_size`` is recorded beside them."""

    chains: int = 4
    warmup: int = 1000
    draws: int = 1000
    thin: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, chains=self.chains, draws=self.draws, thin=self.thin)
        check.whole(self.name, at_least=0, warmup=self.warmup)

    @abstractmethod
    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One transition of every chain (see kernel.py)."""

    def adaptation(self) -> Adaptation | None:
        """What warm-up learns; None where there is nothing to learn."""
        return None

    def start(self, state: State, engine: MarkovEngine) -> State:
        """Entries of the engine's first state that the kernel needs beside the point."""
        return {}

    def _fit(self, problem: Problem, run: Run) -> DrawsPosterior:
        engine = MarkovEngine(
            sampler=self,
            density=problem.density,
            begin=start(problem, run, self.chains, default="prior").to(problem.density.dtype),
            seed=run.seed,
            restart=run.init in (None, "prior"),
        )
        return collect(engine, problem, run)


@dataclass(frozen=True)
class TunedSampler(Sampler):
    """A sampler with a step size and a metric that warm-up adapts (see ``bayesdl.infer.adaptation``).

    Args:
        step_size: None to adapt it, together with the metric; a given one is used as it is, with the metric 1, and
            warm-up only burns in.
        target_accept: mean acceptance statistic that the step size is adapted to.
        metric: "diag", "dense" (D^2 numbers; for strong correlations in up to some hundred dimensions) or "low_rank"
            (diagonal plus a few directions).
    """

    step_size: float | None = None
    target_accept: float = 0.8
    metric: Shape = "diag"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.fraction(self.name, target_accept=self.target_accept)
        check.one_of(self.name, SHAPES, metric=self.metric)
        if self.step_size is not None:
            check.positive(self.name, step_size=self.step_size)

    def adaptation(self) -> Adaptation | None:
        """Dual averaging and windows, unless the step size is given."""
        return None if self.step_size is not None else StepAndMetric(self.warmup, self.target_accept, self.metric)

    def start(self, state: State, engine: MarkovEngine) -> State:
        """The given step size."""
        return {} if self.step_size is None else {"step_size": torch.full_like(state["step_size"], self.step_size)}


def collect(engine: MarkovEngine, problem: Problem, run: Run) -> DrawsPosterior:
    """Drive an engine and wrap the draws that it reached.

    Raises:
        Divergence: a chain accepted nothing at all after warm-up.
        KeyboardInterrupt: interrupted before the first draw.
    """
    state = run.drive(engine, problem.density)
    drawn = engine.drawn(state)
    if drawn < 1:
        raise run.too_early("the first draw after warm-up")
    record = dict(zip(engine.names, state["statistics"][:, :, :drawn].clone(), strict=True))
    sizes = state["step_size"]
    if "acceptance" in record:
        stuck = torch.nonzero(record["acceptance"].amax(1) == 0).flatten().tolist()
        if drawn >= STUCK and stuck:
            raise Divergence(
                f"{engine.label}: chains {stuck} accepted nothing after warm-up (step size {float(sizes[0]):.3g}). Use "
                "a longer warmup, a smaller step, or another init; a hierarchical model may need a non-centred form."
            )
    info: dict[str, Any] = {"warmup": engine.warmup, "thin": engine.thin}
    if sizes.isfinite().all():
        info["step_size"] = float(sizes[0])
    if state["length"].isfinite().all():
        info["length"] = float(state["length"][0])
    if "divergent" in record:
        info["divergences"] = int(record["divergent"].sum())
    return DrawsPosterior(problem, state["draws"][:, :drawn].clone(), record, info)
