"""From finite networks to the infinite one: mode, ensemble and Hamiltonian Monte Carlo against the exact posterior.

    python examples/infinite_width.py --out results/infinite_width

Twenty-four points of a curve, none of them between -1 and 1. The same prior, ``sd = w_std / sqrt(fan_in)``, is put on
networks with 2, 8, 32 and 128 hidden units and, through ``NNGP``, on infinitely many. Means and covariances of prior
functions are the same at every width. What the width changes is how Gaussian they are: with one hidden layer the excess
kurtosis of any of their values or differences is proportional to 1 / width. The widest network is fitted in three ways:
by its mode, by an ensemble of modes from different starts, and by NUTS, a Hamiltonian Monte Carlo sampler.

What to look for: the bands of the exact posterior widen in the gap and beyond the data. A mode has no band but the
noise's, and modes from ten starts nearly agree: an ensemble of them is no posterior. Two units must bend in the gap and
have no doubt left beyond the data; and with the width the posterior of NUTS, which knows nothing of Gaussian processes,
approaches the exact one, to within the Monte-Carlo error.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.data.synthetic import gap_mean
from bayesdl.evaluate import predictive_bands
from bayesdl.posterior.convergence import mcse_mean, mcse_sd
from bayesdl.posterior.tables import render

NOISE = 0.3  # standard deviation, in units of the standardised target
GRID = torch.linspace(-4.5, 4.5, 91, dtype=torch.float64)[:, None]
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def network(data: bdl.Dataset, width: int) -> bdl.BayesianNetwork:
    """One hidden layer of erf units, whose infinite limit has a closed form."""
    prior = bdl.priors.Normal("fan_in", w_std=4.0, b_std=1.5)
    likelihood = bdl.likelihoods.Gaussian(noise=NOISE)
    return bdl.models.mlp(data, hidden=(width,), activation="erf", prior=prior, likelihood=likelihood)


def prior_step(data: bdl.Dataset, width: int, draws: int) -> dict[str, float]:
    """How far prior functions climb from one edge of the gap to the other.

    Returns:
        Variance relative to what the NNGP kernel says, its standard error, and the excess kurtosis.
    """
    model, x = network(data, width), data.x[:, 0]
    edges = torch.stack([x.masked_fill(x > 0, -torch.inf).argmax(), x.masked_fill(x < 0, torch.inf).argmin()])
    functions = bdl.prior_predictive(model, data, draws, seed=1).mean_by_draw[:, edges]  # [S, 2]
    step = functions[:, 1] - functions[:, 0]
    scaler = bdl.data.Scaler.fit(data.x, data.y, scale_y=True)
    kernel = bdl.infinite.nngp(bdl.infinite.from_module(model), scaler.x(data.x[edges])) * scaler.y_scale**2
    square = step**2 / (kernel[0, 0] + kernel[1, 1] - 2 * kernel[0, 1])
    error = float(square.std()) / draws**0.5
    return {"ratio": float(square.mean()), "ratio error": error, "kurtosis": float(square.square().mean()) - 3}


def distances(posterior: bdl.Posterior, limit: bdl.Prediction) -> dict[str, float]:
    """Root mean square differences over the grid between a posterior's functions and the limit's, in raw units.

    Returns:
        Those of the mean and of the sd of the functions, the Monte-Carlo standard errors of both, and R-hat.
    """
    functions = posterior.function_draws(GRID)  # [C, S, G]
    mean, sd = functions.mean((0, 1)), functions.flatten(0, 1).std(0)

    def size(values: Tensor) -> float:
        return float(values.square().mean().sqrt())

    return {
        "mean": size(mean - limit.mean),
        "mean error": size(mcse_mean(functions)),
        "sd": size(sd - limit.epistemic.sqrt()),
        "sd error": size(mcse_sd(functions)),
        "rhat": posterior.diagnostics(GRID).rhat,
    }


def plot_distances(ax: Axes, result: Mapping[int, Mapping[str, float]]) -> None:
    """How far the finite posteriors are from the limit."""
    widths = list(result)
    for key, colour, label in (("mean", BLUE, "posterior mean"), ("sd", ORANGE, "posterior sd of the function")):
        ax.loglog(widths, [result[w][key] for w in widths], "o-", color=colour, label=label)
    for key, colour in (("mean", BLUE), ("sd", ORANGE)):
        noise = [result[w][f"{key} error"] for w in widths]
        ax.loglog(widths, noise, ":", color=colour, label=f"Monte-Carlo error of the {key}")
    ax.set(xlabel="hidden units", ylabel="RMS distance to the limit", ylim=(4e-3, 1))
    ax.set_title("The posterior of NUTS approaches the limit")


def plot_kurtosis(ax: Axes, result: Mapping[int, Mapping[str, float]]) -> None:
    """How far prior functions are from Gaussian."""
    widths = list(result)
    ax.plot(widths, [result[w]["kurtosis"] for w in widths], "o", color=BLUE, label="prior draws")
    line = torch.logspace(0.2, 2.2, 60)
    # The line through the narrowest network, where the kurtosis stands furthest above its Monte-Carlo error.
    ax.plot(line, result[widths[0]]["kurtosis"] * widths[0] / line, "--", color=GREY, label="proportional to 1 / width")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xscale="log", xlabel="hidden units", ylabel="excess kurtosis")
    ax.set_title("The prior becomes Gaussian: its step across the gap")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit all widths and the limit, print and draw.

    Returns:
        By width: ratio of prior variances, prior kurtosis, and distances of the posterior from the limit; the sds of
        the function in the middle of the gap and at the data, of the limit and of each way of fitting the widest.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/infinite_width"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    data = bdl.data.synthetic.regression_gap(24, seed=0)
    limit = bdl.fit(network(data, 1), data, bdl.NNGP()).predict(GRID)
    # Shorter trajectories than the default's: a few stiff directions make the steps small, whatever the length.
    method = bdl.NUTS(warmup=60, draws=40, max_depth=6) if options.quick else bdl.NUTS(
        warmup=150, draws=250, max_depth=7
    )  # fmt: skip
    widths = (2, 32) if options.quick else (2, 8, 32, 128)
    progress = False if options.quick else None

    wide, members = widths[-1], 3 if options.quick else 10
    modes = {"MAP": bdl.MAP(), f"ensemble of {members}": bdl.DeepEnsemble(members=members)}
    predictions = {
        f"{wide} hidden units, {label}": bdl.fit(network(data, wide), data, mode, seed=0, progress=progress).predict(
            GRID
        )
        for label, mode in modes.items()
    }
    result: dict[int, dict[str, float]] = {}
    for width in widths:
        posterior = bdl.fit(network(data, width), data, method, seed=0, progress=progress)
        if width in (widths[0], wide):
            predictions[f"{width} hidden units, NUTS"] = posterior.predict(GRID)
        prior = prior_step(data, width, 1000 if options.quick else 5000)
        result[width] = {**prior, **distances(posterior, limit)}
    rows = []
    for width, r in result.items():
        step = f"{r['ratio']:.3f} +- {r['ratio error']:.3f}"
        distance = [f"{r[key]:.3f} ({r[f'{key} error']:.3f})" for key in ("mean", "sd")]
        rows.append([str(width), step, f"{r['kurtosis']:.2f}", *distance, f"{r['rhat']:.3f}"])
    columns = ["hidden units", "prior variance / kernel", "kurtosis", "mean (MC error)", "sd (MC error)", "R-hat"]
    print(render("Distance from the infinitely wide network: prior (step across the gap), posterior", columns, rows))

    predictions["infinitely many, NNGP"] = limit
    middle, beside = (int((GRID[:, 0] - at).abs().argmin()) for at in (0.0, 2.0))
    sds = {label: p.epistemic.sqrt()[[middle, beside]].tolist() for label, p in predictions.items()}
    print(render("Standard deviation of the function", ["", "in the gap", "at the data"],
                 [[label, *(f"{sd:.3f}" for sd in pair)] for label, pair in sds.items()]))  # fmt: skip

    figure = Figure(figsize=(15, 6.8), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    axes = top.subplots(1, len(predictions), sharex=True, sharey=True)
    for ax, (label, prediction) in zip(axes, predictions.items(), strict=True):
        predictive_bands(GRID, prediction, ax, data)
        ax.plot(GRID[:, 0], gap_mean(GRID[:, 0]), ":", color="black", linewidth=1, label="truth")
        ax.set(title=label, ylim=(-4.5, 4.5), ylabel="y" if ax is axes[0] else "")
        ax.get_legend().remove()
    top.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    left, right = bottom.subplots(1, 2)
    plot_distances(left, result)
    plot_kurtosis(right, result)
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=9)
        ax.set_xticks(widths, [str(w) for w in widths])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    path = options.out / "infinite_width.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return {"widths": result, "sds": sds}


if __name__ == "__main__":
    main()
