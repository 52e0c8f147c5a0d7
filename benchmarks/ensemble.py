"""What ten networks side by side cost beside one.

    python benchmarks/ensemble.py

An ensemble of ten 64-128-128-10 relu networks on `digits`, mini-batches of 64 rows, Adam, float32, one thread, against
one such network trained by bayesdl and by plain torch (``nn.Sequential``, fused Adam). The three take turns within a
round; processor time per step is measured behind the first 200 steps of a run, and ratios are taken within rounds.
Writes ensemble.md beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bayesdl as bdl

BATCH, RATE, FIRST = 64, 0.003, 200


def ours(rows: bdl.Dataset, members: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step of an ensemble, of the whole run, and how gradients were computed."""
    model = bdl.models.mlp(rows, hidden=(128, 128), activation="relu").to(torch.float32)
    method = bdl.DeepEnsemble(members=members, steps=steps, batch_size=BATCH, learning_rate=RATE)
    ends: list[float] = []
    began = time.process_time()
    posterior: Any = method.fit(
        model, rows, seed=0, progress=False, callback=lambda _: ends.append(time.process_time()) or False
    )
    return {
        "ms": 1e3 * (ends[-1] - ends[FIRST - 1]) / (len(ends) - FIRST),
        "seconds": time.process_time() - began,
        "execution": posterior.problem.density.execution,
    }


def plain(rows: bdl.Dataset, steps: int) -> dict[str, Any]:
    """The same network in plain torch."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
    x, y = rows.x.float() / 16, rows.y
    began = middle = time.process_time()
    for step in range(steps):
        if step == FIRST:
            middle = time.process_time()
        chosen = torch.randint(len(x), (BATCH,))
        optimiser.zero_grad()
        cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimiser.step()
    end = time.process_time()
    return {"ms": 1e3 * (end - middle) / (steps - FIRST), "seconds": end - began, "execution": "eager"}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = bdl.data.load("digits").train
    found: dict[str, list[dict[str, Any]]] = {"plain torch, one": [], "bayesdl, one": [], "bayesdl, ten": []}
    for _ in range(options.rounds):
        found["plain torch, one"].append(plain(rows, options.steps))
        found["bayesdl, one"].append(ours(rows, 1, options.steps))
        found["bayesdl, ten"].append(ours(rows, 10, options.steps))
    lines = [
        "# Ten networks beside one",
        "",
        f"`python benchmarks/ensemble.py`: {options.rounds} rounds of {options.steps} steps; digits, 64-128-128-10,",
        f"batches of {BATCH}, Adam; torch {torch.__version__}, one thread. Ratios are medians of those within rounds;",
        "*s in all* holds recording and compilation. Goal: ten at most 4 times one.",
        "",
        "| training | ms a step | / plain torch | / bayesdl, one | s in all | gradients |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, runs in found.items():
        ratios = [
            statistics.median(run["ms"] / other["ms"] for run, other in zip(runs, found[base], strict=True))
            for base in ("plain torch, one", "bayesdl, one")
        ]
        ms, seconds = (statistics.median(run[key] for run in runs) for key in ("ms", "seconds"))
        lines.append(
            f"| {name} | {ms:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {seconds:.1f} | {runs[0]['execution']} |"
        )
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
