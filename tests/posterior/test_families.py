from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro import validation_enabled
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.distributions import transforms
from torch.func import vmap

from bayesdl.models.distributions import AsymmetricLaplace
from bayesdl.posterior.families import CannotUnpack, Stacked, pack, stack, take, unpack

N = 3


def positive(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.5


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cholesky(*shape):
    return torch.eye(2, dtype=torch.float64).expand(*shape, 2, 2) + 0.1 * normal(*shape, 2, 2).tril()


# Every builder takes one draw's parameters (a location and a positive number per row) to a distribution of N rows.
BUILDERS = {
    "Normal": lambda m, s: dist.Normal(m, s),
    "Normal, shared scale": lambda m, s: dist.Normal(m, s[0]),
    "Normal, constant scale": lambda m, s: dist.Normal(m, 2.0),
    "Laplace": lambda m, s: dist.Laplace(m, s),
    "LogNormal": lambda m, s: dist.LogNormal(m, s),
    "Cauchy": lambda m, s: dist.Cauchy(m, s),
    "StudentT": lambda m, s: dist.StudentT(2 + s[0], m, s),
    "Uniform": lambda m, s: dist.Uniform(m, m + s),
    "Gumbel": lambda m, s: dist.Gumbel(m, s),
    "Weibull": lambda m, s: dist.Weibull(s, 1 + s),
    "Pareto": lambda m, s: dist.Pareto(s, 1 + s),
    "Gamma": lambda m, s: dist.Gamma(s, 2 * s),
    "InverseGamma": lambda m, s: dist.InverseGamma(3 * s, s),
    "Beta": lambda m, s: dist.Beta(s, 2 * s),
    "HalfNormal": lambda m, s: dist.HalfNormal(s),
    "Logistic": lambda m, s: dist.Logistic(m, s),
    "AsymmetricLaplace": lambda m, s: AsymmetricLaplace(m, s, 0.3),
    "Poisson": lambda m, s: dist.Poisson(s),
    "Bernoulli, logits": lambda m, s: dist.Bernoulli(logits=m),
    "Bernoulli, probs": lambda m, s: dist.Bernoulli(s / 2),
    "Binomial": lambda m, s: dist.Binomial(torch.tensor([3, 4, 5]), logits=m),
    "NegativeBinomial": lambda m, s: dist.NegativeBinomial(3, logits=m),
    "GammaPoisson": lambda m, s: dist.GammaPoisson(s, s),
    "Geometric": lambda m, s: dist.Geometric(s / 2),
    "Categorical": lambda m, s: dist.Categorical(logits=torch.stack([m, s, m * s, -m], -1)),
    "OneHotCategorical": lambda m, s: dist.OneHotCategorical(torch.stack([s, s, s * s, s], -1)),
    "Multinomial": lambda m, s: dist.Multinomial(7, torch.stack([s, s * s], -1)),
    "Dirichlet": lambda m, s: dist.Dirichlet(torch.stack([s, s * s], -1)),
    "MVN, scale_tril": lambda m, s: dist.MultivariateNormal(
        torch.stack([m, s], -1), scale_tril=torch.diag_embed(torch.stack([s, s], -1))
    ),
    "MVN, covariance": lambda m, s: dist.MultivariateNormal(
        torch.stack([m, s], -1), torch.eye(2, dtype=m.dtype) * s[0]
    ),
    "LowRankMVN": lambda m, s: dist.LowRankMultivariateNormal(
        torch.stack([m, s], -1), torch.stack([m, m], -1)[..., None], torch.stack([s, s], -1)
    ),
    "MultivariateStudentT": lambda m, s: dist.MultivariateStudentT(
        s[0] + 2, torch.stack([m, s], -1), torch.eye(2, dtype=m.dtype)
    ),
    "Independent": lambda m, s: dist.Normal(torch.stack([m, s], -1), s[0]).to_event(1),
    "Expanded": lambda m, s: dist.Normal(m[0], s[0]).expand([N]),
    "ExpandedDistribution": lambda m, s: ExpandedDistribution(dist.Normal(m[0], s[0]), torch.Size([N])),
    "ZeroInflatedPoisson": lambda m, s: dist.ZeroInflatedPoisson(s, gate=s / 2),
    "ZeroInflatedNegativeBinomial": lambda m, s: dist.ZeroInflatedNegativeBinomial(s, logits=m, gate_logits=m),
    "Expanded Independent": lambda m, s: dist.Normal(m[:2], s[:2]).to_event(1).expand([N]),
    "Masked, tensor": lambda m, s: dist.Normal(m, s).mask(torch.tensor([True, False, True])),
    "Masked, bool": lambda m, s: dist.Normal(m, s).mask(True),
    "Mixture": lambda m, s: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.stack([m, s], -1)), dist.Normal(torch.stack([m, -m], -1), s[0])
    ),
    "Mixture, shared": lambda m, s: dist.MixtureSameFamily(
        dist.Categorical(logits=m[:2].expand(N, 2)), dist.Laplace(m[:2], s[:2])
    ).expand([N]),
    "Transformed": lambda m, s: dist.TransformedDistribution(
        dist.Normal(m, s), [transforms.AffineTransform(1.0, 2.0), transforms.ExpTransform()]
    ),
    "Transformed, tensors": lambda m, s: dist.TransformedDistribution(
        dist.Normal(m, 1.0),
        [transforms.ComposeTransform([transforms.AffineTransform(m, s), transforms.TanhTransform()])],
    ),
    "Transformed, event": lambda m, s: dist.TransformedDistribution(
        dist.Normal(torch.stack([m, s], -1), 1.0).to_event(1), [transforms.AffineTransform(s[:2], 3.0)]
    ),
    "Delta": lambda m, s: dist.Delta(m),
}  # fmt: skip


def draws(s=4, n=N):
    torch.manual_seed(1)
    return normal(s, n), positive(s, n).clamp(max=1.4)


@pytest.mark.parametrize("name", BUILDERS)
def test_through_vmap_equals_draw_by_draw(name):
    build, (m, s) = BUILDERS[name], draws()
    members = [build(a, b) for a, b in zip(m, s, strict=True)]
    specs = []

    def tensors(a, b):
        spec, found = unpack(build(a, b))
        specs.append(spec)
        return {key: value.clone() for key, value in found.items()}

    with validation_enabled(False):  # it calls .item(), which vmap forbids
        stacked = vmap(tensors)(m, s)
        packed = pack(specs[0], stacked)
    assert packed.batch_shape == (4, N)
    assert packed.event_shape == members[0].event_shape
    value = torch.stack([member.sample() for member in members])
    expected = torch.stack([member.log_prob(v) for member, v in zip(members, value, strict=True)])
    torch.testing.assert_close(packed.log_prob(value), expected, rtol=1e-12, atol=1e-12)
    again = pack(*unpack(packed))
    torch.testing.assert_close(again.log_prob(value), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stack(members).log_prob(value), expected, rtol=1e-12, atol=1e-12)
    assert not isinstance(stack(members), Stacked)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(
        take(packed, rows, 1).log_prob(value[:, rows]), expected[:, rows], rtol=1e-12, atol=1e-12
    )
    assert take(packed, slice(1, 3), 0).batch_shape == (2, N)


def test_the_parameter_that_was_given_is_the_one_kept():
    given = dist.Bernoulli(torch.tensor([0.0, 1.0]))
    assert given.logits.isfinite().all()  # torch clamps, so going through the logits would lose the 0 and the 1
    spec, tensors = unpack(given)
    assert spec.names == ("probs",)
    assert tensors["probs"].tolist() == [0.0, 1.0]


def test_precision_of_float64_is_kept_or_asked_for():
    base = dist.Normal(torch.zeros(2, 3), torch.ones(2, 3)).mask(torch.ones(2, 3, dtype=torch.bool))
    double = take(base, slice(0, 2), 1, torch.float64)
    assert double.base_dist.loc.dtype == torch.float64
    assert double._mask.dtype == torch.bool


class Opaque(dist.Normal):
    """A family that keeps its parameters to itself."""

    arg_constraints = {}  # noqa: RUF012 - torch's own form

    def __init__(self, parameters, validate_args=None):
        super().__init__(parameters[0], parameters[1], validate_args=validate_args)


def test_what_cannot_be_taken_apart_stands_side_by_side():
    m, s = draws()
    members = [Opaque((a, b), validate_args=True) for a, b in zip(m, s, strict=True)]
    with pytest.raises(CannotUnpack, match="parameters"):
        unpack(members[0])
    side = stack(members)
    assert isinstance(side, Stacked)
    assert side.batch_shape == (4, N)
    value = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    expected = torch.stack([member.log_prob(value) for member in members])
    torch.testing.assert_close(side.log_prob(value[None]), expected)
    torch.testing.assert_close(side.log_prob(value.expand(6, 4, N))[2], expected)
    torch.testing.assert_close(side.mean, m)
    torch.testing.assert_close(side.variance, s**2)
    assert side.sample(torch.Size([5])).shape == (5, 4, N)
    # A value off the support is no error here, and the members stay as they were.
    assert side.log_prob(torch.full((1, N), float("inf"))).shape == (4, N)
    assert members[0]._validate_args


def test_signals():
    with pytest.raises(CannotUnpack, match="parameters of its own"):
        unpack(dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.SigmoidTransform().inv.inv.inv]))
    with pytest.raises(CannotUnpack, match=r"samples"):
        unpack(dist.Empirical(torch.zeros(3, 5), torch.zeros(3, 5)))
    spec, tensors = unpack(dist.MultivariateNormal(torch.zeros(N, 2), torch.eye(2)))
    with pytest.raises(CannotUnpack, match="cannot be made"):
        pack(spec, {"loc": tensors["loc"], "scale_tril": torch.zeros(7, 3, 3)})


def test_draw_by_draw_without_vmap():
    m, _ = draws()
    cutpoints = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    members = [dist.OrderedLogistic(row, cutpoints) for row in m]
    together = stack(members)
    assert together.batch_shape == (4, N)
    value = torch.tensor([0, 1, 2])
    torch.testing.assert_close(together.log_prob(value), torch.stack([d.log_prob(value) for d in members]))


def test_different_families_stand_side_by_side():
    side = stack([dist.Normal(torch.zeros(N), 1.0), dist.Laplace(torch.zeros(N), 1.0)])
    assert isinstance(side, Stacked)
    low = side.cdf(torch.full((1, N), -1.0))
    torch.testing.assert_close(low[:, 0], torch.tensor([0.158655, 0.183940]), rtol=1e-5, atol=0)
