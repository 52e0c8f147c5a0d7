"""Recorded graphs over blocks of chains: the gradient alone, or a step of a sampler with the gradient inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdl.density import forecast, graph
from bayesdl.density.compiled import CompilerFailure, compile_graph
from bayesdl.density.graph import Graph

Step = Callable[..., tuple[Tensor, ...]]
"""``(*rows, *shared, value_and_grad) -> results``: rows and results have the chains first, and no chain looks at
another; equal steps are the same step."""


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference between two ways of computing the same number that rounding explains."""
    return 1e-9 if dtype == torch.float64 else 1e-4


class Blocks:
    """A recorded graph that runs over blocks of chains, small enough for the cache.

    What depends on the data alone is computed when the data change, if they are steady; else with every call.
    """

    def __init__(self, function: Graph, inputs: Sequence[Tensor], in_rows: Sequence[int | None], steady: bool) -> None:
        """Record ``function`` for inputs like these."""
        z, *data = inputs
        self.before: Callable[..., Sequence[Tensor]] | None = None
        self.in_rows = (None, *in_rows)  # of the factors, and of the batch's tensors
        self.shared = not any(dim == 0 for dim in in_rows)
        recorded = graph.record(function, inputs)
        self.elements, largest = graph.elements(recorded)
        self.block = forecast.block(len(z), largest, z.dtype)
        if self.block < len(z):
            recorded = graph.record(function, (z[: self.block], *self.cut(data, 0)))
        self.operations = graph.operations(recorded)
        whole = self.block >= len(z) or self.shared
        self.before, self.graph = graph.split_off_data(recorded) if steady and whole else (None, recorded)
        self.call: Callable[..., Any] = self.graph
        self._data: list[Tensor] = []
        self._versions: list[object] = []
        self._bound: Sequence[Tensor] = ()

    def compile(self, inputs: Sequence[Tensor]) -> None:
        """Put machine code in the graph's place.

        Raises:
            CompilerFailure: as said; the graph stays.
        """
        z, *data = inputs
        bound = self.bind(data)
        self.call = compile_graph(self.graph, (z[: self.block].contiguous(), *self.cut(bound, 0)))

    def __call__(self, z: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of all chains."""
        value, gradient = self.over_blocks(self.call, [z.contiguous()], (), self.bind(data))
        return value, gradient

    def over_blocks(
        self,
        call: Callable[..., Sequence[Tensor]],
        rows: Sequence[Tensor],
        shared: Sequence[Tensor],
        bound: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """``call(*rows, *shared, *bound)``, block by block of the chains."""
        chains, block = len(rows[0]), self.block
        if block >= chains:
            return call(*rows, *shared, *bound)
        pieces = []
        for start in range(0, chains, block):
            first = min(start, chains - block)  # the last block overlaps the one before: one graph serves for all
            cut = [row[first : first + block] for row in rows]
            pieces.append([piece[start - first :] for piece in call(*cut, *shared, *self.cut(bound, first))])
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def bind(self, data: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the graph takes besides z, in the strides that machine code was made for."""
        if self.before is None:
            return [tensor.contiguous() for tensor in data]
        # Tensors of inference mode do not count their changes; they are taken for changed.
        versions = [object() if tensor.is_inference() else tensor._version for tensor in data]
        same = len(self._data) == len(data) and all(map(_is, self._data, data))
        if not same or versions != self._versions:
            self._bound = [tensor.contiguous() for tensor in self.before(*data)]
            self._data, self._versions = list(data), versions
        return self._bound

    def cut(self, data: Sequence[Tensor], first: int) -> Sequence[Tensor]:
        """The part of one block of chains, of the tensors that carry the chain dimension.

        What was computed from the data beforehand is only there where nothing has to be cut.
        """
        if self.shared or self.before is not None:
            return data
        last = first + self.block
        return [t if dim is None else t[first:last] for t, dim in zip(data, self.in_rows, strict=True)]


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other


class FusedStep:
    """A step of a sampler, with the gradients that it takes, as one piece of machine code.

    What is between two gradients (coordinates, momenta, energies) is a dozen small operations; with few rows, starting
    them one by one takes as long as the gradient itself.
    """

    def __init__(
        self, step: Step, blocks: Blocks, rows: Sequence[Tensor], shared: Sequence[Tensor], data: Sequence[Tensor]
    ) -> None:
        """Record and compile ``step(*rows, *shared, value_and_grad)``.

        Raises:
            CompilerFailure: there is no machine code, or it computes something else.
        """
        self.blocks, self.gradients = blocks, 0
        bound = blocks.bind(data)

        def whole(*tensors: Tensor) -> tuple[Tensor, ...]:
            own, rest = tensors[: len(rows) + len(shared)], tensors[len(rows) + len(shared) :]

            def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
                self.gradients += 1
                value, gradient = blocks.graph(z, *rest)
                return value, gradient

            return step(*own, value_and_grad)

        # Machine code is made for one order in memory: that of contiguous tensors, here and in every later call.
        first = [row[: blocks.block].contiguous() for row in rows]
        inputs = [*first, *(part.contiguous() for part in shared), *blocks.cut(bound, 0)]
        recorded = graph.record(whole, inputs)
        self.gradients = 0
        want = whole(*inputs)
        self.call = compile_graph(recorded, inputs)
        wrong = difference(self.call(*inputs), want)
        if wrong:
            raise CompilerFailure(f"The compiled step's {wrong}")

    def bind(self, shared: Sequence[Tensor], data: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The step as a function of its rows alone."""
        bound, over_blocks, call = self.blocks.bind(data), self.blocks.over_blocks, self.call
        parts = [part.contiguous() for part in shared]
        return lambda *rows: over_blocks(call, [row.contiguous() for row in rows], parts, bound)


def difference(got: Sequence[Tensor], want: Sequence[Tensor], names: Sequence[str] = ()) -> str:
    """In words, by how much results differ beyond rounding; empty if they do not.

    Args:
        got: what one way of computing gives.
        want: what another does.
        names: of the results. Without any, these are what a step is made of, where differences of large numbers may be
            small: then the rounding of the largest number is granted to all.
    """
    sizes = [float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) for b in want]
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        allowed = tolerance(b.dtype)
        scale = max(1.0, sizes[number] if names else max(sizes))
        if not torch.allclose(a, b, rtol=allowed, atol=allowed * scale, equal_nan=True):
            name = names[number] if names else f"result {number}"
            return f"{name} differs from the program's by {float((a - b).abs().max()):.3g}"
    return ""
