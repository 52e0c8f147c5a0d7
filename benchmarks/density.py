"""Microseconds per gradient: machine code and replay of the recorded graph, and the same density by hand.

    python benchmarks/density.py [--chains 1,4,16,64]

Three works: the network 10-50-1 tanh on `diabetes` (weights N(0, 1/fan_in), biases N(0, 1), noise HalfNormal(1)), a
hierarchical logistic regression on `breast_cancer` with non-centred weights, and eight schools; float32, one thread. By
hand is what a careful user of torch writes without Pyro: `vmap(grad_and_value(log density))`. All ways give the same
numbers; this is checked before anything is timed. Times are processor seconds of the one thread, each the smallest of
blocks of calls taken in turns, so that neighbours on the machine add little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.functional import logsigmoid

import bayesdl as bdl
from bayesdl.density import LogDensity
from bayesdl.posterior.tables import render

ROUNDS = 30
SECONDS = 3e-3  # of one block of calls


def network(x: Tensor, y: Tensor | None = None) -> Tensor:
    """10-50-1, tanh."""
    one, hidden = x.new_ones(()), x
    for layer, (inputs, outputs) in enumerate(((x.shape[1], 50), (50, 1))):
        w = pyro.sample(f"w{layer}", dist.Normal(0 * one, inputs**-0.5).expand([outputs, inputs]).to_event(2))
        b = pyro.sample(f"b{layer}", dist.Normal(0 * one, one).expand([outputs]).to_event(1))
        hidden = torch.nn.functional.linear(hidden if layer == 0 else hidden.tanh(), w, b)
    noise = pyro.sample("noise", dist.HalfNormal(one))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(hidden.squeeze(-1), noise), obs=y)


def network_by_hand(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The network's log density, without its constant."""
    w0, b0, w1, b1, log_noise = z[:500].view(50, 10), z[500:550], z[550:600], z[600], z[601]
    residual = (y - torch.tanh(x @ w0.T + b0) @ w1 - b1) * torch.exp(-log_noise)
    prior = 10 * w0.square().sum() + b0.square().sum() + 50 * w1.square().sum() + b1.square() + (2 * log_noise).exp()
    return -0.5 * (residual.square().sum() + prior) - (len(x) - 1) * log_noise


def logistic(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Hierarchical logistic regression, weights in units of their common scale."""
    one = x.new_ones(())
    scale = pyro.sample("scale", dist.HalfNormal(one))
    intercept = pyro.sample("intercept", dist.Normal(0 * one, one))
    w = pyro.sample("w", dist.Normal(0 * one, one).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=intercept + x @ (scale * w)), obs=y)


def logistic_by_hand(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The regression's log density, without its constant."""
    score = z[1] + x @ (torch.exp(z[0]) * z[2:])
    return logsigmoid((2 * y - 1) * score).sum() - 0.5 * ((2 * z[0]).exp() + z[1:].square().sum()) + z[0]


def schools(s: Tensor, y: Tensor | None = None) -> Tensor:
    """Eight schools, non-centred."""
    one = s.new_ones(())
    mean, scale = pyro.sample("mean", dist.Normal(0 * one, 5.0)), pyro.sample("scale", dist.HalfCauchy(5 * one))
    effect = pyro.sample("effect", dist.Normal(0 * one, one).expand([len(s)]).to_event(1))
    with pyro.plate("data", len(s)):
        return pyro.sample("y", dist.Normal(mean + scale * effect, s), obs=y)


def schools_by_hand(z: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The schools' log density, without its constant."""
    residual = (y - z[0] - torch.exp(z[1]) * z[2:]) / s
    prior = -0.5 * (z[0] / 5).square() - torch.log1p((torch.exp(z[1]) / 5).square()) - 0.5 * z[2:].square().sum()
    return prior - 0.5 * residual.square().sum() + z[1]


def works() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]]:
    """Program, density by hand and data, by name."""

    def rows(name: str) -> dict[str, Tensor]:
        data = bdl.data.load(name)
        x = torch.as_tensor(data.x, dtype=torch.float64)
        y = torch.as_tensor(data.y, dtype=torch.float64)
        if name == "diabetes":
            y = (y - y.mean()) / y.std()
        return {"x": ((x - x.mean(0)) / x.std(0)).float(), "y": y.float()}

    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return {
        "network": (network, network_by_hand, rows("diabetes")),
        "logistic": (logistic, logistic_by_hand, rows("breast_cancer")),
        "schools": (schools, schools_by_hand, {"s": errors, "y": effects}),
    }


def microseconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Time the functions in turns."""
    best: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, function in functions.items():
        function()
        began = time.thread_time()
        function()
        calls[name] = max(1, int(SECONDS / max(time.thread_time() - began, 1e-6)))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            began = time.thread_time()
            for _ in range(calls[name]):
                function()
            best[name] = min(best.get(name, float("inf")), (time.thread_time() - began) / calls[name])
    return {name: 1e6 * value for name, value in best.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", default="1,4,16,64")
    chains = [int(part) for part in parser.parse_args().chains.split(",")]
    torch.set_num_threads(1)
    rows = []
    for name, (program, by_hand, data) in works().items():
        gradient = vmap(grad_and_value(by_hand), in_dims=(0, None, None))
        for count in chains:
            ways = {way: LogDensity(program, data, execution=way) for way in ("compile", "replay")}
            z = 0.3 * torch.randn(count, ways["replay"].dim, generator=torch.Generator().manual_seed(count))
            began = time.perf_counter()
            slope = ways["compile"].value_and_grad(z)[1]
            seconds = time.perf_counter() - began
            for other in (gradient(z, *data.values())[0], ways["replay"].value_and_grad(z)[1]):
                torch.testing.assert_close(slope, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
            took = microseconds({
                "compile": lambda d=ways["compile"], z=z: d.value_and_grad(z),
                "replay": lambda d=ways["replay"], z=z: d.value_and_grad(z),
                "hand": lambda f=gradient, z=z, data=data: f(z, *data.values()),
            })  # fmt: skip
            rows.append([
                name, str(count), ways["compile"].execution, f"{seconds:.1f}", f"{took['compile']:.0f}",
                f"{took['compile'] / count:.1f}", f"{took['replay'] / count:.1f}", f"{took['hand'] / count:.1f}",
            ])  # fmt: skip
    columns = ["work", "chains", "way", "build s", "us/call", "us/chain", "replay us/chain", "hand us/chain"]
    print(render("One gradient of all chains, float32, one thread", columns, rows))


if __name__ == "__main__":
    main()
