"""Run as a script: load posteriors and predict, in a process that has fitted nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(folder: Path) -> None:
    """Predict with every posterior below a folder, at the inputs that jobs.json names."""
    import torch

    import bayesdl as bdl
    from bayesdl._files import write_tensors
    from tests.contract import predictions

    found = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        posterior = bdl.load(folder / job["key"] / "posterior")
        x = torch.tensor(job["x"], dtype=torch.float64)
        found.update({f"{job['key']}/{name}": value for name, value in predictions(posterior, x).items()})
    write_tensors(folder / "predictions.safetensors", found)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]))
