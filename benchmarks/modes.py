"""Ways to a mode: passes through the rows that each optimiser of all rows takes.

    python benchmarks/modes.py

MAP on `digits` (softmax regression, and 64-32-10 with tanh units), on `diabetes` (10-50-1, tanh), and on a logistic
regression whose inputs have scales from 1 to 1,000, in float64 from one start. A pass is a gradient of all rows; a
product with a curvature counts as two. An optimiser has arrived when the norm of the gradient of the loss per row, in
prior standard deviations, is below 1e-5; modes of networks differ, so their loss is printed. Processor time of one
thread, recording of the program left out. Writes modes.md beside this file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.infer.lbfgs import LBFGSEngine
from bayesdl.infer.newton import CURVATURES, NewtonEngine
from bayesdl.posterior import prepare
from bayesdl.posterior.problem import Problem

NEAR, MOST, DOUBLE = 1e-5, 60.0, torch.float64


def logistic(x: Tensor, y: Tensor | None = None) -> None:
    """With a prior so weak that the scales of the inputs are those of the curvature."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], dtype=DOUBLE), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def problems() -> Iterator[tuple[str, Problem, Tensor]]:
    """Name, problem and start ``[1, D]``."""
    for name, hidden in (("digits", ()), ("digits", (32,)), ("diabetes", (50,))):
        rows = bdl.data.load(name).train
        model = bdl.models.mlp(rows, hidden=hidden, activation="tanh").to(DOUBLE)
        problem = prepare(model, rows)
        values = problem.density.constrain(problem.density.prior_draws(1, 0))
        values |= {k: v[None].double() for k, v in model.initial_values(torch.Generator().manual_seed(0)).items()}
        yield f"{name}, {'-'.join(['linear', *map(str, hidden)])}", problem, problem.density.unconstrain(values)
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 20, generator=stream, dtype=DOUBLE)
    y = (x.sum(1) + torch.randn(1000, generator=stream, dtype=DOUBLE) > 0).double()
    problem = prepare(logistic, (x * torch.logspace(0, 3, 20, dtype=DOUBLE), y))
    yield "logistic, scales 1 to 1,000", problem, torch.zeros(1, 20, dtype=DOUBLE)


def steepness(problem: Problem, z: Tensor) -> float:
    """Norm of the loss's gradient in prior standard deviations."""
    gradients = problem.density.gradients
    _, slope = problem.density.value_and_grad(z, target="joint")
    problem.density.gradients = gradients
    return float((slope * problem.density.prior_scale).norm()) / (problem.density.n or 1)


def run(problem: Problem, start: Tensor, optimizer: str) -> tuple[int | None, float, float]:
    """Passes until arrival (None if it does not arrive), seconds and loss then."""
    engine: Any
    if optimizer == "lbfgs":
        engine = LBFGSEngine("MAP", problem, "joint", 100_000, 1, start.clone)
    else:
        engine = NewtonEngine("MAP", problem, "joint", 100_000, 1, start.clone, CURVATURES[optimizer])
    steepness(problem, start)
    problem.density.gradients = 0
    began, state = time.process_time(), {"step": 0, **engine.init()}
    while not engine.done(state) and time.process_time() - began < MOST:
        state = engine.step(state) | {"step": state["step"] + 1}
        if steepness(problem, state["z"]) < NEAR:
            passes = problem.density.gradients + 2 * state.get("products", 0)
            return passes, time.process_time() - began, float(state["loss"][0])
    return None, time.process_time() - began, float(state["loss"][0])


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    lines = [
        "# Ways to a mode",
        "",
        "`python benchmarks/modes.py`: passes through all rows until the gradient's norm is below 1e-5 (see there); a",
        f"product with a curvature counts as two. torch {torch.__version__}, float64, one thread; *-* is not within "
        f"{MOST:g} s.",
        "",
        "| problem | unknowns | optimiser | passes | s | loss |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, problem, start in problems():
        for optimizer in ("lbfgs", *CURVATURES):
            passes, seconds, loss = run(problem, start, optimizer)
            shown = "-" if passes is None else f"{passes:,}"
            lines.append(f"| {name} | {start.shape[1]:,} | {optimizer} | {shown} | {seconds:.1f} | {loss:.6f} |")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
