"""Variational inference with Gaussians: independent coordinates, low rank, matrix normal, and full covariance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bayesdl.density import LogDensity
from bayesdl.density.sites import random_sites
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.gaussian_families import Family, FullRank, LowRankPlusDiagonal, MeanField
from bayesdl.infer.gaussian_vi import GaussianVI
from bayesdl.infer.loop import Run
from bayesdl.infer.matrix_normal import Independent, MatrixNormal
from bayesdl.infer.row_noise import KINDS
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import MOST_DENSE
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class MeanFieldVI(GaussianVI):
    r"""Maximises the ELBO over q = N(mean, diag sd^2): Gaussians with independent coordinates (Blundell et al., 2015).

    The settings are those of ``GaussianVI``. On a Gaussian posterior the optimum has its mean, and the variances
    1 / diag(precision): smaller than the marginal ones wherever coordinates depend on each other.

    With ``fit(..., prior_rows=A)`` the method first runs on the rows A alone; the Gaussian that it finds is the prior
    for the run on the other rows. Scaler and prior then have not seen the rows that a PAC-Bayes bound counts.
    """

    name: ClassVar[str] = "MeanFieldVI"
    learns_prior: ClassVar[bool] = True
    estimators: ClassVar[tuple[str, ...]] = (*GaussianVI.estimators, *KINDS)

    def family(self, density: LogDensity) -> MeanField:
        """Independent coordinates."""
        return MeanField(self.dim(density))

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        return self._fit_with_learnt_prior(problem, run) if run.learn_prior else super()._fit(problem, run)

    def _fit_with_learnt_prior(self, problem: Problem, run: Run) -> Posterior:
        """The Bayesian update in two stages: q on rows A is the prior of the run on the other rows."""
        if self.temperature != 1:
            raise MethodError(
                f"{self.name}(temperature={self.temperature!r}) with prior_rows would temper the learnt prior twice; "
                "use temperature=1 (likelihood_temperature is possible)."
            )
        if not bool(self.where_random(problem.density).all()):
            raise MethodError(
                f"{self.name} with prior_rows learns a density for every coordinate; it cannot have points. Use "
                "random='*', and give every pyro.param a prior."
            )
        early = problem.of_prior()
        first, second = (problem.restrict(index.nonzero().flatten()) for index in (early, ~early))
        stage = run.stage("prior")
        stage.init = run.init
        prior, prior_info = self.approximate(first, stage, lambda: self._start(first, stage))
        if run.tally.interrupted:
            raise run.too_early("the prior was learnt")
        sd = prior.covariance.variances().sqrt()
        update = replace(second, density=second.density.with_gaussian_prior(prior.mean, sd))
        law, info = self.approximate(update, run, lambda: torch.cat([prior.mean, sd.log()]))
        info["prior"] = {"rows": int(early.sum()), **prior_info}
        # The posterior has seen all rows; what it is compared with is the learnt prior.
        learnt = replace(problem, density=problem.density.with_gaussian_prior(prior.mean, sd))
        return GaussianPosterior(learnt, law, info)


@dataclass(frozen=True)
class LowRankVI(GaussianVI):
    """Maximises the ELBO over q = N(mean, diag sd^2 + F F^T) with F of a few columns (Ong et al., 2018).

    The settings are those of ``GaussianVI``, and the rank. The parameters take D (rank + 2) numbers. With rank D - 1
    the family holds every Gaussian.

    Args:
        rank: columns of F.
    """

    name: ClassVar[str] = "LowRankVI"

    rank: int = 10

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, rank=self.rank)

    def family(self, density: LogDensity) -> LowRankPlusDiagonal:
        """Low rank plus diagonal."""
        return LowRankPlusDiagonal(self.dim(density), self.rank)


@dataclass(frozen=True)
class MatrixNormalVI(GaussianVI):
    """Maximises the ELBO over a matrix normal for each weight matrix (Louizos & Welling, 2016).

    The settings are those of ``GaussianVI``. A site ``[O, ...]`` of two or more dimensions, such as the weight of a
    linear or convolutional layer, is a matrix ``W [O, I]`` with ``cov(W) = U x V``, the outputs' dependence times the
    inputs'; other sites have independent coordinates, and sites do not depend on each other. It takes O^2 + I^2 numbers
    for O I weights, and a draw O I (O + I).
    """

    name: ClassVar[str] = "MatrixNormalVI"

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        reason = super().applies_to(density)
        if reason is None:
            for part in self.family(density).parts:
                if isinstance(part, MatrixNormal) and max(part.rows, part.columns) > MOST_DENSE:
                    return (
                        f"a weight of {part.rows} x {part.columns} has a covariance of its longer side of more than "
                        f"{MOST_DENSE} numbers squared; use LowRankVI, or random='...' for smaller layers"
                    )
        return reason

    def family(self, density: LogDensity) -> Independent:
        """A family for each site."""
        parts: list[Family] = []
        for site in random_sites(density.sites, self.random):
            rows = site.unconstrained_shape[0] if len(site.unconstrained_shape) > 1 else 1
            columns = site.size // rows
            parts.append(MatrixNormal(site.size, rows, columns) if min(rows, columns) > 1 else MeanField(site.size))
        return Independent(self.dim(density), tuple(parts))


@dataclass(frozen=True)
class FullRankVI(GaussianVI):
    """Maximises the ELBO over all Gaussians q, by their Cholesky factor.

    The settings are those of ``GaussianVI``. On a Gaussian posterior the optimum is the posterior, and the ELBO the
    log evidence. It carries some R x R matrices for R random coordinates, and a draw costs R^2.
    """

    name: ClassVar[str] = "FullRankVI"

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        count = self.dim(density)
        if count > MOST_DENSE:
            gigabytes = 8 * count**2 * density.dtype.itemsize / 2**30
            return (
                f"a full covariance of {count} coordinates takes about {gigabytes:,.0f} GiB with its optimiser; use "
                "LowRankVI, or random='...' for the sites that need it (a last layer, say)"
            )
        return super().applies_to(density)

    def family(self, density: LogDensity) -> FullRank:
        """All Gaussians."""
        return FullRank(self.dim(density))
