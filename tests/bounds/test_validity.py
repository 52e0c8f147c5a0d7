"""Failure rates: each bound fails with probability at most delta, and what is left out of it shows at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
from scipy import stats

from bayesdl.bounds import concentration as c

Losses = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

# Laws of losses in [0, 1] with their mean and variance.
LAWS: dict[str, tuple[Losses, float, float]] = {
    "fair coin": (lambda rng, size: (rng.uniform(size=size) < 0.5).astype(float), 0.5, 0.25),
    "rare error": (lambda rng, size: (rng.uniform(size=size) < 0.03).astype(float), 0.03, 0.0291),
    "beta(1, 9)": (lambda rng, size: rng.beta(1, 9, size=size), 0.1, 9 / 1100),
    "narrow": (lambda rng, size: rng.uniform(0.3, 0.32, size=size), 0.31, 0.02**2 / 12),
    "mostly 0": (lambda rng, size: rng.uniform(size=size) * (rng.uniform(size=size) < 0.02), 0.01, 0.02 / 3 - 1e-4),
}


def upper_bounds(losses: np.ndarray, variance: float, delta: float) -> dict[str, np.ndarray]:
    """Every upper bound on a mean, ``[runs]`` each."""
    n, numbers = losses.shape[1], {"n": losses.shape[1], "delta": delta}
    # An average of losses is rounded; a bound may not be taken from less than it is.
    mean = np.minimum(losses.mean(1) * (1 + 1e-13), 1)
    bounds = {
        "hoeffding": c.hoeffding(risk=mean, **numbers),
        "chernoff_upper": c.chernoff_upper(risk=mean, **numbers),
        "bernstein": c.bernstein(risk=mean, variance=variance, **numbers),
        "empirical_bernstein": c.empirical_bernstein(risk=mean, variance=losses.var(1, ddof=1), **numbers),
        "betting_upper": c.betting_upper(losses, delta=delta),
        "mcdiarmid": mean + c.mcdiarmid(differences=np.full(n, 1 / n), delta=delta),
        "chernoff_lower": 1 - np.asarray(c.chernoff_lower(risk=1 - mean, **numbers)),
        "betting_lower": 1 - np.asarray(c.betting_lower(1 - losses, delta=delta)),
    }
    if set(np.unique(losses)) <= {0.0, 1.0}:
        errors = losses.sum(1)
        bounds["clopper_pearson_upper"] = c.clopper_pearson_upper(errors=errors, **numbers)
        bounds["clopper_pearson_lower"] = 1 - np.asarray(c.clopper_pearson_lower(errors=n - errors, **numbers))
    return {name: np.asarray(bound) for name, bound in bounds.items()}


def check_rates(law: str, n: int, delta: float, runs: int, seed: int) -> None:
    draw, mean, variance = LAWS[law]
    losses = draw(np.random.default_rng(seed), (runs, n))
    allowed = stats.binom.ppf(1 - 1e-4, runs, delta)
    for name, bound in upper_bounds(losses, variance, delta).items():
        assert (bound < mean).sum() <= allowed, (name, (bound < mean).mean())
        # Betting weighs the losses by their order, so that once in a while it excludes their very average.
        assert (bound < losses.mean(1)).mean() <= (0.01 if "betting" in name else 0), name


@pytest.mark.parametrize("law", LAWS)
def test_failure_rate_is_at_most_delta(law: str) -> None:
    for n, delta in ((5, 0.5), (60, 0.1)):
        check_rates(law, n, delta, runs=1000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [1, 3, 20, 400])
def test_failure_rate_is_at_most_delta_in_many_runs(law: str, n: int) -> None:
    if n == 1:
        draw, mean, _ = LAWS[law]
        losses = draw(np.random.default_rng(2), (20_000, 1))
        assert (np.asarray(c.betting_upper(losses, delta=0.2)) < mean).mean() <= 0.2 + 4 * math.sqrt(0.16 / 20_000)
        return
    for delta in (0.3, 0.01):
        check_rates(law, n, delta, runs=4000, seed=n)


def test_central_limit_theorem_fails_more_often_than_it_says() -> None:
    # Exact enumeration: 40 rows, error rate 3%, "95% sure".
    n, p, delta = 40, 0.03, 0.05
    share = np.arange(n + 1) / n
    normal = share + stats.norm.ppf(1 - delta) * np.sqrt(share * (1 - share) / n)
    exact = np.asarray(c.clopper_pearson_upper(errors=np.arange(n + 1), n=n, delta=delta))
    weight = stats.binom.pmf(np.arange(n + 1), n, p)
    assert weight[normal < p].sum() > 5 * delta
    assert weight[exact < p].sum() <= delta


def tight_error_rate(k: int, n: int, delta: float) -> float:
    """The error rate just above the exact bound for k errors: at most k of them come with probability ~ delta."""
    return float(c.clopper_pearson_upper(errors=k, n=n, delta=delta)) * (1 + 1e-9)


def test_delta_that_is_not_split_fails_twice_as_often() -> None:
    n, delta, runs = 50, 0.1, 20_000
    p = tight_error_rate(2, n, delta)
    errors = np.random.default_rng(3).binomial(n, p, size=(runs, 2)).min(1)  # the better of a class of two
    counts = np.arange(n + 1)
    forgotten = np.asarray(c.clopper_pearson_upper(errors=counts, n=n, delta=delta))[errors] < p
    split = np.asarray(c.clopper_pearson_upper(errors=counts, n=n, delta=delta / 2))[errors] < p
    deviation = math.sqrt(delta * (1 - delta) / runs)
    assert forgotten.mean() == pytest.approx(1 - (1 - delta) ** 2, abs=0.01)
    assert forgotten.mean() > delta + 20 * deviation
    assert split.mean() <= delta + 3 * deviation


def test_midpoint_of_the_bracket_fails_more_often_than_delta() -> None:
    # No errors in n trials: the kl bound is exact there, P(no error) = delta at p = 1 - delta^(1/n).
    delta, runs, over = mp.mpf("0.05"), 0, 0
    for n in range(2, 40):
        exact = 1 - delta ** (mp.mpf(1) / n)
        bound = float(mp.log(1 / delta) / n)
        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if float(c.binary_kl(0.0, middle)) > bound else (middle, high)
        midpoint = mp.mpf((low + high) / 2)
        runs += 1
        if midpoint < exact:  # an error rate between the two is missed whenever no error comes
            over += (1 - (midpoint + exact) / 2) ** n > delta
        ours = mp.mpf(float(c.chernoff_upper(risk=0.0, n=n, delta=float(delta))))
        assert (1 - ours) ** n <= mp.mpf(float(delta))
    assert over > runs / 4


def test_sorted_losses_make_a_fraud_of_betting() -> None:
    # In an order that depends on their values, the losses so far say what comes next.
    losses, mean, _ = LAWS["fair coin"]
    x = losses(np.random.default_rng(4), (500, 200))
    assert (np.asarray(c.betting_upper(x, delta=0.05)) < mean).mean() <= 0.05
    assert (np.asarray(c.betting_upper(np.sort(x, 1), delta=0.05)) < mean).mean() > 0.9
