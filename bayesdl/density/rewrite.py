"""Rewriting a recorded graph so that it computes the same numbers with fewer and faster operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
Node = Any  # an fx.Node whose target is an operation; its arguments are typed too widely there to be of use
_NO_OPS = {_aten.view.default, _aten.reshape.default, _aten.expand.default, _aten._unsafe_view.default}
_TIMES_ONE = {_aten.mul.Scalar, _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar}
_PLUS_ZERO = {_aten.add.Tensor, _aten.sub.Tensor}
_ALIASES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default}
# Operations that read a tensor's shape and not its values, and what they fill it with.
_FILLED = {
    _aten.ones_like.default: 1, _aten.zeros_like.default: 0, _aten.new_ones.default: 1, _aten.new_zeros.default: 0,
}  # fmt: skip

MAX_CONSTANT = 2**20
"""Most elements of a tensor of equal numbers that is kept instead of being made on every call."""


def thin(graph: fx.GraphModule) -> None:
    """Fold constants, compute what is written twice once, and drop what does nothing or what nobody reads.

    The graph must not write into any tensor.
    """
    _fold_constants(graph)
    _write_numbers(graph)
    _unslice_single(graph)
    _flip_products(graph)
    _cancel_signs(graph)
    share_repeated(graph)
    _drop_no_ops(graph)
    eliminate_dead(graph)


def calls(graph: fx.GraphModule) -> list[Node]:
    """The operations of a graph, in order."""
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def is_random(node: Node) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def mutates(node: Node) -> bool:
    """Whether an operation writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def value_of(node: Node) -> Tensor:
    """The fake tensor, of the right shape and type, that stands for what a node gives."""
    value: Tensor = node.meta["val"]
    return value


def insert(graph: fx.GraphModule, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert an operation, with the shape of what it gives."""
    node = graph.graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args), **kwargs)
    return node


def eliminate_dead(graph: fx.GraphModule) -> None:
    """Remove what nobody reads, random draws included (a plate's unused permutation, for one)."""
    for node in reversed(list(graph.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.graph.erase_node(node)


def _fold_constants(graph: fx.GraphModule) -> None:
    """Evaluate, once, every node that depends on constants and shapes alone (priors' parameters and normalisers)."""
    known: dict[fx.Node, Tensor] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            value = getattr(graph, str(node.target), None)
            if isinstance(value, Tensor):
                known[node] = value
        elif node.op == "call_function" and not is_random(node):
            value = _filled(node)
            if value is None and all(argument in known for argument in node.all_input_nodes):
                arguments = fx.map_arg(node.args, lambda n: known[n])
                keywords = fx.map_arg(node.kwargs, lambda n: known[n])
                with torch.no_grad():
                    value = node.target(*arguments, **keywords)
            if not isinstance(value, Tensor):
                continue
            known[node] = value
            name = f"_folded_{node.name}"
            graph.register_buffer(name, value.detach().clone(), persistent=False)
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(name)
            node.replace_all_uses_with(constant)
            constant.meta["val"] = value
            known[constant] = value
            graph.graph.erase_node(node)


def _filled(node: Node) -> Tensor | None:
    """The value of ``ones_like`` and its kin, which need no values to be known."""
    number, fake = _FILLED.get(node.target), node.meta.get("val")
    if number is None or not isinstance(fake, Tensor) or fake.numel() > MAX_CONSTANT:
        return None
    return torch.full(fake.shape, number, dtype=fake.dtype, device=fake.device)


def _write_numbers(graph: fx.GraphModule) -> None:
    """Where one side of a sum or product is a constant of equal entries, write it as a number.

    The zeros that sums begin with, and derivatives' factors of one, then drop out.
    """
    for node in calls(graph):
        if node.target not in _TIMES_ONE | _PLUS_ZERO or len(node.args) != 2 or node.kwargs:
            continue
        left, right = node.args
        if _number(graph, left) is not None and node.target in (_aten.add.Tensor, _aten.mul.Tensor):
            left, right = right, left
        number = _number(graph, right)
        if number is not None and isinstance(left, fx.Node) and _number(graph, left) is None:
            given, got = value_of(left), value_of(node)
            if (given.shape, given.dtype) == (got.shape, got.dtype) and got.is_floating_point():
                node.args = (left, number)


def _number(graph: fx.GraphModule, node: Node) -> float | None:
    """The entry of a constant whose entries are equal, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = getattr(graph, str(node.target))
    if not (isinstance(value, Tensor) and value.numel() and value.is_floating_point()):
        return None
    first = value.reshape(-1)[0]
    return float(first) if bool((value == first).all()) else None


def _cancel_signs(graph: fx.GraphModule) -> None:
    """Minus minus x is x."""
    for node in calls(graph):
        inner = node.args[0] if node.target is _aten.neg.default else None
        if isinstance(inner, fx.Node) and inner.target is _aten.neg.default:
            node.replace_all_uses_with(inner.args[0])
            graph.graph.erase_node(node)


def _flip_products(graph: fx.GraphModule) -> None:
    """Compute a matrix product of which only the transposition is used as that: ``(A B)^T = B^T A^T``."""
    for node in calls(graph):
        if node.target is _aten.mm.default and all(_matrix_flip(user) for user in node.users):
            with graph.graph.inserting_before(node):
                sides: list[Any] = [
                    side.args[0] if _matrix_flip(side) else insert(graph, _aten.t.default, side)
                    for side in reversed(node.args)
                ]
                product = insert(graph, _aten.mm.default, *sides)
            for user in list(node.users):
                user.replace_all_uses_with(product)
                graph.graph.erase_node(user)
            graph.graph.erase_node(node)


def _matrix_flip(node: Node) -> bool:
    """Whether an operation transposes a matrix."""
    if node.target is _aten.permute.default:
        return list(node.args[1]) == [1, 0]
    return node.target is _aten.t.default or (node.target is _aten.transpose.int and value_of(node).dim() == 2)


def _unslice_single(graph: fx.GraphModule) -> None:
    """The derivative of picking the only entry of a dimension is to put the dimension back."""
    for node in calls(graph):
        if node.target is _aten.select_backward.default and node.args[1][node.args[2]] == 1:
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(insert(graph, _aten.unsqueeze.default, node.args[0], node.args[2]))
            graph.graph.erase_node(node)


def share_repeated(graph: fx.GraphModule) -> None:
    """Compute what is written twice only once."""
    seen: dict[Any, fx.Node] = {}
    for node in calls(graph):
        if is_random(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if "tensor(" in key[1]:
            continue
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.graph.erase_node(node)
        else:
            seen[key] = node


def _drop_no_ops(graph: fx.GraphModule) -> None:
    """Remove views to the shape that a tensor already has, aliases, products and powers with 1, and sums with 0."""
    for node in calls(graph):
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and (node.target in _ALIASES or _does_nothing(node, source)):
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)


def _does_nothing(node: Node, source: Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return False
    if node.target in _NO_OPS:
        return True
    plain = not node.kwargs and len(node.args) == 2
    neutral = 1 if node.target in _TIMES_ONE else 0 if node.target in _PLUS_ZERO else None
    return plain and neutral is not None and isinstance(node.args[1], int | float) and node.args[1] == neutral
