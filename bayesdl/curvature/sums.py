"""Gauss-Newton and Fisher matrices of a network's likelihood, summed over all N rows: dense, diagonal, of low rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.curvature.layers import ELEMENTS, Layer, layers_of, signals
from bayesdl.curvature.memory import require_memory
from bayesdl.curvature.outputs import Curvature, NetworkOutputs
from bayesdl.density import Site

SPARE, SWEEPS, SETTLED = 10, 60, 1e-9


def dense(
    network: NetworkOutputs, sites: Sequence[Site], curvature: Curvature = "ggn", batch_size: int | None = None
) -> Tensor:
    """``sum_i J_i^T R_i R_i^T J_i`` by the coordinates of some sites in their order, ``[R, R]``.

    Cost: N C gradients and N C R^2 multiplications.

    Raises:
        MethodError: the matrix is too large to be written out.
    """
    size = sum(site.size for site in sites)
    require_memory(f"A full matrix of {size:,} unknowns", size, size, network.z.dtype)
    total = network.z.new_zeros(size, size)
    for rows in _row_factors(network, tuple(sites), curvature, batch_size):
        total += rows.mT @ rows
    return total


def diagonal(
    network: NetworkOutputs, sites: Sequence[Site], curvature: Curvature = "ggn", batch_size: int | None = None
) -> Tensor:
    """The diagonal of ``dense``, ``[R]``, exact; layer by layer from inputs and gradients where that can be."""
    layers, others = layers_of(network, sites)
    whole = torch.zeros_like(network.z)
    _add_layers(network, layers, curvature, batch_size, whole)
    if others:
        values = torch.stack(
            [r.square().sum(0) for r in _row_factors(network, tuple(others), curvature, batch_size)]
        ).sum(0)
        whole[coordinates(others, network.z)] = values
    return whole[coordinates(sites, network.z)]


def _add_layers(
    network: NetworkOutputs, layers: Sequence[Layer], curvature: Curvature, batch_size: int | None, whole: Tensor
) -> None:
    """Add the diagonals of layers to ``whole [D]``."""
    if not layers:
        return
    for batch in network.batches(batch_size):
        found = signals(network, layers, batch["x"], network.roots(batch, curvature))[1]
        for layer, signal in zip(layers, found, strict=True):
            whole[layer.place] += signal.squares()


def top(times: Callable[[Tensor], Tensor], like: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a positive semi-definite matrix and their vectors, by block power iteration.

    ``rank`` and a few spare vectors are multiplied and made orthonormal until the Ritz values stand still (Halko,
    Martinsson & Tropp, 2011, algorithm 4.4). Exact after one sweep where the matrix has no higher rank.

    Args:
        times: ``M v`` for rows v ``[V, D]``.
        like: a vector ``[D]``.
        rank: how many.
        seed: of the start.

    Returns:
        Values ``[R]``, falling, and vectors ``[D, R]``.
    """
    count = min(len(like), rank + SPARE)
    rows = torch.randn(count, len(like), dtype=like.dtype, generator=generator(seed, "top")).to(like.device)
    basis = torch.linalg.qr(times(rows).mT)[0]
    values = like.new_zeros(count)
    for _ in range(SWEEPS):
        image = times(basis.mT).mT
        inner = basis.mT @ image
        old, (values, turn) = values, torch.linalg.eigh(0.5 * (inner + inner.mT))
        if bool((values - old).abs().max() <= SETTLED * values.abs().max()):
            break
        basis = torch.linalg.qr(image)[0]
    kept = min(rank, count)
    return values[-kept:].flip(0).clamp(min=0), (basis @ turn)[:, -kept:].flip(1)


def coordinates(sites: Sequence[Site], like: Tensor) -> Tensor:
    """The coordinates of sites in the flat vector, in the sites' order."""
    pieces = [torch.arange(site.start, site.stop, device=like.device) for site in sites]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=like.device)


def _row_factors(
    network: NetworkOutputs, sites: tuple[Site, ...], curvature: Curvature, batch_size: int | None
) -> Iterator[Tensor]:
    """``R_i^T J_i`` of some rows at a time, ``[B C, R]``."""
    size = sum(site.size for site in sites)
    for batch in network.batches(batch_size):
        roots = network.roots(batch, curvature)
        step = max(1, ELEMENTS // (size * roots.shape[2]))
        for rows in torch.arange(len(roots), device=roots.device).split(step):
            yield network.row_factors(batch["x"][rows], roots[rows], sites).flatten(0, 1)
