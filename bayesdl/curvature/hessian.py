"""The exact Hessian of a log density: written out, and as a product with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from bayesdl.curvature.memory import require_memory
from bayesdl.posterior.problem import Problem

Rows = Mapping[str, Any]


def parts(problem: Problem, batch_size: int | None) -> Iterator[tuple[Callable[[Tensor], Tensor], float]]:
    """The log density as a weighted sum over mini-batches, exact for all N rows.

    A batch of B rows counts N/B times in the density, so with the weight B/N rows and prior each count once.

    Args:
        problem: model and rows.
        batch_size: rows in a batch; None for all at once.

    Yields:
        The density of a batch as a function of ``z [D]``, and its weight.
    """
    density = problem.density
    if batch_size is None or density.n is None or batch_size >= density.n:
        yield density.function(), 1.0
        return
    for index in torch.arange(density.n).split(batch_size):
        yield density.function(problem.minibatch(index)), len(index) / density.n


def hessian_times(problem: Problem, z: Tensor, rows: Tensor, batch_size: int | None = None) -> Tensor:
    """``H v`` for the Hessian H of the log density at ``z [D]`` and rows v ``[..., D]``, never writing H out.

    Forward over reverse (Pearlmutter, 1994), where every operation of the program has a forward derivative, else twice
    reverse. Cost: about three gradients a row and batch.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    total = torch.zeros_like(flat)
    for function, weight in parts(problem, batch_size):
        total += weight * _products(function, z, flat)
    return total.reshape(rows.shape)


def hessian(
    problem: Problem, z: Tensor, coordinates: Tensor | None = None, batch_size: int | None = None, chunk: int = 64
) -> Tensor:
    """The Hessian of the log density at ``z [D]``, ``[R, R]``.

    Args:
        problem: model and rows; sites of any program.
        z: the point.
        coordinates: ``[R]``, those to differentiate by; all by default.
        batch_size: rows in a mini-batch; None for all at once.
        chunk: columns that are computed together.

    Raises:
        MethodError: the matrix is too large to be written out.
    """
    index = torch.arange(len(z), device=z.device) if coordinates is None else coordinates
    require_memory(f"A Hessian of {len(index):,} unknowns", len(index), len(index), z.dtype)
    columns = []
    for some in index.split(chunk):
        units = torch.zeros(len(some), len(z), dtype=z.dtype, device=z.device)
        units[torch.arange(len(some)), some] = 1.0
        columns.append(hessian_times(problem, z, units, batch_size)[:, index])
    whole = torch.cat(columns) if columns else z.new_zeros(0, 0)
    return 0.5 * (whole + whole.mT)


def _products(function: Callable[[Tensor], Tensor], z: Tensor, rows: Tensor) -> Tensor:
    def forward_over_reverse(v: Tensor) -> Tensor:
        found: Tensor = jvp(grad(function), (z,), (v,))[1]
        return found

    try:
        return vmap(forward_over_reverse)(rows).detach()
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        # Control flow that depends on values, and operations without a forward derivative or a batching rule.
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]
            products = [_along(slope, leaf, v) for v in rows]
        return torch.stack(products)


def _along(slope: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    if not slope.requires_grad:  # a linear density
        return torch.zeros_like(v)
    found = torch.autograd.grad(slope, leaf, v, retain_graph=True, materialize_grads=True)[0]
    return found.detach()
