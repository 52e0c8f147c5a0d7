"""One network, one curve, every posterior: which approximation says what the long run of NUTS says?

    python examples/posteriors.py --out results/posteriors

Thirty points of a curve, none of them between -1 and 1, and a network of 16 tanh units with known noise. Every method
fits the same model (``MCDropout`` with a mask on the hidden units), none is tuned to the picture, and a long run of
NUTS from many starts tells what the posterior is. Each panel shows a method's mean and its central 90% of new
targets, with those of NUTS as dotted lines.

What to look for: trained networks (``MAP``, the ensemble, ``SVGD``) fit the data and know nothing of other functions
in the gap, because one mode attracts them all; randomising every member's problem spreads them. ``Laplace``, which
predicts with the linearised network, widens where NUTS does. Gaussians over the weights through the network itself
(``MeanFieldVI``, ``FullRankVI``) give up a part of the fit for their width. The Kalman filter sees every row once, in
their order, and forgets the first ones. The table measures it: the Wasserstein distance of the predictive
distributions, apart for inputs with data and for the gap, and the total variation over both. NUTS against itself
(half of its chains against the other) is what chance leaves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.evaluate import total_variation, wasserstein_by_row
from bayesdl.evaluate.plots import BLUE, GREY, tidy
from bayesdl.posterior import DrawsPosterior, Prediction
from bayesdl.posterior.tables import render

GRID = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)[:, None]
GAP = GRID[:, 0].abs() < 1.0
SEEN = (GRID[:, 0].abs() >= 1.0) & (GRID[:, 0].abs() <= 3.0)
REFERENCE, DRAWS = "NUTS", 400


def network(data: bdl.Dataset, dropout: float = 0.0) -> bdl.BayesianNetwork:
    """One hidden layer of 16 tanh units; the noise is known, 0.3 standard deviations of the target."""
    prior = bdl.priors.Normal("fan_in", w_std=3.0, b_std=2.0)
    likelihood = bdl.likelihoods.Gaussian(noise=0.3)
    return bdl.models.mlp(data, hidden=(16,), activation="tanh", prior=prior, likelihood=likelihood, dropout=dropout)


def methods(short: float) -> dict[str, bdl.Method]:
    """The methods by label, with ``short`` times their usual numbers of steps."""
    steps = round(3000 * short)
    chains = {"chains": 16, "warmup": round(300 * short), "draws": round(200 * short)}
    return {
        "MAP": bdl.MAP(steps=steps),
        "DeepEnsemble": bdl.DeepEnsemble(members=20, steps=steps),
        "randomised MAP": bdl.DeepEnsemble(members=20, steps=steps, anchored=True, perturbed=True),
        "MCDropout": bdl.MCDropout(steps=steps),
        "SWAG": bdl.SWAG(steps=steps, batch_size=10),
        "Laplace": bdl.Laplace(steps=steps),
        "KalmanFilter": bdl.KalmanFilter(),
        "MeanFieldVI": bdl.MeanFieldVI(steps=steps),
        "FullRankVI": bdl.FullRankVI(steps=steps),
        "SVGD": bdl.SVGD(particles=50, steps=steps),
        "SGHMC": bdl.SGHMC(chains=8, warmup=steps, draws=50, thin=20),
        REFERENCE: bdl.NUTS(**chains, max_depth=7 if short == 1 else 5),
    }


def halves(posterior: Any) -> list[Prediction]:
    """What two halves of a run's chains predict."""
    z, middle = posterior.z, len(posterior.z) // 2
    parts = [DrawsPosterior(posterior.problem, part, {}, {}) for part in (z[:middle], z[middle:])]
    return [part.predict(GRID, max_draws=DRAWS) for part in parts]


def distances(prediction: Prediction, reference: Prediction) -> dict[str, float]:
    """How far a prediction is from the reference."""
    square = wasserstein_by_row(prediction, reference).square()
    return {
        "near the data": float(square[SEEN].mean().sqrt()),
        "in the gap": float(square[GAP].mean().sqrt()),
        "total variation": total_variation(prediction, reference),
        "sd in the gap": float(prediction[GAP].epistemic.mean().sqrt()),
    }


def panel(ax: Axes, label: str, prediction: Prediction, reference: Prediction, data: bdl.Dataset) -> None:
    """A method's mean and interval, with those of the reference."""
    x, (low, high) = GRID[:, 0], prediction.interval(0.9)
    ax.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(x, prediction.mean, color=BLUE, linewidth=1.8)
    for line in (reference.mean, *reference.interval(0.9)):
        ax.plot(x, line, ":", color="black", linewidth=1.0)
    ax.plot(data.x[:, 0], data.y, "o", color=GREY, markersize=2.5)
    ax.set(title=label, ylim=(-4.5, 4.5))
    tidy(ax)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit every method, print the table and draw the panels.

    Returns:
        By method: its distances from NUTS, and seconds; the distances of the halves of NUTS under "NUTS by halves".
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/posteriors"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    data = bdl.data.synthetic.regression_gap(30, seed=0)
    model, masked = network(data), network(data, dropout=0.1)
    progress = False if options.quick else None
    posteriors: dict[str, Any] = {}
    for label, method in methods(0.1 if options.quick else 1.0).items():
        init = "map" if label == REFERENCE else None
        chosen = masked if label == "MCDropout" else model
        posteriors[label] = bdl.fit(chosen, data, method, seed=0, init=init, progress=progress)
    predictions = {label: posterior.predict(GRID, max_draws=DRAWS) for label, posterior in posteriors.items()}
    reference = predictions[REFERENCE]
    result = {label: distances(prediction, reference) for label, prediction in predictions.items()}
    for label, posterior in posteriors.items():
        result[label]["seconds"] = posterior.info["seconds"]
    result["NUTS by halves"] = distances(*halves(posteriors[REFERENCE]))
    del result[REFERENCE]

    columns = ["method", *result["MAP"]]
    rows = [[label, *(f"{row[name]:.3f}" if name in row else "-" for name in columns[1:])]
            for label, row in result.items()]  # fmt: skip
    print(render("distance from NUTS in units of y", columns, rows))

    figure = Figure(figsize=(13, 8.5), dpi=150, layout="constrained")
    axes = figure.subplots(3, 4, sharex=True, sharey=True).flatten()
    for ax, (label, prediction) in zip(axes, predictions.items(), strict=True):
        panel(ax, label, prediction, reference, data)
    figure.suptitle("One network, twelve posteriors: mean and central 90% of new targets; dotted: NUTS")
    path = options.out / "posteriors.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return {"methods": result}


if __name__ == "__main__":
    main()
