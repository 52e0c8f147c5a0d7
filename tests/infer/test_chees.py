"""ChEES: its criterion, the length that it finds, known moments, resume, extension, and few chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.infer import chees
from bayesdl.infer.chees import ChEES, slope, van_der_corput
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.nuts import NUTS
from bayesdl.posterior.convergence import ess_bulk
from tests.cases import conjugate
from tests.infer.targets import Target, banana, copied, correlated, funnel, moments, normal, run, standard_errors

DOUBLE = torch.float64
SHORT = ChEES(chains=64, warmup=200, draws=150)
SETTINGS = {"correlated": SHORT, "funnel": SHORT, "banana": replace(SHORT, target_accept=0.95)}
BEST = 2.2467
"""Where E[sin^2(U T)], with U from U(0, 1), is largest: tan 2T = 2T."""


def engine(target: Any, method: ChEES, seed: int = 0, **options: Any) -> MarkovEngine:
    begin = target.prior_draws(method.chains, seed)
    return MarkovEngine(sampler=method, density=target, begin=begin, seed=seed, **options)


def test_the_sequence_is_that_of_van_der_corput() -> None:
    assert [van_der_corput(k) for k in range(1, 8)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]
    first = sorted(van_der_corput(k) for k in range(1, 256))
    assert first == [k / 256 for k in range(1, 256)]


def test_the_slope_is_the_derivative_of_the_criterion() -> None:
    stream = generator(0, "slope")
    start, momentum = (torch.randn(2, 5, 3, dtype=DOUBLE, generator=stream) for _ in range(2))
    accepted = torch.rand(2, 5, dtype=DOUBLE, generator=stream)
    centre = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.5, 0.0]], dtype=DOUBLE)

    def flow(time: float) -> tuple[torch.Tensor, torch.Tensor]:
        # Hamiltonian flow of a standard normal: a rotation
        cos, sin = math.cos(time), math.sin(time)
        return start * cos + momentum * sin, momentum * cos - start * sin

    def criterion(time: float) -> torch.Tensor:
        change = (flow(time)[0] - centre[:, None]).square().sum(2) - (start - centre[:, None]).square().sum(2)
        return (accepted * change.square()).sum(1) / accepted.sum(1) / 4.0

    time, small = 0.7, 1e-6
    exact = (criterion(time * (1 + small)) - criterion(time * (1 - small))) / (2 * small)
    found, magnitude = slope(start, *flow(time), torch.full((2, 5), time, dtype=DOUBLE), accepted, centre)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    assert (magnitude >= found.abs()).all()


def test_a_diverged_chain_has_no_say() -> None:
    stream = generator(1, "slope")
    parts = [torch.randn(1, 4, 3, dtype=DOUBLE, generator=stream) for _ in range(3)]
    time, accepted, centre = torch.ones(1, 4, dtype=DOUBLE), torch.ones(1, 4, dtype=DOUBLE), torch.zeros(1, 3).double()
    accepted[:, 3] = 0.0
    without = slope(*(part[:, :3] for part in parts), time[:, :3], accepted[:, :3], centre)
    parts[1][:, 3] = torch.nan
    torch.testing.assert_close(slope(*parts, time, accepted, centre), without)
    assert [part.tolist() for part in slope(*parts, time, 0.0 * accepted, centre)] == [[0.0], [0.0]]


@pytest.mark.parametrize(("chains", "tolerance"), [(64, 0.15), (4, 0.35)])
def test_the_length_is_the_best_one_whatever_the_scales(chains: int, tolerance: float) -> None:
    # Both ways from the start: the first length is one step, far too short.
    method = ChEES(chains=chains, warmup=500, draws=1, target_accept=0.95)
    for scales in (torch.ones(20, dtype=DOUBLE), torch.logspace(-2, 2, 20, dtype=DOUBLE)):
        state = run(engine(normal(scales), method))
        assert float(state["length"]) == pytest.approx(BEST, rel=tolerance)


def test_climbing_the_wrong_way_finds_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def downhill(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, magnitude = slope(*arguments)
        return -found, magnitude

    monkeypatch.setattr(chees, "slope", downhill)
    state = run(engine(normal(torch.ones(20, dtype=DOUBLE)), ChEES(chains=64, warmup=500, draws=1, target_accept=0.95)))
    assert not 0.7 * BEST < float(state["length"]) < 1.4 * BEST


def test_every_group_learns_its_own_length() -> None:
    # Two groups of one target, the second of which is held back by a step size of its own.
    target = normal(torch.ones(10, dtype=DOUBLE))
    state = run(engine(target, ChEES(chains=32, warmup=300, draws=1), groups=2))
    lengths = state["length"]
    assert lengths.shape == (2,)
    assert lengths[0] != lengths[1]
    torch.testing.assert_close(lengths, torch.full((2,), BEST, dtype=DOUBLE), rtol=0.3, atol=0.0)


@pytest.mark.parametrize(("name", "make"), [("correlated", correlated), ("funnel", funnel), ("banana", banana)])
def test_known_moments(name: str, make: Callable[[], Target]) -> None:
    errors = moments(name, run(engine(make(), SETTINGS[name]))["draws"])
    assert max(map(abs, errors.values())) < 4.0, errors


@pytest.mark.parametrize("name", ["correlated", "funnel", "banana"])
def test_the_moments_notice_a_wrong_density(name: str) -> None:
    right = {"correlated": correlated, "funnel": funnel, "banana": banana}[name]()
    wrong = Target(lambda z: tuple(part / 1.4 for part in right.function(z)), right.dim, right.spread)
    errors = moments(name, run(engine(wrong, SETTINGS[name]))["draws"])
    assert max(map(abs, errors.values())) > 6.0, errors


def test_two_chains_are_enough_and_one_is_not() -> None:
    draws = run(engine(correlated(), ChEES(chains=2, warmup=400, draws=600)))["draws"]
    errors = moments("correlated", draws)
    assert max(map(abs, errors.values())) < 4.0, errors
    with pytest.raises(MethodError, match="at least 2"):
        ChEES(chains=1)


def autoregressive(dim: int) -> Target:
    """N(0, 0.9^|i-j|): scales that no diagonal metric can even out."""
    index = torch.arange(dim, dtype=DOUBLE)
    precision = torch.linalg.inv(0.9 ** (index[:, None] - index).abs())

    def function(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slope = z @ precision
        return -0.5 * (z * slope).sum(-1), -slope

    return Target(function, dim)


@pytest.mark.slow
def test_a_gradient_is_worth_more_than_in_nuts() -> None:
    worth = {}
    for method in (ChEES(chains=64, warmup=300, draws=60), NUTS(chains=8, warmup=300, draws=200)):
        driver = engine(autoregressive(50), method)  # type: ignore[arg-type]  # any sampler will do
        state = run(driver)
        draws = state["draws"]
        effective = min(float(ess_bulk(values).min()) for values in (draws, draws.square()))
        leapfrogs = state["statistics"][driver.names.index("leapfrogs")]
        worth[method.name] = effective / float(leapfrogs.sum())
    assert worth["ChEES"] > 1.2 * worth["NUTS"], worth


def test_the_chains_move_in_lockstep_by_the_sequence() -> None:
    driver = engine(correlated(), replace(SHORT, chains=8, draws=20))
    state = run(driver)
    leapfrogs = state["statistics"][driver.names.index("leapfrogs")]
    assert (leapfrogs == leapfrogs[0]).all()
    steps = float(state["length"] / state["step_size"])
    expected = [math.ceil(van_der_corput(k) * steps) for k in range(201, 221)]
    assert leapfrogs[0].tolist() == expected


def test_a_given_step_size_is_kept_and_the_length_still_learnt() -> None:
    state = run(engine(normal(torch.ones(10, dtype=DOUBLE)), ChEES(chains=32, warmup=300, draws=5, step_size=0.3)))
    assert state["step_size"].tolist() == [0.3]
    assert torch.equal(state["metric.scale"], torch.ones(1, 10, dtype=DOUBLE))
    assert float(state["length"]) == pytest.approx(BEST, rel=0.25)


@pytest.mark.parametrize("metric", ["diag", "dense", "low_rank"])
def test_resume_from_any_step_is_bit_exact(metric: Any) -> None:
    method = ChEES(chains=3, warmup=40, draws=20, metric=metric)
    whole = run(engine(funnel(), method))
    for pause in (1, 22, 40, 49):
        other = run(engine(funnel(), method), None, copied(run(engine(funnel(), method), pause)))
        for name in ("draws", "statistics", "z", "length", "chees.log_length", "chees.size", "chees.centre"):
            assert torch.equal(other[name], whole[name]), (pause, name)


def test_a_fit_tells_its_length_and_is_extended_where_the_sequence_stood() -> None:
    method = ChEES(chains=4, warmup=40, draws=10)
    whole: Any = replace(method, draws=16).fit(conjugate().program, conjugate().data, progress=False)
    part: Any = method.fit(conjugate().program, conjugate().data, progress=False)
    assert part.info["length"] > 0.0
    extended: Any = bdl.extend(part, 6, progress=False)
    assert torch.equal(extended.z, whole.z)
    assert torch.equal(extended.stats["leapfrogs"], whole.stats["leapfrogs"])
    assert abs(standard_errors(whole.z[..., 0], float(conjugate().mean()[0]))) < 5.0
