"""Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari & Gelman, 2018) of any program and method.

Parameters are drawn from the prior, data from the program given them, and the posterior is fitted to the data. If all
is right, the rank of the true value among L posterior draws is uniform on {0, ..., L}, for every quantity. Full-batch
samplers fit all replicates as one batch of chains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayesdl import _rng
from bayesdl.density import LogDensity
from bayesdl.density.program import has_density
from bayesdl.errors import DataError, ModelError
from bayesdl.evaluate import uniformity
from bayesdl.posterior import Posterior, convergence
from bayesdl.posterior.problem import prepare
from bayesdl.posterior.summary import entry_names
from bayesdl.posterior.tables import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST, LEAST = 99, 9
"""Posterior draws that a rank is taken among, at most and at least."""
LOG_LIKELIHOOD = "log likelihood"
OBSERVED = "observed "
"""Prefix of the arguments that hold the simulated values of observed sites."""

Quantities = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Simulated:
    """A program whose observed sites take their values from arguments ``"observed <site>"``."""

    def __init__(self, model: Any, sites: tuple[str, ...]) -> None:
        self.model, self.sites = model, sites

    def __call__(self, **arguments: Any) -> Any:
        """Run the program on simulated observations."""
        values = {site: arguments.pop(OBSERVED + site) for site in self.sites}
        with poutine.condition(data=values):
            return self.model(**arguments)


@dataclass(frozen=True)
class Calibration:
    """Ranks of the truth among posterior draws, and what they say.

    Attributes:
        names: the Q quantities.
        ranks: ``[R, Q]``, whole numbers from 0 to ``draws``.
        draws: L, posterior draws that each rank was taken among.
        ess: effective draws of a replicate's posterior, its worst quantity, the 10% quantile over the replicates;
            infinite for independent draws.
        method: name of the method.
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    ess: float = torch.inf
    method: str = "the method"

    def p_values(self) -> Tensor:
        """Neyman's smooth test of every quantity ``[Q]``; see ``uniformity`` for it and its alternatives."""
        return uniformity.smooth(self.ranks, self.draws)

    def rejected(self, level: float = 0.05) -> bool:
        """Whether the posteriors are wrong: the smallest p-value, times the number of quantities, is below ``level``.

        A right method is rejected with probability ``level`` at most.
        """
        return float(self.p_values().min()) * len(self.names) < level

    def coverage(self, level: float = 0.9) -> Tensor:
        """Share of the replicates ``[Q]`` whose central interval of about ``level`` holds the truth, less the level.

        The interval runs between order statistics, whose exact level under a right posterior is subtracted.
        """
        cut = round((1.0 - level) / 2.0 * (self.draws + 1))
        inside = (self.ranks >= cut) & (self.ranks <= self.draws - cut)
        return inside.double().mean(0) - (self.draws + 1 - 2 * cut) / (self.draws + 1)

    def __str__(self) -> str:
        """A verdict, and a table of the quantities, the most suspicious first."""
        tests = [
            self.p_values(),
            uniformity.envelope(self.ranks, self.draws),
            uniformity.chi_square(self.ranks, self.draws),
            uniformity.symmetry(self.ranks, self.draws),
        ]
        middle = (self.ranks.double() + 0.5) / (self.draws + 1) - 0.5
        shift, spread = middle.mean(0), (12.0 * middle.square().mean(0)).sqrt()
        order = tests[0].argsort()
        rows = [
            [self.names[k], *(f"{float(test[k]):.3g}" for test in tests), f"{float(shift[k]):+.3f}", f"{spread[k]:.3f}"]
            for k in order.tolist()
        ]
        columns = ["quantity", "p smooth", "p ECDF", "p chi-square", "p symmetry", "shift", "spread"]
        title = f"{len(self.ranks)} replicates, ranks among {self.draws} draws"
        return f"{self.verdict()}\n{render(title, columns, rows)}"

    def verdict(self) -> str:
        """What the ranks say, in words."""
        if not self.rejected():
            return f"{self.method}: no sign of miscalibration (smallest p-value {float(self.p_values().min()):.2g})."
        k = int(self.p_values().argmin())
        middle = (self.ranks[:, k].double() + 0.5) / (self.draws + 1) - 0.5
        shift = float(middle.mean()) * (12 * len(middle)) ** 0.5
        spread = float(middle.square().mean() * 12 - 1) * (len(middle) / 0.8) ** 0.5
        if abs(shift) > abs(spread):
            reason = f"the posterior lies too {'low' if shift > 0 else 'high'}"
        else:
            reason = f"the posterior is too {'narrow' if spread > 0 else 'wide'}"
        return f"{self.method} is miscalibrated; worst at {self.names[k]}: {reason}."

    def plot(self, names: list[str] | None = None) -> Figure:
        """Differences of the rank ECDFs from the diagonal, in their simultaneous 95% bands."""
        from bayesdl.evaluate.sbc_plot import rank_differences

        return rank_differences(self, names)


def simulation_based_calibration(
    model: Any,
    data: Any,
    method: Any,
    *,
    replicates: int = 500,
    quantities: Quantities | None = None,
    seed: int = 0,
    data_plate: str = "data",
    progress: bool | None = None,
) -> Calibration:
    """Check a program and a method on data simulated from the program itself.

    Quantities are every scalar of every latent site, the log likelihood of the data, and what ``quantities`` adds.
    Ranks are taken among at most 99 draws, thinned to be about independent.

    Args:
        model: any Pyro program without ``pyro.factor``.
        data: as in ``fit``; it gives the inputs and the shapes, its targets are replaced by simulated ones.
        method: what is to be checked, such as ``NUTS(chains=2, warmup=300, draws=200)``. A full-batch sampler runs all
            replicates as one batch.
        replicates: R.
        quantities: more quantities, from a dict of latents ``[n, *shape]`` to tensors ``[n, ...]`` by name.
        seed: seed of the simulation and of the fits.
        data_plate: name of the plate over rows.
        progress: whether to show a progress bar.

    Raises:
        ModelError: the program cannot be simulated.
        DataError: too few effective draws for a rank.
    """
    problem = prepare(model, data, seed=seed, data_plate=data_plate)
    truths, simulated = simulate(problem.model, problem.batch, replicates, seed)
    program = Simulated(problem.model, tuple(simulated[0]))
    datasets = [
        {**problem.batch, **{OBSERVED + site: value for site, value in values.items()}} for values in simulated
    ]
    posteriors = method.fit_each(program, datasets, seed=seed, data_plate=data_plate, progress=progress)
    density = posteriors[0].problem.density
    if unknown := sorted({site.name for site in density.sites} - set(truths[0])):
        raise ModelError(f"{unknown} have no prior to draw the truth from; simulation needs one for every latent.")
    found = [_values(p, None, quantities, seed) for p in posteriors]
    truth = density.unconstrain({s.name: torch.stack([t[s.name] for t in truths]) for s in density.sites})
    exact = [_values(p, truth[k : k + 1], quantities, seed)[1][0, 0] for k, p in enumerate(posteriors)]
    names = found[0][0]
    draws = torch.stack([values for _, values in found], -2)  # [C, S, R, Q]
    kept, ess = _independent(draws)
    ranks = (kept < torch.stack(exact)).sum(0)
    ties = (kept == torch.stack(exact)).sum(0)
    # A tie (a quantity that takes few values) is broken at random, so that the rank stays uniform.
    stream = _rng.generator(seed, "ties")
    ranks += (torch.rand(ranks.shape, generator=stream, dtype=torch.float64) * (ties + 1)).long()
    return Calibration(names, ranks, len(kept), ess, method.name)


def simulate(
    model: Any, batch: Mapping[str, Any], replicates: int, seed: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Latents from the prior and observations from the program given them, by site name, once per replicate.

    Raises:
        ModelError: the program has factors, which nothing can be drawn from, or observes nothing.
    """
    truths, simulated = [], []
    free = poutine.uncondition(model)
    for k in range(replicates):
        with torch.no_grad(), _rng.isolated(seed, "simulate", k), pyro.get_param_store().scope():
            trace = poutine.trace(free).get_trace(**batch)
        sites = {name: site for name, site in trace.nodes.items() if has_density(site)}
        observed = {name for name, site in sites.items() if site["infer"].get("was_observed")}
        factors = sorted(name for name in observed if type(sites[name]["fn"]).__name__ == "Unit")
        if factors or not observed:
            what = f"has factors ({', '.join(factors)})" if factors else "observes nothing"
            raise ModelError(f"Data cannot be simulated from this program: it {what}.")
        truths.append({name: site["value"] for name, site in sites.items() if name not in observed})
        simulated.append({name: sites[name]["value"] for name in sorted(observed)})
    return truths, simulated


def _values(
    posterior: Posterior, z: Tensor | None, quantities: Quantities | None, seed: int
) -> tuple[tuple[str, ...], Tensor]:
    """Names and values ``[C, S, Q]`` of all quantities at the posterior's draws, or at ``z [S, D]``."""
    density = posterior.problem.density
    if z is None:
        z = posterior.unconstrained_by_chain()
        if z.shape[0] == 1 and z.shape[1] > MOST:
            z = posterior.unconstrained_draws(None, seed)[None]
    else:
        z = z[None]
    chains, draws, dim = z.shape
    flat = z.reshape(-1, dim)
    values: dict[str, Tensor] = dict(density.constrain(flat))
    if quantities is not None:
        values |= quantities(values)
    values[LOG_LIKELIHOOD] = _log_likelihood(density, flat)
    names, parts = [], []
    for name, value in values.items():
        names += entry_names(name, value.shape[1:])
        parts.append(value.reshape(len(flat), -1).double())
    return tuple(names), torch.cat(parts, 1).reshape(chains, draws, -1)


def _log_likelihood(density: LogDensity, z: Tensor) -> Tensor:
    """The log likelihood of all the data ``[S]``, by the recorded graph of the fit's own shapes where it fits."""
    return density.log_density(z, target="likelihood")


def _independent(draws: Tensor) -> tuple[Tensor, float]:
    """About independent draws ``[L, R, Q]`` of ``[C, S, R, Q]``, and the effective number that decided L.

    Raises:
        DataError: fewer than 9 of them.
    """
    chains, length = draws.shape[:2]
    if length < 4:
        raise DataError("Ranks need posteriors of several draws; this method gives a single point or a few members.")
    ess = convergence.ess_bulk(draws).nan_to_num(nan=1.0).amin(-1).quantile(0.1)
    # Draws beyond the effective number would crowd around the truth or away from it, and feign a wrong width.
    count = min(MOST, chains * length, int(ess))
    if count < LEAST:
        raise DataError(
            f"A tenth of the replicates have fewer than {count + 1} effective draws in their worst quantity; ranks need "
            f"{LEAST}. Ask the method for more draws or a longer warmup."
        )
    pooled = draws.transpose(0, 1).flatten(0, 1)
    chosen = torch.linspace(0, len(pooled) - 1, count, dtype=torch.float64).round().long()
    return pooled[chosen], float(ess)
