"""Run as a script: fits in processes of their own, which kill themselves where their job says.

One job a line comes in on stdin, as JSON; for each a process is forked, so that torch is imported only once, and a
line goes out when it has ended. With a job as its only argument the script runs it in this very process.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import bayesdl as bdl
from bayesdl._files import write_json
from bayesdl.density import LogDensity
from bayesdl.infer import record
from tests.cases import conjugate
from tests.load_worker import main as predict

Job = dict[str, Any]
"""folder, method, settings, options of ``fit``, every (steps between checkpoints), and when to die: see ``Meter``;
block (bytes of draws in memory), where the draws go into a folder."""


class Meter:
    """Counts every gradient in a file that outlives the process, and kills the process when its time has come.

    kill_at_gradient: after so many gradients; kill_at_write: in the middle of the n-th write of a checkpoint, of which
    half is then on the disk; kill_at_step: so many gradients (kill_after) into the step after this one.
    """

    def __init__(self, job: Job, name: str) -> None:
        self.job = job
        self.count, self.writes, self.deadline = 0, 0, job.get("kill_at_gradient")
        self.file = os.open(Path(job["folder"]) / name, os.O_CREAT | os.O_WRONLY)
        self.evaluate, self.sync = LogDensity.value_and_grad, os.fsync
        meter = self

        def value_and_grad(density: LogDensity, z: Any, *args: Any, **options: Any) -> Any:
            meter.count += len(z)
            os.pwrite(meter.file, str(meter.count).encode(), 0)
            result = meter.evaluate(density, z, *args, **options)
            if meter.deadline is not None and meter.count >= meter.deadline:
                die()
            return result

        LogDensity.value_and_grad = value_and_grad  # type: ignore[method-assign]
        os.fsync = self.fsync  # type: ignore[assignment]

    def fsync(self, handle: int) -> None:
        """The n-th file that is to be on the disk gets there in half."""
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode):
            self.writes += 1
            if self.writes == self.job.get("kill_at_write"):
                os.ftruncate(handle, status.st_size // 2)
                die()
        self.sync(handle)

    def callback(self, state: dict[str, Any]) -> None:
        """Arm the clock at a step."""
        if state["step"] == self.job.get("kill_at_step"):
            self.deadline = self.count + self.job["kill_after"]


def die() -> None:
    """As a power cut would: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fit(job: Job) -> None:
    """Fit, or go on with a fit, under a checkpoint; save the posterior and the gradients at every step."""
    folder = Path(job["folder"])
    meter = Meter(job, job["meter"])
    steps = []

    def callback(state: dict[str, Any]) -> None:
        steps.append(state["gradients"])
        meter.callback(state)

    options = dict(job["options"])
    if job["block"] is not None:
        record.BLOCK_BYTES = job["block"]
        options["draws_to"] = folder / "draws"
    posterior = bdl.fit(
        conjugate().network(),
        conjugate().data,
        getattr(bdl, job["method"])(**job["settings"]),
        seed=5,
        checkpoint=bdl.Checkpoint(folder / "run", every=job["every"]),
        callback=callback,
        **options,
    )
    posterior.save(folder / "posterior")
    write_json(folder / "info.json", {"info": posterior.info, "steps": steps})


def run(job: Job) -> None:
    """Do one job."""
    if "predict" in job:
        predict(Path(job["predict"]))
    else:
        fit(job)


def preload() -> None:
    """Import what torch imports when it first records a graph, and bayesdl when a name is first used."""
    _ = bdl.NUTS, bdl.SGLD, bdl.MeanFieldVI
    x = torch.ones(1, 2)
    make_fx(vmap(grad_and_value(torch.sum)), tracing_mode="fake")(x)


def serve() -> None:
    """Fork a process for every job on stdin and say how it ended."""
    preload()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(json.loads(line))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(json.loads(sys.argv[1]))
    else:
        serve()
