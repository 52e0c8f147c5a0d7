"""Tests of uniform ranks have the level that they claim, and find what they are for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bayesdl import _rng
from bayesdl.errors import DataError
from bayesdl.evaluate import uniformity
from bayesdl.evaluate.uniformity import band, chi_square, envelope, smooth, symmetry

DRAWS, RANKS, REPEATS = 99, 500, 200
TESTS = {"smooth": smooth, "envelope": envelope, "chi-square": chi_square, "symmetry": symmetry}
Test = Callable[[Tensor, int], Tensor]


def ranks(shift: float = 0.0, width: float = 1.0, draws: int = DRAWS, count: int = RANKS) -> Tensor:
    """Ranks ``[count, REPEATS]`` of N(0, 1) among draws of N(shift, width^2)."""
    stream = np.random.default_rng(_rng.derive_seed(0, "ranks", str((shift, width, draws, count))))
    level = stats.norm.cdf((stream.standard_normal((count, REPEATS)) - shift) / width)
    return torch.from_numpy(stream.binomial(draws, level))


@pytest.mark.parametrize("draws", [19, 99])
@pytest.mark.parametrize("test", TESTS.values(), ids=TESTS)
def test_p_values_of_uniform_ranks_are_uniform(test: Test, draws: int) -> None:
    p = test(ranks(draws=draws), draws).numpy()
    # Statistics of whole numbers step; where they do, p-values err to the safe side, and only there.
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3
    assert abs(float((p < 0.05).mean()) - 0.05) < 4 * (0.05 * 0.95 / REPEATS) ** 0.5
    assert abs(float(p.mean()) - 0.5) < 4 * (1 / 12 / REPEATS) ** 0.5 + 0.01


@pytest.mark.parametrize("test", TESTS.values(), ids=TESTS)
def test_levels_hold_for_few_replicates(test: Test) -> None:
    p = test(ranks(count=60), DRAWS)
    assert float((p < 0.05).double().mean()) < 0.05 + 4 * (0.05 * 0.95 / REPEATS) ** 0.5


@pytest.mark.parametrize(("shift", "width"), [(0.2, 1.0), (0.0, 0.85), (-0.2, 1.0), (0.0, 1.18)])
def test_a_planted_error_is_found(shift: float, width: float) -> None:
    planted = ranks(shift, width)
    power = {name: float((test(planted, DRAWS) < 0.05).double().mean()) for name, test in TESTS.items()}
    assert power["smooth"] > 0.92
    # Bins know no order: they miss several times as many.
    assert 1 - power["chi-square"] > 3 * (1 - power["smooth"])
    assert power["envelope"] > power["chi-square"]
    if shift:
        assert power["symmetry"] > 0.9
    else:
        assert abs(power["symmetry"] - 0.05) < 4 * (0.05 * 0.95 / REPEATS) ** 0.5


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_symmetry_does_not_look_at_the_width(width: float) -> None:
    p = symmetry(ranks(width=width), DRAWS).numpy()
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3
    assert abs(float((p < 0.05).mean()) - 0.05) < 4 * (0.05 * 0.95 / REPEATS) ** 0.5


def test_the_band_holds_the_ecdf_as_often_as_it_says() -> None:
    uniform = ranks().numpy()
    below = np.stack([np.bincount(column, minlength=DRAWS + 1).cumsum()[:-1] for column in uniform.T]) / RANKS
    for level in (0.8, 0.95):
        points, low, high = band(RANKS, DRAWS, level)
        inside = ((below >= low) & (below <= high)).all(1).mean()
        # both the band and its coverage are simulated
        error = (level * (1 - level) * (1 / REPEATS + 1 / uniformity.SIMULATIONS)) ** 0.5
        assert abs(inside - level) < 4 * error
        assert (low < points).all()
        assert (high > points).all()


def test_the_band_and_its_p_value_agree() -> None:
    some = ranks(0.05)
    _, low, high = band(RANKS, DRAWS)
    below = np.stack([np.bincount(column, minlength=DRAWS + 1).cumsum()[:-1] for column in some.numpy().T]) / RANKS
    inside = ((below >= low) & (below <= high)).all(1)
    assert (inside == (envelope(some, DRAWS).numpy() > 0.05)).mean() > 0.97


def test_polynomials_of_the_smooth_test_against_its_definition() -> None:
    # One rank repeated: the statistic is R times the sum of squared orthonormal polynomials there (Legendre's, nearly).
    found = smooth(torch.full((5, 1), 40), 4000)
    at = 2 * 40.5 / 4001 - 1
    legendre = [np.polynomial.legendre.Legendre.basis(k)(at) * (2 * k + 1) ** 0.5 for k in range(1, 5)]
    assert float(found) == pytest.approx(stats.chi2.sf(5 * sum(h**2 for h in legendre), 4), rel=0.02)


def test_bins_of_unequal_sizes() -> None:
    # 10 values in 4 bins of 3, 2, 3, 2: ranks in proportion are perfectly uniform, equal counts are not.
    assert float(chi_square(torch.arange(10).repeat(30)[:, None], 9, bins=4)) == pytest.approx(1.0)
    assert float(chi_square(torch.tensor([0, 3, 5, 8]).repeat(75)[:, None], 9, bins=4)) < 0.01


def test_what_is_no_rank_is_refused() -> None:
    for wrong in (torch.tensor([[0], [10]]), torch.tensor([[-1], [3]]), torch.tensor([1, 2]), torch.tensor([[1]])):
        with pytest.raises(DataError, match=r"whole numbers \[R, Q\] from 0 to 9"):
            smooth(wrong, 9)
    with pytest.raises(DataError, match="Ranks among 3 draws"):
        smooth(torch.tensor([[0], [3]]), 3)
    with pytest.raises(DataError, match="cannot be tested in 12 bins: from 2 to 10"):
        chi_square(torch.zeros(5, 1, dtype=torch.int64), 9, bins=12)
