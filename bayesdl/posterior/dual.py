"""A covariance of many coordinates by a kernel between few rows: what Gauss-Newton leaves where data are fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from bayesdl.posterior.covariance import CHUNK, Covariance, Dense


@dataclass(frozen=True)
class Outer:
    """M = N C rows of ``O I`` coordinates, row (n, c) being ``left[n, c] x right[n]``, and never written out.

    Attributes:
        left: ``[N, C, O]``.
        right: ``[N, I]``.
    """

    left: Tensor
    right: Tensor

    @property
    def size(self) -> int:
        """Coordinates."""
        return self.left.shape[2] * self.right.shape[1]

    def forward(self, v: Tensor) -> Tensor:
        """``F v`` for ``v [S, O I]``, ``[S, M]``."""
        along = self.right @ v.unflatten(1, (self.left.shape[2], -1)).mT  # [S, N, O]
        return torch.einsum("sno,nco->snc", along, self.left).flatten(1)

    def backward(self, u: Tensor) -> Tensor:
        """``F^T u`` for ``u [S, M]``, ``[S, O I]``."""
        along = torch.einsum("snc,nco->sno", u.unflatten(1, self.left.shape[:2]), self.left)
        return (along.mT @ self.right).flatten(1)

    def kernel(self, other: Rows) -> Tensor:
        """``F G^T`` with the rows of another piece of the same kind, ``[M, M']``."""
        assert isinstance(other, Outer)
        by_left = self.left.flatten(0, 1) @ other.left.flatten(0, 1).mT
        by_right = self.right @ other.right.mT
        shape = (*self.left.shape[:2], *other.left.shape[:2])
        return (by_left.reshape(shape) * by_right[:, None, :, None]).reshape(by_left.shape)

    def own(self) -> Tensor:
        """``F_n F_n^T`` of every n, ``[N, C, C]``."""
        return self.left @ self.left.mT * self.right.square().sum(1)[:, None, None]

    def squares(self) -> Tensor:
        """Diagonal of ``F^T F``, ``[O I]``."""
        return (self.left.square().sum(1).mT @ self.right.square()).flatten()


@dataclass(frozen=True)
class Written:
    """Rows written out.

    Attributes:
        rows: ``[N, C, R]``.
    """

    rows: Tensor

    @property
    def size(self) -> int:
        """Coordinates."""
        return self.rows.shape[2]

    def forward(self, v: Tensor) -> Tensor:
        """As for ``Outer``."""
        return v @ self.rows.flatten(0, 1).mT

    def backward(self, u: Tensor) -> Tensor:
        """As for ``Outer``."""
        return u @ self.rows.flatten(0, 1)

    def kernel(self, other: Rows) -> Tensor:
        """As for ``Outer``."""
        assert isinstance(other, Written)
        return self.rows.flatten(0, 1) @ other.rows.flatten(0, 1).mT

    def own(self) -> Tensor:
        """As for ``Outer``."""
        return self.rows @ self.rows.mT

    def squares(self) -> Tensor:
        """As for ``Outer``."""
        return self.rows.square().sum((0, 1))


Rows = Outer | Written


def kernel(pieces: tuple[Rows, ...], others: tuple[Rows, ...]) -> Tensor:
    """``F G^T`` over all coordinates, ``[M, M']``."""
    return reduce(torch.add, (one.kernel(other) for one, other in zip(pieces, others, strict=True)))


@dataclass(frozen=True)
class Dual(Covariance):
    """``S = (1 + F^T F)^-1 = 1 - F^T (1 + F F^T)^-1 F`` for rows F ``[M, D]``, by the eigenvectors of ``F F^T``.

    Memory M^2 and what the rows take; an operation costs a product with F, its transpose and the eigenvectors.

    Attributes:
        pieces: F, in pieces of consecutive coordinates.
        values: ``[M]``, eigenvalues of ``F F^T``.
        vectors: ``[M, M]``, its eigenvectors in columns.
    """

    pieces: tuple[Rows, ...]
    values: Tensor
    vectors: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return sum(piece.size for piece in self.pieces)

    @property
    def noise_dim(self) -> int:
        """D + M: a draw from the prior, and noise of the rows on which it is conditioned (Matheron's rule)."""
        return self.dim + len(self.values)

    def solved(self, u: Tensor) -> Tensor:
        """``(1 + F F^T)^-1 u`` for ``u [..., M]``."""
        return ((u @ self.vectors) / (1.0 + self.values)) @ self.vectors.mT

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class."""
        prior, own = noise[..., : self.dim], noise[..., self.dim :]
        return prior - self._backward(self.solved(self._forward(prior) + own))

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return rows - self._backward(self.solved(self._forward(rows)))

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return rows + self._backward(self._forward(rows))

    def log_det(self) -> Tensor:
        """See the base class."""
        return -self.values.log1p().sum()

    def variances(self) -> Tensor:
        """See the base class; costs M products with ``F^T``."""
        total = self.vectors.new_zeros(self.dim)
        half = (self.vectors * (1.0 + self.values).rsqrt()).mT
        for some in half.split(CHUNK):
            total += self._backward(some).square().sum(0)
        return 1.0 - total

    def precisions(self) -> Tensor:
        """See the base class."""
        return 1.0 + torch.cat([piece.squares() for piece in self.pieces])

    def marginal(self, part: slice) -> Dense:
        """See the base class; of a part it is written out."""
        start, stop, _ = part.indices(self.dim)
        like = self.vectors
        units = torch.zeros(stop - start, self.dim, dtype=like.dtype, device=like.device)
        units[:, start:stop].fill_diagonal_(1.0)
        return Dense.of(self.times(units)[:, start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """Eigenvalues and vectors of the kernel, and the pieces by number."""
        found = {"kernel_values": self.values, "kernel_vectors": self.vectors}
        for k, piece in enumerate(self.pieces):
            if isinstance(piece, Outer):
                found |= {f"left_{k}": piece.left, f"right_{k}": piece.right}
            else:
                found[f"rows_{k}"] = piece.rows
        return found

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Dual:
        """Rebuild what ``tensors`` wrote."""
        pieces: list[Rows] = []
        for k in range(len(tensors)):
            if f"left_{k}" in tensors:
                pieces.append(Outer(tensors[f"left_{k}"], tensors[f"right_{k}"]))
            elif f"rows_{k}" in tensors:
                pieces.append(Written(tensors[f"rows_{k}"]))
        return cls(tuple(pieces), tensors["kernel_values"], tensors["kernel_vectors"])

    def _forward(self, v: Tensor) -> Tensor:
        flat = v.reshape(-1, self.dim)
        parts = flat.split([piece.size for piece in self.pieces], 1)
        total = reduce(torch.add, (piece.forward(part) for piece, part in zip(self.pieces, parts, strict=True)))
        return total.reshape(*v.shape[:-1], -1)

    def _backward(self, u: Tensor) -> Tensor:
        flat = u.reshape(-1, len(self.values))
        return torch.cat([piece.backward(flat) for piece in self.pieces], 1).reshape(*u.shape[:-1], self.dim)
