"""GuideVI against known optima, its gradient against differences, guides of one's own, refusals, files, resume."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import Divergence, MethodError, ModelMismatch, ModelRequired
from bayesdl.infer.checkpoint import Checkpoint
from bayesdl.infer.guide import GuideEngine, GuideVI
from bayesdl.infer.loop import Run
from bayesdl.posterior.guide import GuidePosterior
from bayesdl.posterior.problem import prepare
from tests.cases import untouched

DOUBLE = torch.float64


def moments(posterior: Any, n: int = 20_000) -> tuple[Tensor, Tensor]:
    z = posterior.unconstrained_draws(n, seed=3)
    return z.mean(0), z.T.cov()


def whitened(covariance: Tensor, exact: Tensor) -> Tensor:
    """exact^(-1/2) covariance exact^(-1/2) - 1, which is 0 where they agree."""
    root = torch.linalg.cholesky(exact)
    half = torch.linalg.solve_triangular(root, covariance, upper=False)
    return torch.linalg.solve_triangular(root, half.T, upper=False) - torch.eye(len(exact), dtype=DOUBLE)


def own_guide(x: Tensor, y: Tensor | None = None) -> None:
    """Full covariance, by hand."""
    loc = pyro.param("loc", lambda: torch.zeros(3, dtype=DOUBLE))
    tril = pyro.param("tril", lambda: 0.05 * torch.eye(3, dtype=DOUBLE), constraint=dist.constraints.lower_cholesky)
    pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=tril))


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide",
    [
        "AutoMultivariateNormal",
        functools.partial(autoguide.AutoLowRankMultivariateNormal, rank=3, init_scale=0.05),
        own_guide,
    ],
    ids=["full", "rank 3", "own"],
)
def test_full_covariance_is_recovered(linear: Any, guide: Any) -> None:
    method = GuideVI(guide=guide, learning_rate=0.03, steps=800, samples=4 if guide is own_guide else 8)
    with untouched():
        posterior = method.fit(linear.model, linear.data)
    mean, precision = linear.posterior()
    covariance = torch.linalg.inv(precision)
    got_mean, got = moments(posterior)
    assert ((got_mean - mean) / covariance.diag().sqrt()).abs().max() < 0.06
    off = whitened(got, covariance).abs().max()
    independent = whitened(torch.diag(1 / precision.diag()), covariance).abs().max()
    assert off < 0.15 < 0.3 < independent
    error = posterior.info["elbo_error"]
    assert linear.log_evidence() - 0.02 < posterior.info["elbo"] + 4 * error
    assert posterior.info["elbo"] - 4 * error < linear.log_evidence()
    assert posterior.kl() is None


@pytest.mark.parametrize("guide", ["AutoNormal", autoguide.AutoDiagonalNormal])
@pytest.mark.parametrize(("temperature", "likelihood"), [(1.0, 1.0), (0.5, 2.0)])
def test_independent_guides_find_the_mean_field_optimum(
    linear: Any, guide: Any, temperature: float, likelihood: float
) -> None:
    method = GuideVI(
        guide=guide, steps=500, learning_rate=0.03, temperature=temperature, likelihood_temperature=likelihood
    )
    mean, precision = linear.posterior(temperature, likelihood)
    got_mean, got = moments(method.fit(linear.model, linear.data))
    sd = precision.diag().rsqrt()
    assert ((got_mean - mean) / sd).abs().max() < 0.08
    assert (got.diag().sqrt() / sd - 1).abs().max() < 0.06


def test_temperature_leaves_the_jacobian_alone() -> None:
    """HalfNormal on the log scale, where the best Gaussian is known: see the mean-field test of the same name."""

    def model() -> None:
        pyro.sample("s", dist.HalfNormal(torch.tensor(1.0, dtype=DOUBLE)))

    mean, covariance = moments(GuideVI(steps=500, samples=32, temperature=4.0, learning_rate=0.02).fit(model, {}))
    assert float(covariance.sqrt()) == pytest.approx(math.sqrt(0.5), rel=0.05)
    assert float(mean) == pytest.approx((math.log(4.0) - 1) / 2, abs=0.05)


def test_discrete_latents_of_rows_are_summed_out() -> None:
    y = torch.tensor([-2.1, -1.9, -2.3, 1.8, 2.2, 2.0, 2.4, -1.7, 2.1, 1.9], dtype=DOUBLE)

    def model(y: Tensor) -> None:
        centre = pyro.sample("centre", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 3.0))
        with pyro.plate("data", len(y)):
            side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
            pyro.sample("y", dist.Normal(torch.where(side > 0, centre, -2.0), 0.5), obs=y)

    posterior = GuideVI(steps=400).fit(model, {"y": y})
    grid = torch.linspace(-10, 10, 20_001, dtype=DOUBLE)
    each = torch.stack(
        [dist.Normal(grid[:, None], 0.5).log_prob(y), dist.Normal(-2.0, 0.5).log_prob(y).expand(20_001, -1)]
    )
    joint = dist.Normal(0.0, 3.0).log_prob(grid) + (each.logsumexp(0) - math.log(2)).sum(1)
    evidence = float(joint.logsumexp(0)) + math.log(float(grid[1] - grid[0]))
    assert abs(posterior.info["elbo"] - evidence) < 0.05 + 4 * posterior.info["elbo_error"]
    weights = joint.softmax(0)
    exact = float((weights * grid).sum())
    draws = posterior.draws(4000)["centre"]
    assert float(draws.mean()) == pytest.approx(exact, abs=0.05)
    assert float(draws.std()) == pytest.approx(float((weights * (grid - exact) ** 2).sum().sqrt()), rel=0.1)


def test_latents_of_rows_in_the_guide_and_new_ones_in_predictions() -> None:
    y = torch.tensor([1.0, 2.0, 4.0, 3.5], dtype=DOUBLE)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 2.0))
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.7), obs=y)

    x = torch.zeros(4, 1, dtype=DOUBLE)
    posterior = GuideVI(guide="AutoMultivariateNormal", steps=500, learning_rate=0.04).fit(model, (x, y))
    precision = 1 / 4 + 4 / 1.49
    centre = float(y.sum()) / 1.49 / precision
    draws = posterior.draws(8000)
    assert float(draws["mu"].mean()) == pytest.approx(centre, abs=0.06)
    assert float(draws["mu"].var()) == pytest.approx(1 / precision, rel=0.12)
    weight = 1 / 0.49 / (1 + 1 / 0.49)
    torch.testing.assert_close(draws["theta"].mean(0), weight * y + (1 - weight) * centre, rtol=0, atol=0.07)
    prediction = posterior.predict(torch.zeros(2, 1, dtype=DOUBLE), max_draws=4000)
    assert float(prediction.variance[1]) == pytest.approx(1.49 + 1 / precision, rel=0.08)


def test_parameters_of_the_model_become_points(linear: Any) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        sigma = pyro.param("sigma", torch.tensor(1.0, dtype=DOUBLE), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 0.4).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)

    posterior = GuideVI(guide="AutoMultivariateNormal", steps=500, learning_rate=0.02).fit(model, linear.data)
    draws = posterior.draws(50)
    assert draws["sigma"].unique().numel() == 1
    sigma = draws["sigma"][0]
    # At the optimum sigma maximises the evidence, since the guide holds the posterior given it.
    sizes = torch.linspace(0.3, 0.8, 501, dtype=DOUBLE)
    x, y = linear.data
    law = [dist.MultivariateNormal(torch.zeros_like(y), s**2 * torch.eye(len(y)) + 0.4**2 * x @ x.T) for s in sizes]
    best = sizes[int(torch.stack([one.log_prob(y) for one in law]).argmax())]
    assert float(sigma) == pytest.approx(float(best), rel=0.02)


# -- the gradient ----------------------------------------------------------------------------------------------------


def positive_model(x: Tensor, y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.Gamma(torch.tensor([2.0, 3.0], dtype=DOUBLE), 1.0).to_event(1))
    mixing = pyro.sample("mixing", dist.Dirichlet(torch.ones(3, dtype=DOUBLE)))
    b = pyro.param("b", torch.tensor([0.1, -0.2, 0.3], dtype=DOUBLE))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (b * mixing), scale.sum()), obs=y)


def own_positive(x: Tensor, y: Tensor | None = None) -> None:
    shape = pyro.param("shape", lambda: torch.tensor([1.5, 2.5], dtype=DOUBLE), constraint=dist.constraints.positive)
    pyro.sample("scale", dist.LogNormal(shape, 0.3).to_event(1))
    loc = pyro.param("loc", lambda: torch.tensor([0.2, -0.4], dtype=DOUBLE))
    stick = dist.transforms.StickBreakingTransform()
    pyro.sample("mixing", dist.TransformedDistribution(dist.Normal(loc, 0.5), [stick]))


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoLowRankMultivariateNormal", own_positive])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_is_that_of_the_elbo_with_the_same_draws(linear: Any, guide: Any, temperature: float) -> None:
    problem = prepare(positive_model, linear.data, temperature=temperature)
    engine = GuideEngine(GuideVI(guide=guide, samples=3, temperature=temperature), problem, Run())
    point = engine._flat(engine.guide.initial)
    elbo, gradient = engine.elbo_and_gradient(point, 5)
    assert elbo.shape == (3,)
    for k in range(len(point)):
        step = torch.zeros_like(point)
        step[k] = 1e-5
        up, down = (engine.elbo_and_gradient(point + sign * step, 5)[0].mean() for sign in (1, -1))
        assert float(gradient[k]) == pytest.approx(float(up - down) / 2e-5, rel=1e-5, abs=1e-6)


def test_batched_draws_have_the_density_of_single_ones(linear: Any) -> None:
    """log q at the draws, from the closed form of the Gaussian in unconstrained coordinates and the Jacobian."""
    problem = prepare(positive_model, linear.data)
    engine = GuideEngine(GuideVI(), problem, Run())
    with torch.no_grad():
        z, log_q = engine.guide.draw(300, 1)
    initial = engine.guide.initial
    places = {site.name: slice(site.start, site.stop) for site in problem.density.sites}
    expected = -problem.density.log_abs_det(z)
    for name in ("scale", "mixing"):
        loc = initial[f"AutoNormal.locs.{name}"]
        sd = torch.nn.functional.softplus(initial[f"AutoNormal.scales.{name}"])
        expected = expected + dist.Normal(loc, sd).log_prob(z[:, places[name]]).sum(1)
    torch.testing.assert_close(log_q, expected, rtol=1e-9, atol=1e-9)
    assert z.unique(dim=0).shape == z.shape


# -- guides ----------------------------------------------------------------------------------------------------------


class Amortised(PyroModule):
    """A guide with a module's parameters, which reads the data."""

    def __init__(self) -> None:
        super().__init__("amortised")
        self.scale = PyroParam(torch.full((3,), 0.1, dtype=DOUBLE), constraint=dist.constraints.positive)
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=DOUBLE))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        assert y is not None
        pyro.sample("w", dist.Normal(self.weight + x.T @ y / len(x), self.scale).to_event(1))


def test_modules_are_trained_as_a_copy(linear: Any) -> None:
    guide = Amortised()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    with untouched():
        posterior = GuideVI(guide=guide, steps=300, learning_rate=0.05).fit(linear.model, linear.data)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert set(posterior.parameters) == {"amortised.scale", "amortised.weight"}
    mean, precision = linear.posterior()
    got, covariance = moments(posterior, 2000)
    sd = precision.diag().rsqrt()
    assert ((got - mean) / sd).abs().max() < 0.2
    assert (covariance.diag().sqrt() / sd - 1).abs().max() < 0.15


def _guide(body: Callable[[Tensor], Any]) -> Callable[..., None]:
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        body(pyro.param("loc", lambda: torch.zeros(3, dtype=DOUBLE)))

    return guide


def _without_gradient(loc: Tensor) -> None:
    pyro.sample("w", dist.VonMises(loc, 1.0).to_event(1))


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown name": ("AutoIAF", "AutoNormal"),
    "no guide": (3, "guide=3"),
    "no latents": (_guide(lambda loc: None), r"Missing: \['w'\]"),
    "other latents": (_guide(lambda loc: pyro.sample("v", dist.Normal(loc, 1.0).to_event(1))), r"unknown: \['v'\]"),
    "no gradient": (_guide(_without_gradient), r"\['w'\].*no gradient"),
    "nothing to train": (
        lambda x, y=None: pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0).to_event(1)),
        "nothing to train",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_guides_that_cannot_be_trained_are_refused(linear: Any, case: str) -> None:
    guide, words = REFUSED[case]
    with untouched(), pytest.raises(MethodError, match=words):
        GuideVI(guide=guide, steps=2).fit(linear.model, linear.data)


def test_finished_autoguides_and_starts_of_own_guides_are_refused(linear: Any) -> None:
    with pytest.raises(MethodError, match="pass the class, guide=AutoNormal"):
        GuideVI(guide=autoguide.AutoNormal(linear.model))
    with pytest.raises(MethodError, match="leave out init="):
        GuideVI(guide=own_guide, steps=2).fit(linear.model, linear.data, init="prior")
    for settings in ({"steps": 0}, {"samples": 1.5}, {"learning_rate": -1.0}):
        with pytest.raises(MethodError, match=f"{next(iter(settings))}="):
            GuideVI(**settings)


def test_start_can_be_given(linear: Any) -> None:
    start = torch.tensor([0.3, -0.1, 0.2], dtype=DOUBLE)
    seen: list[Tensor] = []
    GuideVI(steps=1, learning_rate=1e-9).fit(
        linear.model, linear.data, init={"w": start}, callback=lambda state: seen.append(state["parameters"])
    )
    torch.testing.assert_close(seen[0][:3], start, rtol=0, atol=1e-6)


def test_divergence_is_an_error_with_advice(linear: Any) -> None:
    with pytest.raises(Divergence, match=r"GuideVI: the ELBO .* learning_rate="):
        GuideVI(steps=5, learning_rate=1e200).fit(linear.model, linear.data)


# -- files and resume ------------------------------------------------------------------------------------------------


def test_known_guides_come_back_with_the_model(linear: Any, tmp_path: Path) -> None:
    posterior = GuideVI(guide=autoguide.AutoMultivariateNormal, steps=30).fit(linear.model, linear.data)
    posterior.save(tmp_path)
    with untouched():
        loaded = bdl.load(tmp_path, linear.model)
    assert isinstance(loaded, GuidePosterior)
    assert repr(loaded) == repr(posterior) == "GuidePosterior(GuideVI, AutoMultivariateNormal, 15 parameters)"
    assert loaded.info["settings"]["guide"] == "AutoMultivariateNormal"
    assert torch.equal(loaded.unconstrained_draws(600, seed=1), posterior.unconstrained_draws(600, seed=1))
    assert torch.equal(loaded.predict(linear.x).mean, posterior.predict(linear.x).mean)
    assert loaded.summary()["w[0]"]["mean"] == posterior.summary()["w[0]"]["mean"]
    bare = bdl.load(tmp_path)
    with pytest.raises(ModelRequired, match="model="):
        bare.draws(3)


@pytest.mark.parametrize(
    "guide", [own_guide, functools.partial(autoguide.AutoLowRankMultivariateNormal, rank=1)], ids=["own", "rank 1"]
)
def test_guides_that_are_code_come_back_by_hand(linear: Any, tmp_path: Path, guide: Any) -> None:
    posterior = GuideVI(guide=guide, steps=20).fit(linear.model, linear.data)
    posterior.save(tmp_path)
    loaded = bdl.load(tmp_path, linear.model)
    assert isinstance(loaded, GuidePosterior)
    with pytest.raises(ModelRequired, match="guide="):
        loaded.predict(linear.x)
    whole = loaded.with_guide(guide)
    assert torch.equal(whole.unconstrained_draws(7), posterior.unconstrained_draws(7))
    assert torch.equal(whole.predict(linear.x).mean, posterior.predict(linear.x).mean)
    whole.save(tmp_path / "again")
    assert (tmp_path / "again" / "posterior.json").read_bytes() == (tmp_path / "posterior.json").read_bytes()
    with pytest.raises(ModelMismatch, match="parameters"):
        loaded.with_guide("AutoMultivariateNormal")


def test_other_guides_with_the_same_parameters_are_recognised(linear: Any, tmp_path: Path) -> None:
    def wider(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(3, dtype=DOUBLE))
        tril = pyro.param("tril", lambda: torch.eye(3, dtype=DOUBLE), constraint=dist.constraints.lower_cholesky)
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=1.01 * tril))

    GuideVI(guide=own_guide, steps=10).fit(linear.model, linear.data).save(tmp_path / "own")
    with pytest.raises(ModelMismatch, match="draws other values"):
        bdl.load(tmp_path / "own", linear.model).with_guide(wider)  # type: ignore[attr-defined]
    # One that reads the data finds only the stored rows.
    GuideVI(guide=Amortised(), steps=10).fit(linear.model, linear.data).save(tmp_path / "reads")
    with pytest.raises(ModelMismatch, match="reads the data"):
        bdl.load(tmp_path / "reads", linear.model).with_guide(Amortised())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "guide", ["AutoLowRankMultivariateNormal", own_guide, Amortised()], ids=["auto", "own", "module"]
)
def test_stopped_fit_resumes_bit_for_bit(linear: Any, tmp_path: Path, guide: Any) -> None:
    method = GuideVI(guide=guide, steps=24, samples=2)
    whole = method.fit(linear.model, linear.data, seed=4)
    checkpoint = Checkpoint(tmp_path / "run", every=5)
    method.fit(linear.model, linear.data, seed=4, checkpoint=checkpoint, callback=lambda state: state["step"] == 13)
    resumed = method.fit(linear.model, linear.data, seed=4, checkpoint=checkpoint)
    for name, value in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], value), name
    assert resumed.info["elbo_trace"] == whole.info["elbo_trace"]
    assert resumed.info["gradients_here"] < resumed.info["gradients"]
    assert not torch.equal(method.fit(linear.model, linear.data, seed=5).tensors()["check"], whole.tensors()["check"])


# -- flows, mixtures, amortised guides -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flow_fits_a_bent_density_where_no_gaussian_does() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(z.square(), 0.5))

    spline = functools.partial(dist.transforms.iterated, 1, dist.transforms.spline_autoregressive)
    flow = functools.partial(autoguide.AutoNormalizingFlow, init_transform_fn=spline)
    gauss = GuideVI("AutoMultivariateNormal", steps=300, learning_rate=0.03).fit(model, {})
    bent = GuideVI(flow, steps=300, samples=4, learning_rate=0.03).fit(model, {})
    assert gauss.info["elbo"] < -0.4
    assert -0.25 < bent.info["elbo"] < 4 * bent.info["elbo_error"]


def test_a_mixture_fits_two_modes_where_a_gaussian_loses_one() -> None:
    """The modes are close: the weights of far ones have no usable slope along draws, whatever the guide."""
    weights, places, scales = (torch.tensor(v, dtype=DOUBLE) for v in ([0.7, 0.3], [-1.2, 1.2], [0.6, 0.8]))

    def model() -> None:
        pyro.sample("z", dist.MixtureOfDiagNormals(places[:, None], scales[:, None], weights.log()))

    def mixture() -> None:
        logits = pyro.param("logits", lambda: torch.zeros(2, dtype=DOUBLE))
        locs = pyro.param("locs", lambda: torch.tensor([[-1.0], [1.0]], dtype=DOUBLE))
        sd = pyro.param("sd", lambda: torch.ones(2, 1, dtype=DOUBLE), constraint=dist.constraints.positive)
        pyro.sample("z", dist.MixtureOfDiagNormals(locs, sd, logits))

    posterior = GuideVI(mixture, steps=250, samples=2, learning_rate=0.05).fit(model, {})
    assert -0.08 < posterior.info["elbo"] < 4 * posterior.info["elbo_error"]
    assert float(posterior.parameters["logits"].softmax(0)[0]) == pytest.approx(0.7, abs=0.12)
    gauss = bdl.FullRankVI(steps=300).fit(model, {}, progress=False)
    assert gauss.info["elbo"] < -0.18


class Encoder(PyroModule):
    """One map from a row's data to the law of the row's latent, for all rows."""

    def __init__(self) -> None:
        super().__init__("encoder")
        self.line = torch.nn.Linear(1, 1).double()
        self.scale = PyroParam(torch.tensor(1.0, dtype=DOUBLE), constraint=dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        assert y is not None
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Normal(self.line(y[:, None])[:, 0], self.scale))


def test_an_amortised_guide_for_latents_of_rows_is_exact_where_its_map_can_be(linear: Any) -> None:
    """theta_i ~ N(0.5, 1), y_i ~ N(theta_i, 0.7^2): a posterior mean that is linear in y_i, and one sd."""
    y = linear.y[:30]

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(torch.tensor(0.5, dtype=DOUBLE), 1.0))
            pyro.sample("y", dist.Normal(theta, 0.7), obs=y)

    posterior = GuideVI(Encoder(), steps=400, samples=1, learning_rate=0.05).fit(model, (linear.x[:30], y))
    weight = 1 / 0.49 / (1 + 1 / 0.49)
    found = posterior.parameters
    assert float(found["encoder.line$$$weight"]) == pytest.approx(weight, abs=0.02)
    assert float(found["encoder.line$$$bias"]) == pytest.approx((1 - weight) * 0.5, abs=0.03)
    assert float(found["encoder.scale"].exp()) == pytest.approx((1 - weight) ** 0.5, rel=0.05)
    evidence = float(torch.distributions.Normal(0.5, 1.49**0.5).log_prob(y).sum())
    assert posterior.info["elbo"] == pytest.approx(evidence, abs=0.3)
    assert posterior.info["elbo"] < evidence + 4 * posterior.info["elbo_error"]
