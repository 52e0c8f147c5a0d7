"""Priors tuned weight by weight and during training, against dense marginal likelihoods and differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.precision import choose
from bayesdl.curvature.products import hessian_products
from bayesdl.curvature.spectrum import covariance_of
from bayesdl.errors import MethodError
from bayesdl.infer.evidence import ProfileEvidence
from bayesdl.infer.loop import Run
from tests.cases import DOUBLE
from tests.curvature.networks import noise

WEIGHTS = (2.0, -1.5, 0.7, 0.0, 0.0, 0.0)


def sparse(open_noise: bool = False) -> tuple[bdl.BayesianNetwork, tuple[Tensor, Tensor]]:
    """Linear regression on six inputs, three of which say nothing."""
    x = noise(60, len(WEIGHTS))
    y = x @ torch.tensor(WEIGHTS, dtype=DOUBLE) + 0.5 * noise(60, seed=8)
    likelihood = bdl.likelihoods.Gaussian(noise=dist.LogNormal(-1.0, 1.0) if open_noise else 0.5)
    return bdl.BayesianNetwork(nn.Linear(len(WEIGHTS), 1, bias=False).double(), bdl.priors.Normal(1.0), likelihood), (
        x,
        y,
    )


def dense_evidence(x: Tensor, y: Tensor, factors: Tensor, sigma: float) -> tuple[float, np.ndarray]:
    """``log N(y; 0, sigma^2 I + X diag(1 / factors) X^T)`` and its gradient by the logarithms of the factors."""
    a, b, f = x.numpy(), y.numpy(), factors.numpy()
    covariance = sigma**2 * np.eye(len(b)) + (a / f) @ a.T
    inverse = np.linalg.inv(covariance)
    solved = inverse @ b
    value = -0.5 * (b @ solved + np.linalg.slogdet(2 * np.pi * covariance)[1])
    slope = -0.5 / f * ((a.T @ solved) ** 2 - np.einsum("nk,nm,mk->k", a, inverse, a))
    return float(value), slope


def fit(model: Any, data: Any, **settings: Any) -> Any:
    return bdl.fit(model, data, bdl.Laplace(**{"steps": 300, "polish": 500, **settings}), seed=0, progress=False)


# -- a precision for each weight -------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "functional"])
def test_automatic_relevance_determination_maximises_the_dense_marginal_likelihood(structure: str) -> None:
    model, (x, y) = sparse()
    found = fit(model, (x, y), tune="parameters", structure=structure)
    factors = torch.tensor(found.info["prior_precision"]["weight"], dtype=DOUBLE)
    value, slope = dense_evidence(x, y, factors, 0.5)
    assert found.info["log_evidence"] == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(found.info["evidence_gradient"]["weight"], slope, atol=1e-6)
    assert found.info["stationary"]
    outside = [int(name[7:-1]) for name in found.info["at_bound"]]
    assert set(outside) <= {3, 4, 5}
    assert outside
    assert not found.info["interior"]
    inside = sorted(set(range(6)) - set(outside))
    assert factors[outside].tolist() == pytest.approx([1e8] * len(outside), rel=0.02)
    assert np.abs(slope[inside]).max() < 1e-3
    assert (found.mean[outside].abs() < 1e-6).all()
    # No other choice of the relevant ones does better, nor does taking back what was switched off.
    for k in range(6):
        for move in (-0.3, 0.3) if k in inside else (-8.0, -17.0):
            other = factors.clone()
            other[k] *= np.exp(move)
            assert dense_evidence(x, y, other, 0.5)[0] < value


def test_relevance_and_noise_together() -> None:
    model, (x, y) = sparse(open_noise=True)
    found = fit(model, (x, y), tune="parameters", structure="full")
    assert found.info["stationary"]
    sigma = float(found.mean[-1].exp())
    factors = torch.tensor(found.info["prior_precision"]["weight"], dtype=DOUBLE)

    def whole(log_sigma: float) -> float:
        prior = -0.5 * (log_sigma + 1.0) ** 2
        return dense_evidence(x, y, factors, float(np.exp(log_sigma)))[0] + prior

    slope = (whole(np.log(sigma) + 1e-4) - whole(np.log(sigma) - 1e-4)) / 2e-4
    assert abs(slope) < 2e-3


@pytest.mark.parametrize("open_noise", [False, True])
@pytest.mark.parametrize("structure", ["full", "functional", "diag"])
def test_the_drift_of_all_numbers_at_once_is_that_of_each(structure: str, open_noise: bool) -> None:
    """One gradient of log det P against its differences along every movement of the mode."""
    x = noise(40, 2)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2 if open_noise else 3)).double()
    open_likelihood = bdl.likelihoods.Gaussian(noise=dist.LogNormal(-1.0, 1.0))
    likelihood = open_likelihood if open_noise else bdl.likelihoods.Categorical()
    y = (x * 2).sin() + 0.3 * noise(40, 2, seed=4) if open_noise else (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    found = fit(bdl.BayesianNetwork(net, None, likelihood), (x, y), structure=structure)
    choice = choose(found.problem, structure, "ggn", "*", 20, 40)
    evidence = ProfileEvidence(found.problem, choice, Run(), "parameters", lambda *given: given[1])
    point = evidence.point(evidence.first(found.mean), found.mean)
    at_once, each = evidence._drift_at_once(point), evidence._drift_by_moves(point)
    assert float(each.abs().max()) > 0.05
    torch.testing.assert_close(at_once, each, rtol=1e-4, atol=1e-5)


def test_where_the_hessian_is_not_negative_the_approximation_moves_the_mode() -> None:
    """Forces along two eigenvectors of the Hessian, one of each sign; with one C for all rows, for both of them."""
    x = noise(40, 2)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    model = bdl.BayesianNetwork(net, None, bdl.likelihoods.Gaussian(noise=0.3))
    found = fit(model, (x, x.prod(1)), structure="full", steps=5, polish=0)
    evidence = ProfileEvidence(
        found.problem, choose(found.problem, "full", "ggn", "*", 20, 40), Run(), "parameters", lambda *given: given[1]
    )
    z = noise(1, len(found.mean), seed=2)[0]
    point = evidence.point(evidence.first(z), z)
    eye = torch.eye(len(z), dtype=DOUBLE)
    spread = covariance_of(point.blocks, len(z)).filled(evidence.sd_at(point.numbers))
    root = spread.scaled(eye)  # rows A e_i, transposed A
    hessian = hessian_products(evidence.working(point.numbers), z.expand_as(eye))(eye)
    values, vectors = torch.linalg.eigh(root @ hessian @ root.mT)
    assert values[0] < -0.01
    assert values[-1] > 0.01
    along = vectors[:, [0, -1]].mT
    forces = torch.linalg.solve(root, along.mT).mT
    each, together = (evidence._moved(point, forces, together=flag) for flag in (False, True))
    torch.testing.assert_close(together, spread.scaled(along))
    torch.testing.assert_close(each, spread.scaled(along / torch.tensor([[1.0], [float(values[-1])]], dtype=DOUBLE)))
    assert (each[1] - together[1]).norm() > 0.1 * together[1].norm()


def test_structures_without_a_gradient_by_every_weight_are_refused() -> None:
    model, data = sparse()
    with pytest.raises(MethodError, match="structure='kron' has not: use structure='diag'"):
        fit(model, data, tune="parameters", structure="kron", steps=5, polish=0)


# -- while the network trains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "batch_size"),
    [("prior", None), ("parameters", None), pytest.param("prior", 20, marks=pytest.mark.slow)],
)
def test_tuning_in_training_ends_where_tuning_afterwards_does(groups: str, batch_size: int | None) -> None:
    """With ``rounds=0``: what training alone has found."""
    model, data = sparse(open_noise=True)
    after = fit(model, data, tune=groups, structure="full")
    settings: dict[str, Any] = {"batch_size": batch_size, "steps": 600, "polish": 50}
    online = fit(model, data, tune=groups, structure="full", online_rounds=20, rounds=0, **settings)
    assert online.info["rounds"] == 0
    assert online.info["log_evidence"] == pytest.approx(after.info["log_evidence"], abs=0.02)
    assert float(online.mean[-1].exp()) == pytest.approx(float(after.mean[-1].exp()), rel=0.01)
    if groups == "prior":
        assert online.info["prior_precision"]["all"] == pytest.approx(after.info["prior_precision"]["all"], rel=0.02)
        assert abs(online.info["evidence_gradient"]["all"]) < 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {"online_rounds": 5},
        {"online_rounds": 5, "tune": "prior", "optimizer": "lbfgs"},
        {"online_rounds": 5, "tune": "prior", "validation": 0.2, "polish": 0},
    ],
)
def test_tuning_in_training_needs_a_training(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="while it trains"):
        bdl.Laplace(**settings)


# -- what is told of the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "polish", "reason"), [(nn.ReLU, 60, "on a kink"), (nn.Tanh, 3, "more polish=")])
def test_tuning_says_why_it_found_no_mode(activation: Any, polish: int, reason: str) -> None:
    x = noise(40, 2)
    y = (2 * x[:, 0]).sin() * x[:, 1] + 0.1 * noise(40, seed=5)
    net = nn.Sequential(nn.Linear(2, 8), activation(), nn.Linear(8, 1)).double()
    model = bdl.BayesianNetwork(net, None, bdl.likelihoods.Gaussian(noise=0.1))
    found = fit(model, (x, y), structure="full", tune="prior", rounds=1, polish=polish)
    assert reason in found.info["tuning_ended"]
    assert not found.info["interior"]


@pytest.mark.parametrize(("rounds", "ended"), [(1, "after 1 rounds"), (100, "stationary")])
def test_tuning_says_how_it_ended(rounds: int, ended: str) -> None:
    model, data = sparse()
    info = fit(model, data, structure="full", tune="prior", rounds=rounds).info
    assert ended in info["tuning_ended"]
    assert info["interior"] == (rounds > 1)
