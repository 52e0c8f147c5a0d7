"""Losses on rows, checked against what the theorems assume, and their Monte-Carlo average over posterior draws."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bayesdl._rng import derive_seed
from bayesdl.bounds._numbers import EPS, up
from bayesdl.bounds.loss import Loss
from bayesdl.data import Dataset
from bayesdl.errors import CertificateError
from bayesdl.infer.progress import Bar
from bayesdl.posterior import Posterior

CELLS = 2**20
"""Draws x rows x classes evaluated at a time."""


def gibbs_risk(
    posterior: Posterior,
    data: Dataset,
    loss: Loss,
    *,
    draws: int,
    seed: int,
    progress: bool | None,
    together: int = 1,
) -> float:
    """Average loss over independent draws from the posterior and over the rows.

    Args:
        posterior: A posterior with a density, whose ``sampler`` draws anew by its seed.
        data: The rows of the bound.
        loss: A loss in [0, 1].
        draws: Number of draws, or of groups of draws.
        seed: Seed of the draws.
        progress: Whether to show a progress bar; None asks the terminal.
        together: Draws in a group; the loss of a group at a row is the product of its members' losses.

    Raises:
        CertificateError: A loss is NaN or outside [0, 1].
    """
    size = max(1, min(draws, CELLS // (together * len(data) * max(1, data.n_classes))))
    sample = posterior.sampler(data.x)
    total: list[float] = []
    bar = Bar("certify", draws, progress)
    try:
        for start in range(0, draws, size):
            bar.update(start, str)
            count = min(size, draws - start)
            prediction = sample(count * together, derive_seed(seed, "certify", start))
            losses = checked(loss.draws(prediction, data.y), (count * together, len(data)), loss)
            total.append(float(losses.unflatten(0, (count, together)).prod(1).sum()))
    finally:
        bar.close(draws, str)
    return min(1.0, math.fsum(total) / (draws * len(data)))


def checked(values: Tensor, shape: tuple[int, ...], loss: Loss) -> Tensor:
    """The losses in float64, after making sure that the theorem's assumption about them is true."""
    values = values.detach().to("cpu", torch.float64)
    if tuple(values.shape) != shape:
        raise CertificateError(f"{loss.name} has shape {tuple(values.shape)}; one value per row {shape} is needed.")
    wrong = ~((values >= 0) & (values <= 1))
    if loss.zero_one:
        wrong |= (values != 0) & (values != 1)
    if wrong.any():
        where = "0 or 1" if loss.zero_one else "in [0, 1]"
        raise CertificateError(f"{loss.name} must be {where}, got {float(values[wrong][0]):g}; no bound would hold.")
    return values


def raised(value: float, relative: float = 64 * EPS) -> float:
    """A non-negative number raised by more than the rounding of the sums behind it; zero stays zero."""
    return float(up(np.asarray(value), relative)) if value > 0 else 0.0
