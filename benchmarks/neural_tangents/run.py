"""Kernels of infinitely wide networks beside neural-tangents: time, and memory beyond the call's start.

    python -m venv peers
    peers/bin/pip install -r benchmarks/neural_tangents/requirements.txt
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/neural_tangents/run.py --peer peers/bin/python

NNGP and NTK in one call, on one core. Every candidate runs in a process of its own, and the two take turns, so that
what else the machine does meets both. neural-tangents is compiled as one program beforehand; its compilation is not
counted. Processor time is what is compared; the rise is the highest resident size during the call less that before it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES

from bayesdl.posterior.tables import render

HERE = Path(__file__).parent
PRECISIONS = ("float32", "float64")


def run(python: str, script: str, name: str, precision: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [python, str(HERE / script), name, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(script, name, precision, *(f"{key} {found[key]:.3g}" for key in ("seconds", "elapsed", "rise")),
          file=sys.stderr, flush=True)  # fmt: skip
    return found


def row(name: str, precision: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """Medians, the ratio of times, the rise in units of the results, and the largest relative difference."""
    mine, other = ({key: statistics.median(one[key] for one in many) for key in ("seconds", "rise")}
                   for many in (ours, theirs))  # fmt: skip
    size = 2 * CASES[name].rows ** 2 * np.dtype(precision).itemsize / 2**20
    a, b = (np.asarray(many[0]["corner"]) for many in (ours, theirs))
    return [
        name,
        precision,
        f"{mine['seconds']:.3g}",
        f"{other['seconds']:.3g}",
        f"{other['seconds'] / mine['seconds']:.3g} x",
        f"{mine['rise']:,.0f}",
        f"{other['rise']:,.0f}",
        f"{size:,.3g}",
        f"{np.abs(a / b - 1).max():.0e}",
    ]


def main() -> None:
    """Run all cases in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="interpreter that has neural-tangents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(CASES), action="append", help="some of the cases")
    options = parser.parse_args()
    rows = []
    for name in options.only or CASES:
        for precision in PRECISIONS:
            pairs = [
                (run(sys.executable, "ours.py", name, precision), run(options.peer, "theirs.py", name, precision))
                for _ in range(options.rounds)
            ]
            ours, theirs = (list(side) for side in zip(*pairs, strict=True))
            rows.append(row(name, precision, ours, theirs))
    columns = ["network", "precision", "ours, s", "theirs, s", "ratio", "our rise, MiB", "theirs", "results, MiB",
               "difference"]  # fmt: skip
    print(render("NNGP and NTK", columns, rows))
    print(f"torch {torch.__version__}, {platform.machine()}, one core, medians of {options.rounds} rounds")


if __name__ == "__main__":
    main()
