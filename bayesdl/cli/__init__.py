"""The command line: ``bayesdl describe | fit | predict | evaluate | certify | verify | compare``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import typer

from bayesdl.cli.certify import certify
from bayesdl.cli.compare import compare
from bayesdl.cli.describe import describe
from bayesdl.cli.evaluate import evaluate
from bayesdl.cli.fit import fit
from bayesdl.cli.predict import predict
from bayesdl.cli.verify import verify
from bayesdl.errors import BayesdlError

BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help stays plain text, so that its examples keep their lines
    help=(
        "Bayesian deep learning on tables: fit one network by any method, predict, evaluate, certify.\n\n"
        "\b\n"
        "A first round:\n"
        "  bayesdl describe diabetes                       what would be fitted, by what, at what cost\n"
        "  bayesdl fit diabetes --method nuts --out run    the posterior, saved in the folder run\n"
        "  bayesdl predict run diabetes                    mean, spread and interval of each held-out row\n"
        "  bayesdl evaluate run diabetes                   scores on the held-out rows\n"
        "  bayesdl certify run diabetes                    a bound that holds with 95% probability\n"
        "  bayesdl verify cert.json                        recompute a certificate that certify --out wrote\n"
        "  bayesdl compare diabetes                        several methods in one table\n\n"
        "Every command explains itself: bayesdl fit --help. Results go to stdout, progress and errors to stderr; "
        "the exit code is 2 for bad input."
    ),
)
for command in (describe, fit, predict, evaluate, certify, verify, compare):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: by default those of the process.

    Returns:
        The exit code: 0, 2 after bad input, 130 after an interruption.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(given)


def _run(given: list[str]) -> int:
    try:
        code = app(given or ["--help"], prog_name="bayesdl", standalone_mode=False)
    except typer.TyperException as error:  # an unknown option, a missing argument
        return _refuse(error.format_message() + " See --help.")
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()  # Python would complain there about the pipe that it cannot flush
        return 0
    except (BayesdlError, OSError) as error:
        return _refuse(str(error))
    except typer.Abort:  # how typer before 0.29 passes an interruption on
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write("bayesdl: interrupted\n")
    return code if isinstance(code, int) else 0


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line instead of the place in the code, which tells a user of the command line nothing."""
    sys.stderr.write(f"bayesdl: warning: {' '.join(str(message).split())}\n")


def _refuse(message: str) -> int:
    sys.stderr.write(f"bayesdl: error: {' '.join(message.split())}\n")
    return BAD_INPUT
