from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from bayesdl.bounds import (
    Certificate,
    ZeroOne,
    bounded,
    certify,
    chernoff_upper,
    clopper_pearson_upper,
    kl_divergence_gaussian,
    mcallester,
    pac_bayes_kl,
)
from bayesdl.data import Dataset, RowIds
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.posterior import Prediction
from tests.bounds.fakes import Thresholds, threshold_data

NONE = RowIds.concat([])


def parts(n: int = 200, seed: int = 0) -> tuple[Dataset, Dataset, Dataset]:
    """Rows of the prior, other rows fitted on, and rows never seen."""
    data = threshold_data(n, seed)
    return data[: n // 4], data[n // 4 : n // 2], data[n // 2 :]


def true_risk(mean: float, sd: float, flip: float) -> float:
    """E_t [flip + (1 - 2 flip) |Phi(t) - 1/2|] for t ~ N(mean, sd^2)."""
    nodes, weights = special.roots_hermitenorm(60)
    wrong = np.abs(stats.norm.cdf(mean + sd * nodes) - 0.5)
    return float(weights @ (flip + (1 - 2 * flip) * wrong) / weights.sum())


def test_hold_out_certificate_holds_the_exact_binomial_bound() -> None:
    reserved, fitted, unseen = parts()
    posterior = Thresholds(RowIds.concat([reserved.rows, fitted.rows]), None, kl=None)
    certificate = certify(posterior, unseen, delta=0.1)
    errors = int((posterior.predict(unseen.x).labels != unseen.y).sum())
    assert certificate.errors == errors
    assert certificate.bound == clopper_pearson_upper(errors=errors, n=100, delta=0.1)
    assert (certificate.theorem, certificate.predictor, certificate.n) == ("binomial tail", "mixture", 100)
    assert certificate.delta_split == {"bound": 0.1}
    assert certificate.kl is None
    assert certificate.risk_upper is None
    assert certificate.draws == 1000
    assert certify(posterior, unseen, draws=7).draws == 7


def test_pac_bayes_certificate_is_made_of_its_numbers() -> None:
    reserved, fitted, _ = parts()
    both = Dataset.concat([reserved, fitted])
    posterior = Thresholds(both.rows, reserved.rows, kl=2.0)
    certificate = certify(posterior, both, delta=0.05, draws=4000)
    split = certificate.delta_split
    assert sum(split.values()) <= 0.05
    assert sum(split.values()) == pytest.approx(0.05, rel=1e-12)
    assert certificate.n == 50
    assert certificate.predictor == "gibbs"
    assert "50 rows of the prior were left out" in certificate.reason
    assert 2.0 < certificate.kl < 2.0 + 1e-6
    t = 0.1 * torch.randn(200_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = ((fitted.x[:, 0] > t[:, None]).long() != fitted.y).double().mean(1)
    error = float(exact.std()) / math.sqrt(4000)
    assert certificate.risk == pytest.approx(float(exact.mean()), abs=4 * error)
    upper = float(chernoff_upper(risk=certificate.risk, n=4000, delta=split["monte_carlo"]))
    assert certificate.risk_upper == pytest.approx(upper, rel=1e-9)
    assert certificate.risk_upper >= upper
    bound = float(pac_bayes_kl(risk=certificate.risk_upper, kl=certificate.kl, n=50, delta=split["bound"]))
    assert certificate.bound == bound
    loose = certify(posterior, both, draws=4000, bound="mcallester")
    assert loose.bound == mcallester(risk=loose.risk_upper, kl=loose.kl, n=50, delta=loose.delta_split["bound"])
    assert loose.bound > certificate.bound


def test_gibbs_risk_averages_all_draws_once_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = threshold_data(50, seed=0)
    posterior = Thresholds(data.rows, NONE)
    certify(posterior, data, draws=100)
    assert len(posterior.seeds) == 2  # one to see the kind of target, one for all draws
    monkeypatch.setattr("bayesdl.bounds.risk.CELLS", 50 * 2 * 30)
    pieces = Thresholds(data.rows, NONE)
    certificate = certify(pieces, data, draws=100)
    assert len(set(pieces.seeds[1:])) == 4
    sizes = [30, 30, 30, 10]
    losses = [
        ((data.x[:, 0] > pieces.unconstrained_draws(size, seed)).long() != data.y).double()
        for size, seed in zip(sizes, pieces.seeds[1:], strict=True)
    ]
    assert certificate.risk == pytest.approx(float(torch.cat(losses).mean()), rel=1e-12)


def test_certificate_depends_on_the_seed_and_on_nothing_else() -> None:
    data = threshold_data(80, seed=0)
    posterior = Thresholds(data.rows, NONE)
    state = torch.random.get_rng_state()
    first, again, other = (certify(posterior, data, draws=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.risk != other.risk
    assert torch.equal(state, torch.random.get_rng_state())


def test_never_fitted_rows_need_no_divergence_even_if_there_is_one() -> None:
    reserved, fitted, unseen = parts()
    posterior = Thresholds(RowIds.concat([reserved.rows, fitted.rows]), reserved.rows, kl=3.0)
    assert certify(posterior, unseen).predictor == "mixture"
    gibbs = certify(posterior, unseen, bound="kl", draws=100)
    assert (gibbs.predictor, gibbs.n) == ("gibbs", 100)
    # Without reserved rows everything fitted on counts as the prior's: the bound's rows are the unseen ones.
    everything = Thresholds(RowIds.concat([reserved.rows, fitted.rows]), None, kl=3.0)
    assert certify(everything, unseen, bound="kl", draws=100).bound == gibbs.bound


def test_rows_seen_by_a_posterior_without_density_are_refused_with_their_number() -> None:
    reserved, fitted, unseen = parts()
    posterior = Thresholds(fitted.rows, None, kl=None)
    mixed = Dataset.concat([fitted[:7], unseen])
    with pytest.raises(CertificateError, match=r"fitted on 7 of these 107 rows.*no density.*data\.test") as refusal:
        certify(posterior, mixed)
    assert not isinstance(refusal.value, DataDependentPrior)
    with pytest.raises(CertificateError, match="fitted on 7 of these 107 rows"):
        certify(posterior, mixed, bound="holdout")
    with pytest.raises(CertificateError, match="no density"):
        certify(posterior, unseen, bound="kl")
    assert certify(posterior, reserved).n == 50


def test_identities_survive_shuffling_and_loading_twice() -> None:
    _, fitted, unseen = parts()
    posterior = Thresholds(parts()[1].shuffle(3).rows, None, kl=None)
    with pytest.raises(CertificateError, match="fitted on 1 of these 101 rows"):
        certify(posterior, Dataset.concat([unseen, fitted[10:11]]).shuffle(1))


def test_prior_that_saw_all_rows_is_refused_and_the_way_out_named() -> None:
    _, fitted, _ = parts()
    with pytest.raises(DataDependentPrior, match=r"fitted on 50 of these 50 rows.*prior_rows=0\.5"):
        certify(Thresholds(fitted.rows, None), fitted)
    with pytest.raises(DataDependentPrior, match="none is left for the bound"):
        certify(Thresholds(fitted.rows, fitted.rows), fitted[:20])


def test_infinite_or_wrong_divergence() -> None:
    data = threshold_data(40, seed=0)
    with pytest.raises(CertificateError, match="infinite KL"):
        certify(Thresholds(data.rows, NONE, kl=math.inf), data)
    with pytest.raises(CertificateError, match="divergence from its prior is nan"):
        certify(Thresholds(data.rows, NONE, kl=math.nan), data)
    with pytest.raises(CertificateError, match="divergence from its prior is -1"):
        certify(Thresholds(data.rows, NONE, kl=-1.0), data)


def test_repeated_rows_and_rows_without_identity_are_refused() -> None:
    _, fitted, unseen = parts()
    with pytest.raises(CertificateError, match=r"3 rows of .* more than once"):
        certify(Thresholds(fitted.rows, None), unseen[[0, 1, 2, 2, 2, 3, 3]])
    with pytest.raises(CertificateError, match="dict of arguments"):
        certify(Thresholds(None, None), unseen)


def test_data_standardised_by_rows_of_the_bound_are_refused() -> None:
    _, fitted, unseen = parts()
    with pytest.raises(DataDependentPrior, match=r"100 of the 100 rows.*standardised"):
        certify(Thresholds(fitted.rows, None), unseen.standardised())
    assert certify(Thresholds(fitted.rows, None), unseen.standardised(by=fitted)).n == 100


def test_another_task_or_other_classes_are_refused() -> None:
    _, fitted, unseen = parts()
    other = Dataset.from_arrays(unseen.x, unseen.y.double(), "regression")
    with pytest.raises(CertificateError, match="fitted for classification"):
        certify(Thresholds(fitted.rows, None), other)
    renamed = Dataset.from_arrays(unseen.x, np.where(unseen.y > 0, "b", "a"))
    with pytest.raises(CertificateError, match="classes a, b, the posterior 0, 1"):
        certify(Thresholds(fitted.rows, None), renamed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.0}, "delta must be strictly"),
        ({"delta": 1.0}, "delta must be strictly"),
        ({"delta": math.nan}, "delta is NaN"),
        ({"draws": 0}, "draws must be a whole number"),
        ({"bound": "tightest"}, "bound='tightest'"),
    ],
)
def test_arguments_out_of_their_domain(options: dict[str, object], words: str) -> None:
    _, fitted, unseen = parts()
    with pytest.raises(CertificateError, match=words):
        certify(Thresholds(fitted.rows, None), unseen, **options)


class Broken(ZeroOne):
    """Half a mistake, which no 0-1 loss knows."""

    def mixture(self, prediction: Prediction, y: Tensor) -> Tensor:
        return super().mixture(prediction, y) / 2


def test_losses_that_break_the_assumption_are_refused() -> None:
    _, fitted, unseen = parts()
    with pytest.raises(CertificateError, match=r"must be 0 or 1, got 0\.5"):
        certify(Thresholds(fitted.rows, None), unseen, loss=Broken())
    with pytest.raises(CertificateError, match=r"must be in \[0, 1\], got nan"):
        certify(Thresholds(fitted.rows, None), unseen, loss=bounded(lambda p, y: p[..., 0] * math.nan, 1.0))
    with pytest.raises(CertificateError, match="one value per row"):
        certify(Thresholds(fitted.rows, None), unseen, loss=bounded(lambda p, y: p, 1.0))


def test_other_losses_get_the_chernoff_bound() -> None:
    _, fitted, unseen = parts()

    def brier(probs: Tensor, y: Tensor) -> Tensor:
        return (probs[..., 1] - y) ** 2

    certificate = certify(Thresholds(fitted.rows, None, sd=1.0), unseen, loss=bounded(brier, 1.0))
    assert certificate.theorem == "Chernoff"
    assert certificate.loss == "min(1, max(0, brier) / 1)"
    upper = float(chernoff_upper(risk=certificate.risk, n=100, delta=0.05))
    assert certificate.bound >= upper
    assert certificate.bound == pytest.approx(upper, rel=1e-9)


def test_candidates_share_delta() -> None:
    _, fitted, unseen = parts()
    candidates = [Thresholds(fitted.rows, None, mean=mean) for mean in (-1.0, 0.0, 1.0)]
    together = certify(candidates, unseen, delta=0.06)
    assert [type(c) for c in together] == [Certificate] * 3
    assert sum(c.delta for c in together) <= 0.06
    for candidate, certificate in zip(candidates, together, strict=True):
        assert certificate.bound == certify(candidate, unseen, delta=certificate.delta).bound
        assert certificate.bound > certify(candidate, unseen, delta=0.06).bound
        assert "one of 3 candidates" in certificate.reason
    with pytest.raises(CertificateError, match="no posterior"):
        certify([], unseen)


def test_pac_bayes_certificates_hold_and_say_something() -> None:
    flip, sd, runs, delta = 0.1, 0.15, 150, 0.2
    failures, optimistic, slack = 0, 0, 0.0
    grid = torch.linspace(-1, 1, 81, dtype=torch.float64)
    for run in range(runs):
        data = threshold_data(100, seed=1000 + run, flip=flip)
        wrong = ((data.x > grid).long() != data.y[:, None]).double().mean(0)
        mean = float(grid[wrong.argmin()])  # fitted on the very rows of the bound
        kl = kl_divergence_gaussian(mean, sd, 0.0, 1.0)
        posterior = Thresholds(data.rows, NONE, mean=mean, sd=sd, kl=kl)
        certificate = certify(posterior, data, delta=delta, draws=500, seed=run)
        truth = true_risk(mean, sd, flip)
        failures += certificate.bound < truth
        optimistic += certificate.risk < truth
        slack += (certificate.bound - truth) / runs
    assert failures <= stats.binom.ppf(0.999, runs, delta)
    assert optimistic > runs / 3  # the empirical risk by itself is no bound
    assert slack < 0.2


def test_hold_out_certificates_hold_at_their_rate() -> None:
    flip, runs, delta = 0.1, 400, 0.2
    truth = true_risk(0.2, 1e-9, flip)
    seen = threshold_data(10, seed=0).rows
    bounds = [
        certify(Thresholds(seen, None, mean=0.2, sd=1e-9), threshold_data(60, seed=run), delta=delta, draws=1).bound
        for run in range(1, runs + 1)
    ]
    failures = sum(bound < truth for bound in bounds)
    assert failures <= stats.binom.ppf(0.999, runs, delta)
    # The bound is exact up to the grid of error counts: it fails about as often as the tail says it may.
    exact = stats.binom.cdf(np.arange(61), 60, truth)
    worst = exact[np.asarray(clopper_pearson_upper(errors=np.arange(61), n=60, delta=delta)) < truth].max()
    assert failures >= stats.binom.ppf(0.001, runs, worst)


def test_certificate_reads_well_and_goes_to_json() -> None:
    reserved, fitted, unseen = parts()
    both = Dataset.concat([reserved, fitted])
    posterior = Thresholds(both.rows, reserved.rows, kl=2.0)
    for certificate in (certify(posterior, both, draws=200), certify(posterior, unseen)):
        text, tex = certificate.statement(), certificate.statement("tex")
        printed = float(text.split("at most ")[1].split(".")[0] + "." + text.split("at most ")[1].split(".")[1])
        assert certificate.bound <= printed < certificate.bound + 1e-4
        assert "With probability at least 0.95" in text
        assert r"\delta" in tex
        assert f"n = {certificate.n}" in tex
        words = (certificate.theorem, certificate.loss, "assumes", "Thresholds")
        assert all(word in str(certificate) for word in words)
        back = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
        assert back["bound"] == certificate.bound
        assert back["statement"] == text
        assert not certificate.vacuous
    with pytest.raises(ValueError, match="'text' or 'tex'"):
        certificate.statement("html")


def test_tiny_delta_never_prints_as_certainty() -> None:
    _, fitted, unseen = parts()
    certificate = certify(Thresholds(fitted.rows, None), unseen, delta=1e-14)
    assert "probability at least 0.99999999999999 " in certificate.statement()


def test_a_share_of_delta_prints_in_few_digits_and_never_more_than_it_is() -> None:
    _, fitted, unseen = parts()
    for k, printed in ((5, "0.99"), (3, "0.9833333")):
        certificate = certify([Thresholds(fitted.rows, None)] * k, unseen, delta=0.05)[0]
        assert f"probability at least {printed} " in certificate.statement()
        assert float(printed) <= 1 - certificate.delta


class Learnt(Thresholds):
    """Its prior was learnt, and is almost the same predictor; its divergence makes PAC-Bayes useless."""

    def learnt_prior(self) -> Thresholds:
        return Thresholds(self.problem.rows, self.problem.prior_rows, sd=1e-9)


def test_the_best_of_several_roads_holds_because_they_share_delta() -> None:
    # At no errors the binomial bound is 1 - delta^(1/n): a true risk just above it is missed at the rate delta. Rows B
    # bound the prior, rows never fitted the mixture, so two independent chances to be lucky.
    runs, n, delta = 80, 30, 0.2
    risk = 1 - (delta / 3) ** (1 / n) + 1e-6
    failures = 0
    for run in range(runs):
        data = threshold_data(2 * n + 1, seed=5000 + run, flip=risk)
        posterior = Learnt(data[: n + 1].rows, data[:1].rows, sd=1e-9, kl=1e4)
        best = certify(posterior, data, delta=delta, draws=1, bound="best", progress=False)
        assert len(best.beside) == 2
        assert sum(best.delta_split.values()) <= delta
        failures += best.bound < risk
    assert 0 < failures <= stats.binom.ppf(0.999, runs, delta)
    # The smaller of two, each at the whole of delta, misses almost twice as often as delta.
    risk = 1 - delta ** (1 / n) + 1e-6
    errors = np.random.default_rng(0).binomial(n, risk, size=(20_000, 2)).min(1)
    assert float((clopper_pearson_upper(errors=errors, n=n, delta=delta) < risk).mean()) > 1.6 * delta
