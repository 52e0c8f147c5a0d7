"""How close is each cheap posterior to the posterior? Agreement and total variation to long chains.

    python benchmarks/comparison/fidelity.py

A 64-16-10 tanh network (1,210 weights) in float32 on the 1,438 training images of `digits`, weights N(0, w_std^2 /
fan_in), biases N(0, 1), under a narrow prior, w_std = 1, which the data hardly outweigh, and a wide one, w_std = 4. The
reference is ChEES-HMC: 16 chains from independent prior draws, 500 transitions of warm-up, 1,000 draws each. Its two
halves of eight chains, compared with each other, show what chance leaves. Every method has the same prior, at most 400
epochs of mini-batches of 100 rows for a training of one member (Adam at 0.01), and two settings, of which the one with
the better log likelihood of 20% of the training rows is taken. Agreement: share of rows with the same most probable
class; total variation: half the sum over the classes of the differences in probability, averaged over the rows
(Izmailov et al., 2021). "Turned" are the same 359 test images turned by a right angle, which no method has seen.
Predictions are of 800 draws of the reference and 50 of the methods. Seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from catalogue import Budget, Candidate, candidates
from ledger import markdown, preface, settings
from trial import tuned

import bayesdl as bdl
from bayesdl.errors import BayesdlError
from bayesdl.evaluate import agreement, calibration, metrics, total_variation
from bayesdl.posterior.convergence import rhat

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "fidelity.json", HERE / "fidelity.md"
BUDGET = Budget(epochs=400, batch_size=100, learning_rate=0.01, w_std=(1.0, 4.0), last_layer="3.*")
REFERENCE = bdl.ChEES(chains=16, warmup=500, draws=1000)
DRAWS = 800
COLUMNS = (
    *("posterior", "agreement", "total variation", "turned: agreement", "total variation", "NLL", "accuracy", "ECE"),
    *("s", "chosen"),
)


def main() -> None:
    """Run all of it, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        RESULTS.write_text(json.dumps({w_std: run(w_std) for w_std in BUDGET.w_std}, indent=1) + "\n")
    TABLE.write_text(table(json.loads(RESULTS.read_text())))
    print(TABLE.read_text())


def run(w_std: float) -> list[dict[str, Any]]:
    """A result for the reference, and for every method, under one prior."""
    digits = bdl.data.load("digits")
    # As images all pixels have one scale; as columns those that are nearly always empty would have enormous ones.
    data = bdl.Dataset.from_arrays(digits.x.reshape(-1, 1, 8, 8), digits.y, splits=digits.splits)
    inputs = {"test": data.test.x, "turned": data.test.x.rot90(1, (2, 3))}

    def make(candidate: Candidate) -> bdl.BayesianNetwork:
        prior = bdl.priors.Normal("fan_in", w_std=candidate.w_std)
        model = bdl.models.mlp(data, hidden=(16,), activation="tanh", prior=prior, dropout=candidate.dropout)
        return model.to(torch.float32)

    began = time.process_time()
    chains: Any = REFERENCE.fit(make(Candidate(REFERENCE, w_std)), data.train, seed=0, init="prior", progress=True)
    seconds = time.process_time() - began
    whole = {name: chains.predict(x, max_draws=DRAWS) for name, x in inputs.items()}
    halves = [half_of(chains, part) for part in (slice(0, 8), slice(8, 16))]
    one, other = ({name: half.predict(x, max_draws=DRAWS) for name, x in inputs.items()} for half in halves)
    mixing = float(rhat(chains.function_draws(data.test.x)).max())
    reference = {"method": "HMC, half against half", "seconds": seconds, "rhat": mixing, "chosen": {}}
    results = [reference | compared(one, other, data.test.y)]
    for method, choices in candidates(replace(BUDGET, w_std=(w_std,)), len(data.train), "classification").items():
        try:
            posterior, known = tuned(make, choices, data.train, 0, BUDGET.draws)
        except BayesdlError as error:
            results.append({"method": method, "failed": str(error)})
            continue
        found = {name: posterior.predict(x, max_draws=BUDGET.draws) for name, x in inputs.items()}
        results.append({"method": method} | known | compared(found, whole, data.test.y))
        print(f"{method}: total variation {results[-1]['test'][1]:.3f}", flush=True)
    return results


def half_of(posterior: Any, part: slice) -> bdl.Posterior:
    """A posterior of some of the chains."""
    return bdl.posterior.DrawsPosterior(posterior.problem, posterior.unconstrained_by_chain()[part], {}, posterior.info)


def compared(found: dict[str, Any], reference: dict[str, Any], y: torch.Tensor) -> dict[str, Any]:
    """Distances on both sets of inputs, and scores on the test rows."""
    test = found["test"]
    distances = {
        name: [agreement(found[name], reference[name]), total_variation(found[name], reference[name])] for name in found
    }
    scores = {"nll": metrics.nll(test, y), "accuracy": metrics.accuracy(test, y), "ece": calibration.ece(test, y)}
    return distances | scores


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A block for each prior."""
    blocks = [f"## Cheap posteriors beside long chains\n\n{preface(__doc__)}\n"]
    return "\n".join(blocks + [f"### w_std = {float(w_std):g}\n\n{block(rows)}" for w_std, rows in results.items()])


def block(results: list[dict[str, Any]]) -> str:
    """The closest first."""
    good = sorted((r for r in results if "failed" not in r), key=lambda r: r["test"][1])
    rows = [
        [
            r["method"],
            *(f"{value:.3f}" for value in (*r["test"], *r["turned"], r["nll"], r["accuracy"], r["ece"])),
            f"{r['seconds']:.1f}",
            settings([r]) if r["chosen"] else "",
        ]
        for r in good
    ]
    failed = "".join(f"\n{r['method']} failed: {r['failed']}\n" for r in results if "failed" in r)
    mixing = f"R-hat of the reference's function values on the test rows: {results[0]['rhat']:.3f} at most.\n"
    return f"{markdown(COLUMNS, rows)}\n{mixing}{failed}"


if __name__ == "__main__":
    main()
