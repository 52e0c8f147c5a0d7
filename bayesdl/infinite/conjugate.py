r"""Preconditioned conjugate gradients on the matrices of Gaussian-process regression.

All of it is about ``B_c = I + sqrt(b_c) K sqrt(b_c)`` of ``bayesdl.infinite.sites``, for C outputs at once that share
the kernel matrix K, which enters only through products with blocks of vectors. The preconditioner is
``P_c = I + sqrt(b_c) R R^T sqrt(b_c)`` with ``R R^T`` K's pivoted Cholesky factorisation of some rank, inverted by the
matrix inversion lemma.

Sources: Gardner et al. (2018), GPyTorch: Blackbox matrix-matrix Gaussian process inference with GPU acceleration,
sec. 4 and app. B; Harbrecht et al. (2012), On the low-rank approximation by the pivoted Cholesky decomposition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import Divergence
from bayesdl.infinite.gram import Gram

STEPS = 1000  # most steps of conjugate gradients


def pivoted_cholesky(kernel: Kernel, x: Tensor, rank: int, tolerance: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return the rows of largest conditional variance, chosen greedily, and the factor R that they give.

    Args:
        kernel: of K.
        x: ``[n, d]``.
        rank: most pivots.
        tolerance: stop where every conditional variance is below this part of the largest variance.

    Returns:
        The pivots ``[m]``, each the row that those before it explain least, and ``R [n, m]`` with ``R R^T`` about K;
        the diagonal of ``K - R R^T`` is nowhere negative.

    Cost: O(n m^2), and n m evaluations of the kernel.
    """
    with torch.no_grad():
        left = kernel(x, diag=True).clone()
        factor, pivots = x.new_zeros(len(x), min(rank, len(x))), []
        smallest = tolerance * float(left.max())
        for k in range(factor.shape[1]):
            pivot = int(left.argmax())
            if not float(left[pivot]) > smallest:
                break
            column = kernel(x, x[pivot : pivot + 1]).to_dense().squeeze(-1)
            column = (column - factor[:, :k] @ factor[pivot, :k]) / left[pivot].sqrt()
            factor[:, k] = column
            left = (left - column.square()).clamp(min=0)
            left[pivot] = 0
            pivots.append(pivot)
    return torch.tensor(pivots, dtype=torch.long), factor[:, : len(pivots)]


class Preconditioner:
    """``P_c = I + sqrt(b_c) R R^T sqrt(b_c)``.

    Args:
        factor: ``[n, m]`` R.
        root: ``[C, n]`` sqrt(b).
    """

    def __init__(self, factor: Tensor, root: Tensor) -> None:
        self.scaled = root.unsqueeze(-1) * factor
        inner = torch.eye(factor.shape[1], dtype=factor.dtype) + self.scaled.mT @ self.scaled
        self.cholesky = torch.linalg.cholesky(inner)

    def solve(self, v: Tensor) -> Tensor:
        """Return ``P^-1 v`` for ``v [C, n, k]``."""
        return v - self.scaled @ torch.cholesky_solve(self.scaled.mT @ v, self.cholesky)

    @property
    def half_log_det(self) -> Tensor:
        """Half of log det P_c, ``[C]``."""
        return self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def draw(self, count: int, seed: int) -> Tensor:
        """Return draws from ``N(0, P_c)``, ``[C, n, count]``."""
        source = generator(seed, "conjugate gradients", "probes")
        outputs, n, m = self.scaled.shape
        inner = torch.randn(outputs, m, count, generator=source, dtype=self.scaled.dtype)
        return self.scaled @ inner + torch.randn(outputs, n, count, generator=source, dtype=self.scaled.dtype)


class Solution(NamedTuple):
    """The result of conjugate gradients."""

    value: Tensor
    """``[C, n, k]``."""
    residual: float
    """The largest of the C k relative residuals ``|v - B u| / |v|``, of the recursion."""
    steps: int
    alpha: Tensor
    """``[steps, C, k]`` lengths of the steps; zero after a column has converged."""
    beta: Tensor
    """``[steps, C, k]``."""


def product(gram: Gram, root: Tensor, v: Tensor) -> Tensor:
    """Return ``B_c v_c`` for ``v [C, n, k]``, all columns in one product with K."""
    outputs, n, k = v.shape
    scaled = root.unsqueeze(-1) * v
    through = (gram @ scaled.movedim(0, 1).reshape(n, outputs * k)).view(n, outputs, k).movedim(1, 0)
    return v + root.unsqueeze(-1) * through


def solve(gram: Gram, root: Tensor, v: Tensor, preconditioner: Preconditioner, tolerance: float) -> Solution:
    """Solve ``B_c u = v`` for many columns at once; a column stops where its own residual is small.

    Args:
        gram: K.
        root: ``[C, n]`` sqrt(b).
        v: ``[C, n, k]``.
        preconditioner: near B.
        tolerance: of the relative residual.

    Raises:
        Divergence: a column has not converged after 1000 steps, or the matrix is not positive definite.
    """
    scale = v.norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
    value, left = torch.zeros_like(v), v.clone()
    near = preconditioner.solve(left)
    direction, power = near, (left * near).sum(1)
    residual = left.norm(dim=1) / scale
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    while bool((active := residual > tolerance).any()) and len(alphas) < STEPS:
        image = product(gram, root, direction)
        curvature = (direction * image).sum(1)
        if not bool((curvature[active] > 0).all()):
            raise Divergence(
                "The kernel matrix of the training rows is not positive semi-definite: either the kernel is no "
                "covariance function, or its values overflow (scale the inputs)."
            )
        alpha = torch.where(active, power / curvature, 0.0)
        value += alpha.unsqueeze(1) * direction
        left = left - alpha.unsqueeze(1) * image
        near = preconditioner.solve(left)
        new = (left * near).sum(1)
        beta = torch.where(active, new / power, 0.0)
        direction, power = near + beta.unsqueeze(1) * direction, new
        residual = torch.where(active, left.norm(dim=1) / scale, residual)
        alphas.append(alpha)
        betas.append(beta)
    worst = float(residual.max()) if residual.numel() else 0.0
    if not worst <= tolerance:
        raise Divergence(
            f"Conjugate gradients stopped at a relative residual of {worst:.1e} after {STEPS} steps, above "
            f"{tolerance:.0e}. The noise is very small beside the kernel: give a larger noise, use solver='cholesky', "
            "or inducing points (inducing=...)."
        )
    empty = v.new_zeros(0, v.shape[0], v.shape[2])
    return Solution(
        value, worst, len(alphas), torch.stack(alphas) if alphas else empty, torch.stack(betas) if betas else empty
    )


def half_log_det(
    gram: Gram, root: Tensor, preconditioner: Preconditioner, probes: int, tolerance: float, seed: int
) -> tuple[float, float]:
    """Estimate half of sum_c log det B_c, with its standard error, by stochastic Lanczos quadrature.

    ``log det B = log det P + E[z^T P^-1/2 log(P^-1/2 B P^-1/2) P^-1/2 z]`` over z ~ N(0, P), where conjugate gradients
    from z give the tridiagonal matrix whose logarithm's first entry is the quadratic form (Gardner et al., eq. 6).

    Args:
        gram: K.
        root: ``[C, n]``.
        preconditioner: P.
        probes: number of z, at least 2.
        tolerance: of conjugate gradients.
        seed: the probes are a function of it.
    """
    z = preconditioner.draw(probes, seed)
    length = (z * preconditioner.solve(z)).sum(1)
    solution = solve(gram, root, z, preconditioner, tolerance)
    values = torch.zeros_like(length)
    for c in range(z.shape[0]):
        for k in range(probes):
            alpha, beta = solution.alpha[:, c, k], solution.beta[:, c, k]
            steps = int((alpha != 0).sum())
            if steps == 0:
                continue  # P is B
            alpha, beta = alpha[:steps], beta[: steps - 1]
            diagonal = 1 / alpha + torch.cat([alpha.new_zeros(1), beta / alpha[:-1]])
            side = beta.sqrt() / alpha[:-1]
            nodes, vectors = torch.linalg.eigh(diagonal.diag() + side.diag(1) + side.diag(-1))
            values[c, k] = length[c, k] * (vectors[0].square() * nodes.clamp(min=1e-300).log()).sum()
    estimate = float(preconditioner.half_log_det.sum()) + 0.5 * float(values.mean(1).sum())
    return estimate, 0.5 * math.sqrt(float((values.var(1) / probes).sum()))
