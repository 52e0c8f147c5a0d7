"""What every way into a Dataset checks: kinds of numbers, shapes, finite values, names with their close matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesdl.errors import DataError

Array = npt.NDArray[Any]

LARGEST_EXACT = 2**53  # float64 skips whole numbers above this one

_REFUSED = {
    "U": "text; numbers are needed (read_csv(..., encode='onehot') turns text columns into 0/1 columns)",
    "S": "bytes; decode them to text or convert them to numbers",
    "c": "complex numbers; give the real and the imaginary part as two columns",
    "M": "dates; give them as numbers, such as days since the first one",
    "m": "time spans; give them as numbers of one unit",
    "V": "records with fields; give a plain table of numbers",
}


def near(name: str, options: Iterable[str]) -> str:
    """A sentence that names the option closest to a misspelt name, or lists them all when none is close."""
    known = list(options)
    folded = {option.casefold(): option for option in known}
    match = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    listed = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
    return (f"Did you mean {folded[match[0]]!r}? " if match else "") + f"There are: {listed}."


def to_array(value: Any, what: str) -> Array:
    """Any array-like (numpy, torch, lists, anything with ``to_numpy``) as a numpy array that owns no torch graph.

    Args:
        value: the array-like.
        what: its name in messages, such as "x".

    Raises:
        DataError: the value is sparse, ragged, or no array at all.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        shapes = {tuple(item.shape) for item in value}
        if len(shapes) > 1:
            raise DataError(f"{what} is a list of tensors of different shapes {sorted(shapes)}; its rows must agree.")
        value = torch.stack(list(value))
    if isinstance(value, Tensor):
        return _from_tensor(value, what)
    if isinstance(value, np.ma.MaskedArray) and value.dtype.kind in "biuf":
        value = np.ma.filled(value.astype(np.float64), np.nan) if np.ma.is_masked(value) else value.data
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    elif hasattr(value, "toarray"):
        raise DataError(f"{what} is a sparse matrix ({type(value).__name__}); pass a dense one: {what}.toarray().")
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{what} is not an array ({error}); give a table whose rows all have the same length."
        ) from None


def _from_tensor(value: Tensor, what: str) -> Array:
    if value.layout is not torch.strided:
        raise DataError(f"{what} is a sparse tensor; pass a dense one: {what}.to_dense().")
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        value = value.float()
    return np.asarray(value.resolve_conj().resolve_neg().numpy())


def check_kind(array: Array, what: str, names: Sequence[str] = ()) -> None:
    """Refuse every kind of array that is not made of real numbers.

    Raises:
        DataError: object, text, complex, date or record arrays, and whole numbers that float64 cannot hold.
    """
    if array.dtype.kind == "O":
        raise DataError(_object_message(array, what, names))
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} holds {_REFUSED.get(array.dtype.kind, f'values of type {array.dtype}')}.")
    if array.dtype.kind in "iu" and array.size:
        far = int(array.max()) if int(array.max()) > LARGEST_EXACT else int(array.min())
        if abs(far) > LARGEST_EXACT:
            raise DataError(
                f"{what} holds the whole number {far}, beyond 2**53, which float64 cannot hold exactly. "
                "It is probably an identifier: leave that column out, or shift and scale it first."
            )


def _object_message(array: Array, what: str, names: Sequence[str]) -> str:
    for position in np.ndindex(array.shape):
        item: Any = array[position]
        if isinstance(item, bool) or not isinstance(item, (int, float, np.number)):
            break
    else:
        return f"{what} has dtype object (mixed or oversized numbers); convert it to floats first."
    return (
        f"{what} has dtype object: {place(position, names)} holds {item!r} ({type(item).__name__}), which is no "
        "number. Convert, encode or drop such columns first; read_csv(..., encode='onehot', missing='drop') does "
        "it for a file."
    )


def place(position: Sequence[int], names: Sequence[str] = ()) -> str:
    """Where an entry stands, in words: its row, its column, and the column's name (both counted from 0)."""
    if len(position) < 2:
        return f"row {position[0]}" if position else "the value"
    if len(position) == 2:
        name = f" ({names[position[1]]!r})" if len(names) > position[1] else ""
        return f"row {position[0]}, column {position[1]}{name}"
    return f"row {position[0]}, entry {tuple(int(entry) for entry in position[1:])}"


def check_finite(array: Array, what: str, names: Sequence[str] = ()) -> None:
    """Refuse NaN and infinite values.

    Raises:
        DataError: says how many there are, where the first one is, and what to do.
    """
    bad = ~np.isfinite(array)
    count = int(bad.sum())
    if not count:
        return
    position = tuple(int(entry) for entry in np.unravel_index(int(bad.argmax()), array.shape))
    plural = "value that is" if count == 1 else "values that are"
    raise DataError(
        f"{what} holds {count} {plural} not finite (NaN or infinite); the first is {array[position]} in "
        f"{place(position, names)}. Drop these rows or fill them in first; read_csv(..., missing='drop') drops the "
        "incomplete rows of a file."
    )
