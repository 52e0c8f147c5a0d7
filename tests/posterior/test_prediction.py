from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import Distribution

from bayesdl.errors import DataError, ModelError
from bayesdl.models.distributions import AsymmetricLaplace
from bayesdl.posterior import blocks
from bayesdl.posterior.families import Stacked, stack, take
from bayesdl.posterior.prediction import GaussianPrediction, Prediction

S, N = 5, 7


def loose(seed=0, *shape):
    g = torch.Generator().manual_seed(seed)
    shape = shape or (S, N)
    return (
        torch.randn(*shape, generator=g, dtype=torch.float64),
        torch.rand(*shape, generator=g, dtype=torch.float64) + 0.5,
    )


M, SD = loose()
REAL = {
    "Normal": dist.Normal(M, SD),
    "Laplace": dist.Laplace(M, SD),
    "StudentT": dist.StudentT(4 + SD, M, SD),
    "Gumbel": dist.Gumbel(M, SD),
    "Logistic": dist.Logistic(M, SD),
    "LogNormal": dist.LogNormal(M, 0.5 * SD),
    "Exponential": dist.Exponential(SD),
    "Gamma": dist.Gamma(1 + SD, SD),
    "InverseGamma": dist.InverseGamma(4 + SD, SD),
    "Weibull": dist.Weibull(SD, 1 + SD),
    "Pareto": dist.Pareto(SD, 4 + SD),
    "Uniform": dist.Uniform(M, M + SD),
    "Beta": dist.Beta(1 + SD, SD),
    "HalfNormal": dist.HalfNormal(SD),
    "AsymmetricLaplace": AsymmetricLaplace(M, SD, 0.2),
    "Mixture": dist.MixtureSameFamily(
        dist.Categorical(logits=torch.stack([M, -M], -1)), dist.Normal(torch.stack([M, 3 + M], -1), 0.5)
    ),
    "Mixture of uniforms": dist.MixtureSameFamily(
        dist.Categorical(logits=torch.stack([M, -M], -1)), dist.Uniform(torch.stack([M, M + 0.5], -1), 5.0)
    ),
    "Mixture of LogNormals": dist.MixtureSameFamily(
        dist.Categorical(logits=torch.stack([M, -M], -1)), dist.LogNormal(torch.stack([M, -M], -1), 0.5)
    ),
}
EVERYWHERE = {**REAL, "Cauchy": dist.Cauchy(M, SD)}
COUNTS = {
    "Poisson": dist.Poisson(4 * SD),
    "NegativeBinomial": dist.NegativeBinomial(3, logits=0.3 * M),
    "GammaPoisson": dist.GammaPoisson(4 * SD, SD),
    "Geometric": dist.Geometric(SD / 2),
    "Binomial": dist.Binomial(torch.arange(1, N + 1), logits=M),
    "ZeroInflatedPoisson": dist.ZeroInflatedPoisson(4 * SD, gate=SD / 2),
}


def component_samples(distribution: Distribution, n: int) -> torch.Tensor:
    """n samples of every component, [n, S, N]."""
    torch.manual_seed(3)
    return distribution.sample(torch.Size([n])).to(torch.float64)


# --- Moments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REAL, *COUNTS])
def test_moments_against_samples(name):
    distribution = {**REAL, **COUNTS}[name]
    prediction = Prediction(distribution)
    n = 20_000
    x = component_samples(distribution, n)
    mixture = x.flatten(0, 1)
    error = mixture.std(0) / math.sqrt(n * S)
    assert ((prediction.mean - mixture.mean(0)).abs() < 5 * error).all()
    fourth = (mixture - mixture.mean(0)).pow(4).mean(0)
    spread = ((fourth - mixture.var(0) ** 2).clamp(min=0) / (n * S)).sqrt()
    assert ((prediction.variance - mixture.var(0)).abs() < 6 * spread + 1e-9).all()
    # The means of the components, up to their own Monte-Carlo error, have the epistemic variance.
    means = x.mean(0)
    slack = 6 * (x.std(0) / math.sqrt(n)).amax(0) * (2 * means.std(0) + 0.05)
    assert ((prediction.epistemic - means.var(0, correction=0)).abs() < slack).all()


def test_moments_by_hand():
    prediction = Prediction(dist.Normal(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])))
    assert prediction.mean.tolist() == [1.0]
    assert prediction.epistemic.tolist() == [1.0]  # divisor S: a mixture of two, not a sample of two
    assert prediction.aleatoric.tolist() == [5.0]
    assert prediction.variance.tolist() == [6.0]
    assert prediction.sd.tolist() == [math.sqrt(6.0)]
    assert prediction.mean_by_draw.tolist() == [[0.0], [2.0]]
    assert repr(prediction) == "Prediction(Normal, kind='real', rows=1, draws=2)"


@pytest.mark.parametrize("name", EVERYWHERE)
def test_variance_is_the_sum_and_one_draw_has_no_epistemic_part(name):
    distribution = EVERYWHERE[name]
    several = Prediction(distribution, shift=3.0, scale=7.0)
    assert torch.equal(several.variance.nan_to_num(-1.0), (several.epistemic + several.aleatoric).nan_to_num(-1.0))
    one = Prediction(take(distribution, slice(0, 1), 0), shift=3.0, scale=7.0)
    assert one.epistemic.tolist() == [0.0] * N


def test_infinite_and_undefined_moments():
    df = torch.tensor([[5.0, 1.5, 0.9], [5.0, 5.0, 5.0]], dtype=torch.float64)
    prediction = Prediction(dist.StudentT(df, torch.tensor([[0.0], [1.0]], dtype=torch.float64), 1.0))
    assert prediction.mean[:2].tolist() == [0.5, 0.5]
    assert prediction.mean[2].isnan()
    assert prediction.variance[0].isfinite()
    assert prediction.variance[1] == math.inf
    assert prediction.variance[2].isnan()
    assert "1 entries are NaN" in prediction.moment_method
    assert "1 variances are infinite" in prediction.moment_method
    assert Prediction(REAL["Normal"]).moment_method == "exact"
    cauchy = Prediction(EVERYWHERE["Cauchy"])
    assert cauchy.mean.isnan().all()
    assert "does not exist" in cauchy.moment_method
    assert cauchy.quantile(0.5).isfinite().all()


def test_families_without_moments_are_sampled():
    transformed = dist.TransformedDistribution(dist.Normal(M, 0.3), [torch.distributions.transforms.ExpTransform()])
    prediction = Prediction(transformed)
    exact = Prediction(dist.LogNormal(M, 0.3))
    assert prediction.moment_method == "samples"
    error = (exact.aleatoric / (256 * S)).sqrt()
    assert ((prediction.mean - exact.mean).abs() < 5 * error).all()
    assert torch.equal(prediction.mean, Prediction(transformed).mean)


# --- Density, cdf, quantiles --------------------------------------------------------------------------------------


def test_log_prob_is_the_log_of_the_mean_density():
    y = torch.linspace(-2, 2, N, dtype=torch.float64)
    prediction = Prediction(REAL["Normal"])
    density = stats.norm(M.numpy(), SD.numpy()).pdf(y.numpy()).mean(0)
    np.testing.assert_allclose(prediction.log_prob(y).numpy(), np.log(density), rtol=1e-12)
    np.testing.assert_allclose(
        prediction.log_prob_by_draw(y).numpy(), stats.norm(M.numpy(), SD.numpy()).logpdf(y.numpy()), rtol=1e-12
    )
    far = Prediction(dist.Normal(torch.zeros(2, 1), 1.0)).log_prob([1e3])
    assert float(far) == pytest.approx(-0.5e6 - 0.5 * math.log(2 * math.pi))  # the mean density itself underflows


@pytest.mark.parametrize("name", EVERYWHERE)
def test_units(name):
    y = 2.0 + 3.0 * torch.linspace(0.3, 1.5, N, dtype=torch.float64)
    model, raw = Prediction(EVERYWHERE[name]), Prediction(EVERYWHERE[name], shift=2.0, scale=3.0)
    inner = (y - 2.0) / 3.0
    torch.testing.assert_close(raw.log_prob(y), model.log_prob(inner) - math.log(3.0))
    torch.testing.assert_close(raw.log_prob_by_draw(y), model.log_prob_by_draw(inner) - math.log(3.0))
    torch.testing.assert_close(raw.cdf(y), model.cdf(inner))
    torch.testing.assert_close(raw.quantile(0.3), 2 + 3 * model.quantile(0.3))
    torch.testing.assert_close(raw.mean, 2 + 3 * model.mean, equal_nan=True)
    torch.testing.assert_close(raw.variance, 9 * model.variance, equal_nan=True)
    torch.testing.assert_close(raw.sample(3, seed=1), 2 + 3 * model.sample(3, seed=1))


def test_density_integrates_to_one_in_raw_units():
    grid = torch.linspace(0, 10, 4001, dtype=torch.float64)
    wide = Prediction(dist.Laplace(M[:, :1].expand(S, 4001), SD[:, :1].expand(S, 4001)), shift=5.0, scale=0.2)
    assert float(torch.trapezoid(wide.log_prob(grid).exp(), grid)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_quantiles_invert_the_cdf(name):
    prediction = Prediction(EVERYWHERE[name], shift=-1.0, scale=2.0)
    assert prediction.quantile_method == "cdf"
    levels = [1e-6, 0.05, 0.5, 0.95, 1 - 1e-6]
    found = prediction.quantile(levels)
    assert found.shape == (5, N)
    assert (found.diff(dim=0) > 0).all()
    for level, row in zip(levels, found, strict=True):
        torch.testing.assert_close(
            prediction.cdf(row), torch.full((N,), level, dtype=torch.float64), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("name", [*EVERYWHERE, *COUNTS])
def test_cdf_and_quantiles_against_samples(name):
    distribution = {**EVERYWHERE, **COUNTS}[name]
    prediction = Prediction(distribution)
    x = component_samples(distribution, 8000).flatten(0, 1)
    for q in (0.1, 0.5, 0.9):
        value = prediction.quantile(q)
        below, up_to = (x < value).double().mean(0), (x <= value).double().mean(0)
        # Five standard errors, of the check's samples and (counts) of the quantile's own 20,000.
        slack = 5 * math.sqrt(q * (1 - q) * (1 / len(x) + 1 / 20_000))
        assert (below <= q + slack).all()
        assert (up_to >= q - slack).all()
    point = x[0]
    slack = 5 * math.sqrt(0.25 * (1 / len(x) + 1 / 20_000))
    assert ((prediction.cdf(point) - (x <= point).double().mean(0)).abs() < slack).all()


def test_integer_quantiles_are_the_smallest_that_reach_the_level():
    rate = torch.tensor([[0.7, 30.0], [2.0, 90.0]], dtype=torch.float64)
    prediction = Prediction(dist.Poisson(rate))
    for q in (0.01, 0.3, 0.5, 0.99):
        value = prediction.quantile(q).numpy()
        cdf = stats.poisson(rate.numpy()).cdf
        assert (cdf(value).mean(0) >= q).all()
        assert (cdf(value - 1).mean(0) < q).all()
    np.testing.assert_allclose(prediction.cdf([3, 40]).numpy(), cdf(np.array([3, 40])).mean(0), rtol=1e-9)


def test_student_cdf_against_scipy():
    prediction = Prediction(REAL["StudentT"])
    y = torch.linspace(-3, 3, N, dtype=torch.float64)
    expected = stats.t((4 + SD).numpy(), M.numpy(), SD.numpy()).cdf(y.numpy()).mean(0)
    np.testing.assert_allclose(prediction.cdf(y).numpy(), expected, rtol=1e-12)


def test_well_separated_and_degenerate_mixtures():
    apart = Prediction(dist.Normal(torch.tensor([[-1e6], [1e6]], dtype=torch.float64), 1.0))
    low, high = apart.interval(0.5)
    assert float(low) == pytest.approx(-1e6)
    assert float(high) == pytest.approx(1e6)
    tiny = Prediction(dist.Normal(torch.tensor([[1.0], [1.0 + 1e-9]], dtype=torch.float64), 1e-9))
    assert 1.0 < float(tiny.quantile(0.5)) < 1.0 + 1e-9
    same = Prediction(dist.Laplace(torch.zeros(3, 2, dtype=torch.float64), 1.0))
    torch.testing.assert_close(same.quantile(0.9), torch.full((2,), -math.log(0.2), dtype=torch.float64))


def test_interval_is_central():
    low, high = Prediction(dist.Normal(torch.zeros(1, 2, dtype=torch.float64), 2.0)).interval(0.9)
    torch.testing.assert_close(high, torch.full((2,), 2 * 1.6448536269514722, dtype=torch.float64))
    torch.testing.assert_close(low, -high)


def test_cdfs_of_counts_against_sums():
    k = torch.arange(60, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 2, 3, 4, 7])
    for name in ("Poisson", "NegativeBinomial", "GammaPoisson", "Geometric"):
        distribution = COUNTS[name]
        mass = distribution.log_prob(k[:, None, None]).exp().cumsum(0).mean(1)
        prediction = Prediction(distribution)
        assert prediction.quantile_method == "cdf"
        torch.testing.assert_close(prediction.cdf(y), mass[y, torch.arange(N)], rtol=1e-9, atol=0)
    n = torch.arange(1, N + 1)
    binomial = stats.binom(n.numpy(), M.sigmoid().numpy()).cdf(y.numpy()).mean(0)
    torch.testing.assert_close(Prediction(COUNTS["Binomial"]).cdf(y), torch.from_numpy(binomial))
    assert Prediction(COUNTS["ZeroInflatedPoisson"]).quantile_method == "samples"


def test_density_of_a_mixture_off_the_support_of_one_part():
    parts = dist.Uniform(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 4.0]]]))
    prediction = Prediction(dist.MixtureSameFamily(dist.Categorical(torch.tensor([[[0.25, 0.75]]])), parts))
    assert float(prediction.log_prob([3.0])) == pytest.approx(math.log(0.375))
    assert float(prediction.log_prob([1.5])) == -math.inf
    assert float(prediction.cdf([3.0])) == pytest.approx(0.25 + 0.375)


def test_off_the_support_the_density_is_zero():
    assert Prediction(REAL["LogNormal"]).log_prob([-1.0] * N).tolist() == [-math.inf] * N
    assert Prediction(REAL["Uniform"]).log_prob([99.0] * N).tolist() == [-math.inf] * N
    assert Prediction(REAL["LogNormal"]).cdf([-1.0] * N).tolist() == [0.0] * N
    assert Prediction(REAL["Uniform"]).cdf([99.0] * N).tolist() == [1.0] * N
    some = Prediction(dist.Uniform(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [6.0]])))
    assert float(some.log_prob([0.5])) == pytest.approx(math.log(0.5))


# --- Samples ------------------------------------------------------------------------------------------------------


def test_samples_are_seeded_and_leave_the_global_state_alone():
    prediction = Prediction(REAL["Normal"])
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    a, b, c = prediction.sample(4, seed=1), prediction.sample(4, seed=1), prediction.sample(4, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (4, N)


@pytest.mark.parametrize("opaque", [False, True])
def test_samples_follow_the_mixture(opaque):
    distribution = dist.Normal(M[:, :2], SD[:, :2])
    if opaque:
        distribution = Stacked([dist.Normal(m, s) for m, s in zip(M[:, :2], SD[:, :2], strict=True)])
    prediction = Prediction(distribution)
    x = prediction.sample(20_000, seed=4)
    levels = Prediction(dist.Normal(M[:, :2], SD[:, :2]))
    for row in range(2):
        uniform = [float(v) for v in _cdf_of_row(levels, row, x[:, row])]
        assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    # One draw serves all rows of a sample, so rows are as dependent as the draws' means are.
    expected = ((M[:, 0] - M[:, 0].mean()) * (M[:, 1] - M[:, 1].mean())).mean()
    covariance = torch.cov(x.T)[0, 1]
    error = float(prediction.sd[0] * prediction.sd[1]) / math.sqrt(20_000)
    assert float((covariance - expected).abs()) < 5 * error


def _cdf_of_row(prediction, row, values):
    m, s = prediction.gaussian_components
    return stats.norm(m[:, row].numpy(), s[:, row].numpy()).cdf(values.numpy()[:, None]).mean(1)


def test_samples_of_classes_and_counts_are_integers():
    assert Prediction(dist.Categorical(logits=torch.zeros(S, N, 3))).sample(6).dtype == torch.int64
    assert Prediction(COUNTS["Poisson"]).sample(6).dtype == torch.int64
    assert Prediction(dist.Bernoulli(torch.full((S, N, 3), 0.5)).to_event(1)).sample(6).shape == (6, N, 3)


# --- Classes ------------------------------------------------------------------------------------------------------


def test_binary():
    p = torch.tensor([[0.2, 0.5, 1.0], [0.6, 0.5, 0.0]], dtype=torch.float64)
    prediction = Prediction(dist.Bernoulli(p))
    assert prediction.kind == "binary"
    torch.testing.assert_close(prediction.probs, torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.5, 0.5]]).double())
    assert prediction.labels.tolist() == [0, 0, 0]
    torch.testing.assert_close(prediction.variance[:, 1], torch.tensor([0.24, 0.25, 0.25]).double())
    torch.testing.assert_close(prediction.epistemic[:, 1], torch.tensor([0.04, 0.0, 0.25]).double())
    log2 = math.log(2)
    torch.testing.assert_close(prediction.entropy[1:], torch.full((2,), log2).double())
    torch.testing.assert_close(prediction.expected_entropy[1:], torch.tensor([log2, 0.0]).double())
    torch.testing.assert_close(prediction.mutual_information[1:], torch.tensor([0.0, log2]).double())
    torch.testing.assert_close(prediction.log_prob([1, 0, 1]), torch.tensor([0.4, 0.5, 0.5]).double().log())
    torch.testing.assert_close(prediction.log_prob(torch.tensor([True, False, True])), prediction.log_prob([1, 0, 1]))


def test_categorical():
    logits = torch.randn(S, N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = Prediction(dist.Categorical(logits=logits))
    p = logits.softmax(-1)
    assert prediction.kind == "categorical"
    torch.testing.assert_close(prediction.mean, p.mean(0))
    torch.testing.assert_close(prediction.epistemic, p.var(0, correction=0))
    torch.testing.assert_close(prediction.variance, p.mean(0) * (1 - p.mean(0)))
    entropy = -(p.mean(0) * p.mean(0).log()).sum(-1)
    inner = -(p * p.log()).sum(-1).mean(0)
    torch.testing.assert_close(prediction.entropy, entropy)
    torch.testing.assert_close(prediction.expected_entropy, inner)
    torch.testing.assert_close(prediction.mutual_information, entropy - inner)
    assert (prediction.mutual_information >= 0).all()
    y = torch.arange(N) % 4
    torch.testing.assert_close(prediction.log_prob(y), p.mean(0)[torch.arange(N), y].log())
    assert torch.equal(prediction.labels, p.mean(0).argmax(-1))
    one = Prediction(dist.Categorical(logits=logits[:1]))
    assert one.mutual_information.tolist() == [0.0] * N
    assert one.epistemic.eq(0).all()


def test_certain_classes_have_no_entropy():
    prediction = Prediction(dist.Categorical(torch.eye(3, dtype=torch.float64).expand(2, 3, 3)))
    assert (prediction.entropy.abs() < 1e-12).all()
    assert (prediction.mutual_information >= 0).all()


def test_several_labels():
    p = torch.tensor([[[0.9, 0.2]], [[0.5, 0.4]]], dtype=torch.float64)
    prediction = Prediction(dist.Bernoulli(p).to_event(1))
    assert prediction.kind == "multilabel"
    torch.testing.assert_close(prediction.probs, torch.tensor([[0.7, 0.3]]).double())
    assert prediction.labels.tolist() == [[1, 0]]
    # The labels are independent given a draw, not in the mixture.
    assert float(prediction.log_prob([[1, 0]])) == pytest.approx(math.log((0.9 * 0.8 + 0.5 * 0.6) / 2))
    assert prediction.entropy.shape == (1, 2)
    head = Prediction(dist.Bernoulli(p[..., 0]))
    torch.testing.assert_close(prediction.mutual_information[:, 0], head.mutual_information)


# --- Several outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["independent", "mvn"])
def test_several_outputs(form):
    m, s = loose(2, S, N, 2)
    joint = dist.Normal(m, s).to_event(1)
    if form == "mvn":
        joint = dist.MultivariateNormal(m, scale_tril=torch.diag_embed(s))
    prediction = Prediction(joint, shift=1.0, scale=2.0)
    single = [Prediction(dist.Normal(m[..., k], s[..., k]), shift=1.0, scale=2.0) for k in range(2)]
    y = torch.linspace(-1, 1, 2 * N, dtype=torch.float64).reshape(N, 2)
    for name in ("mean", "epistemic", "aleatoric", "variance"):
        torch.testing.assert_close(getattr(prediction, name), torch.stack([getattr(p, name) for p in single], -1))
    for q in (0.05, 0.5):
        torch.testing.assert_close(prediction.quantile(q), torch.stack([p.quantile(q) for p in single], -1))
    torch.testing.assert_close(prediction.cdf(y), torch.stack([p.cdf(y[:, k]) for k, p in enumerate(single)], -1))
    by_draw = torch.stack([p.log_prob_by_draw(y[:, k]) for k, p in enumerate(single)]).sum(0)
    torch.testing.assert_close(prediction.log_prob(y), by_draw.logsumexp(0) - math.log(S))
    assert prediction.sample(3).shape == (3, N, 2)
    assert prediction[2:4].mean.shape == (2, 2)


# --- Rows, batches, memory ----------------------------------------------------------------------------------------


ALL = {
    **EVERYWHERE,
    **COUNTS,
    "Bernoulli": dist.Bernoulli(logits=M),
    "Categorical": dist.Categorical(logits=torch.stack([M, SD, -M], -1)),
    "MultiBernoulli": dist.Bernoulli(logits=torch.stack([M, SD], -1)).to_event(1),
}


def statistics(prediction):
    values = {"mean": prediction.mean, "epistemic": prediction.epistemic, "aleatoric": prediction.aleatoric}
    y = torch.ones(len(prediction), *prediction.event_shape)
    values["log_prob"] = prediction.log_prob(y)
    if prediction.kind in ("real", "count"):
        values["quantile"], values["cdf"] = prediction.quantile([0.1, 0.8]).T, prediction.cdf(y)
    else:
        values["expected_entropy"] = prediction.expected_entropy
    return values


@pytest.mark.parametrize("name", [n for n in ALL if Prediction(ALL[n]).kind != "count"])
def test_rows_batches_and_pieces_agree(name, monkeypatch):
    whole = Prediction(ALL[name])
    expected = statistics(whole)
    rows = [5, 0, 0, 3]
    chosen = statistics(whole[rows])
    again = statistics(Prediction.concat([whole[:2], whole[2:3], whole[3:]])[torch.tensor(rows)])
    monkeypatch.setattr(blocks, "ELEMENTS", 12)  # one or two rows at a time
    pieces = statistics(Prediction(ALL[name]))
    for key, value in expected.items():
        for other, index in ((pieces, slice(None)), (chosen, rows), (again, rows)):
            torch.testing.assert_close(other[key], value[index], equal_nan=True, rtol=1e-9, atol=1e-12)
    assert len(whole[rows]) == 4
    assert len(whole[2]) == 1
    assert len(whole[torch.tensor([True, False] * 3 + [True])]) == 4
    assert [len(row) for row in whole] == [1] * N


def test_streams_hold_no_parameters():
    calls = []

    def block(start):
        def make():
            calls.append(start)
            return dist.Normal(M[:, start : start + 4], SD[:, start : start + 4])

        return min(4, N - start), make

    streamed = Prediction.stream([block(0), block(4)], shift=1.0, scale=2.0)
    whole = Prediction(REAL["Normal"], shift=1.0, scale=2.0)
    for key, value in statistics(whole).items():
        torch.testing.assert_close(statistics(streamed)[key], value)
    torch.testing.assert_close(streamed[[6, 1]].mean, whole.mean[[6, 1]])
    assert calls[:3] == [0, 0, 4]


def test_draw_by_draw_distributions_give_the_same():
    members = [dist.Normal(m, s) for m, s in zip(M, SD, strict=True)]
    side = Prediction(Stacked(members))
    for key, value in statistics(Prediction(stack(members))).items():
        torch.testing.assert_close(statistics(side)[key], value)
    with pytest.raises(ModelError, match="cannot be taken apart"):
        _ = side[:2].mean


def test_float32_parameters_give_float64_statistics():
    prediction = Prediction(dist.Normal(M.float(), SD.float()))
    assert prediction.mean.dtype == torch.float64
    y = torch.zeros(N, dtype=torch.float64)
    torch.testing.assert_close(prediction.log_prob(y), Prediction(REAL["Normal"]).log_prob(y), rtol=1e-5, atol=1e-6)


def test_gradients_do_not_leak_out():
    prediction = Prediction(dist.Normal(M.clone().requires_grad_(), SD))
    assert not prediction.mean.requires_grad
    assert not prediction.quantile(0.5).requires_grad
    assert not prediction.sample(2).requires_grad


# --- Gaussian predictions -----------------------------------------------------------------------------------------


def test_gaussian_prediction():
    prediction = GaussianPrediction(M[0], SD[0], 0.25, shift=1.0, scale=2.0)
    same = Prediction(dist.Normal(M[:1], (SD[:1] + 0.25).sqrt()), shift=1.0, scale=2.0)
    torch.testing.assert_close(prediction.epistemic, 4 * SD[0])
    torch.testing.assert_close(prediction.aleatoric, torch.full((N,), 1.0).double())
    y = torch.linspace(-1, 1, N, dtype=torch.float64)
    for ours, theirs in (
        (prediction.mean, same.mean),
        (prediction.variance, same.variance),
        (prediction.log_prob(y), same.log_prob(y)),
        (prediction.quantile([0.1, 0.9]), same.quantile([0.1, 0.9])),
        (prediction.cdf(y), same.cdf(y)),
    ):
        torch.testing.assert_close(ours, theirs)
    parts = Prediction.concat([prediction[:3], prediction[3:]])
    assert isinstance(parts, GaussianPrediction)
    torch.testing.assert_close(parts.epistemic, prediction.epistemic)
    torch.testing.assert_close(prediction[[4, 1]].epistemic, prediction.epistemic[[4, 1]])


# --- Bad input ----------------------------------------------------------------------------------------------------

CLASSES = Prediction(dist.Categorical(logits=torch.zeros(S, N, 3)))
BAD = [
    (lambda: Prediction(dist.Normal(torch.zeros(4), 1.0)), ModelError, "batch shape"),
    (lambda: Prediction(dist.Normal(torch.zeros(4, 0), 1.0)), ModelError, "at least one of each"),
    (lambda: Prediction(dist.OneHotCategorical(torch.ones(2, 3, 4))), ModelError, "one-hot"),
    (lambda: Prediction(REAL["Normal"], kind="reel"), ModelError, "kind is one of"),
    (lambda: Prediction(REAL["Normal"], scale=0.0), ModelError, "positive"),
    (lambda: Prediction(REAL["Normal"], shift=math.nan), ModelError, "finite"),
    (lambda: Prediction(COUNTS["Poisson"], scale=2.0), ModelError, "cannot be shifted or scaled"),
    (lambda: Prediction.concat([]), ModelError, "no predictions"),
    (lambda: Prediction.concat([CLASSES, Prediction(REAL["Normal"])]), ModelError, "differ"),
    (lambda: Prediction(REAL["Normal"])[N], DataError, "no such rows"),
    (lambda: Prediction(REAL["Normal"])[N:], DataError, "at least one row"),
    (lambda: Prediction(REAL["Normal"]).log_prob(torch.zeros(N, 1)), DataError, r"shape \(7, 1\)"),
    (lambda: Prediction(REAL["Normal"]).log_prob(torch.zeros(N + 1)), DataError, "7 rows"),
    (lambda: Prediction(REAL["Normal"]).log_prob([math.nan] * N), DataError, "not finite"),
    (lambda: Prediction(REAL["Normal"]).log_prob(["a"] * N), DataError, "text"),
    (lambda: Prediction(REAL["Normal"]).quantile(1.0), DataError, "strictly between"),
    (lambda: Prediction(REAL["Normal"]).interval(90), DataError, "strictly between"),
    (lambda: Prediction(REAL["Normal"]).sample(0), DataError, "at least one sample"),
    (lambda: Prediction(REAL["Normal"]).probs, ModelError, "predictions of classes"),
    (lambda: Prediction(REAL["Normal"]).mutual_information, ModelError, "predictions of classes"),
    (lambda: CLASSES.quantile(0.5), ModelError, "ordered"),
    (lambda: CLASSES.cdf([0] * N), ModelError, "ordered"),
    (lambda: CLASSES.log_prob([3] + [0] * (N - 1)), DataError, "from 0 to 2"),
    (lambda: CLASSES.log_prob([-1] + [0] * (N - 1)), DataError, "row 0"),
    (lambda: CLASSES.log_prob([0.5] * N), DataError, "out of range"),
    (lambda: Prediction(COUNTS["Poisson"]).log_prob([-1.5] * N), DataError, "from 0 on"),
    (lambda: GaussianPrediction(M[0], SD[0, :2], 0.1), ModelError, "vectors"),
    (lambda: GaussianPrediction(M[0], -SD[0], 0.1), ModelError, "not negative"),
    (lambda: GaussianPrediction(M[0], 0 * SD[0], 0.0), ModelError, "positive in total"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
