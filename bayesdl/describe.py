"""The doctor before anything runs: what a model is, which methods apply, and what each would cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch

from bayesdl._rng import isolated
from bayesdl.errors import BayesdlError
from bayesdl.infer import record
from bayesdl.infer.method import Method
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.problem import Problem, prepare
from bayesdl.posterior.tables import render

TIMED = 5
"""Gradients that are timed, after two that are not."""
PRIOR_DRAWS = 100


@dataclass(frozen=True)
class Forecast:
    """What a method would cost, extrapolated from a few timed gradients.

    Attributes:
        reason: why the method does not apply, or None if it does.
        microseconds: per call for all its chains at once.
        calls: gradient calls.
        seconds: microseconds x calls, the method's own bookkeeping left out.
        megabytes: of the draws that it keeps.
        note: what was assumed.
    """

    reason: str | None
    microseconds: float = 0.0
    calls: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Description:
    """What ``describe`` found; print it.

    Attributes:
        sites: name, shape, support and scope of every latent.
        rows: rows N in the data plate, or None without one.
        observed: observed sites in the data plate.
        factorised: mini-batches (factor N/B) and per-row likelihoods exist.
        why_not: the reason if they do not.
        execution: how gradients are evaluated: "replay" of a recorded graph, "handlers", or "loop".
        units: "scaled" if the data are standardised for the model, else "raw".
        prior_range: central 90% interval of the prior predictive distribution over all rows, raw units, or None.
        data_range: the same of the observed targets, or None.
        forecasts: by method name.
    """

    sites: tuple[tuple[str, tuple[int, ...], str, str], ...]
    rows: int | None
    observed: tuple[str, ...]
    factorised: bool
    why_not: str | None
    execution: str
    units: str
    prior_range: tuple[float, float] | None
    data_range: tuple[float, float] | None
    forecasts: Mapping[str, Forecast]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "sites": [dict(zip(("name", "shape", "support", "scope"), site, strict=True)) for site in self.sites],
            **{k: getattr(self, k) for k in ("rows", "observed", "factorised", "why_not", "execution", "units")},
            "prior_range": self.prior_range,
            "data_range": self.data_range,
            "forecasts": {name: vars(forecast) for name, forecast in self.forecasts.items()},
        }

    def __str__(self) -> str:
        """Two tables and a few sentences."""
        latents = render(
            "Latent sites",
            ["site", "shape", "support", "scope"],
            [[name, str(list(shape)), _words(support), scope] for name, shape, support, scope in self.sites],
        )
        lines = [
            f"data plate   {self.rows or 'no'} rows, observed: {', '.join(self.observed) or 'none'}",
            "mini-batches yes; the likelihood of B rows counts N/B times" if self.factorised else
            f"mini-batches no: {self.why_not}",
            f"gradients    {_EXECUTION[self.execution]}",
            f"units        {self.units}",
        ]  # fmt: skip
        if self.prior_range is not None and self.data_range is not None:
            lines.append(
                f"prior        90% of prior predictions lie in [{self.prior_range[0]:.4g}, {self.prior_range[1]:.4g}]; "
                f"90% of the data in [{self.data_range[0]:.4g}, {self.data_range[1]:.4g}]"
            )
        rows = []
        for name, f in self.forecasts.items():
            if f.reason is not None:
                rows.append([name, "-", "-", "-", "-", f"no: {f.reason}"])
            elif not f.calls:
                rows.append([name, "-", "-", "-", "-", f.note])
            else:
                cells = [f"{f.microseconds:.0f}", f"{f.calls:,}", f"{f.seconds:.1f}", f"{f.megabytes:.1f}", f.note]
                rows.append([name, *cells])
        costs = render("Methods", ["method", "us per call", "calls", "seconds", "MB", "note"], rows, width=140)
        return latents + "\n".join(lines) + "\n\n" + costs


_EXECUTION = {
    "compile": "the program was recorded once; its graph is compiled to machine code",
    "replay": "the program was recorded once; its graph is replayed",
    "handlers": "Pyro's handlers run every time, batched over chains (it cannot be recorded)",
    "loop": "Pyro's handlers run for one chain after the other (control flow depends on values)",
}


def describe(
    model: Any, data: Any, methods: Iterable[Method], *, seed: int = 0, data_plate: str = "data"
) -> Description:
    """Look at a model and its data before fitting: structure, prior predictions, methods and their cost.

    Args:
        model: a Pyro program.
        data: as in ``fit``.
        methods: methods to forecast.
        seed: seed of the prior draws.
        data_plate: name of the plate over rows.

    Raises:
        ModelError: the model cannot be used; the message says why.
        DataError: the data cannot be used.
    """
    with isolated(seed, "describe"), pyro.get_param_store().scope():
        problem = prepare(model, data, seed=seed, data_plate=data_plate)
        density = problem.density
        start = density.prior_draws(4, seed)
        density.value_and_grad(start)
        forecasts = {method.name: _forecast(method, problem, start) for method in methods}
        prior, observed = _ranges(problem, seed)
    why_not = None
    try:
        density.require_rows()
    except BayesdlError as error:
        why_not = str(error)
    return Description(
        sites=tuple((s.name, tuple(s.shape), s.support, s.scope) for s in density.sites),
        rows=density.n,
        observed=density.observed,
        factorised=density.factorised,
        why_not=why_not,
        execution=density.execution,
        units="scaled" if problem.scaled else "raw",
        prior_range=prior,
        data_range=observed,
        forecasts=forecasts,
    )


def _forecast(method: Method, problem: Problem, start: torch.Tensor) -> Forecast:
    reason = method.applies_to(problem.density)
    if reason is not None:
        return Forecast(reason)
    work = method.work(problem)
    if not work.calls:
        return Forecast(None, note=work.note)
    z = start[:1].repeat(work.chains, 1)
    batch = None
    size = getattr(method, "batch_size", None)
    if size is not None:
        batch = problem.minibatch(torch.arange(min(size, problem.n)))
    for _ in range(2):
        problem.density.value_and_grad(z, batch)
    began = time.perf_counter()
    for _ in range(TIMED):
        problem.density.value_and_grad(z, batch)
    each = (time.perf_counter() - began) / TIMED
    kept = work.draws * problem.density.dim * z.element_size()
    notes = [work.note] if work.note else []
    if method.streams and kept > record.memory():
        notes.append("more than the memory here: use draws_to= or functions_at=")
    return Forecast(None, each * 1e6, work.calls, each * work.calls, kept / 2**20, "; ".join(notes))


def _words(support: str) -> str:
    """A support without the dimensions that its shape tells already."""
    return support.removeprefix("IndependentConstraint(").split(", ")[0] if "Independent" in support else support


def _ranges(problem: Problem, seed: int) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    if problem.y_name is None or len(problem.density.observed) != 1:
        return None, None
    inputs = problem.training_inputs
    prediction = predict(problem, problem.density.prior_draws(PRIOR_DRAWS, seed), inputs, seed=seed)
    if prediction.kind not in ("real", "count"):
        return None, None
    levels = torch.tensor([0.05, 0.95], dtype=torch.float64)
    samples = prediction.sample(PRIOR_DRAWS, seed=seed).double().reshape(-1)
    target = problem.scaler.unscale_y(problem.batch[problem.y_name]).double().reshape(-1)
    low, high = torch.quantile(samples[torch.isfinite(samples)], levels).tolist()
    first, last = torch.quantile(target, levels).tolist()
    return (low, high), (first, last)
