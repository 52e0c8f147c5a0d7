"""Closed forms of class probabilities against quadrature, Monte Carlo, and the Dirichlet that they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.curvature.linearised import LinearisedPosterior
from bayesdl.curvature.links import bridge, link_of, probit
from bayesdl.errors import MethodError
from tests.cases import DOUBLE, dataset, network
from tests.curvature.networks import noise

MEANS, VARIANCES = (0.0, 0.7, 2.0, 5.0), (0.01, 1.0, 9.0, 60.0)


def integral(mean: float, variance: float) -> float:
    """``int sigmoid(f) N(f; mean, variance) df`` by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    return float((weights / (1 + np.exp(-(mean + variance**0.5 * nodes)))).sum() / weights.sum())


def one(mean: float, variance: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([[mean]], dtype=DOUBLE), torch.tensor([[[variance]]], dtype=DOUBLE)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_the_binary_probit_is_within_two_hundredths_of_the_integral(mean: float, variance: float) -> None:
    found = float(probit(*one(mean, variance)).sigmoid())
    assert found == pytest.approx(integral(mean, variance), abs=0.02)
    if mean and variance > 1:
        assert abs(found - integral(mean, variance)) < 0.3 * abs(float(torch.tensor(mean).sigmoid()) - found)


def test_the_probit_of_classes_against_draws() -> None:
    """Independent logits of equal variance, where the rule of thumb is at its best."""
    mean = torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5]], dtype=DOUBLE)
    for variance in (0.1, 1.0, 4.0):
        covariance = variance * torch.eye(3, dtype=DOUBLE).expand(2, 3, 3)
        drawn = (mean + variance**0.5 * noise(100_000, 2, 3)).softmax(-1).mean(0)
        assert (probit(mean, covariance).softmax(-1) - drawn).abs().max() < 0.06


@pytest.mark.parametrize("alpha", [[1.5, 2.0, 4.0], [30.0, 8.0, 3.0, 3.0], [0.9, 1.1]])
def test_the_bridge_is_exact_for_the_approximation_of_a_dirichlet(alpha: list[float]) -> None:
    """Mean and covariance of Laplace's approximation in the softmax basis (MacKay, 1998), and back."""
    a = torch.tensor(alpha, dtype=DOUBLE)
    count = len(a)
    mean = a.log() - a.log().mean()
    inverse = a.reciprocal()
    covariance = inverse.diag() - (inverse[:, None] + inverse) / count + inverse.sum() / count**2
    torch.testing.assert_close(bridge(mean[None], covariance[None])[0], a, rtol=1e-9, atol=0)


def test_the_bridge_counts_variance_where_it_is_large() -> None:
    """Against the integral: without the correction the mean would be that of no variance."""
    model = bdl.BayesianNetwork(torch.nn.Linear(1, 1).double(), likelihood=bdl.likelihoods.Bernoulli())
    link = link_of("bridge", model.likelihood)
    assert link is not None
    for variance in (10.0, 40.0):
        found = float(link(*one(2.0, variance)).sigmoid())
        assert found == pytest.approx(integral(2.0, variance), abs=0.08)
        assert found < float(torch.tensor(2.0).sigmoid()) - 0.1


@pytest.mark.parametrize("link", ["probit", "bridge"])
@pytest.mark.parametrize("kind", ["classes", "binary"])
def test_predictions_by_closed_links(kind: str, link: str, tmp_path: Any) -> None:
    x, y = dataset(kind).x, dataset(kind).y
    found = bdl.fit(network(kind), dataset(kind), bdl.Laplace(steps=200, link=link))
    assert isinstance(found, LinearisedPosterior)
    closed, drawn = found.predict(x), found.predict(x, link="monte_carlo", max_draws=4000)
    assert (closed.probs - drawn.probs).abs().max() < (0.05 if link == "probit" else 0.25)
    assert not torch.allclose(closed.probs, drawn.probs, atol=1e-6)
    assert closed.log_prob(y).shape == y.shape
    torch.testing.assert_close(found.predict(x, batch_size=5).probs, closed.probs)
    found.save(tmp_path)
    loaded: Any = bdl.load(tmp_path)
    torch.testing.assert_close(loaded.predict(x).probs, closed.probs)


def test_links_are_of_class_probabilities() -> None:
    with pytest.raises(MethodError, match=r"Categorical\(\) or Bernoulli\(\)"):
        bdl.fit(network("regression"), dataset("regression"), bdl.Laplace(steps=5, link="probit"))
    with pytest.raises(MethodError, match="linearised"):
        bdl.fit(network("classes"), dataset("classes"), bdl.Laplace(steps=5, link="probit", predictive="sampled"))
