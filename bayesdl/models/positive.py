"""Priors on positive scalars (noise levels, scales, degrees of freedom), free of dtype and device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from bayesdl.errors import ModelError

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Exponential": ("rate",),
    "Gamma": ("concentration", "rate"),
    "HalfCauchy": ("scale",),
    "HalfNormal": ("scale",),
    "InverseGamma": ("concentration", "rate"),
    "LogNormal": ("loc", "scale"),
    "Uniform": ("low", "high"),
    "Weibull": ("scale", "concentration"),
}


@dataclass(frozen=True, repr=False)
class PositivePrior:
    """A scalar prior on the positive reals, kept as its family's name and numbers.

    A Pyro distribution holds tensors of one dtype on one device; this does not, so one model serves all of them.

    Attributes:
        family: one of Exponential, Gamma, HalfCauchy, HalfNormal, InverseGamma, LogNormal, Uniform, Weibull.
        arguments: the family's arguments in the order of Pyro's constructor.
    """

    family: str
    arguments: tuple[float, ...]

    def __post_init__(self) -> None:
        names = _ARGUMENTS.get(self.family)
        if names is None or len(names) != len(self.arguments):
            raise ModelError(f"{self} is not a prior on a positive scalar; {_known()}")
        if not all(math.isfinite(value) for value in self.arguments):
            raise ModelError(f"{self} has an argument that is not a finite number.")
        if any(value <= 0 for name, value in zip(names, self.arguments, strict=True) if name not in ("loc", "low")):
            raise ModelError(f"{self} needs positive arguments.")
        if self.family == "Uniform" and not 0 <= self.arguments[0] < self.arguments[1]:
            raise ModelError(f"{self} as the prior of a positive number needs 0 <= low < high.")

    def __repr__(self) -> str:
        return f"{self.family}({', '.join(f'{value:g}' for value in self.arguments)})"

    @classmethod
    def of(cls, distribution: PositivePrior | torch.distributions.Distribution, setting: str) -> PositivePrior:
        """Read a Pyro or torch distribution.

        Args:
            distribution: a scalar distribution of a listed family.
            setting: what the prior is for, to name it in errors.

        Raises:
            ModelError: the family is not listed, or an argument is not a single number.
        """
        if isinstance(distribution, PositivePrior):
            return distribution
        family = type(distribution).__name__
        listed = (getattr(dist, family, None), getattr(torch.distributions, family, None))
        if family not in _ARGUMENTS or type(distribution) not in listed:
            raise ModelError(f"{setting}={family}(...) is not a prior on a positive scalar; {_known()}")
        values = [torch.as_tensor(getattr(distribution, name)) for name in _ARGUMENTS[family]]
        if any(value.numel() != 1 for value in values):
            raise ModelError(
                f"{setting}={family}(...) has shape {tuple(distribution.batch_shape)}; a scalar one is needed."
            )
        return cls(family, tuple(float(value) for value in values))

    def distribution(self, like: Tensor) -> Distribution:
        """The Pyro distribution in the dtype and on the device of ``like``."""
        values = (torch.full((), value, dtype=like.dtype, device=like.device) for value in self.arguments)
        made: Distribution = getattr(dist, self.family)(*values)
        return made


def _known() -> str:
    return f"use one of {', '.join(sorted(_ARGUMENTS))} with numbers as arguments."
