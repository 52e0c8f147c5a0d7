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
    """What predictions need of the training rows, for C outputs and n rows."""

    root: Tensor
    """``[C, n]`` sqrt(b)."""
    cholesky: Tensor
    """``[C, n, n]`` lower factor of B."""
    weights: Tensor
    """``[C, n]`` such that the posterior mean of g at x is ``k(x)^T weights``."""


def condition(covariance: Tensor, a: Tensor, b: Tensor) -> Factors:
    """Factor a Gaussian process conditioned on its sites.

    Args:
        covariance: ``[n, n]`` K, shared by the outputs.
        a: ``[C, n]`` sites' linear coefficients.
        b: ``[C, n]`` sites' precisions, positive.

    Raises:
        MethodError: B has no Cholesky factor in float64: K is not positive semi-definite, or not finite.

    Cost: C n^3 / 3 operations, 8 C n^2 bytes.
    """
    root = b.sqrt()
    matrix = root.unsqueeze(-1) * covariance * root.unsqueeze(-2)
    matrix = matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    cholesky, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise MethodError(
            "The kernel matrix of the training rows is not positive semi-definite in float64. Either the kernel is no "
            "covariance function, its values overflow (scale the inputs), or the noise is too small beside them."
        )
    solved = torch.cholesky_solve((a / root).unsqueeze(-1), cholesky).squeeze(-1)
    return Factors(root, cholesky, root * solved)


def mean_at(cross: Tensor, factors: Factors) -> Tensor:
    """Return the posterior mean of g, ``[C, N]``, from the covariances ``cross [n, N]`` with the training rows."""
    return factors.weights @ cross


def whitened(cross: Tensor, factors: Factors) -> Tensor:
    """Return V ``[C, n, N]`` with ``V^T V`` the reduction of the prior covariance by the data (n^2 N operations)."""
    scaled = factors.root.unsqueeze(-1) * cross
    return torch.linalg.solve_triangular(factors.cholesky, scaled, upper=False)


def moments(cross: Tensor, diagonal: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Return posterior means and variances of g, each ``[C, N]``.

    Args:
        cross: ``[n, N]`` covariances of the training rows with the new ones.
        diagonal: ``[N]`` prior variances of the new rows.
        factors: from ``condition``.
    """
    reduction = whitened(cross, factors).square().sum(-2)
    return mean_at(cross, factors), (diagonal - reduction).clamp(min=0)


def log_normaliser(mean: Tensor, a: Tensor, factors: Factors) -> Tensor:
    """Return log of the integral of ``N(g | 0, K) prod exp(a g - b g^2 / 2)``, summed over outputs.

    Args:
        mean: ``[C, n]`` posterior mean of g at the training rows.
        a: ``[C, n]``.
        factors: from ``condition``.
    """
    log_det = factors.cholesky.diagonal(dim1=-2, dim2=-1).log().sum()
    return 0.5 * (a * mean).sum() - log_det
