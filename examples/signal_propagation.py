"""Deep random networks: what survives thirty layers, and which of them can be trained.

    python examples/signal_propagation.py --out results/signal_propagation

Signals in a wide random network forget where they came from in one of two ways. With small weights all inputs become
alike and gradients vanish; with large ones like inputs become unlike and gradients explode. `theory.mean_field`
computes both for any activation, and where between them neither happens. Here networks of finite width are set beside
it: lengths and correlations layer by layer, gradients on the way back, a circle of inputs on its way through, and the
singular values of the whole. In the end networks of growing depth are trained on digits from many initialisations.

What to look for: dots (networks of finite width) on lines (the limit); the circle that grows by the same factor in
every layer while its curvature stays; and that six correlation depth scales (dashed) tell, within a factor of two, how
deep a network can be trained in few steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.posterior.tables import render
from bayesdl.theory.curves import great_circle, great_circle_law
from bayesdl.theory.mean_field import MeanField, critical_init
from bayesdl.theory.mean_field_plots import phase_diagram
from bayesdl.theory.signal_propagation import RandomNetwork, gradient_lengths, moments, squared_singular_values

B_STD = 0.3
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
PHASES = {"ordered": (1.3, BLUE), "critical": (critical_init("tanh", B_STD), GREY), "chaotic": (2.5, ORANGE)}


def networks(w_std: float, width: int, depth: int, seeds: int) -> list[RandomNetwork]:
    """Networks of tanh units that differ in their seeds."""
    return [RandomNetwork("tanh", (width,) * (depth + 1), w_std, B_STD, seed=seed) for seed in range(seeds)]


def forward(ax: Axes, width: int, depth: int, seeds: int) -> dict[str, dict[str, float]]:
    """Draw correlations of two signals; return how far lengths and correlations are from the maps, in all phases."""
    found = {}
    for phase, (w_std, colour) in PHASES.items():
        nets = networks(w_std, width, depth, seeds)
        field = nets[0].field
        q = float(field.q_star)
        runs = [moments(net, net.start(q, torch.tensor([[1.0, 0.6], [0.6, 1.0]]))) for net in nets]
        c, lengths = (
            torch.stack([values(r) for r in runs]) for values in (lambda r: r.c[:, 0, 1], lambda r: r.q[:, 0])
        )
        path = field.propagate(depth, q, 0.6)
        ax.plot(path.c, color=colour, label=f"{phase}, w_std = {w_std:.2f}")
        for row in c:
            ax.plot(row, ".", color=colour, markersize=3, alpha=0.6)
        found[phase] = {
            "q": float((lengths.mean(0) - path.q1).abs().max() / q),
            "c": float((c.mean(0) - path.c).abs().max()),
        }
    ax.set(
        xlabel="layer",
        ylabel="correlation of two inputs",
        title=f"Signals: {seeds} networks of {width} units",
        ylim=(0, 1),
    )
    return found


def backward(ax: Axes, width: int, depth: int, seeds: int) -> dict[str, list[float]]:
    """Draw total squared gradients; return the factor per layer, its standard error, and chi."""
    found = {}
    for phase, (w_std, colour) in PHASES.items():
        nets = networks(w_std, width, depth, seeds)
        field = nets[0].field
        back = torch.stack([gradient_lengths(n, n.start(float(field.q_star)), seed=n.seed)[:, 0] for n in nets])
        back = back / back[:, -1:]
        for row in back:
            ax.semilogy(row, ".", color=colour, markersize=3, alpha=0.6)
        ax.semilogy(
            field.chi ** (depth - torch.arange(depth + 1)), color=colour, label=f"{phase}, chi = {field.chi:.3f}"
        )
        rates = back[:, 0].log() / depth
        found[phase] = [math.exp(rates.mean()), float(rates.std()) / seeds**0.5, float(field.chi)]
    ax.set(xlabel="layer", ylabel="squared gradient / last layer's", title="Gradients, from right to left")
    return found


def circle(ax: Axes, width: int, depth: int) -> dict[str, list[float]]:
    """Draw how a circle of inputs grows and bends in a chaotic network; return both at the end, and the law."""
    (net,) = networks(PHASES["chaotic"][0], width, depth, 1)
    found, law = great_circle(net, float(net.field.q_star)), great_circle_law(net.field, depth)
    values = {
        "squared speed / N": (found.metric.mean(1) / width, law.metric, ORANGE),
        "N squared curvature": (found.curvature.square().mean(1) * width, law.curvature, BLUE),
    }
    for label, (dots, line, colour) in values.items():
        ax.semilogy(dots, "o", color=colour, markersize=4)
        ax.semilogy(line, color=colour, label=label)
    ax.semilogy(found.gauss_metric.mean(1), "s", color=GREY, markersize=3, label="squared speed of the tangent")
    ax.set(xlabel="layer", title=f"A circle of inputs, chaotic, {width} units")
    return {label: [float(dots[-1]), float(line[-1])] for label, (dots, line, _) in values.items()}


def spectrum(ax: Axes, width: int, depth: int) -> dict[str, list[float]]:
    """Draw squared singular values with both ensembles of weights; return their mean, relative spread and largest."""
    found = {}
    for weights, colour in (("gaussian", ORANGE), ("orthogonal", BLUE)):
        net = RandomNetwork("tanh", (width,) * (depth + 1), 1.05, 0.02, weights)  # type: ignore[arg-type]
        values = squared_singular_values(net, net.start(float(net.field.q_star))[0])
        ax.semilogy(values.clamp(min=1e-6), color=colour, label=f"{weights} weights")
        found[weights] = [float(values.mean()), float(values.std() / values.mean()), float(values.max())]
    ax.axhline(float(net.field.chi) ** depth, color=GREY, linestyle="--", label="chi^L, the mean of both")
    ax.set(xlabel="number", ylim=(1e-6, None), title=f"Squared singular values, {depth} layers")
    return found


def train(x: Tensor, y: Tensor, w_std: float, depth: int, width: int, steps: int) -> float:
    """Training accuracy of a network after a few steps of Adam on batches of 100 rows."""
    torch.manual_seed(0)
    sizes = [x.shape[1], *[width] * depth]
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    for layer in net[::2]:
        nn.init.normal_(layer.weight, 0.0, w_std / math.sqrt(layer.in_features))
        nn.init.normal_(layer.bias, 0.0, B_STD)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimiser.step()
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def trainable(ax: Axes, quick: bool) -> dict[str, list[float]]:
    """Draw which depths can be trained from which w_std; return accuracies by depth, and the w_std."""
    data = bdl.data.load("digits")
    x = ((data.x - data.x.mean(0)) / data.x.std(0).clamp(min=0.1)).float()[:600]
    y = data.y[:600].long()
    critical = PHASES["critical"][0]
    w_std = [0.6, 1.0, critical, 2.2, 3.5] if quick else [0.6, 0.8, 1.0, 1.2, critical, 1.6, 1.9, 2.3, 2.8, 3.5]
    depths = (2, 20) if quick else (3, 6, 12, 24, 48)
    width, steps = (50, 60) if quick else (100, 200)
    accuracy = torch.tensor([[train(x, y, w, depth, width, steps) for w in w_std] for depth in depths])
    mesh = ax.pcolormesh(w_std, depths, accuracy.numpy(), cmap="viridis", vmin=0, vmax=1, shading="nearest")
    ax.figure.colorbar(mesh, ax=ax, label="training accuracy")
    w = torch.linspace(w_std[0], w_std[-1], 60, dtype=torch.float64)
    scale = 6 * MeanField("tanh", w, B_STD).xi_c
    ax.plot(w, scale.clamp(max=1e4), "--", color="white", linewidth=2, label="6 depth scales xi_c")
    ax.set(
        yscale="log", xlabel="w_std", ylabel="layers", title=f"{steps} steps on digits", ylim=(depths[0], depths[-1])
    )
    ax.set_yticks(depths, [str(depth) for depth in depths])
    ax.minorticks_off()
    return {"w_std": w_std} | {str(d): row.tolist() for d, row in zip(depths, accuracy, strict=True)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all experiments, print and draw.

    Returns:
        What the experiments return, by their names.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/signal_propagation"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="smaller networks, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    quick = options.quick
    width, depth, seeds = (200, 8, 4) if quick else (1000, 20, 5)

    figure = Figure(figsize=(15, 8.6), dpi=150, layout="constrained")
    diagram, signals, gradients, curve, values, training = figure.subplots(2, 3).flat
    phase_diagram("tanh", diagram, points=12 if quick else 33)
    result: dict[str, Any] = {
        "signals": forward(signals, width, depth, seeds),
        "gradients": backward(gradients, width, depth, seeds),
        "circle": circle(curve, width, 8),
        "spectrum": spectrum(values, 200 if quick else 400, 40),
        "training": trainable(training, quick),
    }
    for ax in (signals, gradients, curve, values):
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    training.legend(facecolor=GREY, labelcolor="white", fontsize=8)

    rows = []
    for phase, (w_std, _) in PHASES.items():
        away, (rate, error, chi) = result["signals"][phase], result["gradients"][phase]
        away_q, away_c = f"{away['q']:.3f}", f"{away['c']:.3f}"
        rows.append([phase, f"{w_std:.3f}", away_q, away_c, f"{rate:.3f} +- {error:.3f}", f"{chi:.3f}"])
    columns = ["phase", "w_std", "length off by", "correlation off by", "gradient a layer", "chi"]
    print(render(f"{seeds} networks of {width} tanh units, {depth} layers, against the limit", columns, rows))
    for label, (dots, line) in result["circle"].items():
        print(f"circle after 8 layers, {label}: {dots:.4g}, law {line:.4g}")
    for weights, (mean, spread, largest) in result["spectrum"].items():
        print(f"{weights} weights: s^2 has mean {mean:.3f}, relative spread {spread:.2f}, largest {largest:.1f}")
    scales = result["training"]["w_std"]
    rows = [[d, *(f"{a:.2f}" for a in row)] for d, row in result["training"].items() if d != "w_std"]
    print(render("Training accuracy by depth and w_std", ["layers", *(f"{w:.2f}" for w in scales)], rows))
    path = options.out / "signal_propagation.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
