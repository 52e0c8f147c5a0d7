"""Eight schools, centred and non-centred: what divergences mean, and what cures them.

    python examples/eight_schools.py --out results/eight_schools

Eight schools coached pupils for a test; each reports an effect ``y`` and its standard error ``sigma`` (Rubin, 1981).
The schools' effects ``theta`` come from one population N(mu, tau^2), and two programs say so. The centred one draws
``theta`` itself. Where ``tau`` is small, ``theta`` must be close to ``mu``: a funnel, whose neck is narrower than any
step size that is right for its mouth. The non-centred one draws ``z ~ N(0, 1)`` and sets ``theta = mu + tau z``: the
same model, and no funnel.

What to look for: the sampler notices. Transitions diverge, at the neck, and the verdict says where and what to write
instead; the draws of the centred program stay out of the neck, so that its ``tau`` comes out too large, and more draws
do not help. The non-centred program has nothing to complain of and agrees with reference draws.
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
from bayesdl.evaluate.plots import BLUE, GREY, ORANGE, tidy
from bayesdl.posterior.convergence import ess_bulk, mcse_mean
from bayesdl.posterior.divergences import divergent_draws
from bayesdl.posterior.tables import render

EFFECT = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
STANDARD_ERROR = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
SCHOOLS = "ABCDEFGH"
REFERENCE = {  # posteriordb, eight_schools-eight_schools_noncentered: means of 10,000 nearly independent draws
    "mu": 4.41, "tau": 3.60, "theta A": 6.15, "theta B": 4.94, "theta C": 3.91, "theta D": 4.80, "theta E": 3.61,
    "theta F": 4.05, "theta G": 6.32, "theta H": 4.88,
}  # fmt: skip
COLOURS = {"centred": ORANGE, "non-centred": BLUE}


def population(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``mu ~ N(0, 5)``, ``tau ~ C+(5)``."""
    mu = pyro.sample("mu", dist.Normal(sigma.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_full((), 5.0)))
    return mu, tau


def centred(sigma: Tensor, y: Tensor | None = None) -> None:
    """``theta_j ~ N(mu, tau)``."""
    mu, tau = population(sigma)
    with pyro.plate("data", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(sigma: Tensor, y: Tensor | None = None) -> None:
    """``z_j ~ N(0, 1)``, ``theta_j = mu + tau z_j``."""
    mu, tau = population(sigma)
    with pyro.plate("data", len(sigma)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(sigma), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


PROGRAMS = {"centred": centred, "non-centred": non_centred}


def latents(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``mu``, ``tau`` and the eight effects, from the draws of either program."""
    theta = values["theta"] if "theta" in values else values["mu"][..., None] + values["tau"][..., None] * values["z"]
    return {"mu": values["mu"], "tau": values["tau"]} | {f"theta {s}": theta[..., k] for k, s in enumerate(SCHOOLS)}


def forest(ax: Axes, draws: dict[str, Tensor]) -> None:
    """Reported effects, and the pooled ones of the non-centred program."""
    order = EFFECT.argsort().tolist()
    place = torch.arange(8.0)
    reported = 1.645 * STANDARD_ERROR[order]
    ax.errorbar(EFFECT[order], place + 0.16, xerr=reported, fmt="o", color=GREY, linewidth=1.1, label="reported, 90%")
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    found = torch.stack([torch.quantile(draws[f"theta {SCHOOLS[k]}"].flatten(), levels) for k in order], 1)
    ax.hlines(place - 0.16, found[0], found[4], color=BLUE, linewidth=1.5, label="posterior, 90%")
    ax.hlines(place - 0.16, found[1], found[3], color=BLUE, linewidth=5, alpha=0.5, label="posterior, 50%")
    ax.plot(found[2], place - 0.16, "o", color=BLUE, markersize=5)
    ax.axvline(float(draws["mu"].mean()), color="black", linestyle=":", linewidth=1.2, label="population mean")
    ax.set_yticks(place.tolist(), [f"school {SCHOOLS[k]}" for k in order])
    ax.set(xlabel="effect of coaching (points)", title="Partial pooling: each school borrows from the others")
    ax.legend(loc="lower right", frameon=False, fontsize=8)


def neck(ax: Axes, name: str, posterior: Any) -> None:
    """``log tau`` against the effect of school A, with divergences."""
    draws = latents(posterior.draws_by_chain())
    x, y = draws["theta A"], draws["tau"].log()
    ax.plot(x.flatten(), y.flatten(), ".", color=COLOURS[name], markersize=2, alpha=0.25, rasterized=True)
    at = divergent_draws(posterior)
    ax.plot(x[at.chain, at.draw], y[at.chain, at.draw], "x", color="black", markersize=5, label=f"{len(at)} divergent")
    ax.set(xlabel="effect of school A", ylabel="log tau", xlim=(-25, 45), ylim=(-5.5, 4.5), title=name.capitalize())
    if len(at):
        ax.legend(loc="lower right", frameon=False, fontsize=8, handletextpad=0.2)


def scale(ax: Axes, found: dict[str, dict[str, Tensor]]) -> None:
    """Densities of ``log tau``: what the centred program leaves out."""
    edges = torch.linspace(-4, 4, 41, dtype=torch.float64)
    for name, draws in found.items():
        heights = torch.histogram(draws["tau"].log().flatten(), edges, density=True).hist
        ax.stairs(heights, edges, color=COLOURS[name], fill=True, alpha=0.35, label=name)
    ax.set(xlabel="log tau", ylabel="density", title="The neck that is missing")
    ax.legend(loc="upper left", frameon=False, fontsize=8)


def running(ax: Axes, found: dict[str, dict[str, Tensor]]) -> None:
    """The mean of ``tau`` as draws come in, over all chains and chain by chain."""
    for name, draws in found.items():
        tau = draws["tau"]
        count = torch.arange(1, tau.shape[1] + 1)
        ax.plot(count, (tau.cumsum(1) / count).T, color=COLOURS[name], linewidth=0.6, alpha=0.35)
        ax.plot(count, tau.mean(0).cumsum(0) / count, color=COLOURS[name], linewidth=2.2, label=f"{name}, all chains")
    ax.axhline(REFERENCE["tau"], color="black", linestyle="--", linewidth=1.2, label="reference")
    ax.set(xlabel="draws of each chain", ylabel="mean of tau so far", title="More draws do not cure a funnel")
    ax.set(ylim=(1.5, 7.5), xlim=(0, tau.shape[1]))
    ax.legend(loc="upper right", frameon=False, fontsize=8)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Sample both programs, compare both with the reference, print and draw.

    Returns:
        By program: means, their distance from the reference in standard errors, the largest R-hat, the smallest
        effective sample size, divergences, the lowest E-BFMI, and the verdict's kinds of trouble.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/eight_schools"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    warmup, draws = (150, 150) if options.quick else (1000, 1000)
    progress = False if options.quick else None
    result: dict[str, Any] = {}
    posteriors, found = {}, {}
    for name, program in PROGRAMS.items():
        method = bdl.NUTS(chains=8, warmup=warmup, draws=draws, target_accept=0.9)
        posterior = bdl.fit(program, (STANDARD_ERROR, EFFECT), method, seed=0, progress=progress)
        values = latents(posterior.draws_by_chain())
        posteriors[name], found[name] = posterior, values
        diagnostics = posterior.diagnostics()
        means = {key: float(value.mean()) for key, value in values.items()}
        errors = {key: (means[key] - REFERENCE[key]) / float(mcse_mean(value)) for key, value in values.items()}
        result[name] = {
            "means": means,
            "errors": errors,
            "rhat": max(mixing.rhat for mixing in diagnostics.sites.values()),
            "ess": min(float(ess_bulk(value)) for value in values.values()),
            "divergences": diagnostics.divergences,
            "ebfmi": diagnostics.ebfmi,
            "trouble": list(diagnostics.verdict.kinds),
        }
        print(f"\n{name.upper()}\n{diagnostics.verdict}\n")
    rows = [
        [key, f"{REFERENCE[key]:.2f}"]
        + [f"{result[name]['means'][key]:.2f} ({result[name]['errors'][key]:+.1f})" for name in PROGRAMS]
        for key in REFERENCE
    ]
    print(render("Posterior means (distance in standard errors)", ["latent", "reference", *PROGRAMS], rows))

    figure = Figure(figsize=(13, 8), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 6)
    places = [grid[0, :2], grid[0, 2:4], grid[0, 4:], grid[1, :3], grid[1, 3:]]
    left, right, third, wide, last = (tidy(figure.add_subplot(place)) for place in places)
    neck(left, "centred", posteriors["centred"])
    neck(right, "non-centred", posteriors["non-centred"])
    scale(third, found)
    forest(wide, found["non-centred"])
    running(last, found)
    path = options.out / "eight_schools.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
