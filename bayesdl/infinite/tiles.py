"""Kernel matrices tile by tile: bounded memory, what belongs to one input computed once, symmetric halves once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bayesdl._memory import keep_freed_memory
from bayesdl.infinite.inputs import cross_covariance, own_covariance
from bayesdl.infinite.layers import Layer, pools, spatial_of, weighted
from bayesdl.infinite.recursion import output, through, variance_layers
from bayesdl.infinite.units import Units, Walk

CELLS = 2**18  # entries of a tile, few enough for a core's caches
RUN = 4  # images beside one, so that shifted pixels are runs of memory that a core adds quickly
MOST = 2**20  # entries of a tile where every pair carries the covariances of all its pixels


class Tiles:
    """The kernel of two sets of inputs, by tiles.

    Args:
        layers: of the network.
        x1: ``[N, d]`` or ``[N, C, *pixels]``.
        x2: likewise, or None for ``x1`` with itself.
        ntk: whether to compute the tangent kernel.
        standard: its parameterisation.
    """

    def __init__(self, layers: Sequence[Layer], x1: Tensor, x2: Tensor | None, ntk: bool, standard: bool) -> None:
        self.layers, self.x1, self.x2, self.ntk, self.standard = layers, x1, x2, ntk, standard
        self.spatial = spatial_of(layers)
        self.full = self.spatial > 0 and pools(layers)
        self.w_var, self.b_var = variances_of(layers, x1)
        self.rows, self.columns = tile_shape(layers, x1)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """The rows and columns of the tiles; of a symmetric matrix those that reach its upper half."""
        count = len(self.x1) if self.x2 is None else len(self.x2)
        for i in range(0, len(self.x1), self.rows):
            for j in range(i if self.x2 is None else 0, count, self.columns):
                yield slice(i, i + self.rows), slice(j, j + self.columns)

    def entries(self, here: slice, there: slice) -> int:
        """How many covariances a tile carries through the layers."""
        pixels = self.x1.shape[2:].numel() if self.spatial else 1
        rows, columns = (len(range(part.stop)[part]) for part in (here, there))
        return rows * columns * pixels ** (2 if self.full else 1)

    def matrix(self) -> list[Tensor]:
        """The NNGP kernel and, if it is asked for, the NTK, ``[N, M]`` each."""
        other = self.x1 if self.x2 is None else self.x2
        keep_freed_memory()
        results = [self.x1.new_empty(len(self.x1), len(other)) for _ in range(1 + self.ntk)]
        own, exact = self.alone(self.x1, self.x2 is None)
        theirs = own if self.x2 is None else self.alone(other, False)[0]
        for here, there in self:
            for result, part in zip(results, self.tile(here, there, own, theirs), strict=True):
                if self.x2 is None:
                    result[there, here] = part.T
                result[here, there] = part
        if self.x2 is None:
            for result, part in zip(results, exact, strict=True):
                for i in range(0, len(result), self.rows):  # rounding may depend on which of a pair comes first
                    square = result[i : i + self.rows, i : i + self.rows]
                    square.copy_(square.triu() + square.triu(1).T)
                result.diagonal().copy_(part)  # without the rounding of the correlations
        return results

    def diagonal(self) -> list[Tensor]:
        """Only the pairs of row i of both, ``[N]`` each."""
        if self.x2 is None:
            return self.alone(self.x1, True)[1]
        own, theirs = (self.alone(x, False)[0] for x in (self.x1, self.x2))
        parts = []
        for rows in _chunks(len(self.x1), self.rows * self.columns):
            known = [(a[..., rows], b[..., rows]) for a, b in zip(own, theirs, strict=True)]
            start = cross_covariance(self.x1[rows], self.x2[rows], True, spatial=self.spatial, full=self.full)
            parts.append(self._end(start, known))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def tile(self, here: slice, there: slice, own: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[Tensor]:
        """One tile of both kernels, from the variances of its rows and columns."""
        known = [(a[..., here].unsqueeze(-1), b[..., there].unsqueeze(-2)) for a, b in zip(own, theirs, strict=True)]
        other = self.x1 if self.x2 is None else self.x2
        start = cross_covariance(self.x1[here], other[there], spatial=self.spatial, full=self.full)
        return self._end(start, known)

    def _end(self, start: Tensor, known: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        walk = Walk(self.w_var, self.b_var, self.standard, self.ntk, known)
        ends = output(through(self.layers, Units(start, None, self.spatial, self.full), walk))
        return [end for end in ends if end is not None]

    def alone(self, x: Tensor, to_end: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Every input with itself: its variances before each nonlinear layer and, if ``to_end``, its kernels."""
        layers = self.layers if to_end else variance_layers(self.layers)
        full = self.spatial > 0 and pools(layers)
        recorded, ends = [], []
        for rows in _chunks(len(x), self.rows * self.columns):
            walk = Walk(self.w_var, self.b_var, self.standard, self.ntk and to_end)
            start = Units(own_covariance(x[rows], self.spatial, full), None, self.spatial, full)
            end = through(layers, start, walk)
            recorded.append(walk.recorded)
            if to_end:
                ends.append([value for value in output(end) if value is not None])
        joined = [torch.cat(parts, -1) for parts in zip(*recorded, strict=True)]
        return joined, [torch.cat(parts) for parts in zip(*ends, strict=True)]


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, max(count, 1), size)]


def variances_of(layers: Sequence[Layer], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The variances of weights and of biases, layer by layer, in the number format of ``x``."""
    widths = list(weighted(layers))
    w_var, b_var = (
        [torch.tensor(sd, dtype=x.dtype, device=x.device).square() for sd in sds]
        for sds in ([layer.w_std for layer in widths], [layer.b_std for layer in widths])
    )
    return w_var, b_var


def tile_shape(layers: Sequence[Layer], x: Tensor) -> tuple[int, int]:
    """How many rows of each input a tile holds."""
    spatial = spatial_of(layers)
    pixels = x.shape[x.dim() - spatial :].numel() if spatial else 1
    if spatial and pools(layers):
        pixels = pixels**2
    pairs = max(CELLS // pixels, min(RUN, MOST // pixels), 1)
    columns = min(pairs, max(64, int(pairs**0.5)))
    return pairs // columns, columns
