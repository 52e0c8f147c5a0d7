from __future__ import annotations

import csv
import io
import json

import pytest
import torch

from bayesdl.cli import main
from bayesdl.data import read_csv
from bayesdl.posterior import load

CITIES = ("Oslo", "Paris", "Rome")
QUICK = ("--method", "map", "--set", "steps=20")


def write(path, rows, header=("age", "city", "price")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def houses(tmp_path):
    return write(tmp_path / "houses.csv", [(20 + k, CITIES[k % 3], 100.5 + 3 * k) for k in range(40)])


@pytest.fixture
def run(capsys):
    def run(*arguments, code=0):
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


@pytest.fixture
def fitted(run, houses, tmp_path):
    options = ("--target", "price", "--encode", "onehot", "--holdout", "0.25")
    run("fit", houses, *options, *QUICK, "--out", tmp_path / "run")
    return tmp_path / "run"


def test_text_and_gaps_need_an_option(run, houses, tmp_path):
    said = run("fit", houses, "--target", "price", "--out", tmp_path / "run", code=2)
    assert "encode='onehot'" in said
    assert "missing='drop'" in said
    assert "--target" in run("fit", houses, "--out", tmp_path / "run", code=2)
    assert "Did you mean 'price'" in run("fit", houses, "--target", "prise", "--out", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_held_out_rows_are_those_that_the_fit_did_not_see(run, fitted, houses):
    assert len(load(fitted).problem.rows) == 30
    seen = read_csv(houses, "price", encode="onehot").rows.isin(load(fitted).problem.rows)
    assert len(list(csv.DictReader(io.StringIO(run("predict", fitted, houses))))) == 10 == int((~seen).sum())
    assert len(list(csv.DictReader(io.StringIO(run("predict", fitted, houses, "--rows", "all"))))) == 40
    assert json.loads(run("certify", fitted, houses, "--json"))["n"] == 10


def test_other_tables_are_read_as_the_fit_read_its_own(run, fitted, tmp_path):
    # Two of three cities, columns in another order: the same inputs for the network all the same.
    other = write(tmp_path / "other.csv", [("Rome", 30, 1.5), ("Oslo", 31, 2.5)], ("city", "age", "price"))
    records = json.loads(run("predict", fitted, other, "--json"))
    x = torch.tensor([[30.0, 0.0, 0.0, 1.0], [31.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert [record["mean"] for record in records] == load(fitted).predict(x).mean.tolist()


def test_rows_without_a_target_are_predicted(run, fitted, tmp_path):
    new = write(tmp_path / "new.csv", [(30, "Rome"), (31, "Oslo")], ("age", "city"))
    known = write(tmp_path / "known.csv", [(30, "Rome", 1.5), (31, "Oslo", 2.5)])
    assert run("predict", fitted, new) == run("predict", fitted, known)
    assert "price" in run("evaluate", fitted, new, code=2)


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([(30, "Bonn", 1.5), (31, "Rome", 2.5)], ("age", "city", "price"), "unknown ['city=Bonn']"),
        ([("Oslo", 1.5), ("Rome", 2.5)], ("city", "price"), "missing ['age']"),
        ([("Oslo",), ("Rome",)], ("city",), "missing ['age']"),
    ],
)
def test_other_columns_are_refused(run, fitted, tmp_path, rows, header, words):
    assert words in run("predict", fitted, write(tmp_path / "other.csv", rows, header), code=2)


def test_classes_keep_their_codes(run, tmp_path):
    table = write(tmp_path / "pets.csv", [(k, ("cat", "dog", "owl")[k % 3]) for k in range(30)], ("size", "kind"))
    run("fit", table, "--target", "kind", *QUICK, "--out", tmp_path / "run")
    # Without "cat", "dog" would be class 0 if the file were read on its own.
    pair = [(k, ("dog", "owl")[k % 2]) for k in range(8)]
    other = write(tmp_path / "other.csv", pair, ("size", "kind"))
    report = json.loads(run("evaluate", tmp_path / "run", other, "--json"))
    x = torch.arange(8, dtype=torch.float64)[:, None]
    expected = load(tmp_path / "run").predict(x).log_prob(torch.tensor([1, 2] * 4))
    assert report["nll"] == pytest.approx(-expected.mean().item(), rel=1e-12)
    strange = write(tmp_path / "strange.csv", [(1, "emu"), (2, "dog")], ("size", "kind"))
    assert "emu" in run("evaluate", tmp_path / "run", strange, code=2)


def test_compare_holds_out_rows_of_a_table_itself(run, houses):
    options = ("--target", "price", "--encode", "onehot", "--method", "gp", "--json")
    assert list(json.loads(run("compare", houses, *options))) == ["GP"]


def test_a_posterior_saved_by_a_program_does_not_know_the_target(run, fitted, houses):
    (fitted / "data.json").unlink()
    assert "which of its columns is the target" in run("evaluate", fitted, houses, code=2)
