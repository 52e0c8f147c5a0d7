"""How the log determinant of a Gauss-Newton precision changes with the point at which it is taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from bayesdl.curvature.layers import ELEMENTS
from bayesdl.curvature.outputs import Curvature, NetworkOutputs
from bayesdl.density import program
from bayesdl.posterior.covariance import Covariance


def log_det_slope(
    network: NetworkOutputs, covariance: Covariance, curvature: Curvature = "ggn", batch_size: int | None = None
) -> Tensor:
    r"""Gradient of ``log det P`` by z at the network's point, ``[D]``, for a P that is the prior's plus the curvature.

    With ``S = P^-1`` held at its value, ``d log det P = tr(S dP)``, so it is the gradient of

        sum_i tr(R_i R_i^T J_i S J_i^T)

    by the z in the outputs' curvature ``R_i R_i^T`` and the Jacobian J_i. Right for a full matrix, and for a diagonal
    one with its diagonal S.

    Args:
        network: the network at a point.
        covariance: S, ``[D, D]``, 0 at all coordinates that are not its weights.
        curvature: which.
        batch_size: rows in a batch.

    Cost: about three times K gradients a row, and K products with S.
    """
    z = network.z.detach().requires_grad_()
    total = torch.zeros_like(network.z)
    for batch in network.batches(batch_size):
        step = max(1, ELEMENTS // (len(z) * network.event_shape.numel()))
        for rows in torch.arange(len(batch["x"])).split(step):
            some: dict[str, Any] = {name: value[rows] for name, value in batch.items()}
            with torch.enable_grad(), program.unchecked():
                jacobian = vmap(jacrev(lambda point, x: network.at(point, x[None])[0]), (None, 0))(z, some["x"])
                moved = jacobian @ covariance.times(jacobian).mT
                value = (network.bends(z, some, curvature) * moved).sum()
                total += torch.autograd.grad(value, z)[0]
    return total
