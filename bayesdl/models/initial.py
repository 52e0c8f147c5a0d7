"""Starting values for optimisers: what each module's own initialisation would draw."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bayesdl._rng import isolated
from bayesdl.models.parameters import ParameterInfo


def initial_values(net: nn.Module, sites: tuple[ParameterInfo, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw fresh values for the sites by ``reset_parameters`` of every submodule; the network stays as it is.

    A module without ``reset_parameters`` keeps the values that it has. The only draw from ``generator`` is one integer
    that seeds the rest, because modules initialise themselves from the global generator.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    fresh = copy.deepcopy(net)
    with isolated(seed, "initial values"), torch.no_grad():
        for module in fresh.modules():
            _reset(module)
    values = dict(fresh.named_parameters())
    return {site.name: site.to_site(values[site.name].detach()).clone() for site in sites}


def _reset(module: nn.Module) -> None:
    # MultiheadAttention and Transformer call theirs _reset_parameters.
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if not callable(reset):
        return
    if not parametrize.is_parametrized(module):
        reset()
        return
    # The reset writes into tensors computed from the real parameters: keep them, and set those through the inverse.
    with parametrize.cached():
        reset()
        computed = {name: getattr(module, name).clone() for name in module.parametrizations}  # type: ignore[union-attr]  # ModuleDict
    for name, value in computed.items():
        setattr(module, name, value)
