"""Recompute a certificate from its file with 50 digits: ``python verify.py cert.json [--data rows.csv]``.

This file needs Python and mpmath alone (NumPy for .npz data), and nothing else of bayesdl: who doubts a certificate
reads these lines. They check the arithmetic and the books: that the bound follows from risk, KL, n and delta by the
named theorem, rounded upwards; that counts, Monte-Carlo step, shares of delta and parts of the KL are consistent; that
no row is both counted and used for the prior; with --data that the rows are those of a file (CSV with the columns and
target of the ledger, or .npz with x and y). They cannot check what the file does not hold: that the losses and the KL
were measured rightly, and that rows are independent draws.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mpmath import mp, mpf

LOOSE = mpf("1e-9")  # how much a stated number may lie above the exact one
GRID = [mpf(2.0 ** (step / 2)) for step in range(-12, 9)]  # of Catoni's parameter
RATIO = mpf(1.15)  # of the grids of the empirical Bernstein bound


def smallest(holds: Callable[[mpf], bool], low: mpf, steps: int = 220) -> mpf:
    """The upper end of a bracket for the smallest p in [low, 1] from which on ``holds``."""
    high = mpf(1)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def kl_inverse(q: mpf, limit: mpf) -> mpf:
    """The largest p with kl(q || p) <= limit."""

    def beyond(p: mpf) -> bool:
        near = q * mp.log(q / p) if q else mpf(0)
        return p == 1 or near + ((1 - q) * mp.log((1 - q) / (1 - p)) if q < 1 else 0) >= limit

    return smallest(beyond, q)


def binomial(errors: int, n: int, delta: mpf) -> mpf:
    """The largest p with P(Bin(n, p) <= errors) >= delta."""

    def unlikely(p: mpf) -> bool:
        term = total = (1 - p) ** n
        for k in range(errors):
            term *= (n - k) * p / ((k + 1) * (1 - p))
            total += term
        return bool(total <= delta)

    return mpf(1) if errors == n else smallest(unlikely, mpf(errors) / n, 80)


def bernstein(r: mpf, kl: mpf, n: mpf, delta: mpf) -> mpf:
    """Tolstikhin and Seldin's bound with the largest variance that the risk allows."""
    e2, half = mp.e - 2, mp.log(2 / delta)
    nu1 = max(1, mp.ceil(mp.log(mp.sqrt(e2 * n / (4 * half))) / mp.log(RATIO)) + 1)
    nu2 = max(1, mp.ceil(mp.log((mp.sqrt((n - 1) / half + 1) + 1) / 2) / mp.log(RATIO)))
    k1, k2, worst = kl + mp.log(2 * nu1 / delta), kl + mp.log(2 * nu2 / delta), min(r, mpf(1) / 2)
    v = worst * (1 - worst) * n / (n - 1)
    v = min(mpf(1) / 4, v + (1 + RATIO) * mp.sqrt(v * k2 / (2 * (n - 1))) + 2 * RATIO * k2 / (n - 1))
    last = e2 * v + k1 / n
    return r + (last if k1 > e2 * v * n else min(last, (1 + RATIO) * mp.sqrt(e2 * v * k1 / n)))


def pac_bayes(theorem: str, r: mpf, kl: mpf, n: mpf, delta: mpf) -> mpf:
    """The bound of a PAC-Bayes theorem, at most 1."""
    sure, price = mp.log(2 * mp.sqrt(n) / delta), (kl + mp.log(len(GRID) / delta)) / n
    b = (kl + sure) / (2 * n)
    formulas = {
        "PAC-Bayes-kl": lambda: kl_inverse(r, 2 * b),
        "McAllester": lambda: r + mp.sqrt(b),
        "quadratic": lambda: (mp.sqrt(r + b) + mp.sqrt(b)) ** 2,
        "Catoni": lambda: min((1 - mp.exp(-c * r - price)) / (1 - mp.exp(-c)) for c in GRID),
        "empirical Bernstein": lambda: bernstein(r, kl, n, delta),
        "majority vote, first order": lambda: 2 * kl_inverse(r, 2 * b),
        "majority vote, tandem loss": lambda: 4 * kl_inverse(r, (2 * kl + sure) / n),
    }
    return min(mpf(1), formulas[theorem]())


def number_problems(cert: Mapping[str, Any]) -> list[str]:
    """What is wrong with the bound, the steps before it, and the shares of delta."""
    wrong: list[str] = []
    n, delta, errors, risk = cert["n"], mpf(cert["delta_split"]["bound"]), cert["errors"], mpf(cert["risk"])
    held_out = cert["kl"] is None
    samples = 1 if held_out else cert["draws"] // (2 if "tandem" in cert["theorem"] else 1)
    if not held_out:
        used = risk  # exact, of finitely many networks, where no draw entered by chance
        if cert["risk_upper"] is not None:
            used = mpf(cert["risk_upper"])
            upper = kl_inverse(risk, -mp.log(mpf(cert["delta_split"]["monte_carlo"])) / samples)
            wrong += compared("risk_upper", cert["risk_upper"], upper)
        parts = mp.fsum(mpf(part) for part in cert["kl_parts"].values())
        if abs(parts - mpf(cert["kl"])) > mpf(10) ** -12 * (1 + mpf(cert["kl"])) or cert["kl"] < 0:
            wrong.append(f"kl {cert['kl']} is not the sum of its parts, {mp.nstr(parts, 15)}")
        bound = pac_bayes(cert["theorem"], used, mpf(cert["kl"]), mpf(n), delta)
    elif cert["theorem"] == "binomial tail":
        bound = binomial(errors, n, delta)
    else:
        bound = kl_inverse(risk, -mp.log(delta) / n)
    whom = ("mixture", "prior") if held_out else ("majority vote",) if "vote" in cert["theorem"] else ("gibbs",)
    if cert["predictor"] not in whom:
        wrong.append(f"the theorem is not about the predictor {cert['predictor']!r}")
    losses = samples if cert["by_row"] else n * samples
    if losses % n or (errors is not None and abs(risk - mpf(errors) / losses) > mpf(10) ** -12):
        wrong.append(f"risk {cert['risk']} is not {errors} errors of {losses}")
    wrong += compared("bound", cert["bound"], bound)
    shares = [mpf(share) for share in cert["delta_split"].values()]
    if not (min(shares) > 0 and mpf(cert["delta"]) * (1 - LOOSE) <= mp.fsum(shares) <= mpf(cert["delta"]) < 1):
        wrong.append(f"the shares of delta add up to {mp.nstr(mp.fsum(shares), 15)}, not to delta = {cert['delta']}")
    return wrong


def compared(name: str, stated: float, exact: mpf) -> list[str]:
    """What is wrong with a stated upper bound: it lies below the exact value, or far above it."""
    if mpf(stated) < exact - mpf(10) ** -40:
        return [f"{name} {stated} lies below the exact value {mp.nstr(exact, 15)}"]
    return [f"{name} {stated} is not {mp.nstr(exact, 15)}"] if mpf(stated) > exact * (1 + LOOSE) + LOOSE**4 else []


def row_problems(cert: Mapping[str, Any], data: Counter[str] | None) -> list[str]:
    """What is wrong with the row ledger: repeated or overlapping rows, a wrong count, rows foreign to the data."""
    ledger, wrong = cert["ledger"], []
    roles = {role: [tuple(entry[:2]) for entry in ledger[role]] for role in "AB"}
    if repeated := sum(len(rows) - len(set(rows)) for rows in roles.values()):
        wrong.append(f"{repeated} rows are listed more than once")
    if both := len(set(roles["A"]) & set(roles["B"])):
        wrong.append(f"{both} rows have both roles, A (prior) and B (bound)")
    if len(roles["B"]) != cert["n"]:
        wrong.append(f"n = {cert['n']}, but {len(roles['B'])} rows have role B")
    hashes = Counter(entry[2] for role in "AB" for entry in ledger[role] if entry[2] or role == "B")
    if data is not None and (missing := (hashes - data).total()):
        wrong.append(f"{missing} rows of the ledger are not in the data, or not so often")
    return wrong


def problems(cert: Mapping[str, Any], data: Counter[str] | None = None) -> list[str]:
    """Everything that is wrong with a certificate and with those beside it; nothing if it holds."""
    with mp.workdps(50):
        wrong = number_problems(cert) + row_problems(cert, data)
    beside = [{**other, "ledger": other["ledger"] or cert["ledger"]} for other in cert["beside"]]
    return wrong + [f"beside: {problem}" for other in beside for problem in problems(other, data)]


def row_hash(values: Iterable[float]) -> str:
    """BLAKE2b of a row as little-endian float64, -0 as 0."""
    numbers = [float(value) + 0.0 for value in values]
    return hashlib.blake2b(struct.pack(f"<{len(numbers)}d", *numbers), digest_size=16).hexdigest()


def hashes_of(path: Path, ledger: Mapping[str, Any]) -> Counter[str]:
    """The hash of every row of a file, with how often it occurs."""
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            parts = [arrays[name].reshape(len(arrays[name]), -1) for name in ("x", "y")]
        return Counter(row_hash([*x.tolist(), *y.tolist()]) for x, y in zip(*parts, strict=True))
    codes = {label: code for code, label in enumerate(ledger["classes"])}

    def cell(row: Mapping[str, str], name: str) -> float:
        column, _, value = name.partition("=")  # a 0/1 column made of a text column
        return float(row[name] if name in row else row[column].strip() == value)

    target, rows = ledger["target"], csv.DictReader(path.read_text().splitlines(), skipinitialspace=True)
    return Counter(
        row_hash([*(cell(row, name) for name in ledger["columns"]),
                  codes[row[target].strip()] if codes else float(row[target])])
        for row in rows
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Print what holds or what is wrong; 0 if the certificate holds, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("certificate", type=Path)
    parser.add_argument("--data", type=Path, help="the rows: a CSV file, or an .npz file with x and y")
    options = parser.parse_args(arguments)
    try:
        cert = json.loads(options.certificate.read_text())
        found = [] if cert["format"] == "bayesdl certificate 1" else [f"its format is {cert['format']!r}"]
        found += problems(cert, None if options.data is None else hashes_of(options.data, cert["ledger"]))
    except (LookupError, TypeError, ValueError, OSError) as error:
        found = [f"it cannot be read: {error!r}"]
    claim = "but for a probability of {delta}, the expected {loss} of the {predictor} predictor is at most {bound}"
    print("\n".join(f"WRONG: {problem}" for problem in found) or "verified: " + claim.format(**cert))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
