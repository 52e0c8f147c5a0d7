"""Data from the command line: a bundled name, a CSV file or a UCI folder, and which of its rows a command uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bayesdl import data as loaders
from bayesdl._files import read_json
from bayesdl.data import Dataset, Split, Task
from bayesdl.data.bundled import BUNDLED
from bayesdl.data.tables import read_names
from bayesdl.errors import DataError, FileError
from bayesdl.posterior import Posterior

NOTES = "data.json"  # beside a posterior's own files: how its data were read


Encode = Literal["onehot"]
Missing = Literal["drop"]
Rows = Literal["held-out", "train", "all"]


@dataclass(frozen=True)
class Reading:
    """How a table is read: the options of ``read_csv``, and the columns and classes that a fit found with them."""

    target: str | None = None
    encode: Encode | None = None
    missing: Missing | None = None
    task: Task | None = None
    drop: tuple[str, ...] = ()
    x_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def read(self, source: str) -> Dataset:
        """Load a bundled set by its name, else read a UCI folder or a CSV file.

        Raises:
            DataError, FileError: there is no such set or file, or it cannot be used as it is.
        """
        path = Path(source)
        if source in BUNDLED or not (path.suffix or path.exists()):
            if self.target is not None and source in BUNDLED:
                raise DataError(f"{source} is bundled and knows its own target; --target is for CSV files.")
            return loaders.load(source)
        if path.is_dir():
            return loaders.read_uci(path, self.task or "regression")
        if self.target is None:
            raise DataError(
                f"{source}: nothing says which of its columns is the target; `bayesdl fit --target NAME` says it, and "
                "notes it in the folder of the posterior."
            )
        return self._aligned(
            loaders.read_csv(path, self.target, self.encode, self.missing, self.task, drop=self.drop), source
        )

    def noted(self, data: Dataset) -> dict[str, Any]:
        """What a later command needs to read another table in the same way, as JSON values."""
        return asdict(replace(self, task=data.task, x_names=data.x_names, classes=data.classes))

    def read_inputs(self, source: str) -> torch.Tensor | None:
        """The inputs ``[N, D]`` of a CSV file that lacks the target's column; None for all other sources.

        Raises:
            DataError, FileError: the file cannot be used as it is.
        """
        path = Path(source)
        if source in BUNDLED or not path.is_file() or self.target is None or self.target in read_names(path):
            return None
        present = [name for name in self.drop if name in read_names(path)]
        x, names = loaders.read_inputs(path, self.encode, self.missing, drop=present)
        return _with_columns(x, names, self.x_names, source)

    def _aligned(self, data: Dataset, source: str) -> Dataset:
        """The data with columns and class codes as they were when the posterior was fitted."""
        if self.x_names and data.x_names != self.x_names:
            x = _with_columns(data.x, data.x_names, self.x_names, source)
            data = replace(data, x=x, x_names=self.x_names)
        if self.classes and data.classes != self.classes:
            data = _with_classes(data, self.classes, source)
        return data


def remembered(folder: Path) -> Reading:
    """How the fit in a folder read its data; the plain reading where the posterior was saved by a program.

    Raises:
        FileError: the notes are damaged.
    """
    notes = folder / NOTES
    if not notes.exists():
        return Reading()
    try:
        value = read_json(notes)
        return Reading(**(value | {name: tuple(value[name]) for name in ("drop", "x_names", "classes")}))
    except (KeyError, TypeError) as error:
        raise FileError(f"{notes} is not what `bayesdl fit` writes ({error!r}); fit again.") from None


def with_split(data: Dataset, holdout: float | None, seed: int) -> Dataset:
    """The data with a split of training and test rows: their own, or a fraction held out at random.

    Raises:
        DataError: the fraction is not possible, or the data have a standard split already.
    """
    if data.splits and holdout is not None:
        raise DataError(f"{data.name} has a standard split; --holdout is for data without one.")
    if data.splits or holdout is None:
        return data
    test = data.rows.isin(data.holdout(holdout, seed)[1].rows)
    split = Split(train=torch.nonzero(~test).flatten(), test=torch.nonzero(test).flatten())
    return replace(data, splits={"hold-out": split}, current="hold-out")


def training_rows(data: Dataset) -> Dataset:
    """The rows to fit: the training rows of the split, or all where there is none."""
    return data.train if data.splits else data


def chosen_rows(data: Dataset, rows: Rows, posterior: Posterior) -> Dataset:
    """The rows that a command is to use.

    Held out are the test rows of a standard split, or else all rows that the posterior was not fitted on.

    Raises:
        DataError: there are no such rows.
    """
    if rows == "all":
        return data
    if data.splits:
        return data.train if rows == "train" else data.test
    seen = posterior.problem.rows
    mask = torch.zeros(len(data), dtype=torch.bool) if seen is None else data.rows.isin(seen)
    if rows == "held-out":
        mask = ~mask
    if not mask.any():
        said = "was fitted on all" if rows == "held-out" else "was not fitted on any"
        raise DataError(f"The posterior {said} of the {len(data)} rows of {data.name}; choose others with --rows.")
    return data.subset(mask)


def _with_columns(x: torch.Tensor, names: Sequence[str], wanted: Sequence[str], source: str) -> torch.Tensor:
    """The columns of x in the order of the fit; a category that does not occur here is a 0/1 column of zeros."""
    unknown = [name for name in names if name not in wanted]
    missing = [name for name in wanted if name not in names and "=" not in name]
    if unknown or missing:
        raise DataError(
            f"{source} does not have the columns of the fit: missing {missing or 'none'}, unknown {unknown or 'none'}."
        )
    aligned = torch.zeros(len(x), len(wanted), dtype=x.dtype)
    for place, name in enumerate(names):
        aligned[:, wanted.index(name)] = x[:, place]
    return aligned


def _with_classes(data: Dataset, classes: tuple[str, ...], source: str) -> Dataset:
    unknown = [name for name in data.classes if name not in classes]
    if unknown:
        raise DataError(f"{source} holds classes that the fit did not know: {', '.join(unknown)}.")
    codes = torch.tensor([classes.index(name) for name in data.classes])
    return replace(data, y=codes[data.y], classes=classes)
