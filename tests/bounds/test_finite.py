"""Ensembles weighed on rows that their members have not seen, and networks that have a short description."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from scipy import special

from bayesdl import data as datasets
from bayesdl import models
from bayesdl.bounds import bounded, certify, compress, pac_bayes_kl, weigh
from bayesdl.bounds.finite import best_weights, divergence
from bayesdl.data import Dataset
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.infer.ensemble import DeepEnsemble
from bayesdl.infer.optimise import MAP
from bayesdl.infer.variational import MeanFieldVI
from bayesdl.posterior import DrawsPosterior, FinitePosterior, load


@pytest.fixture(scope="module")
def cancer() -> Dataset:
    return datasets.load("breast_cancer")


@pytest.fixture(scope="module")
def ensemble(cancer: Dataset) -> DrawsPosterior:
    """Six members, three of them so little trained that they are worse."""
    model, rows = models.mlp(cancer, hidden=(3,)), cancer.train[:200]
    good = DeepEnsemble(members=3, steps=60).fit(model, rows, seed=0, progress=False)
    assert isinstance(good, DrawsPosterior)
    bad = torch.randn(3, 1, good.z.shape[2], generator=torch.Generator().manual_seed(1), dtype=good.z.dtype)
    return DrawsPosterior(good.problem, torch.cat([good.z, bad]), {}, {"method": "DeepEnsemble"})


def errors(posterior: DrawsPosterior, data: Dataset) -> torch.Tensor:
    """The share of wrong rows of each member, one by one."""
    return torch.stack(
        [
            (DrawsPosterior(posterior.problem, z[None], {}, {}).predict(data.x).labels != data.y).double().mean()
            for z in posterior.z
        ]
    )


def test_weighted_members_are_certified_by_a_finite_sum(ensemble: DrawsPosterior, cancer: Dataset) -> None:
    weighted, unseen = weigh(ensemble, cancer.train), cancer.train[200:]
    certificate = certify(weighted, cancer.train)
    risks, w = errors(ensemble, unseen), weighted.weights
    assert certificate.n == len(unseen)
    assert certificate.predictor == "gibbs"
    assert certificate.risk_upper is None
    assert certificate.delta_split == {"bound": 0.05}
    assert certificate.risk == pytest.approx(float(w @ risks), rel=1e-12)
    kl = float((w * w.log()).nansum()) + math.log(6)
    assert kl <= certificate.kl <= kl + 1e-12
    assert certificate.bound == pytest.approx(
        float(pac_bayes_kl(risk=float(w @ risks), kl=kl, n=len(unseen), delta=0.05)), rel=1e-9
    )
    assert float(w[3:].sum()) < 0.1 < float(w[:3].max())


@pytest.mark.parametrize("n", [50, 1000, 100_000])
@pytest.mark.parametrize("prior", [[1 / 6] * 6, [0.3, 0.1, 0.2, 0.1, 0.2, 0.1]])
def test_weights_are_the_best_of_all_weights(n: int, prior: list[float]) -> None:
    """Against others, far and near; the optimum is inside for few rows and at the best member for many."""
    start, risks = np.array(prior), np.array([0.1, 0.104, 0.12, 0.14, 0.2, 0.5])

    def bounds(weights: np.ndarray) -> np.ndarray:
        kl = np.maximum(0.0, special.rel_entr(weights, start).sum(-1))
        return np.asarray(pac_bayes_kl(risk=np.minimum(weights @ risks, 1), kl=kl, n=n, delta=0.05))

    weights = best_weights(start, risks, n, 0.05)
    assert (weights.max() > 0.99) == (n == 100_000)
    rng = np.random.default_rng(0)
    for spread in (2.0, 0.1, 0.01):
        others = (weights + 1e-3 * spread * start) * np.exp(spread * rng.normal(size=(1000, 6)))
        values = bounds(others / others.sum(1, keepdims=True))
        assert bounds(weights) <= values.min() + 1e-6
        assert bounds(weights) < values.mean()


def test_members_that_saw_all_rows_are_refused(ensemble: DrawsPosterior, cancer: Dataset) -> None:
    with pytest.raises(DataDependentPrior, match="none is left"):
        weigh(ensemble, cancer.train[:150])
    with pytest.raises(CertificateError, match="ensemble, or chains"):
        weigh(MeanFieldVI(steps=1).fit(models.mlp(cancer, hidden=(2,)), cancer.train, progress=False), cancer.train)
    with pytest.raises(CertificateError, match="one weight for each of 6"):
        weigh(ensemble, cancer.train, prior=torch.ones(5))
    copies = Dataset.from_arrays(cancer.train[:20].x, cancer.train[:20].y, "classification", classes=cancer.classes)
    with pytest.raises(DataDependentPrior, match="20 rows .*copies"):
        weigh(ensemble, copies)


def test_rows_that_chose_the_weights_allow_no_hold_out_bound(ensemble: DrawsPosterior, cancer: Dataset) -> None:
    weighted = weigh(ensemble, cancer.train)
    with pytest.raises(CertificateError, match="hold-out bound needs rows"):
        certify(weighted, cancer.train[200:], bound="holdout")
    assert certify(weighted, cancer.train[200:]).predictor == "gibbs"
    assert certify(weighted, cancer.test).theorem == "binomial tail"


def test_weighted_ensemble_predicts_by_its_weights_and_survives_saving(
    ensemble: DrawsPosterior, cancer: Dataset, tmp_path: Path
) -> None:
    weighted = weigh(ensemble, cancer.train)
    probs = weighted.by_member(cancer.test.x).mean_by_draw[..., 1]
    exact = (weighted.weights[:, None] * probs).sum(0)
    assert torch.allclose(weighted.predict(cancer.test.x, max_draws=5000).probs[:, 1], exact, atol=6 / 5000)
    again = load(weighted.save(tmp_path / "run"))
    assert isinstance(again, FinitePosterior)
    assert certify(again, cancer.train) == certify(weighted, cancer.train)


def test_divergence_of_weights_is_never_below_the_exact_one() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 30):
        for sharpness in (0.0, 1e-9, 1.0, 300.0):
            prior = rng.random(size) + 0.01
            weights = prior * np.exp(-sharpness * rng.random(size))
            with mpmath.workdps(50):
                p, q = ([mpmath.mpf(v) / mpmath.fsum(a) for v in a] for a in (prior, weights))
                exact = mpmath.fsum(b * mpmath.log(b / a) for a, b in zip(p, q, strict=True) if b > 0)
            found = divergence(weights, prior)
            assert exact <= found <= exact * (1 + 1e-13) + 1e-13
    assert divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(math.log(2), rel=1e-14)


@pytest.fixture(scope="module")
def flower() -> tuple[torch.Tensor, torch.Tensor]:
    """A pair, which nothing scales: no row is spent on units."""
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    return x, (x @ torch.tensor([2.0, -1.0, 0.5, 0.0]) > 0).long()


def test_compressed_network_is_certified_on_its_training_rows(flower: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = models.mlp(Dataset.from_arrays(*flower, "classification"), hidden=(4,))
    mode = MAP(steps=150).fit(model, flower, seed=0, progress=False)
    network = compress(mode, flower)
    certificate = certify(network, flower)
    assert certificate.n == 2000
    assert certificate.risk_upper is None
    assert certificate.kl >= network.info["bits"] * math.log(2)
    assert certificate.kl == pytest.approx(network.info["bits"] * math.log(2), rel=1e-12)
    # The certificate is of this network: its own errors, row by row.
    wrong = (network.predict(flower[0]).labels != flower[1]).double().mean()
    assert certificate.risk == pytest.approx(float(wrong), rel=1e-12)
    assert certificate.bound < 0.3
    one = compress(mode, flower, levels=(network.info["levels"],))
    assert torch.equal(one.z, network.z)
    assert len((network.z[0]).unique()) <= network.info["levels"]
    for levels in (1, 9):
        assert certify(compress(mode, flower, levels=(levels,)), flower).bound >= certificate.bound - 1e-12


def test_description_starts_from_a_network_of_other_rows(flower: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = flower
    whole = Dataset.from_arrays(x, y, "classification")
    model = models.mlp(whole, hidden=(4,))
    first, rest = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    early = MAP(steps=150).fit(model, first, seed=0, progress=False)
    late = MAP(steps=30, learning_rate=1e-4).fit(model, rest, seed=0, init=early, progress=False)
    from_zero, from_early = compress(late, rest), compress(late, rest, prior=early)
    certificate = certify(from_early, rest)
    assert certificate.n == 1000
    assert certificate.bound < certify(from_zero, rest).bound
    assert float((from_early.z - late.z).abs().max()) < 0.01
    with pytest.raises(DataDependentPrior, match="copies"):
        compress(late, (x, y), prior=early)


def test_what_cannot_be_compressed_is_told(ensemble: DrawsPosterior, cancer: Dataset) -> None:
    with pytest.raises(CertificateError, match="weigh its members"):
        compress(ensemble, cancer.train)
    mode = MAP(steps=5).fit(models.mlp(cancer, hidden=(2,)), cancer.train, progress=False)
    with pytest.raises(DataDependentPrior, match="none is left"):
        compress(mode, cancer.train)  # its scaler saw them all
    assert certify(compress(mode, cancer.test), cancer.test).n == len(cancer.test)
    with pytest.raises(CertificateError, match="levels"):
        compress(mode, cancer.test, levels=())


def test_regression_members_are_weighed_by_a_bounded_loss() -> None:
    data = datasets.load("diabetes")
    posterior = DeepEnsemble(members=4, steps=20).fit(
        models.mlp(data, hidden=(3,)), data.train[:150], seed=0, progress=False
    )
    loss = bounded("nll", ceiling=10.0)
    certificate = certify(weigh(posterior, data.train, loss=loss), data.train, loss=loss)
    assert certificate.n == len(data.train) - 150
    assert certificate.risk < certificate.bound < 1
