"""The covariance of a network's outputs, linearised in Gaussian weights: ``J S J^T`` row by row, without J."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

from bayesdl.curvature.kernel import Parts, places
from bayesdl.curvature.kernel import rows as rows_of
from bayesdl.curvature.layers import Layer, Signals, layers_of, signals
from bayesdl.curvature.outputs import NetworkOutputs
from bayesdl.density import Site
from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, Kronecker
from bayesdl.posterior.dual import Dual, kernel
from bayesdl.posterior.placed import Placed, Spectral

AT_ONCE = 2**20
"""Numbers of a dense layer's covariance that are looked at together: what stays in the cache."""

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
DENSE_UP_TO = 4096
"""Unknowns of a dense covariance up to which rows of the Jacobian are made."""


def covariances(network: NetworkOutputs, covariance: Covariance) -> Moments | None:
    """How to compute means ``[B, K]`` and covariances ``[B, K, K]`` of the outputs at inputs, or None.

    Possible where each layer's weights are independent of all others with a diagonal or Kronecker covariance, and those
    of no layer with a diagonal one; where few directions or few rows make the covariance; or where it is dense and
    small.

    Args:
        network: the network at the mean.
        covariance: of all coordinates.
    """
    if not isinstance(covariance, Placed):
        return None
    at = torch.full((covariance.dim,), -1, dtype=torch.int64, device=covariance.place.device)
    at[covariance.place] = torch.arange(len(covariance.place), device=at.device)
    random = [site for site in network.sites if bool((at[site.start : site.stop] >= 0).all())]
    parts = layers_of(network, random)
    layers, others = parts
    spreads = [_spread(layer, covariance, at) for layer in layers]
    sd = _separate(covariance)[torch.cat([at[site.start : site.stop] for site in others])] if others else at[:0]
    if not bool(sd.isnan().any()) and all(spread is not None for spread in spreads):
        return _LayerMoments(network, parts, [spread for spread in spreads if spread is not None], sd)
    first = _blocks(covariance.inner)[0][0]
    size = sum(site.size for site in random)
    if first.dim != size or not bool((at[places(network, parts)] < size).all()):
        return None
    if isinstance(first, Dual) and torch.equal(covariance.place[:size], places(network, parts)):
        scale = torch.zeros_like(network.z)
        scale[covariance.place] = covariance.scale
        return _DualMoments(network, parts, scale, first)
    if isinstance(first, Spectral):
        return _SpectralMoments(network, parts, covariance, first)
    if isinstance(first, Dense) and size <= DENSE_UP_TO:
        if len(layers) == 1 and not others:
            where = at[layers[0].place.flatten()]
            root = covariance.scale[where, None] * first.root[where]
            return _OneLayerMoments(network, layers[0], root @ root.mT)
        where = covariance.place[:size]
        if torch.equal(where, torch.cat([_range(site, network.z) for site in random])):
            return _DenseMoments(network, tuple(random), covariance.scale[:size, None] * first.root)
    return None


class _LayerMoments:
    """Sums over layers, each in its eigenbasis: ``sum_oi s_oi (U^T M_k V)_oi (U^T M_l V)_oi``; and over other weights.

    Attributes:
        others: ``[R]``, sd of the weights that belong to no layer.
    """

    def __init__(self, network: NetworkOutputs, parts: Parts, spreads: list[_Spread], others: Tensor) -> None:
        self.network, self.spreads, self.others = network, spreads, others
        self.layers, self.sites = parts

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        f, found = signals(self.network, self.layers, rows)
        total = f.new_zeros(*f.shape, f.shape[1])
        for signal, spread in zip(found, self.spreads, strict=True):
            total += spread.through(signal)
        if self.sites:
            wide = _jacobians(self.network, f, rows, tuple(self.sites)) * self.others
            total += wide @ wide.mT
        return f, total


class _DualMoments:
    """``k(x, x) - k(x, X) (1 + k(X, X))^-1 k(X, x)``, with the kernel of the prior's linearised functions."""

    def __init__(self, network: NetworkOutputs, parts: Parts, scale: Tensor, dual: Dual) -> None:
        self.network, self.parts, self.scale, self.dual = network, parts, scale, dual
        self.half = dual.vectors * (1.0 + dual.values).rsqrt()

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        f = self.network.at(self.network.z, rows)
        pieces = tuple(rows_of(self.network, self.parts, self.scale, rows))
        prior = torch.stack([piece.own() for piece in pieces]).sum(0)
        told = (kernel(pieces, self.dual.pieces) @ self.half).unflatten(0, f.shape)
        return f, prior - told @ told.mT


class _SpectralMoments:
    """``a J J^T + (J W) diag(l - a) (J W)^T`` for few directions W: a forward derivative along each."""

    def __init__(self, network: NetworkOutputs, parts: Parts, covariance: Placed, few: Spectral) -> None:
        place, scale = covariance.place[: few.dim], covariance.scale[: few.dim]
        sd = torch.zeros_like(network.z)
        sd[place] = scale * few.across.sqrt()
        spreads = [_Spread(None, None, sd[layer.place].square()) for layer in parts[0]]
        others = torch.cat([sd[site.start : site.stop] for site in parts[1]]) if parts[1] else sd[:0]
        self.across = _LayerMoments(network, parts, spreads, others)
        self.network = network
        self.steps = network.z.new_zeros(few.basis.shape[1], len(network.z))
        self.steps[:, place] = (few.basis * scale[:, None]).mT
        self.gain = few.along - few.across

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        f, total = self.across(rows)

        def along(step: Tensor) -> Tensor:
            found: Tensor = jvp(lambda z: self.network.at(z, rows), (self.network.z,), (step,))[1]
            return found

        told = vmap(along, chunk_size=64)(self.steps).movedim(0, 2)  # [B, K, R]
        return f, total + (told * self.gain) @ told.mT


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


class _OneLayerMoments:
    """One layer with a dense covariance ``[O I, O I]``: that of its outputs, ``a^T S_op a``, between the gradients."""

    def __init__(self, network: NetworkOutputs, layer: Layer, covariance: Tensor) -> None:
        self.network, self.layer, self.covariance = network, layer, covariance
        count, width = layer.place.shape
        # [I, O O I]: one product with the inputs leaves a vector for each pair of outputs.
        self.wide = covariance.reshape(count, width, count, width).movedim(0, 1).reshape(width, -1)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        f, (signal,) = signals(self.network, [self.layer], rows)
        count, width = self.layer.place.shape
        parts = []
        if signal.inputs.shape[1] == 1:
            inputs, back = signal.inputs[:, 0], signal.gradients[:, :, 0].movedim(0, 1)
            step = max(1, AT_ONCE // self.wide.shape[1])
            for a, g in zip(inputs.split(step), back.split(step), strict=True):
                half = (a @ self.wide).reshape(len(a), count * count, width)
                parts.append(g @ (half @ a.unsqueeze(2)).reshape(-1, count, count) @ g.mT)
        else:
            for derivative in signal.derivatives():
                flat = derivative.flatten(2).movedim(0, 1)
                parts.append(flat @ self.covariance @ flat.mT)
        return f, torch.cat(parts)


class _DenseMoments:
    """``(J L) (J L)^T`` with a root L of the covariance."""

    def __init__(self, network: NetworkOutputs, sites: tuple[Site, ...], root: Tensor) -> None:
        self.network, self.sites, self.root = network, sites, root

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        f = self.network.at(self.network.z, rows)
        wide = _jacobians(self.network, f, rows, self.sites) @ self.root
        return f, wide @ wide.mT


def _jacobians(network: NetworkOutputs, f: Tensor, rows: Tensor, sites: tuple[Site, ...]) -> Tensor:
    """Of the outputs f by some sites, ``[B, K, R]``."""
    units = torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(len(f), -1, -1)
    return network.row_factors(rows, units, sites)


def _range(site: Site, like: Tensor) -> Tensor:
    return torch.arange(site.start, site.stop, device=like.device)


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
    found = _separate(covariance)[where]
    return None if bool(found.isnan().any()) else _Spread(None, None, found.square())


def _separate(covariance: Placed) -> Tensor:
    """The sd of coordinates that are independent of all others, in the order of ``place``; nan elsewhere."""
    sd = covariance.scale.new_full((len(covariance.place),), float("nan"))
    for block, first in _blocks(covariance.inner):
        if isinstance(block, Diagonal):
            sd[first : first + block.dim] = block.sd
    return sd * covariance.scale


def _blocks(inner: Covariance) -> list[tuple[Covariance, int]]:
    """Independent blocks, and where each begins."""
    if isinstance(inner, Blocks):
        return [(block, part.start) for block, part in zip(inner.blocks, inner.parts(), strict=True)]
    return [(inner, 0)]
