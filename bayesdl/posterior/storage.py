"""Posteriors on disk: tensors in safetensors, the rest in JSON; loading never runs code."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl import _files
from bayesdl.data import RowIds, Scaler
from bayesdl.density import LogDensity
from bayesdl.errors import BayesdlError, FileError, ModelMismatch, ModelRequired
from bayesdl.models import BayesianNetwork
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem

FORMAT = 1
PROBE_ROWS = 4
"""Training rows that are stored with a posterior, by which the model is recognised."""

KINDS = {
    "draws": "bayesdl.posterior.draws:DrawsPosterior",
    "gaussian": "bayesdl.posterior.gaussian:GaussianPosterior",
    "guide": "bayesdl.posterior.guide:GuidePosterior",
    "gp": "bayesdl.infinite.posterior:GPPosterior",
}
"""Posterior classes by the name in the file: a fixed table, so that a file can never name code to import."""


def save(posterior: Posterior, path: Path) -> Path:
    """Write ``posterior.json`` and ``posterior.safetensors`` into the folder ``path``, each atomically.

    Args:
        posterior: what to save.
        path: a folder; it is made if it does not exist.

    Returns:
        The folder.
    """
    problem = posterior.problem
    probe, plain = _probe(problem)
    point = posterior.unconstrained_draws(2, seed=0) if posterior.kind in ("draws", "gaussian") else None
    tensors = {f"posterior/{name}": value for name, value in posterior.tensors().items()}
    tensors |= {f"probe/{name}": value for name, value in probe.items()}
    tensors |= {f"scaler/{name}": value for name, value in problem.scaler.state().items()}
    if point is not None:
        tensors["check/z"], tensors["check/log_density"] = point, _fresh(problem, probe, plain).log_density(point)
    model: dict[str, Any] | None = None
    if isinstance(problem.model, BayesianNetwork):
        try:
            model = problem.model.config()
            tensors |= {f"constants/{name}": value for name, value in problem.model.constants().items()}
        except ModelRequired:
            model = None
    description = {
        "format": FORMAT,
        "kind": posterior.kind,
        "info": posterior.info,
        "model": model,
        "sites": _layout(problem),
        "data": {
            "x_name": problem.x_name,
            "y_name": problem.y_name,
            "plain": plain,
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
    _files.write_tensors(path / "posterior.safetensors", tensors)
    _files.write_json(path / "posterior.json", description)
    return path


def load(path: str | Path, model: Any = None) -> Posterior:
    """Read a posterior that ``Posterior.save`` wrote.

    A ``BayesianNetwork`` made of known layers, priors and likelihoods is rebuilt from the file. Any other model is code
    and comes from the caller; without it draws and statistics can be read, and ``predict`` says what is missing.

    Args:
        path: the folder.
        model: the model that the posterior was fitted with.

    Raises:
        FileError: the folder holds no posterior, or a damaged one.
        ModelMismatch: the model has other sites, or other numbers on the stored probe.
    """
    folder = Path(path)
    description = _files.read_json(folder / "posterior.json")
    tensors, _ = _files.read_tensors(folder / "posterior.safetensors")
    try:
        return _restore(description, tensors, model)
    except BayesdlError:
        raise
    except Exception as error:  # a damaged description, or another model, can fail anywhere and in any way
        reason = f"{type(error).__name__}: {error}"
        if model is not None:
            raise ModelMismatch(
                f"The model does not run on the rows that are stored in {folder} ({reason}). Is it the fitted one?"
            ) from error
        raise FileError(f"{folder} does not hold a posterior of bayesdl, or a damaged one ({reason}).") from error


def _restore(description: Any, tensors: dict[str, Tensor], model: Any) -> Posterior:
    if description["format"] != FORMAT:
        raise FileError(f"The posterior has format {description['format']}; this version of bayesdl reads {FORMAT}.")
    module, _, name = KINDS[description["kind"]].partition(":")
    kind: type[Posterior] = getattr(import_module(module), name)
    if model is None and description["model"] is not None:
        model = BayesianNetwork.from_config(description["model"])
        model.load_constants(_part(tensors, "constants/"))
    problem = None if model is None else _problem(model, description, tensors)
    return kind.restore(problem, _part(tensors, "posterior/"), description["info"], description["sites"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _layout(problem: Problem) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "shape": list(s.shape), "start": s.start, "size": s.size, "support": s.support}
        for s in problem.density.sites
    ]


def _probe(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A few rows of the training batch (all of them where latents are local), and its non-tensor arguments."""
    whole = not problem.density.factorised or any(site.scope == "local" for site in problem.density.sites)
    rows = {} if whole else problem.minibatch(torch.arange(min(PROBE_ROWS, problem.n)))
    batch = {**problem.batch, **rows}
    plain = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}, plain


def _fresh(problem: Problem, probe: dict[str, Tensor], plain: dict[str, Any]) -> LogDensity:
    return LogDensity(problem.model, {**probe, **plain}, data_plate=problem.data_plate)


def _problem(model: Any, description: dict[str, Any], tensors: dict[str, Tensor]) -> Problem:
    data = description["data"]
    batch = {**_part(tensors, "probe/"), **data["plain"]}
    options = {name: data[name] for name in ("data_plate", "temperature", "likelihood_temperature")}
    density = LogDensity(model, batch, **options)
    problem = Problem(
        model=model,
        density=density,
        batch=batch,
        x_name=data["x_name"],
        y_name=data["y_name"],
        scaler=Scaler.from_state(_part(tensors, "scaler/")),
        rows=None if data["rows"] is None else RowIds.from_json(data["rows"]),
        prior_rows=None if data["prior_rows"] is None else RowIds.from_json(data["prior_rows"]),
        task=data["task"],
        classes=tuple(data["classes"]),
        seed=data["seed"],
        data_plate=data["data_plate"],
    )
    _recognise(problem, description, tensors)
    return problem


def _recognise(problem: Problem, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Compare the model with the one that the posterior was fitted with.

    Raises:
        ModelMismatch: they differ.
    """
    got, wanted = _layout(problem), description["sites"]
    if got != wanted:
        different = [f"{a['name']} {a['shape']} instead of {b['name']} {b['shape']}"
                     for a, b in zip(got, wanted, strict=False) if a != b]  # fmt: skip
        raise ModelMismatch(
            f"The model has {len(got)} latent sites, the posterior {len(wanted)}; first difference: "
            f"{different[0] if different else 'their number'}."
        )
    if "check/z" not in tensors:
        return
    probe = {name: value for name, value in problem.batch.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in problem.batch.items() if not isinstance(value, Tensor)}
    now = _fresh(problem, probe, plain).log_density(tensors["check/z"].to(problem.density.dtype))
    then = tensors["check/log_density"]
    if not torch.allclose(now.double(), then.double(), rtol=1e-4, atol=1e-3):
        raise ModelMismatch(
            f"The model gives the log density {float(now[0]):.6g} where the fitted one gave {float(then[0]):.6g}: same "
            "sites, but another likelihood, prior, or architecture."
        )
