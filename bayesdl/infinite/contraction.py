"""Three ways to one block of an empirical tangent kernel, ``J(x1) J(x2)^T``, and what each costs.

The operation counts are those of Novak, Sohl-Dickstein and Schoenholz (2022), Fast finite width neural tangent kernel,
table 1, with N rows, K outputs, P parameters, F multiplications in a forward pass of a row, and for a layer with
weights ``[O, I]`` at T positions its inputs a ``[T, I]`` and the derivatives g ``[K, T, O]`` by its outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from bayesdl.curvature.layers import Layer, layers_of, signals
from bayesdl.density import Site
from bayesdl.infinite.finite import ELEMENTS, FiniteNetwork


class Contraction(ABC):
    """Features of rows, and their products.

    Attributes:
        network: at the point where the kernel is taken.
        outputs: K.
        row_numbers: numbers held for a row.
        pair_numbers: numbers held for a pair of rows.
    """

    row_numbers: int
    pair_numbers: int

    def __init__(self, network: FiniteNetwork, per_output: bool) -> None:
        self.network, self.per_output = network, per_output
        with torch.no_grad():
            self.outputs = network.at(network.z, network.example).shape[1]
        self.blocks = self.outputs**2 if per_output else 1

    @abstractmethod
    def features(self, x: Tensor) -> Any:
        """What is computed once for the rows ``x [B, ...]``."""

    @abstractmethod
    def product(self, one: Any, other: Any) -> Tensor:
        """``[B1, B2]``, the trace over outputs, or ``[B1, B2, K, K]``."""

    @abstractmethod
    def cost(self, n1: int, n2: int, forward: float) -> float:
        """Multiplications for n1 x n2 rows, given those of a forward pass of one row."""


class Jacobians(Contraction):
    """Rows of the Jacobian, ``[B, K, P]``, multiplied: ``N K F + N^2 K^2 P``, or ``N^2 K P`` for the trace."""

    def __init__(self, network: FiniteNetwork, per_output: bool, sites: Sequence[Site] | None = None) -> None:
        super().__init__(network, per_output)
        self.sites = network.sites if sites is None else tuple(sites)
        self.size = sum(site.size for site in self.sites)
        self.row_numbers, self.pair_numbers = self.outputs * self.size, self.blocks

    def features(self, x: Tensor) -> Tensor:
        """``[B, K, P]`` in the units of z."""
        network = self.network
        fixed = network.parameters(network.z)
        leaves = {site.name: fixed[site.name] for site in self.sites}

        def row(one: Tensor) -> dict[str, Tensor]:
            def function(values: dict[str, Tensor]) -> Tensor:
                return network.outputs({**fixed, **values}, one.unsqueeze(0))[0]

            found: dict[str, Tensor] = jacrev(function)(leaves)
            return found

        found = vmap(row)(x)
        parts = [found[site.name].flatten(2) * network.scale[site.start : site.stop] for site in self.sites]
        return torch.cat(parts, 2).detach()

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """One matrix product."""
        return flat_product(one, other, self.per_output)

    def cost(self, n1: int, n2: int, forward: float) -> float:
        """A backward pass costs two forward ones."""
        return (n1 + n2) * self.outputs * 2 * forward + n1 * n2 * self.products * self.size

    @property
    def products(self) -> int:
        """Products of rows of two Jacobians for a pair."""
        return self.outputs**2 if self.per_output else self.outputs


class VectorProducts(Contraction):
    """Columns of the kernel by ``J(x1) (J(x2)^T e_k)``: ``N^2 K F``, and never more of a Jacobian than one row."""

    def __init__(self, network: FiniteNetwork, per_output: bool) -> None:
        super().__init__(network, per_output)
        self.row_numbers = self.outputs * len(network.z)
        self.pair_numbers = self.outputs**2

    def features(self, x: Tensor) -> Tensor:
        """The rows themselves."""
        return x

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """A reverse derivative for every row and output of ``other``, then a forward one for all rows of ``one``."""
        network = self.network
        units = torch.eye(self.outputs, dtype=network.z.dtype, device=network.z.device)

        def column(row: Tensor, unit: Tensor) -> Tensor:
            pull = vjp(lambda z: network.at(z, row.unsqueeze(0))[0], network.z)[1]
            along: Tensor = jvp(lambda z: network.at(z, one), (network.z,), pull(unit))[1]
            return along  # [B1, K]

        columns = vmap(vmap(column, (None, 0)), (0, None), chunk_size=self.chunk(len(one)))
        found = columns(other, units).detach().permute(2, 0, 3, 1)  # of [B2, K, B1, K]
        return found if self.per_output else found.diagonal(dim1=2, dim2=3).sum(2)

    def chunk(self, rows: int) -> int:
        """Rows of ``other`` at once, so that tangents and activations stay within bounds."""
        return max(1, ELEMENTS // (self.outputs * (len(self.network.z) * (1 + rows // 16))))

    def cost(self, n1: int, n2: int, forward: float) -> float:
        """A forward derivative and the outputs beside it cost three forward passes."""
        return n1 * n2 * self.outputs * 3 * forward + n2 * self.outputs * 2 * forward


class Structured(Contraction):
    """Layer by layer, without the Jacobian: ``sum_ts (a_t . a'_s) (g_t . g'_s)`` for weights ``[O, I]``.

    For a linear layer that is ``N^2 (I + K^2 O)``, or ``N^2 (I + K O)`` for the trace, against ``N^2 K^2 O I`` with the
    Jacobian. A layer with many positions has ``g^T a``, its rows of the Jacobian, made where that is cheaper, and so
    have the parameters of all other modules.
    """

    def __init__(self, network: FiniteNetwork, per_output: bool) -> None:
        super().__init__(network, per_output)
        found, others = layers_of(network, network.sites)
        self.layers = [layer for layer in found if _uniform(network.scale[layer.place])]
        odd = [layer for layer in found if layer not in self.layers]
        rest = [*others, *(site for site in network.sites if any(_belongs(site, layer) for layer in odd))]
        self.rest = Jacobians(network, per_output, rest) if rest else None
        self.columns = [network.scale[layer.place[0]] for layer in self.layers]
        heard = signals(network, self.layers, network.example)[1]
        self.shapes = [(*layer.place.shape, h.inputs.shape[1]) for layer, h in zip(self.layers, heard, strict=True)]
        self.gram = [self._gram_cost(*shape) <= self._jacobian_cost(*shape) for shape in self.shapes]
        k, rest_numbers = self.outputs, self.rest.row_numbers if self.rest else 0
        ways = list(zip(self.shapes, self.gram, strict=True))
        self.row_numbers = rest_numbers + sum(t * (i + k * o) if gram else k * o * i for (o, i, t), gram in ways)
        wide = [t * t + (k * t * o if per_output else t * t) for (o, _, t), gram in ways if gram and t > 1]
        self.pair_numbers = max([self.blocks, *wide])

    def features(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor] | Tensor], Tensor | None]:
        """For each layer a ``[B, T, I]`` and g ``[K, B, T, O]``, or ``[B, K, O I]``."""
        parts: list[tuple[Tensor, Tensor] | Tensor] = []
        heard = signals(self.network, self.layers, x)[1]
        for signal, column, gram in zip(heard, self.columns, self.gram, strict=True):
            a, g = signal.inputs * column, signal.gradients
            parts.append((a, g) if gram else (g.mT @ a).flatten(2).movedim(0, 1))
        return parts, self.rest.features(x) if self.rest else None

    def product(self, one: Any, other: Any) -> Tensor:
        """The sum over layers."""
        total: Tensor | int = 0
        for first, second in zip(one[0], other[0], strict=True):
            if isinstance(first, Tensor):
                total = total + flat_product(first, second, self.per_output)
            else:
                total = total + signal_product(first, second, self.per_output)
        if self.rest:
            total = total + self.rest.product(one[1], other[1])
        assert isinstance(total, Tensor)
        return total

    def cost(self, n1: int, n2: int, forward: float) -> float:
        """With the cheaper of two ways for each layer."""
        k = self.outputs
        total = (n1 + n2) * k * 2 * forward
        for shape, gram in zip(self.shapes, self.gram, strict=True):
            o, i, t = shape
            total += n1 * n2 * (self._gram_cost(*shape) if gram else self._jacobian_cost(*shape))
            total += 0 if gram else (n1 + n2) * k * t * o * i
        return total + (n1 * n2 * self.rest.products * self.rest.size if self.rest else 0)

    def _gram_cost(self, o: int, i: int, t: int) -> int:
        k = self.outputs
        return t * t * (i + k * o) + (k * k * t * o if self.per_output else 0)

    def _jacobian_cost(self, o: int, i: int, t: int) -> int:
        return (self.outputs**2 if self.per_output else self.outputs) * o * i


def flat_product(one: Tensor, other: Tensor, per_output: bool) -> Tensor:
    """``J J'^T`` of rows ``[B1, K, D]`` and ``[B2, K, D]``, or its trace over outputs."""
    if not per_output:
        return one.flatten(1) @ other.flatten(1).mT
    found = one.flatten(0, 1) @ other.flatten(0, 1).mT
    return found.reshape(*one.shape[:2], *other.shape[:2]).transpose(1, 2)


def signal_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], per_output: bool) -> Tensor:
    """``sum_ts (a_t . a'_s) (g_t . g'_s)`` of inputs ``[B, T, I]`` and derivatives ``[K, B, T, O]``."""
    (a1, g1), (a2, g2) = one, other
    if a1.shape[1] == 1:
        inner = a1[:, 0] @ a2[:, 0].mT
        outer = flat_product(g1[:, :, 0].transpose(0, 1), g2[:, :, 0].transpose(0, 1), per_output)
        return outer * (inner[:, :, None, None] if per_output else inner)
    inner = torch.einsum("bti,csi->bcts", a1, a2)
    if per_output:
        return torch.einsum("kbcso,lcso->bckl", torch.einsum("bcts,kbto->kbcso", inner, g1), g2)
    return (inner * torch.einsum("kbto,kcso->bcts", g1, g2)).sum((2, 3))


def _uniform(scale: Tensor) -> bool:
    """Whether the units ``[O, I]`` of a layer's weights depend on the column alone."""
    return torch.equal(scale, scale[:1].expand_as(scale))


def _belongs(site: Site, layer: Layer) -> bool:
    return bool((layer.place == site.start).any())
