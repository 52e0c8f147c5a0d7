"""The covariance of a network's outputs, linearised in Gaussian weights: ``J S J^T`` row by row, without J."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.curvature.layers import Layer, Signals, layers_of, signals
from bayesdl.curvature.outputs import NetworkOutputs
from bayesdl.density import Site
from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, Kronecker
from bayesdl.posterior.placed import Placed

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
DENSE_UP_TO = 4096
"""Unknowns of a dense covariance up to which rows of the Jacobian are made."""


def covariances(network: NetworkOutputs, covariance: Covariance) -> Moments | None:
    """How to compute means ``[B, K]`` and covariances ``[B, K, K]`` of the outputs at inputs, or None.

    Possible where every random weight belongs to a layer, and each layer's weights are independent of the others' with
    a diagonal or Kronecker covariance; or where the covariance is dense and small.

    Args:
        network: the network at the mean.
        covariance: of all coordinates.
    """
    if not isinstance(covariance, Placed):
        return None
    at = torch.full((covariance.dim,), -1, dtype=torch.int64, device=covariance.place.device)
    at[covariance.place] = torch.arange(len(covariance.place), device=at.device)
    random = [site for site in network.sites if bool((at[site.start : site.stop] >= 0).all())]
    layers, others = layers_of(network, random)
    if not others:
        spreads = [_spread(layer, covariance, at) for layer in layers]
        if all(spread is not None for spread in spreads):
            return _LayerMoments(network, layers, [spread for spread in spreads if spread is not None])
    size = sum(site.size for site in random)
    where = torch.cat([at[site.start : site.stop] for site in random]) if random else at[:0]
    blocks = _blocks(covariance.inner)
    dense = [block for block, first in blocks if isinstance(block, Dense) and block.dim == size and first == 0]
    if size <= DENSE_UP_TO and dense and torch.equal(where, torch.arange(size, device=where.device)):
        return _DenseMoments(network, tuple(random), covariance.scale[:size, None] * dense[0].root)
    return None


class _LayerMoments:
    """Sums over layers, each in its eigenbasis: ``sum_oi s_oi (U^T M_k V)_oi (U^T M_l V)_oi``."""

    def __init__(self, network: NetworkOutputs, layers: list[Layer], spreads: list[_Spread]) -> None:
        self.network, self.layers, self.spreads = network, layers, spreads

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        f, found = signals(self.network, self.layers, rows)
        total = f.new_zeros(*f.shape, f.shape[1])
        for signal, spread in zip(found, self.spreads, strict=True):
            total += spread.through(signal)
        return f, total


class _Spread:
    """A layer's covariance, ``(U x V) diag(spread) (U x V)^T`` with V in the units of the columns.

    Attributes:
        left: U or None for the identity.
        right: V, likewise.
        spread: ``[O, I]``.
    """

    def __init__(self, left: Tensor | None, right: Tensor | None, spread: Tensor) -> None:
        self.left, self.right, self.spread = left, right, spread

    def through(self, signal: Signals) -> Tensor:
        """``J S J^T`` of the layer's weights, ``[B, K, K]``."""
        a = signal.inputs if self.right is None else signal.inputs @ self.right
        g = signal.gradients if self.left is None else signal.gradients @ self.left
        if a.shape[1] == 1:
            weight = a[:, 0].square() @ self.spread.mT  # [B, O]
            back = g[:, :, 0].movedim(0, 1)  # [B, K, O]
            return (back * weight.unsqueeze(1)) @ back.mT
        parts = []
        for derivative in Signals(a, g).derivatives():
            flat = (derivative * self.spread.sqrt()).flatten(2).movedim(0, 1)
            parts.append(flat @ flat.mT)
        return torch.cat(parts)


class _DenseMoments:
    """``(J L) (J L)^T`` with a root L of the covariance."""

    def __init__(self, network: NetworkOutputs, sites: tuple[Site, ...], root: Tensor) -> None:
        self.network, self.sites, self.root = network, sites, root

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        f = self.network.at(self.network.z, rows)
        units = torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(len(f), -1, -1)
        wide = self.network.row_factors(rows, units, self.sites) @ self.root
        return f, wide @ wide.mT


def _spread(layer: Layer, covariance: Placed, at: Tensor) -> _Spread | None:
    """The covariance of a layer's weights, if it is one of a kind and independent of the rest."""
    where = at[layer.place]
    scale = covariance.scale[where]
    flat = where.flatten()
    for block, first in _blocks(covariance.inner):
        inside = (flat >= first) & (flat < first + block.dim)
        if isinstance(block, Kronecker) and block.spread.shape == where.shape and bool(inside.all()):
            straight = torch.equal(flat, torch.arange(first, first + block.dim, device=flat.device))
            same = torch.allclose(scale, scale[:1].expand_as(scale), rtol=1e-5)
            return _Spread(block.left, scale[0, :, None] * block.right, block.spread) if straight and same else None
    sd = covariance.scale.new_full((len(covariance.place),), float("nan"))
    for block, first in _blocks(covariance.inner):
        if isinstance(block, Diagonal):
            sd[first : first + block.dim] = block.sd
    found = sd[where]
    return None if bool(found.isnan().any()) else _Spread(None, None, (found * scale).square())


def _blocks(inner: Covariance) -> list[tuple[Covariance, int]]:
    """Independent blocks, and where each begins."""
    if isinstance(inner, Blocks):
        return [(block, part.start) for block, part in zip(inner.blocks, inner.parts(), strict=True)]
    return [(inner, 0)]
