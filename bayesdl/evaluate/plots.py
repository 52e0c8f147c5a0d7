"""Pictures of predictions: calibration and predictive bands, in Okabe and Ito's colours (safe for colour-blind eyes).

Every function draws on the axes that it is given, or on a new figure that no window or global state knows of, and
returns the axes; ``axes.figure.savefig(path)`` writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bayesdl.data.checks import to_array
from bayesdl.errors import DataError, MissingExtra, ModelError
from bayesdl.evaluate.calibration import BINS, reliability_bins
from bayesdl.evaluate.metrics import pit
from bayesdl.posterior.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
_Z90 = 1.6448536269514722


def reliability_diagram(prediction: Prediction, y: Any, ax: Axes | None = None, *, bins: int = BINS) -> Axes:
    """Accuracy against confidence of the predicted class, in equal bins; the numbers are the rows in each bin.

    Bars are 90% Wilson intervals of the accuracy; the expected calibration error stands in the title.

    Args:
        prediction: Of classes.
        y: Labels.
        ax: Axes to draw on.
        bins: Number of equal bins of [0, 1].

    Raises:
        MissingExtra: Matplotlib is not installed.
        DataError: See ``Prediction.target``.
        ModelError: The prediction is not of classes.
    """
    found = reliability_bins(prediction, y, bins)
    axes = _axes(ax, (4.8, 4.6))
    full = found.count > 0
    n, share, confidence = found.count[full], found.accuracy[full], found.confidence[full]
    edges = (torch.arange(bins, dtype=torch.float64) / bins)[full]
    centre = (share + _Z90**2 / (2 * n)) / (1 + _Z90**2 / n)
    half = _Z90 * (share * (1 - share) / n + _Z90**2 / (4 * n**2)).sqrt() / (1 + _Z90**2 / n)
    errors = torch.stack([share - (centre - half), centre + half - share]).clamp(min=0)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated", zorder=1)
    bars = edges.numpy(), share.numpy()
    axes.bar(*bars, width=1 / bins, align="edge", color=BLUE, alpha=0.3, edgecolor="white", zorder=0)
    axes.errorbar(
        confidence, share, yerr=errors, fmt="o", color=BLUE, markersize=5, linewidth=1.2, label="observed", zorder=2
    )
    for left, count in zip(edges.tolist(), n.tolist(), strict=True):
        axes.annotate(
            f"{int(count)}", (left + 0.5 / bins, 0.015), ha="center", va="bottom", fontsize=7, color=GREY, rotation=90
        )
    low = max(0.0, float(edges.min()) - 0.5 / bins)
    axes.set(xlim=(low, 1.0), ylim=(0.0, 1.03))
    axes.set(xlabel="confidence (probability of the predicted class)", ylabel="accuracy (share of rows)")
    axes.set_title(f"expected calibration error {found.ece:.3f}, {int(found.count.sum())} rows", fontsize=10)
    axes.legend(loc="upper left", frameon=False)
    return tidy(axes)


def calibration_curve(prediction: Prediction, y: Any, ax: Axes | None = None) -> Axes:
    """Share of targets inside the central interval against the interval's level, from the PIT values.

    The grey band is where 90% of perfectly calibrated predictions would lie at each level (binomial, pointwise).

    Args:
        prediction: Of a real or count target.
        y: Observed targets.
        ax: Axes to draw on.

    Raises:
        MissingExtra: Matplotlib is not installed.
        DataError: See ``Prediction.target``.
        ModelError: The prediction is of classes.
    """
    centred = (2 * pit(prediction, y).flatten() - 1).abs()
    axes = _axes(ax, (4.8, 4.6))
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    inside = (centred[:, None] <= levels).to(torch.float64).mean(0)
    spread = _Z90 * (levels * (1 - levels) / len(centred)).sqrt()
    axes.fill_between(
        levels, levels - spread, levels + spread, color=GREY, alpha=0.2, linewidth=0, label="calibrated (90% of cases)"
    )
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axes.plot(levels, inside, color=BLUE, linewidth=2, label="observed")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="level of the central interval", ylabel="coverage (share of targets inside)")
    axes.set_title(f"coverage of the 90% interval {inside[90]:.2f}, {len(centred)} targets", fontsize=10)
    axes.legend(loc="upper left", frameon=False)
    return tidy(axes)


def predictive_bands(
    x: Any,
    prediction: Prediction,
    ax: Axes | None = None,
    data: Any = None,
    *,
    x_label: str = "x",
    y_label: str = "y",
) -> Axes:
    """Mean and central 50% and 90% intervals over one input, with the epistemic part apart.

    The epistemic band is the mean +- 1.645 epistemic standard deviations: where the mean itself would lie with 90%
    probability if it were Gaussian over the draws.

    Args:
        x: One input ``[N]`` or ``[N, 1]``, in any order.
        prediction: At these inputs, of a real or count target.
        ax: Axes to draw on.
        data: Observations to show as points: a pair ``(x, y)`` or anything with ``.x`` and ``.y``.
        x_label: Name and unit of the input.
        y_label: Name and unit of the target.

    Raises:
        MissingExtra: Matplotlib is not installed.
        DataError: x has more than one column or another number of rows than the prediction.
        ModelError: The prediction is of classes, or of several outputs.
    """
    if prediction.event_shape:
        raise ModelError(f"bands are drawn for one output; this prediction has {prediction.event_shape[0]}.")
    inputs = _one_column(x, "x")
    if len(inputs) != len(prediction):
        raise DataError(f"x has {len(inputs)} rows, but the prediction has {len(prediction)}.")
    order = inputs.argsort()
    across = inputs[order]
    quantiles = prediction.quantile([0.05, 0.25, 0.75, 0.95])[:, order]
    mean, epistemic = prediction.mean[order], _Z90 * prediction.epistemic[order].sqrt()
    axes = _axes(ax, (6.4, 4.0))
    axes.fill_between(across, quantiles[0], quantiles[3], color=BLUE, alpha=0.15, linewidth=0, label="90% interval")
    axes.fill_between(across, quantiles[1], quantiles[2], color=BLUE, alpha=0.3, linewidth=0, label="50% interval")
    if bool((epistemic > 0).any()):
        low, high = mean - epistemic, mean + epistemic
        # Hatched rather than filled, so that the intervals below keep their shades.
        axes.fill_between(
            across,
            low,
            high,
            facecolor="none",
            edgecolor=ORANGE,
            hatch="////",
            linewidth=0.8,
            alpha=0.7,
            label="epistemic part (90%)",
        )
    axes.plot(across, mean, color=BLUE, linewidth=2, label="mean")
    if data is not None:
        points = data if isinstance(data, tuple) else (data.x, data.y)
        shown = _one_column(points[0], "data.x"), _one_column(points[1], "data.y")
        axes.plot(*shown, linestyle="none", marker="o", markersize=3, color="black", alpha=0.6, label="data")
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(float(across[0]), float(across[-1])))
    axes.legend(loc="best", frameon=False, fontsize=8)
    return tidy(axes)


def _one_column(values: Any, what: str) -> torch.Tensor:
    array = torch.as_tensor(to_array(values, what)).to(torch.float64)
    if array.dim() not in (1, 2) or (array.dim() == 2 and array.shape[1] != 1):
        raise DataError(f"{what} must be one column to be drawn along an axis; it has shape {tuple(array.shape)}.")
    return array.reshape(-1)


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return new_figure(size).subplots() if ax is None else ax


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure that no window or global state knows of.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("pictures need matplotlib: pip install 'bayesdl[plots]'") from error
    return Figure(figsize=size, dpi=150, layout="constrained")


def tidy(axes: Axes) -> Axes:
    """Axes without the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)
    return axes
