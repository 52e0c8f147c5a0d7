"""The order in memory of what a batched network computes."""

from __future__ import annotations

import torch
from torch import fx

from bayesdl.density.rewrite import Node, calls, eliminate_dead, insert, share_repeated, value_of

_aten = torch.ops.aten

REGISTER = 16
"""Single-precision numbers in the widest vector registers."""


def rows_last(graph: fx.GraphModule) -> None:
    """Keep the activations of batched layers with their rows as the last dimension in memory.

    A layer of C chains, ``[C, rows, in] @ [C, in, out]``, is computed as ``([C, out, in] @ [C, in, rows])^T``: the same
    sums. Rows are the longest dimension, so that all that follows (activation, its derivative, the sums over rows for
    the biases) runs over long contiguous stretches, and the product for the weights' gradient finds both its operands
    in the order that matrix libraries are fast at. An input that all chains share is transposed once.
    """
    products = [node for node in calls(graph) if node.target is _aten.bmm.default and _has_many_rows(node)]
    for node in products:
        for operand in node.args:
            _store_by_columns(graph, operand)
        with graph.graph.inserting_before(node):
            flipped = [insert(graph, _aten.transpose.int, operand, 1, 2) for operand in reversed(node.args)]
            product = insert(graph, _aten.bmm.default, *flipped)
            straight = insert(graph, _aten.transpose.int, product, 1, 2)
        node.replace_all_uses_with(straight)
        graph.graph.erase_node(node)
    if products:
        for node in calls(graph):  # a view may have relied on the order in memory that a product had before
            if node.target in (_aten.view.default, _aten._unsafe_view.default):
                node.target = _aten.reshape.default
        _sink_transposes(graph)
        share_repeated(graph)
        eliminate_dead(graph)


def fill_registers(graph: fx.GraphModule) -> None:
    """Compute a product whose rows do not fill vector registers, but whose columns do, by its transposition.

    Matrix libraries run along the rows of what they write: ``[64, 569] @ [569, 30]`` takes 1.6 times as long as
    ``([30, 569] @ [569, 64])^T``.
    """
    for node in calls(graph):
        if node.target is _aten.mm.default:
            rows, columns = value_of(node).shape
            if rows % REGISTER == 0 and columns % REGISTER:
                with graph.graph.inserting_before(node):
                    flipped = [insert(graph, _aten.t.default, operand) for operand in reversed(node.args)]
                    straight = insert(graph, _aten.t.default, insert(graph, _aten.mm.default, *flipped))
                node.replace_all_uses_with(straight)
                graph.graph.erase_node(node)


def _has_many_rows(product: Node) -> bool:
    left, right = product.args
    (_, rows, inner), outer = value_of(left).shape, value_of(right).shape[2]
    return rows > max(inner, outer)


def _store_by_columns(graph: fx.GraphModule, operand: Node) -> None:
    """Where an operand is one matrix for all chains, let it be a copy that is stored by columns."""
    shared = operand.args[0] if operand.target is _aten.expand.default else None
    if isinstance(shared, fx.Node) and value_of(shared).dim() == 2 and shared.target is not _aten.transpose.int:
        with graph.graph.inserting_before(operand):
            columns = insert(graph, _aten.transpose.int, shared, 0, 1)
            copy = insert(graph, _aten.clone.default, columns, memory_format=torch.contiguous_format)
            back = insert(graph, _aten.transpose.int, copy, 0, 1)
        operand.args = (back, *operand.args[1:])


def _sink_transposes(graph: fx.GraphModule) -> None:
    """Move transpositions behind the element-wise operations and sums that follow them, until they cancel.

    A compiler orders its loops by the shapes that it reads; now they say what the memory looks like.
    """
    for node in calls(graph):
        sources = [source for source in node.all_input_nodes if _flipped(source) is not None]
        if not sources:
            continue
        with graph.graph.inserting_before(node):
            if node.target is _aten.transpose.int and _swaps_last_two(node):
                behind: Node | None = _flipped(sources[0])
            elif torch.Tag.pointwise in getattr(node.target, "tags", ()) and value_of(node).dim() == 3:
                arguments = [_flip(graph, a) if isinstance(a, fx.Node) else a for a in node.args]
                behind = insert(graph, _aten.transpose.int, insert(graph, node.target, *arguments, **node.kwargs), 1, 2)
            elif node.target is _aten.sum.dim_IntList and node.args[1] in ([1], [2]):
                inner = insert(graph, node.target, _flipped(sources[0]), [3 - node.args[1][0]], *node.args[2:])
                behind = insert(graph, _aten.transpose.int, inner, 1, 2) if value_of(inner).dim() == 3 else inner
            else:
                continue
        node.replace_all_uses_with(behind)
        graph.graph.erase_node(node)


def _swaps_last_two(node: Node) -> bool:
    return node.target is _aten.transpose.int and {d % value_of(node).dim() for d in node.args[1:]} == {1, 2}


def _flipped(node: Node) -> Node | None:
    """What a node is the transposition of, or None."""
    source = node.args[0] if node.target is _aten.transpose.int and _swaps_last_two(node) else None
    return source if isinstance(source, fx.Node) and value_of(source).dim() == 3 else None


def _flip(graph: fx.GraphModule, node: Node) -> Node:
    """The transposition of the last two of three dimensions, of which the first may be missing."""
    rank = value_of(node).dim()
    if rank == 0:
        return node
    if rank == 1:
        return insert(graph, _aten.unsqueeze.default, node, 1)
    return _flipped(node) or insert(graph, _aten.transpose.int, node, rank - 2, rank - 1)
