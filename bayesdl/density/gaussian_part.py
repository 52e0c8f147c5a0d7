"""The part of the prior that is an independent Gaussian over z, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesdl.density.sites import Site


@dataclass(frozen=True)
class GaussianPart:
    """The sites whose prior is an independent Gaussian over z, in closed form over the whole flat vector.

    For a network that is every weight: one operation instead of five per parameter tensor and their backward.

    Attributes:
        names: the sites.
        mean: ``[D]``.
        precision: ``[D]``, 0 on the coordinates of other sites.
        constant: log normaliser.
    """

    names: frozenset[str]
    mean: Tensor
    precision: Tensor
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
        used = self.precision[self.precision > 0].double()
        object.__setattr__(self, "constant", float(0.5 * (used.log() - math.log(2 * math.pi)).sum()))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the Gaussian coordinates at ``z [..., D]``."""
        return self.constant - 0.5 * ((z - self.mean).square() * self.precision).sum(-1)

    def add(self, z: Tensor, value: Tensor, gradient: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``power`` times the log density and its gradient to those of the rest."""
        offset = z - self.mean
        slope = offset * (self.precision * power)
        return value + (power * self.constant - 0.5 * (offset * slope).sum(-1)), gradient - slope
