"""How far an approximation is from the posterior: Pareto-smoothed importance sampling with its draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl.density.log_density import Target
from bayesdl.errors import MethodError
from bayesdl.posterior.arviz_export import require_arviz
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.posterior.base import Posterior

MOST_NUMBERS = 2**24
"""Numbers in the draws at which the density is evaluated at once."""
GOOD, USABLE = 0.5, 0.7
"""k-hat below which importance sampling has finite variance, and below which it works in practice."""
FEWEST = 25
"""Draws below which there is no tail to fit."""
EQUAL = 1e-6
"""Spread of the log weights below which they are equal: a tail fitted to rounding errors would say nothing."""


@dataclass(frozen=True)
class Importance:
    """Draws of an approximation q, weighted by density / q.

    Attributes:
        z: draws of q, ``[S, D]``, in unconstrained coordinates.
        log_weights: normalised and Pareto-smoothed, ``[S]``.
        k_hat: shape of the Pareto tail of the weights (Vehtari et al., 2024); -inf where all weights are equal.
        ess: ``1 / sum of squared weights``: independent draws of the posterior that these are worth.
        log_evidence: log of the mean weight, an estimate of the log normaliser of the density: log p(y) at temperature
            1. Of coordinates that are points it is the joint one: log p(y, points), or log p(y; parameters).
        log_evidence_error: its standard error, by the delta method; it means something where k_hat is below 0.5.
    """

    z: Tensor
    log_weights: Tensor
    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_error: float

    @property
    def reliable(self) -> bool:
        """Whether weighted draws can be trusted: k-hat below 0.7, and below what S draws can show."""
        return self.k_hat < min(USABLE, 1.0 - 1.0 / math.log10(len(self.z)))

    @property
    def verdict(self) -> str:
        """What k-hat says, in words."""
        if self.k_hat < GOOD and self.reliable:
            return "the approximation is close to the posterior, and its weighted draws correct what is left"
        if self.reliable:
            return "the approximation misses part of the posterior's tails; its weighted draws still work"
        return (
            "the approximation is far from the posterior somewhere: neither its draws nor their weights can be trusted "
            "for all quantities; take a richer family or a sampler (predictions alone may still be good: check them)"
        )

    def __str__(self) -> str:
        """k-hat, effective draws, evidence, verdict."""
        return (
            f"k-hat {self.k_hat:.2f}; {self.ess:.0f} effective draws of {len(self.z)}; log evidence "
            f"{self.log_evidence:.4g} +- {self.log_evidence_error:.2g}\n{self.verdict}"
        )


def importance(posterior: Posterior, draws: int, seed: int, batch_size: int | None) -> Importance:
    """See ``Posterior.importance``."""
    if draws < FEWEST:
        raise MethodError(f"importance(draws={draws}): the tail of the weights takes at least {FEWEST} draws.")
    z, log_q = posterior.draws_and_log_prob(draws, seed)
    raw = (log_density(posterior.problem, z, batch_size) - log_q).double()
    if raw.isnan().any() or (raw == math.inf).any() or not raw.isfinite().any():
        raise MethodError("The density is not a number, or infinite, at some draws: they have no importance weights.")
    if float(raw.max() - raw.min()) < EQUAL:
        smoothed, k_hat = raw, -math.inf
    else:
        found, shape = require_arviz().psislw(raw.numpy(force=True), normalize=False)
        smoothed, k_hat = torch.as_tensor(found, device=raw.device), float(shape)
    normalised = smoothed - torch.logsumexp(smoothed, 0)
    ratio = normalised.exp() * draws  # weights over their mean
    return Importance(
        z=z,
        log_weights=normalised,
        k_hat=k_hat,
        ess=float(normalised.exp().square().sum().reciprocal()),
        log_evidence=float(torch.logsumexp(smoothed, 0)) - math.log(draws),
        log_evidence_error=float(ratio.std()) / math.sqrt(draws),
    )


def log_density(problem: Problem, z: Tensor, batch_size: int | None = None, target: Target = "posterior") -> Tensor:
    """The log density with all rows at ``z [S, D]``, some draws and ``batch_size`` rows at a time; ``[S]``."""
    parts = z.split(max(1, MOST_NUMBERS // z.shape[1]))
    return torch.cat([_part(problem, part, batch_size, target) for part in parts])


def _part(problem: Problem, z: Tensor, batch_size: int | None, target: Target) -> Tensor:
    if batch_size is None or batch_size >= problem.n:
        return problem.density.log_density(z, target=target)
    density, total, prior = problem.density, z.new_zeros(len(z)), None
    for rows in torch.arange(problem.n).split(batch_size):
        part = problem.minibatch(rows)
        likelihood = density.log_density(z, part, target="likelihood")  # scaled up to all rows
        prior = density.log_density(z, part, target=target) - likelihood if prior is None else prior
        total += likelihood * (len(rows) / problem.n)
    return total if prior is None else total + prior
