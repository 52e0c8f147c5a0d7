"""What all stochastic-gradient samplers share: their settings, and the fit that drives their engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State, pack, unpack
from bayesdl.infer.langevin_noise import KINDS, NoiseKind
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.record import Record
from bayesdl.infer.schedules import Constant, Schedule, as_schedule
from bayesdl.infer.starts import start
from bayesdl.infer.stochastic_engine import StochasticEngine, Turn
from bayesdl.infer.stochastic_gradient import GRADIENTS, Gradient, with_variate
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class StochasticSampler(Method):
    """A Markov chain with full or mini-batch gradients and no accept step; a subclass gives its step.

    It moves in coordinates divided by the prior's standard deviations (where the prior is Gaussian), a constant
    preconditioner that does not change the target: a network's layers come to one scale. The factor N/B and the
    temperature come with the gradient, from the log density alone: no sampler has a temperature of its own.

    Mini-batches are drawn **without replacement** within an epoch, for each chain its own: their errors cancel over the
    epoch, so slow directions feel far less of them than of independent ones. Rows that do not fill the last batch of an
    epoch are left out of it.

    Under a schedule the states are weighted by their step sizes, as they must be: the draws are taken at equal
    distances of time (the sum of step sizes), so that the posterior's draws have equal weights. In the exploring stage
    of a ``Cyclical`` schedule there is neither noise nor a draw (Zhang et al., 2020, algorithm 1).

    Should warm-up explode under a default step size, it goes back to its last good point with a smaller one.

    The posterior's ``stats``, each ``[C, S]``: log_density (an estimate, with mini-batches), step_size, and what the
    sampler adds.

    Args:
        chains: chains C.
        warmup: steps per chain before the first draw.
        draws: states per chain that are kept.
        thin: steps per kept draw.
        step_size: a number, a Schedule (of the step number, warm-up included), or None for a default that is measured
            during warm-up; each sampler says which, and in which units.
        batch_size: rows in a mini-batch; None takes all rows.
        gradient: "plain"; or with a control variate: "svrg" (two gradients on the batch a step and one of all rows an
            epoch; two more vectors a chain) or "saga" (one gradient a step; a table of one vector a chain for every
            N / batch_size).
        replacement: draw every row of every mini-batch independently, for comparisons with theory.
        noise: "normal", or "signs": a tenth of the cost, the same second moments, and tails that are a little too
            light at large steps (see ``draw_noise``).
    """

    streams: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of what ``observe`` tells, recorded beside log_density and step_size."""
    tolerated: ClassVar[float]
    """The default step keeps ``tolerated / curvature`` above the gradient's variance (see ``default_step``)."""

    chains: int = 4
    warmup: int = 5000
    draws: int = 1000
    thin: int = 50
    step_size: float | Schedule | None = None
    batch_size: int | None = None
    gradient: Gradient = "plain"
    replacement: bool = False
    noise: NoiseKind = "normal"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, chains=self.chains, draws=self.draws, thin=self.thin)
        check.whole_or_none(self.name, batch_size=self.batch_size)
        check.whole(self.name, at_least=0, warmup=self.warmup)
        check.one_of(self.name, GRADIENTS, gradient=self.gradient)
        check.one_of(self.name, KINDS, noise=self.noise)
        if self.step_size is not None:
            check.rate(self.name, step_size=self.step_size)
        if self.gradient != "plain" and self.batch_size is None:
            raise MethodError(
                f"{self.name}(gradient={self.gradient!r}): a control variate takes the noise out of mini-batches; give "
                "a batch_size, or use gradient='plain'."
            )
        if self.gradient == "saga" and self.replacement:
            raise MethodError(f"{self.name}(gradient='saga', replacement=True): SAGA's blocks of rows are fixed.")

    # -- what a sampler says -----------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, z: Tensor, noise: Callable[[], Tensor], gradient: Callable[[], Tensor]) -> State:
        """Entries of the state beside z: momenta and the like, for chains that start, or start again, at ``z``."""

    @abstractmethod
    def move(self, state: State, turn: Turn) -> State:
        """The entries that one step changes; the state itself is left as it is."""

    def observe(self, state: State) -> dict[str, Tensor]:
        """The further statistics ``[C]`` of a state that is recorded."""
        return {}

    @abstractmethod
    def default_step(self, stiffness: float) -> float:
        """The default step size where ``stiffness`` is the larger of curvature and gradient variance / tolerated."""

    def scale(self, state: State) -> Tensor | None:
        """Square root ``[C, D]`` of the preconditioner, or None for 1; step sizes are chosen behind it."""
        return None

    @property
    def looks(self) -> bool:
        """Whether curvature and gradient noise are to be measured during warm-up."""
        return self.step_size is None

    @property
    def batches_compared(self) -> int:
        """How many mini-batch gradients a measurement of their variance takes."""
        return 8

    # -- the fit -----------------------------------------------------------------------------------------------

    def work(self, problem: Problem) -> Work:
        """One gradient of all chains a step, on the mini-batch; more with some control variates."""
        work = Work(self.chains, self.warmup + self.draws * self.thin, self.chains * self.draws)
        return work if self.batch_size is None else with_variate(work, self.gradient, problem.n, self.batch_size)

    def _fit(self, problem: Problem, run: Run) -> DrawsPosterior:
        begin = start(problem, run, self.chains, default="prior").to(problem.density.dtype)
        record = Record.of(problem, run, begin, self.draws)
        engine = StochasticEngine(self, problem, run.seed, begin, record)
        engine.expect()
        return self._collect(engine, run)

    def _extend(self, posterior: DrawsPosterior, run: Run) -> DrawsPosterior:
        if self.step_size is not None and not isinstance(as_schedule(self.step_size), Constant):
            raise MethodError(
                f"{self.name} cannot be extended under {self.step_size}: draws at equal distances of time lie "
                "elsewhere in a longer run. Fit with more draws instead."
            )
        # Copies, because a control variate's table is written in place.
        last = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in unpack(posterior.last or {}).items()
        }
        before = posterior.shape[1]
        record = Record.after(posterior, run, last["z"], self.draws)
        whole = replace(self, draws=before + self.draws)
        engine = StochasticEngine(whole, posterior.problem, run.seed, last["z"], record, last, before)
        engine.expect(posterior.info["execution"])
        return self._collect(engine, run)

    def _collect(self, engine: StochasticEngine, run: Run) -> DrawsPosterior:
        """Drive an engine and wrap the draws that it reached."""
        problem = engine.problem
        state = run.drive(engine, problem.density)
        drawn = engine.drawn(state["step"]) - engine.before
        if drawn < 1:
            raise run.too_early("the first draw after warm-up")
        record = dict(zip(engine.names, state["statistics"][:, :, :drawn].clone(), strict=True))
        info = {"step_size": state["step_size"], "warmup": self.warmup, "thin": self.thin}
        info["execution"] = problem.density.execution
        posterior = engine.record.posterior(problem, state, drawn, record, info)
        posterior.last = pack(Record.without(state))
        return posterior


def mean_square(values: Tensor) -> Tensor:
    """Mean square ``[C]`` of each chain's row of ``[C, D]``."""
    squares: Tensor = torch.linalg.vecdot(values, values)
    return squares / values.shape[1]
