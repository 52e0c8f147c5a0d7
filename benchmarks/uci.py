"""Test log likelihoods of network posteriors on UCI regression, over the literature's standard splits.

    python benchmarks/uci.py --data ../shared/data/uci --sets yacht boston --methods MCLMC

One hidden layer of 50 tanh units, float32, inputs and target standardised on the training rows; weights
N(0, 4/fan_in), biases N(0, 1), noise LogNormal(-1.2, 1) in units of the target's standard deviation, the same for all
sets (the 4 is the best of {1, 4, 16} on the first split of concrete). Chains start from the members of a deep ensemble
(one MAP run each from its own initialisation). Log likelihoods are per test row, of the posterior mixture, in the
target's raw units; seconds are processor time. Every finished split is a line of ``uci.jsonl``; a second run goes on
where the first stopped, and ``--table`` prints what is in.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

import bayesdl as bdl
from bayesdl.posterior.convergence import rhat

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "uci.jsonl", HERE / "uci.md"
SETS = ("yacht", "boston", "energy", "concrete", "airfoil")
METHODS: dict[str, bdl.Method] = {
    "MAP": bdl.MAP(steps=500, learning_rate=0.05),
    "DeepEnsemble": bdl.DeepEnsemble(members=10, steps=500, learning_rate=0.05),
    "MCLMC": bdl.MCLMC(chains=8, warmup=120, draws=40, metric="low_rank"),
}
PUBLISHED = {
    "boston": (-2.40, "MC dropout, tuned (Gal's repository)"),
    "concrete": (-2.93, "MC dropout, tuned (Gal's repository)"),
    "energy": (-1.21, "MC dropout, tuned (Gal's repository)"),
    "yacht": (-1.18, "deep ensemble (Lakshminarayanan et al., 2017, table 1)"),
}
"""Best mean test log likelihood that could be read at its source."""
ORIENTATION = {
    "HMC, bars of a figure of Izmailov et al. (2021)": {
        "boston": -2.39, "concrete": -2.67, "energy": -1.07, "yacht": 0.56,
    },
    "HMC, after Bui et al. (2016), from memory": {"boston": -2.27, "concrete": -2.72, "energy": -0.93, "yacht": -1.62},
}  # fmt: skip
"""HMC elsewhere, under other noise priors, on which these figures depend strongly; not to be relied on."""


def main() -> None:
    """Run what is missing within the time, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data" / "uci")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--splits", type=int, default=20, help="splits of a set at most")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no split after so long")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, results = time.perf_counter(), read()
    if not arguments.table:
        done = {(r["set"], r["method"], r["split"]) for r in results}
        for name in arguments.sets:
            data = bdl.data.read_uci(arguments.data / name)
            for split in range(min(arguments.splits, len(data.splits))):
                for method in arguments.methods:
                    if (name, method, split) in done:
                        continue
                    if time.perf_counter() - started > 60 * arguments.minutes:
                        break
                    result = one(data.split(split), name, method, split)
                    results.append(result)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                    print(f"{name} {method} split {split}: {result['log_likelihood']:.3f}, {result['seconds']:.0f} s")
    TABLE.write_text(table(results))
    print(TABLE.read_text())


def one(data: bdl.Dataset, name: str, method: str, split: int) -> dict[str, Any]:
    """Fit one split and predict its test rows."""
    prior = bdl.priors.Normal("fan_in", w_std=2.0)
    model = bdl.models.mlp(data, hidden=(50,), activation="tanh", prior=prior).to(torch.float32)
    started = time.process_time()
    chosen = METHODS[method]
    init = "map" if hasattr(chosen, "warmup") else None
    posterior: Any = chosen.fit(model, data.train, seed=split, init=init, progress=False)
    seconds = time.process_time() - started
    prediction = posterior.predict(data.test.x)
    result = {
        "set": name,
        "method": method,
        "split": split,
        "settings": posterior.info["settings"],
        "log_likelihood": float(prediction.log_prob(data.test.y).mean()),
        "rmse": float((prediction.mean - data.test.y).square().mean().sqrt()),
        "seconds": seconds,
        "gradients": posterior.info["gradients"],
        "torch": str(torch.__version__),
        "machine": f"{platform.machine()}, one thread",
    }
    if init:
        functions = posterior.function_draws(data.test.x)
        result["rhat"] = float(rhat(functions).max())
        result["divergences"] = posterior.info.get("divergences")
    return result


def read() -> list[dict[str, Any]]:
    """The splits that are in."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard error over the splits, beside the published figures."""
    blocks = []
    for name in SETS:
        mine = [r for r in results if r["set"] == name]
        rows = []
        for method in METHODS:
            found = sorted((r for r in mine if r["method"] == method), key=lambda r: r["split"])
            if not found:
                continue
            values = [r["log_likelihood"] for r in found]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            paired = differences(mine, method)
            rows.append(
                [
                    method,
                    str(len(found)),
                    f"{statistics.mean(values):.3f} ± {error:.3f}",
                    paired,
                    f"{statistics.mean(r['rmse'] for r in found):.3f}",
                    rhats(found),
                    f"{statistics.mean(r['seconds'] for r in found):.0f}",
                ]
            )
        if rows:
            columns = ["method", "splits", "log likelihood", "less DeepEnsemble", "RMSE", "R-hat (median)", "s a split"]
            head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
            body = "".join("| " + " | ".join(row) + " |\n" for row in rows)
            blocks.append(f"## {name}\n\n{elsewhere(name)}\n\n{head}{body}")
    preface = textwrap.fill(" ".join((__doc__ or "").split("\n\n")[2].split()), 120)
    return f"# Network posteriors on UCI regression\n\n{preface}\n\n" + "\n".join(blocks)


def elsewhere(name: str) -> str:
    """What others report on a set, in a sentence."""
    if name not in PUBLISHED:
        return "There is no figure to compare with that could be read at its source."
    value, source = PUBLISHED[name]
    others = "; ".join(f"{who} {figures[name]}" for who, figures in ORIENTATION.items())
    return textwrap.fill(f"To beat: {value}, {source}. For orientation: {others}.", 120)


def rhats(results: list[dict[str, Any]]) -> str:
    """Median over the splits of the largest R-hat of the function values, where there are chains."""
    known = [r["rhat"] for r in results if "rhat" in r]
    return f"{statistics.median(known):.2f}" if known else ""


def differences(results: list[dict[str, Any]], method: str) -> str:
    """Mean paired difference of the log likelihood to the deep ensemble, with its standard error."""
    base = {r["split"]: r["log_likelihood"] for r in results if r["method"] == "DeepEnsemble"}
    each = [r["log_likelihood"] - base[r["split"]] for r in results if r["method"] == method and r["split"] in base]
    if method == "DeepEnsemble" or len(each) < 2:
        return ""
    return f"{statistics.mean(each):+.3f} ± {statistics.stdev(each) / math.sqrt(len(each)):.3f}"


if __name__ == "__main__":
    main()
