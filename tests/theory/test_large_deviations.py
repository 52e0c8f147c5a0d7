"""Rates of rare means, against closed forms and exact probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom, norm

from bayesdl.errors import DataError
from bayesdl.theory.large_deviations import rate_function


def test_rates_of_known_variables() -> None:
    """B5-01: Gaussian x^2 / 2, signs at 0.5, exponential x - 1 - log x on both sides of its mean."""
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(rate_function(lambda s: s.square() / 2, x), x.square() / 2)
    assert float(rate_function(lambda s: s.cosh().log(), 0.5)) == pytest.approx(0.1308, abs=1e-4)
    x = torch.tensor([0.2, 1.0, 2.5], dtype=torch.float64)
    exponential = rate_function(lambda s: -torch.log1p(-s), x)
    torch.testing.assert_close(exponential, x - 1 - x.log(), atol=1e-9, rtol=1e-9)
    with pytest.raises(DataError, match="range"):
        rate_function(lambda s: torch.logaddexp(s, -s) - math.log(2), 1.5)


def test_probabilities_fall_at_these_rates() -> None:
    """B5-01: -log P / n approaches the rate from above, for Gaussian means and for signs."""
    rates = [-norm.logsf(0.5 * math.sqrt(n)) / n for n in (50, 200, 1000)]
    assert rates == sorted(rates, reverse=True)
    assert rates == pytest.approx([0.170, 0.139, 0.129], abs=6e-3)
    assert -norm.logsf(0.5 * 200) / 40_000 == pytest.approx(0.125, abs=2e-4)
    n = 2000
    assert -binom.logsf(0.75 * n - 1, n, 0.5) / n == pytest.approx(0.1308, abs=3e-3)
