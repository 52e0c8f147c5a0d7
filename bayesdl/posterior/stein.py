"""Kernel Stein discrepancy: do draws come from the density whose gradient is known, bias of the sampler included?

R-hat compares chains with each other; a step size that is too large, a wrong Jacobian or a forgotten N/B moves all of
them alike. The Stein discrepancy compares draws with the gradient of the log density, whose normalising constant it
does not need (Liu, Lee & Jordan, ICML 2016; Chwialkowski, Strathmann & Gretton, ICML 2016; with the inverse
multiquadric kernel, for which it detects non-convergence, Gorham & Mackey, ICML 2017). What it cannot see is a whole
mode that no draw is in, or wrong weights of modes far apart: gradients are local.

For the base kernel k(x, y) = (c^2 + |x - y|^2)^b with -1 < b < 0, and scores s = grad log pi, the Stein kernel

    h(x, y) = s(x).s(y) k + s(x).grad_y k + s(y).grad_x k + div_x grad_y k

has mean 0 under pi in either argument. Coordinates are unconstrained and divided by ``scale``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.density.log_density import CHUNK
from bayesdl.errors import DataError, Divergence
from bayesdl.posterior import convergence

if TYPE_CHECKING:
    from bayesdl.posterior.base import Posterior

CELLS = 2**22
"""Pairs of draws held at once."""
DRAWS = 1000
"""Draws that are used by default, evenly thinned: the cost is quadratic."""
PER_EFFECTIVE = 2.0
"""Correlation length of the bootstrap's signs, in autocorrelation times of the scores."""


@dataclass(frozen=True)
class Stein:
    """The kernel Stein discrepancy of draws from a density.

    Attributes:
        v_statistic: mean of h over all pairs of draws; not negative.
        u_statistic: mean of h over pairs of different draws: unbiased for the squared discrepancy, 0 on average for
            independent exact draws.
        p_value: how often the wild bootstrap's u-statistic is at least as large: small if the draws are not from the
            density.
        draws: number of draws n.
        sign_length: draws over which the bootstrap keeps a sign, 1 for independent draws.
    """

    v_statistic: float
    u_statistic: float
    p_value: float
    draws: int
    sign_length: float

    @property
    def ksd(self) -> float:
        """The discrepancy, sqrt of the v-statistic; of the order n^(-1/2) for exact draws."""
        return math.sqrt(max(self.v_statistic, 0.0))

    def __str__(self) -> str:
        """The discrepancy and the p-value."""
        return f"kernel Stein discrepancy {self.ksd:.3g} of {self.draws} draws, p = {self.p_value:.3g}"


def stein_discrepancy(
    z: Tensor,
    score: Tensor,
    *,
    scale: Tensor | None = None,
    c: float | None = None,
    exponent: float = -0.5,
    bootstraps: int = 999,
    sign_length: float | None = None,
    seed: int = 0,
) -> Stein:
    r"""Statistics and test from draws and their scores.

    The p-value is by the wild bootstrap (Chwialkowski et al., 2016, section 4): signs W along every chain, which change
    with probability a at each draw, and (1/n^2) sum_{i != j} W_i W_j h_ij in place of the u-statistic. Correlated draws
    need signs that last longer than the draws' memory, 1 / (2 a) draws; a = 1/2 is the bootstrap for independent ones.
    A kernel scale taken from the draws themselves makes the test slightly conservative.

    Cost: O(n^2 (D + bootstraps)) time, O(CELLS + n (D + bootstraps)) memory.

    Args:
        z: draws ``[C, S, D]`` in unconstrained coordinates, C chains in their order.
        score: gradients of the log density at them, ``[C, S, D]``.
        scale: ``[D]`` unit of each coordinate; the draws' own standard deviation by default.
        c: width of the kernel in these units; sqrt(D) by default, the order of the distances.
        exponent: b, between -1 and 0.
        bootstraps: number of bootstrap samples.
        sign_length: 1 / (2 a); by default from the autocorrelation of the scores.
        seed: seed of the signs.

    Raises:
        DataError: shapes that do not fit, fewer than 2 draws, or values that are not finite.
    """
    if z.dim() != 3 or z.shape != score.shape or z.shape[0] * z.shape[1] < 2:
        raise DataError(f"draws and scores must both be [C, S, D]; got {tuple(z.shape)} and {tuple(score.shape)}.")
    if not (-1 < exponent < 0 and (c is None or c > 0) and bootstraps >= 1):
        raise DataError(f"exponent lies between -1 and 0, c and bootstraps are positive; got {exponent}, {c}.")
    if not (z.isfinite().all() and score.isfinite().all()):
        raise DataError("The Stein discrepancy needs finite draws and gradients.")
    chains, length, dim = z.shape
    n = chains * length
    x, s = z.detach().double().flatten(0, 1), score.detach().double().flatten(0, 1)
    unit = x.std(0) if scale is None else scale.to(x)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    x, s = (x - x.mean(0)) / unit, s * unit
    width = math.sqrt(dim) if c is None else c
    lasting = _sign_length(s.reshape(z.shape)) if sign_length is None else max(sign_length, 1.0)
    signs = _signs(bootstraps, chains, length, 0.5 / lasting, seed).to(x)
    diagonal = s.square().sum() * width ** (2 * exponent) - 2 * exponent * dim * n * width ** (2 * exponent - 2)
    total, resampled = x.new_zeros(()), x.new_zeros(bootstraps)
    for rows in torch.arange(n, device=x.device).split(max(1, CELLS // n)):
        block = _stein_kernel(x[rows], s[rows], x, s, width, exponent)
        total += block.sum()
        resampled += ((signs[:, rows] @ block) * signs).sum(1)
    v, diagonal_mean = float(total) / n**2, float(diagonal) / n**2
    u = (float(total) - float(diagonal)) / (n * (n - 1))
    # W_i^2 = 1: the diagonal is the same in every bootstrap sample as in the statistic.
    exceed = int((resampled / n**2 - diagonal_mean >= v - diagonal_mean).sum())
    return Stein(v, u, (1 + exceed) / (1 + bootstraps), n, lasting)


def kernel_stein(
    posterior: Posterior, *, max_draws: int = DRAWS, scale: Tensor | None = None, seed: int = 0, bootstraps: int = 999
) -> Stein:
    """The kernel Stein discrepancy of a posterior's draws from the density that it approximates.

    Works for every posterior with draws of the latents: of a sampler it measures the bias that R-hat cannot see, of a
    variational method the approximation. In unconstrained coordinates, with the program's temperatures.

    Args:
        posterior: what to judge; needs its model and training rows.
        max_draws: most draws, evenly thinned along every chain.
        scale: ``[D]`` unit of each coordinate; the draws' own standard deviation by default.
        seed: seed of the bootstrap, and of the draws of a posterior with a density.
        bootstraps: number of bootstrap samples.

    Raises:
        ModelRequired: loaded without a model.
        DataError: loaded without its training rows, whose density would be another one.
        Divergence: the gradient is not finite at a draw.
    """
    problem = posterior.problem
    if not problem.complete:
        raise DataError("A loaded posterior no longer has its training rows, and with others the density is another.")
    z = posterior.unconstrained_by_chain()
    each = max(1, max_draws // z.shape[0])
    if z.shape[1] > each:
        z = z[:, torch.linspace(0, z.shape[1] - 1, each, dtype=torch.float64).round().long()]
    parts = [problem.density.value_and_grad(part)[1] for part in z.flatten(0, 1).split(CHUNK)]
    score = torch.cat(parts).reshape(z.shape)
    bad = (~score.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise Divergence(f"The gradient of the log density is not finite at draws of chains {bad}.")
    return stein_discrepancy(z, score, scale=scale, seed=seed, bootstraps=bootstraps)


def _stein_kernel(x: Tensor, s: Tensor, y: Tensor, t: Tensor, c: float, exponent: float) -> Tensor:
    """h(x_i, y_j) with scores s_i, t_j: ``[a, D], [a, D], [b, D], [b, D] -> [a, b]``, without an ``[a, b, D]``."""
    squares = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0.0)
    # (s_i - t_j).(x_i - y_j)
    cross = (s * x).sum(1)[:, None] + (t * y).sum(1) - s @ y.T - x @ t.T
    base = c**2 + squares
    first = 2 * exponent * base ** (exponent - 1)
    return (
        (s @ t.T) * base**exponent
        - first * (cross + x.shape[1])
        - 4 * exponent * (exponent - 1) * squares * base ** (exponent - 2)
    )


def _sign_length(score: Tensor) -> float:
    """``PER_EFFECTIVE`` times the autocorrelation time of the slowest of some scores, at least 1."""
    chains, length, dim = score.shape
    if length < 4:
        return 1.0
    some = torch.linspace(0, dim - 1, min(dim, 50)).round().long()
    time = chains * length / float(convergence.ess_mean(score[..., some]).clamp(min=1.0).min())
    return 1.0 if time < 1.2 else PER_EFFECTIVE * time


def _signs(bootstraps: int, chains: int, length: int, change: float, seed: int) -> Tensor:
    """Signs ``[bootstraps, C S]`` that change along each chain with the given probability."""
    stream = _rng.generator(seed, "Stein bootstrap")
    uniform = torch.rand(bootstraps, chains, length, generator=stream)
    steps = torch.where(uniform < change, -1.0, 1.0)
    steps[..., 0] = torch.where(uniform[..., 0] < 0.5, -1.0, 1.0)
    return steps.cumprod(-1).flatten(1)
