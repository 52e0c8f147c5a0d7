"""Kronecker-factored curvature of linear and convolutional layers (Martens & Grosse, 2015; Grosse & Martens, 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bayesdl.curvature.layers import Layer, signals
from bayesdl.curvature.outputs import Curvature, NetworkOutputs


@dataclass(frozen=True)
class Factors:
    """The curvature of a layer's weights ``[O, I]`` as ``left x right``.

    Attributes:
        left: sum over rows, positions and functions of ``g g^T``, ``[O, O]``.
        right: mean over rows and positions of ``a a^T``, ``[I, I]``; a bias is the last column.
    """

    left: Tensor
    right: Tensor


def factors(
    network: NetworkOutputs, layers: Sequence[Layer], curvature: Curvature = "ggn", batch_size: int | None = None
) -> list[Factors]:
    """K-FAC of each layer, summed over all N rows.

    Gradients and inputs are treated as independent of each other, and those of different positions as uncorrelated
    ("expand" in Eschenhagen et al., 2023). Exact for one linear layer on vectors whose output curvature is the same in
    all rows, and for the layers of deep linear networks under the same condition.
    """
    left = [network.z.new_zeros(len(layer.place), len(layer.place)) for layer in layers]
    right = [network.z.new_zeros(layer.place.shape[1], layer.place.shape[1]) for layer in layers]
    count = [0] * len(layers)
    for batch in network.batches(batch_size):
        found = signals(network, layers, batch["x"], network.roots(batch, curvature))[1]
        for k, signal in enumerate(found):
            a, g = signal.inputs.flatten(0, 1), signal.gradients.flatten(0, 2)
            left[k] += g.mT @ g
            right[k] += a.mT @ a
            count[k] += len(a)
    return [Factors(g, a / n) for g, a, n in zip(left, right, count, strict=True)]


def rescaled(
    network: NetworkOutputs,
    layers: Sequence[Layer],
    bases: Sequence[tuple[Tensor, Tensor]],
    curvature: Curvature = "ggn",
    batch_size: int | None = None,
) -> list[Tensor]:
    """The exact diagonal of each layer's curvature in a product basis, ``[O, I]`` (E-KFAC, George et al., 2018).

    Args:
        network: the network at a point.
        layers: its layers.
        bases: for each, U ``[O, O]`` and V ``[I, I]``; V need not be orthogonal (columns in other units).
        curvature: which.
        batch_size: rows in a batch.
    """
    totals = [network.z.new_zeros(layer.place.shape) for layer in layers]
    for batch in network.batches(batch_size):
        found = signals(network, layers, batch["x"], network.roots(batch, curvature))[1]
        for k, (signal, (left, right)) in enumerate(zip(found, bases, strict=True)):
            totals[k] += signal.rotated(left, right).squares()
    return totals
