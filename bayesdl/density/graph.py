"""Recording a function as a graph of tensor operations, thinned out for fast replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bayesdl.errors import RandomDensity

Graph = Callable[..., tuple[Tensor, Tensor]]

_NO_OPS = {torch.ops.aten.view.default, torch.ops.aten.expand.default, torch.ops.aten._unsafe_view.default}
_NEUTRAL = {torch.ops.aten.mul.Scalar, torch.ops.aten.pow.Tensor_Scalar}
_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh_copy.default}


def record(function: Callable[..., Any], inputs: Sequence[Tensor], *, allow_random: bool = False) -> fx.GraphModule:
    """Record ``function(*inputs)`` with fake tensors and return a thinned graph that replays it.

    Fake tensors have shapes but no values, so a program whose shapes or branches depend on values refuses to be
    recorded instead of freezing what the first batch happened to hold. Tensors that the program closes over become
    constants.

    Raises:
        RandomDensity: the function draws random numbers.
        Exception: whatever torch raises where the function cannot be recorded; the caller then runs it as it is.
    """
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    # Rewriting assumes that every operation is pure; a program that writes in place is replayed as recorded.
    if not any(_mutates(node) for node in _calls(graph)):
        _fold_constants(graph)
        _share_repeated(graph)
        _drop_no_ops(graph)
        _eliminate_dead(graph)
    if not allow_random:
        _refuse_random(graph)
    graph.recompile()
    return graph


def _calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _refuse_random(graph: fx.GraphModule) -> None:
    names = sorted({str(node.target) for node in _calls(graph) if _is_random(node)})
    if names:
        raise RandomDensity(
            f"The log density draws random numbers ({', '.join(names)}): dropout in training mode, or a value that is "
            "sampled outside pyro.sample. Put the network in eval mode, or make the draw a latent site."
        )


def _fold_constants(graph: fx.GraphModule) -> None:
    """Evaluate, once, every node that depends on constants alone (priors' parameters and normalisers)."""
    known: dict[fx.Node, Tensor] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            value = getattr(graph, str(node.target), None)
            if isinstance(value, Tensor):
                known[node] = value
        elif node.op == "call_function" and not _is_random(node):
            if not all(argument in known for argument in node.all_input_nodes):
                continue
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


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _share_repeated(graph: fx.GraphModule) -> None:
    """Compute what is written twice only once."""
    seen: dict[Any, fx.Node] = {}
    for node in _calls(graph):
        if _is_random(node):
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
    """Remove views and expansions to the shape that a tensor already has, aliases, and powers and products with 1."""
    for node in _calls(graph):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        same = node.target in _NO_OPS and _shape(node) is not None and _shape(node) == _shape(source)
        if same or (node.target in _NEUTRAL and node.args[1] == 1) or node.target in _ALIASES:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _eliminate_dead(graph: fx.GraphModule) -> None:
    """Remove what nobody reads, random draws included (a plate's unused permutation, for one)."""
    for node in reversed(list(graph.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.graph.erase_node(node)
