"""Bayesian linear regression in closed form, for any noise level and scale of the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesdl.density import LogDensity, Site
from bayesdl.models import BayesianNetwork
from bayesdl.models.likelihoods import Gaussian
from bayesdl.posterior.covariance import Covariance, Diagonal
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import among
from bayesdl.posterior.prior import prior_law


@dataclass
class LinearGaussian:
    r"""``Y = X W^T + noise s`` with rows ``w_k ~ N(m_k, a^2 S)`` of W: posterior and evidence for all s and a.

    Given the inputs the K outputs are independent with one prior covariance and one noise, so all share one
    factorisation: with ``S = L L^T`` and ``L^T X^T X L = U diag(l) U^T`` the coordinates of ``w_k = m_k + a L U v_k``
    are independent, under the prior and under the posterior. All is computed in double precision. Source: Bishop
    (2006), Pattern Recognition and Machine Learning, sections 3.3 and 3.5. Cost F^3 once, then K F for an evidence.

    Args:
        gram: ``X^T X``, ``[F, F]``.
        moment: ``(Y - X M^T)^T X``, ``[K, F]``.
        square: ``|Y - X M^T|^2``.
        count: number of targets.
        mean: M, ``[K, F]``.
        covariance: S, of each row.
    """

    gram: Tensor
    moment: Tensor
    square: Tensor
    count: int
    mean: Tensor
    covariance: Covariance
    directions: Tensor = field(init=False)
    values: Tensor = field(init=False)
    projected: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Diagonalise."""
        root = torch.linalg.cholesky(self.covariance.double().dense())
        values, rotation = torch.linalg.eigh(root.mT @ self.gram @ root)
        self.values, self.directions = values.clamp(min=0.0), root @ rotation
        self.projected = self.moment @ self.directions

    def posterior(self, noise: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Means ``[K, F]`` of the rows given the targets, and their covariance ``[F, F]``."""
        precision = scale**-2 + self.values / noise**2
        mean = self.mean.double() + (self.projected / noise**2 / precision) @ self.directions.mT
        return mean, (self.directions / precision) @ self.directions.mT

    def log_evidence(self, log_noise: Tensor, log_scale: Tensor) -> Tensor:
        """``log N(Y; X M^T, s^2 I + a^2 X S X^T)`` over all outputs at log s and log a, differentiable."""
        variance, spread = (2 * log_noise).exp(), (2 * log_scale).exp()
        ratio = spread * self.values / variance
        explained = (self.projected.square() * spread / (1 + ratio)).sum() / variance
        log_det = self.count * (math.log(2 * math.pi) + 2 * log_noise) + len(self.projected) * ratio.log1p().sum()
        return -0.5 * (log_det + (self.square - explained) / variance)


def not_a_regression(density: LogDensity, need: str) -> str | None:
    """Why a density is not that of a network with Gaussian noise of one level, or None if it is.

    Args:
        density: of any program.
        need: what the method wants of the network, for the message.
    """
    model = density.model
    if not isinstance(model, BayesianNetwork):
        return f"it needs a BayesianNetwork, {need}; a program has no such part"
    if type(model.likelihood) is not Gaussian or model.likelihood.noise == "head":
        return f"the likelihood must be Gaussian with one noise level, and it is {model.likelihood}"
    return None


def noise_site(density: LogDensity) -> Site | None:
    """The site of the unknown noise level of a network's Gaussian likelihood, or None if there is none."""
    model = density.model
    if not (isinstance(model, BayesianNetwork) and type(model.likelihood) is Gaussian):
        return None
    return next((site for site in density.sites if site.name == "noise" and site.scope == "global"), None)


def prior_of(density: LogDensity, part: slice, z: Tensor | None) -> Normal | None:
    """The prior of some coordinates, given the others at z where it is coupled to them; None if not Gaussian."""
    law = prior_law(density)
    if law is not None:
        if not isinstance(law.covariance, Diagonal) and z is not None:
            for rest in (slice(part.stop, law.dim), slice(0, part.start)):  # the later one first: places stay
                law = law.conditional(rest, z[rest]) if rest.stop > rest.start else law
            return law
        return law.marginal(part)
    own = [site.gaussian for site in density.sites if part.start <= site.start < part.stop]
    if None in own:
        return None
    mean, sd = (torch.cat([pair[k].reshape(-1) for pair in own if pair is not None]) for k in range(2))
    return Normal(mean, Diagonal(sd))


def embedded(law: Normal, z: Tensor, part: slice) -> Normal:
    """The law of some coordinates among the others, which are points."""
    random = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    random[part] = True
    mean = z.clone()
    mean[part] = law.mean
    return Normal(mean, among(law.covariance, random))
