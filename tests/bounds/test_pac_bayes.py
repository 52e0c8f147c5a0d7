from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from bayesdl.bounds.concentration import binary_kl
from bayesdl.bounds.gaussian_kl import kl_divergence_gaussian
from bayesdl.bounds.pac_bayes import mcallester, pac_bayes_kl
from bayesdl.errors import CertificateError

RISK, KL, N, DELTA = st.floats(0, 1), st.floats(0, 1e4), st.integers(1, 100_000), st.floats(1e-6, 0.5)


def test_published_numbers() -> None:
    numbers = {"risk": 0.03, "kl": 5000.0, "n": 60_000, "delta": 0.05}
    assert float(pac_bayes_kl(**numbers)) == pytest.approx(0.154, abs=5e-4)
    assert float(mcallester(**numbers)) == pytest.approx(0.234, abs=5e-4)
    # The factor is 1/(2n), not 2/n: n = 1000, KL = 10.
    assert float(mcallester(risk=0.0, kl=10.0, n=1000, delta=0.05)) == pytest.approx(0.0926, abs=5e-5)


def kl_moment(n: int) -> float:
    """E exp(n kl(K/n || p)) for K ~ Bin(n, p): the powers of p cancel."""
    k = np.arange(n + 1)
    log = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    log += special.xlogy(k, k / n) + special.xlogy(n - k, 1 - k / n)
    return float(np.exp(log).sum())


@pytest.mark.parametrize(("n", "value"), [(8, 4.25), (20, 6.29), (100, 13.2)])
def test_exponential_moment_of_the_kl(n: int, value: float) -> None:
    assert kl_moment(n) == pytest.approx(value, abs=0.05 if n == 100 else 0.005)


def test_maurers_constant_holds_for_every_small_n() -> None:
    assert all(kl_moment(n) <= 2 * math.sqrt(n) * (1 + 1e-12) for n in range(1, 500))
    # It stays near its asymptote sqrt(pi n / 2) + 2/3, so sqrt(n) alone would be refuted.
    assert all(kl_moment(n) > math.sqrt(n) for n in range(1, 500))


@pytest.mark.parametrize("p", [0.03, 0.4, 0.97])
def test_moment_does_not_depend_on_the_true_risk(p: float) -> None:
    n, k = 25, np.arange(26)
    log = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1) + special.xlogy(k, p)
    log += special.xlogy(n - k, 1 - p)
    assert float((np.exp(log + n * np.asarray(binary_kl(k / n, p)))).sum()) == pytest.approx(kl_moment(n), rel=1e-10)


@given(RISK, KL, N, DELTA)
@settings(max_examples=150)
def test_kl_form_is_between_the_risk_and_mcallester(risk: float, kl: float, n: int, delta: float) -> None:
    tight = float(pac_bayes_kl(risk=risk, kl=kl, n=n, delta=delta))
    loose = float(mcallester(risk=risk, kl=kl, n=n, delta=delta))
    assert risk < tight <= loose * (1 + 1e-12) or tight == 1.0
    assert tight <= 1
    # kl(risk || bound) reaches the complexity, so the inverted value does not lie below it.
    complexity = (kl + math.log(2 * math.sqrt(n) / delta)) / n
    assert tight == 1.0 or float(binary_kl(risk, tight)) >= complexity * (1 - 1e-12)


@given(RISK, KL, st.integers(1, 10_000), DELTA)
@settings(max_examples=100)
def test_bounds_move_with_each_number_as_they_must(risk: float, kl: float, n: int, delta: float) -> None:
    for bound in (pac_bayes_kl, mcallester):
        here = float(bound(risk=risk, kl=kl, n=n, delta=delta))
        assert here <= float(bound(risk=min(1.0, risk + 0.1), kl=kl, n=n, delta=delta))
        assert here <= float(bound(risk=risk, kl=kl + 1, n=n, delta=delta))
        assert here <= float(bound(risk=risk, kl=kl, n=n, delta=delta / 2))
        assert here >= float(bound(risk=risk, kl=kl, n=4 * n, delta=delta))


def test_infinite_kl_is_vacuous() -> None:
    assert pac_bayes_kl(risk=0.0, kl=math.inf, n=100, delta=0.05) == 1.0
    assert mcallester(risk=0.0, kl=math.inf, n=100, delta=0.05) == 1.0


@pytest.mark.parametrize("bound", [pac_bayes_kl, mcallester])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"risk": 1.01}, "risk must be in"),
        ({"risk": math.nan}, "risk is NaN"),
        ({"kl": -1e-6}, "kl must be non-negative"),
        ({"kl": math.nan}, "kl is NaN"),
        ({"n": 0}, "n must be a whole number"),
        ({"delta": 0.0}, "delta must be strictly"),
        ({"delta": 1.0}, "delta must be strictly"),
    ],
)
def test_domain_errors_name_the_argument(bound: object, change: dict[str, float], words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        bound(**({"risk": 0.1, "kl": 1.0, "n": 100, "delta": 0.05} | change))  # type: ignore[operator]


def exact_gaussian_kl(m: np.ndarray, s: np.ndarray, m0: np.ndarray, s0: np.ndarray) -> mpmath.mpf:
    total = mpmath.mpf(0)
    for a, b, c, d in zip(m, s, m0, s0, strict=True):
        ratio = (mpmath.mpf(b) / mpmath.mpf(d)) ** 2
        total += ((mpmath.mpf(a) - mpmath.mpf(c)) / mpmath.mpf(d)) ** 2 + ratio - 1 - mpmath.log(ratio)
    return total / 2


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 6.0, 20.0])
def test_gaussian_kl_is_never_below_the_exact_value_and_tight(scale: float) -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        m0, s0 = rng.normal(size=40), np.exp(rng.normal(size=40))
        m, s = m0 + scale * rng.normal(size=40), s0 * np.exp(scale * rng.normal(size=40))
        value = kl_divergence_gaussian(m, s, m0, s0)
        with mpmath.workdps(60):
            exact = exact_gaussian_kl(m, s, m0, s0)
            assert mpmath.mpf(value) >= exact
            # Relative to the terms: at scale 1e-9 the divergence is a difference of numbers of order 1e-9 each.
            assert mpmath.mpf(value) <= exact * (1 + mpmath.mpf("1e-12")) + 40 * scale * mpmath.mpf("1e-13")


def test_gaussian_kl_agrees_with_torch_and_takes_tensors() -> None:
    torch.manual_seed(0)
    m, s, m0, s0 = torch.randn(30), torch.rand(30) + 0.1, torch.randn(30), torch.rand(30) + 0.1
    double = [value.double() for value in (m, s, m0, s0)]
    q, p = torch.distributions.Normal(*double[:2]), torch.distributions.Normal(*double[2:])
    expected = float(torch.distributions.kl_divergence(q, p).sum())
    assert kl_divergence_gaussian(m, s, m0, s0) == pytest.approx(expected, rel=1e-13)


def test_gaussian_kl_at_its_edges() -> None:
    assert kl_divergence_gaussian(np.zeros(3), np.ones(3), 0.0, 1.0) == 0.0
    assert kl_divergence_gaussian(1e200, 1.0, 0.0, 1e-200) == math.inf
    with pytest.raises(CertificateError, match="sd must be positive"):
        kl_divergence_gaussian(0.0, 0.0, 0.0, 1.0)
    with pytest.raises(CertificateError, match="prior_sd must be positive"):
        kl_divergence_gaussian(0.0, 1.0, 0.0, -1.0)
    with pytest.raises(CertificateError, match="mean is NaN"):
        kl_divergence_gaussian(math.nan, 1.0, 0.0, 1.0)
    with pytest.raises(CertificateError, match="prior_mean must be finite"):
        kl_divergence_gaussian(0.0, 1.0, math.inf, 1.0)
