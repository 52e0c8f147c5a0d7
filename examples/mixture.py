"""A Gaussian mixture whose assignments are summed out: NUTS, mean-field VI and MAP on one Pyro program.

    python examples/mixture.py --out results/mixture

150 iris flowers are known by the length of their petals alone; which of three species each one is, the model is not
told. Every flower has a discrete latent ``k`` inside the data plate. It is declared like any other latent: the density
sums it out, so gradients exist and mini-batches would, too. Means are ordered by construction, a first one plus
positive gaps; otherwise the six permutations of the components would be six modes.

What to look for: the components find the species without labels; NUTS gives a band where MAP gives one curve; and the
mean-field Gaussian, which knows no correlations, is too sure about the two species that overlap.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
    gaps = pyro.sample("gaps", dist.LogNormal(one[1:] * 0.5, 0.7).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(-one, 0.5).to_event(1))
    mean = means({"first": first, "gaps": gaps})
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(share))
        pyro.sample("y", dist.Normal(mean[k], sd[k]), obs=y)


def means(draws: dict[str, Tensor]) -> Tensor:
    """The components' means ``[..., K]``."""
    first = draws["first"][..., None]
    return torch.cat([first, first + draws["gaps"].cumsum(-1)], -1)


def components(draws: dict[str, Tensor], y: Tensor) -> Tensor:
    """``share_k N(y; mean_k, sd_k)``, ``[S, K, G]``."""
    normal = torch.distributions.Normal(means(draws)[..., None], draws["sd"][..., None])
    return draws["share"][..., None] * normal.log_prob(y).exp()


def plot_density(ax: Axes, posterior: bdl.Posterior, mode: bdl.Posterior, y: Tensor, species: Tensor) -> None:
    """The data, the posterior mean of each component, and the whole density with its 90% band."""
    grid = torch.linspace(0.6, 7.6, 351, dtype=torch.float64)
    parts = components(posterior.draws(), grid)
    ax.hist(
        [y[species == k].numpy() for k in range(K)], bins=35, range=(0.6, 7.6), density=True, stacked=True,
        color=COLOURS, alpha=0.25,
    )  # fmt: skip
    # The program's own density of new flowers under every draw, [S, G]: the assignments are summed out here as well.
    density = posterior.log_likelihood({"y": grid}).exp()
    low, high = torch.quantile(density, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    ax.fill_between(grid, low, high, color=GREY, alpha=0.35, linewidth=0, label="density, 90% (NUTS)")
    ax.plot(grid, density.mean(0), color="black", linewidth=1.6, label="density, mean (NUTS)")
    ax.plot(grid, mode.log_likelihood({"y": grid}).exp()[0], "--", color="black", linewidth=1, label="density at the mode (MAP)")
    for k in range(K):
        ax.plot(grid, parts.mean(0)[k], color=COLOURS[k], linewidth=1.6, label=f"component {k + 1}")
    ax.set(xlabel="petal length (cm)", ylabel="density", title="Found without labels (bars: the true species)")
    ax.set_xlim(0.6, 7.6)
    ax.legend(frameon=False, fontsize=9)


def plot_marginals(ax: Axes, fits: dict[str, bdl.Posterior]) -> None:
    """NUTS and VI draws of the standard deviations of the two components that overlap."""
    for label, colour, size in (("NUTS", COLOURS[0], 5), ("mean-field VI", COLOURS[1], 5)):
        draws = fits[label].draws(2000)
        ax.plot(means(draws)[:, 1], means(draws)[:, 2], ".", color=colour, markersize=size, alpha=0.3, label=label, markeredgewidth=0)
    ax.set(xlabel="mean of component 2 (cm)", ylabel="mean of component 3 (cm)")
    ax.legend(frameon=False, fontsize=9)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/mixture"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    progress = False if options.quick else None
    iris = bdl.data.load("iris")
    y, species = iris.x[:, PETAL_LENGTH], iris.y
    nuts = bdl.NUTS(warmup=200, draws=150) if options.quick else bdl.NUTS(warmup=500, draws=500)
    methods = {"NUTS": nuts, "mean-field VI": bdl.MeanFieldVI(), "MAP": bdl.MAP()}
    fits = {label: bdl.fit(mixture, {"y": y}, method, seed=0, progress=progress) for label, method in methods.items()}
    print(fits["NUTS"].summary())
    print(fits["NUTS"].diagnostics())
    for l, f in fits.items():
        d = f.draws()
        print(l, means(d).mean(0), d["sd"].mean(0), d["share"].mean(0), f.info["seconds"])
        print(means(d).std(0), d["sd"].std(0))
        r = components(d, y).mean(0).argmax(0)
        print((r==species).float().mean(), f.log_likelihood({"y": y}).logsumexp(0).sub(0).sum())
        dd = torch.cat([means(d), d["sd"], d["share"]], 1)
        print(torch.corrcoef(dd.T).round(decimals=1) if len(dd)>1 else "")
    print([ (y[species==k].mean(), y[species==k].std()) for k in range(3)])
    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_density(left, fits["NUTS"], fits["MAP"], y, species)
    plot_marginals(right, fits)
    figure.savefig(options.out / "mixture.png")
    return {}


if __name__ == "__main__":
    main()
