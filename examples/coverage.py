"""Does a bound hold as often as it says? Draws repeated from known laws, for every concentration bound.

    python examples/coverage.py --out results/coverage

A law of losses in [0, 1] with a known mean is drawn from again and again. Each time every bound is computed from the
drawn losses alone and compared with the mean. A bound at delta = 5% may be below it in at most 5% of the draws.

The first two laws are made so that the tightest bounds fail at nearly that rate, and so that what is wrong shows.

What to look for: no bound fails too often. Two things that people use instead do: the interval of the central limit
theorem ("average + 1.645 standard errors"), and a bound of one predictor for the best of twenty, whose 20 chances to be
lucky nobody counted. With delta / 20 for each, that one holds too.

A loose bound always holds, so the second panel shows what the bounds cost: their mean distance from the truth, against
the number of losses. Where losses are 0 or 1 the binomial tail is exact and nothing beats it. Where they hardly vary,
bounds that know only the range pay 1 / sqrt(n) and those that see the variance pay 1 / n. Only a variance
that is known leads below the dotted line: a loss of 1 that comes with probability log(1 / delta) / n stays away from
all n draws with probability delta, and who does not know of it cannot exclude it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from bayesdl import bounds
from bayesdl.posterior.tables import render

Array = NDArray[np.float64]

DELTA, N, CANDIDATES = 0.05, 100, 20
# The error rate just above the exact bound for 2 errors: at most 2 come with probability delta, so the bound is tight.
RATE = 1.0001 * float(bounds.clopper_pearson_upper(errors=2, n=N, delta=DELTA))
RARE = 0.034  # no large loss in N draws with probability 3%
LAWS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, ...]], Array], float, float]] = {
    # name: draws, mean, variance
    "errors, 1 in 16": (lambda rng, size: (rng.uniform(size=size) < RATE).astype(float), RATE, RATE * (1 - RATE)),
    "about 0.3, rarely 1": (
        lambda rng, size: np.where(rng.uniform(size=size) < RARE, 1.0, rng.uniform(0.29, 0.31, size=size)),
        0.3 + 0.7 * RARE,
        (1 - RARE) * 0.02**2 / 12 + RARE * (1 - RARE) * 0.7**2,
    ),
    "between 0.29 and 0.31": (lambda rng, size: rng.uniform(0.29, 0.31, size=size), 0.3, 0.02**2 / 12),
}
COLOURS = {
    "Hoeffding": "#555555",
    "Chernoff, kl": "#0072B2",
    "Bernstein, known variance": "#56B4E9",
    "empirical Bernstein": "#009E73",
    "betting": "#D55E00",
    "binomial tail": "#CC79A7",
    "central limit theorem": "#E8A400",
    "best of 20, delta each": "#E8A400",
    "best of 20, delta / 20": "#CC79A7",
}
NO_BOUND = ("central limit theorem", "best of 20, delta each")


def upper_bounds(losses: Array, variance: float) -> dict[str, Array]:
    """Each bound on the mean, for each row of ``losses``; the binomial tail if they are errors."""
    n = losses.shape[1]
    risk = np.minimum(losses.mean(1) * (1 + 1e-13), 1)  # an average is rounded: to the safe side
    sample = losses.var(1, ddof=1)
    found = {
        "Hoeffding": bounds.hoeffding(risk=risk, n=n, delta=DELTA),
        "Chernoff, kl": bounds.chernoff_upper(risk=risk, n=n, delta=DELTA),
        "Bernstein, known variance": bounds.bernstein(risk=risk, variance=variance, n=n, delta=DELTA),
        "empirical Bernstein": bounds.empirical_bernstein(risk=risk, variance=sample, n=n, delta=DELTA),
        "betting": bounds.betting_upper(losses, delta=DELTA),
        "central limit theorem": risk + stats.norm.ppf(1 - DELTA) * np.sqrt(sample / n),
    }
    if np.isin(losses, (0, 1)).all():
        found["binomial tail"] = by_count(losses.sum(1), n, DELTA)
    return {name: np.asarray(bound) for name, bound in found.items()}


def by_count(errors: Array, n: int, delta: float) -> Array:
    """The binomial bound, computed once for each number of errors."""
    table = np.asarray(bounds.clopper_pearson_upper(errors=np.arange(n + 1), n=n, delta=delta))
    return table[errors.astype(int)]


def failure_rates(runs: int, rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """By law and bound, the share of runs in which the bound was below the mean."""
    rates = {}
    for law, (draw, mean, variance) in LAWS.items():
        found = upper_bounds(draw(rng, (runs, N)), variance)
        rates[law] = {name: float((bound < mean).mean()) for name, bound in found.items()}
    # Twenty predictors with one error rate; the one with the fewest errors is certified.
    fewest = rng.binomial(N, RATE, size=(runs, CANDIDATES)).min(1).astype(float)
    for name, delta in (("best of 20, delta each", DELTA), ("best of 20, delta / 20", DELTA / CANDIDATES)):
        rates["errors, 1 in 16"][name] = float((by_count(fewest, N, delta) < RATE).mean())
    return rates


def slack(sizes: Sequence[int], repeats: int, law: str, rng: np.random.Generator) -> dict[str, list[float]]:
    """By bound, its mean distance from the truth for each number of losses."""
    draw, mean, variance = LAWS[law]
    found: dict[str, list[float]] = {}
    for n in sizes:
        for name, bound in upper_bounds(draw(rng, (repeats, n)), variance).items():
            found.setdefault(name, []).append(float((bound - mean).mean()))
    return {name: gaps for name, gaps in found.items() if name not in NO_BOUND}


def plot_rates(ax: Axes, rates: dict[str, dict[str, float]], runs: int) -> None:
    """A dot for each law and bound, with its exact 99% interval."""
    lines = [(law, name, rate) for law, row in rates.items() for name, rate in row.items()]
    for y, (_, name, rate) in enumerate(lines):
        low, high = (
            float(side(errors=round(rate * runs), n=runs, delta=0.005))
            for side in (bounds.clopper_pearson_lower, bounds.clopper_pearson_upper)
        )
        ax.plot([low, high], [y, y], color=COLOURS[name], linewidth=2)
        ax.plot(rate, y, "X" if name in NO_BOUND else "o", color=COLOURS[name], markersize=7)
    ax.axvline(DELTA, color="black", linestyle="--", linewidth=1)
    ax.annotate("delta", (DELTA, -0.9), (3, 0), textcoords="offset points", fontsize=9)
    ax.set_yticks(range(len(lines)), [name for _, name, _ in lines], fontsize=8)
    first = 0
    for law, row in rates.items():
        ax.axhline(first - 0.5, color="#DDDDDD", linewidth=0.8)
        ax.annotate(law, (0.985, first), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8.5)
        first += len(row)
    ax.set_xscale("symlog", linthresh=0.05)
    ax.set_xticks([0, 0.02, 0.05, 0.2, 0.5, 1], ["0", "0.02", "0.05", "0.2", "0.5", "1"])
    ax.set(xlim=(-0.002, 1.2), ylim=(len(lines) - 0.5, -1.2), xlabel=f"share of {runs} draws in which it failed")
    ax.set_title(f"n = {N}: bounds (dots) and what is none (crosses)", fontsize=11)


def plot_slack(ax: Axes, sizes: Sequence[int], gaps: dict[str, list[float]], law: str) -> None:
    """Distance from the truth against n, both on log axes."""
    for name, values in gaps.items():
        ax.plot(sizes, values, "o-", color=COLOURS[name], label=name, markersize=3.5, linewidth=1.6)
    unseen = (1 - LAWS[law][1]) * np.log(1 / DELTA) / np.array(sizes)
    ax.plot(sizes, unseen, ":", color="black", label="a loss of 1 that never showed", linewidth=1.2)
    ax.set(xscale="log", yscale="log", xlabel="number n of losses", ylabel="bound - true mean, on average")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.minorticks_off()
    ax.set_title(f"Losses: {law}", fontsize=11)
    ax.legend(frameon=False, fontsize=8)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw, bound, count, print and draw a picture.

    Returns:
        Failure rates by law and bound, mean distances by law and bound, and the numbers of losses.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/coverage"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer draws, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    rng = np.random.default_rng(0)
    runs, repeats = (500, 3) if options.quick else (5000, 50)
    sizes = (30, 300) if options.quick else (10, 30, 100, 300, 1000, 3000, 10_000)
    rates = failure_rates(runs, rng)
    shown = ("errors, 1 in 16", "between 0.29 and 0.31")
    gaps = {law: slack(sizes, repeats, law, rng) for law in shown}

    table = [[name, law, f"{rate:.4f}"] for law, row in rates.items() for name, rate in row.items()]
    print(render(f"Share of {runs} draws in which it failed; delta = {DELTA}, n = {N}", ["", "losses", "rate"], table))
    for law, row in gaps.items():
        cells = [[name, *(f"{gap:.4f}" for gap in values)] for name, values in row.items()]
        print(render(f"Bound - true mean, losses: {law}", ["n =", *map(str, sizes)], cells))

    figure = Figure(figsize=(14, 5.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    plot_rates(axes[0], rates, runs)
    for ax, (law, row) in zip(axes[1:], gaps.items(), strict=True):
        plot_slack(ax, sizes, row, law)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    path = options.out / "coverage.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return {"rates": rates, "slack": gaps, "sizes": list(sizes)}


if __name__ == "__main__":
    main()
