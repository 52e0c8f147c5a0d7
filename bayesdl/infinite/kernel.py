"""Kernel matrices of infinitely wide networks, computed in tiles of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import DataError, ModelError
from bayesdl.infinite.layers import Conv, Flatten, Layer, check_layers, pools, spatial_of, weighted
from bayesdl.infinite.rules import Covariance, propagate

Parameterisation = Literal["ntk", "standard"]
CELLS = 2**17  # entries of a tile, which a core's cache holds
MATERIAL = 2**23  # entries of a tile where every pair carries the covariances of its pixels


class Kernels(NamedTuple):
    """Both kernels of an infinitely wide network."""

    nngp: Tensor
    ntk: Tensor


def input_covariance(x1: Tensor, x2: Tensor, diag: bool = False, *, spatial: int = 0, full: bool = False) -> Covariance:
    """Return the inner products of the inputs divided by their number of features (or channels).

    Args:
        x1: inputs ``[..., N, d]``, or images ``[..., N, C, *pixels]``.
        x2: inputs ``[..., M, d]`` or ``[..., M, C, *pixels]``.
        diag: row-by-row pairs (N = M) instead of all pairs.
        spatial: number of spatial dimensions.
        full: between all pairs of pixels instead of equal ones.
    """
    if not spatial:
        d = x1.shape[-1]
        q1, q2 = x1.square().sum(-1) / d, x2.square().sum(-1) / d
        if diag:
            return Covariance(q1, q2, (x1 * x2).sum(-1) / d)
        return Covariance(q1.unsqueeze(-1), q2.unsqueeze(-2), x1 @ x2.mT / d)
    pixels = x1.shape[x1.dim() - spatial :]
    a, b = x1.flatten(-spatial), x2.flatten(-spatial)
    pair, own = ("p", "p") if not full else ("pq", "pq")
    second = "q" if full else "p"
    rows = "...n" if diag else "...nm"
    cross = torch.einsum(f"...ncp,...{'n' if diag else 'm'}c{second}->{rows}{pair}", a, b)
    q1, q2 = (torch.einsum(f"...ncp,...nc{second}->...n{own}", z, z) for z in (a, b))
    if not diag:
        trailing = len(own)
        q1, q2 = q1.unsqueeze(-1 - trailing), q2.unsqueeze(-2 - trailing)
    shape = (*pixels, *pixels) if full else tuple(pixels)
    size = len(pair)
    q1, q2, cross = (q.reshape(*q.shape[: q.dim() - size], *shape) / x1.shape[-1 - spatial] for q in (q1, q2, cross))
    return Covariance(q1, q2, cross, spatial=spatial, full=full)


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


def kernels(
    layers: Sequence[Layer],
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    diag: bool = False,
    ntk: bool = True,
    parameterisation: Parameterisation = "ntk",
) -> tuple[Tensor, Tensor | None]:
    """Return the NNGP kernel and, unless ``ntk`` is False, the NTK of one output unit between two sets of inputs.

    Args:
        layers: from ``from_module`` or ``fully_connected``.
        x1: inputs ``[..., N, d]``, or images ``[N, C, *pixels]``.
        x2: inputs ``[..., M, d]``, or images; by default ``x1``, and then each pair is computed once.
        diag: only the pairs of row i of ``x1`` with row i of ``x2``.
        ntk: whether to compute the NTK.
        parameterisation: of the NTK; "standard" needs the finite network's ``fan_in`` of every layer.

    Returns:
        ``[..., N, M]`` each, or ``[..., N]`` with ``diag``.

    Raises:
        ModelError: the stack has no limit.
        DataError: the inputs do not fit.

    Cost: O(N M (d + layers)) for tables; times the pixels for images without pooling, times their square (up to the
    last pooling layer) with it. Beyond the results, memory holds one tile of pairs; with gradients, all of them.
    """
    layers = check_layers(layers)
    if parameterisation not in ("ntk", "standard"):
        raise ModelError(f"parameterisation={parameterisation!r} must be 'ntk' or 'standard'.")
    own = x2 is None or x2 is x1
    x1, x2 = check_inputs(layers, x1, x1 if x2 is None else x2)
    standard = parameterisation == "standard"
    taped = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
    rows = rows_per_tile(layers, x1)
    if diag:
        size = rows**2 if x1.dim() == 2 + spatial_of(layers) and not taped else max(1, len(x1))
        parts = [_block(layers, a, b, True, ntk, standard) for a, b in zip(x1.split(size), x2.split(size), strict=True)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if ntk else None  # type: ignore[misc]
    if taped or x1.dim() != 2 + spatial_of(layers) or x2.dim() != x1.dim() or not len(x1) or not len(x2):
        return _block(layers, x1, x2, False, ntk, standard)
    results = [x1.new_empty(len(x1), len(x2)) for _ in range(1 + ntk)]
    for i in range(0, len(x1), rows):
        for j in range(0, len(x2), rows):
            if own and j < i:
                continue
            here, there = slice(i, i + rows), slice(j, j + rows)
            block = _block(layers, x1[here], x2[there], False, ntk, standard)
            for result, part in zip(results, block, strict=False):
                assert part is not None
                result[here, there] = part
                if own and j > i:
                    result[there, here] = part.T
        if own:  # the variances without the rounding of the correlations
            exact = _block(layers, x1[i : i + rows], x1[i : i + rows], True, ntk, standard)
            for result, part in zip(results, exact, strict=False):
                assert part is not None
                result.diagonal()[i : i + rows] = part
    return results[0], results[1] if ntk else None


def rows_per_tile(layers: Sequence[Layer], x: Tensor) -> int:
    """How many rows of each input a tile holds."""
    spatial = spatial_of(layers)
    if not spatial:
        return int(CELLS**0.5)
    pixels = x.shape[x.dim() - spatial :].numel()
    return max(1, int((MATERIAL / 8 / (pixels**2 if pools(layers) else pixels)) ** 0.5))


def _block(
    layers: Sequence[Layer], x1: Tensor, x2: Tensor, diag: bool, ntk: bool, standard: bool
) -> tuple[Tensor, Tensor | None]:
    spatial = spatial_of(layers)
    start = input_covariance(x1, x2, diag, spatial=spatial, full=spatial > 0 and pools(layers))
    if ntk:
        start = start._replace(ntk=torch.zeros_like(start.q12))
    w_var, b_var = (
        [torch.tensor(sd, dtype=x1.dtype, device=x1.device).square() for sd in sds]
        for sds in zip(*((layer.w_std, layer.b_std) for layer in weighted(layers)), strict=True)
    )
    end = propagate(layers, start, w_var, b_var, standard=standard)
    if end.spatial:
        raise ModelError("The network's output is an image; end it with Flatten or a mean over pixels, and Linear.")
    return end.q12, end.ntk


def nngp(layers: Sequence[Layer], x1: Tensor, x2: Tensor | None = None, *, diag: bool = False) -> Tensor:
    """Return the covariance of an infinitely wide network's output under its prior; see ``kernels``.

    Every output unit has this covariance, and different output units are independent.
    """
    return kernels(layers, x1, x2, diag=diag, ntk=False)[0]


def ntk(
    layers: Sequence[Layer],
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    diag: bool = False,
    parameterisation: Parameterisation = "ntk",
) -> Tensor:
    """Return the tangent kernel, the inner product of the gradients of one output unit by all parameters.

    It is what training by gradient descent follows, as ``nngp`` is what Bayesian inference does; see ``kernels``.
    """
    value = kernels(layers, x1, x2, diag=diag, parameterisation=parameterisation)[1]
    assert value is not None
    return value
