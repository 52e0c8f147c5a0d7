"""Kernel matrices of infinitely wide networks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.forecast import forecast, require_room
from bayesdl.infinite.inputs import check_inputs, input_covariance
from bayesdl.infinite.layers import Layer, check_layers, pools, spatial_of
from bayesdl.infinite.recursion import propagate
from bayesdl.infinite.tiles import Tiles, variances_of

Parameterisation = Literal["ntk", "standard"]
LONG = 500  # tiles from which a forecast is logged before the work begins
LOGGER = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """Both kernels of an infinitely wide network."""

    nngp: Tensor
    ntk: Tensor


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
        TooLarge: the matrices exceed this machine's memory; ``forecast`` tells beforehand.

    Cost: O(N M (d + layers)) for tables; times the pixels for images without pooling, times their square (up to the
    last pooling layer) with it. Beyond the results, memory holds one tile of pairs and the variances of every input at
    every nonlinear layer; with gradients, all pairs. A long computation logs its forecast (level INFO).
    """
    layers = check_layers(layers)
    if parameterisation not in ("ntk", "standard"):
        raise ModelError(f"parameterisation={parameterisation!r} must be 'ntk' or 'standard'.")
    own = x2 is None or x2 is x1
    x1, x2 = check_inputs(layers, x1, x1 if x2 is None else x2)
    standard = parameterisation == "standard"
    spatial = spatial_of(layers)
    taped = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
    if taped or {x1.dim(), x2.dim()} != {2 + spatial}:
        start = input_covariance(x1, x2, diag, spatial=spatial, full=spatial > 0 and pools(layers))
        if ntk:
            start = start._replace(ntk=torch.zeros_like(start.q12))
        return propagate(layers, start, *variances_of(layers, x1), standard=standard)
    tiles = Tiles(layers, x1, None if own else x2, ntk, standard)
    if diag:
        results = tiles.diagonal()
    else:
        require_room(len(x1), len(x2), 1 + ntk, x1.dtype)
        if LOGGER.isEnabledFor(logging.INFO) and sum(1 for _ in tiles) >= LONG:
            what = forecast(layers, x1, len(x1), None if own else len(x2), ntk=ntk)
            LOGGER.info("Kernels of %d x %d pairs: %s.", len(x1), len(x2), what)
        results = tiles.matrix()
    return results[0], results[1] if ntk else None


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
