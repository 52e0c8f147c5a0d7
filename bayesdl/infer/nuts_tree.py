"""One transition of the No-U-Turn sampler for all chains in lockstep, without recursion.

A trajectory is doubled, forwards or backwards in time, until it turns back on itself; the next state is one of its
points, drawn with weights ``exp(-H)``, biased towards the half that was added last (multinomial NUTS: Betancourt, 2017,
"A conceptual introduction to Hamiltonian Monte Carlo", appendix A.3; the criterion between neighbouring subtrees is the
one that Stan added in 2019).

**Without recursion.** The new half of depth j has the leaves 0 ... 2^j - 1, the same for all chains. At leaf n those
blocks end whose size is 2, 4, ..., 2^t, where t counts the trailing ones of n in binary; the block of size 2^k began at
a = n - 2^k + 1, whose binary form is n with k trailing ones cleared. An even leaf a is therefore kept in slot
``1 + popcount(a)``: at leaf n the slots of the ending blocks are a contiguous range below ``1 + popcount(n)``, and no
slot is overwritten before its block is complete. Slot 0 holds the old trajectory, which makes "old trajectory plus new
half" one more block that ends at the last leaf. Memory is ``3 (max_depth + 1) C D`` numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesdl.infer.hamiltonian import MAX_ENERGY_ERROR, kinetic, leapfrog
from bayesdl.infer.kernel import Floats, Point, Statistics, ValueAndGrad, column
from bayesdl.infer.target import advance

Bools = NDArray[np.bool_]

FIRST, BEFORE, SUM = range(3)
"""A slot: momentum at the block's first leaf, momentum one leaf earlier, sum of the momenta before the first leaf."""


class End(NamedTuple):
    """One end of a trajectory, each ``[C, D]``."""

    z: Tensor
    p: Tensor
    grad: Tensor


def nuts_transition(
    start: Point,
    momentum: Tensor,
    step_size: Floats,
    uniforms: Callable[[int], Floats],
    value_and_grad: ValueAndGrad,
    max_depth: int = 10,
) -> tuple[Point, Statistics]:
    """Move every chain by one multinomial NUTS transition.

    Args:
        start: where the chains stand, ``C`` chains of dimension ``D``.
        momentum: ``[C, D]`` standard normal draws.
        step_size: ``[C]``, of the leapfrog integrator.
        uniforms: ``depth -> [2 + 2^depth, C]`` draws from U(0, 1). Row 0 chooses the direction, row 1
            decides between the old trajectory and the new half, row 2 + n whether leaf n becomes the half's candidate.
        value_and_grad: the log density; called once a leaf for all chains, also for those that have stopped.
        max_depth: at most ``2^max_depth - 1`` leapfrog steps.

    Returns:
        The new ``Point`` and, each ``[C]``: ``acceptance`` (mean over the trajectory of
        ``min(1, exp(H_start - H))``), ``energy`` (of the chosen point), ``divergent``, ``depth`` (completed doublings),
        ``leapfrogs``, ``log_density``.
    """
    chains, like = len(start.z), start.z
    backward = forward = End(start.z, momentum, start.grad)
    total = momentum
    slots = start.z.new_empty((max_depth + 1, 3, *start.z.shape))
    chosen_z, chosen_grad = start.z, start.grad
    chosen_value = start.value.numpy()
    energy_start: Floats = kinetic(momentum).double().cpu().numpy() - chosen_value
    chosen_energy = energy_start
    log_weight = np.zeros(chains)
    active = np.ones(chains, dtype=bool)
    divergent = np.zeros(chains, dtype=bool)
    accepted, leapfrogs, depths = np.zeros(chains), np.zeros(chains), np.zeros(chains)

    for depth in range(max_depth):
        noise = uniforms(depth)
        ahead = noise[0] < 0.5
        to_front = column(ahead, like)
        signed = np.where(active, np.where(ahead, step_size, -step_size), 0.0)
        step = column(signed, like)
        z, p, grad = _choose(to_front, forward, backward)
        slots[0, FIRST] = torch.where(to_front, backward.p, forward.p)
        torch.neg(total, out=slots[0, SUM])
        half = torch.zeros_like(total)
        half_weight = np.full(chains, -np.inf)
        half_z, half_grad, half_value, half_energy = chosen_z, chosen_grad, chosen_value, chosen_energy
        turned_whole = np.zeros(chains, dtype=bool)

        for leaf in range(1 << depth):
            before = p
            z, p, value, grad = advance(leapfrog, value_and_grad, z, p, grad, step)
            ones = leaf.bit_count()
            if leaf % 2 == 0:
                torch.stack((p, before, half), out=slots[ones + 1])
            half = half + p
            last = leaf + 1 == 1 << depth
            # Trailing ones of the leaf = trailing zeros of its successor; the last leaf also ends the whole trajectory.
            ending = ((leaf + 1) & -(leaf + 1)).bit_length() - 1 + last
            energy, turned = _look(slots[ones + 1 - ending : ones + 1], p, half, value)
            if last:
                turned_whole = turned[0]
                turned = turned[1:]

            log_ratio = energy_start - energy
            log_ratio[~np.isfinite(log_ratio)] = -np.inf
            accepted += np.where(active, np.exp(np.minimum(log_ratio, 0.0)), 0.0)
            leapfrogs += active
            bad = active & (log_ratio < -MAX_ENERGY_ERROR)
            half_weight = np.logaddexp(half_weight, log_ratio)
            take = active & (np.log(noise[2 + leaf]) < log_ratio - np.maximum(half_weight, -1e300)) & ~bad
            if take.any():
                mask = column(take, like)
                half_z, half_grad = torch.where(mask, z, half_z), torch.where(mask, grad, half_grad)
                half_value = np.where(take, value.double().cpu().numpy(), half_value)
                half_energy = np.where(take, energy, half_energy)
            stop = bad | (active & turned.any(0)) if len(turned) else bad
            if stop.any():
                divergent |= bad
                active = active & ~stop
                if not active.any():
                    break
                # A stopped chain waits at its start with step 0: no overflow of its own can reach the log density.
                mask = column(active, like)
                step = step * mask
                z, p = torch.where(mask, z, start.z), torch.where(mask, p, momentum)
                grad = torch.where(mask, grad, start.grad)

        if not active.any():
            break
        take = active & (np.log(noise[1]) < half_weight - log_weight)
        if take.any():
            mask = column(take, like)
            chosen_z, chosen_grad = torch.where(mask, half_z, chosen_z), torch.where(mask, half_grad, chosen_grad)
            chosen_value = np.where(take, half_value, chosen_value)
            chosen_energy = np.where(take, half_energy, chosen_energy)
        log_weight = np.logaddexp(log_weight, half_weight)
        depths += active
        active = active & ~turned_whole
        if not active.any():
            break
        total = total + half
        end = End(z, p, grad)
        forward, backward = _choose(to_front, end, forward), _choose(to_front, backward, end)

    point = Point(chosen_z, torch.from_numpy(chosen_value), chosen_grad)
    return point, {
        "acceptance": accepted / leapfrogs,
        "energy": chosen_energy,
        "divergent": divergent.astype(np.float64),
        "depth": depths,
        "leapfrogs": leapfrogs,
        "log_density": chosen_value,
    }


def _choose(mask: Tensor, yes: End, no: End) -> End:
    return End(*(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True)))


def _look(blocks: Tensor, p: Tensor, total: Tensor, value: Tensor) -> tuple[Floats, Bools]:
    """Energy of the newest leaf and whether the blocks ``[b, 3, C, D]`` that end at it have turned, in one transfer.

    A block with end momenta ``p_a``, ``p_b`` and momentum sum ``rho`` goes on while ``p_a . rho > 0`` and
    ``p_b . rho > 0``; each half is also tested with the other's nearest leaf. The next slot begins the second half.

    Returns:
        ``energy [C]`` and ``turned [b, C]``.
    """
    energy = kinetic(p) - value
    if not len(blocks):
        return energy.double().cpu().numpy(), np.zeros((0, len(p)), dtype=bool)
    first, earlier = blocks[:, FIRST], blocks[:, SUM]
    rho = total - earlier
    dots = [energy[None], torch.linalg.vecdot(first, rho), torch.linalg.vecdot(p, rho)]
    count = len(blocks)
    if count > 1:
        second, inner = first[1:], blocks[1:, BEFORE]
        left = earlier[1:] - earlier[:-1] + second
        right = rho[1:] + inner
        dots += [torch.linalg.vecdot(first[:-1], left), torch.linalg.vecdot(second, left)]
        dots += [torch.linalg.vecdot(inner, right), torch.linalg.vecdot(p, right)]
    numbers = torch.cat(dots).double().cpu().numpy()
    back = numbers[1:] <= 0.0
    turned = back[:count] | back[count : 2 * count]
    if count > 1:
        turned[:-1] |= back[2 * count :].reshape(4, count - 1, -1).any(0)
    return numbers[0].copy(), turned
