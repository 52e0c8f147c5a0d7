"""What every test may rely on: a headless backend, repeatable properties, and the reference data where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")

# The checks of the contract battery stand in a module of their own; their assertions are to be explained as well.
pytest.register_assert_rewrite("tests.contract")

# No deadline, because a loaded machine is no bug; derandomised, because a suite should say the same thing twice.
settings.register_profile("bayesdl", deadline=None, derandomize=True)
settings.load_profile("bayesdl")

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = (ROOT / os.environ.get("BAYESDL_REFERENCE", "../shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data, which is not part of the repository.

    The test is skipped where there is none; with BAYESDL_REQUIRE_REFERENCE set, as in .ci/run, it fails instead.
    """
    if not REFERENCE.is_dir():
        message = f"no reference data at {REFERENCE} (set BAYESDL_REFERENCE)"
        if os.environ.get("BAYESDL_REQUIRE_REFERENCE"):
            pytest.fail(message)
        pytest.skip(message)
    return REFERENCE
