"""Tables in text files: a header line, one row a line, numbers and, when asked for, categories."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bayesdl.data.arrays import Task
from bayesdl.data.checks import Array, near
from bayesdl.data.dataset import Dataset
from bayesdl.data.files import read_bytes
from bayesdl.errors import DataError

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null"})  # compared in lower case, surrounding blanks removed

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE | re.ASCII)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_OPTIONS = (
    "Options: encode='onehot' turns text columns into 0/1 columns, one for each value; missing='drop' leaves out the "
    "rows with missing values; drop=['name'] leaves out a column."
)


@dataclass(frozen=True)
class _Table:
    """The cells of a file as text: names of the columns, rows, and the line on which each row ends."""

    names: list[str]
    rows: list[list[str]]
    lines: list[int]


def read_csv(
    path: str | Path,
    target: str,
    encode: Literal["onehot"] | None = None,
    missing: Literal["drop"] | None = None,
    task: Task | None = None,
    *,
    drop: Sequence[str] = (),
) -> Dataset:
    """Read a table from a text file (UTF-8, a header line, separated by commas, semicolons or tabs; gzip allowed).

    Nothing is guessed about a column that is not all numbers, or about missing cells (empty, NA, N/A, NaN, null, ?):
    without the option that says what to do they are an error. The values that a text column takes are regarded as
    fixed in advance, as its names are; they do not count as learnt from the rows.

    Args:
        path: the file.
        target: the name of the column to predict; a column of whole numbers or text holds classes, one with decimals
            a regression target, unless ``task`` says otherwise.
        encode: "onehot" replaces a text column "c" by 0/1 columns "c=value", one for each value, in sorted order.
        missing: "drop" leaves out the rows with a missing cell. Rows are counted after that.
        task: "regression" or "classification"; needed when whole numbers may be either.
        drop: columns to leave out, such as names and identifiers.

    Raises:
        FileError: the file cannot be read.
        DataError: it is no such table, a name is misspelt, cells are not usable; says where and what to do.
    """
    _check_options(encode, missing)
    try:
        if target in drop:
            raise DataError(f"{target!r} is the target and in drop; take it out of one of them.")
        table = _read(path, [target], drop, missing)
        return _to_dataset(table, target, encode, task, Path(path).name)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def read_inputs(
    path: str | Path,
    encode: Literal["onehot"] | None = None,
    missing: Literal["drop"] | None = None,
    *,
    drop: Sequence[str] = (),
) -> tuple[Tensor, tuple[str, ...]]:
    """Read rows without a target, to predict it: every column is an input.

    Args:
        path: the file, as in ``read_csv``.
        encode: as in ``read_csv``.
        missing: as in ``read_csv``.
        drop: columns to leave out.

    Returns:
        The inputs ``[N, D]`` in float64, and the names of the columns.

    Raises:
        FileError: the file cannot be read.
        DataError: as in ``read_csv``.
    """
    _check_options(encode, missing)
    try:
        names, columns = _inputs(_read(path, [], drop, missing), None, encode)
        if not columns:
            raise DataError("there is no column to predict from.")
        return torch.from_numpy(np.stack(columns, axis=1)), tuple(names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def read_names(path: str | Path) -> tuple[str, ...]:
    """The names in the header line of a text file.

    Raises:
        FileError: the file cannot be read.
        DataError: it is no table.
    """
    try:
        return tuple(_parse(read_bytes(path)).names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _check_options(encode: str | None, missing: str | None) -> None:
    for option, value, allowed in (("encode", encode, "onehot"), ("missing", missing, "drop")):
        if value not in (None, allowed):
            raise DataError(f"Tables are read with {option}=None or {option}={allowed!r}, not {value!r}.")


def _read(path: str | Path, needed: Sequence[str], drop: Sequence[str], missing: str | None) -> _Table:
    table = _parse(read_bytes(path))
    _check_names(table, [*needed, *drop])
    return _without_missing(_leave_out(table, set(drop)), missing)


def _parse(content: bytes) -> _Table:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start}); save the file as CSV in UTF-8.") from None
    if not text.strip():
        raise DataError("the file is empty; it needs a header line with the names of the columns, then the rows.")
    names: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells) and len(cells) <= 1:
                continue
            if not names:
                names = cells
            elif len(cells) != len(names):
                raise DataError(
                    f"line {reader.line_num} has {len(cells)} cells, the header has {len(names)}. Every line needs the "
                    "same number; put text that contains the separator in quotes."
                )
            else:
                rows.append(cells)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"line {lines[-1] + 1 if lines else 1} or later is not readable as CSV: {error}.") from None
    return _Table(names, rows, lines)


def _delimiter(text: str) -> str:
    """The separator that gives the header most cells; tried out, as a count would be fooled by quoted separators."""
    first = text.lstrip().splitlines()[0]
    return max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark))))


def _check_names(table: _Table, wanted: Sequence[str]) -> None:
    for column, name in enumerate(table.names):
        if not name:
            raise DataError(
                f"column {column + 1} has no name. If it is a row number written by pandas, write the file with "
                "index=False; else name it in the header line."
            )
        if table.names.index(name) != column:
            raise DataError(f"the name {name!r} stands for more than one column; rename one of them.")
    for name in wanted:
        if name not in table.names:
            bare = all(_NUMBER.fullmatch(column) for column in table.names)
            hint = " The first line holds only numbers: is the header line missing?" if bare else ""
            raise DataError(f"there is no column {name!r}. {near(str(name), table.names)}{hint}")
    if not table.rows:
        raise DataError("the file has a header line but no rows.")


def _leave_out(table: _Table, drop: set[str]) -> _Table:
    keep = [column for column, name in enumerate(table.names) if name not in drop]
    rows = [[row[column] for column in keep] for row in table.rows]
    return _Table([table.names[column] for column in keep], rows, table.lines)


def _without_missing(table: _Table, missing: str | None) -> _Table:
    complete = [not any(cell.lower() in MISSING for cell in row) for row in table.rows]
    if all(complete):
        return table
    first = complete.index(False)
    column = next(place for place, cell in enumerate(table.rows[first]) if cell.lower() in MISSING)
    where = f"the first in line {table.lines[first]}, column {table.names[column]!r}"
    if missing is None:
        raise DataError(f"{complete.count(False)} of {len(complete)} rows have missing values, {where}. {_OPTIONS}")
    if not any(complete):
        raise DataError(
            f"every row has a missing value ({where}), so missing='drop' leaves none. Leave out the column that is "
            "never filled in with drop=['name'], or fill the cells in."
        )
    rows = [row for row, whole in zip(table.rows, complete, strict=True) if whole]
    return _Table(table.names, rows, [line for line, whole in zip(table.lines, complete, strict=True) if whole])


def _to_dataset(table: _Table, target: str, encode: str | None, task: Task | None, name: str) -> Dataset:
    names, columns = _inputs(table, target, encode)
    if not columns:
        raise DataError(f"{target!r} is the only column; there is nothing to predict it from.")
    y = _target([row[table.names.index(target)] for row in table.rows], target, table)
    return Dataset.from_arrays(np.stack(columns, axis=1), y, task, name=name, x_names=names, y_name=target)


def _inputs(table: _Table, target: str | None, encode: str | None) -> tuple[list[str], list[Array]]:
    """The names and the values of all columns but the target's, text columns encoded."""
    names: list[str] = []
    columns: list[Array] = []
    texts: list[str] = []
    for place, column in enumerate(table.names):
        if column == target:
            continue
        cells = [row[place] for row in table.rows]
        if _is_numeric(cells):
            names.append(column)
            columns.append(_numbers(cells, column, table))
        elif encode is None:
            texts.append(column)
        else:
            values = _categories(cells, column)
            names.extend(f"{column}={value}" for value in values)
            columns.extend(np.array([cell == value for cell in cells], dtype=np.float64) for value in values)
    if texts:
        cells = [row[table.names.index(texts[0])] for row in table.rows]
        first = next(row for row, cell in enumerate(cells) if not _NUMBER.fullmatch(cell))
        raise DataError(
            f"{'column' if len(texts) == 1 else 'columns'} {', '.join(map(repr, texts))} "
            f"{'holds' if len(texts) == 1 else 'hold'} text, such as {cells[first]!r} in line {table.lines[first]}. "
            f"{_OPTIONS}"
        )
    return names, columns


def _is_numeric(cells: list[str]) -> bool:
    return all(_NUMBER.fullmatch(cell) for cell in cells)


def _numbers(cells: list[str], column: str, table: _Table) -> Array:
    values = np.array([float(cell) for cell in cells], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(
            f"{bad.size} infinite values, the first, {cells[bad[0]]!r}, in line {table.lines[bad[0]]}, column "
            f"{column!r}. Correct them, or clear these cells and pass missing='drop'."
        )
    return values


def _target(cells: list[str], target: str, table: _Table) -> Array:
    """The target as whole numbers, floats or text, whichever holds all of them."""
    if all(_WHOLE.fullmatch(cell) for cell in cells) and all(abs(int(cell)) < 2**63 for cell in cells):
        return np.array([int(cell) for cell in cells], dtype=np.int64)
    if _is_numeric(cells):
        return _numbers(cells, target, table)
    return np.array(cells)


def _categories(cells: list[str], column: str) -> list[str]:
    """The different values of a text column.

    Raises:
        DataError: so many that the column is an identifier, free text, or numbers spelt in another way.
    """
    values = sorted(set(cells))
    if len(values) > max(20, math.ceil(len(cells) / 2)):
        raise DataError(
            f"column {column!r} holds {len(values)} different texts in {len(cells)} rows, such as {cells[0]!r}: no "
            f"category but a name, free text, or numbers that are not written like 1234.5. Leave it out with "
            f"drop=[{column!r}], or correct it."
        )
    return values
