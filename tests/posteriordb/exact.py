"""Linear regressions whose posterior is known to rounding: Gaussian given sigma, and sigma by quadrature.

With beta ~ N(0, 1/p) (p = 0 is flat), V = (X'X / s^2 + p)^-1 and m = V X'y / s^2: beta | sigma = s is N(m, V), and

    log p(s | y) = log p(s) - n log s - y'y / (2 s^2) + m' V^-1 m / 2 + log det V / 2.

These six references have no Monte-Carlo error of their own, which the gold-standard draws (10,000) do: one hundredth of
a posterior sd, more than what a missing Jacobian moves sigma by in the larger data sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from tests.posteriordb.judgement import LEVELS, Reference
from tests.posteriordb.programs import ENTRIES

Array = NDArray[np.float64]
GRID = 4001


def _half_cauchy(s: Array) -> Array:
    return np.asarray(stats.halfcauchy.logpdf(s, scale=2.5))


PRIORS: dict[str, tuple[Callable[[Array], Array], float]] = {
    "arK-arK": (_half_cauchy, 0.01),
    "kidiq-kidscore_interaction": (_half_cauchy, 0.0),
    "kidiq-kidscore_momiq": (_half_cauchy, 0.0),
    "mesquite-logmesquite": (np.zeros_like, 0.0),
    "nes2000-nes": (np.zeros_like, 0.0),
    "sblrc-blr": (lambda s: np.asarray(stats.halfnorm.logpdf(s, scale=10.0)), 0.01),
}
"""Log prior density of sigma, and prior precision of the coefficients."""


def exact(name: str, raw: dict[str, Any], names: list[str]) -> Reference:
    """The reference without error; ``names`` end with sigma."""
    x, y = _design(name, raw)
    log_prior, precision = PRIORS[name]
    n, d = x.shape
    rough = float(np.std(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]))
    sigma = rough * np.exp(np.linspace(-14, 14, GRID) / np.sqrt(2 * n))
    inner = x.T @ x / sigma[:, None, None] ** 2 + precision * np.eye(d)
    covariance = np.linalg.inv(inner)
    mean = np.einsum("sij,j->si", covariance, x.T @ y) / sigma[:, None] ** 2
    log_weight = log_prior(sigma) - n * np.log(sigma) - y @ y / (2 * sigma**2)
    log_weight += 0.5 * np.einsum("si,sij,sj->s", mean, inner, mean) - 0.5 * np.linalg.slogdet(inner)[1]
    weight = np.exp(log_weight - log_weight.max()) * sigma  # the grid is even in log sigma
    weight /= weight.sum()
    columns = [_coefficient(weight, mean[:, k], np.sqrt(covariance[:, k, k])) for k in range(d)]
    values = torch.tensor(np.array([*columns, _noise(weight, sigma)]).T)
    return Reference(names, values, torch.zeros_like(values))


def _design(name: str, raw: dict[str, Any]) -> tuple[Array, Array]:
    data = ENTRIES[name].data(raw)
    if isinstance(data, dict):
        y, lags = data["y"], data["lags"]
        past = [y[lags - k : len(y) - k] for k in range(1, lags + 1)]
        parts: tuple[Tensor, Tensor] = torch.stack([torch.ones_like(past[0]), *past], 1), y[lags:]
    else:
        parts = data
    return parts[0].numpy(), parts[1].numpy()


def _coefficient(weight: Array, mean: Array, sd: Array) -> list[float]:
    """Statistics of a mixture of Gaussians."""
    centre = float(weight @ mean)
    spread = float(np.sqrt(weight @ (sd**2 + (mean - centre) ** 2)))

    def below(x: float, level: float) -> float:
        return float(weight @ stats.norm.cdf((x - mean) / sd)) - level

    reach = 10 * spread
    return [centre, spread, *(brentq(below, centre - reach, centre + reach, args=(q,)) for q in LEVELS)]


def _noise(weight: Array, sigma: Array) -> list[float]:
    """Statistics of a law on a grid that is even in log sigma."""
    centre = float(weight @ sigma)
    spread = float(np.sqrt(weight @ (sigma - centre) ** 2))
    # The trapezoidal rule: a grid point's own mass lies half below it.
    below = weight.cumsum() - weight / 2
    return [centre, spread, *np.exp(np.interp(LEVELS, below, np.log(sigma))).tolist()]
