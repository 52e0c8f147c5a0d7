"""Certificates on MNIST: how small a risk can be guaranteed from 60,000 rows?

    python benchmarks/certificates/mnist.py --data ../shared/data/images

Networks in float32, pixels scaled by one mean and one deviation of the prior's rows, weights N(0, 9 / fan_in) a priori
and biases N(0, 0.01). Half of the rows train the prior's mean, all train the posterior, and the certificate counts the
other half, with delta 0.035 in all. The scale of the bound's prior, a twentieth of the model's, was chosen on 5,000 of
the prior's rows, among six, by the errors of a network with noise of that size; the rest is as it was written down.
Beside each certificate of the Gibbs predictor stand bounds from a binomial tail (delta 0.035): of the prior's mean
network on the rows that the certificate counts, where a test-set bound is always the smaller one at equal error
(log 1 / delta against log 2 sqrt(n) / delta, and no KL); and the errors on the 10,000 test rows. Seconds are processor
time of one thread.

Every finished line is in ``mnist.jsonl``; a second run goes on where the first stopped, also within a fit, and
``--table`` writes mnist.md from what is in.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bayesdl as bdl
from bayesdl.bounds import clopper_pearson_upper

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "mnist.jsonl", HERE / "mnist.md"
DELTA = 0.035


def dense() -> nn.Module:
    """784-600-600-600-10."""
    widths = (784, 600, 600, 600)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(600, 10))


def convolutional() -> nn.Module:
    """Two convolutions and two linear layers, as in Perez-Ortiz et al. (2021)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


@dataclass(frozen=True)
class Task:
    """A line of the table."""

    name: str
    net: Any
    prior: bdl.priors.Prior
    method: bdl.Method
    passes: int
    published: str


WIDE = bdl.priors.Normal("fan_in", w_std=30.0)  # so that it hardly weighs on the training of the prior's mean
FILTERS = bdl.priors.Normal("fan_in", w_std=6.0)  # an error in a filter is one in all pixels
COMMON = bdl.PACBayes(
    bound="kl", prior_fraction=0.5, delta=0.028, batch_size=250, learning_rate=30.0, prior_learning_rate=0.001
)
TASKS = (
    Task(
        "784-600-600-600-10",
        dense,
        WIDE,
        replace(COMMON, prior_scale=0.5 / 30, prior_noise=1.0 / 30, steps=2400, prior_steps=4800),
        passes=50,
        published="0.0279 (0.0420 in a re-run)",
    ),
    Task(
        "two convolutions, two linear layers",
        convolutional,
        bdl.priors.PerParameter({"0.*": FILTERS, "2.*": FILTERS, "*": WIDE}),
        replace(
            COMMON,
            prior_scale=0.1 / 30,
            prior_noise=0.5 / 30,
            batch_size=125,
            learning_rate=3.0,
            steps=50,
            prior_steps=2000,
        ),
        passes=10,
        published="0.0155",
    ),
)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data" / "images")
    parser.add_argument("--only", nargs="+", help="names of lines; default: all")
    parser.add_argument("--checkpoints", type=Path, default=Path("results") / "certificates")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = read()
    for task in TASKS:
        wanted = options.only is None or task.name in options.only
        if wanted and not options.table and all(r["name"] != task.name for r in done):
            result = run(task, options)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
    TABLE.write_text(table(read()))
    print(TABLE.read_text())


def read() -> list[dict[str, Any]]:
    """The finished lines."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Fit, certify, and look at the test rows."""
    train, test = (
        bdl.data.read_idx(options.data / "mnist" / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")
    )
    model = bdl.BayesianNetwork(task.net(), task.prior, bdl.likelihoods.Categorical()).to(torch.float32)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    checkpoint = bdl.Checkpoint(options.checkpoints / f"{task.net.__name__}.ckpt", every=100)
    posterior: Any = task.method.fit(model, train, seed=0, checkpoint=checkpoint)
    fitted = time.process_time() - began
    posterior.save(options.checkpoints / task.net.__name__)
    certificate = bdl.certify(posterior, train, delta=DELTA, draws=task.passes * posterior.info["counted_rows"])
    seconds = time.process_time() - began - fitted
    certificate.save(options.checkpoints / f"{task.net.__name__}.json")
    rows = train.subset(~train.rows.isin(posterior.problem.prior_rows))
    means = {"prior's mean": posterior.problem.density.new_prior[0], "posterior's mean": posterior.mean}
    networks = {name: at_point(posterior, mean) for name, mean in means.items()}
    errors = wrong(networks["prior's mean"], rows)
    return {
        "name": task.name,
        "bound": certificate.bound,
        "risk": certificate.risk,
        "risk_upper": certificate.risk_upper,
        "kl": certificate.kl,
        "n": certificate.n,
        "draws": certificate.draws,
        "surrogate": {key: posterior.info[key] for key in ("risk", "bound")},
        "prior_bound": float(clopper_pearson_upper(errors=errors, n=len(rows), delta=DELTA)),
        "test_errors": {name: wrong(network, test) for name, network in networks.items()},
        "published": task.published,
        "seconds": [fitted, seconds],
        "settings": task.method.settings(),
        "torch": str(torch.__version__),
    }


def at_point(posterior: Any, mean: torch.Tensor) -> Any:
    """The network with some weights, as a function from rows to labels."""
    values = {name: value[0] for name, value in posterior.problem.density.constrain(mean[None]).items()}

    def labels(x: torch.Tensor) -> torch.Tensor:
        inputs = posterior.problem.inputs(x)[posterior.problem.x_name]
        with torch.no_grad():
            return posterior.problem.model.forward(values, inputs).argmax(1)

    return labels


def wrong(labels: Any, data: bdl.Dataset) -> int:
    """Errors on rows."""
    return sum(
        int((labels(data.x[begin : begin + 1000]) != data.y[begin : begin + 1000]).sum())
        for begin in range(0, len(data), 1000)
    )


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = ("network", "certificate", "published", "risk (Gibbs)", "KL, nats", "n", "prior's network, tail bound")
    columns = (*head, "test error: prior, posterior mean", "s fitting, certifying")
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    for r in results:
        test = ", ".join(f"{count / 10_000:.4f}" for count in r["test_errors"].values())
        cells = (r["name"], f"**{r['bound']:.4f}**", r["published"], f"{r['risk']:.4f}", f"{r['kl']:.1f}", str(r["n"]))
        lines.append(" | ".join((*cells, f"{r['prior_bound']:.4f}", test, ", ".join(f"{s:.0f}" for s in r["seconds"]))))
    title = (__doc__ or "").split("\n\n")[2]
    return f"## Certificates on MNIST\n\n{title}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
