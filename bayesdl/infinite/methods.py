"""The methods ``GP`` and ``NNGP``: inference over functions instead of weights."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gpytorch
import torch
from gpytorch import Module
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.errors import MethodError, ModelError
from bayesdl.infer import method as check
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method, Work
from bayesdl.infinite import structure
from bayesdl.infinite.convert import from_module
from bayesdl.infinite.evidence import Evidence, Process, log_evidence
from bayesdl.infinite.kernels import NNGPKernel
from bayesdl.infinite.layers import Layer, spatial_of
from bayesdl.infinite.maximise import Maximise
from bayesdl.infinite.posterior import GPPosterior, flat
from bayesdl.infinite.variational import (
    Bound,
    Expectation,
    SiteUpdates,
    bernoulli_expectation,
    categorical_expectation,
)
from bayesdl.models import BayesianNetwork
from bayesdl.models.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models.positive import PositivePrior
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class _GaussianProcess(Method):
    """What GP and NNGP share; their difference is where kernel and mean come from."""

    tempered: ClassVar[bool] = False
    takes_prior: ClassVar[bool] = False
    learns_prior: ClassVar[bool] = True

    noise: float | None = field(default=None, kw_only=True)
    steps: int = field(default=100, kw_only=True)
    max_rows: int = field(default=5000, kw_only=True)
    fit_kernel: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, steps=self.steps, max_rows=self.max_rows)
        if self.noise is not None:
            check.positive(self.name, noise=self.noise)
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
        return None

    def work(self, problem: Problem) -> Work:
        """No gradients of the density: kernel matrices and their factors."""
        return Work(note=f"{problem.n}^3 operations a factorisation, about {_gigabytes(problem.n, problem):.2f} GB")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        if run.init is not None:
            raise MethodError(f"{self.name} has no weights to start from: leave init=None.")
        x = flat(problem.batch[problem.x_name or "x"])
        self._check_rows(len(x), problem)
        kernel, mean = self._prior(problem)
        process = Process(kernel, mean, x, self.fit_kernel)
        learning = self._learning_rows(problem, run, len(x))
        regression = isinstance(problem.model.likelihood, Gaussian)
        learnt = bool(process.parameters) or (regression and not isinstance(self._noise(problem), (int, float)))
        a, b, noise, info = (self._regress if regression else self._classify)(problem, run, process, learning)
        for parameter in (*kernel.parameters(), *mean.parameters()):
            parameter.requires_grad_(False)
        info |= {
            "noise": noise,
            "hyperparameters": structure.hyperparameters(kernel) | structure.hyperparameters(mean),
            "structure": structure.storable(kernel, mean, x[:20]),
            "hyperparameters_from": _learnt_from(run, learnt),
        }
        return GPPosterior(problem, kernel, mean, x, a, b, noise, info)

    def _noise(self, problem: Problem) -> Any:
        """The noise as it was stated: a number, a prior over it, or what says that it is to be learnt."""
        return problem.model.likelihood.noise if self.noise is None else self.noise

    def _learning_rows(self, problem: Problem, run: Run, n: int) -> Tensor:
        """``[n]`` bool: the rows that noise and kernel are fitted on; with ``prior_rows`` these alone."""
        if not run.learn_prior:
            return torch.ones(n, dtype=torch.bool)
        assert problem.rows is not None  # prepare refuses prior_rows otherwise
        assert problem.prior_rows is not None  # likewise
        learning = problem.rows.isin(problem.prior_rows)
        if bool(learning.all()):
            raise MethodError(
                f"prior_rows holds all {n} rows: none are left to update the prior with. Give a part of them."
            )
        return learning

    def _check_rows(self, n: int, problem: Problem) -> None:
        if n > self.max_rows:
            raise MethodError(
                f"{self.name} on {n} rows needs about {_gigabytes(n, problem):.1f} GB for its kernel matrices and "
                f"{n**3 / 1e9:,.0f} billion multiplications a factorisation. The limit is max_rows={self.max_rows}: "
                "raise it, fit on some of the rows, or take a method with mini-batches such as SGLD or MeanFieldVI."
            )

    def _regress(
        self, problem: Problem, run: Run, process: Process, learning: Tensor
    ) -> tuple[Tensor, Tensor, float, dict[str, Any]]:
        """Fit noise and hyperparameters; the sites then hold the data exactly."""
        stated = self._noise(problem)
        prior = stated if isinstance(stated, PositivePrior) else None
        fixed = float(stated) if isinstance(stated, (int, float)) else None
        y = problem.batch[problem.y_name or "y"].to("cpu", torch.float64)
        y = y.unsqueeze(0) if y.dim() == 1 else y.T
        objective = Evidence(process.at(learning), y[:, learning], fixed, prior)
        state = run.drive(Maximise(objective, self.steps), problem.density)
        process.assign(state["z"][: len(process.vector)])
        noise = objective.noise_at(state["z"])
        with torch.no_grad():
            mean, covariance = process.prior()
            evidence = log_evidence(y - mean, covariance, torch.tensor(noise, dtype=torch.float64))
        a, b = (y - mean) / noise**2, torch.full_like(y, noise**-2)
        raw = float(evidence) - y.numel() * float(problem.scaler.y_scale.log())
        return a, b, noise, {"log_evidence": raw, "evidence": "exact", "converged": bool(state["converged"])}

    def _classify(
        self, problem: Problem, run: Run, process: Process, learning: Tensor
    ) -> tuple[Tensor, Tensor, None, dict[str, Any]]:
        """Fit the hyperparameters if asked for, then the sites."""
        y = problem.batch[problem.y_name or "y"].to("cpu")
        outputs = _outputs(problem)
        binary = isinstance(problem.model.likelihood, Bernoulli)

        def expectation_of(labels: Tensor) -> Expectation:
            return bernoulli_expectation(labels) if binary else categorical_expectation(labels, outputs)

        expectation, sites, converged = expectation_of(y), None, True
        if process.parameters:
            engine = Maximise(Bound(process.at(learning), outputs, expectation_of(y[learning])), self.steps)
            found = run.stage("hyperparameters").drive(engine, problem.density)
            process.assign(found["z"])
            converged = bool(found["converged"])
            if bool(learning.all()):
                sites = found["a"], found["b"]
        with torch.no_grad():
            mean, covariance = process.prior()
            state = run.drive(SiteUpdates(mean, covariance, outputs, expectation, sites), problem.density)
        converged = converged and bool(state["stopped"])
        info = {"log_evidence": state["bound"], "evidence": "lower bound", "converged": converged}
        return state["a"], state["b"], None, info


@dataclass(frozen=True)
class NNGP(_GaussianProcess):
    r"""The network as it becomes when its hidden layers grow infinitely wide: a Gaussian process.

    The kernel is read off the model's net and Gaussian prior, so the finite and the infinite network are one model.
    Regression is exact; its result is what Bayesian inference over all weights converges to as the width grows (not
    what training by gradient descent converges to). Classes go through the best Gaussian over the latent functions.

    Args:
        w_std: weights have standard deviation ``w_std / sqrt(fan_in)``; by default as the model's prior says.
        b_std: biases have standard deviation ``b_std``; by default as the model's prior says.
        fit_kernel: fit the variances of all layers to the evidence, starting from these values.
        noise: standard deviation of Gaussian noise in the units of the standardised target. By default the
            likelihood's own: fixed where that is a number, else the one of highest evidence (times its prior, if any).
        steps: most optimiser steps on noise and kernel.
        max_rows: most training rows; the cost is O(n^3).

    Source: Lee et al. (2018), Deep neural networks as Gaussian processes.
    """

    name: ClassVar[str] = "NNGP"

    w_std: float | None = None
    b_std: float | None = None
    fit_kernel: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.w_std is not None:
            check.positive(self.name, w_std=self.w_std)
        if self.b_std is not None and self.b_std != 0:
            check.positive(self.name, b_std=self.b_std)

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        reason = super().applies_to(density)
        if reason is None:
            try:
                self._layers(density.model)
            except ModelError as error:
                return str(error).rstrip(".")
        return reason

    def _prior(self, problem: Problem) -> tuple[Kernel, Module]:
        layers = self._layers(problem.model)
        shape = problem.batch[problem.x_name or "x"].shape[1:] if spatial_of(layers) else None
        kernel = NNGPKernel(layers, input_shape=shape, dtype=torch.float64).double()
        return kernel, gpytorch.means.ZeroMean()

    def _layers(self, model: Any) -> tuple[Layer, ...]:
        return from_module(model, w_std=self.w_std, b_std=self.b_std)


@dataclass(frozen=True)
class GP(_GaussianProcess):
    """Gaussian-process regression or classification with any GPyTorch kernel; of the model only the likelihood counts.

    Args:
        kernel: a GPyTorch kernel without batch shape; ``ScaleKernel(RBFKernel())`` by default. It is copied.
        mean: a GPyTorch mean; zero by default. It is copied.
        fit_kernel: fit the parameters of kernel and mean that require grad to the evidence, times the priors that are
            registered on them; otherwise they stay as given.
        noise: see ``NNGP``.
        steps: see ``NNGP``.
        max_rows: see ``NNGP``.

    Source: Rasmussen and Williams (2006), Gaussian processes for machine learning, ch. 2 and 5.
    """

    name: ClassVar[str] = "GP"

    kernel: Kernel | None = None
    mean: Module | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.kernel is not None and (not isinstance(self.kernel, Kernel) or len(self.kernel.batch_shape)):
            raise MethodError(f"GP(kernel={self.kernel!r}): kernel must be a GPyTorch kernel without batch shape.")
        if self.mean is not None and not isinstance(self.mean, gpytorch.means.Mean):
            raise MethodError(f"GP(mean={self.mean!r}): mean must be a GPyTorch mean.")

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values; kernel and mean by their printed form and parameters."""
        values = {name: value for name, value in super().settings().items() if name not in ("kernel", "mean")}
        for name in ("kernel", "mean"):
            module = getattr(self, name)
            values[name] = None if module is None else {"module": str(module), **structure.hyperparameters(module)}
        return values

    def _prior(self, problem: Problem) -> tuple[Kernel, Module]:
        kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()) if self.kernel is None else self.kernel
        mean = gpytorch.means.ZeroMean() if self.mean is None else self.mean
        kernel, mean = copy.deepcopy(kernel).double(), copy.deepcopy(mean).double()
        row = flat(problem.batch[problem.x_name or "x"][:1])
        try:
            shape, center = tuple(kernel(row).to_dense().shape), tuple(mean(row).shape)
        except (RuntimeError, IndexError) as error:
            raise MethodError(
                f"GP(kernel=...): the kernel cannot take inputs of {row.shape[1]} columns: {error}"
            ) from None
        if (shape, center) != ((1, 1), (1,)):
            raise MethodError(f"GP(kernel=...): for one row the kernel gives shape {shape}, it must give (1, 1).")
        return kernel, mean


def _learnt_from(run: Run, learnt: bool) -> str:
    """Which rows noise and kernel were fitted on: a certificate's prior must not have seen the rows of its bound."""
    if run.learn_prior:
        return "prior rows"
    return "all rows" if learnt else "nothing"


def _gigabytes(n: int, problem: Problem) -> float:
    """Memory of the float64 matrices ``[n, n]`` that a fit holds."""
    return 8 * n**2 * (3 + 2 * _outputs(problem)) / 1e9


def _outputs(problem: Problem) -> int:
    """How many latent functions: the network's outputs."""
    row = problem.batch[problem.x_name or "x"][:1]
    with torch.no_grad():
        return math.prod(problem.model.net(row).shape[1:])
