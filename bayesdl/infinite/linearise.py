"""A network linearised in its parameters, as a module that trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import jvp

from bayesdl.infinite.finite import FiniteNetwork, Parameterisation
from bayesdl.models import BayesianNetwork


class LinearisedNetwork(nn.Module):
    """``f(x; w0) + J(x; w0) (w - w0)`` with parameters w of the network's own names, which start at w0.

    The function is linear in w, so that gradient descent on a squared loss is solved by ``GradientFlow`` with the
    network's empirical tangent kernel (Lee et al., 2019, sec. 2.2). See ``linearize``.

    Attributes:
        network: the network at w0.
    """

    def __init__(self, network: FiniteNetwork) -> None:
        super().__init__()
        self.network = network
        for site in network.sites:
            *path, last = site.name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            value = network.z[site.start : site.stop].reshape(site.shape)
            module.register_parameter(last, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs in the network's shape; one forward derivative, two to three times the network's own cost."""
        network = self.network
        named = dict(self.named_parameters())
        w = torch.cat([named[site.name].flatten() for site in network.sites])

        def function(z: Tensor) -> Tensor:
            return network.model.forward(network.parameters(z), x)

        both = jvp(function, (network.z,), (w - network.z,))
        expansion: Tensor = both[0] + both[1]
        return expansion


def linearize(
    net: nn.Module | BayesianNetwork,
    *,
    params: Mapping[str, Tensor] | None = None,
    parameterisation: Parameterisation = "standard",
) -> LinearisedNetwork:
    """Return the first-order Taylor expansion of a network in its parameters, as a module.

    Args:
        net: any module that maps rows to outputs, or a ``BayesianNetwork``. It is copied, in its dtype, on its device.
        params: values by name around which to expand; the module's own by default.
        parameterisation: "standard": parameters as in the module; "ntk": in units of their prior standard deviations,
            in which one learning rate serves all widths.

    Raises:
        ModelError: the network is refused, or has no prior for "ntk".
        DataError: parameters that are not its own.
    """
    return LinearisedNetwork(FiniteNetwork(net, params, parameterisation))
