"""The layers of an infinitely wide, fully connected network, as maps of covariances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.duals import DUALS


class Covariance(NamedTuple):
    """The 2 x 2 covariance of one unit at pairs of inputs; the fields broadcast against each other.

    All three change from layer to layer and all three are carried: holding the variances at a fixed point, as the
    analysis of signal propagation does, gives another kernel.
    """

    q1: Tensor
    """Variance at the first input, ``[..., N, 1]`` for a matrix of pairs or ``[..., N]`` for row-by-row pairs."""
    q2: Tensor
    """Variance at the second input, ``[..., 1, M]`` or ``[..., N]``."""
    q12: Tensor
    """Covariance between the two, ``[..., N, M]`` or ``[..., N]``."""


@dataclass(frozen=True)
class Dense:
    """A fully connected layer: weights N(0, w_std^2 / inputs), biases N(0, b_std^2).

    Raises:
        ModelError: w_std is not a positive number, or b_std is negative.
    """

    w_std: float = 1.0
    b_std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.w_std) and self.w_std > 0):
            raise ModelError(f"w_std of a layer is {self.w_std}; it must be a positive number.")
        if not (math.isfinite(self.b_std) and self.b_std >= 0):
            raise ModelError(f"b_std of a layer is {self.b_std}; it must be a number not below 0 (0: no bias).")


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity by name: "relu", "erf" or "linear".

    Raises:
        ModelError: the name has no closed-form dual.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in DUALS:
            raise ModelError(f"No closed-form kernel for the activation {self.name!r}; known are {', '.join(DUALS)}.")


Layer = Dense | Activation


def dense(covariance: Covariance, w_var: Tensor | float, b_var: Tensor | float) -> Covariance:
    """One fully connected layer: each entry q becomes ``w_var q + b_var``."""
    return Covariance(*(w_var * q + b_var for q in covariance))


def activate(covariance: Covariance, name: str) -> Covariance:
    """One nonlinearity: each entry becomes the matching expectation of products of activations."""
    dual = DUALS[name]
    return Covariance(dual.variance(covariance.q1), dual.variance(covariance.q2), dual.covariance(*covariance))


def fully_connected(depth: int, activation: str = "relu", w_std: float = 1.0, b_std: float = 1.0) -> tuple[Layer, ...]:
    """Return the layers of a network with ``depth`` equal hidden layers and a linear read-out.

    Args:
        depth: number of hidden layers; 0 is a linear model.
        activation: "relu", "erf" or "linear".
        w_std: weights have standard deviation ``w_std / sqrt(inputs)``.
        b_std: biases have standard deviation ``b_std``; 0 for none.

    Raises:
        ModelError: a negative depth or an unknown activation.
    """
    if depth < 0:
        raise ModelError(f"depth is {depth}; it counts hidden layers and cannot be negative.")
    hidden: tuple[Layer, ...] = (Dense(w_std, b_std), Activation(activation))
    return (*(hidden * depth), Dense(w_std, b_std))


def check_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Check that the layers begin and end with a dense one, without which the output is no Gaussian process.

    Raises:
        ModelError: there is no layer, or the first or the last is not ``Dense``.
    """
    if not layers or not isinstance(layers[0], Dense):
        raise ModelError("The first layer must be dense: an activation of the raw inputs has no infinite-width limit.")
    if not isinstance(layers[-1], Dense):
        raise ModelError("The last layer must be dense: only a linear read-out has a Gaussian limit.")
    return tuple(layers)


def layers_to_json(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return the layers as JSON values."""
    return [{"layer": type(layer).__name__, **asdict(layer)} for layer in layers]


def layers_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    """Rebuild layers from what ``layers_to_json`` returned."""
    known = {"Dense": Dense, "Activation": Activation}
    return tuple(known[value["layer"]](**{k: v for k, v in value.items() if k != "layer"}) for value in values)
