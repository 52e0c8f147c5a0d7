"""Bayesian linear regression with known noise: what a method should find is known in closed form.

Samplers are compared in standard errors that come from their effective sample size. The seeds are fixed; with fresh
ones a test of nine numbers at 4.5 standard errors would fail in one of ten thousand runs.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import gpytorch
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior.convergence import ess_mean, mcse_mean
from tests.cases import DOUBLE, conjugate

TOLERANCE = 4.5
"""In standard errors."""


def errors(draws: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Errors of the first two moments of draws ``[C, S, D]`` in standard errors, ``[D + D^2]``.

    Moments are taken along the principal directions, where an error in a narrow one cannot hide behind a wide one.
    """
    variances, directions = torch.linalg.eigh(covariance)
    off = (draws - mean) @ directions
    products = (off[..., :, None] * off[..., None, :] - variances.diag()).flatten(2)
    values = torch.cat([off, products], dim=2)
    assert float(ess_mean(values).min()) > 400, "too few effective draws for a judgement"
    return values.mean((0, 1)) / mcse_mean(values)


SAMPLERS: dict[str, Any] = {
    "NUTS": lambda **more: bdl.NUTS(chains=32, warmup=150, draws=150, **more),
    "HMC": lambda **more: bdl.HMC(chains=32, warmup=150, draws=150, **more),
    "ChEES": lambda **more: bdl.ChEES(chains=32, warmup=150, draws=100, **more),
    "MALA": lambda **more: bdl.MALA(chains=64, warmup=200, draws=200, **more),
    "RandomWalk": lambda **more: bdl.RandomWalk(chains=64, warmup=300, draws=300, **more),
    "EllipticalSlice": lambda **more: bdl.EllipticalSlice(chains=64, warmup=100, draws=200, **more),
}


@cache
def sampled(name: str, temperature: float) -> Tensor:
    """Draws ``[C, S, 3]`` of the weights."""
    posterior = bdl.fit(conjugate().program, conjugate().data, SAMPLERS[name](temperature=temperature))
    assert posterior.units == "raw"
    draws: Tensor = posterior.draws_by_chain()["w"]
    return draws


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_find_mean_and_covariance_of_the_tempered_posterior(name: str, temperature: float) -> None:
    exact = conjugate().covariance(temperature)
    assert errors(sampled(name, temperature), conjugate().mean(), exact).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_comparison_notices_a_wrong_posterior(name: str) -> None:
    right, draws = conjugate().covariance(), sampled(name, 1.0)
    sd = right.diagonal().sqrt()
    assert errors(draws, conjugate().mean() + 0.1 * sd, right).abs().max() > TOLERANCE
    assert errors(draws, conjugate().mean(), 1.15 * right).abs().max() > TOLERANCE
    assert errors(draws, conjugate().mean(), right.diagonal().diag()).abs().max() > TOLERANCE


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sgld_has_its_known_bias_and_no_other(temperature: float) -> None:
    precision, unit = conjugate().precision(temperature), conjugate().prior ** 2
    size = 1.0 / float(torch.linalg.eigvalsh(precision)[-1])
    method = bdl.SGLD(chains=256, warmup=1000, draws=150, thin=20, step_size=size / unit, temperature=temperature)
    draws = bdl.fit(conjugate().program, conjugate().data, method).draws_by_chain()["w"]
    # z' = z - (e/2) L z + sqrt(e) noise has the stationary covariance (L - e L^2 / 4)^-1: a third too much along the
    # stiffest direction, next to nothing along the others. Step sizes are in units of the prior's variance.
    biased = torch.linalg.inv(precision - size / 4 * precision @ precision)
    assert errors(draws, conjugate().mean(), biased).abs().max() < TOLERANCE
    assert errors(draws, conjugate().mean(), conjugate().covariance(temperature)).abs().max() > TOLERANCE


@pytest.mark.parametrize(("optimizer", "steps", "tolerance"), [("lbfgs", 50, 1e-7), ("adam", 1000, 1e-4)])
def test_the_mode_is_the_mean(optimizer: str, steps: int, tolerance: float) -> None:
    found = bdl.fit(conjugate().network(), conjugate().data, bdl.MAP(steps=steps, optimizer=optimizer))
    torch.testing.assert_close(found.draws()["weight"].flatten(), conjugate().mean(), rtol=0, atol=tolerance)


def test_maximum_likelihood_is_least_squares() -> None:
    found = bdl.fit(conjugate().program, conjugate().data, bdl.MaximumLikelihood(steps=50, optimizer="lbfgs"))
    squares = torch.linalg.lstsq(conjugate().x, conjugate().y[:, None]).solution[:, 0]
    torch.testing.assert_close(found.draws()["w"][0], squares, rtol=0, atol=1e-7)
    assert (squares - conjugate().mean()).abs().max() > 1e-2


def test_every_member_of_an_ensemble_ends_at_the_only_mode() -> None:
    members = bdl.fit(conjugate().network(), conjugate().data, bdl.DeepEnsemble(members=4, steps=1000))
    weights = members.draws()["weight"].squeeze(1)
    assert weights.shape == (4, 3)
    torch.testing.assert_close(weights, conjugate().mean().expand(4, 3), rtol=0, atol=1e-4)
    assert members.predict(conjugate().x).epistemic.max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_field_is_the_known_diagonal(temperature: float) -> None:
    precision = conjugate().precision(temperature)
    variance = 1 / precision.diagonal()
    method = bdl.MeanFieldVI(steps=1500, temperature=temperature)
    found = bdl.fit(conjugate().program, conjugate().data, method, seed=3)
    assert ((found.mean - conjugate().mean()).abs() / variance.sqrt()).max() < 0.03
    torch.testing.assert_close(found.sd.square(), variance, rtol=0.04, atol=0)
    # It is narrower than the posterior's own marginals, which another divergence or a full covariance would give.
    assert (found.sd.square() / conjugate().covariance(temperature).diagonal()).min() < 0.8
    if temperature == 1:
        gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
        assert found.info["elbo"] == pytest.approx(conjugate().log_evidence() - gap, abs=5 * found.info["elbo_error"])
        prior = conjugate().prior
        kl = (prior / found.sd).log() + (found.sd.square() + found.mean.square()) / (2 * prior**2) - 0.5
        assert found.kl() == pytest.approx(float(kl.sum()))


def linear_kernel() -> gpytorch.kernels.Kernel:
    """k(x, x') = prior^2 x . x'."""
    kernel = gpytorch.kernels.LinearKernel()
    kernel.variance = conjugate().prior ** 2
    return kernel


@pytest.mark.parametrize("name", ["GP", "NNGP"])
def test_gaussian_processes_are_the_same_regression_in_function_space(name: str) -> None:
    method = bdl.GP(kernel=linear_kernel(), fit_kernel=False) if name == "GP" else bdl.NNGP()
    posterior = bdl.fit(conjugate().network(), conjugate().data, method)
    x = 1.5 * conjugate().x[:5]
    mean, covariance = x @ conjugate().mean(), x @ conjugate().covariance() @ x.T
    prediction = posterior.predict(x)
    tight = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(prediction.mean, mean, **tight)
    torch.testing.assert_close(prediction.epistemic, covariance.diagonal(), **tight)
    torch.testing.assert_close(prediction.aleatoric, torch.full((5,), conjugate().sigma ** 2, dtype=DOUBLE), **tight)
    assert posterior.log_evidence == pytest.approx(conjugate().log_evidence(), rel=1e-9)
    three = posterior.functions(x[:3], 6000, seed=1)  # three weights leave no randomness to a fourth value
    assert errors(three.reshape(4, -1, 3), mean[:3], covariance[:3, :3]).abs().max() < TOLERANCE


def test_a_sampler_predicts_what_the_gaussian_process_does() -> None:
    chains = bdl.fit(conjugate().network(), conjugate().data, SAMPLERS["NUTS"]())
    exact = bdl.fit(conjugate().network(), conjugate().data, bdl.NNGP())
    x = conjugate().x[:10]
    functions = chains.function_draws(x)
    off = (functions - exact.predict(x).mean).mean((0, 1)) / mcse_mean(functions)
    assert off.abs().max() < TOLERANCE
    torch.testing.assert_close(chains.predict(x).sd, exact.predict(x).sd, rtol=0.02, atol=0)


def half_normal(x: Tensor, y: Tensor | None = None) -> None:
    """A scale about which the data say nothing: its posterior is its prior, on the positive numbers."""
    pyro.sample("s", dist.HalfNormal(torch.ones((), dtype=DOUBLE)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.zeros(len(x), dtype=DOUBLE), 1.0), obs=y)


@pytest.mark.parametrize("name", ["NUTS", "HMC", "SGLD"])
def test_temperature_is_that_of_the_constrained_density(name: str) -> None:
    """HalfNormal(1)^(1/4) is HalfNormal(2), with mean 1.596; tempering the Jacobian as well would give 0.539."""
    method = (
        bdl.SGLD(chains=64, warmup=2000, draws=100, thin=40, step_size=0.02, temperature=4.0)
        if name == "SGLD"
        else SAMPLERS[name](temperature=4.0)
    )
    data = (torch.zeros(2, 1, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE))
    s = bdl.fit(half_normal, data, method).draws_by_chain()["s"]
    bias = 0.02 if name == "SGLD" else 0.0  # of order step_size
    for values, exact in ((s, 2 * math.sqrt(2 / math.pi)), (s.square(), 4.0)):
        assert float(ess_mean(values)) > 400
        assert abs(float(values.mean()) - exact) < TOLERANCE * float(mcse_mean(values)) + bias * exact
