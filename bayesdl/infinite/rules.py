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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.layers import Activation, AvgPool, Conv, Dense, Flatten, Layer, LayerNorm, Scale, Sum, pools


class Covariance(NamedTuple):
    """The 2 x 2 covariance of one unit at pairs of inputs, and their tangent kernel; the fields broadcast.

    All of them change from layer to layer and are carried: holding the variances at a fixed point, as the analysis of
    signal propagation does, gives another kernel. For images the dimensions of the pairs are followed by those of the
    pixels, ``[..., H, W]``: covariances between equal pixels only, which is all that a network without pooling needs;
    or, where ``full``, by those of two pixels, ``[..., H, W, H', W']``.
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

    @property
    def trailing(self) -> int:
        """Number of dimensions of the pixels."""
        return self.spatial * (2 if self.full else 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Covariance:
        """A linear function of every field."""
        ntk = None if self.ntk is None else function(self.ntk)
        return self._replace(q1=function(self.q1), q2=function(self.q2), q12=function(self.q12), ntk=ntk)


class Weights(NamedTuple):
    """The variances of the layers with weights, in their order, shaped to broadcast against pairs of rows."""

    w_var: Iterator[Tensor]
    b_var: Iterator[Tensor]
    standard: bool = False


def propagate(
    layers: Sequence[Layer],
    covariance: Covariance,
    w_var: Sequence[Tensor],
    b_var: Sequence[Tensor],
    *,
    standard: bool = False,
) -> Covariance:
    """Carry a covariance through the layers; the k-th one with weights has the variances ``w_var[k]``, ``b_var[k]``.

    Raises:
        ModelError: layers of images meet rows without pixels, or the image is smaller than a window.
    """
    weights = Weights(iter(w_var), iter(b_var), standard)
    for k, layer in enumerate(layers):
        if covariance.full and not pools(layers[k:]):
            covariance = covariance.map(partial(_equal_pixels, spatial=covariance.spatial))._replace(full=False)
        covariance = apply(layer, covariance, weights)
    return covariance


def apply(layer: Layer, covariance: Covariance, weights: Weights) -> Covariance:
    """One layer."""
    if isinstance(layer, Dense):
        return _affine(layer, covariance, weights)
    if isinstance(layer, Activation):
        return _activate(layer, covariance)
    if isinstance(layer, Scale):
        return covariance.map(lambda q: layer.factor**2 * q)
    if isinstance(layer, Flatten):
        return _flatten(covariance)
    if isinstance(layer, AvgPool):
        return _pool(layer, covariance)
    if isinstance(layer, LayerNorm):
        return _normalise(layer, covariance)
    return _sum(layer, covariance, weights)


def _affine(layer: Dense, covariance: Covariance, weights: Weights) -> Covariance:
    extra = (1,) * covariance.trailing
    w, b = (v.reshape(v.shape + extra) for v in (next(weights.w_var), next(weights.b_var)))
    if isinstance(layer, Conv):
        if covariance.spatial != len(layer.window):
            raise ModelError(
                f"A convolution over {len(layer.window)} dimensions meets inputs with {covariance.spatial}; give "
                "images as [N, channels, *pixels]."
            )
        mean = covariance.map(lambda q: _shared_windows(q, layer, covariance.full))
    elif covariance.spatial:
        raise ModelError("A dense layer meets an image; put Flatten, or a mean over all pixels, before it.")
    else:
        mean = covariance
    new = mean._replace(q1=w * mean.q1 + b, q2=w * mean.q2 + b, q12=w * mean.q12 + b)
    if mean.ntk is None:
        return new
    if not weights.standard:
        return new._replace(ntk=new.q12 + w * mean.ntk)
    if layer.fan_in is None:
        raise ModelError("The NTK in the standard parameterisation needs fan_in= of every dense layer.")
    return new._replace(ntk=layer.fan_in * mean.q12 + float(layer.b_std > 0) + w * mean.ntk)


def _activate(layer: Activation, covariance: Covariance) -> Covariance:
    dual, (q1, q2, q12, ntk, spatial, full) = layer.dual, covariance
    if full:  # the variances of both pixels of a pair
        first, second = _equal_pixels(q1, spatial), _equal_pixels(q2, spatial)
        ones = (1,) * spatial
        here = [v.reshape(*v.shape, *ones) for v in (first, second)]
        there = [
            v.reshape(*v.shape[: v.dim() - spatial], *ones, *v.shape[v.dim() - spatial :]) for v in (first, second)
        ]
        new1, new2 = (dual.covariance(h, t, q) for h, t, q in zip(here, there, (q1, q2), strict=True))
        q1, q2 = here[0], there[1]
    else:
        new1, new2 = dual.variance(q1), dual.variance(q2)
    if ntk is None:
        return covariance._replace(q1=new1, q2=new2, q12=dual.covariance(q1, q2, q12))
    value, slope = dual.both(q1, q2, q12)
    return covariance._replace(q1=new1, q2=new2, q12=value, ntk=ntk * slope)


def _flatten(covariance: Covariance) -> Covariance:
    spatial = covariance.spatial
    if not spatial:
        return covariance
    dims = tuple(range(-spatial, 0))
    flat = covariance.map(lambda q: (_equal_pixels(q, spatial) if covariance.full else q).mean(dims))
    return flat._replace(spatial=0, full=False)


def _pool(layer: AvgPool, covariance: Covariance) -> Covariance:
    spatial = covariance.spatial
    if not layer.window:
        dims = tuple(range(-2 * spatial, 0))
        return covariance.map(lambda q: q.mean(dims, keepdim=True)) if spatial else covariance
    if spatial != len(layer.window):
        raise ModelError(f"A pool over {len(layer.window)} dimensions meets inputs with {spatial}.")

    def windows(q: Tensor) -> Tensor:
        for axis in range(2 * spatial):
            k = axis % spatial
            q = _slide(q, (axis - 2 * spatial,), layer.window[k], layer.stride[k], layer.padding[k], 1)
        return q

    return covariance.map(windows)


def _normalise(layer: LayerNorm, covariance: Covariance) -> Covariance:
    spatial, full = covariance.spatial, covariance.full
    scales = []
    for q in (covariance.q1, covariance.q2):
        variance = _equal_pixels(q, spatial) if full else q
        mean = variance.mean(tuple(range(-spatial, 0)), keepdim=True) if spatial else variance
        mean = mean + layer.eps
        scales.append(mean.reshape(*mean.shape, *[1] * spatial) if full else mean)
    first, second = scales
    cross = first.sqrt() * second.sqrt()
    ntk = None if covariance.ntk is None else covariance.ntk / cross
    return covariance._replace(q1=covariance.q1 / first, q2=covariance.q2 / second, q12=covariance.q12 / cross, ntk=ntk)


def _sum(layer: Sum, covariance: Covariance, weights: Weights) -> Covariance:
    total: Covariance | None = None
    for branch in layer.branches:
        end = covariance
        for part in branch:
            end = apply(part, end, weights)
        if total is None:
            total = end
            continue
        if total.q12.shape[total.q12.dim() - total.trailing :] != end.q12.shape[end.q12.dim() - end.trailing :]:
            raise ModelError("The branches of a sum have images of different sizes.")
        ntk = None if total.ntk is None or end.ntk is None else total.ntk + end.ntk
        total = total._replace(q1=total.q1 + end.q1, q2=total.q2 + end.q2, q12=total.q12 + end.q12, ntk=ntk)
    assert total is not None
    return total


def _equal_pixels(q: Tensor, spatial: int) -> Tensor:
    """From ``[..., H, W, H', W']`` its entries at equal pixels, ``[..., H, W]``."""
    pixels = q.shape[q.dim() - spatial :]
    lead = q.shape[: q.dim() - 2 * spatial]
    count = pixels.numel()
    return q.reshape(*lead, count, count).diagonal(dim1=-2, dim2=-1).reshape(*lead, *pixels)


def _shared_windows(q: Tensor, layer: Conv, full: bool) -> Tensor:
    """The mean over the offsets of a convolution's window, the same offset for both pixels of a pair."""
    spatial = len(layer.window)
    for k in range(spatial):
        axes = (k - 2 * spatial, k - spatial) if full else (k - spatial,)
        q = _slide(q, axes, layer.window[k], layer.stride[k], layer.padding[k], layer.dilation[k])
    return q


def _slide(
    q: Tensor, axes: tuple[int, ...], window: int, stride: int, padding: tuple[int, int], dilation: int
) -> Tensor:
    """The mean over a window of entries, moved along all the axes at once, with zeros outside.

    Raises:
        ModelError: the window is larger than the padded image.
    """
    before, after = padding
    length = q.shape[axes[0]]
    count = (length + before + after - dilation * (window - 1) - 1) // stride + 1
    if count < 1:
        raise ModelError(f"A window of {window} pixels is larger than an image of {length} pixels.")
    shape = list(q.shape)
    for axis in axes:
        shape[axis] = count
    total = q.new_zeros(shape)
    for offset in range(window):
        # Places k with 0 <= k stride + shift < length; the others see the zeros around the image.
        shift = offset * dilation - before
        start, stop = max(0, -(shift // stride)), min(count, (length - 1 - shift) // stride + 1)
        if stop <= start:
            continue
        source, target = q, total
        for axis in axes:
            first = start * stride + shift
            source = source.transpose(axis, -1)[..., first : first + (stop - start - 1) * stride + 1 : stride]
            source = source.transpose(axis, -1)
            target = target.narrow(axis, start, stop - start)
        target += source
    return total / window
