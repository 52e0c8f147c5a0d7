"""Bayesian linear regression with known variances: everything about it is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

N, NOISE, PRIOR = 100, 0.5, 0.4


@dataclass
class Linear:
    """y = x w + noise, w ~ N(0, PRIOR^2), noise ~ N(0, NOISE^2), correlated columns."""

    x: Tensor
    y: Tensor
    model: Callable[..., Any]

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def posterior(self, temperature: float = 1.0, likelihood_temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and precision of p(w, y)^(1/T) with p(y | w)^(1/T_L)."""
        data = self.x.T @ self.x / NOISE**2 / likelihood_temperature
        precision = (data + torch.eye(self.x.shape[1], dtype=torch.float64) / PRIOR**2) / temperature
        right = self.x.T @ self.y / NOISE**2 / likelihood_temperature / temperature
        return torch.linalg.solve(precision, right), precision

    def log_evidence(self) -> float:
        covariance = NOISE**2 * torch.eye(len(self.y), dtype=torch.float64) + PRIOR**2 * self.x @ self.x.T
        law = torch.distributions.MultivariateNormal(torch.zeros_like(self.y), covariance)
        return float(law.log_prob(self.y))


@pytest.fixture(scope="session")
def linear() -> Linear:
    noise = torch.Generator().manual_seed(7)
    mix = torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.randn(N, 3, generator=noise, dtype=torch.float64) @ mix
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    y = y + NOISE * torch.randn(N, generator=noise, dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), PRIOR).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    return Linear(x, y, model)


@pytest.fixture(scope="session")
def orthogonal(linear: Linear) -> Linear:
    """The same with uncorrelated columns: a posterior with independent coordinates."""
    x = torch.linalg.qr(linear.x)[0] * 10.0
    y = x @ torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64) + (linear.y - linear.y.mean()) * 0.1
    return Linear(x, y, linear.model)
