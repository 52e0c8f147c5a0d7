"""Random-walk Metropolis: detailed balance, known moments, acceptance, resume; rejections have to count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bayesdl._rng import generator
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hamiltonian import acceptance
from bayesdl.infer.kernel import evaluate
from bayesdl.infer.random_walk import RandomWalk, random_walk_transition
from bayesdl.posterior.convergence import mcse_mean
from tests.infer.targets import Target, banana, copied, correlated, funnel, moments, normal, run, standard_errors

SHORT = RandomWalk(chains=64, warmup=300, draws=1000)


def engine(target: Any, method: RandomWalk, seed: int = 0) -> MarkovEngine:
    return MarkovEngine(sampler=method, density=target, begin=target.prior_draws(method.chains, seed), seed=seed)


def kernel_of(pi: Any, proposal: Any, inverted: bool = False) -> Any:
    """Transition matrix of a Metropolis chain on the states of ``pi`` with the proposal matrix ``proposal``."""
    flow = np.log(pi)[:, None] + np.log(proposal)
    ratio = flow - flow.T if inverted else flow.T - flow
    moves = proposal * acceptance(ratio)
    np.fill_diagonal(moves, 0.0)
    return moves + np.diag(1.0 - moves.sum(1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_detailed_balance_holds_on_a_discrete_chain(symmetric: bool) -> None:
    pi = np.array([0.05, 0.1, 0.2, 0.4, 0.15, 0.1])
    proposal = np.full((6, 6), 1 / 6)
    if not symmetric:
        proposal = np.random.default_rng(0).dirichlet(np.ones(6), 6)
    flow = pi[:, None] * kernel_of(pi, proposal)
    assert np.abs(flow - flow.T).max() < 1e-15
    assert np.abs(flow.sum(0) - pi).max() < 1e-15
    # with the ratio upside down, as it is sometimes printed, the chain has another law
    assert np.abs(pi @ kernel_of(pi, proposal, inverted=True) - pi).max() > 0.05


@pytest.mark.parametrize(("name", "make"), [("correlated", correlated), ("funnel", funnel), ("banana", banana)])
def test_known_moments(name: str, make: Callable[[], Target]) -> None:
    errors = moments(name, run(engine(make(), SHORT))["draws"])
    assert max(map(abs, errors.values())) < 4.0, errors


def test_a_rejected_state_has_to_count_again() -> None:
    target = normal(torch.ones(2, dtype=torch.float64))
    draws = run(engine(target, RandomWalk(chains=64, warmup=50, draws=1000, step_size=2.0)))["draws"]
    squares = draws[:, 1:].square().sum(-1)
    assert abs(standard_errors(squares, 2.0)) < 4.0
    # the states in between, each counted once: the tails, which are left more easily, weigh too much
    once = squares[(draws[:, 1:] != draws[:, :-1]).any(-1)]
    assert float((once.mean() - 2.0) / mcse_mean(squares)) > 10.0


def test_a_rejected_chain_stays_where_it_is() -> None:
    target = correlated()
    start = evaluate(target.prior_draws(6), target.value_and_grad)
    noise = torch.randn(6, 3, dtype=torch.float64, generator=generator(1, "noise"))
    uniform = np.linspace(0.0, 0.999, 6)
    point, statistics = random_walk_transition(start, noise, np.full(6, 0.5), uniform, target.value_and_grad)
    accepted = torch.from_numpy(uniform < statistics["acceptance"])
    assert accepted.any()
    assert not accepted.all()
    assert torch.equal(point.z[~accepted], start.z[~accepted])
    assert torch.equal(point.z[accepted], (start.z + 0.5 * noise)[accepted])
    again = evaluate(point.z, target.value_and_grad)
    torch.testing.assert_close(point.value, again.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dim", "target"), [(8, 0.234), (1, 0.44)])
def test_the_acceptance_is_the_one_asked_for(dim: int, target: float) -> None:
    scales = torch.logspace(-2, 2, dim, dtype=torch.float64)
    state = run(engine(normal(scales), RandomWalk(chains=64, warmup=400, draws=100, target_accept=target)))
    assert float(state["statistics"][0].mean()) == pytest.approx(target, abs=0.03)
    # the proposals have the shape of the target: in whitened coordinates the best step is 2.38 / sqrt(D)
    assert float(state["step_size"][0]) == pytest.approx(2.4 / dim**0.5, rel=0.35)


def test_a_density_that_is_not_finite_is_never_entered() -> None:
    target = Target(lambda z: (torch.where(z[:, 0] < 0.0, torch.nan, -z[:, 0]), -torch.ones_like(z)), 1)
    begin = target.prior_draws(32).abs()
    method = RandomWalk(chains=32, warmup=300, draws=1000, target_accept=0.44)
    draws = run(MarkovEngine(sampler=method, density=target, begin=begin, seed=0))["draws"]
    assert (draws > 0.0).all()
    assert float(draws.mean()) == pytest.approx(1.0, abs=0.1)


def test_resume_from_any_step_is_bit_exact() -> None:
    method = RandomWalk(chains=3, warmup=40, draws=20, metric="dense")
    whole = run(engine(funnel(), method))
    for pause in (1, 22, 40, 49):
        other = run(engine(funnel(), method), None, copied(run(engine(funnel(), method), pause)))
        for name in ("draws", "statistics", "z", "metric.factor"):
            assert torch.equal(other[name], whole[name]), (pause, name)
