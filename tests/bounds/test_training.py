"""Training for a bound: its slopes, the direction of a step, priors, and the certificate at the end."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

import bayesdl as bdl
from bayesdl.bounds import objectives, training
from bayesdl.bounds.objectives import Objective
from bayesdl.errors import DataDependentPrior, MethodError
from bayesdl.models.clipped import Clipped
from bayesdl.posterior.gaussian import GaussianPosterior
from tests.cases import dataset, network

BOUNDS = get_args(Objective)
POINTS = [(0.02, 5000.0, 30_000), (0.3, 10.0, 100), (1e-4, 1.0, 1000), (0.5, 0.0, 50)]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("risk", "kl", "n"), POINTS)
def test_slopes_are_those_of_the_bound(bound: Objective, risk: float, kl: float, n: int) -> None:
    def value(r: float, k: float) -> float:
        return objectives.value(bound, r, k, n, 0.025)

    by_risk, by_kl = objectives.slopes(bound, risk, kl, n, 0.025)
    step, longer = 1e-5 * risk, 1e-4 * (1 + kl)
    assert by_risk == pytest.approx((value(risk + step, kl) - value(risk - step, kl)) / (2 * step), rel=1e-6)
    assert by_kl == pytest.approx((value(risk, kl + longer) - value(risk, kl - longer)) / (2 * longer), rel=1e-5)


@pytest.mark.parametrize(("risk", "kl", "n"), POINTS)
def test_relaxations_lie_above_the_kl_bound(risk: float, kl: float, n: int) -> None:
    found = {bound: objectives.value(bound, risk, kl, n, 0.025) for bound in BOUNDS if bound != "elbo"}
    assert found["kl"] <= min(found.values()) * (1 + 1e-12)
    # At its best lambda Thiemann's bound is the quadratic one.
    assert found["lambda"] == pytest.approx(found["quadratic"], rel=1e-12)


def test_a_clipped_likelihood_is_bounded_and_flat_below_its_floor() -> None:
    likelihood = Clipped(bdl.likelihoods.Categorical(), 1e-3)
    f = torch.tensor([[20.0, 0.0], [0.0, 0.5]], requires_grad=True)
    loss = -likelihood.distribution(f, {}).log_prob(torch.tensor([1, 1]))
    (slope,) = torch.autograd.grad(loss.sum(), f)
    assert loss[0].item() == pytest.approx(math.log(1e3))
    assert (slope[0] == 0).all()
    assert (slope[1] != 0).all()
    real = Clipped(bdl.likelihoods.Gaussian(noise=0.01), 1e-3)
    assert real.distribution(torch.zeros(1), {"noise": torch.tensor(0.01)}).log_prob(torch.zeros(1)).item() == (
        pytest.approx(math.log(10.0))
    )


@pytest.mark.parametrize("bound", ["kl", "classic"])
@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_a_step_goes_down_the_bound(bound: Objective, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[training.BoundEngine] = []
    init = training.BoundEngine.init
    monkeypatch.setattr(training.BoundEngine, "init", lambda self: engines.append(self) or init(self))
    method = bdl.PACBayes(bound=bound, steps=1, prior_steps=20, estimator="reparameterisation", prior_scale=0.3)
    bdl.fit(network(kind), dataset(kind), method, progress=False)
    engine, stream = engines[0], torch.Generator().manual_seed(0)
    noise = engine.objective.noise(1, stream)
    parameters = engine.begin() + 0.3 * torch.randn(len(engine.begin()), generator=stream, dtype=torch.float64)
    centre, width = engine.problem.density.gaussian_prior() or pytest.fail("the prior is Gaussian")

    def risk(at: torch.Tensor) -> float:
        m, log_sd = at.chunk(2)
        z = m + log_sd.exp() * noise[0]
        values = {name: value[0] for name, value in engine.problem.density.constrain(z[None]).items()}
        model, batch = engine.problem.model, engine.problem.batch
        law = model.likelihood.distribution(model.forward(values, batch["x"]), values)
        return float((engine.loss.highest - law.log_prob(batch["y"])).mean()) / engine.loss.range

    def total(at: torch.Tensor) -> float:
        m, log_sd = at.chunk(2)
        q, p = torch.distributions.Normal(m, log_sd.exp()), torch.distributions.Normal(centre, width)
        kl = float(torch.distributions.kl_divergence(q, p).sum())
        return objectives.value(bound, risk(at), kl, engine.counted, engine.delta)

    assert engine.counted == len(dataset(kind)) // 2
    state: dict[str, Any] = {"parameters": parameters, "risk": torch.tensor(risk(parameters)), "step": 0}
    _, gradient = engine.objective.estimate(parameters, noise, None, engine.weight(state))
    moves = 1e-5 * torch.eye(len(parameters), dtype=torch.float64)
    by_hand = torch.tensor([(total(parameters + e) - total(parameters - e)) / 2e-5 for e in moves], dtype=torch.float64)
    torch.testing.assert_close(-gradient / gradient.norm(), by_hand / by_hand.norm(), rtol=1e-4, atol=1e-6)


def test_training_lowers_the_bound_and_certify_counts_the_rows_outside_the_prior() -> None:
    data = bdl.data.load("breast_cancer").train
    model = bdl.models.mlp(data, hidden=(20,), activation="relu").to(torch.float32)
    method = bdl.PACBayes(prior_scale=0.5, steps=600, prior_steps=10, learning_rate=10.0)
    posterior: Any = bdl.fit(model, data, method, progress=False)
    reserved = posterior.problem.prior_rows
    assert len(reserved) == round(len(data) / 2)
    assert posterior.info["counted_rows"] == len(data) - len(reserved)
    untrained = GaussianPosterior(posterior.problem, prior_law(posterior), {})
    before, after = (bdl.certify(q, data, draws=5000) for q in (untrained, posterior))
    assert untrained.kl() == pytest.approx(0.0, abs=1e-6)
    assert after.n == posterior.info["counted_rows"]
    assert after.bound < before.bound - 0.01
    assert after.kl == pytest.approx(posterior.info["kl"], rel=1e-6)
    with pytest.raises(DataDependentPrior):
        bdl.certify(posterior, data.subset(data.rows.isin(reserved)))


def prior_law(posterior: Any) -> Any:
    """The prior of a bound as a posterior's law."""
    from bayesdl.posterior.prior import prior_law

    return prior_law(posterior.problem.density)


def test_a_prior_without_data_needs_units_that_no_row_gave() -> None:
    data = bdl.data.load("breast_cancer").train
    method = bdl.PACBayes(prior_fraction=None, prior_scale=0.5, steps=20)
    model = bdl.models.mlp(data, hidden=(5,), activation="relu")
    scaled = bdl.fit(model, data, method, progress=False)
    with pytest.raises(DataDependentPrior, match="scaler"):
        bdl.certify(scaled, data)
    x = (data.x / torch.tensor([10.0] * data.x.shape[1])).clamp(-3, 3)
    free = bdl.fit(model, (x, data.y), method, progress=False)
    certificate = bdl.certify(free, (x, data.y), draws=2000)
    assert certificate.n == len(data) == free.info["counted_rows"]
    assert free.info["prior"]["rows"] == 0


def test_an_earlier_posterior_may_be_the_prior() -> None:
    data = dataset("classes")
    first, second = data.subset(range(12)), data.subset(range(12, len(data)))
    before = bdl.fit(network("classes"), first, bdl.MeanFieldVI(steps=20), progress=False)
    posterior = bdl.fit(network("classes"), second, bdl.PACBayes(steps=20), prior=before, progress=False)
    assert posterior.info["counted_rows"] == len(second)
    assert "scale" not in posterior.info["prior"]
    dense = bdl.fit(network("classes"), first, bdl.FullRankVI(steps=20), progress=False)
    with pytest.raises(MethodError, match="independent coordinates"):
        bdl.fit(network("classes"), second, bdl.PACBayes(steps=20), prior=dense, progress=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"delta": 1.5}, "delta"),
        ({"p_min": 0.0}, "p_min"),
        ({"prior_fraction": 1.0}, "prior_fraction"),
        ({"bound": "hoeffding"}, "bound"),
        ({"estimator": "score"}, "estimator"),
        ({"likelihood_temperature": 2.0}, "temperature"),
        ({"prior_scale": -1.0}, "prior_scale"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        bdl.PACBayes(**settings)


def test_every_objective_trains() -> None:
    found = {
        bound: bdl.fit(
            network("binary"), dataset("binary"), bdl.PACBayes(bound=bound, steps=5, prior_steps=20), progress=False
        ).info
        for bound in BOUNDS
    }
    assert all(0 < info["bound"] <= 1 for info in found.values())
    assert len({info["kl"] for info in found.values()}) >= 4  # "lambda" may follow "quadratic"


@pytest.mark.parametrize("prior", [bdl.priors.StudentT(), bdl.priors.Hierarchical()], ids=["StudentT", "Hierarchical"])
def test_any_prior_of_the_model_gives_the_scale_of_the_bounds_prior(prior: bdl.priors.Prior) -> None:
    data = dataset("binary")
    net = torch.nn.Sequential(torch.nn.Linear(data.x.shape[1], 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    model = bdl.BayesianNetwork(net, prior, bdl.likelihoods.Categorical())
    posterior: Any = bdl.fit(model, data, bdl.PACBayes(steps=5, prior_steps=5), progress=False)
    assert 0 < bdl.certify(posterior, data, draws=200).bound <= 1
