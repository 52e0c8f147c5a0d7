"""Functions in single precision by rational approximations, as exact as its rounding and several times as fast.

A fit reweighted towards the smallest largest relative error gives the coefficients, from the constant up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from bayesdl.density import rewrite

_aten = torch.ops.aten

# tanh(x) = x P(x^2) / Q(x^2) on |x| <= 9.02, where tanh is 1 to float32's rounding; error 2.1e-8 before rounding.
_TANH_EDGE = 9.02
_TANH = (
    (0.999999979040067, 0.13379717825242193, 0.0034940344053237668, 2.05834786019433e-05, 1.33190684003981e-08),
    (1.0, 0.46713033071703963, 0.025871072645014048, 0.0003283092577589237, 7.762017951674771e-07),
)
# log(1 + t) = t P(t) / Q(t) on [0, 1]; error 1.9e-8 before rounding.
_LOG = (
    (0.9999999809644796, 0.8671773436774096, 0.12375804537615268),
    (1.0, 1.3671753947618464, 0.4740445633861409, 0.03109269128367483),
)


def approximate(graph: fx.GraphModule) -> None:
    """Replace tanh and log sigmoid in float32 on the CPU by functions that agree to 4e-7, relatively.

    The library's tanh costs 2.5 nanoseconds per number, half of a small network's gradient, and its logarithm 0.9;
    these cost 0.3 and 0.15.
    """
    for node in rewrite.calls(graph):
        if node.target not in (_aten.tanh.default, _aten.log_sigmoid_forward.default):
            continue
        value = rewrite.value_of(node.args[0])
        if value.dtype != torch.float32 or value.device.type != "cpu":
            continue
        with graph.graph.inserting_before(node):
            if node.target is _aten.tanh.default:
                node.replace_all_uses_with(tanh(graph.graph, node.args[0]))
            else:
                results = log_sigmoid(graph.graph, node.args[0])
                for user in list(node.users):  # the value, and what its derivative reads
                    user.replace_all_uses_with(results[user.args[1]])
                    graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.recompile()


def tanh(graph: fx.Graph, x: Any) -> fx.Node:
    """Nodes that compute tanh x."""
    x = _call(graph, _aten.clamp.default, x, -_TANH_EDGE, _TANH_EDGE)
    ratio = _ratio(graph, x, _call(graph, _aten.mul.Tensor, x, x), _TANH)
    return _call(graph, _aten.clamp.default, ratio, -1.0, 1.0)


def log_sigmoid(graph: fx.Graph, x: Any) -> tuple[fx.Node, fx.Node]:
    """Nodes that compute ``min(x, 0) - log(1 + t)`` and ``t = exp(-|x|)``."""
    t = _call(graph, _aten.exp.default, _call(graph, _aten.neg.default, _call(graph, _aten.abs.default, x)))
    value = _call(graph, _aten.sub.Tensor, _call(graph, _aten.clamp_max.default, x, 0.0), _ratio(graph, t, t, _LOG))
    return value, t


def _ratio(graph: fx.Graph, x: Any, variable: Any, parts: tuple[Sequence[float], Sequence[float]]) -> fx.Node:
    """``x P(variable) / Q(variable)``."""
    above, below = (_polynomial(graph, variable, coefficients) for coefficients in parts)
    return _call(graph, _aten.div.Tensor, _call(graph, _aten.mul.Tensor, x, above), below)


def _polynomial(graph: fx.Graph, x: Any, coefficients: Sequence[float]) -> fx.Node:
    """Horner's scheme."""
    total: Any = _call(graph, _aten.mul.Tensor, x, coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        total = _call(graph, _aten.mul.Tensor, _call(graph, _aten.add.Tensor, total, coefficient), x)
    return _call(graph, _aten.add.Tensor, total, coefficients[0])


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)
