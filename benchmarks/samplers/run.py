"""The whole comparison in one command; it can be stopped and started again at any time.

    python benchmarks/samplers/run.py --rounds 5 --seeds 3 --minutes 120

Every round runs every sampler once per seed on both works (the slowest only once), each in a process of its own, one
thread on one core; rounds differ in their seeds too. What `results.jsonl` already holds is not run again. `table.py`
makes `samplers.md` of it. A smoke run: `--scale 0.1 --results /tmp/smoke.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from catalogue import CATALOGUE
from worker import MISSING
from works import WORKS, digest

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
PACKAGES = ("bayesdl", "torch", "pyro-ppl", "jax", "jaxlib", "numpyro", "blackjax", "optax", "arviz", "numpy")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "0",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # a compilation is cold, as it is in JAX
}


def versions() -> dict[str, str]:
    """Versions of the packages, of Python, and the commit of the working tree."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    return found | {"python": platform.python_version(), "commit": commit}


def hardware() -> dict[str, Any]:
    """Processor and cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system()}


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a run this run."""
    names = ("work", "sampler", "round", "seed", "scale", "digest", "arguments")
    return tuple(json.dumps(record[name], sort_keys=True) for name in names)


def plan(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs in their order: samplers alternate, so that a busy minute falls on all of them alike."""
    names = [name for name in CATALOGUE if not options.only or any(word in name for word in options.only)]
    for turn in range(options.rounds):
        for seed in range(options.seeds):
            shift = (turn * options.seeds + seed) % len(names)
            for name in names[shift:] + names[:shift]:
                if CATALOGUE[name].heavy and seed:
                    continue
                for work in options.works:
                    yield {
                        "work": work,
                        "sampler": name,
                        "round": turn,
                        "seed": seed,
                        "scale": options.scale,
                        "digest": digest(work),
                        "arguments": CATALOGUE[name].arguments(work, options.scale),
                    }


def run(task: dict[str, Any], core: int, limit: float) -> dict[str, Any] | str:
    """A run's result, or why there is none."""
    command = [sys.executable, str(HERE / "worker.py"), task["work"], task["sampler"]]
    command += ["--seed", str(task["seed"] + 1000 * task["round"]), "--scale", str(task["scale"])]
    if core >= 0:
        command = ["taskset", "-c", str(core), *command]
    try:
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    lines = done.stderr.strip().splitlines() or [""]
    if done.returncode == MISSING:
        return lines[-1]
    if done.returncode:
        return {"failed": lines[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Go through the plan until it or the time is at its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each sampler in each round")
    parser.add_argument("--minutes", type=float, default=30.0, help="no run is started after this")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one run may take")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on warm-up and draws; the table reads 1 alone")
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--only", nargs="+", help="samplers whose name contains one of these words")
    parser.add_argument("--core", type=int, default=1, help="core to stay on; -1 leaves it to the system")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    stored = options.results.read_text().splitlines() if options.results.exists() else []
    done = {key(json.loads(line)) for line in stored}
    about, missing = {"versions": versions(), "hardware": hardware()}, set()
    end = time.monotonic() + 60 * options.minutes
    tasks = list(plan(options))
    for count, task in enumerate(tasks, 1):
        if key(task) in done or task["sampler"] in missing:
            continue
        if time.monotonic() > end:
            print(f"time is up: {len(tasks) - count + 1} of {len(tasks)} runs not started; the same command goes on")
            return
        before = os.getloadavg()[0]
        result = run(task, options.core, options.limit)
        if isinstance(result, str):
            missing.add(task["sampler"])
            print(f"skipped {task['sampler']}: {result}", flush=True)
            continue
        record = task | result | {"load": [before, os.getloadavg()[0]], "when": time.strftime("%Y-%m-%d")} | about
        with options.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"[{count}/{len(tasks)}] {describe(record)}", flush=True)


def describe(record: dict[str, Any]) -> str:
    """One line about a run."""
    head = f"{record['work']}, {record['sampler']}, round {record['round']}, seed {record['seed']}: "
    if "failed" in record:
        return head + record["failed"]
    text = head + f"{record['us_per_gradient']:.1f} us/gradient, compiled in {record['compile_s']:.1f} s"
    if "ess_per_s" in record:
        text += f", {record['ess_per_s']:.1f} ESS/s, R-hat {record['rhat']:.3f}, {record['divergences']} divergences"
        text += f", {record['wall_total_s']:.0f} s in all"
    return text


if __name__ == "__main__":
    main()
