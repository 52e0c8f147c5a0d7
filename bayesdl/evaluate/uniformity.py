"""Are ranks uniform? Tests for ranks r in {0, ..., L}, as simulation-based calibration gives them."""

from __future__ import annotations

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
        bins: at most L + 1; by default as many, up to 20, as leave 25 ranks to each.

    Raises:
        DataError: fewer than 2 bins.
    """
    values = _checked(ranks, draws)
    count = bins or min(20, draws + 1, int(len(values) / EXPECTED))
    if not 2 <= count <= draws + 1:
        raise DataError(f"{len(values)} ranks of {draws} draws cannot be tested in {count} bins; 2 are the least.")
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
    strayed = _smallest_tail(values.numpy(), draws)
    return torch.from_numpy((_simulated_tails(len(values), draws, seed)[:, None] <= strayed).mean(0))


def band(count: int, draws: int, level: float = 0.95, seed: int = 0) -> tuple[Array, Array, Array]:
    """The simultaneous band of ``envelope`` for the ECDF of ``count`` uniform ranks.

    Returns:
        Points ``[L]`` in (0, 1), and the lowest and the highest ECDF there.
    """
    gamma = float(np.quantile(_simulated_tails(count, draws, seed), 1.0 - level))
    points = np.arange(1, draws + 1) / (draws + 1)
    law = stats.binom(count, points)
    return points, law.ppf(gamma / 2.0) / count, law.isf(gamma / 2.0) / count


def symmetry(ranks: Tensor, draws: int) -> Tensor:
    """p-values ``[Q]`` of the ranks ``[R, Q]`` being symmetric about their middle: unbiased, whatever the width.

    The two-sample Kolmogorov-Smirnov test between ranks and their mirror images, as variational simulation-based
    calibration asks (Yao, Vehtari, Simpson & Gelman, 2018, section 3.2); a variational posterior that is only too
    narrow passes.
    """
    values = _checked(ranks, draws).double().numpy()
    return torch.tensor([stats.ks_2samp(column, draws - column).pvalue for column in values.T], dtype=torch.float64)


def _checked(ranks: Tensor, draws: int) -> Tensor:
    if ranks.dim() != 2 or len(ranks) < 2 or int(ranks.min()) < 0 or int(ranks.max()) > draws:
        raise DataError(f"ranks are whole numbers [R, Q] from 0 to {draws}, R at least 2; got {tuple(ranks.shape)}.")
    return ranks


def _smallest_tail(ranks: NDArray[np.int64], draws: int) -> Array:
    """For every column the smallest two-sided tail of its ECDF's counts at 1/(L+1), ..., L/(L+1)."""
    count = len(ranks)
    points = np.arange(1, draws + 1) / (draws + 1)
    below = np.stack([np.bincount(column, minlength=draws + 1).cumsum()[:-1] for column in ranks.T], 1)
    low, high = stats.binom.cdf(below, count, points[:, None]), stats.binom.sf(below - 1, count, points[:, None])
    found: Array = np.minimum(1.0, 2.0 * np.minimum(low, high)).min(0)
    return found


def _simulated_tails(count: int, draws: int, seed: int) -> Array:
    stream = np.random.default_rng(_rng.derive_seed(seed, "uniform ranks"))
    return _smallest_tail(stream.integers(0, draws + 1, (count, SIMULATIONS)), draws)
