"""Certificates of posteriors that were really fitted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesdl import data as datasets
from bayesdl import models
from bayesdl.bounds import bounded, certify, kl_divergence_gaussian, verify
from bayesdl.data import Dataset
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.infer.laplace import Laplace
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
    certificate = certify(classifier, cancer.train, seed=1)
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
    error = float(risk.std()) / 1000**0.5 + (0.05 / certificate.draws) ** 0.5
    assert certificate.risk == pytest.approx(float(risk.mean()), abs=4 * error)


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


def test_a_prior_chosen_by_the_rows_of_the_bound_is_refused() -> None:
    data = datasets.load("iris")
    pair = ((data.x - 4) / 2, data.y)
    fitted = MeanFieldVI(steps=1).fit(models.mlp(data, hidden=(2,)), pair, seed=0, progress=False)
    assert isinstance(fitted, GaussianPosterior)
    problem = fitted.problem.with_prior_by_rows(fitted.mean, fitted.sd)
    with pytest.raises(DataDependentPrior, match="none is left for the bound"):
        certify(GaussianPosterior(problem, fitted.law, {}), pair, draws=10)


@pytest.mark.slow
def test_a_prior_tuned_by_laplace_is_refused_on_its_rows() -> None:
    data = datasets.load("iris")
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    pair = ((data.x[order] - 4) / 2, data.y[order])
    fitted = Laplace(steps=5, rounds=1, structure="diag", tune="prior", predictive="sampled").fit(
        models.mlp(data, hidden=(2,)), (pair[0][:100], pair[1][:100]), seed=0, progress=False
    )
    assert fitted.kl() is not None
    with pytest.raises(DataDependentPrior, match="none is left for the bound"):
        certify(fitted, (pair[0][:100], pair[1][:100]), draws=10)
    # Rows that nothing has seen may still be bounded, against the tuned prior.
    assert certify(fitted, (pair[0][100:], pair[1][100:]), draws=10, bound="kl").n == 50


def test_a_certificate_knows_the_prior_beside_it_and_the_parts_of_its_divergence(
    classifier: GaussianPosterior, cancer: Dataset, tmp_path: Path
) -> None:
    certificate = certify(classifier, cancer.train, draws=300, seed=1)
    rest = cancer.train.subset(~cancer.train.rows.isin(classifier.problem.prior_rows))
    alone = classifier.learnt_prior()
    assert alone is not None
    (beside,) = certificate.beside
    assert (beside.predictor, beside.n) == ("prior", len(rest))
    assert beside.errors == int((alone.predict(rest.x).labels != rest.y).sum())
    assert set(certificate.kl_parts) == {"0.weight", "0.bias", "2.weight", "2.bias", "between sites", "rounding"}
    assert certificate.kl_parts["between sites"] == pytest.approx(0, abs=1e-9)
    assert all(part > -1e-9 for part in certificate.kl_parts.values())
    best = certify(classifier, cancer.train, draws=300, seed=1, bound="best")
    halves = [certify(classifier, cancer.train, draws=300, seed=1, delta=0.025), beside]
    assert best.bound == pytest.approx(min(halves[0].bound, halves[0].beside[0].bound), rel=1e-12)
    assert (best.delta, sum(best.delta_split.values())) == (0.05, pytest.approx(0.05, rel=1e-12))
    assert sum(best.delta_split.values()) <= 0.05
    path = certify(classifier, cancer[:400], draws=100).save(tmp_path / "cert.json")
    np.savez(tmp_path / "rows.npz", x=cancer.x, y=cancer.y)
    assert verify.main([str(path), "--data", str(tmp_path / "rows.npz")]) == 0
    np.savez(tmp_path / "rows.npz", x=cancer.x[:300], y=cancer.y[:300])
    assert verify.main([str(path), "--data", str(tmp_path / "rows.npz")]) == 1


def test_regression_is_certified_for_its_intervals_and_bounded_losses() -> None:
    data = datasets.load("diabetes")
    posterior = VI.fit(models.mlp(data, hidden=(3,)), data.train, prior_rows=0.5, seed=0, progress=False)
    misses = certify(posterior, data.train, draws=500)
    assert misses.loss == "miss of the central 90% interval"
    assert misses.bound < 0.6
    held_out = certify(posterior, data.test)
    share = 100 * (1 - held_out.bound)
    words = re.search(
        r"with confidence 95% at least ([\d.]+)% of new cases lie in the 90% band of posterior", str(held_out)
    )
    assert words is not None
    assert share - 0.1 <= float(words[1]) <= share
    assert words[0] in held_out.statement()
    assert "% of new cases lie in the 90% band of the Gibbs predictor" in misses.statement()
    low, high = posterior.predict(data.test.x).interval(0.9)
    assert held_out.errors == int(((data.test.y < low) | (data.test.y > high)).sum())
    absolute = certify(posterior, data.test, loss=bounded(lambda mean, y: (mean - y).abs(), 200.0))
    mean = posterior.predict(data.test.x).mean
    assert absolute.risk == pytest.approx(float((mean - data.test.y).abs().clamp(max=200).mean()) / 200, rel=1e-9)
    assert torch.isfinite(torch.tensor(absolute.bound))
