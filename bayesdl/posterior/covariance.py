"""Covariance matrices ``[D, D]`` that are never written out: diagonal, low rank, dense, Kronecker, and blocks of them.

Everything that a Gaussian posterior needs of its covariance is a method here, and costs what its structure allows.
Rows ``[..., D]`` are vectors; a matrix acts on each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from bayesdl.errors import MethodError

CHUNK = 256
"""Columns of a root that are looked at together where two structures have no closed form in common."""
MOST_DENSE = 8192
"""Dimensions of a matrix that is written out at most: 0.5 GiB in double precision."""


@dataclass(frozen=True)
class Covariance(ABC):
    """A symmetric positive semi-definite matrix S = A A^T."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """D."""

    @property
    def noise_dim(self) -> int:
        """Standard normal numbers that a draw takes: columns of A."""
        return self.dim

    @abstractmethod
    def scaled(self, noise: Tensor) -> Tensor:
        """``A e`` for rows e of ``noise [n, noise_dim]``: draws from N(0, S), ``[n, D]``."""

    @abstractmethod
    def times(self, rows: Tensor) -> Tensor:
        """``S v`` for rows v ``[..., D]``."""

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """``S^-1 v`` for rows v ``[..., D]``."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """Log determinant, a scalar; -inf if S is singular."""

    @abstractmethod
    def variances(self) -> Tensor:
        """Diagonal of S, ``[D]``."""

    @abstractmethod
    def precisions(self) -> Tensor:
        """Diagonal of S^-1, ``[D]``."""

    @abstractmethod
    def marginal(self, part: slice) -> Covariance:
        """Covariance of some consecutive coordinates, with the rest integrated out."""

    def dense(self) -> Tensor:
        """The matrix written out, ``[D, D]``.

        Raises:
            MethodError: it has more than ``MOST_DENSE`` dimensions.
        """
        if self.dim > MOST_DENSE:
            gigabytes = self.dim**2 * 8 / 2**30
            raise MethodError(
                f"A covariance of {self.dim} coordinates written out takes {gigabytes:,.0f} GiB; use its diagonal "
                "(variances), its marginals, or a structure that need not be written out."
            )
        like = self.variances()
        return self.times(torch.eye(self.dim, dtype=like.dtype, device=like.device))

    def trace_in(self, other: Covariance) -> Tensor:
        """``tr(T^-1 S)`` with T the ``other`` matrix: exact for every pair, in closed form where they share one."""
        if isinstance(other, Diagonal):
            return (self.variances() * other.precisions()).sum()
        like, total = self.variances(), self.variances().new_zeros(())
        for start in range(0, self.noise_dim, CHUNK):
            count = min(CHUNK, self.noise_dim - start)
            noise = torch.zeros(count, self.noise_dim, dtype=like.dtype, device=like.device)
            noise[:, start : start + count].fill_diagonal_(1.0)
            columns = self.scaled(noise)
            total = total + (columns * other.solve(columns)).sum()
        return total

    def double(self) -> Covariance:
        """The same in double precision."""
        return restore({name: part.double() for name, part in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name, from which ``restore`` makes it again."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


@dataclass(frozen=True)
class Diagonal(Covariance):
    """``S = diag(sd^2)``.

    Attributes:
        sd: ``[D]``; a coordinate with 0 is a point.
    """

    sd: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return len(self.sd)

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class; cost D a draw."""
        return noise * self.sd

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return rows * self.sd.square()

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return rows / self.sd.square()

    def log_det(self) -> Tensor:
        """See the base class."""
        return 2.0 * self.sd.log().sum()

    def variances(self) -> Tensor:
        """See the base class."""
        return self.sd.square()

    def precisions(self) -> Tensor:
        """See the base class."""
        return self.sd.square().reciprocal()

    def marginal(self, part: slice) -> Diagonal:
        """See the base class."""
        return Diagonal(self.sd[part])

    def trace_in(self, other: Covariance) -> Tensor:
        """See the base class."""
        return (self.variances() * other.precisions()).sum()


@dataclass(frozen=True)
class LowRank(Covariance):
    """``S = diag(sd^2) + F F^T`` with R columns.

    Everything goes through the R x R matrix ``C = 1 + F^T diag(sd^-2) F`` (Woodbury's identity and the matrix
    determinant lemma): a solve costs 2 D R, the set-up D R^2.

    Attributes:
        sd: ``[D]``, positive.
        factor: F, ``[D, R]``.
    """

    sd: Tensor
    factor: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return len(self.sd)

    @property
    def noise_dim(self) -> int:
        """D + R: independent noise, and that along the columns."""
        return self.factor.shape[0] + self.factor.shape[1]

    @cached_property
    def _whitened(self) -> tuple[Tensor, Tensor]:
        """``diag(sd^-2) F`` and the Cholesky factor of C."""
        scaled = self.factor / self.sd.square()[:, None]
        inner = self.factor.mT @ scaled
        return scaled, torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))

    @cached_property
    def inverse_factor(self) -> Tensor:
        """G ``[D, R]`` with ``S^-1 = diag(sd^-2) - G G^T``."""
        scaled, root = self._whitened
        return torch.linalg.solve_triangular(root, scaled.mT, upper=False).mT

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class; cost D R a draw."""
        own, along = noise.split([self.dim, self.factor.shape[1]], -1)
        return own * self.sd + along @ self.factor.mT

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return rows * self.sd.square() + (rows @ self.factor) @ self.factor.mT

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return rows / self.sd.square() - (rows @ self.inverse_factor) @ self.inverse_factor.mT

    def log_det(self) -> Tensor:
        """See the base class."""
        return 2.0 * (self.sd.log().sum() + self._whitened[1].diagonal().log().sum())

    def variances(self) -> Tensor:
        """See the base class."""
        return self.sd.square() + self.factor.square().sum(1)

    def precisions(self) -> Tensor:
        """See the base class."""
        return self.sd.square().reciprocal() - self.inverse_factor.square().sum(1)

    def marginal(self, part: slice) -> LowRank:
        """See the base class."""
        return LowRank(self.sd[part], self.factor[part])

    def trace_in(self, other: Covariance) -> Tensor:
        """See the base class; R solves instead of D."""
        columns = self.factor.mT
        return (self.sd.square() * other.precisions()).sum() + (columns * other.solve(columns)).sum()


@dataclass(frozen=True)
class Dense(Covariance):
    """``S = L L^T`` with its Cholesky factor.

    Attributes:
        root: L, ``[D, D]``, lower triangular.
    """

    root: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Dense:
        """From S itself.

        Raises:
            MethodError: it is not positive definite.
        """
        root, failed = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
        if failed:
            raise MethodError("The covariance is not positive definite.")
        return cls(root.contiguous())  # so that one read from a file multiplies in the same order

    @property
    def dim(self) -> int:
        """D."""
        return len(self.root)

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class; cost D^2 a draw."""
        return noise @ self.root.mT

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return (rows @ self.root) @ self.root.mT

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        flat = rows.reshape(-1, self.dim).mT
        return torch.cholesky_solve(flat, self.root).mT.reshape(rows.shape)

    def log_det(self) -> Tensor:
        """See the base class."""
        return 2.0 * self.root.diagonal().log().sum()

    def variances(self) -> Tensor:
        """See the base class."""
        return self.root.square().sum(1)

    def precisions(self) -> Tensor:
        """See the base class."""
        return torch.cholesky_inverse(self.root).diagonal()

    def marginal(self, part: slice) -> Dense:
        """See the base class."""
        rows = self.root[part]
        return Dense(torch.linalg.cholesky(rows @ rows.mT))


@dataclass(frozen=True)
class Kronecker(Covariance):
    """The covariance of a matrix ``[O, I]`` whose variances are given in a product basis.

    ``S = (U x V) diag(variances) (U x V)^T`` with orthogonal U and V. Equal to ``P x Q`` (a matrix normal) where
    ``variances`` is the outer product of the eigenvalues of P and Q; any other variances are possible too (E-KFAC, and
    K-FAC with a prior added). Coordinates are the matrix row by row. A draw costs O I (O + I).

    Attributes:
        left: U, ``[O, O]``.
        right: V, ``[I, I]``.
        spread: variances, ``[O, I]``.
    """

    left: Tensor
    right: Tensor
    spread: Tensor

    @property
    def dim(self) -> int:
        """O I."""
        return self.spread.numel()

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class."""
        matrix = noise.reshape(*noise.shape[:-1], *self.spread.shape) * self.spread.sqrt()
        return (self.left @ matrix @ self.right.mT).reshape(noise.shape)

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return self._through(rows, self.spread)

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return self._through(rows, self.spread.reciprocal())

    def log_det(self) -> Tensor:
        """See the base class."""
        return self.spread.log().sum()

    def variances(self) -> Tensor:
        """See the base class."""
        return (self.left.square() @ self.spread @ self.right.square().mT).reshape(-1)

    def precisions(self) -> Tensor:
        """See the base class."""
        return (self.left.square() @ self.spread.reciprocal() @ self.right.square().mT).reshape(-1)

    def marginal(self, part: slice) -> Covariance:
        """See the base class; of a part it has no structure."""
        if part.indices(self.dim) == (0, self.dim, 1):
            return self
        return Dense.of(self.dense()[part, part])

    def _through(self, rows: Tensor, factors: Tensor) -> Tensor:
        matrix = self.left.mT @ rows.reshape(*rows.shape[:-1], *self.spread.shape) @ self.right
        return (self.left @ (matrix * factors) @ self.right.mT).reshape(rows.shape)


@dataclass(frozen=True)
class Blocks(Covariance):
    """Independent groups of consecutive coordinates, each with a covariance of its own.

    Attributes:
        blocks: in the order of the coordinates.
    """

    blocks: tuple[Covariance, ...]

    @property
    def dim(self) -> int:
        """D."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each block."""
        return [block.dim for block in self.blocks]

    @property
    def noise_dim(self) -> int:
        """See the base class."""
        return sum(block.noise_dim for block in self.blocks)

    def parts(self) -> list[slice]:
        """Where each block lies."""
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class."""
        pieces = noise.split([block.noise_dim for block in self.blocks], -1)
        return torch.cat([block.scaled(piece) for block, piece in zip(self.blocks, pieces, strict=True)], -1)

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        pieces = rows.split(self.sizes, -1)
        return torch.cat([block.times(piece) for block, piece in zip(self.blocks, pieces, strict=True)], -1)

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        pieces = rows.split(self.sizes, -1)
        return torch.cat([block.solve(piece) for block, piece in zip(self.blocks, pieces, strict=True)], -1)

    def log_det(self) -> Tensor:
        """See the base class."""
        return torch.stack([block.log_det() for block in self.blocks]).sum()

    def variances(self) -> Tensor:
        """See the base class."""
        return torch.cat([block.variances() for block in self.blocks])

    def precisions(self) -> Tensor:
        """See the base class."""
        return torch.cat([block.precisions() for block in self.blocks])

    def marginal(self, part: slice) -> Covariance:
        """See the base class."""
        start, stop, _ = part.indices(self.dim)
        found = []
        for block, own in zip(self.blocks, self.parts(), strict=True):
            low, high = max(start, own.start), min(stop, own.stop)
            if low < high:
                whole = (low, high) == (own.start, own.stop)
                found.append(block if whole else block.marginal(slice(low - own.start, high - own.start)))
        return found[0] if len(found) == 1 else Blocks(tuple(found))

    def trace_in(self, other: Covariance) -> Tensor:
        """See the base class; block by block where both have the same ones."""
        if isinstance(other, Blocks) and self.sizes == other.sizes:
            pairs = zip(self.blocks, other.blocks, strict=True)
            return torch.stack([mine.trace_in(theirs) for mine, theirs in pairs]).sum()
        return super().trace_in(other)

    def tensors(self) -> dict[str, Tensor]:
        """The blocks' parts, each with the block's number before its name."""
        return {f"{k}.{name}": part for k, block in enumerate(self.blocks) for name, part in block.tensors().items()}


def restore(tensors: Mapping[str, Tensor]) -> Covariance:
    """The covariance that has these parts: their names tell its structure."""
    from bayesdl.posterior.dual import Dual  # which stand on this module
    from bayesdl.posterior.placed import Placed, Spectral

    if "place" in tensors:
        return Placed.restore(dict(tensors))
    if "kernel_vectors" in tensors:
        return Dual.restore(tensors)
    if any("." in name for name in tensors):
        groups: dict[int, dict[str, Tensor]] = {}
        for name, part in tensors.items():
            number, _, rest = name.partition(".")
            groups.setdefault(int(number), {})[rest] = part
        return Blocks(tuple(restore(groups[k]) for k in sorted(groups)))
    kinds: Sequence[type[Covariance]] = (Diagonal, LowRank, Dense, Kronecker, Spectral)
    for kind in kinds:
        if {entry.name for entry in fields(kind)} == set(tensors):
            return kind(**tensors)
    raise MethodError(f"No covariance has the parts {sorted(tensors)}.")
