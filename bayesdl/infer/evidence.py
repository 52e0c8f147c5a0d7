"""Prior precision and noise that maximise the Laplace evidence (MacKay, 1992; Immer et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesdl.curvature.precision import Choice, precision
from bayesdl.curvature.spectrum import Block, best_precision
from bayesdl.errors import MethodError
from bayesdl.infer.loop import Run
from bayesdl.models import BayesianNetwork
from bayesdl.models.likelihoods import Gaussian
from bayesdl.posterior.problem import Problem

SETTLED = 1e-3
"""Largest gradient of the log evidence, by the logarithm of a number, at which it counts as maximal."""
MOST = 1e8
"""Largest factor, or its inverse, on the precision of the prior that the model came with."""


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        problem: with the tuned prior.
        working: the problem of which z is a mode: the same, but with the pull on the noise.
        z: the mode under it, ``[D]``.
        info: factors on the prior's precision by group, gradients there, effective numbers of parameters, rounds, and
            whether all of it is an interior maximum.
    """

    problem: Problem
    working: Problem
    z: Tensor
    info: dict[str, Any]


def tune(
    problem: Problem,
    z: Tensor,
    choice: Choice,
    run: Run,
    by_layer: bool,
    rounds: int,
    polished: Callable[[Problem, Tensor, Run], Tensor],
) -> Tuned:
    """Change the prior's precision and the noise until the evidence is stationary in them.

    At a mode with the curvature's eigenvalues d in units of the prior N(m, s^2 / lambda), and u = (z - m) / s,

        d log evidence / d log lambda = (gamma - lambda |u|^2) / 2,      gamma = sum d / (d + lambda)
        d log evidence / d log sigma  = |r|^2 / sigma^2 - (N K - gamma)  + d log p(sigma) / d log sigma

    Each round sets every lambda to the root of the first, and finds the mode again: the noise with it, in a density
    with ``gamma log sigma`` added, whose maximum is the root of the second. The dependence of the curvature on the mode
    is left out, as usual; for linear models there is none, and the result is the maximum of the exact evidence.

    Args:
        problem: with a Gaussian prior over all unknowns.
        z: a mode.
        choice: of the precision.
        run: of which each round is a stage.
        by_layer: a factor for each layer instead of one.
        rounds: most rounds.
        polished: finds a mode from a point.

    Raises:
        MethodError: the prior is not Gaussian.
    """
    prior = problem.density.gaussian_prior()
    if prior is None or not choice.network or choice.curvature == "hessian":
        raise MethodError(
            "Tuning multiplies the precision of a Gaussian prior of a network: it needs BayesianNetwork with "
            "prior=Normal(...), hyperparameters whose priors are Gaussian too (LogNormal), and 'ggn' or 'fisher'."
        )
    centre, sd = prior
    noise = _noise(problem)
    factors: dict[str, float] = {}
    gamma_before, working = 0.0, problem
    # Recorded once; a density whose prior has changed takes it over.
    problem.density.value_and_grad(z[None], target="likelihood")
    for round_ in range(rounds + 1):
        current = replace(problem, density=problem.density.with_gaussian_prior(centre, sd))
        blocks = [block for block in precision(current, z, choice) if block.prior]
        groups = _groups(blocks, by_layer)
        squares = {name: _square(z, centre, sd, group) for name, group in groups.items()}
        gammas = {name: sum(block.effective() for block in group) for name, group in groups.items()}
        gamma = sum(gammas.values())
        gradients = {name: 0.5 * (gammas[name] - squares[name]) for name in groups}
        if noise is not None:
            gradients["noise"] = gamma - gamma_before
        # Relative to gamma as well: both vanish where the prior's precision runs to infinity.
        settled = all(abs(value) < SETTLED * min(1.0, gammas.get(name, 1.0)) for name, value in gradients.items())
        factors = factors or dict.fromkeys(groups, 1.0)
        at_bound = [name for name, factor in factors.items() if not 1.01 / MOST < factor < MOST / 1.01]
        if settled or at_bound or round_ == rounds:
            break
        sd = sd.clone()
        for name, group in groups.items():
            factor = best_precision(group, squares[name], MOST)
            factor = min(max(factor * factors[name], 1 / MOST), MOST) / factors[name]
            factors[name] *= factor
            for block in group:
                sd[block.place] /= factor**0.5
        tilted = centre.clone()
        if noise is not None:
            tilted[noise] += gamma * sd[noise].square()
        working = replace(problem, density=problem.density.with_gaussian_prior(tilted, sd))
        z = polished(working, z, run.stage(f"tune {round_}"))
        gamma_before = gamma
    info = {
        "prior_precision": factors,
        "evidence_gradient": gradients,
        "effective_by_group": gammas,
        "rounds": round_,
        "interior": settled and not at_bound,
    }
    if at_bound:
        info["at_bound"] = at_bound
    return Tuned(current, working, z, info)


def _groups(blocks: list[Block], by_layer: bool) -> dict[str, list[Block]]:
    groups: dict[str, list[Block]] = {}
    for block in blocks:
        groups.setdefault(block.group if by_layer else "all", []).append(block)
    return groups


def _square(z: Tensor, centre: Tensor, sd: Tensor, group: list[Block]) -> float:
    place = torch.cat([block.place for block in group])
    return float(((z[place] - centre[place]).double() / sd[place].double()).square().sum())


def _noise(problem: Problem) -> int | None:
    """The coordinate of a Gaussian likelihood's unknown noise."""
    model = problem.model
    if isinstance(model, BayesianNetwork) and isinstance(model.likelihood, Gaussian):
        for site in problem.density.sites:
            if site.name == "noise" and site.scope == "global":
                return site.start
    return None
