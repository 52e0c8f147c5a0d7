"""K-fold cross-validation and the bootstrap: many fits of one model, in one batch where the method allows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.data import Dataset, as_dataset
from bayesdl.errors import DataError
from bayesdl.posterior import Posterior


@dataclass(frozen=True)
class CrossValidation:
    """How well each row is predicted by the fits that did not see it.

    Attributes:
        log_density: ``[N]``, log predictive density (log probability, of classes) of the rows, in raw units.
        fold: ``[N]``, number of the fold that each row was held out in.
        method: name of the method.
    """

    log_density: Tensor
    fold: Tensor
    method: str = ""

    @property
    def elpd(self) -> float:
        """Sum of the log predictive densities."""
        return float(self.log_density.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of ``elpd`` over rows, sqrt(N) sd; it takes the rows as independent."""
        return math.sqrt(len(self.log_density)) * float(self.log_density.std())

    def difference(self, other: CrossValidation) -> tuple[float, float]:
        """``elpd`` less that of another model or method on the same rows, and the paired difference's standard error.

        Raises:
            DataError: other rows or other folds.
        """
        if not torch.equal(self.fold, other.fold):
            raise DataError("Cross-validations are compared on the same rows and folds: use the same data and seed.")
        each = self.log_density - other.log_density
        return float(each.sum()), math.sqrt(len(each)) * float(each.std())

    def __str__(self) -> str:
        """One line."""
        folds, rows = int(self.fold.max()) + 1, len(self.fold)
        mean = self.elpd / rows
        return (
            f"{folds}-fold cross-validation of {rows} rows, {self.method}: elpd {self.elpd:.1f} "
            f"(standard error {self.standard_error:.1f}), {mean:.3f} a row"
        )


def cross_validate(
    model: Any,
    data: Any,
    method: Any,
    *,
    folds: int = 10,
    seed: int = 0,
    data_plate: str = "data",
    progress: bool | None = None,
) -> CrossValidation:
    """Hold out each fold once, fit to the rest, and predict it.

    Standardisation is learnt anew on the rows of each fit. A full-batch sampler runs the folds as one batch of chains
    (two, where the number of rows is no multiple of the number of folds).

    Args:
        model: as in ``fit``.
        data: a ``Dataset`` or a pair ``(x, y)``.
        method: such as ``NUTS()``.
        folds: K.
        seed: of the folds and of the fits.
        data_plate: name of the plate over rows.
        progress: whether to show a progress bar.

    Raises:
        DataError: fewer rows than folds, or fewer than two folds.
    """
    dataset = as_dataset(data)
    rows = len(dataset)
    if not 2 <= folds <= rows:
        raise DataError(f"folds={folds} is not possible for {rows} rows: from 2 to as many as there are rows.")
    order = torch.randperm(rows, generator=_rng.generator(seed, "folds"))
    fold = torch.empty(rows, dtype=torch.int64)
    fold[order] = torch.arange(rows) % folds
    parts = [_part(data, dataset, (fold != k).nonzero()[:, 0]) for k in range(folds)]
    posteriors = method.fit_each(model, parts, seed=seed, data_plate=data_plate, progress=progress)
    found = torch.empty(rows, dtype=torch.float64)
    for k, posterior in enumerate(posteriors):
        held = (fold == k).nonzero()[:, 0]
        found[held] = posterior.predict(dataset.x[held], seed=seed).log_prob(dataset.y[held]).double()
    return CrossValidation(found, fold, method.name)


def bootstrap(
    model: Any,
    data: Any,
    method: Any,
    *,
    replicates: int = 100,
    seed: int = 0,
    data_plate: str = "data",
    progress: bool | None = None,
) -> list[Posterior]:
    """Fit to samples of the rows with replacement, of the data's size (Efron, 1979).

    The spread of a quantity over the posteriors tells how much it hangs on the rows at hand; their mixture is the
    bagged posterior.

    Args:
        model: as in ``fit``.
        data: a ``Dataset`` or a pair ``(x, y)``.
        method: such as ``NUTS()``.
        replicates: samples.
        seed: of the samples and of the fits.
        data_plate: name of the plate over rows.
        progress: whether to show a progress bar.

    Returns:
        One posterior a sample.
    """
    if replicates < 1:
        raise DataError(f"replicates={replicates} must be at least 1.")
    dataset = as_dataset(data)
    stream = _rng.generator(seed, "bootstrap")
    samples = torch.randint(len(dataset), (replicates, len(dataset)), generator=stream)
    parts = [_part(data, dataset, index) for index in samples]
    found: list[Posterior] = method.fit_each(model, parts, seed=seed, data_plate=data_plate, progress=progress)
    return found


def _part(data: Any, dataset: Dataset, index: Tensor) -> Any:
    """Some rows, in the form that the data were given in: a pair is never standardised, a Dataset is."""
    return dataset.subset(index) if isinstance(data, Dataset) else (dataset.x[index], dataset.y[index])
