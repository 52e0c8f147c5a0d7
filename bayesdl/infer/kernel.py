"""What the kernels of all Markov chains are written in: points, tunings, noise, statistics.

A kernel moves every chain by one transition. It works in **whitened coordinates**: the engine gives it positions u
with z = A u, where A A^T = M^-1 is the inverse mass matrix (see metric.py), and the log density as a function of u. So
no kernel knows of scales or correlations; for all of them the mass matrix is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats: TypeAlias = NDArray[np.float64]
Statistics: TypeAlias = dict[str, Floats]
"""Numbers ``[C]`` by name: what a transition tells of itself. Entries that its sampler does not name among its
``statistics`` are for its adaptation alone, and may have more dimensions."""
ValueAndGrad: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``u [C, D] -> (log density [C], gradient [C, D])``; non-finite numbers are returned, not raised."""


class Point(NamedTuple):
    """Where the chains stand, with everything the next transition needs so that no gradient is computed twice."""

    z: Tensor
    """``[C, D]`` positions, in the kernel's coordinates."""
    value: Tensor
    """``[C]`` log density, float64 on the CPU: energies are compared there."""
    grad: Tensor
    """``[C, D]`` gradient of the log density."""
    momentum: Tensor | None = None
    """``[C, D]`` momentum or direction, of kernels that keep it from one transition to the next."""


class Tuning(NamedTuple):
    """What warm-up finds for a kernel."""

    step: Floats
    """``[C]`` step sizes, equal for the chains of a group."""
    length: Floats
    """``[C]`` integration times, for kernels whose trajectories have one; else NaN."""
    done: int = 0
    """Transitions done before this one, for kernels that use a sequence in place of independent draws."""


@dataclass(frozen=True)
class Noise:
    """The randomness of a transition, of the same shape whatever the chains do.

    Attributes:
        normals: stream of the Gaussian draws, on the device of the chains.
        uniforms: stream of everything else, on the CPU.
        like: ``[C, D]``, whose shape, dtype and device the draws have.
        chains: chains of all processes; this one's are ``own``.
        own: which of them are moved here.
    """

    normals: torch.Generator
    uniforms: torch.Generator
    like: Tensor
    chains: int
    own: slice

    def normal(self) -> Tensor:
        """Standard normal draws ``[C, D]``."""
        shape = (self.chains, self.like.shape[1])
        drawn = torch.randn(shape, generator=self.normals, dtype=self.like.dtype, device=self.like.device)
        return drawn[self.own]

    def uniform(self, rows: int) -> Floats:
        """Draws from U(0, 1), ``[rows, C]``."""
        drawn = torch.rand(rows, self.chains, generator=self.uniforms, dtype=torch.float64)
        found: Floats = drawn[:, self.own].numpy()
        return found

    def shared(self) -> float:
        """One draw from U(0, 1) for all chains together."""
        return float(torch.rand((), generator=self.uniforms, dtype=torch.float64))

    def branch(self) -> Noise:
        """Noise with streams of its own, seeded by one draw from this one.

        For kernels whose number of draws depends on the chains: however many they take, the stream that comes after
        them is the same, for every process and every resumed run.
        """
        seed = int(torch.randint(2**62, (), generator=self.uniforms))
        normals = torch.Generator(device=self.normals.device).manual_seed(seed ^ 1)  # another stream than the uniforms'
        return replace(self, normals=normals, uniforms=torch.Generator().manual_seed(seed))


class Kernel(Protocol):
    """One transition of all chains."""

    def __call__(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """Move every chain; the point that it starts from is left as it is."""
        ...


def evaluate(z: Tensor, value_and_grad: ValueAndGrad) -> Point:
    """The ``Point`` at ``z [C, D]``; one gradient a chain."""
    value, grad = value_and_grad(z)
    return Point(z, value.double().cpu(), grad)


def column(values: NDArray[np.generic], like: Tensor) -> Tensor:
    """``[C]`` numbers as a column ``[C, 1]`` on the device of ``like``, in its dtype unless they are truth values."""
    found = torch.from_numpy(values)[:, None]
    return found.to(like.device) if found.dtype == torch.bool else found.to(like)


def choose(accepted: NDArray[np.bool_], new: Point, old: Point) -> Point:
    """``new`` where a chain accepted, ``old`` where it did not; the old state then counts once more."""
    mask = column(accepted, old.z)
    return Point(
        torch.where(mask, new.z, old.z),
        torch.where(torch.from_numpy(accepted), new.value, old.value),
        torch.where(mask, new.grad, old.grad),
    )
