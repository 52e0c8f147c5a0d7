"""How memory is handed out."""

from __future__ import annotations

import torch


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees, for the next step.

    glibc hands freed blocks above a threshold back to the system, which hands them out again page by page: a tenth of
    the time of ten networks side by side. The threshold rises to the largest block that was ever freed, up to 32 MiB
    (mallopt(3)). The block is never touched, so it costs no memory; other C libraries take no notice.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
