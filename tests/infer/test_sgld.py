"""SGLD: its known bias on Gaussians, the factor N/B, schedules, the default step size, resume."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import Divergence, MethodError, NotFactorised
from bayesdl.infer.curvature import gradient_noise, largest_curvature
from bayesdl.infer.schedules import Polynomial
from bayesdl.infer.sgld import SGLD, sgld_step
from bayesdl.infer.stochastic_engine import StochasticEngine
from bayesdl.posterior.problem import prepare
from tests.infer.targets import Target, copied, correlated, normal, run, standard_errors


def engine(target: Any, method: SGLD, begin: Tensor | None = None, seed: int = 0) -> StochasticEngine:
    problem = SimpleNamespace(density=target, n=target.n)
    start = target.prior_draws(method.chains, seed) if begin is None else begin
    return StochasticEngine(method, problem, seed, start)  # type: ignore[arg-type]  # a Target stands in for the density


def second_moments(step_size: float, steps: int, factor: float = 1.0) -> Tensor:
    """Time averages of z^2 for 64,000 independent walkers on N(0, 1); ``factor`` spoils the drift."""
    stream = generator(0, "walkers", int(1e6 * step_size))
    z = torch.randn(64_000, dtype=torch.float64, generator=stream)
    total, burn = torch.zeros_like(z), math.ceil(12 / step_size)
    for step in range(burn + steps):
        z = sgld_step(z, -factor * z, torch.randn(z.shape, dtype=torch.float64, generator=stream), step_size)
        if step >= burn:
            total += z.square()
    return total / steps


def errors(values: Tensor, exact: float) -> float:
    return float((values.mean() - exact) / (values.std() / math.sqrt(len(values))))


def test_the_variance_on_a_gaussian_and_the_order_of_its_excess() -> None:
    sizes, excess = [0.06, 0.12, 0.24, 0.48], []
    for size in sizes:
        values = second_moments(size, math.ceil(60 / size))
        assert abs(errors(values, 1.0 / (1.0 - size / 4.0))) < 3.0, size
        excess.append(float(values.mean()) - 1.0)
    slope = np.polyfit(np.log(sizes), np.log(excess), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.1)


def test_a_drift_without_its_half_is_noticed() -> None:
    assert abs(errors(second_moments(0.5, 60, factor=2.0), 1.0 / (1.0 - 0.5 / 4.0))) > 30.0


def test_the_engine_samples_that_variance() -> None:
    target = normal(torch.ones(20, dtype=torch.float64))
    state = run(engine(target, SGLD(chains=32, warmup=100, draws=100, thin=4, step_size=0.5)))
    squares = state["draws"].square().mean(2)
    assert abs(standard_errors(squares, 1.0 / (1.0 - 0.5 / 4.0))) < 4.0
    assert target.gradients == 32 * 500


def test_steps_are_in_units_of_the_prior() -> None:
    # N(0, s^2) seen in units of s is N(0, 1), whatever s: the bias is that of the step size there
    scales = torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)
    target = normal(scales)
    target.unit = scales
    method = SGLD(chains=64, warmup=60, draws=100, thin=4, step_size=0.5)
    state = run(engine(target, method, target.prior_draws(64) * scales))
    assert abs(standard_errors((state["draws"] / scales).square().mean(2), 1.0 / (1.0 - 0.5 / 4.0))) < 4.0


N, B, STEP = 100, 10, 1e-3


def observations() -> Tensor:
    return 0.5 + torch.randn(N, dtype=torch.float64, generator=generator(5, "observations"))


def mean_program(x: Tensor, y: Tensor | None = None) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(theta + 0.0 * x[:, 0], 1.0), obs=y)


def shuffled_variance(y: Tensor) -> float:
    """Stationary variance, averaged over an epoch, with batches drawn without replacement.

    z_{k+1} = r z_k + (STEP/2) N e_k + sqrt(STEP) xi with r = 1 - STEP (N + 1) / 2; the K batch errors e_k of an epoch
    have variance s^2 = (1 - B/N) var(y) / B and sum to zero, so their covariances are -s^2 / (K - 1).
    """
    batches, rate = N // B, 1 - STEP * (N + 1) / 2
    noise = (1 - B / N) * float(y.var()) / B * (STEP / 2 * N) ** 2
    covariance = noise * (np.eye(batches) * batches - 1) / (batches - 1) + STEP * np.eye(batches)
    added = []
    for k in range(batches + 1):
        weights = rate ** np.arange(k)[::-1]
        added.append(weights @ covariance[:k, :k] @ weights)
    start = added[batches] / (1 - rate ** (2 * batches))
    return float(np.mean([rate ** (2 * k) * start + added[k] for k in range(batches)]))


def test_the_factor_n_over_b_is_right_once() -> None:
    y = observations()
    data = (torch.zeros(N, 1, dtype=torch.float64), y)
    method = SGLD(chains=200, warmup=200, draws=100, thin=21, step_size=STEP, batch_size=B)
    posterior = method.fit(mean_program, data, seed=0, progress=False)
    theta = posterior.z[..., 0]  # type: ignore[attr-defined]  # fit is annotated with the base class
    mean = float(y.sum()) / (N + 1)
    assert abs(standard_errors(theta, mean)) < 4.0
    assert abs(standard_errors((theta - mean).square(), shuffled_variance(y))) < 4.0
    # and thus within 8% of the exact posterior variance, where independent batches would be off by about 20%
    assert shuffled_variance(y) == pytest.approx(1 / (N + 1), rel=0.08)
    assert posterior.info["gradients"] == 200 * 2300


@pytest.mark.parametrize(("factor", "printed"), [(N / B, 0.01217), (1.0, 0.0907), (1.0 / B, 0.486)])
def test_independent_batches_and_the_two_wrong_factors(factor: float, printed: float) -> None:
    # The wrong factors (batch sum, batch mean) sample another posterior; a test of N/B must be able to see that.
    y, chains = observations(), 4000
    stream = generator(0, "independent")
    slope = 1 + factor * B
    heat = factor**2 * B * float(y.var(correction=0))
    exact = (1 + STEP * heat / 4) / (slope * (1 - STEP * slope / 4))
    centre = factor * B * float(y.mean()) / slope
    z = centre + math.sqrt(exact) * torch.randn(chains, dtype=torch.float64, generator=stream)
    total, steps = torch.zeros_like(z), 600
    for _ in range(steps):
        rows = torch.randint(N, (chains, B), generator=stream)
        gradient = factor * (y[rows] - z[:, None]).sum(1) - z
        z = sgld_step(z, gradient, torch.randn(z.shape, dtype=torch.float64, generator=stream), STEP)
        total += (z - centre).square()
    assert abs(errors(total / steps, exact)) < 4.0
    assert exact == pytest.approx(printed, rel=0.08)


def test_mini_batches_of_a_coupled_program_are_refused() -> None:
    def chain(x: Tensor, y: Tensor | None = None) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(theta + 0.0 * x[:, 0] + x.sum(), 1.0), obs=y)

    data = (torch.linspace(0.0, 1.0, 8, dtype=torch.float64)[:, None], torch.ones(8, dtype=torch.float64))
    with pytest.raises((MethodError, NotFactorised)):
        SGLD(chains=1, warmup=1, draws=1, thin=1, batch_size=4).fit(chain, data, progress=False)


def test_draws_are_equally_spaced_in_langevin_time() -> None:
    schedule = Polynomial(a=0.4, b=5.0, gamma=0.6)
    method = SGLD(chains=2, warmup=30, draws=60, thin=5, step_size=schedule)
    driver = engine(normal(torch.ones(2, dtype=torch.float64)), method)
    filled = np.array([driver.drawn(step) for step in range(driver.total + 1)])
    assert filled[:31].max() == 0
    assert filled[-1] == 60
    sizes = np.array([schedule(step) for step in range(30, driver.total)])
    share = sizes.cumsum() / sizes.sum()
    assert np.abs(filled[31:] / 60 - share).max() <= 0.5 / 60 + 1e-12
    method = SGLD(chains=2, warmup=3, draws=4, thin=1, step_size=0.1)
    constant = engine(normal(torch.ones(2, dtype=torch.float64)), method)
    assert [constant.drawn(step) for step in range(constant.total + 1)] == [0, 0, 0, 0, 1, 2, 3, 4]


def test_each_draw_bears_the_step_size_of_its_time() -> None:
    schedule = Polynomial(a=40.0, b=60.0, gamma=0.9)
    target = normal(torch.ones(50, dtype=torch.float64))
    driver = engine(target, SGLD(chains=64, warmup=0, draws=200, thin=2, step_size=schedule))
    state = run(driver)
    assert torch.isfinite(state["draws"]).all()
    used = state["statistics"][1, 0]
    assert float(used[0]) == pytest.approx(schedule(0), rel=0.2)
    assert float(used.diff().max()) <= 0.0


def test_the_default_step_size_is_set_by_the_largest_curvature() -> None:
    scales = torch.tensor([0.05, 1.0, 3.0], dtype=torch.float64)
    target = normal(scales)
    state = run(engine(target, SGLD(chains=4, warmup=200, draws=20, thin=5), target.prior_draws(4) * scales))
    assert state["step_size"] == pytest.approx(0.05**2, rel=0.02)
    assert state["rescues"] == 0


def test_warm_up_comes_back_from_an_explosion() -> None:
    # exp(-z^4 / 4) is flat near 0, where the chains start, and ever steeper outside: E z^2 = 2 G(3/4) / G(1/4) = 0.676
    quartic = Target(lambda z: (-z.pow(4).sum(1) / 4, -z.pow(3)), 1)
    begin = torch.full((64, 1), 0.05, dtype=torch.float64)
    state = run(engine(quartic, SGLD(chains=64, warmup=500, draws=100, thin=10), begin))
    assert state["rescues"] > 0
    exact = 2 * math.gamma(0.75) / math.gamma(0.25)
    assert float(state["draws"].square().mean()) == pytest.approx(exact, rel=0.25)


def test_an_explosion_with_a_given_step_size_is_an_error() -> None:
    target = normal(torch.full((2,), 0.01, dtype=torch.float64))
    with pytest.raises(Divergence, match="smaller step_size"):
        run(engine(target, SGLD(chains=2, warmup=2000, draws=10, thin=1, step_size=0.1)))
    with pytest.raises(Divergence, match="smaller step_size"):
        run(engine(target, SGLD(chains=2, warmup=0, draws=2000, thin=1, step_size=0.1)))


def test_no_curvature_no_default() -> None:
    flat = Target(lambda z: (z.sum(1) * 0.0, z * 0.0), 2)
    with pytest.raises(Divergence, match="pass step_size"):
        run(engine(flat, SGLD(chains=2, warmup=5, draws=5, thin=1)), 1)


def test_curvature_and_gradient_noise() -> None:
    target = correlated()
    exact = 1.0 / float(torch.linalg.eigvalsh(torch.linalg.inv(-_hessian(target))).min())
    found = largest_curvature(target.prior_draws(4), target.value_and_grad, generator(0, "probe"))
    assert found == pytest.approx(exact, rel=1e-3)
    stream = generator(0, "gradients")

    def batch() -> Any:
        spread = torch.tensor([1.0, 3.0], dtype=torch.float64)
        return lambda z: (z[:, 0], spread * torch.randn(z.shape, dtype=torch.float64, generator=stream))

    noise = gradient_noise(torch.zeros(500, 2, dtype=torch.float64), batch)
    assert noise.tolist() == pytest.approx([1.0, 9.0], rel=0.1)


def _hessian(target: Target) -> Tensor:
    rows = [target.function(row[None])[1][0] for row in torch.eye(3, dtype=torch.float64)]
    return torch.stack(rows) - target.function(torch.zeros(1, 3, dtype=torch.float64))[1]


@pytest.mark.parametrize("batch_size", [None, 7])
def test_resume_from_any_step_is_bit_exact(batch_size: int | None) -> None:
    x = torch.randn(20, 1, dtype=torch.float64, generator=generator(0, "x"))
    problem = prepare(mean_program, (x, x[:, 0]), seed=0)
    method = SGLD(chains=3, warmup=25, draws=10, thin=3, batch_size=batch_size)
    begin = problem.density.prior_draws(3, 0)
    whole = run(StochasticEngine(method, problem, 0, begin))
    for pause in (1, 15, 25, 40):
        half = run(StochasticEngine(method, problem, 0, begin), pause)
        other = run(StochasticEngine(method, problem, 0, begin), None, copied(half))
        assert torch.equal(other["draws"], whole["draws"]), pause
        assert torch.equal(other["statistics"], whole["statistics"])
        assert other["step_size"] == whole["step_size"]
