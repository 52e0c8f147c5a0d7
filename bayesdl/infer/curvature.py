"""What bounds the step of a Langevin sampler: the largest curvature, and the noise of mini-batch gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.infer.hamiltonian import ValueAndGrad


def largest_curvature(
    z: Tensor, value_and_grad: ValueAndGrad, generator: torch.Generator, iterations: int = 12
) -> float:
    """Largest absolute eigenvalue of the Hessian of the log density, over the chains at ``z [C, D]``.

    Power iteration on central differences of the gradient, ``Hv = (g(z + hv) - g(z - hv)) / 2h``: it approaches the
    eigenvalue from below, and needs no second derivatives. Cost: ``2 iterations`` gradients a chain.
    """
    width = torch.finfo(z.dtype).eps ** (1 / 3)
    vector = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    size = torch.zeros_like(z[:, :1])
    for _ in range(iterations):
        vector = vector / vector.norm(dim=1, keepdim=True)
        ahead, behind = (value_and_grad(z + sign * width * vector)[1] for sign in (1.0, -1.0))
        vector = (ahead - behind) / (2.0 * width)
        size = vector.norm(dim=1)
    return float(size.max())


def gradient_noise(z: Tensor, next_batch: Callable[[], ValueAndGrad], batches: int = 8) -> Tensor:
    """Variance ``[D]`` of each coordinate of the mini-batch gradient at ``z [C, D]``, averaged over the chains.

    Args:
        z: positions.
        next_batch: gives the log density on a new mini-batch at each call.
        batches: how many gradients are compared.
    """
    gradients = torch.stack([next_batch()(z)[1] for _ in range(batches)])
    return gradients.var(0).mean(0)
