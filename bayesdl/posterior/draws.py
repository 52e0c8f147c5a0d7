"""A posterior known by its draws: MCMC chains, ensembles, a single mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.errors import MethodError, ModelMismatch
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.problem import Problem, prepare

if TYPE_CHECKING:
    from bayesdl.posterior.diagnostics import Diagnostics


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
        self.z = z.detach()
        self.stats = dict(stats)
        self.last: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        """Method, chains and draws."""
        chains, draws, dim = self.z.shape
        return f"DrawsPosterior({self.info.get('method', '?')}, {chains} chains x {draws} draws, {dim} coordinates)"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Stored draws ``[n, D]``: all, evenly thinned, or resampled (see the base class)."""
        pooled = self.z.flatten(0, 1)
        total = len(pooled)
        if n is None or n == total:
            return pooled
        if n < 1:
            raise MethodError(f"draws(n={n}): n must be at least 1.")
        if n < total:
            return pooled[torch.linspace(0, total - 1, n, dtype=torch.float64).round().long()]
        return pooled[torch.randint(total, (n,), generator=_rng.generator(seed, "resample draws"))]

    def unconstrained_by_chain(self) -> Tensor:
        """The stored draws, ``[C, S, D]``."""
        return self.z

    def _draw_count(self, most: int) -> int:
        return min(most, self.z.shape[0] * self.z.shape[1])

    def function_draws(self, x: Any, *, site: str | None = None, seed: int = 0) -> Tensor:
        """Mean of the likelihood at raw inputs under every draw, ``[C, S, N]`` (classes: ``[C, S, N, K]``)."""
        inputs = self.problem.inputs(x)
        prediction = predict(self.problem, self.z.flatten(0, 1), inputs, site=site, seed=seed)
        means = prediction.mean_by_draw
        return means.reshape(*self.z.shape[:2], *means.shape[1:])

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
        return self.diagnostics().to_json() if self.z.shape[1] >= 4 else None

    def with_data(self, data: Any) -> DrawsPosterior:
        """The posterior with its training data given back, after ``bayesdl.load``.

        Args:
            data: as in the fit.

        Raises:
            ModelMismatch: these are other data than those of the fit.
        """
        old = self.problem
        problem = prepare(
            old.model,
            data,
            seed=old.seed,
            data_plate=old.data_plate,
            temperature=old.density.temperature,
            likelihood_temperature=old.density.likelihood_temperature,
        )
        if not _extends(old, problem):
            raise ModelMismatch("These are not the data that the posterior was fitted on, or not in the same order.")
        whole = DrawsPosterior(problem, self.z, self.stats, self.info)
        whole.last = self.last
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """Draws and statistics, and where the chains stand."""
        stats = {f"stats/{name}": value for name, value in self.stats.items()}
        return {"z": self.z, **stats, **{f"last/{name}": value for name, value in (self.last or {}).items()}}

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> DrawsPosterior:
        """Rebuild what ``tensors`` wrote."""
        stats, last = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("stats/", "last/")
        )
        posterior = cls(problem, tensors["z"], stats, info)
        posterior.last = last or None
        return posterior


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
