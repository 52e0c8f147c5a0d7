"""Tables as text, by rich."""

from __future__ import annotations

import io
from collections.abc import Sequence


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = 110) -> str:
    """A table as text: the first column to the left, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return buffer.getvalue()
