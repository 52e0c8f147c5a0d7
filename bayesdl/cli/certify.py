"""``bayesdl certify``: an upper bound on the expected loss that holds with a stated probability."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from bayesdl.bounds import certify as certify_posterior
from bayesdl.bounds.certify import Bound
from bayesdl.cli import _options as options
from bayesdl.cli._output import print_json
from bayesdl.cli._rows import Rows, chosen_rows, remembered
from bayesdl.posterior import load


def certify(
    folder: options.Folder,
    data: options.Data,
    rows: Annotated[
        Rows | None,
        typer.Option("--rows", help="Default: train after a fit with --prior-rows, else held-out.", show_default=False),
    ] = None,
    delta: Annotated[float, typer.Option(help="The bound fails with at most this probability.")] = 0.05,
    draws: Annotated[
        int | None, typer.Option(help="Posterior draws for the Monte-Carlo step.", show_default=False)
    ] = None,
    bound: Annotated[str, typer.Option(help=f"The theorem: {', '.join(get_args(Bound))}.", metavar="NAME")] = "auto",
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Also write the certificate as JSON, for `bayesdl verify`.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Bound the expected loss of the posterior in FOLDER.

    The bound on the loss on new rows holds with probability 1 - delta. The loss is 0-1 for classes; for regression, a
    miss of the central 90% interval.

    After a fit with --prior-rows, the bound is PAC-Bayes-kl on the training rows that shaped neither the scaler nor the
    prior. Any other posterior is bounded on rows that it was not fitted on.

    \b
    Examples:
      bayesdl fit breast_cancer --prior-rows 0.5 --out vi  &&  bayesdl certify vi breast_cancer
      bayesdl fit breast_cancer --method nuts --out nuts   &&  bayesdl certify nuts breast_cancer --delta 0.01
    """
    posterior = load(folder)
    dataset = remembered(folder).read(data)
    if rows is None:
        rows = "held-out" if posterior.problem.prior_rows is None else "train"
    certificate = certify_posterior(
        posterior, chosen_rows(dataset, rows, posterior), delta=delta, draws=draws, seed=seed, bound=cast(Bound, bound)
    )
    if out is not None:
        certificate.save(out)
    if as_json:
        print_json(certificate.to_dict())
    else:
        typer.echo(certificate)
