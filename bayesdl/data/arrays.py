"""The arrays of a Dataset: inputs and regression targets as float tables, the task, the names of the columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayesdl.data.checks import Array, check_finite, check_kind
from bayesdl.data.labels import check_meant_as_labels
from bayesdl.errors import DataError

Task = Literal["regression", "classification"]


def column_names(inputs: Array, given: Any) -> tuple[str, ...]:
    """The names of a table's columns, checked; x1, x2, ... where none are given."""
    if inputs.ndim > 2 or not inputs.ndim:
        return ()
    width = inputs.shape[1] if inputs.ndim == 2 else 1
    if given is None:
        return tuple(f"x{column + 1}" for column in range(width)) if inputs.ndim == 2 else ("x",)
    names = tuple(str(name) for name in given)
    if len(names) != width:
        raise DataError(f"x has {width} columns but {len(names)} names were given: {', '.join(names[:10])}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"The column name {twice[0]!r} stands for more than one column; rename one of them.")
    return names


def check_inputs(inputs: Array, names: tuple[str, ...]) -> Array:
    """Inputs as a new array of float64 or float32.

    Raises:
        DataError: no numbers, no rows or columns, or values that are not finite.
    """
    if not inputs.ndim:
        raise DataError("x is a single value; inputs are [N, ...] with one row for each target.")
    if not inputs.size:
        raise DataError(f"x has shape {inputs.shape}: no {'rows' if not len(inputs) else 'columns'}.")
    check_kind(inputs, "x", names)
    narrow = inputs.ndim > 2 and np.result_type(inputs.dtype, np.float32) == np.float32
    with np.errstate(over="ignore"):
        inputs = np.array(inputs, dtype=np.float32 if narrow else np.float64, order="C", copy=True)
    check_finite(inputs, "x", names)
    return inputs


def infer_task(targets: Array, what: str, classes: Sequence[Any] | None) -> Task:
    """Classification for known classes, whole numbers, booleans and text; regression for floats.

    Raises:
        DataError: whole numbers that look like counts or measurements.
    """
    if classes is not None:
        return "classification"
    if targets.dtype.kind in "iu" and targets.ndim == 1:
        check_meant_as_labels(targets, what)
    return "classification" if targets.dtype.kind in "biuUO" else "regression"


def regression_target(targets: Array, what: str, classes: Sequence[Any] | None) -> Tensor:
    """Targets as float64.

    Raises:
        DataError: no real numbers, values that are not finite, or classes given for a regression.
    """
    if classes is not None:
        raise DataError("classes belong to task='classification'; a regression target has none.")
    if targets.dtype.kind in "UO" and isinstance(targets.flat[0], str):
        raise DataError(f"{what} holds text, such as {str(targets.flat[0])!r}; that is task='classification'.")
    check_kind(targets, what)
    with np.errstate(over="ignore"):
        targets = np.array(targets, dtype=np.float64, order="C", copy=True)
    check_finite(targets, what)
    return torch.from_numpy(targets)
