"""Data in raw units with names, task, row identities and splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.data.arrays import Task, check_inputs, column_names, infer_task, regression_target
from bayesdl.data.checks import check_kind, near, to_array
from bayesdl.data.labels import encode_labels, is_coded
from bayesdl.data.rows import RowIds, fingerprint, row_index
from bayesdl.data.scaling import Scaler
from bayesdl.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """A division of a Dataset's rows, as positions in it: ``train`` and ``test``, int64, in the order of use."""

    train: Tensor
    test: Tensor

    def take(self, index: Tensor, n: int) -> Split:
        """The same division of the chosen rows of a set of n, in their new order."""
        role = torch.zeros(n, dtype=torch.int8)
        role[self.train], role[self.test] = 1, 2
        role = role[index]
        return Split(torch.nonzero(role == 1).flatten(), torch.nonzero(role == 2).flatten())


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and targets of one task, always in the data's own units.

    Make one with ``Dataset.from_arrays``, ``load``, ``read_csv``, ``read_uci``, ``read_idx`` or ``synthetic``. What
    those do about unusual data:

    - NaN or infinite values, no rows, no columns, x and y of different lengths, object, text, complex or date arrays,
      whole numbers beyond 2**53: ``DataError``.
    - Labels that are text, booleans or whole numbers other than 0..K-1 are encoded as 0..K-1, and ``classes`` keeps
      the originals (numbers in rising order, text in alphabetical order). Labels of one class only: ``DataError``,
      unless ``classes`` names what else could occur.
    - Constant columns are kept; ``Scaler`` gives them scale 1, so they become 0. Duplicate columns are kept as well:
      priors share the weight between them. Duplicate rows are kept and count as different rows.
    - A target column ``[N, 1]`` is read as ``[N]``.

    Attributes:
        x: ``[N, ...]`` inputs: float64 for tables, float32 for images (in [0, 1]).
        y: ``[N]`` or ``[N, K]`` targets: float64 for regression; int64 in 0..K-1 for classification, where ``[N, K]``
            means K independent yes/no labels.
        task: "regression" or "classification".
        x_names: the columns of a table; empty for inputs of more dimensions.
        y_name: the target.
        classes: the label that each code stands for; empty for regression.
        name: what the data are called in tables and messages.
        rows: the identity of each row; it survives every method below.
        splits: divisions into train and test rows by name.
        current: the name of the split behind ``train`` and ``test``; None without splits.
        shaped_by: the rows that ``standardised`` took its means and scales from, None for raw values. A certificate
            needs its rows disjoint from these.
    """

    __iter__: ClassVar[None] = None  # integer indexing alone would make Python iterate over one-row sets

    x: Tensor
    y: Tensor
    task: Task
    x_names: tuple[str, ...]
    y_name: str
    classes: tuple[str, ...]
    name: str
    rows: RowIds
    splits: Mapping[str, Split] = field(default_factory=dict)
    current: str | None = None
    shaped_by: RowIds | None = None

    def __post_init__(self) -> None:
        """Check what every Dataset keeps, however it was made.

        Raises:
            DataError: no rows, lengths that differ, or names that do not fit the columns.
        """
        if self.task not in get_args(Task):
            raise DataError(f"There is no task {self.task!r}. {near(str(self.task), get_args(Task))}")
        if not len(self.x):
            raise DataError(f"{self.name} has no rows. If a selection left none, loosen it.")
        if not len(self.x) == len(self.y) == len(self.rows):
            raise DataError(
                f"{self.name} has {len(self.x)} rows in x, {len(self.y)} in y and {len(self.rows)} identities; "
                "they must be equally many."
            )
        if self.x.ndim == 2 and len(self.x_names) != self.x.shape[1]:
            raise DataError(f"{self.name} has {self.x.shape[1]} columns but {len(self.x_names)} column names.")

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any,
        task: Task | None = None,
        *,
        name: str = "data",
        x_names: Sequence[str] | None = None,
        y_name: str | None = None,
        classes: Sequence[Any] | None = None,
        splits: Mapping[str, Split] | None = None,
    ) -> Dataset:
        """Check arrays and make a Dataset of copies of them.

        Tables (one or two dims) become float64; inputs of more dims stay float32 unless they need float64. A 1-D x
        stays 1-D: networks need columns, so give them ``x[:, None]``. The identity of the rows comes from the values,
        so equal arrays given twice are known to be the same rows.

        Args:
            x: ``[N, ...]`` numpy array, tensor, nested list, or anything with ``to_numpy`` (its column names are kept).
            y: ``[N]`` or ``[N, K]`` targets.
            task: inferred when None: floats are a regression target; whole numbers, booleans and text are classes.
                Counts need "regression".
            name: what the data are called.
            x_names: the columns; default: those of x, else x1, x2, ...
            y_name: the target; default: the name of y if it has one, else "y".
            classes: the classes in order, when y may lack some of them (a test set); whole numbers that are not
                among them are taken as codes 0..K-1.
            splits: divisions into train and test rows; the first one becomes current.

        Raises:
            DataError: see the class; the message says what is wrong, where, and what to do.
        """
        inputs = to_array(x, "x")
        names = column_names(inputs, x_names if x_names is not None else getattr(x, "columns", None))
        inputs = check_inputs(inputs, names)
        y_name = str(getattr(y, "name", None) or "y") if y_name is None else y_name
        targets = to_array(y, "y")
        if not targets.ndim or targets.ndim > 2:
            raise DataError(f"y has {targets.ndim} dimensions; targets are [N] or [N, K].")
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if len(inputs) != len(targets):
            raise DataError(f"x has {len(inputs)} rows and y has {len(targets)}; every row needs one target.")
        if not targets.size:
            raise DataError(f"y has shape {targets.shape}: there is nothing to learn.")
        what = "y" if y_name == "y" else f"y ({y_name!r})"
        labels: tuple[str, ...] = ()
        if (task or infer_task(targets, what, classes)) == "classification":
            task = "classification"
            codes, labels = encode_labels(targets, what, classes)
        elif task in (None, "regression"):
            task = "regression"
            codes = regression_target(targets, what, classes)
        else:
            raise DataError(f"There is no task {task!r}. {near(str(task), get_args(Task))}")
        tensor = torch.from_numpy(inputs)
        rows = RowIds.of(fingerprint(tensor, codes.double()), len(tensor))
        parts = dict(splits or {})
        return cls(tensor, codes, task, names, y_name, labels, name, rows, parts, next(iter(parts), None))

    @classmethod
    def concat(cls, parts: Sequence[Dataset], name: str | None = None) -> Dataset:
        """The rows of all parts one after the other, with their identities; splits are dropped.

        Raises:
            DataError: the parts differ in task, columns, classes, or in the shape of a row.
        """
        if not parts:
            raise DataError("There is nothing to concatenate: the list of parts is empty.")
        first = parts[0]
        for part in parts[1:]:
            for what, ours, theirs in (
                ("task", first.task, part.task),
                ("columns", first.x_names, part.x_names),
                ("classes", first.classes, part.classes),
                ("shape of a row", first.x.shape[1:], part.x.shape[1:]),
                ("shape of a target", first.y.shape[1:], part.y.shape[1:]),
            ):
                if ours != theirs:
                    raise DataError(f"{first.name} and {part.name} differ in {what}: {ours} and {theirs}.")
        shaping = [part.shaped_by for part in parts if part.shaped_by is not None]
        return replace(
            first,
            x=torch.cat([part.x for part in parts]),
            y=torch.cat([part.y for part in parts]),
            rows=RowIds.concat([part.rows for part in parts]),
            name=name or "+".join(dict.fromkeys(part.name for part in parts)),
            splits={},
            current=None,
            shaped_by=RowIds.concat(shaping) if shaping else None,
        )

    def __len__(self) -> int:
        """The number of rows N."""
        return len(self.x)

    def __repr__(self) -> str:
        """One line: name, task, rows, shape of a row, classes, split."""
        shape = " x ".join(map(str, self.x.shape[1:])) or "1"
        kind = f"{self.n_classes} classes" if self.classes else f"target {self.y_name!r}"
        split = f", split {self.current!r} of {len(self.splits)}" if self.current is not None else ""
        return f"Dataset({self.name!r}, {self.task}, {len(self)} rows of {shape}, {kind}{split})"

    @property
    def n_classes(self) -> int:
        """The number of classes; 0 for regression."""
        return len(self.classes)

    def subset(self, index: Any) -> Dataset:
        """The chosen rows in the given order: an int, a slice, positions (repeats allowed), or a boolean mask.

        Splits are kept for the rows that remain.

        Raises:
            DataError: no row is left, a position is out of range, or a mask has another length.
        """
        chosen = row_index(index, len(self))
        if not len(chosen):
            raise DataError(f"The selection leaves none of the {len(self)} rows of {self.name}.")
        splits = {name: split.take(chosen, len(self)) for name, split in self.splits.items()}
        return replace(self, x=self.x[chosen], y=self.y[chosen], rows=self.rows.take(chosen), splits=splits)

    __getitem__ = subset

    def shuffle(self, seed: int) -> Dataset:
        """The same rows in a random order."""
        return self.subset(torch.randperm(len(self), generator=generator(seed, "data", "shuffle")))

    @property
    def train(self) -> Dataset:
        """The training rows of the current split.

        Raises:
            DataError: there is no split, or it has no such rows here.
        """
        return self._part("train")

    @property
    def test(self) -> Dataset:
        """The test rows of the current split.

        Raises:
            DataError: there is no split, or it has no such rows here.
        """
        return self._part("test")

    def _part(self, part: Literal["train", "test"]) -> Dataset:
        if self.current is None:
            raise DataError(
                f"{self.name} has no split, so it has no .{part}. Make one: rest, held = data.holdout(0.2, seed=0)."
            )
        chosen = getattr(self.splits[self.current], part)
        if not len(chosen):
            raise DataError(f"None of these {len(self)} rows of {self.name} is a {part} row of split {self.current!r}.")
        return replace(self, splits={}, current=None).subset(chosen)

    def split(self, k: int | str) -> Dataset:
        """The same rows with another split current: the k-th, counted from 0, or the one of that name.

        Raises:
            DataError: there is no such split.
        """
        names = list(self.splits)
        if isinstance(k, int) and 0 <= k < len(names):
            return replace(self, current=names[k])
        if k in self.splits:
            return replace(self, current=str(k))
        if not names:
            raise DataError(f"{self.name} comes without splits. Make one: rest, held = data.holdout(0.2, seed=0).")
        raise DataError(f"{self.name} has no split {k!r}; it has {len(names)}: {', '.join(names)}.")

    def holdout(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Two disjoint parts: the rest, and a random fraction held out; both keep the order of the rows.

        The draw is over distinct rows, so a row that is present several times stays on one side. Splits are dropped.

        Raises:
            DataError: the fraction is not between 0 and 1, or leaves one side empty.
        """
        if not 0 < fraction < 1:
            raise DataError(f"The held-out fraction must lie between 0 and 1; got {fraction}.")
        distinct, place = self.rows.unique()
        count = round(fraction * len(distinct))
        if not 0 < count < len(distinct):
            raise DataError(
                f"Holding out {fraction} of {len(distinct)} different rows leaves one side empty; it needs at least "
                "one row on each side."
            )
        order = torch.randperm(len(distinct), generator=generator(seed, "data", "holdout"))
        held = torch.zeros(len(distinct), dtype=torch.bool)
        held[order[:count]] = True
        plain = replace(self, splits={}, current=None)
        return plain.subset(~held[place]), plain.subset(held[place])

    def standardised(self, by: Dataset | None = None) -> Dataset:
        """The data in scaled units (mean 0, standard deviation 1), for hand-written programs; see ``Scaler``.

        Inputs are scaled, and the target of a regression. The rows behind the means and scales are kept in
        ``shaped_by``.

        Args:
            by: the data that give means and scales; default: the training rows of the current split, else all rows.
        """
        if by is None:
            by = self if self.current is None else self.train
        regression = self.task == "regression"
        scaler = Scaler.fit(by.x, by.y, scale_y=regression)
        shaping = [rows for rows in (self.shaped_by, by.shaped_by, by.rows) if rows is not None]
        shaped_by = RowIds.concat(shaping).unique()[0]
        return replace(self, x=scaler.x(self.x), y=scaler.y(self.y), shaped_by=shaped_by)


def as_dataset(data: Any, task: Task | None = None) -> Dataset:
    """A Dataset as it is; a pair ``(x, y)`` checked and wrapped, its numbers unchanged.

    Args:
        data: a Dataset or a tuple of two arrays.
        task: for pairs, as in ``Dataset.from_arrays``.

    Raises:
        DataError: neither of the two, or whole numbers in y that may be labels or counts: encoding them here would
            change the numbers behind the caller's back.
    """
    if isinstance(data, Dataset):
        return data
    if not isinstance(data, tuple) or len(data) != 2:
        raise DataError(
            f"Data are a Dataset or a pair (x, y); got {type(data).__name__}. Make a Dataset with "
            "Dataset.from_arrays(x, y), load(name) or read_csv(path, target)."
        )
    x, y = data
    targets = to_array(y, "y")
    if task != "regression" and targets.ndim == 1 and targets.size and targets.dtype.kind in "iu":
        check_kind(targets, "y")
        if not is_coded(targets):
            raise DataError(
                f"y holds whole numbers ({targets.min()} to {targets.max()}) that are not the classes 0..K-1. Labels: "
                "Dataset.from_arrays(x, y, task='classification') encodes them. Counts or measurements: "
                "Dataset.from_arrays(x, y, task='regression')."
            )
    return Dataset.from_arrays(x, y, task)
