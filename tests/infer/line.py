"""A line with known noise through twelve rows: a program whose posterior is known in closed form."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayesdl._rng import generator
from tests.infer.targets import standard_errors


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x[:, 0] * w[1], 0.5), obs=y)


def rows() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.0, 2.0, 12, dtype=torch.float64)[:, None]
    return x, 0.7 - 1.1 * x[:, 0] + 0.5 * torch.randn(12, dtype=torch.float64, generator=generator(0, "y"))


def line_errors(z: Tensor, temperature: float) -> list[float]:
    """Errors of mean and covariance of draws ``[C, S, 2]``, in standard errors."""
    x, y = rows()
    design = torch.cat([torch.ones_like(x), x], 1)
    precision = design.T @ design / 0.25 + torch.eye(2) / 1.5**2
    mean, covariance = torch.linalg.solve(precision, design.T @ y / 0.25), temperature * torch.linalg.inv(precision)
    off = z - mean
    errors = [standard_errors(off[..., i], 0.0) for i in range(2)]
    pairs = [(0, 0), (0, 1), (1, 1)]
    return errors + [standard_errors(off[..., i] * off[..., j], float(covariance[i, j])) for i, j in pairs]
