"""Has the sampler converged, and how many independent draws is the chain worth?

Rank-normalised split R-hat and effective sample sizes after Vehtari, Gelman, Simpson, Carpenter & Buerkner,
"Rank-normalization, folding, and localization: an improved R-hat for assessing convergence of MCMC",
Bayesian Analysis 16 (2021); nested R-hat after Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman,
"Nested R-hat: assessing the convergence of Markov chain Monte Carlo when running many short chains", Bayesian Analysis
(2024); and the Bayesian fraction of missing information after Betancourt (2016).

Every function takes draws ``x [C, S, ...]`` (C chains of S draws) and returns one number per trailing entry ``[...]``
in float64. A quantity that never changes has R-hat 1 and as many effective draws as there are draws; one that is
constant within each chain but differs between chains has R-hat infinity. Entries with a NaN or infinite draw give NaN.
Each costs a sort or a Fourier transform of the draws, O(C S log(C S)) an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import beta, chi2
from torch import Tensor

from bayesdl.errors import DataError
from bayesdl.posterior.autocorrelation import Array, effective_size

_BLOCK = 2**23  # draws handled at a time: bounds the memory of the Fourier transform
_ONE_SD = 0.15865525393145707, 0.8413447460685429  # the normal law's probabilities at -1 and +1


def rhat(x: Tensor) -> Tensor:
    """Rank-normalised split R-hat: the larger of the bulk's and the folded draws' (eq. 14 there).

    sqrt(var+ / W) of the normal scores of the ranks, every chain cut in halves, so that one chain is enough.

    Args:
        x: Draws ``[C, S, ...]``, S >= 4.

    Returns:
        ``[...]``, about 1 at convergence; above 1.01 (1.05 for a quick look) is a reason to run longer.

    Raises:
        DataError: Fewer than 4 draws a chain.
    """
    return _by_column(x, lambda v: _rhat(split(v)))


def nested_rhat(x: Tensor, superchains: int | Sequence[int], *, ranks: bool = True) -> Tensor:
    r"""Nested R-hat of many short chains: do groups of chains that started together forget where?

    K superchains of M chains each, the chains of one superchain with the same starting point:
    sqrt(1 + B / W), with B the variance of the superchains' means, and W the mean over superchains of (variance of its
    chains' means + mean variance within its chains) (Margossian et al., eq. 8-10). A single draw a chain is enough,
    if M > 1; with one chain a superchain (M = 1) the statistic is R-hat without splitting.

    Stationary chains whose draws are independent have E B = W' / (M S), so that even perfect chains of one draw give
    about sqrt(1 + 1/M): compare with ``nested_limit``.

    Args:
        x: Draws ``[C, S, ...]``, S >= 1.
        superchains: Their number K, for chains in order (the first C/K are the first superchain), or the label of
            every chain's superchain ``[C]``, each used M times.
        ranks: Whether to take the normal scores of ranks, and the larger of bulk and folded draws, as ``rhat`` does;
            else the plain statistic of the paper.

    Returns:
        ``[...]``.

    Raises:
        DataError: Fewer than two superchains, of different sizes, or of one chain of one draw.
    """
    order, k = _superchains(superchains, x.shape[0])
    if x.shape[1] * (x.shape[0] // k) < 2:
        raise DataError("nested R-hat needs two chains a superchain, or two draws a chain.")

    def statistic(v: Array) -> Array:
        if not ranks:
            return _nested(v[:, order], k)
        scores = _normal_scores(v), _normal_scores(_folded(v))
        return np.maximum(*(_nested(score[:, order], k) for score in scores))

    return _by_column(x, statistic, least=1)


def nested_limit(chains: int, tolerance: float = 0.02, *, superchains: int | None = None) -> float:
    """Below which nested R-hat speaks for convergence: sqrt(1 + 1/M + tolerance) (Margossian et al., section 3).

    Args:
        chains: M, the chains of one superchain.
        tolerance: Squared bias that is let pass, in units of the posterior variance; 0.02 corresponds to the usual
            R-hat < 1.01.
        superchains: K; if given, 1/M, which is the mean for a single draw a chain, gives way to what independent draws
            exceed once in 10,000 quantities, chi^2_{K-1} / ((K - 1) M), because the worst of many is compared with it.
    """
    chance = 1.0 if superchains is None else float(chi2.isf(1e-4, superchains - 1)) / (superchains - 1)
    return math.sqrt(1 + chance / chains + tolerance)


def ess_bulk(x: Tensor) -> Tensor:
    """Effective sample size of the rank-normalised draws ``[C, S, ...] -> [...]``: how well the centre is known."""
    return _by_column(x, lambda v: effective_size(_normal_scores(split(v))))


def ess_mean(x: Tensor) -> Tensor:
    """Effective sample size for the mean ``[C, S, ...] -> [...]``: var(mean) = var(x) / ess."""
    return _by_column(x, lambda v: effective_size(split(v)))


def ess_sd(x: Tensor) -> Tensor:
    """Effective sample size for the standard deviation: that of the mean of (x - mean)^2; ``[C, S, ...] -> [...]``."""
    return _by_column(x, lambda v: effective_size(split(_squares(v))))


def ess_quantile(x: Tensor, q: float) -> Tensor:
    """Effective sample size for the q-quantile ``[C, S, ...] -> [...]``: that of the indicator x <= quantile."""
    _check_level(q)
    return _by_column(x, lambda v: _ess_below(v, _ordered(v), q))


def ess_tail(x: Tensor) -> Tensor:
    """The smaller of the effective sample sizes for the 5% and the 95% quantile ``[C, S, ...] -> [...]``."""
    return _by_column(x, _ess_tail)


def mcse_mean(x: Tensor) -> Tensor:
    """Monte-Carlo standard error of the mean, sd(x) / sqrt(ess_mean(x)) ``[C, S, ...] -> [...]``."""
    return _by_column(x, lambda v: v.std((1, 2), ddof=1) / np.sqrt(effective_size(split(v))))


def mcse_sd(x: Tensor) -> Tensor:
    """Monte-Carlo standard error of the standard deviation ``[C, S, ...] -> [...]``.

    By the delta method, sqrt(Var((x - mean)^2) / ess_sd) / (2 sd): no normal law is assumed.
    """

    def statistic(v: Array) -> Array:
        squares = _squares(v)
        variance, spread = squares.mean((1, 2)), squares.var((1, 2))
        scale = np.where(variance > 0, variance, 1.0)
        return np.sqrt(spread / effective_size(split(squares)) / scale) / 2

    return _by_column(x, statistic)


def mcse_quantile(x: Tensor, q: float) -> Tensor:
    """Monte-Carlo standard error of the q-quantile ``[C, S, ...] -> [...]`` (Vehtari et al., section 4.4).

    Half the distance between the draws whose ranks are one standard deviation below and above, from the beta law
    Beta(ess q + 1, ess (1 - q) + 1) of the level that the empirical quantile reaches.
    """
    _check_level(q)

    def statistic(v: Array) -> Array:
        ordered = _ordered(v)
        ess, n = _ess_below(v, ordered, q), ordered.shape[1]
        low, high = (beta.ppf(p, ess * q + 1, ess * (1 - q) + 1) * n - 1 for p in _ONE_SD)
        first = np.floor(np.maximum(low, 0)).astype(int)
        last = np.ceil(np.minimum(high, n - 1)).astype(int)
        row = np.arange(len(ordered))
        return (ordered[row, last] - ordered[row, first]) / 2

    return _by_column(x, statistic)


def ebfmi(energy: Tensor) -> Tensor:
    """Energy Bayesian fraction of missing information, E[(E_t - E_{t-1})^2] / Var(E), of every chain.

    Below about 0.3 the momentum's refreshment moves too little of the energy, and tails are explored slowly.

    Args:
        energy: Value of the Hamiltonian at every draw, ``[C, S]``.

    Returns:
        ``[C]``; NaN for a chain whose energy never changes.
    """
    values = _checked(energy, 4)
    return values.diff(dim=1).square().mean(1) / values.var(1)


def mixing(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``rhat``, ``ess_bulk`` and ``ess_tail`` together, in about two thirds of the time of the three calls."""
    found = _by_column(x, _mixing)
    return found[0], found[1], found[2]


def split(x: Array) -> Array:
    """Both halves of every chain as chains of their own, ``[d, C, S] -> [d, 2C, S // 2]``, first halves first.

    An odd middle draw is left out.
    """
    half = x.shape[2] // 2
    return np.concatenate([x[:, :, :half], x[:, :, -half:]], axis=1)


def bulk_and_folded_scores(x: Array) -> tuple[Array, Array]:
    """Normal scores of the ranks of the draws, and of their distances from the median; both ``[d, C, S]``."""
    return _normal_scores(x), _normal_scores(_folded(x))


def _checked(x: Tensor, least: int) -> Tensor:
    if x.dim() < 2 or x.shape[0] < 1 or x.shape[1] < least:
        raise DataError(
            f"convergence needs x [chains, draws, ...] with at least {least} draws a chain; got {tuple(x.shape)}."
        )
    return x.detach().to("cpu", torch.float64)


def _check_level(q: float) -> None:
    if not 0 < q < 1:
        raise DataError(f"a quantile's level lies between 0 and 1; got q={q}.")


def _by_column(x: Tensor, statistic: Callable[[Array], Array], least: int = 4) -> Tensor:
    """Apply a statistic ``[d, C, S] -> [..., d]`` to all trailing entries, in blocks of columns."""
    values = _checked(x, least)
    chains, draws, *rest = values.shape
    columns = values.reshape(chains, draws, math.prod(rest))
    finite = columns.isfinite().all(0).all(0)
    width = max(1, _BLOCK // (chains * draws))
    blocks = torch.split(finite.nonzero()[:, 0], width)
    found = [statistic(columns[:, :, block].permute(2, 0, 1).contiguous().numpy()) for block in blocks]
    joined = torch.from_numpy(np.concatenate(found, axis=-1))
    out = torch.full((*joined.shape[:-1], columns.shape[2]), math.nan, dtype=torch.float64)
    out[..., finite] = joined
    return out.reshape((*joined.shape[:-1], *rest))


def _superchains(superchains: int | Sequence[int], chains: int) -> tuple[NDArray[np.int64], int]:
    labels = np.arange(chains) * superchains // max(chains, 1) if isinstance(superchains, int) else superchains
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    if len(np.asarray(labels)) != chains or len(counts) < 2 or len(set(counts.tolist())) > 1:
        raise DataError(
            f"nested R-hat needs at least two superchains with equally many of the {chains} chains; got {superchains}."
        )
    return np.argsort(labels, kind="stable"), len(counts)


def _ordered(x: Array) -> Array:
    return np.sort(x.reshape(len(x), x.shape[1] * x.shape[2]), axis=1)


def _folded(x: Array) -> Array:
    ordered = _ordered(x)
    n = ordered.shape[1]
    median = (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
    return np.abs(x - median[:, None, None])


def _squares(x: Array) -> Array:
    return (x - x.mean((1, 2), keepdims=True)) ** 2


def _normal_scores(x: Array) -> Array:
    """Normal quantiles of the average ranks over all chains, with Blom's offsets (3/8, 1/4)."""
    flat = x.reshape(len(x), x.shape[1] * x.shape[2])
    n = flat.shape[1]
    order = np.argsort(flat, axis=1)
    # At ranks 1, 3/2, 2, ...: ties share the average of the ranks that they cover.
    table = ndtri((np.arange(2, 2 * n + 1) / 2 - 0.375) / (n + 0.25))
    scores = np.empty_like(flat)
    np.put_along_axis(scores, order, table[None, ::2], axis=1)
    new = np.diff(np.take_along_axis(flat, order, axis=1), axis=1) != 0
    tied = np.flatnonzero(~new.all(1))
    if len(tied):
        position = np.arange(n)
        edge = np.ones((len(tied), 1), dtype=bool)
        first = np.maximum.accumulate(np.where(np.hstack([edge, new[tied]]), position, 0), axis=1)
        last = np.where(np.hstack([new[tied], edge]), position, n - 1)[:, ::-1]
        last = np.minimum.accumulate(last, axis=1)[:, ::-1]
        scores[tied[:, None], order[tied]] = table[first + last]
    return scores.reshape(x.shape)


def _rhat(halves: Array) -> Array:
    return np.maximum(*(plain_rhat(score) for score in bulk_and_folded_scores(halves)))


def plain_rhat(z: Array) -> Array:
    """sqrt(var+ / W) of chains ``[d, C, S]`` as they are (eq. 1-4 of Vehtari et al.), ``[d]``."""
    n = z.shape[2]
    return _ratio((n - 1) / n, z.var(2, ddof=1).mean(1), z.mean(2).var(1, ddof=1), z)


def _nested(z: Array, k: int) -> Array:
    chains, draws = z.shape[1] // k, z.shape[2]
    superchains = z.reshape(len(z), k, chains, draws)
    means = superchains.mean(3)
    within = superchains.var(3, ddof=1).mean((1, 2)) if draws > 1 else np.zeros(len(z))
    within += means.var(2, ddof=1).mean(1) if chains > 1 else 0.0
    return _ratio(1.0, within, means.mean(2).var(1, ddof=1), z.reshape(len(z), k, chains * draws))


def _ratio(first: float, within: Array, between: Array, groups: Array) -> Array:
    """sqrt(first + between / within); 1 for what never changes, infinity for what changes between groups alone."""
    constant = groups.max((1, 2)) == groups.min((1, 2))
    # Not within == 0: the variance of equal numbers is only zero to rounding.
    flat = (groups.max(2) == groups.min(2)).all(1)
    value = np.sqrt(first + between / np.where(flat, 1.0, within))
    return np.where(constant, 1.0, np.where(flat, math.inf, value))


def _mixing(x: Array) -> Array:
    bulk, folded = bulk_and_folded_scores(split(x))
    return np.stack([np.maximum(plain_rhat(bulk), plain_rhat(folded)), effective_size(bulk), _ess_tail(x)])


def _ess_tail(x: Array) -> Array:
    ordered = _ordered(x)
    return np.minimum(_ess_below(x, ordered, 0.05), _ess_below(x, ordered, 0.95))


def _ess_below(x: Array, ordered: Array, q: float) -> Array:
    position = q * (ordered.shape[1] - 1)
    if abs(position - round(position)) < 1e-9:  # exactly an order statistic, whatever the product rounds to
        position = round(position)
    k = int(position)
    upper = ordered[:, min(k + 1, ordered.shape[1] - 1)]
    quantile = ordered[:, k] + (position - k) * (upper - ordered[:, k])
    return effective_size(split((x <= quantile[:, None, None]).astype(np.float64)))
