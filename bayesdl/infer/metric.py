"""The metric of a Markov chain: the linear map between whitened and unconstrained coordinates.

Kernels move in u with ``z = A u``, where ``A A^T = M^-1`` approximates the covariance of the posterior. Three shapes:

- diagonal: ``A = diag(s)``;
- dense: ``A = L``, the Cholesky factor of the covariance; D^2 numbers and operations;
- low rank plus diagonal: ``A = diag(s) (I + V diag(t - 1) V^T)`` with K orthonormal columns V, which stretches K
  directions by t and costs 2 D K operations.

Every group of chains has a metric of its own. The origin of u may be moved to any point z, for kernels that turn about
one (elliptical slice sampling about the prior's mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State

Shape = Literal["diag", "dense", "low_rank"]
SHAPES: tuple[Shape, ...] = ("diag", "dense", "low_rank")


@dataclass(frozen=True)
class Metric:
    """The map z = A u + centre, for G groups of K chains, group after group.

    Attributes:
        scale: ``[G, D]``, s; of a dense metric 1.
        factor: ``[G, D, D]``, L, or None.
        directions: ``[G, D, K]``, V, or None.
        stretch: ``[G, K]``, t, or None.
        centre: ``[G, D]``, or None for 0.
    """

    scale: Tensor
    factor: Tensor | None = None
    directions: Tensor | None = None
    stretch: Tensor | None = None
    centre: Tensor | None = None

    @classmethod
    def identity(cls, groups: int, like: Tensor) -> Metric:
        """A = 1 for every group of the chains ``like [C, D]``."""
        return cls(like.new_ones(groups, like.shape[1]))

    @classmethod
    def of(cls, state: State) -> Metric:
        """The metric that an engine's state holds."""
        names = ("factor", "directions", "stretch", "centre")
        return cls(state["metric.scale"], *(state.get(f"metric.{name}") for name in names))

    def state(self) -> State:
        """The entries of an engine's state."""
        parts = {
            "factor": self.factor,
            "directions": self.directions,
            "stretch": self.stretch,
            "centre": self.centre,
        }
        kept = {f"metric.{name}": part for name, part in parts.items() if part is not None}
        return {"metric.scale": self.scale} | kept

    def to_z(self, u: Tensor) -> Tensor:
        """``A u + centre`` of whitened positions ``[C, D]``."""
        if self.factor is not None:
            z = self._grouped(u, self.factor.mT)
        else:
            z = self._scaled(self._stretched(u, inverse=False))
        return z if self.centre is None else z + self._rows(self.centre, z)

    def to_u(self, z: Tensor) -> Tensor:
        """``A^-1 (z - centre)`` of unconstrained positions ``[C, D]``."""
        if self.centre is not None:
            z = z - self._rows(self.centre, z)
        if self.factor is not None:
            rows = z.reshape(len(self.factor), -1, z.shape[1]).mT
            return torch.linalg.solve_triangular(self.factor, rows, upper=False).mT.reshape(z.shape)
        return self._stretched(z / self._rows(self.scale, z), inverse=True)

    def pull(self, gradient: Tensor) -> Tensor:
        """``A^T g``: the gradient with respect to u of a gradient ``[C, D]`` with respect to z."""
        if self.factor is not None:
            return self._grouped(gradient, self.factor)
        return self._stretched(self._scaled(gradient), inverse=False)

    def push(self, gradient: Tensor) -> Tensor:
        """``A^-T g``: the gradient with respect to z of a gradient ``[C, D]`` with respect to u."""
        if self.factor is not None:
            rows = gradient.reshape(len(self.factor), -1, gradient.shape[1]).mT
            return torch.linalg.solve_triangular(self.factor.mT, rows, upper=True).mT.reshape(gradient.shape)
        return self._stretched(gradient, inverse=True) / self._rows(self.scale, gradient)

    def _rows(self, part: Tensor, like: Tensor) -> Tensor:
        """One row per group as one row per chain; a single group is broadcast."""
        return part if len(part) == 1 else part.repeat_interleave(len(like) // len(part), 0)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows * self._rows(self.scale, rows)

    def _grouped(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """Rows ``[C, D]`` times their group's matrix ``[G, D, E]``."""
        if len(matrix) == 1:
            return rows @ matrix[0]
        return (rows.reshape(len(matrix), -1, rows.shape[1]) @ matrix).reshape(len(rows), -1)

    def _stretched(self, rows: Tensor, *, inverse: bool) -> Tensor:
        if self.directions is None or self.stretch is None:
            return rows
        weight = (1.0 / self.stretch if inverse else self.stretch) - 1.0
        inner = self._grouped(rows, self.directions) * self._rows(weight, rows)
        return rows + self._grouped(inner, self.directions.mT)
