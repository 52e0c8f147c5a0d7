"""Multinomial NUTS for one chain, as the papers write it: recursion over subtrees, every leaf kept in a list.

It takes the same random numbers as the fast version but shares none of its code: plain momenta with a mass matrix
instead of whitened ones, plain leapfrog, a tree of Python objects, criteria evaluated from the list of leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Gradient = Callable[[Vector], tuple[float, Vector]]


@dataclass
class Leaf:
    z: Vector
    v: Vector
    energy: float


@dataclass
class Result:
    z: Vector
    depth: int
    divergent: bool
    energy: float
    acceptance: float
    visited: list[Vector] = field(default_factory=list)


class Recursive:
    """One chain's transition; ``scale^2`` is the diagonal of the inverse mass matrix, ``v ~ N(0, M)``."""

    def __init__(self, gradient: Gradient, step_size: float, scale: Vector, max_depth: int = 10) -> None:
        self.gradient, self.step_size, self.inverse_mass, self.max_depth = gradient, step_size, scale**2, max_depth

    def leaf(self, z: Vector, v: Vector) -> Leaf:
        value, _ = self.gradient(z)
        return Leaf(z, v, 0.5 * float(v @ (self.inverse_mass * v)) - value)

    def move(self, leaf: Leaf, sign: int) -> Leaf:
        step = sign * self.step_size
        v = leaf.v + 0.5 * step * self.gradient(leaf.z)[1]
        z = leaf.z + step * self.inverse_mass * v
        return self.leaf(z, v + 0.5 * step * self.gradient(z)[1])

    def straight(self, leaves: list[Leaf], rho: Vector | None = None) -> bool:
        total = sum(leaf.v for leaf in leaves) if rho is None else rho
        return all(float((self.inverse_mass * end.v) @ total) > 0 for end in (leaves[0], leaves[-1]))

    def joined(self, first: list[Leaf], second: list[Leaf]) -> bool:
        """The criterion for two neighbouring blocks: as a whole, and each with the nearest leaf of the other."""
        return (
            self.straight(first + second) and self.straight([*first, second[0]]) and self.straight([first[-1], *second])
        )

    def build(self, start: Leaf, sign: int, depth: int, visited: list[Leaf]) -> list[Leaf] | None:
        """The ``2^depth`` leaves next to ``start`` in the order of integration, or None once a subtree is invalid."""
        if depth == 0:
            leaf = self.move(start, sign)
            visited.append(leaf)
            return [leaf] if leaf.energy - self.origin <= 1000.0 else None
        first = self.build(start, sign, depth - 1, visited)
        if first is None:
            return None
        second = self.build(first[-1], sign, depth - 1, visited)
        if second is None or not self.joined(first, second):
            return None
        return first + second

    def transition(self, z: Vector, v: Vector, uniforms: Callable[[int], Vector]) -> Result:
        """``uniforms(depth) [2 + 2^depth]``: direction, old against new, one for every new leaf."""
        start = self.leaf(z, v)
        self.origin = start.energy
        trajectory, sample, depth, divergent = [start], start, 0, False
        visited: list[Leaf] = []
        while depth < self.max_depth:
            noise = uniforms(depth)
            sign = 1 if noise[0] < 0.5 else -1
            seen: list[Leaf] = []
            new = self.build(trajectory[-1] if sign > 0 else trajectory[0], sign, depth, seen)
            visited += seen
            if new is None:
                divergent = not seen[-1].energy - self.origin <= 1000.0
                break
            candidate = self.pick(new, noise[2:])
            if noise[1] < self.mass(new) / self.mass(trajectory):
                sample = candidate
            depth += 1
            outwards = trajectory if sign > 0 else trajectory[::-1]
            going = self.joined(outwards, new)
            trajectory = trajectory + new if sign > 0 else new[::-1] + trajectory
            if not going:
                break
        errors = [leaf.energy - self.origin for leaf in visited]
        accepted = float(np.mean([min(1.0, math.exp(-error)) if math.isfinite(error) else 0.0 for error in errors]))
        return Result(sample.z, depth, divergent, sample.energy, accepted, [leaf.z for leaf in visited])

    def mass(self, leaves: list[Leaf]) -> float:
        return sum(math.exp(self.origin - leaf.energy) for leaf in leaves)

    def pick(self, leaves: list[Leaf], uniforms: Vector) -> Leaf:
        """Take leaf n with probability w_n / (w_0 + ... + w_n); in the end each is chosen with w_n / sum."""
        chosen, total = leaves[0], 0.0
        for leaf, u in zip(leaves, uniforms, strict=True):
            weight = math.exp(self.origin - leaf.energy)
            total += weight
            if u < weight / total:
                chosen = leaf
        return chosen
