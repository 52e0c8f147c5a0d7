"""Leapfrog and HMC: reversible, volume preserving, second order; known moments; wrong variants fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hamiltonian import kinetic, leapfrog
from bayesdl.infer.hmc import HMC, hmc_transition
from bayesdl.infer.kernel import Noise, Point, Statistics, Tuning, ValueAndGrad, evaluate
from bayesdl.infer.metric import Metric
from tests.infer.targets import Target, banana, copied, correlated, funnel, moments, normal, run, standard_errors

ONE = torch.ones(1, dtype=torch.float64)


def engine(target: Any, method: HMC, seed: int = 0) -> MarkovEngine:
    return MarkovEngine(sampler=method, density=target, begin=target.prior_draws(method.chains, seed), seed=seed)


def path(target: Target, z: Tensor, p: Tensor, step: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    value, grad = target.value_and_grad(z)
    for _ in range(steps):
        z, p, value, grad = leapfrog(z, p, grad, step, target.value_and_grad)
    return z, p, value


@pytest.mark.parametrize("make", [correlated, funnel, banana])
def test_the_leapfrog_runs_back_to_where_it_came_from(make: Callable[[], Target]) -> None:
    target = make()
    z = target.prior_draws(8)
    p = torch.randn(z.shape, dtype=torch.float64, generator=generator(0, "p"))
    step = 0.05 * torch.linspace(0.5, 2.0, target.dim, dtype=torch.float64)
    far, momentum, _ = path(target, z, p, step, 25)
    assert float((far - z).abs().min()) > 1e-3
    back, returned, _ = path(target, far, momentum, -step, 25)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returned, p, rtol=1e-9, atol=1e-9)


def test_the_leapfrog_is_symplectic() -> None:
    target, step = banana(), torch.tensor([0.05, 0.02], dtype=torch.float64)

    def flow(state: Tensor) -> Tensor:
        z, p, _ = path(target, state[None, :2], state[None, 2:], step, 10)
        return torch.cat([z[0], p[0]])

    jacobian = torch.autograd.functional.jacobian(flow, torch.tensor([0.7, -0.3, 0.4, 1.1], dtype=torch.float64))
    # in the momenta v = p / scale; the step size itself drops out
    weight = torch.cat([torch.ones(2, dtype=torch.float64), 1.0 / step])
    jacobian = weight[:, None] * jacobian / weight
    form = torch.zeros(4, 4, dtype=torch.float64)
    form[:2, 2:], form[2:, :2] = torch.eye(2), -torch.eye(2)
    torch.testing.assert_close(jacobian.T @ form @ jacobian, form, rtol=1e-10, atol=1e-10)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-10)


def test_energy_is_kept_to_second_order_and_euler_loses_it() -> None:
    target = normal(ONE)
    z, p = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    _, end, value = path(target, z, p, 0.1 * ONE, 50)
    assert float(kinetic(end) - value) / 0.5 == pytest.approx(0.9977, abs=5e-5)
    euler_z, euler_p = z, p
    for _ in range(50):
        euler_z, euler_p = euler_z + 0.1 * euler_p, euler_p - 0.1 * euler_z
    assert float(euler_z.square() + euler_p.square()) == pytest.approx(1.01**50, rel=1e-9)

    def error(step: float) -> float:
        bent = banana()
        start = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
        momentum = torch.tensor([[0.8, -0.6]], dtype=torch.float64)
        _, moved, reached = path(bent, start, momentum, torch.full((2,), step, dtype=torch.float64), round(1.2 / step))
        return float((kinetic(moved) - reached) - (kinetic(momentum) - bent.value_and_grad(start)[0]))

    assert error(0.02) / error(0.01) == pytest.approx(4.0, rel=0.05)


def test_the_mass_matrix_sets_the_period() -> None:
    # With M^-1 = scale^2 equal to the variance every coordinate has period 2 pi, whatever its scale.
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    target = normal(scales)
    z = torch.tensor([[0.2, -1.0, 10.0]], dtype=torch.float64)
    p = torch.tensor([[1.0, 0.3, -0.5]], dtype=torch.float64)
    end, momentum, _ = path(target, z, p, 2 * math.pi / 4000 * scales, 4000)
    torch.testing.assert_close(end, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(momentum, p, rtol=1e-4, atol=1e-5)


def test_a_mass_that_does_not_fit_is_still_exact_without_the_accept_step() -> None:
    # M = 4 on N(0, 1): dz/dt = v would give variance 3.98; dz/dt = v / M gives 1 and is accepted at .998.
    method = Unchecked(chains=256, warmup=0, draws=60, step_size=0.1, leapfrog_steps=40, jitter=0.3)
    driver = engine(normal(ONE), method)
    start = {"step": 0} | driver.init()
    state = run(driver, None, driver.change_metric(start, Metric(torch.full((1, 1), 0.5, dtype=torch.float64))))
    assert abs(standard_errors(state["draws"][:, 10:, 0].square(), 1.0)) < 4.0
    assert float(state["statistics"][0].mean()) > 0.995


class Unchecked(HMC):
    """HMC that accepts whatever comes."""

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        steps = self.steps(tuning.step, noise.shared())
        return hmc_transition(point, noise.normal(), tuning.step, steps, 0.0 * tuning.step, value_and_grad)


def test_large_steps_need_the_accept_step() -> None:
    # At step size 1.4 the leapfrog samples variance 1 / (1 - 1.4^2 / 4) = 1.96 unless ends are accepted or refused.
    target, method = normal(ONE), HMC(chains=256, warmup=50, draws=60, step_size=1.4, leapfrog_steps=3)
    right = run(engine(target, method))
    assert abs(standard_errors(right["draws"][..., 0].square(), 1.0)) < 4.0
    assert float(right["statistics"][0].mean()) < 0.95
    wrong = run(engine(target, Unchecked(**method.settings())))
    assert standard_errors(wrong["draws"][..., 0].square(), 1.0) > 10.0


def test_half_a_period_is_accepted_and_goes_nowhere_without_jitter() -> None:
    target = normal(ONE)
    fixed = HMC(chains=8, warmup=0, draws=50, step_size=1.0, leapfrog_steps=3, jitter=0.0)
    state = run(engine(target, fixed))
    start = target.prior_draws(8, 0)
    torch.testing.assert_close(state["draws"][..., 0].abs(), start.abs().expand(8, 50), rtol=1e-9, atol=1e-9)
    assert float(state["statistics"][0].min()) > 1 - 1e-9
    jittered = run(engine(target, HMC(chains=64, warmup=20, draws=100, step_size=1.0, leapfrog_steps=3)))
    assert abs(standard_errors(jittered["draws"][..., 0].square(), 1.0)) < 4.0


@pytest.mark.parametrize(("name", "make"), [("correlated", correlated), ("funnel", funnel), ("banana", banana)])
def test_known_moments(name: str, make: Callable[[], Target]) -> None:
    method = HMC(chains=64, warmup=150, draws=200, target_accept=0.98 if name == "banana" else 0.8)
    errors = moments(name, run(engine(make(), method))["draws"])
    assert max(map(abs, errors.values())) < 4.0, errors


def test_a_rejected_chain_stays_and_counts_again() -> None:
    target = correlated()
    start = evaluate(target.prior_draws(5), target.value_and_grad)
    momentum = torch.randn(5, 3, dtype=torch.float64, generator=generator(1, "p"))
    each = np.ones(5)
    point, statistics = hmc_transition(start, momentum, 0.3 * each, 5.0 * each, each, target.value_and_grad)
    stayed = torch.from_numpy(statistics["acceptance"]) < 1.0
    assert stayed.any()
    assert torch.equal(point.z[stayed], start.z[stayed])
    assert torch.equal(point.value[stayed], start.value[stayed])
    torch.testing.assert_close(
        torch.from_numpy(statistics["energy"])[stayed], (kinetic(momentum) - start.value)[stayed], rtol=1e-12, atol=0
    )


def test_an_end_that_is_not_finite_is_rejected_as_a_divergence() -> None:
    target = Target(lambda z: (torch.where(z[:, 0] < 1.0, -z[:, 0], torch.nan), -torch.ones_like(z)), 1)
    start = evaluate(torch.zeros(2, 1, dtype=torch.float64), target.value_and_grad)
    momentum = torch.tensor([[5.0], [-1.0]], dtype=torch.float64)
    each = np.ones(2)
    point, statistics = hmc_transition(start, momentum, 0.5 * each, each, 0.0 * each, target.value_and_grad)
    assert statistics["divergent"].tolist() == [1.0, 0.0]
    assert point.z[0].item() == 0.0
    assert point.z[1].item() != 0.0


def test_resume_from_any_step_is_bit_exact() -> None:
    method = HMC(chains=3, warmup=40, draws=20)
    whole = run(engine(funnel(), method))
    for pause in (1, 22, 40, 49):
        other = run(engine(funnel(), method), None, copied(run(engine(funnel(), method), pause)))
        for name in ("draws", "statistics", "z", "metric.scale"):
            assert torch.equal(other[name], whole[name]), (pause, name)


def test_a_given_step_size_is_used_as_it_is() -> None:
    state = run(engine(correlated(), HMC(chains=2, warmup=30, draws=5, step_size=0.07)))
    assert state["step_size"].tolist() == [0.07]
    assert torch.equal(state["metric.scale"], torch.ones(1, 3, dtype=torch.float64))
    assert state["statistics"][-1].eq(0.07).all()


def test_steps_of_a_trajectory() -> None:
    assert HMC(trajectory_length=2.0, jitter=0.0).steps(np.array([0.1, 0.2]), 0.3).tolist() == [20, 10]
    assert HMC(leapfrog_steps=10, jitter=0.5).steps(np.array([0.1]), 0.0) == 5
    assert HMC(leapfrog_steps=10, jitter=0.5).steps(np.array([0.1]), 1.0) == 15
    assert HMC().steps(np.array([1e-9, 1e9]), 0.5).tolist() == [1024, 1]


def test_chains_of_different_step_sizes_move_as_they_do_alone() -> None:
    target = funnel()
    start = evaluate(target.prior_draws(3), target.value_and_grad)
    momentum = torch.randn(3, 3, dtype=torch.float64, generator=generator(1, "p"))
    step, steps, uniform = np.array([0.1, 0.3, 0.2]), np.array([7.0, 2.0, 4.0]), np.zeros(3)
    together, _ = hmc_transition(start, momentum, step, steps, uniform, target.value_and_grad)
    for k in range(3):
        own = Point(start.z[k : k + 1], start.value[k : k + 1], start.grad[k : k + 1])
        one = slice(k, k + 1)
        alone, _ = hmc_transition(own, momentum[one], step[one], steps[one], uniform[one], target.value_and_grad)
        torch.testing.assert_close(alone.z[0], together.z[k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"chains": 0}, "chains"),
        ({"draws": 1.5}, "draws"),
        ({"warmup": -1}, "warmup"),
        ({"step_size": 0.0}, "step_size"),
        ({"leapfrog_steps": 0}, "leapfrog_steps"),
        ({"trajectory_length": math.inf}, "trajectory_length"),
        ({"jitter": 1.0}, "jitter"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(MethodError, match=name):
        HMC(**settings)


def test_a_flat_density_is_a_divergence_with_advice() -> None:
    flat = Target(lambda z: (z[:, 0] * 0.0, z * 0.0), 1)
    with pytest.raises(Divergence, match="init"):
        engine(flat, HMC(chains=2, warmup=5, draws=5)).init()
