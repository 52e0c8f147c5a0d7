"""The inverse Hessian that L-BFGS knows: a diagonal and a few directions, of every chain at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class InverseHessian(NamedTuple):
    """``H = diag(a) + B G B^T = A A^T`` with ``A = diag(a)^1/2 (I + Q (L - I) Q^T)``, of every chain.

    Q ``[C, D, M]`` spans diag(a)^-1/2 B, M = min(D, 2 J), and L L^T is H's part there; Q is 0 where there is none.
    """

    diagonal: Tensor
    """``[C, D]``, a."""
    basis: Tensor
    """``[C, D, M]``, Q."""
    factor: Tensor
    """``[C, M, M]``, L."""

    def root(self, u: Tensor) -> Tensor:
        """``A u`` of ``u [C, K, D]``."""
        return self.diagonal.sqrt()[:, None] * self._along(u, self.factor)

    def times(self, gradient: Tensor) -> Tensor:
        """``H g`` of ``g [C, D]``."""
        scaled = (self.diagonal.sqrt() * gradient)[:, None]
        return self.root(self._along(scaled, self.factor.mT))[:, 0]

    def log_det(self) -> Tensor:
        """``log |H|``, ``[C]``."""
        return self.diagonal.log().sum(1) + 2.0 * self.factor.diagonal(dim1=1, dim2=2).log().sum(1)

    def variances(self) -> Tensor:
        """The diagonal of H, ``[C, D]``."""
        gain = self.factor @ self.factor.mT - torch.eye(self.factor.shape[1]).to(self.factor)
        return self.diagonal * (1.0 + ((self.basis @ gain) * self.basis).sum(2))

    def _along(self, u: Tensor, factor: Tensor) -> Tensor:
        inner = u @ self.basis
        return u + (inner @ factor.mT - inner) @ self.basis.mT


def inverse_hessian(diagonal: Tensor, steps: Tensor, changes: Tensor) -> InverseHessian:
    """The L-BFGS inverse Hessian (Zhang et al., 2022, algorithms 3 and 4, where D may also be below 2 J).

    Args:
        diagonal: ``[C, D]``, a.
        steps: ``[C, J, D]``, rows of S^T, the latest last; rows of 0 are unused.
        changes: ``[C, J, D]``, rows of Y^T: how the gradient of the negative log density changed.

    Returns:
        H; of chains whose directions are too close to dependent for a Cholesky factor, diag(a) alone.
    """
    root = diagonal.sqrt()[:, None]
    scaled = changes * root
    inner = steps @ changes.mT
    curvature = inner.diagonal(dim1=1, dim2=2)
    upper = inner.triu() + (curvature == 0).to(inner).diag_embed()
    eye = torch.eye(inner.shape[1], dtype=inner.dtype, device=inner.device)
    right = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    corner = right.mT @ (curvature.diag_embed() + scaled @ scaled.mT) @ right
    middle = torch.cat([torch.cat([torch.zeros_like(right), -right], 2), torch.cat([-right.mT, corner], 2)], 1)
    basis, triangle = torch.linalg.qr(torch.cat([scaled, steps / root], 1).mT)
    size = triangle.shape[1]
    whole = torch.eye(size, dtype=inner.dtype, device=inner.device) + triangle @ middle @ triangle.mT
    good = whole.isfinite().all((1, 2)) & basis.isfinite().all((1, 2))
    identity = torch.eye(size, dtype=inner.dtype, device=inner.device).expand_as(whole)
    factor, failed = torch.linalg.cholesky_ex(torch.where(good[:, None, None], whole, identity))
    good = good & (failed == 0)
    keep = good[:, None, None]
    return InverseHessian(diagonal, torch.where(keep, basis, 0.0), torch.where(keep, factor, identity))


def next_diagonal(diagonal: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The diagonal a after one more step s and change y, ``[C, D]`` (Gilbert & Lemarechal, 1989).

    ``1/a' = (y.a y / a + y^2 - (y.a y) / (s.s/a) (s/a)^2) / s.y``, elementwise.
    """
    wide = (change.square() * diagonal).sum(1, keepdim=True)
    tall = (step.square() / diagonal).sum(1, keepdim=True)
    curvature = (step * change).sum(1, keepdim=True)
    return curvature / (wide / diagonal + change.square() - wide / tall * (step / diagonal).square())
