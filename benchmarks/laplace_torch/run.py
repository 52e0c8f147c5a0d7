"""Laplace beside laplace-torch: time to fit, time to predict, and memory that predicting takes.

    python -m venv peers
    peers/bin/pip install -e . -r benchmarks/laplace_torch/requirements.txt
    OMP_NUM_THREADS=1 peers/bin/python benchmarks/laplace_torch/run.py

A 64-128-128-10 tanh network on scikit-learn's digits (1,438 training rows, 359 test rows), float32, one thread, prior
N(0, 1), probit link, the same trained weights for all. Every candidate runs in a process of its own, and the candidates
take turns, so that what else the machine does meets all of them. Of laplace-torch every back end runs that has the
structure, and the best of them is what counts, separately for each column. Processor time is measured; memory is the
highest resident size while the test split is predicted, less that before. The last column is the largest difference
of a class probability from ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.posterior.tables import render

STRUCTURES = {
    "K-FAC": ("all", "kron"),
    "diagonal": ("all", "diag"),
    "last layer, K-FAC": ("last_layer", "kron"),
    "last layer, full": ("last_layer", "full"),
}
OURS = "bayesdl"
BACKENDS = ("CurvlinopsGGN", "BackPackGGN", "AsdlGGN")
KEYS = ("fit", "predict", "rise")
PAGE = os.sysconf("SC_PAGE_SIZE")


def network() -> nn.Sequential:
    """The network, untrained."""
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and labels, test inputs and labels."""
    data = bdl.data.load("digits")
    parts = (data.train, data.test)
    (x, y), (test_x, test_y) = ((part.x.float() / 16, part.y.long()) for part in parts)
    return x, y, test_x, test_y


def lifted(net: nn.Sequential) -> bdl.BayesianNetwork:
    """The network under its prior."""
    return bdl.BayesianNetwork(net, bdl.priors.Normal(1.0), bdl.likelihoods.Categorical())


def ours(net: nn.Sequential, x: Tensor, y: Tensor, where: str, structure: str) -> Callable[[Tensor], Tensor]:
    """Fit, and give the function that predicts."""
    values = {name: value.detach().clone() for name, value in net.named_parameters()}
    random = "*" if where == "all" else "4.*"
    method = bdl.Laplace(structure=structure, random=random, polish=0, link="probit")
    posterior = bdl.fit(lifted(net), (x, y), method, init=values, progress=False)
    return lambda rows: posterior.predict(rows).probs


def theirs(
    net: nn.Sequential, x: Tensor, y: Tensor, where: str, structure: str, backend: str
) -> Callable[[Tensor], Tensor]:
    """The same with laplace-torch."""
    import laplace
    from laplace import curvature
    from torch.utils.data import DataLoader, TensorDataset

    made = laplace.Laplace(
        net,
        "classification",
        subset_of_weights=where,
        hessian_structure=structure,
        backend=getattr(curvature, backend),
        prior_precision=1.0,
    )
    made.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return lambda rows: made(rows, pred_type="glm", link_approx="probit")


class Peak:
    """The highest resident size of this process while it is entered, in MiB above that at the start."""

    def __enter__(self) -> Peak:
        self.base, self.most, self.ended = _resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.rise = max(self.most, _resident()) - self.base

    def _watch(self) -> None:
        while not self.ended.wait(0.001):
            self.most = max(self.most, _resident())


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def worker(name: str, label: str, weights: Path) -> None:
    """Run one candidate and print what it took, as JSON."""
    torch.set_num_threads(1)
    x, y, test_x, _ = digits()
    net = network()
    net.load_state_dict(torch.load(weights))
    where, structure = STRUCTURES[label]

    def fit(rows: int) -> Callable[[Tensor], Tensor]:
        if name == OURS:
            return ours(net, x[:rows], y[:rows], where, structure)
        return theirs(net, x[:rows], y[:rows], where, structure, name)

    fit(64)(test_x[:2])  # imports, and what is made once
    start = time.process_time()
    predict = fit(len(x))
    fitted = time.process_time()
    predict(test_x[:2])
    begun = time.process_time()
    with Peak() as peak:
        probs = predict(test_x)
    ended = time.process_time()
    found = {"fit": fitted - start, "predict": ended - begun, "rise": peak.rise, "probs": probs.detach().tolist()}
    print(json.dumps(found))


def run(name: str, label: str, weights: Path) -> dict[str, Any] | None:
    """A candidate in a process of its own; None if it has no such structure."""
    command = [sys.executable, __file__, "--worker", name, label, str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        print(f"{label}, {name}: {why[:120]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{label}, {name}:", *(f"{key} {found[key]:.3g}" for key in KEYS), file=sys.stderr, flush=True)
    return found


def table(results: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Print medians, and ratios of the best of the others to ours."""
    rows = []
    for label in dict.fromkeys(label for label, _ in results):
        mine = results[label, OURS]
        middle = {key: statistics.median(one[key] for one in mine) for key in KEYS}
        rows.append([label, OURS, *(f"{value:.3g}" for value in middle.values()), ""])
        best = dict.fromkeys(middle, float("inf"))
        for backend in BACKENDS:
            if found := results.get((label, backend)):
                other = {key: statistics.median(one[key] for one in found) for key in best}
                best = {key: min(best[key], other[key]) for key in best}
                gap = (torch.tensor(found[0]["probs"]) - torch.tensor(mine[0]["probs"])).abs().max()
                rows.append([label, backend, *(f"{value:.3g}" for value in other.values()), f"{float(gap):.1g}"])
        ratios = (f"{best[key] / max(middle[key], 1e-9):.2g} x" for key in best)
        rows.append([label, "best of them / ours", *ratios, ""])
    columns = ["structure", "by", "fit, s", "predict, s", "rise, MiB", "difference"]
    print(render("Laplace on digits, 64-128-128-10", columns, rows))


def main() -> None:
    """Run all candidates in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "STRUCTURE", "WEIGHTS"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=list(STRUCTURES), action="append", help="some of the structures")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], options.worker[1], Path(options.worker[2]))
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y, _, _ = digits()
    net = network()
    mode = bdl.fit(lifted(net), (x, y), bdl.MAP(steps=500), seed=0, progress=False)
    net.load_state_dict({name: value[0] for name, value in mode.draws(1).items()})
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        torch.save(net.state_dict(), weights)
        for _ in range(options.rounds):
            for label in options.only or STRUCTURES:
                for name in (OURS, *BACKENDS):
                    if (found := run(name, label, weights)) is not None:
                        results.setdefault((label, name), []).append(found)
    table(results)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {options.rounds} rounds")


if __name__ == "__main__":
    main()
