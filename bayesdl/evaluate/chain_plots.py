"""Pictures of Markov chains: traces, ranks, energies, divergences, autocorrelation, R-hat by layer.

Every function takes a posterior with chains, and latents by name or inputs at which predictions are looked at, and
returns a figure that no window or global state knows of; ``figure.savefig(path)`` writes it. Chains beyond the eighth
are drawn in one colour. Without names and inputs, the latents with the largest R-hat are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesdl.errors import DataError
from bayesdl.evaluate.chain_quantities import Array, envelope, quantities, rank_fractions, thinned
from bayesdl.evaluate.plots import BLUE, GREY, ORANGE, new_figure, tidy
from bayesdl.posterior import DrawsPosterior, convergence
from bayesdl.posterior.autocorrelation import autocovariance
from bayesdl.posterior.diagnostics import CELLS
from bayesdl.posterior.divergences import divergent_draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", ORANGE, "#000000")
BINS, FEWEST = 20, 5
LAGS = 60
CEILING = 5.0
"""Where larger values of R-hat, infinity among them, are drawn."""

Names = Iterable[str] | str | None


def trace(posterior: DrawsPosterior, names: Names = None, x: Any = None) -> Figure:
    """Draws in their order, chain by chain, with each chain's histogram; divergences as ticks below.

    Args:
        posterior: chains.
        names: sites ("beta") or entries ("beta[0]").
        x: raw inputs whose predictions are drawn.
    """
    shown = quantities(posterior, names, x)
    figure = new_figure((8.0, 1.9 * len(shown) + 0.3))
    grid = figure.subplots(len(shown), 2, squeeze=False, sharey="row", width_ratios=[4, 1])
    divergent = posterior.stats.get("divergent")
    for (label, value), (left, right) in zip(shown.items(), grid, strict=True):
        edges = np.histogram_bin_edges(value, 30)
        for chain, draws in enumerate(value):
            style = _style(chain, len(value))
            left.plot(draws, linewidth=0.6, **style)
            right.stairs(np.histogram(draws, edges)[0], edges, orientation="horizontal", linewidth=1.0, **style)
        if divergent is not None and bool(divergent.any()):
            at = (divergent.cpu() != 0).nonzero()[:, 1].numpy()
            left.plot(at, np.full(len(at), value.min()), "|", color="black", markersize=6, label="divergent")
        left.set(ylabel=label, xlim=(0, max(value.shape[1] - 1, 1)))
        right.set_xticks([])
        tidy(left)
        tidy(right)
    grid[-1, 0].set_xlabel("draw")
    grid[-1, 1].set_xlabel("share")
    grid[0, 0].set_title(_chains(posterior), fontsize=10, loc="left")
    _legend(figure, grid[0, 0])
    return figure


def rank_histogram(posterior: DrawsPosterior, names: Names = None, x: Any = None, *, bins: int = BINS) -> Figure:
    """Histogram of every chain's ranks among all draws: flat where chains agree (Vehtari et al., 2021, section 5).

    Chains are thinned to about independent draws; the grey band is where 95% of the counts of a bin would lie.

    Args:
        posterior: chains.
        names: as in ``trace``.
        x: as in ``trace``.
        bins: most bins; with few draws, so many that ``FEWEST`` are expected in each.
    """
    shown = quantities(posterior, names, x)
    figure, axes = _panels(len(shown))
    for (label, value), panel in zip(shown.items(), axes, strict=True):
        draws, every = thinned(value)
        count = max(2, min(bins, draws.shape[1] // FEWEST))
        edges = np.linspace(0, 1, count + 1)
        mean = draws.shape[1] / count
        # A bin holds size / bins of all ranks; how many are this chain's is hypergeometric.
        other = 1 - 1 / len(draws) if len(draws) > 1 else 0.0
        spread = 1.96 * np.sqrt(mean * other * (1 - 1 / count))
        panel.axhspan(mean - spread, mean + spread, color=GREY, alpha=0.2, linewidth=0)
        for chain, fractions in enumerate(rank_fractions(draws)):
            panel.stairs(np.histogram(fractions, edges)[0], edges, linewidth=1.2, **_style(chain, len(draws)))
        panel.set(xlabel="rank (share of all draws)", ylabel="draws", xlim=(0, 1), ylim=(0, None))
        panel.set_title(label + _thinning(every), fontsize=10)
    _legend(figure, axes[0])
    return figure


def rank_ecdf(posterior: DrawsPosterior, names: Names = None, x: Any = None, *, level: float = 0.95) -> Figure:
    """ECDF of every chain's ranks less that of the uniform law, with a simultaneous envelope.

    If all chains have one law, all their curves stay inside with probability ``level`` (Säilynoja et al., 2022). A
    chain that leaves the band upwards has too many small values; one that is steep in the middle is too narrow. Chains
    are thinned to about independent draws first, because the envelope is made for these.

    Args:
        posterior: at least two chains.
        names: as in ``trace``.
        x: as in ``trace``.
        level: probability that no curve leaves the band.

    Raises:
        DataError: a single chain has nothing to be ranked against.
    """
    if posterior.shape[0] < 2:
        raise DataError("Ranks compare chains; this posterior has one.")
    shown = quantities(posterior, names, x)
    figure, axes = _panels(len(shown))
    for (label, value), panel in zip(shown.items(), axes, strict=True):
        draws, every = thinned(value)
        points = np.linspace(0, 1, 101)[1:-1]
        low, high = envelope(draws.shape[0], draws.shape[1], points, level) - points
        panel.fill_between(points, low, high, color=GREY, alpha=0.2, linewidth=0, label=f"{level:.0%} of cases")
        outside = 0
        for chain, fractions in enumerate(np.sort(rank_fractions(draws), axis=1)):
            curve = np.searchsorted(fractions, points, side="right") / draws.shape[1] - points
            left = bool(((curve < low - 1e-12) | (curve > high + 1e-12)).any())
            outside += left
            style = _style(chain, len(draws))
            panel.plot(
                points, curve, linewidth=1.2, **(style if len(draws) <= len(COLOURS) or not left else {"color": ORANGE})
            )
        panel.set(xlabel="rank (share of all draws)", ylabel="ECDF - uniform", xlim=(0, 1))
        panel.set_title(f"{label}: {outside} of {len(draws)} chains outside{_thinning(every)}", fontsize=10)
    _legend(figure, axes[0])
    return figure


def energy(posterior: DrawsPosterior) -> Figure:
    """The energy's marginal law against that of its changes; much narrower changes mean slow tails (E-BFMI).

    Raises:
        DataError: the method records no energies.
    """
    if "energy" not in posterior.stats:
        raise DataError(f"{posterior.info.get('method', 'This method')} records no energies.")
    values = posterior.stats["energy"].cpu().double()
    changes = values.diff(dim=1).flatten().numpy()
    marginal = (values - values.mean()).flatten().numpy()
    fractions = convergence.ebfmi(values)
    figure = new_figure((5.4, 3.6))
    axes = figure.subplots()
    edges = np.histogram_bin_edges(np.concatenate([marginal, changes]), 50)
    for name, part, colour in (("energy - mean", marginal, BLUE), ("change per transition", changes, ORANGE)):
        heights = np.histogram(part, edges, density=True)[0]
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.4, label=name)
    axes.set(xlabel="energy [nats]", ylabel="density")
    axes.set_title(
        f"E-BFMI {float(fractions.min()):.2f} to {float(fractions.max()):.2f} (below 0.3: slow)", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


def divergences(posterior: DrawsPosterior, first: str | None = None, second: str | None = None) -> Figure:
    """Two latents against each other, with the draws at which transitions diverged.

    Args:
        posterior: chains of a method that records divergences.
        first: entry for the horizontal axis; with ``second``, by default the two where divergences gather most.
        second: entry for the vertical axis.

    Raises:
        DataError: no divergences are recorded, or a name that does not exist.
    """
    found = divergent_draws(posterior)
    names = [name for name in (first, second) if name is not None]
    names += [place.entry for place in found.places if place.entry not in names]
    if len(names) < 2:
        names += [name for name in quantities(posterior, None, None) if name not in names]
    if len(names) < 2:
        raise DataError("Two scalar latents are needed to draw one against the other; this model has one.")
    chosen = quantities(posterior, names[:2], None)
    if len(chosen) != 2:
        raise DataError(f"name two entries, such as 'beta[0]'; {names[:2]} are {len(chosen)}.")
    (across_name, across), (up_name, up) = chosen.items()
    figure = new_figure((5.2, 4.4))
    axes = figure.subplots()
    axes.plot(across.ravel(), up.ravel(), ".", color=BLUE, markersize=2, alpha=0.3, label="draws", rasterized=True)
    at = found.chain.numpy(), found.draw.numpy()
    axes.plot(across[at], up[at], "x", color=ORANGE, markersize=5, label="after a divergent transition")
    axes.set(xlabel=across_name, ylabel=up_name)
    axes.set_title(f"{len(found)} divergent of {across.size} transitions", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="best")
    tidy(axes)
    return figure


def autocorrelation(posterior: DrawsPosterior, names: Names = None, x: Any = None, *, lags: int = LAGS) -> Figure:
    """Autocorrelation of every chain (thin) and of all (thick), with the autocorrelation time.

    Args:
        posterior: chains.
        names: as in ``trace``.
        x: as in ``trace``.
        lags: largest lag.
    """
    shown = quantities(posterior, names, x)
    figure, axes = _panels(len(shown))
    for (label, value), panel in zip(shown.items(), axes, strict=True):
        most = min(lags, value.shape[1] - 1)
        covariance = autocovariance(value[:, None])
        each = covariance / np.where(covariance[:, :1] > 0, covariance[:, :1], 1.0)
        pooled = covariance.mean(0) / max(float(covariance[:, 0].mean()), 1e-300)
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.plot(each[:, : most + 1].T, color=BLUE, alpha=0.3, linewidth=0.7)
        panel.plot(pooled[: most + 1], color=BLUE, linewidth=2)
        time = value.size / float(convergence.ess_mean(torch.from_numpy(value))) if value.shape[1] >= 4 else np.nan
        panel.set(xlabel="lag [draws]", ylabel="autocorrelation", xlim=(0, max(most, 1)), ylim=(None, 1.03))
        panel.set_title(f"{label}: {time:.1f} draws for one", fontsize=10)
    return figure


def rhat_by_layer(posterior: DrawsPosterior, x: Any = None) -> Figure:
    """R-hat of every entry of every site, below those of the predictions and the log likelihood.

    Args:
        posterior: chains of at least 4 draws.
        x: raw inputs for the predictions; training rows by default.
    """
    rows = _rhats(posterior, x)
    figure = new_figure((6.4, 0.32 * len(rows) + 1.2))
    axes = figure.subplots()
    for height, (name, values) in enumerate(rows.items()):
        colour = BLUE if name in ("predictions", "log likelihood") else GREY
        axes.plot(values, np.full(len(values), height), "|", color=colour, markersize=9, alpha=0.6)
        axes.plot(values.max(), height, "o", color=ORANGE if values.max() > 1.05 else colour, markersize=5)
    for limit, style in ((1.01, ":"), (1.05, "--")):
        axes.axvline(limit, color=GREY, linewidth=1, linestyle=style, zorder=0)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel="R-hat (dotted 1.01, dashed 1.05); dot: the worst entry")
    top = max(float(values.max()) for values in rows.values())
    axes.set_xlim(0.99, max(1.06, top * 1.02))
    axes.set_title(_chains(posterior), fontsize=10, loc="left")
    tidy(axes)
    return figure


def _rhats(posterior: DrawsPosterior, x: Any) -> dict[str, Array]:
    parts: dict[str, torch.Tensor] = {}
    chains, draws = posterior.shape
    if posterior._problem is not None and (x is not None or posterior.problem.complete):
        functions, total = posterior.function_means(x), posterior.total_log_likelihood()
        parts |= {} if functions is None else {"predictions": functions.flatten(2)}
        parts |= {} if total is None else {"log likelihood": total[..., None]}
    most = max(1, CELLS // (chains * draws))
    parts |= {name: value.reshape(chains, draws, -1) for name, value in posterior.site_draws(most)}
    found = {}
    for name, value in parts.items():
        some = torch.linspace(0, value.shape[2] - 1, min(most, value.shape[2]), dtype=torch.float64).round().long()
        rhats = convergence.rhat(value[..., some])
        found[name] = rhats.nan_to_num(nan=CEILING).clamp(max=CEILING).numpy()
    return found


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, two in a row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = new_figure((4.2 * columns, 2.9 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in grid[count:]:
        spare.set_visible(False)
    return figure, [tidy(axes) for axes in grid[:count]]


def _legend(figure: Figure, axes: Axes) -> None:
    """Names of the lines of the first panel, below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=8)


def _style(chain: int, chains: int) -> dict[str, Any]:
    if chains <= len(COLOURS):
        return {"color": COLOURS[chain], "alpha": 0.8, "label": f"chain {chain}"}
    return {"color": BLUE, "alpha": max(0.15, 3.0 / chains)}


def _chains(posterior: DrawsPosterior) -> str:
    chains, draws = posterior.shape
    return f"{chains} {'chain' if chains == 1 else 'chains'} of {draws} draws"


def _thinning(every: int) -> str:
    return f" (one draw in {every})" if every > 1 else ""
