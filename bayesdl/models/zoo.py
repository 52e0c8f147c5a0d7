"""Plain networks of the right size for a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from bayesdl._rng import isolated
from bayesdl.errors import ModelError
from bayesdl.models.layers import Erf
from bayesdl.models.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, MultiBernoulli
from bayesdl.models.network import BayesianNetwork
from bayesdl.models.priors import Normal, Prior

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "erf": Erf,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class SizedData(Protocol):
    """The part of a Dataset that decides a network's size."""

    @property
    def x(self) -> Tensor:
        """Inputs ``[N, ...]``."""

    @property
    def y(self) -> Tensor:
        """Targets ``[N]`` or ``[N, K]``."""

    @property
    def task(self) -> str:
        """Either "regression" or "classification"."""

    @property
    def n_classes(self) -> int:
        """Number of classes of a classification."""


def mlp(
    data: SizedData,
    hidden: Sequence[int] = (16,),
    activation: str = "tanh",
    prior: Prior | None = None,
    likelihood: Likelihood | None = None,
    dropout: float = 0.0,
) -> BayesianNetwork:
    """A fully connected network sized for a data set, in the dtype of its inputs.

    Args:
        data: a Dataset.
        hidden: units of each hidden layer; empty for a linear model.
        activation: one of elu, erf, gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh.
        prior: by default ``Normal("fan_in")``, with ``w_std = sqrt(2)`` for relu and leaky_relu, which halve the second
            moment, and 1 for the others: prior functions of a standardised input then have a spread of about 1.
        likelihood: by default Gaussian for regression, Bernoulli for two classes, Categorical for more, MultiBernoulli
            for several yes/no targets.
        dropout: rate of a dropout behind each hidden layer, which ``MCDropout`` switches on; 0 for none.

    Returns:
        The model; its net is a plain ``nn.Sequential``.

    Raises:
        ModelError: a setting is out of range, or the likelihood is for another task.
    """
    if activation not in ACTIVATIONS:
        raise ModelError(f"activation must be one of {', '.join(sorted(ACTIVATIONS))}; got {activation!r}.")
    if not _are_widths(hidden):
        raise ModelError(f"hidden must be a sequence of positive integers, such as (16,); got {hidden!r}.")
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout must be a rate, at least 0 and below 1; got {dropout!r}.")
    likelihood = _likelihood_for(data) if likelihood is None else likelihood
    if likelihood.task != data.task:
        raise ModelError(f"{likelihood} is for {likelihood.task}, the data are {data.task}.")
    if prior is None:
        prior = Normal("fan_in", w_std=math.sqrt(2.0) if activation in ("relu", "leaky_relu") else 1.0)
    inputs = math.prod(data.x.shape[1:])
    with isolated(0, "mlp"):
        layers: list[nn.Module] = [] if data.x.dim() == 2 else [nn.Flatten()]
        for width_in, width_out in zip((inputs, *hidden), hidden, strict=False):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[activation]()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear((inputs, *hidden)[-1], likelihood.n_outputs(_targets(data))))
    return BayesianNetwork(nn.Sequential(*layers).to(data.x.dtype), prior, likelihood)


def _are_widths(hidden: object) -> bool:
    return isinstance(hidden, Sequence) and all(type(width) is int and width > 0 for width in hidden)


def _likelihood_for(data: SizedData) -> Likelihood:
    if data.task == "regression":
        return Gaussian()
    if data.y.dim() == 2:
        return MultiBernoulli()
    return Bernoulli() if data.n_classes == 2 else Categorical()


def _targets(data: SizedData) -> int:
    """Target columns, or classes."""
    if data.y.dim() == 2:
        return data.y.shape[1]
    return 1 if data.task == "regression" else data.n_classes
