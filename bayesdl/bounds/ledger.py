"""The row ledger: which rows a certificate counts, which it must not, and a hash of each by which others can check."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.data import Dataset, RowIds

ROWS = 4096  # converted to float64 at a time

Entry = tuple[int, int, str | None]
"""Source (a place in ``Ledger.origins``), position in it, and hash of the row; None where its values are unknown."""


@dataclass(frozen=True)
class Ledger:
    """Every row by its role.

    Args:
        origins: Fingerprints of the sources of the rows.
        columns: Names of the columns of the inputs; empty for inputs that are no table.
        target: Name of the target.
        classes: The label that each code stands for; empty for regression.
        prior: Role A: rows that shaped the scaler or prior; for a hold-out bound all rows fitted on.
        bound: Role B: rows that the bound counts.
    """

    origins: tuple[str, ...]
    columns: tuple[str, ...]
    target: str
    classes: tuple[str, ...]
    prior: tuple[Entry, ...]
    bound: tuple[Entry, ...]

    @classmethod
    def of(cls, data: Dataset, bound: Tensor, prior: RowIds) -> Ledger:
        """The ledger of a certificate.

        Args:
            data: All rows that were given.
            bound: Positions in ``data`` of the rows that count.
            prior: The rows of role A, in the data or not.
        """
        origins = tuple(dict.fromkeys((*prior.origins, *data.rows.origins)))
        hashes = dict(zip(_keys(data.rows, origins), row_hashes(data.x, data.y), strict=True))
        roles = prior.unique()[0], data.rows.take(bound)
        entries = [tuple((*key, hashes.get(key)) for key in _keys(rows, origins)) for rows in roles]
        return cls(origins, data.x_names, data.y_name, tuple(map(str, data.classes)), *entries)

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "hash": "BLAKE2b, 16 bytes, of the row as little-endian float64: inputs, then targets",
            "origins": list(self.origins),
            "columns": list(self.columns),
            "target": self.target,
            "classes": list(self.classes),
            "A": [list(entry) for entry in self.prior],
            "B": [list(entry) for entry in self.bound],
        }

    @classmethod
    def from_json(cls, value: Any) -> Ledger:
        """Rebuild what ``to_json`` wrote."""
        roles = [tuple((int(s), int(i), None if h is None else str(h)) for s, i, h in value[role]) for role in "AB"]
        texts = [tuple(map(str, value[name])) for name in ("origins", "columns", "classes")]
        return cls(texts[0], texts[1], str(value["target"]), texts[2], *roles)


def row_hashes(x: Tensor, y: Tensor) -> list[str]:
    """BLAKE2b (128 bits, hex) of every row: inputs and targets as float64, -0 as 0."""
    found: list[str] = []
    for start in range(0, len(x), ROWS):
        part = [value[start : start + ROWS].detach().cpu().to(torch.float64).flatten(1) for value in (x, _column(y))]
        rows = np.ascontiguousarray((torch.cat(part, 1) + 0.0).numpy(), dtype="<f8")
        found += [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows]
    return found


def _column(y: Tensor) -> Tensor:
    return y.unsqueeze(1) if y.dim() == 1 else y


def _keys(rows: RowIds, origins: tuple[str, ...]) -> list[tuple[int, int]]:
    place = [origins.index(origin) for origin in rows.origins]
    return [(place[source], index) for source, index in zip(rows.source.tolist(), rows.index.tolist(), strict=True)]
