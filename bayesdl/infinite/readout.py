"""What a network's covariance is made of: the features that its last linear layer takes, or its outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesdl.errors import ModelError
from bayesdl.infinite.finite import FiniteNetwork


class Outputs:
    """``f(x) . f(x') / K``: one draw of a network's kernel where nothing can be integrated out."""

    def __init__(self, network: FiniteNetwork) -> None:
        self.network = network
        with torch.no_grad():
            self.size = network.at(network.z, network.example).shape[1]

    def features(self, x: Tensor) -> Tensor:
        """Outputs ``[B, K]``."""
        with torch.no_grad():
            return self.network.at(self.network.z, x)

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """``[B1, B2]``."""
        return one @ other.mT / self.size


class Readout:
    """``f(x) = W h(x) + b``, and the covariance of f over W and b, ``w_var h(x) . h(x') + b_var``.

    Attributes:
        size: n, the number of features.
        w_var: prior variance of a weight; without a prior ``1 / n``.
        b_var: prior variance of a bias; without a prior, or without a bias, 0.

    Raises:
        ModelError: the outputs are not those of a ``Linear``, or its prior is not one variance about zero.
    """

    def __init__(self, network: FiniteNetwork) -> None:
        self.network = network
        linear = {name: module for name, module in network.model.net.named_modules() if type(module) is nn.Linear}
        f, calls = self._listen(linear, network.example)
        # The layer whose output is the network's, to the last bit.
        ends = [
            name for name, (_, out) in calls if out.numel() == f.numel() and torch.equal(out.flatten(), f.flatten())
        ]
        if not ends:
            raise ModelError(
                "The network's outputs are not those of a Linear layer, so there is no readout whose features could "
                "be taken. Let it end in one; monte_carlo_kernel needs none."
            )
        self.name, self.module = ends[-1], linear[ends[-1]]
        self.size = self.module.in_features
        self.w_var, self.b_var = (self._variance("weight"), self._variance("bias"))

    def features(self, x: Tensor) -> Tensor:
        """What the layer takes, ``[B, n]``."""
        _, calls = self._listen({self.name: self.module}, x)
        return calls[-1][1][0].reshape(len(x), -1)

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """``[B1, B2]``."""
        return self.w_var * (one @ other.mT) + self.b_var

    def _variance(self, part: str) -> float:
        name = f"{self.name}.{part}" if self.name else part
        if not self.network.has_prior:
            return 1 / self.size if part == "weight" else 0.0
        info = next((info for info in self.network.model.sites if info.name == name), None)
        if info is None:
            if getattr(self.module, part) is None:
                return 0.0
            raise ModelError(f"Parameter {name!r} is frozen, so the outputs have no prior covariance over it.")
        sd = self.network.prior_sd(name)
        mean: Tensor = self.network.model.prior.distribution(info).mean
        if bool((sd != sd.flatten()[0]).any()) or bool((mean != 0).any()):
            raise ModelError(f"The prior of {name!r} must have mean zero and one variance for all its entries.")
        return float(sd.flatten()[0]) ** 2

    def _listen(
        self, layers: dict[str, nn.Linear], x: Tensor
    ) -> tuple[Tensor, list[tuple[str, tuple[Tensor, Tensor]]]]:
        """Outputs of the network, and each layer's inputs and outputs in the order of the calls."""
        calls: list[tuple[str, tuple[Tensor, Tensor]]] = []

        def hook(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                calls.append((name, (inputs[0], output)))

            return keep

        handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
        try:
            with torch.no_grad():
                return self.network.at(self.network.z, x), calls
        finally:
            for handle in handles:
                handle.remove()
