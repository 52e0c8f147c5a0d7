r"""Bounds on a mean by betting: the tightest here for losses in [0, 1] that are not 0-1, whatever their variance.

A gambler starts with capital 1 and bets before each loss that the mean lies on one side of m. If m is the mean, the
game is fair and the capital reaches 1 / delta with probability at most delta (Markov's inequality). So every m at which
the capital did reach it is excluded. Source: Waudby-Smith and Ramdas (2024), "Estimating means of bounded random
variables by betting", JRSS B 86(1), Theorem 3 (hedged capital), with predictable plug-in bets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bayesdl.bounds._numbers import EPS, Array, Values, arrays, like, outermost, require, require_delta

# Each running mean starts as if 1/2 had been seen once, each running variance as if 1/4 had been seen PRIOR times: less
# than once, for losses that hardly vary are the case in which betting pays most.
PRIOR = 0.25


def _bets(losses: Array, delta: Array, *, sign: int) -> Array:
    """The shares ``[..., n]`` that are put at stake; the i-th depends on the losses before the i-th alone."""
    n = losses.shape[-1]
    seen = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(losses, -1)) / (seen + 1)
    variance = (0.25 * PRIOR + np.cumsum(np.square(losses - mean), -1)) / (seen + PRIOR)
    mean, variance = (
        np.concatenate([np.full((*losses.shape[:-1], 1), start), values[..., :-1]], -1)
        for start, values in ((0.5, mean), (0.25, variance))
    )
    room = 1 - mean if sign > 0 else mean
    v = -np.log(delta)[..., None] * np.square(room) / (n * variance)
    # w - 1 - log w = v by Newton's method, which falls to the root from any start above it.
    w = 1 + v + np.sqrt(2 * v)
    for _ in range(8):
        w = np.where(w > 1, w - (w - 1 - np.log(w) - v) / (1 - 1 / w), w)
    return np.asarray(1 - 1 / np.maximum(w, 1.0))


def _exceeds(losses: Array, bets: Array, mean: Array, delta: Array, *, sign: int) -> NDArray[np.bool_]:
    """Whether the capital of betting that the true mean is below (+1) or above (-1) ``mean`` surely reaches 1/delta."""
    m = mean[..., None]
    with np.errstate(all="ignore"):  # a cut gain only makes the capital smaller; at the ends m is not asked about
        gain = bets * np.minimum(sign * (m - losses) / (1 - m if sign > 0 else m), 1e300)
    logs = np.log1p(gain)
    # A gain is off by four half-units, which log1p magnifies by 1 / (1 + gain); sums are pairwise.
    each = 4 * EPS * np.abs(gain) / (1 + gain) + 2 * EPS * np.abs(logs)
    total = (32 + np.log2(losses.shape[-1])) * EPS * np.abs(logs).sum(-1)
    return np.asarray(logs.sum(-1) - each.sum(-1) - total >= -np.log(delta) * (1 + 4 * EPS))


def _bound(losses: Values, delta: Values, *, sign: int) -> Values:
    (values,), (delta_,) = arrays(losses=losses), arrays(delta=delta)
    require((values >= 0) & (values <= 1), "losses", "in [0, 1]", values)
    require_delta(delta_)
    count = values.shape[-1] if values.ndim else 0
    require(np.asarray(count > 0), "the number of losses", "at least 1", np.asarray(count))
    delta_ = np.broadcast_to(delta_, np.broadcast_shapes(values.shape[:-1], delta_.shape))
    values = np.ascontiguousarray(np.broadcast_to(values, (*delta_.shape, count)))
    bets = _bets(values, delta_, sign=sign)
    end = np.full(delta_.shape, (1.0 + sign) / 2)
    found = outermost(1 - end, end, lambda m: _exceeds(values, bets, m, delta_, sign=sign))
    return like(found, losses, delta)


def betting_upper(losses: Values, *, delta: Values) -> Values:
    r"""Upper bound on the mean of independent losses in [0, 1] by betting against every larger mean.

    .. math:: \bar R = \sup \Big\{ m : \prod_i \Big(1 + b_i \frac{m - \ell_i}{1 - m}\Big) < \frac1\delta \Big\}

    The share :math:`b_i \in [0, 1)` at stake depends on the losses before the i-th, by their mean and variance: it
    minimises :math:`(\log(1 / \delta) / n + \sigma^2 \psi(b)) / b` with :math:`\psi(b) = -\log(1 - b) - b` and
    :math:`\sigma = \hat\sigma_{i-1} / (1 - \hat\mu_{i-1})`, hence
    :math:`b = 1 - 1 / w, \; w - 1 - \log w = \log(1 / \delta) / (n \sigma^2)`. Any such choice gives a valid bound;
    this one is within a few percent of ``chernoff_upper`` for 0-1 losses and of the limit
    :math:`(1 - \mu) \log(1 / \delta) / n` (a loss of 1 that never showed) for losses that hardly vary.

    The capital grows with m, so the sup is found by halving. For 0-1 losses the exact ``clopper_pearson_upper`` is
    tighter. The bound depends a little on the order of the losses, which must not depend on their values (no sorting).
    With the lower bound at delta / 2 each, it is the hedged capital interval.

    Assumptions: independent losses in [0, 1] with one mean (more generally: each has this mean given those before).
    Source: Waudby-Smith and Ramdas (2024), Theorem 3, with bets of our own; :math:`\psi` as in their Theorem 2.

    Args:
        losses: ``[..., n]``, in the order in which they were observed.
        delta: Failure probability in (0, 1), for each set of losses.

    Returns:
        The bounds ``[...]``, rounded up; 1 when no mean is excluded.

    Raises:
        CertificateError: When there is no loss, one is NaN or outside [0, 1], or delta is outside (0, 1).

    Cost: 62 passes over the losses.
    """
    return _bound(losses, delta, sign=1)


def betting_lower(losses: Values, *, delta: Values) -> Values:
    r"""Lower bound on the mean of independent losses in [0, 1] by betting against every smaller mean.

    .. math:: \underline R = \inf \Big\{ m : \prod_i \Big(1 + b_i \frac{\ell_i - m}{m}\Big) < \frac1\delta \Big\}

    The mirror image of ``betting_upper``, under the same assumptions and from the same source.

    Args:
        losses: ``[..., n]``, in the order in which they were observed.
        delta: Failure probability in (0, 1), for each set of losses.

    Returns:
        The bounds ``[...]``, rounded down; 0 when no mean is excluded.

    Raises:
        CertificateError: When there is no loss, one is NaN or outside [0, 1], or delta is outside (0, 1).

    Cost: 62 passes over the losses.
    """
    return _bound(losses, delta, sign=-1)
