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
from bayesdl.errors import BayesdlError, DataError, ModelError
from bayesdl.posterior.families import CannotUnpack, Spec, pack, stack, unpack
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.problem import Problem

CELLS = 2**22
"""Draws times rows that one pass of the program holds at once, where the caller gives no batch size."""


def predict(
    problem: Problem,
    z: Tensor,
    inputs: Mapping[str, Any],
    *,
    site: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Prediction:
    """The mixture over draws of the distribution at the target site, in raw units.

    Latents inside the data plate, and observed sites before the target, are drawn anew; the program is stopped at the
    target.

    Args:
        problem: model, units and layout.
        z: draws ``[S, D]``.
        inputs: the program's arguments without the target, in model units.
        site: the target; the only observed site by default.
        batch_size: rows per pass; by default so many that draws times rows stay below ``CELLS``.
        seed: seed of what is drawn anew.
    """
    if site is not None and site not in problem.density.observed:
        raise ModelError(
            f"site={site!r} is none of the sites that the program observes in its data plate: "
            f"{', '.join(problem.density.observed) or 'none'}."
        )
    name = problem.target if site is None else site
    values = problem.density.constrain(z)
    values = {s.name: values[s.name] for s in problem.density.sites if s.scope != "local"}
    rows = [key for key in problem.row_names if isinstance(inputs.get(key), Tensor)]
    n = len(inputs[rows[0]]) if rows else 1
    size = max(1, CELLS // max(1, len(z))) if batch_size is None else batch_size
    if size < 1:
        raise DataError(f"batch_size={batch_size} must be at least 1.")

    def block(start: int) -> Distribution:
        part = {**inputs, **{key: inputs[key][start : start + size] for key in rows}}
        with _rng.isolated(seed, "predict", start):
            return at_draws(problem.model, part, values, name)

    scale, shift = float(problem.scaler.y_scale), float(problem.scaler.y_mean)
    if n <= size:
        return Prediction(block(0), shift=shift, scale=scale)
    # More than one block: hold none, and compute each again for every statistic.
    blocks = [(min(size, n - start), partial(block, start)) for start in range(0, n, size)]
    return Prediction.stream(blocks, shift=shift, scale=scale)


def at_draws(model: Any, inputs: Mapping[str, Any], values: Mapping[str, Tensor], site: str) -> Distribution:
    """The distribution at ``site`` with batch shape ``[S, N]``, for constrained values ``[S, *shape]`` by site."""
    found: list[Spec] = []

    def one(draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spec, tensors = unpack(program.distribution_at(model, inputs, draw, site))
        found.append(spec)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    with torch.no_grad(), program.unchecked():
        try:
            tensors = vmap(one, randomness="different", chunk_size=None)(dict(values))
            return pack(found[0], tensors)
        except BayesdlError:
            raise
        except KeyError as error:
            raise DataError(f"The program has no site {error} to predict.") from None
        except (CannotUnpack, RuntimeError, ValueError, NotImplementedError, TypeError):
            # What vmap cannot run (sampling of some families, value-dependent control flow) goes draw by draw.
            count = len(next(iter(values.values())))
            draws = [{name: value[s] for name, value in values.items()} for s in range(count)]
            return stack([program.distribution_at(model, inputs, draw, site) for draw in draws])
