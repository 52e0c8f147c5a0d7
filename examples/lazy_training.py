"""A network trained by gradient descent, narrow and wide, against the closed form of its infinite limit.

    python examples/lazy_training.py --out results/lazy

One hidden layer of erf units is drawn from its prior and trained on seven points by gradient descent without momentum,
many times over. As the width grows its tangent kernel stays what it was at the start: the network trains as if it were
linear in its weights, and the ensemble of trained networks becomes a Gaussian process whose mean and covariance at
every time are in `GradientFlow`.

What to look for: the narrow networks leave the band of the limit, the wide ones fill it; training that goes on for ever
(dashed) would pass through the points, and slow directions take most of that time; and the change of the kernel, like
the distance between a network and its linearisation, falls almost as 1 / width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.infinite import GradientFlow, from_module, kernel_drift, monte_carlo_kernel, width_rate
from bayesdl.posterior.tables import render

PRIOR = bdl.priors.Normal("fan_in", w_std=2.0, b_std=0.5)
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def network(width: int) -> bdl.BayesianNetwork:
    """One hidden layer of erf units; the limit of its kernels has a closed form."""
    net = nn.Sequential(nn.Linear(1, width), bdl.models.Erf(), nn.Linear(width, 1)).double()
    return bdl.BayesianNetwork(net, PRIOR)


def points() -> tuple[Tensor, Tensor, Tensor]:
    """Training inputs and targets, and a grid."""
    x = torch.tensor([-1.6, -1.2, -0.9, 0.1, 0.5, 1.1, 1.5], dtype=torch.float64)[:, None]
    return x, torch.sin(3 * x) + 0.5 * x, torch.linspace(-2.2, 2.2, 89, dtype=torch.float64)[:, None]


def train(width: int, members: int, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Trained functions on the grid ``[members, G]``, and each run's drift and gap ``[2, members]``."""
    x, y, grid = points()
    runs = [
        kernel_drift(network(width), x, y, x_new=grid, steps=steps, looks=1, learning_rate=rate, seed=seed)
        for seed in range(members)
    ]
    return torch.stack([run.outputs[:, 0] for run in runs]), torch.stack(
        [torch.stack([run.change[-1], run.gap[-1]]) for run in runs], 1
    )


def draw(ax: Axes, functions: Tensor, mean: Tensor, sd: Tensor, end: tuple[Tensor, Tensor]) -> None:
    """Trained networks over the band of the limit."""
    x, y, grid = points()
    at = grid[:, 0]
    ax.fill_between(at, mean - 2 * sd, mean + 2 * sd, color=BLUE, alpha=0.2, linewidth=0, label="limit, mean +- 2 sd")
    ax.plot(at, mean, color=BLUE, linewidth=2)
    for side in (-2, 2):
        label = "after infinite time, +- 2 sd" if side == 2 else None
        ax.plot(at, end[0] + side * end[1], "--", color="black", linewidth=0.9, label=label)
    for i, f in enumerate(functions[:20]):
        ax.plot(at, f, color=ORANGE, alpha=0.5, linewidth=0.8, label=None if i else "trained networks")
    ax.plot(x[:, 0], y[:, 0], "o", color="black", markersize=4, label="data")
    ax.set(ylim=(-3.5, 3.5), xlabel="x")
    ax.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, compare, print and draw.

    Returns:
        By width: root mean square pull of the ensemble's mean from the limit's, the ratio of its variance to the
        limit's, median drift and gap; rates of both in the width; and how the Monte-Carlo kernel agrees with the limit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/lazy"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    x, y, grid = points()
    limit = from_module(network(1))  # of any width
    (k, theta), (k_cross, theta_cross) = limit.kernels(x), limit.kernels(grid, x)
    k_new = limit.nngp(grid)
    steps, members = (40, 8) if options.quick else (300, 24)
    widths = (8, 512) if options.quick else (8, 64, 512, 4096)
    rate = 0.4 * bdl.infinite.learning_rate_limit(theta)
    flow = GradientFlow(theta, y[:, 0], k, learning_rate=rate, discrete=True)
    mean, covariance = flow.mean(steps, theta_cross), flow.covariance(steps, theta_cross, k_cross, k_new)
    sd = covariance.diagonal().clamp(min=0).sqrt()
    last = flow.covariance(math.inf, theta_cross, k_cross, k_new).diagonal().clamp(min=0).sqrt()
    end = flow.mean(math.inf, theta_cross), last

    result: dict[int, dict[str, float]] = {}
    functions, drifts = {}, {}
    for width in widths:
        functions[width], drifts[width] = train(width, members, steps, rate)
        error = functions[width].mean(0) - mean
        pull = (error / sd).square().mean().sqrt() * members**0.5
        spread = functions[width].var(0).sum() / sd.square().sum()
        change, gap = drifts[width].median(1).values
        result[width] = dict(pull=float(pull), spread=float(spread), change=float(change), gap=float(gap))
    rates = {
        name: width_rate(widths, torch.stack([d[i] for d in drifts.values()]))
        for i, name in ((0, "change"), (1, "gap"))
    }
    sampled = monte_carlo_kernel(network(64), grid[::22], x, draws=40)
    assert sampled.ntk is not None
    assert sampled.ntk_error is not None
    pulls = float(((sampled.ntk - theta_cross[::22]) / sampled.ntk_error).square().mean().sqrt())

    rows = [
        [str(width), *(f"{r[key]:.3g}" for key in ("pull", "spread", "change", "gap"))] for width, r in result.items()
    ]
    columns = ["hidden units", "mean, in SE", "variance / limit", "kernel change", "gap to linear"]
    print(render(f"{members} networks after {steps} steps, against the infinite ensemble", columns, rows))
    for name, (slope, error_of_slope) in rates.items():
        print(f"{name} is proportional to width^({slope:.2f} +- {error_of_slope:.2f})")

    figure = Figure(figsize=(13, 4.4), dpi=150, layout="constrained")
    narrow, wide, right = figure.subplots(1, 3)
    for ax, width in ((narrow, widths[0]), (wide, widths[-1])):
        draw(ax, functions[width], mean, sd, end)
        ax.set_title(f"{width} hidden units")
    wide.legend(frameon=False, fontsize=8, loc="lower right")
    for i, (name, colour) in enumerate((("kernel change", BLUE), ("gap to the linearised network", ORANGE))):
        for width in widths:
            right.loglog([width] * members, drifts[width][i], ".", color=colour, alpha=0.4)
        right.loglog(widths, [drifts[w][i].median() for w in widths], "-", color=colour, label=name)
    line = torch.tensor(widths, dtype=torch.float64)
    right.loglog(line, result[widths[0]]["change"] * widths[0] / line, "--", color=GREY, label="1 / width")
    right.set(xlabel="hidden units", ylabel="relative distance", title="Training becomes linear")
    right.legend(frameon=False, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    path = options.out / "lazy_training.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return {"widths": result, "rates": {name: list(pair) for name, pair in rates.items()}, "pulls": pulls}


if __name__ == "__main__":
    main()
