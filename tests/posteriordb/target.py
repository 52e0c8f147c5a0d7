"""Is the function that a sampler is given the log density of the program, and its gradient the gradient?

Draws alone cannot tell: a Metropolis-adjusted sampler with a wrong gradient is slower and still right, because its
proposals stay reversible and volume preserving whatever the force is; and a missing Jacobian moves the noise of a
regression on n rows by 1 / sqrt(2 n) posterior standard deviations, less than what 10,000 reference draws can show once
n exceeds some 300. Both are plain, to rounding, at any few points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from tests.posteriordb.densities import DENSITIES
from tests.posteriordb.programs import ENTRIES

STEP = 1e-4
"""Of the central differences, in posterior standard deviations; their error is of its square."""


class Mismatch(NamedTuple):
    """How far a target is from what it should be.

    Attributes:
        value: largest error of a difference between log densities.
        gradient: largest error of a directional derivative, relative to the gradient's size there.
    """

    value: float
    gradient: float

    @property
    def wrong(self) -> bool:
        """Whether more than rounding is off."""
        return self.value > 1e-6 or self.gradient > 1e-4


def mismatch(name: str, raw: dict[str, Any], density: LogDensity, draws: Tensor) -> Mismatch:
    """Compare a target with the density of ``densities.py`` at the reference's scalars ``draws [n, P]``."""
    sites = ENTRIES[name].sites(draws, raw)
    z = density.unconstrain(sites)
    rows = ({site: value[k].numpy() for site, value in sites.items()} for k in range(len(draws)))
    by_hand = torch.tensor([DENSITIES[name](raw, row) for row in rows], dtype=torch.float64)
    wanted = by_hand + torch.stack([_log_determinant(density, row) for row in z])
    value, gradient = density.value_and_grad(z)
    off = value - wanted
    spread = z.std(0)
    direction = spread * torch.randn(z.shape, dtype=z.dtype, generator=generator(0, "directions"))
    ahead, behind = (density.value_and_grad(z + sign * STEP * direction)[0] for sign in (1, -1))
    slope = (gradient * direction).sum(1)
    error = ((ahead - behind) / (2 * STEP) - slope).abs()
    return Mismatch(float((off - off[0]).abs().max()), float((error / (spread * gradient).norm(dim=1)).max()))


def _log_determinant(density: LogDensity, z: Tensor) -> Tensor:
    """Log |det| of the map from z to the free coordinates of the sites, by automatic differentiation."""
    total = z.new_zeros(())
    for site in density.sites:

        def free(leaf: Tensor, site: Any = site) -> Tensor:
            value = site.transform(leaf.reshape(site.unconstrained_shape))
            # Of a simplex all parts but the last are free.
            return value[..., : site.unconstrained_shape[-1]].reshape(-1) if value.dim() else value.reshape(-1)

        jacobian = torch.func.jacrev(free)(z[site.start : site.stop])
        total = total + torch.linalg.slogdet(jacobian)[1]
    return total


def spread_out(draws: Any, n: int) -> Tensor:
    """``n`` of the reference's draws ``[C, S, P]``, from all its chains, as ``[n, P]``."""
    flat = torch.from_numpy(draws).double().flatten(0, 1)
    return flat[torch.linspace(0, len(flat) - 1, n).long()]


Target = Callable[[LogDensity], LogDensity]
