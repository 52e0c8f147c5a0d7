r"""The log evidence of Gaussian-process regression as a function of kernel hyperparameters and noise.

Exact, with its gradient in closed form: with ``w_c = (K + V_c)^-1 (y_c - mu)`` and V_c the noise variances,

    d log p / dK = sum_c (w_c w_c^T - (K + V_c)^-1) / 2,    d log p / d mu = sum_c w_c,

which meets the derivatives of the kernel tile by tile (Rasmussen and Williams, 2006, eq. 5.9). With inducing points it
is Titsias' lower bound, whose small matrices are differentiated automatically.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from gpytorch import Module
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bayesdl.errors import MethodError
from bayesdl.infinite.gram import gram, gram_gradient
from bayesdl.infinite.inducing import Features, features
from bayesdl.infinite.sites import Dense, Factors, condition
from bayesdl.models.positive import PositivePrior

LARGE, WELL = 1000, 1e3  # rows and largest diagonal entry of a factor that is inverted in single precision
STARTS = (0.03, 0.1, 0.3, 1.0)  # noise levels tried first, in units of the target's standard deviation


class Process:
    """A GPyTorch kernel and mean over given training rows, with the hyperparameters that are to be fitted.

    Args:
        kernel: float64, without batch shape.
        mean: a GPyTorch mean, float64.
        x: ``[n, d]`` training inputs.
        fitted: whether their parameters that require grad are coordinates.
        inducing: ``[m, d]`` inducing points, if any.
    """

    def __init__(self, kernel: Kernel, mean: Module, x: Tensor, fitted: bool, inducing: Tensor | None = None) -> None:
        self.kernel, self.mean, self.x, self.inducing = kernel, mean, x, inducing
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

    def prior(self) -> tuple[Tensor, Dense | Features]:
        """Return the mean ``[n]`` and the covariance of the latent function at the training rows."""
        mean = self.mean(self.x)
        if self.inducing is not None:
            return mean, features(self.kernel, self.x, self.inducing)
        taped = bool(self.parameters) and torch.is_grad_enabled()
        return mean, Dense(self.kernel(self.x).to_dense() if taped else gram(self.kernel, self.x))

    def log_hyperprior(self) -> Tensor:
        """Return the log density of the priors that are registered on the kernel and mean."""
        total = self.x.new_zeros(())
        for module in (self.kernel, self.mean):
            for _, owner, prior, closure, _ in module.named_priors():
                total = total + prior.log_prob(closure(owner)).sum()
        return total

    def gradient(self, value: Tensor, slope: Tensor | None = None) -> Tensor:
        """Return the gradient of a value (``[n]`` with slopes ``[n]``) by the fitted hyperparameters, ``[P]``."""
        if not (self.parameters and value.requires_grad):
            return torch.zeros_like(self.vector)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            value, self.parameters, slope, allow_unused=True, retain_graph=True
        )
        pairs = zip(self.parameters, found, strict=True)
        return parameters_to_vector([torch.zeros_like(p) if g is None else g for p, g in pairs])

    def gradient_of_kernel(self, weights: Tensor) -> Tensor:
        """Return the gradient of ``sum_ij weights_ij K_ij``, ``[P]``, for symmetric weights ``[n, n]``."""
        if not self.parameters:
            return self.vector
        return parameters_to_vector(gram_gradient(self.kernel, self.x, weights, self.parameters))


def log_density(residual: Tensor, precision: Tensor, factors: Factors) -> Tensor:
    """Return ``sum_c log N(y_c | mu, K + diag(1 / b_c))`` from its factors (Rasmussen and Williams, eq. 2.30).

    Args:
        residual: ``[C, n]`` targets minus prior mean.
        precision: ``[C, n]`` b.
        factors: of K with these sites.
    """
    return -0.5 * (residual * factors.weights).sum() - factors.half_log_det - half_log_noise(precision)


def half_log_noise(precision: Tensor) -> Tensor:
    """Return ``sum log(2 pi / b) / 2``."""
    return 0.5 * (math.log(2 * math.pi) - precision.log()).sum()


def lower_bound(residual: Tensor, precision: Tensor, prior: Features) -> Tensor:
    """Return Titsias' bound ``log N(y | mu, Q + 1/b) - sum b left / 2`` (2009, eq. 9) with ``Q = phi phi^T``."""
    at = prior.at(residual * precision, precision)
    fit = -0.5 * (residual * precision * (residual - at.mean)).sum()
    return fit - at.half_log_det - half_log_noise(precision) - 0.5 * (precision * prior.left).sum()


class Evidence:
    """Log evidence plus the log priors of noise and hyperparameters, an objective for ``Maximise``.

    The last coordinate is the log of the noise where that is unknown. Prior densities are those of the noise and the
    hyperparameters themselves, without a Jacobian, as everywhere where this package maximises.

    Args:
        process: prior over the latent functions.
        y: ``[C, n]`` targets.
        noise: standard deviation, one for all targets, or ``[C, n]``; unknown if None.
        noise_prior: of an unknown one.
    """

    def __init__(
        self, process: Process, y: Tensor, noise: float | Tensor | None, noise_prior: PositivePrior | None
    ) -> None:
        self.process, self.y, self.noise, self.noise_prior = process, y, noise, noise_prior
        self._fixed: tuple[Tensor, Dense | Features] | None = None
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
        return max(tried, key=lambda z: self.value(z))

    def noise_at(self, z: Tensor) -> float | Tensor:
        """The noise's standard deviation in the coordinates z."""
        return float(z[-1].exp()) if self.noise is None else self.noise

    def precision_at(self, z: Tensor) -> Tensor:
        """``1 / noise^2``, ``[C, n]``."""
        return torch.as_tensor(self.noise_at(z), dtype=self.y.dtype).square().reciprocal().expand_as(self.y)

    def value(self, z: Tensor) -> float:
        """The log evidence alone, without priors; -inf where the matrix cannot be factored."""
        self.process.assign(z[: len(self.process.vector)])
        precision = self.precision_at(z)
        with torch.no_grad():
            try:
                mean, prior = self._fixed or self.process.prior()
                residual = self.y - mean
                if isinstance(prior, Features):
                    return float(lower_bound(residual, precision, prior))
                return float(log_density(residual, precision, condition(prior[0], residual * precision, precision)))
            except MethodError:
                return -math.inf

    def evaluate(self, z: Tensor, warm: Mapping[str, Tensor]) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Value and gradient; -inf where the matrix cannot be factored."""
        self.process.assign(z[: len(self.process.vector)])
        try:
            value, gradient = self._sparse(z) if self.process.inducing is not None else self._dense(z)
        except MethodError:
            return -math.inf, torch.zeros_like(z), {}
        with torch.enable_grad():
            hyperprior = self.process.log_hyperprior()
            gradient[: len(self.process.vector)] += self.process.gradient(hyperprior)
            value += hyperprior.item()
            if self.noise is None and self.noise_prior is not None:
                log_noise = z[-1].detach().clone().requires_grad_()
                noise = log_noise.exp()
                density = self.noise_prior.distribution(noise).log_prob(noise)
                gradient[-1] += torch.autograd.grad(density, log_noise)[0]
                value += density.item()
        return value if math.isfinite(value) else -math.inf, gradient, {}

    def _dense(self, z: Tensor) -> tuple[float, Tensor]:
        """Exact value and gradient: n^3 operations."""
        precision = self.precision_at(z)
        with torch.enable_grad():
            mean = self.process.mean(self.process.x)
        with torch.no_grad():
            prior = self._fixed[1] if self._fixed else Dense(gram(self.process.kernel, self.process.x))
            assert isinstance(prior, Dense)
            residual = self.y - mean
            factors = condition(prior.covariance, residual * precision, precision)
            value = float(log_density(residual, precision, factors))
            if not len(z):
                return value, torch.zeros_like(z)
            slopes = _slopes(factors)
        parts = [self.process.gradient_of_kernel(slopes) + self.process.gradient(mean, factors.weights.sum(0))]
        if self.noise is None:
            parts.append(2 * math.exp(2 * float(z[-1])) * slopes.diagonal().sum().unsqueeze(0))
        return value, torch.cat(parts)

    def _sparse(self, z: Tensor) -> tuple[float, Tensor]:
        """Lower bound and its gradient: n m^2 operations."""
        with torch.enable_grad():
            log_noise = z[-1].detach().clone().requires_grad_() if self.noise is None else z.new_zeros(())
            mean, prior = self._fixed or self.process.prior()
            assert isinstance(prior, Features)
            precision = (-2 * log_noise).exp().expand_as(self.y) if self.noise is None else self.precision_at(z)
            value = lower_bound(self.y - mean, precision, prior)
            parts = [self.process.gradient(value)]
            if self.noise is None:
                parts.append(torch.autograd.grad(value, log_noise)[0].unsqueeze(0))
        return value.item(), torch.cat(parts)


def _slopes(factors: Factors) -> Tensor:
    """Return ``d log p / dK``, ``[n, n]``, from one inverse per distinct vector of precisions."""
    shares = len(factors.weights) // len(factors.root)
    total: Tensor | None = None
    for root, cholesky in zip(factors.root, factors.cholesky, strict=True):
        inverse = inverse_of(cholesky).mul_(root).mul_(root.unsqueeze(-1))
        total = inverse if total is None else total.add_(inverse)
    assert total is not None
    return total.addmm_(factors.weights.mT, factors.weights, beta=-shares / 2, alpha=0.5)


def inverse_of(cholesky: Tensor) -> Tensor:
    """Return ``(L L^T)^-1`` in float64.

    Large and well-conditioned matrices are inverted in single precision, which halves the time of a step: from the
    factor in double precision an inverse loses digits by the condition number of L, the root of the matrix's. B has
    no eigenvalue below 1, so the largest entry of L's diagonal bounds that, up to a factor. The value of the evidence
    is not touched; its gradient is off by about 1e-5 of its two terms, where its maximum has a curvature of order n.
    """
    if len(cholesky) < LARGE or float(cholesky.diagonal().max()) > WELL:
        return torch.cholesky_inverse(cholesky)
    return torch.cholesky_inverse(cholesky.float()).double()
