from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from bayesdl.errors import DataError, ModelError
from bayesdl.evaluate import metrics
from bayesdl.evaluate.calibration import brier, brier_parts, ece, reliability_bins
from bayesdl.posterior.families import take
from bayesdl.posterior.prediction import GaussianPrediction, Prediction

G = torch.Generator().manual_seed(0)
S, N = 6, 40
M = torch.randn(S, N, generator=G, dtype=torch.float64)
SD = torch.rand(S, N, generator=G, dtype=torch.float64) + 0.3
Y = torch.randn(N, generator=G, dtype=torch.float64)
NORMAL = Prediction(dist.Normal(M, SD), shift=1.0, scale=2.0)


def gaussian(mean, sd, y):
    return Prediction(dist.Normal(torch.tensor([mean]).double(), torch.tensor([sd]).double())), torch.tensor(y).double()


# --- Numbers ------------------------------------------------------------------------------------------------------


def test_by_hand():
    prediction, y = gaussian([0.0, 1.0], [1.0, 2.0], [1.0, -1.0])
    assert metrics.rmse(prediction, y) == pytest.approx(math.sqrt((1 + 4) / 2))
    assert metrics.mae(prediction, y) == pytest.approx(1.5)
    log = 0.5 * math.log(2 * math.pi)
    assert metrics.nll(prediction, y) == pytest.approx((log + 0.5 + log + math.log(2) + 0.5) / 2)
    assert metrics.coverage(prediction, y, 0.9) == 1.0
    assert metrics.coverage(prediction, y, 0.5) == 0.0
    assert metrics.width(prediction, 0.9) == pytest.approx(2 * 1.6448536 * 1.5)
    # At the median the quantile loss is half the absolute error.
    assert metrics.pinball(prediction, y, 0.5) == pytest.approx(0.75)
    assert metrics.pinball(prediction, y, 0.9) == pytest.approx(
        sk.mean_pinball_loss(y, prediction.quantile(0.9), alpha=0.9)
    )
    np.testing.assert_allclose(metrics.pit(prediction, y), stats.norm([0, 1], [1, 2]).cdf(y))
    # CRPS of a standard Gaussian at its mean: (sqrt 2 - 1) / sqrt(pi).
    standard, zero = gaussian([0.0], [1.0], [0.0])
    assert metrics.crps(standard, zero) == pytest.approx((math.sqrt(2) - 1) / math.sqrt(math.pi))


def test_crps_of_a_gaussian_mixture_against_the_integral():
    grid = torch.linspace(-25, 25, 50_001, dtype=torch.float64)
    found = metrics.crps_by_row(NORMAL, Y)
    for row in range(5):
        wide = Prediction(
            dist.Normal(M[:, row : row + 1].expand(S, len(grid)), SD[:, row : row + 1].expand(S, len(grid))),
            shift=1.0,
            scale=2.0,
        )
        square = (wide.cdf(grid) - (grid >= Y[row]).double()).square()
        assert float(found[row]) == pytest.approx(float(torch.trapezoid(square, grid)), abs=2e-3)
        assert metrics.crps_method(NORMAL) == "exact"


def test_crps_in_blocks_and_for_several_outputs():
    draws = 2100  # two rows do not fit into one block of pairs
    m, s = torch.randn(draws, 3, generator=G).double(), torch.full((draws, 3), 0.5).double()
    y = torch.zeros(3).double()
    together = metrics.crps_by_row(Prediction(dist.Normal(m, s)), y)
    alone = metrics.crps_by_row(Prediction(dist.Normal(m[:, 1:2], s[:, 1:2])), y[1:2])
    torch.testing.assert_close(together[1:2], alone)
    outputs = Prediction(dist.Normal(m[:9].reshape(9, 3, 1), s[:9].reshape(9, 3, 1)).to_event(1))
    torch.testing.assert_close(
        metrics.crps_by_row(outputs, y[:, None])[:, 0], metrics.crps_by_row(Prediction(dist.Normal(m[:9], s[:9])), y)
    )


def test_sampled_crps_is_unbiased(monkeypatch):
    exact = metrics.crps_by_row(NORMAL, Y)
    monkeypatch.setattr(metrics, "PAIRS", 0)
    assert metrics.crps_method(NORMAL) == "samples"
    monkeypatch.setattr(metrics, "SAMPLES", 10)  # the biased estimator would be off by about 10% here
    runs = torch.stack([metrics.crps_by_row(NORMAL, Y, seed) for seed in range(400)]).mean(1)
    assert abs(float(runs.mean() - exact.mean())) < 4 * float(runs.std()) / 20


def test_crps_of_a_laplace_from_samples():
    prediction = Prediction(dist.Laplace(torch.zeros(1, 1).double(), 1.0))
    # E|X| - E|X - X'|/2 = 1 - 3/4 for a standard Laplace at 0.
    found = [metrics.crps(prediction, [0.0], seed) for seed in range(20)]
    assert np.mean(found) == pytest.approx(0.25, abs=4 * np.std(found) / math.sqrt(20))


def test_ensemble_of_one_equals_its_member():
    one = Prediction(take(dist.Normal(M, SD), slice(0, 1), 0))
    member = GaussianPrediction(M[0], 0 * SD[0], SD[0] ** 2)
    copies = Prediction(dist.Normal(M[:1].expand(4, N), SD[:1].expand(4, N)))
    for score in (metrics.nll, metrics.rmse, metrics.mae, metrics.crps, metrics.coverage, metrics.calibration_error):
        assert score(one, Y) == pytest.approx(score(member, Y), rel=1e-9)
        assert score(one, Y) == pytest.approx(score(copies, Y), rel=1e-9)
    assert metrics.epistemic_share(one) == 0.0
    assert metrics.epistemic_share(copies) == pytest.approx(0.0, abs=1e-15)


def test_pit_is_uniform_when_the_prediction_is_right():
    n = 2000
    m = torch.randn(S, n, generator=G, dtype=torch.float64)
    right = Prediction(dist.Normal(m, 0.5), shift=3.0, scale=4.0)
    y = right.sample(1, seed=5)[0]
    # All rows share a draw, so that only conditionally on it are they independent: redraw for each row.
    y = right.sample(n, seed=6).diagonal()
    assert stats.kstest(metrics.pit(right, y).numpy(), "uniform").pvalue > 1e-3
    assert metrics.calibration_error(right, y) < 0.03
    narrow = Prediction(dist.Normal(m.mean(0)[None], 0.2), shift=3.0, scale=4.0)
    assert stats.kstest(metrics.pit(narrow, y).numpy(), "uniform").pvalue < 1e-6
    assert metrics.calibration_error(narrow, y) > 0.1


@pytest.mark.parametrize("family", ["Poisson", "NegativeBinomial"])
def test_pit_of_counts_is_uniform(family):
    n = 2000
    rate = 1.0 + torch.rand(1, n, generator=G, dtype=torch.float64)
    right = Prediction(dist.Poisson(rate) if family == "Poisson" else dist.NegativeBinomial(2, probs=rate / 4))
    y = right.sample(1, seed=1)[0]
    values = metrics.pit(right, y, seed=2)
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(values, metrics.pit(right, y, seed=2))


# --- Classes ------------------------------------------------------------------------------------------------------


def binary(n=200, draws=4, ties=False):
    g = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(draws, n, generator=g, dtype=torch.float64)
    if ties:
        logits = logits[:1].round().expand(draws, n)
    prediction = Prediction(dist.Bernoulli(logits=logits))
    y = (torch.rand(n, generator=g, dtype=torch.float64) < logits.mean(0).sigmoid()).long()
    return prediction, y


def categorical(n=300, k=4):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(3, n, k, generator=g, dtype=torch.float64)
    prediction = Prediction(dist.Categorical(logits=logits))
    y = torch.multinomial(logits.mean(0).softmax(-1), 1, generator=g)[:, 0]
    return prediction, y


@pytest.mark.parametrize("ties", [False, True])
def test_binary_scores_against_scikit_learn(ties):
    prediction, y = binary(ties=ties)
    p = prediction.probs.numpy()
    assert metrics.nll(prediction, y) == pytest.approx(sk.log_loss(y, p))
    assert brier(prediction, y) == pytest.approx(sk.brier_score_loss(y, p[:, 1]))
    assert metrics.auroc(prediction, y) == pytest.approx(sk.roc_auc_score(y, p[:, 1]))
    assert metrics.accuracy(prediction, y) == pytest.approx(sk.accuracy_score(y, p.argmax(1)))


def test_multiclass_scores_against_scikit_learn():
    prediction, y = categorical()
    p = prediction.probs.numpy()
    assert metrics.nll(prediction, y) == pytest.approx(sk.log_loss(y, p))
    assert metrics.auroc(prediction, y) == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr", average="macro"))
    onehot = np.eye(4)[y.numpy()]
    assert brier(prediction, y) == pytest.approx(((p - onehot) ** 2).sum(1).mean())
    assert metrics.accuracy(prediction, y) == pytest.approx(sk.accuracy_score(y, p.argmax(1)))


def test_several_labels_are_averaged():
    g = torch.Generator().manual_seed(3)
    p = torch.rand(2, 60, 3, generator=g, dtype=torch.float64)
    y = (torch.rand(60, 3, generator=g) < 0.4).long()
    prediction = Prediction(dist.Bernoulli(p).to_event(1))
    mean = p.mean(0).numpy()
    assert metrics.auroc(prediction, y) == pytest.approx(sk.roc_auc_score(y, mean, average="macro"))
    assert brier(prediction, y) == pytest.approx(((mean - y.numpy()) ** 2).mean())
    parts = brier_parts(prediction, y)
    assert parts.score == pytest.approx(parts.reliability - parts.resolution + parts.uncertainty + parts.within)
    assert metrics.accuracy(prediction, y) == pytest.approx(((mean > 0.5) == y.numpy()).mean())
    assert int(reliability_bins(prediction, y).count.sum()) == 180


def test_auroc_without_a_curve():
    prediction, y = binary()
    assert math.isnan(metrics.auroc(prediction, torch.ones_like(y)))
    three = Prediction(dist.Categorical(torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]])))
    # Class 2 does not occur: the curves of classes 0 and 1 are both perfect.
    assert metrics.auroc(three, [0, 1]) == 1.0


@pytest.mark.parametrize("case", [binary, categorical])
@pytest.mark.parametrize("bins", [1, 3, 15, 1000])
def test_brier_decomposition_is_exact(case, bins):
    prediction, y = case()
    parts = brier_parts(prediction, y, bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
    assert parts.score == pytest.approx(total, rel=1e-12)
    assert parts.score == pytest.approx(brier(prediction, y))
    assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0


def test_brier_decomposition_by_hand():
    # Two probabilities, each in a bin of its own: no within-bin terms. Frequencies 1/4 and 3/4, base rate 1/2.
    p = torch.tensor([[0.2] * 4 + [0.9] * 4], dtype=torch.float64)
    y = [1, 0, 0, 0, 1, 1, 1, 0]
    parts = brier_parts(Prediction(dist.Bernoulli(p)), y)
    assert parts.reliability == pytest.approx((0.05**2 + 0.15**2) / 2)
    assert parts.resolution == pytest.approx(0.25**2)
    assert parts.uncertainty == pytest.approx(0.25)
    assert parts.within == pytest.approx(0.0, abs=1e-15)
    assert parts.score == pytest.approx((0.8**2 + 3 * 0.2**2 + 3 * 0.1**2 + 0.9**2) / 8)


def test_ece_by_hand():
    # Confidences 0.9, 0.9, 0.6, 1.0; right, wrong, right, right.
    p = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]]], dtype=torch.float64)
    prediction = Prediction(dist.Categorical(p))
    y = [0, 1, 1, 0]
    assert ece(prediction, y) == pytest.approx((2 * 0.4 + 0.4 + 0.0) / 4)
    bins = reliability_bins(prediction, y)
    assert bins.count.tolist()[-1] == 1.0  # full confidence falls into the last bin, not beyond it
    assert bins.confidence[-1] == 1.0
    assert bins.count.sum() == 4
    assert ece(prediction, y, bins=1) == pytest.approx(abs(3.4 / 4 - 3 / 4))


def test_binary_and_two_classes_agree():
    prediction, y = binary()
    logits = torch.logit(prediction.probs[:, 1])
    two = Prediction(dist.Categorical(logits=torch.stack([torch.zeros_like(logits), logits], -1)[None]))
    assert ece(two, y) == pytest.approx(ece(prediction, y))
    assert brier(two, y) == pytest.approx(2 * brier(prediction, y))  # summed over both classes
    assert metrics.auroc(two, y) == pytest.approx(metrics.auroc(prediction, y))


def test_calibrated_probabilities_have_a_small_error():
    g = torch.Generator().manual_seed(4)
    p = torch.rand(1, 20_000, generator=g, dtype=torch.float64)
    y = (torch.rand(20_000, generator=g, dtype=torch.float64) < p[0]).long()
    assert ece(Prediction(dist.Bernoulli(p)), y) < 0.02
    assert ece(Prediction(dist.Bernoulli(p**3)), y) > 0.1


def test_perplexity_of_a_uniform_guess_is_the_number_of_classes():
    prediction = Prediction(dist.Categorical(logits=torch.zeros(3, 5, 12, dtype=torch.float64)))
    assert metrics.perplexity(prediction, [0, 1, 2, 3, 11]) == pytest.approx(12.0)
    assert metrics.nll(prediction, [0, 1, 2, 3, 11]) == pytest.approx(math.log(12))  # positive, in nats
    assert metrics.predictive_entropy(prediction) == pytest.approx(math.log(12))
    assert metrics.mutual_information(prediction) == pytest.approx(0.0, abs=1e-12)


def test_disagreement_is_epistemic_and_noise_is_not():
    disagree = Prediction(dist.Bernoulli(torch.tensor([[1.0], [0.0]]).double()))
    noise = Prediction(dist.Bernoulli(torch.tensor([[0.5], [0.5]]).double()))
    assert metrics.epistemic_share(disagree) == pytest.approx(1.0)
    assert metrics.epistemic_share(noise) == pytest.approx(0.0, abs=1e-12)
    # The same for numbers: the noise variance counts as aleatoric, the spread of the means as epistemic.
    numbers = Prediction(dist.Normal(torch.tensor([[-1.0], [1.0]]).double(), 1.0))
    assert metrics.epistemic_share(numbers) == pytest.approx(0.5)


def test_the_right_kind_is_asked_for():
    prediction, y = binary()
    for score in (metrics.rmse, metrics.mae, metrics.crps, metrics.coverage, metrics.pit):
        with pytest.raises(ModelError, match="real and count targets"):
            score(prediction, y)
    for score in (metrics.accuracy, metrics.auroc, metrics.perplexity, brier, ece):
        with pytest.raises(ModelError, match="for classes"):
            score(NORMAL, Y)
    with pytest.raises(DataError, match="at least one bin"):
        ece(prediction, y, bins=0)
