"""The latent sites of a program and their layout in one flat unconstrained vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from bayesdl.errors import MethodError, ModelError


@dataclass(frozen=True)
class Site:
    """One latent site.

    Attributes:
        name: the site's name in the program.
        shape: shape of its constrained value, batch and event dimensions together.
        unconstrained_shape: shape of its unconstrained value (a simplex of K has K - 1 coordinates).
        start: where its coordinates begin in the flat vector.
        scope: "global", "local" (inside the data plate) or "param" (a ``pyro.param``: point-estimated, no prior).
        transform: bijection from the reals to the support.
        support: the support, in words.
        unbounded: the support is the reals, so that the transform is the identity.
        gaussian: (mean, sd) of the prior in the unconstrained coordinate where it is an independent Gaussian with
            constant parameters, else None.
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    start: int
    scope: str
    transform: Transform
    support: str
    unbounded: bool
    gaussian: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return self.unconstrained_shape.numel()

    @property
    def stop(self) -> int:
        """One past the site's last coordinate."""
        return self.start + self.size


def random_sites(layout: Sequence[Site], patterns: str | Sequence[str]) -> list[Site]:
    """The sites with a prior whose names match one of the shell-style patterns ("2.*"); "*" is all of them.

    Raises:
        MethodError: a pattern that matches none.
    """
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    idle = [pattern for pattern in given if not any(fnmatchcase(site.name, pattern) for site in layout)]
    if idle:
        raise MethodError(f"random={idle[0]!r} matches none of the sites {[site.name for site in layout]}.")
    matched = [site for site in layout if any(fnmatchcase(site.name, pattern) for pattern in given)]
    return [site for site in matched if site.scope != "param"]


def split(sites: Sequence[Site], z: Tensor) -> list[Tensor]:
    """Cut ``z [..., D]`` into one unconstrained tensor ``[..., *unconstrained_shape]`` per site (views)."""
    return [z[..., site.start : site.stop].reshape((*z.shape[:-1], *site.unconstrained_shape)) for site in sites]


def constrain(sites: Sequence[Site], z: Tensor) -> dict[str, Tensor]:
    """Map ``z [..., D]`` to constrained values ``[..., *shape]`` by site name."""
    return {site.name: site.transform(leaf) for site, leaf in zip(sites, split(sites, z), strict=True)}


def unconstrain(sites: Sequence[Site], values: Mapping[str, Tensor]) -> Tensor:
    """Map constrained values ``[..., *shape]`` by site name to ``z [..., D]``.

    Raises:
        ModelError: a site is missing, or a value has another shape than its site.
    """
    missing = [site.name for site in sites if site.name not in values]
    unknown = sorted(set(values) - {site.name for site in sites})
    if missing or unknown:
        raise ModelError(
            f"Values are needed for exactly the latent sites of the model; missing: {missing or 'none'}, "
            f"unknown: {unknown or 'none'}."
        )
    parts = []
    for site in sites:
        value = values[site.name]
        lead = value.dim() - len(site.shape)
        if lead < 0 or value.shape[lead:] != site.shape:
            raise ModelError(
                f"Site {site.name!r} has shape {tuple(site.shape)}; got a value of shape {tuple(value.shape)}."
            )
        parts.append(site.transform.inv(value).reshape((*value.shape[:lead], site.size)))
    return torch.cat(parts, dim=-1)


def log_abs_det(sites: Sequence[Site], z: Tensor) -> Tensor:
    """Log absolute Jacobian determinant of ``constrain`` at ``z [..., D]``, shape ``[...]``."""
    total = z.new_zeros(z.shape[:-1])
    for site, leaf in zip(sites, split(sites, z), strict=True):
        # A transform reports one term per event; the rest of the site's dimensions are summed here.
        terms = site.transform.log_abs_det_jacobian(leaf, site.transform(leaf))
        total = total + terms.reshape((*z.shape[:-1], -1)).sum(-1)
    return total
