"""Every script in examples/ runs, says something true, draws something, and writes nowhere but where it is told to."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SLOW = {
    "bound_training",
    "continual_digits",
    "eight_schools",
    "foreign_images",
    "network_hmc",
    "infinite_width",
    "posteriors",
    "signal_propagation",
    "stiff_directions",
}
RUNS = [pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else (), id=path.stem) for path in SCRIPTS]
Result = dict[str, Any]


def schools(result: Result) -> None:
    means = result["means"]
    assert means["mu"]["exact"] == pytest.approx(4.40, abs=0.01)
    assert means["tau"]["exact"] == pytest.approx(3.60, abs=0.01)
    assert len(means) == 10
    assert all(abs(row["errors"]) < 4 for row in means.values()), means
    assert result["rhat"] < 1.05
    assert result["divergences"] < 5


def mixture(result: Result) -> None:
    for label in ("NUTS", "mean-field VI", "MAP"):
        assert result[label]["means"] == pytest.approx(result["species"], abs=0.35)
        assert result[label]["accuracy"] > 0.92
    # The component that overlaps with none is found by all; on the ridge between the others mean-field VI is too sure.
    assert result["mean-field VI"]["means"][0] == pytest.approx(result["NUTS"]["means"][0], abs=0.02)
    sure, right = (np.array(result[label]["sd"][1:]) for label in ("mean-field VI", "NUTS"))
    assert (sure < 0.75 * right).all()
    assert result["rhat"] < 1.15


def linear_regression(result: Result) -> None:
    assert result["MAP"]["deviation"] < 1e-5
    assert result["mean-field VI"]["deviation"] < 0.03
    for label in ("SGLD", "HMC", "NUTS"):
        assert result[label]["deviation"] < 4, label
    exact = np.array(result["NUTS"]["expected"])
    assert (np.array(result["mean-field VI"]["sd"]) < 0.6 * exact).all()
    assert (np.array(result["SGLD"]["expected"]) > exact).all()


def infinite_width(result: Result) -> None:
    narrow, wide = (result["widths"][width] for width in (2, 32))
    for moments in (narrow, wide):
        assert abs(moments["ratio"] - 1) < 4 * moments["ratio error"]
    assert wide["mean"] < 0.5 * narrow["mean"]
    assert wide["sd"] < narrow["sd"]
    mode, ensemble, _, nuts, limit = result["sds"].values()
    assert limit[0] > 3 * limit[1]
    assert nuts[0] == pytest.approx(limit[0], rel=0.35)
    assert mode == [0.0, 0.0]
    assert ensemble[0] < 0.7 * limit[0]


def bound_training(result: Result) -> None:
    for certificates in result.values():
        assert set(certificates) == {"PACBayes", "PACBayes, elbo", "MeanFieldVI", "the prior's network"}
        for label, row in certificates.items():
            assert row["risk"] < row["bound"] < 1
            assert (row["kl"] == 0) == (label == "the prior's network")


def stiff_directions(result: Result) -> None:
    along, *others = result["certificates"].values()
    for temperature, run in along.items():
        assert run["bound"] < min(other[temperature]["bound"] for other in others) < 1
        assert run["risk"] < run["bound"]
        assert result["effective dimension"][temperature] < 910 / 4


def certificate(result: Result) -> None:
    rows = result["shares"]
    for row in rows.values():
        assert row["risk"] < row["bound"] < 0.3
        assert row["test risk"] < row["bound"]
        assert row["hold-out risk"] < row["hold-out bound"] < 0.3
        # The bound is the kl inversion of its two terms, at a risk raised for the Monte-Carlo step.
        risk, bound = row["risk"], row["bound"]
        kl = risk * np.log(risk / bound) + (1 - risk) * np.log((1 - risk) / (1 - bound))
        assert kl > row["KL / n"] + row["log / n"]
    kls = [row["kl"] for row in rows.values()]
    assert kls == sorted(kls, reverse=True)
    assert result["bound"] == min(row["bound"] for row in rows.values())
    assert result["alone"] < result["bound"]
    assert result["delta"] == pytest.approx(0.05 / len(rows))


def continual(result: Result) -> None:
    forgetful, cured, everything = (result[way][-1] for way in ("fine-tuning", "prior=posterior", "all tasks at once"))
    mean = [sum(last) / len(last) for last in (forgetful, cured, everything)]
    assert mean[0] + 0.2 < mean[1] < mean[2]
    assert forgetful[0] < 0.4 < 0.6 < cured[0]
    # Learning the next task is no trouble to fine-tuning, only keeping the last one.
    assert min(row[-1] for row in result["fine-tuning"]) > 0.8
    assert min(everything) > 0.8


def coverage(result: Result) -> None:
    for law, row in result["rates"].items():
        for name, rate in row.items():
            if name == "best of 20, delta each" or (name == "central limit theorem" and "between" not in law):
                assert rate > 0.08, (law, name)
            elif name != "central limit theorem":
                assert rate < 0.05 + 4 * (0.05 * 0.95 / 500) ** 0.5, (law, name)
    narrow = result["slack"]["between 0.29 and 0.31"]
    assert narrow["betting"][-1] < 0.2 * narrow["Chernoff, kl"][-1]
    wrong = result["slack"]["errors, 1 in 16"]
    assert wrong["binomial tail"][-1] == min(row[-1] for row in wrong.values())


def counts(result: Result) -> None:
    for period, average, tolerance in (("1851-1880", 3.3, 0.35), ("1900-1961", 0.903, 0.15)):
        assert result[period]["average"] == pytest.approx(average, abs=1e-3)
        assert result[period]["rate"] == pytest.approx(average, abs=tolerance)
    low, middle, high = result["fall"]
    assert result["change"] == 1890.5
    assert low < result["change"] < high
    assert 1886 < middle < 1895


def demo(result: Result) -> None:
    assert result["identical"]
    methods = {"MAP", "deep ensemble", "mean-field VI", "SGLD", "NUTS", "NNGP"}
    assert set(result["diabetes"]) == set(result["breast_cancer"]) == methods
    for label in methods:
        assert 45 < result["diabetes"][label]["rmse"] < 75, label  # 77 is the standard deviation of the target
        assert result["breast_cancer"][label]["accuracy"] > 0.88, label
        assert result["breast_cancer"][label]["nll"] < 0.35, label
    assert 0 < result["diabetes"]["NUTS"]["epistemic_share"] < 0.5
    assert result["diabetes"]["MAP"]["epistemic_share"] == 0
    variational, held_out = (result["certificates"][label] for label in ("mean-field VI", "NUTS"))
    assert variational["theorem"] == "PAC-Bayes-kl"
    assert held_out["theorem"] == "binomial tail"
    for found in (variational, held_out):
        assert found["risk"] < found["bound"] < 0.25


def sgd(result: Result) -> None:
    for row in [*result["settings"].values(), *result["scaling"].values()]:
        assert abs(row["measured"] - row["finite steps and rows"]) < 4 * row["error"]
        assert row["Gibbs"] < row["finite steps"] < row["finite steps and rows"]
    assert result["settings"]["1.5, 32"]["measured"] > 4 * result["settings"]["1.5, 32"]["Gibbs"]
    scaled = [row["measured"] for row in result["scaling"].values()]
    assert scaled == sorted(scaled)
    assert len({round(row["Gibbs"], 9) for row in result["scaling"].values()}) == 1
    for row in result["spectrum"].values():
        assert row["rank"] < row["rows"] < row["dim"]
        assert row["fraction"] < row["rows"] / row["dim"]
    assert result["spectrum"]["MAP"]["gradient"] < 1e-3 < result["spectrum"]["a draw from the prior"]["gradient"]
    annealed, large, _, small = result["wells"].values()
    for row in result["wells"].values():
        assert row["low"] - 0.03 < row["exact"] < row["high"] + 0.03
    assert max(large["high"], small["high"]) < annealed["low"]
    assert annealed["high"] < 1


def sgld_mnist(result: Result) -> None:
    assert result["data"] == "digits"
    for label in ("MAP", "SGLD", "SGHMC"):
        assert result[label]["accuracy"] > 0.93, label
        assert result[label]["nll"] < 0.25, label
        # further from what was learnt, less sure
        assert result[label]["no digits"] > 2 * result[label]["test digits"], label
    for label in ("SGLD", "SGHMC"):
        assert result[label]["no digits"] > result["MAP"]["no digits"], label


def foreign_images(result: Result) -> None:
    assert result["data"] == "digits"
    for label, row in result.items():
        if label != "data":
            assert row["accuracy"] > 0.93, label
            assert row["scrambled"] > 0.9, label
            assert row["scrambled"] > row["upside down"] > 0.6, label  # some digits stay digits
    # The linearised network is least sure of what it has not seen, and pays for it on what it has.
    assert result["Laplace"]["scrambled"] >= result["MAP"]["scrambled"]


def funnel(result: Result) -> None:
    centred, cured = result["centred"], result["non-centred"]
    assert all(abs(errors) < 4 for errors in cured["errors"].values()), cured["errors"]
    assert cured["rhat"] < 1.03
    assert centred["divergences"] > 10 * max(1, cured["divergences"])
    assert "divergences" in centred["trouble"]
    assert centred["ebfmi"] < cured["ebfmi"]
    assert 5 * centred["ess"] < cured["ess"]
    assert centred["rhat"] > cured["rhat"] + 0.01


def lazy_training(result: Result) -> None:
    narrow, wide = result["widths"].values()
    assert wide["pull"] < 2
    assert 0.3 < wide["spread"] < 2.5
    for key in ("change", "gap"):
        assert wide[key] < 0.5 * narrow[key]
        assert result["rates"][key][0] + 2 * result["rates"][key][1] < 0
    assert wide["change"] < 0.1
    assert result["pulls"] < 3


def network_hmc(result: Result) -> None:
    assert set(result["samplers"]) == {"HMC", "NUTS", "ChEES", "MCLMC"}
    gaps = []
    for label, row in result["samplers"].items():
        assert row["rhat of functions"] < row["rhat of weights"], label
        if row["per 1,000 gradients"]:
            assert row["ess"] > 40
            gaps.append(row["gap"])
    # So short a warm-up is too short for ChEES, which learns a length as well; the others make do with it.
    assert len(gaps) >= 3
    assert min(gaps) > 3 * result["sd at the data"]
    assert max(gaps) < 1.5 * min(gaps)


def posteriors(result: Result) -> None:
    rows = result["methods"]
    assert rows["NUTS by halves"]["total variation"] < 0.15
    assert rows["MAP"]["sd in the gap"] == 0
    assert min(row["sd in the gap"] for label, row in rows.items() if label != "MAP") > 0.03
    for label in ("Laplace", "SGHMC"):
        assert rows[label]["total variation"] < 0.5 * rows["MAP"]["total variation"], label
        assert rows[label]["sd in the gap"] > 0.3, label


def prior_tuning(result: Result) -> None:
    scores, best = result["scores"], result["best"]
    assert best not in {"0.1", "1e+03"}
    assert result["tuned"]["interior"]
    assert result["tuned"]["log evidence"] > scores[best]["log evidence"]
    assert scores[best]["NLL"] < min(scores["0.1"]["NLL"], scores["1e+03"]["NLL"]) - 0.1
    weak, strong = scores["0.1"], scores["1e+03"]
    assert weak["NLL"] < weak["NLL of the mode"] - 0.3
    assert (
        weak["effective parameters"] > 10 * scores["10"]["effective parameters"] > 10 * strong["effective parameters"]
    )


def optimisation(result: Result) -> None:
    for name, row in result["steps"].items():
        for taken, expected in row.values():
            assert 0.85 * expected < taken < 1.5 * expected, name
    assert result["steps"]["gradient"]["100"][0] == 624
    assert result["ends"]["Newton, bare"] == pytest.approx([0, 0], abs=1e-4)
    assert result["ends"]["Newton, trust region"] == pytest.approx([0, 1], abs=1e-5)


def smoothing(result: Result) -> None:
    ahead, back = result["filter"], result["smoother"]
    assert back["RMSE in the gap"] < 0.2 * ahead["RMSE in the gap"]
    assert back["widest sd"] < 0.25 * ahead["widest sd"]
    for row in (ahead, back):
        assert 0.8 < row["90% intervals hold"] < 0.99
    assert 0.25 < result["acceleration"] < 1.0


def signal_propagation(result: Result) -> None:
    for phase, away in result["signals"].items():
        assert away["q"] < 0.2, phase
        assert away["c"] < 0.3, phase
    for phase, (rate, error, chi) in result["gradients"].items():
        assert rate == pytest.approx(chi, abs=4 * error + 0.03), phase
    for label, (found, law) in result["circle"].items():
        assert found == pytest.approx(law, rel=0.4), label
    gaussian, orthogonal = (result["spectrum"][weights] for weights in ("gaussian", "orthogonal"))
    assert orthogonal[1] < 0.3 * gaussian[1]
    # Twenty layers: too small weights, the critical ones, too large.
    small, _, critical, _, large = result["training"]["20"]
    assert critical > 0.9
    assert max(small, large) < 0.4


CHECKS: dict[str, Callable[[Result], None]] = {
    "bound_training": bound_training,
    "certificate": certificate,
    "continual_digits": continual,
    "counts": counts,
    "coverage": coverage,
    "demo": demo,
    "eight_schools": funnel,
    "foreign_images": foreign_images,
    "hierarchical_regression": schools,
    "infinite_width": infinite_width,
    "lazy_training": lazy_training,
    "linear_regression": linear_regression,
    "mixture": mixture,
    "network_hmc": network_hmc,
    "optimisation": optimisation,
    "posteriors": posteriors,
    "prior_tuning": prior_tuning,
    "sgd_markov_chain": sgd,
    "sgld_mnist": sgld_mnist,
    "signal_propagation": signal_propagation,
    "smoothing": smoothing,
    "stiff_directions": stiff_directions,
}


def load(script: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


WRITTEN: list[Path] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if WRITTEN is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        if writes:
            WRITTEN.append(Path(os.fsdecode(path)).resolve())
    elif event == "os.rename":
        WRITTEN.append(Path(os.fsdecode(arguments[1])).resolve())


@pytest.fixture(scope="module")
def audit() -> Callable[[], Any]:
    """A context manager that lists every file that is opened for writing, or moved, inside it."""
    sys.addaudithook(_hook)  # stays until the process ends, and does nothing outside the block

    @contextmanager
    def watch() -> Iterator[list[Path]]:
        global WRITTEN
        WRITTEN = found = []
        try:
            yield found
        finally:
            WRITTEN = None

    return watch


@pytest.mark.parametrize("script", RUNS)
def test_example(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    audit: Callable[[], Any],
) -> None:
    assert script.stem in CHECKS, f"{script.name} is new: say in CHECKS what its numbers must be"
    module = load(script, monkeypatch)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "here"
    with audit() as written:
        result = module.main(["--quick", "--out", str(out)])
    elsewhere = [path for path in written if not path.is_relative_to(out) and path != Path(os.devnull)]
    assert not elsewhere
    assert list(tmp_path.iterdir()) == [out]

    CHECKS[script.stem](result)
    json.dumps(result, allow_nan=False)
    printed = capsys.readouterr()
    assert "┃" in printed.out
    pictures = list(out.rglob("*.png"))
    assert pictures
    for picture in pictures:
        assert f"wrote {picture}" in printed.out
        pixels = matplotlib.image.imread(picture)
        height, width, _ = pixels.shape
        assert min(height, width) > 400
        inside = pixels[height // 10 : -height // 10, width // 10 : -width // 10, :3]
        assert len(np.unique((inside * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 100
        assert inside.std() > 0.05


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_says_what_the_example_shows(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python examples/{script.name} --out" in text
    assert "--quick" in text


def test_the_quadrature_of_eight_schools_equals_reference_draws(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = load(ROOT / "examples" / "hierarchical_regression.py", monkeypatch).exact()
    with np.load(shared / "data/posteriordb/eight_schools-eight_schools_noncentered/reference.npz") as reference:
        names, mean, sd = (reference[key] for key in ("names", "mean", "sd"))
    ours = [*exact["theta"].tolist(), exact["mu"], exact["tau"]]
    assert list(names) == [*(f"theta[{k}]" for k in range(1, 9)), "mu", "tau"]
    # The reference is the mean of 10,000 almost independent draws.
    assert np.abs((np.array(ours) - mean) / (sd / 100)).max() < 4
