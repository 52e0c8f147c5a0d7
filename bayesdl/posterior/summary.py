"""The table that users of Stan expect."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.posterior import convergence
from bayesdl.posterior.tables import render

COLUMNS = ("mean", "sd", "5%", "50%", "95%", "ess_bulk", "ess_tail", "rhat")
SHOWN = 40
"""Entries of one site that the printed table shows; the object has all."""
QUANTILE_CELLS = 2**22
"""Draws times entries whose quantiles are taken at once: ``torch.quantile`` refuses more than 2**24."""


@dataclass(frozen=True)
class Summary:
    """Posterior summaries of every entry of every latent.

    Attributes:
        entries: values of ``COLUMNS`` by entry name ("beta[0]", "noise"); the last three are NaN without chains of at
            least 4 draws.
    """

    entries: Mapping[str, Mapping[str, float]]

    def __getitem__(self, name: str) -> Mapping[str, float]:
        """The row of one entry."""
        return self.entries[name]

    def __str__(self) -> str:
        """The table; of a site with many entries only the first ones."""
        rows: list[list[str]] = []
        for site, group in itertools.groupby(self.entries, key=lambda name: name.split("[")[0]):
            names = list(group)
            for name in names[:SHOWN]:
                entry = self.entries[name]
                cells = [f"{entry[c]:.0f}" if c.startswith("ess") else f"{entry[c]:.3g}" for c in COLUMNS[:-1]]
                rows.append([name, *cells, f"{entry['rhat']:.3f}"])
            if len(names) > SHOWN:
                rows.append([f"{site}: {len(names) - SHOWN} more", *[""] * len(COLUMNS)])
        return render("Posterior", ["latent", *COLUMNS], rows)


def summarise(draws: Mapping[str, Tensor]) -> Summary:
    """Summaries of constrained draws ``[C, S, *shape]`` by site name."""
    entries: dict[str, dict[str, float]] = {}
    for site, value in draws.items():
        flat = value.flatten(2).double() if value.dim() > 2 else value[..., None].double()
        pooled = flat.flatten(0, 1)
        columns = [pooled.mean(0), pooled.std(0) if len(pooled) > 1 else torch.zeros(pooled.shape[1])]
        columns += list(_quantiles(pooled))
        if flat.shape[1] >= 4:
            rhat, bulk, tail = convergence.mixing(flat)
            columns += [bulk, tail, rhat]
        else:
            columns += [torch.full_like(pooled[0], torch.nan)] * 3
        names = entry_names(site, value.shape[2:])
        for position, name in enumerate(names):
            entries[name] = {c: float(column[position]) for c, column in zip(COLUMNS, columns, strict=True)}
    return Summary(entries)


def _quantiles(pooled: Tensor) -> Tensor:
    """The quantiles 5%, 50% and 95% of every column of ``[S, d]``, a few columns at a time; ``[3, d]``."""
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=pooled.dtype, device=pooled.device)
    width = max(1, QUANTILE_CELLS // len(pooled))
    return torch.cat([torch.quantile(part, levels, dim=0) for part in pooled.split(width, dim=1)], dim=1)


def entry_names(site: str, shape: torch.Size) -> list[str]:
    """The names of a site's entries, in the order of ``flatten``: "beta[0,1]"; a scalar bears its site's name."""
    if not shape:
        return [site]
    return [f"{site}[{','.join(map(str, index))}]" for index in itertools.product(*map(range, shape))]
