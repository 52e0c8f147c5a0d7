"""Cumulative distribution functions and quantiles of equally weighted mixtures over posterior draws.

In this file a distribution has batch shape ``[S, n]`` and stands for n mixtures of S components each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import GammaPoisson, MaskedDistribution
from scipy import special
from torch import Tensor
from torch.distributions import (
    Beta,
    Binomial,
    Distribution,
    Geometric,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)

from bayesdl._rng import isolated
from bayesdl.posterior.families import row_pieces

_TOLERANCE = 1e-13
_SAMPLES = 20_000


def unwrap(distribution: Distribution) -> Distribution:
    """The distribution below masks and Independent: what one component of the event is distributed as."""
    while isinstance(distribution, MaskedDistribution | Independent):
        distribution = distribution.base_dist
    return distribution


def marginal(distribution: Distribution) -> Distribution | None:
    """Distribution of each component of the event, batch shape ``[S, n, *event]``; None where it has no closed form."""
    inner = unwrap(distribution)
    if isinstance(inner, MultivariateNormal | LowRankMultivariateNormal):
        return Normal(inner.mean, inner.variance.sqrt(), validate_args=False)
    return inner if not inner.event_shape else None


def marginal_with_cdf(distribution: Distribution) -> Distribution | None:
    """The `marginal`, or None if it has no closed form or no cdf."""
    one = marginal(distribution)
    if one is None:
        return None
    try:
        cdf(one, torch.zeros((), dtype=torch.float64))
    except NotImplementedError:
        return None
    return one


def cdf(distribution: Distribution, value: Tensor) -> Tensor:
    """P(Y <= value) under every component; values outside the support give 0 or 1.

    By the family's own cdf, or for Student-t, Beta and counts by the special functions of torch and scipy.

    Args:
        distribution: A scalar distribution, batch shape ``[S, n, ...]``.
        value: Broadcasts with the batch shape.

    Raises:
        NotImplementedError: If the family has no cdf.
    """
    if isinstance(distribution, MixtureSameFamily):
        weights = distribution.mixture_distribution.probs
        return (weights * cdf(distribution.component_distribution, value[..., None])).sum(-1)
    support: Any = distribution.support
    if support.is_discrete:
        value = value.floor()
    low, high = _limits(support)
    # Not every family's cdf is defined beyond its support (a logarithm there gives NaN).
    inside = value if low is None else value.clamp(low, high)
    special_cdf = next((function for family, function in _SPECIAL if isinstance(distribution, family)), None)
    result = distribution.cdf(inside) if special_cdf is None else special_cdf(distribution, inside)
    if low is None:
        return result
    below = value < low if support.is_discrete else value <= low
    result = torch.where(below, torch.zeros_like(result), result)
    return torch.where(value >= high, torch.ones_like(result), result)


def log_density(distribution: Distribution, value: Tensor) -> Tensor:
    """Log density of values ``[n, ...]`` under every component, ``[S, n]``; -inf outside the component's support.

    Without the check a family may return any number there: it is only defined on its support.
    """
    return _log_density(distribution, value[None])


def _log_density(distribution: Distribution, value: Tensor) -> Tensor:
    if isinstance(distribution, MixtureSameFamily):
        # torch's own check wants the value inside the support of all components at once.
        weights = distribution.mixture_distribution.logits.log_softmax(-1)
        inner = value.unsqueeze(-1 - len(distribution.event_shape))
        return (weights + _log_density(distribution.component_distribution, inner)).logsumexp(-1)
    support: Any = distribution.support
    inside = support.check(value)
    result = distribution.log_prob(value)
    return torch.where(inside, result, torch.full_like(result, -math.inf))


def mixture_quantile(distribution: Distribution, q: float) -> Tensor:
    """The value x with (1/S) sum_s F_s(x) = q; for counts the smallest integer whose cdf reaches q.

    Bisection on the mixture's cdf, sped up by Newton steps that stay inside the bracket. The bracket comes from the
    components' own quantiles (the mixture's lies between the smallest and the largest of them), or, where these have
    no closed form, from one sample of each component, widened until it holds the quantile.

    Args:
        distribution: A scalar distribution with a cdf, batch shape ``[S, n, ...]``.
        q: Level in (0, 1).

    Returns:
        ``[n, ...]`` float64. Cost: about 10 evaluations of cdf and density, 60 for counts.
    """
    low, high = _bracket(distribution, q)
    support: Any = distribution.support
    if support.is_discrete:
        return _integer_quantile(distribution, q, low, high)
    span = high - low
    x = (low + high) / 2
    done = span <= 0
    for step in range(200):
        level = cdf(distribution, x).mean(0)
        low, high = torch.where(level < q, x, low), torch.where(level < q, high, x)
        newton = x - (level - q) / log_density(distribution, x).exp().mean(0)
        # Every fourth step halves the bracket, so that no shape of the cdf can hold the search up.
        use_newton = (newton >= low) & (newton <= high) & (step % 4 != 3)
        candidate = torch.where(use_newton, newton, (low + high) / 2)
        small = _TOLERANCE * (x.abs() + span)
        arrived = ((candidate - x).abs() <= small) & use_newton | (high - low <= small)
        x = torch.where(done, x, candidate)
        done = done | arrived
        if bool(done.all()):
            break
    return x


def sampled_quantile(distribution: Distribution, q: float) -> Tensor:
    """Quantile of about 20,000 seeded samples, the same number from every component; ``[n, *event]`` float64.

    The standard error is sqrt(q (1 - q) / 20000) on the probability scale.
    """

    def order_statistic(samples: Tensor, rows: slice) -> Tensor:
        return samples.kthvalue(max(math.ceil(q * len(samples)), 1), dim=0).values

    return _from_samples(distribution, order_statistic)


def sampled_cdf(distribution: Distribution, value: Tensor) -> Tensor:
    """Share of the same seeded samples that are at most ``value`` ``[n, *event]``."""
    return _from_samples(distribution, lambda samples, rows: (samples <= value[rows]).to(torch.float64).mean(0))


def _from_samples(distribution: Distribution, statistic: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """A statistic of samples ``[M, rows, *event]``, a few rows at a time where the distribution can be cut."""
    rounds = torch.Size([max(2, math.ceil(_SAMPLES / distribution.batch_shape[0]))])
    per_row = rounds[0] * distribution.batch_shape[0] * distribution.event_shape.numel()
    with isolated(0, "Prediction", "quantile"):
        found = [
            statistic(piece.sample(rounds).flatten(0, 1).to(torch.float64), rows)
            for rows, piece in row_pieces(distribution, max(1, 2**24 // per_row))
        ]
    return torch.cat(found)


def _limits(support: Any) -> tuple[Tensor | None, Tensor]:
    """Ends of the support; None for the lower one stands for the whole line."""
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    upper = torch.as_tensor(math.inf if high is None else high, dtype=torch.float64)
    return (None if low is None else torch.as_tensor(low, dtype=torch.float64)), upper


def _betainc(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Regularised incomplete beta function I_x(a, b)."""
    return torch.as_tensor(special.betainc(a.detach().numpy(), b.detach().numpy(), x.detach().numpy()))


def _student_t(d: Any, value: Tensor) -> Tensor:
    standard = (value - d.loc) / d.scale
    return torch.as_tensor(special.stdtr(d.df.expand(standard.shape).detach().numpy(), standard.detach().numpy()))


# Families whose cdf torch and Pyro lack.
_SPECIAL: tuple[tuple[type[Distribution], Callable[[Any, Tensor], Tensor]], ...] = (
    (StudentT, _student_t),
    (Beta, lambda d, v: _betainc(d.concentration1, d.concentration0, v)),
    (Poisson, lambda d, v: torch.special.gammaincc(v + 1, d.rate)),
    (Geometric, lambda d, v: 1 - (1 - d.probs) ** (v + 1)),
    (NegativeBinomial, lambda d, v: _betainc(d.total_count, v + 1, 1 - d.probs)),
    (GammaPoisson, lambda d, v: _betainc(d.concentration, v + 1, d.rate / (1 + d.rate))),
    # At v = total_count, where the first parameter would be 0, the cdf is 1 by the support.
    (Binomial, lambda d, v: _betainc((d.total_count - v).clamp(min=0.5), v + 1, 1 - d.probs)),
)


def _bracket(distribution: Distribution, q: float) -> tuple[Tensor, Tensor]:
    try:
        own = distribution.icdf(torch.tensor(q, dtype=torch.float64)).expand(distribution.batch_shape)
    except NotImplementedError:
        own = None
    if own is not None and bool(own.isfinite().all()):
        return own.amin(0), own.amax(0)
    with isolated(0, "Prediction", "bracket"):
        samples = distribution.sample().to(torch.float64)
    low, high = samples.amin(0), samples.amax(0)
    width = (high - low) + 1e-2 * high.abs() + 1e-6
    for _ in range(1100):  # doublings from the smallest to the largest float64
        above, below = cdf(distribution, low).mean(0) >= q, cdf(distribution, high).mean(0) < q
        if not bool((above | below).any()):
            break
        low, high = torch.where(above, low - width, low), torch.where(below, high + width, high)
        width = 2 * width
    return low, high


def _integer_quantile(distribution: Distribution, q: float, low: Tensor, high: Tensor) -> Tensor:
    low, high = low.floor() - 1, high.ceil()
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).floor()
        reached = cdf(distribution, middle).mean(0) >= q
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high
