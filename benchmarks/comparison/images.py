"""Cheap posteriors side by side on images: how good, how calibrated, and do they know what they have not seen?

    python benchmarks/comparison/images.py --data ../shared/data/images

A 784-100-100-10 relu network in float32, weights N(0, w_std^2 / fan_in), biases N(0, 1), pixels scaled by one mean and
one deviation. A training of one member is at most 5 epochs of mini-batches of 128 rows, by Adam at 0.002 where the
method has no optimiser of its own. Each method tries four settings on 80% of the 60,000 training rows: two scales of
the prior (1 and 2) and two choices of what matters most to it; the one with the best log likelihood of the other 20% is
fitted to all training rows and predicts the 10,000 test rows. Ensembles have five members, methods that draw weights
predict with 30. AUROC: the probability that a foreign image has the larger predictive entropy (total), or the larger
mutual information of label and weights (epistemic), than a test image; 0.5 is chance. Seconds are processor time of one
thread: of the chosen fit, of all the tries, and of predicting the test rows. LastLayer and KalmanFilter are for
numbers.

Every finished fit is a line of ``images.jsonl``; a second run goes on where the first stopped, and ``--table`` writes
images.md from what is in.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from catalogue import Budget, Candidate, candidates
from ledger import append, markdown, options_of, preface, read, settings
from trial import tuned

import bayesdl as bdl
from bayesdl.errors import BayesdlError
from bayesdl.evaluate import calibration, detection_auroc, metrics

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "images.jsonl", HERE / "images.md"
FOREIGN = {"mnist": ("notmnist", "fashion_mnist"), "fashion_mnist": ("notmnist", "mnist")}
"""What is unlike each set."""
BUDGET = Budget(epochs=5, batch_size=128, learning_rate=0.002, w_std=(1.0, 2.0), draws=30, last_layer="5.*")


def main() -> None:
    """Run what is missing within the time, then write the table."""
    parser = options_of(__doc__, "images", list(FOREIGN))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        run(options)
    TABLE.write_text(table(read(RESULTS)))
    print(TABLE.read_text())


def run(options: argparse.Namespace) -> None:
    """What is missing."""
    began = time.perf_counter()
    done = {(r["set"], r["method"]) for r in read(RESULTS)}

    def images(name: str, part: str) -> bdl.Dataset:
        return bdl.data.read_idx(options.data / name / f"{part}-images-idx3-ubyte.gz")

    for name in options.sets:
        train, test = images(name, "train"), images(name, "t10k")
        foreign = {other: images(other, "t10k") for other in FOREIGN[name]}
        for method, choices in candidates(BUDGET, len(train), "classification").items():
            if (name, method) in done or (options.methods and method not in options.methods):
                continue
            if time.perf_counter() - began > 60 * options.minutes:
                return
            result = {"set": name, "method": method} | one(train, test, foreign, choices)
            append(RESULTS, result)
            print(f"{name} {method}: {result.get('nll', result.get('failed'))}", flush=True)


def one(
    train: bdl.Dataset, test: bdl.Dataset, foreign: dict[str, bdl.Dataset], choices: list[Candidate]
) -> dict[str, Any]:
    """Tune and fit one method, and predict the test rows and what is foreign."""

    def make(candidate: Candidate) -> bdl.BayesianNetwork:
        prior = bdl.priors.Normal("fan_in", w_std=candidate.w_std)
        model = bdl.models.mlp(train, hidden=(100, 100), activation="relu", prior=prior, dropout=candidate.dropout)
        return model.to(torch.float32)

    try:
        posterior, known = tuned(make, choices, train, 0, BUDGET.draws)
    except BayesdlError as error:
        return {"failed": str(error)}
    began = time.process_time()
    inside = posterior.predict(test.x, max_draws=BUDGET.draws)
    seconds = time.process_time() - began
    auroc: dict[str, list[float]] = {}
    for name, rows in foreign.items():
        outside = posterior.predict(rows.x, max_draws=BUDGET.draws)
        auroc[name] = [detection_auroc(inside, outside, "total"), detection_auroc(inside, outside, "epistemic")]
    return known | {
        "nll": metrics.nll(inside, test.y),
        "accuracy": metrics.accuracy(inside, test.y),
        "ece": calibration.ece(inside, test.y),
        "auroc": auroc,
        "predict_seconds": seconds,
        "torch": str(torch.__version__),
    }


def table(results: list[dict[str, Any]]) -> str:
    """One block a set."""
    blocks = [f"## Cheap posteriors on images\n\n{preface(__doc__)}\n"]
    for name, others in FOREIGN.items():
        detections = [f"AUROC {other}: total, epistemic" for other in others]
        columns = ["method", "NLL", "accuracy", "ECE", *detections, "s", "s tuning", "s predicting", "chosen"]
        rows = [line(r, others) for r in results if r["set"] == name]
        blocks.append(f"### {name}\n\n{markdown(columns, rows)}")
    return "\n".join(blocks)


def line(result: dict[str, Any], others: tuple[str, ...]) -> list[str]:
    """A method's row."""
    if "failed" in result:
        return [result["method"], "failed", *[""] * (len(others) + 6)]
    return [
        result["method"],
        f"{result['nll']:.4f}",
        f"{result['accuracy']:.4f}",
        f"{result['ece']:.4f}",
        *(", ".join(f"{value:.3f}" for value in result["auroc"][other]) for other in others),
        f"{result['seconds']:.0f}",
        f"{result['tuning_seconds']:.0f}",
        f"{result['predict_seconds']:.1f}",
        settings([result]),
    ]


if __name__ == "__main__":
    main()
