"""The progress bar: on stderr, and only for what takes longer than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 1.0  # seconds before a bar appears
INTERVAL = 0.1  # seconds between two redraws


def _watched() -> bool:
    """Whether somebody looks at stderr: a terminal, or a notebook's kernel."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Bar:
    """A bar that opens itself after a second and redraws at most ten times a second.

    Args:
        label: what is running.
        total: steps.
        show: True or False, or None to show it where stderr is a terminal or a notebook.
    """

    def __init__(self, label: str, total: int, show: bool | None) -> None:
        """Start the clock; nothing is drawn yet."""
        self.label, self.total = label, total
        self.show = _watched() if show is None else show
        self.next = time.monotonic() + PATIENCE
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def update(self, step: int, status: Callable[[], str]) -> None:
        """Show the step reached; ``status`` is asked only when something is drawn."""
        if not self.show or time.monotonic() < self.next:
            return
        if self.progress is None:
            self._open()
        assert self.progress is not None
        assert self.task is not None
        self.progress.update(self.task, completed=step, status=status())
        self.progress.refresh()
        self.next = time.monotonic() + INTERVAL

    def close(self, step: int, status: Callable[[], str]) -> None:
        """Draw the last state, if a bar was opened, and give the terminal back."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step, status=status())
            self.progress.stop()
            self.progress = None

    def _open(self) -> None:
        # rich takes a tenth of a second to import, so short fits never load it
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self.task = self.progress.add_task(self.label, total=self.total, status="")
        self.progress.start()
