"""From a torch.nn.Module and its prior to the layers of its infinitely wide limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from pyro.distributions.distribution import Distribution
from torch import nn

from bayesdl.errors import ModelError
from bayesdl.infinite.layers import Activation, Dense, Layer, check_layers
from bayesdl.models import BayesianNetwork
from bayesdl.models.layers import Erf
from bayesdl.models.parameters import ParameterInfo, parameters_of

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", Erf: "erf"}
# What does nothing to the rows of a table when the network is evaluated.
_NEUTRAL: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout)


def from_module(
    net: nn.Module | BayesianNetwork, *, w_std: float | None = None, b_std: float | None = None
) -> tuple[Layer, ...]:
    """Return the layers of the infinitely wide limit of a fully connected network.

    ``net`` is a ``torch.nn.Sequential`` (nested ones too) of Linear, ReLU, Erf, Identity, Dropout (taken in evaluation
    mode, where it does nothing) and Flatten. Hidden widths go to infinity; the prior variance of every sum of inputs,
    ``fan_in * sd^2``, is held at its value in the given network, so that both have the same covariance function.

    Args:
        net: the module, or a ``BayesianNetwork``, whose Gaussian prior then gives the standard deviations.
        w_std: weights have standard deviation ``w_std / sqrt(fan_in)`` in every layer; overrides the prior.
        b_std: biases have standard deviation ``b_std`` in every layer that has them; overrides the prior.

    Returns:
        the layers, for ``bayesdl.infinite.nngp`` or ``bayesdl.infinite.NNGPKernel``.

    Raises:
        ModelError: a layer that has no rule here, parameters that are tied or frozen, or a prior that is not an
            independent zero-mean Gaussian (the limit of a network with other weights in its first layer, whose width
            stays finite, is no Gaussian process). The message names the layer.
    """
    module, prior = (net.net, net.prior) if isinstance(net, BayesianNetwork) else (net, None)
    if prior is None and (w_std is None or b_std is None):
        raise ModelError("A module has no prior: pass w_std= and b_std=, or pass a BayesianNetwork.")
    sites = {site.name: site for site in parameters_of(module)}
    layers: list[Layer] = []
    for name, layer in _steps(module, ""):
        kind = type(layer)
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise ModelError(f"Layer {_label(name, layer)} has forward hooks; what they compute has no kernel.")
        if kind is nn.Linear:
            weight, bias = (_site(sites, name, layer, part) for part in ("weight", "bias"))
            assert weight is not None
            fan_in = weight.shape[1]
            w = _sd(net, weight) * math.sqrt(fan_in) if w_std is None else w_std
            b = 0.0 if bias is None else _sd(net, bias) if b_std is None else b_std
            layers.append(Dense(w, b))
        elif kind in _ACTIVATIONS:
            layers.append(Activation(_ACTIVATIONS[kind]))
        elif isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            continue
        elif kind not in _NEUTRAL:
            raise ModelError(
                f"Layer {_label(name, layer)} has no rule for infinite width. There are rules for Linear, ReLU, Erf "
                "(bayesdl.models.layers.Erf, the closed-form neighbour of tanh), Identity, Dropout and "
                "Flatten(start_dim=1) in a Sequential."
            )
    return check_layers(layers)


def _steps(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers in the order in which they are applied, with their names."""
    if type(module) is not nn.Sequential or module._forward_hooks or module._forward_pre_hooks:
        yield name, module
        return
    # Not named_children(), which leaves out the second place of a module that is used twice.
    for child_name, child in module._modules.items():
        assert child is not None
        yield from _steps(child, f"{name}.{child_name}" if name else child_name)


def _label(name: str, layer: nn.Module) -> str:
    return f"{name!r} ({type(layer).__name__})"


def _site(sites: dict[str, ParameterInfo], layer_name: str, layer: nn.Module, part: str) -> ParameterInfo | None:
    """The latent site of a Linear's weight or bias, or None if it has no bias."""
    if getattr(layer, part) is None:
        return None
    name = f"{layer_name}.{part}" if layer_name else part
    if name not in sites:
        raise ModelError(f"{name!r} is frozen or tied to an earlier layer; infinite width needs weights of its own.")
    if len(sites[name].owners) > 1:
        raise ModelError(f"{name!r} is tied to another layer; infinite width needs independent weights.")
    return sites[name]


def _sd(net: nn.Module | BayesianNetwork, site: ParameterInfo) -> float:
    """The prior standard deviation of a parameter."""
    assert isinstance(net, BayesianNetwork)
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
