"""Which way of evaluating a gradient pays, forecast from counts alone.

The choice follows from the program, the number of chains and the number of gradients, never from a clock: a run that is
resumed, or repeated, must take the same way, because another way rounds differently.
"""

from __future__ import annotations

import torch

OPERATION = 2.7e-6
"""Seconds that one replayed operation costs above the same operation compiled: dispatch and allocation."""

ELEMENT = 0.5e-9
"""Seconds that a number costs which a replayed operation writes to memory; compiled, it stays in a register."""

COMPILE = 4.0
"""Seconds that the first compilation costs whatever is compiled."""

COMPILE_OPERATION = 0.02
"""Seconds of compilation for every operation of the graph."""

BLOCK_BYTES = 2**20
"""Bytes per thread of the largest tensor of a block of chains, so that the block's tensors stay in the second cache."""


def compile_seconds(operations: int) -> float:
    """Forecast seconds that it takes to compile a graph of so many operations."""
    return COMPILE + COMPILE_OPERATION * operations


def saved_seconds(operations: int, elements: int) -> float:
    """Forecast seconds that a compiled graph saves on every call: its operations, and the numbers that they write."""
    return OPERATION * operations + ELEMENT * elements


def pays(operations: int, elements: int, calls: int) -> bool:
    """Whether ``calls`` gradients save more time than it takes to compile the graph."""
    return calls * saved_seconds(operations, elements) > compile_seconds(operations)


def block(chains: int, largest: int, dtype: torch.dtype) -> int:
    """Chains to evaluate at once, so that what they write stays in the cache.

    Args:
        chains: chains in all.
        largest: numbers in the largest tensor of all chains.
        dtype: their type.

    Returns:
        The size of equal blocks; the last one may overlap the one before.
    """
    allowed = BLOCK_BYTES * torch.get_num_threads()
    blocks = -(-largest * dtype.itemsize // allowed)
    return max(1, -(-chains // max(1, blocks)))
