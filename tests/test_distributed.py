"""Chains spread over processes: the same run as in one process, on every rank, also after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl._distributed import Ranks
from bayesdl.errors import MethodError
from tests.distributed_worker import fit

ROOT = Path(__file__).parents[1]


def torchrun(name: str, folder: Path, *arguments: object) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests" / "distributed_worker.py"), name, str(folder), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=300).returncode


def test_shares_cover_all_chains_and_are_gathered_in_order() -> None:
    for world in (1, 2, 3, 5):
        parts = [Ranks(rank, world).share(5) for rank in range(world)]
        assert [k for part in parts for k in range(5)[part]] == [0, 1, 2, 3, 4]
    with pytest.raises(MethodError, match="2 chains cannot be spread over 3"):
        Ranks(0, 3).share(2)
    assert Ranks.current() == Ranks(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NUTS"])
def test_two_processes_make_the_run_of_one(name: str, tmp_path: Path) -> None:
    assert torchrun(name, tmp_path) == 0
    ranks: list[Any] = [bdl.load(tmp_path / f"posterior{rank}") for rank in range(2)]
    assert torch.equal(ranks[0].z, ranks[1].z)
    alone = fit(name)
    assert ranks[0].z.shape == alone.z.shape
    assert ranks[0].info["gradients"] == pytest.approx(alone.info["gradients"], abs=2)
    # Rounding differs with the number of chains in a batch and grows along the run; the first draws show that noise,
    # adaptation and starts are the same.
    torch.testing.assert_close(ranks[0].z[:, :1], alone.z[:, :1], rtol=1e-3, atol=1e-3)
    # Killed in the middle, the two processes at different steps, and started again: bit for bit the same.
    assert torchrun(name, tmp_path / "killed", 47) != 0
    assert torchrun(name, tmp_path / "killed") == 0
    resumed: Any = bdl.load(tmp_path / "killed" / "posterior0")
    assert torch.equal(resumed.z, ranks[0].z)
