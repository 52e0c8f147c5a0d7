"""Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari & Gelman, 2018) of any program and method.

Parameters are drawn from the prior, data from the program given them, and the posterior is fitted to the data. If all
is right, the rank of the true value among L posterior draws is uniform on {0, ..., L}, for every quantity. Full-batch
samplers fit all replicates as one batch of chains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.density import LogDensity
from bayesdl.errors import DataError, ModelError
from bayesdl.evaluate import uniformity
from bayesdl.evaluate.simulated import OBSERVED, Simulated, simulate
from bayesdl.posterior import DrawsPosterior, Posterior, convergence
from bayesdl.posterior.problem import prepare
from bayesdl.posterior.summary import entry_names
from bayesdl.posterior.tables import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST, LEAST = 99, 9
"""Posterior draws that a rank is taken among, at most and at least."""
FEWEST = 20
"""Replicates below which no test sees anything."""
CELLS = 2**23
"""Draws times unknowns whose quantities are computed at once."""
LOG_LIKELIHOOD = "log likelihood"

Quantities = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


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
        failed: replicates in which chains were stuck, so that ``fit`` would have refused to return a posterior. Their
            ranks are among the others as they came out: leaving them out would favour the data that are easy to fit.
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    ess: float = torch.inf
    method: str = "the method"
    failed: tuple[int, ...] = ()

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

        The interval runs between order statistics, at least one of which is left out on each side; its exact level
        under a right posterior is subtracted. The standard error is sqrt(level (1 - level) / R).
        """
        cut = min(max(1, round((1.0 - level) / 2.0 * (self.draws + 1))), self.draws // 2)
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
        middle = self._middle()
        shift, spread = middle.mean(0), middle.square().mean(0).sqrt() / self._uniform_sd()
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
        p = self.p_values()
        k, count = int(p.argmin()), len(self.ranks)
        if self.rejected():
            text = f"{self.method} is miscalibrated; worst at {self.names[k]}: {self._reason(k)}."
        else:
            text = f"{self.method}: no sign of miscalibration (smallest p-value {float(p[k]):.2g} of {len(p)})."
        if self.failed:
            text += f" In {len(self.failed)} of {count} replicates chains were stuck after warm-up; they are counted."
        return text

    def plot(self, names: list[str] | None = None) -> Figure:
        """Differences of the rank ECDFs from the diagonal, in their simultaneous 95% bands."""
        from bayesdl.evaluate.sbc_plot import rank_differences

        return rank_differences(self, names)

    def _reason(self, k: int) -> str:
        """What is wrong with the ranks of the k-th quantity, in words."""
        middle, count = self._middle()[:, k], len(self.ranks)
        shift = float(middle.mean()) / self._uniform_sd() * count**0.5
        spread = (float(middle.square().mean()) / self._uniform_sd() ** 2 - 1.0) * (count / 0.8) ** 0.5
        if self.names[k] == LOG_LIKELIHOOD and abs(shift) > 2.0:
            how = "worse than the truth does (too wide, or displaced)" if shift > 0 else "better than the truth does"
            return f"the draws fit the data {how}"
        if max(abs(shift), abs(spread)) < 2.0:
            return "the posterior has another shape"
        if abs(shift) > abs(spread):
            return f"the posterior lies too {'low' if shift > 0 else 'high'}"
        return f"the posterior is too {'narrow' if spread > 0 else 'wide'}"

    def _middle(self) -> Tensor:
        """The ranks as fractions from -1/2 to 1/2."""
        return (self.ranks.double() + 0.5) / (self.draws + 1) - 0.5

    def _uniform_sd(self) -> float:
        """Standard deviation of these fractions under uniform ranks."""
        return float(((1.0 - (self.draws + 1.0) ** -2) / 12.0) ** 0.5)


def simulation_based_calibration(
    model: Any,
    data: Any,
    method: Any,
    *,
    replicates: int = 500,
    sites: Collection[str] | None = None,
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
        data: as in ``fit``; it gives the inputs and the shapes, its targets are replaced by simulated ones (in the
            model's units).
        method: what is to be checked, such as ``NUTS(chains=2, warmup=300, draws=200)``. A full-batch sampler runs all
            replicates as one batch.
        replicates: R, at least 20.
        sites: latent sites whose scalars are ranked; all by default. The weights of a network may be left out with
            ``()``, because chains that stay in one of many equivalent modes are right in function space alone.
        quantities: more quantities, from a dict of latents ``[n, *shape]`` to tensors ``[n, ...]`` by name.
        seed: seed of the simulation and of the fits.
        data_plate: name of the plate over rows.
        progress: whether to show a progress bar.

    Raises:
        ModelError: the program cannot be simulated.
        DataError: too few replicates, or too few effective draws for a rank.
        Divergence: a method gave no posterior at all for a replicate.
    """
    if replicates < FEWEST:
        raise DataError(f"replicates={replicates} are too few to see anything: use at least {FEWEST}, better 500.")
    problem = prepare(model, data, seed=seed, data_plate=data_plate)
    known = {site.name for site in problem.density.sites}
    if missing := sorted(set(sites or ()) - known):
        raise ModelError(f"There are no latent sites {missing}; there are {', '.join(sorted(known))}.")
    truths, simulated = simulate(problem.model, problem.batch, replicates, seed)
    if unknown := sorted(known - set(truths)):
        raise ModelError(f"{unknown} have no prior to draw the truth from; simulation needs one for every latent.")
    arguments = {OBSERVED + site: values for site, values in simulated.items()}
    datasets = [{**problem.batch, **{name: rows[k] for name, rows in arguments.items()}} for k in range(replicates)]
    posteriors = method.fit_each(
        Simulated(problem.model, tuple(simulated)),
        datasets,
        seed=seed,
        data_plate=data_plate,
        progress=progress,
        keep_stuck=True,
    )
    density = posteriors[0].problem.density
    truth = density.unconstrain({site.name: truths[site.name] for site in density.sites})
    drawn = torch.stack([_draws(p, _rng.derive_seed(seed, "posterior", k)) for k, p in enumerate(posteriors)])
    z = torch.cat([truth[:, None], drawn.flatten(1, 2)], 1)  # the truth beside the draws, [R, 1 + C S, D]
    names, values = _values(density, z, arguments, known if sites is None else set(sites), quantities)
    exact, found = values[:, 0], values[:, 1:].unflatten(1, drawn.shape[1:3])
    independent = not isinstance(posteriors[0], DrawsPosterior)
    kept, ess = (found[:, 0], torch.inf) if independent else _thinned(found)
    below, ties = ((compare(kept, exact[:, None])).sum(1) for compare in (torch.lt, torch.eq))
    # A tie (a quantity that takes few values) is broken at random, so that the rank stays uniform.
    chance = torch.rand(ties.shape, generator=_rng.generator(seed, "ties"), dtype=torch.float64)
    ranks = below + (chance * (ties + 1)).long()
    failed = tuple(k for k, posterior in enumerate(posteriors) if posterior.info.get("stuck"))
    return Calibration(names, ranks, kept.shape[1], ess, method.name, failed)


def _draws(posterior: Posterior, seed: int) -> Tensor:
    """Chains ``[C, S, D]``, or one of fresh independent draws ``[1, 99, D]`` where the posterior has a density."""
    if isinstance(posterior, DrawsPosterior):
        return posterior.z
    return posterior.unconstrained_draws(MOST, seed)[None]


def _values(
    density: LogDensity, z: Tensor, rows: Mapping[str, Tensor], sites: set[str], quantities: Quantities | None
) -> tuple[tuple[str, ...], Tensor]:
    """Names and values ``[R, n, Q]`` of all quantities at ``z [R, n, D]``; every replicate has its own rows."""
    count, dim = z.shape[1:]
    names: list[str] = []
    blocks = []
    for block in z.split(max(1, CELLS // (count * dim))):
        latents = density.constrain(block.flatten(0, 1))
        values = {name: value for name, value in latents.items() if name in sites}
        if quantities is not None:
            values |= quantities(latents)
        if wrong := sorted(name for name, value in values.items() if value.shape[:1] != (len(block) * count,)):
            raise DataError(f"quantities gives {wrong} another number of draws than the latents that it was given.")
        names = [entry for name, value in values.items() for entry in entry_names(name, value.shape[1:])]
        parts = [value.reshape(len(block) * count, -1).double() for value in values.values()]
        blocks.append(torch.cat(parts, 1).unflatten(0, (len(block), count)) if parts else z.new_empty(0))
    # One call for the k-th draws of all replicates: the recorded graph of the sampler's own kind, over data of its own.
    each = [density.value_and_grad(z[:, k], rows, target="likelihood", per_chain=True)[0] for k in range(count)]
    likelihood = torch.stack(each, 1).double()[..., None]
    return (*names, LOG_LIKELIHOOD), torch.cat([torch.cat(blocks), likelihood], 2) if names else likelihood


def _thinned(draws: Tensor) -> tuple[Tensor, float]:
    """About independent draws ``[R, L, Q]`` of ``[R, C, S, Q]``, and the effective number that decided L.

    Raises:
        DataError: fewer than 9 of them.
    """
    chains, length = draws.shape[1:3]
    if length < 4:
        raise DataError("Ranks need posteriors of several draws; this method gives a single point or a few members.")
    by_chain = draws.permute(1, 2, 0, 3)
    ess = convergence.ess_bulk(by_chain).nan_to_num(nan=1.0).amin(-1).quantile(0.1)
    # Draws beyond the effective number would crowd around the truth or away from it, and feign a wrong width.
    count = min(MOST, chains * length, int(ess))
    if count < LEAST:
        raise DataError(
            f"A tenth of the replicates have fewer than {count + 1} effective draws in their worst quantity; ranks "
            f"need {LEAST}. Ask the method for more draws or a longer warmup."
        )
    pooled = draws.transpose(1, 2).flatten(1, 2)
    chosen = torch.linspace(0, chains * length - 1, count, dtype=torch.float64).round().long()
    return pooled[:, chosen], float(ess)
