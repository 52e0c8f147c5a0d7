"""The part of the prior that is Gaussian over z, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bayesdl.density.sites import Site


class Coupling(Protocol):
    """A covariance matrix of all coordinates, of any structure, by what it does to vectors.

    ``bayesdl.posterior.covariance.Covariance`` is one.
    """

    @property
    def noise_dim(self) -> int:
        """Standard normal numbers that a draw takes."""
        ...

    def scaled(self, noise: Tensor) -> Tensor:
        """Draws ``[n, D]`` with mean zero from standard normal ``noise [n, noise_dim]``."""
        ...

    def solve(self, rows: Tensor) -> Tensor:
        """The inverse times rows ``[..., D]``."""
        ...

    def precisions(self) -> Tensor:
        """Diagonal of the inverse, ``[D]``."""
        ...

    def log_det(self) -> Tensor:
        """Log determinant."""
        ...


@dataclass(frozen=True)
class GaussianPart:
    """The sites whose prior is Gaussian over z, in closed form over the whole flat vector.

    For a network that is every weight: one operation instead of five per parameter tensor and their backward.

    Attributes:
        names: the sites.
        mean: ``[D]``.
        precision: ``[D]``, the diagonal of the precision matrix; 0 on the coordinates of other sites.
        covariance: what couples the coordinates, then all of them; None if they are independent.
        constant: log normaliser.
    """

    names: frozenset[str]
    mean: Tensor
    precision: Tensor
    covariance: Coupling | None = None
    constant: float = field(init=False)

    @classmethod
    def of(cls, layout: tuple[Site, ...], dtype: torch.dtype, device: torch.device) -> GaussianPart:
        """Collect the Gaussian global sites of a layout."""
        dim = sum(site.size for site in layout)
        mean, precision = (torch.zeros(dim, dtype=dtype, device=device) for _ in range(2))
        names = set()
        for site in layout:
            if site.gaussian is not None and site.scope == "global":
                names.add(site.name)
                mean[site.start : site.stop] = site.gaussian[0].reshape(-1)
                precision[site.start : site.stop] = site.gaussian[1].reshape(-1).square().reciprocal()
        return cls(frozenset(names), mean, precision)

    def __post_init__(self) -> None:
        """Compute the normaliser now: while a graph is recorded, tensors have no values."""
        if self.covariance is None:
            used = self.precision[self.precision > 0].double()
            count, log_det = len(used), -used.log().sum()
        else:
            count, log_det = len(self.mean), self.covariance.log_det()
        object.__setattr__(self, "constant", -0.5 * (float(log_det) + count * math.log(2 * math.pi)))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the Gaussian coordinates at ``z [..., D]``."""
        offset = z - self.mean
        return self.constant - 0.5 * (offset * self._weighed(offset, 1.0)).sum(-1)

    def add(self, z: Tensor, value: Tensor, gradient: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``power`` times the log density and its gradient to those of the rest."""
        offset = z - self.mean
        slope = self._weighed(offset, power)
        return value + (power * self.constant - 0.5 * (offset * slope).sum(-1)), gradient - slope

    def draws(self, n: int, stream: torch.Generator) -> Tensor:
        """``[n, D]`` draws of a part that has every coordinate."""
        count = len(self.mean) if self.covariance is None else self.covariance.noise_dim
        noise = torch.randn(n, count, dtype=self.mean.dtype, generator=stream).to(self.mean.device)
        spread = noise * self.precision.rsqrt() if self.covariance is None else self.covariance.scaled(noise)
        return self.mean + spread

    def _weighed(self, offset: Tensor, power: Tensor | float) -> Tensor:
        """``power`` times the precision matrix, times rows ``[..., D]``."""
        if self.covariance is None:
            return offset * (self.precision * power)
        return self.covariance.solve(offset) * power
