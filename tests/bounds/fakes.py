"""Posteriors whose predictive distributions are known in closed form, for tests of the certificates' bookkeeping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from bayesdl.data import Dataset, RowIds
from bayesdl.posterior import Posterior, Prediction


class Thresholds(Posterior):
    """Classifiers 1[x > t] with t ~ N(mean, sd^2), against the prior t ~ N(0, 1)."""

    def __init__(
        self,
        rows: RowIds | None,
        prior_rows: RowIds | None,
        *,
        mean: float = 0.0,
        sd: float = 0.1,
        kl: float | None = 1.0,
        task: str = "classification",
    ) -> None:
        problem: Any = SimpleNamespace(
            density=SimpleNamespace(dim=1),
            rows=rows,
            prior_rows=prior_rows,
            task=task,
            classes=("0", "1"),
            x_name=None,
            y_name=None,
            batch={},
        )
        super().__init__(problem, {"method": "Thresholds"})
        self.mean, self.sd, self.divergence = mean, sd, kl
        self.seeds: list[int] = []

    def kl(self) -> float | None:
        return self.divergence

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.mean + self.sd * torch.randn(n or 100, 1, generator=generator, dtype=torch.float64)

    def predict(
        self, x: Any, *, batch_size: int | None = None, max_draws: int = 1000, site: str | None = None, seed: int = 0
    ) -> Prediction:
        self.seeds.append(seed)
        t = self.unconstrained_draws(max_draws, seed)
        return Prediction(Bernoulli(probs=(x[:, 0] > t).double(), validate_args=False))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def restore(cls, problem: Any, tensors: dict[str, Tensor], info: dict[str, Any], *rest: Any) -> Thresholds:
        raise NotImplementedError


def threshold_data(n: int, seed: int, flip: float = 0.1) -> Dataset:
    """x ~ N(0, 1), y = 1[x > 0] with a share of flipped labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0) ^ (torch.rand(n, generator=generator) < flip)
    return Dataset.from_arrays(x, y.long(), "classification", classes=[0, 1])
