"""What a likelihood is: how a network's outputs become a distribution of the target."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from bayesdl.errors import DataError, ModelError
from bayesdl.models.positive import PositivePrior
from bayesdl.models.prior import check_positive

DEFAULT_NOISE = PositivePrior("LogNormal", (-1.2, 1.0))
"""Prior of a noise level in units of the standardised target: median 0.30, central 95% from 0.04 to 2.1."""

START_OF_NOISE = 0.3
"""Where a noise level that is fitted by maximum likelihood begins."""

SMALLEST_HEAD_SCALE = 1e-3
"""Added to a heteroscedastic head's scale, so that one row fitted exactly cannot have unbounded density."""


@dataclass(frozen=True)
class Likelihood(abc.ABC):
    """The distribution of a row's target given the network's outputs for the row.

    Attributes:
        task: "regression" or "classification", the kind of Dataset it is for.
        scales_y: the target lives on the whole real line, so fitting may standardise it.
        latent_names: the sites (or params) that the likelihood adds to the program, outside the data plate.
    """

    task: ClassVar[str]
    scales_y: ClassVar[bool] = False

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Names of the sites that ``latents`` makes."""
        return ()

    def n_outputs(self, targets: int = 1) -> int:
        """How many outputs the network needs for ``targets`` target columns (Categorical: classes)."""
        return targets

    def latents(self, like: Tensor) -> dict[str, Tensor]:
        """Sample the likelihood's own latents; runs outside the data plate.

        Args:
            like: a tensor whose dtype and device they take.
        """
        return {}

    @abc.abstractmethod
    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """The distribution of the target, batch shape ``[N]``.

        Args:
            f: the network's outputs ``[N]`` or ``[N, K]``.
            latents: what ``latents`` returned.

        Raises:
            ModelError: the outputs do not fit the likelihood.
        """

    def target(self, y: Tensor, distribution: Distribution, dtype: torch.dtype) -> Tensor:
        """The target in the form that ``distribution`` observes.

        Args:
            y: the target as given.
            distribution: what ``distribution`` returned.
            dtype: the network's floating-point type.

        Raises:
            ModelError: its shape differs, so that it would broadcast, e.g. ``[N, 1]`` against ``[N]`` to ``[N, N]``.
        """
        shape = distribution.shape()
        if y.shape != shape:
            raise ModelError(
                f"{type(self).__name__} has a target of shape {tuple(shape)} for this network's outputs, but y has "
                f"shape {tuple(y.shape)}. Use y of shape [N] for one target (y.squeeze(-1)), [N, K] for K."
            )
        return y.to(dtype)

    def check_target(self, y: Tensor, outputs: int | None = None) -> None:
        """Check the target's shape and values before anything runs.

        Args:
            y: the target ``[N]`` or ``[N, K]``.
            outputs: how many outputs the network has, where known.

        Raises:
            DataError: what is wrong and where.
        """
        name = type(self).__name__
        if not isinstance(y, Tensor):
            raise DataError(f"The target y of {name} must be a tensor, got {type(y).__name__}.")
        if y.is_complex() or not bool(torch.isfinite(y).all()):
            raise DataError(f"The target y of {name} holds NaN, infinite or complex values; remove those rows.")
        self._check_values(y, outputs)

    @abc.abstractmethod
    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        """Raise DataError unless the finite tensor y lies in the support and fits the number of outputs."""

    def _one_column(self, y: Tensor) -> None:
        if y.dim() != 1:
            raise DataError(
                f"{type(self).__name__} needs a target y of shape [N], got {tuple(y.shape)}; for a single column use "
                "y.squeeze(-1)."
            )


def one_output(f: Tensor, owner: str, instead: str) -> Tensor:
    """Outputs ``[N]`` or ``[N, 1]`` as ``[N]``.

    Raises:
        ModelError: any other shape; the message adds ``instead``.
    """
    if f.dim() == 2 and f.shape[1] == 1:
        return f[:, 0]
    if f.dim() != 1:
        raise ModelError(f"{owner} needs one output per row, the network returns shape {tuple(f.shape)}; {instead}.")
    return f


@dataclass(frozen=True)
class LocationScale(Likelihood):
    """A family on the real line with a location, the network's output, and a scale, the noise.

    Attributes:
        noise: the scale. None: the prior ``DEFAULT_NOISE``; a Pyro distribution: that prior (site "noise"); a number:
            fixed; "mle": a ``pyro.param`` "noise", fitted without a prior; "head": the network's own second output per
            target, ``softplus(raw) + 0.001``. In the units that the network sees: those of the standardised target
            when a Dataset is fitted.
    """

    noise: PositivePrior | torch.distributions.Distribution | float | str | None = field(default=None, kw_only=True)

    task: ClassVar[str] = "regression"
    scales_y: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.noise is None:
            object.__setattr__(self, "noise", DEFAULT_NOISE)
        elif isinstance(self.noise, (PositivePrior, torch.distributions.Distribution)):
            object.__setattr__(self, "noise", PositivePrior.of(self.noise, "noise"))
        elif isinstance(self.noise, str):
            if self.noise not in ("mle", "head"):
                raise ModelError(
                    f"{type(self).__name__}: noise must be None, a positive number, 'mle', 'head' or a distribution, "
                    f"got {self.noise!r}."
                )
        else:
            check_positive(type(self).__name__, "noise", self.noise)

    @abc.abstractmethod
    def family(self, loc: Tensor, scale: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """The family's distribution with no event dimension."""

    @property
    def latent_names(self) -> tuple[str, ...]:
        """The site "noise" where the noise is unknown."""
        return ("noise",) if isinstance(self.noise, PositivePrior) or self.noise == "mle" else ()

    def n_outputs(self, targets: int = 1) -> int:
        """One per target, two with a head."""
        return 2 * targets if self.noise == "head" else targets

    def latents(self, like: Tensor) -> dict[str, Tensor]:
        """The noise where it is one number: sampled, a param, or fixed."""
        if isinstance(self.noise, PositivePrior):
            return {"noise": pyro.sample("noise", self.noise.distribution(like))}
        if isinstance(self.noise, str):
            return {"noise": _noise_param(like)} if self.noise == "mle" else {}
        assert isinstance(self.noise, (int, float))
        return {"noise": torch.full((), float(self.noise), dtype=like.dtype, device=like.device)}

    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """Independent over the K targets of ``[N, K]`` outputs."""
        if f.dim() not in (1, 2):
            raise ModelError(
                f"{type(self).__name__} needs outputs of shape [N] or [N, K], the network returns {tuple(f.shape)}; "
                "end it with a Flatten and a Linear layer."
            )
        if self.noise == "head":
            loc, scale = self._head(f)
        else:
            loc, scale = f, latents["noise"]
        if loc.dim() == 1:
            return self.family(loc, scale, latents)
        if loc.shape[1] == 1:
            return self.family(loc[:, 0], scale if scale.dim() == 0 else scale[:, 0], latents)
        independent: Distribution = self.family(loc, scale, latents).to_event(1)
        return independent

    def _head(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Split ``[N, 2K]`` into K locations and K scales."""
        if f.dim() != 2 or f.shape[1] % 2:
            raise ModelError(
                f"{type(self).__name__}(noise='head') needs two outputs per target (all locations, then all raw "
                f"scales); the network returns shape {tuple(f.shape)}."
            )
        loc, raw = f.chunk(2, dim=1)
        return loc, softplus(raw) + SMALLEST_HEAD_SCALE

    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        if y.dim() not in (1, 2):
            raise DataError(f"{type(self).__name__} needs y of shape [N] or [N, K], got {tuple(y.shape)}.")
        if y.dim() == 2 and y.shape[1] == 1:
            self._one_column(y)
        columns = 1 if y.dim() == 1 else y.shape[1]
        if outputs is not None and outputs != self.n_outputs(columns):
            raise DataError(
                f"y has {columns} target column(s), for which {type(self).__name__} needs {self.n_outputs(columns)} "
                f"network output(s), but the network has {outputs}."
            )


def _noise_param(like: Tensor) -> Tensor:
    start = torch.full((), START_OF_NOISE, dtype=like.dtype, device=like.device)
    value: Tensor = pyro.param("noise", start, constraint=constraints.positive)
    return value
