"""Exact binomial bounds on a probability from a number of successes: no inequality is lost on the way."""

from __future__ import annotations

import numpy as np
from scipy import special

from bayesdl.bounds._numbers import (
    Array,
    Values,
    arrays,
    like,
    outermost,
    require,
    require_count,
    require_delta,
)


def _checked(errors: Values, n: Values, delta: Values) -> tuple[Array, Array, Array]:
    """Errors, trials, and delta lowered by more than the rounding error of the binomial tail."""
    errors_, n_, delta_ = arrays(errors=errors, n=n, delta=delta)
    require_count("n", n_, 1)
    require_count("errors", errors_, 0)
    require(errors_ <= n_, "errors", "at most n", errors_)
    require_delta(delta_)
    return errors_, n_, delta_ * (1 - 1e-14 * (4 + np.sqrt(n_)))


def clopper_pearson_upper(*, errors: Values, n: Values, delta: Values) -> Values:
    r"""Exact binomial upper bound on an error probability (Clopper and Pearson, 1934; Langford, 2005, Theorem 3.3).

    .. math:: \bar p = \sup \{ p : P(\mathrm{Bin}(n, p) \le k) \ge \delta \}, \qquad
        P(p > \bar p) \le \delta

    Args:
        errors: Number k of errors among n independent trials, 0 <= k <= n.
        n: Number of trials, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, rounded up: the binomial tail at it was seen to be below delta by more than the tail's own rounding
        error (1e-14 sqrt(n), tested against high precision up to n = 1e6). 1 when every trial is an error.

    Raises:
        CertificateError: When an argument is NaN or outside its domain, or there are more errors than trials.
    """
    k, n_, target = _checked(errors, n, delta)
    open_ = k < n_
    a, b = k + 1, np.where(open_, n_ - k, 1.0)
    p = outermost(np.zeros(k.shape), np.ones(k.shape), lambda p: special.betaincc(a, b, p) <= target)
    return like(np.where(open_, p, 1.0), errors, n, delta)


def clopper_pearson_lower(*, errors: Values, n: Values, delta: Values) -> Values:
    r"""Exact binomial lower bound on a probability, the mirror image of ``clopper_pearson_upper``.

    .. math:: \underline p = \inf \{ p : P(\mathrm{Bin}(n, p) \ge k) \ge \delta \}, \qquad
        P(p < \underline p) \le \delta

    Each side fails with probability at most delta; the interval from both is a statement at 2 delta.

    Args:
        errors: Number k of errors (or successes) among n independent trials, 0 <= k <= n.
        n: Number of trials, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, rounded down; 0 when no trial is an error.

    Raises:
        CertificateError: When an argument is NaN or outside its domain, or there are more errors than trials.
    """
    k, n_, target = _checked(errors, n, delta)
    some = k > 0
    a, b = np.where(some, k, 1.0), n_ - k + 1
    p = outermost(np.ones(k.shape), np.zeros(k.shape), lambda p: special.betainc(a, b, p) <= target)
    return like(np.where(some, p, 0.0), errors, n, delta)
