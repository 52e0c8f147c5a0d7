"""The bounds' formulas in mpmath at 50 digits, written from the papers and not from the package."""

from __future__ import annotations

from typing import Any

import mpmath as mp

mp.mp.dps = 50
log, sqrt, e = mp.log, mp.sqrt, mp.e


def kl(q: Any, p: Any) -> mp.mpf:
    """kl(q || p); floats are exact rationals here."""
    q, p = mp.mpf(q), mp.mpf(p)
    first = q * log(q / p) if q > 0 else mp.mpf(0)
    second = (1 - q) * (mp.log1p(-q) - mp.log1p(-p)) if q < 1 else mp.mpf(0)
    return first + second


def kl_upper(q: Any, bound: Any) -> mp.mpf:
    """The root p >= q of kl(q || p) = bound, by bisection."""
    low, high = mp.mpf(q), mp.mpf(1)
    for _ in range(130):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(q, middle) <= bound else (low, middle)
    return low


def binomial_tail(k: int, n: int, p: Any) -> mp.mpf:
    """P(Bin(n, p) <= k), summed downwards from its largest term until the terms no longer matter."""
    p = mp.mpf(p)
    term = mp.exp(mp.loggamma(n + 1) - mp.loggamma(k + 1) - mp.loggamma(n - k + 1) + k * log(p) + (n - k) * log(1 - p))
    total, ratio = mp.mpf(0), (1 - p) / p
    for j in range(k, -1, -1):
        total += term
        term *= j * ratio / (n - j + 1)
        if term < total * mp.mpf("1e-25"):
            break
    return total


def sauer(m: Any, v: Any) -> mp.mpf:
    """Log of the sum of binomials."""
    return log(sum(mp.binomial(int(m), i) for i in range(min(int(v), int(m)) + 1)))


def betting_capital(losses: Any, m: Any, delta: Any, upper: bool) -> mp.mpf:
    """Log capital of betting against the mean m, with the bets of the docstring through Lambert's W."""
    x = [mp.mpf(float(loss)) if upper else 1 - mp.mpf(float(loss)) for loss in losses]
    m = mp.mpf(m) if upper else 1 - mp.mpf(m)
    n, capital = len(x), mp.mpf(0)
    mean, variance, total, squares = mp.mpf("0.5"), mp.mpf("0.25"), mp.mpf("0.5"), mp.mpf("0.0625")
    for i, loss in enumerate(x, 1):
        v = log(1 / mp.mpf(delta)) * (1 - mean) ** 2 / (n * variance)
        bet = 1 + 1 / mp.lambertw(-mp.exp(-1 - v), -1).real
        capital += log(1 + bet * (m - loss) / (1 - m))
        total += loss
        mean = total / (i + 1)
        squares += (loss - mean) ** 2
        variance = squares / (i + mp.mpf("0.25"))
    return capital


def chernoff(risk: Any, n: Any, delta: Any) -> mp.mpf:
    return kl_upper(risk, log(1 / mp.mpf(delta)) / n)


# name: formula from exact numbers. What is cut at 1 is cut by the test.
FORMULAS = {
    "hoeffding": lambda risk, n, delta: risk + sqrt(log(1 / delta) / (2 * n)),
    "hoeffding_tail": lambda epsilon, n: 2 * mp.exp(-2 * n * epsilon**2),
    "chernoff_upper": chernoff,
    "bernstein": lambda risk, variance, n, delta: (
        risk + sqrt(2 * variance * log(1 / delta) / n) + log(1 / delta) / (3 * n)
    ),
    "empirical_bernstein": lambda risk, variance, n, delta: (
        risk + sqrt(2 * variance * log(2 / delta) / n) + 7 * log(2 / delta) / (3 * (n - 1))
    ),
    "finite_class_deviation": lambda log_size, n, delta: sqrt((log_size + log(2 / delta)) / (2 * n)),
    "finite_class_excess_risk": lambda log_size, n, delta: 2 * sqrt((log_size + log(2 / delta)) / (2 * n)),
    "occam": lambda risk, description, n, delta: kl_upper(risk, (description + log(1 / delta)) / n),
    "log_growth": lambda m, dimension: sauer(m, dimension),
    "vc_deviation": lambda dimension, n, delta: sqrt(8 * (sauer(2 * n, dimension) + log(4 / delta)) / n),
    "vapnik_deviation": lambda dimension, n, delta: (
        sqrt((n + 1) * (sauer(2 * n, dimension) + log(4 / delta))) / n + 1 / n
    ),
    "vc_tail": lambda epsilon, dimension, n: 8 * mp.exp(sauer(n, dimension) - n * epsilon**2 / 32),
    "massart": lambda log_size, n: sqrt(2 * log_size / n),
    "rademacher_bound": lambda risk, complexity, n, delta: risk + 2 * complexity + 3 * sqrt(log(2 / delta) / (2 * n)),
    "online_to_batch": lambda mistakes, n, delta: mistakes / n + sqrt(log(1 / delta) / (2 * n)),
    "margin_bound": lambda risk, radius, margin, n, delta: (
        risk + 2 * radius / (margin * sqrt(n)) + sqrt(log(1 / delta) / (2 * n))
    ),
}
