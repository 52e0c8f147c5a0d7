"""Multivariate normal laws over the unconstrained coordinates: densities, divergences, products, parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, LowRank, restore
from bayesdl.posterior.placed import Placed

COVARIANCE = "covariance/"
"""Before the names of the covariance's parts in a file."""


@dataclass(frozen=True)
class Normal:
    """N(mean, covariance) over ``[D]``.

    Attributes:
        mean: ``[D]``.
        covariance: of any structure.
    """

    mean: Tensor
    covariance: Covariance

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)

    def draws(self, n: int, seed: int = 0) -> Tensor:
        """``n`` independent draws, ``[n, D]``, by the seed."""
        stream = generator(seed, "gaussian draws")
        noise = torch.randn(n, self.covariance.noise_dim, generator=stream, dtype=self.mean.dtype)
        return self.mean + self.covariance.scaled(noise.to(self.mean.device))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density at ``z [..., D]``, shape ``[...]``; infinite where a coordinate is a point."""
        away = z - self.mean
        square = (away * self.covariance.solve(away)).sum(-1)
        return -0.5 * (square + self.covariance.log_det() + self.dim * math.log(2.0 * math.pi))

    def kl(self, other: Normal) -> Tensor:
        """KL(self || other) in nats, exact for every pair of structures, in double precision.

        ``1/2 [tr(T^-1 S) - D + (m - n)^T T^-1 (m - n) + log det T - log det S]`` for N(m, S) and N(n, T).

        Raises:
            MethodError: the two have different numbers of coordinates.
        """
        if self.dim != other.dim:
            raise MethodError(f"KL between laws of {self.dim} and {other.dim} coordinates.")
        mine, theirs = self.covariance.double(), other.covariance.double()
        away = self.mean.double() - other.mean.double()
        square = (away * theirs.solve(away)).sum()
        return 0.5 * (mine.trace_in(theirs) - self.dim + square + theirs.log_det() - mine.log_det())

    def without_points(self) -> Normal:
        """The law of the coordinates that are not points."""
        covariance = self.covariance
        if isinstance(covariance, Placed):
            return Normal(self.mean[covariance.place], covariance.without_points())
        if isinstance(covariance, Diagonal):
            return Normal(self.mean[covariance.sd > 0], Diagonal(covariance.sd[covariance.sd > 0]))
        return self

    def marginal(self, part: slice) -> Normal:
        """The law of some consecutive coordinates."""
        return Normal(self.mean[part], self.covariance.marginal(part))

    def conditional(self, part: slice, value: Tensor) -> Normal:
        """The law of the other coordinates, in their order, given that ``z[part]`` is ``value``.

        Diagonal stays diagonal, low rank stays low rank; independent blocks are conditioned one by one where ``part``
        is made of whole ones. Everything else is written out.
        """
        start, stop, _ = part.indices(self.dim)
        given = torch.zeros(self.dim, dtype=torch.bool, device=self.mean.device)
        given[start:stop] = True
        rest, away, covariance = ~given, value - self.mean[part], self.covariance
        if isinstance(covariance, Diagonal):
            return Normal(self.mean[rest], Diagonal(covariance.sd[rest]))
        if isinstance(covariance, LowRank):
            return self._low_rank_conditional(covariance, rest, given, away)
        if isinstance(covariance, Blocks):
            kept = [k for k, own in enumerate(covariance.parts()) if own.stop <= start or own.start >= stop]
            inside = [k for k, own in enumerate(covariance.parts()) if start <= own.start and own.stop <= stop]
            if len(kept) + len(inside) == len(covariance.blocks):
                blocks = tuple(covariance.blocks[k] for k in kept)
                return Normal(self.mean[rest], blocks[0] if len(blocks) == 1 else Blocks(blocks))
        matrix = covariance.dense()
        across = matrix[rest][:, given]
        weights = torch.linalg.solve(matrix[given][:, given], across.mT).mT
        return Normal(self.mean[rest] + weights @ away, Dense.of(matrix[rest][:, rest] - weights @ across.mT))

    def _low_rank_conditional(self, covariance: LowRank, rest: Tensor, given: Tensor, away: Tensor) -> Normal:
        """The columns' noise has a posterior given the coordinates that are known; that is all that couples them."""
        known = LowRank(covariance.sd[given], covariance.factor[given])
        mine, theirs = covariance.factor[rest], covariance.factor[given]
        inner = torch.eye(mine.shape[1], dtype=mine.dtype, device=mine.device) - theirs.mT @ known.solve(theirs.mT).mT
        root = torch.linalg.cholesky(0.5 * (inner + inner.mT))
        mean = self.mean[rest] + mine @ (theirs.mT @ known.solve(away))
        return Normal(mean, LowRank(covariance.sd[rest], mine @ root))

    def times(self, other: Normal) -> Normal:
        """The normalised product of two densities: precisions add up.

        Of independent evidence under one flat prior, say. Diagonal, low rank, and equal blocks keep their structure
        exactly (ranks add up); anything else is written out.
        """
        return _combined(self, other, 1.0)

    def without(self, other: Normal) -> Normal:
        """The normalised quotient of two densities: what is left of this law when ``other`` is taken out of it.

        Raises:
            MethodError: the other law is not wider in every direction, so that there is no such law.
        """
        return _combined(self, other, -1.0)

    def tensors(self) -> dict[str, Tensor]:
        """Mean and the covariance's parts by name, from which ``restore`` makes the law again."""
        return {"mean": self.mean} | {f"{COVARIANCE}{name}": part for name, part in self.covariance.tensors().items()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Normal:
        """The law that has these parts."""
        parts = {name.removeprefix(COVARIANCE): part for name, part in tensors.items() if name.startswith(COVARIANCE)}
        return cls(tensors["mean"], restore(parts))

    def to(self, dtype: torch.dtype, device: torch.device) -> Normal:
        """The same law in another type, on another device."""
        parts = self.tensors().items()
        return Normal.restore({n: p.to(device, dtype if p.is_floating_point() else p.dtype) for n, p in parts})


def _combined(one: Normal, other: Normal, sign: float) -> Normal:
    """The law with precision ``S^-1 + sign T^-1`` and the mean that the product or quotient of the densities has."""
    if one.dim != other.dim:
        raise MethodError(f"Laws of {one.dim} and {other.dim} coordinates cannot be put together.")
    mine, theirs = one.covariance, other.covariance
    if isinstance(mine, Blocks) and isinstance(theirs, Blocks) and mine.sizes == theirs.sizes and len(mine.blocks) > 1:
        pieces = [_combined(one.marginal(part), other.marginal(part), sign) for part in mine.parts()]
        return Normal(torch.cat([p.mean for p in pieces]), Blocks(tuple(p.covariance for p in pieces)))
    shift = mine.solve(one.mean) + sign * theirs.solve(other.mean)
    structured = (Diagonal, LowRank)
    if isinstance(mine, structured) and isinstance(theirs, Diagonal if sign < 0 else structured):
        covariance = _combined_low_rank(mine, theirs, sign)
    else:
        covariance = Dense.of(_inverse(_inverse(mine.dense()) + sign * _inverse(theirs.dense())))
    return Normal(covariance.times(shift), covariance)


def _combined_low_rank(mine: Diagonal | LowRank, theirs: Covariance, sign: float) -> Covariance:
    """``(P - G G^T)^-1 = P^-1 + H H^T``, with P the diagonal parts of both precisions and G their columns."""
    precision = mine.sd.square().reciprocal()
    columns = [mine.inverse_factor] if isinstance(mine, LowRank) else []
    if isinstance(theirs, LowRank):
        precision = precision + theirs.sd.square().reciprocal()
        columns.append(theirs.inverse_factor)
    else:
        precision = precision + sign * theirs.precisions()
    if not bool((precision > 0).all()):
        raise _refusal(int((precision <= 0).sum()))
    if not columns:
        return Diagonal(precision.rsqrt())
    removed = torch.cat(columns, 1)
    scaled = removed / precision[:, None]
    inner = torch.eye(removed.shape[1], dtype=removed.dtype, device=removed.device) - removed.mT @ scaled
    root, failed = torch.linalg.cholesky_ex(0.5 * (inner + inner.mT))
    if failed:
        raise _refusal(1)
    return LowRank(precision.rsqrt(), torch.linalg.solve_triangular(root, scaled.mT, upper=False).mT)


def _inverse(matrix: Tensor) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
    if failed:
        raise _refusal(1)
    return torch.cholesky_inverse(root)


def _refusal(count: int) -> MethodError:
    return MethodError(
        f"There is no Gaussian left: in {count} or more directions the law that is taken out knows more than the one "
        "it is taken from."
    )
