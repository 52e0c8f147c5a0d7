"""Families of Gaussians for variational inference: how a flat vector of numbers becomes a covariance, and back.

Every family writes its root as ``A = diag(sd) B`` with a scale-free B: the spread of q is log sd ``[R]`` followed by
the numbers of B, whose learning rates then suit coordinates of any scale. R is the number of random coordinates. What
a step of the optimisation needs is here in closed form, so that no graph of autograd goes through the sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.posterior.covariance import Covariance, Dense, Diagonal, LowRank

FIRST_FACTOR = 0.1
"""Length of the rows of a low-rank factor at the start: at zero, which is a saddle, all gradients along it vanish."""


@dataclass(frozen=True)
class Family(ABC):
    """Covariances ``S = A A^T`` of some structure, by their spread ``[size]``.

    Attributes:
        dim: R.
    """

    dim: int

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers that describe a covariance."""

    @property
    def noise_dim(self) -> int:
        """Standard normal numbers behind a draw: columns of A."""
        return self.dim

    @abstractmethod
    def start(self, sd: Tensor, stream: torch.Generator) -> Tensor:
        """The spread of (almost) independent coordinates with standard deviations ``sd [R]``."""

    @abstractmethod
    def covariance(self, spread: Tensor) -> Covariance:
        """S, made quickly: for a step."""

    def settled(self, spread: Tensor) -> Covariance:
        """S as a posterior keeps it."""
        return self.covariance(spread)

    @abstractmethod
    def half_log_det(self, spread: Tensor) -> Tensor:
        """``1/2 log det S``, the entropy without its constant."""

    @abstractmethod
    def entropy_gradient(self, spread: Tensor) -> Tensor:
        """Gradient of ``1/2 log det S``, ``[size]``."""

    @abstractmethod
    def trace_gradient(self, spread: Tensor, precision: Tensor) -> Tensor:
        """Gradient of ``1/2 tr(diag(precision) S)``, ``[size]``."""

    @abstractmethod
    def pull(self, spread: Tensor, noise: Tensor, away: Tensor, slopes: Tensor) -> Tensor:
        """Gradient of ``sum_s <slopes_s, A e_s>``, ``[size]``.

        Args:
            spread: ``[size]``.
            noise: e, ``[S, noise_dim]``.
            away: ``A e``, ``[S, R]``.
            slopes: ``[S, R]``.
        """


@dataclass(frozen=True)
class MeanField(Family):
    """Independent coordinates, B = 1: log sd ``[R]`` alone."""

    @property
    def size(self) -> int:
        """R."""
        return self.dim

    def start(self, sd: Tensor, stream: torch.Generator) -> Tensor:
        """See the base class."""
        return sd.log()

    def covariance(self, spread: Tensor) -> Diagonal:
        """See the base class."""
        return Diagonal(spread.exp())

    def half_log_det(self, spread: Tensor) -> Tensor:
        """See the base class."""
        return spread.sum()

    def entropy_gradient(self, spread: Tensor) -> Tensor:
        """See the base class."""
        return torch.ones_like(spread)

    def trace_gradient(self, spread: Tensor, precision: Tensor) -> Tensor:
        """See the base class."""
        return precision * (2.0 * spread).exp()

    def pull(self, spread: Tensor, noise: Tensor, away: Tensor, slopes: Tensor) -> Tensor:
        """See the base class."""
        return torch.linalg.vecdot(slopes, away, dim=0) if len(slopes) > 1 else (slopes * away)[0]


@dataclass(frozen=True)
class LowRankPlusDiagonal(Family):
    """B = [1, V] with V ``[R, rank]``: ``S = diag(sd) (1 + V V^T) diag(sd)``.

    Attributes:
        rank: columns of V.
    """

    rank: int

    @property
    def size(self) -> int:
        """R (1 + rank)."""
        return self.dim * (1 + self.rank)

    @property
    def noise_dim(self) -> int:
        """R + rank."""
        return self.dim + self.rank

    def start(self, sd: Tensor, stream: torch.Generator) -> Tensor:
        """See the base class."""
        factor = torch.empty(self.dim * self.rank, dtype=sd.dtype, device=sd.device).normal_(generator=stream)
        return torch.cat([sd.log(), factor * (FIRST_FACTOR / self.rank**0.5)])

    def covariance(self, spread: Tensor) -> LowRank:
        """See the base class."""
        sd, factor = self._parts(spread)
        return LowRank(sd, sd[:, None] * factor)

    def half_log_det(self, spread: Tensor) -> Tensor:
        """See the base class."""
        return spread[: self.dim].sum() + self._inner(spread)[1].diagonal().log().sum()

    def entropy_gradient(self, spread: Tensor) -> Tensor:
        """See the base class: ``(1 + V V^T)^-1 V = V (1 + V^T V)^-1`` for V."""
        factor, root = self._inner(spread)
        return torch.cat([torch.ones_like(spread[: self.dim]), torch.cholesky_solve(factor.mT, root).mT.reshape(-1)])

    def trace_gradient(self, spread: Tensor, precision: Tensor) -> Tensor:
        """See the base class."""
        sd, factor = self._parts(spread)
        scaled = precision * sd.square()
        own = scaled * (1.0 + factor.square().sum(1))
        return torch.cat([own, (scaled[:, None] * factor).reshape(-1)])

    def pull(self, spread: Tensor, noise: Tensor, away: Tensor, slopes: Tensor) -> Tensor:
        """See the base class."""
        scaled = slopes * spread[: self.dim].exp()
        return torch.cat([(slopes * away).sum(0), (scaled.mT @ noise[:, self.dim :]).reshape(-1)])

    def _parts(self, spread: Tensor) -> tuple[Tensor, Tensor]:
        return spread[: self.dim].exp(), spread[self.dim :].reshape(self.dim, self.rank)

    def _inner(self, spread: Tensor) -> tuple[Tensor, Tensor]:
        """V and the Cholesky factor of ``1 + V^T V``."""
        factor = spread[self.dim :].reshape(self.dim, self.rank)
        inner = factor.mT @ factor
        return factor, torch.linalg.cholesky(inner + torch.eye(self.rank, dtype=inner.dtype, device=inner.device))


@dataclass(frozen=True)
class FullRank(Family):
    """B unit lower triangular: ``A = diag(sd) B`` is the Cholesky factor of S, log sd the logarithm of its diagonal.

    The part of ``[R, R]`` above the diagonal is carried along as zeros: it makes everything a plain matrix product.
    """

    @property
    def size(self) -> int:
        """R (1 + R)."""
        return self.dim * (1 + self.dim)

    def start(self, sd: Tensor, stream: torch.Generator) -> Tensor:
        """See the base class."""
        return torch.cat([sd.log(), sd.new_zeros(self.dim**2)])

    def covariance(self, spread: Tensor) -> Dense:
        """See the base class."""
        return Dense(self._root(spread))

    def half_log_det(self, spread: Tensor) -> Tensor:
        """See the base class."""
        return spread[: self.dim].sum()

    def entropy_gradient(self, spread: Tensor) -> Tensor:
        """See the base class."""
        gradient = torch.zeros_like(spread)
        gradient[: self.dim] = 1.0
        return gradient

    def trace_gradient(self, spread: Tensor, precision: Tensor) -> Tensor:
        """See the base class."""
        root = self._root(spread)
        along = (precision * spread[: self.dim].exp())[:, None] * root
        return torch.cat([precision * root.square().sum(1), along.tril(-1).reshape(-1)])

    def pull(self, spread: Tensor, noise: Tensor, away: Tensor, slopes: Tensor) -> Tensor:
        """See the base class."""
        scaled = slopes * spread[: self.dim].exp()
        return torch.cat([(slopes * away).sum(0), (scaled.mT @ noise).tril(-1).reshape(-1)])

    def _root(self, spread: Tensor) -> Tensor:
        unit = spread[self.dim :].reshape(self.dim, self.dim).clone()
        unit.diagonal().fill_(1.0)
        return spread[: self.dim].exp()[:, None] * unit
