"""What a prior over a network's parameters is."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.models.parameters import ParameterInfo

NO_SCALES: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Prior(abc.ABC):
    """The distribution of a network's parameters before any data, chosen apart from the network and the likelihood."""

    @abc.abstractmethod
    def distribution(self, site: ParameterInfo, scales: Mapping[str, Tensor] = NO_SCALES) -> Distribution:
        """The prior of one parameter, all of its dimensions event dimensions.

        Args:
            site: the parameter.
            scales: values of the hyperparameter sites by name, as ``sample_scales`` returned them.

        Raises:
            ModelError: the prior has no rule for this parameter.
        """

    def sample_scales(self, sites: Sequence[ParameterInfo]) -> dict[str, Tensor]:
        """Run ``pyro.sample`` for the prior's own hyperparameters; most priors have none."""
        return {}

    def scale_names(self, sites: Sequence[ParameterInfo]) -> tuple[str, ...]:
        """Names of the hyperparameter sites that ``sample_scales`` makes."""
        return ()

    def check(self, sites: Sequence[ParameterInfo]) -> None:
        """Raise ModelError unless every parameter has a rule, before anything runs."""
        for site in sites:
            self.distribution(site)


def location_and_sd(site: ParameterInfo, scale: float | str, w_std: float, b_std: float) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's prior.

    With ``scale="fan_in"``: weights 0 and ``w_std / sqrt(fan_in)``, biases 0 and ``b_std``, a normalising layer's gain
    1 and ``b_std``, its shift 0 and ``b_std``. With a number: 0 and that number, for every parameter alike.
    """
    if not isinstance(scale, str):
        return 0.0, float(scale)
    role = site.role
    if role.kind == "weight":
        return 0.0, w_std / math.sqrt(role.fan_in)
    return (1.0 if role.kind == "gain" else 0.0), b_std


def over_shape(one: Distribution, site: ParameterInfo) -> Distribution:
    """Independent copies of a scalar distribution over the parameter's shape, as one event."""
    joint: Distribution = one.expand(site.shape).to_event(len(site.shape))
    return joint


def check_scale(prior: str, scale: float | str, w_std: float, b_std: float) -> None:
    """Refuse settings that are out of range or would be ignored.

    Raises:
        ModelError: with the setting's name.
    """
    for name, value in (("w_std", w_std), ("b_std", b_std)):
        check_positive(prior, name, value)
    if isinstance(scale, str):
        if scale != "fan_in":
            raise ModelError(f"{prior}: scale must be a positive number or 'fan_in', got {scale!r}.")
        return
    check_positive(prior, "scale", scale)
    if (w_std, b_std) != (1.0, 1.0):
        raise ModelError(f"{prior}: w_std and b_std belong to scale='fan_in' and would be ignored with scale={scale}.")


def check_unit(owner: str, name: str, value: object) -> None:
    """Raise ModelError unless ``value`` is a number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ModelError(f"{owner}: {name} must be strictly between 0 and 1, got {value!r}.")


def check_positive(owner: str, name: str, value: object) -> None:
    """Raise ModelError unless ``value`` is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"{owner}: {name} must be a positive finite number, got {value!r}.")
