"""One step of posteriors' SGLD and SGHMC, over a plain fused SGD step of the same network with noise of its size.

    python benchmarks/samplers/posteriors_step.py

784-400-400-10 relu network, batches of 128, float32, one thread. The yardstick is ``torch.optim.SGD(fused=True)`` with
its forward and backward pass, and one ``normal_`` into a buffer of as many numbers as there are parameters. Blocks of
steps alternate; medians of processor seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable

import posteriors
import torch
from torch import Tensor, nn
from torch.func import functional_call

ROWS, BATCH, WIDTH, CLASSES = 60_000, 128, 400, 10
Step = Callable[[], object]


def network() -> nn.Sequential:
    """The network, with the same weights at each call."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]
    return nn.Sequential(*layers)


def plain(x: Tensor, y: Tensor) -> Step:
    """A fused SGD step, and the noise."""
    net = network()
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-6, fused=True)
    noise = torch.empty(sum(p.numel() for p in net.parameters()))

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
        noise.normal_()

    return step


def peer(method: str, inplace: bool, x: Tensor, y: Tensor) -> Step:
    """A step of posteriors, for the log posterior per row that its documentation recommends."""
    net = network()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits = functional_call(net, params, (batch[0],))
        prior = posteriors.diag_normal_log_prob(params) / ROWS
        return prior - nn.functional.cross_entropy(logits, batch[1]), torch.tensor([])

    transform = getattr(posteriors.sgmcmc, method).build(log_posterior, lr=1e-6, temperature=1 / ROWS)
    state = transform.init(params)

    def step() -> None:
        nonlocal state
        state, _ = transform.update(state, (x, y), inplace=inplace)

    return step


def main() -> None:
    """Measure and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=30, help="steps in a block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(BATCH, 784, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)
    steps = {"sgd + noise": plain(x, y)}
    for method in ("sgld", "sghmc"):
        steps |= {method: peer(method, False, x, y), f"{method} in place": peer(method, True, x, y)}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(options.blocks + 1):
        for name, step in steps.items():
            began = time.process_time()
            for _ in range(options.steps):
                step()
            if block:
                taken[name].append(1e6 * (time.process_time() - began) / options.steps)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, taken["sgd + noise"], strict=True))
        for name, times in taken.items()
    }
    versions = {name: importlib.metadata.version(name) for name in ("posteriors", "torch")}
    print(json.dumps({"us": medians, "ratio": ratios, "versions": versions, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
