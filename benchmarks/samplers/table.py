"""Make `samplers.md` of `results.jsonl`: ``python benchmarks/samplers/table.py``.

Ratios are taken run by run, in the same round and with the same seed, against the peer whose median is best. We are
'ahead' where the median ratio and its lower quartile are both above 1.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from catalogue import CATALOGUE
from run import RESULTS

Record = dict[str, Any]
CONVERGED = 1.05
"""R-hat in function space from which on a run's effective sample size is not believed, and counts as 0."""
TITLES = {
    "network": "Network 10-50-1 tanh on `diabetes`",
    "logistic": "Hierarchical logistic regression on `breast_cancer`",
}
RATES = {
    "ess_per_s": "after warm-up, without compilation",
    "ess_per_s_with_warmup": "with warm-up, without compilation",
    "ess_per_s_with_all": "with warm-up and compilation",
}


def read(path: Path) -> list[Record]:
    """Full-length runs with the settings that the catalogue has today, those that failed among them."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        record
        for record in records
        if record["scale"] == 1.0
        and record["sampler"] in CATALOGUE
        and record["arguments"] == CATALOGUE[record["sampler"]].arguments(record["work"], 1.0)
    ]


def rate(record: Record, name: str) -> float:
    """An effective sample size per second, 0 where the chains do not agree."""
    return float(record[name]) if record.get("rhat", np.inf) < CONVERGED else 0.0


def grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Runs by sampler, in the catalogue's order."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record["sampler"]].append(record)
    return {name: found[name] for name in CATALOGUE if name in found}


def middle(values: Iterable[float | None], digits: int = 3) -> str:
    """Median with some significant digits; a dash where there is none."""
    known = [value for value in values if value is not None]
    return number(float(np.median(known)), digits) if known else "-"


def number(value: float, digits: int = 3) -> str:
    """A figure with some significant digits and no exponent."""
    if not np.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{round(value, digits - 1 - int(np.floor(np.log10(abs(value))))):,.{places}f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    head = ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] + ["---:"] * (len(columns) - 1)) + " |"]
    return [*head, *("| " + " | ".join(row) + " |" for row in rows), ""]


def pairs(ours: list[Record], theirs: list[Record], name: str, smaller_is_better: bool = False) -> np.ndarray:
    """Ratios ours/theirs of runs with the same round and seed; above 1 is better for us."""
    other = {(record["round"], record["seed"]): record for record in theirs}
    ratios = []
    for record in ours:
        match = other.get((record["round"], record["seed"]))
        if match is None:
            continue
        if smaller_is_better:
            ratios.append(match[name] / record[name])
        else:
            mine, peer = rate(record, name), rate(match, name)
            ratios.append(mine / peer if peer else np.inf * mine if mine else 0.0)
    return np.array(ratios)


def verdict(ratios: np.ndarray) -> list[str]:
    """Runs, median, lower quartile, and the word."""
    median, quartile = float(np.median(ratios)), float(np.quantile(ratios, 0.25))
    word = "ahead" if min(median, quartile) > 1 else "behind" if median < 1 else "undecided"
    return [str(len(ratios)), number(median), number(quartile), word]


def samplers(groups: dict[str, list[Record]]) -> list[str]:
    """Figures of each sampler on one work."""
    rows = []
    for name, runs in groups.items():
        judged = [run for run in runs if run["finite"]]
        rates = [rate(run, "ess_per_s") for run in judged]
        rows.append([
            name, str(len(runs)), middle(run["us_per_gradient"] for run in runs),
            middle(run["ess_per_1000_gradients"] for run in judged), middle(rates),
            " to ".join(number(float(np.quantile(rates, q))) for q in (0.25, 0.75)) if rates else "-",
            middle(rate(run, "ess_per_s_with_warmup") for run in judged), middle(run["wall_compile_s"] for run in runs),
            middle((run["rhat"] for run in judged), 4), str(sum(run["divergences"] or 0 for run in runs)),
            middle((run["log_likelihood_mean"] for run in judged), 5),
            middle(run["log_likelihood_se"] for run in judged),
            middle(run["wall_sampling_s"] / run["sampling_s"] for run in runs),
        ])  # fmt: skip
    columns = ["sampler", "runs", "us/gradient", "ESS/1,000 gradients", "ESS/s", "quartiles", "with warm-up"]
    return table([*columns, "compile s", "R-hat", "divergences", "log lik.", "SE", "wall/CPU"], rows)


def comparison(groups: dict[str, list[Record]]) -> list[str]:
    """Our samplers against the best peer, and against the peer of the same kind."""
    kinds = {name: CATALOGUE[name] for name in groups}
    ours = [name for name, entry in kinds.items() if entry.package == "bayesdl"]
    peers = [name for name, entry in kinds.items() if entry.package != "bayesdl"]
    if not ours or not peers:
        return ["No runs to compare yet.", ""]
    rows = []
    for field, words in RATES.items():

        def level(name: str, field: str = field) -> float:
            return float(np.median([rate(run, field) for run in groups[name]]))

        best_peer, best = max(peers, key=level), max(ours, key=level)
        rows += row(groups, best, best_peer, field, f"best against best, {words}")
    for name in ours:
        alike = [peer for peer in peers if kinds[peer].like == kinds[name].like]
        if alike:
            peer = max(alike, key=lambda p: float(np.median([rate(run, "ess_per_s") for run in groups[p]])))
            rows += row(groups, name, peer, "ess_per_s", "like for like, after warm-up")
            rows += row(groups, name, peer, "us_per_gradient", "us per gradient", smaller_is_better=True)
    return table(["bayesdl", "peer", "what", "pairs", "median ratio", "lower quartile", "verdict"], rows)


def row(
    groups: dict[str, list[Record]], name: str, peer: str, field: str, words: str, smaller_is_better: bool = False
) -> list[list[str]]:
    """One line of the comparison, or none without common rounds."""
    ratios = pairs(groups[name], groups[peer], field, smaller_is_better)
    return [[name, peer, words, *verdict(ratios)]] if len(ratios) else []


def gradients(groups: dict[str, list[Record]]) -> list[str]:
    """The bare leapfrog loop by number of chains."""
    rows = []
    for chains in (1, 4, 16, 64):
        ours, theirs = groups.get(f"bayesdl leapfrog x{chains}", []), groups.get(f"jax leapfrog x{chains}", [])
        if ours and theirs:
            ratios = pairs(ours, theirs, "us_per_gradient", smaller_is_better=True)
            fields = ("us_per_gradient", "wall_compile_s")
            both = [middle(run[field] for run in runs) for field in fields for runs in (ours, theirs)]
            rows.append([str(chains), *both, *(verdict(ratios) if len(ratios) else ["0", "-", "-", "-"])])
    columns = ["chains", "bayesdl us", "JAX us", "bayesdl compile s", "JAX compile s", "pairs"]
    return table([*columns, "ratio JAX/bayesdl", "lower quartile", "verdict"], rows)


def own_cost(groups: dict[str, list[Record]]) -> list[str]:
    """What our samplers cost besides their gradients: their time over that of as many gradients in a bare loop."""
    rows = []
    for name, runs in groups.items():
        entry = CATALOGUE[name]
        if entry.package != "bayesdl" or entry.kind != "sampler":
            continue
        chains = entry.settings["chains"]
        bare = [run["us_per_bare_gradient"] for run in groups.get(f"bayesdl leapfrog x{chains}", [])]
        if bare:
            computed = [run["sampling_s"] / run["settings"]["gradients_computed"] for run in runs]
            useful = [run["gradients"] / run["settings"]["gradients_computed"] for run in runs]
            percent = 100 * (1e6 * np.median(computed) / np.median(bare) - 1), 100 * np.median(useful)
            rows.append([name, str(len(runs)), f"{percent[0]:.1f}%", f"{percent[1]:.0f}%"])
    columns = ["sampler", "runs", "time over that of its gradients alone", "gradients that belong to a trajectory"]
    return table(columns, rows)


def pyro_scaled(groups: dict[str, list[Record]]) -> list[str]:
    """Pyro's effective sample size per second, scaled from NumPyro's, which runs the same algorithm."""
    pyro = [name for name in groups if CATALOGUE[name].package == "pyro"]
    same = groups.get("numpyro NUTS x1", [])
    if not pyro or not same:
        return []
    per_gradient = float(np.median([run["ess_per_1000_gradients"] for run in same])) / 1000
    lines = []
    for name in pyro:
        cost = float(np.median([run["us_per_gradient"] for run in groups[name]]))
        lines.append(
            f"{name} is run for a few transitions of short trajectories, so its ESS/s above means nothing. Scaled: at "
            f"{number(cost)} us per gradient and the {number(per_gradient)} effective draws per gradient of NumPyro's "
            f"NUTS, which is the same algorithm, it would give {number(1e6 * per_gradient / cost)} ESS/s."
        )
    return [*lines, ""]


def machines(records: list[Record]) -> list[str]:
    """Hardware and versions, and the commits that were measured on them."""
    commits: dict[str, set[str]] = defaultdict(set)
    for record in records:
        hardware, versions = record["hardware"], dict(record["versions"])
        commit = versions.pop("commit")
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        commits[f"{hardware['processor']}, {hardware['cores']} cores. {packages}."].add(commit)
    return [line for about in sorted(commits) for line in (f"{about} Commits {', '.join(sorted(commits[about]))}.", "")]


def section(title: str, rows: list[str]) -> list[str]:
    """A table under its title, or nothing where it has no rows."""
    return [title, "", *rows] if len(rows) > len(table([""], [])) else []


def page(path: Path) -> str:
    """The whole page."""
    everything = read(path)
    records = [record for record in everything if "failed" not in record]
    failed = [record for record in everything if "failed" in record]
    lines = [(Path(__file__).parent / "preface.md").read_text().rstrip(), ""]
    lines += machines(records)
    loads = [load for record in records for load in record["load"]]
    if loads:
        lines += [f"Load average during the runs: {min(loads):.1f} to {max(loads):.1f}.", ""]
    for work, title in TITLES.items():
        groups = grouped(record for record in records if record["work"] == work)
        runs = {name: r for name, r in groups.items() if CATALOGUE[name].kind == "sampler"}
        if not groups:
            continue
        lines += [f"## {title}", ""]
        if runs:
            lines += [*samplers(runs), *pyro_scaled(runs), "### Ratios", "", *comparison(runs)]
            lines += section("### Own cost", own_cost(groups))
        lines += section("### Bare leapfrog", gradients(groups))
    if failed:
        lines += ["## Runs that failed", ""]
        lines += [f"- {r['work']}, {r['sampler']}, round {r['round']}, seed {r['seed']}: {r['failed']}" for r in failed]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "samplers.md")
    options = parser.parse_args()
    options.out.write_text(page(options.results))
    print(f"wrote {options.out}")
