from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch

from bayesdl.bounds import certify
from bayesdl.cli import main
from bayesdl.data import load as load_data
from bayesdl.evaluate import evaluate
from bayesdl.posterior import load

COMMANDS = ("describe", "fit", "predict", "evaluate", "certify", "verify", "compare")


@pytest.fixture
def run(capsys):
    """Run a command that must succeed; its standard output."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that must refuse its input; the one line on standard error."""

    def refused(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        assert captured.err.startswith("bayesdl: error: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        return captured.err

    return refused


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regression") / "run"
    settings = ["--set", "chains=2", "--set", "warmup=10", "--set", "draws=10", "--set", "max_depth=3"]
    assert main(["fit", "diabetes", "--method", "nuts", *settings, "--hidden", "3", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification") / "run"
    options = ["--set", "steps=50", "--prior-rows", "0.5", "--seed", "3", "--out", str(folder)]
    assert main(["fit", "breast_cancer", *options]) == 0
    return folder


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_without_arguments_the_first_round_is_explained(run):
    assert run() == run("--help")
    assert "bayesdl fit diabetes --method nuts --out run" in run()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_examples(run, command):
    text = run(command, "--help")
    assert "Examples:" in text
    assert text.count(f"bayesdl {command}") >= 2
    # Each example keeps its own line.
    assert all(line.count(f"bayesdl {command} ") <= 1 for line in text.splitlines())


def test_fit_writes_the_posterior_and_how_the_data_were_read(regression):
    assert {path.name for path in regression.iterdir()} == {"posterior.json", "posterior.safetensors", "data.json"}
    assert [path.name for path in regression.parent.iterdir()] == ["run"]
    posterior = load(regression)
    assert posterior.info["method"] == "NUTS"
    assert (posterior.info["settings"]["warmup"], posterior.info["settings"]["chains"]) == (10, 2)
    assert posterior.problem.rows == load_data("diabetes").train.rows


def test_fit_tells_what_it_did(run, tmp_path):
    options = ["--method", "map", "--set", "steps=5", "--hidden", "4", "--hidden", "3", "--activation", "relu"]
    told = json.loads(run("fit", "iris", *options, "--seed", "11", "--out", tmp_path / "a", "--json"))
    assert (told["method"], told["seed"], told["rows"], told["settings"]["steps"]) == ("MAP", 11, 120, 5)
    shapes = {name: tuple(value.shape[1:]) for name, value in load(tmp_path / "a").draws().items()}
    assert {shapes["0.weight"], shapes["2.weight"], shapes["4.weight"]} == {(4, 4), (3, 4), (3, 3)}
    assert "evaluate" in run("fit", "iris", *options, "--out", tmp_path / "b")


def test_fit_does_not_replace_a_posterior_unasked(run, refused, tmp_path):
    options = ["fit", "iris", "--method", "map", "--set", "steps=5", "--out", tmp_path / "a"]
    run(*options)
    assert "--overwrite" in refused(*options)
    run(*options, "--overwrite")


def test_checkpoints_stay_in_the_folder_and_go_when_the_run_has_ended(run, tmp_path, monkeypatch):
    written = []
    from bayesdl.infer.checkpoint import Checkpoint

    save = Checkpoint.save

    def record(self, *state, **options):
        save(self, *state, **options)
        written.append(self.file)

    monkeypatch.setattr(Checkpoint, "save", record)
    options = ["--method", "map", "--set", "steps=30", "--checkpoint-every", "10"]
    run("fit", "iris", *options, "--out", tmp_path / "a")
    assert len(written) >= 3
    assert {path.parent for path in written} == {tmp_path / "a"}
    assert not any(path.exists() for path in written)


def test_evaluate_uses_the_test_split_of_a_bundled_set(run, regression):
    report = json.loads(run("evaluate", regression, "diabetes", "--json"))
    test = load_data("diabetes").test
    expected = evaluate(load(regression).predict(test.x), test.y).to_dict()
    assert report == expected
    assert "nll" in run("evaluate", regression, "diabetes")
    train = json.loads(run("evaluate", regression, "diabetes", "--rows", "train", "--json"))
    assert train["nll"] != report["nll"]


def test_predict_prints_one_line_a_row(run, regression):
    table = rows_of(run("predict", regression, "diabetes", "--level", "0.5"))
    prediction = load(regression).predict(load_data("diabetes").test.x)
    low, high = prediction.interval(0.5)
    assert list(table[0]) == ["mean", "sd", "epistemic_sd", "low", "high"]
    for name, values in (("mean", prediction.mean), ("sd", prediction.sd), ("low", low), ("high", high)):
        np.testing.assert_allclose([float(row[name]) for row in table], values, rtol=1e-5)
    records = json.loads(run("predict", regression, "diabetes", "--json"))
    assert [record["mean"] for record in records] == prediction.mean.tolist()


def test_predict_names_classes(run, classification):
    table = rows_of(run("predict", classification, "breast_cancer"))
    assert list(table[0]) == ["label", "p_malignant", "p_benign", "mutual_information"]
    for row in table:
        probabilities = {name: float(row[f"p_{name}"]) for name in ("malignant", "benign")}
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-5)
        assert row["label"] == max(probabilities, key=probabilities.get)


def test_certify_holds_out_where_there_is_no_density(run, regression):
    certificate = json.loads(run("certify", regression, "diabetes", "--delta", "0.1", "--json"))
    expected = certify(load(regression), load_data("diabetes").test, delta=0.1)
    assert certificate["bound"] == expected.bound
    assert (certificate["theorem"], certificate["n"]) == ("binomial tail", 88)
    assert "Certificate for NUTS" in run("certify", regression, "diabetes")


def test_certify_counts_the_other_half_after_prior_rows(run, classification):
    certificate = json.loads(run("certify", classification, "breast_cancer", "--draws", "50", "--json"))
    assert (certificate["theorem"], certificate["predictor"]) == ("PAC-Bayes-kl", "gibbs")
    assert certificate["n"] == len(load_data("breast_cancer").train) - len(load(classification).problem.prior_rows)
    held_out = json.loads(run("certify", classification, "breast_cancer", "--rows", "held-out", "--json"))
    assert held_out["predictor"] == "mixture"


def test_a_written_certificate_is_verified_and_a_changed_one_is_not(run, classification, tmp_path, capsys):
    path = tmp_path / "cert.json"
    printed = run("certify", classification, "breast_cancer", "--draws", "50", "--bound", "quadratic", "--out", path)
    assert "quadratic" in printed
    assert "beside" in printed
    assert run("verify", path).startswith("verified: but for a probability of 0.05")
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"bound": value["bound"] - 0.01}))
    assert main(["verify", str(path)]) == 1
    assert "WRONG: bound" in capsys.readouterr().out


def test_describe_and_compare(run):
    described = json.loads(run("describe", "iris", "--hidden", "3", "--json"))
    assert {site["name"] for site in described["sites"]} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert "NUTS" in run("describe", "iris", "--hidden", "3")
    table = json.loads(run("compare", "wine", "--method", "map", "--method", "gp", "--json"))
    assert list(table) == ["MAP", "GP"]
    assert "accuracy" in run("compare", "wine", "--method", "gp")


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("fit", "iris", "--method", "map", "--set", "steps=20", "--seed", seed, "--out", tmp_path / name)
        outputs.append(run("predict", tmp_path / name, "iris"))
    assert outputs[0] == outputs[1] != outputs[2]


def test_closed_pipe_is_no_error(regression, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert main(["predict", str(regression), "diabetes"]) == 0


def test_an_interruption_before_there_is_a_result(capsys, monkeypatch, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bayesdl.infer.optimise.MAP._fit", interrupt)
    assert main(["fit", "iris", "--method", "map", "--out", str(tmp_path / "a")]) == 130
    assert capsys.readouterr().err == "bayesdl: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt"], "No such command"),
        (["fit", "diabetes"], "--out"),
        (["fit", "diabetes", "--out", "X", "--oops"], "No such option: --oops"),
        (["fit", "diabets", "--out", "X"], "Did you mean 'diabetes'"),
        (["fit", "none.csv", "--target", "y", "--out", "X"], "none.csv does not exist"),
        (["fit", "diabetes", "--target", "y", "--out", "X"], "knows its own target"),
        (["fit", "diabetes", "--holdout", "0.2", "--out", "X"], "standard split"),
        (["fit", "diabetes", "--method", "nutz", "--out", "X"], "Did you mean nuts"),
        (["fit", "diabetes", "--method", "nuts", "--set", "warmpu=3", "--out", "X"], "Did you mean warmup"),
        (["fit", "diabetes", "--method", "nuts", "--set", "warmup", "--out", "X"], "a setting and its value"),
        (["fit", "diabetes", "--method", "nuts", "--set", "warmup=1.5", "--out", "X"], "whole number"),
        (["fit", "diabetes", "--method", "nuts", "--set", "warmup=ten", "--out", "X"], "whole number"),
        (["fit", "diabetes", "--set", "steps=5", "--set", "steps=6", "--out", "X"], "twice"),
        (["fit", "diabetes", "--activation", "rleu", "--out", "X"], "activation must be one of"),
        (["fit", "diabetes", "--hidden", "0", "--out", "X"], "positive integers"),
        (["fit", "diabetes", "--hidden", "many", "--out", "X"], "--hidden"),
        (["fit", "diabetes", "--prior-rows", "2", "--out", "X"], "prior_rows"),
        (["fit", "diabetes", "--method", "nuts", "--prior-rows", "0.5", "--out", "X"], "prior_rows"),
        (["fit", "diabetes", "--checkpoint-every", "0", "--out", "X"], "at least 1"),
        (["evaluate", "X", "diabetes"], "does not exist"),
        (["predict", "X", "diabetes"], "does not exist"),
        (["certify", "X", "diabetes"], "does not exist"),
        (["compare", "diabetes", "--method", "map", "--method", "map"], "more than once"),
        (["describe", "diabets"], "Did you mean 'diabetes'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(refused, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("evaluate", ["breast_cancer"], "30"),
        ("predict", ["diabetes", "--level", "1.5"], "level"),
        ("certify", ["diabetes", "--delta", "0"], "delta"),
        ("certify", ["diabetes", "--rows", "train"], "fitted on"),
        ("certify", ["iris"], "fitted for regression"),
    ],
)
def test_bad_input_for_a_saved_posterior(refused, regression, command, options, words):
    assert words in refused(command, regression, *options)


def test_damaged_notes(refused, run, tmp_path):
    run("fit", "iris", "--method", "map", "--set", "steps=5", "--out", tmp_path / "a")
    (tmp_path / "a" / "data.json").write_text('{"target": 3}')
    assert "fit again" in refused("evaluate", tmp_path / "a", "iris")


def test_infinite_numbers_become_null_in_json(capsys):
    from bayesdl.cli._output import print_json

    print_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": torch.tensor(2.0).item()})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": 2.0}
