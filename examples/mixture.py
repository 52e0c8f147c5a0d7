"""A Gaussian mixture whose assignments are summed out: NUTS, mean-field VI and MAP on one Pyro program.

    python examples/mixture.py --out results/mixture

150 iris flowers are known by the length of their petals alone; which of three species each one is, the model is not
told. Every flower has a discrete latent ``k`` inside the data plate. It is declared like any other latent; the density
sums it out, so that there are gradients. The components' means are ordered by construction, a first one plus positive
gaps: otherwise their 6 permutations would be 6 modes.

What to look for: the components find the species, about 19 flowers in 20; where MAP gives one curve, NUTS gives a band;
and mean-field VI, whose Gaussian has independent coordinates, cuts its way across the ridge along which the overlapping
components trade flowers: it is about twice too sure of their means.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior.tables import render

K = 3
PETAL_LENGTH = 2  # column of the iris data
COLOURS = ("#0072B2", "#D55E00", "#009E73")
GREY = "#555555"


def mixture(y: Tensor) -> None:
    """``y_i ~ N(mean[k_i], sd[k_i])`` with ``k_i ~ Categorical(share)`` and ``mean[0] < mean[1] < mean[2]``."""
    one = y.new_ones(K)
    share = pyro.sample("share", dist.Dirichlet(5 * one))
    first = pyro.sample("first", dist.Normal(2 * one[0], 2.0))
    gaps = pyro.sample("gaps", dist.LogNormal(0.5 * one[1:], 0.7).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(-one, 0.5).to_event(1))
    mean = means({"first": first, "gaps": gaps})
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(share))
        pyro.sample("y", dist.Normal(mean[k], sd[k]), obs=y)


def means(draws: Mapping[str, Tensor]) -> Tensor:
    """The components' means ``[..., K]``."""
    first = draws["first"][..., None]
    return torch.cat([first, first + draws["gaps"].cumsum(-1)], -1)


def components(draws: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """``share_k N(y; mean_k, sd_k)`` averaged over draws, ``[K, G]``: proportional to P(k | y)."""
    normal = torch.distributions.Normal(means(draws)[..., None], draws["sd"][..., None])
    return (draws["share"][..., None] * normal.log_prob(y).exp()).mean(0)


def plot_density(ax: Axes, fits: Mapping[str, bdl.Posterior], y: Tensor, species: Tensor) -> None:
    """The data, the mean of each component over the posterior, and the whole density with its 90% band."""
    grid = torch.linspace(0.6, 7.4, 341, dtype=torch.float64)
    by_species = [y[species == k].numpy() for k in range(K)]
    ax.hist(by_species, bins=34, range=(0.55, 7.35), density=True, stacked=True, color=COLOURS, alpha=0.25)
    # The program's own density of new flowers, a row for every draw: the assignments are summed out here as well.
    density = fits["NUTS"].log_likelihood({"y": grid}).exp()
    low, high = torch.quantile(density, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    ax.fill_between(grid, low, high, color=GREY, alpha=0.35, linewidth=0, label="density of new flowers, 90%")
    mode = fits["MAP"].log_likelihood({"y": grid})[0].exp()
    ax.plot(grid, mode, ":", color="black", linewidth=1.6, label="density at the mode")
    for k, part in enumerate(components(fits["NUTS"].draws(), grid)):
        ax.plot(grid, part, color=COLOURS[k], linewidth=2, label=f"component {k + 1}, posterior mean")
    ax.set(xlabel="petal length (cm)", ylabel="density", xlim=(0.6, 7.4))
    ax.set_title("Three components find three species (bars), untold")
    ax.legend(frameon=False, fontsize=9)


def plot_ridge(ax: Axes, fits: Mapping[str, bdl.Posterior], truth: tuple[float, float]) -> None:
    """Draws by NUTS and by VI, and the mode, of two quantities that trade off."""
    for label, colour, alpha in (("NUTS", COLOURS[0], 0.35), ("mean-field VI", COLOURS[1], 0.25)):
        draws = fits[label].draws(1200)
        x, y = draws["share"][:, 1], means(draws)[:, 2]
        ax.plot(x, y, ".", color=colour, markersize=5, alpha=alpha, markeredgewidth=0)
        correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
        ax.plot([], [], "o", color=colour, label=f"{label}: correlation {correlation:.2f}")
    mode = fits["MAP"].draws()
    ax.plot(mode["share"][:, 1], means(mode)[:, 2], "X", color="black", markersize=9, label="MAP")
    ax.plot(*truth, "*", color="#F0E442", markeredgecolor="black", markersize=15, label="the species' own values")
    ax.set(xlabel="share of component 2", ylabel="mean of component 3 (cm)")
    ax.set_title("The overlapping components trade flowers")
    ax.legend(frameon=False, fontsize=9, loc="upper left")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit by three methods, print and draw.

    Returns:
        By method: means of the components and their sd over draws, and the accuracy of the assignments; the species'
        own means; NUTS's largest R-hat.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/mixture"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    iris = bdl.data.load("iris")
    y, species = iris.x[:, PETAL_LENGTH], iris.y
    methods = {
        "NUTS": bdl.NUTS(warmup=60, draws=60, max_depth=4) if options.quick else bdl.NUTS(warmup=300, draws=400),
        "mean-field VI": bdl.MeanFieldVI(steps=600 if options.quick else 3000),
        "MAP": bdl.MAP(optimizer="lbfgs", steps=200),
    }
    starts = {"NUTS": "map"}  # each chain starts at the mode that it finds from a draw of the prior
    progress = False if options.quick else None
    fits = {
        label: bdl.fit(mixture, {"y": y}, method, seed=0, init=starts.get(label), progress=progress)
        for label, method in methods.items()
    }
    print(fits["NUTS"].summary())

    own = torch.stack([y[species == k].mean() for k in range(K)])
    result: dict[str, Any] = {"species": own.tolist()}
    rows = [["the species", *(f"{m:.2f}" for m in own), ""]]
    for label, posterior in fits.items():
        draws = posterior.draws()
        mean, sd = means(draws).mean(0), means(draws).std(0, correction=0)
        accuracy = float((components(draws, y).argmax(0) == species).double().mean())
        result[label] = {"means": mean.tolist(), "sd": sd.tolist(), "accuracy": accuracy}
        several = len(draws["share"]) > 1
        cells = [f"{m:.2f} +- {s:.2f}" if several else f"{m:.2f}" for m, s in zip(mean, sd, strict=True)]
        rows.append([label, *cells, f"{accuracy:.1%}"])
    columns = ["method", *(f"mean {k + 1} (cm)" for k in range(K)), "flowers assigned right"]
    print(render("Means of the components", columns, rows))
    diagnostics = fits["NUTS"].diagnostics()
    result["rhat"] = max(mixing.rhat for mixing in diagnostics.sites.values())

    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    plot_density(left, fits, y, species)
    plot_ridge(right, fits, (float((species == 1).double().mean()), float(own[2])))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    path = options.out / "mixture.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
