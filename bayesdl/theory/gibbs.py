r"""Where stochastic gradient descent stays: the Gibbs law of its model, with the correction for finite steps.

The isotropic model ``w' = w - eta grad ell(w) + (eta / sqrt b) xi`` is unadjusted Langevin dynamics at the temperature
``T = eta / (2 b)``. As eta tends to 0 at fixed T its law tends to the Gibbs law

.. math:: \rho(w) = e^{-\beta \ell(w)} / Z(\beta), \qquad \beta = 1/T = 2 b / \eta

if Z is finite, which flat directions that reach to infinity prevent. At finite steps, and where the noise is not
isotropic, the law is another one: ``stationary_covariance`` for quadratics, ``gibbs_law(..., step_size=)`` in one
dimension to second order, and ``langevin_chain`` on a grid without approximation to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from bayesdl.errors import DataError, MethodError, ModelError
from bayesdl.theory.markov_chains import FiniteChain

EDGE = 1e-9
"""Largest share of its peak that a density may have at the ends of the interval it is integrated over."""


def temperature(step_size: float, batch_size: float, *, noise_variance: float = 1.0) -> float:
    """``T = eta s^2 / (2 b)``, with s^2 the variance of one row's gradient (1 in the textbook model).

    Raises:
        MethodError: a number is not positive.
    """
    if not (step_size > 0 and batch_size > 0 and noise_variance > 0):
        raise MethodError(f"step_size={step_size}, batch_size={batch_size}, {noise_variance=} must be positive.")
    return step_size * noise_variance / (2 * batch_size)


def linear_scaling(step_size: float, batch_size: float, new_batch_size: float) -> float:
    """The step size that keeps the temperature when the mini-batch changes its size, ``eta b' / b``.

    The stationary law stays the same up to O(eta); b' / b < 2 / (eta lambda_max) is the limit of stability.
    """
    return step_size * new_batch_size / batch_size


def stationary_covariance(
    hessian: Tensor, step_size: float, batch_size: float, noise_covariance: Tensor | None = None
) -> Tensor:
    r"""Covariance ``[D, D]`` of SGD in equilibrium on a quadratic whose gradient noise has the covariance C / b.

    .. math:: \Sigma = (I - \eta H) \Sigma (I - \eta H) + (\eta^2 / b) C, \qquad
        \Sigma_{ij} = \frac{\eta}{b} \frac{C_{ij}}{\lambda_i + \lambda_j - \eta \lambda_i \lambda_j}

    in the eigenbasis of H. For C = I it is the Gibbs covariance ``T H^-1`` divided by ``1 - eta lambda / 2`` in every
    direction. For C = s^2 H, a well-specified model's, it tends to T s^2 I: not the Gibbs law of any temperature.

    Args:
        hessian: H, symmetric and positive definite ``[D, D]``.
        step_size: eta.
        batch_size: b; for draws without replacement 1 / ``minibatch_factor``.
        noise_covariance: C ``[D, D]``; the identity if None.

    Raises:
        MethodError: there is no equilibrium, because H is not positive or ``eta lambda_max >= 2``.
    """
    values, axes = torch.linalg.eigh(hessian)
    if not (values[0] > 0 and step_size * values[-1] < 2):
        raise MethodError(
            f"No equilibrium: the curvatures, {float(values[0]):.3g} to {float(values[-1]):.3g}, must be positive and "
            f"below 2 / step_size = {2 / step_size:.3g}."
        )
    noise = torch.eye(len(values), dtype=values.dtype) if noise_covariance is None else noise_covariance
    sums = values[:, None] + values - step_size * values[:, None] * values
    return axes @ (axes.T @ noise @ axes / sums) @ axes.T * (step_size / batch_size)


def relaxation_time(curvatures: Tensor, step_size: float) -> float:
    """Steps in which the mean of SGD on a quadratic comes e times closer to the minimum in its slowest direction.

    ``-1 / log max_i |1 - eta lambda_i|``, which is ``1 / (eta lambda_min)`` for small steps; infinite if the steps are
    too large to converge. Variances relax twice as fast.
    """
    slowest = float((1 - step_size * curvatures).abs().max())
    return math.inf if slowest >= 1 else (0.0 if slowest == 0 else -1 / math.log(slowest))


@dataclass(frozen=True, eq=False)
class GibbsLaw:
    """A density on a uniform grid, integrated by the trapezoidal rule.

    Args:
        grid: ``[G]``.
        density: ``[G]``, normalised.
        log_normaliser: log Z.
    """

    grid: Tensor
    density: Tensor
    log_normaliser: float

    @property
    def masses(self) -> Tensor:
        """Probability of the cell around each point of the grid, ``[G]``."""
        return self.density * (self.grid[1] - self.grid[0])

    @property
    def mean(self) -> float:
        """Mean."""
        return float((self.masses * self.grid).sum())

    @property
    def variance(self) -> float:
        """Variance."""
        return float((self.masses * (self.grid - self.mean).square()).sum())

    def probability(self, low: float, high: float) -> float:
        """Probability of the interval from ``low`` to ``high``; the distribution function is interpolated linearly."""
        cumulative = torch.cumulative_trapezoid(self.density, self.grid)
        cumulative = torch.cat([cumulative.new_zeros(1), cumulative / cumulative[-1]])
        place = (torch.tensor([low, high], dtype=self.grid.dtype) - self.grid[0]) / (self.grid[1] - self.grid[0])
        place = place.clamp(0, len(self.grid) - 1)
        left = place.floor().long().clamp(max=len(self.grid) - 2)
        values = torch.lerp(cumulative[left], cumulative[left + 1], place - left)
        return float(values[1] - values[0])


def gibbs_law(
    loss: Callable[[Tensor], Tensor],
    temperature: float,
    low: float,
    high: float,
    *,
    step_size: float = 0.0,
    points: int = 2001,
) -> GibbsLaw:
    r"""The Gibbs density of a one-dimensional loss by quadrature, on request corrected for the step size.

    The correction replaces the loss by the modified one that the chain of step eta feels,

    .. math:: \ell_\eta = \ell - \frac{\eta}{4} \ell'^2 + \frac{\eta T}{2} \ell''

    whose Gibbs law is the chain's up to O(eta^2) at fixed temperature. On ``lambda w^2 / 2`` it is exact: the variance
    is ``T / lambda / (1 - eta lambda / 2)``.

    Args:
        loss: ``[G] -> [G]``, elementwise.
        temperature: T.
        low: Left end of the grid.
        high: Right end.
        step_size: eta of the correction; 0 for the Gibbs law itself.
        points: G.

    Raises:
        ModelError: the density does not vanish at the ends, so its normaliser is unknown or infinite.
    """
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    energy = loss(grid)
    if step_size > 0:
        first = grad(lambda w: loss(w).sum())
        second = grad(lambda w: first(w).sum())(grid)
        energy = energy - step_size / 4 * first(grid).square() + step_size * temperature / 2 * second
    log_density = -energy / temperature
    log_z = float(torch.logsumexp(log_density, 0) + math.log((high - low) / (points - 1)))
    density = (log_density - log_z).exp()
    if not max(density[0], density[-1]) <= EDGE * density.max():
        raise ModelError(
            f"The Gibbs density does not vanish at {low} and {high}: widen the interval. If that does not help, the "
            "loss does not confine its argument, Z is infinite and there is no Gibbs law: add a prior that confines it."
        )
    return GibbsLaw(grid, density, log_z)


def double_well(w: Tensor, *, tilt: float = 0.1) -> Tensor:
    """``w^2/2 + exp(-2 w^2) + tilt w``: wells near -0.83 and 0.83, the left one deeper by about 1.7 tilt.

    The barrier is about 0.4 high. The gradient grows linearly, so that SGD is stable on it for step sizes below 0.4;
    on a quartic double well every step size leads to infinity in the end.
    """
    return 0.5 * w.square() + (-2 * w.square()).exp() + tilt * w


def langevin_chain(
    gradient: Callable[[Tensor], Tensor], grid: Tensor, step_size: float, batch_size: float
) -> FiniteChain:
    """The isotropic model in one dimension as a finite chain on the points of a grid, at any step size.

    Row i holds the density of ``N(w_i - eta grad ell(w_i), eta^2 / b)`` at the points, normalised: integrals over the
    density become sums, with a relative error of about ``2 exp(-2 pi^2 (sd / spacing)^2)``, below 1e-8 for a spacing of
    at most one standard deviation. The invariant law costs O(G^3).

    Args:
        gradient: ``[G] -> [G]``, elementwise.
        grid: ``[G]``, increasing in equal steps of at most ``eta / sqrt(b)``.
        step_size: eta.
        batch_size: b.

    Raises:
        DataError: the grid is none, or too coarse.
    """
    sd = step_size / math.sqrt(batch_size)
    spacing = grid.diff()
    if len(grid) < 2 or not ((spacing > 0) & (spacing <= sd) & ((spacing - spacing[0]).abs() < 1e-6 * sd)).all():
        raise DataError(f"grid must increase in equal steps of at most eta / sqrt(b) = {sd:.3g}.")
    mean = grid - step_size * gradient(grid)
    return FiniteChain(torch.softmax(-0.5 * ((grid - mean[:, None]) / sd).square(), dim=1))
