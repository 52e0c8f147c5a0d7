"""What the commands print: JSON, tables and CSV on stdout; nothing else goes there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Print a value as JSON; infinite and undefined numbers, which JSON has no word for, become null."""
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """Print names and values, one pair a line, aligned."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        typer.echo(f"{name:<{width}}  {as_text(value)}")


def print_csv(columns: Mapping[str, Sequence[Any]]) -> None:
    """Print columns of equal length as CSV."""
    typer.echo(",".join(map(_quoted, columns)))
    for row in zip(*columns.values(), strict=True):
        typer.echo(",".join(_quoted(as_text(value)) for value in row))


def as_text(value: Any) -> str:
    """A number with six significant digits, anything else as it prints itself."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n\r') else text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
