"""The picture of simulation-based calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bayesdl.errors import DataError
from bayesdl.evaluate import uniformity
from bayesdl.evaluate.plots import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdl.evaluate.sbc import Calibration

SHOWN = 6
"""Quantities that are drawn if the caller names none, the most suspicious ones."""


def rank_differences(calibration: Calibration, names: list[str] | None = None) -> Figure:
    """ECDFs of the ranks less the diagonal, with the simultaneous 95% band of uniform ranks.

    A line above the band on the left and below it on the right: a posterior too narrow; the mirror image: too wide;
    all above: too high; all below: too low.

    Args:
        calibration: the ranks.
        names: quantities; the six with the smallest p-values by default.

    Raises:
        DataError: a name that is not among the quantities.
    """
    known = list(calibration.names)
    if unknown := sorted(set(names or ()) - set(known)):
        raise DataError(f"There are no quantities {unknown}; there are {', '.join(known)}.")
    order = calibration.p_values().argsort().tolist()[:SHOWN]
    chosen = order if names is None else [known.index(name) for name in names]
    count, draws = len(calibration.ranks), calibration.draws
    points, low, high = uniformity.band(count, draws)
    figure = new_figure((6.4, 4.0))
    axes = tidy(figure.add_subplot())
    axes.fill_between(points, low - points, high - points, color="0.88", step="mid", label="95% band if calibrated")
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    for k in chosen:
        below = np.bincount(calibration.ranks[:, k].numpy(), minlength=draws + 1).cumsum()[:-1] / count
        axes.plot(points, below - points, linewidth=1.4, label=known[k])
    axes.set_xlabel("rank of the truth among the draws, as a fraction")
    axes.set_ylabel("ECDF less uniform")
    axes.set_title(f"{calibration.method}: {count} replicates", loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure
