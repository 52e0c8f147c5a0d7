"""What to draw of a posterior's chains: latents by name, predictions at inputs, and their ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom, rankdata
from torch import Tensor

from bayesdl import _rng
from bayesdl.errors import DataError
from bayesdl.posterior import DrawsPosterior, convergence
from bayesdl.posterior.summary import entry_names

SHOWN = 4
"""Quantities that are drawn if the caller names none."""
SIMULATED = 2**22
"""Ranks that are drawn for an envelope, in all."""

Array = NDArray[np.float64]


def quantities(posterior: DrawsPosterior, names: Iterable[str] | str | None, x: Any) -> dict[str, Array]:
    """Draws ``[C, S]`` by label.

    Args:
        posterior: chains.
        names: sites ("beta", all of its entries) or entries ("beta[0,1]"); by default, without ``x``, the ``SHOWN``
            entries with the largest R-hat.
        x: raw inputs at which predictions are wanted, "f[0]" being the likelihood's mean at the first row.

    Raises:
        DataError: a name that the model does not have.
    """
    found: dict[str, Array] = {}
    if x is not None:
        found |= _entries("f", posterior.function_draws(x))
    if names is None and x is not None:
        return found
    sites = posterior.draws_by_chain()
    if names is None:
        return _worst(sites)
    for name in [names] if isinstance(names, str) else names:
        site = name.split("[")[0]
        entries = _entries(site, sites[site]) if site in sites else {}
        chosen = entries if name == site else {name: entries[name]} if name in entries else {}
        if not chosen:
            raise DataError(
                f"There is no latent {name!r}; there are {', '.join(sites)}, and entries such as 'beta[0]'."
            )
        found |= chosen
    return found


def _entries(site: str, draws: Tensor) -> dict[str, Array]:
    flat = draws.detach().cpu().double().reshape(*draws.shape[:2], -1).numpy()
    return dict(zip(entry_names(site, draws.shape[2:]), np.moveaxis(flat, -1, 0), strict=True))


def _worst(sites: dict[str, Tensor]) -> dict[str, Array]:
    ranked = []
    for site, draws in sites.items():
        flat = draws.flatten(2) if draws.dim() > 2 else draws[..., None]
        values = convergence.rhat(flat).nan_to_num(nan=torch.inf) if flat.shape[1] >= 4 else torch.ones(flat.shape[2])
        top = values.argsort(descending=True, stable=True)[:SHOWN]
        ranked += [(float(values[entry]), site, int(entry)) for entry in top]
    chosen = sorted(ranked, key=lambda item: -item[0])[:SHOWN]
    return {
        entry_names(site, sites[site].shape[2:])[entry]: _entries(site, sites[site].flatten(2))[f"{site}[{entry}]"]
        if sites[site].dim() > 2
        else _entries(site, sites[site])[site]
        for _, site, entry in chosen
    }


def thinned(x: Array) -> tuple[Array, int]:
    """Chains ``[C, S]`` thinned to about independent draws, and the distance between these."""
    draws = x.shape[1]
    if draws < 4:
        return x, 1
    # One chain at a time: chains that disagree are still to be seen as draws of their own.
    each = convergence.ess_mean(torch.from_numpy(x.T[None].copy()))
    every = round(draws / float(each.median().clamp(1.0, draws)))
    return x[:, ::every], every


def rank_fractions(x: Array) -> Array:
    """Ranks of the draws among those of all chains, as fractions in (0, 1); ``[C, S]``."""
    fractions: Array = ((rankdata(x, method="average") - 0.5) / x.size).reshape(x.shape)
    return fractions


def envelope(chains: int, draws: int, points: Array, level: float = 0.95, seed: int = 0) -> Array:
    """Band for the rank ECDFs of all chains at once: ``[2, K]`` at the points, ``level`` that no chain leaves it.

    If the chains have one law, their draws are a random partition of the ranks. The pointwise level of the band is
    set so that the whole of it has the level asked for (Säilynoja, Bürkner & Vehtari, 2022, section 3),
    by simulation.

    Args:
        chains: C.
        draws: S.
        points: K values in (0, 1), increasing.
        level: simultaneous coverage.
        seed: seed of the simulation.
    """
    size = chains * draws
    places = (np.arange(size) + 0.5) / size
    below = np.searchsorted(places, points, side="right")
    # How many of the `below` lowest ranks are one chain's.
    mass = hypergeom.pmf(np.arange(draws + 1), size, below[:, None], draws)
    at_most, at_least = mass.cumsum(1), mass[:, ::-1].cumsum(1)[:, ::-1]
    tails = np.minimum(at_most, at_least)
    times = int(np.clip(SIMULATED // (size + chains * len(points)), 200, 2000))
    stream = np.random.default_rng(_rng.derive_seed(seed, "rank envelope"))
    cells = len(points) + 1
    cell = np.searchsorted(points, places)
    owner = np.repeat(np.arange(chains) * cells, draws)
    least = np.empty(times)
    for row in range(times):
        found = np.bincount(stream.permutation(owner) + cell, minlength=chains * cells)
        counts = found.reshape(chains, cells).cumsum(1)[:, :-1]
        least[row] = tails[np.arange(len(points)), counts].min()
    inside = tails >= np.quantile(least, 1 - level, method="lower")
    low = inside.argmax(1)
    high = draws - inside[:, ::-1].argmax(1)
    return np.stack([low, high]) / draws
