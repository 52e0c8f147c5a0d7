"""From a torch.nn.Module and its prior to the layers of its infinitely wide limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pyro.distributions.distribution import Distribution
from torch import nn

from bayesdl.errors import ModelError
from bayesdl.infinite.kernel import Parameterisation
from bayesdl.infinite.layers import Conv, Dense, Layer
from bayesdl.infinite.network import InfiniteNetwork
from bayesdl.infinite.trace import Walk
from bayesdl.models import BayesianNetwork
from bayesdl.models.parameters import ParameterInfo, parameters_of

Scales = float | Sequence[float] | Mapping[str, float]


def from_module(
    net: nn.Module | BayesianNetwork,
    *,
    w_std: Scales | None = None,
    b_std: Scales | None = None,
    parameterisation: Parameterisation = "ntk",
) -> InfiniteNetwork:
    """Return the infinitely wide limit of a network.

    ``net`` is a ``torch.nn.Sequential`` or any module that torch.fx can trace, of Linear, Conv1d, Conv2d, AvgPool and
    the mean over all pixels, Flatten, LayerNorm (over all units of a row), Dropout (in evaluation mode, where it does
    nothing), elementwise functions in any notation (a run of them is one activation), and sums of branches, such as
    ``x + block(x)``. Hidden widths and channels go to infinity; the prior variance of every sum of inputs,
    ``fan_in * sd^2``, is held at its value in the given network, so that both have the same covariance function.

    Args:
        net: the module, or a ``BayesianNetwork``, whose Gaussian prior then gives the standard deviations. A module
            without a prior has those of torch's initialisation: w_std = 1 / sqrt(3) and b_std = 1 / sqrt(3 fan_in),
            which would vanish with the width and is held at its value in the given network.
        w_std: weights have standard deviation ``w_std / sqrt(fan_in)``: a number for every layer, or a list in the
            order of application, or a dictionary by the layers' names; overrides the prior.
        b_std: biases have standard deviation ``b_std`` in the layers that have them; likewise.
        parameterisation: of the tangent kernel; see ``InfiniteNetwork``.

    Returns:
        the layers, with ``nngp(x1, x2)`` and ``ntk(x1, x2)``.

    Raises:
        ModelError: a layer that has no rule here, parameters that are tied or frozen, or a prior that is not an
            independent zero-mean Gaussian (the limit of a network with other weights in its first layer, whose width
            stays finite, is no Gaussian process). The message names the layer.
    """
    reader = _Reader(net, w_std, b_std)
    layers = Walk(reader.module, reader.layer).layers()
    reader.check_used()
    return InfiniteNetwork(layers, parameterisation)


class _Reader:
    """Reads the standard deviations of layers in the order in which the walk meets them."""

    def __init__(self, net: nn.Module | BayesianNetwork, w_std: Scales | None, b_std: Scales | None) -> None:
        self.net, self.given = net, {"w_std": w_std, "b_std": b_std}
        self.module = net.net if isinstance(net, BayesianNetwork) else net
        self.sites = {site.name: site for site in parameters_of(self.module)}
        self.names: list[str] = []
        self.biased: list[str] = []
        norms = [
            name
            for name, module in self.module.named_modules()
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and next(module.parameters(), None) is not None
        ]
        if norms and isinstance(net, BayesianNetwork):
            raise ModelError(
                f"Layer {norms[0]!r} has weights under a prior, which infinite width holds at one and zero; make it "
                "LayerNorm(..., elementwise_affine=False)."
            )

    def layer(self, name: str, module: nn.Module) -> Layer:
        """The rule of a Linear or a convolution."""
        weight, bias = (_site(self.sites, name, module, part) for part in ("weight", "bias"))
        assert weight is not None
        fan_in = weight.shape[1:].numel()
        w = self._given("w_std", name, self.names)
        self.names.append(name)
        if w is None:
            w = self._sd(weight, fan_in) * math.sqrt(fan_in)
        b: float | None = 0.0
        if bias is not None:
            b = self._given("b_std", name, self.biased)
            self.biased.append(name)
            if b is None:
                b = self._sd(bias, fan_in)
        assert b is not None
        if isinstance(module, nn.Linear):
            return Dense(w, b, fan_in)
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        return _convolution(name, module, w, b, fan_in)

    def check_used(self) -> None:
        """Check that every given standard deviation found its layer.

        Raises:
            ModelError: it did not.
        """
        for argument, names in (("w_std", self.names), ("b_std", self.biased)):
            given = self.given[argument]
            if isinstance(given, Mapping):
                unknown = set(given) - set(names)
                if unknown:
                    raise ModelError(f"{argument} names layers that the network lacks: {', '.join(sorted(unknown))}.")
            elif isinstance(given, Sequence) and len(given) != len(names):
                raise ModelError(f"{argument} has {len(given)} numbers, the network has {len(names)} layers: {names}.")

    def _given(self, argument: str, name: str, before: list[str]) -> float | None:
        given = self.given[argument]
        if isinstance(given, Mapping):
            return given.get(name)
        if isinstance(given, Sequence):
            if len(before) >= len(given):
                raise ModelError(f"{argument} has {len(given)} numbers, and layer {name!r} is one more.")
            return float(given[len(before)])
        return given

    def _sd(self, site: ParameterInfo, fan_in: int) -> float:
        return _sd(self.net, site) if isinstance(self.net, BayesianNetwork) else 1 / math.sqrt(3 * fan_in)


def _convolution(name: str, module: nn.Conv1d | nn.Conv2d, w: float, b: float, fan_in: int) -> Conv:
    if module.groups != 1 or module.padding_mode != "zeros":
        raise ModelError(
            f"Layer {name!r} ({type(module).__name__}) has groups={module.groups} and "
            f"padding_mode={module.padding_mode!r}; infinite width has a rule for groups=1 and zeros."
        )
    if isinstance(module.padding, str):
        totals = [
            d * (k - 1) if module.padding == "same" else 0
            for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        padding = tuple((int(p), int(p)) for p in module.padding)
    return Conv(w, b, fan_in, module.kernel_size, module.stride, padding, module.dilation)


def _site(sites: dict[str, ParameterInfo], layer_name: str, layer: nn.Module, part: str) -> ParameterInfo | None:
    """The latent site of a layer's weight or bias, or None if it has no bias."""
    if getattr(layer, part) is None:
        return None
    name = f"{layer_name}.{part}" if layer_name else part
    if name not in sites:
        raise ModelError(f"{name!r} is frozen or tied to an earlier layer; infinite width needs weights of its own.")
    if len(sites[name].owners) > 1:
        raise ModelError(f"{name!r} is tied to another layer; infinite width needs independent weights.")
    return sites[name]


def _sd(net: BayesianNetwork, site: ParameterInfo) -> float:
    """The prior standard deviation of a parameter."""
    advice = "Use priors.Normal (alone or inside PerParameter), or pass w_std= and b_std= to choose a Gaussian prior."
    if net.prior.scale_names([site]):
        raise ModelError(f"The prior scale of {site.name!r} is itself random: the limit is a mixture of GPs. {advice}")
    prior = _base(net.prior.distribution(replace(site, dtype=torch.float64)))
    if not isinstance(prior, torch.distributions.Normal):
        raise ModelError(f"The prior of {site.name!r} is {type(prior).__name__}, so the limit is not a GP. {advice}")
    mean, sd = prior.loc, prior.scale
    if bool((mean != 0).any()) or bool((sd != sd.flatten()[0]).any()):
        raise ModelError(f"The prior of {site.name!r} must have mean zero and one standard deviation. {advice}")
    return float(sd.flatten()[0])


def _base(distribution: Distribution) -> Distribution:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution
