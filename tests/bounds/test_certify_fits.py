"""Certificates of posteriors that were really fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bayesdl import data as datasets
from bayesdl import models
from bayesdl.bounds import bounded, certify, kl_divergence_gaussian
from bayesdl.data import Dataset
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.infer.variational import MeanFieldVI
from bayesdl.posterior import DrawsPosterior, GaussianPosterior, load

VI = MeanFieldVI(steps=150, samples=2, initial_scale=0.05)


@pytest.fixture(scope="module")
def cancer() -> Dataset:
    return datasets.load("breast_cancer")


@pytest.fixture(scope="module")
def classifier(cancer: Dataset) -> GaussianPosterior:
    fitted = VI.fit(models.mlp(cancer, hidden=(5,)), cancer.train, prior_rows=0.5, seed=0, progress=False)
    assert isinstance(fitted, GaussianPosterior)
    return fitted


def test_variational_classifier_is_certified_on_its_training_rows(
    classifier: GaussianPosterior, cancer: Dataset
) -> None:
    certificate = certify(classifier, cancer.train, draws=1000, seed=1)
    reserved = classifier.problem.prior_rows
    assert reserved is not None
    assert certificate.n == len(cancer.train.rows.minus(reserved))
    assert certificate.predictor == "gibbs"
    assert certificate.bound < 0.5
    prior = classifier.problem.density.gaussian_prior()
    assert prior is not None
    exact = kl_divergence_gaussian(classifier.mean, classifier.sd, *prior)
    assert certificate.kl == pytest.approx(exact, rel=1e-6)
    assert certificate.kl >= exact
    # The Gibbs risk, independently: each draw alone on the rows outside the prior's.
    rest = cancer.train.subset(~cancer.train.rows.isin(reserved))
    probs = classifier.predict(rest.x, max_draws=1000, seed=99).mean_by_draw[..., 1]
    risk = ((probs > 0.5).long() != rest.y).double().mean(1)
    assert certificate.risk == pytest.approx(float(risk.mean()), abs=4 * float(risk.std()) / 500**0.5 + 1e-9)


def test_certificate_survives_saving(classifier: GaussianPosterior, cancer: Dataset, tmp_path: Path) -> None:
    again = load(classifier.save(tmp_path / "run"))
    before, after = certify(classifier, cancer.train, draws=200), certify(again, cancer.train, draws=200)
    # The prior's sd goes through its precision and back, so the last bit of the KL may differ.
    assert after.kl == pytest.approx(before.kl, rel=1e-12)
    assert replace(after, kl=before.kl, bound=before.bound) == before


def test_draws_of_the_same_posterior_are_certified_on_held_out_rows_only(
    classifier: GaussianPosterior, cancer: Dataset
) -> None:
    draws = DrawsPosterior(classifier.problem, classifier.unconstrained_draws(40)[None], {}, {"method": "NUTS"})
    certificate = certify(draws, cancer.test)
    assert (certificate.theorem, certificate.n, certificate.draws) == ("binomial tail", len(cancer.test), 40)
    wrong = int((draws.predict(cancer.test.x).labels != cancer.test.y).sum())
    assert certificate.errors == wrong
    with pytest.raises(CertificateError, match=f"fitted on {len(cancer.train)} of these"):
        certify(draws, cancer.train)


def test_scaler_that_saw_the_rows_of_the_bound_is_refused(cancer: Dataset) -> None:
    posterior = MeanFieldVI(steps=2).fit(models.mlp(cancer, hidden=(2,)), cancer.train[:60], seed=0, progress=False)
    with pytest.raises(DataDependentPrior, match=r"prior_rows=0\.5"):
        certify(posterior, cancer.train[:60])


def test_copies_from_another_source_are_recognised_by_their_values(
    classifier: GaussianPosterior, cancer: Dataset
) -> None:
    draws = DrawsPosterior(classifier.problem, classifier.unconstrained_draws(5)[None], {}, {})
    copies = (cancer.train.x[:20], cancer.train.y[:20])
    with pytest.raises(CertificateError, match="fitted on 20 of these 20 rows"):
        certify(draws, copies)
    with pytest.raises(DataDependentPrior, match="copies"):
        certify(classifier, copies, draws=10)
    assert certify(draws, (cancer.test.x, cancer.test.y)).n == len(cancer.test)


def test_fixed_scaler_and_prior_allow_the_bound_on_every_row() -> None:
    data = datasets.load("iris")
    scaled = ((data.x - 4) / 2, data.y)  # a pair is never scaled: nothing was learnt before the bound
    posterior = VI.fit(models.mlp(data, hidden=(3,)), scaled, seed=0, progress=False)
    certificate = certify(posterior, scaled, draws=300)
    assert (certificate.n, certificate.predictor) == (len(data.x), "gibbs")


def test_regression_is_certified_for_its_intervals_and_bounded_losses() -> None:
    data = datasets.load("diabetes")
    posterior = VI.fit(models.mlp(data, hidden=(3,)), data.train, prior_rows=0.5, seed=0, progress=False)
    misses = certify(posterior, data.train, draws=500)
    assert misses.loss == "miss of the central 90% interval"
    assert misses.bound < 0.6
    held_out = certify(posterior, data.test)
    low, high = posterior.predict(data.test.x).interval(0.9)
    assert held_out.errors == int(((data.test.y < low) | (data.test.y > high)).sum())
    absolute = certify(posterior, data.test, loss=bounded(lambda mean, y: (mean - y).abs(), 200.0))
    mean = posterior.predict(data.test.x).mean
    assert absolute.risk == pytest.approx(float((mean - data.test.y).abs().clamp(max=200).mean()) / 200, rel=1e-9)
    assert torch.isfinite(torch.tensor(absolute.bound))
