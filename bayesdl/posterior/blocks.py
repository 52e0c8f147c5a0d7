"""Distributions over draws and rows, held in blocks of rows and looked at one bounded piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl.errors import ModelError
from bayesdl.posterior.families import CannotUnpack, row_pieces, take, unpack

ELEMENTS = 2**24
"""Parameters in one piece: 128 MB in float64."""

Maker = Callable[[], Distribution]


class Blocks:
    """Consecutive rows, block after block; each block is a function that makes its distribution ``[S, rows]``.

    Joining and choosing rows only rearranges the functions: nothing is computed or copied until a piece is looked at.

    Args:
        blocks: Number of rows of each block, and the function that makes its distribution.
    """

    def __init__(self, blocks: Sequence[tuple[int, Maker]]) -> None:
        self.blocks = tuple(blocks)

    def __len__(self) -> int:
        return sum(n for n, _ in self.blocks)

    def select(self, rows: npt.NDArray[np.int64]) -> Blocks:
        """The rows with these numbers, in this order."""
        ends = np.cumsum([n for n, _ in self.blocks])
        owner = np.searchsorted(ends, rows, side="right")
        runs = np.flatnonzero(np.diff(owner)) + 1
        chosen = []
        for run, owners in zip(np.split(rows, runs), np.split(owner, runs), strict=True):
            n, make = self.blocks[owners[0]]
            chosen.append((len(run), _rows_of(make, torch.from_numpy(run - (ends[owners[0]] - n)))))
        return Blocks(chosen)

    def pieces(self) -> Iterator[tuple[slice, Distribution]]:
        """Row ranges and their distributions in float64, unvalidated, of at most about ``ELEMENTS`` parameters each.

        A distribution that cannot be taken apart comes as one piece, as it is.
        """
        start = 0
        for n, make in self.blocks:
            distribution = make()
            for rows, piece in row_pieces(distribution, _step(distribution), torch.float64):
                yield slice(start + rows.start, start + rows.stop), piece
            start += n


def _step(distribution: Distribution) -> int:
    try:
        tensors = unpack(distribution)[1].values()
    except CannotUnpack:
        return int(distribution.batch_shape[1])
    return max(1, ELEMENTS // max(t.shape[0] * t.shape[2:].numel() for t in tensors))


def _rows_of(make: Maker, rows: Tensor) -> Maker:
    def taken() -> Distribution:
        try:
            return take(make(), rows, 1)
        except CannotUnpack as reason:
            raise ModelError(
                f"rows of this prediction cannot be taken apart ({reason}); predict on the rows you need instead."
            ) from None

    return taken
