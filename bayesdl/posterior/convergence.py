"""Has the sampler converged, and how many independent draws is the chain worth?

Rank-normalised split R-hat and effective sample sizes after Vehtari, Gelman, Simpson, Carpenter & Buerkner,
"Rank-normalization, folding, and localization: an improved R-hat for assessing convergence of MCMC",
Bayesian Analysis 16 (2021), and the Bayesian fraction of missing information after Betancourt (2016).

Every function takes draws ``x [C, S, ...]`` (C chains of S draws) and returns one number per trailing entry ``[...]``
in float64. A quantity that never changes has R-hat 1 and as many effective draws as there are draws; one that is
constant within each chain but differs between chains has R-hat infinity. Entries with a NaN or infinite draw give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.fft import next_fast_len
from scipy.stats import rankdata
from torch import Tensor

from bayesdl.errors import DataError

_BLOCK = 2**24  # draws handled at a time: bounds the memory of the Fourier transform


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
    return _by_column(x, _rhat)


def ess_bulk(x: Tensor) -> Tensor:
    """Effective sample size of the rank-normalised draws ``[C, S, ...] -> [...]``: how well the centre is known."""
    return _by_column(x, lambda v: _ess(_normal_scores(_split(v))))


def ess_mean(x: Tensor) -> Tensor:
    """Effective sample size for the mean ``[C, S, ...] -> [...]``: var(mean) = var(x) / ess."""
    return _by_column(x, lambda v: _ess(_split(v)))


def ess_quantile(x: Tensor, q: float) -> Tensor:
    """Effective sample size for the q-quantile ``[C, S, ...] -> [...]``: that of the indicator x <= quantile."""
    if not 0 < q < 1:
        raise DataError(f"a quantile's level lies between 0 and 1; got q={q}.")
    return _by_column(x, lambda v: _ess_below(v, q))


def ess_tail(x: Tensor) -> Tensor:
    """The smaller of the effective sample sizes for the 5% and the 95% quantile ``[C, S, ...] -> [...]``."""
    return _by_column(x, lambda v: torch.minimum(_ess_below(v, 0.05), _ess_below(v, 0.95)))


def mcse_mean(x: Tensor) -> Tensor:
    """Monte-Carlo standard error of the mean, sd(x) / sqrt(ess_mean(x)) ``[C, S, ...] -> [...]``."""
    return _by_column(x, lambda v: v.flatten(0, 1).std(0) / _ess(_split(v)).sqrt())


def ebfmi(energy: Tensor) -> Tensor:
    """Energy Bayesian fraction of missing information, E[(E_t - E_{t-1})^2] / Var(E), of every chain.

    Below about 0.3 the momentum's refreshment moves too little of the energy, and tails are explored slowly.

    Args:
        energy: Value of the Hamiltonian at every draw, ``[C, S]``.

    Returns:
        ``[C]``; NaN for a chain whose energy never changes.
    """
    values = _checked(energy)
    return values.diff(dim=1).square().mean(1) / values.var(1)


def _checked(x: Tensor) -> Tensor:
    if x.dim() < 2 or x.shape[0] < 1 or x.shape[1] < 4:
        raise DataError(
            f"convergence needs x [chains, draws, ...] with at least 4 draws a chain; got {tuple(x.shape)}."
        )
    return x.detach().to("cpu", torch.float64)


def _by_column(x: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a statistic of ``[C, S, d]`` to all trailing entries, in blocks of columns."""
    values = _checked(x)
    chains, draws, *rest = values.shape
    columns = values.reshape(chains, draws, math.prod(rest))
    finite = columns.isfinite().all(0).all(0)
    out = torch.full((columns.shape[2],), math.nan, dtype=torch.float64)
    width = max(1, _BLOCK // (chains * draws))
    for block in torch.split(finite.nonzero()[:, 0], width):
        out[block] = statistic(columns[:, :, block])
    return out.reshape(rest)


def _split(x: Tensor) -> Tensor:
    """Both halves of every chain as chains of their own, ``[2C, S // 2, d]``; an odd middle draw is left out."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, -half:]])


def _normal_scores(x: Tensor) -> Tensor:
    """Normal quantiles of the average ranks over all chains, with Blom's offsets (3/8, 1/4)."""
    chains, draws, columns = x.shape
    ranks = torch.from_numpy(rankdata(x.reshape(chains * draws, columns).numpy(), method="average", axis=0))
    scores: Tensor = torch.special.ndtri((ranks - 0.375) / (chains * draws + 0.25))
    return scores.reshape(x.shape)


def _constant(x: Tensor) -> Tensor:
    return x.amax((0, 1)) == x.amin((0, 1))


def _rhat(x: Tensor) -> Tensor:
    halves = _split(x)
    ordered = halves.flatten(0, 1).sort(0).values
    n = len(ordered)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return torch.maximum(_plain_rhat(_normal_scores(halves)), _plain_rhat(_normal_scores((halves - median).abs())))


def _plain_rhat(z: Tensor) -> Tensor:
    n = z.shape[1]
    within, between = z.var(1).mean(0), z.mean(1).var(0)
    value = ((n - 1) / n + between / within).sqrt()
    stuck = torch.where(_constant(z), torch.ones_like(value), torch.full_like(value, math.inf))
    return torch.where(_flat_chains(z), stuck, value)


def _flat_chains(z: Tensor) -> Tensor:
    return (z.amax(1) == z.amin(1)).all(0)


def _ess_below(x: Tensor, q: float) -> Tensor:
    ordered = x.flatten(0, 1).sort(0).values
    position = q * (len(ordered) - 1)
    if abs(position - round(position)) < 1e-9:  # exactly an order statistic, whatever the product rounds to
        position = round(position)
    k = int(position)
    upper = ordered[min(k + 1, len(ordered) - 1)]
    quantile = ordered[k] + (position - k) * (upper - ordered[k])
    return _ess(_split((x <= quantile).to(x.dtype)))


def _autocovariance(x: Tensor) -> Tensor:
    """Biased autocovariances (divisor S) at every lag, by the Fourier transform; ``[C, S, d]``."""
    n = x.shape[1]
    padded = next_fast_len(2 * n)
    spectrum = torch.fft.rfft(x - x.mean(1, keepdim=True), n=padded, dim=1)
    covariance: Tensor = torch.fft.irfft(spectrum.abs().square(), n=padded, dim=1)[:, :n] / n
    return covariance


def _ess(x: Tensor) -> Tensor:
    """Effective sample size of ``[C, S, d]`` by Geyer's initial monotone sequence (Vehtari et al., eq. 10-13).

    The autocorrelation time is tau = -1 + 2 sum_k P_k over the pairs P_k = rho_{2k} + rho_{2k+1}, cut where a pair
    turns negative and made non-increasing; the first autocorrelation after the cut is added once if it is positive.
    ess = C S / tau, and tau is at least 1 / log10(C S).
    """
    chains, n, columns = x.shape
    covariance = _autocovariance(x).mean(0)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + x.mean(1).var(0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    last = max((n - 3) // 2, 0)
    pairs = rho[: 2 * last + 2].reshape(last + 1, 2, columns)
    sums = pairs.sum(1)
    # Index of the first pair that is not positive, or of the last one there is.
    cut = (sums > 0).cumprod(0).sum(0).clamp(max=last)
    before = torch.arange(last + 1)[:, None] < cut
    edge, edge_sum = pairs[:, 0].gather(0, cut[None])[0], sums.gather(0, cut[None])[0]
    edge = torch.where((edge > 0) | (edge_sum >= 0), edge, torch.zeros_like(edge))
    tau = -1 + 2 * torch.where(before, sums.cummin(0).values, torch.zeros_like(sums)).sum(0) + edge
    size = chains * n
    ess = size / tau.clamp(min=1 / math.log10(size))
    return torch.where(_constant(x), torch.full_like(ess, float(size)), ess)
