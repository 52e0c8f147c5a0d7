"""The divergence of Gaussian processes, and certificates that rest on it."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath as mp
import pytest
import torch
from scipy import stats
from torch import Tensor

import bayesdl as bdl
from bayesdl.bounds import IntervalMiss, verify
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.infinite.divergence import site_kl, update_kl


def sites(n: int = 7, outputs: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    a = torch.randn(outputs, n, generator=generator, dtype=torch.float64)
    b = torch.rand(outputs, n, generator=generator, dtype=torch.float64) + 0.1
    return root @ root.T, a, b


def conditioned(covariance: mp.matrix, mean: mp.matrix, a: Tensor, b: Tensor) -> tuple[mp.matrix, mp.matrix]:
    """Mean and covariance given sites, through the precision matrix."""
    inverse = covariance**-1
    after = (inverse + mp.diag(b.tolist())) ** -1
    return after * (inverse * mean + mp.matrix(a.tolist())), after


def gaussian_kl(m: mp.matrix, s: mp.matrix, m0: mp.matrix, s0: mp.matrix) -> float:
    inverse, away = s0**-1, m - m0
    ratio = inverse * s
    trace = sum(ratio[i, i] for i in range(s.rows))
    return float((trace - s.rows + (away.T * inverse * away)[0] - mp.log(mp.det(ratio))) / 2)


def test_divergence_is_that_of_the_gaussians_at_the_inputs() -> None:
    covariance, a, b = sites()
    early = torch.tensor([True, False, True, True, False, False, False])
    found, update = site_kl(covariance, a, b), update_kl(covariance, a, b, early)
    with mp.workdps(40):
        k, zero = mp.matrix(covariance.tolist()), mp.zeros(7, 1)
        for c in range(2):
            everything = conditioned(k, zero, a[c], b[c])
            assert float(found[c]) == pytest.approx(gaussian_kl(*everything, zero, k), rel=1e-11)
            # Sites of precision 0 leave the prior as it is: the early posterior at all seven inputs.
            first = conditioned(k, zero, a[c] * early, b[c] * early)
            assert float(update[c]) == pytest.approx(gaussian_kl(*everything, *first), rel=1e-11)


def test_divergence_survives_a_singular_kernel_and_vanishes_without_information() -> None:
    covariance, a, b = sites()
    twice = covariance[[0, 0, 1]][:, [0, 0, 1]]
    # Two sites at one input are one site of their sum.
    merged_a, merged_b = (torch.stack([v[:, 0] + v[:, 1], v[:, 2]], 1) for v in (a[:, :3], b[:, :3]))
    apart = site_kl(twice, a[:, :3], b[:, :3])
    torch.testing.assert_close(apart, site_kl(covariance[:2, :2], merged_a, merged_b), rtol=1e-10, atol=0)
    nothing = site_kl(covariance, a * 1e-9, b * 1e-12)
    assert float(nothing.abs().max()) < 1e-12


@pytest.fixture(scope="module")
def regression() -> bdl.Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(120, 1, generator=generator, dtype=torch.float64) * 4 - 2
    y = torch.sin(2 * x[:, 0]) + 0.2 * torch.randn(120, generator=generator, dtype=torch.float64)
    return bdl.Dataset.from_arrays(x, y, "regression")


def test_nngp_regression_is_certified_with_half_of_the_rows_as_prior(regression: bdl.Dataset, tmp_path: Path) -> None:
    model = bdl.models.mlp(regression, hidden=(20,), activation="relu")
    posterior = bdl.fit(model, regression, bdl.NNGP(), prior_rows=0.5, seed=0, progress=False)
    assert posterior.info["hyperparameters_from"] == "prior rows"
    certificate = bdl.certify(posterior, regression, draws=2000, progress=False)
    assert (certificate.n, certificate.predictor, certificate.method) == (60, "gibbs", "NNGP")
    assert certificate.kl == pytest.approx(posterior.kl(), rel=1e-8)
    # The risk in closed form: a draw f ~ N(m, v) misses where |y - f| > z sigma.
    later = regression.subset(~regression.rows.isin(posterior.problem.prior_rows))
    prediction = posterior.predict(later.x)
    m, sd, noise = prediction.mean, prediction.epistemic.sqrt(), prediction.aleatoric.sqrt()
    reach = IntervalMiss().level
    z = float(stats.norm.ppf(0.5 + reach / 2))
    hit = stats.norm.cdf((later.y - m + z * noise) / sd) - stats.norm.cdf((later.y - m - z * noise) / sd)
    assert certificate.risk == pytest.approx(float((1 - hit).mean()), abs=0.005)
    # The process given the prior's rows alone stands beside.
    beside = certificate.beside[0]
    alone = bdl.fit(model, regression.subset(regression.rows.isin(posterior.problem.prior_rows)),
                    bdl.NNGP(), seed=0, progress=False)  # fmt: skip
    low, high = alone.predict(later.x).interval(0.9)
    assert (beside.predictor, beside.errors) == ("prior", int(((later.y < low) | (later.y > high)).sum()))
    assert "of new cases lie in the 90% band" in str(certificate)
    with_file = certificate.save(tmp_path / "cert.json")
    assert verify.main([str(with_file)]) == 0
    again = bdl.load(posterior.save(tmp_path / "run"), model)
    assert again.kl() == pytest.approx(posterior.kl(), rel=1e-10)


def test_nngp_classifier_is_certified_on_all_rows_where_nothing_was_learnt() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.3 * torch.randn(80, generator=generator, dtype=torch.float64) > 0).long()
    data = bdl.Dataset.from_arrays(x, y)
    model = bdl.models.mlp(data, hidden=(20,), activation="relu")
    posterior = bdl.fit(model, (x, y), bdl.NNGP(), seed=0, progress=False)
    certificate = bdl.certify(posterior, (x, y), draws=1000, progress=False)
    assert (certificate.n, certificate.beside) == (80, ())
    assert set(certificate.kl_parts) == {"latent function 0", "rounding"}
    assert certificate.bound < 0.5
    with pytest.raises(DataDependentPrior, match="shaped its scaler"):
        bdl.certify(bdl.fit(model, data, bdl.NNGP(), seed=0, progress=False), data)


def test_hyperparameters_learnt_on_the_rows_of_the_bound_are_refused(regression: bdl.Dataset) -> None:
    pair = (regression.x, regression.y)
    model = bdl.models.mlp(regression, hidden=(20,), activation="relu")
    posterior = bdl.fit(model, pair, bdl.NNGP(), seed=0, progress=False)
    assert posterior.kl() is None
    with pytest.raises(CertificateError, match="kernel or noise were fitted to the same rows"):
        bdl.certify(posterior, pair)
    stated = bdl.fit(model, pair, bdl.NNGP(noise=0.2), seed=0, progress=False)
    assert math.isfinite(stated.kl())


def test_independent_draws_are_not_the_even_ones_of_predict(regression: bdl.Dataset) -> None:
    model = bdl.models.mlp(regression, hidden=(20,), activation="relu")
    posterior = bdl.fit(model, (regression.x, regression.y), bdl.NNGP(noise=0.2), progress=False)
    x = regression.x[:3]
    draws = posterior.sampler(x)(4000, 5).mean_by_draw
    prediction = posterior.predict(x)
    error = prediction.epistemic.sqrt() / 4000**0.5
    assert bool(((draws.mean(0) - prediction.mean).abs() < 4 * error).all())
    torch.testing.assert_close(draws.var(0), prediction.epistemic, rtol=0.1, atol=0)
