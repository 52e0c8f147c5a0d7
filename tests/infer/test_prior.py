"""Yesterday's posterior as today's prior: exact where the answer is known, refused where it means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.density import LogDensity
from bayesdl.errors import CertificateError, DataDependentPrior, DataError, MethodError, ModelError, ModelMismatch
from bayesdl.posterior import GaussianPosterior, prepare
from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, Kronecker, LowRank
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.prior import prior_law, with_prior_law
from tests.cases import DOUBLE, Conjugate, conjugate, dataset, network, program

STREAM = torch.Generator().manual_seed(3)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=STREAM, dtype=DOUBLE)


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(randn(n, n)).Q


STRUCTURES: dict[str, Covariance] = {
    "diagonal": Diagonal(0.3 + randn(3).abs()),
    "low rank": LowRank(0.3 + randn(3).abs(), randn(3, 2)),
    "dense": Dense.of(torch.eye(3, dtype=DOUBLE) + (lambda a: a @ a.T)(randn(3, 3))),
    "Kronecker": Kronecker(torch.ones(1, 1, dtype=DOUBLE), rotation(3), 0.3 + randn(1, 3).abs()),
    "blocks": Blocks((Diagonal(torch.full((1,), 0.5, dtype=DOUBLE)), Dense.of(torch.eye(2, dtype=DOUBLE) + 0.4))),
}


def part(first: int, last: int) -> Conjugate:
    whole = conjugate()
    return Conjugate(whole.x[first:last], whole.y[first:last])


def exact(data: Conjugate) -> GaussianPosterior:
    """The exact posterior, as a method would return it."""
    problem = prepare(data.network(), data.data)
    return GaussianPosterior(problem, Normal(data.mean(), Dense.of(data.covariance())), {"method": "by hand"})


# -- the density -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "execution"),
    [(structure, way) for structure in STRUCTURES for way in ("replay", "handlers", "loop")]
    + [pytest.param(structure, "compile", marks=pytest.mark.slow) for structure in STRUCTURES],
)
def test_value_and_gradient_under_a_prior_of_any_structure(structure: str, execution: Any) -> None:
    law = Normal(torch.tensor([0.2, -0.1, 0.4], dtype=DOUBLE), STRUCTURES[structure])
    data = part(0, 20)
    own = LogDensity(data.network(), {"x": data.x, "y": data.y}, execution=execution)
    density, z = with_prior_law(own, law), randn(4, 3)
    leaf = z.clone().requires_grad_()
    matrix = law.covariance.dense()
    want = torch.distributions.Normal(leaf @ data.x.T, data.sigma).log_prob(data.y).sum(-1)
    want = want + torch.distributions.MultivariateNormal(law.mean, matrix).log_prob(leaf)
    (slope,) = torch.autograd.grad(want.sum(), leaf)
    if execution == "compile":
        assert density.expect(10, z) == "compile"
    value, gradient = density.value_and_grad(z)
    torch.testing.assert_close(value, want.detach(), rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(density.log_density(z), want.detach(), rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(
        density.log_prior(z), torch.distributions.MultivariateNormal(law.mean, matrix).log_prob(z)
    )
    draws = density.prior_draws(20_000)
    # Of 20,000 draws the covariance is known to about 1 in 100 of the variances.
    assert (torch.cov(draws.T) - matrix).abs().max() < 0.04 * matrix.diagonal().max()
    assert (draws.mean(0) - law.mean).abs().max() < 0.03 * matrix.diagonal().max().sqrt()
    found = prior_law(density)
    assert found is not None
    assert float(found.kl(law)) == pytest.approx(0.0, abs=1e-12)
    assert (density.gaussian_prior() is None) == (structure != "diagonal")


def test_rows_are_weighed_and_the_prior_is_not() -> None:
    """A mini-batch stands for all rows N/B times; the prior, whatever its structure, counts once."""
    law = Normal(torch.zeros(3, dtype=DOUBLE), STRUCTURES["dense"])
    data = part(0, 20)
    density = with_prior_law(LogDensity(data.network(), {"x": data.x, "y": data.y}), law)
    z = randn(2, 3)
    halves = [density.value_and_grad(z, {"x": data.x[rows], "y": data.y[rows]}) for rows in (slice(10), slice(10, 20))]
    value, gradient = density.value_and_grad(z)
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, value)
    torch.testing.assert_close((halves[0][1] + halves[1][1]) / 2, gradient)


# -- two batches are one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [20, 45])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_mode_under_the_posterior_of_a_first_batch_is_that_of_all_rows(cut: int, backwards: bool) -> None:
    batches = [part(0, cut), part(cut, 60)]
    first, second = reversed(batches) if backwards else batches
    found = bdl.fit(second.network(), second.data, bdl.MAP(steps=60, optimizer="lbfgs"), prior=exact(first))
    torch.testing.assert_close(found.draws()["weight"].flatten(), conjugate().mean(), rtol=0, atol=1e-8)
    assert (exact(first).mean - conjugate().mean()).abs().max() > 1e-2


def test_a_diagonal_prior_gives_elastic_weight_consolidation() -> None:
    """MAP under N(m, diag 1/F) minimises loss + 1/2 sum F (w - m)^2."""
    first, second = part(0, 30), part(30, 60)
    fisher = first.precision().diagonal()
    prior = GaussianPosterior(exact(first).problem, Normal(first.mean(), Diagonal(fisher.rsqrt())), {})
    found = bdl.fit(second.network(), second.data, bdl.MAP(steps=60, optimizer="lbfgs"), prior=prior)
    matrix = second.x.T @ second.x / second.sigma**2 + fisher.diag()
    want = torch.linalg.solve(matrix, second.x.T @ second.y / second.sigma**2 + fisher * first.mean())
    torch.testing.assert_close(found.draws()["weight"].flatten(), want, rtol=0, atol=1e-8)


def test_samplers_take_the_prior() -> None:
    first, second = part(0, 30), part(30, 60)
    method = bdl.HMC(chains=32, warmup=60, draws=50, leapfrog_steps=8)
    draws = bdl.fit(second.network(), second.data, method, prior=exact(first)).draws()["weight"].flatten(1)
    off = (draws.mean(0) - conjugate().mean()) / conjugate().covariance().diagonal().sqrt()
    assert off.abs().max() < 0.15  # 1,600 draws, at least 800 of them worth something: 4 standard errors
    torch.testing.assert_close(torch.cov(draws.T), conjugate().covariance(), rtol=0.2, atol=5e-4)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_mean_field_under_an_earlier_posterior(structure: str) -> None:
    first, second = part(0, 30), part(30, 60)
    before = first.precision().diagonal().rsqrt()
    prior = exact(first)
    if structure == "diagonal":
        prior = GaussianPosterior(prior.problem, Normal(first.mean(), Diagonal(before)), {})
    precision = second.x.T @ second.x / second.sigma**2 + torch.linalg.inv(prior.law.covariance.dense())
    right = second.x.T @ second.y / second.sigma**2 + prior.law.covariance.solve(prior.law.mean)
    found = bdl.fit(second.network(), second.data, bdl.MeanFieldVI(steps=1200), prior=prior, seed=1)
    sd = precision.diagonal().rsqrt()
    assert ((found.mean - torch.linalg.solve(precision, right)) / sd).abs().max() < 0.03
    torch.testing.assert_close(found.sd, sd, rtol=0.03, atol=0)
    want = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(found.mean, found.sd.square().diag()),
        torch.distributions.MultivariateNormal(prior.law.mean, prior.law.covariance.dense()),
    )
    assert found.kl() == pytest.approx(float(want), rel=1e-9)


# -- units, rows, files ----------------------------------------------------------------------------------------------

VI = bdl.MeanFieldVI(steps=30, samples=2)


def halves(kind: str = "regression") -> tuple[bdl.Dataset, bdl.Dataset]:
    """The second half has other means and scales than the first."""
    data = dataset(kind)
    order = data.x[:, 0].argsort()
    return data.subset(order[:16]), data.subset(order[16:])


def test_the_first_scaler_is_kept() -> None:
    one, two = halves()
    model = network("regression")
    first = bdl.fit(model, one, VI, init="prior")
    pair = (two.x, two.y)  # raw numbers like those of the Dataset, and the same rows
    for data in (two, pair):
        second = bdl.fit(model, data, VI, prior=first)
        scaler, own = second.problem.scaler.state(), first.problem.scaler.state()
        assert all(torch.equal(scaler[name], own[name]) for name in own)
        assert second.units == "scaled"
        torch.testing.assert_close(second.problem.batch["x"], first.problem.scaler.x(two.x))
        torch.testing.assert_close(second.problem.batch["y"], first.problem.scaler.y(two.y))
    assert not torch.allclose(bdl.fit(model, two, VI, init="prior").problem.batch["x"], second.problem.batch["x"])


def test_a_fit_starts_at_the_mean_of_its_prior() -> None:
    one, two = halves()
    first = bdl.fit(network("regression"), one, VI, init="prior")
    still = bdl.fit(network("regression"), two, bdl.MAP(steps=1, learning_rate=1e-12), prior=first)
    torch.testing.assert_close(still.unconstrained_draws()[0], first.mean, rtol=0, atol=1e-9)
    elsewhere = bdl.fit(network("regression"), two, bdl.MAP(steps=1, learning_rate=1e-12), prior=first, init="prior")
    assert not torch.allclose(elsewhere.unconstrained_draws()[0], first.mean)


def test_the_rows_that_the_prior_has_seen_are_known() -> None:
    data = dataset("binary")
    model = network("binary")
    parts = [data.subset(range(first, first + 8)) for first in (0, 8, 16)]
    posterior = bdl.fit(model, parts[0], VI, init="prior")
    for rows in parts[1:]:
        posterior = bdl.fit(model, rows, VI, prior=posterior)
    problem = posterior.problem
    assert problem.rows == parts[2].rows
    assert problem.prior_rows == data.subset(range(16)).rows
    assert posterior.info["prior"] == {"method": "MeanFieldVI", "rows": 8}
    certificate = bdl.certify(posterior, parts[2], draws=100, progress=False)
    assert (certificate.theorem, certificate.n) == ("PAC-Bayes-kl", 8)
    assert certificate.kl == pytest.approx(posterior.kl(), rel=1e-6)
    # Of all rows only those of the last fit, and those that nobody has seen, are left for a bound.
    assert bdl.certify(posterior, data, draws=100, progress=False).n == 16
    for seen in parts[:2]:
        with pytest.raises(DataDependentPrior, match="belong to the rows of the prior"):
            bdl.certify(posterior, seen, progress=False)
    assert bdl.certify(posterior, data.subset(range(24, 32)), progress=False).theorem == "binomial tail"


def test_rows_of_a_dict_are_unknown_for_ever() -> None:
    one, two = part(0, 30), part(30, 60)
    first = bdl.fit(one.program, {"x": one.x, "y": one.y}, VI, init="prior")
    second = bdl.fit(two.program, two.data, VI, prior=first)
    assert (second.problem.rows, second.problem.prior_rows) == (None, None)
    with pytest.raises(CertificateError, match="no identity"):
        bdl.certify(second, (one.x, one.y), progress=False)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_a_posterior_with_an_earlier_one_as_its_prior_is_saved_and_loaded(structure: str, tmp_path: Path) -> None:
    one, two = halves()
    model = network("regression")
    first = bdl.fit(model, one, VI, init="prior")
    if structure == "dense":
        spread = Dense.of(first.law.covariance.dense() + 1e-3)
        first = GaussianPosterior(first.problem, Normal(first.mean, spread), first.info)
    for name, method in {"vi": VI, "map": bdl.MAP(steps=20), "nuts": bdl.NUTS(chains=2, warmup=10, draws=5)}.items():
        second = bdl.fit(model, two, method, prior=first, init="prior")
        loaded = bdl.load(second.save(tmp_path / name))
        law, again = prior_law(second.problem.density), prior_law(loaded.problem.density)
        assert law is not None
        assert again is not None
        for key, value in law.tensors().items():
            assert torch.equal(value, again.tensors()[key])
        torch.testing.assert_close(law.mean, first.mean, rtol=0, atol=0)
        assert loaded.problem.prior_rows == second.problem.prior_rows == one.rows.unique()[0]
        assert torch.equal(loaded.predict(two.x).mean, second.predict(two.x).mean)
        assert loaded.kl() == second.kl()
        loaded.save(tmp_path / "again")
        for file in ("posterior.json", "posterior.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_a_loaded_posterior_is_a_prior_too(tmp_path: Path) -> None:
    one, two = halves()
    first = bdl.fit(network("regression"), one, VI, init="prior")
    loaded = bdl.load(first.save(tmp_path))
    second, again = (bdl.fit(network("regression"), two, VI, prior=prior) for prior in (first, loaded))
    assert torch.equal(second.mean, again.mean)
    assert second.problem.prior_rows == again.problem.prior_rows


def test_chains_under_a_prior_are_extended(tmp_path: Path) -> None:
    one, two = part(0, 30), part(30, 60)
    short, long = (bdl.NUTS(chains=2, warmup=20, draws=draws) for draws in (5, 12))
    whole = bdl.fit(two.network(), two.data, long, prior=exact(one))
    begun = bdl.fit(two.network(), two.data, short, prior=exact(one))
    assert torch.equal(bdl.extend(begun, 7).draws()["weight"], whole.draws()["weight"])
    loaded = bdl.load(begun.save(tmp_path))
    assert torch.equal(bdl.extend(loaded, 7, data=two.data).draws()["weight"], whole.draws()["weight"])


def test_early_stopping_keeps_the_prior() -> None:
    first, second = part(0, 30), part(30, 60)
    problem = bdl.fit(second.network(), second.data, bdl.MAP(steps=1), prior=exact(first)).problem
    some = problem.restrict(torch.arange(5))
    law = prior_law(some.density)
    assert law is not None
    assert torch.equal(law.mean, first.mean())
    z = randn(2, 3)
    torch.testing.assert_close(some.density.log_prior(z), problem.density.log_prior(z))


def test_a_fit_with_a_prior_resumes(tmp_path: Path) -> None:
    first, second = part(0, 30), part(30, 60)
    whole = bdl.fit(second.network(), second.data, VI, prior=exact(first))
    bdl.fit(second.network(), second.data, VI, prior=exact(first), checkpoint=tmp_path / "run",
            callback=lambda state: state["step"] == 12)  # fmt: skip
    resumed = bdl.fit(second.network(), second.data, VI, prior=exact(first), checkpoint=tmp_path / "run")
    assert torch.equal(resumed.mean, whole.mean)
    with pytest.raises(bdl.errors.ResumeMismatch):
        bdl.fit(second.network(), second.data, VI, prior=exact(part(0, 20)), checkpoint=tmp_path / "run")


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_no_prior_is_refused() -> None:
    data = part(30, 60)
    good = exact(part(0, 30))
    point = GaussianPosterior(good.problem, Normal(good.mean, Diagonal(torch.tensor([0.1, 0.0, 0.1]).double())), {})

    def refused(error: type[Exception], match: str, method: bdl.Method = VI, **options: Any) -> None:
        with pytest.raises(error, match=match):
            bdl.fit(data.network(), data.data, method, **options)

    refused(MethodError, "only a Gaussian posterior", prior=bdl.fit(data.network(), part(0, 30).data, bdl.MAP(steps=2)))
    refused(MethodError, "only a Gaussian posterior", prior=3.0)
    refused(MethodError, r"point at 1 of its 3 coordinates \(in \['weight'\]\)", prior=point)
    refused(MethodError, "choose one", prior=good, prior_rows=0.5)
    refused(MethodError, "temper", bdl.MeanFieldVI(temperature=2.0), prior=good)
    for method in (bdl.MaximumLikelihood(), bdl.GP(), bdl.NNGP()):
        refused(MethodError, "takes no prior=", method, prior=good)
    refused(MethodError, "independent Gaussian", bdl.EllipticalSlice(), prior=good)
    with pytest.raises(DataError, match="learnt from 30 of these 60 rows|learnt from 30 of these 30 rows"):
        bdl.fit(data.network(), part(0, 30).data, VI, prior=good)
    with pytest.raises(ModelMismatch, match=r"w: \[2\] instead of None"):
        bdl.fit(program, (data.x[:, :2], data.y), VI, prior=good)
    wider = bdl.BayesianNetwork(torch.nn.Linear(4, 1, bias=False).double())
    with pytest.raises(DataError, match="columns|shape"):
        bdl.fit(wider, (data.x, data.y), VI, prior=good)
    x = torch.cat([data.x, data.x[:, :1]], 1)
    with pytest.raises((ModelMismatch, DataError), match=r"weight: \[1, 4\] instead of \[1, 3\]|columns"):
        bdl.fit(wider, (x, data.y), VI, prior=good)


def test_other_classes_are_refused() -> None:
    x, first = dataset("binary").x, dataset("binary")
    posterior = bdl.fit(network("binary"), first.subset(range(16)), VI, init="prior")
    other = bdl.Dataset.from_arrays(x[16:] + 1.0, ["up" if k % 2 else "down" for k in range(16)])
    with pytest.raises(DataError, match="classes down, up"):
        bdl.fit(network("binary"), other, VI, prior=posterior)


def test_latents_of_the_rows_cannot_be_carried_over() -> None:
    import pyro
    import pyro.distributions as dist

    def local(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            f = pyro.sample("f", dist.Normal(torch.zeros(len(x), dtype=DOUBLE), 1.0))
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    x, y = randn(6, 1), randn(6)
    first = bdl.fit(local, (x[:3], y[:3]), VI, init="prior")
    with pytest.raises(ModelError, match="all global"):
        bdl.fit(local, (x[3:], y[3:]), VI, prior=first)
