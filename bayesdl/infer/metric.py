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

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State
from bayesdl.infer.kernel import ValueAndGrad

Shape = Literal["diag", "dense", "low_rank"]
SHAPES: tuple[Shape, ...] = ("diag", "dense", "low_rank")
RANK = 16
"""Directions of a low-rank metric at most."""


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
    def diagonal(cls, scale: Tensor, shape: Shape = "diag") -> Metric:
        """A = diag(s), ``scale [G, D]``, with the parts of any shape, so that a better one can take its place."""
        groups, dim = scale.shape
        if shape == "dense":
            return cls(torch.ones_like(scale), torch.diag_embed(scale))
        if shape == "low_rank":
            return cls(scale, None, scale.new_zeros(groups, dim, RANK), scale.new_ones(groups, RANK))
        return cls(scale)

    @classmethod
    def of(cls, state: State) -> Metric:
        """The metric that an engine's state holds."""
        names = ("factor", "directions", "stretch", "centre")
        return cls(state["metric.scale"], *(state.get(f"metric.{name}") for name in names))

    def state(self) -> State:
        """The entries of an engine's state."""
        return {f"metric.{name}": part for name, part in self.parts().items()}

    def parts(self) -> dict[str, Tensor]:
        """The attributes that are there, by name."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: part for name, part in found.items() if part is not None}

    def around(self, value_and_grad: ValueAndGrad) -> ValueAndGrad:
        """A log density of z as one of u, with its gradient with respect to u."""

        def of_u(u: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = value_and_grad(self.to_z(u))
            return value, self.pull(gradient)

        return of_u

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
        return part if len(part) in (1, len(like)) else part.repeat_interleave(len(like) // len(part), 0)

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
