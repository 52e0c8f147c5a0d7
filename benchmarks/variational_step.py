"""One step of Gaussian variational inference against a fused Adam step of the plain network.

    python benchmarks/variational_step.py

A 784-400-400-10 relu classifier, batch 128, one weight sample, float32, one thread, 478,410 weights. The candidates
take turns within a round, processor time is measured, and ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.posterior.problem import prepare
from bayesdl.posterior.tables import render

STEPS = 20_000
"""Of the run that the steps are taken from: long enough for the density to compile itself."""


def network() -> nn.Sequential:
    """784-400-400-10, relu."""
    return nn.Sequential(*[nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)])


def adam_step(x: Tensor, y: Tensor) -> Callable[[], object]:
    """A fused Adam step on the next mini-batch of an epoch."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    order = itertools.cycle(torch.randperm(len(x)).split(128)[:-1])

    def step() -> None:
        rows = next(order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()

    return step


def variational_step(method: Any, x: Tensor, y: Tensor, replay: bool = False) -> Callable[[], object]:
    """A step of a method's engine, without the loop around it (which costs some microseconds).

    Args:
        method: the method.
        x: inputs.
        y: classes.
        replay: whether the density is replayed, as in shorter runs, instead of compiled.
    """
    model = bdl.BayesianNetwork(network(), bdl.priors.Normal("fan_in"), bdl.likelihoods.Categorical())
    problem = prepare(model, (x, y))
    scale = problem.density.prior_scale
    begin = torch.cat(
        [0.5 * scale * torch.randn_like(scale), method.family(len(scale)).start(0.1 * scale, torch.Generator())]
    )
    engine = method.engine(problem, 0, lambda: begin)
    if not replay:
        engine.expect()
    state = {"step": 0} | engine.init()

    def step() -> None:
        nonlocal state
        done = state["step"]
        state = engine.step(state)
        state["step"] = done + 1

    return step


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
        "Adam of the plain network": adam_step(x, y),
        "MeanFieldVI": variational_step(bdl.MeanFieldVI(**settings), x, y),
        "MeanFieldVI, replayed": variational_step(bdl.MeanFieldVI(**settings), x, y, replay=True),
        "MeanFieldVI, reparameterisation": variational_step(bdl.MeanFieldVI(**plain), x, y),
        "IVON": variational_step(bdl.IVON(**settings), x, y),
    }
    for candidate in candidates.values():
        for _ in range(5):
            candidate()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, candidate in candidates.items():
            began = time.process_time()
            for _ in range(options.calls):
                candidate()
            taken[name].append((time.process_time() - began) / options.calls)
    rows = []
    for name, times in taken.items():
        ratios = sorted(a / b for a, b in zip(times, taken["Adam of the plain network"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        middle = f"{statistics.median(ratios):.2f}"
        rows.append([name, f"{1e3 * statistics.median(times):.2f}", middle, f"{low:.2f}-{high:.2f}"])
    print(render("One step with one weight sample", ["step", "ms", "/ Adam", "quartiles"], rows))
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {platform.machine()}, one thread")


if __name__ == "__main__":
    main()
