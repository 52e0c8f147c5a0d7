"""Samplers against posteriordb's gold-standard draws, and what the same judgement says of wrong samplers.

    python benchmarks/posteriordb.py [--only garch] [--methods NUTS] [--draws 2000] [--render]

Every fit is written to ``posteriordb.json`` as it ends and is not made again, so the script can be stopped and goes on
where it was; ``posteriordb.md`` is written anew each time from what is in. The reference draws are looked for as in the
tests (``BAYESDL_REFERENCE``, by default ``../shared``); programs, judgement and wrong samplers are those of
``tests/posteriordb``. One thread; seconds are processor time, so that other work on the machine does not enter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bayesdl as bdl  # noqa: E402
from bayesdl.infer.sampler import Sampler  # noqa: E402
from bayesdl.posterior import prepare  # noqa: E402
from tests.posteriordb import mutations, target  # noqa: E402
from tests.posteriordb.budgets import METHODS, method  # noqa: E402
from tests.posteriordb.exact import PRIORS, exact  # noqa: E402
from tests.posteriordb.judgement import Reference, judge  # noqa: E402
from tests.posteriordb.programs import ENTRIES, load  # noqa: E402

SHARED = (ROOT / os.environ.get("BAYESDL_REFERENCE", "../shared")).resolve()
RECORDS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).with_suffix(".md")
RIGHT = "right"
CHECKED = {"no Jacobian": mutations.NoJacobian, "gradient x 1.05": mutations.SteepGradient}
"""Mutations of the target, which a check of the target sees."""


def one(posterior: str, sampler: Sampler, mutation: str, seed: int = 0) -> dict[str, Any]:
    """Fit, judge, and say what was found."""
    entry, (raw, file) = ENTRIES[posterior], load(SHARED, posterior)
    data = entry.data(raw)
    wrong = mutation != RIGHT
    # Wrong samplers start where the posterior is: what they get wrong is then not a matter of their warm-up.
    init = entry.sites(target.spread_out(file["draws"], sampler.chains), raw) if wrong else None
    made = mutations.MUTATIONS[mutation](sampler) if wrong else sampler
    started = time.process_time()
    fitted = bdl.fit(entry.program, data, made, seed=seed, init=init, progress=False)
    seconds = time.process_time() - started
    scalars = entry.scalars(fitted.draws_by_chain(), raw)
    judgement = judge(scalars, Reference.of_draws(file))
    density = prepare(entry.program, data).density
    if mutation in CHECKED:
        density = mutations.changed(density, CHECKED[mutation])
    found = {
        "posterior": posterior,
        "method": sampler.name,
        "mutation": mutation,
        "settings": sampler.settings(),
        "worst": judgement.worst,
        "z": judgement.largest,
        "bulk": float(judgement.bulk.min()),
        "tail": float(judgement.tail.min()),
        "rhat": float(judgement.rhat.max()),
        "failures": judgement.failures(),
        "target": target.mismatch(posterior, raw, density, target.spread_out(file["draws"], 8)).wrong,
        "divergences": fitted.info.get("divergences"),
        "gradients": fitted.info["gradients"] // sampler.chains,
        "seconds": seconds,
    }
    if posterior in PRIORS:
        precise = judge(scalars, exact(posterior, raw, list(judgement.names)))
        found |= {"exact z": precise.largest, "exact wrong": precise.wrong}
    return found


def main() -> None:
    """Fit what is not in yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the posteriors' names")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--mutations", nargs="*", default=[RIGHT, *mutations.MUTATIONS])
    parser.add_argument("--render", action="store_true", help="write the page alone")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    records: dict[str, Any] = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    names = [name for name in ENTRIES if not chosen.only or any(part in name for part in chosen.only)]
    tasks = [(m, kind, name) for m in chosen.mutations for kind in chosen.methods for name in names]
    for mutation, kind, name in [] if chosen.render else tasks:
        key = "/".join((mutation, kind, name))
        if key not in records:
            records[key] = one(name, method(kind, name, draws=chosen.draws), mutation)
            RECORDS.write_text(json.dumps(records, indent=1))
            print(f"{len(records)} in: {key}: {records[key]['failures'] or 'passes'}", flush=True)
    PAGE.write_text(page(list(records.values())))


def page(records: list[dict[str, Any]]) -> str:
    """The page in Markdown."""
    right = [record for record in records if record["mutation"] == RIGHT]
    wrong = [record for record in records if record["mutation"] != RIGHT]
    hardware = f"{platform.machine()}, one thread; torch {torch.__version__}, pyro-ppl {pyro.__version__}"
    parts = [HEAD.format(hardware=hardware), _right_table(right), POWER]
    parts += [_count(mutation, wrong) for mutation in mutations.MUTATIONS]
    return "\n".join([*parts, "", _wrong_table(wrong)])


HEAD = """# Gold-standard posteriors

`python benchmarks/posteriordb.py` on {hardware}.

Each of posteriordb's posteriors, written as a Pyro program (`tests/posteriordb/programs.py`), against its reference
draws: mean, sd and five quantiles of every scalar, in standard errors of both sides together. *z* is the largest of
them; *exact z* compares with the posterior itself, which is known by quadrature for six linear regressions. A row
passes with |z| < 4, bulk and tail ESS of every scalar at least 400, and R-hat below 1.01. Gradients are per chain,
warm-up included; seconds are processor time, compilation included.
"""
POWER = """
## What the judgement says of wrong samplers

The same samplers, started at reference draws, with one thing wrong.

- *no Jacobian*: the target is the log joint without log |det J|. In a regression on n rows that moves log sigma by
  1 / (2n), which is 1 / sqrt(2n) posterior sd. The reference draws know a mean to 1 / 100 sd, so that no number of
  draws can tell the four regressions with n > 400 apart at four standard errors. The exact posterior can where the
  sampler's own draws are enough, and the check of the target always.
- *gradient x 1.05*: the value is kept. A Metropolis-adjusted sampler with it has the right stationary law: leapfrog
  steps along any force are reversible and keep volume, and points are weighed by the right value. Its draws are right,
  and no judgement of draws can object; the check of the target does.
- *no refreshment*: every transition of a chain begins with the chain's first momentum.

*By draws*: the judgement above, against reference draws or exact values. *Target*: value and gradient of the function
that the sampler is given, against a density in numpy and central differences (`tests/posteriordb/target.py`).
"""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, rule, *rows]) + "\n"


def _exact(record: dict[str, Any]) -> str:
    return f"{record['exact z']:.1f}" if "exact z" in record else ""


def _draws_fail(record: dict[str, Any]) -> bool:
    return bool(record["failures"]) or record.get("exact wrong", False)


def _right_table(records: list[dict[str, Any]]) -> str:
    columns = ["posterior", "method", "chains x draws", "warm-up", "target", "metric", "z", "exact z", "bulk ESS"]
    columns += ["tail ESS", "R-hat", "divergences", "gradients", "seconds", ""]
    rows = []
    for record in records:
        settings = record["settings"]
        rows.append([
            record["posterior"].split("-")[-1], record["method"], f"{settings['chains']} x {settings['draws']}",
            str(settings["warmup"]), f"{settings['target_accept']:g}", str(settings["metric"]), f"{record['z']:.1f}",
            _exact(record), f"{record['bulk']:.0f}", f"{record['tail']:.0f}", f"{record['rhat']:.4f}",
            str(record["divergences"]), str(record["gradients"]), f"{record['seconds']:.0f}",
            "fails" if _draws_fail(record) or record["target"] else "passes",
        ])  # fmt: skip
    return _table(columns, rows)


def _count(mutation: str, records: list[dict[str, Any]]) -> str:
    mine = [record for record in records if record["mutation"] == mutation]
    draws = sum(_draws_fail(record) for record in mine)
    either = sum(_draws_fail(record) or record["target"] for record in mine)
    gold = sum(bool(record["failures"]) for record in mine)
    return (
        f"- **{mutation}**: of {len(mine)} fits, {gold} fail against the reference draws, {draws} against these or the "
        f"exact values, {either} with the check of the target."
    )


def _wrong_table(records: list[dict[str, Any]]) -> str:
    columns = ["posterior", "wrong", "z", "exact z", "bulk ESS", "R-hat", "by draws", "target"]
    rows = [
        [
            record["posterior"].split("-")[-1], record["mutation"], f"{record['z']:.1f}", _exact(record),
            f"{record['bulk']:.0f}", f"{record['rhat']:.3f}", "fails" if _draws_fail(record) else "passes",
            "fails" if record["target"] else "passes",
        ]
        for record in records
    ]  # fmt: skip
    return _table(columns, rows)


if __name__ == "__main__":
    main()
