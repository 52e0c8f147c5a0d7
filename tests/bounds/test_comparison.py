from __future__ import annotations

import math
import re

import pytest

from bayesdl.bounds import (
    bounded,
    catoni,
    certify,
    chernoff_upper,
    clopper_pearson_upper,
    compare_bounds,
    pac_bayes_kl,
    tandem,
)
from bayesdl.data import RowIds
from bayesdl.errors import CertificateError
from tests.bounds.fakes import Thresholds, threshold_data

DATA = threshold_data(300, seed=0)
NONE = RowIds.concat([])


def test_each_column_is_what_certify_gives_at_its_delta() -> None:
    posterior = Thresholds(DATA[:200].rows, NONE, kl=2.0)
    found = compare_bounds(posterior, DATA, draws=400, progress=False)
    assert list(found.each) == [
        "kl", "quadratic", "mcallester", "catoni", "bernstein", "vote", "tandem", "holdout, mixture"
    ]  # fmt: skip
    for name in ("kl", "catoni", "tandem"):
        alone = certify(posterior, DATA, draws=400, bound=name, progress=False)
        assert (found.each[name].bound, found.each[name].risk) == (alone.bound, alone.risk)
    k = len(found.events)
    assert found.events == ("PAC-Bayes-kl", "Catoni", "empirical Bernstein", "tandem", "holdout, mixture")
    for name in ("quadratic", "tandem"):
        shared = certify(posterior, DATA, delta=0.05 / k, draws=400, bound=name, progress=False)
        assert found.shared[name].bound == pytest.approx(shared.bound, rel=1e-12)
    held = found.each["holdout, mixture"]
    assert held.bound == clopper_pearson_upper(errors=held.errors, n=100, delta=0.05)
    assert sum({event: 0.05 / k for event in found.events}.values()) <= 0.05 * (1 + 1e-12)
    assert found.best.bound == min(certificate.bound for certificate in found.shared.values())
    text = str(found)
    assert re.search(r"quadratic .*gibbs .*PAC-Bayes-kl", text)
    assert "costs delta / 5" in text


def test_votes_are_left_out_where_nothing_votes_and_pictures_need_a_divergence() -> None:
    posterior = Thresholds(DATA.rows, NONE, kl=2.0)
    loss = bounded(lambda p, y: (p[..., 1] - y) ** 2, 1.0)
    found = compare_bounds(posterior, DATA, loss=loss, draws=50, progress=False)
    assert "vote" not in found.each
    assert "tandem" not in found.each
    with pytest.raises(CertificateError, match="ZeroOne"):
        certify(posterior, DATA, loss=loss, bound="vote", draws=50)
    with pytest.raises(CertificateError, match="pairs of draws"):
        certify(posterior, DATA, bound="tandem", draws=1)


def test_a_posterior_without_divergence_has_the_hold_out_bound_alone() -> None:
    found = compare_bounds(Thresholds(DATA[:200].rows, None, kl=None), DATA[200:])
    assert list(found.each) == ["holdout, mixture"]
    assert found.best == certify(Thresholds(DATA[:200].rows, None, kl=None), DATA[200:])
    with pytest.raises(CertificateError, match="Only hold-out bounds"):
        found.plot()


def test_the_tandem_risk_is_that_of_pairs_of_draws() -> None:
    # A draw t errs on the rows between t and 0, and on flipped rows outside: pairs of draws of opposite signs differ.
    posterior = Thresholds(DATA.rows, NONE, sd=1.0, kl=2.0)
    found = certify(posterior, DATA, bound="tandem", draws=20_000, progress=False)
    t = posterior.unconstrained_draws(3000, seed=7)[:, 0]
    wrong = ((DATA.x[:, 0] > t[:, None]).long() != DATA.y).double().mean(0)
    assert found.risk == pytest.approx(float((wrong**2).mean()), abs=0.01)
    assert found.predictor == "majority vote"
    split = found.delta_split
    upper = float(chernoff_upper(risk=found.risk, n=10_000, delta=split["monte_carlo"]))
    assert found.bound == pytest.approx(float(tandem(risk=upper, kl=found.kl, n=300, delta=split["bound"])), rel=1e-9)


def test_the_curves_go_through_the_bounds() -> None:
    pytest.importorskip("matplotlib")
    posterior = Thresholds(DATA.rows, NONE, kl=2.0)
    found = compare_bounds(posterior, DATA, draws=50, progress=False)
    panels = found.plot().axes
    assert [axes.get_xlabel() for axes in panels] == ["rows of the bound n", "KL (nats)", "empirical risk"]
    curves = {line.get_label(): line for line in panels[2].lines if not str(line.get_label()).startswith("_")}
    assert set(curves) == set(found.each)
    cert = found.each["kl"]
    x, y = curves["kl"].get_data()
    for risk, bound in zip(x, y, strict=True):
        exact = pac_bayes_kl(risk=risk, kl=cert.kl, n=cert.n, delta=cert.delta_split["bound"])
        assert bound == pytest.approx(float(exact), rel=1e-12)


def test_a_vacuous_certificate_says_which_term_dominates() -> None:
    far = certify(Thresholds(DATA.rows, NONE, kl=5000.0), DATA, draws=200, progress=False)
    assert far.vacuous
    assert far.terms["KL"] == pytest.approx(math.sqrt(far.kl / 600), rel=1e-12)
    assert re.search(r"vacuous +the KL dominates \(risk 0\.\d+, KL 2\.887, confidence 0\.\d+.*prior_rows", str(far))
    right = DATA[200:].subset((DATA[200:].x[:, 0] > 0) == (DATA[200:].y > 0))[:1]
    few = certify(Thresholds(DATA[:200].rows, None, sd=1e-9), right, delta=1e-7)
    assert few.errors == 0
    assert "the confidence dominates" in str(few)
    wrong = certify(Thresholds(DATA.rows, NONE, mean=50.0, kl=0.0), DATA, bound="tandem", draws=200, progress=False)
    assert "the risk dominates" in str(wrong)
    assert float(catoni(risk=wrong.risk_upper, kl=wrong.kl, n=300, delta=0.04)) < 1
