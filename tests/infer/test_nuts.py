"""NUTS: against a naive recursion on the same noise, on densities with known moments, and through ``fit``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.data import Dataset
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.checkpoint import Checkpoint
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hmc import HMC
from bayesdl.infer.kernel import Point, evaluate
from bayesdl.infer.nuts import NUTS
from bayesdl.infer.nuts_tree import nuts_transition
from bayesdl.infer.sgld import SGLD
from bayesdl.models import mlp
from bayesdl.posterior.convergence import rhat
from tests.infer.line import line, line_errors, rows
from tests.infer.targets import Target, banana, copied, correlated, funnel, moments, normal, run
from tests.oracles.nuts_recursive import Recursive

TARGETS = {"correlated": correlated, "funnel": funnel, "banana": banana}
SHORT_SGLD = SGLD(chains=2, warmup=25, draws=10, thin=2, batch_size=5)
SHORT = NUTS(chains=64, warmup=150, draws=150)
# The arms of the banana are six times stiffer than its middle: at an acceptance of 0.8 chains stick there.
SETTINGS = {"correlated": SHORT, "funnel": SHORT, "banana": replace(SHORT, target_accept=0.95, draws=300)}


def engine(target: Any, method: NUTS, seed: int = 0, begin: Tensor | None = None, **kwargs: Any) -> MarkovEngine:
    start = target.prior_draws(method.chains, seed) if begin is None else begin
    return MarkovEngine(sampler=method, density=target, begin=start, seed=seed, **kwargs)


class Watched:
    """Records every point at which the density is evaluated."""

    def __init__(self, target: Target) -> None:
        self.target, self.seen = target, []

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(z.clone())
        return self.target.value_and_grad(z)


@pytest.mark.parametrize(
    ("name", "step_size"), [("correlated", 0.05), ("funnel", 0.3), ("banana", 0.12), ("funnel", 1.2)]
)
def test_the_iterative_tree_is_the_recursive_one(name: str, step_size: float) -> None:
    target = TARGETS[name]()
    chains = 16
    stream = generator(0, name)
    noise = [torch.rand(2 + 2**depth, chains, dtype=torch.float64, generator=stream).numpy() for depth in range(8)]
    step = step_size * np.linspace(0.5, 1.5, chains)
    z = target.prior_draws(chains)
    momentum = torch.randn(chains, target.dim, dtype=torch.float64, generator=stream)
    watched = Watched(target)
    start = evaluate(z, target.value_and_grad)
    point, statistics = nuts_transition(start, momentum, step, noise.__getitem__, watched, 8)

    def gradient(row: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        value, grad = target.function(torch.from_numpy(row)[None])
        return float(value), grad[0].numpy()

    depths = set()
    for k in range(chains):
        oracle = Recursive(gradient, step[k], np.ones(target.dim), max_depth=8)

        def uniforms(depth: int, k: int = k) -> np.ndarray[Any, Any]:
            return noise[depth][:, k]

        expected = oracle.transition(z[k].numpy(), momentum[k].numpy(), uniforms)
        # A chain that has stopped waits at its start, so what it visited is the beginning of what was evaluated.
        count = int(statistics["leapfrogs"][k])
        assert count == len(expected.visited)
        visited = _moving(torch.stack([rows[k] for rows in watched.seen]), z[k])[:count]
        torch.testing.assert_close(visited, torch.tensor(np.array(expected.visited)), rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(point.z[k], torch.from_numpy(expected.z), rtol=1e-7, atol=1e-8)
        assert statistics["depth"][k] == expected.depth
        assert bool(statistics["divergent"][k]) == expected.divergent
        assert statistics["energy"][k] == pytest.approx(expected.energy, rel=1e-7)
        assert statistics["acceptance"][k] == pytest.approx(expected.acceptance, rel=1e-7)
        depths.add(expected.depth)
    assert len(depths) > 1
    again = evaluate(point.z, target.value_and_grad)
    torch.testing.assert_close(point.value, again.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(point.grad, again.grad, rtol=1e-12, atol=1e-12)


def _moving(visited: Tensor, start: Tensor) -> Tensor:
    return visited[(visited != start).any(1)]


def test_a_batch_moves_as_its_chains_do_alone() -> None:
    target = funnel()
    stream = generator(3, "noise")
    noise = [torch.rand(2 + 2**depth, 6, dtype=torch.float64, generator=stream).numpy() for depth in range(6)]
    momentum = torch.randn(6, 3, dtype=torch.float64, generator=stream)
    start = evaluate(target.prior_draws(6), target.value_and_grad)
    step = np.full(6, 0.2)
    together, _ = nuts_transition(start, momentum, step, noise.__getitem__, target.value_and_grad, 6)
    for k in range(6):
        own = Point(start.z[k : k + 1], start.value[k : k + 1], start.grad[k : k + 1])
        uniforms = [rows[:, k : k + 1] for rows in noise]
        alone, _ = nuts_transition(own, momentum[k : k + 1], step[:1], uniforms.__getitem__, target.value_and_grad, 6)
        torch.testing.assert_close(alone.z[0], together.z[k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(TARGETS))
def test_known_moments(name: str) -> None:
    errors = moments(name, run(engine(TARGETS[name](), SETTINGS[name]))["draws"])
    assert max(map(abs, errors.values())) < 4.0, errors


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_moments_notice_a_wrong_density(name: str) -> None:
    right = TARGETS[name]()
    # value and gradient divided alike: a sampler of another temperature
    wrong = Target(lambda z: tuple(part / 1.4 for part in right.function(z)), right.dim, right.spread)
    errors = moments(name, run(engine(wrong, SETTINGS[name]))["draws"])
    assert max(map(abs, errors.values())) > 6.0, errors


def test_resume_from_any_step_is_bit_exact() -> None:
    method = NUTS(chains=3, warmup=40, draws=20, max_depth=6)
    whole = run(engine(funnel(), method))
    for pause in (1, 23, 38, 47):
        half = run(engine(funnel(), method), pause)
        other = run(engine(funnel(), method), None, copied(half))
        for name in ("draws", "statistics", "z", "metric.scale", "averaging"):
            assert torch.equal(other[name], whole[name]), (pause, name)


def test_a_step_leaves_the_state_that_it_starts_from_alone() -> None:
    driver = engine(funnel(), NUTS(chains=3, warmup=30, draws=5, max_depth=5))
    state = run(driver, 26)
    before = copied(state)
    driver.step(state)
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), state[name].nan_to_num()), name


def test_a_divergence_is_seen_and_survived() -> None:
    target = normal(torch.full((2,), 1e-3, dtype=torch.float64))
    start = evaluate(torch.full((3, 2), 1e-3, dtype=torch.float64), target.value_and_grad)
    noise = np.full((2 + 2**10, 3), 0.4)
    point, statistics = nuts_transition(
        start,
        torch.ones(3, 2, dtype=torch.float64),
        np.ones(3),
        lambda depth: noise[: 2 + 2**depth],
        target.value_and_grad,
    )
    assert statistics["divergent"].tolist() == [1.0, 1.0, 1.0]
    assert statistics["leapfrogs"].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(point.z, start.z)


def test_a_density_that_ends_in_nan_stops_one_chain_and_not_the_others() -> None:
    def walled(z: Tensor) -> tuple[Tensor, Tensor]:
        inside = z[:, :1] > 0.0
        value = torch.where(inside, -z, torch.nan).sum(1)
        return value, torch.where(inside, -torch.ones_like(z), torch.nan)

    target = Target(walled, 1)
    method = NUTS(chains=16, warmup=200, draws=300)
    begin = target.prior_draws(16).abs()
    state = run(engine(target, method, begin=begin))
    draws = state["draws"]
    assert torch.isfinite(draws).all()
    assert (draws > 0).all()
    assert float(state["statistics"][2].sum()) > 0
    assert float(draws.mean()) == pytest.approx(1.0, abs=0.15)


def test_a_start_without_density_is_replaced_or_refused() -> None:
    def half_line(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(z[:, 0] > 0.0, -z[:, 0], -torch.inf), -torch.ones_like(z)

    target = Target(half_line, 1)
    begin = torch.tensor([[1.0], [-1.0], [2.0]], dtype=torch.float64)
    method = NUTS(chains=3, warmup=5, draws=5)
    state = run(engine(target, method, begin=begin), 0)
    assert torch.isfinite(state["value"]).all()
    assert state["z"][0].item() == 1.0
    with pytest.raises(Divergence, match=r"start of chains \[1\]"):
        engine(target, method, begin=begin, restart=False).init()
    nowhere = Target(lambda z: (z[:, 0] * torch.nan, z), 1)
    with pytest.raises(Divergence, match="other prior draws"):
        engine(nowhere, method, begin=begin).init()


@pytest.mark.parametrize("method", [NUTS(chains=16, warmup=100, draws=100), HMC(chains=16, warmup=100, draws=100)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_conjugate_regression_is_exact(method: NUTS | HMC, temperature: float) -> None:
    posterior = replace(method, temperature=temperature).fit(line, rows(), seed=2, progress=False)
    errors = line_errors(posterior.z, temperature)  # type: ignore[attr-defined]  # fit is annotated with the base class
    assert max(map(abs, errors)) < 4.0, errors
    assert posterior.info["divergences"] == 0
    leapfrogs = posterior.stats["leapfrogs"]  # type: ignore[attr-defined]  # as above
    assert posterior.info["gradients"] > 16 * float(leapfrogs.max(0).values.sum())


def test_a_fit_is_a_function_of_its_seed() -> None:
    method = NUTS(chains=2, warmup=20, draws=10)
    first, again, other = (method.fit(line, rows(), seed=seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(first.z, again.z)  # type: ignore[attr-defined]  # fit is annotated with the base class
    assert not torch.equal(first.z, other.z)  # type: ignore[attr-defined]  # as above


def test_a_fit_that_is_stopped_returns_its_draws_or_says_that_there_are_none() -> None:
    method = NUTS(chains=2, warmup=10, draws=10)
    posterior = method.fit(line, rows(), progress=False, callback=lambda state: state["step"] == 14)
    assert posterior.z.shape == (2, 4, 2)  # type: ignore[attr-defined]  # fit is annotated with the base class
    assert {name: tuple(value.shape) for name, value in posterior.stats.items()} == dict.fromkeys(
        (*NUTS.statistics, "step_size"), (2, 4)
    )  # type: ignore[attr-defined]  # as above
    with pytest.raises(MethodError, match="first draw"):
        method.fit(line, rows(), progress=False, callback=lambda state: state["step"] == 3)


@pytest.mark.parametrize(
    "method", [NUTS(chains=2, warmup=25, draws=10), HMC(chains=2, warmup=25, draws=10), SHORT_SGLD]
)
@pytest.mark.parametrize("pause", [7, 25, 31])
def test_a_fit_resumes_from_its_file_bit_for_bit(method: Any, pause: int, tmp_path: Path) -> None:
    whole = method.fit(line, rows(), progress=False)
    file = Checkpoint(tmp_path / "run", every=3)
    with suppress(MethodError):  # there is no posterior yet when it stops in warm-up
        method.fit(line, rows(), progress=False, checkpoint=file, callback=lambda state: state["step"] == pause)
    resumed = method.fit(line, rows(), progress=False, checkpoint=file)
    assert torch.equal(resumed.z, whole.z)
    assert all(torch.equal(resumed.stats[name], whole.stats[name]) for name in whole.stats)
    # a checkpointed run may probe the density once a process
    assert 0 <= resumed.info["gradients"] - whole.info["gradients"] <= 2
    assert 0 < resumed.info["gradients_here"] < whole.info["gradients"]


@pytest.mark.slow
def test_a_small_network_mixes_in_function_space_from_prior_draws() -> None:
    x = torch.linspace(-2.0, 2.0, 60, dtype=torch.float64)[:, None]
    y = torch.sin(2.0 * x[:, 0]) + 0.5 * torch.randn(60, dtype=torch.float64, generator=generator(0, "sine"))
    data = Dataset.from_arrays(x, y)
    posterior = NUTS(chains=4, warmup=150, draws=100).fit(mlp(data, hidden=(5,)), data, seed=0, progress=False)
    assert float(rhat(posterior.function_draws(x)).max()) < 1.05  # type: ignore[attr-defined]  # as above


@pytest.mark.parametrize("method", [NUTS(chains=1, warmup=30, draws=5), HMC(chains=1, warmup=30, draws=5), SHORT_SGLD])
def test_float32_and_a_single_chain(method: Any) -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[0] + x[:, 0] * w[1], 0.5), obs=y)

    x, y = rows()
    posterior = replace(method, chains=1).fit(program, {"x": x.float(), "y": y.float()}, progress=False)
    assert posterior.z.dtype == torch.float32
    assert posterior.z.shape[0] == 1
    assert torch.isfinite(posterior.z).all()
