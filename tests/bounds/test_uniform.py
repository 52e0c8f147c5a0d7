"""Uniform convergence: worked numbers, and brute force over small classes."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
from scipy.optimize import linprog

from bayesdl.bounds import chernoff_upper, uniform
from bayesdl.bounds.concentration import hoeffding_tail
from bayesdl.bounds.uniform import (
    consistent_sample_size,
    cover_count,
    finite_class_deviation,
    finite_class_excess_risk,
    finite_class_sample_size,
    fits_conjunction,
    fits_halfspace,
    fits_rectangle,
    labellings,
    log_growth,
    occam,
    vapnik_deviation,
    vc_deviation,
    vc_dimension,
    vc_dimensions,
    vc_rule_of_thumb,
    vc_sample_size,
    vc_tail,
)
from bayesdl.errors import CertificateError
from tests.bounds.exact import sauer

LOG_SIZE = 1000 * math.log(2)


def test_excess_risk_of_two_to_the_thousand_members() -> None:
    # The textbook's form log(4 |F| / delta) is the function at delta / 2.
    n = np.array([1e3, 1e4, 1e5, 1e6])
    printed = finite_class_excess_risk(log_size=LOG_SIZE, n=n, delta=0.001 / 2)
    assert np.round(printed, 4).tolist() == pytest.approx([1.1844, 0.3746, 0.1184, 0.0375])
    assert (finite_class_excess_risk(log_size=LOG_SIZE, n=n, delta=0.001) < printed).all()
    # 1.42 and 0.45 are the same with the logarithm to base 2, the second at n = 10^4.
    in_bits = 2 * np.sqrt((1000 + math.log2(4 / 0.001)) / (2 * n[:2]))
    assert in_bits == pytest.approx([1.42, 0.45], abs=0.005)


def test_sample_sizes_are_the_exact_ceilings() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        log_size, epsilon, delta = rng.uniform((0, 0.001, 1e-6), (50, 1, 0.9)).tolist()
        exact = (mp.mpf(log_size) + mp.log(2 / mp.mpf(delta))) / (2 * mp.mpf(epsilon) ** 2)
        assert finite_class_sample_size(log_size=log_size, epsilon=epsilon, delta=delta) == int(mp.ceil(exact))
        exact = (mp.mpf(log_size) - mp.log(mp.mpf(delta))) / mp.mpf(epsilon)
        assert consistent_sample_size(log_size=log_size, epsilon=epsilon, delta=delta) == int(mp.ceil(exact))
    # One member is Hoeffding's inequality; half of epsilon takes four times the rows.
    n = finite_class_sample_size(log_size=0.0, epsilon=0.01, delta=0.05)
    assert n == math.ceil(math.log(40) / 0.0002)
    assert hoeffding_tail(epsilon=0.01, n=n) <= 0.05 < hoeffding_tail(epsilon=0.01, n=n - 1)
    assert finite_class_sample_size(log_size=0.0, epsilon=0.005, delta=0.05) == pytest.approx(4 * n, abs=4)
    assert finite_class_deviation(log_size=0.0, n=n, delta=0.05) <= 0.01


def test_bound_of_one_predictor_fails_for_the_one_that_fits_best() -> None:
    rng = np.random.default_rng(1)
    n, members, runs, delta = 100, 200, 400, 0.05
    risks = rng.binomial(n, 0.5, size=(runs, members)).min(1) / n  # every member has the risk 1/2
    deviation = math.sqrt(math.log(1 / delta) / (2 * n))
    assert (risks + deviation < 0.5).mean() > 10 * delta
    uniform_deviation = finite_class_deviation(log_size=math.log(members), n=n, delta=delta)
    assert (risks + uniform_deviation < 0.5).mean() <= delta
    assert uniform_deviation < 2 * (0.5 - risks.mean())


def test_occam_shares_delta_by_weight() -> None:
    for weight in (1.0, 0.25, 2.0**-30):
        shared = occam(risk=0.1, description=-math.log(weight), n=500, delta=0.05)
        assert shared == pytest.approx(chernoff_upper(risk=0.1, n=500, delta=0.05 * weight), rel=1e-12)
    # In simulation: geometric weights over fair members, of which the most promising is taken.
    rng = np.random.default_rng(2)
    k, n, runs, delta = np.arange(1, 41), 60, 3000, 0.2
    errors, risk = rng.binomial(n, 0.5, size=(runs, len(k))), np.arange(n + 1)[:, None] / n
    shared = np.asarray(occam(risk=risk, description=k * math.log(2), n=n, delta=delta))[errors, k - 1].min(1)
    alone = np.asarray(chernoff_upper(risk=risk[:, 0], n=n, delta=delta))[errors].min(1)
    assert (shared < 0.5).mean() <= delta
    assert (alone < 0.5).mean() > 2 * delta


def test_growth_is_sauers_sum_and_the_power_lies_above() -> None:
    for m, v in itertools.product((1, 2, 5, 30, 400), (0, 1, 3, 29, 500)):
        total, power = log_growth(m, dimension=v), log_growth(m, dimension=v, form="power")
        assert sauer(m, v) <= total <= sauer(m, v) * (1 + mp.mpf("1e-12")) + mp.mpf("1e-300")
        assert total <= power * (1 + 1e-15)
        assert power <= m * math.log(2) * (1 + 1e-14)
    assert log_growth(10**9, dimension=10**8) == log_growth(10**9, dimension=10**8, form="power")
    with pytest.raises(ValueError, match="'sum' or 'power'"):
        log_growth(3, dimension=1, form="both")


def test_sample_size_of_the_growth_function_at_n() -> None:
    # The real roots are 128,203.03 and 423,060.13.
    for v, n in ((3, 128_204), (11, 423_061)):
        assert vc_sample_size(epsilon=0.1, dimension=v, delta=0.05, growth="power") == n
        right = [8 * (mp.e * m / v) ** v * mp.exp(-mp.mpf(m) * mp.mpf(0.1) ** 2 / 32) for m in (n - 1, n)]
        assert right[0] > 0.05 >= right[1]
        assert vc_sample_size(epsilon=0.1, dimension=v, delta=0.05) < n
    assert vc_tail(epsilon=0.1, dimension=3, n=1000, growth="power") == pytest.approx(4.4e9, rel=0.02)


def test_refined_form_and_the_rule_of_thumb() -> None:
    # Without what the textbook leaves out: 1 / n and (n + 1) / n.
    root = vapnik_deviation(dimension=10, n=1000, delta=0.05, growth="power") - 1 / 1000
    refined = 2 * root * math.sqrt(1000 / 1001)
    assert refined == pytest.approx(0.519, abs=5e-4)
    assert vc_rule_of_thumb(dimension=10, n=1000, delta=0.05) == pytest.approx(0.303, abs=5e-4)
    assert vc_rule_of_thumb(dimension=1e8, n=50_000, delta=0.05) == pytest.approx(126.5, abs=0.05)
    # Below 2 n = V the printed radicand is negative; the bound says that it says nothing.
    v, n = 1e8, 5e4
    assert (v * (math.log(2 * n / v) + 1) + math.log(80)) / n == pytest.approx(-11_815, abs=1)
    assert 1 < vapnik_deviation(dimension=v, n=n, delta=0.05, growth="power") < 2
    assert vc_deviation(dimension=v, n=n, delta=0.05) > 1


def test_vc_bounds_cover_a_class_of_thresholds() -> None:
    # Thresholds on [0, 1] against a fair coin: the largest deviation of a cumulated sum.
    rng = np.random.default_rng(3)
    runs, n = 300, 400
    signs = rng.integers(0, 2, (runs, n)) - 0.5
    x = rng.uniform(size=(runs, n)).argsort(1)
    sums = np.cumsum(np.take_along_axis(signs, x, 1), 1)  # n (P(y = 1, x <= t) - P(y = 0, x <= t)) / 2, of mean 0
    worst = np.abs(np.concatenate([sums, sums[:, -1:] - sums], 1)).max(1) / n
    assert (worst > vc_deviation(dimension=2, n=n, delta=0.05)).mean() <= 0.05
    assert (worst > vapnik_deviation(dimension=2, n=n, delta=0.05)).mean() <= 0.05
    assert vapnik_deviation(dimension=2, n=n, delta=0.05) < vc_deviation(dimension=2, n=n, delta=0.05)


def test_dimensions_of_known_classes_by_brute_force() -> None:
    rng = np.random.default_rng(4)
    for d in (1, 2, 3):
        points = rng.standard_normal((d + 2, d))
        assert labellings(points[: d + 1], fits_halfspace) == 2 ** (d + 1)
        assert labellings(points, fits_halfspace) < 2 ** (d + 2)
        assert vc_dimension(points, fits_halfspace) == vc_dimensions.halfspaces(d) == d + 1
    assert vc_dimensions.halfspaces(3, bias=False) == 3
    cross = np.array([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0], [0.1, 0.2], [0.6, 0.6]])
    assert vc_dimension(cross, fits_rectangle) == vc_dimensions.rectangles() == 4
    for d in (2, 3):
        cube = np.array(list(itertools.product((0, 1), repeat=d)), dtype=float)
        assert vc_dimension(cube, fits_conjunction) == vc_dimensions.conjunctions(d) == d
    assert [vc_dimensions.finite_class(size) for size in (1, 2, 7, 8, 9)] == [0, 1, 2, 3, 3]


def test_sine_shatters_any_number_of_points() -> None:
    x = 10.0 ** -np.arange(1, 7)

    def fits(x: np.ndarray, y: np.ndarray) -> bool:
        frequency = math.pi * (1 + np.sum(~y / x))
        return bool(((np.sin(frequency * x) > 0) == y).all())

    assert labellings(x, lambda x, y: fits(x[:, 0], y)) == 2**6


def homogeneous(x: np.ndarray, y: np.ndarray) -> bool:
    rows = -np.where(y, 1.0, -1.0)[:, None] * x
    return linprog(np.zeros(x.shape[1]), A_ub=rows, b_ub=-np.ones(len(x)), bounds=(None, None)).status == 0


@pytest.mark.parametrize(("n", "d", "count"), [(3, 3, 8), (4, 2, 8), (5, 3, 22), (6, 3, 32), (8, 3, 58)])
def test_covers_count_is_that_of_linear_programs(n: int, d: int, count: int) -> None:
    assert cover_count(n, d) == count
    if n <= 6:
        assert labellings(np.random.default_rng(n).standard_normal((n, d)), homogeneous) == count


def test_covers_recurrence_and_capacity() -> None:
    assert all(
        cover_count(n + 1, d) == cover_count(n, d) + cover_count(n, d - 1) for n in range(1, 20) for d in range(2, 9)
    )
    assert all(cover_count(n, 7) == 2**n for n in range(1, 8))
    assert [cover_count(2 * d, d) / 2 ** (2 * d) for d in (1, 5, 50)] == [0.5] * 3
    # With d fixed the share falls to 0 while the count itself grows.
    assert [cover_count(n, 50) / 2**n for n in (80, 100, 120)] == pytest.approx([0.988, 0.5, 0.033], abs=5e-4)
    assert [cover_count(n, 5) for n in (5, 10, 20, 40)] == [32, 512, 10072, 184342]
    # Halfspaces with a bias: never more than Sauer's bound at V = d + 1.
    assert math.log(cover_count(30, 4)) < log_growth(30, dimension=4)


def test_relu_networks() -> None:
    low, high = vc_dimensions.relu_orders(parameters=1e6, layers=10)
    assert (low, high) == (pytest.approx(1.15e8, rel=2e-3), pytest.approx(1.38e8, rel=2e-3))
    # By hand: 2 inputs, 3 units, 1 output: W = 9 + 4, W_1 = 9, W_2 = 13, R = 3 + 2.
    r = 5
    by_hand = 2 + (9 + 13) * math.log2(4 * math.e * r * math.log2(2 * math.e * r))
    assert vc_dimensions.relu_network([2, 3, 1]) == math.floor(by_hand)
    assert vc_dimensions.relu_network([2, 3, 1]) >= 3  # it has the halfspaces
    wide, deep = vc_dimensions.relu_network([10, 200, 1]), vc_dimensions.relu_network([10, 20, 20, 20, 1])
    assert wide > 10 * 200
    assert deep > vc_dimensions.relu_network([10, 20, 20, 1]) > vc_dimensions.relu_network([10, 20, 1])
    with pytest.raises(CertificateError, match="number of units"):
        vc_dimensions.relu_network([2, 1])
    with pytest.raises(CertificateError, match="layers must be at most"):
        vc_dimensions.relu_orders(parameters=3, layers=4)


def test_every_name_is_there() -> None:
    assert all(hasattr(uniform, name) for name in uniform.__all__)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vc_rule_of_thumb(dimension=-1, n=10, delta=0.1), "dimension"),
        (lambda: vc_rule_of_thumb(dimension=1, n=0, delta=0.1), "n must be"),
        (lambda: vc_sample_size(epsilon=0.0, dimension=1, delta=0.1), "epsilon"),
        (lambda: vc_sample_size(epsilon=0.1, dimension=1, delta=1.0), "delta"),
        (lambda: finite_class_sample_size(log_size=1.0, epsilon=0.0, delta=0.1), "epsilon"),
        (lambda: consistent_sample_size(log_size=-1.0, epsilon=0.1, delta=0.1), "log_size"),
        (lambda: cover_count(0, 2), "n must be"),
        (lambda: vc_dimensions.halfspaces(0), "d must be"),
        (lambda: vc_dimensions.relu_network([2, 0, 5]), "widths"),
        (lambda: labellings(np.zeros((21, 1)), fits_halfspace), "at most 20"),
    ],
)
def test_domain_errors_name_the_argument(call: object, words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        call()  # type: ignore[operator]
