from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bayesdl.bounds import chernoff_upper, clopper_pearson_lower, clopper_pearson_upper, hoeffding
from bayesdl.errors import CertificateError
from tests.bounds.exact import binomial_tail


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


@pytest.mark.parametrize("n", [1, 3, 50, 2_000, 60_000, 1_000_000])
def test_clopper_pearson_is_outward_and_within_1e_12(n: int) -> None:
    rng = np.random.default_rng(n)
    for share in (0.0, 0.001, 0.03, 0.5, 0.99):
        k, delta = int(share * n), float(10 ** rng.uniform(-10, -0.1))
        p, near = mp.mpf(float(clopper_pearson_upper(errors=k, n=n, delta=delta))), mp.mpf("1e-12")
        assert binomial_tail(k, n, p) <= delta, (k, delta)
        assert binomial_tail(k, n, p / (1 + near)) > delta, (k, delta)
        k = n - k  # P(Bin(n, p) >= k) = P(Bin(n, 1 - p) <= n - k)
        p = mp.mpf(float(clopper_pearson_lower(errors=k, n=n, delta=delta)))
        assert binomial_tail(n - k, n, 1 - p) <= delta, (k, delta)
        assert binomial_tail(n - k, n, 1 - p * (1 + near)) > delta, (k, delta)


def test_clopper_pearson_at_its_edges() -> None:
    assert clopper_pearson_upper(errors=5, n=5, delta=0.05) == 1.0
    assert clopper_pearson_upper(errors=0, n=20, delta=0.05) == pytest.approx(1 - 0.05 ** (1 / 20), rel=1e-9)
    assert clopper_pearson_lower(errors=0, n=20, delta=0.05) == 0.0
    assert clopper_pearson_lower(errors=20, n=20, delta=0.05) == pytest.approx(0.05 ** (1 / 20), rel=1e-12)
    assert clopper_pearson_lower(errors=[0, 3, 7], n=7, delta=0.05).shape == (3,)


@pytest.mark.parametrize("bound", [clopper_pearson_upper, clopper_pearson_lower])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"errors": 3}, "errors must be at most n"),
        ({"errors": -1}, "errors must be a whole number"),
        ({"errors": 0.5}, "errors must be a whole number"),
        ({"n": float("inf")}, "n must be a whole number"),
        ({"delta": 1.0}, "delta must be strictly"),
        ({"delta": float("nan")}, "delta is NaN"),
    ],
)
def test_domain_errors_name_the_argument(bound: object, change: dict[str, float], words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        bound(**({"errors": 1, "n": 2, "delta": 0.05} | change))  # type: ignore[operator]
