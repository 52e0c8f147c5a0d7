"""A likelihood whose log loss is bounded, as PAC-Bayes bounds need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from bayesdl.models.likelihood import Likelihood
from bayesdl.models.prior import check_unit


class ClippedProbability(TorchDistribution):
    """``max(log p(y), log floor)`` in place of ``log p(y)``: no density, but a loss that is bounded.

    Args:
        inner: the distribution of a row's target.
        floor: smallest probability.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, inner: Distribution, floor: float) -> None:
        self.inner, self.floor = inner, floor
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the distribution itself."""
        return self.inner.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> ClippedProbability:
        """The same over a larger batch shape."""
        return ClippedProbability(self.inner.expand(batch_shape), self.floor)

    def log_prob(self, value: Tensor) -> Tensor:
        """The clipped log probability."""
        found: Tensor = self.inner.log_prob(value)
        return found.clamp_min(math.log(self.floor))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws of the distribution itself."""
        drawn: Tensor = self.inner.sample(sample_shape)
        return drawn


@dataclass(frozen=True)
class Clipped(Likelihood):
    """Another likelihood of classes, its log loss bounded by ``log(1 / floor)``.

    Rows whose class has a smaller probability count as if it were ``floor``, and have no slope.

    Attributes:
        inner: the likelihood.
        floor: smallest probability.
    """

    inner: Likelihood
    floor: float

    task: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        check_unit("Clipped", "floor", self.floor)

    def n_outputs(self, targets: int = 1) -> int:
        """As the likelihood itself."""
        return self.inner.n_outputs(targets)

    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """The likelihood's distribution, clipped."""
        clipped: Distribution = ClippedProbability(self.inner.distribution(f, latents), self.floor)
        return clipped

    def target(self, y: Tensor, distribution: Distribution, dtype: torch.dtype) -> Tensor:
        """As the likelihood itself."""
        return self.inner.target(y, distribution, dtype)

    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        self.inner.check_target(y, outputs)
