"""A recorded graph as machine code, by torch's compiler."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from bayesdl.density import layout, rewrite
from bayesdl.density.approximations import approximate
from bayesdl.density.graph import VIEWS

_aten = torch.ops.aten

# One thread compiles: a pool of processes costs more than the two files that there are. The check that the processor's
# vector instructions can be compiled takes six seconds; trying them, and then narrower ones, takes none. Shapes and
# strides are the caller's promise, and are not checked again.
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"compile_threads": 1, "size_asserts": False, "cpp.vec_isa_ok": True},
    {"compile_threads": 1, "size_asserts": False, "cpp.vec_isa_ok": True, "cpp.simdlen": 256},
)


# The compiler writes these as conditions around the code of their input, once for every place that reads them.
_PLACING = {
    _aten.cat.default,
    _aten.constant_pad_nd.default,
    _aten.select_backward.default,
    _aten.select_scatter.default,
    _aten.slice_backward.default,
    _aten.slice_scatter.default,
}
_MOST_COPIES = 64
"""Copies of one piece of code in another at most: a recursion by doubling, say, would be written out 2^k times."""


class CompilerFailure(Exception):
    """The graph could not be compiled here; the message says why. Never reaches the user: the replay runs instead."""


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph for inputs of exactly these shapes, types and strides.

    Raises:
        CompilerFailure: there is no compiler, or it refuses.
    """
    copies = _copies(graph)
    if copies > _MOST_COPIES:
        raise CompilerFailure(f"its padded and shifted tensors would be written out {copies} times")
    approximate(graph)
    layout.fill_registers(graph)
    reason = ""
    for options in _OPTIONS:
        # What the compiler thinks of its own internals is of no use to who fits a model.
        with warnings.catch_warnings(), torch.no_grad(), _fixed_order():
            warnings.simplefilter("ignore")
            try:
                inductor = importlib.import_module("torch._inductor")
                compiled: Callable[..., Any] = inductor.compile(graph, list(inputs), options=dict(options))
                compiled(*inputs)
            except Exception as error:  # compiler and tool chain fail with errors of any type
                reason = reason or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            else:
                return compiled
    raise CompilerFailure(reason)


def _copies(graph: fx.GraphModule) -> int:
    """How often code that places a tensor in a larger one would be repeated inside the same kernel, at worst."""
    found: dict[fx.Node, int] = {}
    for node in rewrite.calls(graph):
        sources: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), sources.append)
        inner = sum(found.get(source, 0) for source in sources)
        if node.target in _PLACING:
            found[node] = inner + 1
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in VIEWS:
            found[node] = inner
        # Whatever else there is (sums, matrix products) is kept in memory and read from there.
    return max(found.values(), default=0)


@contextmanager
def _fixed_order() -> Iterator[None]:
    """With several threads, let no two of them add to one number in the order in which they happen to come."""
    before = torch.get_deterministic_debug_mode()
    if torch.get_num_threads() > 1:
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
