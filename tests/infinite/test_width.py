"""Networks of growing width against the infinite one: kernels at the rate 1 / width, and posteriors by sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.infinite import from_module, monte_carlo_kernel
from bayesdl.models import BayesianNetwork, likelihoods, priors
from bayesdl.posterior.convergence import mcse_mean, mcse_sd

PRIOR = priors.Normal("fan_in", w_std=1.5, b_std=0.4)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.erf(h + self.second(torch.relu(h))))


class Convolutions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, width, 3, padding=1), nn.Conv1d(width, width, 3, stride=2)
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(x)))
        return self.last(torch.tanh(h).mean(-1))


def deep(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, 1),
    )  # fmt: skip


NETWORKS = {
    "deep": (deep, X),
    "residual": (Residual, X),
    "convolutions": (Convolutions, torch.cat([X, X.flip(1)], 1).view(3, 2, 4)),
}


def deviations(name: str, width: int, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both kernels: means less the limits, their standard errors, and mean squares of single networks' deviations.

    All relative to the limit's largest entry, ``[2, 3, 3]``.
    """
    build, x = NETWORKS[name]
    model = BayesianNetwork(build(width).double(), PRIOR)
    found, limit = monte_carlo_kernel(model, x, draws=draws), from_module(model).kernels(x)
    assert found.ntk is not None
    assert found.ntk_error is not None
    scale = torch.stack([limit.nngp.max(), limit.ntk.max()]).view(2, 1, 1)
    bias = torch.stack([found.nngp - limit.nngp, found.ntk - limit.ntk]) / scale
    error = torch.stack([found.nngp_error, found.ntk_error]) / scale
    return bias, error, bias.square() + draws * error.square()


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_of_finite_networks_converge_like_one_over_width(name: str) -> None:
    """Squared deviations of one network are proportional to 1 / width, and so is the bias of many."""
    widths, squares = (16, 96), []
    for width in widths:
        bias, error, square = deviations(name, width, draws=16)
        assert (bias.abs() < 4.5 * error + 4 / width).all()
        squares.append(square.mean((1, 2)))
    rate = (squares[1] / squares[0]).log() / math.log(widths[1] / widths[0])
    assert ((rate + 1).abs() < 0.5).all(), rate


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_rate_in_many_draws(name: str) -> None:
    """With draws in proportion to the width the standard error of the mean kernel, too, falls like 1 / width."""
    widths = (8, 16, 32)
    runs = [deviations(name, width, draws=20 * width) for width in widths]
    for width, (bias, error, _) in zip(widths, runs, strict=True):
        assert (bias.abs() < 4.5 * error + 1 / width).all()
        assert error.max() < 1 / width
    squares = torch.stack([square.mean((1, 2)) for _, _, square in runs]).log()
    at = torch.tensor(widths, dtype=torch.float64).log()
    rate = ((at - at.mean()).unsqueeze(-1) * squares).sum(0) / (at - at.mean()).square().sum()
    assert ((rate + 1).abs() < 0.2).all(), rate


GRID = torch.tensor([[-2.0], [-0.6], [0.0], [0.6], [2.0]], dtype=torch.float64)


def posterior_distance(width: int, method: bdl.HMC) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances of the sampled posterior's means and sds from the exact ones, and their Monte-Carlo errors, ``[G]``."""
    x = torch.tensor([[-1.5], [-1.0], [-0.8], [0.9], [1.2]], dtype=torch.float64)
    data = bdl.Dataset.from_arrays(x, torch.sin(2 * x[:, 0]) + 0.3)
    net = nn.Sequential(nn.Linear(1, width), bdl.models.Erf(), nn.Linear(width, 1)).double()
    prior = priors.Normal("fan_in", w_std=2.0, b_std=1.0)
    model = BayesianNetwork(net, prior, likelihoods.Gaussian(noise=0.3))
    exact = bdl.fit(model, data, bdl.NNGP()).predict(GRID)
    functions = bdl.fit(model, data, method, seed=0, progress=False).function_draws(GRID)
    mean = functions.mean((0, 1)) - exact.mean
    sd = functions.flatten(0, 1).std(0) - exact.epistemic.sqrt()
    return mean, mcse_mean(functions), sd, mcse_sd(functions)


def test_hmc_on_a_wide_network_agrees_with_the_gaussian_process() -> None:
    """Same prior, same data; within Monte-Carlo errors and a width correction of 1 / width in units of the prior."""
    mean, mean_error, sd, sd_error = posterior_distance(64, bdl.HMC(chains=16, warmup=80, draws=80, leapfrog_steps=12))
    assert mean_error.max() < 0.08
    assert (mean.abs() < 4.5 * mean_error + 2 / 64).all()
    assert (sd.abs() < 4.5 * sd_error + 2 / 64).all()


@pytest.mark.slow
def test_hmc_approaches_the_gaussian_process_with_the_width() -> None:
    """At 4 units the posterior is another one, by many standard errors; at 256 it is the limit's within 0.02."""
    method = bdl.HMC(chains=32, warmup=200, draws=400, leapfrog_steps=16)
    narrow, wide = posterior_distance(4, method), posterior_distance(256, method)
    assert wide[1].max() < 0.012
    assert (wide[0].abs() < 4 * wide[1] + 2 / 256).all()
    assert (wide[2].abs() < 4 * wide[3] + 2 / 256).all()
    assert (narrow[0].abs() / narrow[1]).max() > 6
    assert narrow[0].square().mean() > 9 * wide[0].square().mean()
