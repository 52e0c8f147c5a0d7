"""The methods ``GP`` and ``NNGP``: inference over functions instead of weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gpytorch
from gpytorch import Module
from gpytorch.kernels import Kernel

from bayesdl.density import LogDensity
from bayesdl.errors import MethodError, ModelError
from bayesdl.infer import method as check
from bayesdl.infinite import structure
from bayesdl.infinite.convert import from_module
from bayesdl.infinite.gaussian_process import GaussianProcess
from bayesdl.infinite.posterior import flat
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class NNGP(GaussianProcess):
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
        solver: "cholesky" (n^3 operations), "cg" (preconditioned conjugate gradients: n^2 operations an iteration, of
            which a mean takes some dozen, and predictive variances as many for every row; Gaussian and Dirichlet
            likelihoods), or "auto": Cholesky up to max_rows rows.
        inducing: so many inducing points, the rows of largest conditional variance, instead of all rows: n m^2
            operations (Titsias, 2009; for classes Adam et al., 2021). All rows give the exact posterior.
        dirichlet: for classes, the small parameter alpha of the Dirichlet likelihood (0.01 is common), by which
            classification is regression (Milios et al., 2018); by default the variational posterior.
        max_rows: most training rows of a Cholesky factorisation. Where conjugate gradients have more, noise and kernel
            are fitted to so many random rows.
        memory: gigabytes that conjugate gradients may keep of the kernel matrix; beyond, it is computed anew at every
            iteration.

    ``info`` has the residual "cg_residual" of the mean's equations with the steps "cg_steps" it took, and the standard
    error "evidence_se" of the log evidence, which conjugate gradients estimate.

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
            model: Any = density.model
            try:
                from_module(model, w_std=self.w_std, b_std=self.b_std)
            except ModelError as error:
                return str(error).rstrip(".")
        return reason

    def _prior(self, problem: Problem) -> tuple[Kernel, Module]:
        rows = problem.batch[problem.x_name or "x"]
        kernel = structure.of_model(problem.model, rows, self.w_std, self.b_std)
        return kernel, gpytorch.means.ZeroMean()


@dataclass(frozen=True)
class GP(GaussianProcess):
    """Gaussian-process regression or classification with any GPyTorch kernel; of the model only the likelihood counts.

    Args:
        kernel: a GPyTorch kernel without batch shape; ``ScaleKernel(RBFKernel())`` by default. It is copied.
        mean: a GPyTorch mean; zero by default. It is copied.
        fit_kernel: fit the parameters of kernel and mean that require grad to the evidence, times the priors that are
            registered on them; otherwise they stay as given.
        noise: see ``NNGP``.
        steps: see ``NNGP``.
        solver: see ``NNGP``.
        inducing: see ``NNGP``.
        dirichlet: see ``NNGP``.
        max_rows: see ``NNGP``.
        memory: see ``NNGP``.

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
