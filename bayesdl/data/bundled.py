"""Small real data sets that come with scikit-learn, in raw units."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bayesdl._rng import generator
from bayesdl.data.arrays import Task
from bayesdl.data.checks import near
from bayesdl.data.dataset import Dataset, Split
from bayesdl.errors import DataError

TEST_FRACTION = 0.2


class _Bundled(NamedTuple):
    """One of scikit-learn's loaders, its options, and what the target means."""

    loader: str
    options: dict[str, bool]
    task: Task
    y_name: str


# scikit-learn's diabetes comes scaled on all its rows unless asked otherwise: that would leak the test rows.
BUNDLED = {
    "breast_cancer": _Bundled("load_breast_cancer", {}, "classification", "diagnosis"),
    "diabetes": _Bundled("load_diabetes", {"scaled": False}, "regression", "progression"),
    "digits": _Bundled("load_digits", {}, "classification", "digit"),
    "iris": _Bundled("load_iris", {}, "classification", "species"),
    "wine": _Bundled("load_wine", {}, "classification", "cultivar"),
}


def load(name: str) -> Dataset:
    """A bundled data set with a fixed split of 80% training and 20% test rows.

    | name | rows x columns | target |
    | --- | --- | --- |
    | breast_cancer | 569 x 30 | 2 classes: malignant, benign |
    | diabetes | 442 x 10 | progression of the disease after a year, 25 to 346 |
    | digits | 1797 x 64 | 10 classes, images of 8 x 8 pixels as rows of 64 |
    | iris | 150 x 4 | 3 classes |
    | wine | 178 x 13 | 3 classes |

    Raises:
        DataError: there is no such set; names them all.
    """
    if name not in BUNDLED:
        raise DataError(
            f"There is no bundled data set {name!r}. {near(str(name), BUNDLED)} Own data: read_csv(path, target)."
        )
    from sklearn import datasets

    entry = BUNDLED[name]
    bunch = getattr(datasets, entry.loader)(**entry.options)
    classes = [str(label) for label in bunch.target_names] if entry.task == "classification" else None
    order = torch.randperm(len(bunch.target), generator=generator(0, "data", "bundled split", name))
    count = round(TEST_FRACTION * len(order))
    return Dataset.from_arrays(
        bunch.data,
        bunch.target,
        entry.task,
        name=name,
        x_names=[str(column) for column in bunch.feature_names],
        y_name=entry.y_name,
        classes=classes,
        splits={"80/20": Split(train=order[count:].sort().values, test=order[:count].sort().values)},
    )
