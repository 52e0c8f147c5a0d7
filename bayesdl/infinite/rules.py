r"""The recursion, layer by layer: covariance of the units (NNGP) and tangent kernel (NTK) of a wide network.

    K <- w^2 <K> + b^2,    Theta <- K + w^2 <Theta>            at weights (NTK parameterisation)
    K <- E[phi(u) phi(v)], Theta <- Theta E[phi'(u) phi'(v)],  (u, v) ~ N(0, K), at an activation

where <.> is the mean over the window of a convolution, for both images at the same offset. In the standard
parameterisation, where the weights themselves are trained, ``Theta <- fan_in <K> + 1 + w^2 <Theta>`` (1 if there are
biases).

Sources: Neal (1996), ch. 2; Lee et al. (2018), Deep neural networks as Gaussian processes, eqs. 4-5; Jacot et al.
(2018), Neural tangent kernel, thm. 1; Arora et al. (2019), On exact computation with an infinitely wide neural net,
sec. 4; Sohl-Dickstein et al. (2020), On the infinite width limit with a standard parameterization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.layers import Activation, AvgPool, Conv, Dense, Flatten, Layer, LayerNorm, Scale, Sum
from bayesdl.infinite.units import Units, Walk
from bayesdl.infinite.windows import equal_pixels, window_sums


def apply(layer: Layer, units: Units, walk: Walk) -> Units:
    """One layer."""
    if isinstance(layer, Dense):
        return _affine(layer, units, walk)
    if isinstance(layer, Activation):
        return _activate(layer, units, walk)
    if isinstance(layer, Scale):
        return units.map(lambda q: layer.factor**2 * q)
    if isinstance(layer, Flatten):
        return _flatten(units)
    if isinstance(layer, AvgPool):
        return _pool(layer, units)
    if isinstance(layer, LayerNorm):
        return _normalise(layer, units, walk)
    return _sum(layer, units, walk)


def _affine(layer: Dense, units: Units, walk: Walk) -> Units:
    w, b = next(walk.weights)
    share = 1.0
    if isinstance(layer, Conv):
        if units.spatial != len(layer.window):
            raise ModelError(
                f"A convolution over {len(layer.window)} dimensions meets inputs with {units.spatial}; give "
                "images as [N, channels, *pixels]."
            )
        shape = layer.window, layer.stride, layer.padding, layer.dilation
        axes = units.axes
        units = units.map(lambda q: window_sums(q, axes, *shape))
        share = 1 / torch.Size(layer.window).numel()
    elif units.spatial:
        raise ModelError("A dense layer meets an image; put Flatten, or a mean over all pixels, before it.")
    w = w * share
    new = w * units.q + b
    if not walk.tangent:
        return units._replace(q=new)
    if not walk.standard:
        fresh = new
    elif layer.fan_in is None:
        raise ModelError("The NTK in the standard parameterisation needs fan_in= of every dense layer.")
    else:
        fresh = (layer.fan_in * share) * units.q + float(layer.b_std > 0)
    return units._replace(q=new, ntk=fresh if units.ntk is None else torch.addcmul(fresh, units.ntk, w))


def _beside(first: Tensor, second: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """What belongs to the pixels of either image, ``[*pixels, ...]``, shaped to broadcast against the units."""
    if not units.full:
        return first, second
    ones, pixels = (1,) * units.spatial, first.shape[: units.spatial]
    return first.reshape(*pixels, *ones, *first.shape[units.spatial :]), second.reshape(*ones, *second.shape)


def _activate(layer: Activation, units: Units, walk: Walk) -> Units:
    dual = layer.dual
    q1, q2 = _beside(*walk.variances(units), units)
    own = walk.known is None and not units.full
    if units.ntk is None:
        return units._replace(q=dual.variance(units.q) if own else dual.covariance(q1, q2, units.q))
    value, slope = dual.both(q1, q2, units.q)
    return units._replace(q=dual.variance(units.q) if own else value, ntk=units.ntk * slope)


def _flatten(units: Units) -> Units:
    spatial = units.spatial
    if not spatial:
        return units
    dims = tuple(range(spatial))
    return units.map(lambda q: (equal_pixels(q, spatial) if units.full else q).mean(dims))._replace(
        spatial=0, full=False
    )


def _pool(layer: AvgPool, units: Units) -> Units:
    spatial = units.spatial
    if not layer.window:
        return units.map(lambda q: q.mean(tuple(range(2 * spatial)), keepdim=True)) if spatial else units
    if spatial != len(layer.window):
        raise ModelError(f"A pool over {len(layer.window)} dimensions meets inputs with {spatial}.")
    axes = [(k,) for k in range(2 * spatial)]
    shape = layer.window * 2, layer.stride * 2, layer.padding * 2, (1,) * 2 * spatial
    return units.map(lambda q: window_sums(q, axes, *shape) / torch.Size(layer.window).numel() ** 2)


def _normalise(layer: LayerNorm, units: Units, walk: Walk) -> Units:
    dims = tuple(range(units.spatial))
    first, second = (((q.mean(dims, keepdim=True) if dims else q) + layer.eps).sqrt() for q in walk.variances(units))
    first, second = _beside(first, second, units)
    return units.map(lambda q: q / (first * second))


def _sum(layer: Sum, units: Units, walk: Walk) -> Units:
    total: Units | None = None
    for branch in layer.branches:
        end = units
        for part in branch:
            end = apply(part, end, walk)
        if total is None:
            total = end
            continue
        size = 2 * units.spatial if units.full else units.spatial
        if total.q.shape[:size] != end.q.shape[:size] or total.spatial != end.spatial:
            raise ModelError("The branches of a sum have images of different sizes.")
        tangents = [ntk for ntk in (total.ntk, end.ntk) if ntk is not None]
        total = total._replace(q=total.q + end.q, ntk=sum(tangents[1:], tangents[0]) if tangents else None)
    assert total is not None
    return total
