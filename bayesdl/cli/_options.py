"""The arguments and options that several commands share, with what ``--help`` says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayesdl.cli._rows import Encode, Missing, Rows
from bayesdl.data import Task
from bayesdl.data.bundled import BUNDLED

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help=f"A bundled set ({', '.join(BUNDLED)}), a CSV file with a header line, or a folder in the UCI layout.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The folder that `bayesdl fit --out` wrote.", show_default=False)
]
Target = Annotated[str | None, typer.Option(help="CSV: the column to predict.", show_default=False)]
EncodeAs = Annotated[
    Encode | None, typer.Option("--encode", help="CSV: turn text columns into 0/1 columns.", show_default=False)
]
MissingRows = Annotated[
    Missing | None, typer.Option("--missing", help="CSV: leave out rows with missing cells.", show_default=False)
]
TaskOf = Annotated[
    Task | None, typer.Option("--task", help="CSV: when whole numbers could be either.", show_default=False)
]
Drop = Annotated[
    list[str],
    typer.Option(
        metavar="COLUMN", help="CSV: a column to leave out; may be repeated.", default_factory=list, show_default=False
    ),
]
Hidden = Annotated[
    list[int],
    typer.Option(
        metavar="UNITS",
        help="Units of a hidden layer; repeat it for more layers.",
        default_factory=lambda: [16],
        show_default="16",
    ),
]
Activation = Annotated[str, typer.Option(help="tanh, relu, ...: what stands between the layers.")]
MethodName = Annotated[str, typer.Option("--method", help="A method in lower case, such as map, nuts or nngp.")]
Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method; may be repeated.",
        default_factory=list,
        show_default=False,
    ),
]
Holdout = Annotated[
    float | None,
    typer.Option(help="Data without a standard split: the fraction of test rows.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="The result is a function of it.")]
RowsOf = Annotated[
    Rows,
    typer.Option(
        "--rows",
        help="held-out: the test rows of a standard split, otherwise those that the posterior was not fitted on.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
