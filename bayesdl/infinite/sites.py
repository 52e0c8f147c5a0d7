r"""A Gaussian process conditioned on one Gaussian site per row and output.

The posterior of the zero-mean part g of a latent function f = mu + g is

    q(g) proportional to N(g | 0, K) prod_i exp(a_i g_i - b_i g_i^2 / 2),   b_i > 0.

With Gaussian noise of variance s^2 this is exact: ``b = 1 / s^2`` and ``a = (y - mu) / s^2``. With another likelihood
the sites are chosen by variational inference (Opper and Archambeau, 2009: the optimum has exactly this form, with n
free precisions). Everything goes through the Cholesky factor of ``B = I + sqrt(b) K sqrt(b)``, whose eigenvalues are
at least 1 (Rasmussen and Williams, 2006, section 3.4.3), so no jitter is added to K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import MethodError


class Factors(NamedTuple):
    """What predictions need of the training rows, for C outputs and n rows.

    S is 1 where all outputs have the same precisions, and so one factor serves them, else C.
    """

    root: Tensor
    """``[S, n]`` sqrt(b)."""
    cholesky: Tensor
    """``[S, n, n]`` lower factor of B."""
    weights: Tensor
    """``[C, n]`` such that the posterior mean of g at x is ``k(x)^T weights``."""

    @property
    def half_log_det(self) -> Tensor:
        """Half of log det B, summed over the outputs."""
        logs = self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum()
        return logs * (len(self.weights) // len(self.root))


class AtRows(NamedTuple):
    """The posterior of g at the training rows, where g is what the sites act on."""

    mean: Tensor
    """``[C, n]``."""
    variance: Tensor
    """``[C, n]``."""
    half_log_det: Tensor
    """Half of log det B, summed over the outputs."""


def shared(b: Tensor) -> Tensor:
    """Return ``b [C, n]`` as ``[1, n]`` where all outputs have the same precisions, else as it is."""
    return b[:1] if torch.equal(b, b[:1].expand_as(b)) else b


def as_columns(v: Tensor, systems: int) -> Tensor:
    """Return ``v [C, n]`` as right-hand sides: ``[1, n, C]`` of one system or ``[C, n, 1]`` of C systems."""
    return v.mT.unsqueeze(0) if systems == 1 else v.unsqueeze(-1)


def from_columns(v: Tensor) -> Tensor:
    """The inverse of ``as_columns``."""
    return v.squeeze(0).mT if len(v) == 1 else v.squeeze(-1)


def condition(covariance: Tensor, a: Tensor, b: Tensor) -> Factors:
    """Factor a Gaussian process conditioned on its sites.

    Args:
        covariance: ``[n, n]`` K, shared by the outputs.
        a: ``[C, n]`` sites' linear coefficients.
        b: ``[C, n]`` sites' precisions, positive.

    Raises:
        MethodError: B has no Cholesky factor in float64: K is not positive semi-definite, or not finite.

    Cost: S n^3 / 3 operations, 8 S n^2 bytes, with S = 1 where the outputs have the same precisions.
    """
    root = shared(b).sqrt()
    matrix = root.unsqueeze(-1) * covariance * root.unsqueeze(-2)
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    cholesky, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise MethodError(
            "The kernel matrix of the training rows is not positive semi-definite in float64. Either the kernel is no "
            "covariance function, its values overflow (scale the inputs), or the noise is too small beside them."
        )
    solved = from_columns(torch.cholesky_solve(as_columns(a / root, len(root)), cholesky))
    return Factors(root, cholesky, root * solved)


def mean_at(cross: Tensor, factors: Factors) -> Tensor:
    """Return the posterior mean of g, ``[C, N]``, from the covariances ``cross [n, N]`` with the training rows."""
    return factors.weights @ cross


def whitened(cross: Tensor, factors: Factors) -> Tensor:
    """Return V ``[S, n, N]`` with ``V^T V`` the reduction of the prior covariance by the data (n^2 N operations)."""
    scaled = factors.root.unsqueeze(-1) * cross
    return torch.linalg.solve_triangular(factors.cholesky, scaled, upper=False)


def moments(cross: Tensor, diagonal: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Return posterior means and variances of g, each ``[C, N]``.

    Args:
        cross: ``[n, N]`` covariances of the training rows with the new ones.
        diagonal: ``[N]`` prior variances of the new rows.
        factors: from ``condition``.
    """
    mean = mean_at(cross, factors)
    reduction = whitened(cross, factors).square().sum(-2)
    return mean, (diagonal - reduction).clamp(min=0).expand_as(mean)


class Dense(NamedTuple):
    """A prior over the function at the training rows by its covariance matrix."""

    covariance: Tensor
    """``[n, n]``."""

    @property
    def diagonal(self) -> Tensor:
        """The prior variances, ``[n]``."""
        return self.covariance.diagonal()

    @property
    def left(self) -> Tensor:
        """The part of them that the sites do not act on: none, ``[n]``."""
        return torch.zeros_like(self.diagonal)

    def at(self, a: Tensor, b: Tensor) -> AtRows:
        """Condition on sites ``[C, n]``: about 4 S n^3 / 3 operations."""
        factors = condition(self.covariance, a, b)
        return AtRows(*moments(self.covariance, self.diagonal, factors), factors.half_log_det)


def log_normaliser(a: Tensor, at: AtRows) -> Tensor:
    """Return log of the integral of ``N(g | 0, K) prod exp(a g - b g^2 / 2)``, summed over outputs.

    Args:
        a: ``[C, n]``.
        at: the posterior with those sites.
    """
    return 0.5 * (a * at.mean).sum() - at.half_log_det
