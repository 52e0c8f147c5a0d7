"""Autocovariances of chains, and the number of independent draws that they are worth.

Arrays are ``[d, C, S]``: d quantities, C chains of S draws, the draws side by side in memory, in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Array = NDArray[np.float64]


def autocovariance(x: Array) -> Array:
    """Biased autocovariances (divisor S) at lags 0 to S - 1, averaged over chains; ``[d, C, S] -> [d, S]``.

    By the Fourier transform of every chain about its own mean, in O(C S log S); the power spectra are averaged before
    the way back, which is linear.
    """
    n = x.shape[-1]
    padded = fft.next_fast_len(2 * n, real=True)
    spectrum = fft.rfft(x - x.mean(-1, keepdims=True), n=padded, axis=-1)
    power = (spectrum.real**2 + spectrum.imag**2).mean(-2)
    covariance: Array = fft.irfft(power, n=padded, axis=-1)[..., :n] / n
    return covariance


def effective_size(x: Array, *, between: bool = True) -> Array:
    """Effective sample size by Geyer's initial monotone sequence (Vehtari et al., 2021, eq. 10-13).

    The autocorrelation time is tau = -1 + 2 sum_k P_k over the pairs P_k = rho_{2k} + rho_{2k+1}, cut where a pair
    turns negative and made non-increasing; the first autocorrelation after the cut is added once if it is positive.
    ess = C S / tau, and tau is at least 1 / log10(C S).

    Args:
        x: Draws ``[d, C, S]``, S >= 2.
        between: Whether the variance is that of all draws, so that chains which disagree are worth little; else the
            variance within chains, so that the result tells how fast each chain moves where it is.

    Returns:
        ``[d]``; the number of draws itself for a quantity that never changes.
    """
    columns, chains, n = x.shape
    size = chains * n
    still = x.max((1, 2)) == x.min((1, 2))
    covariance = autocovariance(x)
    within = covariance[:, 0] * n / (n - 1)
    total = covariance[:, 0] + x.mean(2).var(1, ddof=1) if between and chains > 1 else covariance[:, 0]
    if not between:
        still = still | (within == 0)
    scale = np.where(still, 1.0, total)
    base = within if between else scale
    rho = 1 - (base[:, None] - covariance) / scale[:, None]
    rho[:, 0] = 1.0
    last = max((n - 3) // 2, 0)
    pairs = rho[:, : 2 * last + 2].reshape(columns, last + 1, 2)
    sums = pairs.sum(2)
    # Index of the first pair that is not positive, or of the last one there is.
    cut = np.minimum(np.cumprod(sums > 0, axis=1).sum(1), last)
    before = np.arange(last + 1) < cut[:, None]
    row = np.arange(columns)
    edge = np.where((pairs[row, cut, 0] > 0) | (sums[row, cut] >= 0), pairs[row, cut, 0], 0.0)
    tau = -1 + 2 * np.where(before, np.minimum.accumulate(sums, axis=1), 0.0).sum(1) + edge
    return np.where(still, float(size), size / np.maximum(tau, 1 / math.log10(size)))
