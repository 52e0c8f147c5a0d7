from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bayesdl.bounds.concentration import (
    binary_kl,
    chernoff_upper,
    clopper_pearson_upper,
    hoeffding,
    kl_inverse_lower,
    kl_inverse_upper,
)
from bayesdl.errors import CertificateError

UNIT = st.floats(0, 1)
BOUND = st.floats(0, 50)


def exact_kl(q: float, p: float) -> mpmath.mpf:
    """kl(q || p) at the working precision of mpmath; floats are exact rationals there."""
    q, p = mpmath.mpf(q), mpmath.mpf(p)
    first = q * mpmath.log(q / p) if q > 0 else mpmath.mpf(0)
    second = (1 - q) * mpmath.log((1 - q) / (1 - p)) if q < 1 else mpmath.mpf(0)
    return first + second


def random_pairs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Risks and bounds over many magnitudes: plain, tiny, and close to one."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, count)
    tiny = 10.0 ** rng.uniform(-18, -1, count)
    q = np.choose(kind, [rng.uniform(0, 1, count), tiny, 1 - tiny, rng.integers(0, 200, count) / 200])
    bound = np.where(rng.uniform(size=count) < 0.5, 10.0 ** rng.uniform(-14, 1.5, count), rng.exponential(0.2, count))
    return q, bound


def test_inverse_is_never_below_the_exact_inverse_on_20000_pairs() -> None:
    q, bound = random_pairs(20_000, seed=1)
    upper = np.asarray(kl_inverse_upper(q, bound))
    with mpmath.workdps(50):
        # kl(q || p) rises with p beyond q: p is an upper bound of the inverse exactly when kl(q || p) >= bound.
        below = [i for i in range(len(q)) if upper[i] < 1 and exact_kl(q[i], upper[i]) < mpmath.mpf(bound[i])]
    assert not below, f"{len(below)} inverses lie below the exact value, first at {q[below[0]], bound[below[0]]}"


def test_inverse_is_tight() -> None:
    q, bound = random_pairs(3_000, seed=2)
    upper = np.asarray(kl_inverse_upper(q, bound))
    inner = np.maximum(upper * (1 - 1e-12), q)
    with mpmath.workdps(50):
        loose = [i for i in range(len(q)) if inner[i] > q[i] and exact_kl(q[i], inner[i]) > mpmath.mpf(bound[i])]
    assert not loose


def test_lower_inverse_is_never_above_the_exact_inverse_and_tight() -> None:
    q, bound = random_pairs(3_000, seed=3)
    lower = np.asarray(kl_inverse_lower(q, bound))
    with mpmath.workdps(50):
        for q_, b, p in zip(q, bound, lower, strict=True):
            assert p == 0 or exact_kl(q_, p) >= mpmath.mpf(b)
            inner = min(p * (1 + 1e-12), q_)
            # Where p is far below q the divergence hardly depends on it, so tightness is asked for in its value.
            assert inner in (0.0, q_) or exact_kl(q_, inner) <= mpmath.mpf(b) * (1 + mpmath.mpf("1e-14"))


def test_midpoint_of_a_bisection_would_fail_the_strictness_test() -> None:
    q, bound = random_pairs(500, seed=4)
    below = 0
    with mpmath.workdps(50):
        for q_, b in zip(q, bound, strict=True):
            low, high = q_, 1.0
            while high - low > 1e-9:
                middle = (low + high) / 2
                low, high = (low, middle) if middle == 1 or exact_kl(q_, middle) > b else (middle, high)
            middle = (low + high) / 2
            below += middle < 1 and exact_kl(q_, middle) < b
    assert below > 100


@pytest.mark.parametrize(
    ("q", "bound", "expected"),
    [(0.3, 0.0, 0.3), (0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, 2.0, 1.0), (0.3, math.inf, 1.0), (0.0, math.inf, 1.0)],
)
def test_inverse_at_its_edges(q: float, bound: float, expected: float) -> None:
    assert kl_inverse_upper(q, bound) == expected


@pytest.mark.parametrize("bound", [1e-12, 1e-3, 0.1, 1.0, 20.0])
def test_inverse_at_zero_risk_is_the_closed_form(bound: float) -> None:
    value = float(kl_inverse_upper(0.0, bound))
    assert value >= -math.expm1(-bound)
    assert value == pytest.approx(-math.expm1(-bound), rel=1e-13)


def test_inverse_of_tiny_risks() -> None:
    q = np.array([5e-324, 1e-300, 1e-200, -0.0])
    assert np.asarray(kl_inverse_upper(q, 0.01)) == pytest.approx(np.full(4, -math.expm1(-0.01)), rel=1e-4)
    assert (np.asarray(kl_inverse_upper(q, 0.01)) >= -math.expm1(-0.01)).all()


@given(UNIT, UNIT)
@settings(max_examples=200)
def test_binary_kl_is_a_divergence_above_pinsker(q: float, p: float) -> None:
    value = float(binary_kl(q, p))
    assert value >= 2 * (p - q) ** 2 * (1 - 1e-12)
    assert (value == 0) == (p == q) or abs(p - q) < 1e-150
    assert value == pytest.approx(float(binary_kl(1 - q, 1 - p)), abs=1e-6) or min(q, p, 1 - q, 1 - p) < 1e-9


def test_binary_kl_values() -> None:
    assert binary_kl(0.0, 0.5) == pytest.approx(math.log(2), rel=1e-15)
    assert binary_kl(0.5, 0.25) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-14)
    assert binary_kl(0.5, 0.0) == math.inf
    assert binary_kl(0.5, 1.0) == math.inf
    assert binary_kl(0.0, 0.0) == binary_kl(1.0, 1.0) == 0.0
    with mpmath.workdps(50):
        assert binary_kl(0.3, 0.3 + 1e-9) == pytest.approx(float(exact_kl(0.3, 0.3 + 1e-9)), rel=1e-6)


@given(UNIT, BOUND, UNIT, BOUND)
@settings(max_examples=150)
def test_inverse_grows_with_risk_and_bound(q: float, bound: float, other_q: float, other_bound: float) -> None:
    low_q, high_q = sorted((q, other_q))
    low_b, high_b = sorted((bound, other_bound))
    upper = float(kl_inverse_upper(low_q, low_b))
    assert low_q <= upper <= 1
    # Neighbouring inputs may round outwards by a few units each.
    assert upper <= float(kl_inverse_upper(high_q, low_b)) * (1 + 1e-13)
    assert upper <= float(kl_inverse_upper(low_q, high_b)) * (1 + 1e-13)
    assert float(kl_inverse_lower(low_q, low_b)) <= low_q


def test_kinds_follow_the_inputs() -> None:
    assert isinstance(kl_inverse_upper(0.1, 0.1), float)
    assert isinstance(kl_inverse_upper(np.array([0.1, 0.2]), 0.1), np.ndarray)
    tensor = kl_inverse_upper(torch.tensor([[0.1], [0.2]], dtype=torch.float32), torch.tensor([0.1, 0.2, 0.3]))
    assert isinstance(tensor, torch.Tensor)
    assert tensor.shape == (2, 3)
    assert tensor.dtype == torch.float64
    assert isinstance(hoeffding(risk=torch.tensor(0.1), n=10, delta=0.05), torch.Tensor)


def test_hoeffding_and_chernoff_numbers() -> None:
    assert hoeffding(risk=0.1, n=100, delta=0.05) == pytest.approx(0.1 + math.sqrt(math.log(20) / 200), rel=1e-13)
    assert hoeffding(risk=0.9, n=2, delta=0.05) == 1.0
    # The central limit theorem's tail is not a finite-sample bound: at p = .01, n = 5 a deviation of .583 has
    # probability 9.9e-6, for which Hoeffding's bound allows and a Gaussian tail would not.
    exact = stats.binom.sf(math.ceil((0.01 + 0.583) * 5) - 1, 5, 0.01)
    assert exact == pytest.approx(9.9e-6, rel=0.01)
    assert exact <= math.exp(-2 * 5 * 0.583**2)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(1e-6, 0.5))
@settings(max_examples=150)
def test_binomial_tail_is_sharper_than_chernoff_is_sharper_than_hoeffding(k: int, n: int, delta: float) -> None:
    k = min(k, n)
    exact = float(clopper_pearson_upper(errors=k, n=n, delta=delta))
    chernoff = float(chernoff_upper(risk=k / n, n=n, delta=delta))
    assert k / n <= exact <= chernoff * (1 + 1e-9)
    assert chernoff <= float(hoeffding(risk=k / n, n=n, delta=delta)) * (1 + 1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
def test_clopper_pearson_covers_by_exact_enumeration(n: int, delta: float) -> None:
    upper = np.asarray(clopper_pearson_upper(errors=np.arange(n + 1), n=n, delta=delta))
    for p in np.concatenate([np.linspace(0, 1, 401), upper[:-1] * (1 + 1e-9), upper[:-1] * (1 - 1e-9)]):
        missed = stats.binom.pmf(np.arange(n + 1), n, min(p, 1.0))[upper < p].sum()
        assert missed <= delta * (1 + 1e-9)
    # Sharp: just above a bound the coverage is nearly used up.
    assert stats.binom.cdf(0, n, upper[0]) == pytest.approx(delta, rel=1e-8)


def test_clopper_pearson_tail_is_below_delta_in_high_precision() -> None:
    rng = np.random.default_rng(5)
    for n in (1, 3, 50, 2_000, 60_000, 1_000_000):
        for share in (0.0, 0.001, 0.03, 0.5, 0.99):
            k, delta = int(share * n), float(10 ** rng.uniform(-10, -0.5))
            p = float(clopper_pearson_upper(errors=k, n=n, delta=delta))
            with mpmath.workdps(40):
                assert binomial_tail(k, n, p) <= mpmath.mpf(delta), (k, n, delta)
                assert binomial_tail(k, n, p * (1 - 1e-9)) > mpmath.mpf(delta), (k, n, delta)


def binomial_tail(k: int, n: int, p: float) -> mpmath.mpf:
    """P(Bin(n, p) <= k) summed downwards from its largest term until the terms no longer matter."""
    p = mpmath.mpf(p)
    log = mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
    term = mpmath.exp(log + k * mpmath.log(p) + (n - k) * mpmath.log(1 - p))
    total, ratio = mpmath.mpf(0), (1 - p) / p
    for j in range(k, -1, -1):
        total += term
        term *= j * ratio / (n - j + 1)
        if term < total * mpmath.mpf("1e-25"):
            break
    return total


def test_clopper_pearson_at_its_edges() -> None:
    assert clopper_pearson_upper(errors=5, n=5, delta=0.05) == 1.0
    assert clopper_pearson_upper(errors=0, n=20, delta=0.05) == pytest.approx(1 - 0.05 ** (1 / 20), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kl_inverse_upper(1.5, 0.1), "q must be in"),
        (lambda: kl_inverse_upper(-0.1, 0.1), "q must be in"),
        (lambda: kl_inverse_upper(math.nan, 0.1), "q is NaN"),
        (lambda: kl_inverse_upper(0.1, -1e-9), "bound must be non-negative"),
        (lambda: kl_inverse_upper(0.1, math.nan), "bound is NaN"),
        (lambda: kl_inverse_lower([0.1, 0.2], [0.1, 0.2, 0.3]), "do not broadcast"),
        (lambda: kl_inverse_upper("much", 0.1), "q must be a number"),
        (lambda: binary_kl(0.1, 2.0), "p must be in"),
        (lambda: hoeffding(risk=0.1, n=0, delta=0.05), "n must be a whole number of at least 1"),
        (lambda: hoeffding(risk=0.1, n=2.5, delta=0.05), "n must be a whole number"),
        (lambda: hoeffding(risk=0.1, n=10, delta=0.0), "delta must be strictly between 0 and 1"),
        (lambda: chernoff_upper(risk=0.1, n=10, delta=1.0), "delta must be strictly between 0 and 1"),
        (lambda: chernoff_upper(risk=np.array([0.1, 7.0]), n=10, delta=0.1), "risk must be in .0, 1., got 7"),
        (lambda: clopper_pearson_upper(errors=3, n=2, delta=0.05), "errors must be at most n"),
        (lambda: clopper_pearson_upper(errors=-1, n=2, delta=0.05), "errors must be a whole number"),
        (lambda: clopper_pearson_upper(errors=1, n=math.inf, delta=0.05), "n must be a whole number"),
    ],
)
def test_domain_errors_name_the_argument(call: object, words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        call()  # type: ignore[operator]
