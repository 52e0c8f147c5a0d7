"""Checked numbers for the bounds: everything becomes float64, and what is outside its domain is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesdl.errors import CertificateError

Array = NDArray[np.float64]
Values = float | Array | Tensor
"""What the bounds take and give back: a number, a NumPy array or a tensor, always in float64."""

EPS = float(np.finfo(np.float64).eps)


def arrays(**values: Values) -> list[Array]:
    """The arguments as float64 arrays of one common shape, refused by name when one is NaN or not a number."""
    out = []
    for name, value in values.items():
        try:
            array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise CertificateError(f"{name} must be a number or an array of numbers, got {value!r}") from error
        if np.isnan(array).any():
            raise CertificateError(f"{name} is NaN")
        out.append(array)
    try:
        return list(np.broadcast_arrays(*out))
    except ValueError as error:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(values, out, strict=True))
        raise CertificateError(f"the arguments do not broadcast against each other: {shapes}") from error


def like(result: Array, *inputs: object) -> Values:
    """The result in the kind of the inputs: a tensor if any was one, a float for scalars, an array otherwise."""
    if any(isinstance(value, Tensor) for value in inputs):
        return torch.from_numpy(np.array(result))
    return float(result) if np.ndim(result) == 0 else np.asarray(result)


def require(ok: NDArray[np.bool_], name: str, domain: str, value: Array) -> None:
    """Raise ``CertificateError`` that names the argument, its domain and its first value outside it."""
    if not np.all(ok):
        worst = float(np.asarray(value)[~np.asarray(ok)].flat[0])
        raise CertificateError(f"{name} must be {domain}, got {worst:g}")


def require_probability(name: str, value: Array) -> None:
    """A risk or a probability lies in [0, 1]."""
    require((value >= 0) & (value <= 1), name, "in [0, 1]", value)


def require_delta(delta: Array) -> None:
    """A failure probability lies strictly between 0 and 1."""
    require((delta > 0) & (delta < 1), "delta", "strictly between 0 and 1", delta)


def require_count(name: str, value: Array, least: int) -> None:
    """A count is a finite whole number that is at least ``least``."""
    ok = np.isfinite(value) & (value >= least) & (np.floor(value) == value)
    require(ok, name, f"a whole number of at least {least}", value)


def up(value: Array, relative: float | Array = 4 * EPS) -> Array:
    """A non-negative value rounded outwards: raised by ``relative`` and by one step of the float64 grid."""
    return np.asarray(np.nextafter(value * (1 + relative), np.inf))


@overload
def down(value: float, relative: float = ...) -> float: ...
@overload
def down(value: Array, relative: float = ...) -> Array: ...
def down(value: float | Array, relative: float = 4 * EPS) -> float | Array:
    """A non-negative value rounded downwards: lower bounds, and shares of delta that must not add up to more."""
    lowered = np.nextafter(np.asarray(value) * (1 - relative), 0.0)
    return float(lowered) if isinstance(value, float) else np.asarray(lowered)


def outermost(inner: Array, outer: Array, holds: Callable[[Array], NDArray[np.bool_]]) -> Array:
    """The number nearest to ``inner``, on the side of ``outer``, at which ``holds`` was seen to be true.

    ``holds`` must be false on the inner side of one threshold and true on the outer side; ``outer`` itself is taken on
    trust. Non-negative floats are ordered as their bit patterns are, so halving the integers between two patterns
    reaches neighbouring floats in at most 62 steps, whatever the magnitudes.
    """
    low = np.abs(inner).view(np.int64).copy()  # abs: -0.0 has the pattern of a negative integer
    high = np.abs(outer).view(np.int64).copy()
    while np.any(np.abs(high - low) > 1):
        middle = (low + high) >> 1
        true = holds(middle.view(np.float64))
        high, low = np.where(true, middle, high), np.where(true, low, middle)
    return np.asarray(high.view(np.float64))
