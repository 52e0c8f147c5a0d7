"""Has the sampler converged? Function space first, then site by site, then what the sampler says of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.density.log_density import CHUNK
from bayesdl.errors import DataError
from bayesdl.posterior import convergence
from bayesdl.posterior.agreement import Agreement, agreement
from bayesdl.posterior.divergences import Place
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.tables import render

if TYPE_CHECKING:
    from bayesdl.posterior.draws import DrawsPosterior
    from bayesdl.posterior.problem import Problem
    from bayesdl.posterior.verdict import Verdict

ROWS = 200
"""Training rows at which functions are compared by default, evenly spaced."""
FEWEST_ROWS, ROW_CELLS = 20, 2**22
"""With very many draws there are fewer rows: at most so many draws times rows, but at least so many rows."""
CELLS = 2**23
"""Draws times entries of one quantity that are looked at; of a larger one, evenly spaced entries."""
LOW_EBFMI = 0.3
"""E-BFMI below which a chain's momenta move too little of the energy."""
SETTINGS = ("warmup", "draws", "chains", "target_accept", "max_depth")
"""Settings of the method that the verdict's advice speaks of."""


@dataclass(frozen=True)
class Mixing:
    """The worst values over the entries of one quantity.

    Attributes:
        rhat: largest rank-normalised split R-hat (or nested R-hat, see ``Diagnostics.superchains``).
        ess_bulk: smallest bulk effective sample size; NaN for chains of fewer than 4 draws.
        ess_tail: smallest tail effective sample size; NaN likewise.
    """

    rhat: float
    ess_bulk: float
    ess_tail: float

    @classmethod
    def of(cls, draws: Tensor, superchains: int | Sequence[int] | None = None) -> Mixing:
        """The worst over all entries of ``draws [C, S, ...]``; entries that never move are left out."""
        flat = draws.flatten(2) if draws.dim() > 2 else draws[..., None]
        chains, length, entries = flat.shape
        most = max(1, CELLS // (chains * length))
        if entries > most:
            flat = flat[..., torch.linspace(0, entries - 1, most, dtype=torch.float64).round().long()]
        moving = (flat != flat[:1, :1]).any(0).any(0)
        flat = flat[..., moving] if bool(moving.any()) else flat[..., :1]
        if length < 4 and superchains is not None:
            return cls(float(convergence.nested_rhat(flat, superchains).max()), math.nan, math.nan)
        rhat, bulk, tail = convergence.mixing(flat)
        if superchains is not None:
            rhat = convergence.nested_rhat(flat, superchains)
        return cls(float(rhat.max()), float(bulk.min()), float(tail.min()))


@dataclass(frozen=True)
class Diagnostics:
    """What the chains say about themselves; ``verdict`` says it in words.

    Weights of a network may be stuck in one of many equivalent modes while the functions agree: ``function``,
    ``function_squared`` and ``log_likelihood`` are what counts; ``sites`` tells where to look.

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
        function_squared: mixing of (f - mean f)^2, f the likelihood's mean at the inputs, or None as ``function``:
            antithetic trajectories flatter the mean, not the spread.
        apart: chains that have not mixed with the others: in function space and log likelihood where these are known,
            else in the latents. Empty where no more than half of the chains agree.
        moving: chains whose second half lies elsewhere than their first.
        agreeing: size of the largest group of chains that agree; None in files of earlier versions.
        frozen: chains that never moved.
        low_ebfmi: chains with an energy fraction below 0.3.
        divergent_chains: chains with divergences.
        places: latents at whose ends the divergences gather.
        saturated: share of the transitions that reached the largest tree depth, or None.
        superchains: number of superchains where R-hat is nested R-hat, else None.
        method: name of the method, or "".
        settings: settings of the method that advice speaks of.
    """

    function: Mixing | None
    log_likelihood: Mixing | None
    sites: dict[str, Mixing]
    divergences: int | None
    acceptance: float | None
    ebfmi: float | None
    chains: int
    draws: int
    function_squared: Mixing | None = None
    apart: tuple[int, ...] = ()
    moving: tuple[int, ...] = ()
    agreeing: int | None = None
    frozen: tuple[int, ...] = ()
    low_ebfmi: tuple[int, ...] = ()
    divergent_chains: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()
    saturated: float | None = None
    superchains: int | None = None
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def rhat(self) -> float:
        """The largest R-hat in function space; where that is unknown, of any latent."""
        return self.function.rhat if self.function else max(mixing.rhat for mixing in self.sites.values())

    @property
    def verdict(self) -> Verdict:
        """The findings in words, the gravest first, each with what to do next."""
        from bayesdl.posterior.verdict import judge

        return judge(self)

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Diagnostics:
        """Rebuild what ``to_json`` wrote."""
        of_rows = ("function", "log_likelihood", "function_squared")
        chains = ("apart", "moving", "frozen", "low_ebfmi", "divergent_chains")
        parts: dict[str, Any] = {name: Mixing(**value[name]) if value.get(name) else None for name in of_rows}
        parts |= {name: tuple(value.get(name, ())) for name in chains}
        parts["places"] = tuple(Place(**place) for place in value.get("places", ()))
        parts["sites"] = {name: Mixing(**mixing) for name, mixing in value["sites"].items()}
        return cls(**{**value, **parts})

    def __str__(self) -> str:
        """A table (function space, log likelihood, then every site), the sampler's statistics, and the verdict."""
        of_rows = (
            ("predictions", self.function),
            ("(f - mean f)^2", self.function_squared),
            ("log likelihood", self.log_likelihood),
        )
        rows = [(name, mixing) for name, mixing in of_rows if mixing is not None] + list(self.sites.items())
        table = render(
            f"{self.chains} chains x {self.draws} draws (worst entry of each row)",
            ["quantity", "R-hat" if self.superchains is None else "nested R-hat", "bulk ESS", "tail ESS"],
            [[name, f"{m.rhat:.3f}", f"{m.ess_bulk:.0f}", f"{m.ess_tail:.0f}"] for name, m in rows],
        )
        notes = []
        if self.divergences is not None:
            notes.append(f"{self.divergences} divergent transitions")
        if self.acceptance is not None:
            notes.append(f"mean acceptance {self.acceptance:.2f}")
        if self.ebfmi is not None:
            notes.append(f"lowest E-BFMI {self.ebfmi:.2f}")
        return f"{table}{', '.join(notes)}{chr(10) if notes else ''}{self.verdict}\n"


def diagnose(
    posterior: DrawsPosterior, x: Any = None, *, superchains: int | Sequence[int] | None = None
) -> Diagnostics:
    """Compute ``Diagnostics`` of a posterior with chains.

    Args:
        posterior: chains of at least 4 draws, or of at least 1 with ``superchains``.
        x: raw inputs for function space; at most ``ROWS`` training rows by default.
        superchains: number or labels of the groups of chains that started together; then R-hat is nested R-hat (see
            ``convergence.nested_rhat``). By default what the posterior's ``info`` says, if anything.

    Raises:
        DataError: fewer than 4 draws per chain (an ensemble or a mode has no chains to compare) and no superchains.
    """
    chains, draws = posterior.shape
    superchains = posterior.info.get("superchains") if superchains is None else superchains
    if draws < 4 and superchains is None:
        raise DataError(
            f"Diagnostics compare chains of at least 4 draws; this posterior has {draws} per chain "
            f"({posterior.info.get('method', 'it')} is no sampler). Many shorter ones need superchains=."
        )
    function = total = None
    if (posterior._problem if x is None else posterior.problem) is not None:
        function, total = posterior.function_means(x), posterior.total_log_likelihood()
    of_rows = [] if function is None else [function.flatten(2)]
    of_rows += [] if total is None else [total[..., None]]
    most = max(1, CELLS // (chains * draws))
    compared = [part.double().cpu() for part in of_rows] or [posterior.coordinates(most)]
    found = agreement(torch.cat(compared, -1)) if draws >= 4 else Agreement((), (), chains)
    squared = None if function is None else (function - function.flatten(0, 1).mean(0)).square()
    return Diagnostics(
        function=None if function is None else Mixing.of(of_rows[0], superchains),
        function_squared=None if squared is None else Mixing.of(squared, superchains),
        log_likelihood=None if total is None else Mixing.of(of_rows[-1], superchains),
        sites={name: Mixing.of(value, superchains) for name, value in posterior.site_draws(most)},
        chains=chains,
        draws=draws,
        apart=found.apart,
        moving=found.moving,
        agreeing=found.agreeing,
        frozen=_chains(posterior.frozen()) if draws > 1 else (),
        superchains=superchains if isinstance(superchains, int) or superchains is None else len(set(superchains)),
        **_statistics(posterior),
    )


def _statistics(posterior: DrawsPosterior) -> dict[str, Any]:
    """What the sampler recorded; None for what it does not record."""
    stats, info = posterior.stats, posterior.info
    settings = {name: value for name, value in info.get("settings", {}).items() if name in SETTINGS}
    found: dict[str, Any] = {"divergences": None, "acceptance": None, "ebfmi": None, "settings": settings}
    found["method"] = info.get("method", "")
    if "divergent" in stats:
        found["divergences"] = int((stats["divergent"] != 0).sum())
        found["divergent_chains"] = _chains((stats["divergent"] != 0).any(1))
        found["places"] = posterior.divergence_places() if found["divergences"] else ()
    if "acceptance" in stats:
        found["acceptance"] = float(stats["acceptance"].double().mean())
    if "energy" in stats and stats["energy"].shape[1] >= 4:
        fractions = convergence.ebfmi(stats["energy"])
        known = fractions[fractions.isfinite()]  # a chain that never moves has none
        found["ebfmi"] = float(known.min()) if len(known) else None
        found["low_ebfmi"] = _chains(fractions < LOW_EBFMI)
    if "depth" in stats and "max_depth" in settings:
        found["saturated"] = float((stats["depth"] >= settings["max_depth"]).double().mean())
    return found


def _chains(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def compared_inputs(problem: Problem, draws: int, x: Any = None) -> dict[str, Any]:
    """The program's arguments at which functions are compared: raw inputs, or by default some training rows.

    Args:
        problem: model and data.
        draws: how many draws there are, of all chains.
        x: raw inputs.
    """
    if x is not None:
        return problem.inputs(x)
    inputs = problem.training_inputs
    if problem.density.factorised:
        most = min(problem.n, ROWS, max(FEWEST_ROWS, ROW_CELLS // draws))
        some = torch.linspace(0, problem.n - 1, most).round().long()
        inputs |= {name: inputs[name][some] for name in problem.row_names if name in inputs}
    return inputs


def function_means(problem: Problem, z: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The likelihood's means at draws ``z [S, D]``, all observed sites side by side, ``[S, P]``."""
    means = [predict(problem, z, inputs, site=site).mean_by_draw.flatten(1) for site in problem.density.observed]
    return torch.cat(means, dim=1)


def total_log_likelihood(problem: Problem, z: Tensor) -> Tensor:
    """The log likelihood of all rows at draws ``z [S, D]``, ``[S]``; a part of the draws at a time."""
    return torch.cat([problem.density.log_likelihood(part).sum(-1) for part in z.split(CHUNK)])
