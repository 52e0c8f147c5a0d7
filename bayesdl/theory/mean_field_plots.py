"""Pictures of signal propagation: the phase diagram, and what happens to signals layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl.evaluate.plots import BLUE, GREY, ORANGE, new_figure, tidy
from bayesdl.theory.mean_field import MeanField, critical_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEPTHS = (3, 6, 12)  # depth scales that are drawn as lines


def phase_diagram(
    activation: str | Callable[[Tensor], Tensor],
    ax: Axes | None = None,
    *,
    w_std: tuple[float, float] = (0.5, 4.0),
    b_std: tuple[float, float] = (0.0, 2.0),
    points: int = 33,
) -> Axes:
    """The slope chi over the plane of w_std and b_std, with the critical line, and lines of equal gradient depth.

    The slope is that at the length which signals of length 1 come to. Where the critical line leaves the white strip,
    as for gelu with small biases, its own length is unstable.

    Args:
        activation: a name, such as "tanh", or any elementwise function.
        ax: axes to draw on.
        w_std: range of the horizontal axis.
        b_std: range of the vertical axis.
        points: of the grid along each axis.

    Raises:
        MissingExtra: Matplotlib is not installed.
        ModelError: the activation is unknown or jumps.
    """
    axes = new_figure((5.4, 4.4)).subplots() if ax is None else ax
    w, b = (torch.linspace(*ends, points, dtype=torch.float64) for ends in (w_std, b_std))
    rate = MeanField(activation, w, b.unsqueeze(-1)).chi.log()
    top = max(float(rate.abs().max()), 1e-3)
    grid = w.numpy(), b.numpy(), rate.numpy()
    mesh = axes.pcolormesh(*grid, cmap="RdBu_r", vmin=-top, vmax=top, shading="gouraud")
    axes.figure.colorbar(mesh, ax=axes, label="log chi: what a layer does to squared gradients")
    for depth in DEPTHS:
        lines = axes.contour(*grid, levels=[-1 / depth, 1 / depth], colors=GREY, linewidths=0.6)
        axes.clabel(lines, fmt=lambda level: f"{1 / abs(level):.0f}", fontsize=7)
    line = critical_line(activation, torch.linspace(*b_std, 4 * points, dtype=torch.float64))
    axes.plot(line.w_std, line.b_std, color="black", linewidth=2, label="critical line")
    axes.set(xlabel="w_std", ylabel="b_std", xlim=w_std, ylim=b_std)
    axes.set_title("ordered on the left, chaotic on the right; depth scales in layers", fontsize=9)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    return axes


def depth_curves(field: MeanField, ax: Axes | None = None, *, depth: int = 30, c: float = 0.5) -> Axes:
    """How far the correlation and the length of signals are from their fixed points, layer by layer.

    Dashed lines fall by a factor e in each depth scale xi_q and xi_c; at criticality there is no such line, and the
    approach is a power of the depth.

    Args:
        field: settings of one network.
        ax: axes to draw on.
        depth: number of layers.
        c: correlation at the first layer; the length begins at ``field.start``.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    axes = new_figure((5.4, 4.0)).subplots() if ax is None else ax
    layers = torch.arange(depth + 1)
    path = field.propagate(depth, field.start, c)
    drawn = (
        ("length |q - q*|", path.q1, field.q_star, field.xi_q, BLUE),
        ("correlation |c - c*|", path.c, field.c_star, field.xi_c, ORANGE),
    )
    for label, values, end, scale, colour in drawn:
        away = (values - end).abs()
        shown = away > 1e-14
        if not bool(end.isfinite()) or not bool(shown.any()):
            continue
        axes.semilogy(layers[shown], away[shown], "o-", color=colour, markersize=3, label=label)
        if 0 < float(scale) < float("inf"):
            last = int(shown.nonzero().max())
            law = away[last] * torch.exp((last - layers) / scale)
            axes.semilogy(layers[: last + 1], law[: last + 1], "--", color=colour, label=f"depth scale {scale:.2f}")
    axes.set(xlabel="layer", ylabel="distance from the fixed point", title=str(field.phase))
    if axes.get_lines():
        axes.legend(frameon=False, fontsize=8)
    return tidy(axes)
