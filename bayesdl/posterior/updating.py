"""Bayesian updating: yesterday's posterior is today's prior."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bayesdl.data import RowIds
from bayesdl.errors import DataError, MethodError, ModelMismatch
from bayesdl.posterior import layout
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.prior import with_prior_law
from bayesdl.posterior.problem import Problem


def as_prior(posterior: Posterior | Any) -> GaussianPosterior:
    """A posterior that can be a prior: a Gaussian over the unknowns, a point nowhere.

    Raises:
        MethodError: it is something else.
        ModelRequired: it was loaded without its model.
    """
    if not isinstance(posterior, GaussianPosterior):
        kind = getattr(posterior, "info", {}).get("method", type(posterior).__name__)
        raise MethodError(
            f"prior={kind}: only a Gaussian posterior can be the prior of a further fit, such as MeanFieldVI's; draws "
            "and modes have no density. Fit the first data with a method that gives a Gaussian."
        )
    variances = posterior.law.covariance.variances()
    bad = torch.nonzero(~(variances.isfinite() & (variances > 0))).flatten()
    if len(bad):
        sites = posterior.problem.density.sites
        names = [site.name for site in sites if bool(((bad >= site.start) & (bad < site.stop)).any())]
        raise MethodError(
            f"prior=: the posterior is a point at {len(bad)} of its {len(variances)} coordinates (in {names}); no data "
            "could move these again, and a prior needs a positive variance everywhere. Fit the first data with a "
            "method that is uncertain of them (MeanFieldVI, or Laplace(structure='full', curvature='hessian')), or "
            "give the likelihood a known noise, as in likelihoods.Gaussian(noise=0.5)."
        )
    return posterior


def updated(problem: Problem, posterior: GaussianPosterior) -> Problem:
    """The problem under the posterior's law as its prior, which has seen the posterior's rows.

    ``problem`` must be in the posterior's units: a scaler of its own would change what the weights mean.

    Raises:
        ModelMismatch: the model has other sites than the posterior.
        DataError: other classes, or rows that the posterior has already learnt from.
        ModelError: the program's prior cannot be replaced.
    """
    before = posterior.problem
    got, wanted = layout.describe(problem.density), layout.describe(before.density)
    if got != wanted:
        there = {site["name"]: site["shape"] for site in wanted}
        here = {site["name"]: site["shape"] for site in got}
        wrong = [f"{name}: {here.get(name)} instead of {there.get(name)}" for name in {**there, **here}
                 if here.get(name) != there.get(name)] or ["their order or supports"]  # fmt: skip
        raise ModelMismatch(
            f"prior=: the model's sites are not those of the posterior; different are {'; '.join(wrong)}. A posterior "
            "can be the prior of the same model only."
        )
    if before.classes and problem.classes and problem.classes != before.classes:
        raise DataError(
            f"prior=: the data have the classes {', '.join(problem.classes)}, the posterior "
            f"{', '.join(before.classes)}: the codes would not mean the same. Make the Dataset with classes= as in the "
            "first fit."
        )
    again = 0 if problem.rows is None or before.rows is None else problem.rows.overlap(before.rows)
    if again:
        raise DataError(
            f"prior=: the posterior has already learnt from {again} of these {len(problem.rows or ())} rows; under its "
            "prior they would count twice. Fit on the new rows alone."
        )
    density = with_prior_law(problem.density, posterior.law)
    if before.rows is None or problem.rows is None:
        # Nobody knows which rows the prior has seen, so nothing may be said about which are new.
        return replace(problem, density=density, rows=None, prior_rows=None)
    seen = [part for part in (before.rows, before.prior_rows, problem.prior_rows) if part is not None]
    return replace(problem, density=density, prior_rows=RowIds.concat(seen).unique()[0])
