"""A posterior known by its draws: MCMC chains, ensembles, a single mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.errors import MethodError
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.posterior.diagnostics import Diagnostics


class DrawsPosterior(Posterior):
    """Draws of the latents, chain by chain.

    Attributes:
        z: unconstrained draws ``[C, S, D]``: C chains (or ensemble members) of S draws.
        stats: per-draw statistics ``[C, S]`` by name (acceptance, energy, divergent, ...).
    """

    kind: ClassVar[str] = "draws"

    def __init__(self, problem: Problem | None, z: Tensor, stats: dict[str, Tensor], info: dict[str, Any]) -> None:
        super().__init__(problem, info)
        self.z = z.detach()
        self.stats = dict(stats)

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

    def diagnostics(self, x: Any = None) -> Diagnostics:
        """R-hat and effective sample sizes in function space and per site, divergences, energy.

        Args:
            x: raw inputs at which functions are compared; at most 200 training rows by default. A loaded posterior,
                which no longer has its training rows, then tells what was found when it was saved.

        Raises:
            DataError: fewer than 4 draws per chain (an ensemble or a mode has no chains to compare).
        """
        from bayesdl.posterior.diagnostics import Diagnostics, diagnose

        if x is None and self._record is not None and self._record.diagnostics is not None:
            return Diagnostics.from_json(self._record.diagnostics)
        return diagnose(self, x)

    def stored_diagnostics(self) -> dict[str, Any] | None:
        """``diagnostics()`` as JSON values; None where the chains are too short."""
        return self.diagnostics().to_json() if self.z.shape[1] >= 4 else None

    def tensors(self) -> dict[str, Tensor]:
        """Draws and statistics."""
        return {"z": self.z, **{f"stats/{name}": value for name, value in self.stats.items()}}

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> DrawsPosterior:
        """Rebuild what ``tensors`` wrote."""
        stats = {name.removeprefix("stats/"): value for name, value in tensors.items() if name.startswith("stats/")}
        return cls(problem, tensors["z"], stats, info)
