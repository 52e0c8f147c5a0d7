"""Stochastic gradient descent as a Markov chain: where it stays, how noisy it is, and when it finds the deeper well.

    python examples/sgd_markov_chain.py --out results/sgd

The first four panels run plain mini-batch SGD on a real least-squares problem with one weight: the progression of
diabetes regressed on the body mass index. Three laws are offered for the place where it stays, each with one more
correction:

- Gibbs: variance ``T / lambda`` with the temperature ``T = eta s^2 / (2b)``; s^2 is the variance of one row's gradient
  at the minimum, lambda the curvature. Right as eta tends to 0.
- finite steps: divided by ``1 - eta lambda / 2``. Right if the noise is the same everywhere.
- finite steps and rows: the noise of a row grows with the distance from the minimum, by the variance V of the rows'
  curvatures: ``(eta^2 s^2 / b) / (2 eta lambda - eta^2 lambda^2 - eta^2 V / b)``. The exact variance for least squares;
  the law itself then has longer tails than a Gaussian.

The fifth panel shows the spectrum of the gradient covariance of a network, at its start and after training. The sixth
lets the Gaussian model of SGD start in the wrong well of a double well and asks how often it ends in the right one.

What to look for: one temperature means one law only while steps are small; the noise of a network lives in few
directions; and annealing beats steps that are too large or too small, is never certain, and hardly beats the best
constant one.
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
from torch.func import grad

import bayesdl as bdl
from bayesdl.bounds import clopper_pearson_upper
from bayesdl.posterior.tables import render
from bayesdl.theory.gibbs import double_well, langevin_chain, linear_scaling, temperature
from bayesdl.theory.gradient_noise import EmpiricalLoss, Spectrum, gradient_covariance, gradient_spectrum
from bayesdl.theory.sgd import isotropic_gradient, minibatch_gradient, run

SETTINGS = ((0.05, 2), (0.5, 8), (1.5, 32))  # step size, rows in a mini-batch
SCALING = (0.0625, 2)  # scaled to all mini-batches with the same temperature
LEVELS = (0.4, 0.3, 0.2, 0.17, 0.15, 0.13, 0.11, 0.1)
START, RIDGE = 0.83, 0.04  # the shallower of the two wells, and the top between them
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
LAWS = {"Gibbs": ("--", GREY), "finite steps": ("-.", ORANGE), "finite steps and rows": ("-", "black")}


class Slope:
    """Least squares with one weight on standardised numbers, and what is known of SGD on it."""

    def __init__(self) -> None:
        """Take the body mass index of the diabetes data."""
        data = bdl.data.load("diabetes").train
        x, y = data.x[:, data.x_names.index("bmi")].double(), data.y.double()
        x, y = ((v - v.mean()) / v.std(correction=0) for v in (x, y))
        self.loss = EmpiricalLoss.of_function(lambda w, x, y: 0.5 * (w[0] * x - y) ** 2, x, y, batch_size=2**18)
        self.minimum = float(x @ y / (x @ x))
        self.curvature = float(x.square().mean())
        self.spread = float(x.square().var(correction=0))
        self.noise = float(gradient_covariance(self.loss, torch.tensor([self.minimum], dtype=torch.float64)))

    def variances(self, eta: float, b: float) -> dict[str, float]:
        """The variance of the weight by the three laws."""
        t, a = temperature(eta, b, noise_variance=self.noise), self.curvature
        exact = eta**2 * self.noise / b / (2 * eta * a - eta**2 * (a**2 + self.spread / b))
        return {"Gibbs": t / a, "finite steps": t / a / (1 - eta * a / 2), "finite steps and rows": exact}

    def sample(self, eta: float, b: int, chains: int) -> Tensor:
        """Weights minus the minimum of independent chains in equilibrium, ``[chains, 8]`` about e-fold times apart."""
        start = torch.full((chains, 1), self.minimum, dtype=torch.float64)
        apart = max(1, round(1 / eta))
        noisy = minibatch_gradient(self.loss, b)
        return run(noisy, start, step_size=eta, warmup=8 * apart, steps=8 * apart, thin=apart)[..., 0] - self.minimum

    def measure(self, eta: float, b: int, chains: int) -> dict[str, Any]:
        """Measured variance with its standard error, the laws' variances, and the sample."""
        sample = self.sample(eta, b, chains)
        squares = sample.square().mean(1)
        error = float(squares.std()) / chains**0.5
        return {"sample": sample.flatten(), "measured": float(squares.mean()), "error": error, **self.variances(eta, b)}


def spectra(quick: bool) -> dict[str, tuple[Spectrum, float]]:
    """Gradient spectra of a network before and after training, each with |full gradient|^2 / trace."""
    data = bdl.data.load("iris" if quick else "digits")
    model = bdl.models.mlp(data, hidden=(16, 8) if quick else (24,))
    trained = bdl.fit(model, data.train, bdl.MAP(optimizer="lbfgs", steps=30 if quick else 200), progress=False)
    loss = EmpiricalLoss.of_density(trained.problem.density, batch_size=512)
    found = {}
    for label, w in (("a draw from the prior", trained.problem.density.prior_draws(1)[0]), ("MAP", trained.z[0, 0])):
        spectrum = gradient_spectrum(loss, w)
        full = float(loss.gradient(w[None]).square().sum())
        found[label] = spectrum, full / float(spectrum.eigenvalues.sum())
    return found


def wells(runs: int, each: int) -> dict[str, dict[str, Any]]:
    """Share of runs in the deeper well over time: simulated with 99% intervals, and exact on a grid."""
    slope = grad(lambda w: double_well(w).sum())
    grid = torch.linspace(-4, 4, 251, dtype=torch.float64)
    plans = {
        "annealed": LEVELS,
        **{f"step size {eta} throughout": (eta,) * len(LEVELS) for eta in (LEVELS[0], 0.15, LEVELS[-1])},
    }
    every = each // 5
    powers = {eta: langevin_chain(slope, grid, eta, 1).power(every) for eta in LEVELS}
    found = {}
    for position, (label, levels) in enumerate(plans.items()):
        w = torch.full((runs, 1), START, dtype=torch.float64)
        law = torch.zeros_like(grid)
        law[(grid - START).abs().argmin()] = 1.0
        exact, counts = [0.0], [0]
        for level, eta in enumerate(levels):
            noisy, seed = isotropic_gradient(slope, 1), position * len(LEVELS) + level
            path = run(noisy, w, step_size=eta, steps=each, thin=every, seed=seed)
            w = path[:, -1]
            counts += (path[..., 0] < RIDGE).sum(0).tolist()
            for _ in range(5):
                law = powers[eta].T @ law
                exact.append(float(law[grid < RIDGE].sum()))
        high = float(clopper_pearson_upper(errors=counts[-1], n=runs, delta=0.005))
        low = 1 - float(clopper_pearson_upper(errors=runs - counts[-1], n=runs, delta=0.005))
        shares = [count / runs for count in counts]
        steps = [every * k for k in range(len(shares))]
        found[label] = {"steps": steps, "shares": shares, "exact": exact, "low": low, "high": high}
    return found


def plot_histogram(ax: Axes, eta: float, b: int, found: Mapping[str, Any]) -> None:
    """The stationary histogram of SGD against the three laws."""
    width = 4.2 * found["measured"] ** 0.5
    bins = torch.linspace(-width, width, 61, dtype=torch.float64)
    ax.hist(found["sample"], bins=bins.numpy(), density=True, color=BLUE, alpha=0.35, label="SGD")
    fine = torch.linspace(-width, width, 401, dtype=torch.float64)
    for label, (line, colour) in LAWS.items():
        density = torch.distributions.Normal(0.0, found[label] ** 0.5).log_prob(fine).exp()
        ax.plot(fine, density, line, color=colour, linewidth=2, label=label)
    ax.set(xlabel="weight minus least-squares solution", yticks=[], title=f"step size {eta}, {b} rows in a mini-batch")


def plot_scaling(ax: Axes, slope: Slope, found: Mapping[float, Mapping[str, Any]]) -> None:
    """Variances at one temperature, relative to the Gibbs law."""
    etas = list(found)
    fine = torch.logspace(-4.2, 0.62, 80, base=2).tolist()
    laws = [slope.variances(eta, eta * SCALING[1] / SCALING[0]) for eta in fine]
    for label, (line, colour) in LAWS.items():
        ax.plot(fine, [law[label] / law["Gibbs"] for law in laws], line, color=colour, linewidth=2)
    ratio = [found[e]["measured"] / found[e]["Gibbs"] for e in etas]
    error = [3 * found[e]["error"] / found[e]["Gibbs"] for e in etas]
    ax.errorbar(etas, ratio, yerr=error, fmt="o", color=BLUE, label="SGD (3 standard errors)")
    ax.set(xscale="log", yscale="log", ylabel="variance / Gibbs variance")
    ax.set_xlabel(f"step size; rows in a mini-batch = {SCALING[1] / SCALING[0]:g} x step size")
    ax.set_title("Linear scaling: one temperature, growing steps")
    ax.set_xticks(etas, [f"{e:g}" for e in etas])
    ax.set_yticks([1, 2, 4], ["1", "2", "4"])
    ax.minorticks_off()


def plot_spectra(ax: Axes, found: Mapping[str, tuple[Spectrum, float]]) -> None:
    """Eigenvalues of the gradient covariance, relative to the largest."""
    for (label, (spectrum, _)), colour in zip(found.items(), (ORANGE, BLUE), strict=True):
        relative = spectrum.eigenvalues[: spectrum.rank] / spectrum.eigenvalues[0]
        share = f"{100 * spectrum.fraction():.1f}% above 1/1000"
        ax.plot(range(1, len(relative) + 1), relative, color=colour, linewidth=2, label=f"{label}: {share}")
    ax.axhline(1e-3, color=GREY, linewidth=0.8, linestyle=":")
    ax.axvline(spectrum.dim, color=GREY, linewidth=0.8, linestyle=":")
    ax.text(spectrum.dim, 1e-6, f"D = {spectrum.dim} ", rotation=90, ha="right", va="center", color=GREY, fontsize=8)
    ax.set(xscale="log", yscale="log", ylim=(1e-8, 2), xlabel="eigenvalue number", ylabel="eigenvalue / largest")
    ax.set_title("Gradient covariance of a network")


def plot_wells(ax: Axes, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Shares in the deeper well over time."""
    for (label, row), colour in zip(found.items(), (BLUE, ORANGE, GREEN, PURPLE), strict=True):
        ax.plot(row["steps"], row["exact"], color=colour, linewidth=2, label=label)
        ax.plot(row["steps"], row["shares"], ".", color=colour, markersize=5)
    inner = ax.inset_axes((0.64, 0.23, 0.34, 0.23))
    w = torch.linspace(-1.8, 1.8, 200)
    inner.plot(w, double_well(w), color=GREY)
    inner.plot(START, double_well(torch.tensor(START)), "o", color="black", markersize=5)
    inner.set(xticks=[], yticks=[], title="start")
    inner.title.set_fontsize(8)
    ax.set(xlabel="step", ylabel="share in the deeper well", ylim=(-0.02, 1.3), title="Annealing on a double well")
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run SGD and its models, compare with the laws, print and draw.

    Returns:
        settings and scaling: measured variances with errors and the laws', by setting; spectrum: rank, fraction and
        |full gradient|^2 / trace; wells: final shares, exact ones and 99% intervals.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/sgd"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer chains and a smaller network, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    chains = 600 if options.quick else 6000
    slope = Slope()
    settings = {(eta, b): slope.measure(eta, b, chains) for eta, b in SETTINGS}
    batches = (2, 8, 32, 48) if options.quick else (2, 4, 8, 16, 32, 48)
    scaled = {linear_scaling(*SCALING, b): b for b in batches}
    scaling = {eta: slope.measure(eta, b, chains) for eta, b in scaled.items()}
    numbers = ("measured", "error", *LAWS)
    measured = [(*key, r) for key, r in settings.items()] + [(eta, scaled[eta], r) for eta, r in scaling.items()]
    rows = [[f"{eta:g}", str(b), *(f"{1e3 * r[key]:.2f}" for key in numbers)] for eta, b, r in measured]
    print(render("Variance of the weight, times 1000", ["step size", "rows", *numbers], rows))

    noise = spectra(options.quick)
    rows = [
        [label, str(s.dim), str(s.n), str(s.rank), f"{100 * s.fraction():.2f}%", f"{ratio:.2g}"]
        for label, (s, ratio) in noise.items()
    ]
    columns = ["at", "weights", "rows", "rank", "above 1/1000", "|gradient|^2 / trace"]
    print(render("Covariance of the rows' gradients", columns, rows))

    found = wells(runs=500 if options.quick else 4000, each=200 if options.quick else 500)
    rows = [
        [label, f"{r['shares'][-1]:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", f"{r['exact'][-1]:.3f}"]
        for label, r in found.items()
    ]
    print(render("Runs that end in the deeper well", ["plan", "share", "99% interval", "exact"], rows))

    figure = Figure(figsize=(15, 8.4), dpi=150, layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, (eta, b) in zip(axes[0], SETTINGS, strict=True):
        plot_histogram(ax, eta, b, settings[eta, b])
    plot_scaling(axes[1, 0], slope, scaling)
    plot_spectra(axes[1, 1], noise)
    plot_wells(axes[1, 2], found)
    for ax in (axes[0, 0], *axes[1]):
        ax.legend(frameon=False, fontsize=8, loc="lower left" if ax is axes[1, 1] else "upper left")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    path = options.out / "sgd_markov_chain.png"
    figure.savefig(path)
    print(f"wrote {path}")

    return {
        "settings": {f"{eta}, {b}": {k: r[k] for k in numbers} for (eta, b), r in settings.items()},
        "scaling": {f"{eta:g}": {k: r[k] for k in numbers} for eta, r in scaling.items()},
        "spectrum": {
            label: {"dim": s.dim, "rows": s.n, "rank": s.rank, "fraction": s.fraction(), "gradient": ratio}
            for label, (s, ratio) in noise.items()
        },
        "wells": {
            label: {"share": r["shares"][-1], "exact": r["exact"][-1], "low": r["low"], "high": r["high"]}
            for label, r in found.items()
        },
    }


if __name__ == "__main__":
    main()
