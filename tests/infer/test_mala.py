"""MALA: HMC with one leapfrog step, known moments, acceptance; without the asymmetric terms it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bayesdl._rng import generator
from bayesdl.infer import mala
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hmc import hmc_transition
from bayesdl.infer.kernel import evaluate
from bayesdl.infer.mala import MALA, log_proposal, mala_transition
from tests.infer.targets import Target, banana, copied, correlated, funnel, moments, normal, run, standard_errors

# Langevin steps are as good as the curvature is even: the narrow ends of funnel and banana ask for small ones.
SETTINGS = {
    "correlated": MALA(chains=64, warmup=300, draws=400, metric="dense"),
    "funnel": MALA(chains=64, warmup=300, draws=600, target_accept=0.8),
    "banana": MALA(chains=64, warmup=200, draws=400, thin=5, step_size=0.2),
}


def engine(target: Any, method: MALA, seed: int = 0) -> MarkovEngine:
    return MarkovEngine(sampler=method, density=target, begin=target.prior_draws(method.chains, seed), seed=seed)


@pytest.mark.parametrize("make", [correlated, funnel, banana])
def test_it_is_hmc_with_one_leapfrog_step(make: Callable[[], Target]) -> None:
    target, chains = make(), 32
    start = evaluate(target.prior_draws(chains), target.value_and_grad)
    noise = torch.randn(chains, target.dim, dtype=torch.float64, generator=generator(1, "noise"))
    step, uniform = np.linspace(0.1, 0.6, chains), np.linspace(0.0, 0.99, chains)
    point, statistics = mala_transition(start, noise, step, uniform, target.value_and_grad)
    other, expected = hmc_transition(start, noise, step, np.ones(chains), uniform, target.value_and_grad)
    torch.testing.assert_close(point.z, other.z, rtol=1e-10, atol=1e-10)
    for name in ("acceptance", "divergent", "log_density"):
        np.testing.assert_allclose(statistics[name], expected[name], rtol=1e-8, atol=1e-10)
    assert 0.0 < float((point.z == start.z).all(1).double().mean()) < 1.0


def test_the_proposal_density_is_that_of_the_langevin_step() -> None:
    target = banana()
    start = evaluate(target.prior_draws(5), target.value_and_grad)
    end, step = target.prior_draws(5, 1), torch.full((5, 1), 0.3, dtype=torch.float64)
    law = torch.distributions.Normal(start.z + 0.5 * 0.3**2 * start.grad, 0.3)
    exact, found = law.log_prob(end).sum(1), log_proposal(end, start, step)
    torch.testing.assert_close(found - found[0], exact - exact[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "make"), [("correlated", correlated), ("funnel", funnel), ("banana", banana)])
def test_known_moments(name: str, make: Callable[[], Target]) -> None:
    errors = moments(name, run(engine(make(), SETTINGS[name]))["draws"])
    assert max(map(abs, errors.values())) < 4.0, errors


def test_the_asymmetric_terms_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    method = MALA(chains=64, warmup=50, draws=300, step_size=1.0)
    target = normal(torch.ones(2, dtype=torch.float64))
    right = run(engine(target, method))["draws"]
    assert abs(standard_errors(right[..., 0].square(), 1.0)) < 4.0
    monkeypatch.setattr(mala, "log_proposal", lambda end, start, step: torch.zeros(len(end), dtype=torch.float64))
    wrong = run(engine(target, method))["draws"]
    assert abs(standard_errors(wrong[..., 0].square(), 1.0)) > 8.0


def test_the_acceptance_is_the_one_asked_for() -> None:
    scales = torch.logspace(-2, 2, 20, dtype=torch.float64)
    state = run(engine(normal(scales), MALA(chains=64, warmup=300, draws=100)))
    assert float(state["statistics"][0].mean()) == pytest.approx(0.574, abs=0.15)


def test_an_end_that_is_not_finite_is_rejected_as_a_divergence() -> None:
    target = Target(lambda z: (torch.where(z[:, 0] < 1.0, -z[:, 0], torch.nan), -torch.ones_like(z)), 1)
    start = evaluate(torch.zeros(2, 1, dtype=torch.float64), target.value_and_grad)
    noise = torch.tensor([[5.0], [-1.0]], dtype=torch.float64)
    point, statistics = mala_transition(start, noise, np.full(2, 0.5), np.zeros(2), target.value_and_grad)
    assert statistics["divergent"].tolist() == [1.0, 0.0]
    assert point.z[0].item() == 0.0
    assert point.z[1].item() != 0.0


def test_resume_from_any_step_is_bit_exact() -> None:
    method = MALA(chains=3, warmup=40, draws=20, metric="low_rank")
    whole = run(engine(funnel(), method))
    for pause in (1, 22, 40, 49):
        other = run(engine(funnel(), method), None, copied(run(engine(funnel(), method), pause)))
        for name in ("draws", "statistics", "z", "metric.scale"):
            assert torch.equal(other[name], whole[name]), (pause, name)
