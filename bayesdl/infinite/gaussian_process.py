"""Inference that every Gaussian-process method shares: targets, hyperparameters, and a way to solve."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from gpytorch import Module
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method, Work
from bayesdl.infinite import structure
from bayesdl.infinite.conditioned import Conditioned, Exact, Inducing, Iterative
from bayesdl.infinite.conjugate import pivoted_cholesky
from bayesdl.infinite.dirichlet import dirichlet_targets
from bayesdl.infinite.evidence import Evidence, Process, half_log_noise, log_density, lower_bound
from bayesdl.infinite.gram import GIGABYTE
from bayesdl.infinite.inducing import features
from bayesdl.infinite.maximise import Maximise
from bayesdl.infinite.posterior import GPPosterior, flat
from bayesdl.infinite.variational import Bound, Expectation, SiteUpdates, bernoulli_expectation, categorical_expectation
from bayesdl.models import BayesianNetwork
from bayesdl.models.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models.positive import PositivePrior
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem

Solver = Literal["auto", "cholesky", "cg"]


@dataclass(frozen=True)
class GaussianProcess(Method):
    """What GP and NNGP share; their difference is where kernel and mean come from."""

    tempered: ClassVar[bool] = False
    takes_prior: ClassVar[bool] = False
    learns_prior: ClassVar[bool] = True

    noise: float | None = field(default=None, kw_only=True)
    steps: int = field(default=100, kw_only=True)
    fit_kernel: bool = field(default=True, kw_only=True)
    solver: Solver = field(default="auto", kw_only=True)
    inducing: int | None = field(default=None, kw_only=True)
    dirichlet: float | None = field(default=None, kw_only=True)
    max_rows: int = field(default=5000, kw_only=True)
    memory: float = field(default=8.0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, steps=self.steps, max_rows=self.max_rows)
        check.positive(self.name, memory=self.memory)
        if self.noise is not None:
            check.positive(self.name, noise=self.noise)
        if self.dirichlet is not None:
            check.positive(self.name, dirichlet=self.dirichlet)
        if self.inducing is not None:
            check.whole(self.name, inducing=self.inducing)
        if self.solver not in get_args(Solver):
            raise MethodError(f"{self.name}: solver={self.solver!r} must be one of {', '.join(get_args(Solver))}.")
        if self.inducing is not None and self.solver != "auto":
            raise MethodError(f"{self.name}: inducing points have their own algebra; leave solver={self.solver!r} out.")
        if self.likelihood_temperature != 1:
            raise MethodError(f"{self.name}: likelihood_temperature={self.likelihood_temperature!r} must be 1 here.")

    @abstractmethod
    def _prior(self, problem: Problem) -> tuple[Kernel, Module]:
        """Kernel and mean, in float64, that the fit may change."""

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        model = density.model
        if not isinstance(model, BayesianNetwork):
            return "a Gaussian process needs a BayesianNetwork, whose likelihood it takes; a program has no such part"
        likelihood = model.likelihood
        if type(likelihood) not in (Gaussian, Bernoulli, Categorical):
            return f"the likelihood must be Gaussian, Bernoulli or Categorical, and it is {type(likelihood).__name__}"
        if isinstance(likelihood, Gaussian) and likelihood.noise == "head":
            return "the noise is an output of the network (noise='head'); a Gaussian process needs one noise level"
        if self.noise is not None and not isinstance(likelihood, Gaussian):
            return f"noise={self.noise} means nothing to {type(likelihood).__name__}"
        if self.dirichlet is not None and isinstance(likelihood, Gaussian):
            return f"dirichlet={self.dirichlet} is for classes, and the likelihood is Gaussian"
        if self.solver == "cg" and self.dirichlet is None and not isinstance(likelihood, Gaussian):
            return "solver='cg' needs Gaussian targets; for classes give dirichlet=0.01, or inducing=512"
        return None

    def work(self, problem: Problem) -> Work:
        """No gradients of the density: kernel matrices and their factors."""
        n = problem.n
        if self.inducing is not None:
            m = min(self.inducing, n)
            return Work(note=f"{n} x {m}^2 operations a step, about {8 * n * m * 4 / GIGABYTE:.2f} GB")
        if self._iterates(problem):
            kept = min(8 * n**2 / GIGABYTE, self.memory)
            return Work(note=f"{n}^2 operations an iteration of conjugate gradients, about {kept:.2f} GB")
        return Work(note=f"{n}^3 operations a factorisation, about {_gigabytes(n, problem):.2f} GB")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        if run.init is not None:
            raise MethodError(f"{self.name} has no weights to start from: leave init=None.")
        x = flat(problem.batch[problem.x_name or "x"])
        iterative = self._iterates(problem)
        if not iterative and self.inducing is None:
            self._check_rows(len(x), problem)
        learning = self._learning_rows(problem, run, len(x), iterative)
        kernel, mean = self._prior(problem)
        z = None if self.inducing is None else x[pivoted_cholesky(kernel, x, self.inducing)[0]]
        process = Process(kernel, mean, x, self.fit_kernel, z)
        regression = isinstance(problem.model.likelihood, Gaussian)
        learnt = bool(process.parameters) or (regression and not isinstance(self._noise(problem), (int, float)))
        if regression or self.dirichlet is not None:
            a, b, noise, info, ready = self._regress(problem, run, process, learning, iterative)
        else:
            (a, b, info), noise, ready = self._classify(problem, run, process, learning), None, None
        for parameter in (*kernel.parameters(), *mean.parameters()):
            parameter.requires_grad_(False)
        info |= {
            "noise": noise,
            "solver": "cg" if iterative else "cholesky",
            "hyperparameters": structure.hyperparameters(kernel) | structure.hyperparameters(mean),
            "structure": structure.storable(kernel, mean, x[:20]),
            "hyperparameters_from": _learnt_from(run, learnt),
        }
        return GPPosterior(problem, kernel, mean, x, a, b, noise, info, inducing=z, ready=ready)

    def _iterates(self, problem: Problem) -> bool:
        """Whether the equations are solved by conjugate gradients."""
        gaussian = isinstance(problem.model.likelihood, Gaussian) or self.dirichlet is not None
        large = self.solver == "auto" and problem.n > self.max_rows
        return self.inducing is None and (self.solver == "cg" or (large and gaussian))

    def _noise(self, problem: Problem) -> Any:
        """The noise as it was stated: a number, a prior over it, or what says that it is to be learnt."""
        return problem.model.likelihood.noise if self.noise is None else self.noise

    def _learning_rows(self, problem: Problem, run: Run, n: int, iterative: bool) -> Tensor:
        """``[n]`` bool: the rows that noise and kernel are fitted on; with ``prior_rows`` these alone."""
        if not run.learn_prior:
            return torch.ones(n, dtype=torch.bool)
        if iterative or self.inducing is not None:
            raise MethodError(
                f"{self.name}: prior_rows is for a certificate, whose divergence is known without inducing points and "
                "iterations alone; use solver='cholesky', or certify on rows that the fit has not seen."
            )
        return problem.of_prior()

    def _check_rows(self, n: int, problem: Problem) -> None:
        if n > self.max_rows:
            raise MethodError(
                f"{self.name} on {n} rows needs about {_gigabytes(n, problem):.1f} GB for its kernel matrices and "
                f"{n**3 / 1e9:,.0f} billion multiplications a factorisation. The limit is max_rows={self.max_rows}: "
                "raise it, take inducing points (inducing=512; for classes also dirichlet=0.01, which can iterate), or "
                "a method with mini-batches such as SGLD or MeanFieldVI."
            )

    def _regress(
        self, problem: Problem, run: Run, process: Process, learning: Tensor, iterative: bool
    ) -> tuple[Tensor, Tensor, float | None, dict[str, Any], Conditioned | None]:
        """Fit noise and hyperparameters; the sites then hold the data exactly."""
        y, noise, prior = self._targets(problem)
        n, part, targets, deviation = len(process.x), process, y, noise
        if iterative and n > self.max_rows:
            few = torch.randperm(n, generator=generator(run.seed, self.name, "rows"))[: self.max_rows]
            learning = torch.zeros(n, dtype=torch.bool).index_fill(0, few, True)
        if not bool(learning.all()):
            part, targets = process.at(learning), y[:, learning]
            deviation = noise[:, learning] if isinstance(noise, Tensor) else noise
        info: dict[str, Any] = {"evidence": "exact" if self.inducing is None else "lower bound", "converged": True}
        objective = Evidence(part, targets, deviation, prior)
        if not iterative or process.parameters or noise is None:
            state = run.drive(Maximise(objective, self.steps), problem.density)
            part.assign(state["z"][: len(process.vector)])
            noise = objective.noise_at(state["z"]) if noise is None else noise
            info["converged"] = bool(state["converged"])
        assert noise is not None
        with torch.no_grad():
            residual = y - process.mean(process.x)
            b = torch.as_tensor(noise, dtype=y.dtype).square().reciprocal().expand_as(y).clone()
            sites = (process.kernel, process.x, residual * b, b)
            ready: Conditioned
            if iterative:
                ready = Iterative(*sites, memory=self.memory)
                log_det, error = ready.half_log_det(run.seed)
                evidence = -0.5 * (residual * ready.weights).sum() - log_det - half_log_noise(b)
                info |= {"evidence": "estimate", "evidence_se": error, "tuned_on_rows": len(part.x), **ready.report}
            elif process.inducing is not None:
                ready = Inducing(*sites, process.inducing)
                evidence = lower_bound(residual, b, features(process.kernel, process.x, process.inducing))
            else:
                ready = Exact(*sites)
                evidence = log_density(residual, b, ready.factors)
        if self.dirichlet is not None:
            info["evidence"] += " of the Dirichlet likelihood's targets"
        info["log_evidence"] = float(evidence) - y.numel() * float(problem.scaler.y_scale.log())
        return residual * b, b, None if isinstance(noise, Tensor) else noise, info, ready

    def _targets(self, problem: Problem) -> tuple[Tensor, float | Tensor | None, PositivePrior | None]:
        """Targets ``[C, n]``, their noise where it is known, and its prior where it is not."""
        y = problem.batch[problem.y_name or "y"].to("cpu")
        if self.dirichlet is not None:
            targets, deviations = dirichlet_targets(y, max(2, _outputs(problem)), self.dirichlet)
            return targets, deviations, None
        stated = self._noise(problem)
        prior = stated if isinstance(stated, PositivePrior) else None
        fixed = float(stated) if isinstance(stated, (int, float)) else None
        y = y.double()
        return y.unsqueeze(0) if y.dim() == 1 else y.T, fixed, prior

    def _classify(
        self, problem: Problem, run: Run, process: Process, learning: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Fit the hyperparameters if asked for, then the sites."""
        y = problem.batch[problem.y_name or "y"].to("cpu")
        expectation, outputs = _expectation(problem, y), _outputs(problem)
        sites, converged, every = None, True, bool(learning.all())
        if process.parameters:
            part = process if every else process.at(learning)
            engine = Maximise(Bound(part, outputs, _expectation(problem, y[learning])), self.steps)
            found = run.stage("hyperparameters").drive(engine, problem.density)
            process.assign(found["z"])
            sites, converged = ((found["a"], found["b"]) if every else None), bool(found["converged"])
        with torch.no_grad():
            mean, prior = process.prior()
            state = run.drive(SiteUpdates(mean, prior, outputs, expectation, sites), problem.density)
        converged = converged and bool(state["stopped"])
        info = {"log_evidence": state["bound"], "evidence": "lower bound", "converged": converged}
        return state["a"], state["b"], info


def _learnt_from(run: Run, learnt: bool) -> str:
    """Which rows noise and kernel were fitted on: a certificate's prior must not have seen the rows of its bound."""
    if run.learn_prior:
        return "prior rows"
    return "all rows" if learnt else "nothing"


def _expectation(problem: Problem, y: Tensor) -> Expectation:
    """The likelihood's, of labels."""
    if isinstance(problem.model.likelihood, Bernoulli):
        return bernoulli_expectation(y)
    return categorical_expectation(y, _outputs(problem))


def _gigabytes(n: int, problem: Problem) -> float:
    """Memory of the float64 matrices ``[n, n]`` that a fit holds."""
    return 8 * n**2 * (3 + 2 * _outputs(problem)) / 1e9


def _outputs(problem: Problem) -> int:
    """How many latent functions: the network's outputs."""
    row = problem.batch[problem.x_name or "x"][:1]
    with torch.no_grad():
        return math.prod(problem.model.net(row).shape[1:])
