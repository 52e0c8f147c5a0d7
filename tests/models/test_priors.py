"""The priors' densities against formulas, their settings, their patterns and their JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn

from bayesdl.errors import FileError, ModelError, ModelRequired
from bayesdl.models import BayesianNetwork
from bayesdl.models.parameters import ParameterInfo, parameters_of
from bayesdl.models.positive import PositivePrior
from bayesdl.models.priors import (
    Hierarchical,
    Laplace,
    Normal,
    PerParameter,
    Prior,
    ScaleMixture,
    StudentT,
    from_config,
    to_config,
)
from tests.models.programs import log_joint, prior_values

WEIGHT, BIAS = parameters_of(nn.Linear(4, 3).double())
VALUE = torch.linspace(-2, 3, 12, dtype=torch.float64).reshape(3, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def log_prob(prior: Prior, value: Tensor = VALUE, site: ParameterInfo = WEIGHT) -> float:
    return float(prior.distribution(site).log_prob(value))


def test_normal_is_weight_decay() -> None:
    sd = 1.2 / math.sqrt(4)
    penalty = float(VALUE.square().sum()) / (2 * sd**2) + 12 * math.log(sd * math.sqrt(2 * math.pi))
    assert -log_prob(Normal("fan_in", w_std=1.2)) == pytest.approx(penalty, rel=1e-13)
    assert log_prob(Normal(0.3)) == pytest.approx(scipy.stats.norm(0, 0.3).logpdf(VALUE).sum(), rel=1e-13)


def test_laplace_is_the_lasso_with_its_normaliser() -> None:
    b = 0.7
    penalty = float(VALUE.abs().sum()) / b + 12 * math.log(2 * b)
    assert -log_prob(Laplace(b)) == pytest.approx(penalty, rel=1e-13)
    # The sd of Laplace(b) is sqrt(2) b.
    assert Laplace("fan_in").distribution(WEIGHT).stddev.flatten()[0].item() == pytest.approx(0.5, rel=1e-13)


def test_student_t_has_the_sd_asked_for_where_it_has_one() -> None:
    assert log_prob(StudentT(3.0, 0.4)) == pytest.approx(scipy.stats.t(3, scale=0.4).logpdf(VALUE).sum(), rel=1e-12)
    assert StudentT(5.0).distribution(WEIGHT).stddev.flatten()[0].item() == pytest.approx(0.5, rel=1e-13)
    assert log_prob(StudentT(1.0)) == pytest.approx(scipy.stats.cauchy(scale=0.5).logpdf(VALUE).sum(), rel=1e-12)


def test_scale_mixture_is_the_mixture_of_two_gaussians() -> None:
    prior = ScaleMixture(0.25, 1.0, 0.01)
    density = 0.25 * scipy.stats.norm(0, 1).pdf(VALUE) + 0.75 * scipy.stats.norm(0, 0.01).pdf(VALUE)
    assert log_prob(prior) == pytest.approx(math.fsum(map(math.log, density.flatten())), rel=1e-12)
    # Far from zero both densities underflow to zero, their logarithm does not.
    assert log_prob(prior, VALUE * 100) == pytest.approx(
        12 * math.log(0.25) + scipy.stats.norm.logpdf(VALUE * 100).sum(), rel=1e-9
    )


@pytest.mark.parametrize(
    "prior",
    [Normal(), Laplace(), StudentT(), ScaleMixture(), Hierarchical(), Hierarchical(dist.HalfCauchy(1.0), "global")],
)
def test_every_prior_is_one_event_and_differentiates_under_vmap(prior: Prior) -> None:
    model = BayesianNetwork(net(), prior)
    x, y = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for site in model.sites:
        one = prior.distribution(
            site, {name: torch.ones((), dtype=torch.float64) for name in prior.scale_names(model.sites)}
        )
        assert one.batch_shape == ()
        assert one.event_shape == site.shape
    values = prior_values(model, x, 2)
    density = log_joint(model, x, y)
    together = torch.func.vmap(torch.func.grad(density))(values)
    for draw in range(2):
        alone = torch.func.grad(density)({name: value[draw] for name, value in values.items()})
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][draw], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("share", "names"),
    [
        ("layer", ["0.scale", "2.scale"]),
        ("global", ["scale"]),
        ("parameter", ["0.weight.scale", "0.bias.scale", "2.weight.scale", "2.bias.scale"]),
    ],
)
def test_hierarchical_scales_stand_before_the_parameters_that_share_them(share: str, names: list[str]) -> None:
    model = BayesianNetwork(net(), Hierarchical(dist.Exponential(2.0), share))
    trace = poutine.trace(model).get_trace(torch.ones(2, 3, dtype=torch.float64))
    latent = [
        name for name, node in trace.nodes.items() if node["type"] == "sample" and name not in ("data", "y", "noise")
    ]
    assert latent == [*names, "0.weight", "0.bias", "2.weight", "2.bias"]


def test_hierarchical_density_by_hand() -> None:
    model = BayesianNetwork(net(), Hierarchical(w_std=1.5, b_std=0.5))
    x, y = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    values = {name: value[0] for name, value in prior_values(model, x, 1).items()}
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x, y)
    trace.compute_log_prob()
    sd = float(values["0.scale"]) * 1.5 / math.sqrt(3)
    expected = scipy.stats.norm(0, sd).logpdf(values["0.weight"]).sum()
    assert float(trace.nodes["0.weight"]["log_prob_sum"]) == pytest.approx(expected, rel=1e-12)
    expected = scipy.stats.norm(0, float(values["2.scale"]) * 0.5).logpdf(values["2.bias"]).sum()
    assert float(trace.nodes["2.bias"]["log_prob_sum"]) == pytest.approx(expected, rel=1e-12)
    expected = scipy.stats.halfnorm.logpdf(float(values["0.scale"]))
    assert float(trace.nodes["0.scale"]["log_prob_sum"]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ModelError, match=r"'weight' depends on site 'scale'"):
        Hierarchical().distribution(WEIGHT)


def test_the_first_matching_pattern_wins() -> None:
    prior = PerParameter({"0.bias": Normal(0.1), "*.bias": Laplace(2.0), "*": Normal("fan_in")})
    model = BayesianNetwork(net(), prior)
    found = {site.name: prior.prior_of(site.name) for site in model.sites}
    assert found == {"0.weight": Normal(), "0.bias": Normal(0.1), "2.weight": Normal(), "2.bias": Laplace(2.0)}
    assert model.prior.distribution(model.sites[1]).stddev[0].item() == pytest.approx(0.1)


def test_patterns_mix_with_hierarchical_priors_of_their_own_names() -> None:
    both = {"*.weight": Hierarchical(share="global"), "*.bias": Hierarchical(share="global", name="bias_scale")}
    trace = poutine.trace(BayesianNetwork(net(), PerParameter(both))).get_trace(torch.ones(2, 3, dtype=torch.float64))
    assert list(trace.nodes)[1:7] == ["scale", "bias_scale", "0.weight", "0.bias", "2.weight", "2.bias"]
    with pytest.raises(ModelError, match=r"'scale'.*name="):
        BayesianNetwork(net(), PerParameter({"*.weight": both["*.weight"], "*": Hierarchical(share="global")}))


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"0.*": Normal()}, ["['2.weight', '2.bias']", "['0.*']", "'*'"]),
        ({"*.wieght": Normal(1.0), "*": Normal()}, ["'*.wieght'", "nothing", "'0.weight'", "'2.bias'"]),
        ({"*": Normal(), "2.bias": Normal(1.0)}, ["'2.bias'", "after", "first wins"]),
        ({"0.WEIGHT": Normal(1.0), "*": Normal()}, ["'0.WEIGHT'", "nothing"]),
    ],
)
def test_patterns_that_miss_are_named(patterns: dict[str, Prior], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        BayesianNetwork(net(), PerParameter(patterns))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Normal(-1.0), ["Normal", "scale", "-1.0"]),
        (lambda: Normal(0.0), ["scale", "positive"]),
        (lambda: Normal(math.nan), ["scale", "nan"]),
        (lambda: Normal("fanin"), ["'fan_in'", "'fanin'"]),
        (lambda: Normal(True), ["scale", "True"]),
        (lambda: Normal(w_std=0.0), ["w_std", "0.0"]),
        (lambda: Laplace(b_std=math.inf), ["Laplace", "b_std", "inf"]),
        (lambda: Normal(0.5, w_std=2.0), ["w_std", "ignored"]),
        (lambda: StudentT(df=0.0), ["df"]),
        (lambda: ScaleMixture(pi=1.0), ["pi", "between 0 and 1"]),
        (lambda: ScaleMixture(sigma2=-1.0), ["sigma2"]),
        (lambda: Hierarchical(share="unit"), ["share", "layer, global, parameter", "'unit'"]),
        (lambda: Hierarchical(name=""), ["name"]),
        (lambda: Hierarchical(dist.Normal(0.0, 1.0)), ["hyperprior=Normal", "positive", "HalfNormal"]),
        (lambda: Hierarchical(dist.HalfNormal(torch.ones(2))), ["(2,)", "scalar"]),
        (lambda: PerParameter({}), ["at least one pattern"]),
        (lambda: PerParameter({"*": 1.0}), ["prior", "1.0"]),
        (lambda: PositivePrior("Uniform", (2.0, 1.0)), ["low < high"]),
        (lambda: PositivePrior("HalfNormal", (-1.0,)), ["HalfNormal(-1)", "positive"]),
        (lambda: PositivePrior("Gamma", (1.0,)), ["Gamma(1)", "one of"]),
        (lambda: PositivePrior("LogNormal", (math.nan, 1.0)), ["finite"]),
    ],
)
def test_settings_out_of_range_are_named(make: object, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        make()  # type: ignore[operator]  # a table of lambdas
    for word in words:
        assert word in str(caught.value)


POSITIVE = [
    (dist.Exponential(2.0), scipy.stats.expon(scale=0.5)),
    (dist.Gamma(2.0, 3.0), scipy.stats.gamma(2, scale=1 / 3)),
    (dist.HalfCauchy(0.5), scipy.stats.halfcauchy(scale=0.5)),
    (dist.HalfNormal(2.0), scipy.stats.halfnorm(scale=2)),
    (dist.InverseGamma(3.0, 2.0), scipy.stats.invgamma(3, scale=2)),
    (dist.LogNormal(-1.0, 0.5), scipy.stats.lognorm(0.5, scale=math.exp(-1))),
    (dist.Uniform(0.5, 2.0), scipy.stats.uniform(0.5, 1.5)),
    (dist.Weibull(2.0, 1.5), scipy.stats.weibull_min(1.5, scale=2)),
    (torch.distributions.HalfNormal(2.0), scipy.stats.halfnorm(scale=2)),
]


@pytest.mark.parametrize(("given", "reference"), POSITIVE, ids=lambda value: type(value).__name__)
def test_priors_of_positive_numbers_keep_family_and_arguments(
    given: torch.distributions.Distribution, reference: object
) -> None:
    kept = PositivePrior.of(given, "noise")
    made = kept.distribution(torch.zeros((), dtype=torch.float64))
    at = torch.tensor(0.8, dtype=torch.float64)
    assert made.log_prob(at).dtype == torch.float64
    assert float(made.log_prob(at)) == pytest.approx(reference.logpdf(0.8), rel=1e-10)  # type: ignore[attr-defined]  # scipy
    assert PositivePrior.of(kept, "noise") is kept


PRIORS = [
    Normal(),
    Normal(0.3),
    Laplace("fan_in", 1.5, 0.2),
    StudentT(3.0),
    ScaleMixture(0.3, 1.0, 0.1),
    Hierarchical(dist.HalfCauchy(1.0), "global", name="tau"),
    PerParameter({"*.bias": Normal(0.1), "0.*": Hierarchical(), "*": Laplace()}),
]


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
def test_priors_go_through_json_even_when_keys_are_sorted(prior: Prior) -> None:
    text = json.dumps(to_config(prior), sort_keys=True)
    assert from_config(json.loads(text)) == prior


@dataclass(frozen=True)
class Mine(Normal):
    """A subclass: code of the user's own."""


def test_priors_of_ones_own_are_code() -> None:
    with pytest.raises(ModelRequired, match=r"Mine.*model="):
        to_config(PerParameter({"*": Mine()}))


def test_damaged_descriptions_are_named() -> None:
    with pytest.raises(ModelRequired, match=r"'os\.system'"):
        from_config({"class": "os.system"})
    with pytest.raises(FileError, match=r"Normal is damaged"):
        from_config({"class": "Normal", "sigma": 1.0})
    with pytest.raises(FileError, match=r"Normal is damaged.*-1"):
        from_config({"class": "Normal", "scale": -1.0})
