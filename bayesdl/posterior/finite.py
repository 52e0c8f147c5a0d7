"""A posterior on finitely many parameter vectors, each with a weight of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.problem import Problem


class FinitePosterior(Posterior):
    """``q = sum_m weights_m delta(z_m)``: a weighted ensemble, or one network that has a short description.

    Averages over it are finite sums, so a certificate of its Gibbs predictor has no Monte-Carlo step.

    Attributes:
        z: the members, ``[M, D]``.
        weights: ``[M]``, float64, non-negative, with the sum 1.
        divergence: KL(q || prior) in nats, or an upper bound on it; the prior is on these and other vectors.
    """

    kind: ClassVar[str] = "finite"

    def __init__(
        self, problem: Problem | None, z: Tensor, weights: Tensor, divergence: float, info: dict[str, Any]
    ) -> None:
        super().__init__(problem, info)
        self.z, self.weights, self.divergence = z.detach(), weights.double(), divergence

    def __repr__(self) -> str:
        """Method, number of members and of coordinates."""
        return f"FinitePosterior({self.info.get('method', '?')}, {len(self.z)} members, {self.z.shape[1]} coordinates)"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Draws ``[n, D]`` by the seed; one for a single member, else 1000 if n is None.

        Stratified (systematic resampling): each member comes ``n weights_m`` times, up to one.
        """
        count = (1000 if len(self.z) > 1 else 1) if n is None else n
        if count < 1:
            raise MethodError(f"draws(n={n}): n must be at least 1.")
        if len(self.z) == 1:
            return self.z.expand(count, -1)
        shift = torch.rand(1, generator=generator(seed, "finite draws"), dtype=torch.float64)
        places = torch.searchsorted(self.weights.cumsum(0), (torch.arange(count) + shift) / count)
        order = torch.randperm(count, generator=generator(seed, "order of finite draws"))
        return self.z[places.clamp_max(len(self.z) - 1)[order].to(self.z.device)]

    def by_member(self, x: Any) -> Prediction:
        """The predictive distributions of all members at raw inputs, S = M."""
        return predict(self.problem, self.z, self.problem.inputs(x))

    def kl(self) -> float | None:
        """See ``divergence``."""
        return self.divergence

    def _draw_count(self, most: int) -> int:
        return most if len(self.z) > 1 else 1

    def tensors(self) -> dict[str, Tensor]:
        """Members, weights and divergence."""
        return {"z": self.z, "weights": self.weights, "divergence": torch.tensor(self.divergence, dtype=torch.float64)}

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> FinitePosterior:
        """Rebuild what ``tensors`` wrote."""
        return cls(problem, tensors["z"], tensors["weights"], float(tensors["divergence"]), info)
