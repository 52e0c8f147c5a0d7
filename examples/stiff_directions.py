"""Why can a network with more weights than rows have a certificate at all?

    python examples/stiff_directions.py --out results/stiff_directions

A network of 910 weights learns ``digits``; its prior is N(0, 0.3^2), fixed before any row was seen, so all 1,438 rows
train it and all count. A PAC-Bayes bound charges the posterior for every direction in which it is narrower than the
prior. Three Gaussians around the same trained network are compared: one along the eigenvectors of the curvature
(``Laplace(structure="full")``), one along the weights (``"diag"``), and a sphere, all as wide as a quadratic loss asks
for (``bayesdl.theory.stiffness``). Each with the likelihood at three temperatures: hotter posteriors are wider.

What to look for: the curvature falls over many decades, and only in some hundred directions do the data say more than
the prior (left). The Gaussian along these is the one that is cheap and still errs little; a sphere has to be as narrow
everywhere as it must be in the stiffest directions (right).

All nine certificates share delta = 0.05, so they hold together and the best may be chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.bounds.certificate import ceiling
from bayesdl.evaluate.plots import tidy
from bayesdl.posterior.covariance import Diagonal
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.tables import render
from bayesdl.theory.stiffness import effective_dimension

DELTA, PRIOR_SD = 0.05, 0.3
TEMPERATURES = (0.5, 1.0, 2.0)
COLOURS = {"along the curvature": "#0072B2", "along the weights": "#D55E00", "a sphere": "#009E73"}


def posteriors(data: tuple[Tensor, Tensor], temperature: float, steps: int) -> tuple[dict[str, Any], Tensor]:
    """Three Gaussians around one mode, and the eigenvalues of the likelihood's curvature there."""
    net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(PRIOR_SD), bdl.likelihoods.Categorical())
    full, diagonal = (
        bdl.fit(
            model,
            data,
            bdl.Laplace(structure=structure, steps=steps, predictive="sampled", likelihood_temperature=temperature),
            progress=False,
        )
        for structure in ("full", "diag")
    )
    law = full.law
    precision = law.covariance.solve(torch.eye(law.dim, dtype=law.mean.dtype))
    curvature = (torch.linalg.eigvalsh(precision).flip(0) - PRIOR_SD**-2).clamp_min(0.0)
    sd = (PRIOR_SD**-2 + curvature.mean()).rsqrt().expand(law.dim).clone()
    sphere = GaussianPosterior(full.problem, Normal(law.mean, Diagonal(sd)), {})
    return dict(zip(COLOURS, (full, diagonal, sphere), strict=True)), curvature


def plot_spectrum(ax: Axes, spectra: dict[float, Tensor]) -> None:
    """Curvatures beside the prior's precision."""
    for temperature, values in spectra.items():
        shade = {0.5: "#08306B", 1.0: "#4292C6", 2.0: "#9ECAE1"}[temperature]
        count = effective_dimension(values, PRIOR_SD**-2)
        seen = values[values > 1e-6]
        label = f"temperature {temperature:g}: {count:.0f} effective directions"
        ax.semilogy(range(1, len(seen) + 1), seen.tolist(), color=shade, label=label)
    ax.axhline(PRIOR_SD**-2, color="#555555", linestyle="--")
    ax.text(880, PRIOR_SD**-2 * 1.3, "the prior's precision", ha="right", color="#555555", fontsize=9)
    ax.set(xlabel="direction", ylabel="curvature of the log likelihood, 1/weight²", ylim=(1e-4, None))
    ax.set_title("Few directions are stiff")
    tidy(ax)
    ax.legend(fontsize=9)


def plot_certificates(ax: Axes, found: dict[str, dict[float, dict[str, float]]]) -> None:
    """Risk and certificate of each Gaussian."""
    for place, (name, runs) in enumerate(found.items()):
        for step, (temperature, run) in enumerate(runs.items()):
            at = place + 0.28 * (step - 1)
            ax.bar(at, run["bound"], 0.24, color=COLOURS[name], alpha=0.35, label="certificate" if not at else None)
            ax.bar(at, run["risk"], 0.24, color=COLOURS[name])
            ax.text(at, run["bound"] + 0.01, f"{run['kl']:.0f} nats", ha="center", fontsize=8)
            ax.text(at, -0.045, f"{temperature:g}", ha="center", fontsize=8)
    ax.set_xticks(range(len(found)), list(found))
    ax.tick_params(axis="x", pad=16, length=0)
    ax.set(ylim=(0, 1), ylabel="error rate: of its draws (full), certified (pale)")
    ax.set_title("What that saves: certificates by shape and temperature")
    tidy(ax)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit, certify, print and draw.

    Returns:
        By shape and temperature: certificate, risk and divergence; and the effective dimensions.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/stiff_directions"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="400 rows and fewer steps, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train = bdl.data.load("digits").train
    rows = 400 if options.quick else len(train)
    data = (train.x[:rows].double() / 16, train.y[:rows])  # units fixed in advance, so that every row may count
    spectra, candidates = {}, []
    for temperature in TEMPERATURES:
        shapes, spectra[temperature] = posteriors(data, temperature, 300 if options.quick else 1500)
        candidates += [(name, temperature, posterior) for name, posterior in shapes.items()]
    certificates = bdl.certify(
        [posterior for *_, posterior in candidates],
        data,
        delta=DELTA,
        bound="kl",
        draws=200 if options.quick else 1000,
        progress=False,
    )
    found: dict[str, dict[float, dict[str, float]]] = {name: {} for name in COLOURS}
    for (name, temperature, _), c in zip(candidates, certificates, strict=True):
        found[name][temperature] = {"bound": c.bound, "risk": c.risk, "kl": c.kl or 0.0}
    cells = [
        [name, f"{temperature:g}", f"{run['risk']:.3f}", f"{run['kl']:.0f}", ceiling(run["bound"], 3)]
        for name, runs in found.items()
        for temperature, run in runs.items()
    ]
    title = f"digits: {rows} rows, {len(spectra[1.0])} weights, no data in the prior, delta = {DELTA} for all"
    print(render(title, ["Gaussian", "temperature", "risk", "KL, nats", "certificate"], cells))
    figure = Figure(figsize=(13, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_spectrum(left, spectra)
    plot_certificates(right, found)
    path = options.out / "stiff_directions.png"
    figure.savefig(path)
    print(f"wrote {path}")
    dimensions = {temperature: effective_dimension(values, PRIOR_SD**-2) for temperature, values in spectra.items()}
    return {"certificates": found, "effective dimension": dimensions}


if __name__ == "__main__":
    main()
