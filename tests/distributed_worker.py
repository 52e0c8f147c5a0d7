"""A fit in one of several processes: ``torchrun ... distributed_worker.py FOLDER [STOP]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import bayesdl as bdl
from bayesdl._distributed import Ranks
from tests.cases import dataset, network

METHODS: dict[str, bdl.Method] = {
    "NUTS": bdl.NUTS(chains=5, warmup=40, draws=12, max_depth=4),
    "HMC": bdl.HMC(chains=4, warmup=60, draws=8, leapfrog_steps=4),
}


def fit(name: str, checkpoint: Path | None = None, stop: int | None = None) -> Any:
    """The fit that all tests look at; ``stop`` kills this process on the spot after so many steps."""

    def callback(state: dict[str, Any]) -> None:
        if stop is not None and state["step"] == stop + Ranks.current().rank:
            raise SystemExit(7)

    options: dict[str, Any] = {} if checkpoint is None else {"checkpoint": bdl.Checkpoint(checkpoint, every=5)}
    return METHODS[name].fit(
        network("regression"), dataset("regression"), seed=3, progress=False, callback=callback, **options
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    posterior = fit(name, folder / "run", int(sys.argv[3]) if len(sys.argv) > 3 else None)
    rank = Ranks.current().rank
    torch.distributed.barrier()
    posterior.save(folder / f"posterior{rank}")
    torch.distributed.destroy_process_group()
