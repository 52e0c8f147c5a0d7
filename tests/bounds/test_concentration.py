"""What the formulas' table does not hold: events, McDiarmid, betting, rate functions, worked numbers."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl.bounds.concentration import (
    bernoulli_rate,
    bernstein,
    betting_lower,
    betting_upper,
    bonferroni,
    chernoff_lower,
    chernoff_upper,
    clopper_pearson_upper,
    empirical_bernstein,
    gaussian_rate,
    hoeffding,
    hoeffding_tail,
    intersection_lower,
    mcdiarmid,
    sample_rate,
    union_bound,
)
from bayesdl.errors import CertificateError
from tests.bounds.exact import betting_capital, kl


def test_tail_of_the_central_limit_theorem_is_no_bound() -> None:
    p, n, epsilon = 0.01, 5, 0.583
    exact = stats.binom.sf(math.ceil((p + epsilon) * n) - 1, n, p)
    assert exact == pytest.approx(9.9e-6, rel=0.01)
    assert 2 * math.exp(-n * epsilon**2 / (2 * p * (1 - p))) == pytest.approx(9.9e-38, rel=0.01)
    assert hoeffding_tail(epsilon=epsilon, n=n) == pytest.approx(0.067, abs=5e-4)


def test_hoeffdings_tail_holds_on_a_grid() -> None:
    for p, n, epsilon in itertools.product((0.01, 0.2, 0.5, 0.9), (1, 5, 40, 300), (0.03, 0.1, 0.3)):
        k = np.arange(n + 1)
        exact = stats.binom.pmf(k, n, p)[np.abs(k / n - p) >= epsilon].sum()
        assert exact <= hoeffding_tail(epsilon=epsilon, n=n)
    assert hoeffding_tail(epsilon=0.0, n=3) == 1.0


def test_chernoff_lower_mirrors_the_upper_bound() -> None:
    lower = chernoff_lower(risk=0.75, n=64, delta=0.05)
    assert lower == pytest.approx(1 - chernoff_upper(risk=0.25, n=64, delta=0.05), rel=1e-14)
    assert kl(0.75, lower) >= mp.log(20) / 64
    assert chernoff_lower(risk=0.0, n=64, delta=0.05) == 0.0


def test_variance_pays_where_it_is_small_and_never_without_limit() -> None:
    numbers = {"risk": 0.1, "n": 2000, "delta": 0.05}
    known, learnt = bernstein(variance=1e-4, **numbers), empirical_bernstein(variance=1e-4, **numbers)
    assert known < learnt < chernoff_upper(**numbers) < hoeffding(**numbers)
    assert bernstein(variance=0.25, **numbers) > hoeffding(**numbers)
    assert empirical_bernstein(risk=0.5, variance=0.5, n=2, delta=0.1) == 1.0  # the largest variance of two losses
    with pytest.raises(CertificateError, match="n must be a whole number of at least 2"):
        empirical_bernstein(risk=0.5, variance=0.1, n=1, delta=0.1)


def test_mcdiarmid_with_equal_differences_is_hoeffding() -> None:
    assert mcdiarmid(differences=np.full(50, 1 / 50), delta=0.05) == pytest.approx(math.sqrt(math.log(20) / 100))
    c = np.random.default_rng(0).uniform(size=1000)
    exact = mp.sqrt(mp.fsum(mp.mpf(v) ** 2 for v in c.tolist()) * mp.log(1 / mp.mpf(0.01)) / 2)
    assert exact <= mcdiarmid(differences=c, delta=0.01) <= exact * (1 + mp.mpf("1e-12"))
    assert mcdiarmid(differences=[1e-200, 1e-200], delta=0.5) == pytest.approx(1e-200 * math.sqrt(math.log(2)))
    assert mcdiarmid(differences=[0.0], delta=0.5) == 0.0
    for change, words in (({"differences": [-1.0]}, "differences"), ({"delta": 1.0}, "delta")):
        with pytest.raises(CertificateError, match=words):
            mcdiarmid(**({"differences": [1.0], "delta": 0.5} | change))


def test_union_and_intersection_are_rounded_to_the_safe_side() -> None:
    for p in np.random.default_rng(0).uniform(0, 0.1, (50, 7)):
        exact = mp.fsum(map(mp.mpf, p.tolist()))
        assert exact <= union_bound(p) <= exact * (1 + mp.mpf("1e-15"))
        assert intersection_lower(p) <= 1 - exact <= intersection_lower(p) + mp.mpf("1e-15")
    assert union_bound([0.5, 0.5, 1e-30]) == 1.0
    assert intersection_lower([0.25, 0.5]) == 0.25
    assert intersection_lower([0.9, 0.9]) == 0.0
    with pytest.raises(CertificateError, match="probabilities"):
        union_bound([0.5, 1.1])


def test_bonferroni_of_identical_sure_events_swings() -> None:
    sums = [math.comb(12, k) for k in range(1, 13)]
    assert bonferroni(sums)[:5] == [12, -54, 166, -329, 463]
    assert bonferroni(sums)[-1] == 1


def test_bonferroni_bounds_any_union_from_both_sides() -> None:
    rng = np.random.default_rng(1)
    events = rng.uniform(size=(64, 6)) < rng.uniform(size=6) * 0.6  # 64 equally likely outcomes, dependent events
    count = events.sum(1)
    sums = [np.mean([math.comb(c, k) for c in count]) for k in range(1, 7)]
    truth, partial = events.any(1).mean(), bonferroni(sums)
    assert all(bound >= truth for bound in partial[::2])
    assert all(bound <= truth for bound in partial[1::2])
    assert partial[-1] == pytest.approx(truth, abs=1e-12)
    assert 1 - events.any(1).mean() >= intersection_lower(events.mean(0))


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("law", ["uniform", "narrow", "zero-one", "constant"])
def test_betting_bounds_solve_their_equation(n: int, law: str) -> None:
    rng = np.random.default_rng(2)
    losses = {
        "uniform": rng.uniform(size=n),
        "narrow": 0.03 + 0.003 * rng.uniform(size=n),
        "zero-one": (rng.uniform(size=n) < 0.1).astype(float),
        "constant": np.zeros(n),
    }[law]
    near = mp.mpf("1e-12")
    for delta in (0.05, 1e-6):
        goal = mp.log(1 / mp.mpf(delta))
        upper, lower = betting_upper(losses, delta=delta), betting_lower(losses, delta=delta)
        assert lower <= losses.mean() <= upper
        assert betting_capital(losses, mp.mpf(upper), delta, True) >= goal or upper == 1.0
        assert betting_capital(losses, mp.mpf(upper) * (1 - near), delta, True) < goal
        assert lower == 0 or betting_capital(losses, mp.mpf(lower), delta, False) >= goal
        assert betting_capital(losses, max(mp.mpf(lower) * (1 + near), near), delta, False) < goal


def test_betting_is_rounded_outwards() -> None:
    losses = np.random.default_rng(6).uniform(size=(60, 30))
    upper, lower = betting_upper(losses, delta=0.3), betting_lower(losses, delta=0.3)
    goal = mp.log(1 / mp.mpf(0.3))
    for x, high, low in zip(losses, upper.tolist(), lower.tolist(), strict=True):
        assert high == 1 or betting_capital(x, high, 0.3, True) >= goal
        assert low == 0 or betting_capital(x, low, 0.3, False) >= goal


def test_betting_moves_as_it_must_and_takes_many_sets_at_once() -> None:
    losses = np.random.default_rng(3).beta(2, 5, size=(4, 3, 100))
    upper = betting_upper(losses, delta=0.05)
    assert upper.shape == (4, 3)
    assert upper[1, 2] == betting_upper(losses[1, 2], delta=0.05)
    assert (betting_upper(losses.transpose(1, 0, 2), delta=0.05) == upper.T).all()
    grid = betting_upper(losses[0, 0], delta=np.array([0.3, 0.05, 0.001]))
    assert (np.diff(grid) > 0).all()
    tensor = betting_lower(torch.from_numpy(losses).float(), delta=0.05)
    assert isinstance(tensor, torch.Tensor)
    # The mirror image, but for the rounding of 1 - loss.
    assert betting_lower(1 - losses, delta=0.05) == pytest.approx(1 - upper, rel=1e-9)


def test_betting_lies_near_the_best_known_for_each_law() -> None:
    rng = np.random.default_rng(4)
    wrong = (rng.uniform(size=(100, 1000)) < 0.01).astype(float)
    gap = (betting_upper(wrong, delta=0.05) - wrong.mean(1)).mean()
    assert gap < 1.25 * (chernoff_upper(risk=wrong.mean(1), n=1000, delta=0.05) - wrong.mean(1)).mean()
    assert gap > (clopper_pearson_upper(errors=wrong.sum(1), n=1000, delta=0.05) - wrong.mean(1)).mean()
    narrow = 0.5 + 0.01 * rng.standard_normal((20, 1000))
    gap = (betting_upper(narrow, delta=0.05) - narrow.mean(1)).mean()
    variance = narrow.var(1, ddof=1)
    bernsteins = empirical_bernstein(risk=narrow.mean(1), variance=variance, n=1000, delta=0.05) - narrow.mean(1)
    assert gap < 0.25 * bernsteins.mean()


@pytest.mark.parametrize("bound", [betting_upper, betting_lower])
def test_betting_refuses_bad_losses(bound: object) -> None:
    for losses, delta, words in [
        ([0.1, 1.2], 0.05, "losses must be in"),
        ([0.1, math.nan], 0.05, "losses is NaN"),
        ([], 0.05, "number of losses"),
        (0.3, 0.05, "number of losses"),
        ([0.1], 0.0, "delta"),
    ]:
        with pytest.raises(CertificateError, match=words):
            bound(losses, delta=delta)  # type: ignore[operator]


def test_rates_are_those_of_large_deviations() -> None:
    assert gaussian_rate(0.5) == 0.125
    assert gaussian_rate(3.0, mean=1.0, sd=4.0) == 0.125
    measured = [-stats.norm.logsf(0.5 * math.sqrt(n)) / n for n in (50, 200, 1000)]
    assert measured == pytest.approx([0.170, 0.139, 0.129], abs=5e-4)
    # A sum of signs beyond n / 2 is a share of ones beyond 3 / 4.
    assert bernoulli_rate(0.75, p=0.5) == pytest.approx(0.1308, abs=5e-5)
    assert -stats.binom.logsf(750, 1000, 0.5) / 1000 == pytest.approx(0.1308, abs=5e-3)
    assert bernoulli_rate([-0.1, 0.5, 1.1], p=0.5).tolist() == [math.inf, 0.0, math.inf]


def test_rate_of_samples() -> None:
    x = [0.0, 0.1, 0.5, 0.999, 1.0, 1.01]
    assert sample_rate(x, samples=[1.0, 0.0, 0.0, 1.0]) == pytest.approx(bernoulli_rate(x, p=0.5), rel=1e-12, abs=1e-15)
    samples = np.random.default_rng(5).standard_normal(100_000)
    assert sample_rate(0.5, samples=samples) == pytest.approx(0.125, abs=0.003)
    assert sample_rate(0.5e-9, samples=1e-9 * samples) == pytest.approx(float(sample_rate(0.5, samples=samples)))
    assert sample_rate([2.0, 3.0], samples=[2.0]).tolist() == [0.0, math.inf]
    rates = np.asarray(sample_rate(np.linspace(-2, 2, 41), samples=samples[:1000]))
    assert rates.min() >= 0
    assert (np.diff(rates, 2) > 0).all()  # strictly convex
    for bad, words in (([], "number of samples"), ([math.inf], "samples must be finite")):
        with pytest.raises(CertificateError, match=words):
            sample_rate(0.0, samples=bad)
