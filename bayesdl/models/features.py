"""A network as a fixed map to features, followed by its last linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bayesdl.errors import ModelError
from bayesdl.models.network import BayesianNetwork


def last_linear(model: BayesianNetwork) -> tuple[str, nn.Linear]:
    """Name and module of the network's last linear layer, in the order in which its modules were made.

    Raises:
        ModelError: it has none whose weight is inferred.
    """
    inferred = {site.name for site in model.sites}
    layers = [(name, layer) for name, layer in model.net.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or f"{layers[-1][0]}.weight".removeprefix(".") not in inferred:
        raise ModelError("The network has no nn.Linear as its last layer, or its weight is frozen.")
    return layers[-1]


def features(model: BayesianNetwork, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Inputs ``[N, H]`` of the last linear layer, at given values of the sites.

    Args:
        model: the network.
        parameters: values by site name.
        x: inputs ``[N, ...]``.

    Raises:
        ModelError: the network's outputs are not those of that layer.
    """
    name, layer = last_linear(model)
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            outputs = model.forward(parameters, x)
    finally:
        handle.remove()
    prefix = f"{name}." if name else ""
    weight, bias = parameters[f"{prefix}weight"], parameters.get(f"{prefix}bias")
    again = [linear(phi, weight, layer.bias if bias is None else bias) for phi in seen]
    if len(seen) != 1 or again[0].numel() != outputs.numel() or not torch.equal(again[0].reshape_as(outputs), outputs):
        raise ModelError(
            f"The network's outputs are not those of its last linear layer {name!r}: something follows it, or it runs "
            "several times. The layer must come last."
        )
    return seen[0].reshape(len(x), -1)
