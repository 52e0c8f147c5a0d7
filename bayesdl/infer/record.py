"""Where the draws of a run go: into memory, into a folder, or into functions at given inputs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl.data.rows import fingerprint
from bayesdl.errors import FileError, MethodError
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Run
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.families import CannotUnpack
from bayesdl.posterior.functions import FunctionPosterior, plain_arguments
from bayesdl.posterior.predictive import parameters
from bayesdl.posterior.problem import Problem
from bayesdl.posterior.shards import InMemory, Shards, Store, Tensors, run_of, shard_file, shards_in, write_shard
from bayesdl.posterior.streamed import StreamedPosterior

BLOCK_BYTES = 2**25
"""Size of a block of draws that goes to disk, or is turned into functions, at once."""
FUNCTIONS = "functions/"


@dataclass
class Record:
    """What a run keeps of its draws.

    Entries of the state: draws ``[C, block, D]``, all of them or the last block; statistics ``[K, C, S]``; for
    functions in memory functions/* ``[C, S, N, ...]``; for a folder record.run, the run's identity in its files.

    A block that is full is written, or turned into functions, within the step that fills it; the next step may write
    over it. A step that is cut off and done again writes the same once more.

    Attributes:
        problem: the model, where functions are kept.
        folder: where blocks go, or None.
        inputs: the program's arguments at which functions are kept, in model units, or None.
        identity: what tells the run from others that could write into the folder.
        first: number of the first shard.
    """

    problem: Problem | None = None
    folder: Path | None = None
    inputs: Mapping[str, Any] | None = None
    identity: Callable[[], str] = str
    first: int = 0

    def __post_init__(self) -> None:
        """Nothing of this run has been looked at in the folder yet."""
        self._looked = False

    @classmethod
    def of(cls, problem: Problem, run: Run, begin: Tensor, draws: int) -> Record:
        """What ``fit`` asks for.

        Args:
            problem: what is fitted.
            run: with ``draws_to`` and ``functions_at``.
            begin: starting points ``[C, D]``.
            draws: S.
        """
        if run.draws_to is None and run.functions_at is None:
            return cls()
        return cls(problem, run.draws_to, run.functions_at, partial(_identity, problem, run, begin, draws))

    @classmethod
    def after(cls, posterior: DrawsPosterior, run: Run, begin: Tensor, draws: int) -> Record:
        """For the draws that follow those of a posterior, kept as these are."""
        store: Store
        inputs = None
        if isinstance(posterior, StreamedPosterior):
            store = posterior.shards
        elif isinstance(posterior, FunctionPosterior):
            store, inputs = posterior.store, posterior.inputs
        else:
            return cls()
        if not isinstance(store, Shards):
            return cls(posterior.problem, None, inputs)
        identity = partial(_identity, posterior.problem, run, begin, draws)
        return cls(posterior.problem, store.folder, inputs, identity, store.first + len(store.stamps))

    def init(self, begin: Tensor, names: Sequence[str], draws: int) -> State:
        """An empty record for chains that start at ``begin [C, D]``.

        Raises:
            MethodError: it does not fit into memory or onto the disk, or the folder holds the draws of another run.
        """
        chains, dim = begin.shape
        latents = chains * dim * begin.element_size()
        kept = chains * sum(value[0, 0].nbytes for value in self._example.values()) if self._example else latents
        streams = self.folder is not None or self.inputs is not None
        block = max(1, min(draws, BLOCK_BYTES // max(latents, kept))) if streams else draws
        self._check_room(draws, block * latents, kept)
        state: State = {
            "draws": begin.new_zeros((chains, block, dim)),
            "statistics": torch.zeros((len(names), chains, draws), dtype=torch.float64),
        }
        if self.folder is not None:
            state["record.run"] = self.identity()
            self._refuse_others(self.folder, state["record.run"])
        else:
            for name, value in self._example.items():
                state[FUNCTIONS + name] = value.new_zeros((chains, draws, *value.shape[2:]))
        return state

    def add(self, state: State, at: int, z: Tensor, statistics: Tensor) -> None:
        """Enter draw number ``at`` of every chain, ``[C, D]``, and its statistics ``[K, C]``."""
        block = state["draws"].shape[1]
        state["draws"][:, at % block] = z
        state["statistics"][:, :, at] = statistics
        if (at + 1) % block == 0:
            self._flush(state, at // block, block)

    def posterior(
        self,
        problem: Problem,
        state: State,
        drawn: int,
        stats: Tensors,
        info: dict[str, Any],
        everyone: Callable[[Tensor], Tensor] = lambda mine: mine,
        common: int | None = None,
    ) -> DrawsPosterior:
        """The posterior of a run on one data set.

        Args:
            problem: what was fitted.
            state: the last one.
            drawn: draws in it.
            stats: statistics ``[C, common]`` by name.
            info: as of the posterior.
            everyone: what the chains of all processes hold, from what those here do.
            common: draws that all processes have.
        """
        common = drawn if common is None else common
        block = state["draws"].shape[1]
        if drawn % block:
            self._flush(state, drawn // block, drawn % block)
        if self.folder is not None:
            shards = Shards.open(self.folder, -(-drawn // block), self.first)
            if self.inputs is None:
                return StreamedPosterior(problem, shards, stats, info)
            return FunctionPosterior(problem, shards, self.inputs, stats, info)
        if self.inputs is None:
            return DrawsPosterior(problem, everyone(state["draws"][:, :common]).clone(), stats, info)
        held = {name: everyone(state[FUNCTIONS + name][:, :common]).clone() for name in self._example}
        return FunctionPosterior(problem, InMemory(held), self.inputs, stats, info)

    @staticmethod
    def without(state: State) -> State:
        """What a later run goes on from: the state without the record, and without the loop's count of gradients."""
        ours = ("draws", "statistics", "record.run", "gradients")
        return {name: value for name, value in state.items() if name not in ours and not name.startswith(FUNCTIONS)}

    # -- inside --------------------------------------------------------------------------------------------------

    @cached_property
    def _example(self) -> Tensors:
        """Functions of one draw of one chain, ``[1, 1, N, ...]``; empty where latents are kept."""
        if self.problem is None or self.inputs is None:
            return {}
        return self._functions(self.problem.density.prior_draws(1, 0)[None])

    def _functions(self, block: Tensor) -> Tensors:
        """Parameters of the likelihood ``[C, block, N, ...]`` of a block of draws."""
        assert self.problem is not None
        assert self.inputs is not None
        try:
            _, found = parameters(self.problem, block.flatten(0, 1), self.inputs)
        except CannotUnpack as reason:
            raise MethodError(
                f"functions_at= keeps the parameters of the likelihood, which cannot be read off this one ({reason}). "
                "Keep the draws instead: draws_to= without functions_at=."
            ) from None
        return {name: value.reshape(*block.shape[:2], *value.shape[1:]) for name, value in found.items()}

    def _flush(self, state: State, number: int, length: int) -> None:
        block = state["draws"][:, :length]
        if self.folder is None:
            at = number * state["draws"].shape[1]
            for name, value in (self._functions(block) if self.inputs is not None else {}).items():
                state[FUNCTIONS + name][:, at : at + length] = value
            return
        run = state["record.run"]
        self._look(self.folder, number, run)
        tensors = {"z": block} if self.inputs is None else self._functions(block)
        write_shard(self.folder, self.first + number, tensors, run)

    def _look(self, folder: Path, number: int, run: str) -> None:
        """What a run that was resumed wrote before must still be there; what others wrote is not written over."""
        if not self._looked:
            for earlier in range(self.first, self.first + number):
                if run_of(folder, earlier) != run:
                    raise FileError(f"{shard_file(folder, earlier)} holds draws of another run than the resumed one.")
            self._looked = True
        mine = self.first + number
        if shard_file(folder, mine).exists() and run_of(folder, mine) != run:
            raise MethodError(_OTHERS.format(folder=folder))

    def _refuse_others(self, folder: Path, run: str) -> None:
        later = [number for number in shards_in(folder) if number >= self.first]
        if any(run_of(folder, number) != run for number in later):
            raise MethodError(_OTHERS.format(folder=folder))

    def _check_room(self, draws: int, held: int, kept: int) -> None:
        """Compare the size of the record with what there is."""
        whole, where = draws * kept, self.folder
        if where is None and self.inputs is None:
            held = whole
        elif where is None:
            held += whole
        if held > memory():
            raise MethodError(
                f"{draws:,} draws take {_size(held)} of memory, more than there is. draws_to='folder' keeps one block "
                "of them in memory; functions_at=x keeps predictions at x instead of the latents; thin= takes "
                "fewer."
            )
        if where is not None and whole > _free(where):
            raise MethodError(
                f"{draws:,} draws take {_size(whole)}, more than is free in {where}. functions_at=x keeps predictions "
                "at x instead of the latents; thin= takes fewer."
            )


_OTHERS = (
    "{folder} already holds draws of another run (or of this one with other settings). Delete them, or choose another "
    "folder."
)


def function_inputs(problem: Problem, x: Any) -> dict[str, Any]:
    """The program's arguments for ``functions_at=x``.

    Raises:
        MethodError: other arguments than the inputs differ from those of the fit.
        DataError: inputs that do not fit the model.
    """
    inputs, plain = problem.inputs(x), plain_arguments(problem)
    given = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    if given != plain:
        raise MethodError(
            f"functions_at= takes all arguments but the target, and {sorted(plain | given)} as in the fit."
        )
    return inputs


def _identity(problem: Problem, run: Run, begin: Tensor, draws: int) -> str:
    """BLAKE2b of what the draws are a function of."""
    density = problem.density
    point = torch.full((1, density.dim), 0.1, dtype=density.dtype, device=density.device)
    probe = f"{float(density.log_density(point)[0]):.6g}"
    what = [run.identity, run.seed, draws, list(begin.shape), fingerprint(begin.detach().cpu()), probe]
    return blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def memory() -> float:
    """Bytes of physical memory, or infinity where the system does not tell."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return float("inf")
    return float(os.sysconf(names[0])) * os.sysconf(names[1])


def _free(folder: Path) -> int:
    """Free bytes where a folder is, or is to be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GB" if count >= 2**30 else f"{count / 2**20:,.1f} MB"
