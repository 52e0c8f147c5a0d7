"""The walks through a network: variances of every input first, then the covariances of pairs.

An activation sees the covariance of a pair of inputs and the variance of each of the two. The variances are those of
the inputs alone: one walk for every input, and then one for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.layers import Activation, Layer, LayerNorm, Sum, pools
from bayesdl.infinite.rules import apply
from bayesdl.infinite.units import Units, Walk
from bayesdl.infinite.windows import equal_pixels


class Covariance(NamedTuple):
    """The 2 x 2 covariance of one unit at pairs of inputs, and their tangent kernel; the fields broadcast.

    For images the dimensions of the pixels come first, ``[*pixels, ...]``: covariances between equal pixels only,
    which is all that a network without pooling needs; or, where ``full``, ``[*pixels, *pixels', ...]``.
    """

    q1: Tensor
    """Covariance of the first input with itself, ``[..., N, 1]`` for a matrix of pairs or ``[..., N]`` for rows."""
    q2: Tensor
    """Covariance of the second input with itself, ``[..., 1, M]`` or ``[..., N]``."""
    q12: Tensor
    """Covariance between the two, ``[..., N, M]`` or ``[..., N]``."""
    ntk: Tensor | None = None
    """Tangent kernel between the two, shaped as q12; None if it is not asked for."""
    spatial: int = 0
    """Number of spatial dimensions."""
    full: bool = False


def through(layers: Sequence[Layer], units: Units, walk: Walk) -> Units:
    """Carry units through all the layers; covariances between different pixels are dropped after the last pool.

    Raises:
        ModelError: layers of images meet rows without pixels, or the image is smaller than a window.
    """
    for k, layer in enumerate(layers):
        if units.full and not pools(layers[k:]):
            units = units.map(partial(equal_pixels, spatial=units.spatial))._replace(full=False)
        units = apply(layer, units, walk)
    return units


def variance_layers(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers up to the last nonlinear one, which a walk for variances has to go through."""
    return layers[: max((k + 1 for k, layer in enumerate(layers) if _nonlinear(layer)), default=0)]


def _nonlinear(layer: Layer) -> bool:
    if isinstance(layer, Sum):
        return any(_nonlinear(part) for branch in layer.branches for part in branch)
    return isinstance(layer, (Activation, LayerNorm))


def variances(
    layers: Sequence[Layer], own: Tensor, w_var: Sequence[Tensor], b_var: Sequence[Tensor], spatial: int, full: bool
) -> list[Tensor]:
    """Return the variance of every input before each nonlinear layer, ``[*pixels, ...]`` each.

    Args:
        layers: of the network.
        own: covariance of every input with itself, ``[*pixels, ...]``, or where ``full`` between all its pixels.
        w_var: one for every layer with weights, shaped to broadcast against ``own``.
        b_var: likewise.
        spatial: number of spatial dimensions.
        full: see ``own``.
    """
    walk = Walk(w_var, b_var)
    through(variance_layers(layers), Units(own, None, spatial, full), walk)
    return walk.recorded


def propagate(
    layers: Sequence[Layer],
    covariance: Covariance,
    w_var: Sequence[Tensor],
    b_var: Sequence[Tensor],
    *,
    standard: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Carry a covariance through the layers; the k-th one with weights has the variances ``w_var[k]``, ``b_var[k]``.

    Returns:
        Covariance of the outputs and, if it was asked for, their tangent kernel.

    Raises:
        ModelError: layers of images meet rows without pixels, the image is smaller than a window, or the output is an
            image.
    """
    q1, q2, q12, ntk, spatial, full = covariance
    first, second = (variances(layers, q, w_var, b_var, spatial, full) for q in (q1, q2))
    walk = Walk(w_var, b_var, standard, ntk is not None, list(zip(first, second, strict=True)))
    return output(through(layers, Units(q12, ntk, spatial, full), walk))


def output(units: Units) -> tuple[Tensor, Tensor | None]:
    """The kernels at the end of a walk.

    Raises:
        ModelError: the output is an image.
    """
    if units.spatial:
        raise ModelError("The network's output is an image; end it with Flatten or a mean over pixels, and Linear.")
    return units.q, units.ntk
