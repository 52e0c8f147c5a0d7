"""Priors over the parameters of a network.

Each is a small frozen dataclass. ``scale="fan_in"`` goes by the type of the module that holds a parameter
(``fan_in.py``); a number is the scale of every parameter alike. The penalty that a prior adds to the summed negative
log likelihood is minus its log density: ``Normal(s)`` is weight decay ``|w|^2 / (2 s^2)``, ``Laplace(b)`` is the lasso
``|w|_1 / b``; against a loss averaged over N rows both are divided by N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from bayesdl.models.composite_priors import Hierarchical, PerParameter
from bayesdl.models.config import decode, encode
from bayesdl.models.distributions import ScaleMixtureNormal
from bayesdl.models.parameters import ParameterInfo
from bayesdl.models.positive import PositivePrior
from bayesdl.models.prior import NO_SCALES, Prior, check_positive, check_scale, check_unit, location_and_sd, over_shape

__all__ = [
    "Hierarchical",
    "Laplace",
    "Normal",
    "PerParameter",
    "Prior",
    "ScaleMixture",
    "StudentT",
    "from_config",
    "to_config",
]


@dataclass(frozen=True)
class Normal(Prior):
    """Independent Gaussians.

    Attributes:
        scale: "fan_in", or the standard deviation of every parameter (mean 0).
        w_std: with "fan_in", a weight has sd ``w_std / sqrt(fan_in)``. 1 keeps the variance of a linear layer's
            output; relu layers need sqrt(2), because relu halves the second moment (He et al., 2015, eq. 10).
        b_std: with "fan_in", sd of biases and of a normalising layer's gain and shift (gains have mean 1).
    """

    scale: float | str = "fan_in"
    w_std: float = 1.0
    b_std: float = 1.0

    def __post_init__(self) -> None:
        check_scale("Normal", self.scale, self.w_std, self.b_std)

    def distribution(self, site: ParameterInfo, scales: Mapping[str, Tensor] = NO_SCALES) -> Distribution:
        """``Normal(mean, sd)`` over the parameter's shape."""
        mean, sd = location_and_sd(site, self.scale, self.w_std, self.b_std)
        return over_shape(dist.Normal(site.scalar(mean), site.scalar(sd)), site)


@dataclass(frozen=True)
class Laplace(Prior):
    """Independent Laplace distributions, ``-log p(w) = |w - m| / b + log 2b``: MAP is the lasso with penalty 1/b.

    Attributes:
        scale: "fan_in" (b such that the sd is the one of ``Normal("fan_in")``: b = sd / sqrt(2)), or b itself.
        w_std: as in ``Normal``.
        b_std: as in ``Normal``.
    """

    scale: float | str = "fan_in"
    w_std: float = 1.0
    b_std: float = 1.0

    def __post_init__(self) -> None:
        check_scale("Laplace", self.scale, self.w_std, self.b_std)

    def distribution(self, site: ParameterInfo, scales: Mapping[str, Tensor] = NO_SCALES) -> Distribution:
        """``Laplace(mean, b)`` over the parameter's shape."""
        mean, sd = location_and_sd(site, self.scale, self.w_std, self.b_std)
        b = sd / math.sqrt(2.0) if isinstance(self.scale, str) else sd
        return over_shape(dist.Laplace(site.scalar(mean), site.scalar(b)), site)


@dataclass(frozen=True)
class StudentT(Prior):
    """Independent Student-t distributions: most weights small, a few large.

    Attributes:
        df: degrees of freedom.
        scale: "fan_in", or the scale of every parameter. With "fan_in" the scale is such that the sd is the one of
            ``Normal("fan_in")`` for df > 2, and equals that sd for df <= 2, where the variance is infinite.
        w_std: as in ``Normal``.
        b_std: as in ``Normal``.
    """

    df: float = 4.0
    scale: float | str = "fan_in"
    w_std: float = 1.0
    b_std: float = 1.0

    def __post_init__(self) -> None:
        check_positive("StudentT", "df", self.df)
        check_scale("StudentT", self.scale, self.w_std, self.b_std)

    def distribution(self, site: ParameterInfo, scales: Mapping[str, Tensor] = NO_SCALES) -> Distribution:
        """``StudentT(df, mean, scale)`` over the parameter's shape."""
        mean, sd = location_and_sd(site, self.scale, self.w_std, self.b_std)
        matched = isinstance(self.scale, str) and self.df > 2
        scale = sd * math.sqrt((self.df - 2) / self.df) if matched else sd
        return over_shape(dist.StudentT(site.scalar(self.df), site.scalar(mean), site.scalar(scale)), site)


@dataclass(frozen=True)
class ScaleMixture(Prior):
    """``pi N(0, sigma1^2) + (1 - pi) N(0, sigma2^2)`` for every parameter (Blundell et al., 2015, eq. 7).

    Attributes:
        pi: weight of the first component.
        sigma1: sd of the first component, the wide one.
        sigma2: sd of the second, the narrow one that holds most weights near zero.
    """

    pi: float = 0.5
    sigma1: float = 1.0
    sigma2: float = math.exp(-6)

    def __post_init__(self) -> None:
        check_positive("ScaleMixture", "sigma1", self.sigma1)
        check_positive("ScaleMixture", "sigma2", self.sigma2)
        check_unit("ScaleMixture", "pi", self.pi)

    def distribution(self, site: ParameterInfo, scales: Mapping[str, Tensor] = NO_SCALES) -> Distribution:
        """The mixture over the parameter's shape."""
        one = ScaleMixtureNormal(site.scalar(self.pi), site.scalar(self.sigma1), site.scalar(self.sigma2))
        return over_shape(one, site)


_TABLE: dict[str, type] = {
    cls.__name__: cls for cls in (Normal, Laplace, StudentT, ScaleMixture, PerParameter, Hierarchical, PositivePrior)
}


def to_config(prior: Prior) -> dict[str, Any]:
    """The prior as JSON.

    Raises:
        ModelRequired: it is, or contains, a class of the user's own.
    """
    config: dict[str, Any] = encode(prior, _TABLE)
    return config


def from_config(config: dict[str, Any]) -> Prior:
    """The prior that ``to_config`` described.

    Raises:
        ModelRequired: the class is not known.
        FileError: the description is damaged.
    """
    prior: Prior = decode(config, _TABLE)
    return prior
