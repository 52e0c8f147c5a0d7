"""How good the gradient estimates of a variational fit are where it ended."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl._rng import derive_seed, generator
from bayesdl.infer.data_order import DataOrder

if TYPE_CHECKING:
    from bayesdl.infer.variational_engine import GaussianEngine

REPEATS = 20
"""Gradient estimates that are compared."""


def gradient_quality(engine: GaussianEngine, parameters: Tensor, seed: int) -> dict[str, float]:
    """Signal, noise and effective draws of the gradient estimate that one step makes.

    Lengths are in units in which q has standard deviation 1: the mean's part is multiplied by q's sd, the spread's is
    scale-free as it is; coordinates with a point are left out.

    Args:
        engine: makes the estimates.
        parameters: ``[P]``, where to look.
        seed: seed of the draws and mini-batches.

    Returns:
        "signal", the length of the expected gradient: 0 at an optimum, so one far above noise / sqrt(20) means that the
        run was too short. "noise", the root of the total variance of one step's estimate, mini-batch and draws
        together. "snr", signal / noise. "draws", how many draws the estimate is worth: of the ELBO, the variance with
        a single draw (score function: twice that with two) on the same mini-batch over that with all ``samples``;
        near 1 more samples buy nothing. Of the bounds with alpha < 1, the effective size (sum w)^2 / sum w^2 of their
        weights.
    """
    objective, samples, kl_weight = engine.objective, engine.method.samples, engine.kl_weight(engine.total)
    stream = generator(seed, "gradient quality", device=parameters.device)
    order = DataOrder(engine.problem, engine.method.batch_size, 1, derive_seed(seed, "gradient quality"))
    state = order.init()
    sd = objective.law(parameters).covariance.variances().sqrt()
    unit = torch.cat([sd, torch.ones_like(parameters[len(sd) :])])
    whole, single, sizes = _Variance(), _Variance(), []
    for _ in range(REPEATS):
        rows, moved = order.next(state)
        state |= moved
        batch = None if rows is None else engine.problem.minibatch(rows[0])
        noise = objective.noise(samples, stream)
        log_weights, gradient = objective.estimate(parameters, noise, batch, kl_weight)
        whole.add(gradient * unit)
        if engine.method.alpha != 1:
            sizes.append(float(log_weights.softmax(0).square().sum().reciprocal()))
        elif samples > objective.fewest:
            single.add(
                objective.estimate(parameters, objective.noise(objective.fewest, stream), batch, kl_weight)[1] * unit
            )
    signal, variance = whole.signal(), whole.total()
    if sizes:
        draws = sum(sizes) / REPEATS
    else:
        draws = objective.fewest * (single.total() / variance if single.count and variance else 1.0)
    return {
        "signal": signal,
        "noise": math.sqrt(variance),
        "snr": signal / math.sqrt(variance) if variance else 0.0,
        "draws": draws,
    }


class _Variance:
    """Running mean and sum of squared deviations of vectors (Welford, 1962), in double precision."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), 0.0

    def add(self, vector: Tensor) -> None:
        self.count += 1
        away = vector.double() - self.mean
        self.mean = self.mean + away / self.count
        self.squares += float(away @ (vector.double() - self.mean))

    def total(self) -> float:
        """Sum of the variances of all entries."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0

    def signal(self) -> float:
        """Length of the expected vector, with the noise's part of the mean's length taken out."""
        return math.sqrt(max(float(self.mean.square().sum()) - self.total() / self.count, 0.0))
