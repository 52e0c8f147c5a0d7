"""The last layer in closed form: exact posteriors and evidences, and random features against their kernel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gpytorch
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import MethodError, ModelError
from bayesdl.models import RandomFourierFeatures
from bayesdl.models.features import features
from tests.cases import DOUBLE, conjugate, dataset, network

STREAM = torch.Generator().manual_seed(5)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=STREAM, dtype=DOUBLE)


def deep(outputs: int = 1, bias: bool = True, **likelihood: Any) -> bdl.BayesianNetwork:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs, bias=bias)).double()
    prior = bdl.priors.Normal("fan_in", w_std=1.3, b_std=0.7)
    return bdl.BayesianNetwork(net, prior, bdl.likelihoods.Gaussian(**likelihood))


def oracle(posterior: bdl.Posterior, noise: float) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of the layer by brute force over its design matrix, and log N(y; X m, C)."""
    problem = posterior.problem
    values = problem.density.constrain(posterior.mean)
    phi = features(problem.model, values, problem.batch["x"])
    y = problem.batch["y"].reshape(len(phi), -1)
    outputs = y.shape[1]
    sites = {site.name: site for site in problem.density.sites}
    layer = [site for name, site in sites.items() if name.startswith("2.")]
    columns = [torch.kron(torch.eye(outputs, dtype=DOUBLE), phi)]
    if "2.bias" in sites:
        columns.append(torch.kron(torch.eye(outputs, dtype=DOUBLE), torch.ones(len(phi), 1, dtype=DOUBLE)))
    design, flat = torch.cat(columns, 1), y.mT.reshape(-1)
    sd = torch.cat([site.gaussian[1].reshape(-1) for site in layer if site.gaussian is not None])
    precision = design.mT @ design / noise**2 + sd.square().reciprocal().diag()
    covariance = torch.linalg.inv(precision)
    law = torch.distributions.MultivariateNormal(
        torch.zeros_like(flat), noise**2 * torch.eye(len(flat), dtype=DOUBLE) + design * sd.square() @ design.mT
    )
    return covariance @ design.mT @ flat / noise**2, covariance, float(law.log_prob(flat))


# -- exact -----------------------------------------------------------------------------------------------------------


def test_conjugate_regression_is_exact() -> None:
    found = bdl.fit(conjugate().network(), conjugate().data, bdl.LastLayer())
    torch.testing.assert_close(found.mean, conjugate().mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.law.covariance.dense(), conjugate().covariance(), rtol=0, atol=1e-10)
    assert found.info["log_evidence"] == pytest.approx(conjugate().log_evidence(), abs=1e-8)
    assert found.info["gradients"] == 0
    assert found.kl() == pytest.approx(
        float(
            torch.distributions.kl_divergence(
                torch.distributions.MultivariateNormal(conjugate().mean(), conjugate().covariance()),
                torch.distributions.MultivariateNormal(torch.zeros(3, dtype=DOUBLE), 0.16 * torch.eye(3, dtype=DOUBLE)),
            )
        ),
        rel=1e-9,
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_batches_in_any_order_are_one_batch(order: tuple[int, ...], tmp_path: Path) -> None:
    x, y = conjugate().data
    parts = [slice(0, 10), slice(10, 45), slice(45, 60)]
    posterior, evidence = None, 0.0
    for k in order:
        posterior = bdl.fit(conjugate().network(), (x[parts[k]], y[parts[k]]), bdl.LastLayer(), prior=posterior)
        evidence += posterior.info["log_evidence"]
        posterior = bdl.load(posterior.save(tmp_path / str(k)))
    assert posterior is not None
    torch.testing.assert_close(posterior.mean, conjugate().mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(posterior.law.covariance.dense(), conjugate().covariance(), rtol=0, atol=1e-10)
    # p(y1, y2, y3) = p(y1) p(y2 | y1) p(y3 | y1, y2)
    assert evidence == pytest.approx(conjugate().log_evidence(), abs=1e-8)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_exact_given_its_features(outputs: int, bias: bool) -> None:
    x, y = randn(20, 3), randn(20) if outputs == 1 else randn(20, outputs)
    found = bdl.fit(deep(outputs, bias, noise=0.4), (x, y), bdl.LastLayer(steps=20))
    mean, covariance, evidence = oracle(found, 0.4)
    size = outputs * (4 + bias)
    torch.testing.assert_close(found.mean[-size:], mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.law.covariance.dense()[-size:, -size:], covariance, rtol=0, atol=1e-9)
    assert found.info["log_evidence"] == pytest.approx(evidence, abs=1e-8)
    assert (found.sd[:-size] == 0).all()
    trained = bdl.fit(deep(outputs, bias, noise=0.4), (x, y), bdl.MAP(steps=20)).unconstrained_draws()[0]
    assert torch.equal(found.mean[:-size], trained[:-size])
    assert found.kl() is None


def test_outputs_share_one_factor_and_batches_keep_it(tmp_path: Path) -> None:
    """Three outputs in two batches: means differ by output in the second prior; against the prior written out."""
    net = nn.Sequential(nn.Linear(4, 3)).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(w_std=1.3, b_std=0.7), bdl.likelihoods.Gaussian(noise=0.4))
    x, y = randn(30, 4), randn(30, 3)
    first = bdl.load(bdl.fit(model, (x[:12], y[:12]), bdl.LastLayer()).save(tmp_path))
    dense = bdl.posterior.covariance.Dense.of(first.law.covariance.dense())
    written = bdl.posterior.GaussianPosterior(first.problem, bdl.posterior.normal.Normal(first.mean, dense), {})
    slow = bdl.fit(model, (x[12:], y[12:]), bdl.LastLayer(), prior=written)
    quick = bdl.fit(model, (x[12:], y[12:]), bdl.LastLayer(), prior=first)
    assert {name: tuple(part.shape) for name, part in quick.law.covariance.inner.tensors().items()} == {
        "left": (3, 3),
        "right": (5, 5),
        "spread": (3, 5),
    }
    torch.testing.assert_close(quick.mean, slow.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(quick.law.covariance.dense(), slow.law.covariance.dense(), rtol=0, atol=1e-11)
    assert quick.info["log_evidence"] == pytest.approx(slow.info["log_evidence"], abs=1e-8)
    assert quick.kl() == pytest.approx(slow.kl(), abs=1e-8)
    # Both batches at once, output by output.
    whole = bdl.fit(model, (x, y), bdl.LastLayer())
    torch.testing.assert_close(quick.mean, whole.mean, rtol=0, atol=1e-10)
    # Standard deviations that differ between outputs: nothing to share.
    sd = torch.linspace(0.5, 2.0, 15, dtype=DOUBLE)
    diagonal = bdl.posterior.normal.Normal(first.mean, bdl.posterior.covariance.Diagonal(sd))
    uneven = bdl.fit(model, (x, y), bdl.LastLayer(), prior=bdl.posterior.GaussianPosterior(first.problem, diagonal, {}))
    design = torch.cat([torch.kron(torch.eye(3, dtype=DOUBLE), part) for part in (x, torch.ones(30, 1).double())], 1)
    precision = design.mT @ design / 0.16 + sd.square().reciprocal().diag()
    torch.testing.assert_close(uneven.law.covariance.dense(), torch.linalg.inv(precision), rtol=0, atol=1e-10)


def test_the_evidence_is_that_of_the_raw_targets() -> None:
    data = dataset("regression")
    found = bdl.fit(network("regression"), data, bdl.LastLayer(steps=20))
    _, _, evidence = oracle(found, found.info["noise"])
    assert found.info["log_evidence"] == pytest.approx(evidence - 32 * math.log(float(data.y.std(correction=0))))


@pytest.mark.parametrize("rows", [8, 200])
def test_the_noise_is_integrated_over(rows: int) -> None:
    """Against a fine sum over noise levels of exact regressions; few rows leave the noise open."""
    x = randn(rows, 2)
    y = x @ torch.tensor([1.0, -0.5], dtype=DOUBLE) + 0.6 * randn(rows)
    prior = dist.LogNormal(-1.0, 1.0)
    net = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(1.5), bdl.likelihoods.Gaussian(noise=prior))
    levels, weights = torch.linspace(-4, 4, 801, dtype=DOUBLE), []
    moments: list[tuple[Tensor, Tensor]] = []
    for level in levels.tolist():
        noise = math.exp(level)
        precision = x.T @ x / noise**2 + torch.eye(2, dtype=DOUBLE) / 1.5**2
        mean = torch.linalg.solve(precision, x.T @ y / noise**2)
        residual = (y.square().sum() / noise**2 - mean @ precision @ mean) / 2
        log_det = rows * math.log(2 * math.pi * noise**2) + float(torch.logdet(precision)) + 4 * math.log(1.5)
        moments.append((mean, torch.linalg.inv(precision)))
        weights.append(
            float(-log_det / 2 - residual) + float(prior.log_prob(torch.tensor(noise, dtype=DOUBLE))) + level
        )
    log_weights = torch.tensor(weights, dtype=DOUBLE)
    share = log_weights.softmax(0)
    means, covariances = (torch.stack([pair[k] for pair in moments]) for k in range(2))
    mean = share @ means
    away = means - mean
    covariance = (share[:, None, None] * (covariances + away[:, :, None] * away[:, None, :])).sum(0)

    found = bdl.fit(model, (x, y), bdl.LastLayer(noise_levels=40))
    assert found.info["log_evidence"] == pytest.approx(float(log_weights.logsumexp(0)) + math.log(8 / 800), abs=1e-8)
    laws = found.laws
    torch.testing.assert_close(torch.stack([law.mean[:2] for law in laws]).mean(0), mean, rtol=0, atol=2e-3)
    spread = torch.stack([law.covariance.dense()[:2, :2] for law in laws]).mean(0)
    torch.testing.assert_close(spread, covariance, rtol=0.03, atol=1e-3)
    inside = torch.tensor(found.info["noise_levels"]).log()
    assert float(inside.mean()) == pytest.approx(float(share @ levels), abs=3e-3)
    sd = float((share @ (levels - share @ levels).square()).sqrt())
    assert float(inside.std()) == pytest.approx(sd, rel=0.04)
    # Where the noise is open, the highest evidence is too sure of the weights.
    one = bdl.fit(model, (x, y), bdl.LastLayer()).law.covariance.dense()[:2, :2]
    assert bool(one.trace() < 0.9 * spread.trace()) == (rows == 8)
    again = bdl.fit(model, (x, y), bdl.LastLayer(noise_levels=40), prior=None)
    assert torch.equal(again.laws[7].mean, laws[7].mean)
    known = bdl.fit(conjugate().network(), conjugate().data, bdl.LastLayer(noise_levels=40))
    torch.testing.assert_close(known.mean, conjugate().mean())


def test_noise_and_prior_scale_have_the_highest_evidence() -> None:
    x = randn(40, 3)
    y = torch.sin(x[:, 0]) + 0.3 * randn(40)
    method = bdl.LastLayer(steps=30, tune_prior=True)
    model = deep(noise=dist.LogNormal(-1.2, 1.0))
    found = bdl.fit(model, (x, y), method)
    noise, scale = found.info["noise"], found.info["prior_scale"]

    def objective(noise: float, scale: float) -> float:
        problem = bdl.posterior.prepare(model, (x, y))
        phi = features(model, problem.density.constrain(found.mean), x)
        design = torch.cat([phi, torch.ones(40, 1, dtype=DOUBLE)], 1)
        sd = torch.cat([torch.full((4,), 1.3 / 2), torch.full((1,), 0.7)]).double() * scale
        law = torch.distributions.MultivariateNormal(
            torch.zeros(40, dtype=DOUBLE), noise**2 * torch.eye(40, dtype=DOUBLE) + design * sd.square() @ design.mT
        )
        return float(law.log_prob(y) + dist.LogNormal(-1.2, 1.0).log_prob(torch.tensor(noise, dtype=DOUBLE)))

    best = objective(noise, scale)
    step = 1e-4
    for a, b in ((1 + step, 1.0), (1.0, 1 + step)):
        slope = (objective(noise * a, scale * b) - objective(noise / a, scale / b)) / (2 * step)
        assert abs(slope) < 1e-4
    assert best > max(objective(1.2 * noise, scale), objective(noise, 1.2 * scale), objective(noise, scale / 1.2))
    assert float(found.problem.density.constrain(found.mean)["noise"]) == pytest.approx(noise)
    prior = found.problem.density.gaussian_prior()
    assert prior is not None
    torch.testing.assert_close(prior[1][16:20], torch.full((4,), 0.65 * scale, dtype=DOUBLE))


def test_an_evidence_without_a_maximum_is_refused() -> None:
    x, y = randn(40, 3), torch.zeros(40, dtype=DOUBLE)
    with pytest.raises(MethodError, match="no maximum inside"):
        bdl.fit(deep(noise=0.3), (x, y), bdl.LastLayer(steps=5, tune_prior=True))


def test_a_coupled_prior_is_conditioned_on_the_points() -> None:
    """The layer's prior given the other weights, where an earlier posterior couples them."""
    x, y = randn(30, 3), randn(30)
    first = bdl.fit(deep(noise=0.4), (x[:15], y[:15]), bdl.MeanFieldVI(steps=20), init="prior")
    spread = bdl.posterior.covariance.Dense.of(first.law.covariance.dense() + 0.05)
    first = bdl.posterior.GaussianPosterior(first.problem, bdl.posterior.normal.Normal(first.mean, spread), {})
    found = bdl.fit(deep(noise=0.4), (x[15:], y[15:]), bdl.LastLayer(steps=10), prior=first)
    # With the hidden layer held fixed the joint density is Gaussian in the layer: its mode is the mean.
    _, gradient = found.problem.density.value_and_grad(found.mean[None])
    assert gradient[0, -5:].abs().max() < 1e-8


def test_refusals() -> None:
    x, y = randn(10, 3), randn(10)

    def refused(model: Any, match: str, method: bdl.Method | None = None, data: Any = (x, y)) -> None:
        with pytest.raises(MethodError, match=match):
            bdl.fit(model, data, method or bdl.LastLayer(steps=5))

    refused(network("binary"), "likelihood must be Gaussian", data=dataset("binary"))
    refused(conjugate().program, "BayesianNetwork")
    refused(deep(2, noise="head"), "one noise level")
    tail = nn.Sequential(nn.Linear(3, 1), nn.Softplus()).double()
    with pytest.raises(ModelError, match="something follows it"):
        bdl.fit(bdl.BayesianNetwork(tail, likelihood=bdl.likelihoods.Gaussian(noise=0.3)), (x, y), bdl.LastLayer())
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    refused(bdl.BayesianNetwork(net, bdl.priors.Laplace()), "not Gaussian")
    wide = nn.Sequential(nn.Linear(3, 9000), nn.Tanh(), nn.Linear(9000, 1)).double()
    refused(bdl.BayesianNetwork(wide), "9001 weights, whose covariance takes 0.6 GiB")
    pair = nn.Sequential(nn.Linear(3, 9000), nn.Tanh(), nn.Linear(9000, 2)).double()
    refused(
        bdl.BayesianNetwork(pair),
        "for each output 9001 weights, whose covariance takes 0.6 GiB",
        data=(x, randn(10, 2)),
    )
    # 12,004 weights, of which each output has 3,001: 0.07 GiB instead of 1.1.
    many = nn.Sequential(nn.Linear(3, 3000), nn.Tanh(), nn.Linear(3000, 4)).double()
    density = bdl.posterior.prepare(bdl.BayesianNetwork(many), (x, randn(10, 4))).density
    assert bdl.LastLayer().applies_to(density) is None
    frozen = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    frozen[2].requires_grad_(False)
    refused(bdl.BayesianNetwork(frozen), "weight is frozen")


# -- random Fourier features -----------------------------------------------------------------------------------------


def kernel(x: Tensor, z: Tensor, lengthscale: float) -> Tensor:
    return torch.exp(-0.5 * torch.cdist(x, z).square() / lengthscale**2)


def test_random_features_are_unbiased_for_the_kernel_with_error_one_over_root_p() -> None:
    x = randn(6, 2)
    want = kernel(x, x, 1.3)
    sizes, errors = [64, 256, 1024, 4096], []
    for p in sizes:
        found = torch.stack([
            (lambda phi: phi @ phi.mT)(RandomFourierFeatures(2, p, 1.3, seed).double()(x)) for seed in range(40)
        ])  # fmt: skip
        error = (found - want).square().mean().sqrt()
        errors.append(float(error))
        # The mean of 40 is within 5 standard errors of the kernel at every pair.
        assert ((found.mean(0) - want).abs() / (found.std(0) / math.sqrt(40) + 1e-12)).max() < 5
    slope = (math.log(errors[-1]) - math.log(errors[0])) / (math.log(sizes[-1]) - math.log(sizes[0]))
    assert slope == pytest.approx(-0.5, abs=0.08)
    # Without the phase the mean would be half of k(x - x') + k(x + x').
    layer = RandomFourierFeatures(2, 4096, 1.3).double()
    without = 2 * (lambda phi: phi @ phi.mT)(torch.cos(x / 1.3 @ layer.frequencies.mT) / math.sqrt(4096))
    trap = want + kernel(x, -x, 1.3)
    assert (without - trap).abs().max() < 0.1 < (without - want).abs().max()


def test_a_last_layer_over_random_features_is_nearly_the_gaussian_process() -> None:
    x = 3 * torch.rand(30, 1, generator=STREAM, dtype=DOUBLE)
    y, new = torch.sin(2 * x[:, 0]) + 0.2 * randn(30), torch.linspace(-1, 4, 20, dtype=DOUBLE)[:, None]
    net = nn.Sequential(RandomFourierFeatures(1, 500, 0.8), nn.Linear(500, 1, bias=False)).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(1.0), bdl.likelihoods.Gaussian(noise=0.2))
    found = bdl.fit(model, (x, y), bdl.LastLayer())
    cut = gpytorch.kernels.RBFKernel()
    cut.lengthscale = 0.8
    exact = bdl.fit(model, (x, y), bdl.GP(kernel=cut, fit_kernel=False))
    phi = net[0](new)
    mean = phi @ found.mean
    variance = (phi * found.law.covariance.times(phi)).sum(1)
    want = exact.predict(new)
    assert (mean - want.mean).abs().max() < 0.2
    assert (variance.sqrt() - want.epistemic.sqrt()).abs().max() < 0.1
    assert found.info["log_evidence"] == pytest.approx(exact.log_evidence, abs=2.0)


def test_random_features_are_saved_with_the_model(tmp_path: Path) -> None:
    net = nn.Sequential(RandomFourierFeatures(3, 20, 2.0, seed=4), nn.Linear(20, 1)).double()
    model = bdl.BayesianNetwork(net)
    found = bdl.fit(model, dataset("regression"), bdl.LastLayer(tune_prior=True))
    loaded = bdl.load(found.save(tmp_path))
    assert torch.equal(loaded.predict(dataset("regression").x).mean, found.predict(dataset("regression").x).mean)
    assert found.sd[-1] == 0  # the noise is a point
    with pytest.raises(ModelError, match="positive lengthscale"):
        RandomFourierFeatures(3, 20, 0.0)
