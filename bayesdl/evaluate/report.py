"""One call from a prediction and the observed targets to all the scores that apply."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from bayesdl.evaluate import calibration, metrics
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.targets import CLASS_KINDS

if TYPE_CHECKING:
    from rich.table import Table

# Unit, and what the number says; in the order in which a report shows them.
_MEANING = {
    "nll": ("nats per row", "negative log predictive density; lower is better"),
    "rmse": ("units of y", "root mean squared error of the mean"),
    "mae": ("units of y", "mean absolute error of the mean"),
    "crps": ("units of y", "continuous ranked probability score; lower is better"),
    "pinball": ("units of y", "quantile loss, averaged over 5%, 25%, 50%, 75%, 95%"),
    "coverage": ("share of targets", "inside the central {level:.0%} interval; calibrated if {level:.2f}"),
    "width": ("units of y", "mean width of the central {level:.0%} interval"),
    "calibration_error": ("probability", "mean distance of PIT levels from nominal ones; 0 if calibrated"),
    "accuracy": ("share", "predicted right"),
    "brier": ("squared probability", "= reliability - resolution + uncertainty + within-bin terms"),
    "reliability": ("squared probability", "part of the Brier score; 0 if calibrated"),
    "resolution": ("squared probability", "part of the Brier score; higher is better"),
    "uncertainty": ("squared probability", "part of the Brier score that belongs to the data"),
    "ece": ("probability", "expected calibration error of the predicted class"),
    "auroc": ("probability", "a positive scores above a negative; 0.5 is chance"),
    "perplexity": ("classes", "exp(nll); the number of classes for a uniform guess"),
    "entropy": ("nats", "total uncertainty of the predicted class"),
    "mutual_information": ("nats", "epistemic part of the entropy"),
    "epistemic_share": ("share", "of the uncertainty that more data would remove"),
}


@dataclass(frozen=True)
class Report:
    """Scores of a prediction, as attributes (``report.nll``) and as keys (``report["nll"]``); prints as a table.

    Args:
        kind: Kind of the target, such as "real" or "categorical".
        rows: Number of rows scored.
        draws: Number of posterior draws in the prediction.
        level: Level of the central interval behind ``coverage`` and ``width``.
        values: The scores by name.
        notes: What is not exact, or not defined, and why.
    """

    kind: str
    rows: int
    draws: int
    level: float
    values: dict[str, float]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        try:
            return self.values[name]
        except KeyError:
            raise KeyError(self._unknown(name)) from None

    def __getattr__(self, name: str) -> float:
        # Called for names that are no fields; "values" itself is missing while a copy is being made.
        if name.startswith("_") or name == "values":
            raise AttributeError(name)
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(self._unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def keys(self) -> Iterator[str]:
        """Names of the scores; with ``report[name]`` they make ``dict(report)`` work."""
        return iter(self.values)

    def to_dict(self) -> dict[str, float]:
        """The scores by name."""
        return dict(self.values)

    def table(self) -> Table:
        """The report as a ``rich`` table."""
        from rich.table import Table

        table = Table(title=f"{self.rows} rows, {self.draws} draws, {self.kind} target", title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        table.add_column("unit")
        table.add_column("meaning")
        for name, value in self.values.items():
            unit, meaning = _MEANING[name]
            table.add_row(name, f"{value:.4g}", unit, meaning.format(level=self.level))
        if self.notes:
            table.caption = "\n".join(self.notes)
            table.caption_justify = "left"
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=120, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.values, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"no score {name!r} for a {self.kind} target; {hint}there are: {', '.join(self.values)}"


def evaluate(prediction: Prediction, y: Any, *, level: float = 0.9, seed: int = 0) -> Report:
    """All scores of a prediction that apply to its kind of target.

    Args:
        prediction: From ``posterior.predict(x)``.
        y: Observed targets, ``[N]`` (``[N, K]`` for several outputs or labels), in raw units.
        level: Level of the central interval whose coverage and width are reported.
        seed: Seed of the samples where a score has no closed form.

    Returns:
        The report; ``print(report)`` shows every score with its unit.

    Raises:
        DataError: y has another shape than the prediction, NaN, or labels out of range.
    """
    target = prediction.target(y)
    score = _scores_of_classes if prediction.kind in CLASS_KINDS else _scores_of_numbers
    values, notes = score(prediction, target, level, seed)
    return Report(prediction.kind, len(prediction), prediction.draws, level, values, tuple(notes))


def _scores_of_numbers(prediction: Prediction, y: Any, level: float, seed: int) -> tuple[dict[str, float], list[str]]:
    values = {
        "nll": metrics.nll(prediction, y),
        "rmse": metrics.rmse(prediction, y),
        "mae": metrics.mae(prediction, y),
        "crps": metrics.crps(prediction, y, seed),
        "pinball": sum(metrics.pinball(prediction, y, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)) / 5,
        "coverage": metrics.coverage(prediction, y, level),
        "width": metrics.width(prediction, level),
        "calibration_error": metrics.calibration_error(prediction, y),
        "epistemic_share": metrics.epistemic_share(prediction),
    }
    notes = []
    if metrics.crps_method(prediction) == "samples":
        notes.append(f"crps: from {metrics.SAMPLES} samples a row")
    if prediction.quantile_method == "samples":
        notes.append(f"quantiles: from samples ({prediction.family} has no closed-form cdf here)")
    if prediction.moment_method != "exact":
        notes.append(f"moments: {prediction.moment_method}")
    return values, notes


def _scores_of_classes(prediction: Prediction, y: Any, level: float, seed: int) -> tuple[dict[str, float], list[str]]:
    parts = calibration.brier_parts(prediction, y)
    values = {
        "nll": metrics.nll(prediction, y),
        "accuracy": metrics.accuracy(prediction, y),
        "brier": parts.score,
        "reliability": parts.reliability,
        "resolution": parts.resolution,
        "uncertainty": parts.uncertainty,
        "ece": calibration.ece(prediction, y),
        "auroc": metrics.auroc(prediction, y),
        "perplexity": metrics.perplexity(prediction, y),
        "entropy": metrics.predictive_entropy(prediction),
        "mutual_information": metrics.mutual_information(prediction),
        "epistemic_share": metrics.epistemic_share(prediction),
    }
    if prediction.kind == "multilabel":
        del values["perplexity"]
    missing = values["auroc"] != values["auroc"]
    return values, ["auroc: not defined, y holds a single class"] if missing else []
