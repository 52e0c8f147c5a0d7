"""The exact log evidence of Gaussian-process regression as a function of kernel hyperparameters and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from gpytorch import Module
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bayesdl.errors import MethodError
from bayesdl.infinite.sites import condition
from bayesdl.models.positive import PositivePrior

STARTS = (0.03, 0.1, 0.3, 1.0)  # noise levels tried first, in units of the target's standard deviation


class Process:
    """A GPyTorch kernel and mean over given training rows, with the hyperparameters that are to be fitted.

    Args:
        kernel: float64, without batch shape.
        mean: a GPyTorch mean, float64.
        x: ``[n, d]`` training inputs.
        fitted: whether their parameters that require grad are coordinates.
    """

    def __init__(self, kernel: Kernel, mean: Module, x: Tensor, fitted: bool) -> None:
        self.kernel, self.mean, self.x = kernel, mean, x
        self.parameters = [p for m in (kernel, mean) for p in m.parameters() if p.requires_grad] if fitted else []

    def at(self, rows: Tensor) -> Process:
        """The same kernel and mean, hyperparameters shared, over some of the rows."""
        return Process(self.kernel, self.mean, self.x[rows], bool(self.parameters))

    @property
    def vector(self) -> Tensor:
        """The fitted hyperparameters in GPyTorch's unconstrained (raw) coordinates, ``[P]``."""
        return parameters_to_vector(self.parameters).detach() if self.parameters else self.x.new_zeros(0)

    def assign(self, vector: Tensor) -> None:
        """Give the fitted hyperparameters new raw values."""
        if self.parameters:
            vector_to_parameters(vector.clone(), self.parameters)

    def prior(self) -> tuple[Tensor, Tensor]:
        """Return the mean ``[n]`` and covariance ``[n, n]`` of the latent function at the training rows."""
        return self.mean(self.x), self.kernel(self.x).to_dense()

    def log_hyperprior(self) -> Tensor:
        """Return the log density of the priors that are registered on the kernel and mean."""
        total = self.x.new_zeros(())
        for module in (self.kernel, self.mean):
            for _, owner, prior, closure, _ in module.named_priors():
                total = total + prior.log_prob(closure(owner)).sum()
        return total

    def gradient(self, value: Tensor, extra: list[Tensor]) -> Tensor:
        """Return the gradient of a value with respect to the fitted hyperparameters and further scalars, ``[P]``."""
        wanted = [*self.parameters, *extra]
        if not wanted:
            return self.x.new_zeros(0)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(value, wanted, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        return torch.cat([part.reshape(-1) for part in parts])


def log_evidence(residual: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    """Return ``sum_c log N(y_c | mu, K + noise^2 I)``.

    Args:
        residual: ``[C, n]`` targets minus prior mean.
        covariance: ``[n, n]``.
        noise: standard deviation, a scalar.

    Raises:
        MethodError: the matrix has no Cholesky factor.

    Source: Rasmussen and Williams (2006), eq. 2.30.
    """
    n = residual.shape[-1]
    precision = noise.square().reciprocal().expand(1, n)
    # Factored once for all outputs: they share kernel and noise.
    factors = condition(covariance, (residual * precision).unsqueeze(-2), precision)
    log_det = factors.cholesky.diagonal(dim1=-2, dim2=-1).log().sum() + n * (noise.log() + 0.5 * math.log(2 * math.pi))
    return -0.5 * (residual * factors.weights.squeeze(-2)).sum() - len(residual) * log_det


class Evidence:
    """Log evidence plus the log priors of noise and hyperparameters, an objective for ``Maximise``.

    The last coordinate is the log of the noise where that is unknown. Prior densities are those of the noise and the
    hyperparameters themselves, without a Jacobian, as everywhere where this package maximises.
    """

    def __init__(self, process: Process, y: Tensor, noise: float | None, noise_prior: PositivePrior | None) -> None:
        self.process, self.y, self.noise, self.noise_prior = process, y, noise, noise_prior
        self._fixed: tuple[Tensor, Tensor] | None = None
        if not process.parameters:
            with torch.no_grad():
                self._fixed = process.prior()

    def start(self) -> Tensor:
        """The kernel's present hyperparameters, and the noise of highest evidence among a few."""
        vector = self.process.vector
        if self.noise is not None:
            return vector
        spread = float(self.y.std(correction=0)) or 1.0
        tried = [torch.cat([vector, vector.new_tensor([math.log(part * spread)])]) for part in STARTS]
        return max(tried, key=lambda z: self.evaluate(z, {})[0])

    def noise_at(self, z: Tensor) -> float:
        """The noise's standard deviation in the coordinates z."""
        return float(z[-1].exp()) if self.noise is None else self.noise

    def evaluate(self, z: Tensor, warm: Mapping[str, Tensor]) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Value and gradient; -inf where the matrix cannot be factored."""
        count = len(self.process.vector)
        self.process.assign(z[:count])
        log_noise = z[count:].detach().clone().requires_grad_()
        noise = log_noise.exp().squeeze() if self.noise is None else self.process.x.new_tensor(self.noise)
        with torch.enable_grad():
            mean, covariance = self._fixed or self.process.prior()
            try:
                value = log_evidence(self.y - mean, covariance, noise) + self.process.log_hyperprior()
            except MethodError:
                return -math.inf, torch.zeros_like(z), {}
            if self.noise is None and self.noise_prior is not None:
                value = value + self.noise_prior.distribution(noise).log_prob(noise)
            gradient = self.process.gradient(value, [log_noise] if self.noise is None else [])
        number = value.item()
        return number if math.isfinite(number) else -math.inf, gradient, {}
