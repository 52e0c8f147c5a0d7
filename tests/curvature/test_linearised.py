"""The linearised predictive against ``J S J^T`` written out, for every structure and way to compute it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import NetworkOutputs
from bayesdl.curvature.functions import covariances
from bayesdl.errors import CertificateError, MethodError
from tests.cases import DOUBLE, dataset, network
from tests.curvature.networks import noise
from tests.curvature.test_sums import Convolutional

STRUCTURES = ("full", "functional", "diag", "kron", "ekfac", "low_rank")


def fit(kind: str, **settings: Any) -> Any:
    return bdl.fit(network(kind), dataset(kind), bdl.Laplace(**{"steps": 200, "rank": 4, **settings}))


def written_out(found: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and ``J S J^T`` in model units, from the whole Jacobian and the whole covariance."""
    at = NetworkOutputs(found.problem, found.mean)
    rows = found.problem.inputs(x)["x"]
    jacobian = torch.autograd.functional.jacobian(lambda z: at.at(z, rows), found.mean)
    assert isinstance(jacobian, Tensor)
    return at.at(found.mean, rows), jacobian @ found.law.covariance.dense() @ jacobian.mT


@pytest.mark.parametrize("random", ["*", "2.*"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_function_covariances_need_no_jacobian(structure: str, random: str) -> None:
    found = fit("classes", structure=structure, random=random)
    at = NetworkOutputs(found.problem, found.mean)
    moments = covariances(at, found.law.covariance)
    assert moments is not None
    mean, covariance = moments(found.problem.batch["x"])
    f, whole = written_out(found, dataset("classes").x)
    torch.testing.assert_close(mean, f)
    torch.testing.assert_close(covariance, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_regression_has_exact_moments(structure: str) -> None:
    found = fit("regression", structure=structure, random=("0.*", "2.*"))  # the noise is a point
    x, scale = dataset("regression").x, found.problem.scaler.y_scale
    f, covariance = written_out(found, x)
    prediction = found.predict(x, max_draws=50)
    torch.testing.assert_close(prediction.mean, found.problem.scaler.unscale_y(f[:, 0]))
    torch.testing.assert_close(prediction.epistemic, scale**2 * covariance[:, 0, 0], rtol=1e-8, atol=0)
    noise_variance = float(scale * found.mean[-1].exp()) ** 2
    torch.testing.assert_close(prediction.aleatoric, torch.full_like(prediction.mean, noise_variance))


def test_draws_of_functions_have_the_same_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fit("regression", structure="low_rank", random=("0.*", "2.*"))
    x, scale = dataset("regression").x[:6], found.problem.scaler.y_scale
    monkeypatch.setattr("bayesdl.curvature.linearised.covariances", lambda *_: None)
    f, covariance = written_out(found, x)
    draws = 20_000
    prediction = found.predict(x, max_draws=draws)
    wanted = scale**2 * covariance[:, 0, 0]
    error = (wanted / draws).sqrt()
    assert ((prediction.mean - found.problem.scaler.unscale_y(f[:, 0])).abs() < 4.5 * error).all()
    torch.testing.assert_close(prediction.epistemic, wanted, rtol=4.5 * (2 / draws) ** 0.5, atol=0)


def test_class_probabilities_are_those_of_gaussian_logits() -> None:
    found = fit("classes", structure="kron")
    x = dataset("classes").x[:4]
    f, covariance = written_out(found, x)
    draws = 40_000
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(3, dtype=DOUBLE))
    exact = (f + (root @ noise(draws, 4, 3, 1)).squeeze(-1)).softmax(-1)
    prediction = found.predict(x, max_draws=draws)
    error = (2 * exact.var(0) / draws).sqrt()
    assert ((prediction.probs - exact.mean(0)).abs() < 4.5 * error).all()


@pytest.mark.parametrize("structure", ["kron", "functional", "low_rank"])
def test_convolutions_and_what_belongs_to_no_layer(structure: str) -> None:
    """A plain convolutional network, and one some of whose weights belong to no known layer."""
    x, y = noise(8, 2, 3, 3), noise(8, 2, seed=1)
    plain = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)).double()
    for net in (plain, Convolutional().double()):
        model = bdl.BayesianNetwork(net, likelihood=bdl.likelihoods.Gaussian(noise=0.3))
        found = bdl.fit(model, (x, y), bdl.Laplace(steps=50, structure=structure, rank=3, polish=20))
        moments = covariances(NetworkOutputs(found.problem, found.mean), found.law.covariance)
        assert moments is not None
        mean, covariance = moments(x)
        f, whole = written_out(found, x)
        torch.testing.assert_close(mean, f)
        torch.testing.assert_close(covariance, whole, rtol=1e-8, atol=1e-10)


# -- few rows: the form in function space ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regression", "classes"])
def test_the_kernel_of_few_rows_is_the_full_matrix(kind: str, tmp_path: Path) -> None:
    """Covariance, evidence, predictions and draws of the same mode, and again after it was saved."""
    near = fit(kind, structure="full")
    written, dual = (
        bdl.fit(network(kind), dataset(kind), bdl.Laplace(structure=structure, polish=0), init=near)
        for structure in ("full", "functional")
    )
    exact = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(dual.law.covariance.dense(), written.law.covariance.dense(), **exact)
    torch.testing.assert_close(dual.sd, written.sd, **exact)
    torch.testing.assert_close(dual.law.covariance.precisions(), written.law.covariance.precisions(), **exact)
    assert dual.info["log_evidence"] == pytest.approx(written.info["log_evidence"], abs=1e-8)
    assert dual.info["effective_parameters"] == pytest.approx(written.info["effective_parameters"], rel=1e-8)
    assert float(dual.law.kl(written.law)) == pytest.approx(0, abs=1e-8)
    x = dataset(kind).x + 0.3
    a, b = dual.predict(x), written.predict(x)
    torch.testing.assert_close(a.mean, b.mean, **exact)
    torch.testing.assert_close(a.epistemic, b.epistemic, rtol=1e-8, atol=1e-10)
    draws = dual.law.draws(20_000, 0) - dual.mean
    sampled = draws.mT @ draws / len(draws)
    error = (dual.sd[:, None] * dual.sd) / len(draws) ** 0.5
    assert ((sampled - written.law.covariance.dense()).abs() < 7 * error + 1e-12).all()
    dual.save(tmp_path)
    loaded: Any = bdl.load(tmp_path)
    torch.testing.assert_close(loaded.predict(x).mean, a.mean)


def test_few_rows_choose_the_kernel_and_many_are_refused() -> None:
    x, y = noise(20, 5), noise(20)
    wide = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 1)).double()
    model = bdl.BayesianNetwork(wide, likelihood=bdl.likelihoods.Gaussian(noise=0.3))
    assert bdl.fit(model, (x, y), bdl.Laplace(steps=5, polish=1)).info["structure"] == "functional"
    x, y = noise(3000, 5), noise(3000, 10)
    model = bdl.BayesianNetwork(nn.Linear(5, 10).double(), likelihood=bdl.likelihoods.Gaussian(noise=0.3))
    with pytest.raises(MethodError, match=r"30,000 outputs of 3,000 rows takes 7 GiB"):
        bdl.fit(model, (x, y), bdl.Laplace(structure="functional", steps=1, polish=0))


def test_it_is_no_law_of_the_network_itself() -> None:
    """Sampled weights predict something else; the linearised functions have no divergence to certify with."""
    linearised = fit("regression", structure="diag")
    sampled = fit("regression", structure="diag", predictive="sampled")
    x = dataset("regression").x
    torch.testing.assert_close(linearised.law.covariance.dense(), sampled.law.covariance.dense())
    assert not torch.allclose(linearised.predict(x).mean, sampled.predict(x).mean, rtol=1e-3)
    assert linearised.kl() is None
    assert sampled.kl() is not None
    with pytest.raises(CertificateError, match="KL divergence"):
        bdl.certify(linearised, dataset("regression"), bound="kl")
    fresh = bdl.Dataset.from_arrays(x + 0.5, dataset("regression").y, name="fresh")
    certificate = bdl.certify(linearised, fresh)
    assert certificate.predictor == "mixture"
    with pytest.raises(MethodError, match="target"):
        linearised.predict(x, site="z")


def test_batches_and_streams_are_the_same_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fit("classes", structure="kron")
    x, y = dataset("classes").x, dataset("classes").y
    whole = found.predict(x)
    monkeypatch.setattr("bayesdl.curvature.linearised.CELLS", 5000)
    streamed = found.predict(x)
    torch.testing.assert_close(streamed.probs, whole.probs)
    torch.testing.assert_close(streamed.log_prob(y), whole.log_prob(y))


def test_leave_one_out_is_of_the_functions_that_predict() -> None:
    found = fit("regression", structure="kron")
    data = dataset("regression")
    rows = found.rows_by_chain()
    assert rows.shape == (1, 1000, 32)
    torch.testing.assert_close(rows[0].logsumexp(0) - np.log(1000), found.predict(data.x).log_prob(data.y))
    torch.testing.assert_close(rows[0], found.log_likelihood(data.x, data.y))
    groups = found.to_arviz()
    torch.testing.assert_close(torch.from_numpy(groups.log_likelihood["y"].to_numpy()), rows)
