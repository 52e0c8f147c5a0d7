"""What the engine of the stochastic-gradient samplers does around their steps."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.schedules import Cyclical
from bayesdl.infer.stochastic import mean_square
from bayesdl.infer.stochastic_engine import StochasticEngine
from bayesdl.infer.stochastic_gradient import ESTIMATES, SAGA
from bayesdl.posterior.problem import Problem, prepare
from tests.cases import conjugate
from tests.infer.targets import Target, copied, normal, run

SAMPLERS = {
    "SGLD": bdl.SGLD,
    "PSGLD": bdl.PSGLD,
    "SGHMC": bdl.SGHMC,
    "SGNHT": bdl.SGNHT,
    "BAOAB": bdl.BAOAB,
}
QUICK = {"chains": 3, "warmup": 25, "draws": 10, "thin": 3}


def engine(target: Any, method: Any, begin: Tensor | None = None, seed: int = 0) -> StochasticEngine:
    problem = SimpleNamespace(density=target, n=target.n)
    start = target.prior_draws(method.chains, seed) if begin is None else begin
    return StochasticEngine(method, problem, seed, start)  # type: ignore[arg-type]  # a Target stands in for the density


@cache
def regression() -> Problem:
    return prepare(conjugate().program, conjugate().data, seed=0)


def driver(method: Any) -> StochasticEngine:
    problem = regression()
    return StochasticEngine(method, problem, 0, problem.density.prior_draws(method.chains, 0))


VARIANTS: dict[str, Any] = {
    **{name: kind(**QUICK, batch_size=7) for name, kind in SAMPLERS.items()},
    "SVRG": bdl.SGLD(**QUICK, batch_size=7, gradient="svrg"),
    "SAGA": bdl.SGHMC(**QUICK, batch_size=7, gradient="saga"),
    "Gamma": bdl.PSGLD(**QUICK, batch_size=7, correction="gamma", decay=0.5),
    "signs": bdl.BAOAB(**QUICK, noise="signs"),
    "independent": bdl.SGHMC(**QUICK, batch_size=7, replacement=True, noise_estimate=True),
    "cyclical": bdl.SGNHT(**QUICK, batch_size=7, step_size=Cyclical(0.1, 55, 2, exploration=0.5)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_bit_exact_and_a_step_that_is_cut_off_is_forgotten(name: str) -> None:
    found = driver(VARIANTS[name])
    whole = run(found)
    for pause in (1, 31):
        half = run(driver(VARIANTS[name]), pause)
        kept = copied(half)
        # the step is made, its result is lost, generators go back to where they were: all that the loop does
        run(found, 1, half)
        for key, value in kept.items():
            if isinstance(value, torch.Generator):
                half[key].set_state(value.get_state())
        for resumed in (half, kept):
            again = run(found, None, resumed)
            assert torch.equal(again["draws"], whole["draws"]), pause
            assert torch.equal(again["statistics"], whole["statistics"]), pause


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_leaves_the_old_state_alone(name: str) -> None:
    found = driver(VARIANTS[name])
    state = run(found, 30)
    # the record and SAGA's table are written in place, at entries that the old state does not count
    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    run(found, 1, state)
    for key, value in tensors.items():
        if key not in ("draws", "statistics", "saga.table"):
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize("gradient", ESTIMATES)
def test_estimates_are_unbiased(gradient: Any) -> None:
    # over an epoch of plain and SVRG batches that holds all rows, and over the blocks of SAGA, which are uneven
    problem, size = regression(), 7 if gradient == "saga" else 10
    order = DataOrder(problem, size, 2, 0)

    def on_rows(z: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = None if rows is None else problem.minibatch(rows)
        return problem.density.value_and_grad(z, batch, per_chain=batch is not None)

    estimate = ESTIMATES[gradient](order, on_rows)
    begin = problem.density.prior_draws(2, 0)
    state = {"z": begin, **order.init()}
    state |= estimate.init(state)
    full = estimate.on(None)
    if gradient == "saga":
        assert isinstance(estimate, SAGA)
        torch.testing.assert_close(state["saga.mean"], full(begin)[1])
        for _ in range(20):  # the table now holds gradients from several places
            state["z"] = begin + 0.1 * torch.randn(2, 3, dtype=torch.float64, generator=state["saga.blocks"])
            estimate.estimate(state)
        shares = torch.tensor([block.shape[1] for block in estimate._blocks(state["saga.rows"])]) / problem.n
        state["saga.table"][:, state["saga.last"]] = state["saga.fresh"]
        total = torch.zeros_like(begin)
        for k, block in enumerate(estimate._blocks(state["saga.rows"])):
            change = (estimate.on(block)(state["z"])[1] - state["saga.table"][:, k]) * shares[k]
            total += (state["saga.mean"] + len(shares) * change) / len(shares)
        torch.testing.assert_close(state["saga.mean"], (state["saga.table"] * shares[:, None]).sum(1))
        torch.testing.assert_close(total, full(state["z"])[1])
        assert {block.shape[1] for block in estimate._blocks(state["saga.rows"])} == {6, 7}
        return
    found = []
    for k in range(6):
        state["z"] = begin + 0.0 * k
        found.append(estimate.estimate(state)[1])
    torch.testing.assert_close(torch.stack(found).mean(0), full(begin)[1])
    if gradient == "svrg":
        # at the snapshot there is no noise at all
        torch.testing.assert_close(torch.stack(found).std(0), torch.zeros_like(begin), rtol=0, atol=1e-8)


def test_independent_batches_are_independent() -> None:
    order = DataOrder(regression(), 50, 2, 0, replacement=True)
    state = order.init()
    rows, _ = order.next(state)
    assert rows is not None
    assert rows.shape == (2, 50)
    assert all(len(row.unique()) < 50 for row in rows)
    assert not torch.equal(rows[0], rows[1])


# -- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGHMC", "SGNHT", "BAOAB"])
def test_the_default_step_is_half_the_shortest_period(name: str) -> None:
    scales = torch.tensor([0.05, 1.0, 3.0], dtype=torch.float64)
    target = normal(scales)
    method = SAMPLERS[name](chains=4, warmup=200, draws=20, thin=5)
    state = run(engine(target, method, target.prior_draws(4) * scales))
    assert state["step_size"] == pytest.approx(0.5 * 0.05, rel=0.02)
    assert state["rescues"] == 0


def test_the_default_friction_balances_the_heat() -> None:
    method = bdl.BAOAB(chains=4, warmup=200, draws=5, thin=1, batch_size=5)
    state = run(driver(method))
    size, heat = state["step_size"], state["heat"]
    turn: Any = SimpleNamespace(step_size=size, warmth=1.0)
    assert heat > 0
    assert method.friction_at(state, turn) == pytest.approx(max(1.0, size * heat / 2))
    early: Any = SimpleNamespace(step_size=size, warmth=0.2)
    assert method.friction_at(state, early) >= 0.3 / size
    assert bdl.BAOAB(friction=3.0).friction_at(state, early) == 3.0
    assert method.friction_at(state | {"heat": 1e9}, turn) == pytest.approx(1 / size)


def test_given_steps_with_a_default_friction_measure_the_heat_alone() -> None:
    method = bdl.SGHMC(**QUICK, batch_size=7, step_size=0.01)
    state = run(driver(method))
    assert state["heat"] > 0
    assert state["curvature"] == 0.0
    assert state["step_size"] == 0.01


def test_the_preconditioner_learns_in_warm_up_and_then_stays() -> None:
    scales = torch.tensor([0.05, 1.0], dtype=torch.float64)
    target = normal(scales)
    method = bdl.PSGLD(chains=8, warmup=400, draws=20, thin=5)
    found = engine(target, method, target.prior_draws(8) * scales)
    state = run(found, 400)
    frozen = state["square"]
    # at stationarity the mean square of the gradient is the curvature
    assert frozen.mean(0).tolist() == pytest.approx([400.0, 1.0], rel=0.5)
    assert torch.equal(run(found, 50, state)["square"], frozen)
    learning = engine(target, bdl.PSGLD(chains=8, warmup=400, draws=20, thin=5, correction="none"))
    state = run(learning, 401)
    assert not torch.equal(run(learning, 1, state)["square"], state["square"])


@pytest.mark.parametrize("name", ["SGHMC", "BAOAB", "SGNHT"])
def test_warm_up_comes_back_from_an_explosion(name: str) -> None:
    # exp(-z^4 / 4) is flat near 0, where the chains start, and ever steeper outside: E z^2 = 2 G(3/4) / G(1/4) = 0.676
    quartic = Target(lambda z: (-z.pow(4).sum(1) / 4, -z.pow(3)), 1)
    begin = torch.full((64, 1), 0.05, dtype=torch.float64)
    state = run(engine(quartic, SAMPLERS[name](chains=64, warmup=600, draws=100, thin=10), begin))
    assert state["rescues"] > 0
    exact = 2 * math.gamma(0.75) / math.gamma(0.25)
    assert float(state["draws"].square().mean()) == pytest.approx(exact, rel=0.25)


def test_kinetic_and_thermostat_are_recorded() -> None:
    target = normal(torch.ones(50, dtype=torch.float64))
    method = bdl.SGNHT(chains=16, warmup=200, draws=50, thin=5, step_size=0.3, friction=1.0)
    found = engine(target, method)
    state = run(found)
    assert found.names == ("log_density", "step_size", "kinetic", "thermostat")
    kinetic, thermostat = state["statistics"][2:].mean((1, 2)).tolist()
    assert kinetic == pytest.approx(1.0, abs=0.03)
    assert thermostat == pytest.approx(1.0, abs=0.1)
    assert mean_square(torch.tensor([[3.0, 4.0]])).tolist() == [12.5]


# -- cycles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_exploring_is_noiseless_and_takes_no_draws(name: str) -> None:
    schedule = Cyclical(0.2, 120, 3, exploration=0.5)
    more = {} if name in ("SGLD", "PSGLD") else {"friction": 1.0}
    method = SAMPLERS[name](chains=4, warmup=0, draws=30, thin=4, step_size=schedule, **more)
    found = engine(normal(torch.ones(2, dtype=torch.float64)), method)
    filled = torch.tensor([found.drawn(step) for step in range(found.total + 1)]).diff()
    exploring = torch.tensor([not schedule.samples(step) for step in range(found.total)])
    assert exploring.sum() == 60
    assert (filled[exploring] == 0).all()
    assert filled.sum() == 30
    state = run(found, 10)
    before = state["noise"].get_state()
    run(found, 5, state)
    assert torch.equal(state["noise"].get_state(), before)
    state = run(found, 25)
    before = state["noise"].get_state()
    run(found, 1, state)
    assert not torch.equal(state["noise"].get_state(), before)


def test_cycles_find_both_modes() -> None:
    # two Gaussians 12 standard deviations apart: one chain with small steps stays where it is
    def mixture(z: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.stack([-0.5 * (z[:, 0] - 6.0).square(), -0.5 * (z[:, 0] + 6.0).square()])
        weights = logits.softmax(0)
        return logits.logsumexp(0), (weights[0] * (6.0 - z[:, 0]) - weights[1] * (6.0 + z[:, 0]))[:, None]

    target = Target(mixture, 1)
    begin = torch.full((64, 1), 6.0, dtype=torch.float64)
    settings = {"chains": 64, "warmup": 0, "draws": 40, "thin": 25}
    small = run(engine(target, bdl.BAOAB(**settings, step_size=0.3, friction=1.0), begin))["draws"]
    assert (small > 0).all()
    state = run(engine(target, bdl.SGLD(**settings, step_size=Cyclical(3.9, 1000, 4)), begin))
    assert 0.05 < float((state["draws"] < 0).double().mean()) < 0.95


def test_a_schedule_that_never_samples_is_refused() -> None:
    schedule = Cyclical(0.1, 1000, 1, exploration=0.9)
    with pytest.raises(MethodError, match="takes draws"):
        engine(normal(torch.ones(1)), bdl.SGLD(chains=1, warmup=0, draws=2, thin=10, step_size=schedule))
    with pytest.raises(MethodError, match="exploration"):
        Cyclical(0.1, 10, 1, exploration=1.0)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bdl.SGLD(gradient="svrg"), "batch_size"),
        (lambda: bdl.SGLD(gradient="sag"), "plain"),
        (lambda: bdl.BAOAB(gradient="saga", batch_size=5, replacement=True), "fixed"),
        (lambda: bdl.SGLD(noise="pool"), "signs"),
        (lambda: bdl.SGHMC(noise_estimate=True, batch_size=5), "without replacement"),
        (lambda: bdl.SGHMC(friction=0.0), "friction"),
        (lambda: bdl.PSGLD(correction="some"), "gamma"),
        (lambda: bdl.PSGLD(decay=1.0), "decay"),
        (lambda: bdl.PSGLD(damping=-1.0), "damping"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        make()


def test_forecasts_count_gradients_and_memory() -> None:
    problem = regression()
    plain = bdl.SGLD(**QUICK, batch_size=7).work(problem)
    assert (plain.chains, plain.calls, plain.draws) == (3, 55, 30)
    assert bdl.SGLD(**QUICK, batch_size=7, gradient="svrg").work(problem).calls == 3 * 55
    table = bdl.SGLD(**QUICK, batch_size=7, gradient="saga").work(problem)
    assert table.draws == 30 + 3 * 9
    assert "27 gradients" in table.note


def test_noise_depends_on_the_seed_alone() -> None:
    first, again, other = (run(engine(normal(torch.ones(2)), bdl.BAOAB(**QUICK), seed=s))["draws"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert generator(0, "a").initial_seed() != generator(0, "b").initial_seed()
