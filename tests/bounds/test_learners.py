"""Perceptron, Rademacher complexity and conjunctions: small problems solved exactly, and learners in simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bayesdl.bounds.uniform import (
    MonotoneConjunction,
    conjunction_sample_size,
    consistent_sample_size,
    empirical_rademacher,
    linear_rademacher,
    margin_bound,
    massart,
    mistake_bound,
    online_to_batch,
    run_perceptron,
)
from bayesdl.errors import CertificateError

LOG_SIZE = 1000 * math.log(2)


def separable(rng: np.random.Generator, n: int, d: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the unit ball with at least this margin around a random hyperplane through the origin."""
    u = rng.standard_normal(d)
    u /= np.linalg.norm(u)
    x = rng.standard_normal((20 * n, d))
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1.0)
    x = x[np.abs(x @ u) >= margin][:n]
    return x, np.sign(x @ u)


def test_perceptron_never_makes_more_mistakes_than_the_bound() -> None:
    rng = np.random.default_rng(5)
    for margin in (0.5, 0.2, 0.05):
        for _ in range(5):
            x, y = separable(rng, 60, 3, margin)
            run = run_perceptron(x, y, max_passes=2000)
            radius = float(np.linalg.norm(x, axis=1).max())
            assert run.separated
            assert (y * (x @ run.weights) > 0).all()
            assert 0 < run.mistakes <= mistake_bound(radius=radius, margin=margin)
            assert run.mistaken.sum() <= run.mistakes
    # Attained: n orthogonal rows have the margin 1 / sqrt(n), and every one is a mistake (a tie counts).
    assert run_perceptron(np.eye(9), np.ones(9)).mistakes == 9 == mistake_bound(radius=1.0, margin=1 / 3)
    assert mistake_bound(radius=3.0, margin=2.0) == 2  # the floor


def test_mistakes_of_one_pass_bound_the_risk() -> None:
    rng = np.random.default_rng(6)
    margin, n, runs, delta = 0.1, 100, 40, 0.2
    gaps, risks, rates = [], [], []
    for _ in range(runs):
        x, y = separable(rng, 4 * n, 3, margin)
        run = run_perceptron(x[:n], y[:n])
        w, risk = np.zeros(3), []
        for row, mistaken in zip(x[:n] * y[:n, None], run.mistaken, strict=True):
            risk.append(np.mean(y[n:] * (x[n:] @ w) <= 0))
            w = w + row * mistaken
        risks.append(np.mean(risk))
        rates.append(run.mistakes / n)
        gaps.append(online_to_batch(mistakes=run.mistakes, n=n, delta=delta) - risks[-1])
    assert np.mean(np.array(gaps) < 0) <= delta
    error = np.std(np.array(risks) - rates) / math.sqrt(runs)
    assert np.mean(risks) == pytest.approx(np.mean(rates), abs=4 * error)  # equal in the mean
    assert np.mean(risks) <= 1 / margin**2 / n
    assert margin_bound(risk=0.0, radius=1.0, margin=0.1, n=10**6, delta=0.05) < 0.025


def test_perceptron_refuses_bad_rows() -> None:
    for x, y, words in [
        ([[1.0], [2.0]], [1.0, 0.0], "y must be -1 or 1"),
        ([[1.0], [math.inf]], [1.0, -1.0], "x must be finite"),
        ([[1.0], [2.0]], [1.0], "got"),
        ([1.0, 2.0], [1.0, 1.0], "got"),
    ]:
        with pytest.raises(CertificateError, match=words):
            run_perceptron(x, y)
    assert not run_perceptron([[1.0], [1.0]], [1.0, -1.0], max_passes=3).separated
    with pytest.raises(CertificateError, match="margin must be positive and at most the radius"):
        mistake_bound(radius=1.0, margin=1.1)


def test_rademacher_complexity_by_monte_carlo_against_all_signs() -> None:
    rng = np.random.default_rng(7)
    n, f = 10, rng.uniform(-1, 1, (6, 10))
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
    exact = (signs @ f.T).max(1).mean() / n
    found = [
        empirical_rademacher(lambda s: (s @ f.T).max(-1), n=n, draws=200, delta=0.2, seed=seed) for seed in range(100)
    ]
    assert np.mean([result.upper < exact for result in found]) <= 0.2
    spread = np.std([result.estimate for result in found])
    assert np.mean([result.estimate for result in found]) == pytest.approx(exact, abs=0.4 * spread)
    assert exact <= massart(log_size=math.log(6), n=n)
    again = empirical_rademacher(lambda s: (s @ f.T).max(-1), n=n, draws=200, delta=0.2, seed=3)
    assert again == found[3]
    assert found[3].upper - found[3].estimate == pytest.approx(math.sqrt(2 * math.log(5) / 2000), rel=1e-9)


def test_rademacher_complexity_of_linear_functions() -> None:
    x = np.random.default_rng(8).standard_normal((50, 3))
    x /= 2 * np.linalg.norm(x, axis=1).max()
    result = empirical_rademacher(lambda s: 2 * np.linalg.norm(s @ x, axis=-1), n=50)
    bound = linear_rademacher(x, norm=2.0)
    assert bound / math.sqrt(2) < result.estimate < bound
    assert bound == pytest.approx(2 * math.sqrt((x**2).sum()) / 50, rel=1e-13)
    # A class that is shattered fits all signs.
    everything = empirical_rademacher(lambda s: np.abs(s).sum(-1), n=50, draws=3)
    assert everything.estimate == 1.0


def test_rademacher_refuses_what_is_no_supremum() -> None:
    for supremum, words in [
        (lambda s: s, "one number for each"),
        (lambda s: s.sum(-1) * math.nan, "supremum is NaN"),
        (lambda s: np.full(len(s), 6.0), "within n of zero"),
    ]:
        with pytest.raises(CertificateError, match=words):
            empirical_rademacher(supremum, n=5, draws=4)
    with pytest.raises(CertificateError, match="delta"):
        empirical_rademacher(lambda s: s.max(-1), n=5, delta=0.0)
    with pytest.raises(CertificateError, match=r"x must be \[n, d\]"):
        linear_rademacher([1.0, 2.0])


def test_conjunction_of_the_book() -> None:
    c = MonotoneConjunction(np.array([True, False, True, True, False]))  # x1 and x3 and x4
    assert c([[1, 0, 0, 1, 1], [1, 1, 1, 1, 0]]).tolist() == [False, True]
    assert conjunction_sample_size(d=8, epsilon=0.1, delta=0.1) == 351
    assert consistent_sample_size(log_size=8 * math.log(2), epsilon=0.1, delta=0.1) == 79


def test_elimination_is_probably_approximately_correct() -> None:
    rng = np.random.default_rng(9)
    d, epsilon, delta, runs = 8, 0.1, 0.1, 300
    cube = np.array(list(itertools.product((0, 1), repeat=d)))
    failures = {351: 0, 20: 0}
    for _ in range(runs):
        truth = MonotoneConjunction(rng.uniform(size=d) < 0.3)
        p = rng.uniform(0.5, 1, d)  # each variable is one with its own probability
        weight = np.prod(np.where(cube, p, 1 - p), 1)
        for n in failures:
            x = rng.uniform(size=(n, d)) < p
            learnt = MonotoneConjunction.learn(x, truth(x))
            assert (learnt(x) == truth(x)).all()
            wrong = learnt(cube) != truth(cube)
            assert not (wrong & learnt(cube)).any()  # no false positives on any row
            failures[n] += weight[wrong].sum() > epsilon
    assert failures[351] <= delta * runs
    assert failures[20] > delta * runs  # the check can fail: 20 rows are too few


def test_learner_refuses_labels_that_no_conjunction_gives() -> None:
    with pytest.raises(CertificateError, match="no monotone conjunction"):
        MonotoneConjunction.learn([[1, 0], [1, 1]], [1, 0])
    with pytest.raises(CertificateError, match="x must be 0 or 1"):
        MonotoneConjunction.learn([[2, 0], [1, 1]], [1, 0])
    with pytest.raises(CertificateError, match="got"):
        MonotoneConjunction.learn([[1, 0], [1, 1]], [1])
    with pytest.raises(CertificateError, match="epsilon must be in"):
        conjunction_sample_size(d=8, epsilon=1.5, delta=0.1)
