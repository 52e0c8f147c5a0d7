"""Several methods on one model and one data set, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bayesdl.data import Dataset
from bayesdl.errors import DataError, MethodError
from bayesdl.evaluate import Report, evaluate
from bayesdl.infer.method import Method
from bayesdl.posterior import DrawsPosterior, Posterior
from bayesdl.posterior.convergence import rhat
from bayesdl.posterior.tables import render


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        name: the data set.
        task: "regression" or "classification".
        posteriors: by label, in the order given.
        reports: metrics on the test rows, by label.
        rhat: largest R-hat of the predictions on the test rows, by label; None where there are no chains.
    """

    name: str
    task: str
    posteriors: Mapping[str, Posterior]
    reports: Mapping[str, Report]
    rhat: Mapping[str, float | None]

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """Numbers by label and column, as JSON values."""
        return {
            label: {
                **report.to_dict(),
                "rhat": self.rhat[label],
                "seconds": self.posteriors[label].info["seconds"],
            }
            for label, report in self.reports.items()
        }

    def __str__(self) -> str:
        """The table: one row a method."""
        real = self.task == "regression"
        columns = (
            ["method", "NLL", "RMSE", "coverage of 90%", "epistemic", "R-hat", "seconds"]
            if real
            else ["method", "NLL", "accuracy", "ECE", "epistemic", "R-hat", "seconds"]
        )
        rows = []
        for label, report in self.reports.items():
            worst = self.rhat[label]
            middle = [f"{report['rmse']:.3g}", f"{report['coverage']:.1%}"] if real else [
                f"{report['accuracy']:.1%}", f"{report['ece']:.3f}"
            ]  # fmt: skip
            rows.append([
                label,
                f"{report['nll']:.3f}",
                *middle,
                f"{report['epistemic_share']:.1%}",
                "-" if worst is None else f"{worst:.3f}",
                f"{self.posteriors[label].info['seconds']:.1f}",
            ])  # fmt: skip
        return render(f"{self.name}: test rows", columns, rows)


def compare(
    model: Any,
    data: Dataset,
    methods: Iterable[Method] | Mapping[str, Method],
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Comparison:
    """Fit every method on ``data.train`` and evaluate it on ``data.test``.

    The test rows are looked at once per method; choosing by this table and reporting its best number is a selection on
    them.

    Args:
        model: a Pyro program, the same for all methods.
        data: a Dataset with a current split.
        methods: methods, or methods by label where one appears twice.
        seed: seed of every fit.
        progress: whether to show progress bars; None asks the terminal.

    Raises:
        DataError: ``data`` has no train and test rows.
        MethodError: no methods, or two with one label.
    """
    if not isinstance(data, Dataset):
        raise DataError("compare needs a Dataset with train and test rows; make one with Dataset.from_arrays(...).")
    chosen = dict(methods) if isinstance(methods, Mapping) else _labelled(list(methods))
    if not chosen:
        raise MethodError("compare needs at least one method.")
    test = data.test
    posteriors: dict[str, Posterior] = {}
    reports: dict[str, Report] = {}
    worst: dict[str, float | None] = {}
    for label, method in chosen.items():
        posterior = method.fit(model, data.train, seed=seed, progress=progress)
        posteriors[label] = posterior
        reports[label] = evaluate(posterior.predict(test.x), test.y)
        worst[label] = None
        if isinstance(posterior, DrawsPosterior) and posterior.shape[1] >= 4:
            worst[label] = float(rhat(posterior.function_draws(test.x)).max())
    return Comparison(data.name, data.task, posteriors, reports, worst)


def _labelled(methods: list[Method]) -> dict[str, Method]:
    labels = [method.name for method in methods]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise MethodError(f"{sorted(twice)} appears more than once; pass a dict of labels to methods.")
    return dict(zip(labels, methods, strict=True))
