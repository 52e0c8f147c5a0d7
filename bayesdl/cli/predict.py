"""``bayesdl predict``: the predictive distribution at the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bayesdl.cli import _options as options
from bayesdl.cli._output import print_csv, print_json
from bayesdl.cli._rows import chosen_rows, remembered
from bayesdl.posterior import Prediction, load


def predict(
    folder: options.Folder,
    data: options.Data,
    rows: options.RowsOf = "held-out",
    level: Annotated[float, typer.Option(help="Probability of the central interval (regression).")] = 0.9,
    as_json: options.Json = False,
) -> None:
    """Predict rows of DATA with the posterior in FOLDER.

    Prints CSV, one line a row.

    \b
    Regression: mean, sd (of which epistemic_sd is doubt about the network), and the central interval low..high.
    Classes:    the most probable label, the probability of each class, and mutual_information (nats), the doubt
                about the network.

    A CSV file is read as the fit read its own. It may lack the target; then all of its rows are predicted.

    \b
    Examples:
      bayesdl predict run diabetes > predictions.csv
      bayesdl predict run new_houses.csv --level 0.5
    """
    posterior = load(folder)
    reading = remembered(folder)
    x = reading.read_inputs(data)
    if x is None:
        x = chosen_rows(reading.read(data), rows, posterior).x
    columns = columns_of(posterior.predict(x), posterior.problem.classes, level)
    if as_json:
        names = list(columns)
        print_json([dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    else:
        print_csv(columns)


def columns_of(prediction: Prediction, classes: Sequence[str], level: float) -> dict[str, list[Any]]:
    """The columns of a prediction: moments and interval for numbers, labels and probabilities for classes."""
    if prediction.kind in ("binary", "categorical"):
        columns: dict[str, list[Any]] = {"label": [classes[code] for code in prediction.labels.tolist()]}
        for place, name in enumerate(classes):
            columns[f"p_{name}"] = prediction.probs[:, place].tolist()
        return columns | {"mutual_information": prediction.mutual_information.tolist()}
    low, high = prediction.interval(level)
    return {
        "mean": prediction.mean.tolist(),
        "sd": prediction.sd.tolist(),
        "epistemic_sd": prediction.epistemic.sqrt().tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }
