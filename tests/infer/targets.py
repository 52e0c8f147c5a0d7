"""Densities with known moments, in the shape of a LogDensity, and the statistic that compares draws with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.posterior.convergence import mcse_mean


@dataclass
class Target:
    """What the engines ask of a LogDensity, around a hand-written value and gradient; counts gradients."""

    function: Callable[[Tensor], tuple[Tensor, Tensor]]
    dim: int
    spread: float = 1.0
    gradients: int = 0
    unit: Tensor | None = None
    dtype = torch.float64
    n = 1

    @property
    def prior_scale(self) -> Tensor:
        return torch.ones(self.dim, dtype=self.dtype) if self.unit is None else self.unit

    def value_and_grad(self, z: Tensor, batch: Any = None, *, per_chain: bool = False) -> tuple[Tensor, Tensor]:
        self.gradients += len(z)
        return self.function(z)

    def fused(
        self, step: Any, rows: Any, shared: Any = (), batch: Any = None, *, per_chain: bool = False
    ) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *given: step(*given, *shared, self.value_and_grad)

    def prior_draws(self, n: int, seed: int = 0) -> Tensor:
        return self.spread * torch.randn(n, self.dim, dtype=self.dtype, generator=generator(seed, "prior"))


def normal(scales: Tensor) -> Target:
    """Independent Gaussians with mean 0 and the given standard deviations."""
    precision = scales.square().reciprocal()
    return Target(lambda z: (-0.5 * (z.square() * precision).sum(-1), -z * precision), len(scales))


COVARIANCE = torch.tensor([[4.0, 1.9, -0.3], [1.9, 1.0, 0.0], [-0.3, 0.0, 0.25]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def correlated() -> Target:
    """N(CENTRE, COVARIANCE); the first two coordinates have correlation 0.95."""
    precision = torch.linalg.inv(COVARIANCE)

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        slope = (z - CENTRE) @ precision
        return -0.5 * ((z - CENTRE) * slope).sum(-1), -slope

    return Target(function, 3, spread=2.0)


def funnel() -> Target:
    """v ~ N(0, 1), x_1, x_2 | v ~ N(0, e^v): skewed curvature; E x^2 = e^(1/2), E v = 0, E v^2 = 1."""

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        v, x = z[:, 0], z[:, 1:]
        squares = 0.5 * x.square().sum(1) * (-v).exp()
        value = -0.5 * v.square() - squares - v
        return value, torch.cat([(-v + squares - 1.0)[:, None], -x * (-v).exp()[:, None]], 1)

    return Target(function, 3)


def banana() -> Target:
    """exp(-2 L), L = (w2 - w1^2)^2 + w1^2/4: w1 ~ N(0, 1), w2 | w1 ~ N(w1^2, 1/4)."""

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        first, bend = z[:, 0], z[:, 1] - z[:, 0].square()
        value = -2.0 * bend.square() - 0.5 * first.square()
        return value, torch.stack([8.0 * first * bend - first, -4.0 * bend], 1)

    return Target(function, 2)


def standard_errors(draws: Tensor, exact: float) -> float:
    """How many Monte-Carlo standard errors (from the effective sample size) the mean of ``[C, S]`` is off."""
    return float((draws.mean() - exact) / mcse_mean(draws))


def moments(name: str, z: Tensor) -> dict[str, float]:
    """Errors of the known moments of a target in standard errors, from draws ``[C, S, D]``."""
    if name == "correlated":
        off = z - CENTRE
        pairs = [(i, j) for i in range(3) for j in range(i, 3)]
        errors = {f"E z{i}": standard_errors(z[..., i], float(CENTRE[i])) for i in range(3)}
        return errors | {
            f"cov {i}{j}": standard_errors(off[..., i] * off[..., j], float(COVARIANCE[i, j])) for i, j in pairs
        }
    if name == "funnel":
        v, x = z[..., 0], z[..., 1]
        return {
            "E v": standard_errors(v, 0.0),
            "E v^2": standard_errors(v.square(), 1.0),
            "E x": standard_errors(x, 0.0),
            "E x^2 e^-v": standard_errors(x.square() * (-v).exp(), 1.0),
        }
    first, second = z[..., 0], z[..., 1]
    return {
        "E w1": standard_errors(first, 0.0),
        "E w1^2": standard_errors(first.square(), 1.0),
        "E w2": standard_errors(second, 1.0),
        "E (w2 - 1)^2": standard_errors((second - 1.0).square(), 2.25),
        "E w1^2 w2": standard_errors(first.square() * second, 3.0),
    }


def run(engine: Any, steps: int | None = None, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Drive an engine without the loop, from a state or from its start."""
    state = {"step": 0} | engine.init() if state is None else state
    for _ in range(engine.total - state["step"] if steps is None else steps):
        step = state["step"]
        state = engine.step(state)
        state["step"] = step + 1
    return state


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that shares nothing with the state, as a checkpoint would bring it back."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, torch.Generator):
            twin = torch.Generator(device=value.device)
            twin.set_state(value.get_state())
            return twin
        return value

    return {name: copy(value) for name, value in state.items()}
