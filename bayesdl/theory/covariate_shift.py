r"""Internal covariate shift: by how much an update of the layers before changes the gradient of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad

from bayesdl.errors import DataError

Parameters = Mapping[str, Tensor]


def internal_covariate_shift(
    loss: Callable[[dict[str, Tensor]], Tensor], before: Parameters, after: Parameters
) -> dict[str, float]:
    r"""For each layer l, ``|grad_l L(W_t) - grad_l L(W^{<l}_{t+1}, W^{>=l}_t)|`` (Santurkar et al., 2018, section 2.3).

    0 for the first layer, and of the order of the step for the others. It tells how far a layer's gradient was taken
    for inputs that it no longer gets once the layers before it have moved too.

    Args:
        loss: from named parameters to a number, such as ``lambda p: mse_loss(functional_call(net, p, (x,)), y)``.
        before: parameters W_t by name, in the order of the layers, as ``dict(net.named_parameters())``; those with the
            same name up to the last dot are a layer.
        after: W_{t+1}.

    Returns:
        By layer.

    Raises:
        DataError: the two do not have the same names.

    Cost: a gradient of all parameters for each layer.
    """
    if list(before) != list(after):
        raise DataError(f"before has the parameters {list(before)}, after {list(after)}: they must be the same.")
    layers: dict[str, list[str]] = {}
    for name in before:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    start = {name: value.detach() for name, value in before.items()}
    first, mixed = grad(loss)(start), dict[str, Tensor]()
    found = {}
    for layer, names in layers.items():
        slopes = grad(loss)(start | mixed)
        change = torch.cat([(first[name] - slopes[name]).flatten() for name in names])
        found[layer] = float(torch.linalg.vector_norm(change))
        mixed |= {name: after[name].detach() for name in names}
    return found
