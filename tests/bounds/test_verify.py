"""Certificate files, and the program that recomputes them: what holds passes, what was tampered with does not."""

from __future__ import annotations

import ast
import copy
import csv
import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesdl.bounds import Certificate, bounded, certify, verify
from bayesdl.bounds.ledger import row_hashes
from bayesdl.bounds.verify import hashes_of, main, problems, row_hash
from bayesdl.data import Dataset, RowIds
from bayesdl.errors import FileError
from tests.bounds.fakes import Thresholds, threshold_data

CHECKED_IN = Path(__file__).resolve().parents[2] / "benchmarks" / "certificates"

DATA = threshold_data(120, seed=0)
PRIOR = DATA[:40]


def certificate(bound: str = "auto", **options: Any) -> Certificate:
    """Fitted on 80 rows, 40 of them the prior's, and 40 rows that nothing was fitted on."""
    posterior = Thresholds(DATA[:80].rows, PRIOR.rows, kl=2.0)
    data = DATA[80:] if bound == "holdout" else DATA
    return certify(posterior, data, bound=bound, **{"draws": 200, "progress": False} | options)


def saved(tmp_path: Path, found: Certificate) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(found.save(tmp_path / "cert.json").read_text())
    return value


@pytest.mark.parametrize(
    "bound", ["auto", "kl", "quadratic", "mcallester", "catoni", "bernstein", "vote", "tandem", "holdout", "best"]
)
def test_every_certificate_is_verified_and_read_back(bound: str, tmp_path: Path) -> None:
    found = certificate(bound)
    assert problems(saved(tmp_path, found), Counter(row_hashes(DATA.x, DATA.y))) == []
    assert Certificate.load(tmp_path / "cert.json") == found


def test_losses_other_than_0_1_are_verified(tmp_path: Path) -> None:
    loss = bounded(lambda p, y: (p[..., 1] - y) ** 2, 1.0)
    for bound in ("holdout", "kl"):
        assert problems(saved(tmp_path, certificate(bound, loss=loss))) == []


def test_the_file_says_what_was_counted_and_by_what(tmp_path: Path) -> None:
    value = saved(tmp_path, certificate("kl"))
    assert set(value["software"]) >= {"python", "torch", "numpy", "bayesdl"}
    assert [len(value["ledger"][role]) for role in "AB"] == [40, 80]
    assert value["ledger"]["B"][0][2] == row_hashes(DATA[40:41].x, DATA[40:41].y)[0]
    assert value["errors"] == round(value["risk"] * 200 * 80)
    assert sum(value["kl_parts"].values()) == pytest.approx(value["kl"], rel=1e-15)
    assert value["beside"][0]["theorem"] == "binomial tail"
    assert [len(value["beside"][0]["ledger"][role]) for role in "AB"] == [80, 40]


@pytest.mark.parametrize("path", sorted(CHECKED_IN.glob("*.json")), ids=lambda path: path.stem)
def test_certificates_of_the_benchmarks_hold(path: Path) -> None:
    value = json.loads(path.read_text())
    assert problems(value) == []
    assert value["bound"] < 0.2


def test_there_are_certificates_of_the_benchmarks() -> None:
    assert len(list(CHECKED_IN.glob("*.json"))) >= 5


def test_a_ledger_that_two_certificates_share_is_written_once(tmp_path: Path) -> None:
    found = certificate("kl")
    twin = dataclasses.replace(found, beside=())
    both = dataclasses.replace(found, beside=(twin, *found.beside))
    value = saved(tmp_path, both)
    assert [other["ledger"] is None for other in value["beside"]] == [True, False]
    assert problems(value) == []
    assert Certificate.load(tmp_path / "cert.json") == both
    overlap(value)
    assert sum("both roles" in problem for problem in problems(value)) == 2


def overlap(cert: dict[str, Any]) -> None:
    cert["ledger"]["A"].append(cert["ledger"]["B"][0])


def twice(cert: dict[str, Any]) -> None:
    cert["ledger"]["B"][1] = cert["ledger"]["B"][0]


def put(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(cert: dict[str, Any]) -> None:
        cert[name] *= factor

    return change


def share(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(cert: dict[str, Any]) -> None:
        cert["delta_split"][name] *= factor

    return change


def both_kl(cert: dict[str, Any]) -> None:
    cert["kl"] -= 1
    cert["kl_parts"]["rounding"] -= 1


def fewer_errors(cert: dict[str, Any]) -> None:
    cert["errors"] -= 200
    cert["risk"] = cert["errors"] / (cert["draws"] * cert["n"])


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "risk": (put("risk", 0.99), "is not .* errors"),
    "risk and errors": (fewer_errors, "risk_upper"),
    "risk over the draws": (put("risk_upper", 0.99), "risk_upper .* below"),
    "KL": (put("kl", 0.9), "not the sum of its parts"),
    "KL and its part": (both_kl, "bound .* is not"),
    "delta": (put("delta", 0.9), "shares of delta add up"),
    "share of delta": (share("bound", 0.5), "bound .* below"),
    "share of the draws": (share("monte_carlo", 0.9), "risk_upper .* below"),
    "lower bound": (put("bound", 1 - 1e-12), "bound .* below"),
    "higher bound": (put("bound", 1.01), "bound .* is not"),
    "n": (put("n", 2), "rows have role B"),
    "theorem": (lambda cert: cert.update(theorem="McAllester"), "bound .* below"),
    "predictor": (lambda cert: cert.update(predictor="mixture"), "not about the predictor"),
    "overlapping rows": (overlap, "1 rows have both roles"),
    "a row twice": (twice, "1 rows are listed more than once"),
    "the bound beside": (lambda cert: cert["beside"][0].update(errors=0), "beside: "),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_caught(name: str, tmp_path: Path) -> None:
    cert = saved(tmp_path, certificate("kl"))
    change, words = TAMPERED[name]
    tampered = copy.deepcopy(cert)
    change(tampered)
    found = problems(tampered)
    assert found
    assert any(re.search(words, problem) for problem in found), found


def test_rows_that_are_not_those_of_the_data_are_caught(tmp_path: Path) -> None:
    cert = saved(tmp_path, certificate("kl"))
    x = DATA.x.clone()
    x[100] += 1e-12
    found = problems(cert, Counter(row_hashes(x, DATA.y)))
    assert any("1 rows of the ledger are not in the data" in problem for problem in found)
    # The same row under two identities: no overlap by name, but the data have it once only.
    cert["ledger"]["A"].append([0, 10_000, cert["ledger"]["B"][0][2]])
    assert any("not so often" in problem for problem in problems(cert, Counter(row_hashes(DATA.x, DATA.y))))


def test_data_from_csv_and_npz_have_the_hashes_of_the_ledger(tmp_path: Path) -> None:
    data = Dataset.from_arrays(
        np.array([[0.1, 0.0], [-0.0, 1.0], [1e-300, 1.0]]), ["no", "yes", "no"], x_names=["a", "c=u"], y_name="t"
    )
    hashes = Counter(row_hashes(data.x, data.y))
    ledger = {"columns": ["a", "c=u"], "target": "t", "classes": ["no", "yes"]}
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["t", "c", "a"], ["no", "v", 0.1], ["yes", "u", -0.0], ["no", "u", 1e-300]])
    np.savez(tmp_path / "rows.npz", x=data.x, y=data.y)
    assert hashes == hashes_of(tmp_path / "rows.csv", ledger) == hashes_of(tmp_path / "rows.npz", ledger)
    assert row_hash([0.1, 0.0, 0]) in hashes
    images = torch.rand(3, 1, 2, 2)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(3))
    assert hashes_of(tmp_path / "images.npz", ledger) == Counter(row_hashes(images, torch.arange(3)))


def test_the_program_runs_alone_is_short_and_leaves_the_digits_of_others(tmp_path: Path) -> None:
    source = Path(verify.__file__)
    lines = source.read_text().splitlines()
    assert len(lines) <= 200
    imported = {alias.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    assert not any("bayesdl" in line for line in lines if line.lstrip().startswith(("import", "from")))
    assert imported == {"argparse", "csv", "hashlib", "json", "struct", "numpy"}
    path = certificate("holdout").save(tmp_path / "cert.json")
    alone = subprocess.run([sys.executable, "-I", str(source), str(path)], capture_output=True, text=True, check=True)
    assert alone.stdout.startswith("verified: but for a probability of 0.05, the expected 0-1 loss of the mixture")
    path.write_text(path.read_text().replace('"bound": 0', '"bound": 0.00'))
    assert main([str(path)]) == 1
    path.write_text("[]")
    assert main([str(path)]) == 1


def test_files_that_are_no_certificates_are_refused(tmp_path: Path) -> None:
    path = certificate("holdout").save(tmp_path / "cert.json")
    value = json.loads(path.read_text())
    for broken, words in (
        (value | {"format": "x"}, "not a certificate"),
        (value | {"theorem": "x"}, "damaged"),
        ([], "not a"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(FileError, match=words):
            Certificate.load(path)
    with pytest.raises(FileError, match="does not exist"):
        Certificate.load(tmp_path / "none.json")


def test_prior_rows_outside_the_data_are_listed_without_a_hash(tmp_path: Path) -> None:
    posterior = Thresholds(DATA[:80].rows, RowIds.concat([PRIOR.rows]), kl=2.0)
    cert = saved(tmp_path, certify(posterior, DATA[40:80], draws=20, progress=False))
    assert {entry[2] for entry in cert["ledger"]["A"]} == {None}
    assert problems(cert) == []
