"""A process that is killed loses at most one checkpoint interval, and its successor ends where it would have ended."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl._files import read_json, read_tensors
from tests.cases import conjugate
from tests.contract import assert_equal, predictions

WORKER = Path(__file__).with_name("resume_worker.py")
COMMAND = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(WORKER)]
Run = Callable[[dict[str, Any]], int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a job in a process of its own; returns the exit code, or minus the signal that ended it."""
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(job: dict[str, Any]) -> int:
            print(json.dumps(job), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@dataclass
class Plan:
    """A method, its checkpoints, and where its parts lie.

    The first kill comes between two steps of warm-up, after the first checkpoint; or, where there is no warm-up
    (None), in the 500 steps of the search for the start.
    """

    method: str
    settings: dict[str, Any]
    every: int
    first: tuple[int, int] | None
    last: tuple[int, int]  # steps between which the last kill comes
    options: dict[str, Any] = field(default_factory=dict)
    block: int | None = None  # bytes of draws in memory, where these go into a folder

    def job(self, folder: Path, meter: str, **kill: int) -> dict[str, Any]:
        """What a process is told."""
        folder.mkdir(exist_ok=True)
        common = {"method": self.method, "settings": self.settings, "every": self.every, "options": self.options}
        return common | {"block": self.block, "folder": str(folder), "meter": meter, **kill}

    def kills(self, steps: list[int]) -> list[dict[str, int]]:
        """Three random moments, given the gradients after every step."""
        moment = random.Random(f"{self.method}{self.block or ''}")
        low, high = (self.every, 480) if self.first is None else (steps[k] for k in self.first)
        return [
            {"kill_at_gradient": moment.randint(low, high)},
            {"kill_at_write": moment.randint(1, 2)},
            {"kill_at_step": moment.randint(*self.last), "kill_after": moment.randint(1, 3)},
        ]


PLANS = {
    "NUTS": Plan("NUTS", {"chains": 2, "warmup": 50, "draws": 50, "max_depth": 4}, 12, (15, 45), (75, 95)),
    # Two chains in three dimensions: shards of 20 draws, so that the last kill falls behind the first of them.
    "NUTS streamed": Plan(
        "NUTS", {"chains": 2, "warmup": 50, "draws": 50, "max_depth": 4}, 12, (15, 45), (75, 95), block=20 * 2 * 3 * 8
    ),
    "SGLD": Plan("SGLD", {"chains": 2, "warmup": 150, "draws": 50, "thin": 4}, 25, (30, 120), (230, 330)),
    "MeanFieldVI": Plan("MeanFieldVI", {"steps": 300}, 40, None, (180, 280)),
    "learnt prior": Plan("MeanFieldVI", {"steps": 200}, 40, None, (90, 190), {"prior_rows": 0.5}),
}


def spent(folder: Path, *meters: str) -> int:
    """Gradients that the processes evaluated, as they themselves counted them."""
    return sum(int((folder / meter).read_text()) for meter in meters)


def interval(whole: Path, every: int) -> int:
    """The most gradients between two checkpoints of the uninterrupted run."""
    steps = read_json(whole / "info.json")["steps"]
    at = [steps[k - 1] for k in range(every, len(steps) + 1, every)]
    return max(after - before for before, after in pairwise(at))


def within_budget(total: int, whole: int, kills: int, most: int) -> bool:
    """Whether work was repeated for one interval a kill at most; a process looks at the density once per stage."""
    return whole <= total <= whole + kills * most + 2 * (kills + 1)


def check_ends_as_the_uninterrupted_run(whole: Path, killed: Path) -> None:
    ours, theirs = (read_tensors(folder / "posterior" / "posterior.safetensors")[0] for folder in (killed, whole))
    assert any(name.startswith("posterior/") for name in theirs)
    assert_equal(ours, theirs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks")
@pytest.mark.parametrize("name", PLANS)
def test_three_kills_lose_three_intervals_at_most(name: str, run: Run, tmp_path: Path) -> None:
    plan = PLANS[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(plan.job(whole, "meter")) == 0
    kills = plan.kills(read_json(whole / "info.json")["steps"])
    for number, kill in enumerate(kills):
        assert run(plan.job(killed, f"meter{number}", **kill)) == -signal.SIGKILL, kill
        assert not (killed / "posterior").exists()
    torn = [path for path in killed.iterdir() if path.suffix == ".part"]
    assert len(torn) == 1, "one checkpoint was being written when its process died"
    assert run(plan.job(killed, "meter3")) == 0
    check_ends_as_the_uninterrupted_run(whole, killed)

    most, alone = interval(whole, plan.every), spent(whole, "meter")
    before, after = spent(killed, "meter0", "meter1", "meter2"), spent(killed, "meter3")
    assert within_budget(before + after, alone, len(kills), most)
    assert not within_budget(before + alone, alone, len(kills), most), "a restart from the seed would pass"
    info, reference = (read_json(folder / "info.json")["info"] for folder in (killed, whole))
    assert info["gradients_here"] == after
    assert reference["gradients_here"] == reference["gradients"] == alone
    assert 0 <= info["gradients"] - alone <= 2 * len(kills)

    x = conjugate().x[:4]
    (tmp_path / "jobs.json").write_text(json.dumps([{"key": key, "x": x.tolist()} for key in ("whole", "killed")]))
    assert run({"predict": str(tmp_path)}) == 0
    elsewhere, here = read_tensors(tmp_path / "predictions.safetensors")[0], bdl.load(killed / "posterior")
    for statistic, value in predictions(here, x).items():
        assert torch.equal(elsewhere[f"killed/{statistic}"], value)
        assert torch.equal(elsewhere[f"whole/{statistic}"], value)


@pytest.mark.slow
def test_fresh_processes_killed_from_outside(tmp_path: Path) -> None:
    """The same without forks, and with the kill coming from another process at no particular point of the program."""
    plan = Plan("NUTS", {"chains": 2, "warmup": 200, "draws": 300, "max_depth": 6}, 20, None, (0, 0))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moment = random.Random(0)
    subprocess.run([*COMMAND, json.dumps(plan.job(whole, "meter"))], check=True)
    alone = spent(whole, "meter")
    for number in range(2):
        process = subprocess.Popen([*COMMAND, json.dumps(plan.job(killed, f"meter{number}"))])
        enough = moment.uniform(0.2, 0.4) * alone
        while process.poll() is None and not _reached(killed / f"meter{number}", enough):
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*COMMAND, json.dumps(plan.job(killed, "meter2"))], check=True)
    check_ends_as_the_uninterrupted_run(whole, killed)
    total = spent(killed, "meter0", "meter1", "meter2")
    assert within_budget(total, alone, 2, interval(whole, plan.every))


def _reached(meter: Path, gradients: float) -> bool:
    return meter.exists() and int(meter.read_text() or 0) >= gradients
