"""Folders with a UCI data set and its standard splits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from bayesdl.data.arrays import Task
from bayesdl.data.checks import Array
from bayesdl.data.dataset import Dataset, Split
from bayesdl.data.files import read_bytes
from bayesdl.errors import DataError, FileError


def read_uci(folder: str | Path, task: Task | None = "regression") -> Dataset:
    """Read ``data.csv.gz`` (or ``data.csv``) and ``splits.npz`` from a folder.

    The table has no header line and its target in the last column. The splits are either the arrays ``train``
    ``[splits, n_train]`` and ``test`` ``[splits, n_test]`` of row positions, whose order is kept (Hernandez-Lobato and
    Adams, 2015), or one array ``fold`` ``[N]``: row i is a test row of split ``fold[i]``. ``data.split(k)`` makes the
    k-th split current; until then it is split 0.

    Args:
        folder: the folder; its name becomes the name of the data.
        task: "regression"; "classification" for a last column of labels; None to infer it.

    Raises:
        FileError: a file is missing or damaged.
        DataError: the table or the splits are not of that form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder; it should hold data.csv.gz and splits.npz.")
    packed = folder / "data.csv.gz"
    table_path = packed if packed.exists() or not (folder / "data.csv").exists() else folder / "data.csv"
    splits_path = folder / "splits.npz"
    table = _read_table(table_path)
    splits = _read_splits(splits_path, len(table))
    try:
        return Dataset.from_arrays(table[:, :-1], table[:, -1], task, name=folder.resolve().name, splits=splits)
    except DataError as error:
        raise DataError(f"{table_path}: {error}") from None


def _read_table(path: Path) -> Array:
    content = read_bytes(path)
    if not content.strip():
        raise DataError(f"{path} is empty; it should hold rows of numbers, the target last.")
    try:
        table: Array = np.loadtxt(io.StringIO(content.decode()), delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        raise DataError(f"{path} is not a table of numbers separated by commas, without a header: {error}.") from None
    if table.shape[1] < 2:
        raise DataError(f"{path} has one column only; it needs features and, last, the target.")
    return table


def _read_splits(path: Path, n: int) -> dict[str, Split]:
    content = read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("train", "test", "fold") if name in file.files}
    except Exception as error:  # zip, zlib, struct and header parsing each raise their own on damaged bytes
        raise FileError(f"{path} is no .npz file of plain arrays ({error}); fetch it again.") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "iu" or not array.size:
            raise DataError(f"{path}: {name} must hold whole numbers; it has dtype {array.dtype}, shape {array.shape}.")
    if set(arrays) == {"fold"}:
        return _from_folds(path, arrays["fold"], n)
    if set(arrays) == {"train", "test"}:
        return _from_positions(path, arrays["train"], arrays["test"], n)
    raise DataError(f"{path} must hold train and test, or fold alone; it holds {', '.join(arrays) or 'none of them'}.")


def _from_folds(path: Path, fold: Array, n: int) -> dict[str, Split]:
    if fold.shape != (n,):
        raise DataError(f"{path}: fold has shape {fold.shape}, but the table has {n} rows.")
    numbers = np.unique(fold)
    if len(numbers) < 2 or not np.array_equal(numbers, np.arange(len(numbers))):
        raise DataError(f"{path}: fold must hold the numbers 0 to K-1 of at least two folds; it holds {numbers[:20]}.")
    return {
        str(k): Split(torch.from_numpy(np.flatnonzero(fold != k)), torch.from_numpy(np.flatnonzero(fold == k)))
        for k in numbers.tolist()
    }


def _from_positions(path: Path, train: Array, test: Array, n: int) -> dict[str, Split]:
    if train.ndim != 2 or test.ndim != 2 or len(train) != len(test):
        raise DataError(
            f"{path}: train and test must be [splits, rows] with equally many splits; they have shapes {train.shape} "
            f"and {test.shape}."
        )
    splits = {}
    for k, (ours, theirs) in enumerate(zip(train, test, strict=True)):
        both = np.concatenate([ours, theirs]).astype(np.int64)
        if both.min() < 0 or both.max() >= n:
            raise DataError(f"{path}: split {k} names row {int(both.max())}; the table has {n} rows, 0 to {n - 1}.")
        if len(np.unique(both)) != len(both):
            raise DataError(f"{path}: split {k} names a row twice; train and test must be disjoint.")
        splits[str(k)] = Split(torch.from_numpy(both[: len(ours)].copy()), torch.from_numpy(both[len(ours) :].copy()))
    return splits
