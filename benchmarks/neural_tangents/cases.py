"""The kernels that are compared, their inputs, and how a call is measured; nothing but numpy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

W_STD, B_STD = 1.5, 0.1


@dataclass(frozen=True)
class Case:
    """A kernel and its inputs: ``two`` sets of them, or one with itself."""

    kind: str
    activation: str
    depth: int
    rows: int
    shape: tuple[int, ...]
    two: bool = False


DENSE, IMAGE = (784,), (3, 16, 16)
CASES = {
    "relu, depth 5": Case("dense", "relu", 5, 4000, DENSE),
    "relu, depth 5, two sets": Case("dense", "relu", 5, 4000, DENSE, True),
    "erf, depth 5": Case("dense", "erf", 5, 4000, DENSE),
    "erf, depth 5, two sets": Case("dense", "erf", 5, 4000, DENSE, True),
    "3 convolutions, Flatten": Case("flatten", "relu", 3, 200, IMAGE),
    "3 convolutions, Flatten, two sets": Case("flatten", "relu", 3, 200, IMAGE, True),
    "3 convolutions, global mean": Case("mean", "relu", 3, 40, IMAGE),
}


def inputs(case: Case, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Standard normal inputs, channels first."""
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(case.rows, *case.shape)).astype(precision) for _ in range(2))
    return one, other if case.two else None


def measure(call: Callable[[], tuple[np.ndarray, np.ndarray]]) -> None:
    """Print processor time, elapsed time, rise of the highest resident size, and a corner of both kernels, as JSON."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    began, processor = time.perf_counter(), time.process_time()
    both = call()
    processor, elapsed = time.process_time() - processor, time.perf_counter() - began
    rise = _status("VmHWM") - before
    corner = [np.asarray(k[:4, :4], dtype=float).tolist() for k in both]
    print(json.dumps({"seconds": processor, "elapsed": elapsed, "rise": rise, "corner": corner}))


def _status(name: str) -> float:
    """A line of this process's status, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) / 2**10
