"""Matrix normals as a family for variational inference, and families of independent groups of coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.infer.gaussian_families import Family
from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Kronecker


@dataclass(frozen=True)
class MatrixNormal(Family):
    """A matrix ``W [O, I]`` = mean + L E M^T with E standard normal: ``S = (L L^T) x (M M^T)``.

    Both roots are lower triangular, written as in ``FullRank``: the spread is log of L's diagonal ``[O]``, the unit
    triangular rest ``[O, O]``, and the same of M. One scale is in both; the gradient moves it in both. A draw costs
    O I (O + I).

    Attributes:
        rows: O.
        columns: I.
    """

    rows: int
    columns: int

    @property
    def size(self) -> int:
        """O (1 + O) + I (1 + I)."""
        return self.rows * (1 + self.rows) + self.columns * (1 + self.columns)

    def start(self, sd: Tensor, stream: torch.Generator) -> Tensor:
        """See the base class; the logarithm of sd is taken apart into a part of the row and one of the column."""
        log_sd = sd.log().reshape(self.rows, self.columns)
        half = 0.5 * log_sd.mean()
        left, right = log_sd.mean(1) - half, log_sd.mean(0) - half
        return torch.cat([left, sd.new_zeros(self.rows**2), right, sd.new_zeros(self.columns**2)])

    def covariance(self, spread: Tensor) -> Product:
        """See the base class."""
        left, right = self._roots(spread)
        return Product(Dense(left), Dense(right))

    def settled(self, spread: Tensor) -> Kronecker:
        """See the base class: in the bases in which both factors are diagonal."""
        (left, first, _), (right, second, _) = (torch.linalg.svd(root) for root in self._roots(spread))
        # Contiguous, so that one read from a file multiplies in the same order.
        return Kronecker(left.contiguous(), right.contiguous(), torch.outer(first.square(), second.square()))

    def half_log_det(self, spread: Tensor) -> Tensor:
        """See the base class."""
        left, _, right, _ = self._parts(spread)
        return self.columns * left.sum() + self.rows * right.sum()

    def entropy_gradient(self, spread: Tensor) -> Tensor:
        """See the base class."""
        gradient = torch.zeros_like(spread)
        left, _, right, _ = self._parts(gradient)
        left.fill_(self.columns)
        right.fill_(self.rows)
        return gradient

    def trace_gradient(self, spread: Tensor, precision: Tensor) -> Tensor:
        """See the base class: ``1/2 sum_oi P_oi (L L^T)_oo (M M^T)_ii``."""
        left, right = self._roots(spread)
        weights = precision.reshape(self.rows, self.columns)
        by_left = (weights @ right.square().sum(1))[:, None] * left
        by_right = (weights.mT @ left.square().sum(1))[:, None] * right
        return self._gathered(spread, by_left, by_right)

    def pull(self, spread: Tensor, noise: Tensor, away: Tensor, slopes: Tensor) -> Tensor:
        """See the base class: ``sum_s <G_s, L E_s M^T>``."""
        left, right = self._roots(spread)
        e, g = (part.reshape(-1, self.rows, self.columns) for part in (noise, slopes))
        by_left = torch.einsum("soi,spi->op", g @ right, e)
        by_right = torch.einsum("soi,soj->ij", g, left @ e)
        return self._gathered(spread, by_left, by_right)

    def _parts(self, spread: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log of the diagonals, and the rest, of both roots."""
        o, i = self.rows, self.columns
        left, first, right, second = spread.split([o, o * o, i, i * i])
        return left, first.reshape(o, o), right, second.reshape(i, i)

    def _roots(self, spread: Tensor) -> tuple[Tensor, Tensor]:
        """L and M."""
        left, first, right, second = self._parts(spread)
        return _root(left, first), _root(right, second)

    def _gathered(self, spread: Tensor, by_left: Tensor, by_right: Tensor) -> Tensor:
        """Gradient ``[size]`` from those by L and M."""
        left, right = self._roots(spread)
        found = []
        for root, slope in ((left, by_left), (right, by_right)):
            scale = root.diagonal()[:, None]
            found += [(slope * root).sum(1), (slope * scale).tril(-1).reshape(-1)]
        return torch.cat(found)


@dataclass(frozen=True)
class Independent(Family):
    """Independent groups of consecutive coordinates, each with a family of its own.

    Attributes:
        parts: in the order of the coordinates.
    """

    parts: tuple[Family, ...]

    @property
    def size(self) -> int:
        """That of all parts, one behind the other."""
        return sum(part.size for part in self.parts)

    @property
    def noise_dim(self) -> int:
        """See the base class."""
        return sum(part.noise_dim for part in self.parts)

    def start(self, sd: Tensor, stream: torch.Generator) -> Tensor:
        """See the base class."""
        own = sd.split([part.dim for part in self.parts])
        return torch.cat([part.start(piece, stream) for part, piece in zip(self.parts, own, strict=True)])

    def covariance(self, spread: Tensor) -> Blocks:
        """See the base class."""
        return Blocks(tuple(part.covariance(piece) for part, piece in self._pairs(spread)))

    def settled(self, spread: Tensor) -> Blocks:
        """See the base class."""
        return Blocks(tuple(part.settled(piece) for part, piece in self._pairs(spread)))

    def half_log_det(self, spread: Tensor) -> Tensor:
        """See the base class."""
        return torch.stack([part.half_log_det(piece) for part, piece in self._pairs(spread)]).sum()

    def entropy_gradient(self, spread: Tensor) -> Tensor:
        """See the base class."""
        return torch.cat([part.entropy_gradient(piece) for part, piece in self._pairs(spread)])

    def trace_gradient(self, spread: Tensor, precision: Tensor) -> Tensor:
        """See the base class."""
        own = precision.split([part.dim for part in self.parts])
        pairs = zip(self._pairs(spread), own, strict=True)
        return torch.cat([part.trace_gradient(piece, weights) for (part, piece), weights in pairs])

    def pull(self, spread: Tensor, noise: Tensor, away: Tensor, slopes: Tensor) -> Tensor:
        """See the base class."""
        dims = [part.dim for part in self.parts]
        rows = zip(
            noise.split([part.noise_dim for part in self.parts], 1),
            away.split(dims, 1),
            slopes.split(dims, 1),
            strict=True,
        )
        pairs = zip(self._pairs(spread), rows, strict=True)
        return torch.cat([part.pull(piece, *own) for (part, piece), own in pairs])

    def _pairs(self, spread: Tensor) -> list[tuple[Family, Tensor]]:
        return list(zip(self.parts, spread.split([part.size for part in self.parts]), strict=True))


@dataclass(frozen=True)
class Product(Covariance):
    """``S = left x right`` of a matrix ``[O, I]``, row by row: what ``Kronecker`` is, without its eigenvectors.

    Attributes:
        left: of the rows, ``[O, O]``.
        right: of the columns, ``[I, I]``.
    """

    left: Dense
    right: Dense

    @property
    def dim(self) -> int:
        """O I."""
        return self.left.dim * self.right.dim

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class."""
        return (self.left.root @ self._matrix(noise) @ self.right.root.mT).reshape(noise.shape)

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return self.left.times(self.right.times(self._matrix(rows)).mT).mT.reshape(rows.shape)

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return self.left.solve(self.right.solve(self._matrix(rows)).mT).mT.reshape(rows.shape)

    def log_det(self) -> Tensor:
        """See the base class."""
        return self.right.dim * self.left.log_det() + self.left.dim * self.right.log_det()

    def variances(self) -> Tensor:
        """See the base class."""
        return torch.outer(self.left.variances(), self.right.variances()).reshape(-1)

    def precisions(self) -> Tensor:
        """See the base class."""
        return torch.outer(self.left.precisions(), self.right.precisions()).reshape(-1)

    def marginal(self, part: slice) -> Dense:
        """See the base class; of a part it has no structure."""
        return Dense.of(self.dense()[part, part])

    def _matrix(self, rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:-1], self.left.dim, self.right.dim)


def _root(log_diagonal: Tensor, rest: Tensor) -> Tensor:
    eye = torch.eye(len(rest), dtype=rest.dtype, device=rest.device)
    return log_diagonal.exp()[:, None] * (rest.tril(-1) + eye)
