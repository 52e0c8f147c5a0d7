"""What all full-batch samplers share: chains, warm-up, draws, and the fit that drives their engine."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._distributed import Ranks
from bayesdl.errors import Divergence
from bayesdl.infer import method as check
from bayesdl.infer.adaptation import Adaptation, StepAndMetric
from bayesdl.infer.checkpoint import State, pack, unpack
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.kernel import Noise, Point, Statistics, Tuning, ValueAndGrad
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method
from bayesdl.infer.metric import SHAPES, Shape
from bayesdl.infer.record import Record
from bayesdl.infer.starts import start_and_scale
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem, same_shapes

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

    streams: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]]
    """Names of what ``transition`` tells; ``step_size`` is recorded beside them by samplers that have one."""

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
        return self._sample([problem], run)[0]

    def _extend(self, posterior: DrawsPosterior, run: Run) -> DrawsPosterior:
        last = unpack(posterior.last or {})
        engine = MarkovEngine(
            sampler=self,
            density=posterior.problem.density,
            begin=last["z"],
            seed=run.seed,
            last=last,
            ranks=run.ranks,
            record=Record.after(posterior, run, last["z"], self.draws),
        )
        engine.expect(self.work(posterior.problem).calls, posterior.info["execution"])
        return collect(engine, [posterior.problem], run)[0]

    def _fit_each(self, problems: list[Problem], run: Run) -> list[Posterior]:
        """Problems whose arguments have the same shapes run as groups of one batch of chains."""
        found: dict[int, DrawsPosterior] = {}
        for n, members in enumerate(_alike(problems)):
            stage = run if n == 0 else replace(run.stage(f"shapes {n}"), init=run.init)
            found |= zip(members, self._sample([problems[k] for k in members], stage), strict=True)
        return [found[k] for k in range(len(problems))]

    def _sample(self, problems: list[Problem], run: Run) -> list[DrawsPosterior]:
        groups, first = len(problems), problems[0]
        rows = None if groups == 1 else _stacked(problems, self.chains)
        begin, scale = start_and_scale(first, run, self.chains * groups, rows=rows, groups=groups)
        begin = begin.to(first.density.dtype)
        engine = MarkovEngine(
            sampler=self,
            density=first.density,
            begin=begin,
            scale=scale,
            seed=run.seed,
            restart=run.init in (None, "prior", "pathfinder"),
            groups=groups,
            rows=rows,
            ranks=run.ranks if groups == 1 else Ranks(),
            record=Record.of(first, run, begin, self.draws),
        )
        engine.expect(self.work(first).calls)
        return collect(engine, problems, run)


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


def collect(engine: MarkovEngine, problems: list[Problem], run: Run) -> list[DrawsPosterior]:
    """Drive an engine and wrap the draws that it reached, one posterior a group.

    Raises:
        Divergence: a chain accepted nothing at all after warm-up.
        KeyboardInterrupt: interrupted before the first draw.
    """
    state = run.drive(engine, engine.density)
    # Processes that were interrupted at different steps agree on the draws that all of them have.
    mine = engine.drawn(state)
    drawn = min(count for (count,) in engine.ranks.numbers([mine]))
    if drawn < 1:
        raise run.too_early("the first draw after warm-up")
    statistics = engine.everyone(state["statistics"][:, :, :drawn].transpose(0, 1).contiguous()).transpose(0, 1)
    chains = engine.chains // engine.groups
    posteriors: list[DrawsPosterior] = []
    for k, problem in enumerate(problems):
        group = slice(k * chains, (k + 1) * chains)
        record = dict(zip(engine.names, statistics[:, group].clone(), strict=True))
        info: dict[str, Any] = {"warmup": engine.warmup, "thin": engine.thin, "execution": engine.density.execution}
        info |= {name: float(state[name][k]) for name in ("step_size", "length") if state[name][k].isfinite()}
        if "divergent" in record:
            info["divergences"] = int(record["divergent"].sum())
        if engine.groups > 1:
            posteriors.append(DrawsPosterior(problem, state["draws"][group, :drawn].clone(), record, info))
        else:
            posteriors.append(engine.record.posterior(problem, state, mine, record, info, engine.everyone, drawn))
            posteriors[0].last = pack(engine.without_record(state))
    _refuse_stuck(posteriors, engine.label, run.keep_stuck)
    return posteriors


def _refuse_stuck(posteriors: list[DrawsPosterior], label: str, keep: bool) -> None:
    for k, posterior in enumerate(posteriors):
        acceptance = posterior.stats.get("acceptance")
        if acceptance is None or acceptance.shape[1] < STUCK:
            continue
        stuck = torch.nonzero(acceptance.amax(1) == 0).flatten().tolist()
        if stuck and keep:
            posterior.info["stuck"] = stuck
        elif stuck:
            where = f" of data set {k}" if len(posteriors) > 1 else ""
            raise Divergence(
                f"{label}: chains {stuck}{where} accepted nothing after warm-up (step size "
                f"{posterior.info['step_size']:.3g}). Use a longer warmup, a smaller step, or another init; a "
                "hierarchical model may need a non-centred form."
            )


def _alike(problems: list[Problem]) -> list[list[int]]:
    """The numbers of the problems, by the shapes of their arguments."""
    found: list[list[int]] = []
    for k, problem in enumerate(problems):
        for members in found:
            if same_shapes(problems[members[0]].batch, problem.batch):
                members.append(k)
                break
        else:
            found.append([k])
    return found


def _stacked(problems: list[Problem], chains: int) -> dict[str, Tensor]:
    """The tensors in which the problems differ, once for every chain ``[R chains, ...]``."""
    first = problems[0].batch
    stacks = {
        name: torch.stack([problem.batch[name] for problem in problems])
        for name, value in first.items()
        if isinstance(value, Tensor)
    }
    return {name: rows.repeat_interleave(chains, 0) for name, rows in stacks.items() if (rows != rows[:1]).any()}
