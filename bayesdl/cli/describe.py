"""``bayesdl describe``: what would be fitted, by what, at what cost."""

from __future__ import annotations

import typer

from bayesdl._registry import METHODS
from bayesdl.cli import _options as options
from bayesdl.cli._output import print_json
from bayesdl.cli._rows import Reading, training_rows
from bayesdl.cli._settings import build_method
from bayesdl.describe import describe as describe_model
from bayesdl.models import mlp


def describe(
    data: options.Data,
    *,
    target: options.Target = None,
    encode: options.EncodeAs = None,
    missing: options.MissingRows = None,
    task: options.TaskOf = None,
    drop: options.Drop,
    hidden: options.Hidden,
    activation: options.Activation = "tanh",
    as_json: options.Json = False,
) -> None:
    """Say what would be fitted to DATA, and at what cost.

    Unknowns, rows, what the prior expects, which methods apply and why others do not, and a forecast for each.

    \b
    Examples:
      bayesdl describe diabetes
      bayesdl describe houses.csv --target price --encode onehot --hidden 50 --activation relu
    """
    rows = training_rows(Reading(target, encode, missing, task, tuple(drop)).read(data))
    description = describe_model(mlp(rows, tuple(hidden), activation), rows, [build_method(name) for name in METHODS])
    if as_json:
        print_json(description.to_dict())
    else:
        typer.echo(rows)
        typer.echo(description)
