"""Class labels of any spelling as the numbers 0..K-1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.data.checks import Array, check_finite, near
from bayesdl.errors import DataError

MANY = 20  # more different whole numbers than this may be a count or a measurement instead of a label


def plain_labels(y: Array, what: str) -> Array:
    """Labels as an array of bool, whole numbers or text.

    Raises:
        DataError: fractions, NaN, empty text, complex numbers, or objects other than text.
    """
    if y.dtype.kind == "O":
        other = next(((row, item) for row, item in enumerate(y.flat) if not isinstance(item, str)), None)
        if other is not None:
            raise DataError(
                f"{what} has dtype object: entry {other[0]} holds {other[1]!r} ({type(other[1]).__name__}). Labels are "
                "whole numbers, booleans or text, all of one kind; drop the rows without a label first."
            )
        y = y.astype(str)
    if y.dtype.kind == "f":
        check_finite(y, what)
        fractions = np.flatnonzero(y.ravel() != np.floor(y.ravel()))
        if fractions.size:
            raise DataError(
                f"{what} holds {y.ravel()[fractions[0]]} at entry {fractions[0]}, which is no class label. Labels are "
                "whole numbers, booleans or text; for a measured quantity pass task='regression'."
            )
        if float(np.abs(y).max()) >= 2**63:
            raise DataError(f"{what} holds labels beyond the range of 64-bit whole numbers; give them as text.")
        y = y.astype(np.int64)
    if y.dtype.kind not in "biuU":
        raise DataError(
            f"{what} has dtype {y.dtype}, which cannot hold class labels; give whole numbers, booleans or text."
        )
    if y.dtype.kind == "U" and bool((np.char.strip(y) == "").any()):
        row = int((np.char.strip(y) == "").argmax())
        raise DataError(f"{what} holds an empty label in row {row}; drop the rows without a label.")
    return y


def encode_labels(y: Array, what: str = "y", classes: Sequence[Any] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as int64 codes and the classes that they stand for.

    Without ``classes`` the classes are the labels found, numbers in rising order and text in alphabetical order.
    With ``classes``, which may name some that y lacks (a test set), labels are looked up there as text; whole numbers
    0..K-1 that are no such text are taken as codes already.

    Args:
        y: ``[N]`` labels, or ``[N, K]`` of 0 and 1 for K independent yes/no labels.
        what: the name of y in messages.
        classes: the classes in order, when they are known.

    Returns:
        Codes of y's shape, and the classes' names.

    Raises:
        DataError: one class only, a label that is not among ``classes``, or ``[N, K]`` with other values than 0 and 1.
    """
    y = plain_labels(y, what)
    if y.ndim == 2:
        if y.dtype.kind == "U" or not bool(np.isin(y, (0, 1)).all()):
            raise DataError(
                f"{what} has {y.shape[1]} columns of labels, so every entry must be 0 or 1 (several yes/no labels). "
                "For one label of many classes give one column; for several measured targets pass task='regression'."
            )
        if not bool((y != y[0, 0]).any()):
            raise DataError(f"{what} holds {int(y[0, 0])} everywhere, so there is nothing to tell apart.")
        return torch.from_numpy(y.astype(np.int64)), ("0", "1")
    found, codes = np.unique(y, return_inverse=True)
    names = tuple(str(label) for label in found.tolist())
    if classes is None:
        if len(names) < 2:
            raise DataError(
                f"{what} holds one class only ({names[0]!r}), so there is nothing to tell apart. Check how the rows "
                "were chosen, or name the classes that could occur: Dataset.from_arrays(..., classes=[...])."
            )
        return torch.from_numpy(codes.reshape(-1).astype(np.int64)), names
    known = tuple(str(label) for label in classes)
    if len(set(known)) != len(known) or len(known) < 2:
        raise DataError(f"classes must name at least two different classes; got {list(known)}.")
    place = {label: code for code, label in enumerate(known)}
    if all(name in place for name in names):
        table = np.array([place[name] for name in names], dtype=np.int64)
        return torch.from_numpy(table[codes.reshape(-1)]), known
    if y.dtype.kind in "biu" and int(found[0]) >= 0 and int(found[-1]) < len(known):
        return torch.from_numpy(y.astype(np.int64)), known
    unknown = next(name for name in reversed(names) if name not in place)
    raise DataError(f"{what} holds the label {unknown!r}, which is not one of the classes. {near(unknown, known)}")


def is_coded(y: Array) -> bool:
    """True when y holds exactly the whole numbers 0..K-1, all of them."""
    found = np.unique(y)
    return bool((found == np.arange(len(found))).all())


def check_meant_as_labels(y: Array, what: str) -> None:
    """Ask for the task when whole numbers look like counts or measurements: many of them, with gaps or few rows each.

    Raises:
        DataError: names both tasks.
    """
    found = np.unique(y)
    k = len(found)
    consecutive = int(found[0]) in (0, 1) and int(found[-1]) - int(found[0]) == k - 1
    if k > MANY and (not consecutive or k > len(y) / 2):
        raise DataError(
            f"{what} holds {k} different whole numbers ({found[0]} to {found[-1]}) in {len(y)} rows: classes, or a "
            "count or measurement? Say which: task='classification' or task='regression'."
        )
