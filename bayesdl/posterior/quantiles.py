"""Cumulative distribution functions and quantiles of equally weighted mixtures over posterior draws.

In this file a distribution has batch shape ``[S, n]`` and stands for n mixtures of S components each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from scipy import special
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
)

from bayesdl._rng import isolated

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


def cdf(distribution: Distribution, value: Tensor) -> Tensor:
    """P(Y <= value) under every component; values outside the support give 0 or 1.

    Student-t by ``scipy.special.stdtr``, Poisson by the regularised incomplete gamma function, others by their own cdf.

    Args:
        distribution: A scalar distribution, batch shape ``[S, n, ...]``.
        value: Broadcasts with the batch shape.

    Raises:
        NotImplementedError: If the family has no cdf.
    """
    if isinstance(distribution, StudentT):
        standard = (value - distribution.loc) / distribution.scale
        df = distribution.df.expand(standard.shape)
        return torch.as_tensor(special.stdtr(df.detach().cpu().numpy(), standard.detach().cpu().numpy()))
    if isinstance(distribution, Poisson):
        whole = value.floor()
        tail = torch.special.gammaincc(whole.clamp(min=0) + 1, distribution.rate)
        return torch.where(whole < 0, torch.zeros_like(tail), tail)
    low, high = _limits(distribution)
    # Not every family's own cdf is defined beyond its support (a logarithm there gives NaN).
    inside = value.clamp(low, high) if isinstance(low, Tensor) and isinstance(high, Tensor) else value
    result = distribution.cdf(inside)
    result = torch.where(value <= low, torch.zeros_like(result), result)
    return torch.where(value >= high, torch.ones_like(result), result)


def log_density(distribution: Distribution, value: Tensor) -> Tensor:
    """Log density of values ``[n, ...]`` under every component, ``[S, n]``; -inf outside the component's support.

    Without the check a family may return any number there: it is only defined on its support.
    """
    support: Any = distribution.support
    inside = support.check(value[None])
    result = distribution.log_prob(value[None])
    return torch.where(inside, result, torch.full_like(result, -math.inf))


def has_cdf(distribution: Distribution) -> bool:
    """Whether `cdf` works for this family."""
    try:
        cdf(distribution, torch.zeros((), dtype=torch.float64))
    except NotImplementedError:
        return False
    return True


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
    samples = _samples(distribution)
    ordered = samples.sort(dim=0).values
    return ordered[min(max(math.ceil(q * len(ordered)) - 1, 0), len(ordered) - 1)]


def sampled_cdf(distribution: Distribution, value: Tensor) -> Tensor:
    """Share of the same seeded samples that are at most ``value`` ``[n, *event]``."""
    return (_samples(distribution) <= value).to(torch.float64).mean(0)


def _samples(distribution: Distribution) -> Tensor:
    with isolated(0, "Prediction", "quantile"):
        samples = distribution.sample(torch.Size([max(2, math.ceil(_SAMPLES / distribution.batch_shape[0]))]))
    return samples.flatten(0, 1).to(torch.float64)


def _limits(distribution: Distribution) -> tuple[Tensor | float, Tensor | float]:
    """Ends of the support; tensors if finite, else plus or minus infinity."""
    support = distribution.support
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None:
        return -math.inf, math.inf
    low = torch.as_tensor(low, dtype=torch.float64)
    return low, torch.as_tensor(math.inf if high is None else high, dtype=torch.float64)


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
