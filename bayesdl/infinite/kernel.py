r"""The NNGP recursion: the covariance of an infinitely wide network's outputs under its prior.

    K(x, x') = x^T x' / d at the inputs
    K <- w_std^2 K + b_std^2 at a dense layer
    K <- E[phi(u) phi(v)], (u, v) ~ N(0, K), at an activation

Sources: Neal (1996), ch. 2; Lee et al. (2018), Deep neural networks as Gaussian processes, eqs. 4-5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdl.errors import DataError
from bayesdl.infinite.layers import Covariance, Dense, Layer, activate, check_layers, dense


def input_covariance(x1: Tensor, x2: Tensor, diag: bool = False) -> Covariance:
    """Return the inner products of the inputs divided by their number of features.

    Args:
        x1: inputs ``[..., N, d]``.
        x2: inputs ``[..., M, d]``.
        diag: row-by-row pairs (N = M) instead of all pairs.
    """
    d = x1.shape[-1]
    q1, q2 = x1.square().sum(-1) / d, x2.square().sum(-1) / d
    if diag:
        return Covariance(q1, q2, (x1 * x2).sum(-1) / d)
    return Covariance(q1.unsqueeze(-1), q2.unsqueeze(-2), x1 @ x2.mT / d)


def propagate(
    layers: Sequence[Layer], covariance: Covariance, w_var: Sequence[Tensor], b_var: Sequence[Tensor]
) -> Covariance:
    """Carry a covariance through the layers; the k-th dense one has the variances ``w_var[k]`` and ``b_var[k]``."""
    k = 0
    for layer in layers:
        if isinstance(layer, Dense):
            covariance = dense(covariance, w_var[k], b_var[k])
            k += 1
        else:
            covariance = activate(covariance, layer.name)
    return covariance


def nngp(layers: Sequence[Layer], x1: Tensor, x2: Tensor | None = None, *, diag: bool = False) -> Tensor:
    """Return the covariance of an infinitely wide network's output between two sets of inputs.

    Every output unit has this covariance, and different output units are independent.

    Args:
        layers: dense layers and activations, from ``fully_connected`` or ``from_module``.
        x1: inputs ``[..., N, d]``.
        x2: inputs ``[..., M, d]``; by default ``x1``.
        diag: only the covariances of row i of ``x1`` with row i of ``x2``.

    Returns:
        ``[..., N, M]``, or ``[..., N]`` with ``diag``.

    Raises:
        ModelError: the stack does not begin and end with a dense layer.
        DataError: the inputs are not matrices with the same number of features.

    Cost: O(N M (d + number of layers)).
    """
    x2 = x1 if x2 is None else x2
    if min(x1.dim(), x2.dim()) < 2 or x1.shape[-1] != x2.shape[-1]:
        raise DataError(f"nngp needs inputs [N, d] and [M, d]; got {list(x1.shape)} and {list(x2.shape)}.")
    layers = check_layers(layers)
    widths = [layer for layer in layers if isinstance(layer, Dense)]
    w_var = [torch.tensor(layer.w_std, dtype=x1.dtype, device=x1.device).square() for layer in widths]
    b_var = [torch.tensor(layer.b_std, dtype=x1.dtype, device=x1.device).square() for layer in widths]
    start = input_covariance(x1, x2, diag)
    return propagate(layers, start, w_var, b_var).q12
