"""Kernel matrices of any GPyTorch kernel between rows, in tiles: stored once, computed anew, or differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

TILE = 512  # rows of a tile: small enough for the cache, large enough that a kernel's own overhead does not count
GIGABYTE = 10**9


def pairs(n: int, size: int = TILE) -> Iterator[tuple[slice, slice]]:
    """The tiles of a symmetric matrix on and above its diagonal."""
    for i in range(0, n, size):
        for j in range(i, n, size):
            yield slice(i, min(i + size, n)), slice(j, min(j + size, n))


def gram(kernel: Kernel, x: Tensor) -> Tensor:
    """Return ``K [n, n]`` at the rows ``x [n, d]``, each pair computed once, without a tape."""
    matrix = x.new_empty(len(x), len(x))
    with torch.no_grad():
        for i, j in pairs(len(x)):
            tile = _tile(kernel, x, i, j)
            matrix[i, j] = tile
            if i != j:
                matrix[j, i] = tile.mT
    return matrix


def gram_gradient(kernel: Kernel, x: Tensor, weights: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of ``sum_ij weights_ij K_ij`` with respect to parameters of the kernel.

    Tile by tile, so that only one tile is on the tape: the memory does not grow with n.

    Args:
        kernel: of K.
        x: ``[n, d]``.
        weights: ``[n, n]``, symmetric.
        parameters: those wanted; one that the kernel does not use has a zero gradient.
    """
    totals = [torch.zeros_like(p) for p in parameters]
    for i, j in pairs(len(x)):
        with torch.enable_grad():
            tile = _tile(kernel, x, i, j)
        if not tile.requires_grad:
            break
        outer = weights[i, j] if i == j else 2 * weights[i, j]
        found: tuple[Tensor | None, ...] = torch.autograd.grad(tile, list(parameters), outer, allow_unused=True)
        totals = [total if g is None else total + g for total, g in zip(totals, found, strict=True)]
    return totals


class Gram:
    """K at rows ``x [n, d]`` as an operator: one stored copy where that fits, else computed anew at every product.

    Args:
        kernel: of K.
        x: ``[n, d]``.
        memory: gigabytes that a stored copy may take.
    """

    def __init__(self, kernel: Kernel, x: Tensor, memory: float) -> None:
        self.kernel, self.x = kernel, x
        self.matrix = gram(kernel, x) if x.element_size() * len(x) ** 2 <= memory * GIGABYTE else None

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return ``K v`` for ``v [n, k]``: 2 n^2 k operations, and n^2 / 2 evaluations where K is not stored."""
        if self.matrix is not None:
            return self.matrix @ v
        result = torch.zeros_like(v)
        with torch.no_grad():
            for i, j in pairs(len(v)):
                tile = _tile(self.kernel, self.x, i, j)
                result[i] += tile @ v[j]
                if i != j:
                    result[j] += tile.mT @ v[i]
        return result


def _tile(kernel: Kernel, x: Tensor, i: slice, j: slice) -> Tensor:
    """Equal rows are passed as one tensor: kernels of distances are exact on the diagonal then."""
    tile: Tensor = kernel(x[i]).to_dense() if i == j else kernel(x[i], x[j]).to_dense()
    return tile
