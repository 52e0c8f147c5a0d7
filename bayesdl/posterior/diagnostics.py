"""Has the sampler converged? Function space first, then site by site."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.density.log_density import CHUNK
from bayesdl.errors import DataError, ModelError, NotFactorised
from bayesdl.posterior import convergence
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.tables import render

if TYPE_CHECKING:
    from bayesdl.posterior.draws import DrawsPosterior
    from bayesdl.posterior.problem import Problem

ROWS = 200
"""Training rows at which functions are compared by default, evenly spaced."""


@dataclass(frozen=True)
class Mixing:
    """The worst values over the entries of one quantity.

    Attributes:
        rhat: largest rank-normalised split R-hat.
        ess_bulk: smallest bulk effective sample size.
        ess_tail: smallest tail effective sample size.
    """

    rhat: float
    ess_bulk: float
    ess_tail: float

    @classmethod
    def of(cls, draws: Tensor) -> Mixing:
        """The worst over all entries of ``draws [C, S, ...]``; entries that never move are left out."""
        flat = draws.flatten(2) if draws.dim() > 2 else draws[..., None]
        moving = (flat != flat[:1, :1]).any(0).any(0)
        flat = flat[..., moving] if bool(moving.any()) else flat[..., :1]
        return cls(
            float(convergence.rhat(flat).max()),
            float(convergence.ess_bulk(flat).min()),
            float(convergence.ess_tail(flat).min()),
        )


@dataclass(frozen=True)
class Diagnostics:
    """What the chains say about themselves.

    Weights of a network may be stuck in one of many equivalent modes while the functions agree: ``function`` and
    ``log_likelihood`` are what counts; ``sites`` tells where to look.

    Attributes:
        function: mixing of the likelihood's mean at the inputs (the worst of all observed sites), or None where the
            program cannot be predicted with, or was not at hand.
        log_likelihood: mixing of the total log likelihood, or None where rows do not separate.
        sites: mixing of each site (each layer's weights, each bias, the noise).
        divergences: number of divergent transitions, or None where the method reports none.
        acceptance: mean acceptance statistic, or None.
        ebfmi: smallest energy fraction over chains, or None.
        chains: C.
        draws: S per chain.
    """

    function: Mixing | None
    log_likelihood: Mixing | None
    sites: dict[str, Mixing]
    divergences: int | None
    acceptance: float | None
    ebfmi: float | None
    chains: int
    draws: int

    @property
    def rhat(self) -> float:
        """The largest R-hat in function space; where that is unknown, of any latent."""
        return self.function.rhat if self.function else max(mixing.rhat for mixing in self.sites.values())

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Diagnostics:
        """Rebuild what ``to_json`` wrote."""
        of_rows = ("function", "log_likelihood")
        parts = {name: Mixing(**value[name]) if value[name] else None for name in of_rows}
        sites = {name: Mixing(**mixing) for name, mixing in value["sites"].items()}
        return cls(**{**value, **parts, "sites": sites})

    def __str__(self) -> str:
        """A table: function space, log likelihood, then every site."""
        rows = [("predictions", self.function)] if self.function else []
        rows += [("log likelihood", self.log_likelihood)] if self.log_likelihood else []
        rows += list(self.sites.items())
        table = render(
            f"{self.chains} chains x {self.draws} draws (worst entry of each row)",
            ["quantity", "R-hat", "bulk ESS", "tail ESS"],
            [[name, f"{m.rhat:.3f}", f"{m.ess_bulk:.0f}", f"{m.ess_tail:.0f}"] for name, m in rows],
        )
        notes = []
        if self.divergences is not None:
            notes.append(f"{self.divergences} divergent transitions")
        if self.acceptance is not None:
            notes.append(f"mean acceptance {self.acceptance:.2f}")
        if self.ebfmi is not None:
            notes.append(f"lowest E-BFMI {self.ebfmi:.2f}")
        return table + (", ".join(notes) + "\n" if notes else "")


def diagnose(posterior: DrawsPosterior, x: Any = None) -> Diagnostics:
    """Compute ``Diagnostics`` of a posterior with chains.

    Args:
        posterior: chains of at least 4 draws.
        x: raw inputs for function space; at most ``ROWS`` training rows by default.

    Raises:
        DataError: fewer than 4 draws per chain (an ensemble or a mode has no chains to compare).
    """
    chains, draws, _ = posterior.z.shape
    if draws < 4:
        raise DataError(
            f"Diagnostics compare chains of at least 4 draws; this posterior has {draws} per chain "
            f"({posterior.info.get('method', 'it')} is no sampler)."
        )
    flat, function, total = posterior.z.flatten(0, 1), None, None
    problem = posterior._problem if x is None else posterior.problem
    if problem is not None:
        function = _function_means(problem, flat, x)
        total = _total_log_likelihood(problem, flat)
    stats = posterior.stats
    return Diagnostics(
        function=None if function is None else Mixing.of(function.reshape(chains, draws, -1)),
        log_likelihood=None if total is None else Mixing.of(total.reshape(chains, draws)),
        sites={name: Mixing.of(value) for name, value in posterior.draws_by_chain().items()},
        divergences=int(stats["divergent"].sum()) if "divergent" in stats else None,
        acceptance=float(stats["acceptance"].double().mean()) if "acceptance" in stats else None,
        ebfmi=float(convergence.ebfmi(stats["energy"]).min()) if "energy" in stats else None,
        chains=chains,
        draws=draws,
    )


def _function_means(problem: Problem, z: Tensor, x: Any) -> Tensor | None:
    """The likelihood's means at every draw, all observed sites side by side, ``[S, ...]``."""
    if x is None:
        inputs = problem.training_inputs
        if problem.density.factorised:
            some = torch.linspace(0, problem.n - 1, min(problem.n, ROWS)).round().long()
            inputs |= {name: inputs[name][some] for name in problem.row_names if name in inputs}
    else:
        inputs = problem.inputs(x)
    try:
        means = [predict(problem, z, inputs, site=site).mean_by_draw.flatten(1) for site in problem.density.observed]
    except ModelError:  # discrete latents that all rows share, or targets of a shape that predictions do not have
        return None
    return torch.cat(means, dim=1) if means else None


def _total_log_likelihood(problem: Problem, z: Tensor) -> Tensor | None:
    """The log likelihood of all rows at every draw, ``[S]``; a part of the draws at a time."""
    try:
        return torch.cat([problem.density.log_likelihood(part).sum(-1) for part in z.split(CHUNK)])
    except NotFactorised:
        return None
