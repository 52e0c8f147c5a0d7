"""Bias and speed of the stochastic-gradient samplers.

    python benchmarks/stochastic.py bias     # minutes: the table of docs/stochastic-gradients.md
    python benchmarks/stochastic.py speed    # one step against a plain SGD step plus one normal_

Bias: Bayesian linear regression with known noise, whose posterior is known exactly, sampled by every sampler at three
step sizes and three batch sizes, with batches without replacement and with independent ones. What is shown is the
largest relative error of a posterior variance along the principal directions. The step sizes of the samplers are made
comparable by the product with the largest curvature: h a for SGLD, eta^2 a for those with momenta.

Speed: a 784-400-400-10 relu network, batch 128, one chain, float32, 478,410 weights. The yardstick is what cannot be
saved: a fused SGD step of the same network on the same kind of batch, and one ``normal_`` of as many numbers.
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
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.infer.baoab import baoab_variance
from bayesdl.infer.sghmc import sghmc_variance
from bayesdl.infer.sgld import sgld_variance
from bayesdl.infer.starts import start
from bayesdl.infer.stochastic_engine import StochasticEngine
from bayesdl.posterior.convergence import mcse_mean
from bayesdl.posterior.problem import Problem, prepare
from bayesdl.posterior.tables import render

# -- bias ------------------------------------------------------------------------------------------------------------

N, CURVATURES, FRICTION, CHAINS = 100, (25.0, 50.0, 100.0), 5.0, 256
COURANTS = (0.1, 0.4, 1.0)
BATCHES = (None, 50, 10)


def regression() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``[N, 3]``, targets ``[N]`` and posterior mean of y = x w + N(0, 1), w ~ N(0, 1), curvatures as above."""
    stream = generator(0, "regression")
    x = torch.linalg.qr(torch.randn(N, 3, dtype=torch.float64, generator=stream))[0]
    x = x * (torch.tensor(CURVATURES, dtype=torch.float64) - 1.0).sqrt()
    y = x @ torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64) + torch.randn(N, dtype=torch.float64, generator=stream)
    return x, y, x.T @ y / torch.tensor(CURVATURES, dtype=torch.float64)


def program(x: Tensor, y: Tensor | None = None) -> None:
    """The regression as a Pyro program."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def methods(courant: float) -> dict[str, Any]:
    """Every sampler at a step whose product with the largest curvature is ``courant``, with its draws' distance."""
    h, eta = courant / max(CURVATURES), (courant / max(CURVATURES)) ** 0.5
    slow = {"warmup": round(25 / courant) + 50, "thin": max(1, round(4 / courant))}
    fast = {"warmup": round(25 / courant**0.5) + 20, "thin": max(1, round(3 / courant**0.5)), "friction": FRICTION}
    return {
        "SGLD": lambda **more: bdl.SGLD(step_size=h, **slow, **more),
        "SGLD, signs": lambda **more: bdl.SGLD(step_size=h, noise="signs", **slow, **more),
        "SGLD, SVRG": lambda **more: bdl.SGLD(step_size=h, gradient="svrg", **slow, **more),
        "SGLD, SAGA": lambda **more: bdl.SGLD(step_size=h, gradient="saga", **slow, **more),
        "PSGLD": lambda **more: bdl.PSGLD(step_size=h * 11.0, **slow, **more),  # G is about 1/11 in the stiffest
        "SGHMC": lambda **more: bdl.SGHMC(step_size=eta, **fast, **more),
        "SGHMC, estimate": lambda **more: bdl.SGHMC(step_size=eta, noise_estimate=True, **fast, **more),
        "SGNHT": lambda **more: bdl.SGNHT(step_size=eta, **fast, **more),
        "BAOAB": lambda **more: bdl.BAOAB(step_size=eta, **fast, **more),
        "BAOAB, SVRG": lambda **more: bdl.BAOAB(step_size=eta, gradient="svrg", **fast, **more),
    }


def closed_form(name: str, courant: float, noise: Tensor) -> float | None:
    """Largest relative error by the formulas, for constant gradient noise V ``[3]`` of independent batches."""
    h, eta = courant / max(CURVATURES), (courant / max(CURVATURES)) ** 0.5
    formulas: dict[str, Callable[[float, float], float]] = {
        "SGLD": lambda a, v: sgld_variance(a, h, v),
        "SGLD, signs": lambda a, v: sgld_variance(a, h, v),
        "SGHMC": lambda a, v: sghmc_variance(a, eta, FRICTION, v),
        "BAOAB": lambda a, v: baoab_variance(a, eta, FRICTION, v),
    }
    if name not in formulas:
        return None
    pairs = zip(CURVATURES, noise.tolist(), strict=True)
    return max((a * formulas[name](a, v) - 1.0 for a, v in pairs), key=abs)


def row_noise(x: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """B V: variance of the gradient of one row times N^2, in the posterior mean and over the posterior, ``[3]``."""
    spread = torch.einsum("ni,nk,nk,k->i", x.square(), x, x, torch.tensor(CURVATURES, dtype=torch.float64).reciprocal())
    pulls = x * (y - x @ mean)[:, None]
    return N * spread + N**2 * pulls.var(0, correction=0)


def bias(draws: int) -> None:
    """Print the table of variance errors."""
    x, y, mean = regression()
    curvatures = torch.tensor(CURVATURES, dtype=torch.float64)
    rows = []
    for name, batch, independent in itertools.product(methods(1.0), BATCHES, (False, True)):
        control = "SVRG" in name or "SAGA" in name
        if (batch is None and (independent or control or "estimate" in name)) or ("estimate" in name) > independent:
            continue
        if independent and "SAGA" in name:  # its blocks are fixed
            continue
        if batch == 50 and name not in ("SGLD", "SGHMC", "BAOAB"):
            continue
        noise = torch.zeros(3, dtype=torch.float64) if batch is None else row_noise(x, y, mean) / batch
        cells = []
        for courant in COURANTS:
            stream = generator(1, name, str(batch), int(100 * courant))
            init = {"w": mean + torch.randn(CHAINS, 3, dtype=torch.float64, generator=stream) / curvatures.sqrt()}
            method = methods(courant)[name](chains=CHAINS, draws=draws, batch_size=batch, replacement=independent)
            try:
                posterior = method.fit(program, (x, y), init=init, progress=False)
            except bdl.errors.Divergence:
                cells += ["diverges", "", ""]
                continue
            squares = (posterior.z - mean).square() * curvatures
            error = squares.mean((0, 1)) - 1.0
            worst = int(error.abs().argmax())
            known = closed_form(name, courant, noise) if independent or batch is None else None
            spread = float(mcse_mean(squares)[worst])
            cells += [f"{float(error[worst]):+.3f}", f"{spread:.3f}", "" if known is None else f"{known:+.3f}"]
        kind = "all rows" if batch is None else f"{batch}, " + ("independent" if independent else "epochs")
        rows.append([name, kind, *cells])
        print(*rows[-1], sep=" | ", flush=True)
    columns = ["sampler", "batch", *itertools.chain(*[(f"step {c}", "+-", "formula") for c in COURANTS])]
    print(render("Largest relative error of a posterior variance", columns, rows))


# -- speed -----------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """784-400-400-10, relu."""
    return nn.Sequential(*[nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)])


def plain_step(optimiser: type[torch.optim.Optimizer], x: Tensor, y: Tensor) -> Callable[[], object]:
    """A fused step of one of torch's optimisers on the next mini-batch of an epoch."""
    net = network()
    made: Any = optimiser(net.parameters(), lr=1e-3, fused=True)  # type: ignore[call-arg]
    order = itertools.cycle(torch.randperm(len(x)).split(128)[:-1])

    def step() -> None:
        rows = next(order)
        made.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        made.step()

    return step


def classifier(x: Tensor, y: Tensor) -> Problem:
    """The network with its prior, and the rows."""
    model = bdl.BayesianNetwork(network(), bdl.priors.Normal("fan_in"), bdl.likelihoods.Categorical())
    return prepare(model, (x, y))


def engine_step(engine: Any) -> Callable[[], object]:
    """A step of an engine, without the loop around it (which costs some microseconds)."""
    state = engine.init() | {"step": 0}

    def step() -> None:
        nonlocal state
        done = state["step"]
        state = engine.step(state)
        state["step"] = done + 1

    return step


def take_turns(
    candidates: dict[str, Callable[[], object]], rounds: int, calls: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a call of every candidate, round by round, by a clock; after five calls that are not counted."""
    for candidate in candidates.values():
        for _ in range(5):
            candidate()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            began = clock()
            for _ in range(calls):
                candidate()
            taken[name].append((clock() - began) / calls)
    return taken


def ratio_rows(taken: dict[str, list[float]], yardstick: list[float]) -> list[list[str]]:
    """Per candidate: median milliseconds, and median and quartiles of the ratios within rounds."""
    rows = []
    for name, times in taken.items():
        ratios = sorted(a / b for a, b in zip(times, yardstick, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        middle = f"{statistics.median(ratios):.2f}"
        rows.append([name, f"{1e3 * statistics.median(times):.2f}", middle, f"{low:.2f}-{high:.2f}"])
    return rows


def sampler_step(method: Any, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A step of a sampler's engine after warm-up, compiled as in a long run."""
    problem = classifier(x, y)
    begin = start(problem, bdl.infer.loop.Run(), 1, default="network").to(problem.density.dtype)
    engine = StochasticEngine(method, problem, 0, begin)
    engine.expect()
    return engine_step(engine)


def speed(rounds: int, calls: int) -> None:
    """Print the table of times; the candidates take turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(12_800, 784), torch.randint(10, (12_800,))
    settings = {"chains": 1, "warmup": 0, "draws": 1, "thin": 10**6, "batch_size": 128}
    buffer, stream = torch.empty(1, sum(p.numel() for p in network().parameters())), generator(0, "speed")
    candidates: dict[str, Callable[[], object]] = {
        "SGD step": plain_step(torch.optim.SGD, x, y),
        "normal_": lambda: buffer.normal_(generator=stream),
        "SGLD": sampler_step(bdl.SGLD(step_size=1e-6, **settings), x, y),
        "SGLD, signs": sampler_step(bdl.SGLD(step_size=1e-6, noise="signs", **settings), x, y),
        "PSGLD": sampler_step(bdl.PSGLD(step_size=1e-6, **settings), x, y),
        "SGHMC": sampler_step(bdl.SGHMC(step_size=1e-3, friction=10.0, **settings), x, y),
        "SGHMC, signs": sampler_step(bdl.SGHMC(step_size=1e-3, friction=10.0, noise="signs", **settings), x, y),
        "SGNHT": sampler_step(bdl.SGNHT(step_size=1e-3, friction=10.0, **settings), x, y),
        "BAOAB": sampler_step(bdl.BAOAB(step_size=1e-3, friction=10.0, **settings), x, y),
    }
    taken = take_turns(candidates, rounds, calls, time.perf_counter)
    yardstick = [a + b for a, b in zip(taken["SGD step"], taken["normal_"], strict=True)]
    rows = ratio_rows(taken, yardstick)
    print(render("One step of one chain", ["step", "ms", "/ (SGD + normal_)", "quartiles"], rows))
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {platform.machine()}, one thread")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bias", "speed"))
    parser.add_argument("--draws", type=int, default=40, help="draws per chain of the bias table")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of the timing")
    options = parser.parse_args()
    if options.what == "bias":
        torch.set_num_threads(1)
        bias(options.draws)
    else:
        speed(options.rounds, 10)


if __name__ == "__main__":
    main()
