"""The contract that every method keeps, as checks that take a method: for those of the registry and for new ones."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._files import read_tensors
from bayesdl._registry import method_class
from tests.cases import DOUBLE, MethodCase, dataset, network, untouched

WORKER = Path(__file__).with_name("load_worker.py")


@dataclass
class Subject:
    """A method of the registry with its quick settings, and the fits that several checks share."""

    name: str
    case: MethodCase
    fits: dict[Any, bdl.Posterior] = field(default_factory=dict)
    steps: dict[Any, int] = field(default_factory=dict)

    def method(self, **more: Any) -> Any:
        """The method with its quick settings and others."""
        return method_class(self.name)(**self.case.settings, **more)

    def network(self, kind: str = "regression", dtype: torch.dtype = DOUBLE) -> bdl.BayesianNetwork:
        """The network that the method is tried on."""
        return network(kind, dtype, self.case.dropout)

    def fit(self, kind: str = "regression", *, fresh: bool = False, **options: Any) -> bdl.Posterior:
        """A posterior on one of the small data sets; kept, unless a fresh one is asked for."""
        key = (kind, *options.items())
        if fresh or key not in self.fits:
            quiet = io.StringIO()
            self.steps[key] = 0

            def count(state: dict[str, Any]) -> None:
                self.steps[key] = state["step"]

            with untouched(), redirect_stdout(quiet), redirect_stderr(quiet):
                posterior = bdl.fit(self.network(kind), dataset(kind), self.method(), callback=count, **options)
            assert quiet.getvalue() == "", "a fit whose output nobody watches prints nothing"
            if fresh:
                return posterior
            self.fits[key] = posterior
        return self.fits[key]


CHECKS: dict[str, Callable[[Subject, Path], None]] = {}


def check(function: Callable[[Subject, Path], None]) -> Callable[[Subject, Path], None]:
    """Enter a check in the table, under the sentence that it is."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


# -- randomness ------------------------------------------------------------------------------------------------------


@check
def the_seed_decides_everything(subject: Subject, folder: Path) -> None:
    first = subject.fit()
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        assert_equal(subject.fit(fresh=True).tensors(), first.tensors())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
    other = subject.fit(seed=1).tensors()
    same = all(torch.equal(value, other[name]) for name, value in first.tensors().items())
    assert same != subject.case.random


@check
def a_stopped_fit_resumes_bit_for_bit(subject: Subject, folder: Path) -> None:
    whole = subject.fit()
    data, model = dataset("regression"), subject.network("regression")
    checkpoint = bdl.Checkpoint(folder / "run", every=7)
    total = subject.steps[("regression",)]
    for stop in {max(1, total // 4), max(1, 3 * total // 4)}:
        try:
            bdl.fit(model, data, subject.method(), checkpoint=checkpoint, callback=lambda s, k=stop: s["step"] == k)
        except bdl.errors.MethodError as error:
            assert "before" in str(error), "only a method that warms up has nothing to return yet"  # noqa: PT017
    resumed = bdl.fit(model, data, subject.method(), checkpoint=checkpoint)
    assert_equal(resumed.tensors(), whole.tensors())
    if whole.info["gradients"]:
        # Each process looks at the density once per stage, to recognise the run; nothing else is done twice.
        assert 0 < resumed.info["gradients"] - whole.info["gradients"] <= 6
        assert resumed.info["gradients_here"] < resumed.info["gradients"]


# -- files -----------------------------------------------------------------------------------------------------------


@check
def a_loaded_posterior_is_the_saved_one(subject: Subject, folder: Path) -> None:
    for kind in subject.case.kinds:
        posterior, x, y = subject.fit(kind), dataset(kind).x, dataset(kind).y
        with untouched():
            posterior.save(folder / kind)
            loaded = bdl.load(folder / kind)
        assert type(loaded) is type(posterior)
        assert loaded.info == json.loads(json.dumps(posterior.info))
        assert loaded.units == posterior.units == "scaled"
        assert_equal(loaded.tensors(), posterior.tensors())
        assert_equal(predictions(loaded, x), predictions(posterior, x))
        assert torch.equal(loaded.log_likelihood(x, y), posterior.log_likelihood(x, y))
        loaded.save(folder / "again")
        for name in ("posterior.json", "posterior.safetensors"):
            assert (folder / "again" / name).read_bytes() == (folder / kind / name).read_bytes()
        with_model = bdl.load(folder / kind, subject.network(kind))
        assert_equal(predictions(with_model, x), predictions(posterior, x))


def predicted_elsewhere(posteriors: Mapping[str, tuple[bdl.Posterior, Tensor]], folder: Path) -> dict[str, Tensor]:
    """Save posteriors and predict with them in a process of its own; ``<key>/<statistic>`` to values."""
    jobs = []
    for key, (posterior, x) in posteriors.items():
        posterior.save(folder / key / "posterior")
        jobs.append({"key": key, "x": x.tolist()})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(WORKER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read_tensors(folder / "predictions.safetensors")[0]


def predictions(posterior: bdl.Posterior, x: Tensor) -> dict[str, Tensor]:
    """What a prediction consists of, by name."""
    prediction = posterior.predict(x)
    values = {name: getattr(prediction, name) for name in ("mean", "variance", "epistemic", "aleatoric")}
    return values | {"sample": prediction.sample(3, seed=4)}


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Bit for bit, dtype included."""
    assert set(left) == set(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        # entries that a method leaves open, such as the length of a kernel that has none, are NaN in both
        torch.testing.assert_close(value, right[name], rtol=0.0, atol=0.0, equal_nan=True, msg=name)


# -- shapes and numbers ----------------------------------------------------------------------------------------------


@check
def shapes_are_those_of_the_contract(subject: Subject, folder: Path) -> None:
    for kind in subject.case.kinds:
        posterior, data = subject.fit(kind), dataset(kind)
        x, y, n = data.x[:7], data.y[:7], 7
        with untouched():
            prediction = posterior.predict(x)
            likelihood = posterior.log_likelihood(x, y)
            report = bdl.evaluate(prediction, y)
        assert len(prediction) == n
        assert likelihood.dim() == 2
        assert likelihood.shape[1] == n
        assert likelihood.isfinite().all()
        wanted = (n,) if kind == "regression" else (n, data.n_classes)
        for statistic in ("mean", "variance", "epistemic", "aleatoric", "sd"):
            value = getattr(prediction, statistic)
            assert value.shape == wanted, statistic
            assert value.isfinite().all(), statistic
            assert (value >= 0).all() or statistic == "mean"
        assert prediction.log_prob(y).shape == (n,)
        assert prediction.sample(5).shape == (5, n)
        assert all(np.isfinite(value) for name, value in report.to_dict().items() if name != "auroc")
        if kind == "regression":
            low, high = prediction.interval(0.8)
            assert bool((low < prediction.quantile(0.5)).all() and (prediction.quantile(0.5) < high).all())
        else:
            torch.testing.assert_close(prediction.probs.sum(1), torch.ones(n, dtype=DOUBLE))
            assert prediction.labels.shape == (n,)
        if subject.case.weights:
            draws = posterior.draws(5, seed=2)
            shapes = {site.name: (5, *site.shape) for site in posterior.problem.density.sites}
            assert {name: tuple(value.shape) for name, value in draws.items()} == shapes
            assert all(value.isfinite().all() for value in draws.values())
            more = posterior.draws(2000, seed=2)
            assert {len(value) for value in more.values()} == {2000}
        else:
            with pytest.raises(bdl.errors.MethodError, match="functions"):
                posterior.draws(5)


@check
def a_prediction_is_the_mixture_of_the_likelihoods_of_its_draws(subject: Subject, folder: Path) -> None:
    if not subject.case.weights:
        return
    for kind in subject.case.kinds:
        posterior, data = subject.fit(kind), dataset(kind)
        likelihood = posterior.log_likelihood(data.x, data.y, max_draws=11)
        mixture = likelihood.double().logsumexp(0) - np.log(len(likelihood))
        torch.testing.assert_close(posterior.predict(data.x, max_draws=11).log_prob(data.y), mixture)


@check
def rows_are_predicted_independently(subject: Subject, folder: Path) -> None:
    for kind in subject.case.kinds:
        posterior, x = subject.fit(kind), dataset(kind).x
        whole = posterior.predict(x)
        one = posterior.predict(x[:1])
        assert len(one) == 1
        batches = posterior.predict(x, batch_size=5)
        for statistic in ("mean", "epistemic", "aleatoric"):
            expected = getattr(whole, statistic)
            torch.testing.assert_close(getattr(one, statistic)[0], expected[0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(getattr(whole[0], statistic)[0], expected[0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(getattr(batches, statistic), expected, rtol=1e-9, atol=1e-12)


@check
def one_draw_has_no_epistemic_part(subject: Subject, folder: Path) -> None:
    for kind in subject.case.kinds:
        prediction = subject.fit(kind).predict(dataset(kind).x, max_draws=1)
        if not (subject.case.weights or kind != "regression"):
            continue  # a Gaussian process is no mixture of draws there
        assert prediction.draws == 1
        assert (prediction.epistemic == 0).all()
        for statistic in ("mean", "variance", "aleatoric", "sd"):
            assert getattr(prediction, statistic).isfinite().all()
        assert torch.equal(prediction.variance, prediction.aleatoric)
        assert prediction.log_prob(dataset(kind).y).isfinite().all()


@check
def one_row_is_enough_to_fit(subject: Subject, folder: Path) -> None:
    data, few = dataset("regression"), list(range(subject.case.fewest))
    prediction = bdl.fit(subject.network("regression"), data.subset(few), subject.method()).predict(data.x)
    for statistic in ("mean", "epistemic", "aleatoric"):
        assert getattr(prediction, statistic).isfinite().all()


@check
def predictions_are_in_raw_units(subject: Subject, folder: Path) -> None:
    data, plain = dataset("regression"), subject.fit()
    # Steps of powers of two change no digit of the standardised numbers, so the fits are the same bit for bit.
    other = bdl.Dataset.from_arrays(data.x / 4 + 3, 1024 + 16 * data.y, name="other units")
    moved = bdl.fit(subject.network("regression"), other, subject.method())
    assert plain.units == moved.units == "scaled"
    left, right = plain.predict(data.x), moved.predict(other.x)
    torch.testing.assert_close(right.mean, 1024 + 16 * left.mean)
    torch.testing.assert_close(right.epistemic, 256 * left.epistemic)
    torch.testing.assert_close(right.aleatoric, 256 * left.aleatoric)
    torch.testing.assert_close(right.quantile(0.9), 1024 + 16 * left.quantile(0.9))
    torch.testing.assert_close(right.log_prob(other.y), left.log_prob(data.y) - np.log(16))
    torch.testing.assert_close(
        moved.log_likelihood(other.x, other.y), plain.log_likelihood(data.x, data.y) - np.log(16)
    )
    assert float(right.mean.mean()) == pytest.approx(float(other.y.mean()), abs=2 * float(other.y.std()))


# -- settings --------------------------------------------------------------------------------------------------------


@check
def a_temperature_is_taken_or_refused(subject: Subject, folder: Path) -> None:
    try:
        method = subject.method(temperature=4.0)
    except bdl.errors.MethodError as error:
        assert "temperature=4.0" in str(error)  # noqa: PT017
        return
    hot = bdl.fit(subject.network("regression"), dataset("regression"), method)
    assert hot.info["settings"]["temperature"] == 4.0
    assert hot.predict(dataset("regression").x).mean.isfinite().all()
    cold = subject.fit().tensors()
    assert not all(torch.equal(value, cold[name]) for name, value in hot.tensors().items())


@check
def networks_in_float32_stay_in_float32(subject: Subject, folder: Path) -> None:
    data = dataset("regression")
    model = subject.network("regression", torch.float32)
    posterior = bdl.fit(model, data, subject.method())
    assert model.dtype == torch.float32
    if subject.case.weights:
        assert {value.dtype for value in posterior.draws(3).values()} == {torch.float32}
    prediction = posterior.predict(data.x)
    assert prediction.mean.dtype == DOUBLE, "statistics are computed in float64"
    assert prediction.mean.isfinite().all()
    posterior.save(folder / "float32")
    assert_equal(predictions(bdl.load(folder / "float32"), data.x), predictions(posterior, data.x))


@check
def the_posterior_says_how_it_came_about(subject: Subject, folder: Path) -> None:
    posterior = subject.fit(seed=1)
    info = posterior.info
    assert info["method"] == subject.name
    assert info["seed"] == 1
    assert {key: info["settings"][key] for key in subject.case.settings} == dict(subject.case.settings)
    assert info["settings"]["temperature"] == 1.0
    assert info["seconds"] > 0
    assert isinstance(info["gradients"], int)
    assert info["gradients"] == info["gradients_here"] >= 0
    assert info["interrupted"] is False
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert subject.name in repr(posterior)
    assert len(posterior.problem.rows or ()) == len(dataset("regression"))
