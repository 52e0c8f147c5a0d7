"""Elliptical slice sampling: conjugate posteriors at several temperatures, refusals, and what a wrong step gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.errors import MethodError
from bayesdl.infer import elliptical_slice
from bayesdl.infer.elliptical_slice import EllipticalSlice, elliptical_slice_transition, log_likelihood
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.kernel import Floats, Point, evaluate
from bayesdl.infer.metric import Metric
from tests.infer.targets import banana, copied, run, standard_errors

DOUBLE = torch.float64
MEAN, SD = torch.tensor([2.0, -1.0], dtype=DOUBLE), torch.tensor([0.5, 1.5], dtype=DOUBLE)
METHOD = EllipticalSlice(chains=32, warmup=20, draws=200)


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(MEAN, SD).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x[:, 0] * w[1], 1.0), obs=y)


def rows() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.0, 2.0, 8, dtype=DOUBLE)[:, None]
    return x, 0.7 - 1.1 * x[:, 0] + torch.randn(8, dtype=DOUBLE, generator=generator(0, "y"))


def errors(draws: Tensor, temperature: float = 1.0, likelihood_temperature: float = 1.0) -> list[float]:
    x, y = rows()
    design = torch.cat([torch.ones_like(x), x], 1)
    precision = design.T @ design / likelihood_temperature + SD.square().reciprocal().diag()
    right = design.T @ y / likelihood_temperature + MEAN / SD.square()
    mean, covariance = torch.linalg.solve(precision, right), temperature * torch.linalg.inv(precision)
    off = draws - mean
    found = [standard_errors(off[..., i], 0.0) for i in range(2)]
    pairs = [(0, 0), (0, 1), (1, 1)]
    return found + [standard_errors(off[..., i] * off[..., j], float(covariance[i, j])) for i, j in pairs]


def engine(temperature: float = 1.0, seed: int = 0, method: EllipticalSlice = METHOD) -> MarkovEngine:
    x, y = rows()
    density = LogDensity(line, {"x": x, "y": y}, temperature=temperature)
    sampler = EllipticalSlice(method.chains, method.warmup, method.draws, temperature=temperature)
    return MarkovEngine(sampler=sampler, density=density, begin=density.prior_draws(sampler.chains, seed), seed=seed)


@pytest.mark.parametrize(("temperature", "likelihood_temperature"), [(1.0, 1.0), (3.0, 1.0), (1.0, 5.0), (0.3, 2.0)])
def test_a_conjugate_posterior_is_exact(temperature: float, likelihood_temperature: float) -> None:
    method = EllipticalSlice(32, 20, 200, temperature=temperature, likelihood_temperature=likelihood_temperature)
    posterior: Any = method.fit(line, rows(), progress=False)
    assert max(map(abs, errors(posterior.z, temperature, likelihood_temperature))) < 4.0
    assert float(posterior.stats["evaluations"].min()) >= 1.0
    assert posterior.info["gradients"] > 32 * 220


def test_the_prior_must_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(map(abs, errors(run(engine())["draws"]))) < 4.0
    monkeypatch.setattr(elliptical_slice, "log_likelihood", lambda point: point.value.numpy())
    assert max(map(abs, errors(run(engine())["draws"]))) > 8.0


def test_the_coordinates_make_the_tempered_prior_standard_normal() -> None:
    driver = engine(3.0)
    state = driver.init()
    metric = Metric.of(state)
    torch.testing.assert_close(metric.to_z(state["z"]), driver.begin)
    torch.testing.assert_close(state["z"], (driver.begin - MEAN) / (SD * math.sqrt(3.0)))
    # the remainder is the likelihood to the power 1/3, up to a constant
    found = torch.from_numpy(log_likelihood(driver.point(state)))
    exact = driver.density.log_density(driver.begin, target="likelihood")
    torch.testing.assert_close(found - found[0], exact - exact[0])


@dataclass
class Recorded:
    """Given uniforms, row after row, in place of a ``Noise``."""

    rows: Floats
    used: int = 0

    def uniform(self, rows: int) -> Floats:
        self.used += rows
        return self.rows[self.used - rows : self.used]


def test_a_batch_moves_as_its_chains_do_alone() -> None:
    target, chains = banana(), 8
    start = evaluate(0.1 * target.prior_draws(chains), target.value_and_grad)
    direction = 5.0 * target.prior_draws(chains, 1)
    uniforms = np.random.default_rng(0).random((60, chains))
    threshold = np.linspace(0.1, 0.9, chains)
    all_noise: Any = Recorded(uniforms)
    together, statistics = elliptical_slice_transition(start, direction, threshold, all_noise, target.value_and_grad)
    for k in range(chains):
        one = slice(k, k + 1)
        own = Point(start.z[one], start.value[one], start.grad[one])
        noise: Any = Recorded(uniforms[:, one])
        alone, own_statistics = elliptical_slice_transition(
            own, direction[one], threshold[one], noise, target.value_and_grad
        )
        torch.testing.assert_close(alone.z[0], together.z[k], rtol=1e-12, atol=1e-12)
        assert own_statistics["evaluations"][0] == statistics["evaluations"][k] == noise.used
    assert len(set(statistics["evaluations"])) > 2
    # every new state lies on its ellipse, above its slice
    assert (log_likelihood(together) > log_likelihood(start) + np.log(threshold)).all()


def test_the_streams_do_not_depend_on_the_fate_of_the_chains() -> None:
    states = [engine(seed=0), engine(seed=0)]
    states[1].begin = states[1].begin + 3.0
    ends = [run(driver, 3) for driver in states]
    assert not torch.equal(ends[0]["z"], ends[1]["z"])
    assert torch.equal(ends[0]["uniforms"].get_state(), ends[1]["uniforms"].get_state())


def test_where_the_density_is_not_finite_no_chain_goes() -> None:
    target = banana()
    start = evaluate(torch.full((4, 2), 0.3, dtype=DOUBLE), target.value_and_grad)

    def walled(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target.value_and_grad(z)
        return torch.where(z[:, 0] < 0.0, torch.nan, value), gradient

    uniforms: Any = Recorded(np.random.default_rng(1).random((60, 4)))
    point, _ = elliptical_slice_transition(start, target.prior_draws(4), np.full(4, 0.1), uniforms, walled)
    assert (point.z[:, 0] >= 0.0).all()
    assert point.value.isfinite().all()


def test_a_prior_that_is_not_gaussian_is_refused() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones((), dtype=DOUBLE)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], sigma), obs=y)

    with pytest.raises(MethodError, match="not an independent Gaussian"):
        METHOD.fit(program, rows(), progress=False)


def test_resume_from_any_step_is_bit_exact() -> None:
    short = EllipticalSlice(3, 10, 10)
    whole = run(engine(method=short))
    for pause in (1, 9, 15):
        other = run(engine(method=short), None, copied(run(engine(method=short), pause)))
        for name in ("draws", "statistics", "z", "metric.centre"):
            assert torch.equal(other[name], whole[name]), (pause, name)
