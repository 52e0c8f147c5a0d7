"""An equal mixture of Gaussians over the unconstrained coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import derive_seed, generator
from bayesdl.errors import MethodError
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import restore
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem


class MixturePosterior(Posterior):
    """``q(z) = (1/M) sum_m N(z; mean_m, covariance_m)``, one Gaussian for each mode that was found.

    Its divergence from the prior has no closed form, so ``kl()`` is None.

    Attributes:
        laws: the Gaussians.
    """

    kind: ClassVar[str] = "mixture"

    def __init__(self, problem: Problem | None, laws: Sequence[Normal], info: dict[str, Any]) -> None:
        super().__init__(problem, info)
        self.laws = tuple(laws)

    def __repr__(self) -> str:
        """Method, number of Gaussians and of coordinates, structure."""
        structure = type(self.laws[0].covariance).__name__
        method, dim = self.info.get("method", "?"), self.laws[0].dim
        return f"MixturePosterior({method}, {len(self.laws)} Gaussians, {dim} coordinates, {structure})"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Fresh draws ``[n, D]`` by the seed; 1000 if n is None.

        Stratified: the Gaussians take turns in a random order, so each has the same number of draws, up to one; any
        single draw is one from the mixture.
        """
        count = 1000 if n is None else n
        if count < 1:
            raise MethodError(f"draws(n={n}): n must be at least 1.")
        turns = torch.randperm(len(self.laws), generator=generator(seed, "mixture")).tolist()
        draws = self.laws[0].mean.new_empty(count, self.laws[0].dim)
        for turn, k in enumerate(turns[:count]):
            mine = draws[turn :: len(turns)]
            mine.copy_(self.laws[k].draws(len(mine), derive_seed(seed, "mixture", k)))
        return draws

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of q at ``z [..., D]``, shape ``[...]``."""
        return torch.stack([law.log_prob(z) for law in self.laws]).logsumexp(0) - math.log(len(self.laws))

    def tensors(self) -> dict[str, Tensor]:
        """Mean and covariance of each Gaussian, its number before their names."""
        found = {}
        for k, law in enumerate(self.laws):
            found[f"{k}/mean"] = law.mean
            found |= {f"{k}/covariance/{name}": part for name, part in law.covariance.tensors().items()}
        return found

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> MixturePosterior:
        """Rebuild what ``tensors`` wrote."""
        laws = []
        for k in range(sum(name.endswith("/mean") for name in tensors)):
            before = f"{k}/covariance/"
            parts = {name.removeprefix(before): part for name, part in tensors.items() if name.startswith(before)}
            laws.append(Normal(tensors[f"{k}/mean"], restore(parts)))
        return cls(problem, laws, info)
