"""Are ranks uniform? Tests for ranks r in {0, ..., L}, as simulation-based calibration gives them."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from bayesdl import _rng
from bayesdl.errors import DataError

Array = NDArray[np.float64]

DEGREE = 4
"""Polynomials of the smooth test: shift, spread, skewness, tails."""
SIMULATIONS = 2000
"""Uniform samples behind an envelope and its p-value."""
EXPECTED = 25.0
"""Ranks that a bin of the chi-square test is to hold."""


def smooth(ranks: Tensor, draws: int) -> Tensor:
    """p-values ``[Q]`` of Neyman's smooth test of ranks ``[R, Q]``.

    The statistic ``sum_k (R^-1/2 sum_r h_k(rank_r))^2``, with h_1 ... h_4 the polynomials that are orthonormal under
    the uniform law on {0, ..., L}, is chi-square with 4 degrees of freedom if the ranks are uniform (Neyman, 1937). Its
    first two parts see a posterior that is shifted, and one that is too wide or too narrow: the usual defects, against
    which it has several times the power of counting in bins.
    """
    values = _checked(ranks, draws).double()
    grid = torch.linspace(-1.0, 1.0, draws + 1, dtype=torch.float64)
    powers = torch.stack([grid**k for k in range(DEGREE + 1)], 1)
    basis = torch.linalg.qr(powers)[0] * math.sqrt(draws + 1)
    parts = basis[values.long(), 1:].sum(0) / math.sqrt(len(values))
    return torch.from_numpy(np.asarray(stats.chi2.sf(parts.square().sum(1).numpy(), DEGREE)))


def chi_square(ranks: Tensor, draws: int, bins: int | None = None) -> Tensor:
    """p-values ``[Q]`` of the chi-square test of ranks ``[R, Q]`` in equal bins.

    Args:
        ranks: whole numbers from 0 to ``draws``.
        draws: L.
        bins: from 2 to L + 1; by default as many, up to 20, as leave 25 ranks to each.

    Raises:
        DataError: fewer than 2 bins, or more than L + 1.
    """
    values = _checked(ranks, draws)
    count = bins or max(2, min(20, draws + 1, int(len(values) / EXPECTED)))
    if not 2 <= count <= draws + 1:
        raise DataError(f"Ranks among {draws} draws cannot be tested in {count} bins: from 2 to {draws + 1}.")
    cell = (values * count) // (draws + 1)
    seen = torch.stack([(cell == k).sum(0) for k in range(count)]).double()
    # Bins hold numbers of ranks that differ by one where L + 1 is no multiple of them.
    share = torch.bincount((torch.arange(draws + 1) * count) // (draws + 1), minlength=count).double() / (draws + 1)
    expected = share[:, None] * len(values)
    statistic = ((seen - expected).square() / expected).sum(0)
    return torch.from_numpy(np.asarray(stats.chi2.sf(statistic.numpy(), count - 1)))


def envelope(ranks: Tensor, draws: int, seed: int = 0) -> Tensor:
    """p-values ``[Q]`` of the ECDFs of ranks ``[R, Q]``: how often a uniform sample strays as far somewhere.

    How far an ECDF strays at a point is the two-sided binomial tail of its count there; the test statistic is the
    smallest over all points, and its law is simulated (Säilynoja, Bürkner & Vehtari, 2022).
    """
    values = _checked(ranks, draws)
    strayed = _smallest_tail(values.cpu().numpy(), draws)
    return _share(_simulated_tails(len(values), draws, seed)[:, None] <= strayed)


def band(count: int, draws: int, level: float = 0.95, seed: int = 0) -> tuple[Array, Array, Array]:
    """The simultaneous band of ``envelope`` for the ECDF of ``count`` uniform ranks.

    Returns:
        Points ``[L]`` in (0, 1), and the lowest and the highest ECDF there.
    """
    gamma = float(np.quantile(_simulated_tails(count, draws, seed), 1.0 - level))
    points = np.arange(1, draws + 1) / (draws + 1)
    law = stats.binom(count, points)
    return points, law.ppf(gamma / 2.0) / count, law.isf(gamma / 2.0) / count


def symmetry(ranks: Tensor, draws: int, seed: int = 0) -> Tensor:
    """p-values ``[Q]`` of the ranks ``[R, Q]`` being symmetric about their middle: unbiased, whatever the width.

    The Kolmogorov-Smirnov distance between ranks and their mirror images, as variational simulation-based calibration
    asks (Yao, Vehtari, Simpson & Gelman, 2018, section 3.2); a variational posterior that is only too narrow passes.
    The two samples are one sample twice, so the two-sample test would reject twice too often; given how far the ranks
    are from the middle, their sides are fair coins under symmetry (Butler, 1969), which is what is simulated here.
    """
    values = _checked(ranks, draws).cpu().numpy()
    stream = np.random.default_rng(_rng.derive_seed(seed, "sides"))
    found = []
    for column in values.T:
        at = np.bincount(column, minlength=draws + 1)
        # Ranks at the ends first, those next to the middle last; a rank in the very middle has no side.
        low, high = at[: (draws + 1) // 2], at[::-1][: (draws + 1) // 2]
        distance = np.abs(np.cumsum(low - high)).max()
        coins = 2 * stream.binomial(low + high, 0.5, (SIMULATIONS, len(low))) - (low + high)
        found.append(_share(np.abs(np.cumsum(coins, 1)).max(1) >= distance))
    return torch.stack(found)


def _checked(ranks: Tensor, draws: int) -> Tensor:
    if draws < DEGREE:
        raise DataError(f"Ranks among {draws} draws say too little; {DEGREE} draws are the least.")
    if ranks.dim() != 2 or len(ranks) < 2 or int(ranks.min()) < 0 or int(ranks.max()) > draws:
        raise DataError(f"ranks are whole numbers [R, Q] from 0 to {draws}, R at least 2; got {tuple(ranks.shape)}.")
    return ranks


def _share(at_least: NDArray[np.bool_]) -> Tensor:
    """p-value from simulations ``[n, ...]``, the sample itself counted among them: never 0, never too small."""
    return torch.from_numpy(np.asarray((1.0 + at_least.sum(0)) / (1.0 + len(at_least))))


def _smallest_tail(ranks: NDArray[np.int64], draws: int) -> Array:
    """For every column the smallest two-sided tail of its ECDF's counts at 1/(L+1), ..., L/(L+1)."""
    below = np.stack([np.bincount(column, minlength=draws + 1).cumsum()[:-1] for column in ranks.T], 1)
    found: Array = np.take_along_axis(_tails(len(ranks), draws), below, 1).min(0)
    return found


@functools.lru_cache(4)
def _tails(count: int, draws: int) -> Array:
    """Two-sided tails ``[L, R + 1]`` of every count at every point."""
    law = stats.binom(count, (np.arange(1, draws + 1) / (draws + 1))[:, None])
    counts = np.arange(count + 1)
    found: Array = np.minimum(1.0, 2.0 * np.minimum(law.cdf(counts), law.sf(counts - 1)))
    return found


@functools.lru_cache(4)
def _simulated_tails(count: int, draws: int, seed: int) -> Array:
    stream = np.random.default_rng(_rng.derive_seed(seed, "uniform ranks"))
    return _smallest_tail(stream.integers(0, draws + 1, (count, SIMULATIONS)), draws)
