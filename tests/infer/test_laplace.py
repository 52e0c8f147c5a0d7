"""Laplace on models whose posterior is known, its tuning against brute force, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import NetworkOutputs, dense
from bayesdl.errors import MethodError
from tests.cases import DOUBLE, conjugate, network
from tests.cases import dataset as small
from tests.curvature.networks import noise

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def fit(model: Any, data: Any, **settings: Any) -> Any:
    return bdl.fit(model, data, bdl.Laplace(**{"steps": 200, **settings}))


# -- conjugate regression --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("structure", ["auto", "full", "kron", "ekfac", "low_rank"])
def test_linear_regression_is_exact(structure: str, temperature: float) -> None:
    c = conjugate()
    found = fit(c.network(), c.data, structure=structure, temperature=temperature, polish=400)
    torch.testing.assert_close(found.mean, c.mean(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.law.covariance.dense(), c.covariance(temperature), **EXACT)
    if temperature == 1:
        assert found.info["log_evidence"] == pytest.approx(c.log_evidence(), rel=1e-10)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_so_is_it_as_a_program(batch_size: int | None) -> None:
    c = conjugate()
    found = fit(c.program, c.data, batch_size=batch_size)
    assert (found.info["structure"], found.info["curvature"]) == ("full", "hessian")
    torch.testing.assert_close(found.mean, c.mean(), **EXACT)
    torch.testing.assert_close(found.law.covariance.dense(), c.covariance(), **EXACT)
    assert found.info["log_evidence"] == pytest.approx(c.log_evidence(), rel=1e-10)
    assert found.info["mode_distance"] < 1e-10


def test_online_laplace_is_one_fit_of_all_rows() -> None:
    c = conjugate()
    x, y = c.data
    first = fit(c.network(), (x[:9], y[:9]))
    second = bdl.fit(c.network(), (x[9:], y[9:]), bdl.Laplace(steps=200), prior=first)
    whole = fit(c.network(), (x, y))
    torch.testing.assert_close(second.mean, whole.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(second.law.covariance.dense(), whole.law.covariance.dense(), **EXACT)
    with pytest.raises(MethodError, match="structure='full'"):
        bdl.fit(c.network(), (x[9:], y[9:]), bdl.Laplace(steps=20, structure="kron"), prior=first)


def test_the_diagonal_is_that_of_the_precision() -> None:
    c = conjugate()
    found = fit(c.network(), c.data, structure="diag")
    torch.testing.assert_close(found.sd.square(), 1 / c.precision().diagonal(), **EXACT)


def with_bias(prior: bdl.priors.Prior | None = None) -> tuple[bdl.BayesianNetwork, Tensor, Tensor, Tensor]:
    """Linear regression with an intercept, whose prior has another scale; rows with ones, and the prior's sd."""
    c = conjugate()
    model = bdl.BayesianNetwork(nn.Linear(3, 1).double(), prior, bdl.likelihoods.Gaussian(noise=c.sigma))
    x = torch.cat([c.x + 1.0, torch.ones(len(c.x), 1, dtype=DOUBLE)], 1)
    return model, x, c.y + 2.0, torch.tensor([3**-0.5] * 3 + [1.0], dtype=DOUBLE)


@pytest.mark.parametrize("structure", ["full", "kron", "ekfac"])
def test_weights_and_bias_are_one_matrix(structure: str) -> None:
    model, x, y, sd = with_bias()
    found = fit(model, (x[:, :3], y), structure=structure, polish=500)
    precision = x.T @ x / conjugate().sigma ** 2 + sd.square().reciprocal().diag()
    torch.testing.assert_close(found.law.covariance.dense(), torch.linalg.inv(precision), **EXACT)


def test_evidence_is_of_raw_targets() -> None:
    posteriors = []
    for scale in (1.0, 16.0):
        data = bdl.Dataset.from_arrays(small("regression").x, scale * small("regression").y, name="units")
        posteriors.append(fit(network("regression"), data))
    gap = posteriors[0].info["log_evidence"] - posteriors[1].info["log_evidence"]
    assert gap == pytest.approx(32 * math.log(16), rel=1e-8)


# -- other programs --------------------------------------------------------------------------------------------------


def logistic() -> tuple[Tensor, Tensor]:
    x = noise(40, 3)
    return x, (x @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE) + noise(40, seed=1) > 0).double()


def test_logistic_regression_is_newton_in_numpy() -> None:
    x, y = logistic()
    model = bdl.BayesianNetwork(
        nn.Linear(3, 1, bias=False).double(), bdl.priors.Normal(1.0), bdl.likelihoods.Bernoulli()
    )
    a, b, w = x.numpy(), y.numpy(), np.zeros(3)
    for _ in range(50):
        p = 1 / (1 + np.exp(-a @ w))
        precision = a.T @ (a * (p * (1 - p))[:, None]) + np.eye(3)
        w = w - np.linalg.solve(precision, a.T @ (p - b) + w)
    joint = np.sum(b * np.log(p) + (1 - b) * np.log(1 - p)) - 0.5 * w @ w - 1.5 * np.log(2 * np.pi)
    evidence = joint + 1.5 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    for curvature in ("ggn", "hessian"):  # equal for a linear logit
        found = fit(model, (x, y), curvature=curvature)
        torch.testing.assert_close(found.mean, torch.from_numpy(w), **EXACT)
        torch.testing.assert_close(found.law.covariance.dense(), torch.from_numpy(np.linalg.inv(precision)), **EXACT)
        assert found.info["log_evidence"] == pytest.approx(evidence, rel=1e-10)


def test_a_positive_latent_is_gaussian_in_its_logarithm() -> None:
    """Gamma counts: the mode in log rate is that of the density of the logarithm, not of the rate."""

    def program(x: Tensor, y: Tensor | None = None) -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(rate.expand(len(x))), obs=y)

    y = torch.tensor([3.0, 5.0, 4.0, 7.0], dtype=DOUBLE)
    found = fit(program, (torch.zeros(4, 1, dtype=DOUBLE), y))
    shape, inverse = 2 + float(y.sum()), 1 + 4  # posterior Gamma(21, 5); of the log the mode is log(21 / 5)
    assert float(found.mean) == pytest.approx(math.log(shape / inverse), abs=1e-9)
    assert float(found.sd) == pytest.approx(shape**-0.5, rel=1e-8)


@pytest.mark.parametrize("n", [1, 10, 100])
def test_laplace_integrals_have_an_error_of_order_one_over_n(n: int) -> None:
    """int exp(-n (w^2/2 + w^4/4)) dw against quadrature (inventory C15-05)."""

    def program(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        pyro.factor("energy", -n * (w**2 / 2 + w**4 / 4) + w**2 / 2 + 0.5 * math.log(2 * math.pi))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.zeros(len(x), dtype=DOUBLE), 1.0), obs=y)

    y = torch.zeros(1, dtype=DOUBLE)
    found = fit(program, (y[:, None], y)).info["log_evidence"] + 0.5 * math.log(2 * math.pi)
    exact = float(np.log(scipy.integrate.quad(lambda w: math.exp(-n * (w**2 / 2 + w**4 / 4)), -8, 8)[0]))
    assert found == pytest.approx(0.5 * math.log(2 * math.pi / n), abs=1e-9)
    assert 0.1 < (found - exact) * n < 1.2


def test_a_saddle_is_refused_by_its_direction() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((w[1] ** 2).expand(len(x)), 0.1), obs=y)

    data = (torch.zeros(5, 1, dtype=DOUBLE), torch.ones(5, dtype=DOUBLE))
    with pytest.raises(MethodError, match=r"curvature is -999 .*mostly w\[1\] \(100%"):
        bdl.fit(program, data, bdl.Laplace(), init={"w": torch.zeros(2, dtype=DOUBLE)})


# -- networks --------------------------------------------------------------------------------------------------------


def precision_of(found: Any) -> Tensor:
    """Gauss-Newton plus prior at the mean, dense."""
    at = NetworkOutputs(found.problem, found.mean)
    sd = found.problem.density.gaussian_prior()[1]
    weights = slice(at.sites[0].start, at.sites[-1].stop)
    return dense(at, at.sites) + sd[weights].square().reciprocal().diag()


def test_full_and_diagonal_precisions_of_a_network() -> None:
    full = fit(network("classes"), small("classes"), structure="full")
    diagonal = fit(network("classes"), small("classes"), structure="diag")
    torch.testing.assert_close(torch.linalg.inv(full.law.covariance.dense()), precision_of(full), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(diagonal.law.covariance.precisions(), precision_of(diagonal).diagonal(), **EXACT)


def test_a_last_layer_is_the_conditional_of_the_whole() -> None:
    data = small("classes")
    whole = fit(network("classes"), data, structure="full")
    last = bdl.fit(
        network("classes"), data, bdl.Laplace(random="2.*", structure="full", polish=0), init=whole_values(whole)
    )
    where = slice(whole.problem.density.sites[2].start, len(whole.mean))
    inverse = torch.linalg.inv(whole.law.covariance.dense())[where, where]
    torch.testing.assert_close(last.law.covariance.dense()[where, where], torch.linalg.inv(inverse), **EXACT)
    assert (last.sd[: where.start] == 0).all()
    assert last.info["points"] == ["0.weight", "0.bias"]
    assert torch.equal(last.draws(5)["0.weight"].std(0), torch.zeros(3, 3, dtype=DOUBLE))


def whole_values(found: Any) -> dict[str, Tensor]:
    values: dict[str, Tensor] = found.problem.density.constrain(found.mean)
    return values


def test_noise_has_the_exact_curvature_of_its_own_block() -> None:
    found = fit(network("regression"), small("regression"))
    assert found.info["hyperparameters"] == {"noise": "exact Hessian"}
    site = found.problem.density.sites[-1]
    z, step = found.mean, torch.zeros_like(found.mean)
    step[site.start] = 1e-4
    density = found.problem.density.log_density(torch.stack([z - step, z, z + step]))
    assert float(found.sd[site.start]) ** -2 == pytest.approx(float(-density.diff(n=2)) / 1e-8, rel=1e-5)


# -- tuning ----------------------------------------------------------------------------------------------------------


def brute_force(x: Tensor, y: Tensor, sd: Tensor, prior: tuple[float, float]) -> tuple[float, float, float]:
    """Factor on the prior's precision and noise that maximise the exact evidence, and its logarithm there."""
    a, b = x.numpy(), y.numpy()

    def minus(point: np.ndarray) -> float:
        covariance = np.exp(2 * point[1]) * np.eye(len(b)) + (a * sd.numpy() ** 2) @ a.T * np.exp(-point[0])
        value = -0.5 * (b @ np.linalg.solve(covariance, b) + np.linalg.slogdet(2 * np.pi * covariance)[1])
        noise = -0.5 * ((point[1] - prior[0]) / prior[1]) ** 2
        return -float(value + noise)

    best = scipy.optimize.minimize(
        minus, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    )
    return float(np.exp(best.x[0])), float(np.exp(best.x[1])), -float(best.fun)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_tuned_prior_and_noise_maximise_the_exact_evidence(structure: str) -> None:
    c = conjugate()
    net = nn.Linear(3, 1, bias=False).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(3.0), bdl.likelihoods.Gaussian(noise=dist.LogNormal(-1.0, 1.0)))
    found = fit(model, c.data, tune="prior", structure=structure, polish=500)
    factor, noise_level, _ = brute_force(c.x, c.y, torch.full((3,), 3.0, dtype=DOUBLE), (-1.0, 1.0))
    assert found.info["interior"]
    assert max(map(abs, found.info["evidence_gradient"].values())) < 1e-3
    assert found.info["prior_precision"]["all"] == pytest.approx(factor, rel=3e-3)
    assert float(found.mean[-1].exp()) == pytest.approx(noise_level, rel=1e-4)
    assert float(found.problem.density.gaussian_prior()[1][0]) == pytest.approx(3.0 * factor**-0.5, rel=2e-3)
    untuned = fit(model, c.data, structure=structure)
    assert found.info["log_evidence"] > untuned.info["log_evidence"] + 1


def test_effective_parameters_are_those_of_mackay() -> None:
    c = conjugate()
    found = fit(c.network(), c.data)
    shrinkage = torch.linalg.eigvalsh(c.x.T @ c.x / c.sigma**2)
    expected = (shrinkage / (shrinkage + c.prior**-2)).sum()
    assert found.info["effective_parameters"] == pytest.approx(float(expected), rel=1e-8)


def wave(factors: tuple[float, float]) -> tuple[bdl.BayesianNetwork, tuple[Tensor, Tensor]]:
    """A noisy sine and a small network, whose layers' priors have these precisions."""
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    sds = [factor**-0.5 for factor in factors]
    first, second = (bdl.priors.Normal("fan_in", w_std=sd, b_std=sd) for sd in sds)
    model = bdl.BayesianNetwork(
        net, bdl.priors.PerParameter({"0.*": first, "*": second}), bdl.likelihoods.Gaussian(noise=0.2)
    )
    x = torch.linspace(-2, 2, 60, dtype=DOUBLE)[:, None]
    return model, (x, (2 * x[:, 0]).sin() + 0.2 * noise(60, seed=3))


@pytest.mark.parametrize("tune", ["prior", pytest.param("layers", marks=pytest.mark.slow)])
def test_the_evidence_of_refitted_modes_is_highest_at_the_tuned_prior(tune: str, tmp_path: Path) -> None:
    """In a nonlinear network the curvature moves with the mode: MacKay's fixed point alone is elsewhere."""
    model, data = wave((1.0, 1.0))
    found = fit(model, data, tune=tune, steps=300, polish=600)
    assert found.info["interior"], found.info
    assert max(map(abs, found.info["evidence_gradient"].values())) < 1e-3
    best = list(found.info["prior_precision"].values())
    assert len(best) == (1 if tune == "prior" else 2)

    def refitted(changed: list[float]) -> float:
        again, _ = wave((changed[0], changed[-1]))
        settings = bdl.Laplace(polish=600)
        return float(bdl.fit(again, data, settings, init=whole_values(found)).info["log_evidence"])

    assert found.info["log_evidence"] == pytest.approx(refitted(best), abs=1e-4)
    for k in range(len(best)):
        sides = [refitted([b * math.exp(s * (j == k)) for j, b in enumerate(best)]) for s in (-0.05, 0.05)]
        assert abs(sides[1] - sides[0]) / 0.1 < 0.02
        assert max(sides) < found.info["log_evidence"] - 5e-4
    found.save(tmp_path)
    loaded = bdl.load(tmp_path)
    assert torch.equal(loaded.problem.density.gaussian_prior()[1], found.problem.density.gaussian_prior()[1])


def test_tuning_works_in_single_precision() -> None:
    """The prior's curvature must not be a difference of large numbers."""
    x, y = noise(200, 5).float(), (noise(200, 5, seed=2)[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    model = bdl.BayesianNetwork(net, bdl.priors.Normal("fan_in", w_std=100.0), bdl.likelihoods.Categorical())
    found = fit(model, (100 * x, y), structure="kron", tune="prior", rounds=1)
    factor = found.info["prior_precision"]["all"]
    sd = found.problem.density.gaussian_prior()[1]
    torch.testing.assert_close(sd[:40], torch.full((40,), 100 / 5**0.5 / factor**0.5), rtol=1e-5, atol=0)


def test_data_that_say_nothing_push_the_prior_to_its_bound() -> None:
    x = noise(30, 3)
    model = bdl.BayesianNetwork(
        nn.Linear(3, 1, bias=False).double(), bdl.priors.Normal(1.0), bdl.likelihoods.Gaussian(noise=1.0)
    )
    found = fit(model, (x, 1e-3 * noise(30, seed=1)), tune="prior")
    assert not found.info["interior"]
    assert found.info["at_bound"] == ["all"]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "cube"}, "structure must be one of"),
        ({"curvature": "hessian", "structure": "kron"}, "must be 'full'"),
        ({"tune": "prior", "temperature": 2.0}, "temperature 1"),
        ({"validation": 0.2}, "polish=0"),
        ({"random": "9.*"}, "matches none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        fit(network("regression"), small("regression"), **settings)


def test_programs_have_no_gauss_newton_matrix() -> None:
    with pytest.raises(MethodError, match="hessian"):
        fit(conjugate().program, conjugate().data, curvature="ggn")


def test_a_network_too_large_for_the_full_matrix_is_refused_with_its_size() -> None:
    model = bdl.BayesianNetwork(nn.Linear(20_000, 2))
    with pytest.raises(MethodError, match=r"40,002 unknowns takes 6 GiB"):
        bdl.fit(model, (torch.zeros(2, 20_000), torch.zeros(2, 2)), bdl.Laplace(structure="full", steps=1, polish=1))


def test_a_prior_without_curvature_takes_a_structure_that_can_do_without() -> None:
    c = conjugate()
    model = bdl.BayesianNetwork(
        nn.Linear(3, 1, bias=False).double(), bdl.priors.Laplace(1.0), bdl.likelihoods.Gaussian(noise=c.sigma)
    )
    found = fit(model, c.data, structure="full", polish=400)
    covariance = torch.linalg.inv(c.x.T @ c.x / c.sigma**2)
    torch.testing.assert_close(found.law.covariance.dense(), covariance, **EXACT)
    with pytest.raises(MethodError, match="same for all outputs"):
        fit(model, c.data, structure="kron")
