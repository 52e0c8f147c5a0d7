"""The log joint of a program, taken apart: global, per row, local; discrete latents summed out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.mcmc.util import TraceTreeEvaluator
from torch import Tensor

from bayesdl.density import program
from bayesdl.density.program import Message, Program, Trace
from bayesdl.errors import ModelError

MAX_ENUMERATED = 2**16
"""Most joint values of the discrete latents outside the data plate that are summed over."""


@dataclass(frozen=True)
class Structure:
    """What discovery learnt about a program's discrete latents.

    Attributes:
        plate: name of the data plate.
        nesting: deepest plate dimension, so that enumeration goes left of it.
        discrete: names of the discrete latent sites.
        by_row: every discrete latent stands in the data plate alone, so rows stay independent after summing out.
    """

    plate: str
    nesting: int
    discrete: tuple[str, ...]
    by_row: bool


@dataclass
class Terms:
    """Log-density terms of one evaluation.

    Attributes:
        prior: log density of the global latents, scalar.
        outside: observed sites and factors outside the data plate, scalar.
        rows: log likelihood per row of the data plate ``[N]``, or None without a data plate.
        local: log density of the continuous latents in the plate ``[N]``, or 0.
    """

    prior: Tensor | float
    outside: Tensor | float
    rows: Tensor | None
    local: Tensor | float


def evaluate(
    model: Program,
    batch: Mapping[str, Any],
    values: Mapping[str, Tensor],
    structure: Structure,
    skip: frozenset[str] = frozenset(),
) -> Terms:
    """Run the program once and collect its terms (no factor N/B, no temperature, no Jacobian).

    The prior of the sites in ``skip`` is left out: the caller has it in closed form.
    """
    enumerate_from = -structure.nesting - 1 if structure.discrete else None
    trace = program.run(model, batch, values, enumerate_from=enumerate_from)
    _refuse_other_sites(trace, values, structure)
    if structure.discrete and not structure.by_row:
        return _summed_out_by_pyro(trace, structure, values, skip)
    prior: Tensor | float = 0.0
    outside: Tensor | float = 0.0
    local: Tensor | float = 0.0
    rows: list[Tensor] = []
    for site in _probability_sites(trace):
        name = site["name"]
        if name in skip:
            continue
        log_probability = program.log_prob(site, structure.plate)
        frame = program.plate_frame(site, structure.plate)
        if name in structure.discrete:
            rows.append(log_probability)
        elif frame is not None and name in values:
            local = local + program.per_row(log_probability, frame)
        elif frame is not None:
            rows.append(_keep_enumerated(log_probability, frame, structure))
        elif name in values:
            prior = prior + log_probability.sum()
        else:
            outside = outside + log_probability.sum()
    return Terms(prior, outside, _sum_out(rows, structure) if rows else None, local)


def _refuse_other_sites(trace: Trace, values: Mapping[str, Tensor], structure: Structure) -> None:
    """Stop when the program visits other latent sites than discovery saw: they would be random or forgotten.

    Raises:
        ModelError: naming the sites.
    """
    visited = {name for name, site in trace.nodes.items() if site["type"] == "param" or program.is_latent(site)}
    different = visited.symmetric_difference({*values, *structure.discrete})
    if different:
        raise ModelError(
            f"The program visits other latent sites here than on its first run: {sorted(different)}. bayesdl needs the "
            "same sites every time; write the branch as a mixture, or as one site with another scale."
        )


def _probability_sites(trace: Trace) -> list[Message]:
    return [site for site in trace.nodes.values() if program.has_density(site)]


def _keep_enumerated(log_probability: Tensor, frame: Any, structure: Structure) -> Tensor:
    """Sum the plate dimensions other than the data plate's; enumerated ones (left of them) stay."""
    if not structure.discrete:
        return program.per_row(log_probability, frame)
    dims = [d for d in range(-min(structure.nesting, log_probability.dim()), 0) if d != frame.dim]
    return log_probability.sum(dims, keepdim=True) if dims else log_probability


def _sum_out(rows: list[Tensor], structure: Structure) -> Tensor:
    """Add the terms of every row; where discrete latents were enumerated, logsumexp over their values."""
    total = rows[0]
    for term in rows[1:]:
        total = total + term
    if not structure.discrete:
        return total
    enumerated = list(range(total.dim() - structure.nesting))
    summed = torch.logsumexp(total, enumerated) if enumerated else total
    return summed.reshape(-1)


def _summed_out_by_pyro(
    trace: Trace, structure: Structure, values: Mapping[str, Tensor], skip: frozenset[str]
) -> Terms:
    """General discrete structure (global assignments, chains): Pyro sums out, nothing is known per row."""
    prior: Tensor | float = 0.0
    skipped: Tensor | float = 0.0
    for site in _probability_sites(trace):
        if site["name"] in values and not any(frame.vectorized for frame in site["cond_indep_stack"]):
            log_probability = program.log_prob(site, structure.plate).sum()
            if site["name"] in skip:
                skipped = skipped + log_probability
            else:
                prior = prior + log_probability
    evaluator = TraceTreeEvaluator(trace, has_enumerable_sites=True, max_plate_nesting=structure.nesting)
    return Terms(prior, evaluator.log_prob(trace) - prior - skipped, None, 0.0)


def refuse_explosion(trace: Trace, discrete: list[str], plate: str) -> None:
    """Refuse sums over too many joint values before any of them is evaluated.

    Raises:
        ModelError: the number of joint values exceeds ``MAX_ENUMERATED``.
    """
    sizes = []
    for name in discrete:
        site = trace.nodes[name]
        values = site["fn"].enumerate_support(expand=False).shape[0]
        sizes.append(values ** (1 if site["cond_indep_stack"] else max(1, math.prod(site["fn"].batch_shape))))
    outside = [
        size
        for name, size in zip(discrete, sizes, strict=True)
        if program.plate_frame(trace.nodes[name], plate) is None
    ]
    count = math.prod(outside)
    if count > MAX_ENUMERATED:
        raise ModelError(
            f"{len(outside)} discrete latent sites ({outside_names(discrete)}) have {count:,} joint values, more than "
            f"the {MAX_ENUMERATED:,} that are summed over. Sum them out by hand in the program, by the forward "
            "algorithm for a hidden Markov model."
        )


def outside_names(names: list[str]) -> str:
    """A short list of names for a message."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
