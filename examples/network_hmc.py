"""A Bayesian network sampled by Hamiltonian Monte Carlo, judged by its functions.

    python examples/network_hmc.py --out results/network_hmc

Thirty points of a curve, none of them between -1 and 1, and a network of 16 tanh units. Many chains run side by side as
one batch, from the members of a small deep ensemble, with HMC and with three other samplers.

What to look for: exchanging two hidden units, or the signs around one, gives the same function by other weights. Chains
need not visit all of these copies, and so weights mix more slowly than functions, which are what R-hat is to be asked
about. Where there are no data the functions differ from draw to draw, and the bands widen. The samplers are compared by
effective draws of the function, of its square and of the log likelihood, whichever are fewest, per gradient:
trajectories that overshoot make means look better than they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.data.synthetic import gap_mean
from bayesdl.evaluate import predictive_bands
from bayesdl.evaluate.plots import BLUE, GREY, ORANGE, tidy
from bayesdl.posterior.convergence import rhat
from bayesdl.posterior.tables import render

GRID = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)[:, None]
SETTLED = 1.1  # R-hat above which a sampler is not compared


def network(data: bdl.Dataset) -> bdl.BayesianNetwork:
    """One hidden layer of 16 tanh units; the noise is known, 0.3 standard deviations of the target."""
    prior = bdl.priors.Normal("fan_in", w_std=3.0, b_std=2.0)
    likelihood = bdl.likelihoods.Gaussian(noise=0.3)
    return bdl.models.mlp(data, hidden=(16,), activation="tanh", prior=prior, likelihood=likelihood)


def measured(posterior: Any) -> dict[str, float]:
    """Convergence in function space and over the weights, and what an effective draw costs."""
    found = posterior.diagnostics(GRID)
    parts = [found.function, found.function_squared, found.log_likelihood]
    settled = max(part.rhat for part in parts) < SETTLED
    gradients = float(posterior.stats["leapfrogs"].sum())
    weights = {name: mixing for name, mixing in found.sites.items() if name.endswith((".weight", ".bias"))}
    return {
        "rhat of functions": found.function.rhat,
        "rhat of weights": max(mixing.rhat for mixing in weights.values()),
        "ess": min(part.ess_bulk for part in parts),
        "gradients": gradients,
        # Chains that have not come together have no effective draws, whatever the estimate says.
        "per 1,000 gradients": 1000.0 * min(part.ess_bulk for part in parts) / gradients if settled else 0.0,
        "divergences": float(found.divergences or 0),
        "gap": float(posterior.predict(torch.zeros(1, 1, dtype=torch.float64)).epistemic.sqrt()),
    }


def plot_functions(ax: Axes, functions: Tensor, data: bdl.Dataset) -> None:
    """A few functions of a few chains, a colour for each chain."""
    colours = (BLUE, ORANGE, "#009E73", "#CC79A7")
    for colour, chain in zip(colours, functions, strict=False):
        some = chain[:: max(1, len(chain) // 8)][:8]
        ax.plot(GRID[:, 0], some.T, color=colour, linewidth=0.8, alpha=0.7)
    ax.plot(data.x[:, 0], data.y, "o", color="black", markersize=3)
    ax.set(xlabel="x", ylabel="f(x)", title="HMC: eight functions of each of four chains", ylim=(-4.5, 4.5))


def plot_rhat(ax: Axes, functions: Tensor, weights: Tensor) -> None:
    """R-hat of the functions at every input, and of every weight: the share of them below a value."""
    for values, colour, label in (
        (rhat(functions), BLUE, "functions, at 81 inputs"),
        (rhat(weights), ORANGE, "weights"),
    ):
        ordered = values.sort().values
        share = torch.arange(1, len(ordered) + 1) / len(ordered)
        ax.step(ordered, share, where="post", color=colour, linewidth=2, label=label)
    ax.axvline(1.01, color=GREY, linestyle=":", linewidth=1.2, label="1.01")
    ax.set(xlabel="R-hat", ylabel="share below", title="HMC: functions mix before weights do", ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=9, loc="lower right")


def plot_cost(ax: Axes, result: dict[str, dict[str, float]]) -> None:
    """Effective draws per 1,000 gradients."""
    heights = [row["per 1,000 gradients"] for row in result.values()]
    ax.barh(list(result), heights, color=[BLUE, *[GREY] * (len(result) - 1)], alpha=0.8)
    for place, height in enumerate(heights):
        ax.annotate(f" {height:.2f}", (height, place), va="center", fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="effective draws per 1,000 gradients", title="The least of f, f squared and log likelihood")
    ax.set_xlim(0, 1.15 * max(heights))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Sample with all four samplers, print and draw.

    Returns:
        By sampler: R-hat of functions and weights, effective draws, gradients, divergences, and the epistemic standard
        deviation in the middle of the gap; beside them that of HMC at the data.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/network_hmc"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few and short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    data = bdl.data.synthetic.regression_gap(30, seed=0)
    model = network(data)
    full, quick = {"chains": 16, "warmup": 250, "draws": 150}, {"chains": 16, "warmup": 80, "draws": 30}
    sizes: dict[str, Any] = quick if options.quick else full
    methods = {
        "HMC": bdl.HMC(**sizes, trajectory_length=1.5),
        "NUTS": bdl.NUTS(**sizes, max_depth=7),
        "ChEES": bdl.ChEES(**sizes),
        "MCLMC": bdl.MCLMC(**sizes),
    }
    progress = False if options.quick else None
    result: dict[str, dict[str, float]] = {}
    posteriors: dict[str, Any] = {}
    for label, method in methods.items():
        posteriors[label] = bdl.fit(model, data, method, seed=0, init="map", progress=progress)
        result[label] = measured(posteriors[label])
    rows = []
    for label, row in result.items():
        mixing = [f"{row[name]:.3f}" for name in ("rhat of functions", "rhat of weights")]
        each = f"{row['per 1,000 gradients']:.2f}" if row["per 1,000 gradients"] else "not settled"
        rows.append([label, *mixing, f"{row['ess']:.0f}", f"{row['gradients']:,.0f}", each, f"{row['gap']:.3f}"])
    columns = ["sampler", "R-hat of f", "of weights", "least ESS", "gradients", "ESS / 1,000", "sd in the gap"]
    print(render(f"{sizes['chains']} chains of {sizes['draws']} draws, judged by their functions", columns, rows))
    print(posteriors["HMC"].diagnostics(GRID).verdict)

    functions = posteriors["HMC"].function_draws(GRID)
    prediction = posteriors["HMC"].predict(GRID)
    figure = Figure(figsize=(12.5, 8), dpi=150, layout="constrained")
    (bands, draws), (mixing, cost) = figure.subplots(2, 2)
    predictive_bands(GRID, prediction, bands, data)
    bands.plot(GRID[:, 0], gap_mean(GRID[:, 0]), ":", color="black", linewidth=1.2, label="truth")
    bands.set(title="HMC: what the posterior predicts", ylim=(-4.5, 4.5))
    bands.legend(frameon=False, fontsize=8, ncols=2)
    plot_functions(draws, functions, data)
    plot_rhat(mixing, functions, posteriors["HMC"].z)
    plot_cost(cost, result)
    for ax in (bands, draws, mixing, cost):
        tidy(ax)
    path = options.out / "network_hmc.png"
    figure.savefig(path)
    print(f"wrote {path}")
    at_data = posteriors["HMC"].predict(data.x).epistemic.sqrt()
    return {"samplers": result, "sd at the data": float(at_data.mean())}


if __name__ == "__main__":
    main()
