"""Disintegrated PAC-Bayes: a bound for one predictor that was drawn once from the posterior and is then kept."""

from __future__ import annotations

import numpy as np

from bayesdl.bounds._numbers import (
    EPS,
    Values,
    arrays,
    like,
    require,
    require_count,
    require_delta,
    require_probability,
    up,
)
from bayesdl.bounds.concentration import kl_inverse_upper


def single_draw(*, risk: Values, log_ratio: Values, n: Values, delta: Values) -> Values:
    r"""The kl bound for a single draw h from Q, where the log density ratio at h stands in place of the divergence.

    .. math:: kl(\hat R(h) \| R(h)) \le \frac{\log (dQ / dP)(h) + \log(2 \sqrt n / \delta)}{n}
        \quad \text{with probability at least } 1 - \delta \text{ over the rows and over } h \sim Q

    h is fixed from then on, and its risk is its own: no Monte-Carlo step, no Gibbs predictor. The price is that the
    ratio fluctuates about KL(Q || P), and that it holds for the one draw that was made, not for the best of several.
    Assumptions: n independent and identically distributed rows, a loss in [0, 1], a prior fixed before these rows.
    Source: Rivasplata et al. (2020), "PAC-Bayes analysis beyond the usual bounds", Theorem 1 (i); Maurer's
    constant.

    Args:
        risk: Average loss of h on the rows of the bound, in [0, 1].
        log_ratio: log q(h) - log p(h) in nats, of either sign, or an upper bound on it; may be infinite.
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).

    Returns:
        Upper bound on R(h), rounded up. Where ratio and confidence add up to less than 0 no risk satisfies the
        inequality, and the bound is the risk itself.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    risk_, ratio, n_, delta_ = arrays(risk=risk, log_ratio=log_ratio, n=n, delta=delta)
    require_probability("risk", risk_)
    require_count("n", n_, 1)
    require_delta(delta_)
    sure = up(np.log(2 * np.sqrt(n_) / delta_), 8 * EPS)
    # The sum may cancel: its rounding error is one of its larger term.
    total = ratio + sure + 2 * EPS * np.abs(np.where(np.isinf(ratio), 0.0, ratio))
    require(ratio > -np.inf, "log_ratio", "above minus infinity", ratio)
    return like(np.asarray(kl_inverse_upper(risk_, up(np.maximum(total, 0.0) / n_))), risk, log_ratio, n, delta)
