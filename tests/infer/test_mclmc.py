"""MCLMC: the isokinetic map against its equations, known moments with the accept step, the bias without, warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.infer import mclmc, microcanonical
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.kernel import Noise, Point, Tuning, evaluate
from bayesdl.infer.mclmc import MCLMC, adjusted_transition, unadjusted_transition
from bayesdl.infer.mclmc_adaptation import add_to_batches, autocorrelation_time, empty_batches
from bayesdl.infer.microcanonical import COEFFICIENTS, Integrator, IsokineticStep, kick, refresh, unit
from bayesdl.posterior.convergence import rhat
from tests.infer.line import line, line_errors, rows
from tests.infer.targets import (
    CENTRE,
    Target,
    banana,
    copied,
    correlated,
    funnel,
    moments,
    normal,
    run,
    standard_errors,
)

INTEGRATORS = tuple(COEFFICIENTS)
ONES = torch.ones(3, dtype=torch.float64)


def engine(target: Any, method: MCLMC, seed: int = 0, **more: Any) -> MarkovEngine:
    begin = target.prior_draws(method.chains * more.get("groups", 1), seed)
    return MarkovEngine(sampler=method, density=target, begin=begin, seed=seed, **more)


def gaussian(*shape: int, name: str = "g") -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(0, name))


def path(
    target: Target, z: Tensor, n: Tensor, step: float, steps: int, integrator: Integrator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, direction, value and work after some steps."""
    value, grad = target.value_and_grad(z)
    size, work = torch.full((len(z), 1), step, dtype=z.dtype), torch.zeros(len(z), dtype=z.dtype)
    for _ in range(steps):
        z, n, value, grad, more = IsokineticStep(integrator)(z, n, grad, size, target.value_and_grad)
        work = work + more
    return z, n, value, work


def log_volume(flow: Callable[[Tensor], Tensor], at: Tensor, dim: int) -> float:
    """Log of the change of volume of a map of (position, direction), measured on the sphere of directions."""
    jacobian = torch.autograd.functional.jacobian(flow, at)

    def frame(state: Tensor) -> Tensor:
        tangent = torch.linalg.svd(state[None, dim:])[2][1:].mT
        return torch.block_diag(torch.eye(dim, dtype=at.dtype), tangent)

    return float(torch.linalg.slogdet(frame(flow(at)).mT @ jacobian @ frame(at))[1])


@pytest.mark.parametrize("dim", [2, 3, 40])
def test_a_kick_solves_its_equation_and_counts_the_work(dim: int) -> None:
    n, grad, time = unit(gaussian(1, dim, name="n")), 2.0 * gaussian(1, dim), 0.7
    turned, work = kick(n, grad, torch.full((1, 1), time, dtype=torch.float64))
    g, speed = grad[0].numpy(), math.sqrt(dim)

    def slope(_: float, state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        at = state[:dim]
        return np.append((g - at * (at @ g)) * speed / (dim - 1), speed * at @ g)

    end = solve_ivp(slope, (0.0, time), np.append(n[0].numpy(), 0.0), rtol=1e-11, atol=1e-12).y[:, -1]
    torch.testing.assert_close(turned[0], torch.from_numpy(end[:dim]), rtol=1e-7, atol=1e-9)
    assert float(work) == pytest.approx(end[dim], rel=1e-7)


def test_a_kick_of_any_strength_stays_on_the_sphere() -> None:
    n = unit(gaussian(4, 5, name="n").float())
    for size in (0.0, 1e-20, 1.0, 1e4, 1e18):
        turned, work = kick(n, size * gaussian(4, 5).float(), torch.full((4, 1), 0.1))
        torch.testing.assert_close(turned.norm(dim=1), torch.ones(4))
        assert work.isfinite().all()
        if size < 1e-10:
            torch.testing.assert_close(turned, n)
            torch.testing.assert_close(work, torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("make", [correlated, funnel, banana])
def test_a_trajectory_runs_back_to_where_it_came_from(make: Callable[[], Target], integrator: Integrator) -> None:
    target = make()
    z = (CENTRE if make is correlated else 0.0) + 0.2 * target.prior_draws(8)
    n = unit(gaussian(*z.shape))
    far, direction, _, work = path(target, z, n, 0.05, 8, integrator)
    assert float((far - z).norm(dim=1).min()) > 1e-2
    # directions converge on the way, by exp(-work / (D - 1)), and what is lost to rounding stays lost
    back, returned, _, undone = path(target, far, -direction, 0.05, 8, integrator)
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-returned, n, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(undone, -work, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_work_is_the_loss_of_volume(integrator: Integrator) -> None:
    # without it, exp(log pi) would not be the weight of a trajectory's end
    target = funnel()

    def flow(state: Tensor) -> Tensor:
        z, n, _, _ = path(target, state[None, :3], state[None, 3:], 0.3, 3, integrator)
        return torch.cat([z[0], n[0]])

    at = torch.cat([gaussian(3, name="z"), unit(gaussian(1, 3))[0]])
    work = path(target, at[None, :3], at[None, 3:], 0.3, 3, integrator)[3]
    assert abs(float(work)) > 0.1
    assert log_volume(flow, at, 3) == pytest.approx(-float(work), abs=1e-9)


def test_the_energy_is_kept_to_second_order_and_minimal_norm_keeps_it_better() -> None:
    target = banana()
    z, n = torch.tensor([[0.5, 1.0]], dtype=torch.float64), unit(torch.tensor([[0.8, -0.6]], dtype=torch.float64))

    def error(step: float, integrator: Integrator) -> float:
        _, _, value, work = path(target, z, n, step, round(0.8 / step), integrator)
        return float(work - (value - target.value_and_grad(z)[0]))

    for integrator in INTEGRATORS:
        assert error(0.02, integrator) / error(0.01, integrator) == pytest.approx(4.0, rel=0.05)
    assert abs(error(0.02, "minimal_norm")) < abs(error(0.02, "leapfrog")) / 5.0


def test_refreshing_forgets_directions_and_leaves_them_uniform() -> None:
    n = unit(gaussian(4000, 30, name="n"))
    time, length = torch.full((4000, 1), 0.5, dtype=torch.float64), torch.full((4000, 1), 2.0, dtype=torch.float64)
    new = refresh(n, gaussian(4000, 30), time, length)
    torch.testing.assert_close(new.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    assert float((n * new).sum(1).mean()) == pytest.approx(math.exp(-0.25), abs=0.02)
    torch.testing.assert_close(new.mT @ new / 4000 * 30, torch.eye(30, dtype=torch.float64), rtol=0, atol=0.15)
    assert torch.equal(refresh(n, gaussian(4000, 30), 0.0 * time, length), unit(n))


SETTINGS: dict[str, dict[str, Any]] = {
    "correlated": {"warmup": 100, "draws": 80},
    "funnel": {"warmup": 100, "integrator": "minimal_norm"},
    "banana": {"warmup": 100, "target_accept": 0.98},
}


@pytest.mark.parametrize(("name", "make"), [("correlated", correlated), ("funnel", funnel), ("banana", banana)])
def test_known_moments(name: str, make: Callable[[], Target]) -> None:
    method = replace(MCLMC(chains=64, draws=150), **SETTINGS[name])
    errors = moments(name, run(engine(make(), method))["draws"])
    assert max(map(abs, errors.values())) < 4.0, errors


LARGE = MCLMC(chains=64, warmup=20, draws=150, step_size=1.1, length=3.0)


@pytest.mark.parametrize("mutation", ["none", "no work", "no accept step"])
def test_large_steps_need_the_right_weight(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation == "no work":
        right = kick
        monkeypatch.setattr(microcanonical, "kick", lambda n, g, t: (right(n, g, t)[0], torch.zeros(len(n)).double()))
    if mutation == "no accept step":
        monkeypatch.setattr(mclmc, "acceptance", lambda log_ratio: np.ones_like(log_ratio))
    state = run(engine(normal(ONES), LARGE))
    off = standard_errors(state["draws"].square().sum(2), 3.0)
    assert (abs(off) < 4.0) == (mutation == "none"), off
    if mutation == "none":
        assert 0.3 < float(state["statistics"][0].mean()) < 0.97


def test_the_bias_without_accept_step_shrinks_with_the_square_of_the_step() -> None:
    scale = torch.ones(10, dtype=torch.float64)

    def bias(step: float) -> tuple[float, float]:
        method = MCLMC(
            chains=256, warmup=30, draws=150, step_size=step, length=2.0, adjusted=False, integrator="leapfrog"
        )
        squares = run(engine(normal(scale), method))["draws"].square().mean(2)
        off = float(squares.mean() - 1.0)
        return off, off / standard_errors(squares, 1.0)

    coarse, fine = bias(1.0), bias(0.5)
    assert abs(coarse[0]) > 20.0 * coarse[1]
    assert abs(fine[0] / coarse[0] - 0.25) < 0.05 + 4.0 * fine[1] / abs(coarse[0])


@pytest.mark.parametrize("length", [2.0, 1e9])
def test_chains_that_never_forget_their_direction_stay_on_their_orbits(length: float) -> None:
    target, draws = normal(ONES), 150
    start = evaluate(target.prior_draws(16), target.value_and_grad)._replace(momentum=unit(gaussian(16, 3)))
    tuning = Tuning(np.full(16, 0.2), np.full(16, length))
    noise = Noise(generator(0, "n"), generator(0, "u"), start.z, 16, slice(0, 16))
    seen = []
    for _ in range(draws):
        start, _ = unadjusted_transition(start, tuning, np.full(16, 10.0), noise, target.value_and_grad, "leapfrog")
        seen.append(start.z)
    mixed = float(rhat(torch.stack(seen, 1).square()).max()) < 1.1
    assert mixed == (length == 2.0)


def test_the_main_streams_do_not_depend_on_the_number_of_steps() -> None:
    target, method = normal(ONES), MCLMC(adjusted=False)
    start = evaluate(target.prior_draws(2), target.value_and_grad)._replace(momentum=unit(gaussian(2, 3)))
    after = []
    for length in (0.2, 2.0):
        noise = Noise(generator(0, "n"), generator(0, "u"), start.z, 2, slice(0, 2))
        method.transition(start, Tuning(np.full(2, 0.1), np.full(2, length)), noise, target.value_and_grad)
        after.append((noise.normal(), noise.uniform(1)))
    assert torch.equal(after[0][0], after[1][0])
    assert np.array_equal(after[0][1], after[1][1])
    branch = Noise(generator(0, "n"), generator(0, "u"), torch.zeros(1, 5), 1, slice(0, 1)).branch()
    assert not torch.equal(branch.normals.get_state(), branch.uniforms.get_state())


def test_warm_up_reaches_the_energy_variance_and_the_acceptance() -> None:
    scales = torch.logspace(-1.0, 1.0, 20, dtype=torch.float64)
    target = normal(scales)
    method = MCLMC(chains=16, warmup=200, draws=50, adjusted=False)
    state = run(engine(target, method))
    ratio = state["metric.scale"][0] / scales
    assert float(ratio.log().abs().max()) < math.log(1.3)
    variance = float(state["statistics"][1].square().mean()) / 20
    assert 0.5 < variance / method.energy_variance < 2.0
    assert 0.6 < float(state["length"]) < 1.6
    adjusted = run(engine(target, replace(method, adjusted=True)))
    assert 0.83 < float(adjusted["statistics"][0].mean()) < 0.97
    assert "momentum" not in adjusted


def test_the_autocorrelation_time_of_autoregressions() -> None:
    # tau = (1 + r) / (1 - r); batches of 8 see a time of 3 a little short
    noise = gaussian(400, 64, 2)
    r = torch.tensor([0.5, -0.5], dtype=torch.float64)
    for k, (low, high) in enumerate([(2.3, 3.2), (0.25, 0.45)]):
        z = noise[0, :, k : k + 1]
        state = empty_batches(z, 1)
        for fresh in noise[:, :, k : k + 1]:
            z = r[k] * z + fresh + 5.0 * (1.0 - r[k])
            state |= add_to_batches(state, z, 1)
        assert low < float(autocorrelation_time(state["batches"])) < high
    assert torch.isnan(autocorrelation_time(empty_batches(noise[0], 2)["batches"])).tolist() == [True, True]


def test_strong_correlations_lengthen_the_trajectories() -> None:
    # the whitened covariance has one large direction: standard deviation sqrt(10)
    dim = 10
    covariance = 0.99 * torch.ones(dim, dim, dtype=torch.float64) + 0.01 * torch.eye(dim, dtype=torch.float64)
    precision = torch.linalg.inv(covariance)
    target = Target(lambda z: (-0.5 * ((z @ precision) * z).sum(1), -z @ precision), dim)
    state = run(engine(target, MCLMC(chains=16, warmup=300, draws=1)))
    assert 1.7 < float(state["length"]) < 4.5
    given = run(engine(target, MCLMC(chains=4, warmup=30, draws=1, length=0.5)))
    assert given["length"].tolist() == [0.5]


@pytest.mark.parametrize("adjusted", [True, False])
def test_groups_of_different_scale_have_their_own_tuning(adjusted: bool) -> None:
    scale = torch.tensor([0.3, 5.0], dtype=torch.float64).repeat_interleave(16)[:, None]
    target = Target(lambda z: (-0.5 * (z / scale).square().sum(1), -z / scale.square()), 4)
    method = MCLMC(chains=16, warmup=100, draws=60, adjusted=adjusted, energy_variance=1e-4)
    state = run(engine(target, method, groups=2))
    assert state["metric.scale"].log().sub(torch.tensor([[0.3], [5.0]]).log()).abs().max() < math.log(1.4)
    squares = (state["draws"] / scale[:, None]).square().mean(2)
    for half in squares.split(16):
        assert abs(standard_errors(half, 1.0)) < 4.0


def test_chains_of_different_tuning_move_as_they_do_alone() -> None:
    target = funnel()
    start = evaluate(target.prior_draws(3), target.value_and_grad)
    n = unit(gaussian(3, 3))
    step, steps, uniform = np.array([0.1, 0.3, 0.2]), np.array([7.0, 2.0, 4.0]), np.zeros(3)
    together, told = adjusted_transition(start, n, step, steps, uniform, target.value_and_grad, "leapfrog")
    for k in range(3):
        one = slice(k, k + 1)
        own = Point(start.z[one], start.value[one], start.grad[one])
        alone, own_told = adjusted_transition(
            own, n[one], step[one], steps[one], uniform[one], target.value_and_grad, "leapfrog"
        )
        torch.testing.assert_close(alone.z[0], together.z[k], rtol=1e-10, atol=1e-10)
        assert own_told["energy_change"][0] == pytest.approx(told["energy_change"][k], rel=1e-8, abs=1e-10)


def test_a_rejected_chain_stays_and_an_end_that_is_not_finite_is_rejected() -> None:
    target = Target(lambda z: (torch.where(z[:, 0] < 1.0, -z[:, 0], torch.nan), -torch.ones_like(z)), 2)
    start = evaluate(torch.zeros(2, 2, dtype=torch.float64), target.value_and_grad)
    n = torch.tensor([[0.8, 0.6], [-0.8, 0.6]], dtype=torch.float64)
    each = np.ones(2)
    point, told = adjusted_transition(start, n, 2.0 * each, each, 0.0 * each, target.value_and_grad, "leapfrog")
    assert told["divergent"].tolist() == [1.0, 0.0]
    assert torch.equal(point.z[0], start.z[0])
    assert not torch.equal(point.z[1], start.z[1])
    refused, _ = adjusted_transition(start, n, 0.1 * each, each, each, target.value_and_grad, "leapfrog")
    assert torch.equal(refused.z, start.z)


def test_without_accept_step_a_chain_that_falls_off_goes_back() -> None:
    def walled(z: Tensor) -> tuple[Tensor, Tensor]:
        inside = z[:, :1] > 0.0
        return torch.where(inside, -z, torch.nan).sum(1), torch.where(inside, -torch.ones_like(z), torch.nan)

    target = Target(lambda z: tuple(a + b for a, b in zip(walled(z), normal(ONES[:2]).function(z), strict=True)), 2)  # type: ignore[arg-type, return-value]
    method = MCLMC(chains=8, warmup=5, draws=60, step_size=0.1, adjusted=False)
    begin = target.prior_draws(8).abs()
    state = run(MarkovEngine(sampler=method, density=target, begin=begin, seed=0))  # type: ignore[arg-type]
    assert state["draws"].isfinite().all()
    assert (state["draws"][..., 0] > 0).all()
    divergent = state["statistics"][method.statistics.index("divergent")]
    assert float(divergent.sum()) > 0
    torch.testing.assert_close(state["statistics"][0], 1.0 - divergent / 5.0)


@pytest.mark.parametrize("adjusted", [True, False])
def test_resume_from_any_step_is_bit_exact(adjusted: bool) -> None:
    method = MCLMC(chains=3, warmup=40, draws=20, adjusted=adjusted)
    whole = run(engine(funnel(), method))
    for pause in (1, 22, 40, 49):
        other = run(engine(funnel(), method), None, copied(run(engine(funnel(), method), pause)))
        for name in ("draws", "statistics", "z", "metric.scale", "length", "step_size"):
            assert torch.equal(other[name], whole[name]), (pause, name)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("adjusted", [True, False])
def test_conjugate_regression(temperature: float, adjusted: bool) -> None:
    # without accept step the tolerance of the energy is tightened until the bias is below the Monte-Carlo error
    method = MCLMC(chains=16, warmup=60, draws=60, temperature=temperature, adjusted=adjusted, energy_variance=3e-5)
    posterior: Any = method.fit(line, rows(), seed=2, progress=False)
    errors = line_errors(posterior.z, temperature)
    assert max(map(abs, errors)) < 4.0, errors
    assert posterior.info["divergences"] == 0
    assert posterior.info["gradients"] > 16 * float(posterior.stats["leapfrogs"].max(0).values.sum())


def test_one_unknown_is_refused() -> None:
    def program(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    with pytest.raises(MethodError, match="single unknown"):
        MCLMC(warmup=5, draws=5).fit(program, {"y": torch.zeros(3, dtype=torch.float64)}, progress=False)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"length": 0.0}, "length"),
        ({"jitter": 1.1}, "jitter"),
        ({"energy_variance": -1.0}, "energy_variance"),
        ({"integrator": "euler"}, "integrator"),
        ({"target_accept": 1.0}, "target_accept"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(MethodError, match=name):
        MCLMC(**settings)


def test_steps_of_a_transition() -> None:
    tuning = Tuning(np.array([0.1, 0.3, 1e-9, 10.0]), np.ones(4))
    assert MCLMC().steps(tuning).tolist() == [10, 3, 1024, 1]
    assert MCLMC(integrator="minimal_norm").steps(tuning, 0.5).tolist() == [5, 2, 512, 1]
