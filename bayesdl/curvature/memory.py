"""What a matrix would take, before it is made."""

from __future__ import annotations

import torch

from bayesdl.errors import MethodError

MOST_GIB = 4.0
"""The largest matrix that is written out without being asked twice."""


def require_memory(what: str, rows: int, columns: int, dtype: torch.dtype, most: float = MOST_GIB) -> None:
    """Refuse a matrix that is too large, with its size.

    Args:
        what: "a Hessian of 1,000,000 unknowns".
        rows: its rows.
        columns: its columns.
        dtype: of its entries.
        most: GiB that are allowed.

    Raises:
        MethodError: it would take more.
    """
    gigabytes = rows * columns * dtype.itemsize / 2**30
    if gigabytes > most:
        raise MethodError(
            f"{what} takes {gigabytes:,.0f} GiB, more than the {most:g} GiB that are allowed; use structure='kron', "
            "'low_rank' or 'diag', or random= for a part of the unknowns."
        )
