"""The parameters of a module that become latent sites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesdl.models.fan_in import Role, role_of


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """One parameter of a network, as a prior sees it.

    Attributes:
        name: its name in ``named_parameters()``, and the name of its latent site.
        shape: shape of the site; an embedding's padding row is left out.
        dtype: floating-point type.
        device: where it lives.
        owners: every (module, local name) under which it stands; more than one for a tied parameter.
        padding: index of the row that is held at zero, or None.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    owners: tuple[tuple[nn.Module, str], ...]
    padding: int | None = None

    @property
    def layer(self) -> str:
        """Name of the module that holds the parameter; empty for a parameter of the network itself."""
        return self.name.rpartition(".")[0]

    @property
    def role(self) -> Role:
        """Kind and fan-in by the table of module types.

        Raises:
            ModelError: the table does not know the module type.
        """
        return role_of(self.owners, self.name, self.shape)

    def scalar(self, value: float) -> Tensor:
        """A scalar tensor of the parameter's dtype on its device."""
        return torch.full((), value, dtype=self.dtype, device=self.device)

    def to_site(self, parameter: Tensor) -> Tensor:
        """The site's value for a full parameter: the padding row, if any, is cut out."""
        if self.padding is None:
            return parameter
        return torch.cat([parameter[: self.padding], parameter[self.padding + 1 :]])

    def to_parameter(self, value: Tensor) -> Tensor:
        """The full parameter for a site's value: the padding row, if any, is put back as zeros."""
        if self.padding is None:
            return value
        zeros = torch.zeros_like(value[:1])
        return torch.cat([value[: self.padding], zeros, value[self.padding :]])


def parameters_of(net: nn.Module) -> tuple[ParameterInfo, ...]:
    """The parameters that require grad, tied ones once, in the order of ``named_parameters()``."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in net.modules():
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, local))
    return tuple(
        _info(name, parameter, tuple(owners[id(parameter)]))
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    )


def _info(name: str, parameter: nn.Parameter, owners: tuple[tuple[nn.Module, str], ...]) -> ParameterInfo:
    padding = None
    for module, local in owners:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and local == "weight" and module.padding_idx is not None:
            # Its gradient is defined as zero although the output depends on it, so it cannot be a random variable.
            padding = module.padding_idx % parameter.shape[0]
    shape = parameter.shape if padding is None else torch.Size([parameter.shape[0] - 1, *parameter.shape[1:]])
    return ParameterInfo(name, shape, parameter.dtype, parameter.device, owners, padding)
