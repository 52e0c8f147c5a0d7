"""Cheap posteriors side by side on UCI regression: one network, one budget of epochs, one budget of tuning.

    python benchmarks/comparison/regression.py --data ../shared/data/uci

One hidden layer of 50 relu units, float32, inputs and target standardised on the training rows; weights
N(0, w_std^2 / fan_in), biases N(0, 1), noise LogNormal(-1.2, 1) in units of the target's standard deviation. A
training of one member is at most 400 epochs of mini-batches of 100 rows, by Adam at 0.01 where the method has no
optimiser of its own; the Kalman filter makes its one pass. On every split each method tries four settings on 80% of
the training rows: two scales of the prior (1 and 4) and two choices of what matters most to it; the one with the best
log likelihood of the other 20% is fitted to all training rows and predicts the test rows. Ensembles have five members,
methods that draw weights predict with 50. Seconds are processor time of one thread: of the chosen fit, and of all the
tries.

Every finished fit is a line of ``regression.jsonl``; a second run goes on where the first stopped, and ``--table``
writes regression.md from what is in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from catalogue import Budget, Candidate, candidates
from ledger import append, markdown, options_of, preface, read, settings, spread
from trial import tuned

import bayesdl as bdl
from bayesdl.errors import BayesdlError
from bayesdl.evaluate import metrics

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "regression.jsonl", HERE / "regression.md"
SETS = ("boston", "yacht", "energy", "concrete")
BUDGET = Budget(epochs=400, batch_size=100, learning_rate=0.01, w_std=(1.0, 4.0))
PUBLISHED = {
    "boston": {"MCDropout": (-2.40, 0.04), "DeepEnsemble": (-2.41, 0.06), "MeanFieldVI": (-2.64, 0.09)},
    "concrete": {"MCDropout": (-2.93, 0.02), "DeepEnsemble": (-3.06, 0.04), "MeanFieldVI": (-3.26, 0.04)},
    "energy": {"MCDropout": (-1.21, 0.01), "DeepEnsemble": (-1.38, 0.05), "MeanFieldVI": (-1.56, 0.11)},
    "yacht": {"MCDropout": (-1.25, 0.015), "DeepEnsemble": (-1.18, 0.05), "MeanFieldVI": (-1.45, 0.02)},
}
"""Mean test log likelihood and its standard error over the same 20 splits (deviations over splits divided by sqrt 20).

MC dropout: Gal's repository, tuned on a validation part of each split, 4,000 epochs. Ensembles of 5 with learnt
variances, 40 epochs: Lakshminarayanan et al. (2017), table 1. Mean-field VI: a public re-run of Bayes by backprop.
"""

COLUMNS = (
    *("method", "splits", "log likelihood", "less MAP", "published", "RMSE", "90% covers", "s", "s tuning"),
    "chosen most",
)


def main() -> None:
    """Run what is missing within the time, then write the table."""
    parser = options_of(__doc__, "uci", SETS)
    parser.add_argument("--splits", type=int, default=20, help="splits of a set at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        run(options)
    TABLE.write_text(table(read(RESULTS)))
    print(TABLE.read_text())


def run(options: argparse.Namespace) -> None:
    """What is missing, one split of every set after the other."""
    began = time.perf_counter()
    done = {(r["set"], r["method"], r["split"]) for r in read(RESULTS)}
    data = {name: bdl.data.read_uci(options.data / name) for name in options.sets}
    for split in range(options.splits):
        for name in options.sets:
            rows = data[name].split(split)
            for method, choices in candidates(BUDGET, len(rows.train), "regression").items():
                if (name, method, split) in done or (options.methods and method not in options.methods):
                    continue
                if time.perf_counter() - began > 60 * options.minutes:
                    return
                result = {"set": name, "method": method, "split": split} | one(rows, choices, split)
                append(RESULTS, result)
                print(
                    f"{name} split {split} {method}: {result.get('log_likelihood', result.get('failed'))}", flush=True
                )


def one(data: bdl.Dataset, choices: list[Candidate], split: int) -> dict[str, Any]:
    """Tune and fit one method on one split, and predict its test rows."""

    def make(candidate: Candidate) -> bdl.BayesianNetwork:
        prior = bdl.priors.Normal("fan_in", w_std=candidate.w_std)
        model = bdl.models.mlp(data, hidden=(50,), activation="relu", prior=prior, dropout=candidate.dropout)
        return model.to(torch.float32)

    try:
        posterior, known = tuned(make, choices, data.train, split, BUDGET.draws)
    except BayesdlError as error:
        return {"failed": str(error)}
    prediction = posterior.predict(data.test.x, max_draws=BUDGET.draws)
    return known | {
        "log_likelihood": float(prediction.log_prob(data.test.y).mean()),
        "rmse": metrics.rmse(prediction, data.test.y),
        "coverage": metrics.coverage(prediction, data.test.y),
        "torch": str(torch.__version__),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Means and standard errors over the splits, beside the published figures."""
    blocks = [f"## Cheap posteriors on UCI regression\n\n{preface(__doc__)}\n"]
    for name in SETS:
        mine = [r for r in results if r["set"] == name]
        methods = dict.fromkeys(r["method"] for r in mine)
        rows = [line(name, method, [r for r in mine if r["method"] == method], mine) for method in methods]
        blocks.append(f"### {name}\n\n{markdown(COLUMNS, rows)}")
    return "\n".join(blocks)


def line(name: str, method: str, found: list[dict[str, Any]], all_of_set: list[dict[str, Any]]) -> list[str]:
    """A method's row."""
    good = [r for r in found if "log_likelihood" in r]
    base = {r["split"]: r["log_likelihood"] for r in all_of_set if r["method"] == "MAP"}
    gains = [r["log_likelihood"] - base[r["split"]] for r in good if r["split"] in base]
    published = PUBLISHED[name].get(method)
    return [
        method,
        str(len(good)) + (f" ({len(found) - len(good)} failed)" if len(good) < len(found) else ""),
        spread([r["log_likelihood"] for r in good]),
        "" if method == "MAP" else spread(gains, sign=True),
        f"{published[0]:.2f} ± {published[1]:.2f}" if published else "",
        spread([r["rmse"] for r in good]),
        f"{statistics.mean(r['coverage'] for r in good):.3f}" if good else "",
        f"{statistics.mean(r['seconds'] for r in good):.1f}" if good else "",
        f"{statistics.mean(r['tuning_seconds'] for r in good):.1f}" if good else "",
        settings(good) if good else "",
    ]


if __name__ == "__main__":
    main()
