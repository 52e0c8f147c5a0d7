"""Recording a function as a graph of tensor operations, and cutting off what need not be computed on every call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from torch.overrides import TorchFunctionMode

from bayesdl.density import layout, rewrite
from bayesdl.errors import BayesdlError, RandomDensity

Graph = Callable[..., tuple[Tensor, Tensor]]

_aten = torch.ops.aten
# Operations that cost nothing: they are repeated on every call rather than kept from the first one.
VIEWS = {
    _aten.view.default, _aten.expand.default, _aten.transpose.int, _aten.permute.default, _aten.t.default,
    _aten.unsqueeze.default, _aten.squeeze.dim, _aten.select.int, _aten.slice.Tensor,
}  # fmt: skip


def record(function: Callable[..., Any], inputs: Sequence[Tensor], *, allow_random: bool = False) -> fx.GraphModule:
    """Record ``function(*inputs)`` with fake tensors and return a thinned graph that replays it.

    Fake tensors have shapes but no values, so a program whose shapes or branches depend on values refuses to be
    recorded instead of freezing what the first batch happened to hold. Tensors that the program closes over become
    constants.

    Raises:
        RandomDensity: the function draws random numbers.
        Exception: whatever torch raises where the function cannot be recorded; the caller then runs it as it is.
    """
    try:
        # Torch's own derivatives write into their temporaries; recorded as fresh results, they can be rewritten. Some
        # warn about their own speed on this way; what a program has to say, it has said in discovery.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _trace(functionalize(function), inputs)
    except BayesdlError:
        raise
    except Exception:  # some operations exist only as writes
        graph = _trace(function, inputs)
    # Rewriting assumes that every operation is pure; a program that writes into its inputs is replayed as recorded.
    if not _writes(graph):
        rewrite.thin(graph)
        layout.rows_last(graph)
    if not allow_random:
        _refuse_random(graph)
    graph.recompile()
    return graph


def _trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    with _CheapForms():
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


class _CheapForms(TorchFunctionMode):
    """Formulas of torch in the form that has the fewest exponentials, its derivative's included."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Write the log probability of a Bernoulli: with one exponential and one logarithm instead of three."""
        kwargs = kwargs or {}
        given = {name: value for name, value in kwargs.items() if value is not None}
        if function is binary_cross_entropy_with_logits and given == {"reduction": "none"} and len(args) == 2:
            logits, value = args
            if logits.shape == value.shape:
                return -(value * logits + logsigmoid(-logits))
        return function(*args, **kwargs)


def _writes(graph: fx.GraphModule) -> bool:
    return any(rewrite.mutates(node) for node in rewrite.calls(graph))


def _refuse_random(graph: fx.GraphModule) -> None:
    names = sorted({str(node.target) for node in rewrite.calls(graph) if rewrite.is_random(node)})
    if names:
        raise RandomDensity(
            f"The log density draws random numbers ({', '.join(names)}): dropout in training mode, or a value that is "
            "sampled outside pyro.sample. Put the network in eval mode, or make the draw a latent site."
        )


def split_off_data(graph: fx.GraphModule) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """Cut a graph ``(z, *data)`` into what depends on the data alone, and the rest.

    With the data fixed, the first part is computed once: ``lgamma(y + 1)`` of a Poisson likelihood, the transposed
    inputs of a network, the products of the factors N/B and 1/T.

    Returns:
        ``(before, rest)``, with ``before(*data)`` the tuple of tensors that ``rest(z, *tensors)`` takes; ``before`` is
        None, and ``rest`` the graph itself, if the graph writes into its inputs.
    """
    if _writes(graph):
        return None, graph
    nodes = list(graph.graph.nodes)
    z, *data = [node for node in nodes if node.op == "placeholder"]
    early = set(data)
    for node in nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(n in early for n in node.all_input_nodes)):
            early.add(node)
    crossing: dict[fx.Node, None] = {}
    cheap: set[fx.Node] = set()

    def cross(node: fx.Node) -> None:
        """Note what the rest needs of an early node: its views are taken there, the tensor under them comes over."""
        if node.op == "get_attr" or node.target in VIEWS:
            cheap.add(node)
            for source in node.all_input_nodes:
                cross(source)
        else:
            crossing[node] = None

    for node in nodes:
        if node not in early:
            for source in node.all_input_nodes:
                if source in early:
                    cross(source)
    before = _part(graph, data, [n for n in nodes if n in early], tuple(crossing))
    output = nodes[-1].args[0]
    rest = _part(graph, [z, *crossing], [n for n in nodes[:-1] if n not in early or n in cheap], output)
    return before, rest


def operations(graph: fx.GraphModule) -> int:
    """Number of operations of a graph."""
    return len(rewrite.calls(graph))


def elements(graph: fx.GraphModule) -> tuple[int, int]:
    """Numbers that a graph writes in all, and in its largest tensor; views write none."""
    values = [node.meta.get("val") for node in rewrite.calls(graph) if node.target not in VIEWS]
    counts = [value.numel() for value in values if isinstance(value, Tensor)]
    return sum(counts), max(counts, default=0)


def _part(root: fx.GraphModule, inputs: Sequence[fx.Node], body: Sequence[fx.Node], output: Any) -> fx.GraphModule:
    """A graph of its own from some nodes of another."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in body:
        if node not in copies:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(fx.map_arg(output, lambda n: copies[n]))
    module = fx.GraphModule(root, part)
    rewrite.eliminate_dead(module)
    module.recompile()
    return module
