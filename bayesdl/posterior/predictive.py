"""From draws of the latents to the likelihood's own distribution at new inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pyro.distributions.distribution import Distribution
from torch import Tensor
from torch.func import vmap

from bayesdl import _rng
from bayesdl.density import program
from bayesdl.density.discovery import prior_trace
from bayesdl.errors import BayesdlError, DataError, ModelError
from bayesdl.posterior.families import CannotUnpack, Spec, pack, stack, unpack
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.problem import Problem

CELLS = 2**22
"""Draws times rows whose distributions are held; beyond that they are computed again for every statistic."""
WORKING = 2**22
"""Draws times rows times inputs a row that the program works on at once."""


def predict(
    problem: Problem,
    z: Tensor,
    inputs: Mapping[str, Any],
    *,
    site: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Prediction:
    """The mixture over posterior draws of the distribution at the target site, in raw units.

    Latents inside the data plate, and observed sites before the target whose values are not among the inputs, are
    drawn anew; the program is stopped at the target.

    Args:
        problem: model, units and layout.
        z: draws ``[S, D]``.
        inputs: the program's arguments without the target, in model units.
        site: the target; the only observed site by default.
        batch_size: rows per pass; by default so many that memory stays bounded (``CELLS``, ``WORKING``).
        seed: seed of what is drawn anew.

    Raises:
        ModelError: the program has no such site, or discrete latents outside the data plate.
        DataError: the program does not run on the inputs.
    """
    _refuse_shared_discrete(problem)
    return mixture(problem, z, inputs, site=site, batch_size=batch_size, seed=seed)


def parameters(problem: Problem, z: Tensor, inputs: Mapping[str, Any]) -> tuple[Spec, dict[str, Tensor]]:
    """The likelihood's distribution at draws, taken apart (see ``families.unpack``).

    Args:
        problem: model, units and layout.
        z: draws ``[S, D]``.
        inputs: the program's arguments without the target, in model units.

    Returns:
        How it is put together, and its parameters ``[S, N, ...]``, in model units.

    Raises:
        ModelError: the program cannot be predicted with, or draws more than the target when it is.
        DataError: the program does not run on the inputs.
        CannotUnpack: the distribution is not determined by parameters that can be read off.
    """
    _refuse_shared_discrete(problem)
    if problem.draws_anew:
        raise ModelError(
            "The program draws more than its target anew when it predicts (latents in the data plate, or several "
            "observed sites), so parameters of the likelihood do not tell its predictions."
        )
    rows = [key for key in problem.row_names if isinstance(inputs.get(key), Tensor)]
    cells = max(1, sum(inputs[key].numel() for key in rows))
    values, size = problem.density.constrain(z), max(1, WORKING // cells)
    with _rng.isolated(0, "predict", 0), torch.no_grad(), program.unchecked():
        try:
            # Not put together in between: some families would round their parameters once more.
            return _unpacked_at_draws(problem.model, inputs, values, problem.target, len(z), size)
        except BayesdlError:
            raise
        except _BEYOND_VMAP:
            return unpack(_one_by_one(problem.model, inputs, values, problem.target, len(z)))


def _refuse_shared_discrete(problem: Problem) -> None:
    structure = problem.density.structure
    if structure.discrete and not structure.by_row:
        nodes = prior_trace(problem.model, problem.batch, 0).nodes
        shared = [n for n in structure.discrete if program.plate_frame(nodes[n], structure.plate) is None]
        if shared:
            raise ModelError(
                f"The discrete latents {shared} belong to all rows. They are summed out of the density, so no draw "
                "tells their values, and the prior's would be wrong. Sum them out in the program, as a mixture."
            )


def mixture(
    problem: Problem,
    z: Tensor,
    inputs: Mapping[str, Any],
    *,
    site: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Prediction:
    """As ``predict``, for draws from the prior: discrete latents outside the data plate are drawn anew as well."""
    density = problem.density
    if site is not None and site not in density.observed:
        raise ModelError(
            f"site={site!r} is none of the sites that the program observes in its data plate: "
            f"{', '.join(density.observed) or 'none'}."
        )
    name = problem.target if site is None else site
    values = density.constrain(z)
    values = {s.name: values[s.name] for s in density.sites if s.scope != "local"}
    rows = [key for key in problem.row_names if isinstance(inputs.get(key), Tensor)]
    n = len(inputs[rows[0]]) if rows else 1
    width = max(1, sum(inputs[key][0].numel() for key in rows))
    size = max(1, min(CELLS // len(z), WORKING // width)) if batch_size is None else batch_size
    if size < 1:
        raise DataError(f"batch_size={batch_size} must be at least 1.")
    if size < n and not density.factorised:
        if batch_size is not None:
            density.require_rows()
        size = n  # such rows only make sense together
    chunk = max(1, WORKING // (width * min(size, n)))

    def block(start: int) -> Distribution:
        part = {**inputs, **{key: inputs[key][start : start + size] for key in rows}}
        with _rng.isolated(seed, "predict", start):
            return at_draws(problem.model, part, values, name, len(z), chunk)

    scale, shift = float(problem.scaler.y_scale), float(problem.scaler.y_mean)
    if len(z) * n <= CELLS or size >= n:
        parts = [Prediction(block(start), scale=scale, shift=shift) for start in range(0, n, size)]
        return Prediction.concat(parts)
    blocks = [(min(size, n - start), partial(block, start)) for start in range(0, n, size)]
    return Prediction.stream(blocks, scale=scale, shift=shift)


def at_draws(
    model: Any, inputs: Mapping[str, Any], values: Mapping[str, Tensor], site: str, draws: int, chunk: int | None = None
) -> Distribution:
    """The distribution at a site at every draw, batch shape ``[S, N]``.

    Args:
        model: the Pyro program.
        inputs: its arguments.
        values: constrained values ``[S, *shape]`` by site name; other latents are drawn anew.
        site: where to stop.
        draws: S.
        chunk: draws that the program works on at once; all if None.

    Raises:
        DataError: the program does not run on the inputs, or does not reach the site.
    """
    with torch.no_grad(), program.unchecked():
        try:
            return pack(*_unpacked_at_draws(model, inputs, values, site, draws, chunk))
        except BayesdlError:
            raise
        except _BEYOND_VMAP:
            return _one_by_one(model, inputs, values, site, draws)


# What vmap cannot run (sampling of some families, value-dependent control flow) goes draw by draw.
_BEYOND_VMAP = (CannotUnpack, RuntimeError, ValueError, NotImplementedError, TypeError, LookupError)


def _unpacked_at_draws(
    model: Any, inputs: Mapping[str, Any], values: Mapping[str, Tensor], site: str, draws: int, chunk: int | None
) -> tuple[Spec, dict[str, Tensor]]:
    found: list[Spec] = []

    def one(_: Tensor, draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spec, tensors = unpack(program.distribution_at(model, inputs, draw, site))
        found.append(spec)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    # The counter is there for programs whose latents are all drawn anew: vmap needs something to map over.
    tensors: dict[str, Tensor] = vmap(one, randomness="different", chunk_size=chunk)(torch.arange(draws), dict(values))
    return found[0], tensors


def _one_by_one(
    model: Any, inputs: Mapping[str, Any], values: Mapping[str, Tensor], site: str, draws: int
) -> Distribution:
    try:
        rows = [{name: value[s] for name, value in values.items()} for s in range(draws)]
        return stack([program.distribution_at(model, inputs, row, site) for row in rows])
    except BayesdlError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
        raise DataError(
            f"The program does not reach its site {site!r} on these inputs ({shapes}): {type(error).__name__}: {error}"
        ) from error
