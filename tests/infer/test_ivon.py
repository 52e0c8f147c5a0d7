"""IVON against the paper's update, and against the mean-field optimum of Gaussian targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.infer.ivon import IVON
from bayesdl.posterior.problem import prepare

DOUBLE = torch.float64


def test_one_update_is_the_papers(linear: Any) -> None:
    """Algorithm 1 of Shen et al. (2024) in its own terms: mean loss, Hessian h, weight decay delta, N samples."""
    method = IVON(estimator="reparameterisation", curvature_rate=0.05, samples=3)
    start = torch.tensor([0.3, -1.0, 0.5, -1.5, -1.5, -1.5], dtype=DOUBLE)
    work = method.engine(prepare(linear.model, linear.data), 0, lambda: start)
    state = {"step": 0} | work.init()
    noise = work.objective.noise(3, torch.Generator().manual_seed(5))
    gradient = work.objective.estimate(state["parameters"], noise, None)[1]
    found = work.move(state, gradient)["parameters"]

    x, y, eps = linear.x.numpy(), linear.y.numpy(), noise.numpy()
    n, mean, sd = len(y), np.array([0.3, -1.0, 0.5]), np.full(3, np.exp(-1.5))
    delta, beta = 1 / (n * 0.4**2), 0.95
    hessian = 1 / (n * sd**2) - delta
    theta = mean + sd * eps
    slopes = (theta @ x.T - y) @ x / 0.5**2 / n
    estimate = (slopes * (theta - mean)).mean(0) / sd**2
    bend = 0.5 * (1 - beta) ** 2 * (hessian - estimate) ** 2 / (hessian + delta)
    hessian = beta * hessian + (1 - beta) * estimate + bend
    mean = mean - 0.1 * (slopes.mean(0) + delta * mean) / (hessian + delta)
    np.testing.assert_allclose(found[3:].numpy(), -0.5 * np.log(n * (hessian + delta)), rtol=1e-10)
    np.testing.assert_allclose(found[:3].numpy(), mean, rtol=1e-10)


@pytest.mark.parametrize(
    ("settings", "mean_tolerance", "sd_tolerance"),
    [({}, 1e-6, 0.03), ({"batch_size": 10}, 0.05, 0.04), ({"temperature": 3.0}, 1e-6, 0.03)],
)
def test_optimum_is_the_mean_field_one(
    linear: Any, settings: dict[str, Any], mean_tolerance: float, sd_tolerance: float
) -> None:
    start = {"w": torch.zeros(3, dtype=DOUBLE)}
    method = IVON(steps=700, learning_rate=0.3, initial_scale=0.1, **settings)
    posterior = method.fit(linear.model, linear.data, init=start, progress=False)
    mean, precision = linear.posterior(settings.get("temperature", 1.0))
    sd = precision.diag().rsqrt()
    assert (torch.linalg.inv(precision).diag().sqrt() / sd - 1).abs().max() > 0.1
    assert ((posterior.mean - mean) / sd).abs().max() < mean_tolerance
    assert (posterior.sd / sd - 1).abs().max() < sd_tolerance


def test_scales_do_not_matter() -> None:
    """Natural gradients know no units: sds from 1e-3 to 1e3, with one learning rate."""
    sd = torch.tensor([1e-3, 1.0, 1e3], dtype=DOUBLE)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.ones(3, dtype=DOUBLE), sd).to_event(1))

    start = {"z": 1.0 + 5.0 * sd}
    posterior = IVON(steps=600, initial_scale=0.5, learning_rate=0.2).fit(model, {}, init=start, progress=False)
    assert ((posterior.mean - 1.0) / sd).abs().max() < 1e-3
    torch.testing.assert_close(posterior.sd, sd, rtol=1e-3, atol=0)


def test_refusals(linear: Any) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 0.4).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)

    with pytest.raises(MethodError, match="leaves points"):
        IVON(random="w").fit(model, linear.data)
    with pytest.raises(MethodError, match="curvature_rate=2"):
        IVON(curvature_rate=2)
