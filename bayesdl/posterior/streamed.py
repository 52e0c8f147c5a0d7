"""A posterior whose draws lie on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl.density.sites import Site, constrain
from bayesdl.errors import FileError, MethodError
from bayesdl.posterior import divergences
from bayesdl.posterior.divergences import Place
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.layout import sites_without_model
from bayesdl.posterior.problem import Problem
from bayesdl.posterior.shards import Shards
from bayesdl.posterior.summary import Summary, summarise

Z = "z"


class StreamedPosterior(DrawsPosterior):
    """Draws in a folder, written there while the chains ran (``fit(..., draws_to=folder)``).

    Predictions read the draws that they use, function-space quantities go from shard to shard, and summaries of the
    latents from site to site. ``z``, and with it ``draws()`` and ``draws_by_chain()``, reads everything.

    Attributes:
        shards: the draws.
        stats: as of ``DrawsPosterior``; these are in memory.
    """

    kind: ClassVar[str] = "streamed"

    def __init__(self, problem: Problem | None, shards: Shards, stats: dict[str, Tensor], info: dict[str, Any]) -> None:
        if list(shards.shapes) != [Z] or len(shards.shapes[Z]) != 1:
            raise FileError(f"The files in {shards.folder} do not hold draws of latents.")
        if problem is not None and shards.shapes[Z][0] != problem.density.dim:
            raise FileError(
                f"The draws in {shards.folder} have {shards.shapes[Z][0]} coordinates, those of the model "
                f"{problem.density.dim}."
            )
        super().__init__(problem, torch.empty(shards.chains, 0, shards.shapes[Z][0]), stats, info)
        self.shards = shards

    @property
    def z(self) -> Tensor:
        """Unconstrained draws ``[C, S, D]``: reads all of them, and keeps none."""
        return torch.cat(list(self.blocks()), 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Chains C and draws S of each."""
        return self.shards.chains, self.shards.draws

    @property
    def in_folder(self) -> bool:
        """They lie on disk."""
        return True

    def __repr__(self) -> str:
        """Method, chains, draws, and the size on disk."""
        size = f"{self.shards.bytes / 2**20:.3g} MB in {self.shards.folder}"
        return f"{type(self).__name__}({self._words()}, {self.shards.shapes[Z][0]} coordinates, {size})"

    def blocks(self) -> Iterator[Tensor]:
        """The shards, ``[C, block, D]``."""
        for tensors in self.shards.blocks():
            yield self._placed(tensors[Z])

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Stored draws ``[n, D]``; only these are read."""
        chosen = self._chosen(n, seed)
        return self.z.flatten(0, 1) if chosen is None else self._placed(self.shards.rows(chosen)[Z])

    def site_draws(self, most: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """See the base class; one site at a time is read, and of a real one at most ``most`` entries."""
        for site in self._sites():
            columns: slice | list[int] = slice(site.start, site.stop)
            if most is not None and site.size > most and site.unbounded:
                columns = (site.start + _evenly(site.size, most)).tolist()
            leaf = self._placed(self.shards.columns(Z, columns))
            if isinstance(columns, list):
                yield site.name, leaf
            else:
                yield site.name, constrain([replace(site, start=0)], leaf)[site.name]

    def coordinates(self, most: int) -> Tensor:
        """See the base class."""
        return self._placed(self.shards.columns(Z, _evenly(self.shards.shapes[Z][0], most).tolist()))

    def divergence_places(self) -> tuple[Place, ...]:
        """See the base class; nothing where the draws are too many to be compared in memory."""
        cells = self.shape[0] * self.shape[1] * self.shards.shapes[Z][0]
        return super().divergence_places() if cells <= divergences.CELLS else ()

    def summary(self) -> Summary:
        """See the base class; one site at a time is read."""
        entries = [summarise({name: value}).entries for name, value in self.site_draws()]
        return Summary({name: entry for part in entries for name, entry in part.items()})

    def followed_by(self, more: DrawsPosterior) -> StreamedPosterior:
        """This posterior with the later draws of its chains, which lie in the shards behind its own."""
        if not isinstance(more, StreamedPosterior):
            raise MethodError("Draws in a folder are followed by draws in the same folder.")
        return self._followed(StreamedPosterior(self.problem, self.shards.joined(more.shards), {}, {}), more)

    def write_files(self, folder: Path) -> None:
        """Copy the shards, unless they are there."""
        self.shards.copy_to(folder)

    def tensors(self) -> dict[str, Tensor]:
        """Statistics, where the chains stand, and the hashes of the shards."""
        return self._chain_tensors() | self.shards.tensors()

    @classmethod
    def open(
        cls, folder: Path, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]
    ) -> StreamedPosterior:
        """A saved posterior, whose shards lie in its folder."""
        return cls(problem, Shards.restore(folder, tensors), {}, info)._restore_chains(tensors)

    def _sites(self) -> list[Site]:
        if self._problem is None and self._record is not None:
            return sites_without_model(self._record.sites)
        return list(self.problem.density.sites)

    def _placed(self, z: Tensor) -> Tensor:
        return z if self._problem is None else z.to(self._problem.density.device)


def _evenly(total: int, most: int) -> Tensor:
    """Evenly spaced numbers below ``total``: all, or so many."""
    return torch.linspace(0, total - 1, min(total, most), dtype=torch.float64).round().long()
