"""``bayesdl evaluate``: scores of a posterior on rows with known targets."""

from __future__ import annotations

import typer

from bayesdl.cli import _options as options
from bayesdl.cli._output import print_json
from bayesdl.cli._rows import chosen_rows, remembered
from bayesdl.evaluate import evaluate as score
from bayesdl.posterior import load


def evaluate(
    folder: options.Folder,
    data: options.Data,
    rows: options.RowsOf = "held-out",
    as_json: options.Json = False,
) -> None:
    """Score the posterior in FOLDER on rows of DATA.

    A CSV file is read as the fit read its own: same target, same encoding.

    \b
    Examples:
      bayesdl evaluate run diabetes
      bayesdl evaluate run diabetes --rows train --json
      bayesdl evaluate run more_houses.csv --rows all
    """
    posterior = load(folder)
    selected = chosen_rows(remembered(folder).read(data), rows, posterior)
    report = score(posterior.predict(selected.x), selected.y)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report)
