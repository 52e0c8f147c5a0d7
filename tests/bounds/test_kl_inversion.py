from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesdl.bounds.concentration import binary_kl, kl_inverse_lower, kl_inverse_upper
from bayesdl.errors import CertificateError
from tests.bounds.exact import kl

UNIT = st.floats(0, 1)
BOUND = st.floats(0, 50)


def random_pairs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Risks and bounds over many magnitudes: plain, tiny, and close to one."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, count)
    tiny = 10.0 ** rng.uniform(-18, -1, count)
    q = np.choose(kind, [rng.uniform(0, 1, count), tiny, 1 - tiny, rng.integers(0, 200, count) / 200])
    bound = np.where(rng.uniform(size=count) < 0.5, 10.0 ** rng.uniform(-14, 1.5, count), rng.exponential(0.2, count))
    return q, bound


def check_both_sides(q: np.ndarray, bound: np.ndarray) -> None:
    """Neither inverse is on the wrong side of the exact root, nor more than 1e-12 away from it, relative."""
    upper, lower = np.asarray(kl_inverse_upper(q, bound)), np.asarray(kl_inverse_lower(q, bound))
    near = mp.mpf("1e-12")
    for q_, b, p, r in zip(q.tolist(), bound.tolist(), upper.tolist(), lower.tolist(), strict=True):
        # kl(q || p) rises with the distance of p from q, so comparing its values compares p with the root.
        assert q_ <= p <= 1
        assert p == 1 or kl(q_, p) >= b, (q_, b)
        inner = p / (1 + near)
        assert inner <= q_ or kl(q_, inner) <= b, (q_, b)
        assert 0 <= r <= q_
        assert r == 0 or kl(q_, r) >= b, (q_, b)
        inner = max(mp.mpf(r) * (1 + near), mp.mpf("1e-300"))  # smaller roots may be given as 0
        assert inner >= q_ or kl(q_, inner) <= b, (q_, b)


def corner_pairs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Risks at 0, at 1, next to them, down to 1e-305; bounds from 1e-305 to 700, and at roots far below the risk."""
    rng = np.random.default_rng(seed)
    tiny = 10.0 ** rng.uniform(-305, -1, count)
    edges = rng.choice([0.0, 1.0, np.nextafter(1.0, 0), 2.0**-53, 0.5, np.nextafter(0.5, 1)], count)
    sure = 1 - 10.0 ** rng.uniform(-16, -1, count)
    q = np.choose(rng.integers(0, 4, count), [edges, tiny, sure, rng.uniform(size=count)])
    small, near = 10.0 ** rng.uniform(-305, 2, count), q * 10.0 ** rng.uniform(-30, 0, count)
    far = q * rng.uniform(1, 700, count)  # the lower root is about q exp(-bound / q)
    return q, np.maximum(np.choose(rng.integers(0, 3, count), [small, near, far]), 1e-305)


def test_inverses_are_on_the_safe_side_and_tight() -> None:
    check_both_sides(*random_pairs(1_000, seed=1))
    check_both_sides(*corner_pairs(1_000, seed=2))


@pytest.mark.slow
def test_inverses_are_on_the_safe_side_and_tight_on_100000_pairs() -> None:
    check_both_sides(*random_pairs(50_000, seed=3))
    check_both_sides(*corner_pairs(50_000, seed=4))


def test_midpoint_of_a_bisection_would_fail_the_strictness_test() -> None:
    q, bound = random_pairs(200, seed=5)
    below = 0
    for q_, b in zip(q.tolist(), bound.tolist(), strict=True):
        low, high = q_, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (low, middle) if middle == 1 or kl(q_, middle) > b else (middle, high)
        middle = (low + high) / 2
        below += middle < 1 and kl(q_, middle) < b
    assert below > 50


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
    assert binary_kl(0.3, 0.3 + 1e-9) == pytest.approx(float(kl(0.3, 0.3 + 1e-9)), rel=1e-6)


@given(UNIT, BOUND, UNIT, BOUND)
@settings(max_examples=60)
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


@pytest.mark.parametrize("inverse", [kl_inverse_upper, kl_inverse_lower])
def test_gradients_are_those_of_the_exact_root(inverse: Callable[..., torch.Tensor]) -> None:
    rng = np.random.default_rng(6)
    q = torch.tensor(rng.uniform(0.01, 0.99, 40), requires_grad=True)
    bound = torch.tensor(10.0 ** rng.uniform(-5, -0.5, 40), requires_grad=True)
    weight = torch.arange(1.0, 41.0, dtype=torch.float64)
    (weight * inverse(q, bound)).sum().backward()
    for wrt in (q, bound):
        step = 1e-6 * wrt.detach()
        ends = [[v.detach() + sign * step * (v is wrt) for v in (q, bound)] for sign in (1, -1)]
        slope = (inverse(*ends[0]) - inverse(*ends[1])) / (2 * step)
        assert torch.allclose(wrt.grad / weight, slope, rtol=1e-5), wrt is q


def test_gradients_broadcast_and_keep_the_inputs_dtype() -> None:
    q = torch.tensor([[0.1], [0.2]], requires_grad=True)
    bound = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    p = kl_inverse_upper(q, bound)
    assert torch.equal(p.detach(), kl_inverse_upper(q.detach(), bound.detach()))
    p.sum().backward()
    assert q.grad.dtype == torch.float32
    assert (q.grad.shape, bound.grad.shape) == ((2, 1), (3,))
    with torch.no_grad():
        assert not kl_inverse_upper(q, bound).requires_grad
    assert kl_inverse_upper(0.1, bound).requires_grad


def test_gradients_at_the_edges_are_no_nan() -> None:
    q = torch.tensor([0.0, 1.0, 0.3, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    bound = torch.tensor([0.1, 0.1, 50.0, 0.0, math.inf], dtype=torch.float64, requires_grad=True)
    kl_inverse_upper(q, bound).sum().backward()
    assert bound.grad.tolist()[:2] == [pytest.approx(math.exp(-0.1)), 0.0]
    assert q.grad[0] > 100  # the exact slope is infinite
    assert q.grad.tolist()[1:] == [0.0, 0.0, 1.0, 0.0]
    assert torch.equal(bound.grad[2:], torch.tensor([0.0, math.inf, 0.0], dtype=torch.float64))


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
    ],
)
def test_domain_errors_name_the_argument(call: object, words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        call()  # type: ignore[operator]
