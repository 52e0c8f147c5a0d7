"""The inputs of an infinitely wide network: what fits, and their covariances before the first layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdl.errors import DataError
from bayesdl.infinite.layers import Conv, Flatten, Layer, spatial_of, weighted
from bayesdl.infinite.recursion import Covariance


def _pixels_first(x: Tensor, spatial: int) -> Tensor:
    """From ``[..., N, C, *pixels]`` ``[P, ..., N, C]``."""
    return x.flatten(-spatial).movedim(-1, 0)


def own_covariance(x: Tensor, spatial: int, full: bool) -> Tensor:
    """The mean over features or channels of the products of an input with itself; see ``cross_covariance``."""
    return cross_covariance(x, x, True, spatial=spatial, full=full)


def cross_covariance(x1: Tensor, x2: Tensor, diag: bool = False, *, spatial: int = 0, full: bool = False) -> Tensor:
    """The mean over features or channels of the products of two inputs.

    Args:
        x1: inputs ``[..., N, d]``, or images ``[..., N, C, *pixels]``.
        x2: inputs ``[..., M, d]`` or ``[..., M, C, *pixels]``.
        diag: row-by-row pairs (N = M) instead of all pairs.
        spatial: number of spatial dimensions.
        full: between all pairs of pixels instead of equal ones.

    Returns:
        ``[..., N, M]``, or ``[..., N]`` with ``diag``; for images ``[*pixels, ..., N, M]``, and where ``full``
        ``[*pixels, *pixels, ..., N, M]``.
    """
    pixels = x1.shape[x1.dim() - spatial :]
    features = x1.shape[-1 - spatial]
    a, b = (_pixels_first(x, spatial) for x in (x1, x2)) if spatial else (x1, x2)
    if not full:
        q = (a * b).sum(-1) if diag else a @ b.mT
        q = q / features
        return q.reshape(*pixels, *q.shape[1:]) if spatial else q
    q = torch.einsum("p...nc,q...nc->pq...n" if diag else "p...nc,q...mc->pq...nm", a, b)
    return (q / features).reshape(*pixels, *pixels, *q.shape[2:])


def input_covariance(x1: Tensor, x2: Tensor, diag: bool = False, *, spatial: int = 0, full: bool = False) -> Covariance:
    """Return the covariance of the inputs with each other and with themselves; see ``cross_covariance``."""
    q1, q2 = (own_covariance(x, spatial, full) for x in (x1, x2))
    if not diag:
        q1, q2 = q1.unsqueeze(-1), q2.unsqueeze(-2)
    return Covariance(q1, q2, cross_covariance(x1, x2, diag, spatial=spatial, full=full), spatial=spatial, full=full)


def check_inputs(layers: Sequence[Layer], x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs as the recursion takes them: images flattened where the network begins so.

    Raises:
        DataError: wrong number of dimensions, features or channels, different image sizes, NaN or infinite values, or
            a number format other than float32 and float64.
    """
    spatial = spatial_of(layers)
    if layers and isinstance(layers[0], Flatten) and not spatial:
        x1, x2 = (x.flatten(1) if x.dim() > 2 else x for x in (x1, x2))
    need = "[N, d] and [M, d]" if not spatial else f"[N, C, {'pixels' if spatial == 1 else 'H, W'}] twice"
    if min(x1.dim(), x2.dim()) < 2 + spatial or x1.shape[-1 - spatial :] != x2.shape[-1 - spatial :]:
        raise DataError(f"The kernel needs inputs {need}; got {list(x1.shape)} and {list(x2.shape)}.")
    if x1.dtype != x2.dtype or x1.dtype not in (torch.float32, torch.float64):
        raise DataError(f"The kernel needs inputs in float32 or float64, both alike; got {x1.dtype} and {x2.dtype}.")
    if not bool(x1.isfinite().all()) or not bool(x2.isfinite().all()):
        raise DataError("The inputs hold NaN or infinite values; remove those rows.")
    first = next(weighted(layers), None)
    if first is not None and first.fan_in is not None:
        features = first.fan_in // torch.Size(first.window).numel() if isinstance(first, Conv) else first.fan_in
        if features != x1.shape[-1 - spatial]:
            raise DataError(
                f"The network takes {features} features or channels, the inputs have {x1.shape[-1 - spatial]}."
            )
    return x1, x2
