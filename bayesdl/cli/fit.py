"""``bayesdl fit``: fit a network to data and save the posterior in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayesdl._files import write_json
from bayesdl.cli import _options as options
from bayesdl.cli._output import print_json, print_pairs
from bayesdl.cli._rows import NOTES, Reading, training_rows, with_split
from bayesdl.cli._settings import build_method
from bayesdl.errors import FileError
from bayesdl.infer.checkpoint import Checkpoint
from bayesdl.models import mlp

CHECKPOINT = "checkpoint"


def fit(
    data: options.Data,
    *,
    out: Annotated[Path, typer.Option(help="The folder to write; nothing is written elsewhere.", show_default=False)],
    target: options.Target = None,
    encode: options.EncodeAs = None,
    missing: options.MissingRows = None,
    task: options.TaskOf = None,
    drop: options.Drop,
    method: options.MethodName = "meanfieldvi",
    settings: options.Set,
    hidden: options.Hidden,
    activation: options.Activation = "tanh",
    seed: options.Seed = 0,
    holdout: options.Holdout = None,
    prior_rows: Annotated[
        float | None,
        typer.Option(help="Learn scaler and prior from this fraction: for a PAC-Bayes bound.", show_default=False),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Save the run's state every so many steps; the same command resumes it.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the posterior in the folder.")] = False,
    as_json: options.Json = False,
) -> None:
    """Fit a network to DATA and save the posterior.

    The network is fully connected. Where the data have a standard split, only its training rows are used.

    \b
    Examples:
      bayesdl fit diabetes --method nuts --out run
      bayesdl fit diabetes --method nuts --set warmup=500 --set chains=2 --out run
      bayesdl fit houses.csv --target price --encode onehot --missing drop --holdout 0.2 --out run
      bayesdl fit breast_cancer --prior-rows 0.5 --out run       (then: bayesdl certify run breast_cancer)
      bayesdl fit digits --hidden 50 --hidden 50 --activation relu --method map --out run
    """
    if (out / "posterior.json").exists() and not overwrite:
        raise FileError(f"{out} holds a posterior already; choose another folder, or pass --overwrite.")
    reading = Reading(target, encode, missing, task, tuple(drop))
    engine = build_method(method, settings)
    rows = training_rows(with_split(reading.read(data), holdout, seed))
    checkpoint = None if checkpoint_every is None else Checkpoint(out / CHECKPOINT, checkpoint_every)
    posterior = engine.fit(
        mlp(rows, tuple(hidden), activation), rows, seed=seed, prior_rows=prior_rows, checkpoint=checkpoint
    )
    posterior.save(out)
    write_json(out / NOTES, reading.noted(rows))
    if not posterior.info["interrupted"]:  # a finished run has nothing left to resume
        for part in out.glob(f"{CHECKPOINT}*.safetensors"):
            part.unlink()
    told = {
        "method": posterior.info["method"],
        "data": rows.name,
        "rows": len(rows),
        "seconds": round(posterior.info["seconds"], 2),
        "gradients": posterior.info["gradients"],
        "saved": str(out),
    }
    if as_json:
        print_json(told | {"settings": posterior.info["settings"], "seed": seed})
    else:
        print_pairs(told | {"next": f"bayesdl evaluate {out} {data}"})
