"""Distributions that Pyro lacks in the form needed here: with a cdf, and safe under ``torch.func.vmap(grad(...))``."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

_Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]


class AsymmetricLaplace(TorchDistribution):
    """The distribution whose tau-quantile is ``loc``; its log density is the pinball loss (Yu & Moyeed, 2001, eq. 2).

    ``log p(y) = log tau(1 - tau) - log s - rho_tau(y - loc) / s`` with ``rho_tau(r) = max(tau r, (tau - 1) r)``: a
    target above ``loc`` (r = y - loc > 0) costs tau per unit, one below costs 1 - tau. Hence ``P(y <= loc) = tau``.

    Args:
        loc: the tau-quantile.
        scale: positive.
        tau: level, strictly between 0 and 1.
    """

    arg_constraints = {  # noqa: RUF012 - torch declares it as an instance attribute
        "loc": constraints.real,
        "scale": constraints.positive,
        "tau": constraints.unit_interval,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, tau: Tensor | float, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale, self.tau = broadcast_all(loc, scale, tau)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: _Shape, _instance: Any = None) -> AsymmetricLaplace:
        """The same distribution over a larger batch shape."""
        new: AsymmetricLaplace = self._get_checked_instance(AsymmetricLaplace, _instance)
        new.loc, new.scale, new.tau = (value.expand(batch_shape) for value in (self.loc, self.scale, self.tau))
        super(AsymmetricLaplace, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        if self._validate_args:
            self._validate_sample(value)
        residual = value - self.loc
        pinball = torch.maximum(self.tau * residual, (self.tau - 1) * residual)
        return self.tau.log() + torch.log1p(-self.tau) - self.scale.log() - pinball / self.scale

    def cdf(self, value: Tensor) -> Tensor:
        """``tau exp((1 - tau) r / s)`` below ``loc``, ``1 - (1 - tau) exp(-tau r / s)`` above."""
        residual = (value - self.loc) / self.scale
        below = self.tau * torch.exp((1 - self.tau) * residual.clamp(max=0))
        above = 1 - (1 - self.tau) * torch.exp(-self.tau * residual.clamp(min=0))
        return torch.where(residual < 0, below, above)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile function, the inverse of ``cdf``."""
        below = torch.log(value / self.tau) / (1 - self.tau)
        above = -torch.log((1 - value) / (1 - self.tau)) / self.tau
        return self.loc + self.scale * torch.where(value < self.tau, below, above)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature; immutable
        """A draw: the difference of two exponentials of rates tau and 1 - tau."""
        shape = self._extended_shape(sample_shape)
        up, down = (torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).exponential_() for _ in range(2))
        return self.loc + self.scale * (up / self.tau - down / (1 - self.tau))

    @property
    def mean(self) -> Tensor:
        """``loc + s (1 - 2 tau) / (tau (1 - tau))``."""
        return self.loc + self.scale * (1 - 2 * self.tau) / (self.tau * (1 - self.tau))

    @property
    def variance(self) -> Tensor:
        """``s^2 (1 - 2 tau + 2 tau^2) / (tau (1 - tau))^2``."""
        return self.scale**2 * (1 - 2 * self.tau + 2 * self.tau**2) / (self.tau * (1 - self.tau)) ** 2


class ScaleMixtureNormal(TorchDistribution):
    """``pi N(0, sigma1^2) + (1 - pi) N(0, sigma2^2)`` (Blundell et al., 2015, eq. 7), elementwise.

    Args:
        pi: weight of the first component, strictly between 0 and 1.
        sigma1: sd of the first component.
        sigma2: sd of the second component.
    """

    arg_constraints = {  # noqa: RUF012 - torch declares it as an instance attribute
        "pi": constraints.unit_interval,
        "sigma1": constraints.positive,
        "sigma2": constraints.positive,
    }
    support = constraints.real

    def __init__(
        self, pi: Tensor | float, sigma1: Tensor | float, sigma2: Tensor | float, validate_args: bool | None = None
    ) -> None:
        self.pi, self.sigma1, self.sigma2 = broadcast_all(pi, sigma1, sigma2)
        super().__init__(self.pi.shape, validate_args=validate_args)

    def expand(self, batch_shape: _Shape, _instance: Any = None) -> ScaleMixtureNormal:
        """The same distribution over a larger batch shape."""
        new: ScaleMixtureNormal = self._get_checked_instance(ScaleMixtureNormal, _instance)
        new.pi, new.sigma1, new.sigma2 = (value.expand(batch_shape) for value in (self.pi, self.sigma1, self.sigma2))
        super(ScaleMixtureNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, by logaddexp of the two components."""
        if self._validate_args:
            self._validate_sample(value)
        first = self.pi.log() - self.sigma1.log() - (value / self.sigma1) ** 2 / 2
        second = torch.log1p(-self.pi) - self.sigma2.log() - (value / self.sigma2) ** 2 / 2
        return torch.logaddexp(first, second) - math.log(2 * math.pi) / 2

    def cdf(self, value: Tensor) -> Tensor:
        """The components' cdfs, mixed."""
        first, second = torch.special.ndtr(value / self.sigma1), torch.special.ndtr(value / self.sigma2)
        return self.pi * first + (1 - self.pi) * second

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature; immutable
        """A draw: choose a component, then a Gaussian."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            first = torch.rand(shape, dtype=self.pi.dtype, device=self.pi.device) < self.pi
            noise = torch.randn(shape, dtype=self.pi.dtype, device=self.pi.device)
            scale: Tensor = torch.where(first, self.sigma1, self.sigma2)
            return scale * noise

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.sigma1)

    @property
    def variance(self) -> Tensor:
        """``pi sigma1^2 + (1 - pi) sigma2^2``."""
        return self.pi * self.sigma1**2 + (1 - self.pi) * self.sigma2**2
