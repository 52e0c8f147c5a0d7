"""Microseconds per gradient: the replayed graph against Pyro's handlers and against the same density by hand.

    python benchmarks/density.py

One network (10-16-1, relu, Gaussian likelihood with unknown noise, 442 rows, float32), for 1 to 256 chains at once. All
three give the same numbers; this is checked before anything is timed. Times are medians over blocks of calls, taken in
turns in one run and on one thread, so that their ratios mean something on any machine.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

import bayesdl as bdl
from bayesdl.density import LogDensity
from bayesdl.posterior.tables import render

CHAINS = (1, 4, 16, 64, 256)
REPETITIONS = 9
CALLS = 20


def by_hand(density: LogDensity, batch: dict[str, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The same log density as a careful user of torch would write it, without Pyro."""
    shapes = [(site.start, site.stop, site.shape) for site in density.sites]
    mean, sd = density.gaussian_prior() or (torch.empty(0), torch.empty(0))
    x, y = batch["x"], batch["y"]

    def one(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, log_noise: Tensor) -> Tensor:
        f = (torch.relu(x @ w1.T + b1) @ w2.T + b2).squeeze(-1)
        residual = (y - f) * torch.exp(-log_noise)
        return -0.5 * residual.square().sum() - len(x) * (log_noise + 0.5 * math.log(2 * math.pi))

    gradient = vmap(grad_and_value(one, argnums=(0, 1, 2, 3, 4)))

    def batched(z: Tensor) -> tuple[Tensor, Tensor]:
        leaves = [z[:, start:stop].reshape(len(z), *shape) for start, stop, shape in shapes]
        parts, value = gradient(*leaves)
        standard = (z - mean) / sd
        prior = -0.5 * standard.square().sum(1) - sd.log().sum() - 0.5 * len(sd) * math.log(2 * math.pi)
        return value + prior, torch.cat([p.reshape(len(z), -1) for p in parts], 1) - standard / sd

    return batched


def median_microseconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Time the functions in turns."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(REPETITIONS + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            for _ in range(CALLS):
                function()
            if repetition >= 1:
                taken[name].append((time.perf_counter() - began) / CALLS)
    return {name: 1e6 * statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    data = bdl.data.load("diabetes")
    model = bdl.models.mlp(data, hidden=(16,), activation="relu")
    problem = bdl.posterior.prepare(model, data)
    density = problem.density
    handlers = LogDensity(model, problem.batch, execution="handlers")
    hand = by_hand(density, dict(problem.batch))
    rows = []
    for chains in CHAINS:
        z = density.prior_draws(1).repeat(chains, 1)
        for got, want in zip(density.value_and_grad(z), hand(z), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
        times = median_microseconds(
            {
                "graph": lambda z=z: density.value_and_grad(z),
                "handlers": lambda z=z: handlers.value_and_grad(z),
                "hand": lambda z=z: hand(z),
            }
        )
        graph, slow, plain = times["graph"], times["handlers"], times["hand"]
        rows.append([
            str(chains), f"{graph:.0f}", f"{graph / chains:.1f}", f"{slow:.0f}", f"{plain:.0f}",
            f"{slow / graph:.1f}", f"{plain / graph:.1f}",
        ])  # fmt: skip
    columns = ["chains", "graph us", "us/chain", "handlers us", "hand us", "handlers/graph", "hand/graph"]
    print(render(f"One gradient of all chains, {platform.processor() or platform.machine()}", columns, rows))


if __name__ == "__main__":
    main()
