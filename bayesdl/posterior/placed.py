"""Covariances of a few directions, and of some coordinates in any order and scale: what curvature leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, restore


@dataclass(frozen=True)
class Spectral(Covariance):
    """Variances of their own along R orthonormal directions, and one variance across them.

    ``S = across (1 - W W^T) + W diag(along) W^T``. Every operation costs 2 D R a row.

    Attributes:
        basis: W, ``[D, R]``, orthonormal columns.
        along: ``[R]``, positive.
        across: a scalar, positive.
    """

    basis: Tensor
    along: Tensor
    across: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return len(self.basis)

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class."""
        return self._through(noise, self.along.sqrt(), self.across.sqrt())

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return self._through(rows, self.along, self.across)

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return self._through(rows, self.along.reciprocal(), self.across.reciprocal())

    def log_det(self) -> Tensor:
        """See the base class."""
        return self.along.log().sum() + (self.dim - len(self.along)) * self.across.log()

    def variances(self) -> Tensor:
        """See the base class."""
        return self.across + self.basis.square() @ (self.along - self.across)

    def precisions(self) -> Tensor:
        """See the base class."""
        return self.across.reciprocal() + self.basis.square() @ (self.along.reciprocal() - self.across.reciprocal())

    def marginal(self, part: slice) -> Dense:
        """See the base class; of a part it has no structure."""
        rows = self.basis[part]
        eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        return Dense.of(self.across * eye + (rows * (self.along - self.across)) @ rows.mT)

    def _through(self, rows: Tensor, along: Tensor, across: Tensor) -> Tensor:
        return across * rows + ((rows @ self.basis) * (along - across)) @ self.basis.mT


@dataclass(frozen=True)
class Placed(Covariance):
    """A covariance of some coordinates, each in a unit of its own; the other coordinates are points.

    ``S = P diag(scale) inner diag(scale) P^T`` with P the columns ``place`` of the identity.

    Attributes:
        place: ``[R]``, the coordinate of z that each coordinate of ``inner`` is.
        points: ``[D - R]``, the coordinates that are points.
        scale: ``[R]``, positive.
        inner: covariance of ``z[place] / scale``.
    """

    place: Tensor
    points: Tensor
    scale: Tensor
    inner: Covariance = field()

    @property
    def dim(self) -> int:
        """D."""
        return len(self.place) + len(self.points)

    @property
    def noise_dim(self) -> int:
        """See the base class."""
        return self.inner.noise_dim

    def scaled(self, noise: Tensor) -> Tensor:
        """See the base class."""
        return self._spread(self.inner.scaled(noise) * self.scale, 0.0)

    def times(self, rows: Tensor) -> Tensor:
        """See the base class."""
        return self._spread(self.inner.times(rows[..., self.place] * self.scale) * self.scale, 0.0)

    def solve(self, rows: Tensor) -> Tensor:
        """See the base class; infinite at points, but 0 where the row is 0 there."""
        found = self._spread(self.inner.solve(rows[..., self.place] / self.scale) / self.scale, 0.0)
        at_points = rows[..., self.points]
        found[..., self.points] = torch.where(at_points == 0, at_points, at_points.sign() * math.inf)
        return found

    def without_points(self) -> Placed:
        """The covariance of ``z[place]``."""
        count = len(self.place)
        return Placed(torch.arange(count, device=self.place.device), self.points[:0], self.scale, self.inner)

    def filled(self, sd: Tensor) -> Placed:
        """The same with points made random: each by itself, with its entry of ``sd [D]``."""
        ones = Diagonal(torch.ones_like(sd[self.points]))
        scale = torch.cat([self.scale, sd[self.points]])
        return Placed(torch.cat([self.place, self.points]), self.points[:0], scale, Blocks((self.inner, ones)))

    def log_det(self) -> Tensor:
        """See the base class; -inf with points."""
        if len(self.points):
            return self.scale.new_tensor(-math.inf)
        return self.inner.log_det() + 2.0 * self.scale.log().sum()

    def variances(self) -> Tensor:
        """See the base class; 0 at points."""
        return self._spread(self.inner.variances() * self.scale.square(), 0.0)

    def precisions(self) -> Tensor:
        """See the base class; infinite at points."""
        return self._spread(self.inner.precisions() / self.scale.square(), math.inf)

    def marginal(self, part: slice) -> Covariance:
        """See the base class; the structure inside is kept where the part lies together in it."""
        start, stop, _ = part.indices(self.dim)
        wanted = ((self.place >= start) & (self.place < stop)).nonzero().flatten()
        points = self.points[(self.points >= start) & (self.points < stop)] - start
        if not len(wanted):
            return Diagonal(torch.zeros(len(points), dtype=self.scale.dtype, device=self.scale.device))
        inner: Covariance
        if int(wanted[-1] - wanted[0]) == len(wanted) - 1:
            inner = self.inner.marginal(slice(int(wanted[0]), int(wanted[-1]) + 1))
        else:
            units = torch.zeros(len(wanted), len(self.place), dtype=self.scale.dtype, device=self.scale.device)
            units[torch.arange(len(wanted)), wanted] = 1.0
            inner = Dense.of(self.inner.times(units)[:, wanted])
        return Placed(self.place[wanted] - start, points, self.scale[wanted], inner)

    def tensors(self) -> dict[str, Tensor]:
        """Where and in which units, and the parts of the inner covariance after "inner."."""
        own = {"place": self.place, "points": self.points, "scale": self.scale}
        return own | {f"inner.{name}": part for name, part in self.inner.tensors().items()}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Placed:
        """Rebuild what ``tensors`` wrote."""
        inner = {name.removeprefix("inner."): part for name, part in tensors.items() if name.startswith("inner.")}
        return cls(tensors["place"].long(), tensors["points"].long(), tensors["scale"], restore(inner))

    def _spread(self, values: Tensor, rest: float) -> Tensor:
        whole = values.new_full((*values.shape[:-1], self.dim), rest)
        whole[..., self.place] = values
        return whole


def among(covariance: Covariance, random: Tensor) -> Covariance:
    """The covariance of D coordinates whose ``random`` ones (booleans ``[D]``) have this one; the rest are points."""
    if bool(random.all()):
        return covariance
    like = covariance.variances()
    if isinstance(covariance, Diagonal):
        sd = like.new_zeros(len(random))
        sd[random] = covariance.sd
        return Diagonal(sd)
    place, points = random.nonzero().flatten(), (~random).nonzero().flatten()
    if isinstance(covariance, Placed):
        points = torch.cat([points, place[covariance.points]]).sort().values
        return Placed(place[covariance.place], points, covariance.scale, covariance.inner)
    return Placed(place, points, torch.ones_like(like), covariance)
