"""Eight schools: a hand-written Pyro program, sampled by NUTS and checked against quadrature.

    python examples/hierarchical_regression.py --out results/schools

Eight schools coached pupils for a test; each reports an effect ``y`` and its standard error ``sigma`` (Rubin, 1981).
The program says that the schools' effects ``theta = mu + tau z`` come from one population, so each school borrows from
the others. It is non-centred: ``z`` is a priori independent of ``mu`` and ``tau``, which spares the sampler the funnel
that ``theta`` given a small ``tau`` would be.

What to look for: the effects shrink towards the population's mean, the more the less certain they are; the summary's
R-hat stays near 1; and sampled moments lie within a few Monte-Carlo standard errors of the exact ones. Those exist
because only ``tau`` needs an integral done by numbers: given ``tau`` everything is Gaussian.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import MultivariateNormal

import bayesdl as bdl
from bayesdl.posterior.convergence import mcse_mean
from bayesdl.posterior.tables import render

SCHOOLS = "ABCDEFGH"
EFFECT = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
STANDARD_ERROR = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
MU_SD, TAU_SCALE = 5.0, 5.0
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def schools(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    """``mu ~ N(0, 5)``, ``tau ~ C+(5)``, ``z_j ~ N(0, 1)``, ``y_j ~ N(mu + tau z_j, sigma_j)``."""
    zero = sigma.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, MU_SD))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + TAU_SCALE))
    z = pyro.sample("z", dist.Normal(torch.zeros_like(sigma), 1.0).to_event(1))
    with pyro.plate("data", len(sigma)):
        observed: Tensor = pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)
    return observed


def given_tau(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In closed form: log p(y | tau) ``[G]``, E[mu | tau, y] ``[G]`` and E[theta | tau, y] ``[G, 8]``."""
    weight = 1 / (STANDARD_ERROR**2 + tau[:, None] ** 2)
    mu = (weight * EFFECT).sum(1) / (weight.sum(1) + MU_SD**-2)
    own = tau[:, None] ** 2 * weight  # the share of its own effect that a school keeps
    theta = own * EFFECT + (1 - own) * mu[:, None]
    covariance = torch.diag_embed(1 / weight) + MU_SD**2
    return MultivariateNormal(torch.zeros_like(EFFECT), covariance).log_prob(EFFECT), mu, theta


def exact(nodes: int = 4000) -> dict[str, Any]:
    """Posterior means by quadrature over ``tau = 5 tan(u)``, under which its half-Cauchy prior is uniform."""
    u = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes * torch.pi / 2
    tau = TAU_SCALE * u.tan()
    log_evidence, mu, theta = given_tau(tau)
    weight = log_evidence.softmax(0)
    moments = {"mu": float(weight @ mu), "tau": float(weight @ tau), "theta": weight @ theta}
    # dtau/du = 5 (1 + tan^2 u), so the density of tau is the weight over the width of its cell.
    density = weight / (torch.pi / 2 / nodes * TAU_SCALE * (1 + u.tan() ** 2))
    return {**moments, "grid": tau, "density": density}


def picture(theta: Tensor, tau: Tensor, truth: dict[str, Any], path: Path) -> None:
    """Left: effects before and after pooling. Right: how pooling depends on tau, and which tau the data support."""
    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    order = EFFECT.argsort()
    place = torch.arange(len(SCHOOLS))
    left.errorbar(
        EFFECT[order], place + 0.14, xerr=1.645 * STANDARD_ERROR[order], fmt="o", color=GREY, alpha=0.75,
        linewidth=1.2, label="reported effect, 90%",
    )  # fmt: skip
    low, lower, upper, high = torch.quantile(theta, torch.tensor([0.05, 0.25, 0.75, 0.95]).double(), dim=0)[:, order]
    left.hlines(place - 0.14, low, high, color=BLUE, linewidth=1.6, label="posterior, 90%")
    left.hlines(place - 0.14, lower, upper, color=BLUE, linewidth=5, alpha=0.5, label="posterior, 50%")
    left.plot(theta.mean(0)[order], place - 0.14, "o", color=BLUE, label="posterior mean")
    left.axvline(truth["mu"], color=ORANGE, linestyle="--", linewidth=1.4, label="population mean")
    left.set_yticks(place.tolist(), [f"school {SCHOOLS[k]}" for k in order])
    left.set(xlabel="effect of coaching (points)", title="Eight schools: effects are pulled together")
    left.legend(loc="lower right", frameon=False, fontsize=9)

    shown = truth["grid"] < 20
    grid, lines = truth["grid"][shown], given_tau(truth["grid"][shown])[2]
    right.plot(grid, lines, color=BLUE, linewidth=1.3)
    height = -torch.inf
    for k in lines[-1].argsort().tolist():
        height = max(height + 0.75, float(lines[-1, k]))  # letters of neighbouring lines must not overlap
        right.annotate(SCHOOLS[k], (20.2, height), color=BLUE, va="center", fontsize=9, annotation_clip=False)
    edges = torch.quantile(tau, torch.linspace(0, 1, 9, dtype=torch.float64))
    for a, b in itertools.pairwise(edges):
        inside = (tau >= a) & (tau <= b)
        right.plot(tau[inside].mean().expand(8), theta[inside].mean(0), "o", color=ORANGE, markersize=3.5)
    right.plot([], [], color=BLUE, label="E[effect | tau], closed form")
    right.plot([], [], "o", color=ORANGE, markersize=3.5, label="draws, in eighths of tau")
    below = right.twinx()
    below.hist(tau.clamp(max=21), bins=42, range=(0, 21), density=True, color=GREY, alpha=0.3)
    below.plot(grid, truth["density"][shown], color=GREY, linewidth=1.2)
    below.set(ylim=(0, 0.75), yticks=[])
    right.plot([], [], color=GREY, label="density of tau: draws and quadrature")
    right.set(xlabel="tau, spread of the population (points)", ylabel="effect (points)")
    right.set(title="The smaller tau, the stronger the pull", xlim=(0, 20), xticks=range(0, 21, 5), ylim=(-6, 24))
    right.legend(loc="upper left", frameon=False, fontsize=9)
    for ax in (left, right, below):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Sample, compare with the exact moments, print and draw.

    Returns:
        Sampled and exact means, their distance in Monte-Carlo standard errors, the largest R-hat, divergences.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/schools"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    warmup, draws = (150, 150) if options.quick else (1000, 1000)
    method = bdl.NUTS(warmup=warmup, draws=draws, target_accept=0.9)
    posterior = bdl.fit(schools, (STANDARD_ERROR, EFFECT), method, seed=0, progress=False if options.quick else None)
    print(posterior.summary())

    values = posterior.draws_by_chain()
    effects = posterior.function_draws(STANDARD_ERROR)  # the mean of y_j under every draw is theta_j: [C, S, 8]
    truth = exact()
    sampled = {"mu": values["mu"], "tau": values["tau"]}
    sampled |= {f"theta {name}": effects[..., k] for k, name in enumerate(SCHOOLS)}
    expected = {"mu": truth["mu"], "tau": truth["tau"]}
    expected |= {f"theta {name}": float(truth["theta"][k]) for k, name in enumerate(SCHOOLS)}
    result = {}
    for name, value in sampled.items():
        mean, error = float(value.mean()), float(mcse_mean(value))
        result[name] = {"mean": mean, "exact": expected[name], "errors": (mean - expected[name]) / error}
    print(
        render(
            "Posterior means: NUTS against quadrature",
            ["latent", "NUTS", "exact", "difference in standard errors"],
            [[name, f"{r['mean']:.3f}", f"{r['exact']:.3f}", f"{r['errors']:+.1f}"] for name, r in result.items()],
        )
    )
    path = options.out / "schools.png"
    picture(effects.flatten(0, 1), values["tau"].flatten(), truth, path)
    print(f"wrote {path}")
    diagnostics = posterior.diagnostics()
    rhat = max(diagnostics.rhat, *(mixing.rhat for mixing in diagnostics.sites.values()))
    return {"means": result, "rhat": rhat, "divergences": diagnostics.divergences}


if __name__ == "__main__":
    main()
