"""Bayesian linear regression, where everything is known: five methods against the closed form.

    python examples/linear_regression.py --out results/linear

With ``w ~ N(0, s^2 I)`` and ``y ~ N(x w, noise^2)`` the posterior is ``N(m, C)``, ``C^-1 = Lambda = x'x / noise^2 +
I / s^2``, ``m = C x'y / noise^2``. One program goes through all methods, and each has its own closed form to meet:

- MAP finds m and knows no spread.
- Mean-field VI finds m with variances ``1 / Lambda_ii``, not ``C_ii``: the best Gaussian without correlations has the
  width of a *slice* through the posterior, so it is too narrow as soon as the columns of x are correlated.
- SGLD makes steps of size e and no correction: along a direction of curvature a its variance is
  ``(1/a) / (1 - e a / 4)``, too large by a known share.
- HMC and NUTS are exact: only Monte-Carlo error is left.

What to look for: deviations of at most about three standard errors from these targets, and the shapes in the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior import DrawsPosterior, GaussianPosterior
from bayesdl.posterior.convergence import mcse_mean
from bayesdl.posterior.tables import render

PRIOR_SD, NOISE, CORRELATION, ROWS = 1.0, 0.5, 0.85, 30
COLOURS = {"closed form": "black", "mean-field VI": "#D55E00", "SGLD": "#009E73", "HMC": "#CC79A7", "NUTS": "#0072B2"}


class Target(NamedTuple):
    """What a method should return: mean ``[2]`` and covariance ``[2, 2]``."""

    mean: Tensor
    covariance: Tensor


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """``w ~ N(0, 1)``, ``y ~ N(x w, 0.5)``."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), PRIOR_SD).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def make_data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Thirty rows with two correlated columns."""
    stream = torch.Generator().manual_seed(seed)
    a, b, e = torch.randn(3, ROWS, generator=stream, dtype=torch.float64)
    x = torch.stack([a, CORRELATION * a + (1 - CORRELATION**2) ** 0.5 * b], dim=1)
    return x, x @ torch.tensor([0.8, -0.3], dtype=torch.float64) + NOISE * e


def targets(x: Tensor, y: Tensor, sgld_step: float) -> dict[str, Target]:
    """The closed forms of the docstring, by method."""
    precision = x.T @ x / NOISE**2 + torch.eye(2, dtype=x.dtype) / PRIOR_SD**2
    covariance = precision.inverse()
    mean = covariance @ x.T @ y / NOISE**2
    curvature, axes = torch.linalg.eigh(precision)
    widened = axes @ torch.diag(1 / curvature / (1 - sgld_step * curvature / 4)) @ axes.T
    exact = Target(mean, covariance)
    return {
        "closed form": exact,
        "MAP": Target(mean, torch.zeros_like(covariance)),
        "mean-field VI": Target(mean, torch.diag(1 / precision.diagonal())),
        "SGLD": Target(mean, widened),
        "HMC": exact,
        "NUTS": exact,
    }


def moments(posterior: bdl.Posterior) -> Target:
    """Mean and covariance of w under a posterior: those that it knows, else those of its draws."""
    if isinstance(posterior, GaussianPosterior):
        return Target(posterior.mean, torch.diag(posterior.sd**2))
    w = posterior.draws()["w"]
    return Target(w.mean(0), torch.cov(w.T, correction=0) if len(w) > 1 else torch.zeros(2, 2, dtype=w.dtype))


def deviation(posterior: bdl.Posterior, target: Target) -> float:
    """Largest distance from the target over means, variances and covariance.

    In Monte-Carlo standard errors for chains; for methods without Monte-Carlo error relative to the target's own sds
    (for MAP: the absolute distance).
    """
    if isinstance(posterior, DrawsPosterior) and posterior.z.shape[1] > 1:
        centred = posterior.draws_by_chain()["w"] - target.mean
        products = torch.stack([centred[..., 0] ** 2, centred[..., 1] ** 2, centred[..., 0] * centred[..., 1]], dim=-1)
        both = torch.cat([centred, products], dim=-1)
        c = target.covariance
        wanted = torch.stack([c.new_zeros(()), c.new_zeros(()), c[0, 0], c[1, 1], c[0, 1]])
        return float(((both.mean((0, 1)) - wanted) / mcse_mean(both)).abs().max())
    found = moments(posterior)
    scale = target.covariance.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    errors = torch.cat([(found.mean - target.mean) / scale, found.covariance.diagonal().sqrt() / scale - 1.0])
    return float(errors[: 4 if isinstance(posterior, GaussianPosterior) else 2].abs().max())


def pair(values: Tensor) -> str:
    """Two numbers for a cell of the table."""
    return ", ".join(f"{value:.4f}" for value in values.tolist())


def ellipse(of: Target, level: float = 0.9) -> Tensor:
    """The contour that holds ``level`` of a Gaussian, ``[2, 181]``."""
    angle = torch.linspace(0, 2 * torch.pi, 181, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()]) * (-2 * torch.log(torch.tensor(1 - level))).sqrt()
    return of.mean[:, None] + torch.linalg.cholesky(of.covariance) @ circle


def plot_ellipses(ax: Axes, found: Mapping[str, Target], closed: Target, draws: Tensor) -> None:
    """90% contours of all methods, over draws by NUTS."""
    ax.plot(*draws[::3].T, ".", color=COLOURS["NUTS"], alpha=0.25, markersize=4, markeredgewidth=0)
    ax.plot(*ellipse(closed), color=COLOURS["closed form"], linewidth=3, label="closed form")
    for label, dashes in (("mean-field VI", "-"), ("SGLD", "-"), ("HMC", (0, (2, 5))), ("NUTS", (3.5, (2, 5)))):
        width = 2 if label in ("mean-field VI", "SGLD") else 3
        ax.plot(*ellipse(found[label]), color=COLOURS[label], linestyle=dashes, linewidth=width, label=label)
    ax.plot(*found["MAP"].mean, "X", color="black", markersize=9, label="MAP", linestyle="none")
    ax.set(xlabel="weight 1", ylabel="weight 2", aspect="equal", title="90% contours of p(w | y)")
    ax.legend(frameon=False, fontsize=9)


def plot_directions(ax: Axes, found: Mapping[str, Target], goals: Mapping[str, Target]) -> None:
    """Standard deviation along every direction, relative to the truth: found (solid) and expected (dotted)."""
    angle = torch.linspace(0, torch.pi, 181, dtype=torch.float64)
    u = torch.stack([angle.cos(), angle.sin()])

    def along(target: Target) -> Tensor:
        return torch.einsum("ig,ij,jg->g", u, target.covariance, u).sqrt()

    truth = along(goals["closed form"])
    ax.axhline(1, color="black", linewidth=1)
    for label in ("mean-field VI", "SGLD", "HMC", "NUTS"):
        ax.plot(angle.rad2deg(), along(found[label]) / truth, color=COLOURS[label], linewidth=2, label=label)
        if label in ("mean-field VI", "SGLD"):
            ax.plot(angle.rad2deg(), along(goals[label]) / truth, ":", color="black", linewidth=1.4)
    ax.plot([], [], ":", color="black", label="closed form of VI and SGLD")
    ax.set(xlabel="direction in the plane of the weights (degrees)", ylabel="standard deviation / exact one")
    ax.set(xlim=(0, 180), xticks=range(0, 181, 45), title="How wide, in every direction")
    ax.legend(frameon=False, fontsize=9)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit by five methods, compare each with its closed form, print and draw.

    Returns:
        By method its deviation from its closed form (see ``deviation``), its sds and those expected.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/linear"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    x, y = make_data()
    draws = 250 if options.quick else 2000
    methods = {
        "MAP": bdl.MAP(optimizer="lbfgs", steps=50),
        "mean-field VI": bdl.MeanFieldVI(steps=1000 if options.quick else 3000, samples=64),
        "SGLD": bdl.SGLD(warmup=500, draws=draws, thin=10),
        "HMC": bdl.HMC(warmup=200, draws=draws),
        "NUTS": bdl.NUTS(warmup=200, draws=draws),
    }
    progress = False if options.quick else None
    fits = {label: bdl.fit(regression, (x, y), method, seed=0, progress=progress) for label, method in methods.items()}
    found = {label: moments(posterior) for label, posterior in fits.items()}
    goals = targets(x, y, fits["SGLD"].info["step_size"])

    result, rows = {}, []
    for label, posterior in fits.items():
        off = deviation(posterior, goals[label])
        sds, wanted = (t.covariance.diagonal().sqrt() for t in (found[label], goals[label]))
        result[label] = {"deviation": off, "sd": sds.tolist(), "expected": wanted.tolist()}
        unit = {"MAP": "absolute", "mean-field VI": "of an sd"}.get(label, "standard errors")
        rows.append([label, pair(found[label].mean), pair(sds), pair(wanted), f"{off:.2g} {unit}"])
    exact = pair(goals["NUTS"].covariance.diagonal().sqrt())
    rows.append(["closed form", pair(goals["NUTS"].mean), exact, exact, ""])
    print(render("Weights 1 and 2", ["method", "means", "sds", "sds expected", "largest deviation"], rows))

    figure = Figure(figsize=(12, 5.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_ellipses(left, found, goals["closed form"], fits["NUTS"].draws()["w"])
    plot_directions(right, found, goals)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    path = options.out / "linear.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
