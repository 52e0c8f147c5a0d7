"""Random streams: one generator per seed and purpose; the global generators are left as they were found."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on the user's seed and on what the stream is for.

    Hashing (BLAKE2b) keeps streams of neighbouring seeds and purposes unrelated, which ``seed + 1`` would not.
    """
    text = "/".join([str(int(seed)), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh ``torch.Generator`` for one purpose of one seed."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))


@contextmanager
def isolated(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed the global torch, numpy and Python generators inside the block; restore all of them afterwards.

    For code that offers no generator argument, such as ``pyro.sample`` and a module's own initialisation.
    """
    value = derive_seed(seed, *purpose)
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.random.default_generator.manual_seed(value)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
