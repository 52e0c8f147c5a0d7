"""Maximum likelihood and MAP: members side by side in one ``[M, D]`` buffer, each with its own data order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.curvature.products import no_information
from bayesdl.density import LogDensity
from bayesdl.density.log_density import Target
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.lbfgs import LBFGSEngine
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.newton import CURVATURES, MOST_PRODUCTS, NewtonEngine
from bayesdl.infer.optimisers import OPTIMISERS
from bayesdl.infer.schedules import Schedule
from bayesdl.infer.starts import start
from bayesdl.infer.stochastic_gradient import GRADIENTS, Gradient, with_variate
from bayesdl.infer.training import OptimiserEngine
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.importance import log_density
from bayesdl.posterior.problem import Problem

AVERAGES = (None, "polyak", "ema")
SECOND_ORDER = ("lbfgs", *CURVATURES)
NOT_FOR_SECOND_ORDER = ("epochs", "clip_norm", "validation", "average")


@dataclass(frozen=True)
class Training(Method):
    """Settings of the methods that train by stochastic gradients, all members side by side.

    The loss is -(log density) / N, with N the number of rows, so that a learning rate suits small and large data alike.
    It is minimised in unconstrained coordinates.

    Args:
        steps: updates of each member.
        epochs: passes through the rows; replaces ``steps`` if given.
        batch_size: rows in a mini-batch, drawn without replacement, the last incomplete one of an epoch left out; None
            or at least N takes all rows.
        optimizer: "adam", "rmsprop" or "sgd" (momentum 0.9). Weight decay is no setting: the prior is what decays
            weights.
        learning_rate: a number, from which a cosine falls to zero over the run, or a Schedule.
        clip_norm: largest norm of a member's gradient of the loss; longer ones are shortened to it.
    """

    tempered: ClassVar[bool] = False
    takes_parameters: ClassVar[bool] = True
    target: ClassVar[Target] = "joint"
    optimizers: ClassVar[tuple[str, ...]] = tuple(OPTIMISERS)

    steps: int = 2000
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: str = "adam"
    learning_rate: float | Schedule = 0.02
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, steps=self.steps)
        check.whole_or_none(self.name, epochs=self.epochs, batch_size=self.batch_size)
        check.one_of(self.name, self.optimizers, optimizer=self.optimizer)
        check.rate(self.name, learning_rate=self.learning_rate)
        if self.clip_norm is not None:
            check.positive(self.name, clip_norm=self.clip_norm)

    def work(self, problem: Problem) -> Work:
        """One gradient of all members a step."""
        members = getattr(self, "members", 1)
        batches = 1 if self.batch_size is None else max(1, problem.n // self.batch_size)
        return Work(members, self.steps if self.epochs is None else self.epochs * batches, members)

    def begin(self, problem: Problem, run: Run, members: int) -> Callable[[], Tensor]:
        """Gives the starts ``[M, D]``: a module's own initialisation, unless ``run.init`` says otherwise."""
        return lambda: start(problem, run, members, default="network", batch_size=self.batch_size)


@dataclass(frozen=True)
class Optimiser(Training):
    """Settings and engine of the methods that look for a maximum.

    For MAP the density is the one in the constrained space (no Jacobian), so the mode is that of p(theta | y).

    Args:
        steps: updates of each member; with an optimiser that takes all rows, iterations at most.
        epochs: as in ``Training``, like the four settings that follow.
        batch_size: see there; where every step takes all rows, those whose derivatives are held at once.
        optimizer: three more than there, which take all rows at every step and end at a stationary point: "lbfgs"
            (members one by one), "newton" (conjugate gradients on exact products with the Hessian inside a trust
            region: a quadratic of few unknowns in one step) and "gauss_newton" (the same with the likelihood's Fisher
            information in the Hessian's place, which makes it a natural gradient; see ``fisher_products``).
        learning_rate: see there.
        clip_norm: see there.
        gradient: "plain", or with a control variate that takes the noise out of mini-batches near the optimum, so that
            a constant learning rate converges: "svrg" (two gradients on the batch a step and one of all rows an epoch)
            or "saga" (one gradient a step; a table of one vector a member for every N / batch_size).
        validation: fraction of the rows that are not trained on; the values with the least negative log likelihood on
            them are returned.
        patience: looks at the validation rows without improvement after which a member stops; a look is taken once an
            epoch, or every 10 steps with full batches.
        average: "polyak" returns the mean of the iterates of the second half (Polyak & Juditsky, 1992), "ema" their
            exponential mean with decay 0.999 and the start's weight removed; None returns the last iterate.
    """

    optimizers: ClassVar[tuple[str, ...]] = (*OPTIMISERS, *SECOND_ORDER)

    gradient: Gradient = "plain"
    validation: float | None = None
    patience: int = 20
    average: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, patience=self.patience)
        check.one_of(self.name, AVERAGES, average=self.average)
        check.one_of(self.name, GRADIENTS, gradient=self.gradient)
        if self.validation is not None:
            check.fraction(self.name, validation=self.validation)
        if self.optimizer in SECOND_ORDER:
            wrong = [name for name in NOT_FOR_SECOND_ORDER if getattr(self, name) is not None]
            wrong += ["gradient"] if self.gradient != "plain" else []
            if wrong:
                raise MethodError(
                    f"{self.name}(optimizer={self.optimizer!r}) takes all rows at every step: leave out {wrong}."
                )
        if self.gradient != "plain" and self.batch_size is None:
            raise MethodError(
                f"{self.name}(gradient={self.gradient!r}): a control variate takes the noise out of mini-batches; give "
                "a batch_size, or use gradient='plain'."
            )

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        if self.validation is not None and not density.factorised:
            return "early stopping needs a log likelihood per row; use validation=None"
        reason = no_information(density) if self.optimizer == "gauss_newton" else None
        if reason is not None:
            return f"optimizer='gauss_newton' needs a Fisher information: {reason}, with optimizer='newton'"
        return super().applies_to(density)

    def work(self, problem: Problem) -> Work:
        """One gradient of all members a step; more with second-order optimisers and control variates."""
        members = getattr(self, "members", 1)
        if self.optimizer == "lbfgs":
            return Work(1, self.steps * members, members, "members one by one; line searches add some")
        if self.optimizer in CURVATURES:
            products = min(MOST_PRODUCTS, 2 * problem.density.dim)
            return Work(members, self.steps * 2 * products, members, "at most; it ends when it has converged")
        work = super().work(problem)
        return work if self.batch_size is None else with_variate(work, self.gradient, problem.n, self.batch_size)

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        z, info = self.optimise(problem, run, members=1)
        return as_posterior(problem, z, info, self.target, self.batch_size)

    def engine(
        self, problem: Problem, run: Run, members: int, begin: Callable[[], Tensor], held_out: dict[str, Any] | None
    ) -> OptimiserEngine:
        """What trains the members, other than by L-BFGS."""
        return OptimiserEngine(self, problem, run.seed, members, begin, held_out)

    def optimise(self, problem: Problem, run: Run, members: int) -> tuple[Tensor, dict[str, Any]]:
        """Train members side by side.

        Returns:
            Their values ``[M, D]`` in unconstrained coordinates, and what to tell of the run.

        Raises:
            Divergence: a member's loss or gradient is not finite.
        """
        begin = self.begin(problem, run, members)
        training, held_out = self._split(problem, run)
        engine: LBFGSEngine | NewtonEngine | OptimiserEngine
        if self.optimizer == "lbfgs":
            engine = LBFGSEngine(self.name, problem, self.target, self.steps, members, begin, self.batch_size)
            note = {"members_in_parallel": members == 1}
        elif self.optimizer in CURVATURES:
            curvature = CURVATURES[self.optimizer]
            engine = NewtonEngine(
                self.name, problem, self.target, self.steps, members, begin, curvature, self.batch_size
            )
            note = {"members_in_parallel": True}
        else:
            engine = self.engine(training, run, members, begin, held_out)
            note = {"members_in_parallel": True}
        state = run.drive(engine, engine.density)
        if state["step"] == 0:
            raise run.too_early("the first update")
        return engine.result(state), note | engine.report(state)

    def _split(self, problem: Problem, run: Run) -> tuple[Problem, dict[str, Any] | None]:
        """The rows to train on, and the held-out rows as a batch."""
        if self.validation is None:
            return problem, None
        count = round(self.validation * problem.n)
        if not 1 <= count < problem.n:
            raise MethodError(
                f"{self.name}(validation={self.validation}) leaves {problem.n - count} of {problem.n} rows to train on "
                f"and {count} to validate with; both need at least one."
            )
        order = torch.randperm(problem.n, generator=generator(run.seed, "validation"))
        return problem.restrict(order[count:].sort().values), problem.minibatch(order[:count].sort().values)


@dataclass(frozen=True)
class MaximumLikelihood(Optimiser):
    """Maximises the likelihood alone; priors only give the start of what the network does not initialise."""

    name: ClassVar[str] = "MaximumLikelihood"
    takes_prior: ClassVar[bool] = False
    target: ClassVar[Target] = "likelihood"


@dataclass(frozen=True)
class MAP(Optimiser):
    """Maximises log p(theta, y): standard training, in which a normal prior is weight decay."""

    name: ClassVar[str] = "MAP"


def as_posterior(
    problem: Problem, z: Tensor, info: dict[str, Any], target: Target, batch_size: int | None
) -> DrawsPosterior:
    """Members ``[M, D]`` as a posterior of M chains of one draw each."""
    value = log_density(problem, z, batch_size, target)
    return DrawsPosterior(problem, z.unsqueeze(1), {"log_joint": value.unsqueeze(1)}, info)


def find_mode(problem: Problem, run: Run, chains: int, batch_size: int | None = None) -> Tensor:
    """A short MAP for every chain, ``[chains, D]``, for engines that start near a mode."""
    return MAP(steps=500, batch_size=batch_size, learning_rate=0.05).optimise(problem, run, chains)[0]
