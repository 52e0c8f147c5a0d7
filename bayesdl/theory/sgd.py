r"""Stochastic gradient descent as a Markov chain: real mini-batches, its Gaussian models, averages, annealing.

All of them step ``w <- w - eta g`` with a random gradient g of the right mean and differ in where g comes from. Given w
its covariance is C(w)/b for rows drawn with replacement, C the covariance of one row's gradient; C(w)/b times
(n-b)/(n-1) without; I/b in the isotropic model. Rows are drawn anew at every step: shuffling once per epoch is another
process, whose state holds the rows that are left besides w.

Gradient descent (b = n without replacement) is a Markov chain too, a deterministic one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import DataError, Divergence
from bayesdl.infer.schedules import Schedule, as_schedule
from bayesdl.theory.gradient_noise import EmpiricalLoss, minibatch_factor

NoisyGradient = Callable[[Tensor, torch.Generator], Tensor]
"""``(w [C, D], stream) -> [C, D]``: a random gradient for every chain."""


def minibatch_gradient(loss: EmpiricalLoss, batch_size: int, *, replace: bool = True) -> NoisyGradient:
    """The mean gradient of b rows, drawn anew for every chain and step.

    Args:
        loss: A mean over rows.
        batch_size: b.
        replace: With replacement (the textbook formulas), or b different rows.

    Raises:
        MethodError: see ``minibatch_factor``.
    """
    minibatch_factor(loss.n, batch_size, replace=replace)

    def draw(w: Tensor, stream: torch.Generator) -> Tensor:
        size = (len(w), batch_size)
        if replace:
            rows = torch.randint(loss.n, size, generator=stream, device=w.device)
        else:
            rows = torch.rand(len(w), loss.n, generator=stream, device=w.device).topk(batch_size, dim=1).indices
        return loss.weighted(w, w.new_full(size, 1.0 / batch_size), rows)

    return draw


def gaussian_gradient(loss: EmpiricalLoss, batch_size: int, *, replace: bool = True) -> NoisyGradient:
    """The Gaussian with the mini-batch gradient's own mean and covariance C(w)/b at every w.

    No D x D matrix is needed: with e_i standard normal, ``(1/n) sum_i [1 + sqrt(n/b) (e_i - mean e)] grad ell^i`` has
    them. Each draw costs a full gradient.

    Raises:
        MethodError: see ``minibatch_factor``.
    """
    scale = math.sqrt(minibatch_factor(loss.n, batch_size, replace=replace) / loss.n)

    def draw(w: Tensor, stream: torch.Generator) -> Tensor:
        normal = torch.randn(len(w), loss.n, generator=stream, dtype=w.dtype, device=w.device)
        return loss.weighted(w, 1.0 / loss.n + scale * (normal - normal.mean(1, keepdim=True)))

    return draw


def isotropic_gradient(gradient: Callable[[Tensor], Tensor], batch_size: float) -> NoisyGradient:
    """A full gradient ``[C, D] -> [C, D]`` plus N(0, I/b): the model whose chain is unadjusted Langevin dynamics."""

    def draw(w: Tensor, stream: torch.Generator) -> Tensor:
        normal = torch.randn(w.shape, generator=stream, dtype=w.dtype, device=w.device)
        return gradient(w) + normal / math.sqrt(batch_size)

    return draw


def run(
    noisy: NoisyGradient,
    start: Tensor,
    *,
    step_size: float | Schedule,
    steps: int,
    warmup: int = 0,
    thin: int = 1,
    seed: int = 0,
) -> Tensor:
    """The chain ``w <- w - eta g`` from every row of ``start``.

    Args:
        noisy: Where g comes from.
        start: ``[C, D]``.
        step_size: eta, or a schedule of the step number (warm-up included).
        steps: Steps after warm-up.
        warmup: Steps that are not recorded.
        thin: Steps between two recorded states.
        seed: Of all randomness.

    Returns:
        ``[C, steps // thin, D]``.

    Raises:
        DataError: start is not ``[C, D]``.
        Divergence: the numbers left the finite ones; on a quadratic, eta times the curvature must be below 2.
    """
    if start.dim() != 2:
        raise DataError(f"start must be [chains, D]; it has shape {tuple(start.shape)}.")
    eta = as_schedule(step_size)
    stream = generator(seed, "sgd chain", device=start.device)
    w = start.clone()
    found = start.new_empty(len(start), steps // thin, start.shape[1])
    with torch.no_grad():
        for t in range(warmup + steps):
            w = w.sub(noisy(w, stream), alpha=eta(t))
            recorded, between = divmod(t + 1 - warmup, thin)
            if recorded > 0 and between == 0:
                found[:, recorded - 1] = w
    if not w.isfinite().all():
        raise Divergence(f"SGD left the finite numbers within {warmup + steps} steps; take a smaller step size.")
    return found


def anneal(
    noisy: NoisyGradient, start: Tensor, *, step_sizes: Sequence[float], steps_each: int, seed: int = 0
) -> Tensor:
    """Equilibrate, reduce the step size, repeat: final states ``[C, D]``.

    It finds the deeper of two wells more often than a constant step size does, not always: it would have to equilibrate
    at every level, which takes a time exponential in (barrier / temperature).

    Args:
        noisy: Where g comes from.
        start: ``[C, D]``.
        step_sizes: The levels of eta, each held for ``steps_each`` steps; equal levels make the control run.
        steps_each: Steps on each level.
        seed: Of all randomness.

    Raises:
        Divergence: see ``run``.
    """
    w = start
    for level, eta in enumerate(step_sizes):
        w = run(noisy, w, step_size=eta, steps=steps_each, thin=steps_each, seed=seed + level)[:, -1]
    return w


class ErgodicAverages(NamedTuple):
    """Time averages of a path.

    Attributes:
        mean: ``(1/T) sum_t W_t``, ``[..., D]``.
        second_moment: ``(1/T) sum_t W_t W_t^T``, ``[..., D, D]``.
    """

    mean: Tensor
    second_moment: Tensor


def ergodic_averages(path: Tensor) -> ErgodicAverages:
    """Time averages of ``path [..., T, D]``, which tend to the invariant law's mean and second moment.

    The second moment is a single sum over time. The double sum over pairs of times, divided by T^2, gives the square of
    the mean.
    """
    return ErgodicAverages(path.mean(-2), path.mT @ path / path.shape[-2])
