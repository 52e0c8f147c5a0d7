"""Posteriors on disk: tensors in safetensors, the rest in JSON; loading never runs code."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl import _files
from bayesdl.data import RowIds, Scaler
from bayesdl.density import LogDensity
from bayesdl.errors import DataError, FileError, MethodError, ModelMismatch, ModelRequired
from bayesdl.models import BayesianNetwork
from bayesdl.posterior import layout
from bayesdl.posterior.base import Posterior, Record
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.prior import prior_law, with_prior_law
from bayesdl.posterior.problem import Problem, changes_units

FORMAT = 2
PROBE_ROWS = 4
"""Training rows that are stored with a posterior, by which the model is recognised."""
JSON, TENSORS, NEXT = "posterior.json", "posterior.safetensors", "posterior.next.safetensors"

KINDS = {
    "draws": "bayesdl.posterior.draws:DrawsPosterior",
    "streamed": "bayesdl.posterior.streamed:StreamedPosterior",
    "functions": "bayesdl.posterior.functions:FunctionPosterior",
    "gaussian": "bayesdl.posterior.gaussian:GaussianPosterior",
    "finite": "bayesdl.posterior.finite:FinitePosterior",
    "mixture": "bayesdl.posterior.mixture:MixturePosterior",
    "dropout": "bayesdl.posterior.dropout:DropoutPosterior",
    "linearised": "bayesdl.curvature.linearised:LinearisedPosterior",
    "guide": "bayesdl.posterior.guide:GuidePosterior",
    "gp": "bayesdl.infinite.posterior:GPPosterior",
}
"""Posterior classes by the name in the file: a fixed table, so that a file can never name code to import."""


def save(posterior: Posterior, path: Path) -> Path:
    """Write ``posterior.json`` and ``posterior.safetensors`` into the folder ``path``.

    The two belong together by a hash of the tensors; draws in files of their own are copied unless they are there
    already. A save that is killed at any moment leaves the posterior that was there before, or the new one.

    Args:
        posterior: what to save.
        path: a folder; it is made if it does not exist.

    Returns:
        The folder.

    Raises:
        DataError: an argument of the program is neither a tensor nor JSON, or an entry of ``info`` is not JSON.
        MethodError: the folder already holds the draws of another run.
    """
    problem = posterior.problem
    probe, plain = _probe(problem)
    _check_json({f"The program's argument {name!r}": value for name, value in plain.items()})
    _check_json({f"posterior.info[{name!r}]": value for name, value in posterior.info.items()})
    point = _check_points(posterior)
    tensors = {f"posterior/{name}": value for name, value in posterior.tensors().items()}
    tensors |= {f"probe/{name}": value for name, value in probe.items()}
    tensors |= {f"scaler/{name}": value for name, value in problem.scaler.state().items()}
    if problem.density.new_prior is not None and (prior := prior_law(problem.density)) is not None:
        tensors |= {f"prior/{name}": value for name, value in prior.tensors().items()}
    tensors |= {"check/z": point, "check/log_density": _density(problem, {**probe, **plain}).log_density(point)}
    model: dict[str, Any] | None = None
    if isinstance(problem.model, BayesianNetwork):
        try:
            model = problem.model.config()
            tensors |= {f"constants/{name}": value for name, value in problem.model.constants().items()}
        except ModelRequired:
            model = None
    stamp = _files.stamp(tensors)
    description = {
        "format": FORMAT,
        "tensors": stamp,
        "kind": posterior.kind,
        "info": posterior.info,
        "diagnostics": posterior.stored_diagnostics(),
        "model": model,
        "dtype": str(problem.density.dtype),
        "sites": layout.describe(problem.density),
        "data": {
            "x_name": problem.x_name,
            "y_name": problem.y_name,
            "plain": plain,
            "complete": problem.complete and all(len(probe[n]) == len(problem.batch[n]) for n in problem.row_names),
            "rows": None if problem.rows is None else problem.rows.to_json(),
            "prior_rows": None if problem.prior_rows is None else problem.prior_rows.to_json(),
            "task": problem.task,
            "classes": list(problem.classes),
            "seed": problem.seed,
            "data_plate": problem.data_plate,
            "temperature": problem.density.temperature,
            "likelihood_temperature": problem.density.likelihood_temperature,
        },
    }
    posterior.write_files(path)
    # The description, which names the tensors by their hash, is the switch from the old posterior to the new one.
    _files.write_tensors(path / NEXT, tensors, stamp)
    _files.write_json(path / JSON, description)
    os.replace(path / NEXT, path / TENSORS)
    return path


def load(path: str | Path, model: Any = None) -> Posterior:
    """Read a posterior that ``Posterior.save`` wrote.

    A ``BayesianNetwork`` made of known layers, priors and likelihoods is rebuilt from the file. Any other model is code
    and comes from the caller; without it draws, summary and diagnostics can be read, and ``predict`` says what is
    missing.

    Args:
        path: the folder.
        model: the model that the posterior was fitted with.

    Raises:
        FileError: the folder holds no posterior, or a damaged one.
        ModelMismatch: the model has other sites, or other numbers on the stored probe.
    """
    folder = Path(path)
    description, tensors = _read(folder)
    try:
        kind, record, fields = _decode(description, tensors)
        problem = None
        if model is None and description["model"] is not None:
            own = BayesianNetwork.from_config(description["model"])
            own.load_constants(_part(tensors, "constants/"))
            problem = _problem(own, fields, description, tensors)
    except (FileError, ModelRequired):
        raise
    except Exception as error:  # a damaged description can fail anywhere and in any way
        raise _damaged(folder, error) from error
    if model is not None:
        try:
            problem = _problem(model, fields, description, tensors)
        except ModelMismatch:
            raise
        except Exception as error:  # so can another model
            raise ModelMismatch(
                f"The model does not run on the rows that are stored in {folder} ({type(error).__name__}: {error}). Is "
                "it the fitted one?"
            ) from error
    try:
        posterior = kind.open(folder, problem, _part(tensors, "posterior/"), description["info"])
    except (FileError, ModelRequired, ModelMismatch):
        raise
    except Exception as error:  # as above
        raise _damaged(folder, error) from error
    posterior._record = record
    return posterior


def _damaged(folder: Path, error: Exception) -> FileError:
    return FileError(
        f"{folder} does not hold a posterior of bayesdl, or a damaged one ({type(error).__name__}: {error})."
    )


def _read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The description and the tensors that belong to it."""
    description = _files.read_json(folder / JSON)
    if not isinstance(description, dict):
        raise FileError(f"{folder / JSON} does not hold a posterior of bayesdl.")
    # The second name is that of a save that was killed before its last step.
    for name in [name for name in (TENSORS, NEXT) if (folder / name).exists()] or [TENSORS]:
        tensors, header = _files.read_tensors(folder / name)
        if header == description.get("tensors") == _files.stamp(tensors):
            return description, tensors
    raise FileError(f"{folder / TENSORS} is damaged, or belongs to another posterior than {JSON} beside it.")


def _check_json(values: dict[str, Any]) -> None:
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise DataError(
                f"{name} is of type {type(value).__name__}, which a file cannot hold: give it as a tensor, a number, "
                "text, or a list of these, or let the program close over it."
            ) from None


def _check_points(posterior: Posterior) -> Tensor:
    """Two points at which the density is stored: draws, or of a posterior over functions draws from the prior."""
    try:
        return posterior.unconstrained_draws(2, seed=0)
    except MethodError:
        return posterior.problem.density.prior_draws(2, seed=0)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _probe(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A few rows of the training batch (all of them where latents are local), and its non-tensor arguments."""
    whole = not problem.density.factorised or any(site.scope == "local" for site in problem.density.sites)
    rows = {} if whole else problem.minibatch(torch.arange(min(PROBE_ROWS, problem.n)))
    batch = {**problem.batch, **rows}
    plain = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}, plain


def _density(problem: Problem, batch: dict[str, Any]) -> LogDensity:
    """The density over the probe, under the program's own prior."""
    whole = problem.density
    return LogDensity(
        problem.model,
        batch,
        data_plate=problem.data_plate,
        temperature=whole.temperature,
        likelihood_temperature=whole.likelihood_temperature,
    )


def _decode(description: Any, tensors: dict[str, Tensor]) -> tuple[type[Posterior], Record, dict[str, Any]]:
    """What the file says that does not depend on the model: kind, record, and the fields of ``Problem``."""
    if description["format"] != FORMAT:
        raise FileError(f"The posterior has format {description['format']}; this version of bayesdl reads {FORMAT}.")
    module, _, name = KINDS[description["kind"]].partition(":")
    kind: type[Posterior] = getattr(import_module(module), name)
    data = description["data"]
    fields = {
        "batch": {**_part(tensors, "probe/"), **data["plain"]},
        "scaler": Scaler.from_state(_part(tensors, "scaler/")),
        "rows": None if data["rows"] is None else RowIds.from_json(data["rows"]),
        "prior_rows": None if data["prior_rows"] is None else RowIds.from_json(data["prior_rows"]),
        "classes": tuple(data["classes"]),
        **{name: data[name] for name in ("x_name", "y_name", "task", "seed", "data_plate", "complete")},
    }
    units = "scaled" if changes_units(fields["scaler"]) else "raw"
    return kind, Record(description["sites"], units, description["diagnostics"]), fields


def _problem(model: Any, fields: dict[str, Any], description: Any, tensors: dict[str, Tensor]) -> Problem:
    options = {name: description["data"][name] for name in ("data_plate", "temperature", "likelihood_temperature")}
    density = LogDensity(model, fields["batch"], **options)
    _recognise(density, description, tensors)
    prior = _part(tensors, "prior/")
    if prior:  # learnt, or an earlier posterior
        density = with_prior_law(density, Normal.restore(prior))
    return Problem(model=model, density=density, **fields)


def _recognise(density: LogDensity, description: Any, tensors: dict[str, Tensor]) -> None:
    """Compare the model with the one that the posterior was fitted with.

    Raises:
        ModelMismatch: they differ.
    """
    got, wanted = layout.describe(density), description["sites"]
    if got != wanted:
        different = [f"{a['name']} {a['shape']} on {a['support']} instead of {b['name']} {b['shape']} on {b['support']}"
                     for a, b in zip(got, wanted, strict=False) if a != b]  # fmt: skip
        raise ModelMismatch(
            f"The model has {len(got)} latent sites, the posterior {len(wanted)}; first difference: "
            f"{different[0] if different else 'their number'}."
        )
    if str(density.dtype) != description["dtype"]:
        raise ModelMismatch(f"The model computes in {density.dtype}, the fitted one in {description['dtype']}.")
    then = tensors["check/log_density"].double()
    now = density.log_density(tensors["check/z"]).double()
    tolerance = 1e-8 if density.dtype == torch.float64 else 1e-4
    if not torch.allclose(now, then, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ModelMismatch(
            f"The model gives the log density {float(now[0]):.8g} where the fitted one gave {float(then[0]):.8g}: same "
            "sites, but another likelihood, prior, or architecture."
        )
