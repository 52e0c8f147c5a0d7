"""Row identities: which row of which source each row of a Dataset is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.data.checks import to_array
from bayesdl.errors import DataError


def fingerprint(*tensors: Tensor) -> str:
    """BLAKE2b (128 bits, hex) of the tensors' dtypes, shapes and values: equal content, equal origin."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()


def row_index(index: Any, n: int) -> Tensor:
    """An int, slice, list, mask or index array over n rows as an int64 tensor of positions in 0..n-1.

    Raises:
        DataError: a mask of another length, a position out of range, or an index that is not made of whole numbers.
    """
    if isinstance(index, slice):
        return torch.arange(*index.indices(n))
    array = np.atleast_1d(to_array(index, "the row index"))
    if array.ndim > 1:
        raise DataError(f"A row index has one dimension; this one has shape {array.shape}.")
    if array.dtype == np.bool_:
        if len(array) != n:
            raise DataError(f"The row mask has {len(array)} entries for {n} rows; it needs one for each row.")
        array = np.flatnonzero(array)
    if not array.size:
        return torch.empty(0, dtype=torch.int64)
    if array.dtype.kind not in "iu":
        raise DataError(f"Rows are chosen by whole numbers or a boolean mask, not by values of type {array.dtype}.")
    low, high = int(array.min()), int(array.max())
    if low < -n or high >= n:
        raise DataError(f"Row {low if low < -n else high} does not exist: there are {n} rows, 0 to {n - 1}.")
    positions = torch.from_numpy(array.astype(np.int64))
    return torch.where(positions < 0, positions + n, positions)


@dataclass(frozen=True, eq=False)
class RowIds:
    """The identity of each row: the source that it came from and its position there.

    Identities travel with their rows through subsets, shuffles, splits, hold-outs and concatenation. A row that is
    taken twice (bootstrap) keeps one identity. Two rows of one source are two rows, even if their values are equal.

    Attributes:
        origins: fingerprints of the sources, see ``fingerprint``.
        source: ``[N]`` int64, the place in ``origins`` of each row's source.
        index: ``[N]`` int64, each row's position in its source.
    """

    origins: tuple[str, ...]
    source: Tensor
    index: Tensor

    @classmethod
    def of(cls, origin: str, n: int) -> RowIds:
        """The identities of all n rows of one source, in order."""
        return cls((origin,), torch.zeros(n, dtype=torch.int64), torch.arange(n))

    @classmethod
    def concat(cls, parts: Sequence[RowIds]) -> RowIds:
        """The rows of all parts, one after the other."""
        origins = tuple(dict.fromkeys(origin for part in parts for origin in part.origins))
        if not origins:
            return cls((), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        source = torch.cat([part._source_in(origins) for part in parts])
        return cls(origins, source, torch.cat([part.index for part in parts]))

    @property
    def origin(self) -> str:
        """The fingerprint of the source; several sources are joined by "+"."""
        return "+".join(self.origins)

    def __len__(self) -> int:
        """The number of rows N, repeated ones included."""
        return len(self.index)

    def __eq__(self, other: object) -> bool:
        """True when both hold the same rows in the same order."""
        if not isinstance(other, RowIds):
            return NotImplemented
        return torch.equal(self.index, other.index) and torch.equal(self.source, other._source_in(self.origins))

    def __repr__(self) -> str:
        """A short description: the number of rows and where they come from."""
        return f"RowIds({len(self)} rows of {', '.join(origin[:8] for origin in self.origins) or 'no source'})"

    def _source_in(self, origins: tuple[str, ...]) -> Tensor:
        """``[N]`` the place of each row's source in another tuple of origins, -1 where it is not among them."""
        place = {origin: position for position, origin in enumerate(origins)}
        table = torch.tensor([place.get(origin, -1) for origin in self.origins], dtype=torch.int64)
        return table[self.source] if len(self) else self.source

    def take(self, index: Any) -> RowIds:
        """The identities of the chosen rows; the index may be a slice, a mask, or positions (repeats allowed)."""
        chosen = row_index(index, len(self))
        return RowIds(self.origins, self.source[chosen], self.index[chosen])

    def isin(self, other: RowIds) -> Tensor:
        """``[N]`` bool: whether each row is also a row of ``other``."""
        found = torch.zeros(len(self), dtype=torch.bool)
        theirs = other._source_in(self.origins)
        for place in range(len(self.origins)):
            found |= (self.source == place) & torch.isin(self.index, other.index[theirs == place])
        return found

    def unique(self) -> tuple[RowIds, Tensor]:
        """The distinct rows, and ``[N]`` the place of each row among them."""
        pairs, inverse = torch.unique(torch.stack([self.source, self.index]), dim=1, return_inverse=True)
        return RowIds(self.origins, pairs[0], pairs[1]), inverse

    def overlap(self, other: RowIds) -> int:
        """The number of distinct rows that are in both."""
        return len(self.take(self.isin(other)).unique()[0])

    def minus(self, other: RowIds) -> RowIds:
        """The rows that are not in ``other``, order and repeats kept."""
        return self.take(~self.isin(other))

    def to_json(self) -> dict[str, Any]:
        """A JSON value: the origins, and stretches of rows such as ``[0, "0-351,360,12"]`` (source, positions)."""
        cuts = [0, *(torch.nonzero(self.source.diff()).flatten() + 1).tolist(), len(self)]
        rows = [[int(self.source[a]), _runs(self.index[a:b].tolist())] for a, b in pairwise(cuts) if b > a]
        return {"origins": list(self.origins), "rows": rows}

    @classmethod
    def from_json(cls, value: Any) -> RowIds:
        """Rebuild what ``to_json`` wrote.

        Raises:
            DataError: the value is not of that form.
        """
        try:
            origins = tuple(str(origin) for origin in value["origins"])
            parts = [cls.of("", 0)]
            for source, runs in value["rows"]:
                index = torch.cat([torch.arange(int(a), int(b or a) + 1) for a, b in _ends(runs)])
                parts.append(cls((origins[source],), torch.zeros_like(index), index))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise DataError(f"Not the row identities that bayesdl writes ({error}).") from None
        source = torch.cat([part._source_in(origins) for part in parts])
        return cls(origins, source, torch.cat([part.index for part in parts]))


def _runs(positions: list[int]) -> str:
    """Positions as text, rising stretches shortened: [0, 1, 2, 7] is "0-2,7"."""
    parts: list[str] = []
    start = last = positions[0]
    for position in [*positions[1:], None]:
        if position is not None and position == last + 1:
            last = position
            continue
        parts.append(str(start) if last == start else f"{start}-{last}")
        if position is not None:
            start = last = position
    return ",".join(parts)


def _ends(runs: str) -> list[tuple[str, str]]:
    """The first and last position (empty if the same) of each stretch of ``_runs``."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", runs):
        raise ValueError(f"{runs[:40]!r} is no list of rows")
    return [(part.partition("-")[0], part.partition("-")[2]) for part in runs.split(",")]
