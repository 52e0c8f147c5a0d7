"""Has the sampler converged? Function space first, then site by site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.errors import DataError
from bayesdl.posterior import convergence
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.tables import render

if TYPE_CHECKING:
    from bayesdl.posterior.draws import DrawsPosterior

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
        function: mixing of the likelihood's mean at the inputs.
        log_likelihood: mixing of the total log likelihood, or None where rows do not separate.
        sites: mixing of each site (each layer's weights, each bias, the noise).
        divergences: number of divergent transitions, or None where the method reports none.
        acceptance: mean acceptance statistic, or None.
        ebfmi: smallest energy fraction over chains, or None.
        chains: C.
        draws: S per chain.
    """

    function: Mixing
    log_likelihood: Mixing | None
    sites: dict[str, Mixing]
    divergences: int | None
    acceptance: float | None
    ebfmi: float | None
    chains: int
    draws: int

    @property
    def rhat(self) -> float:
        """The largest R-hat in function space."""
        return self.function.rhat

    def __str__(self) -> str:
        """A table: function space, log likelihood, then every site."""
        rows = [("predictions", self.function)]
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
    problem = posterior.problem
    sites = {name: Mixing.of(value) for name, value in posterior.draws_by_chain().items()}
    if x is None:
        keep = problem.row_names
        n = problem.density.n or 1
        some = torch.linspace(0, n - 1, min(n, ROWS)).round().long()
        inputs = {k: v[some] if k in keep else v for k, v in problem.batch.items() if k != problem.y_name}
    else:
        inputs = problem.inputs(x)
    function = predict(problem, posterior.z.flatten(0, 1), inputs).mean_by_draw
    total = None
    if problem.density.factorised:
        rows = problem.density.log_likelihood(posterior.z.flatten(0, 1)).sum(-1)
        total = Mixing.of(rows.reshape(chains, draws))
    stats = posterior.stats
    return Diagnostics(
        function=Mixing.of(function.reshape(chains, draws, *function.shape[1:])),
        log_likelihood=total,
        sites=sites,
        divergences=int(stats["divergent"].sum()) if "divergent" in stats else None,
        acceptance=float(stats["acceptance"].double().mean()) if "acceptance" in stats else None,
        ebfmi=float(convergence.ebfmi(stats["energy"]).min()) if "energy" in stats else None,
        chains=chains,
        draws=draws,
    )
