"""``bayesdl verify``: recompute a certificate from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayesdl.bounds.verify import main


def verify(
    certificate: Annotated[
        Path, typer.Argument(metavar="CERT", help="The file that `bayesdl certify --out` wrote.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="The rows: a CSV file, or an .npz file with x and y.", show_default=False),
    ] = None,
) -> None:
    """Recompute the certificate in CERT with 50 digits, and check its rows.

    The exit code is 0 if it holds and 1 if anything in it is wrong. The program is one file that uses nothing else of
    bayesdl, bayesdl/bounds/verify.py; it can be read, and run by itself: python verify.py cert.json --data rows.csv

    \b
    Examples:
      bayesdl certify vi breast_cancer --out cert.json  &&  bayesdl verify cert.json
      bayesdl verify cert.json --data rows.csv
    """
    raise typer.Exit(main([str(certificate), *([] if data is None else ["--data", str(data)])]))
