"""Data in raw units, with names, task, row identities and splits; loaders for files, bundled and synthetic sets."""

from __future__ import annotations

from bayesdl.data import synthetic
from bayesdl.data.arrays import Task
from bayesdl.data.bundled import load
from bayesdl.data.dataset import Dataset, Split, as_dataset
from bayesdl.data.images import read_idx
from bayesdl.data.rows import RowIds
from bayesdl.data.scaling import Scaler
from bayesdl.data.tables import read_csv, read_inputs
from bayesdl.data.uci import read_uci

__all__ = [
    "Dataset",
    "RowIds",
    "Scaler",
    "Split",
    "Task",
    "as_dataset",
    "load",
    "read_csv",
    "read_idx",
    "read_inputs",
    "read_uci",
    "synthetic",
]
