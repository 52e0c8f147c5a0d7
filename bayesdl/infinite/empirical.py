"""Empirical kernels: what a network of finite width, at given parameters, has in place of its infinite limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bayesdl.errors import DataError, MethodError, ModelError
from bayesdl.infinite.contraction import Contraction, Jacobians, Structured, VectorProducts
from bayesdl.infinite.finite import ELEMENTS, FiniteNetwork, Parameterisation
from bayesdl.infinite.readout import Outputs, Readout
from bayesdl.models import BayesianNetwork

Algorithm = Literal["auto", "jacobian", "vector_products", "structured"]
ALGORITHMS: dict[str, type[Contraction]] = {
    "structured": Structured,
    "jacobian": Jacobians,
    "vector_products": VectorProducts,
}


def empirical_ntk(
    net: nn.Module | BayesianNetwork,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    parameterisation: Parameterisation = "standard",
    algorithm: Algorithm = "auto",
    batch_size: int | None = None,
    per_output: bool = False,
) -> Tensor:
    """The tangent kernel of a network, ``J(x1) J(x2)^T`` with ``J = d f / d z``.

    Where the width grows in the "ntk" parameterisation it converges to the infinite network's ``ntk``.

    Args:
        net: any module that maps rows to outputs ``[N]`` or ``[N, K]``, or a ``BayesianNetwork``.
        x1: inputs ``[N1, ...]``, as the module takes them.
        x2: inputs ``[N2, ...]``; by default ``x1``, of which one half of the pairs is computed.
        params: values of some or all parameters by name; the module's own by default.
        parameterisation: "standard", by the module's parameters; "ntk", by them in units of their prior standard
            deviations, which needs a ``BayesianNetwork``.
        algorithm: "jacobian" contracts Jacobians; "vector_products" never makes one; "structured" uses the layers'
            inputs and backward signals; "auto" takes the one with the fewest operations.
        batch_size: rows of x1 and of x2 at a time; by default as many as keep tensors below 2^24 numbers.
        per_output: all pairs of outputs, instead of the mean of the K diagonal ones (which agree in the limit).

    Returns:
        ``[N1, N2]``, or ``[N1, N2, K, K]`` with ``per_output``. No gradient flows through it.

    Raises:
        ModelError: the network is refused, as by ``BayesianNetwork``, has a recurrent layer of torch's, or no prior for
            "ntk".
        DataError: inputs that it cannot take.
        MethodError: an unknown algorithm.

    Source: Jacot, Gabriel and Hongler (2018); Novak, Sohl-Dickstein and Schoenholz (2022) for the algorithms, whose
    costs are in the table of ``ntk_costs``.
    """
    network = FiniteNetwork(net, params, parameterisation, x1)
    return ntk_of(network, x1, x2, algorithm, batch_size, per_output)


def ntk_of(
    network: FiniteNetwork,
    x1: Tensor,
    x2: Tensor | None = None,
    algorithm: Algorithm = "auto",
    batch_size: int | None = None,
    per_output: bool = False,
) -> Tensor:
    """``empirical_ntk`` at a network's point."""
    first = network.inputs(x1)
    second = None if x2 is None else network.inputs(x2)
    method = _chosen(network, algorithm, per_output, len(first), len(first if second is None else second))
    rows = _rows(batch_size, method.row_numbers, method.pair_numbers)
    found = tiled(method.features, method.product, first, second, rows)
    return found if per_output else found / method.outputs


def ntk_costs(
    net: nn.Module | BayesianNetwork, x1: Tensor, x2: Tensor | None = None, *, per_output: bool = False
) -> dict[str, float]:
    """Multiplications that each algorithm of ``empirical_ntk`` would take, by its name.

    With N rows, K outputs, P parameters, and F multiplications for a forward pass of one row:
    "jacobian" takes ``4 N K F + N^2 K P`` (K^2 for all pairs of outputs), "vector_products" ``3 N^2 K F``, and
    "structured" ``4 N K F + N^2 sum (I + K O)`` over the linear layers ``[O, I]``.
    """
    network = FiniteNetwork(net, x=x1)
    n1, n2 = len(x1), len(x1 if x2 is None else x2)
    forward = _forward(network)
    return {name: make(network, per_output).cost(n1, n2, forward) for name, make in ALGORITHMS.items()}


def empirical_nngp(
    net: nn.Module | BayesianNetwork,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """The covariance of a network's outputs over its last linear layer, ``w_var h(x1) h(x2)^T + b_var``.

    h ``[N, n]`` are the inputs of that layer at the given parameters, and w_var and b_var the prior variances of its
    weights and biases (for a bare module, 1 / n and 0). It converges to the infinite network's ``nngp``, and its mean
    over draws of the hidden layers is the prior covariance of the network's outputs.

    Args:
        net: as for ``empirical_ntk``; its outputs must be those of a ``Linear``.
        x1: inputs ``[N1, ...]``.
        x2: inputs ``[N2, ...]``; by default ``x1``.
        params: values of some or all parameters by name; the module's own by default.
        batch_size: rows at a time.

    Returns:
        ``[N1, N2]``.

    Raises:
        ModelError: the network is refused, or does not end in a linear layer.
        DataError: inputs that it cannot take.
    """
    network = FiniteNetwork(net, params, x=x1)
    return nngp_of(network, Readout(network), x1, x2, batch_size)


def nngp_of(
    network: FiniteNetwork,
    readout: Readout | Outputs,
    x1: Tensor,
    x2: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """``empirical_nngp`` at a network's point."""
    first = network.inputs(x1)
    second = None if x2 is None else network.inputs(x2)
    rows = _rows(batch_size, max(readout.size, network.example.numel()), 1)
    return tiled(readout.features, readout.product, first, second, rows)


def tiled(
    features: Callable[[Tensor], Any], product: Callable[[Any, Any], Tensor], x1: Tensor, x2: Tensor | None, rows: int
) -> Tensor:
    """A kernel of features, ``rows`` x ``rows`` pairs at a time; for one set of inputs, one half and its mirror.

    Returns:
        ``[N1, N2]`` or ``[N1, N2, K, K]``.
    """
    found: Tensor | None = None
    n1, n2 = len(x1), len(x1 if x2 is None else x2)
    for i in range(0, n1, rows):
        one = features(x1[i : i + rows])
        for j, other in _others(features, one, x1, x2, i, rows):
            tile = product(one, other)
            if found is None:
                found = tile.new_empty(n1, n2, *tile.shape[2:])
            found[i : i + rows, j : j + rows] = tile
            if x2 is None and i != j:
                mirror = tile.transpose(0, 1)
                found[j : j + rows, i : i + rows] = mirror.transpose(2, 3) if tile.dim() == 4 else mirror
    assert found is not None
    return found


def _others(
    features: Callable[[Tensor], Any], one: Any, x1: Tensor, x2: Tensor | None, i: int, rows: int
) -> Iterator[tuple[int, Any]]:
    """The blocks of columns that go with the block of rows that begins at i, and where they begin."""
    if x2 is None:
        yield i, one
    start, x = (i + rows, x1) if x2 is None else (0, x2)
    for j in range(start, len(x), rows):
        yield j, features(x[j : j + rows])


def _rows(batch_size: int | None, row_numbers: int, pair_numbers: int) -> int:
    if batch_size is None:
        return max(1, min(ELEMENTS // max(row_numbers, 1), int((ELEMENTS / pair_numbers) ** 0.5)))
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} must be at least 1.")
    return batch_size


def _chosen(network: FiniteNetwork, algorithm: Algorithm, per_output: bool, n1: int, n2: int) -> Contraction:
    if any(isinstance(module, nn.RNNBase) for module in network.model.net.modules()):
        # torch differentiates their fused kernels for a whole batch only.
        raise ModelError(
            "The tangent kernel needs derivatives row by row, which torch's recurrent layers do not give. Write the "
            "recurrence with Linear layers."
        )
    if algorithm != "auto":
        if algorithm not in ALGORITHMS:
            raise MethodError(f"algorithm={algorithm!r} must be 'auto' or one of {', '.join(map(repr, ALGORITHMS))}.")
        return ALGORITHMS[algorithm](network, per_output)
    forward = _forward(network)
    methods = [make(network, per_output) for make in ALGORITHMS.values()]
    return min(methods, key=lambda method: method.cost(n1, n2, forward))


def _forward(network: FiniteNetwork) -> float:
    """Multiplications in a forward pass of one row; at least one for each parameter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.at(network.z, network.example)
    return max(counter.get_total_flops() / 2, len(network.z))
