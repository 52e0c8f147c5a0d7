"""``PACBayes``: Gaussians over the weights of a network, trained for the smallest certificate."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from bayesdl.bounds import objectives
from bayesdl.bounds.objectives import Objective
from bayesdl.bounds.prior import UnderNoise
from bayesdl.density import LogDensity
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.optimisers import ascend, slots_like
from bayesdl.infer.row_noise import row_noise
from bayesdl.infer.schedules import Schedule
from bayesdl.infer.starts import start
from bayesdl.infer.training import thinned
from bayesdl.infer.variational import MeanFieldVI
from bayesdl.infer.variational_engine import GaussianEngine
from bayesdl.models import BayesianNetwork
from bayesdl.models.clipped import Clipped
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.problem import Problem

OBJECTIVES = get_args(Objective)
MEMORY = 0.98
"""Of the running mean of the risk, from which the bound's slopes are taken."""


@dataclass(frozen=True)
class PACBayes(Method):
    r"""Minimises a PAC-Bayes bound over q = N(mean, diag sd^2), for ``certify`` (Perez-Ortiz et al., 2021).

    In the bound stand the mean over rows of the clipped log loss ``min(-log p(y | x, w), log 1/p_min) / log 1/p_min``,
    which lies in [0, 1], and KL(q || prior) in closed form. Densities of real targets are taken in units of the
    standardised target, and cut at 10 from above. The certificate itself is of the loss that ``certify`` is asked for;
    of intervals of real targets, whose noise a trained network takes for too small, ``MeanFieldVI`` with
    ``prior_rows=`` has the better ones.

    The prior is a Gaussian around a network that was trained on the prior's rows alone, which are also those of the
    scaler; and under weight noise, so that the prior's draws err as little as its mean. The posterior is trained on all
    rows, and ``certify`` counts the others. Without rows for it (``prior_fraction=None``) its mean is the network's
    random initialisation, and no row may have shaped the scaler either: pass a pair ``(x, y)`` in units that were fixed
    in advance. With ``prior=`` it is that posterior. Several fits may be compared by ``certify([...])``, at its price
    of delta over their number.

    Args:
        bound: what is minimised: "kl" (the PAC-Bayes-kl bound, by implicit differentiation), or one of its relaxations
            "quadratic", "lambda" and "classic", or "elbo", see ``bayesdl.bounds.objectives``.
        prior_fraction: of the rows, for the prior.
        prior_scale: sd of the prior, as a share of that of the model's prior, which is where the posterior's begins.
            Wide priors make it cheap to move the mean, narrow ones keep the noise small.
        prior_noise: sd of the noise in the weights while the prior's network is trained, in the same unit; None takes
            ``prior_scale``. Wider noise regularises: on images the network errs less by it.
        delta: failure probability of the bound that is minimised.
        p_min: smallest probability, or density, in the loss.
        steps: updates of the posterior.
        prior_steps: updates of the network at the prior's mean.
        batch_size: rows in a mini-batch; None takes all rows.
        learning_rate: of gradient descent with momentum 0.9, for the mean in units of the prior's sd and for log sd; a
            number starts a cosine to zero, a Schedule is taken as it is. Not Adam: its steps are as long where the
            gradient is nothing but noise, and in a million coordinates that costs more than the rest gains.
        prior_learning_rate: of Adam, for the prior's mean.
        samples: draws for one gradient.
        estimator: of its gradient, as in ``MeanFieldVI``; None takes "local" for networks that allow it, else
            "reparameterisation".
    """

    name: ClassVar[str] = "PACBayes"
    tempered: ClassVar[bool] = False
    learns_prior: ClassVar[bool] = True

    bound: Objective = "kl"
    prior_fraction: float | None = 0.5
    prior_scale: float = 0.1
    prior_noise: float | None = None
    delta: float = 0.025
    p_min: float = 1e-5
    steps: int = 2000
    prior_steps: int = 2000
    batch_size: int | None = None
    learning_rate: float | Schedule = 1.0
    prior_learning_rate: float | Schedule = 0.02
    samples: int = 1
    estimator: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.one_of(self.name, OBJECTIVES, bound=self.bound)
        check.one_of(self.name, ("local", "flipout", "reparameterisation", None), estimator=self.estimator)
        check.fraction(self.name, delta=self.delta, p_min=self.p_min)
        if self.prior_fraction is not None:
            check.fraction(self.name, prior_fraction=self.prior_fraction)
        check.positive(self.name, prior_scale=self.prior_scale)
        if self.prior_noise is not None:
            check.positive(self.name, prior_noise=self.prior_noise)
        check.whole(self.name, steps=self.steps, prior_steps=self.prior_steps, samples=self.samples)
        check.whole_or_none(self.name, batch_size=self.batch_size)
        check.rate(self.name, learning_rate=self.learning_rate, prior_learning_rate=self.prior_learning_rate)
        if self.likelihood_temperature != 1:
            raise MethodError(f"{self.name}: a bound has no temperature; use likelihood_temperature=1.")

    @property
    def reserved(self) -> float | None:
        """See the base class."""
        return self.prior_fraction

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        model = density.model
        if not isinstance(model, BayesianNetwork):
            return "it trains the bounded log loss of a network; lift yours by BayesianNetwork(net), or use MeanFieldVI"
        return super().applies_to(density)

    def work(self, problem: Problem) -> Work:
        """One gradient a step."""
        return Work(self.samples, self.steps, 2, "and the training of the prior's mean")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        update, info = self._with_prior(problem, run)
        kept = None if update.prior_rows is None or update.rows is None else update.rows.isin(update.prior_rows)
        counted = update.n - (0 if kept is None else int(kept.sum()))
        if counted < 1:
            raise MethodError(f"{self.name}: all {update.n} rows belong to the prior; the bound needs some of its own.")
        clipped = _clipped(update, self.p_min)
        inner = self._inner(clipped.density)
        mean, sd = _prior(update)
        engine = BoundEngine(
            inner,
            clipped,
            torch.ones_like(mean, dtype=torch.bool),
            inner.family(clipped.density),
            run.seed,
            lambda: torch.cat([self._begin(update, run, mean), sd.log()]),
            self.bound,
            counted,
            self.delta,
            clipped.model.likelihood,
        )
        engine.expect()
        state = run.drive(engine, engine.objective.density)
        if state["step"] == 0:
            raise run.too_early("the first update")
        posterior = GaussianPosterior(update, engine.objective.law(state["average"]), {})
        posterior.info |= info | engine.report(state, float(posterior.kl() or 0.0))
        return posterior

    def _with_prior(self, problem: Problem, run: Run) -> tuple[Problem, dict[str, Any]]:
        """The problem under the bound's prior, and what is told of it."""
        if problem.density.new_prior is not None:
            if problem.density.gaussian_prior() is None:
                raise MethodError(f"{self.name}: prior= must have independent coordinates, as MeanFieldVI's has.")
            return problem, {}
        info: dict[str, Any] = {"scale": self.prior_scale}
        if not run.learn_prior:
            mean = start(problem, run, 1, default="network")[0]
            info["rows"] = 0
        else:
            early = problem.restrict(problem.of_prior().nonzero().flatten())
            stage = run.stage("prior")
            stage.init = run.init
            trainer = UnderNoise(
                steps=self.prior_steps,
                batch_size=self.batch_size,
                learning_rate=self.prior_learning_rate,
                share=self.prior_noise or self.prior_scale,
                gradients=self._inner(problem.density),
            )
            found, told = trainer.optimise(early, stage, members=1)
            if run.tally.interrupted:
                raise run.too_early("the prior was learnt")
            mean, info = found[0], info | {"rows": early.n, "steps": told["steps"]}
        sd = self.prior_scale * problem.density.prior_scale
        density = problem.density.with_gaussian_prior(mean, sd)
        return replace(problem, density=density), {"prior": info}

    def _inner(self, density: LogDensity) -> MeanFieldVI:
        """Who gives the gradients."""
        estimator = self.estimator
        if estimator is None:
            possible = not isinstance(row_noise(density, "*", "local"), str)
            estimator = "local" if possible else "reparameterisation"
        return MeanFieldVI(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            samples=self.samples,
            estimator=estimator,
        )

    def _begin(self, update: Problem, run: Run, mean: Tensor) -> Tensor:
        """Where the posterior's mean starts: at the prior's, unless told otherwise."""
        return mean if run.init is None or run.learn_prior else start(update, run, 1, default="network")[0]


@dataclass
class BoundEngine(GaussianEngine):
    """Gaussian variational inference whose weight of the KL is the one by which a bound falls fastest.

    With r the risk, the bound f(r, KL) has the gradient ``f_r grad r + f_k grad KL``, and the ELBO of N rows under the
    clipped loss, whose range is c, ``-N c grad r - w grad KL``: with ``w = N c f_k / f_r`` it is ``-N c / f_r`` times
    as long.

    State besides that of the ELBO: risk, its running mean.

    Attributes:
        bound: what is minimised.
        counted: n, the rows of the bound.
        delta: its failure probability.
        loss: the clipped likelihood.
    """

    bound: Objective
    counted: int
    delta: float
    loss: Clipped
    _kl: float = field(init=False)
    _by_risk: float = field(init=False)

    def init(self) -> State:
        """Also a risk: that of a guess."""
        return super().init() | {"risk": torch.tensor(0.5, dtype=torch.float64)}

    def weight(self, state: State) -> float:
        """See the class; what it finds serves the whole step."""
        self._kl = self.kl(state["parameters"])
        self._by_risk, by_kl = objectives.slopes(self.bound, float(state["risk"]), self._kl, self.counted, self.delta)
        return self.problem.n * self.loss.range * by_kl / self._by_risk

    def slots(self, parameters: Tensor) -> State:
        """See the base class."""
        return slots_like("sgd", parameters)

    def move(self, state: State, gradient: Tensor) -> State:
        """Gradient descent on the bound, for the mean in units of the prior's sd."""
        step, parameters = state["step"], state["parameters"]
        uphill = gradient * (self._by_risk / (self.problem.n * self.loss.range))
        uphill[: len(self.random)] *= _prior(self.problem)[1].square()
        moved, slots = ascend("sgd", parameters, uphill, state, step, self.schedule(step))
        return slots | {"parameters": moved}

    def step(self, state: State) -> State:
        """Also follow the risk."""
        new = super().step(state)
        # The estimate is that of the log likelihood less the KL, whatever the weight.
        log_likelihood = float(new["trace"][0, state["step"]]) + self._kl
        risk = (self.loss.highest - log_likelihood / self.problem.n) / self.loss.range
        risk = min(max(risk, 0.0), 1.0)  # beyond by rounding alone
        memory = min(MEMORY, 1 - 1 / (state["step"] + 1))
        new["risk"] = memory * state["risk"] + (1 - memory) * risk
        return new

    def kl(self, parameters: Tensor) -> float:
        """KL(q || prior)."""
        mean, log_sd = self.objective.split(parameters)
        centre, sd = _prior(self.problem)
        ratio = log_sd - sd.log()
        return float((((mean - centre) / sd).square() + (2 * ratio).exp() - 1 - 2 * ratio).sum(dtype=torch.float64) / 2)

    def report(self, state: State, kl: float) -> dict[str, Any]:
        """What the training reached, of the clipped log loss."""
        risk = float(state["risk"])
        return {
            "steps": state["step"],
            "risk": risk,
            "kl": kl,
            "bound": min(objectives.value(self.bound, risk, kl, self.counted, self.delta), 1.0),
            "counted_rows": self.counted,
            "elbo_trace": thinned(state["trace"][:1, : state["step"]])[0],
            "execution": self.objective.density.execution,
        }

    def status(self, state: State) -> str:
        """Risk and bound."""
        return f"risk {float(state['risk']):.4f}"


def _prior(problem: Problem) -> tuple[Tensor, Tensor]:
    """Mean and sd ``[D]`` of the bound's prior."""
    found = problem.density.gaussian_prior()
    assert found is not None  # _with_prior saw to it
    return found


def _clipped(problem: Problem, floor: float) -> Problem:
    """The same problem with the bounded log loss."""
    model = problem.model
    clipped = BayesianNetwork(model.net, model.prior, Clipped(model.likelihood, floor))
    density = LogDensity(clipped, problem.batch, data_plate=problem.data_plate)
    return replace(problem, model=clipped, density=density.with_gaussian_prior(*_prior(problem)))
