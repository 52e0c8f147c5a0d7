"""Gaussian-process classification against brute-force integration, and on data."""

import math
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from torch import Tensor, nn

from bayesdl.infinite import GP, NNGP, NNGPKernel, fully_connected, nngp
from bayesdl.infinite.evidence import Process
from bayesdl.infinite.sites import Dense
from bayesdl.infinite.variational import Bound, SiteUpdates, bernoulli_expectation, categorical_expectation
from bayesdl.models import BayesianNetwork, Erf, likelihoods, priors
from bayesdl.posterior import load

LAYERS = fully_connected(1, "erf", 2.0, 1.0)


def network(outputs: int = 1, d: int = 2, w_std: float = 2.0, kind: type[nn.Module] = Erf) -> BayesianNetwork:
    net = nn.Sequential(nn.Linear(d, 10), kind(), nn.Linear(10, outputs)).double()
    likelihood = likelihoods.Bernoulli() if outputs == 1 else likelihoods.Categorical()
    return BayesianNetwork(net, priors.Normal("fan_in", w_std, 1.0), likelihood)


def moons(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    t = math.pi * torch.rand(n, generator=g, dtype=torch.float64)
    y = torch.arange(n) % 2
    upper = torch.stack([t.cos(), t.sin()], 1)
    lower = torch.stack([1 - t.cos(), 0.5 - t.sin()], 1)
    x = torch.where(y[:, None] == 0, upper, lower) + 0.15 * torch.randn(n, 2, generator=g, dtype=torch.float64)
    return x - torch.tensor([0.5, 0.25], dtype=torch.float64), y.double()


def importance(kernel: Tensor, y: Tensor, draws: int = 400_000) -> tuple[float, Tensor]:
    """Log evidence, and P(y* = 1) at the last row, from prior draws weighted by the likelihood of the first rows."""
    g = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(kernel + 1e-10 * torch.eye(len(kernel), dtype=torch.float64))
    f = torch.randn(draws, len(kernel), generator=g, dtype=torch.float64) @ root.T
    log_weight = torch.nn.functional.logsigmoid((2 * y - 1) * f[:, :-1]).sum(1)
    evidence = torch.logsumexp(log_weight, 0) - math.log(draws)
    return float(evidence), (log_weight.softmax(0) * f[:, -1].sigmoid()).sum()


def test_binary_posterior_is_close_to_the_exact_one_and_its_bound_below_the_evidence() -> None:
    x, y = moons(6, seed=3)
    new = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    evidence, probability = importance(nngp(LAYERS, torch.cat([x, new])), y)
    posterior = NNGP().fit(network(), (x, y))
    assert evidence - 0.1 < posterior.log_evidence < evidence
    assert posterior.info["evidence"] == "lower bound"
    assert posterior.info["converged"]
    assert posterior.predict(new).probs[0, 1].item() == pytest.approx(float(probability), abs=0.01)


def test_sites_are_a_stationary_point_of_the_bound() -> None:
    x, y = moons(30)
    kernel = nngp(LAYERS, x)
    zero = torch.zeros(30, dtype=torch.float64)
    state = SiteUpdates(zero, Dense(kernel), 1, bernoulli_expectation(y), tolerance=1e-12).run()
    torch.testing.assert_close(state["a"], state["target_a"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["b"], state["target_b"], rtol=1e-5, atol=1e-6)

    def naive(mean: Tensor, covariance: Tensor) -> Tensor:
        value = bernoulli_expectation(y)(mean[None], covariance.diagonal()[None])[0].sum()
        own, prior = (torch.distributions.MultivariateNormal(m, c, validate_args=False) for m, c in
                      ((mean, covariance), (torch.zeros_like(mean), kernel)))  # fmt: skip
        return value - torch.distributions.kl_divergence(own, prior)

    # the same Gaussian through its plain formulas: same bound, and no small change of it is better
    b = state["b"][0]
    covariance = torch.linalg.inv(torch.linalg.inv(kernel) + torch.diag(b))
    mean = covariance @ state["a"][0]
    best = naive(mean, covariance)
    assert state["bound"] == pytest.approx(best.item(), rel=1e-6)
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        root = torch.linalg.cholesky(covariance)
        moved = root @ (0.05 * torch.randn(30, generator=g, dtype=torch.float64)) + mean
        turn = torch.eye(30, dtype=torch.float64) + 0.01 * torch.randn(30, 30, generator=g, dtype=torch.float64)
        assert naive(moved, covariance) < best
        assert naive(mean, root @ turn @ turn.T @ root.T) < best


def test_expectations_are_derivatives_of_each_other() -> None:
    y = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    mean = torch.tensor([[0.3, -2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    variance = torch.tensor([[0.5, 2.0, 9.0]], dtype=torch.float64, requires_grad=True)
    value, slope, precision = bernoulli_expectation(y)(mean, variance)
    by_mean, by_variance = torch.autograd.grad(value.sum(), (mean, variance))
    torch.testing.assert_close(slope, by_mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(precision, -2 * by_variance, rtol=1e-9, atol=1e-12)
    labels = torch.tensor([0, 2, 1])
    means = torch.tensor([[0.3, 1.0, 0.0], [0.0, -1.0, 2.0], [1.0, 0.5, 0.0]], dtype=torch.float64)
    spread = torch.full_like(means, 1.5).requires_grad_()
    means.requires_grad_()
    value, slope, precision = categorical_expectation(labels, 3)(means, spread)
    by_mean, by_variance = torch.autograd.grad(value.sum(), (means, spread))
    torch.testing.assert_close(slope, by_mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(precision, -2 * by_variance, rtol=0.1, atol=0.02)


def test_two_moons_are_separated_better_than_by_a_line_and_doubt_grows_far_away() -> None:
    x, y = moons(200)
    new, truth = moons(400, seed=1)
    posterior = NNGP(fit_kernel=True).fit(network(), (x, y))
    flat = BayesianNetwork(nn.Linear(2, 1).double(), likelihood=likelihoods.Bernoulli())
    linear = NNGP(fit_kernel=True).fit(flat, (x, y))
    nll = [-p.predict(new).log_prob(truth).mean().item() for p in (posterior, linear)]
    assert nll[0] < 0.5 * nll[1]
    assert (posterior.predict(new).labels == truth).double().mean() > 0.95
    # an RBF process forgets the data far away: latent mean 0, probability one half
    rbf = GP().fit(network(), (x, y))
    far = rbf.predict(torch.tensor([[300.0, 0.0], [0.0, -300.0]], dtype=torch.float64))
    torch.testing.assert_close(far.probs, torch.full((2, 2), 0.5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (far.mutual_information > rbf.predict(x).mutual_information.quantile(0.9)).all()
    probabilities = posterior.predict(new).probs[:, 1]
    assert abs(probabilities.mean() - truth.mean()) < 0.05


def test_relu_kernel_classifies_too() -> None:
    x, y = moons(100)
    new, truth = moons(200, seed=1)
    posterior = NNGP(w_std=3.0, b_std=1.0).fit(network(kind=nn.ReLU), (x, y))
    assert (posterior.predict(new).labels == truth).double().mean() > 0.9


def blobs(n: int = 90) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    centres = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]], dtype=torch.float64)
    return centres[y] + 0.6 * torch.randn(n, 2, generator=g, dtype=torch.float64), y


def test_three_classes() -> None:
    x, y = blobs()
    posterior = NNGP().fit(network(3), (x, y))
    assert posterior.info["converged"]
    predicted = posterior.predict(x)
    assert predicted.probs.shape == (90, 3)
    torch.testing.assert_close(predicted.probs.sum(1), torch.ones(90, dtype=torch.float64))
    assert (predicted.labels == y).double().mean() > 0.9
    assert posterior.log_evidence > -90 * math.log(3)
    assert posterior.functions(x[:4], 5).shape == (5, 4, 3)
    # renaming the classes renames the columns, up to the quasi-random points
    turned = NNGP().fit(network(3), (x, (y + 1) % 3)).predict(x).probs.roll(-1, 1)
    torch.testing.assert_close(turned, predicted.probs, rtol=0, atol=0.02)


def test_two_classes_by_softmax_agree_with_the_logistic_of_twice_the_variance() -> None:
    x, y = moons(40)
    kernel = nngp(LAYERS, x)
    zero = torch.zeros(40, dtype=torch.float64)
    # f_1 - f_0 has twice the variance of each; a factorised Gaussian cannot represent all of their dependence
    softmax = SiteUpdates(zero, Dense(kernel), 2, categorical_expectation(y, 2)).run()
    logistic = SiteUpdates(zero, Dense(2 * kernel), 1, bernoulli_expectation(y)).run()
    assert softmax["bound"] < logistic["bound"] + 0.05
    assert softmax["bound"] > logistic["bound"] - 3


@pytest.mark.parametrize("classes", [1, 3])
def test_gradient_of_the_bound_by_finite_differences(classes: int) -> None:
    x, y = moons(20) if classes == 1 else blobs(21)
    expectation = bernoulli_expectation(y) if classes == 1 else categorical_expectation(y, 3)
    kernel = NNGPKernel(LAYERS, dtype=torch.float64)
    objective = Bound(Process(kernel, gpytorch.means.ConstantMean().double(), x, fitted=True), classes, expectation)
    z = objective.start()
    _, gradient, warm = objective.evaluate(z, {})
    for k in range(len(z)):
        step = torch.zeros_like(z)
        step[k] = 1e-2
        slope = (objective.evaluate(z + step, warm)[0] - objective.evaluate(z - step, warm)[0]) / 2e-2
        assert gradient[k].item() == pytest.approx(slope, rel=0.02, abs=0.01)


def test_predictions_repeat_save_and_do_not_depend_on_batches(tmp_path: Path) -> None:
    (x, y), model = moons(40), network()
    first, second = (NNGP().fit(model, (x, y), seed=1).predict(x).probs for _ in range(2))
    assert torch.equal(first, second)
    posterior = NNGP().fit(model, (x, y), seed=1)
    torch.testing.assert_close(posterior.predict(x, batch_size=7).probs, first, rtol=1e-12, atol=0)
    posterior.save(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run").predict(x).probs, first)
    values = posterior.log_likelihood(x, y, max_draws=500)
    assert values.shape == (500, 40)
    mixture = torch.logsumexp(values, 0) - math.log(500)
    torch.testing.assert_close(mixture, posterior.predict(x, max_draws=500).log_prob(y), rtol=1e-9, atol=1e-12)
    one = posterior.predict(x, max_draws=1)
    assert (one.epistemic == 0).all()


def test_a_classification_resumes_bit_for_bit(tmp_path: Path) -> None:
    (x, y), model = moons(40), network()
    method = NNGP(fit_kernel=True)
    whole = method.fit(model, (x, y))

    class Stop(Exception):
        pass

    def die(state: dict[str, Any]) -> None:
        if state["step"] == 1:
            raise Stop

    with pytest.raises(Stop):
        method.fit(model, (x, y), checkpoint=tmp_path / "run", callback=die)
    resumed = method.fit(model, (x, y), checkpoint=tmp_path / "run")
    assert torch.equal(resumed.a, whole.a)
    assert resumed.log_evidence == whole.log_evidence


def test_functions_have_the_posteriors_moments() -> None:
    x, y = moons(40)
    posterior = NNGP().fit(network(), (x, y))
    draws = posterior.functions(x[:5], n=20_000)
    mean_of_p, se = draws.sigmoid().mean(0), draws.sigmoid().std(0) / math.sqrt(20_000)
    assert ((mean_of_p - posterior.predict(x[:5]).probs[:, 1]).abs() / se).max() < 4.5


def test_one_row_of_a_class_and_repeated_rows_are_fine() -> None:
    x = moons(30)[0]
    x[10:20] = x[0]
    y = torch.ones(30, dtype=torch.float64)
    y[5] = 0
    predicted = NNGP().fit(network(), (x, y)).predict(x)
    assert predicted.probs.isfinite().all()
    assert predicted.probs[5, 0] == predicted.probs[:, 0].max()
