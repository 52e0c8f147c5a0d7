"""The stochastic-gradient samplers through ``fit``, against conjugate regression: what they sample is known exactly.

At small steps it is the posterior; at large ones its covariance is what the linear equations of the scheme give.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.posterior.convergence import ess_mean, mcse_mean
from tests.cases import conjugate
from tests.infer.linear_laws import Step, regression_law
from tests.infer.test_stochastic_steps import baoab, sghmc, sgld
from tests.test_conjugate import TOLERANCE, errors, half_normal

UNIT = conjugate().prior
STIFFEST = float(torch.linalg.eigvalsh(conjugate().precision())[-1]) * UNIT**2
"""Largest curvature, in units of the prior's sd."""

SMALL: dict[str, Any] = {
    "SGLD": lambda t: bdl.SGLD(512, 100, 60, 30, 0.04 * t / STIFFEST, temperature=t),
    "SGLD-signs": lambda t: bdl.SGLD(512, 100, 60, 30, 0.04 * t / STIFFEST, noise="signs", temperature=t),
    "PSGLD": lambda t: bdl.PSGLD(512, 200, 60, 40, 0.02 * (t / STIFFEST) ** 0.5, decay=0.95, temperature=t),
    "SGHMC": lambda t: bdl.SGHMC(512, 50, 60, 10, 0.2 * (t / STIFFEST) ** 0.5, friction=4.0, temperature=t),
    "SGNHT": lambda t: bdl.SGNHT(512, 50, 60, 10, 0.2 * (t / STIFFEST) ** 0.5, friction=4.0, temperature=t),
    "BAOAB": lambda t: bdl.BAOAB(512, 50, 60, 5, 1.5 * (t / STIFFEST) ** 0.5, friction=4.0, temperature=t),
}


def drawn(method: Any, seed: int = 0) -> Tensor:
    """Draws ``[C, S, 3]`` of the weights, by chains that start in the posterior, so that a short warm-up is enough."""
    stream = generator(seed, "starts")
    start = torch.randn(method.chains, 3, dtype=torch.float64, generator=stream)
    root = torch.linalg.cholesky(conjugate().covariance(method.temperature))
    init = {"w": conjugate().mean() + start @ root.T}
    posterior = method.fit(conjugate().program, conjugate().data, seed=seed, init=init, progress=False)
    draws: Tensor = posterior.draws_by_chain()["w"]
    return draws


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", SMALL)
def test_small_steps_sample_the_tempered_posterior(name: str, temperature: float) -> None:
    draws, exact = drawn(SMALL[name](temperature)), conjugate().covariance(temperature)
    off = errors(draws, conjugate().mean(), exact)
    assert off.abs().max() < TOLERANCE, off
    # and a covariance that is 20% larger, or the other temperature's, would not have passed
    assert errors(draws, conjugate().mean(), 1.2 * exact).abs().max() > TOLERANCE
    assert errors(draws, conjugate().mean(), conjugate().covariance(5.0 - temperature)).abs().max() > 5 * TOLERANCE


BATCH, SIZE, FRICTION = 10, (0.4 / STIFFEST) ** 0.5, 6.0
SHORT = {"chains": 256, "draws": 60, "batch_size": BATCH, "replacement": True}
NOISY: dict[str, tuple[Any, Step, int]] = {
    "SGLD": (bdl.SGLD(warmup=100, thin=10, step_size=SIZE**2, **SHORT), sgld(SIZE**2), 1),
    "SGHMC": (bdl.SGHMC(warmup=60, thin=5, step_size=SIZE, friction=FRICTION, **SHORT), sghmc(SIZE, FRICTION), 2),
    "BAOAB": (bdl.BAOAB(warmup=60, thin=5, step_size=SIZE, friction=FRICTION, **SHORT), baoab(SIZE, FRICTION), 2),
}


@pytest.mark.parametrize("name", NOISY)
def test_independent_mini_batches_add_their_known_heat(name: str) -> None:
    method, step, entries = NOISY[name]
    law = regression_law(step, entries, conjugate(), BATCH)
    draws = drawn(method)
    off = errors(draws, conjugate().mean(), law)
    assert off.abs().max() < TOLERANCE, off
    for wrong in (conjugate().covariance(), regression_law(step, entries, conjugate())):
        assert errors(draws, conjugate().mean(), wrong).abs().max() > 2 * TOLERANCE


def largest_excess(covariance: Tensor) -> float:
    """Largest relative error of a variance along the posterior's principal directions."""
    variances, directions = torch.linalg.eigh(conjugate().covariance())
    return float(((directions.T @ covariance @ directions).diagonal() / variances - 1.0).abs().max())


@pytest.mark.slow
def test_the_noise_estimate_takes_heat_out() -> None:
    # V is measured per coordinate at one time; its dependence on z and its correlations are left
    size, friction = 0.03, 10.0
    plain = largest_excess(regression_law(sghmc(size, friction), 2, conjugate(), BATCH))
    method = bdl.SGHMC(warmup=60, thin=10, step_size=size, friction=friction, noise_estimate=True, **SHORT)
    found = (drawn(method) - conjugate().mean()).flatten(0, 1)
    left = largest_excess(found.T @ found / len(found))
    assert plain > 0.5
    assert left < 0.6 * plain, (left, plain)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["svrg", "saga"])
@pytest.mark.parametrize("name", ["SGLD", "BAOAB"])
def test_control_variates_take_the_heat_out_without_a_bias_of_the_mean(name: str, gradient: Any) -> None:
    size, batch = (0.1 / STIFFEST) ** 0.5, 7  # 60 rows: blocks of 7 and of 6
    if name == "SGLD":
        method, step = bdl.SGLD(256, 60, 40, 12, size**2, batch, gradient), sgld(size**2)
    else:
        method, step = bdl.BAOAB(256, 60, 40, 6, size, batch, gradient, friction=FRICTION), baoab(size, FRICTION)
    draws = drawn(method)
    off = (draws - conjugate().mean()).flatten(0, 1)
    plain = largest_excess(regression_law(step, 1 if name == "SGLD" else 2, conjugate(), batch))
    left = largest_excess(off.T @ off / len(off))
    assert plain > 0.3
    assert left < 0.5 * plain, (left, plain)
    assert errors(draws, conjugate().mean(), conjugate().covariance())[:3].abs().max() < TOLERANCE


HOT: dict[str, Any] = {
    "SGLD": lambda: bdl.SGLD(64, 2000, 100, 40, 0.02, temperature=4.0),
    "PSGLD": lambda: bdl.PSGLD(64, 2000, 100, 40, 0.04, temperature=4.0),
    "SGHMC": lambda: bdl.SGHMC(64, 400, 150, 10, 0.15, friction=1.0, temperature=4.0),
    "SGNHT": lambda: bdl.SGNHT(64, 400, 150, 10, 0.15, friction=1.0, temperature=4.0),
    "BAOAB": lambda: bdl.BAOAB(64, 400, 150, 10, 0.15, friction=1.0, temperature=4.0),
}


@pytest.mark.parametrize("name", HOT)
def test_temperature_is_that_of_the_constrained_density(name: str) -> None:
    """HalfNormal(1)^(1/4) is HalfNormal(2), with mean 1.596; a sampler that scales its noise instead gives 0.539."""
    data = (torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    s = HOT[name]().fit(half_normal, data, progress=False).draws_by_chain()["s"]
    bias = 0.02  # of order step_size, or its square
    for values, exact in ((s, 2 * math.sqrt(2 / math.pi)), (s.square(), 4.0)):
        assert float(ess_mean(values)) > 400
        assert abs(float(values.mean()) - exact) < TOLERANCE * float(mcse_mean(values)) + bias * exact
