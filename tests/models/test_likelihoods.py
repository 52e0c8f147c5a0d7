"""The likelihoods: the identities that tie them to the usual losses, what they observe, and what they refuse."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn

from bayesdl.errors import DataError, ModelError, ModelRequired
from bayesdl.models import BayesianNetwork
from bayesdl.models.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    MultiBernoulli,
    Poisson,
    Quantile,
    StudentT,
    from_config,
    to_config,
)

F = torch.tensor([-1.2, 0.3, 2.0, 0.7], dtype=torch.float64)
Y = torch.tensor([0.1, -0.4, 1.5, 3.0], dtype=torch.float64)
LOGITS = torch.tensor([[0.2, -1.0, 0.5], [2.0, 0.1, -0.3], [-0.7, 0.0, 0.4], [1.0, 1.0, 1.0]], dtype=torch.float64)


def nll(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """Minus the log likelihood of each row, with fixed latents."""
    fn = likelihood.distribution(f, likelihood.latents(f))
    return -fn.log_prob(likelihood.target(y, fn, f.dtype))


def test_gaussian_is_the_squared_error_with_its_factor_and_constant() -> None:
    for sigma in (0.5, 2.0):
        expected = (Y - F) ** 2 / (2 * sigma**2) + 0.5 * math.log(2 * math.pi * sigma**2)
        torch.testing.assert_close(nll(Gaussian(noise=sigma), F, Y), expected, rtol=1e-13, atol=1e-13)
    # |y - f|^2 over K outputs is the energy of noise^2 = 1/2, up to K/2 log(pi).
    f, y = LOGITS[:, :2], LOGITS[:, 1:]
    expected = ((y - f) ** 2).sum(1) + math.log(math.pi)
    torch.testing.assert_close(nll(Gaussian(noise=math.sqrt(0.5)), f, y), expected, rtol=1e-13, atol=1e-13)


def test_a_heteroscedastic_head_has_its_own_scale_per_row_and_target() -> None:
    raw = torch.tensor([-3.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    fn = Gaussian(noise="head").distribution(torch.stack([F, raw], 1), {})
    sd = torch.log1p(raw.exp()) + 1e-3
    assert fn.batch_shape == (4,)
    assert fn.event_shape == ()
    torch.testing.assert_close(fn.mean, F)
    torch.testing.assert_close(fn.stddev, sd, rtol=1e-12, atol=0)
    two = Gaussian(noise="head").distribution(torch.stack([F, -F, raw, 2 * raw], 1), {})
    assert two.event_shape == (2,)
    torch.testing.assert_close(two.mean, torch.stack([F, -F], 1))
    torch.testing.assert_close(two.stddev[:, 0], sd, rtol=1e-12, atol=0)
    assert two.stddev[0, 1] != two.stddev[0, 0]


def test_student_t_by_formula() -> None:
    expected = -scipy.stats.t(3, loc=F, scale=0.7).logpdf(Y)
    torch.testing.assert_close(nll(StudentT(df=3.0, noise=0.7), F, Y), torch.from_numpy(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.8])
def test_quantile_is_the_pinball_loss_minimised_by_the_empirical_quantile(tau: float) -> None:
    residual = Y - F
    pinball = torch.where(residual > 0, tau * residual, (tau - 1) * residual)
    expected = pinball / 0.3 + math.log(0.3) - math.log(tau * (1 - tau))
    torch.testing.assert_close(nll(Quantile(tau, noise=0.3), F, Y), expected, rtol=1e-12, atol=1e-12)
    sample = torch.tensor(scipy.stats.gamma(2).rvs(101, random_state=0))
    grid = torch.sort(sample).values
    losses = torch.stack([nll(Quantile(tau, noise=1.0), value.expand(101), sample).sum() for value in grid])
    # 101 tau is no integer, so the minimiser is one order statistic: the ceil(101 tau)-th.
    assert int(losses.argmin()) == math.ceil(101 * tau) - 1


def test_bernoulli_is_the_logistic_loss() -> None:
    y = torch.tensor([0, 1, 1, 0])
    expected = torch.log1p(torch.exp(-(2 * y - 1) * F))
    torch.testing.assert_close(nll(Bernoulli(), F, y), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(nll(Bernoulli(), F[:, None], y), expected, rtol=1e-13, atol=0)


def test_categorical_gradient_is_probability_minus_one_hot() -> None:
    y = torch.tensor([2, 0, 1, 1])
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nll(Categorical(), logits, y).sum(), logits)
    expected = torch.softmax(LOGITS, 1) - nn.functional.one_hot(y, 3)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_several_heads_count_the_negatives() -> None:
    t = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    p = torch.sigmoid(LOGITS)
    expected = -(t * p.log() + (1 - t) * (1 - p).log()).sum(1)
    torch.testing.assert_close(nll(MultiBernoulli(), LOGITS, t), expected, rtol=1e-12, atol=1e-14)
    # Without the second term, all logits to infinity would be free.
    assert (nll(MultiBernoulli(), LOGITS + 50, t)[[0, 1, 3]] > 40).all()


def test_poisson_takes_the_log_rate() -> None:
    y = torch.tensor([0, 2, 5, 1])
    expected = -scipy.stats.poisson(F.exp()).logpmf(y)
    torch.testing.assert_close(nll(Poisson(), F, y), torch.from_numpy(expected), rtol=1e-12, atol=1e-14)


def test_outputs_with_one_column_are_one_target() -> None:
    for likelihood in (Gaussian(noise=1.0), StudentT(noise=1.0), Quantile(0.3, noise=1.0), Poisson()):
        y = Y.abs().round()
        torch.testing.assert_close(nll(likelihood, F[:, None], y), nll(likelihood, F, y))


def sites(likelihood: Likelihood, outputs: int = 1) -> dict[str, dict[str, object]]:
    pyro.clear_param_store()
    model = BayesianNetwork(nn.Linear(2, outputs).double(), None, likelihood)
    nodes = poutine.trace(model).get_trace(torch.ones(3, 2, dtype=torch.float64)).nodes
    pyro.clear_param_store()
    return {name: node for name, node in nodes.items() if node["type"] in ("sample", "param")}


def test_noise_is_a_prior_a_param_a_number_or_a_head() -> None:
    for given, family in ((None, dist.LogNormal), (dist.HalfNormal(0.5), dist.HalfNormal)):
        node = sites(Gaussian(noise=given))["noise"]
        assert isinstance(node["fn"], family)
        assert not node["cond_indep_stack"]
    node = sites(Gaussian(noise="mle"))["noise"]
    assert node["type"] == "param"
    assert float(node["value"].detach()) == pytest.approx(0.3)  # type: ignore[arg-type]  # a tensor
    assert "noise" not in sites(Gaussian(noise=0.1))
    assert "noise" not in sites(Gaussian(noise="head"), outputs=2)
    assert isinstance(sites(StudentT(df=dist.Gamma(2.0, 0.1)))["df"]["fn"], dist.Gamma)


def test_the_default_noise_prior_is_gaussian_in_its_logarithm_with_the_stated_quantiles() -> None:
    prior = Gaussian().noise.distribution(F)  # type: ignore[union-attr]  # stored as a PositivePrior
    low, median, high = (float(prior.icdf(torch.tensor(q, dtype=torch.float64))) for q in (0.025, 0.5, 0.975))
    assert median == pytest.approx(0.30, abs=0.005)
    assert low == pytest.approx(0.04, abs=0.005)
    assert high == pytest.approx(2.1, abs=0.05)


@pytest.mark.parametrize(
    ("likelihood", "targets", "outputs", "task", "scales"),
    [
        (Gaussian(), 1, 1, "regression", True),
        (Gaussian(noise="head"), 3, 6, "regression", True),
        (StudentT(), 2, 2, "regression", True),
        (Quantile(0.9), 1, 1, "regression", True),
        (Bernoulli(), 2, 1, "classification", False),
        (MultiBernoulli(), 4, 4, "classification", False),
        (Categorical(), 5, 5, "classification", False),
        (Poisson(), 1, 1, "regression", False),
    ],
    ids=lambda value: str(value),
)
def test_what_each_likelihood_needs(
    likelihood: Likelihood, targets: int, outputs: int, task: str, scales: bool
) -> None:
    assert likelihood.n_outputs(targets) == outputs
    assert likelihood.task == task
    assert likelihood.scales_y is scales


def test_targets_are_checked_and_good_ones_pass() -> None:
    Gaussian().check_target(Y, 1)
    Gaussian(noise="head").check_target(LOGITS, 6)
    Bernoulli().check_target(torch.tensor([True, False]), 1)
    Bernoulli().check_target(torch.tensor([0.0, 1.0]), 1)
    MultiBernoulli().check_target(torch.tensor([[0, 1], [1, 1]]), 2)
    Categorical().check_target(torch.tensor([0, 2, 1]), 3)
    Categorical().check_target(torch.tensor([0.0, 2.0]))
    Poisson().check_target(torch.tensor([0.0, 7.0]), 1)


@pytest.mark.parametrize(
    ("likelihood", "y", "outputs", "words"),
    [
        (Gaussian(), Y.numpy(), 1, ["tensor", "ndarray"]),
        (Gaussian(), torch.tensor([1.0, math.inf]), 1, ["infinite"]),
        (Gaussian(), Y[:, None], 1, ["[N]", "(4, 1)", "squeeze"]),
        (Gaussian(), Y[:, None, None], None, ["[N, K]", "(4, 1, 1)"]),
        (StudentT(), LOGITS, 2, ["3 target column", "StudentT", "has 2"]),
        (Quantile(0.5, noise="head"), Y, 1, ["2 network output", "has 1"]),
        (Bernoulli(), torch.tensor([1, 2]), 1, ["0 and 1", "[1, 2]"]),
        (Bernoulli(), torch.tensor([-1, 1]), 1, ["[-1, 1]", "Dataset.from_arrays"]),
        (Bernoulli(), torch.tensor([[0], [1]]), 1, ["(2, 1)"]),
        (MultiBernoulli(), torch.tensor([0, 1]), 2, ["[N, 2]", "(2,)"]),
        (MultiBernoulli(), torch.tensor([[0, 1, 1]]), 2, ["[N, 2]", "(1, 3)"]),
        (MultiBernoulli(), torch.tensor([[0, 2]]), 2, ["0 and 1"]),
        (Categorical(), torch.tensor([0, 3]), 3, ["Label 3", "3 outputs", "0..2", "4 outputs"]),
        (Categorical(), torch.tensor([-1, 0]), 3, ["0..K-1", "-1"]),
        (Categorical(), torch.tensor([0.5, 1.0]), 3, ["0..K-1", "0.5"]),
        (Categorical(), torch.tensor([[1, 0], [0, 1]]), 2, ["[N]", "(2, 2)"]),
        (Poisson(), torch.tensor([-1.0, 2.0]), 1, ["negative", "counts"]),
        (Poisson(), torch.tensor([1.5, 2.0]), 1, ["fractional", "Gaussian"]),
    ],
)
def test_targets_outside_the_support_are_refused(
    likelihood: Likelihood, y: Tensor, outputs: int | None, words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        likelihood.check_target(y, outputs)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gaussian(noise=0.0), ["Gaussian", "noise", "positive"]),
        (lambda: Gaussian(noise="ml"), ["'mle'", "'head'", "'ml'"]),
        (lambda: Gaussian(noise=dist.Normal(0.0, 1.0)), ["noise=Normal", "HalfNormal"]),
        (lambda: StudentT(df=-1.0), ["df"]),
        (lambda: StudentT(df=dist.Beta(1.0, 1.0)), ["df=Beta"]),
        (lambda: Quantile(1.0), ["tau", "between 0 and 1"]),
        (lambda: Quantile("0.5"), ["tau", "'0.5'"]),
    ],
)
def test_settings_out_of_range_are_named(make: object, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        make()  # type: ignore[operator]  # a table of lambdas
    for word in words:
        assert word in str(caught.value)


LIKELIHOODS = [
    Gaussian(),
    Gaussian(noise=0.2),
    Gaussian(noise="mle"),
    Gaussian(noise=dist.Gamma(2.0, 1.0)),
    StudentT(df=dist.Gamma(2.0, 0.1), noise="head"),
    Quantile(0.9),
    Bernoulli(),
    MultiBernoulli(),
    Categorical(),
    Poisson(),
]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_likelihoods_go_through_json(likelihood: Likelihood) -> None:
    assert from_config(json.loads(json.dumps(to_config(likelihood)))) == likelihood


class Mine(Gaussian):
    """A subclass: code of the user's own."""


def test_likelihoods_of_ones_own_are_code() -> None:
    with pytest.raises(ModelRequired, match=r"Mine.*model="):
        to_config(Mine())


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_every_likelihood_differentiates_under_vmap(likelihood: Likelihood) -> None:
    outputs = 6 if likelihood.n_outputs(3) == 6 else 3 if likelihood.n_outputs(3) == 3 else 1
    f = torch.linspace(-1, 1, 2 * 4 * outputs, dtype=torch.float64).reshape(2, 4, outputs).sin()
    latents = {
        name: torch.ones(2, dtype=torch.float64) * torch.tensor([0.5, 2.0], dtype=torch.float64)
        for name in likelihood.latent_names
    }
    fixed = {} if latents else {k: v.expand(2) for k, v in likelihood.latents(f).items()}
    y = torch.tensor([0, 1, 1, 0])
    target = y if outputs == 1 or isinstance(likelihood, Categorical) else torch.stack([y, 1 - y, y], 1)

    def density(f: Tensor, latents: dict[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False):
            fn = likelihood.distribution(f, latents)
            return fn.log_prob(likelihood.target(target, fn, f.dtype)).sum()

    together = torch.func.vmap(torch.func.grad(density))(f, latents or fixed)
    for chain in range(2):
        alone = torch.func.grad(density)(f[chain], {k: v[chain] for k, v in (latents or fixed).items()})
        torch.testing.assert_close(together[chain], alone, rtol=1e-12, atol=1e-12)
        assert alone.abs().max() > 0
