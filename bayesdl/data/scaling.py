"""Standardising inputs and targets, and undoing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.errors import DataError


def _location_scale(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (divisor n) over some dims, kept as size 1, in float64; scale 1 where constant."""
    values = values.double()
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    # Halved before they are added and divided by the largest before they are squared: no overflow, no underflow.
    middle = low / 2 + high / 2
    reach = (high / 2 - low / 2).clamp(min=torch.finfo(torch.float64).tiny)
    unit = (values - middle) / reach
    centre = unit.mean(dims, keepdim=True)
    mean = middle + reach * centre
    scale = reach * (unit - centre).square().mean(dims, keepdim=True).sqrt()
    # Equality, not a small scale, says "constant": the rounded mean of equal values may differ from them.
    constant = (low == high) | (scale < torch.finfo(torch.float64).tiny)
    return torch.where(low == high, low, mean), torch.where(constant, torch.ones_like(scale), scale)


def _dims(x: Tensor) -> tuple[int, ...]:
    """The dims pooled for one mean: the rows; for images ``[N, C, H, W, ...]`` also the positions."""
    return (0, *range(2, x.ndim)) if x.ndim >= 4 else (0,)


@dataclass(frozen=True, eq=False)
class Scaler:
    """Affine maps ``x -> (x - x_mean) / x_scale`` and ``y -> (y - y_mean) / y_scale``, fitted in float64.

    Columns of a table (and entries of ``[N, T, D]``) have their own mean and scale; images ``[N, C, H, W]`` have one
    for each channel, since a pixel that is almost always black would be blown up by its own. Constant columns have
    scale 1 and become 0. The scale is the standard deviation with divisor N.

    Attributes:
        x_mean: ``[D...]`` (``[C, 1, 1]`` for images).
        x_scale: of the same shape, positive.
        y_mean: a scalar; 0 when y is not scaled.
        y_scale: a scalar; 1 when y is not scaled. Several targets ``[N, K]`` share one mean and one scale.
    """

    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor | None = None, scale_y: bool = False) -> Scaler:
        """Mean and scale of the rows of x, and of y if ``scale_y``.

        Raises:
            DataError: no rows, or ``scale_y`` without y.
        """
        if not len(x):
            raise DataError("A scaler cannot be fitted on no rows at all.")
        mean, scale = _location_scale(x, _dims(x))
        none = cls.identity(x)
        if not scale_y:
            return cls(mean[0], scale[0], none.y_mean, none.y_scale)
        if y is None:
            raise DataError("scale_y=True needs y; pass it, or leave the target unscaled with scale_y=False.")
        y_mean, y_scale = _location_scale(y.reshape(-1), (0,))
        return cls(mean[0], scale[0], y_mean[0], y_scale[0])

    @classmethod
    def identity(cls, x: Tensor) -> Scaler:
        """The scaler that leaves everything as it is, for inputs of the shape of x."""
        shape = tuple(1 if dim in _dims(x) else size for dim, size in enumerate(x.shape))[1:]
        zeros, ones = (torch.full(shape, value, dtype=torch.float64) for value in (0.0, 1.0))
        return cls(zeros, ones, torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))

    def x(self, x: Tensor) -> Tensor:
        """Scaled inputs ``[M, D...]``, in the dtype of x (float64 if x is not floating).

        Raises:
            DataError: the columns are not those that the scaler was fitted on.
        """
        shape = tuple(x.shape[1:])
        fitted = tuple(self.x_mean.shape)
        fits = len(shape) == len(fitted) and (shape[:1] == fitted[:1] if x.ndim >= 4 else shape == fitted)
        if x.ndim < 1 or not fits:
            raise DataError(
                f"x has shape {tuple(x.shape)}, but the inputs fitted on have shape [N{_inner(fitted)}]. Give the same "
                "columns in the same order; a single row also needs its row dimension, x[None]."
            )
        return _affine(x, self.x_mean, self.x_scale)

    def y(self, y: Tensor) -> Tensor:
        """Scaled targets of the same shape; classes pass unchanged when y is not scaled."""
        return y if self._keeps_y() else _affine(y, self.y_mean, self.y_scale)

    def unscale_y(self, y: Tensor) -> Tensor:
        """Targets in the data's units again: ``y_mean + y_scale * y``."""
        if self._keeps_y():
            return y
        dtype = y.dtype if y.dtype.is_floating_point else torch.float64
        return (y.double() * self.y_scale.to(y.device) + self.y_mean.to(y.device)).to(dtype)

    def _keeps_y(self) -> bool:
        return bool((self.y_mean == 0) & (self.y_scale == 1))

    def state(self) -> dict[str, Tensor]:
        """The four tensors by name."""
        return {"x_mean": self.x_mean, "x_scale": self.x_scale, "y_mean": self.y_mean, "y_scale": self.y_scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Scaler:
        """Rebuild a scaler from ``state()``; other entries are ignored.

        Raises:
            DataError: a tensor is missing or holds what no fit gives.
        """
        missing = [name for name in ("x_mean", "x_scale", "y_mean", "y_scale") if name not in state]
        if missing:
            raise DataError(f"The scaler's state lacks {', '.join(missing)}.")
        scaler = cls(*(state[name].double() for name in ("x_mean", "x_scale", "y_mean", "y_scale")))
        sound = scaler.x_mean.shape == scaler.x_scale.shape and scaler.y_mean.ndim == scaler.y_scale.ndim == 0
        if not sound or not bool((scaler.x_scale > 0).all() & (scaler.y_scale > 0)):
            raise DataError("The scaler's state does not hold means and positive scales of matching shapes.")
        return scaler


def _affine(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """``(values - mean) / scale``, computed in float64."""
    dtype = values.dtype if values.dtype.is_floating_point else torch.float64
    return ((values.double() - mean.to(values.device)) / scale.to(values.device)).to(dtype)


def _inner(shape: tuple[int, ...]) -> str:
    return "".join(f", {size}" for size in shape)
