"""A Laplace posterior as eigenvalues: precisions ``d + lambda`` in the units of the prior, block by block.

With u = (z - m) / s for a prior N(m, diag s^2) and H the curvature of the likelihood, the precision of u is
``diag(s) H diag(s) + 1``. Its eigenvectors do not change when the prior's precision is multiplied by lambda, so
posterior, evidence and the evidence's derivatives are closed forms of lambda from one decomposition.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, Kronecker
from bayesdl.posterior.dual import Dual, Rows, kernel
from bayesdl.posterior.placed import Placed, Spectral


@dataclass(frozen=True, eq=False)
class Block(ABC):
    """Some coordinates that are independent of all others.

    Attributes:
        place: ``[R]``, which coordinates of z.
        scale: ``[R]``, the prior's sd, or 1 where the matrix holds the prior already.
        group: the name of the layer or site.
        prior: whether the prior adds a precision of 1 in these units; else the matrix is the whole precision.
        values: eigenvalues d, float64, any shape; those that are left out are 0.
    """

    place: Tensor
    scale: Tensor
    group: str
    prior: bool
    values: Tensor

    @property
    def added(self) -> float:
        """The precision that the prior adds: 1 or 0."""
        return float(self.prior)

    @abstractmethod
    def covariance(self) -> Covariance:
        """Of ``z[place] / scale``."""

    def log_det(self) -> float:
        """Log determinant of the precision of ``z[place]``."""
        inner = (self.values + self.added).log().sum()
        return float(inner) - 2.0 * float(self.scale.double().log().sum())

    def effective(self) -> float:
        """``gamma = sum d / (d + 1)``: how many directions the data determine (MacKay, 1992)."""
        return float(self._shares.sum())

    @abstractmethod
    def determined(self) -> Tensor:
        """How much of each coordinate the data determine, ``[R]``: 1 less its variance over the prior's.

        The sum is ``effective()``.
        """

    @property
    def _shares(self) -> Tensor:
        """How much of each direction the data determine, in the shape of the values."""
        return self.values / (self.values + 1.0)

    def _variances(self) -> Tensor:
        return (self.values + self.added).reciprocal().to(self.scale.dtype)


@dataclass(frozen=True, eq=False)
class Full(Block):
    """A dense matrix by its eigenvectors ``basis [R, R]``."""

    basis: Tensor

    @classmethod
    def of(cls, matrix: Tensor, place: Tensor, scale: Tensor, group: str, prior: bool) -> Full:
        """From the curvature by ``z[place]``, ``[R, R]``; negative eigenvalues stay, for the caller to judge."""
        wide = scale.double()
        values, basis = torch.linalg.eigh(wide[:, None] * matrix.double() * wide)
        return cls(place, scale, group, prior, values.clamp(min=0) if prior else values, basis)

    def determined(self) -> Tensor:
        """See the base class."""
        return self.basis.square() @ self._shares

    def covariance(self) -> Covariance:
        """Dense."""
        root = self.basis * (self.values + self.added).rsqrt()
        return Dense.of((root @ root.mT).to(self.scale.dtype))


@dataclass(frozen=True, eq=False)
class Separate(Block):
    """A diagonal matrix."""

    @classmethod
    def of(cls, diagonal: Tensor, place: Tensor, scale: Tensor, group: str, prior: bool) -> Separate:
        """From the curvature's diagonal by ``z[place]``, ``[R]``."""
        return cls(place, scale, group, prior, diagonal.double() * scale.double().square())

    def determined(self) -> Tensor:
        """See the base class."""
        return self._shares

    def covariance(self) -> Covariance:
        """Diagonal."""
        return Diagonal(self._variances().sqrt())


@dataclass(frozen=True, eq=False)
class Product(Block):
    """A matrix of weights ``[O, I]`` in the basis ``left [O, O] x right [I, I]``; the values are ``[O, I]``."""

    left: Tensor
    right: Tensor

    def determined(self) -> Tensor:
        """See the base class."""
        return (self.left.double().square() @ self._shares @ self.right.double().square().mT).flatten()

    def covariance(self) -> Covariance:
        """Kronecker."""
        return Kronecker(self.left, self.right, self._variances())


@dataclass(frozen=True, eq=False)
class Few(Block):
    """A matrix of low rank by its eigenvectors ``basis [R, rank]``."""

    basis: Tensor

    def determined(self) -> Tensor:
        """See the base class."""
        return self.basis.double().square() @ self._shares

    def covariance(self) -> Covariance:
        """The prior's, less what the few directions say."""
        return Spectral(self.basis, self._variances(), self.scale.new_tensor(1.0))


@dataclass(frozen=True, eq=False)
class Functional(Block):
    """A matrix ``F^T F`` of M rows by the eigenvectors ``vectors [M, M]`` of their kernel; the values are ``[M]``."""

    rows: tuple[Rows, ...]
    vectors: Tensor

    @classmethod
    def of(cls, rows: tuple[Rows, ...], place: Tensor, scale: Tensor, group: str) -> Functional:
        """From rows F in units of the prior."""
        values, vectors = torch.linalg.eigh(kernel(rows, rows).double())
        return cls(place, scale, group, True, values.clamp(min=0), rows, vectors.to(scale.dtype))

    def determined(self) -> Tensor:
        """See the base class."""
        return 1.0 - self.covariance().variances().double()

    def covariance(self) -> Covariance:
        """By the kernel."""
        return Dual(self.rows, self.values.to(self.scale.dtype), self.vectors)


def covariance_of(blocks: Sequence[Block], dim: int) -> Placed:
    """The covariance over all D coordinates; those in no block are points."""
    first = blocks[0].scale
    place = torch.cat([block.place for block in blocks])
    is_point = torch.ones(dim, dtype=torch.bool, device=first.device)
    is_point[place] = False
    inner = [block.covariance() for block in blocks]
    scale = torch.cat([block.scale for block in blocks])
    whole = inner[0] if len(inner) == 1 else Blocks(tuple(inner))
    return Placed(place, is_point.nonzero().flatten(), scale, whole)


def log_evidence(log_density: float, blocks: Sequence[Block]) -> float:
    """``log p(y, z*) + R/2 log 2 pi - 1/2 log det(precision)`` over the R coordinates that are no points.

    Args:
        log_density: log joint at the mode, in the unconstrained coordinates.
        blocks: the posterior's precision.
    """
    size = sum(len(block.place) for block in blocks)
    return log_density + 0.5 * size * math.log(2.0 * math.pi) - 0.5 * sum(block.log_det() for block in blocks)
