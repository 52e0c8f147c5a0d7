"""One step of Gaussian variational inference against a fused Adam step of the plain network.

    python benchmarks/variational_step.py

A 784-400-400-10 relu classifier, batch 128, one weight sample, float32, one thread, 478,410 weights. The candidates
take turns within a round, processor time is measured, and ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from stochastic import classifier, engine_step, plain_step, ratio_rows, take_turns
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior.tables import render

STEPS = 20_000
"""Of the run that the steps are taken from: long enough for the density to compile itself."""


def variational_step(method: Any, x: Tensor, y: Tensor, replay: bool = False) -> Callable[[], object]:
    """A step of a method's engine.

    Args:
        method: the method.
        x: inputs.
        y: classes.
        replay: whether the density is replayed, as in shorter runs, instead of compiled.
    """
    problem = classifier(x, y)
    scale = problem.density.prior_scale
    begin = torch.cat(
        [0.5 * scale * torch.randn_like(scale), method.family(problem.density).start(0.1 * scale, torch.Generator())]
    )
    engine = method.engine(problem, 0, lambda: begin)
    if not replay:
        engine.expect()
    return engine_step(engine)


def main() -> None:
    """Print the table of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--calls", type=int, default=10, help="steps of each candidate in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(12_800, 784), torch.randint(10, (12_800,))
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 128, "samples": 1, "learning_rate": 1e-3}
    plain = settings | {"estimator": "reparameterisation"}
    candidates: dict[str, Callable[[], object]] = {
        "Adam of the plain network": plain_step(torch.optim.Adam, x, y),
        "MeanFieldVI": variational_step(bdl.MeanFieldVI(**settings), x, y),
        "MeanFieldVI, replayed": variational_step(bdl.MeanFieldVI(**settings), x, y, replay=True),
        "MeanFieldVI, reparameterisation": variational_step(bdl.MeanFieldVI(**plain), x, y),
        "MeanFieldVI, local": variational_step(bdl.MeanFieldVI(**settings, estimator="local"), x, y),
        "MeanFieldVI, local, replayed": variational_step(
            bdl.MeanFieldVI(**settings, estimator="local"), x, y, replay=True
        ),
        "MeanFieldVI, flipout": variational_step(bdl.MeanFieldVI(**settings, estimator="flipout"), x, y),
        "IVON": variational_step(bdl.IVON(**settings), x, y),
    }
    taken = take_turns(candidates, options.rounds, options.calls, time.process_time)
    rows = ratio_rows(taken, taken["Adam of the plain network"])
    print(render("One step with one weight sample", ["step", "ms", "/ Adam", "quartiles"], rows))
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {platform.machine()}, one thread")


if __name__ == "__main__":
    main()
