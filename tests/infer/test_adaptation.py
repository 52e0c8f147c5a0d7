"""Warm-up: the schedule of windows, dual averaging, and the pooled variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesdl._rng import generator
from bayesdl.errors import Divergence
from bayesdl.infer import adaptation
from bayesdl.infer import windows as window
from bayesdl.infer.adaptation import Windows, windows
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hamiltonian import first_step_size
from bayesdl.infer.kernel import Noise, evaluate
from bayesdl.infer.metric import SHAPES, Metric, Shape
from bayesdl.infer.nuts import NUTS
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


def test_dual_averaging_finds_the_step_sizes_of_known_acceptance_curves() -> None:
    # acceptance exp(-c eps) is 0.8 at eps = -log 0.8 / c
    rate = torch.tensor([1.0, 30.0], dtype=torch.float64)
    state = adaptation.start_averaging(torch.ones(2, dtype=torch.float64))
    noise = torch.randn(2000, 2, dtype=torch.float64, generator=generator(0, "acceptance")) * 0.05
    for shake in noise:
        state |= adaptation.average(state, (-rate * state["step_size"]).exp() + shake, 0.8)
    torch.testing.assert_close(
        adaptation.averaged_step_size(state) * rate, torch.full_like(rate, -math.log(0.8)), rtol=0.05, atol=0
    )


def test_dual_averaging_follows_its_formula() -> None:
    state = adaptation.start_averaging(torch.tensor([0.5], dtype=torch.float64))
    error = averaged = 0.0
    for t, accepted in enumerate([0.9, 0.2, 0.0, 1.0], start=1):
        state |= adaptation.average(state, torch.tensor([accepted], dtype=torch.float64), 0.8)
        error = (1 - 1 / (t + 10)) * error + (0.8 - accepted) / (t + 10)
        log_step = math.log(5.0) - math.sqrt(t) / 0.05 * error
        averaged = t**-0.75 * log_step + (1 - t**-0.75) * averaged
        assert float(state["step_size"]) == pytest.approx(math.exp(log_step), rel=1e-12)
    assert float(adaptation.averaged_step_size(state)) == pytest.approx(math.exp(averaged), rel=1e-12)


def test_one_stuck_chain_rules_the_harmonic_mean_and_not_the_arithmetic() -> None:
    accepted = torch.full((1, 64), 0.8, dtype=torch.float64)
    assert float(adaptation.harmonic_mean(accepted)) == pytest.approx(0.8)
    accepted[0, 5] = 0.0
    assert float(adaptation.harmonic_mean(accepted)) < 0.1 < float(accepted.mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_metric_maps_there_and_back_and_its_adjoint_is_its_transpose(shape: Shape) -> None:
    metric = _random_metric(shape, groups=2, dim=5)
    u = torch.randn(6, 5, dtype=torch.float64, generator=generator(1, "u"))
    g = torch.randn(6, 5, dtype=torch.float64, generator=generator(2, "g"))
    torch.testing.assert_close(metric.to_u(metric.to_z(u)), u)
    torch.testing.assert_close(metric.push(metric.pull(g)), g)
    torch.testing.assert_close((metric.to_z(u) * g).sum(1), (u * metric.pull(g)).sum(1))


def _random_metric(shape: Shape, groups: int, dim: int) -> Metric:
    stream = generator(0, shape)
    scale = torch.rand(groups, dim, dtype=torch.float64, generator=stream) + 0.5
    noise = torch.randn(groups, dim, dim, dtype=torch.float64, generator=stream)
    if shape == "diag":
        return Metric(scale)
    if shape == "dense":
        return Metric(torch.ones_like(scale), torch.linalg.cholesky(noise @ noise.mT + torch.eye(dim)))
    return Metric(scale, None, torch.linalg.qr(noise[..., :2])[0], scale[:, :2] * 3.0)


def test_the_window_holds_the_total_covariance_of_all_draws_of_a_groups_chains() -> None:
    z = torch.randn(50, 8, 3, dtype=torch.float64, generator=generator(0, "z")) + 1e3
    z[:, 1] += 5.0
    for shape in ("diag", "dense"):
        state = window.start(shape, z[0], 2)
        for row in z:
            state |= window.extend(shape, state, row, None, 2)
        metric = window.estimate(shape, state, torch.float64)
        for k in range(2):
            covariance = z[:, 4 * k : 4 * k + 4].reshape(200, 3).T.cov()
            expected = 200 / 205 * (covariance + 5e-3 / 200 * covariance.diagonal().diag())
            if shape == "diag":
                torch.testing.assert_close(metric.scale[k].square(), expected.diagonal(), rtol=1e-10, atol=0)
            else:
                assert metric.factor is not None
                torch.testing.assert_close(metric.factor[k] @ metric.factor[k].T, expected, rtol=1e-10, atol=1e-14)


def test_a_low_rank_metric_whitens_a_gaussian_with_fewer_draws_than_dimensions() -> None:
    dim, stream = 100, generator(0, "low rank")
    covariance = torch.diag(torch.logspace(-2, 2, dim, dtype=torch.float64))
    axes = torch.linalg.qr(torch.randn(dim, 4, dtype=torch.float64, generator=stream))[0]
    stretch = torch.tensor([30.0, 10.0, -0.95, -0.9], dtype=torch.float64)
    root = covariance.sqrt() @ (torch.eye(dim, dtype=torch.float64) + axes @ stretch.diag() @ axes.T)
    covariance = root @ root.T
    z = torch.randn(60, dim, dtype=torch.float64, generator=stream) @ root.T
    gradient = -torch.linalg.solve(covariance, z.T).T
    state = window.start("low_rank", z, 1)
    state |= window.extend("low_rank", state, z, gradient, 1)
    metric = window.estimate("low_rank", state, torch.float64)
    inverse = metric.to_u(torch.eye(dim, dtype=torch.float64)).T
    spectrum = torch.linalg.eigvalsh(inverse @ covariance @ inverse.T)
    diagonal = torch.linalg.eigvalsh(covariance / covariance.diagonal().sqrt().outer(covariance.diagonal().sqrt()))
    assert float(spectrum.max() / spectrum.min()) < 50.0 < float(diagonal.max() / diagonal.min()) / 10.0


def _noise(like: torch.Tensor) -> Noise:
    return Noise(generator(0, "p"), generator(0, "u"), like, len(like), slice(0, len(like)))


def test_the_first_step_sizes_bracket_the_target_group_by_group() -> None:
    target = normal(torch.full((50,), 0.01, dtype=torch.float64))
    wide = normal(torch.ones(50, dtype=torch.float64))

    def both(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = target.function(z[:64]), wide.function(z[64:])
        return torch.cat([parts[0][0], parts[1][0]]), torch.cat([parts[0][1], parts[1][1]])

    point = evaluate(torch.cat([target.prior_draws(64) * 0.01, wide.prior_draws(64)]), both)
    group = np.repeat([0, 1], 64)
    for guess in (1.0, 1e-5):
        narrow, broad = first_step_size(point, np.full(2, guess), group, _noise(point.z), both)
        assert 0.002 < narrow < 0.02
        assert 0.2 < broad < 2.0


def test_a_density_without_a_step_size_is_a_divergence() -> None:
    point = evaluate(torch.zeros(3, 2, dtype=torch.float64), lambda z: (z.sum(1) * 0.0, z * 0.0))
    with pytest.raises(Divergence, match="flat"):
        first_step_size(
            point, np.ones(1), np.zeros(3, dtype=np.int64), _noise(point.z), lambda z: (z.sum(1) * 0.0, z * 0.0)
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_learns_the_scales_and_reaches_the_target_acceptance(shape: Shape) -> None:
    scales = torch.logspace(-1.5, 0.5, 10, dtype=torch.float64)
    target = normal(scales)
    method = NUTS(chains=16, warmup=200, draws=50, metric=shape)
    engine = MarkovEngine(sampler=method, density=target, begin=target.prior_draws(16), seed=1)
    state = run(engine)
    inverse = Metric.of(state).to_z(torch.eye(10, dtype=torch.float64)).T
    ratio = (inverse @ inverse.T).diagonal().sqrt() / scales
    assert float(ratio.log().abs().max()) < math.log(1.25)
    assert 0.7 < float(state["statistics"][0].mean()) < 0.93
    assert float(state["statistics"][4].max()) <= 15
