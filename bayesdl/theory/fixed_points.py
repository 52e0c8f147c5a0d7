"""Fixed points of ``q -> scale * moment(q) + offset`` on q >= 0, for many scales and offsets at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Moment = Callable[[Tensor], Tensor]

SMALLEST = 2.0**-50  # what falls below it falls to zero
NOISE = 2e-15  # rounding of a moment that is a difference of numbers near 1; a smaller change is none
CLOSE = 1e-14
ROUNDS = 80


def fixed_point(moment: Moment, scale: Tensor, offset: Tensor, *, start: float, largest: float) -> Tensor:
    """The fixed point next to ``start`` in the direction in which the map moves it.

    A growing map, iterated from ``start``, ends there. The start itself is returned where it is fixed, infinity where
    the map grows up to ``largest``, zero where it shrinks down to nothing.

    Args:
        moment: maps ``[n] -> [n]``, continuous for q > 0 and not negative.
        scale: ``[...]``.
        offset: ``[...]``, not negative.
        start: where to begin, positive.
        largest: where to end.

    Returns:
        ``[...]``.

    Cost: one moment for every power of two between the start and the furthest fixed point, and about ten for each pair
    of scale and offset.
    """
    scale, offset = torch.broadcast_tensors(scale, offset)
    shape, scale, offset = scale.shape, scale.reshape(-1), offset.reshape(-1)

    def gap(q: Tensor) -> Tensor:
        return scale * moment(q) + offset - q

    at = scale.new_tensor([start])
    first = gap(at)
    found = torch.full_like(scale, start)
    noise = NOISE * scale.clamp(min=1)
    rising, falling = first > noise * max(1, start), first < -noise * max(1, start)
    for pending, factor, limit in ((rising, 2.0, math.inf), (falling, 0.5, 0.0)):
        before, here = first, at
        found[pending] = limit
        while bool(pending.any()) and SMALLEST < float(here) < largest:
            there = here * factor
            after = gap(there)
            crossed = pending & (before * after <= 0) & (after.abs() > noise)
            if bool(crossed.any()):
                ends = (here.expand_as(scale)[crossed], there.expand_as(scale)[crossed])
                found[crossed] = _between(
                    moment, scale[crossed], offset[crossed], ends, (before[crossed], after[crossed])
                )
            pending = pending & ~crossed
            here, before = there, after
    return found.view(shape)


def fixed_points(moment: Moment, scale: float, offset: float, *, largest: float) -> Tensor:
    """All fixed points of one map, zero included, in growing order, ``[F]``.

    Two that lie within a factor of ``sqrt(2)`` of each other may be missed, as may one where the map only touches the
    diagonal; where every q is fixed only zero is listed.
    """
    octaves = torch.arange(2 * math.log2(SMALLEST), 2 * math.log2(largest) + 1, dtype=torch.float64)
    q = 2.0 ** (octaves / 2)
    # One at a time, because a quadrature takes as many nodes as the largest q of a call asks for.
    gap = torch.cat([scale * moment(one) + offset - one for one in q.split(1)])
    sure = gap.abs() > NOISE * max(1.0, scale) * q.clamp(min=1)
    q, gap = q[sure], gap[sure]
    left = (gap[:-1] * gap[1:] < 0).nonzero()[:, 0]
    pair = torch.tensor([[scale], [offset]], dtype=torch.float64).expand(2, len(left))
    inner = _between(moment, pair[0], pair[1], (q[left], q[left + 1]), (gap[left], gap[left + 1]))
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, inner]) if float(scale * moment(zero) + offset) == 0 else inner


def _between(
    moment: Moment, scale: Tensor, offset: Tensor, ends: tuple[Tensor, Tensor], gaps: tuple[Tensor, Tensor]
) -> Tensor:
    """Roots in brackets ``[n]`` by the Illinois rule: secants that keep the bracket."""
    (a, b), (f, g) = ends, gaps
    for _ in range(ROUNDS):
        x = torch.where(g == f, (a + b) / 2, b - g * (b - a) / torch.where(g == f, 1, g - f))
        h = scale * moment(x) + offset - x if len(x) else x
        # The new point replaces the end of its own sign; an end that stays twice counts half, so that it moves next.
        same = h * g > 0
        a, f = torch.where(same, a, b), torch.where(same, f / 2, g)
        b, g = x, h
        if bool(((h.abs() <= CLOSE * x) | ((b - a).abs() <= CLOSE * x)).all()):
            break
    return b
