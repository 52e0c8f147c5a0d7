"""The layers of an infinitely wide network: what each is, and which stacks have a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.dual import Dual
from bayesdl.infinite.duals import DUALS, FAMILIES
from bayesdl.infinite.quadrature import Quadrature


@dataclass(frozen=True)
class Dense:
    """A fully connected layer: weights N(0, w_std^2 / inputs), biases N(0, b_std^2).

    Args:
        w_std: see above.
        b_std: 0 for no bias.
        fan_in: inputs of the layer in the finite network, which only the standard parameterisation's NTK needs.

    Raises:
        ModelError: w_std is not a positive number, or b_std is negative.
    """

    w_std: float = 1.0
    b_std: float = 1.0
    fan_in: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.w_std) and self.w_std > 0):
            raise ModelError(f"w_std of a layer is {self.w_std}; it must be a positive number.")
        if not (math.isfinite(self.b_std) and self.b_std >= 0):
            raise ModelError(f"b_std of a layer is {self.b_std}; it must be a number not below 0 (0: no bias).")


@dataclass(frozen=True)
class Conv(Dense):
    """A convolution: weights N(0, w_std^2 / (channels * window)), biases N(0, b_std^2); zeros around the image.

    Args:
        window: of the kernel, one number for every spatial dimension.
        stride: likewise.
        padding: zeros before and after, a pair for every spatial dimension.
        dilation: likewise.
    """

    window: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
    dilation: tuple[int, ...] = (1, 1)


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity: a name of ``duals.DUALS``, a family's name with its parameters, or any function.

    Args:
        name: "relu", "erf", ...; or "leaky_relu", "monomial", ... with ``parameters``; or a function of a tensor.
        parameters: of a family, such as ``("leaky_relu", (0.2,))``.

    Raises:
        ModelError: the name is unknown, or the family has another number of parameters.
    """

    name: str | Callable[[Tensor], Tensor]
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if callable(self.name):
            return
        if self.parameters:
            if FAMILIES.get(self.name, (0,))[0] != len(self.parameters):
                raise ModelError(f"No activation {self.name!r} takes parameters {self.parameters}.")
        elif self.name not in DUALS:
            raise ModelError(
                f"No closed-form kernel for the activation {self.name!r}; known are {', '.join(DUALS)}; pass the "
                "function itself, such as torch.tanh, for its kernel by quadrature."
            )

    @cached_property
    def dual(self) -> Dual:
        """The expectations that its kernel is made of."""
        if callable(self.name):
            return Quadrature(self.name)
        return FAMILIES[self.name][1](*self.parameters) if self.parameters else DUALS[self.name]


@dataclass(frozen=True)
class Scale:
    """Multiplication by a constant."""

    factor: float


@dataclass(frozen=True)
class Flatten:
    """All pixels of an image side by side as one vector; nothing where there are no pixels."""


@dataclass(frozen=True)
class AvgPool:
    """The mean over windows of pixels, zeros around the image counted; ``window=()`` is the mean over all pixels."""

    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LayerNorm:
    """Division by ``sqrt(variance + eps)``, the variance taken over all units (and pixels) of a row.

    The mean over units, which it subtracts, is zero in the limit, where the units are Gaussian with mean zero.
    """

    eps: float = 1e-5


@dataclass(frozen=True)
class Sum:
    """The sum of branches that start from the same place; an empty branch is the identity (a residual connection)."""

    branches: tuple[tuple[Layer, ...], ...]


Layer = Dense | Activation | Scale | Flatten | AvgPool | LayerNorm | Sum


def fully_connected(
    depth: int, activation: str | Activation = "relu", w_std: float = 1.0, b_std: float = 1.0
) -> tuple[Layer, ...]:
    """Return the layers of a network with ``depth`` equal hidden layers and a linear read-out.

    Args:
        depth: number of hidden layers; 0 is a linear model.
        activation: a name of ``duals.DUALS``, or an ``Activation``.
        w_std: weights have standard deviation ``w_std / sqrt(inputs)``.
        b_std: biases have standard deviation ``b_std``; 0 for none.

    Raises:
        ModelError: a negative depth or an unknown activation.
    """
    if depth < 0:
        raise ModelError(f"depth is {depth}; it counts hidden layers and cannot be negative.")
    phi = activation if isinstance(activation, Activation) else Activation(activation)
    hidden: tuple[Layer, ...] = (Dense(w_std, b_std), phi)
    return (*(hidden * depth), Dense(w_std, b_std))


def weighted(layers: Sequence[Layer]) -> Iterator[Dense]:
    """The layers that have weights, branches in their order."""
    for layer in layers:
        if isinstance(layer, Dense):
            yield layer
        elif isinstance(layer, Sum):
            for branch in layer.branches:
                yield from weighted(branch)


def spatial_of(layers: Sequence[Layer]) -> int:
    """Return the number of spatial dimensions that the first convolution gives the inputs; 0 for tables."""
    first = next(weighted(layers), None)
    return len(first.window) if isinstance(first, Conv) else 0


def pools(layers: Sequence[Layer]) -> bool:
    """Whether pixels are averaged somewhere, which needs the covariances between different pixels."""
    return any(
        isinstance(layer, AvgPool) or (isinstance(layer, Sum) and any(map(pools, layer.branches))) for layer in layers
    )


def check_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Check that the layers have a limit: they begin and end with random weights, and activations see Gaussian units.

    Raises:
        ModelError: the first or the last layer has no weights (a linear read-out or convolution, followed by no more
            than averages of pixels), an activation follows another, or two branches of a sum are dependent.
    """
    layers = tuple(layers)
    first = next((layer for layer in layers if not isinstance(layer, Flatten)), None)
    if not isinstance(first, Dense):
        raise ModelError("The first layer must be dense: an activation of the raw inputs has no infinite-width limit.")
    if not _gaussian(layers, False):
        raise ModelError("The last layer must be dense: only a linear read-out has a Gaussian limit.")
    return layers


def _gaussian(layers: Sequence[Layer], gaussian: bool) -> bool:
    """Whether the units are Gaussian after the layers; ``gaussian``: before them."""
    for layer in layers:
        if isinstance(layer, Dense):
            gaussian = True
        elif isinstance(layer, Sum):
            ends = [_gaussian(branch, gaussian) for branch in layer.branches]
            if sum(not _fresh(branch) for branch in layer.branches) > 1:
                raise ModelError(
                    "Two branches of a sum depend on the same units, so their covariance has no closed form; end all "
                    "but one of them with a dense layer or a convolution."
                )
            gaussian = all(ends)
        elif isinstance(layer, (Activation, LayerNorm)):
            if not gaussian:
                raise ModelError(
                    f"{type(layer).__name__} follows units that are not Gaussian in the limit (another activation, the "
                    "raw inputs); put a dense layer or a convolution between them."
                )
            gaussian = isinstance(layer, LayerNorm)
    return gaussian


def _fresh(branch: Sequence[Layer]) -> bool:
    """Whether a branch ends with weights of its own, so that it is uncorrelated with everything else."""
    for layer in reversed(branch):
        if isinstance(layer, (Dense, Activation)):
            return isinstance(layer, Dense)
        if isinstance(layer, Sum):
            return all(map(_fresh, layer.branches))
    return False


_KINDS = {kind.__name__: kind for kind in (Dense, Conv, Activation, Scale, Flatten, AvgPool, LayerNorm, Sum)}


def layers_to_json(layers: Sequence[Layer]) -> list[dict[str, Any]] | None:
    """Return the layers as JSON values, or None where an activation is a function, which is code."""
    values: list[dict[str, Any]] = []
    for layer in layers:
        name = type(layer).__name__
        if isinstance(layer, Sum):
            branches = [layers_to_json(branch) for branch in layer.branches]
            if None in branches:
                return None
            values.append({"layer": name, "branches": branches})
        elif isinstance(layer, Activation) and callable(layer.name):
            return None
        else:
            values.append({"layer": name, **{key: _lists(item) for key, item in asdict(layer).items()}})
    return values


def layers_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    """Rebuild layers from what ``layers_to_json`` returned."""
    layers: list[Layer] = []
    for value in values:
        settings = {name: _tuples(item) for name, item in value.items() if name not in ("layer", "branches")}
        if "branches" in value:
            settings["branches"] = tuple(map(layers_from_json, value["branches"]))
        layers.append(_KINDS[value["layer"]](**settings))
    return tuple(layers)


def _lists(item: Any) -> Any:
    return list(map(_lists, item)) if isinstance(item, tuple) else item


def _tuples(item: Any) -> Any:
    return tuple(map(_tuples, item)) if isinstance(item, list) else item


def with_scales(layers: Sequence[Layer], scales: Iterator[tuple[float, float]]) -> tuple[Layer, ...]:
    """Return the layers with new pairs (w_std, b_std), in the order of ``weighted``."""
    new: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Dense):
            w_std, b_std = next(scales)
            layer = replace(layer, w_std=w_std, b_std=b_std)
        elif isinstance(layer, Sum):
            layer = Sum(tuple(with_scales(branch, scales) for branch in layer.branches))
        new.append(layer)
    return tuple(new)
