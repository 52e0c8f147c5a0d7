"""Several processes: what each of them works on, and how they put their parts together.

Under ``torchrun`` the chains of a sampler are spread over the processes (ranks): gloo between CPUs, NCCL between GPUs.
Every process draws the noise of all chains and uses its own rows, so a run does what a single process would, up to
rounding, whatever the number of ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bayesdl.errors import MethodError


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The processes that ``torchrun`` started (joined on the first call), or this one alone."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                return cls()
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of ``count`` chains are this process's: contiguous parts whose sizes differ by one at most.

        Raises:
            MethodError: there are more processes than chains.
        """
        if count < self.world:
            raise MethodError(f"{count} chains cannot be spread over {self.world} processes: use at least as many.")
        edges = [count * k // self.world for k in range(self.world + 1)]
        return slice(edges[self.rank], edges[self.rank + 1])

    def gather(self, mine: Tensor, count: int) -> Tensor:
        """The rows of all processes ``[count, ...]``, in the order of ``share``, from those of this one."""
        if self.world == 1:
            return mine
        shares = [Ranks(rank, self.world).share(count) for rank in range(self.world)]
        sizes = [share.stop - share.start for share in shares]
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def numbers(self, mine: list[int]) -> list[list[int]]:
        """A few whole numbers of every process."""
        if self.world == 1:
            return [mine]
        found: list[list[int]] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, mine)
        return found
