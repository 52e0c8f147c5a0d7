"""The draws of a warm-up window, and the metric that they suggest.

Every estimate is pooled over the chains of a group: the covariance is that of all its draws about their common mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State
from bayesdl.infer.metric import RANK, Metric, Shape

KEPT = 400
"""Draws of a group that an estimate of a low-rank metric looks at; older ones are overwritten."""
PLAIN = 2.0
"""Directions whose variance is off by less than this factor, either way, are left to the diagonal."""
RIDGE = 1e-5
"""Added to the variances of a low-rank estimate: the weight of the diagonal metric beside the draws."""


def start(shape: Shape, like: Tensor, groups: int) -> State:
    """An empty window for positions ``like [C, D]`` of all chains."""
    dim = like.shape[1]
    if shape == "low_rank":
        kept = like.new_zeros(groups, KEPT, dim, dtype=torch.float64)
        return {"window.count": 0, "window.draws": kept, "window.gradients": kept.clone()}
    zeros = like.new_zeros(groups, dim, dtype=torch.float64)
    squares = zeros if shape == "diag" else zeros.new_zeros(groups, dim, dim)
    return {"window.count": 0, "window.mean": zeros, "window.squares": squares}


def extend(shape: Shape, state: State, z: Tensor, gradient: Tensor | None, groups: int) -> State:
    """Add one draw of every chain, ``z [C, D]``, to the window of its group.

    Diagonal and dense: Chan, Golub & LeVeque's pairwise update of mean and squares.

    Args:
        shape: of the metric.
        state: holds the window.
        z: unconstrained positions of all chains.
        gradient: ``[C, D]`` of the log density there, for a low-rank metric.
        groups: G.
    """
    rows = z.double().reshape(groups, -1, z.shape[1])
    count, chains = state["window.count"], rows.shape[1]
    if gradient is not None:
        slots = torch.arange(count, count + chains, device=z.device)[-KEPT:] % KEPT
        draws, gradients = state["window.draws"].clone(), state["window.gradients"].clone()
        draws[:, slots] = rows[:, -KEPT:]
        gradients[:, slots] = gradient.double().reshape(rows.shape)[:, -KEPT:]
        return {"window.count": count + chains, "window.draws": draws, "window.gradients": gradients}
    centre = rows.mean(1)
    shift = centre - state["window.mean"]
    inner = rows - centre[:, None]
    weight = count * chains / (count + chains)
    if shape == "diag":
        squares = inner.square().sum(1) + shift.square() * weight
    else:
        squares = inner.mT @ inner + shift[:, :, None] * shift[:, None] * weight
    return {
        "window.count": count + chains,
        "window.mean": state["window.mean"] + shift * (chains / (count + chains)),
        "window.squares": state["window.squares"] + squares,
    }


def estimate(shape: Shape, state: State, dtype: torch.dtype) -> Metric:
    """The metric of the window's n draws: their covariance, regularised.

    Diagonal and dense: ``n/(n+5) (cov + 5e-3/n diag)``, where ``diag`` are the variances (1 where a coordinate never
    moved): relative to them, so that it blurs no posterior that is far narrower than 1.
    """
    n = state["window.count"]
    if shape == "low_rank":
        return _low_rank(state["window.draws"][:, :n], state["window.gradients"][:, :n], dtype)
    covariance = state["window.squares"] / max(n - 1, 1) * (n / (n + 5.0))
    variance = covariance if shape == "diag" else covariance.diagonal(dim1=1, dim2=2)
    floor = torch.where(variance > 0, variance * (5e-3 / n), 5e-3 / (n + 5.0))
    if shape == "diag":
        return Metric((variance + floor).sqrt().to(dtype))
    factor = torch.linalg.cholesky(covariance + torch.diag_embed(floor)).to(dtype)
    return Metric(factor.new_ones(factor.shape[:2]), factor)


def _low_rank(draws: Tensor, gradients: Tensor, dtype: torch.dtype) -> Metric:
    """A low-rank metric from draws and gradients, ``[G, n, D]`` each.

    The metric that brings the covariances of whitened draws and whitened gradients together minimises the Fisher
    divergence to a Gaussian (Seyboldt, Carlson & Carpenter, 2024): the diagonal ``s^2 = sd(draws) / sd(gradients)``;
    then, in the span of the leading directions of both, the geometric mean of the draws' covariance and the inverse of
    the gradients'. Few draws suffice, because the gradients see the stiff directions that the draws barely show.
    """
    parts = [_low_rank_of_group(x, g) for x, g in zip(draws, gradients, strict=True)]
    scale, directions, stretch = (torch.stack(part).to(dtype) for part in zip(*parts, strict=True))
    return Metric(scale, None, directions, stretch)


def _low_rank_of_group(draws: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, dim = draws.shape
    tiny = 1e-10
    scale = ((draws.var(0) + tiny) / (gradients.var(0) + tiny)).pow(0.25)
    x = (draws - draws.mean(0)) / scale
    g = (gradients - gradients.mean(0)) * scale
    rank = min(RANK, n - 1, dim)
    # Orthonormal basis of the leading directions of draws and gradients together.
    leading = [torch.linalg.svd(part, full_matrices=False)[2][:rank] for part in (x, g)]
    basis = torch.linalg.qr(torch.cat(leading).mT)[0]
    ridge = RIDGE * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    of_draws, of_gradients = ((part @ basis).mT @ (part @ basis) / n + ridge for part in (x, g))
    values, vectors = torch.linalg.eigh(_geometric_mean(of_draws, of_gradients))
    order = values.log().abs().argsort(descending=True)[:rank]
    values, vectors = values[order], vectors[:, order]
    stretch = torch.where(values.log().abs() > torch.tensor(PLAIN).log(), values.clamp(min=1e-8).sqrt(), 1.0)
    directions, stretch_all = draws.new_zeros(dim, RANK), draws.new_ones(RANK)
    directions[:, : len(order)], stretch_all[: len(order)] = basis @ vectors, stretch
    return scale, directions, stretch_all


def _geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """The positive definite S with ``S b S = a``, ``b^-1/2 (b^1/2 a b^1/2)^1/2 b^-1/2``."""
    values, vectors = torch.linalg.eigh(b)
    root, inverse = (vectors * values.pow(power) @ vectors.mT for power in (0.5, -0.5))
    inner, axes = torch.linalg.eigh(root @ a @ root)
    middle: Tensor = axes * inner.clamp(min=0.0).sqrt() @ axes.mT
    return inverse @ middle @ inverse
