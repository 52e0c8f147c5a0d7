"""A posterior known by its draws: MCMC chains, ensembles, a single mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.errors import MethodError, ModelError, ModelMismatch, NotFactorised
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.problem import Problem, prepare

if TYPE_CHECKING:
    from bayesdl.posterior.diagnostics import Diagnostics
    from bayesdl.posterior.divergences import Place

Followed = TypeVar("Followed", bound="DrawsPosterior")


class DrawsPosterior(Posterior):
    """Draws of the latents, chain by chain.

    Attributes:
        z: unconstrained draws ``[C, S, D]``: C chains (or ensemble members) of S draws.
        stats: per-draw statistics ``[C, S]`` by name (acceptance, energy, divergent, ...).
        last: where the chains stand, with tuning and random streams, as tensors; ``bayesdl.extend`` goes on from there.
            None for posteriors that cannot be extended.
    """

    kind: ClassVar[str] = "draws"

    def __init__(self, problem: Problem | None, z: Tensor, stats: dict[str, Tensor], info: dict[str, Any]) -> None:
        super().__init__(problem, info)
        self._z = z.detach()
        self.stats = dict(stats)
        self.last: dict[str, Tensor] | None = None

    @property
    def z(self) -> Tensor:
        """Unconstrained draws ``[C, S, D]``."""
        return self._z

    @property
    def shape(self) -> tuple[int, int]:
        """Chains C and draws S of each."""
        return self._z.shape[0], self._z.shape[1]

    @property
    def in_folder(self) -> bool:
        """Whether the draws lie on disk."""
        return False

    def __repr__(self) -> str:
        """Method, chains and draws."""
        return f"{type(self).__name__}({self._words()}, {self._z.shape[2]} coordinates)"

    def _words(self) -> str:
        chains, draws = self.shape
        return f"{self.info.get('method', '?')}, {chains} chains x {draws} draws"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Stored draws ``[n, D]``: all, evenly thinned, or resampled (see the base class)."""
        chosen = self._chosen(n, seed)
        pooled = self.z.flatten(0, 1)
        return pooled if chosen is None else pooled[chosen]

    def _chosen(self, n: int | None, seed: int) -> Tensor | None:
        """Numbers ``[n]`` of the draws to take, chain after chain; None for all."""
        total = self.shape[0] * self.shape[1]
        if n is None or n == total:
            return None
        if n < 1:
            raise MethodError(f"draws(n={n}): n must be at least 1.")
        if n < total:
            return torch.linspace(0, total - 1, n, dtype=torch.float64).round().long()
        return torch.randint(total, (n,), generator=_rng.generator(seed, "resample draws"))

    def unconstrained_by_chain(self) -> Tensor:
        """The stored draws, ``[C, S, D]``."""
        return self.z

    def _draw_count(self, most: int) -> int:
        return min(most, self.shape[0] * self.shape[1])

    # -- quantities of all draws, for diagnostics ----------------------------------------------------------------

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive draws ``[C, block, D]``, as few at once as they are kept."""
        yield self.z

    def by_block(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``[C, S, ...]`` from a function of draws, ``[n, D] -> [n, ...]``, that is called block by block."""
        parts = []
        for block in self.blocks():
            value = function(block.flatten(0, 1))
            parts.append(value.reshape(*block.shape[:2], *value.shape[1:]))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def site_draws(self, most: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Constrained draws ``[C, S, *shape]`` site by site.

        Args:
            most: if given, larger sites may come as so many evenly spaced entries, ``[C, S, most]``.
        """
        yield from self.draws_by_chain().items()

    def coordinates(self, most: int) -> Tensor:
        """Unconstrained draws ``[C, S, D]``, or of at least ``most`` evenly spaced coordinates."""
        return self.z

    def divergence_places(self) -> tuple[Place, ...]:
        """Latents at whose ends the divergences gather, where that can be told."""
        from bayesdl.posterior.divergences import divergent_draws

        return divergent_draws(self).places

    def frozen(self) -> Tensor:
        """Which chains never move, ``[C]``."""
        still, first = torch.ones(self.shape[0], dtype=torch.bool), None
        for block in self.blocks():
            first = block[:, :1] if first is None else first
            still &= (block == first).flatten(1).all(1).cpu()
        return still

    def function_draws(self, x: Any, *, site: str | None = None, seed: int = 0) -> Tensor:
        """Mean of the likelihood at raw inputs under every draw, ``[C, S, N]`` (classes: ``[C, S, N, K]``)."""
        inputs = self.problem.inputs(x)
        return self.by_block(lambda z: predict(self.problem, z, inputs, site=site, seed=seed).mean_by_draw)

    def function_means(self, x: Any = None) -> Tensor | None:
        """The likelihood's means at every draw, all observed sites side by side, ``[C, S, P]``.

        Args:
            x: raw inputs; some training rows by default (see ``diagnostics.compared_inputs``).

        Returns:
            None where the program cannot be predicted with.
        """
        from bayesdl.posterior.diagnostics import compared_inputs, function_means

        inputs = compared_inputs(self.problem, self.shape[0] * self.shape[1], x)
        if not self.problem.density.observed:
            return None
        try:
            return self.by_block(lambda z: function_means(self.problem, z, inputs))
        except ModelError:  # discrete latents that all rows share, or targets of a shape that predictions do not have
            return None

    def total_log_likelihood(self) -> Tensor | None:
        """The log likelihood of all training rows at every draw, ``[C, S]``; None where rows do not separate."""
        from bayesdl.posterior.diagnostics import total_log_likelihood

        try:
            return self.by_block(lambda z: total_log_likelihood(self.problem, z))
        except NotFactorised:
            return None

    def diagnostics(self, x: Any = None, *, superchains: int | Sequence[int] | None = None) -> Diagnostics:
        """R-hat and effective sample sizes in function space and per site, divergences, energy, and a verdict in words.

        Args:
            x: raw inputs at which functions are compared; at most 200 training rows by default. A loaded posterior,
                which no longer has its training rows, then tells what was found when it was saved.
            superchains: number or labels of the groups of chains that started together, for nested R-hat; with it one
                draw per chain is enough.

        Raises:
            DataError: fewer than 4 draws per chain and no superchains (an ensemble or a mode has no chains to compare).
        """
        from bayesdl.posterior.diagnostics import Diagnostics, diagnose

        if x is None and superchains is None and self._record is not None and self._record.diagnostics is not None:
            return Diagnostics.from_json(self._record.diagnostics)
        return diagnose(self, x, superchains=superchains)

    def stored_diagnostics(self) -> dict[str, Any] | None:
        """``diagnostics()`` as JSON values; None where the chains are too short."""
        return self.diagnostics().to_json() if self.shape[1] >= 4 else None

    def with_data(self, data: Any) -> DrawsPosterior:
        """The posterior with its training data given back, after ``bayesdl.load``.

        Args:
            data: as in the fit.

        Raises:
            ModelMismatch: these are other data than those of the fit.
        """
        old, law = self.problem, self.problem.density.new_prior
        problem = prepare(
            old.model,
            data,
            seed=old.seed,
            data_plate=old.data_plate,
            temperature=old.density.temperature,
            likelihood_temperature=old.density.likelihood_temperature,
            scaler=None if law is None else old.scaler,
        )
        if law is not None:
            density = problem.density.with_gaussian_prior(*law)
            problem = replace(problem, density=density, prior_rows=old.prior_rows)
        if not _extends(old, problem):
            raise ModelMismatch("These are not the data that the posterior was fitted on, or not in the same order.")
        whole = copy.copy(self)
        whole._problem, whole._record = problem, None
        return whole

    def followed_by(self, more: DrawsPosterior) -> DrawsPosterior:
        """This posterior with the later draws of its chains."""
        return self._followed(DrawsPosterior(self.problem, torch.cat([self.z, more.z], 1), {}, {}), more)

    def _followed(self, whole: Followed, more: DrawsPosterior) -> Followed:
        whole.stats = {name: torch.cat([value, more.stats[name]], 1) for name, value in self.stats.items()}
        whole.info, whole.last = {**self.info, **more.info}, more.last
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """Draws and statistics, and where the chains stand."""
        return {"z": self.z, **self._chain_tensors()}

    def _chain_tensors(self) -> dict[str, Tensor]:
        stats = {f"stats/{name}": value for name, value in self.stats.items()}
        return stats | {f"last/{name}": value for name, value in (self.last or {}).items()}

    def _restore_chains(self, tensors: dict[str, Tensor]) -> Self:
        """Take what ``_chain_tensors`` wrote."""
        self.stats, last = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("stats/", "last/")
        )
        self.last = last or None
        return self

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> DrawsPosterior:
        """Rebuild what ``tensors`` wrote."""
        return cls(problem, tensors["z"], {}, info)._restore_chains(tensors)


def _extends(few: Problem, whole: Problem) -> bool:
    """Whether a problem with a few training rows can be part of another one: same units, same rows."""
    state, other = few.scaler.state(), whole.scaler.state()
    if any(not torch.equal(state[name], other[name]) for name in state):
        return False
    if few.rows is not None and (whole.rows is None or few.rows.to_json() != whole.rows.to_json()):
        return False
    return all(
        torch.equal(value, whole.batch[name][: len(value)] if name in few.row_names else whole.batch[name])
        for name, value in few.batch.items()
        if isinstance(value, Tensor)
    )
