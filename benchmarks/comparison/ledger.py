"""Results as lines of a file, and tables of them."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[3] / "shared" / "data"


def options_of(doc: str | None, data: str, sets: Sequence[str]) -> argparse.ArgumentParser:
    """What scripts over several sets and methods are asked."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / data, help="the folder of the sets")
    parser.add_argument("--sets", nargs="+", default=list(sets), choices=sets)
    parser.add_argument("--methods", nargs="+", help="names of the table; default: all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no method after so long")
    parser.add_argument("--table", action="store_true", help="only write the table")
    return parser


def read(path: Path) -> list[dict[str, Any]]:
    """The results that are in a file of lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a result to a file of lines."""
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def preface(doc: str | None) -> str:
    """The description in a script's docstring: what follows its title and its command."""
    return textwrap.fill(" ".join((doc or "").split("\n\n")[2].split()), 120)


def spread(values: Sequence[float], digits: int = 3, sign: bool = False) -> str:
    """Mean and standard error."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def settings(results: Sequence[dict[str, Any]]) -> str:
    """The settings that were chosen most often, with their counts where there is more than one result."""
    counts = Counter(", ".join(f"{name}={_short(value)}" for name, value in r["chosen"].items()) for r in results)
    if len(results) == 1:
        return next(iter(counts))
    return "; ".join(f"{shown} ({count})" for shown, count in counts.most_common(2))


def _short(value: float) -> str:
    """Whole numbers as they are, others to three digits."""
    return str(value) if isinstance(value, int) else f"{value:.3g}"
