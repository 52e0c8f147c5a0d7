"""Where do divergent transitions happen?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor

from bayesdl.errors import DataError
from bayesdl.posterior.summary import entry_names

if TYPE_CHECKING:
    from bayesdl.posterior.draws import DrawsPosterior

FEWEST = 5
"""Divergences below which nothing is said about their place."""
SHOWN = 3
TAIL = 0.1
"""What counts as an end of a latent's range: the lowest or the highest tenth of all draws."""
CELLS = 2**24


@dataclass(frozen=True)
class Place:
    """A latent at one end of which the divergences gather.

    Attributes:
        entry: the latent ("tau", "theta[3]").
        side: "low" or "high".
        share: share of the divergences in the lowest (highest) tenth of all draws; 0.1 would be chance.
        typical: median of the latent over the divergent draws.
    """

    entry: str
    side: str
    share: float
    typical: float


@dataclass(frozen=True)
class DivergentDraws:
    """The draws at which a transition diverged: the states that these transitions left the chains in.

    A trajectory that diverges ends in a region where the density curves faster than the step size can follow; the state
    that the chain is left in lies on its way there.

    Attributes:
        chain: chain of each, ``[K]``.
        draw: position in the chain, ``[K]``.
        values: constrained values ``[K, *shape]`` by site name.
        places: latents at whose ends they gather, the clearest first; empty for fewer than ``FEWEST``.
    """

    chain: Tensor
    draw: Tensor
    values: dict[str, Tensor]
    places: tuple[Place, ...]

    def __len__(self) -> int:
        """K, the number of divergences."""
        return len(self.chain)


def divergent_draws(posterior: DrawsPosterior) -> DivergentDraws:
    """The divergent transitions of a posterior, with the values of the latents there.

    Raises:
        DataError: the method records no divergences.
    """
    if "divergent" not in posterior.stats:
        raise DataError(
            f"{posterior.info.get('method', 'This method')} records no divergences; only samplers that integrate "
            "Hamiltonian dynamics and check the energy do."
        )
    mask = posterior.stats["divergent"].cpu() != 0
    chain, draw = mask.nonzero(as_tuple=True)
    by_chain = {name: value.cpu() for name, value in posterior.draws_by_chain().items()}
    values = {name: value[chain, draw] for name, value in by_chain.items()}
    return DivergentDraws(chain, draw, values, _places(by_chain, mask.flatten()))


def _places(draws: dict[str, Tensor], mask: Tensor) -> tuple[Place, ...]:
    """By the rank-sum test of divergent against other draws, entry by entry, with Bonferroni's correction."""
    hits, size = int(mask.sum()), len(mask)
    if hits < FEWEST or hits == size:
        return ()
    names, columns = [], []
    for site, value in draws.items():
        names += entry_names(site, value.shape[2:])
        columns.append(value.double().flatten(0, 1).reshape(size, -1))
    table = torch.cat(columns, 1).T
    some = torch.linspace(0, len(table) - 1, min(len(table), max(1, CELLS // size))).round().long()
    ranks = (rankdata(table[some].numpy(), axis=1) - 0.5) / size
    at = ranks[:, mask.numpy()]
    z = (at.mean(1) - 0.5) / np.sqrt((size - hits) / (12.0 * hits * size))
    found = []
    for row in np.argsort(-np.abs(z))[:SHOWN]:
        share = float((at[row] <= TAIL).mean() if z[row] < 0 else (at[row] > 1 - TAIL).mean())
        if abs(z[row]) > norm.isf(0.005 / len(z)) and share > 2 * TAIL:
            entry = int(some[row])
            side = "low" if z[row] < 0 else "high"
            found.append(Place(names[entry], side, share, float(table[entry][mask].median())))
    return tuple(found)
