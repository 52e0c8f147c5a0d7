"""How strong should the prior be? The evidence of a Laplace approximation answers without a validation set.

    python examples/prior_tuning.py --out results/prior_tuning

A network with 20 tanh units on `diabetes`, under priors N(0, 1 / (factor x fan-in)) of very different strengths. For
each of them ``Laplace`` gives the log evidence of the training rows, and the test rows say how good the predictions of
the mode (``MAP``) and of the linearised posterior are.

What to look for: under a weak prior the mode fits noise, and the test rows punish it; the posterior averages over many
fits, and is hurt less. Under a strong prior nothing is learnt. The evidence, which has seen no test row, is highest
where both do well. The effective number of parameters says how many of the weights the data have a say in.
``Laplace(tune="prior")`` climbs there without a grid, and sets the noise along with the prior: a diamond. Its evidence
is above the whole curve, whose modes take the noise at which they fit best, and that is too small.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.evaluate.plots import BLUE, GREY, ORANGE, tidy
from bayesdl.posterior.tables import render


def network(data: bdl.Dataset, factor: float) -> bdl.BayesianNetwork:
    """The network under a prior of ``factor`` times the precision of N(0, 1 / fan-in)."""
    prior = bdl.priors.Normal("fan_in", w_std=factor**-0.5, b_std=factor**-0.5)
    return bdl.models.mlp(data, hidden=(20,), activation="tanh", prior=prior)


def scores(posterior: Any, data: bdl.Dataset) -> dict[str, float]:
    """Log evidence, effective parameters, and the test rows' negative log likelihoods of mode and posterior."""
    mode = bdl.posterior.DrawsPosterior(posterior.problem, posterior.mean[None, None], {}, {})
    return {
        "log evidence": posterior.info["log_evidence"],
        "effective parameters": posterior.info["effective_parameters"],
        "NLL of the mode": bdl.evaluate(mode.predict(data.test.x), data.test.y).nll,
        "NLL": bdl.evaluate(posterior.predict(data.test.x), data.test.y).nll,
    }


def curve(ax: Axes, factors: Sequence[float], rows: Sequence[dict[str, float]], names: dict[str, str]) -> None:
    """Scores over the prior's precision."""
    for name, colour in names.items():
        ax.plot(factors, [row[name] for row in rows], "o-", color=colour, linewidth=1.8, markersize=4, label=name)
    ax.set(xscale="log", xlabel="precision of the prior, in units of the fan-in's")
    tidy(ax)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit under every prior, print the table and draw the curves.

    Returns:
        The scores by factor, the factor of the highest evidence, and what tuning found.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/prior_tuning"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="four priors instead of eleven")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    data = bdl.data.load("diabetes")
    factors = [0.1, 1.0, 10.0, 1000.0] if options.quick else [10.0 ** (k / 2) for k in range(-3, 8)]
    grid = []
    for factor in factors:
        posterior = bdl.fit(network(data, factor), data.train, bdl.Laplace(steps=1000), seed=0, progress=False)
        grid.append(scores(posterior, data))
    best = max(range(len(factors)), key=lambda k: grid[k]["log evidence"])
    method = bdl.Laplace(steps=1000, tune="prior")
    tuned = bdl.fit(network(data, 1.0), data.train, method, seed=0, progress=False)
    reached, there = tuned.info["prior_precision"]["all"], scores(tuned, data)

    columns = ["precision of the prior", *grid[0]]
    rows = [
        [f"{factor:.3g}", *(f"{value:.3f}" for value in row.values())]
        for factor, row in zip(factors, grid, strict=True)
    ]
    rows.append([f"{reached:.3g}, tuned", *(f"{value:.3f}" for value in there.values())])
    print(render("diabetes: evidence of the training rows, scores of the test rows", columns, rows))

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    evidence, quality = figure.subplots(1, 2)
    curve(evidence, factors, grid, {"log evidence": BLUE})
    evidence.set(ylabel="log evidence (nats)", title="What the training rows say")
    curve(quality, factors, grid, {"NLL of the mode": ORANGE, "NLL": BLUE})
    quality.set(ylabel="nats per test row", title="What the test rows say")
    for ax, name in ((evidence, "log evidence"), (quality, "NLL")):
        ax.axvline(factors[best], color=GREY, linestyle=":", linewidth=1.5, label="highest evidence")
        ax.plot([factors[best]], [grid[best][name]], "*", color="black", markersize=12)
        ax.plot([reached], [there[name]], "D", color="black", markersize=7, label="tuned")
        ax.legend(frameon=False, fontsize=9)
    path = options.out / "prior_tuning.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return {
        "scores": {f"{f:.3g}": row for f, row in zip(factors, grid, strict=True)},
        "best": f"{factors[best]:.3g}",
        "tuned": there | {"interior": tuned.info["interior"]},
    }


if __name__ == "__main__":
    main()
