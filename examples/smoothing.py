"""Filtering and smoothing: where a vehicle was, by noisy positions at uneven times, with a stretch without any.

    python examples/smoothing.py --out results/smoothing

A line of road: position and speed follow a random acceleration, and positions are measured with noise at uneven times.
``bdl.statespace.StateSpace`` gives the exact posterior of the whole path, because program and noise are linear and
Gaussian: the filter knows what came before each moment, the smoother also what came after. The strength of the
acceleration is chosen by the evidence, which the filter gives in passing.

What to look for: inside the gap the filter runs on along the last speed and its band opens, until the first measurement
after it pulls it back with a jump. The smoother's path bends from one side to the other, and its band is narrower
everywhere, widest in the middle of the gap. Its 90% intervals hold the truth about nine times in ten.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bayesdl.evaluate.plots import BLUE, GREY, ORANGE, tidy
from bayesdl.posterior.tables import render
from bayesdl.statespace import States, StateSpace

NOISE, ACCELERATION, GAP, Z90 = 2.0, 0.5, (40.0, 65.0), 1.6449


def road(times: Tensor, acceleration: float) -> StateSpace:
    """Position and speed at the given times ``[T]``: the integral of white acceleration over each interval."""
    step = times.diff(prepend=times.new_zeros(1))
    one, zero = torch.ones_like(step), torch.zeros_like(step)
    move = torch.stack([one, step, zero, one], 1).reshape(-1, 2, 2)
    spread = torch.stack([step**3 / 3, step**2 / 2, step**2 / 2, step], 1).reshape(-1, 2, 2)
    look = times.new_tensor([[[1.0, 0.0]]])
    start = torch.diag(times.new_tensor([100.0, 4.0]))
    return StateSpace(times.new_zeros(2), start, move, acceleration**2 * spread, look,
                      times.new_full((1, 1, 1), NOISE**2), varying=True)  # fmt: skip


def travel(times: Tensor, stream: torch.Generator) -> Tensor:
    """A path ``[T, 2]`` of the model."""
    space, state, path = road(times, ACCELERATION), times.new_tensor([0.0, 1.0]), []
    for move, spread in zip(space.transition, space.transition_noise, strict=True):
        noise = torch.randn(2, generator=stream, dtype=times.dtype)
        state = move @ state + torch.linalg.cholesky(spread) @ noise
        path.append(state)
    return torch.stack(path)


def scores(found: States, truth: Tensor, missing: Tensor) -> dict[str, float]:
    """Error and interval of the position, in and out of the gap."""
    away, sd = found.mean[:, 0] - truth[:, 0], found.covariance[:, 0, 0].sqrt()
    return {
        "RMSE": float(away.square().mean().sqrt()),
        "RMSE in the gap": float(away[missing].square().mean().sqrt()),
        "90% intervals hold": float((away.abs() < Z90 * sd).double().mean()),
        "widest sd": float(sd.max()),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Smooth one journey, print the scores and draw it.

    Returns:
        The scores of filter and smoother, and the acceleration that the evidence prefers.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/smoothing"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="the same: it takes a second")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    stream = torch.Generator().manual_seed(4)
    times = torch.empty(150, dtype=torch.float64).exponential_(1.5, generator=stream).cumsum(0)
    truth = travel(times, stream)
    x = truth[:, :1] + NOISE * torch.randn(len(times), 1, generator=stream, dtype=torch.float64)
    missing = (times > GAP[0]) & (times < GAP[1])
    x[missing] = torch.nan

    grid = [0.05 * 2 ** (k / 2) for k in range(14)]
    evidence = [float(road(times, level).log_evidence(x)) for level in grid]
    best = grid[max(range(len(grid)), key=evidence.__getitem__)]
    space = road(times, best)
    found = {"filter": space.filter(x), "smoother": space.smooth(x)}
    rows = {name: scores(states, truth, missing) for name, states in found.items()}
    title = f"position, with acceleration {best:.2f} by the evidence (the truth: {ACCELERATION})"
    cells = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in rows.items()]
    print(render(title, ["", *rows["filter"]], cells))

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    path, strength = figure.subplots(1, 2, width_ratios=(3, 1))
    for (name, states), colour in zip(found.items(), (ORANGE, BLUE), strict=True):
        mean, sd = states.mean[:, 0], states.covariance[:, 0, 0].sqrt()
        path.plot(times, mean, color=colour, linewidth=1.6, label=name)
        path.fill_between(times, mean - Z90 * sd, mean + Z90 * sd, color=colour, alpha=0.2, linewidth=0)
    path.plot(times, truth[:, 0], color="black", linewidth=1.0, linestyle="--", label="truth")
    path.plot(times, x[:, 0], ".", color=GREY, markersize=4, label="measurements")
    path.set(xlabel="time", ylabel="position", title="What came before, and what came after too (90% bands)")
    path.legend(frameon=False, fontsize=9)
    strength.plot(grid, evidence, "o-", color=BLUE, linewidth=1.8, markersize=4)
    strength.axvline(ACCELERATION, color=GREY, linestyle=":", linewidth=1.5)
    strength.set(xscale="log", xlabel="acceleration", ylabel="log evidence (nats)", title="Evidence")
    for ax in (path, strength):
        tidy(ax)
    target = options.out / "smoothing.png"
    figure.savefig(target)
    print(f"wrote {target}")
    return {**rows, "acceleration": best}


if __name__ == "__main__":
    main()
