"""Which chains disagree with the others?

R-hat is one number for all chains. Here every chain is compared with the pooled rest, quantity by quantity, in normal
scores of ranks (of the draws and of their distances from the median, so that a chain of another width is seen as well).
With m_c a chain's mean score, m_{-c} that of the other chains, and s^2 the median of the chains' own variances,

    d_c^2 = (m_c - m_{-c})^2 / s^2.

A chain is *apart* where d_c^2 exceeds both ``LIMIT**2 - 1`` (chains that far from each other would have R-hat = LIMIT)
and what chance explains, given how slowly the chains move where they are; one that never moved at all is apart too.
The chain that is furthest apart is taken out, and the rest compared anew, until the rest agree: one stuck chain must
not make its neighbours look wrong. A chain is *moving* where the means of its two halves differ likewise. Where R-hat
is large and no chain is apart or moving, all of them are too slow for their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from torch import Tensor

from bayesdl.posterior.autocorrelation import Array, effective_size
from bayesdl.posterior.convergence import bulk_and_folded_scores

LIMIT = 1.05
"""R-hat from which on chains have not mixed."""
CHANCE = 1e-3
"""How often perfect chains may be blamed, over all chains and quantities together."""
CELLS = 2**22
"""Draws times quantities that are compared; of more, evenly spaced ones."""
QUANTITIES = 64
"""The worst quantities, for which chance is weighed."""
MARGIN = 2.0
"""Factor on what chance explains, because it is itself estimated from the chains."""


@dataclass(frozen=True)
class Agreement:
    """What the comparison of chains with each other found.

    Attributes:
        apart: chains that sit elsewhere than the rest; empty where no more than half of the chains agree.
        moving: chains whose second half lies elsewhere than their first.
        agreeing: size of the largest group of chains found that agree.
    """

    apart: tuple[int, ...]
    moving: tuple[int, ...]
    agreeing: int


def agreement(x: Tensor) -> Agreement:
    """Compare every chain of ``x [C, S, P]`` (S >= 4) with the others, in O(P C S log(C S) + P C^2)."""
    chains, draws, _ = x.shape
    values = x.detach().to("cpu").double()
    values = values[..., values.isfinite().all(0).all(0) & (values != values[:1, :1]).any(0).any(0)]
    if values.shape[2] == 0:
        return Agreement((), (), chains)
    most = max(1, CELLS // (chains * draws))
    if values.shape[2] > most:
        values = values[..., torch.linspace(0, values.shape[2] - 1, most, dtype=torch.float64).round().long()]
    columns = values.permute(2, 0, 1).contiguous().numpy()
    half = draws // 2
    halves = np.stack([columns[:, :, :half], columns[:, :, -half:]], axis=2).reshape(len(columns), 2 * chains, half)
    scores = np.concatenate(bulk_and_folded_scores(halves))
    shape = len(scores), chains, 2
    half_means = scores.mean(2).reshape(shape)
    variance = np.median(scores.var(2, ddof=1).reshape(shape).mean(2), axis=1)
    # Below this, a spread of scores is rounding: most chains stand still, and any difference is a difference.
    variance = np.maximum(variance, 1e-12)[:, None]
    means = half_means.mean(2)
    drift = np.diff(half_means, axis=2)[:, :, 0] ** 2 / variance
    moved = (columns != columns[:, :, :1]).any((0, 2))
    suspicious = np.maximum((_distances(means, moved) / variance).max(1), drift.max(1) / 2)
    worst = np.argsort(-suspicious)[:QUANTITIES]
    worst = worst[suspicious[worst] > LIMIT**2 - 1]
    if len(worst) == 0:
        return _named(moved, ())
    by_chance = MARGIN * chi2.isf(CHANCE / (len(scores) * chains), 1) * _noise(scores[worst], drift[worst])[:, None]
    still = drift[worst] / 2 <= np.maximum(LIMIT**2 - 1, by_chance)
    # A chain's mean has half the variance of a half's; that of the rest adds its share.
    allowed = np.maximum(LIMIT**2 - 1, by_chance / 2 * chains / max(chains - 1, 1))
    kept = _agreeing(means[worst] / np.sqrt(variance[worst]), allowed, moved)
    return _named(kept, np.flatnonzero(~still.all(0)).tolist())


def _named(kept: NDArray[np.bool_], moving: Sequence[int]) -> Agreement:
    agreeing = int(kept.sum())
    apart = np.flatnonzero(~kept).tolist() if 2 * agreeing > len(kept) else ()
    return Agreement(tuple(apart), tuple(moving), agreeing)


def _noise(scores: Array, drift: Array) -> Array:
    """Variance of the mean of half a chain, in units of the variance of its draws; ``[P, 2C, n] -> [P]``.

    The larger of two estimates that a minority of bad chains cannot spoil: from the median effective size of the halves
    by themselves, and from the median distance between the halves of a chain.
    """
    columns, halves, n = scores.shape
    each = effective_size(scores.reshape(columns * halves, 1, n), between=False).reshape(columns, halves)
    found = np.minimum(np.median(each, axis=1), n)
    found = np.minimum(found, np.median(found))  # the worst quantities are also those with the luckiest estimates
    # Subtracting a half's own mean lowers its autocovariances: for slow chains E found = e (e - 1) / (e - 3), about.
    e = (1 + found + np.sqrt(np.maximum((1 + found) ** 2 - 12 * found, 0.0))) / 2
    if halves < 8:
        return 1 / e
    return np.maximum(1 / e, np.median(drift, axis=1) / 2 / chi2.median(1))


def _distances(means: Array, kept: NDArray[np.bool_]) -> Array:
    """Squared distance of every chain's mean ``[P, C]`` from that of the other kept chains."""
    count = kept.sum() - kept
    others = (means[:, kept].sum(1, keepdims=True) - np.where(kept, means, 0.0)) / np.maximum(count, 1)
    distances: Array = np.where(count > 0, (means - others) ** 2, 0.0)
    return distances


def _agreeing(means: Array, allowed: Array, moved: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the chains that move remain when the furthest is taken out until the rest agree, ``[C]``."""
    kept = moved.copy()
    while kept.sum() > 1:
        excess = np.where(kept, _distances(means, kept) / allowed, 0.0)
        if not (excess > 1).any():
            break
        kept[np.argmax(np.where(excess > 1, excess, 0.0).sum(0))] = False
    for chain in np.flatnonzero(moved & ~kept):  # one that was taken out while worse ones still drew the mean away
        if bool((_distances(means, kept)[:, [chain]] <= allowed).all()):
            kept[chain] = True
    return kept
