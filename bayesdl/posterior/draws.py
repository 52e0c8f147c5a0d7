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
    import arviz

    from bayesdl.posterior.diagnostics import Diagnostics
    from bayesdl.posterior.summary import Summary


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
        self._values: dict[str, Tensor] | None = None  # constrained draws of a posterior loaded without its model

    def __repr__(self) -> str:
        """Method, chains and draws."""
        chains, draws, dim = self.z.shape
        return f"DrawsPosterior({self.info.get('method', '?')}, {chains} chains x {draws} draws, {dim} coordinates)"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Stored draws ``[n, D]``: all, evenly thinned, or resampled (see the base class)."""
        return self.z.flatten(0, 1)[self._pick(n, seed)]

    def _pick(self, n: int | None, seed: int) -> Tensor:
        total = self.z.shape[0] * self.z.shape[1]
        if n is None or n == total:
            return torch.arange(total)
        if n < 1:
            raise MethodError(f"draws(n={n}): n must be at least 1.")
        if n < total:
            return torch.linspace(0, total - 1, n, dtype=torch.float64).round().long()
        return torch.randint(total, (n,), generator=_rng.generator(seed, "resample draws"))

    def _draw_count(self, most: int) -> int:
        return min(most, self.z.shape[0] * self.z.shape[1])

    def draws(self, n: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Constrained draws ``[n, *shape]`` by site name; they need no model."""
        pick = self._pick(n, seed)
        return {name: value.flatten(0, 1)[pick] for name, value in self.draws_by_chain().items()}

    def draws_by_chain(self) -> dict[str, Tensor]:
        """Constrained draws ``[C, S, *shape]`` by site name."""
        return self.problem.density.constrain(self.z) if self._values is None else self._values

    def function_draws(self, x: Any, *, site: str | None = None, seed: int = 0) -> Tensor:
        """Mean of the likelihood at raw inputs under every draw, ``[C, S, N]`` (classes: ``[C, S, N, K]``)."""
        inputs = self.problem.inputs(x)
        prediction = predict(self.problem, self.z.flatten(0, 1), inputs, site=site, seed=seed)
        means = prediction.mean_by_draw
        return means.reshape(*self.z.shape[:2], *means.shape[1:])

    def diagnostics(self, x: Any = None) -> Diagnostics:
        """R-hat and effective sample sizes in function space and per site, divergences, energy.

        Args:
            x: raw inputs at which functions are compared; at most 200 training rows by default.
        """
        from bayesdl.posterior.diagnostics import diagnose

        return diagnose(self, x)

    def summary(self) -> Summary:
        """Mean, sd, quantiles, effective sample sizes and R-hat of every latent, as a table."""
        from bayesdl.posterior.summary import summarise

        return summarise(self.draws_by_chain())

    def to_arviz(self) -> arviz.InferenceData:
        """ArviZ InferenceData: posterior, log likelihood, posterior predictive, sample statistics, observed data."""
        from bayesdl.posterior.arviz_export import to_arviz

        return to_arviz(self)

    def loo(self) -> Any:
        """PSIS leave-one-out cross-validation with k-hat per row, by ArviZ."""
        from bayesdl.posterior.arviz_export import loo

        return loo(self)

    def tensors(self) -> dict[str, Tensor]:
        """Draws, statistics, and the constrained values of bounded sites."""
        bounded = {site.name for site in self.problem.density.sites if not site.unbounded}
        values = self.draws_by_chain()
        return {
            "z": self.z,
            **{f"stats/{name}": value for name, value in self.stats.items()},
            **{f"site/{name}": values[name] for name in bounded},
        }

    @classmethod
    def restore(
        cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any], sites: list[dict[str, Any]]
    ) -> DrawsPosterior:
        """Rebuild what ``tensors`` wrote; ``sites`` is the layout in the file, for draws without a model."""
        stats = {name[6:]: value for name, value in tensors.items() if name.startswith("stats/")}
        posterior = cls(problem, tensors["z"], stats, info)
        if problem is None:
            z = posterior.z
            posterior._values = {
                site["name"]: tensors.get(
                    f"site/{site['name']}",
                    z[..., site["start"] : site["start"] + site["size"]],
                ).reshape(*z.shape[:2], *site["shape"])
                for site in sites
            }
        return posterior
