"""Gauss-Newton's rows ``R_i^T J_i`` piece by piece, and their kernel: Laplace in function space (Immer et al., 2021).

With weights in units of the prior, the posterior's covariance ``(1 + F^T F)^-1`` has as many directions other than the
prior's as there are rows in F: N rows times C functions of each. All that is needed of it, evidence and predictions
included, is in the kernel ``F F^T``, a Gaussian process's. For a layer on vectors ``F_nc = g_nc x a_n``, so that the
kernel is ``(g g^T) (a a^T)`` entry by entry, and no Jacobian is written out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdl.curvature.layers import Layer, signals
from bayesdl.curvature.memory import require_memory
from bayesdl.curvature.outputs import Curvature, NetworkOutputs
from bayesdl.density import Site
from bayesdl.posterior.dual import Outer, Rows, Written

Parts = tuple[list[Layer], list[Site]]


def places(network: NetworkOutputs, parts: Parts) -> Tensor:
    """The coordinates of z in the order of the pieces, ``[R]``."""
    layers, others = parts
    found = [layer.place.flatten() for layer in layers]
    found += [torch.arange(site.start, site.stop, device=network.z.device) for site in others]
    return torch.cat(found)


def rows(network: NetworkOutputs, parts: Parts, scale: Tensor, x: Tensor, roots: Tensor | None = None) -> list[Rows]:
    """``R_i^T J_i diag(scale)`` of some rows, a piece for each layer and one for the other sites.

    Args:
        network: the network at a point.
        parts: of ``layers_of``: layers, and sites that belong to none.
        scale: ``[D]``, units of the coordinates.
        x: inputs ``[B, ...]``.
        roots: ``[B, K, C]``; by default the K outputs themselves.
    """
    layers, others = parts
    found: list[Rows] = []
    for layer, signal in zip(layers, signals(network, layers, x, roots)[1], strict=True):
        units = scale[layer.place]
        if signal.inputs.shape[1] == 1 and torch.allclose(units, units[:1].expand_as(units), rtol=1e-6):
            found.append(Outer(signal.gradients[:, :, 0].movedim(0, 1), signal.inputs[:, 0] * units[0]))
        else:
            written = [(part * units).flatten(2).movedim(0, 1) for part in signal.derivatives()]
            found.append(Written(torch.cat(written)))
    if others:
        if roots is None:
            outputs = network.at(network.z, x[:1]).shape[1]
            roots = torch.eye(outputs, dtype=scale.dtype, device=scale.device).expand(len(x), -1, -1)
        units = torch.cat([scale[site.start : site.stop] for site in others])
        found.append(Written(network.row_factors(x, roots, tuple(others)) * units))
    return found


def training_rows(
    network: NetworkOutputs, parts: Parts, scale: Tensor, curvature: Curvature, batch_size: int | None
) -> tuple[Rows, ...]:
    """Those of all training rows.

    Functions that say nothing at any row are left out: for class logits there is one, as a constant added to all of
    them changes nothing.

    Raises:
        MethodError: the kernel between them is too large to be written out.
    """
    roots = torch.cat([network.roots(batch, curvature) for batch in network.batches(batch_size)])
    says = roots.square().sum(1).amax(0)
    roots = roots[:, :, says > 100 * torch.finfo(roots.dtype).eps * says.max()]
    count = roots.shape[0] * roots.shape[2]
    require_memory(f"A kernel between {count:,} outputs of {len(roots):,} rows", count, count, torch.float64)
    found: list[list[Rows]] = []
    start = 0
    for batch in network.batches(batch_size):
        found.append(rows(network, parts, scale, batch["x"], roots[start : start + len(batch["x"])]))
        start += len(batch["x"])
    return tuple(_joined(pieces) for pieces in zip(*found, strict=True))


def _joined(pieces: Sequence[Rows]) -> Rows:
    if all(isinstance(piece, Outer) for piece in pieces):
        outer = [piece for piece in pieces if isinstance(piece, Outer)]
        return Outer(torch.cat([piece.left for piece in outer]), torch.cat([piece.right for piece in outer]))
    return Written(torch.cat([piece.rows for piece in pieces if isinstance(piece, Written)]))
