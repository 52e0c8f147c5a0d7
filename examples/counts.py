"""Counts: a network with a Poisson likelihood on the British coal-mining disasters, 1851 to 1961.

    python examples/counts.py --out results/counts

The target is the number of disasters in a year (Jarrett, 1979), the only input the year. The network gives the
logarithm of the rate; its posterior is a posterior over whole curves, so that any question about the curve has a
posterior of its own. Here: in which year did the rate fall fastest?

The classical model of these data knows two rates and one year of change, and its posterior is a closed form (two
conjugate Gamma integrals for each year). It serves as a yardstick: the network, which was not told that there is a
step, should put the fall where that model puts the change.

What to look for: the rate falls from about 3 a year to about 1; the band of the rate (epistemic) is far narrower than
that of the counts, which stays wide however much is known; the fall lies around 1890.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior.tables import render

FIRST_YEAR = 1851
COUNTS = (
    4, 5, 4, 0, 1, 4, 3, 4, 0, 6, 3, 3, 4, 0, 2, 6, 3, 3, 5, 4, 5, 3, 1, 4, 4, 1, 5, 5, 3, 4, 2, 5, 2, 2, 3, 4, 2,
    1, 3, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0, 3, 1, 0, 3, 2, 2, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 2, 1, 0,
    0, 0, 1, 1, 0, 2, 3, 3, 1, 1, 2, 1, 1, 1, 1, 2, 4, 2, 0, 0, 1, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1,
)  # fmt: skip
GAMMA = (1.0, 0.5)  # shape and rate of the yardstick's prior on both rates
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def change_point(counts: Tensor) -> Tensor:
    """P(the rate changes after year i | counts), ``[n - 1]``: two Gamma-Poisson models side by side, in closed form."""
    shape, rate = GAMMA
    total, years = counts.cumsum(0)[:-1], torch.arange(1, len(counts), dtype=counts.dtype)
    before = torch.lgamma(shape + total) - (shape + total) * (rate + years).log()
    later, rest = counts.sum() - total, len(counts) - years
    after = torch.lgamma(shape + later) - (shape + later) * (rate + rest).log()
    return (before + after).softmax(0)


def picture(data: bdl.Dataset, posterior: bdl.Posterior, rate: Tensor, fall: Tensor, exact: Tensor, path: Path) -> None:
    """Above: counts, rate and predicted counts. Below: when the rate fell, by the network and in closed form."""
    years, counts = data.x[:, 0].numpy(), data.y.numpy()
    figure = Figure(figsize=(12, 6.4), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    low, lower, upper, high = torch.quantile(rate, torch.tensor([0.05, 0.25, 0.75, 0.95], dtype=torch.float64), dim=0)
    new = posterior.predict(data.x).quantile([0.05, 0.95])
    top.bar(years, counts, width=0.7, color=GREY, alpha=0.45, label="disasters in the year")
    top.fill_between(years, *new, step="mid", color=ORANGE, alpha=0.13, linewidth=0, label="new counts, 90%")
    top.fill_between(years, low, high, color=BLUE, alpha=0.25, linewidth=0, label="rate, 90%")
    top.fill_between(years, lower, upper, color=BLUE, alpha=0.4, linewidth=0, label="rate, 50%")
    top.plot(years, rate.mean(0), color=BLUE, linewidth=2, label="rate, mean")
    top.set(ylabel="disasters a year", title="Coal-mining disasters: a Poisson network", xlim=(1850, 1962))
    top.legend(frameon=False, ncols=5, loc="upper right", fontsize=9)
    bottom.hist(fall, bins=110, range=(1851, 1961), density=True, color=BLUE, alpha=0.5, label="steepest fall, network")
    label = "year of change, two-rate model (closed form)"
    bottom.step(years[:-1] + 0.5, exact.numpy(), where="mid", color="black", linewidth=1.4, label=label)
    bottom.set(xlabel="year", ylabel="probability")
    bottom.legend(frameon=False, loc="upper right", fontsize=9)
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Sample, print and draw.

    Returns:
        Mean rate over 1851-1880 and over 1900-1961 with the average counts there; median and central 90% of the time of
        the steepest fall; the closed form's median; R-hat of the rate; divergences.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/counts"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="short chains, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    counts = torch.tensor(COUNTS, dtype=torch.float64)
    years = FIRST_YEAR + torch.arange(len(COUNTS), dtype=torch.float64)
    data = bdl.Dataset.from_arrays(years[:, None], counts, "regression", name="coal mining", y_name="disasters")
    prior = bdl.priors.Normal("fan_in", w_std=3.0, b_std=1.0)
    model = bdl.models.mlp(data, hidden=(16,), prior=prior, likelihood=bdl.likelihoods.Poisson())
    method = bdl.NUTS(warmup=80, draws=80, max_depth=6) if options.quick else bdl.NUTS(
        warmup=200, draws=300, max_depth=7, target_accept=0.95
    )  # fmt: skip
    posterior = bdl.fit(model, data, method, seed=0, progress=False if options.quick else None)
    diagnostics = posterior.diagnostics()
    print(diagnostics)

    rate = posterior.function_draws(data.x).flatten(0, 1)  # [S, N]: the mean of a Poisson is its rate
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    rows, result = [], {}
    for name, inside in (("1851-1880", years <= 1880), ("1900-1961", years >= 1900)):
        mean, average = rate[:, inside].mean(1), float(counts[inside].mean())
        low, _, high = torch.quantile(mean, levels).tolist()
        result[name] = {"rate": float(mean.mean()), "average": average}
        rows.append([name, f"{average:.2f}", f"{mean.mean():.2f}", f"{low:.2f} to {high:.2f}"])
    print(render("Disasters a year", ["years", "average count", "rate, posterior mean", "90%"], rows))

    # A change between two years is put in the middle of them.
    fall = years[:-1][rate.diff(dim=1).argmin(1)] + 0.5
    low, middle, high = torch.quantile(fall, levels).tolist()
    exact = change_point(counts)
    change = float(years[:-1][(exact.cumsum(0) < 0.5).sum()]) + 0.5
    print(f"The rate falls fastest at {middle:.1f} (90%: {low:.1f} to {high:.1f}); two rates change at {change:.1f}.")
    path = options.out / "counts.png"
    picture(data, posterior, rate, fall, exact, path)
    print(f"wrote {path}")
    numbers = {"fall": [low, middle, high], "change": change, "rhat": diagnostics.rhat}
    return {**result, **numbers, "divergences": diagnostics.divergences}


if __name__ == "__main__":
    main()
