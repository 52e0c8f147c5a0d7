"""The Gaussian families against Gaussian posteriors, which are known in closed form; settings common to all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.infer.gaussian_families import Family, FullRank, LowRankPlusDiagonal, MeanField
from bayesdl.infer.matrix_normal import Independent, MatrixNormal
from bayesdl.infer.schedules import Constant, Warmup
from bayesdl.infer.variational import FullRankVI, GaussianVI, LowRankVI, MeanFieldVI
from bayesdl.posterior.covariance import Dense, Diagonal, Kronecker
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import prepare

DOUBLE = torch.float64
FAMILIES: list[Family] = [MeanField(4), LowRankPlusDiagonal(4, 2), LowRankPlusDiagonal(4, 3), FullRank(4)]
FAMILIES += [MatrixNormal(4, 2, 2), MatrixNormal(4, 4, 1), Independent(4, (MeanField(1), LowRankPlusDiagonal(3, 2)))]
QUICK: dict[str, Any] = {"steps": 700, "learning_rate": 0.05}


def target(dim: int = 4) -> tuple[Any, Tensor, Tensor]:
    """A program that is a Gaussian with correlated coordinates on several scales; its mean and covariance."""
    stream = generator(3, "target")
    mix = torch.randn(dim, dim, generator=stream, dtype=DOUBLE) + torch.eye(dim, dtype=DOUBLE)
    root = torch.linspace(0.3, 1, dim, dtype=DOUBLE)[:, None] * mix
    mean, covariance = torch.linspace(-1, 1, dim, dtype=DOUBLE), root @ root.T

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    return model, mean, covariance


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_a_family_agrees_with_autograd(family: Family) -> None:
    """Everything in closed form against derivatives of the covariance that the spread stands for."""
    stream = generator(0, "family")
    spread = family.start(torch.rand(4, generator=stream, dtype=DOUBLE) + 0.5, stream)
    spread = spread + 0.3 * torch.randn(family.size, generator=stream, dtype=DOUBLE)
    if isinstance(family, FullRank):
        spread[4:] = spread[4:].reshape(4, 4).tril(-1).reshape(-1)
    noise = torch.randn(5, family.noise_dim, generator=stream, dtype=DOUBLE)
    slopes = torch.randn(5, 4, generator=stream, dtype=DOUBLE)
    precision = torch.rand(4, generator=stream, dtype=DOUBLE)

    def gradient(function: Any) -> Tensor:
        leaf = spread.clone().requires_grad_()
        found = torch.autograd.grad(function(family.covariance(leaf)), leaf)[0]
        if isinstance(family, FullRank):  # what lies above the diagonal stays zero
            found[4:] = found[4:].reshape(4, 4).tril(-1).reshape(-1)
        return found

    covariance = family.covariance(spread)
    dense = covariance.dense()
    half_log_det = 0.5 * torch.logdet(dense)
    torch.testing.assert_close(family.half_log_det(spread), half_log_det, rtol=1e-10, atol=1e-10)
    expected = gradient(lambda s: 0.5 * torch.logdet(s.dense()))
    torch.testing.assert_close(family.entropy_gradient(spread), expected, rtol=1e-9, atol=1e-10)
    expected = gradient(lambda s: 0.5 * (precision * s.dense().diagonal()).sum())
    torch.testing.assert_close(family.trace_gradient(spread, precision), expected, rtol=1e-9, atol=1e-10)
    expected = gradient(lambda s: (slopes * s.scaled(noise)).sum())
    found = family.pull(spread, noise, covariance.scaled(noise), slopes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    rows = torch.randn(2, 4, generator=stream, dtype=DOUBLE)
    for other in (covariance, family.settled(spread)):
        torch.testing.assert_close(other.dense(), dense, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other.solve(other.times(rows)), rows, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.log_det(), torch.logdet(dense), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other.variances(), dense.diag(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other.precisions(), torch.linalg.inv(dense).diag(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", [FullRankVI(**QUICK), LowRankVI(rank=3, **QUICK)], ids=["full", "rank 3"])
def test_a_family_that_holds_the_posterior_recovers_it(method: GaussianVI) -> None:
    model, mean, covariance = target()
    posterior = method.fit(model, {}, progress=False)
    truth, sd = posterior.law.covariance.dense(), covariance.diag().sqrt()
    assert ((posterior.mean - mean) / sd).abs().max() < 1e-3
    assert ((truth - covariance) / sd / sd[:, None]).abs().max() < 0.01
    assert float(Normal(mean, Dense.of(covariance)).kl(posterior.law)) < 1e-4
    assert posterior.info["elbo"] == pytest.approx(0.0, abs=1e-3)  # the density is normalised


def test_mean_field_shrinks_to_the_inverse_of_the_diagonal_precision() -> None:
    model, mean, covariance = target()
    posterior = MeanFieldVI(**QUICK).fit(model, {}, progress=False)
    sd = torch.linalg.inv(covariance).diag().rsqrt()
    assert (covariance.diag().sqrt() / sd).max() > 2.0  # the marginal sd would be told apart
    assert ((posterior.mean - mean) / sd).abs().max() < 0.02
    torch.testing.assert_close(posterior.sd, sd, rtol=0.06, atol=0)


def matrix_target(precision: Tensor, mean: Tensor) -> Any:
    """A program with a site ``[2, 3]`` whose density is that Gaussian."""
    shape = torch.distributions.transforms.ReshapeTransform((6,), (2, 3))

    def model() -> None:
        base = dist.MultivariateNormal(mean, precision_matrix=precision)
        pyro.sample("w", dist.TransformedDistribution(base, [shape]))

    return model


def matrix_optimum(precision: Tensor) -> Tensor:
    """Covariance of the matrix normal nearest in KL(q || p), by its stationarity conditions in turn.

    ``U^-1 = (1/I) sum_jl P_.j.l V_jl`` and ``V^-1 = (1/O) sum_ik P_i.k. U_ik``.
    """
    weights, left, right = precision.numpy().reshape(2, 3, 2, 3), np.eye(2), np.eye(3)
    for _ in range(200):
        left = np.linalg.inv(np.einsum("ijkl,jl->ik", weights, right) / 3)
        right = np.linalg.inv(np.einsum("ijkl,ik->jl", weights, left) / 2)
    return torch.from_numpy(np.kron(left, right))


@pytest.mark.parametrize("kronecker", [True, False])
def test_a_matrix_normal_recovers_its_kind_and_else_its_own_optimum(kronecker: bool) -> None:
    stream = generator(5, "matrix")
    roots = [torch.randn(n, n, generator=stream, dtype=DOUBLE) + torch.eye(n, dtype=DOUBLE) for n in (2, 3, 6)]
    left, right, whole = (root @ root.mT + 0.3 * torch.eye(len(root), dtype=DOUBLE) for root in roots)
    precision = torch.kron(left, right) if kronecker else whole
    mean = torch.linspace(-1, 1, 6, dtype=DOUBLE)
    model = matrix_target(precision, mean)
    posterior = bdl.MatrixNormalVI(steps=1200, learning_rate=0.05).fit(model, {}, progress=False)
    assert [type(block) for block in posterior.law.covariance.blocks] == [Kronecker]
    truth = Normal(mean, Dense.of(torch.linalg.inv(precision)))
    best = float(Normal(mean, Dense.of(matrix_optimum(precision))).kl(truth))
    independent = float(Normal(mean, Diagonal(precision.diag().rsqrt())).kl(truth))
    assert best == pytest.approx(0.0, abs=1e-9) if kronecker else best > 0.1
    assert independent > 0.1
    found = float(posterior.law.kl(truth))
    assert best - 1e-9 < found < best + (1e-5 if kronecker else 0.005)
    assert posterior.info["elbo"] == pytest.approx(-found, abs=1e-5 + 4 * posterior.info["elbo_error"])


def test_a_matrix_normal_for_every_weight_and_the_rest_independent(tmp_path: Any) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 1))
    model = bdl.BayesianNetwork(net, likelihood=bdl.likelihoods.Gaussian(noise=0.3))
    stream = torch.Generator().manual_seed(0)
    pair = torch.randn(20, 1, 3, 3, generator=stream), torch.randn(20, 1, generator=stream)
    posterior = bdl.MatrixNormalVI(steps=30, batch_size=7).fit(model, pair, progress=False)
    kinds = [type(block) for block in posterior.law.covariance.blocks]
    assert kinds == [Kronecker, Diagonal, Diagonal, Diagonal]  # a single output has a plain vector of weights
    loaded = bdl.load(posterior.save(tmp_path / "saved"))
    assert torch.equal(loaded.unconstrained_draws(3), posterior.unconstrained_draws(3))
    prior = posterior.problem.density.gaussian_prior()
    ours = torch.distributions.MultivariateNormal(posterior.mean.double(), posterior.law.covariance.double().dense())
    theirs = torch.distributions.MultivariateNormal(prior[0].double(), torch.diag(prior[1].double() ** 2))
    assert posterior.kl() == pytest.approx(float(torch.distributions.kl_divergence(ours, theirs)), rel=1e-6)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_conjugate_regression_and_its_evidence(linear: Any, batch_size: int | None) -> None:
    posterior = FullRankVI(steps=800, batch_size=batch_size).fit(linear.model, linear.data, progress=False)
    mean, precision = linear.posterior()
    truth = Normal(mean, Dense.of(torch.linalg.inv(precision)))
    assert float(posterior.law.kl(truth)) < (1e-12 if batch_size is None else 0.02)
    tolerance = 1e-9 if batch_size is None else 0.02 + 4 * posterior.info["elbo_error"]
    assert posterior.info["elbo"] == pytest.approx(linear.log_evidence(), abs=tolerance)


def at_optimum(linear: Any, **settings: Any) -> tuple[Any, Tensor]:
    """A full-rank engine and the parameters at which q is the posterior."""
    method = FullRankVI(**settings)
    work = method.engine(prepare(linear.model, linear.data), 0, lambda: torch.zeros(15, dtype=DOUBLE))
    mean, precision = linear.posterior()
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    sd = root.diag()
    return work.objective, torch.cat([mean, sd.log(), (root / sd[:, None]).tril(-1).reshape(-1)])


def test_sticking_the_landing_has_no_variance_where_q_is_the_posterior(linear: Any) -> None:
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    work, parameters = at_optimum(linear)
    gradients = torch.stack([work.estimate(parameters, row, None)[1] for row in noise.split(1)])
    assert gradients.abs().max() < 1e-9
    log_weights = work.estimate(parameters, noise, None)[0]
    torch.testing.assert_close(log_weights, torch.full_like(log_weights, linear.log_evidence()), rtol=1e-12, atol=0)
    plain, _ = at_optimum(linear, estimator="reparameterisation")
    gradients = torch.stack([plain.estimate(parameters, row, None)[1] for row in noise.split(1)])
    assert gradients.std(0)[:6].min() > 0.1
    assert (gradients.mean(0).abs() < 4.5 * gradients.std(0) / math.sqrt(50) + 1e-12).all()


@pytest.mark.parametrize("method", [LowRankVI, FullRankVI])
def test_the_score_function_is_unbiased_and_its_baseline_takes_out_variance(linear: Any, method: Any) -> None:
    """Against the path's gradient, which other tests hold to the closed form; and against no baseline at all."""
    problem = prepare(linear.model, linear.data)
    work = method(estimator="score", samples=4).engine(problem, 0, lambda: None).objective
    mean, precision = linear.posterior()
    spread = work.family.start(1.4 * precision.diag().rsqrt(), generator(2, "start"))
    parameters = torch.cat([mean + 0.5 * precision.diag().rsqrt(), spread])
    noise = work.normals(4800, generator(1, "score")).reshape(1200, 4, -1)
    found = [work.estimate(parameters, e, None) for e in noise]
    values, gradients = (torch.stack(part) for part in zip(*found, strict=True))
    path = method(estimator="reparameterisation").engine(problem, 0, lambda: None).objective
    along = torch.stack([path.estimate(parameters, e, None)[1] for e in noise.flatten(0, 1).split(12)])
    error = (gradients.var(0) / len(gradients) + along.var(0) / len(along)).sqrt()
    assert ((gradients.mean(0) - along.mean(0)).abs() < 4.5 * error + 1e-12).all()
    # Without a baseline: sum_s f_s grad log q(z_s) / S.
    covariance = work.family.covariance(spread)
    plain = (values[..., None] * covariance.solve(covariance.scaled(noise.flatten(0, 1))).reshape(1200, 4, 3)).mean(1)
    assert (gradients[:, :3].var(0) < 0.1 * plain.var(0)).all()
    assert (gradients[:, :3].var(0) > 3 * along[:, :3].var(0)).all()  # of 4 draws, and of 12


def test_the_score_function_has_no_variance_where_q_is_the_posterior(linear: Any) -> None:
    work, parameters = at_optimum(linear, estimator="score")
    noise = work.normals(8, generator(1, "score"))
    assert work.estimate(parameters, noise, None)[1].abs().max() < 1e-8


def test_the_score_function_fits_a_density_with_a_step(linear: Any) -> None:
    """The likelihood sees the sign of z alone: paths have no slope there, and end at the prior."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        pyro.sample("y", dist.Normal((z > 0).to(z.dtype), 0.5), obs=torch.tensor(1.3, dtype=DOUBLE))

    settings: dict[str, Any] = {"steps": 800, "samples": 32, "learning_rate": 0.05, "initial_scale": 1.0}
    found = MeanFieldVI(estimator="score", **settings).fit(model, {}, progress=False)
    wrong = MeanFieldVI(estimator="reparameterisation", **settings).fit(model, {}, progress=False)

    def elbo(m: Tensor, s: Tensor) -> Tensor:
        above = torch.special.ndtr(m / s)
        fit = above * (-0.5 * (0.3 / 0.5) ** 2) + (1 - above) * (-0.5 * (1.3 / 0.5) ** 2)
        return fit - 0.5 * (m**2 + s**2 - 1) + s.log()

    grid = torch.cartesian_prod(torch.linspace(-1, 3, 401, dtype=DOUBLE), torch.linspace(0.2, 1.5, 261, dtype=DOUBLE))
    m, s = grid[elbo(*grid.T).argmax()]
    assert float(found.mean[0]) == pytest.approx(float(m), abs=0.05)
    assert float(found.sd[0]) == pytest.approx(float(s), abs=0.05)
    assert abs(float(wrong.mean[0])) < 0.01 < float(m) - 0.5


@pytest.mark.parametrize("estimator", ["sticking", "reparameterisation", "score"])
@pytest.mark.parametrize("family", [MeanFieldVI, LowRankVI, FullRankVI, bdl.MatrixNormalVI])
def test_mini_batches_of_an_epoch_average_to_the_full_gradient(linear: Any, family: Any, estimator: str) -> None:
    problem = prepare(linear.model, linear.data)
    work = family(estimator=estimator).engine(problem, 0, lambda: None)
    stream = generator(1, "parameters")
    parameters = 0.1 * torch.randn(3 + work.family.size, generator=stream, dtype=DOUBLE)
    noise = work.objective.noise(4, stream)
    parts = torch.arange(100).split(20)
    split = [work.objective.estimate(parameters, noise, problem.minibatch(rows)) for rows in parts]
    whole = work.objective.estimate(parameters, noise, None)
    for k in range(2):
        torch.testing.assert_close(torch.stack([pair[k] for pair in split]).mean(0), whole[k], rtol=1e-9, atol=1e-9)
    # Twice the data is twice the log likelihood: the KL counts once, whatever N.
    double = prepare(linear.model, tuple(torch.cat([part, part]) for part in linear.data))
    twice = family(estimator=estimator).engine(double, 0, lambda: None).objective.estimate(parameters, noise, None)
    tempered = prepare(linear.model, linear.data, likelihood_temperature=0.5)
    other = family(estimator=estimator, likelihood_temperature=0.5).engine(tempered, 0, lambda: None)
    half = other.objective.estimate(parameters, noise, None)
    torch.testing.assert_close(twice[0], half[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(twice[1], half[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(twice[1], whole[1], rtol=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_weighted_bounds_and_their_gradient_agree_with_autograd_on_average(linear: Any, alpha: float) -> None:
    """The doubly reparameterised gradient against that of the bound itself, both averaged over the noise."""
    work = MeanFieldVI(alpha=alpha).engine(prepare(linear.model, linear.data), 0, lambda: None)
    mean, precision = linear.posterior()
    exact = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    parameters = torch.cat([mean + 0.03, precision.diag().rsqrt().log() + 0.2])
    noise = torch.randn(20_000, 4, 3, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    leaf = parameters.clone().requires_grad_()
    q = torch.distributions.Normal(leaf[:3], leaf[3:].exp())
    z = leaf[:3] + leaf[3:].exp() * noise
    log_weights = exact.log_prob(z) - q.log_prob(z).sum(-1)
    bounds = (torch.logsumexp((1 - alpha) * log_weights, 1) - math.log(4)) / (1 - alpha)
    expected = torch.autograd.grad(bounds.mean(), leaf)[0]
    found = [work.objective.estimate(parameters, part, None) for part in noise[:2_000]]
    gradients = torch.stack([gradient for _, gradient in found])
    assert ((gradients.mean(0) - expected).abs() < 5 * gradients.std(0) / math.sqrt(2_000)).all()
    ours = torch.stack([work.objective.bound(values)[0] for values, _ in found]) - linear.log_evidence()
    torch.testing.assert_close(ours, bounds[:2_000].detach(), rtol=0, atol=1e-9)


def test_smaller_orders_give_tighter_bounds_and_cover_more(linear: Any) -> None:
    fits = {
        alpha: MeanFieldVI(steps=500, samples=64, alpha=alpha).fit(linear.model, linear.data, progress=False)
        for alpha in (1.0, 0.5, 0.0)
    }
    last = {alpha: sum(fit.info["elbo_trace"][-50:]) / 50 for alpha, fit in fits.items()}
    assert last[1.0] < last[0.5] < last[0.0] < linear.log_evidence() + 0.05
    volume = [float(fits[alpha].sd.log().sum()) for alpha in (1.0, 0.5, 0.0)]
    assert volume[0] + 0.1 < volume[1] < volume[2]
    marginal = torch.linalg.inv(linear.posterior()[1]).diag().sqrt()
    assert (fits[0.0].sd > 0.9 * marginal).all()


def test_a_constant_kl_weight_is_a_likelihood_temperature(linear: Any) -> None:
    for estimator in ("sticking", "reparameterisation"):
        method = MeanFieldVI(steps=700, kl_weight=3.0, estimator=estimator)
        posterior = method.fit(linear.model, linear.data, progress=False)
        mean, precision = linear.posterior(likelihood_temperature=3.0)
        sd = precision.diag().rsqrt()
        assert ((posterior.mean - mean) / sd).abs().max() < 1e-3
        torch.testing.assert_close(posterior.sd, sd, rtol=0.04, atol=0)
        # The ELBO that is reported is the one without the weight.
        assert posterior.info["elbo"] < linear.log_evidence() - 1.0
        assert posterior.info["gradient"]["signal"] < posterior.info["gradient"]["noise"]


def test_warm_up_of_the_kl_ends_at_the_elbo(linear: Any) -> None:
    method = MeanFieldVI(steps=700, kl_weight=Warmup(300))
    posterior = method.fit(linear.model, linear.data, progress=False)
    torch.testing.assert_close(posterior.sd, linear.posterior()[1].diag().rsqrt(), rtol=0.04, atol=0)
    assert MeanFieldVI.from_settings(posterior.info["settings"]) == method
    work = MeanFieldVI(kl_weight=Warmup(10)).engine(prepare(linear.model, linear.data), 0, lambda: None)
    parameters, noise = torch.zeros(6, dtype=DOUBLE), torch.ones(2, 3, dtype=DOUBLE)
    gradients = [work.objective.estimate(parameters, noise, None, weight)[1] for weight in (0.0, 0.5, 1.0)]
    torch.testing.assert_close((gradients[0] + gradients[2]) / 2, gradients[1])
    # Without the KL it is the likelihood's own gradient.
    z = parameters[:3] + noise
    _, slope = work.problem.density.value_and_grad(z, target="likelihood")
    torch.testing.assert_close(gradients[0], torch.cat([slope.mean(0), (slope * noise).mean(0)]))


def two_sites(linear: Any) -> Any:
    """The regression with its three coefficients in three sites."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        names = ("first", "middle", "last")
        w = torch.stack([pyro.sample(name, dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 0.4)) for name in names])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return model


@pytest.mark.parametrize("method", [MeanFieldVI, LowRankVI, FullRankVI])
@pytest.mark.parametrize("estimator", ["sticking", "reparameterisation"])
def test_points_here_and_a_gaussian_there(linear: Any, method: Any, estimator: str, tmp_path: Any) -> None:
    """The joint optimum: the points are at the mode, and the rest is the posterior given these."""
    settings = {"steps": 600, "random": ("first", "l*"), "estimator": estimator}
    posterior = method(**settings).fit(two_sites(linear), linear.data, progress=False)
    mean, precision = linear.posterior()
    given = precision[[0, 2]][:, [0, 2]]
    assert ((posterior.mean - mean) * precision.diag().sqrt()).abs().max() < 1e-3
    assert float(posterior.sd[1]) == 0.0
    covariance = posterior.law.covariance.dense()[[0, 2]][:, [0, 2]]
    expected = torch.diag(1 / given.diag()) if method is MeanFieldVI else torch.linalg.inv(given)
    scale = expected.diag().sqrt() * expected.diag().sqrt()[:, None]
    # Six hundred noisy steps leave a few percent.
    torch.testing.assert_close(covariance / scale, expected / scale, rtol=0, atol=0.15)
    draws = posterior.draws(50)
    assert torch.equal(draws["middle"], draws["middle"][:1].expand(50))
    assert posterior.kl() is None
    loaded = bdl.load(posterior.save(tmp_path / "saved"), two_sites(linear))
    assert torch.equal(loaded.unconstrained_draws(5), posterior.unconstrained_draws(5))
    if method is FullRankVI and estimator == "sticking":
        # Its weights are those of the density at the points: equal, as q is the posterior given them.
        density = posterior.problem.density.log_density(posterior.unconstrained_draws(2))
        log_q = posterior.draws_and_log_prob(2)[1]
        torch.testing.assert_close(density - log_q, torch.full_like(log_q, posterior.info["elbo"]), rtol=1e-9, atol=0)


def test_the_last_layer_alone(linear: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model = bdl.BayesianNetwork(net, bdl.priors.Normal("fan_in"), bdl.likelihoods.Gaussian())
    x, y = (part.float() for part in linear.data)
    posterior = FullRankVI(steps=60, random="2.*", batch_size=25).fit(model, (x, y[:, None]), progress=False)
    for site in posterior.problem.density.sites:
        sd = posterior.sd[site.start : site.stop]
        assert bool((sd > 0).all()) if site.name.startswith("2.") else bool((sd == 0).all())
    assert posterior.predict(x[:3]).mean.isfinite().all()


def test_gradient_quality_sees_an_unfinished_run_and_the_noise_of_batches(linear: Any) -> None:
    start = {"w": torch.zeros(3, dtype=DOUBLE)}
    short = MeanFieldVI(steps=5).fit(linear.model, linear.data, init=start, progress=False).info["gradient"]
    long = MeanFieldVI(steps=600).fit(linear.model, linear.data, progress=False).info["gradient"]
    assert short["snr"] > 10.0
    assert long["snr"] < 0.5
    batches = MeanFieldVI(steps=600, batch_size=10).fit(linear.model, linear.data, progress=False).info["gradient"]
    assert batches["noise"] > 2 * long["noise"]
    assert 1.0 <= batches["draws"] < 2.5 < long["draws"] < 12.0
    # Where q is almost the posterior, all weights are almost equal.
    weighted = FullRankVI(steps=400, alpha=0.0).fit(linear.model, linear.data, progress=False).info["gradient"]
    assert 7.0 < weighted["draws"] <= 8.0


def test_evidence_and_k_hat(linear: Any) -> None:
    posterior = FullRankVI(steps=500).fit(linear.model, linear.data, progress=False)
    assert posterior.importance().k_hat < 0.3
    mean, precision = linear.posterior()
    exact = GaussianPosterior(posterior.problem, Normal(mean, Dense.of(torch.linalg.inv(precision))), {})
    full = exact.importance()
    assert full.k_hat == -math.inf
    assert full.ess == pytest.approx(2000)
    assert full.log_evidence == pytest.approx(linear.log_evidence(), abs=1e-9)
    narrow = MeanFieldVI(steps=500).fit(linear.model, linear.data, progress=False).importance(batch_size=30)
    assert abs(narrow.log_evidence - linear.log_evidence()) < 4 * narrow.log_evidence_error
    assert 0.2 < narrow.k_hat < 0.7
    assert narrow.reliable
    assert 300 < narrow.ess < 1900
    model, *_ = target()
    far = MeanFieldVI(**QUICK).fit(model, {}, progress=False).importance()
    assert far.k_hat > 0.7
    assert not far.reliable
    assert "far from the posterior" in str(far)


def test_evidence_of_a_guide(linear: Any) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0, dtype=DOUBLE), 0.1))
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 0.4).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5 * scale), obs=y)

    guide = bdl.GuideVI("AutoMultivariateNormal", steps=300, learning_rate=0.03).fit(model, linear.data, progress=False)
    gauss = FullRankVI(steps=400).fit(model, linear.data, progress=False)
    one, other = guide.importance(), gauss.importance(seed=1)
    assert one.reliable
    assert other.reliable
    assert abs(one.log_evidence - other.log_evidence) < 4 * math.hypot(one.log_evidence_error, other.log_evidence_error)


def test_importance_refusals(linear: Any) -> None:
    with pytest.raises(MethodError, match="without a density"):
        bdl.MAP(steps=2).fit(linear.model, linear.data, progress=False).importance()
    with pytest.raises(MethodError, match="draws=10"):
        MeanFieldVI(steps=2).fit(linear.model, linear.data, progress=False).importance(10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"estimator": "pathwise"}, "estimator='pathwise'"),
        ({"estimator": "score", "samples": 1}, "at least 2"),
        ({"estimator": "score", "kl_weight": 2.0}, "likelihood_temperature"),
        ({"alpha": 2.0}, r"alpha=2\.0"),
        ({"alpha": 0.5, "batch_size": 3}, "mini-batches"),
        ({"alpha": 0.5, "estimator": "reparameterisation"}, "doubly reparameterised"),
        ({"kl_weight": 0.0}, r"kl_weight=0\.0"),
        ({"kl_weight": 2.0, "temperature": 2.0}, "use one"),
        ({"kl_weight": Constant(2.0), "likelihood_temperature": 2.0}, "use one"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        MeanFieldVI(**settings)


def test_refusals(linear: Any) -> None:
    with pytest.raises(MethodError, match="rank=0"):
        LowRankVI(rank=0)
    with pytest.raises(MethodError, match=r"random='v\*' matches none of the sites \['w'\]"):
        MeanFieldVI(random="v*").fit(linear.model, linear.data)

    def parameters_only(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.param("a", torch.zeros(3, dtype=DOUBLE))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ a, 0.5), obs=y)

    with pytest.raises(MethodError, match="nothing to be random"):
        MeanFieldVI().fit(parameters_only, linear.data)
    with pytest.raises(MethodError, match="likelihood_temperature=b, which takes any prior"):
        MeanFieldVI(kl_weight=2.0).fit(target()[0], {})
    with pytest.raises(MethodError, match="no slope by which a point"):
        MeanFieldVI(estimator="score", random="first").fit(two_sites(linear), linear.data)
    with pytest.raises(MethodError, match="cannot have points"):
        MeanFieldVI(random="first").fit(two_sites(linear), linear.data, prior_rows=0.5)

    def wide(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(9000), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w.mean() + x[:, 0], 0.5), obs=y)

    with pytest.raises(MethodError, match=r"9000 coordinates takes about 2 GiB.*LowRankVI"):
        FullRankVI().fit(wide, (torch.zeros(4, 3), torch.zeros(4)))


def test_on_two_modes_the_elbo_has_two_optima_and_neither_matches_the_moments() -> None:
    """KL(q || p) of one Gaussian on 0.7 N(-3, 0.5^2) + 0.3 N(3, 1): where a fit starts decides where it ends."""
    weights, places, scales = (torch.tensor(v, dtype=DOUBLE) for v in ([0.7, 0.3], [-3.0, 3.0], [0.5, 1.0]))

    def model() -> None:
        k = pyro.sample("k", dist.Categorical(weights))  # summed out
        pyro.sample("z", dist.Normal(places[k], scales[k]))

    fits = [
        FullRankVI(steps=400).fit(model, {}, init={"z": torch.tensor(at, dtype=DOUBLE)}, progress=False)
        for at in (-2.0, 2.0)
    ]
    for fit, weight, place, scale in zip(fits, weights, places, scales, strict=True):
        assert float(fit.mean[0]) == pytest.approx(float(place), abs=0.02)
        assert float(fit.sd[0]) == pytest.approx(float(scale), rel=0.03)
        # At a mode that q fills, KL(q || p) is minus the log of that mode's weight.
        assert fit.info["elbo"] == pytest.approx(math.log(float(weight)), abs=0.01)
    # The other direction, KL(p || q), is smallest at the moments: here by quadrature.
    grid = torch.linspace(-12, 12, 4001, dtype=DOUBLE)
    p = (weights * torch.distributions.Normal(places, scales).log_prob(grid[:, None]).exp()).sum(1)
    p = p / p.sum()
    mean = float((p * grid).sum())
    sd = float((p * (grid - mean).square()).sum().sqrt())

    def inclusive(m: float, s: float) -> float:
        return float((p * (p.log() - torch.distributions.Normal(m, s).log_prob(grid))).sum())

    best = inclusive(mean, sd)
    assert all(inclusive(mean + a, sd * b) > best for a, b in [(0.1, 1.0), (-0.1, 1.0), (0.0, 1.05), (0.0, 0.95)])
    assert all(inclusive(float(fit.mean[0]), float(fit.sd[0])) > best + 1.0 for fit in fits)
