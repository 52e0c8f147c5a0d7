"""Warm-up: the schedule of windows, dual averaging, and the pooled variance."""

from __future__ import annotations

import math

import pytest
import torch

from bayesdl._rng import generator
from bayesdl.errors import Divergence
from bayesdl.infer import adaptation
from bayesdl.infer.adaptation import Windows, windows
from bayesdl.infer.hamiltonian import evaluate, first_step_size
from bayesdl.infer.hamiltonian_engine import HamiltonianEngine
from bayesdl.infer.nuts import NUTS, STATISTICS
from tests.infer.targets import normal, run


def test_the_windows_are_those_of_stan() -> None:
    assert windows(1000) == Windows(75, 950, (100, 150, 250, 450, 950))
    assert windows(500) == Windows(75, 450, (100, 150, 250, 450))
    assert windows(150) == Windows(75, 100, (100,))
    assert windows(100) == Windows(15, 90, (90,))
    assert windows(19) == Windows(19, 19, ())
    assert windows(0).ends == ()


@pytest.mark.parametrize("warmup", [20, 37, 149, 151, 333, 600, 2000])
def test_windows_cover_the_slow_part_without_a_gap(warmup: int) -> None:
    plan = windows(warmup)
    assert 0 < plan.start < plan.ends[0]
    assert plan.ends[-1] == plan.stop < warmup
    assert list(plan.ends) == sorted(set(plan.ends))


def test_dual_averaging_finds_the_step_size_of_a_known_acceptance_curve() -> None:
    # acceptance exp(-eps) is 0.8 at eps = -log 0.8
    state = adaptation.start_averaging(1.0)
    noise = torch.randn(2000, dtype=torch.float64, generator=generator(0, "acceptance")) * 0.05
    for shake in noise.tolist():
        state |= adaptation.average(state, math.exp(-state["step_size"]) + shake, 0.8)
    assert adaptation.averaged_step_size(state) == pytest.approx(-math.log(0.8), rel=0.03)


def test_dual_averaging_follows_its_formula() -> None:
    state = adaptation.start_averaging(0.5)
    error = averaged = 0.0
    for t, accepted in enumerate([0.9, 0.2, 0.0, 1.0], start=1):
        state |= adaptation.average(state, accepted, 0.8)
        error = (1 - 1 / (t + 10)) * error + (0.8 - accepted) / (t + 10)
        log_step = math.log(5.0) - math.sqrt(t) / 0.05 * error
        averaged = t**-0.75 * log_step + (1 - t**-0.75) * averaged
        assert state["step_size"] == pytest.approx(math.exp(log_step), rel=1e-12)
    assert adaptation.averaged_step_size(state) == pytest.approx(math.exp(averaged), rel=1e-12)


def test_the_window_holds_the_total_variance_of_all_draws_of_all_chains() -> None:
    z = torch.randn(50, 4, 3, dtype=torch.float64, generator=generator(0, "z")) + 1e3
    z[:, 1] += 5.0
    state = adaptation.start_window(z[0])
    for row in z:
        state |= adaptation.extend_window(state, row)
    variance = z.reshape(200, 3).var(0)
    expected = 200 / 205 * variance + 1e-3 * 5 / 205
    torch.testing.assert_close(adaptation.window_scale(state).square(), expected, rtol=1e-10, atol=0)


def test_the_first_step_size_brackets_the_target() -> None:
    target = normal(torch.full((50,), 0.01, dtype=torch.float64))
    point = evaluate(target.prior_draws(64) * 0.01, target.value_and_grad)
    sizes = [
        first_step_size(point, torch.ones(50, dtype=torch.float64), guess, generator(0, "p"), target.value_and_grad)
        for guess in (1.0, 1e-5)
    ]
    assert all(0.002 < size < 0.02 for size in sizes)


def test_a_density_without_a_step_size_is_a_divergence() -> None:
    flat = normal(torch.ones(2, dtype=torch.float64))
    point = evaluate(torch.zeros(3, 2, dtype=torch.float64), lambda z: (z.sum(1) * 0.0, z * 0.0))
    with pytest.raises(Divergence, match="flat"):
        first_step_size(
            point, torch.ones(2), 1.0, generator(0, "p"), lambda z: (flat.value_and_grad(z)[0] * 0.0, z * 0.0)
        )


def test_warm_up_learns_the_scales_and_reaches_the_target_acceptance() -> None:
    scales = torch.logspace(-1.5, 0.5, 10, dtype=torch.float64)
    target = normal(scales)
    method = NUTS(chains=16, warmup=200, draws=50)
    engine = HamiltonianEngine(
        label="NUTS",
        density=target,
        begin=target.prior_draws(16),
        transition=method.transition,
        names=STATISTICS,
        warmup=method.warmup,
        draws=method.draws,
        step_size=None,
        target_accept=0.8,
        seed=1,
    )
    state = run(engine)
    ratio = state["scale"] / scales
    assert float(ratio.log().abs().max()) < math.log(1.25)
    assert 0.7 < float(state["statistics"][0].mean()) < 0.93
    assert float(state["statistics"][4].max()) <= 15
