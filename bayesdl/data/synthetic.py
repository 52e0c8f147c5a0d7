"""Seeded synthetic data whose true function and noise are known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.data.dataset import Dataset
from bayesdl.errors import DataError

GAP = (-1.0, 1.0)  # where regression_gap has no inputs, inside its range
GAP_NOISE = 0.1  # the standard deviation of regression_gap's noise


def gap_mean(x: Tensor) -> Tensor:
    """The true mean of ``regression_gap``: ``sin(2 x) + x / 2``."""
    return torch.sin(2 * x) + x / 2


def sine_line_mean(x: Tensor) -> Tensor:
    """The true mean of ``sine_line``: ``2 sin(x) + x``."""
    return 2 * torch.sin(x) + x


def regression_gap(n: int = 100, seed: int = 0) -> Dataset:
    """1-D regression with a gap, where a good posterior is less certain than near the data.

    Inputs are uniform on [-3, -1] and [1, 3], half of the rows in each; ``y = gap_mean(x) + 0.1 e`` with standard
    normal e.

    Returns:
        ``x [n, 1]``, ``y [n]``; no split (use ``holdout``).

    Raises:
        DataError: n is no whole number of at least 2.
    """
    stream = _stream(n, 0.0, seed, "regression_gap")
    side = torch.where(torch.arange(n) < n // 2, -1.0, 1.0).double()
    x = side * (GAP[1] + 2 * _uniform(n, stream))
    return _regression(x, gap_mean(x) + GAP_NOISE * _normal(n, stream), "regression_gap")


def sine_line(n: int = 40, noise: float = 0.5, seed: int = 0) -> Dataset:
    """1-D regression ``y = 2 sin(x) + x + noise e``, x uniform on [0, 5], e standard normal.

    Args:
        n: rows.
        noise: the standard deviation of the noise.
        seed: another seed, other data.

    Returns:
        ``x [n, 1]``, ``y [n]``; no split (use ``holdout``).

    Raises:
        DataError: n is no whole number of at least 2, or the noise is negative or not finite.
    """
    stream = _stream(n, noise, seed, "sine_line")
    x = 5 * _uniform(n, stream)
    return _regression(x, sine_line_mean(x) + noise * _normal(n, stream), "sine_line")


def two_moons(n: int = 200, noise: float = 0.1, seed: int = 0) -> Dataset:
    """Two interleaved half circles in the plane, one for each class.

    With t uniform on [0, pi], class 0 lies at ``(cos t, sin t)`` and class 1 at ``(1 - cos t, 1/2 - sin t)``; normal
    noise of standard deviation ``noise`` is added to both coordinates. Rows alternate between the classes.

    Returns:
        ``x [n, 2]``, ``y [n]`` in {0, 1}; no split (use ``holdout``).

    Raises:
        DataError: n is no whole number of at least 2, or the noise is negative or not finite.
    """
    stream = _stream(n, noise, seed, "two_moons")
    t = math.pi * _uniform(n, stream)
    y = torch.arange(n) % 2
    upper = torch.stack([torch.cos(t), torch.sin(t)], dim=1)
    lower = torch.stack([1 - torch.cos(t), 0.5 - torch.sin(t)], dim=1)
    centre = torch.where(y[:, None] == 0, upper, lower)
    x = centre + noise * torch.randn(n, 2, generator=stream, dtype=torch.float64)
    return Dataset.from_arrays(x, y, "classification", name="two_moons", y_name="moon", classes=["upper", "lower"])


def _stream(n: Any, noise: Any, seed: int, name: str) -> torch.Generator:
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise DataError(f"{name} needs n, a whole number of at least 2 rows; got {n!r}.")
    if not isinstance(noise, (int, float)) or not math.isfinite(noise) or noise < 0:
        raise DataError(f"{name} needs noise, a finite standard deviation of at least 0; got {noise!r}.")
    return generator(seed, "data", name)


def _uniform(n: int, stream: torch.Generator) -> Tensor:
    return torch.rand(n, generator=stream, dtype=torch.float64)


def _normal(n: int, stream: torch.Generator) -> Tensor:
    return torch.randn(n, generator=stream, dtype=torch.float64)


def _regression(x: Tensor, y: Tensor, name: str) -> Dataset:
    return Dataset.from_arrays(x[:, None], y, "regression", name=name)
