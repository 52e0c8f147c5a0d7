"""GP and NNGP regression against conjugate algebra, GPyTorch's own exact GP, and finite differences."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from bayesdl.data import Dataset
from bayesdl.errors import Divergence, MethodError, ModelMismatch, ModelRequired
from bayesdl.infinite import GP, NNGP, GPPosterior, NNGPKernel, fully_connected, nngp
from bayesdl.infinite.evidence import Evidence, Process
from bayesdl.models import BayesianNetwork, Erf, likelihoods, priors
from bayesdl.models.positive import PositivePrior
from bayesdl.posterior import load


def table(n: int = 40, d: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1] + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
    return x, y


def network(noise: Any = 0.3, kind: type[nn.Module] = nn.ReLU, d: int = 3, outputs: int = 1) -> BayesianNetwork:
    net = nn.Sequential(nn.Linear(d, 8), kind(), nn.Linear(8, outputs)).double()
    return BayesianNetwork(net, priors.Normal("fan_in", 1.4, 0.5), likelihoods.Gaussian(noise=noise))


LAYERS = fully_connected(1, "relu", 1.4, 0.5)


def dense(kernel: Tensor, cross: Tensor, own: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor, float]:
    """Mean, latent covariance and log evidence by an inverse, as the textbook prints them."""
    k = (kernel + noise**2 * torch.eye(len(y), dtype=torch.float64)).numpy()
    inverse = np.linalg.inv(k)
    mean, covariance = cross.T.numpy() @ inverse @ y.numpy(), own.numpy() - cross.T.numpy() @ inverse @ cross.numpy()
    evidence = multivariate_normal(np.zeros(len(y)), k).logpdf(y.numpy())
    return torch.as_tensor(mean), torch.as_tensor(covariance), evidence


def test_a_linear_network_is_conjugate_bayesian_linear_regression() -> None:
    x, y = table()
    new = table(7, seed=1)[0]
    s_w, s_b, noise = 0.7, 0.4, 0.3
    prior = priors.PerParameter({"weight": priors.Normal(s_w), "bias": priors.Normal(s_b)})
    model = BayesianNetwork(nn.Linear(3, 1).double(), prior, likelihoods.Gaussian(noise=noise))
    posterior = NNGP().fit(model, (x, y))
    # the posterior over the four weights, from which mean and covariance of the function follow
    features, fresh = (torch.cat([v, torch.ones(len(v), 1, dtype=torch.float64)], 1) for v in (x, new))
    prior_precision = torch.diag(torch.tensor([s_w**-2] * 3 + [s_b**-2], dtype=torch.float64))
    covariance = torch.linalg.inv(prior_precision + features.T @ features / noise**2)
    weights = covariance @ features.T @ y / noise**2
    predicted = posterior.predict(new)
    torch.testing.assert_close(predicted.mean, fresh @ weights, rtol=1e-10, atol=1e-12)
    latent = fresh @ covariance @ fresh.T
    torch.testing.assert_close(predicted.epistemic, latent.diagonal(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(predicted.aleatoric, torch.full((7,), noise**2, dtype=torch.float64))
    design = noise**2 * torch.eye(40, dtype=torch.float64) + features @ torch.linalg.inv(prior_precision) @ features.T
    evidence = multivariate_normal(np.zeros(40), design.numpy()).logpdf(y.numpy())
    assert posterior.log_evidence == pytest.approx(evidence, rel=1e-12)
    assert posterior.info["evidence"] == "exact"
    draws = posterior.functions(new, n=20_000, seed=3)
    error = torch.cov(draws.T) - latent
    scale = (latent.diagonal()[:, None] * latent.diagonal() + latent**2).sqrt() / math.sqrt(20_000)
    assert (error.abs() / scale).max() < 4.5
    assert ((draws.mean(0) - fresh @ weights).abs() / (latent.diagonal() / 20_000).sqrt()).max() < 4.5


@pytest.mark.parametrize("noise", [0.3, 1e-3])
def test_predictions_follow_the_textbook_and_gpytorch(noise: float) -> None:
    x, y = table()
    new = torch.cat([table(20, seed=1)[0], x[:3]])
    posterior = NNGP().fit(network(noise), (x, y))
    mean, covariance, evidence = dense(nngp(LAYERS, x), nngp(LAYERS, x, new), nngp(LAYERS, new), y, noise)
    predicted = posterior.predict(new)
    torch.testing.assert_close(predicted.mean, mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(predicted.epistemic, covariance.diagonal(), rtol=1e-6, atol=1e-9)
    assert posterior.log_evidence == pytest.approx(evidence, rel=1e-9)
    assert (predicted.epistemic > 0).all()
    assert (predicted.epistemic[-3:] < noise**2).all()  # at a training row less than the noise remains
    exact = posterior.to_gpytorch()
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False), gpytorch.settings.debug(False):
        theirs = exact(new)
        torch.testing.assert_close(predicted.mean, theirs.mean, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(predicted.epistemic, theirs.covariance_matrix.diagonal(), rtol=1e-5, atol=1e-8)
        exact.train()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(exact.likelihood, exact)
        assert posterior.log_evidence == pytest.approx(40 * mll(exact(x), y).item(), rel=1e-9)


def test_interpolation_without_visible_noise_adds_no_jitter() -> None:
    x, y = table(15)
    posterior = NNGP(noise=1e-6).fit(network(), (x, y))
    predicted = posterior.predict(x)
    torch.testing.assert_close(predicted.mean, y, rtol=0, atol=1e-6)
    assert (predicted.epistemic < 1.1e-12).all()


def test_raw_units_come_back_and_evidence_is_a_density_of_raw_targets() -> None:
    x, y = table()
    plain = NNGP().fit(network(), ((x - x.mean(0)) / x.std(0, correction=0), (y - y.mean()) / y.std(correction=0)))
    raw = Dataset.from_arrays(5 + 3 * x, 100 + 20 * y, task="regression")
    scaled = NNGP().fit(network(), raw)
    new = table(9, seed=1)[0]
    ours = scaled.predict(5 + 3 * new)
    base = plain.predict((new - x.mean(0)) / x.std(0, correction=0))
    s = 20 * float(y.std(correction=0))
    torch.testing.assert_close(ours.mean, 100 + 20 * y.mean() + s * base.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.epistemic, s**2 * base.epistemic, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.aleatoric, s**2 * base.aleatoric, rtol=1e-9, atol=0)
    assert scaled.log_evidence == pytest.approx(plain.log_evidence - 40 * math.log(s), rel=1e-10)
    assert scaled.units == "scaled"
    functions = scaled.functions(5 + 3 * new, n=4000)
    assert ((functions.mean(0) - ours.mean).abs() / (ours.epistemic / 4000).sqrt()).max() < 4.5


def test_log_likelihood_averages_to_the_predictive_density() -> None:
    x, y = table()
    data = Dataset.from_arrays(x, 7 * y, task="regression")
    posterior = NNGP().fit(network(), data)
    values = posterior.log_likelihood(x, 7 * y, max_draws=2000)
    assert values.shape == (2000, 40)
    mixture = torch.logsumexp(values, 0) - math.log(2000)
    torch.testing.assert_close(mixture, posterior.predict(x).log_prob(7 * y), rtol=2e-3, atol=2e-3)


def test_unknown_noise_is_the_mode_of_evidence_times_prior() -> None:
    x, y = table()
    kernel = nngp(LAYERS, x)
    noises = np.exp(np.linspace(math.log(0.02), math.log(2.0), 20_001))
    values, vectors = np.linalg.eigh(kernel.numpy())
    spectrum = values[:, None] + noises**2
    evidence = -0.5 * ((vectors.T @ y.numpy())[:, None] ** 2 / spectrum + np.log(spectrum)).sum(0)
    by_evidence = NNGP().fit(network("mle"), (x, y))
    assert by_evidence.info["noise"] == pytest.approx(noises[evidence.argmax()], rel=2e-3)
    prior = dist.LogNormal(math.log(0.05), 0.1)
    with_prior = NNGP().fit(network(prior), (x, y))
    penalised = evidence + prior.log_prob(torch.as_tensor(noises)).numpy()
    assert with_prior.info["noise"] == pytest.approx(noises[penalised.argmax()], rel=2e-3)
    assert with_prior.info["noise"] < 0.7 * by_evidence.info["noise"]
    assert NNGP(noise=0.2).fit(network("mle"), (x, y)).info["noise"] == 0.2


@pytest.mark.parametrize("noise", [None, 0.3])
def test_gradient_of_the_evidence_by_finite_differences(noise: float | None) -> None:
    x, y = table(20)
    kernel = NNGPKernel(fully_connected(2, "erf", 1.2, 0.3), dtype=torch.float64)
    process = Process(kernel, gpytorch.means.ConstantMean().double(), x, fitted=True)
    objective = Evidence(process, y[None], noise, PositivePrior("LogNormal", (-1.2, 1.0)))
    z = torch.full((7 + (noise is None),), 0.1, dtype=torch.float64)
    _, gradient, _ = objective.evaluate(z, {})
    for k in range(len(z)):
        step = torch.zeros_like(z)
        step[k] = 1e-5
        slope = (objective.evaluate(z + step, {})[0] - objective.evaluate(z - step, {})[0]) / 2e-5
        assert gradient[k].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_fitting_the_kernel_raises_the_evidence_to_a_stationary_point() -> None:
    x, y = table()
    kept = NNGP().fit(network(0.3, Erf), (x, y))
    fitted = NNGP(fit_kernel=True).fit(network(0.3, Erf), (x, y))
    assert kept.info["hyperparameters"]["w_var"] == pytest.approx([1.96, 1.96])
    assert fitted.log_evidence > kept.log_evidence + 1
    assert fitted.info["converged"]
    posterior = GP(gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=3))).fit(network(0.3), (x, y))
    assert posterior.log_evidence > kept.log_evidence
    scales = posterior.info["hyperparameters"]["base_kernel.lengthscale"][0]
    assert scales[2] > 2 * scales[0]  # the third input is noise


def test_registered_priors_and_fixed_parameters_are_respected() -> None:
    x, y = table()
    kernel = gpytorch.kernels.RBFKernel(lengthscale_prior=gpytorch.priors.LogNormalPrior(math.log(0.2), 0.01))
    tight = GP(kernel).fit(network(), (x, y)).info["hyperparameters"]["lengthscale"][0][0]
    assert tight == pytest.approx(0.2, rel=0.05)
    assert kernel.lengthscale.item() == pytest.approx(math.log(2))  # the user's kernel is copied
    kept = GP(kernel, fit_kernel=False).fit(network(), (x, y))
    assert kept.info["hyperparameters"]["lengthscale"][0][0] == pytest.approx(math.log(2))
    frozen = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
    frozen.base_kernel.raw_lengthscale.requires_grad_(False)
    values = GP(frozen).fit(network(), (x, y)).info["hyperparameters"]
    assert values["base_kernel.lengthscale"][0][0] == pytest.approx(math.log(2))
    assert values["outputscale"] != pytest.approx(math.log(2))


def test_a_constant_mean_is_fitted_and_used() -> None:
    x, y = table()
    posterior = GP(mean=gpytorch.means.ConstantMean()).fit(network(), (x, y + 4))
    far = posterior.predict(x + 1000).mean
    torch.testing.assert_close(far, far[:1].expand(40))
    assert (far - 4).abs().max() < 1
    assert far[0].item() == pytest.approx(posterior.info["hyperparameters"]["constant"])


def test_several_targets_are_independent_functions_with_one_noise() -> None:
    x, y = table()
    both = torch.stack([y, -2 * y.flip(0)], 1)
    posterior = NNGP().fit(network(0.3, outputs=2), (x, both))
    single = [NNGP().fit(network(), (x, column)) for column in both.T]
    assert posterior.log_evidence == pytest.approx(sum(p.log_evidence for p in single), rel=1e-12)
    new = table(6, seed=1)[0]
    predicted = posterior.predict(new, max_draws=2048)
    for k, one in enumerate(single):
        torch.testing.assert_close(predicted.mean[:, k], one.predict(new).mean, rtol=0.02, atol=0.005)
        torch.testing.assert_close(predicted.variance[:, k], one.predict(new).variance, rtol=0.02, atol=0.005)
    assert posterior.functions(new, n=5).shape == (5, 6, 2)


def test_batches_do_not_change_predictions() -> None:
    x, y = table()
    posterior = NNGP().fit(network(), (x, y))
    new = table(11, seed=1)[0]
    whole, parts = posterior.predict(new), posterior.predict(new, batch_size=3)
    torch.testing.assert_close(whole.mean, parts.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.variance, parts.variance, rtol=1e-12, atol=1e-14)
    assert len(posterior.predict(new[:1])) == 1
    with pytest.raises(MethodError, match="batch_size"):
        posterior.predict(new, batch_size=0)


def test_weights_cannot_be_drawn() -> None:
    posterior = NNGP().fit(network(), table())
    with pytest.raises(MethodError, match="functions"):
        posterior.draws(3)
    with pytest.raises(MethodError, match="n must be"):
        posterior.functions(table()[0], n=0)


def test_same_seed_same_result_and_global_generators_untouched() -> None:
    (x, y), model = table(), network(None)
    before = torch.random.get_rng_state()
    first, second = (NNGP(fit_kernel=True).fit(model, (x, y), seed=4) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.predict(x).mean, second.predict(x).mean)
    assert torch.equal(first.functions(x, 3, seed=5), second.functions(x, 3, seed=5))
    assert not torch.equal(first.functions(x, 3, seed=5), first.functions(x, 3, seed=6))


def test_a_fit_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    x, y = table()
    method, model = NNGP(fit_kernel=True), network(None)
    whole = method.fit(model, (x, y))
    stopped = method.fit(model, (x, y), checkpoint=tmp_path / "run", callback=lambda state: state["step"] == 3)
    assert not stopped.info["converged"]
    resumed = method.fit(model, (x, y), checkpoint=tmp_path / "run")
    assert resumed.log_evidence == whole.log_evidence
    assert torch.equal(resumed.predict(x).mean, whole.predict(x).mean)


SCRIPT = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from safetensors.torch import load_file
from bayesdl.posterior import load
for folder in sys.argv[2:]:
    posterior, stored = load(folder), load_file(folder + ".safetensors")
    predicted = posterior.predict(stored["x"])
    assert torch.equal(predicted.mean, stored["mean"]), (predicted.mean - stored["mean"]).abs().max()
    assert torch.equal(predicted.variance, stored["variance"])
    assert torch.equal(posterior.functions(stored["x"], 2), stored["functions"])
"""


def test_saved_posteriors_predict_the_same_in_another_process(tmp_path: Path) -> None:
    x, y = table()
    new = table(5, seed=2)[0]
    matern = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=2, active_dims=(0, 2))
    composite = gpytorch.kernels.ScaleKernel(matern) + gpytorch.kernels.LinearKernel()
    folders = []
    for k, method in enumerate((NNGP(), GP(composite, mean=gpytorch.means.ConstantMean()))):
        posterior = method.fit(network(None), Dataset.from_arrays(x, 10 * y, task="regression"))
        folders.append(str(posterior.save(tmp_path / str(k))))
        predicted = posterior.predict(new)
        stored = {"x": new, "mean": predicted.mean, "variance": predicted.variance}
        save_file({**stored, "functions": posterior.functions(new, 2)}, f"{folders[-1]}.safetensors")
    command = [sys.executable, "-c", SCRIPT, str(torch.get_num_threads()), *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr


class Doubled(gpytorch.kernels.RBFKernel):
    def forward(self, x1: Tensor, x2: Tensor, **params: Any) -> Tensor:
        return 2 * super().forward(x1, x2, **params)


def test_a_kernel_that_is_code_comes_back_by_hand(tmp_path: Path) -> None:
    x, y = table()
    posterior = GP(Doubled()).fit(network(), (x, y))
    assert posterior.info["structure"] is None
    posterior.save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert isinstance(loaded, GPPosterior)
    assert loaded.log_evidence == posterior.log_evidence
    with pytest.raises(ModelRequired, match="with_kernel"):
        loaded.predict(x)
    with pytest.raises(ModelMismatch, match="kernel"):
        loaded.with_kernel(gpytorch.kernels.ScaleKernel(Doubled()))
    assert torch.equal(loaded.with_kernel(Doubled()).predict(x).mean, posterior.predict(x).mean)


def test_constraints_of_the_users_own_are_noticed() -> None:
    kernel = gpytorch.kernels.RBFKernel(lengthscale_constraint=gpytorch.constraints.Interval(0.1, 5.0))
    assert GP(kernel).fit(network(), table()).info["structure"] is None


def program(x: Tensor, y: Tensor | None = None) -> None:
    import pyro

    w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize(
    ("method", "model", "words"),
    [
        (NNGP(), network(0.3, partial(nn.Softmax, -1)), "Softmax.*Erf"),
        (NNGP(), program, "BayesianNetwork"),
        (GP(), program, "BayesianNetwork"),
        (GP(), network("head", outputs=2), "head"),
        (GP(gpytorch.kernels.RBFKernel(ard_num_dims=2)), network(), "3 columns"),
        (GP(gpytorch.kernels.MultitaskKernel(gpytorch.kernels.RBFKernel(), num_tasks=2)), network(), r"\(2, 2\)"),
        (NNGP(solver="cholesky", max_rows=39), network(), "40 rows.*GB.*max_rows=39"),
        (GP(), BayesianNetwork(nn.Linear(3, 1).double(), likelihood=likelihoods.StudentT()), "StudentT"),
        (GP(noise=0.1), BayesianNetwork(nn.Linear(3, 1).double(), likelihood=likelihoods.Bernoulli()), "noise=0.1"),
    ],
)
def test_what_does_not_apply_is_refused_with_the_reason(method: Any, model: Any, words: str) -> None:
    x, y = table()
    if isinstance(model, BayesianNetwork) and isinstance(model.likelihood, likelihoods.Bernoulli):
        y = (y > 0).double()
    with pytest.raises(MethodError, match=words):
        method.fit(model, (x, y))


def test_a_starting_point_is_refused() -> None:
    with pytest.raises(MethodError, match="init"):
        NNGP().fit(network(), table(), init="map")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NNGP(w_std=0.0), "w_std"),
        (lambda: NNGP(b_std=-1.0), "b_std"),
        (lambda: NNGP(noise=-1.0), "noise"),
        (lambda: NNGP(temperature=2.0), "temperature"),
        (lambda: NNGP(likelihood_temperature=2.0), "likelihood_temperature"),
        (lambda: GP(steps=0), "steps"),
        (lambda: GP(max_rows=0), "max_rows"),
        (lambda: GP(kernel="rbf"), "kernel"),
        (lambda: GP(gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))), "batch"),
        (lambda: GP(mean=1.0), "mean"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        make()


class Indefinite(gpytorch.kernels.Kernel):
    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        distance = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).norm(dim=-1)
        box = (distance <= 1.5).to(x1)
        return box.diagonal(dim1=-1, dim2=-2) if diag else box


def test_a_kernel_that_is_no_covariance_is_refused() -> None:
    # 1{|x - x'| <= c} has a negative eigenvalue on three equally spaced points
    x = torch.zeros(3, 3, dtype=torch.float64)
    x[:, 0] = torch.arange(3)
    with pytest.raises(Divergence, match=r"log evidence is -inf.*covariance function"):
        GP(Indefinite(), fit_kernel=False, noise=0.1).fit(network(), (x, torch.ones(3, dtype=torch.float64)))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU])
def test_kernels_by_quadrature_are_saved_with_their_network(activation: type[nn.Module], tmp_path: Path) -> None:
    x, y = table(12)
    posterior = NNGP(fit_kernel=True, steps=2).fit(network(0.3, activation), (x, y))
    loaded = load(posterior.save(tmp_path / "run"))
    assert torch.equal(loaded.predict(x).mean, posterior.predict(x).mean)
    assert torch.equal(loaded.predict(x).variance, posterior.predict(x).variance)


def test_gradient_of_many_rows_uses_single_precision_where_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = table(300)
    process = Process(NNGPKernel(LAYERS, dtype=torch.float64), gpytorch.means.ZeroMean(), x, fitted=True)
    objective = Evidence(process, torch.stack([y, y.flip(0)]), None, None)
    for log_noise, error in ((-1.5, 1e-4), (-9.0, 0.0)):  # with little noise the matrix is ill-conditioned
        z = torch.cat([process.vector, torch.tensor([log_noise], dtype=torch.float64)])
        monkeypatch.setattr("bayesdl.infinite.evidence.LARGE", 1000)
        value, whole, _ = objective.evaluate(z, {})
        monkeypatch.setattr("bayesdl.infinite.evidence.LARGE", 300)
        same, single, _ = objective.evaluate(z, {})
        assert same == value
        assert ((single - whole).abs() <= error * (300 + whole.abs())).all()
        assert torch.equal(single, whole) == (error == 0)
