"""The order in which mini-batches pass, for every member its own: in epochs, or each row drawn independently."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.infer.checkpoint import State
from bayesdl.posterior.problem import Problem


class DataOrder:
    """Mini-batches, one stream of rows per member; within an epoch without replacement, unless told otherwise.

    Args:
        problem: gives the rows.
        batch_size: rows in a mini-batch; None, or at least all rows, means that there are no mini-batches.
        members: streams; member k's order depends on the seed and k alone.
        seed: the run's seed.
        replacement: every row of every mini-batch is drawn independently of all others.

    Attributes:
        batches: mini-batches in an epoch. The rows that do not fill the last one wait for the next epoch's order.
    """

    def __init__(
        self, problem: Problem, batch_size: int | None, members: int, seed: int, replacement: bool = False
    ) -> None:
        """See the class."""
        self.problem, self.members, self.seed, self.replacement = problem, members, seed, replacement
        self.size = None if batch_size is None or batch_size >= problem.n else batch_size
        self.batches = 1 if self.size is None else problem.n // self.size

    def init(self) -> State:
        """The entries that the order adds to an engine's state: generators, and the permutations ``[M, N]``."""
        if self.size is None:
            return {}
        state: State = {f"order.{k}": generator(self.seed, "member", k, "data order") for k in range(self.members)}
        if self.replacement:
            return state
        return state | {"order": torch.empty(self.members, 0, dtype=torch.int64), "order.next": self.batches}

    def next(self, state: State) -> tuple[Tensor | None, State]:
        """The next mini-batches' rows ``[M, B]`` (None for all rows), and the changed entries of the state."""
        if self.size is None:
            return None, {}
        streams = [state[f"order.{k}"] for k in range(self.members)]
        if self.replacement:
            return torch.stack([torch.randint(self.problem.n, (self.size,), generator=one) for one in streams]), {}
        order, position = state["order"], state["order.next"]
        if position == self.batches:
            order = torch.stack([torch.randperm(self.problem.n, generator=stream) for stream in streams])
            position = 0
        index = order[:, position * self.size : (position + 1) * self.size]
        return index, {"order": order, "order.next": position + 1}
