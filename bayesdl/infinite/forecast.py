"""What a kernel matrix will take, before it is computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.errors import DataError, TooLarge
from bayesdl.infer.record import memory
from bayesdl.infinite.inputs import check_inputs
from bayesdl.infinite.layers import Layer, check_layers
from bayesdl.infinite.tiles import Tiles

LIVE = 12  # matrices of a tile's size that exist at once
GIB = 2**30


@dataclass(frozen=True)
class KernelForecast:
    """Time and memory of a kernel matrix; print it.

    Attributes:
        seconds: one tile, timed, times the number of tiles.
        results: bytes of the matrices that are returned.
        working: bytes beside them: one tile's matrices, and the variances of every input at every nonlinear layer.
        tiles: number of tiles.
    """

    seconds: float
    results: int
    working: int
    tiles: int

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"about {self.seconds:,.3g} s, {self.results / GIB:,.3g} GiB of results and {self.working / GIB:,.2g} GiB "
            f"to work in, {self.tiles:,} tiles"
        )


def forecast(layers: Sequence[Layer], x: Tensor, n1: int, n2: int | None = None, *, ntk: bool = True) -> KernelForecast:
    """Forecast ``kernels`` of ``n1`` rows with themselves, or with ``n2`` others, from one timed tile.

    Args:
        layers: see ``kernels``.
        x: a few rows like those that are meant, which give the sizes and the number format.
        n1: rows of the matrix.
        n2: columns; None for the symmetric matrix of ``n1`` rows.
        ntk: whether the NTK is wanted too.

    Raises:
        ModelError: the layers have no limit.
        DataError: ``x`` does not fit, or a number of rows is not positive.

    Cost: two tiles.
    """
    layers = check_layers(layers)
    x, _ = check_inputs(layers, x, x)
    if n1 < 1 or (n2 is not None and n2 < 1) or not len(x):
        raise DataError(f"A forecast needs rows: n1={n1}, n2={n2}, and {len(x)} rows to try.")
    columns = n1 if n2 is None else n2
    tiles = Tiles(layers, x, None, ntk, False)
    few = x[torch.arange(max(min(tiles.rows, n1), min(tiles.columns, columns))) % len(x)]
    tiles = Tiles(layers, few, few, ntk, False)
    with torch.no_grad():
        variances, _ = tiles.alone(few, False)
        where = slice(min(tiles.rows, n1)), slice(min(tiles.columns, columns))
        each = [_timed(tiles, where, variances) for _ in range(2)][1]
    starts = range(0, n1, tiles.rows)
    count = sum(-(-(columns - (i if n2 is None else 0)) // tiles.columns) for i in starts)
    size = x.element_size()
    kept = sum(v[..., 0].numel() for v in variances) * (n1 + (n2 or 0)) * size
    results = (1 + ntk) * n1 * columns * size
    return KernelForecast(each * count, results, kept + LIVE * tiles.entries(*where) * size, count)


def _timed(tiles: Tiles, where: tuple[slice, slice], variances: list[Tensor]) -> float:
    began = time.perf_counter()
    tiles.tile(*where, variances, variances)
    return time.perf_counter() - began


def require_room(n1: int, n2: int, matrices: int, dtype: torch.dtype) -> None:
    """Refuse matrices that this machine's memory cannot hold.

    Raises:
        TooLarge: it cannot.
    """
    need = matrices * n1 * n2 * dtype.itemsize
    if need > memory():
        raise TooLarge(
            f"{matrices} kernel matri{'x' if matrices == 1 else 'ces'} of {n1:,} x {n2:,} take {need / GIB:,.1f} GiB, "
            f"and this machine has {memory() / GIB:,.1f}. Take fewer rows or float32, one kernel instead of both, or "
            "inducing points."
        )
