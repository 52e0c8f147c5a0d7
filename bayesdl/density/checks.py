"""Whether a program's rows can be taken apart, and whether its density is a function at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.density import program, terms
from bayesdl.density.blocks import tolerance
from bayesdl.density.discovery import Discovery
from bayesdl.density.program import Program
from bayesdl.errors import BayesdlError, ModelError, NotFactorised, RandomDensity, RowCoupling

Batch = Mapping[str, Any]


def refuse_own_subsample(batch: Batch, found: Discovery) -> None:
    """Refuse a data plate that is smaller than the data.

    Raises:
        ModelError: the program draws a subsample of its own.
    """
    lengths = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if found.rows is not None and lengths and found.rows not in lengths and found.rows < max(lengths):
        raise ModelError(
            f"The data plate {found.structure.plate!r} has {found.rows} rows, the data have {max(lengths)}: the "
            "program draws its own subsample. Drop subsample_size; fit draws the mini-batches."
        )


def refuse_random(model: Program, batch: Batch, found: Discovery) -> None:
    """Evaluate twice; a density has one value.

    Raises:
        RandomDensity: it has two.
    """
    values = []
    for attempt in range(2):
        with torch.no_grad(), program.unchecked(), _rng.isolated(attempt, "repeat"):
            part = terms.evaluate(model, batch, found.example, found.structure)
        values.append(torch.as_tensor(part.outside if part.rows is None else part.outside + part.rows.sum()))
    if not torch.equal(values[0].nan_to_num(), values[1].nan_to_num()):
        raise RandomDensity(
            "The log density is random: two evaluations at one point differ. Dropout in training mode, or a value "
            "that is sampled outside pyro.sample? Put the network in eval mode, or make the draw a latent site."
        )


def why_no_rows(found: Discovery) -> NotFactorised | None:
    """Why there are no per-row terms at all, or None."""
    plate = found.structure.plate
    if found.rows is None:
        return NotFactorised(
            f"The program has no plate named {plate!r} around its observations, so there are no rows to take apart. "
            f'Write `with pyro.plate("{plate}", len(x)):` around the observed site, or pass data_plate=.'
        )
    if found.structure.discrete and not found.structure.by_row:
        return NotFactorised("A discrete latent outside the data plate couples the rows once it is summed out.")
    return None


def why_no_batches(model: Program, batch: Batch, found: Discovery, row_names: Sequence[str]) -> NotFactorised | None:
    """Why the program cannot run on part of its rows, or None: compare half of the rows alone and among all."""
    if not row_names or found.rows is None:
        return NotFactorised("The program closes over its data: rows cannot be selected. Pass them as arguments.")
    half = max(1, found.rows // 2)
    part = {**batch, **{name: batch[name][:half] for name in row_names}}
    local = {site.name: site for site in found.sites if site.scope == "local"}
    if any(site.shape[0] != found.rows for site in local.values()):
        return NotFactorised("Latents in the data plate stand in a second plate; their rows cannot be selected.")
    values = {name: value[:half] if name in local else value for name, value in found.example.items()}
    with torch.no_grad(), program.unchecked():
        try:
            whole = terms.evaluate(model, batch, found.example, found.structure).rows
            alone = terms.evaluate(model, part, values, found.structure).rows
        except BayesdlError:
            raise
        except Exception as error:  # user code on fewer rows may fail in any way
            return NotFactorised(f"The program does not run on part of its rows ({error}).")
    if whole is None or alone is None or alone.shape != (half,):
        return NotFactorised("The program does not follow the number of rows that it is given.")
    allowed = tolerance(whole.dtype)
    if torch.allclose(whole[:half], alone, rtol=allowed, atol=allowed, equal_nan=True):
        return None
    worst = int((whole[:half] - alone).abs().argmax())
    return RowCoupling(
        f"The likelihood of row {worst} changes from {float(whole[worst]):.6g} to {float(alone[worst]):.6g} when the "
        "other rows are left out: rows are coupled (batch normalisation, a mean over the batch). Mini-batches and "
        "per-row likelihoods do not exist for this program; full-batch methods work."
    )
