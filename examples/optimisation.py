"""Descent on quadratics of growing condition number, and near a saddle.

    python examples/optimisation.py --out results/optimisation

Left: steps that gradient descent, heavy ball and Nesterov's method take to come a million times closer to the minimum
of a quadratic with curvatures between 1/kappa and 1, each with its best step size and momentum, against
``bdl.theory.optimisation.tuned``. Right: their paths on ``(x^2 - y^2) / 2 + y^4 / 4`` from a point beside the stable
side of its saddle, and those of Newton's method: bare, and inside the trust region of ``MAP(optimizer="newton")``.

What to look for: gradient descent needs steps in proportion to kappa, momentum to its square root. Near the saddle
gradient descent and momentum are drawn in and then crawl out along the direction of negative curvature. Bare Newton
jumps to the saddle and stays there, because a saddle is where the gradient vanishes; the trust region follows the
negative curvature to its edge and ends in a minimum after a few steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.evaluate.plots import BLUE, GREY, ORANGE, tidy
from bayesdl.posterior.tables import render
from bayesdl.theory.optimisation import Descent, tuned

DOUBLE, CLOSER, START = torch.float64, 1e-6, (1.0, 0.01)
METHODS: dict[Descent, tuple[str, str]] = {
    "gradient": ("gradient descent", GREY),
    "heavy_ball": ("heavy ball", ORANGE),
    "nesterov": ("Nesterov", BLUE),
}


def descend(
    method: Descent, gradient: Callable[[Tensor], Tensor], start: Tensor, step: float, momentum: float, steps: int
) -> list[Tensor]:
    """Iterates of a method."""
    path = [start, start]
    for _ in range(steps):
        ahead = path[-1] + momentum * (path[-1] - path[-2])
        path.append(ahead - step * gradient(ahead if method == "nesterov" else path[-1]))
    return path[1:]


def steps_needed(method: Descent, kappa: float) -> tuple[int, float]:
    """Steps to come a million times closer: measured, and by the rate."""
    scale = torch.logspace(-math.log10(kappa), 0, 30, dtype=DOUBLE)
    found = tuned(method, 1 / kappa, 1.0)
    expected = math.log(CLOSER) / math.log(found.rate)
    start = torch.ones(30, dtype=DOUBLE)
    path = descend(method, lambda w: scale * w, start, found.step_size, found.momentum, int(3 * expected) + 20)
    far = [k for k, w in enumerate(path) if float(w.norm()) > CLOSER * float(start.norm())]
    return far[-1] + 1, expected


def slope(w: Tensor) -> Tensor:
    """Of the loss with a saddle at 0 and minima at (0, 1) and (0, -1)."""
    return torch.stack([w[0], w[1] ** 3 - w[1]])


def saddle() -> None:
    """The loss as a program, beside a prior that is all but flat."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 10.0).to_event(1))
    pyro.factor("loss", -(w[0] ** 2 - w[1] ** 2) / 2 - w[1] ** 4 / 4)


def trust_region(start: Tensor, steps: int) -> list[Tensor]:
    """Iterates of Newton's method in bayesdl."""
    path = [start]
    method = bdl.MaximumLikelihood(steps=steps, optimizer="newton")
    bdl.fit(saddle, {}, method, init={"w": start}, progress=False, callback=lambda state: path.append(state["z"][0]))
    return path


def draw(ax: Axes, paths: dict[str, tuple[list[Tensor], str]]) -> None:
    """Paths over the contours of the loss."""
    x, y = torch.meshgrid(torch.linspace(-0.4, 1.2, 120), torch.linspace(-0.4, 1.5, 120), indexing="ij")
    ax.contour(x, y, (x**2 - y**2) / 2 + y**4 / 4, levels=25, colors="lightgrey", linewidths=0.7)
    for name, (path, colour) in paths.items():
        points = torch.stack(path)
        ax.plot(points[:, 0], points[:, 1], "o-", color=colour, markersize=3, linewidth=1.2, label=name)
    ax.plot([0], [0], "x", color="black", markersize=9)
    ax.set(xlabel="x", ylabel="y", title="Near a saddle (cross)", xlim=(-0.4, 1.2), ylim=(-0.4, 1.5))
    ax.legend(frameon=False, fontsize=9)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Count steps, follow paths, print the table and draw both.

    Returns:
        Steps by method and condition number, and where the paths end.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/optimisation"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="condition numbers up to 100 instead of 10,000")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    kappas = [10.0, 30.0, 100.0] if options.quick else [10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4]
    steps = {name: {kappa: steps_needed(name, kappa) for kappa in kappas} for name in METHODS}
    rows = [[f"{kappa:g}", *(f"{steps[name][kappa][0]:,}" for name in METHODS)] for kappa in kappas]
    print(render("steps to come a million times closer", ["condition number", *(m[0] for m in METHODS.values())], rows))

    start = torch.tensor(START, dtype=DOUBLE)
    paths = {
        "gradient descent": (descend("gradient", slope, start, 0.1, 0.0, 100), GREY),
        "heavy ball": (descend("heavy_ball", slope, start, 0.1, 0.8, 100), ORANGE),
        "Newton, bare": ([start, start - slope(start) / torch.stack([torch.ones(()), 3 * start[1] ** 2 - 1])], "black"),
        "Newton, trust region": (trust_region(start, 20), BLUE),
    }
    ends = {name: [round(float(v), 6) for v in path[-1]] for name, (path, _) in paths.items()}
    print(render("where they end", ["path", "x", "y"], [[name, *map(str, end)] for name, end in ends.items()]))

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    counts, plane = figure.subplots(1, 2)
    for name, (label, colour) in METHODS.items():
        counts.plot(kappas, [steps[name][k][1] for k in kappas], "--", color=colour, linewidth=1.0)
        counts.plot(kappas, [steps[name][k][0] for k in kappas], "o", color=colour, markersize=5, label=label)
    counts.set(xscale="log", yscale="log", xlabel="condition number", ylabel="steps to 1e-6",
               title="Quadratics: measured, and by the rate (dashed)")  # fmt: skip
    counts.legend(frameon=False, fontsize=9)
    draw(plane, paths)
    for ax in (counts, plane):
        tidy(ax)
    path = options.out / "optimisation.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return {"steps": {name: {f"{k:g}": v for k, v in row.items()} for name, row in steps.items()}, "ends": ends}


if __name__ == "__main__":
    main()
