"""Draws in a folder, block after block, so that no more of them than a block need be in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayesdl import _files
from bayesdl.errors import FileError, MethodError

FORMAT = 1
HASHES = "shards"
PATTERN = re.compile(r"draws-(\d{5,})\.safetensors")

Tensors = dict[str, Tensor]


class Store(Protocol):
    """Quantities of every draw by name, ``[C, S, ...]``, wherever they are."""

    @property
    def chains(self) -> int:
        """C."""
        ...

    @property
    def draws(self) -> int:
        """S."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What follows ``[C, S]``, by name."""
        ...

    def blocks(self) -> Iterator[Tensors]:
        """Consecutive draws ``[C, block, ...]``."""
        ...

    def rows(self, index: Tensor, part: slice = ...) -> Tensors:
        """Some draws ``[n, ...]`` by their pooled numbers (chain after chain), of their first dimension a part."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Quantities of every draw, ``[C, S, ...]`` by name."""

    tensors: Tensors

    @property
    def chains(self) -> int:
        """C."""
        return next(iter(self.tensors.values())).shape[0]

    @property
    def draws(self) -> int:
        """S."""
        return next(iter(self.tensors.values())).shape[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What follows ``[C, S]``, by name."""
        return {name: tuple(value.shape[2:]) for name, value in self.tensors.items()}

    def blocks(self) -> Iterator[Tensors]:
        """All of them as one block."""
        yield self.tensors

    def rows(self, index: Tensor, part: slice = slice(None)) -> Tensors:
        """See ``Store``."""
        return {name: value.flatten(0, 1)[index][:, part] for name, value in self.tensors.items()}

    def joined(self, later: InMemory) -> InMemory:
        """These and those that follow."""
        return InMemory({name: torch.cat([value, later.tensors[name]], 1) for name, value in self.tensors.items()})


@dataclass(frozen=True)
class Shards:
    """Some shards of a folder: files of names known beforehand, each with a block ``[C, block, ...]`` of draws.

    The hash of every shard stands in its header. Whole blocks are compared with it when they are read; parts of a
    block are not, as that would take reading all of it.

    Attributes:
        folder: where they are.
        chains: C.
        lengths: draws per chain in each shard.
        stamps: hash of each.
        shapes: what follows ``[C, block]``, by name.
        dtypes: by name, as safetensors calls them.
        first: number of the first one; the others follow.
    """

    folder: Path
    chains: int
    lengths: tuple[int, ...]
    stamps: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    first: int = 0

    @classmethod
    def open(cls, folder: Path, stamps: Sequence[str] | int, first: int = 0) -> Shards:
        """Look at the headers of some shards.

        Args:
            folder: where they are.
            stamps: their hashes, or how many they are.
            first: number of the first one.

        Raises:
            FileError: one is missing, damaged, another one than it should be, or does not fit the others.
        """
        wanted: Sequence[str | None] = [None] * stamps if isinstance(stamps, int) else stamps
        if not wanted:
            raise FileError(f"{folder} holds no draws.")
        heads = [_head(folder, first + k) for k in range(len(wanted))]
        for k, (head, stamp) in enumerate(zip(heads, wanted, strict=True)):
            if stamp is not None and head.stamp != stamp:
                raise FileError(f"{shard_file(folder, first + k)} holds other draws than those of this posterior.")
            if (head.chains, head.shapes, head.dtypes) != (heads[0].chains, heads[0].shapes, heads[0].dtypes):
                raise FileError(f"{shard_file(folder, first + k)} does not fit the shards before it.")
        lengths, found = tuple(head.length for head in heads), tuple(head.stamp for head in heads)
        return cls(folder, heads[0].chains, lengths, found, heads[0].shapes, heads[0].dtypes, first)

    def tensors(self) -> Tensors:
        """The hashes, as a tensor to store."""
        return {HASHES: torch.tensor([list(bytes.fromhex(stamp)) for stamp in self.stamps], dtype=torch.uint8)}

    @classmethod
    def restore(cls, folder: Path, tensors: Tensors) -> Shards:
        """The shards of a folder that ``tensors`` described."""
        return cls.open(folder, [bytes(row).hex() for row in tensors[HASHES].tolist()])

    def joined(self, later: Shards) -> Shards:
        """These and those that follow."""
        return replace(self, lengths=self.lengths + later.lengths, stamps=self.stamps + later.stamps)

    @property
    def files(self) -> list[Path]:
        """Where they are."""
        return [shard_file(self.folder, self.first + k) for k in range(len(self.stamps))]

    @property
    def draws(self) -> int:
        """S."""
        return sum(self.lengths)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.files)

    def blocks(self) -> Iterator[Tensors]:
        """One shard after the other.

        Raises:
            FileError: a shard is missing, or is not what its hash says.
        """
        for file, stamp in zip(self.files, self.stamps, strict=True):
            tensors, header = _files.read_tensors(file)
            if header.get("stamp") != stamp or _files.stamp(tensors) != stamp:
                raise FileError(f"{file} is damaged, or holds other draws than those of this posterior.")
            yield tensors

    def rows(self, index: Tensor, part: slice = slice(None)) -> Tensors:
        """See ``Store``; only these rows are read, shard by shard."""
        chain, draw = (index // self.draws).tolist(), (index % self.draws).tolist()
        edges = [0, *accumulate(self.lengths)]
        owner = np.searchsorted(edges, draw, side="right") - 1
        found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(draw) for name in self.shapes}
        for shard in np.unique(owner).tolist():
            for name, parts in found.items():
                with _slice(self.files[shard], name) as piece:
                    for n in np.flatnonzero(owner == shard).tolist():
                        at, where = draw[n] - edges[shard], chain[n]
                        parts[n] = piece[where : where + 1, at : at + 1, part]
        return {name: torch.cat(parts).squeeze(1) for name, parts in found.items()}

    def columns(self, name: str, part: slice | list[int]) -> Tensor:
        """Some of the first dimension behind the draws, of all draws: ``[C, S, columns, ...]``."""
        blocks = []
        for file in self.files:
            with _slice(file, name) as piece:
                blocks.append(piece[:, :, part])
        return torch.cat(blocks, 1)

    def copy_to(self, folder: Path) -> None:
        """Copy the shards into another folder.

        Raises:
            MethodError: there are other draws already.
        """
        if folder.resolve() == self.folder.resolve():
            return
        present = shards_in(folder)
        for number, stamp in enumerate(self.stamps):
            if number in present and _head(folder, number).stamp != stamp:
                raise MethodError(f"{folder} already holds the draws of another run; choose another folder.")
        for number, file in enumerate(self.files):
            if number not in present:
                _files.write_atomic(shard_file(folder, number), file.read_bytes())


@contextmanager
def _slice(file: Path, name: str) -> Iterator[Any]:
    """One tensor of a shard, to read parts of."""
    with _files.opened(file) as (handle, _):
        yield handle.get_slice(name)


@dataclass(frozen=True)
class _Head:
    """What the header of a shard says."""

    chains: int
    length: int
    stamp: str
    run: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def shard_file(folder: Path, number: int) -> Path:
    """The only name that a shard of this number can have."""
    return folder / f"draws-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, tensors: Tensors, run: str) -> None:
    """Write a block ``[C, block, ...]`` of draws, atomically.

    Args:
        folder: where to.
        number: of the shard.
        tensors: the block.
        run: identity of the run; only a run that writes the same may write over it.
    """
    header = {"format": FORMAT, "run": run, "stamp": _files.stamp(tensors)}
    _files.write_tensors(shard_file(folder, number), tensors, header)


def shards_in(folder: Path) -> list[int]:
    """The numbers of the shards that lie in a folder."""
    matches = [PATTERN.fullmatch(file.name) for file in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in matches if match)


def run_of(folder: Path, number: int) -> str:
    """The identity of the run that wrote a shard.

    Raises:
        FileError: it is missing or damaged.
    """
    return _head(folder, number).run


def _head(folder: Path, number: int) -> _Head:
    file = shard_file(folder, number)
    with _files.opened(file) as (handle, header):
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        dtypes = {name: str(piece.get_dtype()) for name, piece in slices.items()}
    leading = {shape[:2] for shape in shapes.values()}
    known = isinstance(header, dict) and header.get("format") == FORMAT
    if not known or len(leading) != 1 or any(len(shape) < 2 or 0 in shape[:2] for shape in shapes.values()):
        raise FileError(f"{file} is not a block of draws written by bayesdl.")
    ((chains, length),) = leading
    rest = {name: shape[2:] for name, shape in shapes.items()}
    return _Head(chains, length, str(header.get("stamp")), str(header.get("run")), rest, dtypes)
