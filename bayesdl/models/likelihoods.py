"""Likelihoods: how a network's outputs become a distribution of the target.

Each is a small frozen dataclass. What it observes per row:

===================  ==========================  ====================================================
likelihood           network's outputs           target
===================  ==========================  ====================================================
Gaussian, StudentT   ``[N, K]``, head ``2K``     real ``[N]`` (K = 1) or ``[N, K]``
Quantile             ``[N, K]``, head ``2K``     real ``[N]`` (K = 1) or ``[N, K]``
Bernoulli            1 logit                     ``[N]`` of 0 and 1
MultiBernoulli       K logits                    ``[N, K]`` of 0 and 1
Categorical          K logits                    ``[N]`` of labels 0..K-1
Poisson              1 log rate                  ``[N]`` of counts
===================  ==========================  ====================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from bayesdl.errors import DataError, ModelError
from bayesdl.models.config import decode, encode
from bayesdl.models.distributions import AsymmetricLaplace
from bayesdl.models.likelihood import Likelihood, LocationScale, one_output
from bayesdl.models.positive import PositivePrior
from bayesdl.models.prior import check_positive, check_unit

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "LocationScale",
    "MultiBernoulli",
    "Poisson",
    "Quantile",
    "StudentT",
    "from_config",
    "to_config",
]


@dataclass(frozen=True)
class Gaussian(LocationScale):
    """``y ~ Normal(f, noise)``; per target ``-log p = (y - f)^2 / (2 noise^2) + log(2 pi noise^2) / 2``.

    The squared error is this up to the factor ``1 / (2 noise^2)`` and the constant, so it implies noise^2 = 1/2 (and
    half the squared error noise^2 = 1): as the energy of a sampler that choice is part of the model.
    """

    def family(self, loc: Tensor, scale: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """``Normal(loc, scale)``."""
        return dist.Normal(loc, scale)


@dataclass(frozen=True)
class StudentT(LocationScale):
    """``y ~ StudentT(df, f, noise)``: heavy tails, so that single outlying targets do not bend the fit.

    Attributes:
        df: degrees of freedom: a number, or a Pyro distribution as their prior (site "df").
    """

    df: PositivePrior | torch.distributions.Distribution | float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.df, (PositivePrior, torch.distributions.Distribution)):
            object.__setattr__(self, "df", PositivePrior.of(self.df, "df"))
        else:
            check_positive("StudentT", "df", self.df)

    @property
    def latent_names(self) -> tuple[str, ...]:
        """The sites "noise" and "df" where they are unknown."""
        return (*super().latent_names, *(("df",) if isinstance(self.df, PositivePrior) else ()))

    def latents(self, like: Tensor) -> dict[str, Tensor]:
        """Noise and degrees of freedom."""
        if isinstance(self.df, PositivePrior):
            return {**super().latents(like), "df": pyro.sample("df", self.df.distribution(like))}
        assert not isinstance(self.df, torch.distributions.Distribution)
        return {**super().latents(like), "df": torch.full((), float(self.df), dtype=like.dtype, device=like.device)}

    def family(self, loc: Tensor, scale: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """``StudentT(df, loc, scale)``."""
        return dist.StudentT(latents["df"], loc, scale)


@dataclass(frozen=True)
class Quantile(LocationScale):
    """``y ~ AsymmetricLaplace(f, noise, tau)``: the network is the target's tau-quantile (Yu & Moyeed, 2001).

    ``-log p = rho_tau(y - f) / noise + log noise - log tau(1 - tau)``; maximum likelihood is quantile regression.

    Attributes:
        tau: level, strictly between 0 and 1; 0.5 is the median.
    """

    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit("Quantile", "tau", self.tau)

    def family(self, loc: Tensor, scale: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """``AsymmetricLaplace(loc, scale, tau)``."""
        return AsymmetricLaplace(loc, scale, torch.full((), self.tau, dtype=loc.dtype, device=loc.device))


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """``P(y = 1) = sigmoid(f)``; ``-log p = log(1 + exp(-(2y - 1) f))``."""

    task: ClassVar[str] = "classification"

    def n_outputs(self, targets: int = 1) -> int:
        """One logit, for two classes."""
        return 1

    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """``Bernoulli(logits=f)`` with f ``[N]`` or ``[N, 1]``."""
        logits = one_output(f, "Bernoulli", "use Categorical(), or MultiBernoulli() for several yes/no targets")
        return dist.Bernoulli(logits=logits)

    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        self._one_column(y)
        _check_binary(y, "Bernoulli")


@dataclass(frozen=True)
class MultiBernoulli(Likelihood):
    """K independent yes/no targets: ``log p = sum_k t_k log p_k + (1 - t_k) log(1 - p_k)``, ``p = sigmoid(f)``.

    The second term counts: without it all logits run to infinity.
    """

    task: ClassVar[str] = "classification"

    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """``Independent(Bernoulli(logits=f), 1)`` with f ``[N, K]``."""
        if f.dim() != 2:
            raise ModelError(f"MultiBernoulli needs outputs of shape [N, K], the network returns {tuple(f.shape)}.")
        return dist.Bernoulli(logits=f).to_event(1)

    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        if y.dim() != 2 or (outputs is not None and y.shape[1] != outputs):
            wanted = "K" if outputs is None else outputs
            raise DataError(f"MultiBernoulli needs y [N, {wanted}], one column per output; got shape {tuple(y.shape)}.")
        _check_binary(y, "MultiBernoulli")


@dataclass(frozen=True)
class Categorical(Likelihood):
    """``P(y = k) = softmax(f)_k``; the gradient of ``-log p`` with respect to f is p minus the one-hot label."""

    task: ClassVar[str] = "classification"

    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """``Categorical(logits=f)`` with f ``[N, K]``, K >= 2."""
        if f.dim() != 2 or f.shape[1] < 2:
            raise ModelError(
                f"Categorical needs one output per class, shape [N, K] with K >= 2; the network returns "
                f"{tuple(f.shape)}. For two classes with one logit use Bernoulli()."
            )
        return dist.Categorical(logits=f)

    def target(self, y: Tensor, distribution: Distribution, dtype: torch.dtype) -> Tensor:
        """The labels as integers."""
        return super().target(y, distribution, torch.int64)

    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        self._one_column(y)
        if y.numel() and (_fractional(y) or y.min() < 0):
            raise DataError(
                f"Categorical needs labels 0..K-1, got values between {y.min().item()} and {y.max().item()}; "
                "Dataset.from_arrays turns any labels into these."
            )
        if outputs is not None and y.numel() and y.max() >= outputs:
            raise DataError(
                f"Label {int(y.max())} is out of range: the network has {outputs} outputs, so labels are "
                f"0..{outputs - 1}. Give the network {int(y.max()) + 1} outputs, or renumber the labels."
            )


@dataclass(frozen=True)
class Poisson(Likelihood):
    """``y ~ Poisson(exp(f))``: counts."""

    task: ClassVar[str] = "regression"

    def n_outputs(self, targets: int = 1) -> int:
        """One log rate."""
        return 1

    def distribution(self, f: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
        """``Poisson(exp(f))`` with f ``[N]`` or ``[N, 1]``."""
        return dist.Poisson(one_output(f, "Poisson", "it models one count").exp())

    def _check_values(self, y: Tensor, outputs: int | None) -> None:
        self._one_column(y)
        if y.numel() and (_fractional(y) or y.min() < 0):
            raise DataError(
                f"Poisson needs counts 0, 1, 2, ...; y holds {'negative' if y.min() < 0 else 'fractional'} values "
                f"(min {y.min().item():g}). Use Gaussian() or StudentT() for real targets."
            )


def _fractional(y: Tensor) -> bool:
    return y.is_floating_point() and bool((y != y.floor()).any())


def _check_binary(y: Tensor, owner: str) -> None:
    if not bool(((y == 0) | (y == 1)).all()):
        found = sorted({value.item() for value in y.flatten()})[:5]
        raise DataError(
            f"{owner} needs labels 0 and 1, y holds {found}; Dataset.from_arrays turns two classes of any names into "
            "these, and for more than two use Categorical()."
        )


_TABLE: dict[str, type] = {
    cls.__name__: cls
    for cls in (Gaussian, StudentT, Quantile, Bernoulli, MultiBernoulli, Categorical, Poisson, PositivePrior)
}


def to_config(likelihood: Likelihood) -> dict[str, Any]:
    """The likelihood as JSON.

    Raises:
        ModelRequired: it is a class of the user's own.
    """
    config: dict[str, Any] = encode(likelihood, _TABLE)
    return config


def from_config(config: dict[str, Any]) -> Likelihood:
    """The likelihood that ``to_config`` described.

    Raises:
        ModelRequired: the class is not known.
        FileError: the description is damaged.
    """
    likelihood: Likelihood = decode(config, _TABLE)
    return likelihood
