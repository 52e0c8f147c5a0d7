"""A network whose weights are drawn anew for every row: local reparameterisation and Flipout, through the module.

With one draw of the weights for all rows, the rows of a mini-batch err together, and the variance of a gradient does
not fall as the batch grows. Both ways here give each row weights of its own, at the price of a second pass through each
layer instead of a weight tensor per row:

- "local": the outputs of a layer are drawn instead of its weights (Kingma, Salimans & Welling, 2015, section 2.2). With
  independent ``w ~ N(m, v)``, a linear layer's outputs at a row x are independent normals with mean ``m x + b`` and
  variance ``v x^2``: exactly. Where one weight meets a row several times (a convolution's pixels, a sequence), outputs
  at different positions would depend on each other and are drawn as if they did not: the mean and the variance of every
  output are right, their joint law is not (as in Molchanov, Ashukha & Vetrov, 2017), so a nonlinear loss of them is
  biased.
- "flipout": one perturbation of the weights serves all rows, its signs flipped by random row and column signs,
  ``w_i = m + D * (s_i r_i^T)`` (Wen et al., 2018). Each row by itself has weights from the right law at all positions,
  so every average over rows is unbiased; perturbations of two rows are uncorrelated, though not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesdl.models.network import BayesianNetwork

Kind = Literal["local", "flipout"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that are linear in their weights, of exactly these types."""


@dataclass(frozen=True, eq=False)
class NoisyLayer:
    """A layer whose weights are drawn for each row.

    Attributes:
        module: in the model's network.
        weight: name of the weight's site.
        bias: name of the bias's site; None if there is no bias, or it is not random.
        inputs: shape of a row's inputs.
        outputs: shape of a row's outputs.
    """

    module: nn.Module
    weight: str
    bias: str | None
    inputs: torch.Size
    outputs: torch.Size

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of its sites."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def noise_sizes(self, kind: Kind) -> tuple[int, ...]:
        """Numbers a row takes: one for each output; or a sign for each input and each output channel."""
        if kind == "local":
            return (math.prod(self.outputs),)
        return tuple(shape[self._channel] for shape in (self.inputs, self.outputs))

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with other weights."""
        if isinstance(self.module, nn.Linear):
            return F.linear(x, weight, bias)
        found: Tensor = self.module._conv_forward(x, weight, bias)  # type: ignore[operator]  # of every convolution
        return found

    def local(self, x: Tensor, variances: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Normal numbers ``[N, size]`` as the noise of the outputs; 0 where their variance is 0."""
        variance = self.apply(x.square(), variances[self.weight], None if self.bias is None else variances[self.bias])
        # The root has no slope at 0, where inputs are all 0 and there is no bias.
        return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * noise.reshape(-1, *self.outputs)

    def flipped(self, x: Tensor, moves: Mapping[str, Tensor], signs: Tensor) -> Tensor:
        """What a perturbation of the weights adds to the outputs, with signs ``[N, inputs + outputs]`` of its own."""
        before, after = signs.split(self.noise_sizes("flipout"), 1)
        moved = self.apply(x * self._by_channel(before, x), moves[self.weight], None)
        if self.bias is not None:
            bias = moves[self.bias]
            moved = moved + (bias if self._channel else bias.reshape(-1, *[1] * (len(self.outputs) - 1)))
        return moved * self._by_channel(after, moved)

    @property
    def _channel(self) -> int:
        """Dimension of the channels in a row's shape."""
        return -1 if isinstance(self.module, nn.Linear) else 0

    def _by_channel(self, signs: Tensor, like: Tensor) -> Tensor:
        """``[N, K]`` so that it multiplies the channels of ``like``."""
        shape = [len(signs), *[1] * (like.dim() - 1)]
        shape[-1 if self._channel else 1] = signs.shape[1]
        return signs.reshape(shape)


class RowNoise:
    """The layers of a network that can draw their weights for each row, and the network with these draws.

    A layer is one of ``LAYERS`` whose parameters nothing else uses, and that sees every row once, in the first
    dimension of its input. The weights of all other layers are the same for all rows.

    Args:
        model: the network.
        x: some inputs.
        random: names of the sites that are random.
        kind: "local" or "flipout", see the module.

    Attributes:
        layers: the layers, in the order of the network's modules.
        sites: names of their sites, in the order of the model's.
        size: U, the numbers that a row takes: normal ones ("local"), or signs, 1 and -1 ("flipout").
    """

    def __init__(self, model: BayesianNetwork, x: Tensor, random: Collection[str], kind: Kind = "local") -> None:
        self.model, self.kind = model, kind
        self.layers = _eligible(model, x, random)
        taken = {name for layer in self.layers for name in layer.sites}
        self.sites = tuple(site.name for site in model.sites if site.name in taken)
        self.size = sum(sum(layer.noise_sizes(kind)) for layer in self.layers)

    def noise(self, rows: int, stream: torch.Generator) -> Tensor:
        """``[rows, U]`` of the kind that ``outputs`` takes."""
        drawn = torch.empty(rows, self.size, dtype=self.model.dtype, device=stream.device)
        if self.kind == "local":
            return drawn.normal_(generator=stream)
        return drawn.random_(0, 2, generator=stream).mul_(2.0).sub_(1.0)

    def outputs(
        self, parameters: Mapping[str, Tensor], spread: Mapping[str, Tensor], x: Tensor, noise: Tensor
    ) -> Tensor:
        """The network's outputs with weights of its own for each row.

        Args:
            parameters: values of the model's sites by name; of ``sites``, the means.
            spread: of ``sites`` by name: the variances ("local"), or a draw's distance from the mean ("flipout").
            x: inputs ``[N, ...]`` in the model's units.
            noise: ``[N, U]``.

        Returns:
            ``[N]`` or ``[N, K]``.
        """
        with self.drawing(spread, noise):
            return self.model.forward(parameters, x)

    @contextmanager
    def drawing(self, spread: Mapping[str, Tensor], noise: Tensor) -> Iterator[None]:
        """Inside the block, whatever runs the network on these rows adds the noise; arguments as of ``outputs``."""
        parts = noise.split([sum(layer.noise_sizes(self.kind)) for layer in self.layers], 1)

        def hook(layer: NoisyLayer, part: Tensor) -> Callable[..., Tensor]:
            def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                draw = layer.local if self.kind == "local" else layer.flipped
                return output + draw(inputs[0], spread, part)

            return add

        with _hooked({layer.module: hook(layer, part) for layer, part in zip(self.layers, parts, strict=True)}):
            yield


def _eligible(model: BayesianNetwork, x: Tensor, random: Collection[str]) -> list[NoisyLayer]:
    """Layers as ``RowNoise`` says, found by running the network on one row twice."""
    owners = {site.name: site.owners for site in model.sites}
    named = {}
    for name, module in model.net.named_modules():
        prefix = f"{name}." if name else ""
        own = [f"{prefix}{part}" for part in ("weight", "bias") if f"{prefix}{part}" in owners]
        if type(module) in LAYERS and f"{prefix}weight" in random and all(len(owners[site]) == 1 for site in own):
            named[module] = [site for site in own if site in random]
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], Tensor]]] = {module: [] for module in named}

    def listen(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        calls[module].append((inputs, output))
        return output.detach()  # so that only what goes past the layers' outputs reaches the end

    by_name = dict(model.net.named_parameters())
    values = {site.name: site.to_site(by_name[site.name]).detach().requires_grad_() for site in model.sites}
    with torch.enable_grad(), _hooked(dict.fromkeys(named, listen)):
        f = model.forward(values, x[:1].expand(2, *x.shape[1:]))
        past = _reaching(f, {name: values[name] for sites in named.values() for name in sites})
    found = []
    for module, sites in named.items():
        if past.intersection(sites) or len(calls[module]) != 1:
            continue
        inputs, output = calls[module][0]
        dims = 2 if isinstance(module, nn.Linear) else _batch_dims(module)
        if len(inputs) == 1 and inputs[0].dim() >= dims and len(inputs[0]) == len(output) == 2:
            bias = sites[1] if len(sites) > 1 else None
            found.append(NoisyLayer(module, sites[0], bias, inputs[0].shape[1:], output.shape[1:]))
    return found


def _reaching(f: Tensor, values: Mapping[str, Tensor]) -> set[str]:
    """Names of the values that f depends on."""
    if not f.requires_grad or not values:
        return set()
    slopes: tuple[Tensor | None, ...] = torch.autograd.grad(f.sum(), list(values.values()), allow_unused=True)
    return {name for name, slope in zip(values, slopes, strict=True) if slope is not None}


def _batch_dims(convolution: nn.Module) -> int:
    """Dimensions of a batch that a convolution takes."""
    return 2 + len(convolution.kernel_size)  # type: ignore[arg-type]  # a tuple in every convolution


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Forward hooks on some modules while the block runs."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
