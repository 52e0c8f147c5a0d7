"""From a model and data to arguments in the model's units: units, dtypes, rows, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.data import RowIds
from bayesdl.errors import DataError, ModelError, NotFactorised
from bayesdl.posterior import prepare
from tests.cases import dataset, network, program, untouched

DOUBLE = torch.float64
X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0], [0.0, 1.0]], dtype=DOUBLE)
Y = torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=DOUBLE)


# -- units -----------------------------------------------------------------------------------------------------------


def test_datasets_are_standardised_for_networks() -> None:
    data = dataset("regression")
    with untouched():
        problem = prepare(network("regression"), data)
    x, y = problem.batch["x"], problem.batch["y"]
    torch.testing.assert_close(x, (data.x - data.x.mean(0)) / data.x.std(0, correction=0))
    torch.testing.assert_close(y, (data.y - data.y.mean()) / data.y.std(correction=0))
    assert problem.scaled
    assert problem.prior_rows is None
    assert problem.rows == data.rows
    assert problem.complete
    assert (problem.n, problem.task, problem.seed, problem.target) == (len(data), "regression", 0, "y")


@pytest.mark.parametrize("kind", ["binary", "classes"])
def test_classes_keep_their_labels(kind: str) -> None:
    problem = prepare(network(kind), dataset(kind))
    assert torch.equal(problem.batch["y"].long(), dataset(kind).y)
    assert problem.classes == dataset(kind).classes
    assert float(problem.scaler.y_scale) == 1.0


def test_counts_are_not_scaled() -> None:
    model = bdl.BayesianNetwork(nn.Linear(2, 1).double(), likelihood=bdl.likelihoods.Poisson())
    problem = prepare(model, bdl.Dataset.from_arrays(X, [0.0, 3.0, 1.0, 2.0], "regression"))
    assert problem.batch["y"].tolist() == [0.0, 3.0, 1.0, 2.0]
    assert problem.scaled, "the inputs are"


def test_pairs_and_dicts_and_programs_stay_raw() -> None:
    model = bdl.BayesianNetwork(nn.Linear(2, 1).double())
    for problem in (
        prepare(model, (X, Y)),
        prepare(program, (X, Y)),
        prepare(program, {"x": X, "y": Y}),
        prepare(model, {"x": X, "y": Y}),
    ):
        assert torch.equal(problem.batch["x"], X)
        assert torch.equal(problem.batch["y"], Y)
        assert not problem.scaled
        assert len(problem.prior_rows or ()) == 0
    raw = prepare(_single, bdl.Dataset.from_arrays(X, Y))
    assert torch.equal(raw.batch["x"], X.float()), "programs get torch's default dtype"
    standard = prepare(_single, bdl.Dataset.from_arrays(X, Y).standardised())
    torch.testing.assert_close(standard.batch["y"].mean(), torch.tensor(0.0))
    assert not standard.scaled, "its raw units are the standardised ones"


def _single(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def test_networks_get_their_own_dtype() -> None:
    problem = prepare(network("regression", torch.float32), dataset("regression"))
    assert {value.dtype for value in problem.batch.values()} == {torch.float32}
    assert problem.inputs(dataset("regression").x)["x"].dtype == torch.float32


def test_inputs_and_targets_come_to_model_units() -> None:
    data = dataset("regression")
    problem = prepare(network("regression"), data)
    for x in (data.x, data.x.numpy(), data.x.tolist(), {"x": data.x}):
        torch.testing.assert_close(problem.inputs(x)["x"], problem.batch["x"])
    batch = problem.labelled(data.x, data.y)
    torch.testing.assert_close(batch["y"], problem.batch["y"])
    for one in (
        problem.labelled(data.x, data.y[:, None]),
        problem.labelled({"x": data.x, "y": data.y}),
        problem.labelled({"x": data.x}, data.y.tolist()),
    ):
        assert all(torch.equal(one[name], batch[name]) for name in batch)


def test_whole_numbers_index_an_embedding() -> None:
    net = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 1)).double()
    words = torch.tensor([[0, 1], [2, 3], [4, 0]])
    problem = prepare(bdl.BayesianNetwork(net), (words, Y[:3]))
    assert problem.batch["x"].dtype == torch.int64
    assert problem.inputs([[1.0, 2.0]])["x"].dtype == torch.int64
    with pytest.raises(DataError, match=r"x must hold whole numbers.*0\.5"):
        problem.inputs([[0.5, 1.0]])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3), "columns"),
        (torch.zeros(2), "row dimension"),
        (torch.zeros(0, 2), "no rows"),
        (torch.tensor([[1.0, torch.nan]]), "NaN or infinite, the first at"),
        ([["a", "b"]], "no numbers"),
    ],
)
def test_inputs_that_do_not_fit(x: Any, words: str) -> None:
    scaled = prepare(bdl.BayesianNetwork(nn.Linear(2, 1).double()), bdl.Dataset.from_arrays(X, Y))
    raw = prepare(bdl.BayesianNetwork(nn.Linear(2, 1).double()), (X, Y))
    with pytest.raises(DataError, match=words):
        scaled.inputs(x)
    # Without a scaler the network itself finds the wrong columns.
    with pytest.raises(DataError, match=words if words != "columns" else "cannot take x of shape"):
        raw.inputs(x)


def test_targets_that_do_not_fit() -> None:
    problem = prepare(network("classes"), dataset("classes"))
    x = dataset("classes").x[:2]
    with pytest.raises(DataError, match="x has 2 rows and y has 3"):
        problem.labelled(x, [0, 1, 2])
    with pytest.raises(DataError, match=r"whole numbers.*0\.7"):
        problem.labelled(x, [0.7, 1.0])
    with pytest.raises(DataError, match="Label 5"):
        problem.labelled(x, [0, 5])
    with pytest.raises(DataError, match="needs y as well"):
        problem.labelled(x)
    with pytest.raises(DataError, match="y holds 1 values that are NaN"):
        prepare(network("regression"), dataset("regression")).labelled(dataset("regression").x[:1], [np.nan])


def test_lengths_in_a_dict_must_agree() -> None:
    def two(x: Tensor, t: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + t, 1.0), obs=y)

    problem = prepare(two, {"x": X, "t": Y, "y": Y})
    with pytest.raises(DataError, match="x has 3 rows and t has 2"):
        problem.inputs({"x": X[:3], "t": Y[:2]})


def test_models_that_are_none() -> None:
    with pytest.raises(ModelError, match="callable"):
        prepare(3, (X, Y))
    with pytest.raises(ModelError, match=r"bayesdl\.BayesianNetwork\(net\)"):
        prepare(nn.Linear(2, 1), (X, Y))
    with pytest.raises(ModelError, match="two arguments"):
        prepare(lambda x: None, (X, Y))
    with pytest.raises(DataError, match="int"):
        prepare(program, 7)


def test_targets_must_be_one_site() -> None:
    def none(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    problem = prepare(none, (X, Y))
    with pytest.raises(ModelError, match=r"0 sites.*none"):
        _ = problem.target
    with pytest.raises(NotFactorised, match="plate"):
        _ = problem.n


# -- rows ------------------------------------------------------------------------------------------------------------


def test_reserved_rows_shape_the_scaler() -> None:
    data = dataset("regression")
    problem = prepare(network("regression"), data, prior_rows=0.25, seed=3)
    rows = problem.prior_rows
    assert rows is not None
    assert len(rows) == len(data) // 4
    part = data.subset(data.rows.isin(rows))
    torch.testing.assert_close(problem.scaler.x_mean, part.x.mean(0))
    torch.testing.assert_close(problem.scaler.y_scale, part.y.std(correction=0))
    assert problem.n == len(data), "all rows are fitted on"
    again = prepare(network("regression"), data, prior_rows=rows)
    assert again.prior_rows == rows
    assert torch.equal(again.batch["x"], problem.batch["x"])
    other = prepare(network("regression"), data, prior_rows=0.25, seed=4)
    assert other.prior_rows != rows


@pytest.mark.parametrize("rows", [0.0, 1.0, -0.1, 2])
def test_reserved_rows_are_a_part(rows: float) -> None:
    with pytest.raises(DataError, match=f"prior_rows={rows}"):
        prepare(network("regression"), dataset("regression"), prior_rows=rows)


def test_reserved_rows_must_be_among_the_rows() -> None:
    with pytest.raises(DataError, match="3 of the prior rows"):
        prepare(network("regression"), dataset("regression"), prior_rows=RowIds.of("elsewhere", 3))
    with pytest.raises(DataError, match="dict"):
        prepare(program, {"x": X, "y": Y}, prior_rows=0.5)


def test_parts_of_a_problem_keep_units_and_prior() -> None:
    problem = prepare(network("regression"), dataset("regression"), temperature=2.0, likelihood_temperature=3.0)
    index = torch.tensor([1, 5, 7])
    part = problem.restrict(index)
    assert part.n == 3
    assert torch.equal(part.batch["x"], problem.batch["x"][index])
    assert part.scaler is problem.scaler
    assert problem.rows is not None
    assert part.rows == problem.rows.take(index)
    assert (part.density.temperature, part.density.likelihood_temperature) == (2.0, 3.0)
    chains = problem.minibatch(torch.tensor([[0, 1], [2, 3], [4, 5]]))
    assert chains["x"].shape == (3, 2, 3)
    assert torch.equal(chains["y"][2], problem.batch["y"][4:6])


def test_arrays_keep_the_meaning_of_their_types() -> None:
    pd = pytest.importorskip("pandas")

    frame = pd.DataFrame({"a": [1, 2, 3, 4], "b": [0.5, 0.1, 0.2, 0.3]})
    problem = prepare(_single, (frame, np.array([1.0, 2.0, 3.0, 4.0])))
    assert problem.batch["x"].dtype == torch.float32
    assert problem.inputs(frame)["x"].dtype == torch.float32
    listed = prepare(_single, ([[1.0, 2.0], [3.0, 4.0]], [1.0, 2.0]))
    assert listed.batch["x"].shape == (2, 2)
