"""Linear and convolutional layers, taken out of a network: their inputs, and the gradients at their outputs.

A layer computes ``s_t = W [a_t, 1]`` at positions t (one for a linear layer on vectors, the pixels of a convolution),
so the derivative of anything by its weights ``[O, I]`` is ``sum_t g_t a_t^T`` with g_t the derivative by s_t. That is
all that K-FAC, exact diagonals and linearised predictions need: K backward passes for a whole batch, and no Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from bayesdl.density import Site
from bayesdl.models import BayesianNetwork

ELEMENTS = 2**24
"""Numbers in the largest tensor that is made at once."""


class Outputs(Protocol):
    """What is needed of a network at a point ``z [D]``; ``NetworkOutputs`` is one."""

    model: BayesianNetwork
    z: Tensor

    @property
    def example(self) -> Tensor:
        """One row of inputs."""
        ...

    def parameters(self, z: Tensor) -> dict[str, Tensor]:
        """Values by name."""
        ...

    def outputs(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``[B, K]``."""
        ...


@dataclass(frozen=True, eq=False)
class Layer:
    """A ``Linear`` or ``Conv2d`` whose weight, and with it perhaps the bias, is a latent site.

    Attributes:
        name: of the module.
        module: in the model's network.
        place: ``[O, I]``, the coordinates of z; the last column is the bias, if it has one.
        biased: whether it has.
    """

    name: str
    module: nn.Module
    place: Tensor
    biased: bool

    def inputs(self, value: Tensor) -> Tensor:
        """The module's input as ``[B, T, I]``, with a 1 at the end where there is a bias."""
        module = self.module
        if isinstance(module, nn.Conv2d):
            kernel, dilation, padding, stride = (
                getattr(module, name) for name in ("kernel_size", "dilation", "padding", "stride")
            )
            value = unfold(value, kernel, dilation, padding, stride).mT
        else:
            value = value.reshape(len(value), -1, value.shape[-1])
        return torch.cat([value, value.new_ones(*value.shape[:2], 1)], 2) if self.biased else value

    def outputs(self, value: Tensor) -> Tensor:
        """Gradients at the module's output, ``[C, B, *shape]``, as ``[C, B, T, O]``."""
        if isinstance(self.module, nn.Conv2d):
            return value.flatten(-2).mT
        return value.reshape(*value.shape[:2], -1, value.shape[-1])


@dataclass(frozen=True)
class Signals:
    """What a batch of rows says about a layer.

    Attributes:
        inputs: ``[B, T, I]``.
        gradients: ``[C, B, T, O]``, of C functions of each row's outputs by the layer's outputs.
    """

    inputs: Tensor
    gradients: Tensor

    def rotated(self, left: Tensor, right: Tensor) -> Signals:
        """In the bases ``left [O, O]`` and ``right [I, I]`` (their columns)."""
        return Signals(self.inputs @ right, self.gradients @ left)

    def squares(self) -> Tensor:
        """Diagonal of ``sum_i J_i^T J_i``: derivatives squared, summed over rows and functions, ``[O, I]``."""
        a, g = self.inputs, self.gradients
        if a.shape[1] == 1:
            return g[:, :, 0].square().sum(0).mT @ a[:, 0].square()
        return torch.stack([part.square().sum((0, 1)) for part in self.derivatives()]).sum(0)

    def derivatives(self) -> Iterator[Tensor]:
        """``sum_t g_t a_t^T`` for some rows at a time, ``[C, B', O, I]``."""
        a, g = self.inputs, self.gradients
        step = max(1, ELEMENTS // (len(g) * g.shape[-1] * a.shape[-1]))
        for rows in torch.arange(len(a), device=a.device).split(step):
            yield g[:, rows].mT @ a[rows]


def layers_of(network: Outputs, random: Sequence[Site]) -> tuple[list[Layer], list[Site]]:
    """The layers whose weight is random, and the random sites that belong to none.

    A layer must be of exactly one of the known types, share its parameters with nobody, and see every row once.

    Args:
        network: the network at a point.
        random: sites of its parameters that are random.
    """
    by_name = {site.name: site for site in random}
    owners = {info.name: info.owners for info in network.model.sites}
    layers, taken = [], set()
    for name, module in _known(network.model.net):
        prefix = f"{name}." if name else ""
        weight, bias = by_name.get(f"{prefix}weight"), by_name.get(f"{prefix}bias")
        if weight is None or any(len(owners[site.name]) > 1 for site in (weight, bias) if site is not None):
            continue
        columns = [_coordinates(weight, network.z).reshape(weight.shape[0], -1)]
        if bias is not None:
            columns.append(_coordinates(bias, network.z).reshape(-1, 1))
        layers.append(Layer(name, module, torch.cat(columns, 1), bias is not None))
    layers = _seen_once(network, layers)
    for layer in layers:
        prefix = f"{layer.name}." if layer.name else ""
        taken |= {f"{prefix}weight", f"{prefix}bias"}
    return layers, [site for site in random if site.name not in taken]


def signals(
    network: Outputs, layers: Sequence[Layer], x: Tensor, roots: Tensor | None = None
) -> tuple[Tensor, list[Signals]]:
    """Run the network on a batch, and go back from C functions of its outputs.

    Args:
        network: the network at a point.
        layers: of ``layers_of``.
        x: inputs in the model's units.
        roots: the functions, ``[B, K, C]``, as ``NetworkOutputs.roots`` gives them; by default the K outputs.

    Returns:
        The outputs ``[B, K]``, and for each layer its signals.
    """
    values = {name: value.detach().requires_grad_() for name, value in network.parameters(network.z).items()}
    with torch.enable_grad(), _listening(layers) as heard:
        f = network.outputs(values, x)
        if roots is None:
            directions = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, len(f), -1)
        else:
            directions = roots.movedim(2, 0)
        outputs = [heard[layer.name][0][1] for layer in layers]
        slopes = torch.autograd.grad(f, outputs, directions, is_grads_batched=True) if layers else ()
    inputs = [layer.inputs(heard[layer.name][0][0]) for layer in layers]
    found = zip(layers, inputs, slopes, strict=True)
    return f.detach(), [Signals(a.detach(), layer.outputs(slope)) for layer, a, slope in found]


def _known(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in net.named_modules():
        plain = (
            type(module) is nn.Conv2d
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        if plain or type(module) is nn.Linear:
            yield name, module


def _coordinates(site: Site, z: Tensor) -> Tensor:
    return torch.arange(site.start, site.stop, device=z.device)


def _seen_once(network: Outputs, layers: list[Layer]) -> list[Layer]:
    x = network.example
    two = x.expand(2, *x.shape[1:])
    with torch.no_grad(), _listening(layers) as heard:
        network.outputs(network.parameters(network.z), two)
    dims: dict[type[nn.Module], int] = {nn.Conv2d: 4}
    return [
        layer
        for layer in layers
        if len(calls := heard[layer.name]) == 1
        and len(calls[0][0]) == 2
        and calls[0][0].dim() >= dims.get(type(layer.module), 2)
    ]


@contextmanager
def _listening(layers: Sequence[Layer]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inputs and outputs of the layers by name, one pair a call.

    The network goes on with a copy of the output, so that what it does in place does not reach the one that is kept.
    """
    heard: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            heard[name].append((inputs[0], output))
            return output.clone()

        return keep

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
