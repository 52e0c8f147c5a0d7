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

LARGEST_DENSITY = 10.0
"""Of a real target in units of its standard deviation: that of a noise of 0.04 at its peak."""


class ClippedProbability(TorchDistribution):
    """``log p(y)`` cut at both ends: no density, but a loss that is bounded.

    Args:
        inner: the distribution of a row's target.
        lowest: log of the smallest probability, or density.
        highest: log of the largest one.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, inner: Distribution, lowest: float, highest: float) -> None:
        self.inner, self.lowest, self.highest = inner, lowest, highest
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the distribution itself."""
        return self.inner.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> ClippedProbability:
        """The same over a larger batch shape."""
        return ClippedProbability(self.inner.expand(batch_shape), self.lowest, self.highest)

    def log_prob(self, value: Tensor) -> Tensor:
        """The clipped log probability."""
        found: Tensor = self.inner.log_prob(value)
        return found.clamp(self.lowest, self.highest)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws of the distribution itself."""
        drawn: Tensor = self.inner.sample(sample_shape)
        return drawn


@dataclass(frozen=True)
class Clipped(Likelihood):
    """Another likelihood, its log loss between 0 and ``range``.

    Rows that are less probable than ``floor`` count as if it were their probability, and have no slope.

    Attributes:
        inner: the likelihood.
        floor: smallest probability; of real targets, smallest density in the network's units.
    """

    inner: Likelihood
    floor: float

    def __post_init__(self) -> None:
        check_unit("Clipped", "floor", self.floor)

    @property
    def task(self) -> str:  # type: ignore[override]  # that of the likelihood itself
        """As the likelihood itself."""
        return self.inner.task

    @property
    def scales_y(self) -> bool:  # type: ignore[override]  # likewise
        """As the likelihood itself."""
        return self.inner.scales_y

    @property
    def latent_names(self) -> tuple[str, ...]:
        """As the likelihood itself."""
        return self.inner.latent_names

    @property
    def highest(self) -> float:
        """Largest log probability; of real targets, the log of the largest density that counts."""
        return math.log(LARGEST_DENSITY) if self.scales_y else 0.0

    @property
    def range(self) -> float:
        """From the smallest to the largest log probability."""
        return self.highest - math.log(self.floor)

    def n_outputs(self, targets: int = 1) -> int:
        """As the likelihood itself."""
        return self.inner.n_outputs(targets)

    def latents(self, like: Tensor) -> dict[str, Tensor]:
        """As the likelihood itself."""
        return self.inner.latents(like)

    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """The likelihood's distribution, clipped."""
        law = self.inner.distribution(f, latents)
        clipped: Distribution = ClippedProbability(law, math.log(self.floor), self.highest)
        return clipped

    def target(self, y: Tensor, distribution: Distribution, dtype: torch.dtype) -> Tensor:
        """As the likelihood itself."""
        return self.inner.target(y, distribution, dtype)

    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        self.inner.check_target(y, outputs)
