"""What Gaussian variational inference maximises, and estimates of its gradient by draws of z."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.density.gaussian_part import GaussianPart
from bayesdl.density.log_density import Target
from bayesdl.infer.gaussian_families import Family
from bayesdl.posterior.importance import MOST_NUMBERS, log_density
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import among
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.infer.gaussian_vi import GaussianVI


@dataclass
class Objective(ABC):
    """The bound as a function of flat parameters ``[P]``: the mean ``[D]`` and then the family's spread.

    A subclass is an estimator of its gradient.

    Attributes:
        method: the settings.
        problem: the model and its data.
        random: which coordinates are Gaussian, booleans ``[D]``; the others are points.
        family: of the random coordinates.
        batch_size: rows in a mini-batch; None takes all rows.
        fewest: draws that an estimate takes at least.
    """

    fewest: ClassVar[int] = 1

    method: GaussianVI
    problem: Problem
    random: Tensor
    family: Family
    batch_size: int | None

    def __post_init__(self) -> None:
        """Look at the prior."""
        density = self.problem.density
        # Under a temperature the prior's part is tempered too, and the closed form no longer fits.
        prior = density.gaussian_prior() if self.method.temperature == 1 else None
        self.prior = None if prior is None else GaussianPart(frozenset(), prior[0], prior[1].square().reciprocal())
        self.places = None if bool(self.random.all()) else self.random.nonzero().flatten()

    @property
    def density(self) -> LogDensity:
        """What the steps evaluate."""
        return self.problem.density

    @property
    def paired(self) -> bool:
        """Whether draws come as antithetic pairs: not for importance weights, which take independent draws."""
        return self.method.alpha == 1

    @abstractmethod
    def expect(self, total: int) -> None:
        """Tell the density how many gradients are to come, so that it may compile itself."""

    @abstractmethod
    def estimate(
        self, parameters: Tensor, noise: Any, batch: dict[str, Any] | None, kl_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Estimates of the ELBO, and the gradient of the objective.

        Args:
            parameters: ``[P]``.
            noise: as ``noise`` gives it.
            batch: a mini-batch or None.
            kl_weight: beta; the estimates have beta = 1 all the same.

        Returns:
            ``[S]``, one for each draw if they can be told apart, and ``[P]``.
        """

    def noise(self, samples: int, stream: torch.Generator) -> Any:
        """What is random in an estimate with some draws."""
        return self.normals(samples, stream)

    def normals(self, samples: int, stream: torch.Generator) -> Tensor:
        """Standard normal numbers ``[samples, noise_dim]`` behind draws of z.

        In pairs, the second half is the negative of the first, which cancels odd powers.
        """
        count = (samples + 1) // 2 if self.paired else samples
        density = self.problem.density
        half = torch.empty(count, self.family.noise_dim, dtype=density.dtype, device=density.device)
        half.normal_(generator=stream)
        return half if count == samples else torch.cat([half, -half])[:samples]

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[D]`` and spread ``[size]``."""
        return parameters[: len(self.random)], parameters[len(self.random) :]

    def law(self, parameters: Tensor) -> Normal:
        """The Gaussian that parameters stand for."""
        mean, spread = self.split(parameters)
        return Normal(mean, among(self.family.settled(spread), self.random))

    def log_weights(self, parameters: Tensor, normals: Tensor) -> Tensor:
        """Log density (of all rows) less log q, at the draws that ``normals [S, noise_dim]`` give; ``[S]``."""
        mean, spread = self.split(parameters)
        covariance, found = self.family.covariance(spread), []
        for part in normals.split(max(1, MOST_NUMBERS // len(mean))):
            away = covariance.scaled(part)
            value = log_density(self.problem, self._displaced(mean, away), self.batch_size)
            found.append(value + self._minus_log_q(spread, away, covariance.solve(away)))
        return torch.cat(found)

    def bound(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """The bound of order alpha, ``log mean w^(1 - alpha) / (1 - alpha)``, and its standard error."""
        order = 1.0 - self.method.alpha
        if order == 0.0:
            return log_weights.mean(), standard_error(log_weights, paired=self.paired)
        count = len(log_weights)
        bound = (torch.logsumexp(order * log_weights, 0) - math.log(count)) / order
        return bound, standard_error((order * (log_weights - bound)).exp(), paired=False) / order

    # -- for the estimators ------------------------------------------------------------------------------------

    def _displaced(self, base: Tensor, away: Tensor, factor: float = 1.0) -> Tensor:
        """``base [D]`` or ``[S, D]`` plus a multiple of rows ``[S, R]`` at the random coordinates."""
        if self.places is None:
            return torch.add(base, away, alpha=factor)
        return base.expand(len(away), -1).index_add(1, self.places, away, alpha=factor)

    def _minus_log_q(self, spread: Tensor, away: Tensor, score: Tensor) -> Tensor:
        """At draws that are ``away [S, R]`` from the mean, with ``score = S^-1 away``; ``[S]``."""
        return self._entropy(spread) + 0.5 * (torch.linalg.vecdot(away, score) - self.family.dim)

    def _entropy(self, spread: Tensor) -> Tensor:
        return self.family.half_log_det(spread) + 0.5 * self.family.dim * math.log(2.0 * math.pi * math.e)

    def _prior_pull(self, z: Tensor) -> Tensor:
        """Minus the gradient of the log prior, which is Gaussian, at ``z [..., D]``."""
        assert self.prior is not None  # the method refuses a weight of the KL otherwise
        return (z - self.prior.mean) * self.prior.precision

    def _prior_precision(self) -> Tensor:
        """That of the random coordinates, ``[R]``."""
        assert self.prior is not None  # only called with the closed form
        return self.prior.precision if self.places is None else self.prior.precision[self.places]

    def _prior_at(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Log density of the Gaussian prior at the mean, and minus its gradient."""
        assert self.prior is not None  # only called with the closed form
        offset = mean - self.prior.mean
        pull = offset * self.prior.precision
        return self.prior.constant - 0.5 * torch.dot(offset, pull), pull


@dataclass
class PathObjective(Objective):
    """Gradients along draws z = mean + A e ("sticking", "reparameterisation")."""

    def __post_init__(self) -> None:
        """Decide how the bound is written."""
        super().__post_init__()
        self.closed = self.method.estimator == "reparameterisation" and self.prior is not None
        self.target: Target = "likelihood" if self.closed else "posterior"

    def expect(self, total: int) -> None:
        """See the base class."""
        density = self.density
        z = torch.zeros(self.method.samples, density.dim, dtype=density.dtype, device=density.device)
        batch = None if self.batch_size is None else self.problem.minibatch(torch.arange(self.batch_size))
        density.expect(total, z, batch, target=self.target)

    def estimate(
        self, parameters: Tensor, noise: Tensor, batch: dict[str, Any] | None, kl_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See the base class.

        With z = mean + A e and g the gradient of the density at z, the path's slope is h = g + S^-1 A e ("sticking":
        that of log density - log q, with q held fixed) or h = g ("reparameterisation"; the entropy, or the KL from a
        Gaussian prior, is then added in closed form). The mean moves along the weighted sum of h, the spread along what
        the family pulls back through A.
        """
        mean, spread = self.split(parameters)
        covariance = self.family.covariance(spread)
        away = covariance.scaled(noise)
        z = self._displaced(mean, away)
        value, slope = self.density.value_and_grad(z, batch, target=self.target)
        if self.closed:
            log_prior, prior_pull = self._prior_at(mean)
            trace = torch.dot(self._prior_precision(), covariance.variances())
            value = value + (log_prior - 0.5 * trace + self._entropy(spread))
        elif self.method.estimator == "sticking":
            score = covariance.solve(away)
            value = value + self._minus_log_q(spread, away, score)
            slope = self._displaced(slope, score, kl_weight)
        else:
            value = value + self._entropy(spread)
        if kl_weight != 1.0 and not self.closed:
            slope = slope + (1.0 - kl_weight) * self._prior_pull(z)
        if len(slope) > 1:
            slope = slope * self._shares(value)[:, None]
        own = slope if self.places is None else slope[:, self.places]
        moved = slope.sum(0) if len(slope) > 1 else slope[0]
        spread_gradient = self.family.pull(spread, noise, away, own)
        if self.method.estimator == "reparameterisation":
            spread_gradient = spread_gradient + kl_weight * self.family.entropy_gradient(spread)
        if self.closed:
            moved = moved - kl_weight * prior_pull
            pull = self.family.trace_gradient(spread, self._prior_precision())
            spread_gradient = spread_gradient - kl_weight * pull
        return value, torch.cat([moved, spread_gradient])

    def _shares(self, value: Tensor) -> Tensor:
        """How much each draw's slope counts, ``[S]``: equally in the ELBO.

        In the bound of order alpha it is ``alpha v + (1 - alpha) v^2`` with v the normalised weights w^(1 - alpha)
        (Daudel et al., 2023, theorem 2; with alpha = 0 the gradient of Tucker et al., 2019).
        """
        alpha = self.method.alpha
        if alpha == 1:
            return torch.full_like(value, 1.0 / len(value))
        weights = ((1.0 - alpha) * value).softmax(0)
        return alpha * weights + (1.0 - alpha) * weights.square()


def standard_error(estimates: Tensor, *, paired: bool = True) -> Tensor:
    """Standard error of a mean of estimates; NaN with fewer than two, or two pairs.

    Args:
        estimates: ``[S]``.
        paired: whether their halves are antithetic pairs.
    """
    pairs = len(estimates) // 2
    means = (estimates[:pairs] + estimates[-pairs:]) / 2 if paired and 2 * pairs == len(estimates) else estimates
    return means.std() / math.sqrt(len(means)) if len(means) > 1 else means.new_tensor(math.nan)
