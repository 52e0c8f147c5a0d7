"""Diagnostics of chains: function space against weight space, statistics, what is left out where."""

from __future__ import annotations

import json
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import DataError
from bayesdl.posterior import DrawsPosterior, prepare
from bayesdl.posterior.convergence import ebfmi, ess_bulk, ess_tail, rhat
from bayesdl.posterior.diagnostics import ROWS, Diagnostics, Mixing
from tests.cases import dataset, network, untouched

DOUBLE = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=DOUBLE)


def around_a_point(model: Any, data: Any, chains: int = 2, draws: int = 400, spread: float = 0.05) -> DrawsPosterior:
    problem = prepare(model, data)
    point = problem.density.prior_draws(1, 5)
    z = point + spread * noise(chains, draws, problem.density.dim)
    return DrawsPosterior(problem, z, {}, {"method": "test"})


def permuted(posterior: DrawsPosterior, order: list[int]) -> DrawsPosterior:
    """Two chains: the first one, and the same with its hidden units in another order."""
    density = posterior.problem.density
    values = density.constrain(posterior.z[:1])
    other = dict(values)
    other["0.weight"], other["0.bias"] = values["0.weight"][..., order, :], values["0.bias"][..., order]
    other["2.weight"] = values["2.weight"][..., order]
    z = torch.cat([density.unconstrain(values), density.unconstrain(other)])
    return DrawsPosterior(posterior.problem, z, {}, {"method": "test"})


def wide(outputs: int = 1) -> Any:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return bdl.BayesianNetwork(net, likelihood=None if outputs == 1 else bdl.likelihoods.Categorical())


@pytest.mark.parametrize("kind", ["regression", "classes"])
def test_permuted_copies_differ_in_weights_and_agree_as_functions(kind: str) -> None:
    posterior = permuted(around_a_point(wide(1 if kind == "regression" else 3), dataset(kind)), [2, 3, 0, 1])
    with untouched():
        found = posterior.diagnostics()
    weights = ("0.weight", "0.bias", "2.weight")
    # Two chains apart from each other have 1.8, as far as ranks can tell.
    assert all(found.sites[name].rhat > 1.5 for name in weights)
    assert all(found.sites[name].ess_bulk < 20 for name in weights)
    assert found.function is not None
    assert found.log_likelihood is not None
    assert found.rhat == found.function.rhat < 1.02
    assert found.log_likelihood.rhat < 1.02
    assert found.function.ess_bulk > 200
    assert found.sites["2.bias"].rhat < 1.02
    # Chains at two different points of the function space are seen there.
    apart = posterior.z.clone()
    apart[1] += 0.5
    different = DrawsPosterior(posterior.problem, apart, {}, {}).diagnostics()
    assert different.rhat > 1.3


def test_numbers_are_those_of_the_convergence_functions() -> None:
    data = dataset("regression")
    posterior = around_a_point(network("regression"), data, 3, 60)
    found = posterior.diagnostics()
    functions = posterior.function_draws(data.x)
    total = posterior.problem.density.log_likelihood(posterior.z).sum(-1)
    assert found.function == Mixing(
        float(rhat(functions).max()), float(ess_bulk(functions).min()), float(ess_tail(functions).min())
    )
    assert found.log_likelihood == Mixing(float(rhat(total)), float(ess_bulk(total)), float(ess_tail(total)))
    weight = posterior.draws_by_chain()["0.weight"]
    assert found.sites["0.weight"].rhat == float(rhat(weight).max())
    assert list(found.sites) == [site.name for site in posterior.problem.density.sites]
    assert (found.chains, found.draws) == (3, 60)
    at = posterior.diagnostics(data.x[:2]).function
    assert at == Mixing.of(functions[..., :2])


def test_statistics_of_the_sampler() -> None:
    posterior = around_a_point(network("regression"), dataset("regression"), 2, 50)
    assert (posterior.diagnostics().divergences, posterior.diagnostics().acceptance) == (None, None)
    divergent = torch.zeros(2, 50, dtype=torch.bool)
    divergent[1, 3:6] = True
    stats = {"divergent": divergent, "acceptance": 0.25 + 0.5 * divergent, "energy": noise(2, 50, seed=3)}
    found = DrawsPosterior(posterior.problem, posterior.z, stats, {}).diagnostics()
    assert found.divergences == 3
    assert found.acceptance == pytest.approx(0.25 + 0.5 * 3 / 100)
    assert found.ebfmi == float(ebfmi(stats["energy"]).min())
    text = str(found)
    for words in ("2 chains x 50 draws", "predictions", "log likelihood", "0.weight", "3 divergent", "0.27", "E-BFMI"):
        assert words in text


def test_entries_that_never_move_are_left_out() -> None:
    draws = noise(2, 30, 3)
    draws[..., 1] = 7.0
    assert Mixing.of(draws) == Mixing.of(draws[..., [0, 2]])
    still = Mixing.of(torch.full((2, 30, 3), 7.0, dtype=DOUBLE))
    assert still.rhat == 1.0
    stuck = noise(2, 30)
    stuck[0], stuck[1] = 0.0, 1.0
    assert math.isinf(Mixing.of(stuck).rhat)


def test_many_rows_are_thinned() -> None:
    x = noise(3 * ROWS, 3)
    data = bdl.Dataset.from_arrays(x, x[:, 0] + noise(3 * ROWS, seed=1))
    posterior = around_a_point(network("regression"), data, 2, 8)
    some = torch.linspace(0, 3 * ROWS - 1, ROWS).round().long()
    assert posterior.diagnostics().function == posterior.diagnostics(x[some]).function


def test_short_chains_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 4 draws.*3 per chain.*test is no sampler"):
        around_a_point(network("regression"), dataset("regression"), 5, 3).diagnostics()


# -- programs --------------------------------------------------------------------------------------------------------

X, Y = noise(6, 2), noise(6, seed=1)


def test_several_observed_sites_count_together() -> None:
    def program(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a * x[:, 0], 1.0), obs=y)
            pyro.sample("z", dist.Normal(b * x[:, 1], 1.0), obs=z)

    posterior = around_a_point(program, {"x": X, "y": Y, "z": Y}, 2, 50)
    found = posterior.diagnostics()
    both = torch.stack([posterior.z[..., :1] * X[:, 0], posterior.z[..., 1:] * X[:, 1]], -1)
    assert found.function is not None
    assert found.function.rhat == pytest.approx(Mixing.of(both).rhat, rel=1e-12)


def test_programs_without_rows_or_predictions() -> None:
    def no_plate(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    def shared(x: Tensor, y: Tensor | None = None) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + k, 1.0), obs=y)

    for program in (no_plate, shared):
        found = around_a_point(program, (X, Y), 2, 20).diagnostics()
        assert (found.function, found.log_likelihood) == (None, None)
        assert found.rhat == found.sites["w"].rhat
        assert "predictions" not in str(found)


def test_closed_over_data_have_a_likelihood() -> None:
    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    found = around_a_point(program, {}, 2, 20).diagnostics()
    assert found.function == found.sites["mu"]
    assert found.log_likelihood is not None


def test_diagnostics_as_json() -> None:
    posterior = around_a_point(network("regression"), dataset("regression"), 2, 20)
    found = posterior.diagnostics()
    assert Diagnostics.from_json(json.loads(json.dumps(found.to_json()))) == found
    bare = Diagnostics(None, None, {"w": Mixing(math.inf, 1.0, 2.0)}, None, None, None, 2, 4)
    assert Diagnostics.from_json(json.loads(json.dumps(bare.to_json()))) == bare
