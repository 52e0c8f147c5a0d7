"""Kalman filtering of weights: exact for linear models, in any order and any batches; useful for small networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import MethodError
from tests.cases import DOUBLE, Conjugate, conjugate, dataset, network


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_linear_model_gets_its_exact_posterior(batch_size: int | None, backwards: bool) -> None:
    order = torch.arange(60).flip(0) if backwards else torch.arange(60)
    data = (conjugate().x[order], conjugate().y[order])
    found = bdl.fit(conjugate().network(), data, bdl.KalmanFilter(batch_size=batch_size))
    torch.testing.assert_close(found.mean, conjugate().mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.law.covariance.dense(), conjugate().covariance(), rtol=0, atol=1e-10)
    assert found.info["log_evidence"] == pytest.approx(conjugate().log_evidence(), abs=1e-8)
    assert found.info["linear"]


def test_it_goes_on_from_an_earlier_posterior() -> None:
    whole = conjugate()
    first, second = Conjugate(whole.x[:25], whole.y[:25]), Conjugate(whole.x[25:], whole.y[25:])
    before = bdl.fit(whole.network(), first.data, bdl.LastLayer())
    found = bdl.fit(whole.network(), second.data, bdl.KalmanFilter(batch_size=4), prior=before)
    torch.testing.assert_close(found.mean, whole.mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.law.covariance.dense(), whole.covariance(), rtol=0, atol=1e-10)


def test_several_outputs_and_a_bias() -> None:
    stream = torch.Generator().manual_seed(1)
    x, y = (torch.randn(30, k, generator=stream, dtype=DOUBLE) for k in (3, 2))
    net = nn.Linear(3, 2).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(0.8), bdl.likelihoods.Gaussian(noise=0.4))
    filtered, exact = (bdl.fit(model, (x, y), method) for method in (bdl.KalmanFilter(), bdl.LastLayer()))
    torch.testing.assert_close(filtered.mean, exact.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(filtered.law.covariance.dense(), exact.law.covariance.dense(), rtol=0, atol=1e-10)
    assert filtered.info["log_evidence"] == pytest.approx(exact.info["log_evidence"], abs=1e-8)


def test_a_network_learns_in_one_pass() -> None:
    stream = torch.Generator().manual_seed(2)
    x = 4 * torch.rand(300, 1, generator=stream, dtype=DOUBLE) - 2
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(300, generator=stream, dtype=DOUBLE)
    net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal("fan_in", w_std=2.0), bdl.likelihoods.Gaussian(noise=0.1))
    found = bdl.fit(model, (x, y), bdl.KalmanFilter())
    assert not found.info["linear"]
    new = torch.linspace(-1.8, 1.8, 50, dtype=DOUBLE)[:, None]
    error = found.predict(new, max_draws=200).mean - torch.sin(2 * new[:, 0])
    assert error.square().mean().sqrt() < 0.1
    assert (found.sd > 0).all()


def test_the_noise_is_the_likelihoods_own_or_as_given() -> None:
    data = dataset("regression")
    assert bdl.fit(network("regression"), data, bdl.KalmanFilter()).info["noise"] == pytest.approx(2.718281828**-1.2)
    assert bdl.fit(network("regression"), data, bdl.KalmanFilter(noise=0.7)).info["noise"] == 0.7
    assert bdl.fit(conjugate().network(), conjugate().data, bdl.KalmanFilter()).info["noise"] == 0.5


def test_refusals() -> None:
    def refused(model: Any, data: Any, match: str) -> None:
        with pytest.raises(MethodError, match=match):
            bdl.fit(model, data, bdl.KalmanFilter())

    refused(network("classes"), dataset("classes"), "likelihood must be Gaussian")
    refused(conjugate().program, conjugate().data, "BayesianNetwork")
    wide = nn.Sequential(nn.Linear(3, 3000), nn.Tanh(), nn.Linear(3000, 1)).double()
    refused(bdl.BayesianNetwork(wide), conjugate().data, r"15001 weights takes 5\.0 GiB")
    net = nn.Linear(3, 1).double()
    refused(bdl.BayesianNetwork(net, bdl.priors.Laplace()), conjugate().data, "not Gaussian")
    noise = bdl.likelihoods.Gaussian(noise=torch.distributions.HalfNormal(1.0))
    refused(bdl.BayesianNetwork(net, likelihood=noise), conjugate().data, "give noise=")
    refused(bdl.BayesianNetwork(net, bdl.priors.Hierarchical()), conjugate().data, "unknowns of its own")
