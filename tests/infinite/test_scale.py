"""Large n: conjugate gradients, inducing points and the Dirichlet likelihood against dense algebra in numpy."""

import math
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import DataError, Divergence, MethodError, ModelError
from bayesdl.infinite import GP, NNGP, NNGPKernel, fully_connected, is_psd_on, nngp
from bayesdl.infinite.conjugate import Preconditioner, half_log_det, pivoted_cholesky, product, solve
from bayesdl.infinite.dirichlet import dirichlet_targets
from bayesdl.infinite.evidence import Evidence, Process
from bayesdl.infinite.gram import Gram, gram, gram_gradient
from bayesdl.models import BayesianNetwork, likelihoods, priors
from bayesdl.posterior import load

LAYERS = fully_connected(1, "relu", 1.4, 0.5)
DOUBLE = torch.float64


def table(n: int = 80, d: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=DOUBLE)
    return x, torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1] + 0.3 * torch.randn(n, generator=g, dtype=DOUBLE)


def network(likelihood: Any = None, outputs: int = 1, noise: Any = 0.3) -> BayesianNetwork:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, outputs)).double()
    return BayesianNetwork(net, priors.Normal("fan_in", 1.4, 0.5), likelihood or likelihoods.Gaussian(noise=noise))


def kernel() -> NNGPKernel:
    return NNGPKernel(LAYERS, dtype=DOUBLE)


# -- the kernel matrix in tiles ---------------------------------------------------------------------------------------


def test_tiles_make_the_matrix_its_products_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x = table(50)[0]
    k = kernel()
    whole = k(x).to_dense()
    weights = torch.randn(50, 50, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    weights = weights + weights.T
    want = torch.autograd.grad((weights * whole).sum(), [k.raw_w_var, k.raw_b_var])
    monkeypatch.setattr("bayesdl.infinite.gram.pairs.__defaults__", (16,))
    torch.testing.assert_close(gram(k, x), whole.detach(), rtol=1e-13, atol=1e-14)
    for found, wanted in zip(gram_gradient(k, x, weights, [k.raw_w_var, k.raw_b_var]), want, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    stored, computed = Gram(k, x, 1.0), Gram(k, x, 1e-6)
    assert stored.matrix is not None
    assert computed.matrix is None
    torch.testing.assert_close(computed @ weights, whole.detach() @ weights, rtol=1e-12, atol=1e-12)


# -- conjugate gradients -----------------------------------------------------------------------------------------------


def test_pivoted_cholesky_takes_the_row_of_largest_conditional_variance_and_becomes_exact() -> None:
    x = table(30)[0]
    matrix = nngp(LAYERS, x)
    pivots, factor = pivoted_cholesky(kernel(), x, 7)
    for k in range(7):
        known = pivots[:k]
        inverse = torch.linalg.inv(matrix[known][:, known])
        left = (matrix - matrix[:, known] @ inverse @ matrix[known]).diagonal()
        assert int(left.argmax()) == int(pivots[k])
        rest = matrix - factor[:, : k + 1] @ factor[:, : k + 1].T
        assert rest.diagonal().min() > -1e-12
    torch.testing.assert_close((lambda f: f @ f.T)(pivoted_cholesky(kernel(), x, 30)[1]), matrix, rtol=1e-7, atol=1e-9)
    # four linear features: the rank is four
    assert len(pivoted_cholesky(NNGPKernel(fully_connected(0, b_std=1.0), dtype=DOUBLE), x, 30, 1e-10)[0]) == 4


def test_conjugate_gradients_solve_every_column_and_say_how_well() -> None:
    x = table(60)[0]
    g = torch.Generator().manual_seed(2)
    root = 10 ** torch.rand(2, 60, generator=g, dtype=DOUBLE)
    v = torch.randn(2, 60, 3, generator=g, dtype=DOUBLE)
    v[0, :, 1] = 0  # a column that is solved at once
    matrix = torch.eye(60, dtype=DOUBLE) + root.unsqueeze(-1) * nngp(LAYERS, x) * root.unsqueeze(-2)
    operator = Gram(kernel(), x, 1.0)
    torch.testing.assert_close(product(operator, root, v), matrix @ v, rtol=1e-11, atol=1e-10)
    steps = []
    for rank in (1, 20):
        near = Preconditioner(pivoted_cholesky(kernel(), x, rank)[1], root)
        inner = near.scaled @ near.scaled.mT + torch.eye(60, dtype=DOUBLE)
        torch.testing.assert_close(near.solve(v), torch.linalg.solve(inner, v), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(near.half_log_det, torch.linalg.slogdet(inner)[1] / 2)
        found = solve(operator, root, v, near, 1e-10)
        torch.testing.assert_close(found.value, torch.linalg.solve(matrix, v), rtol=1e-6, atol=1e-9)
        assert found.residual <= 1e-10
        steps.append(found.steps)
    assert steps[1] < 0.7 * steps[0]  # a better preconditioner needs fewer steps


def test_log_determinant_is_estimated_within_its_standard_error() -> None:
    x = table(200)[0]
    root = torch.full((1, 200), 3.0, dtype=DOUBLE)
    matrix = torch.eye(200, dtype=DOUBLE) + 9 * nngp(LAYERS, x)
    want = float(torch.linalg.slogdet(matrix)[1]) / 2
    near = Preconditioner(pivoted_cholesky(kernel(), x, 5)[1], root)
    value, error = half_log_det(Gram(kernel(), x, 1.0), root, near, 200, 1e-6, 0)
    assert 0 < error < 0.02 * want
    assert abs(value - want) < 4 * error
    exact = Preconditioner(pivoted_cholesky(kernel(), x, 200, 0.0)[1], root)
    assert half_log_det(Gram(kernel(), x, 1.0), root, exact, 4, 1e-6, 0)[0] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("memory", [8.0, 1e-9])
@pytest.mark.parametrize("outputs", [1, 2])
def test_cg_and_cholesky_are_one_posterior(memory: float, outputs: int) -> None:
    x, y = table()
    y = y if outputs == 1 else torch.stack([y, y.flip(0)], 1)
    model = network(outputs=outputs)
    exact = NNGP(solver="cholesky").fit(model, (x, y))
    iterated = NNGP(solver="cg", memory=memory).fit(model, (x, y))
    new = table(9, seed=1)[0]
    a, b = exact.predict(new), iterated.predict(new)
    torch.testing.assert_close(b.mean, a.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(b.variance, a.variance, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(iterated.functions(new, 3), exact.functions(new, 3), rtol=1e-4, atol=1e-4)
    assert iterated.info["solver"] == "cg"
    assert 0 <= iterated.info["cg_residual"] < 1e-7
    assert abs(iterated.log_evidence - exact.log_evidence) < 4 * iterated.info["evidence_se"] + 1e-6


def test_large_tables_iterate_by_themselves_with_noise_and_kernel_from_some_rows(tmp_path: Path) -> None:
    x, y = table(200)
    method = GP(max_rows=120, steps=10)
    posterior = method.fit(network(noise=None), (x, y))
    assert (posterior.info["solver"], posterior.info["tuned_on_rows"]) == ("cg", 120)
    kept = NNGP(solver="cholesky").fit(network(), (x, y))
    assert kept.info["solver"] == "cholesky"
    # the same hyperparameters by dense algebra
    fixed = GP(posterior.kernel, fit_kernel=False, noise=posterior.info["noise"]).fit(network(), (x, y))
    new = table(5, seed=1)[0]
    torch.testing.assert_close(posterior.predict(new).mean, fixed.predict(new).mean, rtol=1e-6, atol=1e-6)
    loaded = load(posterior.save(tmp_path / "run"))
    assert torch.equal(loaded.predict(new).mean, posterior.predict(new).mean)
    assert torch.equal(loaded.predict(new).variance, posterior.predict(new).variance)


def test_iterations_that_do_not_converge_say_the_residual_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesdl.infinite.conjugate.STEPS", 3)
    x, y = table(150)
    with pytest.raises(Divergence, match=r"relative residual of .* after 3 steps.*larger noise.*cholesky.*inducing"):
        NNGP(solver="cg", noise=1e-3).fit(network(), (x, y))


# -- inducing points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.3, 0.02])
def test_all_rows_as_inducing_points_are_the_exact_regression(noise: float) -> None:
    x, y = table()
    exact = NNGP(noise=noise).fit(network(), (x, y))
    all_rows = NNGP(noise=noise, inducing=500).fit(network(), (x, y))
    new = table(9, seed=1)[0]
    torch.testing.assert_close(all_rows.predict(new).mean, exact.predict(new).mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(all_rows.predict(new).variance, exact.predict(new).variance, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(all_rows.functions(new, 3), exact.functions(new, 3), rtol=1e-5, atol=1e-5)
    assert all_rows.log_evidence == pytest.approx(exact.log_evidence, abs=1e-4)


def test_fewer_inducing_points_follow_titsias_and_stay_below_the_evidence(tmp_path: Path) -> None:
    x, y = table()
    matrix, noise = nngp(LAYERS, x).numpy(), 0.3
    exact = NNGP().fit(network(), (x, y))
    new = table(9, seed=1)[0]
    last = -math.inf
    for m in (3, 10, 30):
        posterior = NNGP(inducing=m).fit(network(), (x, y))
        z = pivoted_cholesky(kernel(), x, m)[0]
        kzz, kzx, kzn = (nngp(LAYERS, x[z], other).numpy() for other in (x[z], x, new))
        q = kzx.T @ np.linalg.solve(kzz, kzx)
        evidence = -0.5 * (y.numpy() @ np.linalg.solve(q + noise**2 * np.eye(80), y.numpy()))
        evidence -= 0.5 * np.linalg.slogdet(2 * math.pi * (q + noise**2 * np.eye(80)))[1]
        bound = evidence - np.trace(matrix - q) / (2 * noise**2)
        assert posterior.log_evidence == pytest.approx(bound, rel=1e-6)
        assert last < posterior.log_evidence < exact.log_evidence
        last = posterior.log_evidence
        sigma = np.linalg.inv(kzz + kzx @ kzx.T / noise**2)
        predicted = posterior.predict(new)
        np.testing.assert_allclose(predicted.mean, kzn.T @ sigma @ kzx @ y.numpy() / noise**2, rtol=1e-5, atol=1e-6)
        variance = np.diag(nngp(LAYERS, new).numpy() - kzn.T @ (np.linalg.inv(kzz) - sigma) @ kzn)
        np.testing.assert_allclose(predicted.epistemic, variance, rtol=1e-5, atol=1e-6)
    loaded = load(posterior.save(tmp_path / "run"))
    assert torch.equal(loaded.predict(new).mean, predicted.mean)


@pytest.mark.parametrize("noise", [None, 0.3])
def test_gradient_of_the_lower_bound_by_finite_differences(noise: float | None) -> None:
    x, y = table(30)
    process = Process(kernel(), gpytorch.means.ConstantMean().double(), x, fitted=True, inducing=x[:6])
    objective = Evidence(process, y[None], noise, None)
    z = torch.full((5 + (noise is None),), 0.1, dtype=DOUBLE)
    _, gradient, _ = objective.evaluate(z, {})
    for k in range(len(z)):
        step = torch.zeros_like(z)
        step[k] = 1e-5
        slope = (objective.value(z + step) - objective.value(z - step)) / 2e-5
        assert gradient[k].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_inducing_points_of_a_linear_kernel_are_no_more_than_its_rank() -> None:
    x, y = table()
    flat = BayesianNetwork(nn.Linear(3, 1).double(), likelihood=likelihoods.Gaussian(noise=0.3))
    found, exact = (NNGP(inducing=m).fit(flat, (x, y)) for m in (40, None))
    assert found.inducing is not None
    assert len(found.inducing) < 20
    torch.testing.assert_close(found.predict(x).mean, exact.predict(x).mean, rtol=1e-6, atol=1e-6)
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-3)


@pytest.mark.parametrize("classes", [1, 3])
def test_all_rows_as_inducing_points_are_the_variational_classification(classes: int) -> None:
    x, y = table(45)
    labels = (y > 0).double() if classes == 1 else torch.arange(45) % 3
    model = network(likelihoods.Bernoulli() if classes == 1 else likelihoods.Categorical(), classes)
    whole, all_rows, few = (NNGP(inducing=m).fit(model, (x, labels)) for m in (None, 45, 6))
    torch.testing.assert_close(all_rows.predict(x).probs, whole.predict(x).probs, rtol=1e-4, atol=1e-5)
    assert all_rows.log_evidence == pytest.approx(whole.log_evidence, abs=1e-3)
    assert few.log_evidence < whole.log_evidence
    assert few.predict(x).probs.isfinite().all()


# -- the Dirichlet likelihood ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_dirichlet_classification_is_regression_on_log_normal_targets(solver: Any) -> None:
    x = table(60)[0]
    y = (x[:, 0] > 0.4).long() + (x[:, 1] > 0.4).long()
    alpha = 0.05
    posterior = NNGP(dirichlet=alpha, solver=solver).fit(network(likelihoods.Categorical(), 3), (x, y))
    new = table(7, seed=1)[0]
    concentration = alpha + np.eye(3)[y.numpy()].T
    variance = np.log(1 / concentration + 1)
    targets = np.log(concentration) - variance / 2
    targets -= targets.mean()
    matrix, cross, own = (nngp(LAYERS, *pair).numpy() for pair in ((x,), (x, new), (new,)))
    rng, logits = np.random.default_rng(0), []
    draws = posterior.functions(new, 20_000)
    for c in range(3):
        inverse = np.linalg.inv(matrix + np.diag(variance[c]))
        mean, covariance = cross.T @ inverse @ targets[c], own - cross.T @ inverse @ cross
        sd = np.sqrt(np.diag(covariance))
        np.testing.assert_array_less(np.abs(draws[..., c].mean(0).numpy() - mean) / sd, 4.5 / math.sqrt(20_000))
        np.testing.assert_allclose(draws[..., c].std(0).numpy(), sd, rtol=0.03)
        logits.append(mean + sd * rng.standard_normal((100_000, 7)))
    odds = np.exp(np.stack(logits, -1))
    want = (odds / odds.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(posterior.predict(new, max_draws=4096).probs, want, atol=0.006)
    assert (posterior.predict(x).labels == y).double().mean() > 0.8


def test_dirichlet_targets_have_the_papers_numbers() -> None:
    targets, deviations = dirichlet_targets(torch.tensor([0, 1]), 2, 0.01)
    want = torch.tensor([0.688184, 4.615121], dtype=DOUBLE)  # log(1 / 1.01 + 1) and log 101
    torch.testing.assert_close(deviations[0].square(), want, rtol=0, atol=1e-6)
    # log 1.01 - s^2 / 2 and log 0.01 - s^2 / 2, about their mean
    assert float(targets[0, 0] - targets[0, 1]) == pytest.approx(6.578589, abs=1e-6)
    assert float(targets.sum()) == pytest.approx(0, abs=1e-12)


def test_dirichlet_of_two_classes_has_one_logit_and_forgets_far_away(tmp_path: Path) -> None:
    x, y = table(60)
    labels = (y > 0).double()
    posterior = GP(dirichlet=0.01, inducing=60).fit(network(likelihoods.Bernoulli()), (x, labels))
    assert posterior.a.shape == (2, 60)
    assert posterior.functions(x[:4], 5).shape == (5, 4)
    assert (posterior.predict(x).labels == labels).double().mean() > 0.85
    far = posterior.predict(torch.full((1, 3), 1e3, dtype=DOUBLE), max_draws=4096).probs
    torch.testing.assert_close(far, torch.full((1, 2), 0.5, dtype=DOUBLE), rtol=0, atol=0.02)
    # turned labels turn the probabilities
    turned = GP(dirichlet=0.01, inducing=60).fit(network(likelihoods.Bernoulli()), (x, 1 - labels))
    torch.testing.assert_close(turned.predict(x).probs.flip(1), posterior.predict(x).probs, rtol=0, atol=0.02)
    assert torch.equal(load(posterior.save(tmp_path / "run")).predict(x).probs, posterior.predict(x).probs)


# -- covariance or not -------------------------------------------------------------------------------------------------


def box(x: Tensor, z: Tensor) -> Tensor:
    return (torch.cdist(x, z) <= 1.0).to(x)


def test_a_gram_matrix_refutes_and_never_proves() -> None:
    line = torch.arange(3.0, dtype=DOUBLE).unsqueeze(-1)
    refuted = is_psd_on(box, line)
    assert not refuted
    assert refuted.smallest == pytest.approx(1 - math.sqrt(2), abs=1e-12)
    assert "-0.414" in str(refuted)
    passed = is_psd_on(box, 5 * line)  # the same function, and no covariance still
    assert passed
    assert "proves nothing" in str(passed)
    assert is_psd_on(kernel(), torch.cat([table(20)[0]] * 2))  # singular is not indefinite
    assert is_psd_on(gpytorch.kernels.RBFKernel(), line.float())


@pytest.mark.parametrize(
    ("function", "x", "error", "words"),
    [
        (box, torch.zeros(0, 1), DataError, "at least one row"),
        (box, torch.tensor([[math.nan]]), DataError, "finite"),
        (lambda x, z: box(x, z)[:1], torch.zeros(2, 1), ModelError, r"\[1, 2\]"),
        (lambda x, z: x @ z.T / 0, torch.ones(2, 1), ModelError, "NaN"),
        (lambda x, z: x - z.T, torch.arange(2.0).unsqueeze(-1), ModelError, "symmetric"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(function: Any, x: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        is_psd_on(function, x)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "likelihood", "words"),
    [
        (NNGP(solver="cg"), likelihoods.Bernoulli(), r"solver='cg'.*dirichlet=0.01.*inducing"),
        (NNGP(dirichlet=0.1), likelihoods.Gaussian(), "dirichlet=0.1 is for classes"),
        (NNGP(max_rows=50), likelihoods.Bernoulli(), "max_rows=50.*inducing=512.*dirichlet"),
    ],
)
def test_what_does_not_apply_is_refused(method: Any, likelihood: Any, words: str) -> None:
    x, y = table()
    with pytest.raises(MethodError, match=words):
        method.fit(network(likelihood), (x, (y > 0).double()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "lu"}, "cholesky, cg"),
        ({"solver": "cg", "inducing": 5}, "inducing points"),
        ({"inducing": 0}, "inducing"),
        ({"dirichlet": 0.0}, "dirichlet"),
        ({"memory": -1.0}, "memory"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        NNGP(**settings)
