"""``bayesdl compare``: several methods on the same data, one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from bayesdl.cli import _options as options
from bayesdl.cli._output import print_json
from bayesdl.cli._rows import Reading, with_split
from bayesdl.cli._settings import build_method
from bayesdl.compare import compare as compare_methods
from bayesdl.models import mlp

TEST_FRACTION = 0.2  # of data without a standard split, unless --holdout says otherwise
METHODS = ("map", "deepensemble", "meanfieldvi", "nuts")


def compare(
    data: options.Data,
    *,
    target: options.Target = None,
    encode: options.EncodeAs = None,
    missing: options.MissingRows = None,
    task: options.TaskOf = None,
    drop: options.Drop,
    methods: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="NAME",
            help="A method in lower case; repeat it for each one to compare.",
            default_factory=lambda: list(METHODS),
            show_default=", ".join(METHODS),
        ),
    ],
    hidden: options.Hidden,
    activation: options.Activation = "tanh",
    holdout: options.Holdout = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Fit DATA by several methods and compare them.

    One table: scores on held-out rows, diagnostics, seconds.

    \b
    Examples:
      bayesdl compare diabetes
      bayesdl compare breast_cancer --method map --method nuts --method nngp --activation relu
    """
    dataset = Reading(target, encode, missing, task, tuple(drop)).read(data)
    if not dataset.splits and holdout is None:
        holdout = TEST_FRACTION
    dataset = with_split(dataset, holdout, seed)
    table = compare_methods(
        mlp(dataset, tuple(hidden), activation), dataset, [build_method(name) for name in methods], seed=seed
    )
    if as_json:
        print_json(table.to_dict())
    else:
        typer.echo(table)
