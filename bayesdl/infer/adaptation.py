"""Warm-up of HMC and NUTS: dual averaging of the step size and windowed estimation of a diagonal mass matrix.

Both are **pooled over the chains**: one step size and one mass matrix serve all of them. Dual averaging sees the mean
acceptance statistic of the chains, and the variance of a window is that of all draws of all chains about their common
mean. C chains thus bring C times the information of one, which makes short warm-ups possible, and chains that have not
yet come together widen the estimate instead of narrowing it. After warm-up nothing is adapted, so that the draws come
from one fixed reversible kernel.

Sources: dual averaging as in Hoffman & Gelman (2014), section 3.2; windows and regularisation as in the Stan reference
manual, "HMC algorithm parameters" (fast - slow, doubling - fast).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State

GAMMA, DELAY, KAPPA = 0.05, 10.0, 0.75
"""Dual averaging: shrinkage towards its centre, iterations that count little, decay of the weights."""


class Windows(NamedTuple):
    """When the mass matrix is estimated; the rest of warm-up adapts the step size alone."""

    start: int
    """First transition whose draw enters an estimate."""
    stop: int
    """First transition after the last window."""
    ends: tuple[int, ...]
    """Number of transitions done when each window closes, in increasing order; the last is ``stop``."""


def windows(warmup: int) -> Windows:
    """Stan's schedule: 75 fast, slow windows of 25, 50, 100, ... draws, 50 fast.

    The last slow window takes in what is left where its successor would not fit. Below 150 transitions the three parts
    are 15%, 75% and 10% of warm-up; below 20 the mass matrix is not estimated.
    """
    first, last, size = 75, 50, 25
    if warmup < 20:
        return Windows(warmup, warmup, ())
    if first + size + last > warmup:
        first, last = int(0.15 * warmup), int(0.1 * warmup)
        size = warmup - first - last
    stop, ends, end = warmup - last, [], first
    while end < stop:
        end += size
        size *= 2
        if end + size > stop:
            end = stop
        ends.append(end)
    return Windows(first, stop, tuple(ends))


def start_averaging(step_size: float) -> State:
    """State of dual averaging, centred on ten times ``step_size``.

    The tensor ``averaging`` holds: centre, number of updates, mean error of the acceptance, log of the averaged step.
    """
    averaging = torch.tensor([math.log(10.0 * step_size), 0.0, 0.0, math.log(step_size)], dtype=torch.float64)
    return {"averaging": averaging, "step_size": step_size}


def average(state: State, accepted: float, target: float) -> State:
    """One update of dual averaging.

    With error ``h_t = target - accepted`` and its weighted mean ``H_t``, ``log eps_t = centre - sqrt(t)/GAMMA * H_t``,
    and the average that is used after warm-up weighs it by ``t^-KAPPA`` (Hoffman & Gelman, 2014, eq. 6).

    Args:
        state: as made by ``start_averaging``.
        accepted: acceptance statistic of the last transition, averaged over the chains.
        target: its wanted mean.

    Returns:
        The changed entries; ``step_size`` is for the next transition.
    """
    centre, count, error, averaged = state["averaging"].tolist()
    count += 1.0
    weight = 1.0 / (count + DELAY)
    error = (1.0 - weight) * error + weight * (target - accepted)
    log_step = centre - math.sqrt(count) / GAMMA * error
    weight = count**-KAPPA
    averaged = weight * log_step + (1.0 - weight) * averaged
    averaging = torch.tensor([centre, count, error, averaged], dtype=torch.float64)
    return {"averaging": averaging, "step_size": math.exp(log_step)}


def averaged_step_size(state: State) -> float:
    """The step size to keep after warm-up."""
    return math.exp(float(state["averaging"][3]))


def start_window(like: Tensor) -> State:
    """An empty window for positions ``like [C, D]``: count, mean ``[D]`` and sum of squared deviations ``[D]``."""
    zeros = like.new_zeros(like.shape[-1], dtype=torch.float64)
    return {"window_count": 0, "window_mean": zeros, "window_squares": zeros}


def extend_window(state: State, z: Tensor) -> State:
    """Add one draw of every chain, ``z [C, D]``, to the window (Chan, Golub & LeVeque's pairwise update)."""
    count, chains = state["window_count"], len(z)
    batch = z.double()
    centre = batch.mean(0)
    shift = centre - state["window_mean"]
    within = (batch - centre).square().sum(0)
    return {
        "window_count": count + chains,
        "window_mean": state["window_mean"] + shift * (chains / (count + chains)),
        "window_squares": state["window_squares"] + within + shift.square() * (count * chains / (count + chains)),
    }


def window_scale(state: State) -> Tensor:
    """Square root ``[D]`` of the regularised variance ``n/(n+5) var + 5/(n+5) 1e-3`` of the window's n draws.

    It is the ``scale`` of ``bayesdl.infer.hamiltonian``: the inverse mass matrix is ``diag(scale^2)``.
    """
    n = state["window_count"]
    variance: Tensor = state["window_squares"] / (n - 1)
    regularised: Tensor = n / (n + 5.0) * variance + 1e-3 * 5.0 / (n + 5.0)
    return regularised.sqrt()
