"""Simulation-based calibration: right posteriors pass, wrong ones do not, whatever the program and the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import DataError, Divergence, ModelError
from bayesdl.evaluate.sbc import LOG_LIKELIHOOD, Calibration, simulation_based_calibration
from bayesdl.evaluate.simulated import OBSERVED, simulate
from bayesdl.evaluate.uniformity import symmetry
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method
from bayesdl.posterior import DrawsPosterior, GaussianPosterior, Posterior
from bayesdl.posterior.covariance import Diagonal
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem

DOUBLE = torch.float64
NOISE = 0.7
# The inputs are positive, so that both coefficients are strongly correlated and a mean-field posterior is too narrow.
X = torch.linspace(0.2, 2.0, 12, dtype=DOUBLE)
DATA = X, torch.zeros_like(X)
SAMPLER = bdl.NUTS(chains=2, warmup=100, draws=60)


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x * w[1], NOISE), obs=y)


@dataclass(frozen=True)
class Exact(Method):
    """The posterior of ``line`` in closed form, with errors on wish."""

    name: ClassVar[str] = "Exact"

    width: float = 1.0
    shift: float = 0.0
    power: float = 1.0
    mean_field: bool = False
    stuck: bool = False

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        x, y = problem.batch["x"], problem.batch[OBSERVED + "y"]
        design = torch.stack([torch.ones_like(x), x], 1)
        precision = torch.eye(2, dtype=DOUBLE) + self.power * design.T @ design / NOISE**2
        covariance = torch.linalg.inv(precision)
        mean = self.power * covariance @ design.T @ y / NOISE**2 + self.shift * covariance.diagonal().sqrt()
        if self.mean_field:
            return GaussianPosterior(problem, Normal(mean, Diagonal(precision.diagonal().rsqrt())), {})
        noise = torch.randn(1, 120, 2, dtype=DOUBLE, generator=generator(run.seed, "exact"))
        info = {"stuck": [0]} if self.stuck and float(y.mean()) > 1.0 else {}
        return DrawsPosterior(problem, mean + self.width * noise @ torch.linalg.cholesky(covariance).T, {}, info)


def check(method: Method, replicates: int = 400, **options: Any) -> Calibration:
    return simulation_based_calibration(line, DATA, method, replicates=replicates, progress=False, **options)


def test_a_right_posterior_passes() -> None:
    found = check(Exact())
    assert found.names == ("w[0]", "w[1]", LOG_LIKELIHOOD)
    assert found.ranks.shape == (400, 3)
    assert 60 < found.draws <= 99
    assert not found.rejected()
    assert found.coverage(0.9).abs().max() < 4 * (0.09 / 500) ** 0.5
    assert str(found).startswith("Exact: no sign of miscalibration (smallest p-value ")
    assert found.failed == ()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Exact(width=0.85), "too narrow"),
        (Exact(width=1.2), "worse than the truth does"),
        (Exact(shift=0.2), "too high"),
        (Exact(shift=-0.2), "too low"),
        (Exact(power=0.25), "worse than the truth does"),  # as of mini-batches of a quarter of the rows, without N/B
    ],
    ids=["narrow", "wide", "high", "low", "without N/B"],
)
def test_a_wrong_posterior_is_rejected(method: Exact, reason: str) -> None:
    found = check(method)
    assert found.rejected()
    assert found.verdict().startswith("Exact is miscalibrated; worst at ")
    assert reason in found.verdict()
    coverage = found.coverage(0.9)
    if method.width != 1.0:
        assert ((coverage[:2] < -0.02) if method.width < 1 else (coverage[:2] > 0.02)).all()


def test_independent_draws_of_a_density_pass_and_symmetry_forgives_a_narrow_posterior() -> None:
    narrow = check(Exact(mean_field=True))
    assert narrow.draws == 99
    assert narrow.ess == torch.inf
    assert "too narrow" in narrow.verdict()
    assert symmetry(narrow.ranks, narrow.draws)[:2].min() > 0.01
    biased = check(Exact(mean_field=True, shift=0.4))
    assert symmetry(biased.ranks, biased.draws)[:2].max() < 1e-3
    # Where coefficients are independent the mean-field posterior is exact. Draws by one seed would be the same noise in
    # every replicate, and the ranks far from uniform.
    centred = X - X.mean()
    right = simulation_based_calibration(
        line, (centred, DATA[1]), Exact(mean_field=True), replicates=400, progress=False
    )
    assert not right.rejected()


def test_only_the_named_sites_and_the_callers_quantities_are_ranked() -> None:
    def quantities(latents: Any) -> dict[str, Tensor]:
        w = latents["w"]
        return {"line": w[:, :1] + w[:, 1:] * X[[0, -1]], "slope": w[:, 1]}

    found = check(Exact(), 30, sites=(), quantities=quantities)
    assert found.names == ("line[0]", "line[1]", "slope", LOG_LIKELIHOOD)
    everything = check(Exact(), 30, quantities=quantities)
    assert torch.equal(everything.ranks[:, 1], everything.ranks[:, everything.names.index("slope")])
    assert check(Exact(), 30, sites=()).names == (LOG_LIKELIHOOD,)
    with pytest.raises(ModelError, match=r"no latent sites \['v'\]; there are w"):
        check(Exact(), sites=["v"])
    with pytest.raises(DataError, match=r"quantities gives \['mean'\] another number of draws"):
        check(Exact(), 30, quantities=lambda latents: {"mean": latents["w"].mean(0)})


def test_the_log_likelihood_is_that_of_each_replicates_own_data() -> None:
    # Draws at the maximum of the likelihood fit their own data better than the truth does, always; other data do not
    # know the difference.
    found = check(Exact(width=0.01, power=1e4), 60)
    assert found.ranks[:, 2].tolist() == [0] * 60
    assert 0 < float((found.ranks[:, 0] == 0).double().mean()) < 1
    assert found._reason(2) == "the draws fit the data better than the truth does"


def test_one_seed_one_result() -> None:
    first, again, other = check(Exact(), 30), check(Exact(), 30), check(Exact(), 30, seed=1)
    assert torch.equal(first.ranks, again.ranks)
    assert not torch.equal(first.ranks, other.ranks)


def test_ties_are_broken_evenly() -> None:
    def coin(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.5)), obs=y)

    # Every draw has the same likelihood: all ranks are ties.
    found = simulation_based_calibration(coin, DATA, bdl.HMC(chains=2, warmup=50, draws=50), progress=False)
    assert found.p_values()[2] > 1e-3
    assert {0, found.draws} <= set(found.ranks[:, 2].tolist())


def several(x: Tensor, counts: Tensor | None = None, total: Tensor | None = None) -> None:
    """Two observed sites, one of them of whole numbers, the other outside the data plate."""
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("counts", dist.Poisson(rate * x), obs=counts)
    pyro.sample("total", dist.Normal(rate, 0.5), obs=total)


def schools(sigma: Tensor, y: Tensor | None = None) -> None:
    """Latents inside the data plate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 2.0))
    with pyro.plate("data", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def single(y: Tensor) -> None:
    """No data plate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    pyro.sample("y", dist.StudentT(5.0, mu, 1.0), obs=y)


PROGRAMS: dict[str, tuple[Any, dict[str, Tensor], int]] = {
    "two observed sites": (several, {"x": X, "counts": torch.zeros_like(X), "total": torch.zeros((), dtype=DOUBLE)}, 2),
    "latents of the rows": (schools, {"sigma": X[:3], "y": X[:3]}, 5),
    "no data plate": (single, {"y": torch.zeros((), dtype=DOUBLE)}, 2),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_of_all_kinds(kind: str) -> None:
    program, data, count = PROGRAMS[kind]
    found = simulation_based_calibration(program, data, SAMPLER, replicates=100, progress=False)
    assert len(found.names) == count
    assert found.draws > 12
    assert not found.rejected(0.01)
    assert found.coverage(0.8).abs().max() < 4 * (0.16 / 100) ** 0.5
    assert float(found.ranks.double().std(0).min()) > 0.2 * found.draws


def test_a_network_is_simulated_in_its_own_units() -> None:
    stream = generator(0, "table")
    x = 100.0 + 20.0 * torch.randn(15, 1, generator=stream, dtype=DOUBLE)
    data = bdl.Dataset.from_arrays(x, 1e4 * x[:, 0])
    model = bdl.models.mlp(data, hidden=())
    method = bdl.HMC(chains=2, warmup=100, draws=80, leapfrog_steps=6)
    found = simulation_based_calibration(model, data, method, replicates=60, progress=False)
    assert not found.rejected(0.01)
    assert float(found.ranks.double().std(0).min()) > 0.2 * found.draws
    _, simulated = simulate(model, bdl.fit(model, data, bdl.MAP(steps=1)).problem.batch, 50, 0)
    (y,) = simulated.values()
    assert y.shape[:2] == (50, 15)
    assert 0.3 < float(y.std()) < 30.0


def test_a_sampler_with_too_large_a_target_is_found() -> None:
    # Its own temperature: draws of p(theta, y)^(1/2) are too wide.
    found = simulation_based_calibration(
        line, DATA, bdl.NUTS(chains=2, warmup=100, draws=60, temperature=2.0), replicates=100, progress=False
    )
    assert found.rejected()
    assert "too wide" in found.verdict()


@pytest.mark.slow
def test_nuts_at_500_replicates() -> None:
    def regression(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        noise = pyro.sample("noise", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, noise), obs=y)

    right, tempered = (
        simulation_based_calibration(
            regression, DATA, bdl.NUTS(chains=2, warmup=150, draws=100, likelihood_temperature=t), progress=False
        )
        for t in (1.0, 1.5)
    )
    assert right.ranks.shape == (500, 3)
    assert right.draws > 40
    assert not right.rejected()
    assert right.coverage(0.9).abs().max() < 4 * (0.09 / 500) ** 0.5
    assert tempered.rejected()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [bdl.MeanFieldVI(steps=300), bdl.GuideVI("AutoMultivariateNormal", steps=300, learning_rate=0.05)]
)
def test_variational_methods(method: Method) -> None:
    found = check(method, 20, seed=2)
    assert found.draws == 99
    assert symmetry(found.ranks, found.draws)[:2].min() > 0.01
    assert found.rejected() == isinstance(method, bdl.MeanFieldVI)


def test_programs_that_cannot_be_simulated_are_refused() -> None:
    def factor(x: Tensor, y: Tensor | None = None) -> None:
        line(x, y)
        pyro.factor("bonus", torch.zeros(()))

    def scaled(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.poutine.scale(scale=0.5):
            line(x, y)

    def parameter(x: Tensor, y: Tensor | None = None) -> None:
        line(x * pyro.param("p", torch.ones((), dtype=DOUBLE)), y)

    for program, data, message in (
        (factor, DATA, r"has factors \(bonus\)"),
        (scaled, DATA, "scales the log probability of w, y"),
        (line, {"x": X}, "observes nothing"),
        (parameter, DATA, r"\['p'\] have no prior to draw the truth from"),
    ):
        with pytest.raises(ModelError, match=message):
            simulation_based_calibration(program, data, bdl.MeanFieldVI(), progress=False)


def test_what_gives_no_ranks_is_refused() -> None:
    with pytest.raises(DataError, match="replicates=19 are too few"):
        check(Exact(), 19)
    with pytest.raises(DataError, match="gives a single point"):
        check(bdl.MAP(steps=2), 20)
    creeping = bdl.HMC(chains=1, warmup=0, draws=60, step_size=1e-3, leapfrog_steps=1)
    with pytest.raises(DataError, match=r"effective draws in their worst quantity; ranks need 9"):
        check(creeping, 20)


def test_replicates_with_stuck_chains_are_counted_and_told() -> None:
    found, clean = check(Exact(stuck=True), 60), check(Exact(), 60)
    assert 0 < len(found.failed) < 30
    assert torch.equal(found.ranks, clean.ranks)
    assert f"In {len(found.failed)} of 60 replicates chains were stuck" in str(found)


def test_a_data_set_with_stuck_chains_is_kept_only_if_asked_for() -> None:
    # The second data set knows the slope a thousand times better: the given step is far too large for it.
    data = [{"x": X * factor, "y": X * 0} for factor in (1.0, 1000.0)]
    method = bdl.HMC(chains=2, warmup=0, draws=30, step_size=0.2, leapfrog_steps=4)
    with pytest.raises(Divergence, match=r"chains \[0, 1\] of data set 1 accepted nothing"):
        method.fit_each(line, data, progress=False)
    first, second = method.fit_each(line, data, progress=False, keep_stuck=True)
    assert "stuck" not in first.info
    assert second.info["stuck"] == [0, 1]


def test_coverage_of_known_ranks() -> None:
    each_once = Calibration(("w",), torch.arange(100)[:, None], 99)
    assert each_once.coverage(0.9).tolist() == pytest.approx([0.0])
    assert each_once.coverage(0.999).tolist() == pytest.approx([0.0])  # 0.98 is the widest that leaves draws outside
    inner = Calibration(("w",), torch.arange(5, 95)[:, None], 99)
    assert inner.coverage(0.9).tolist() == pytest.approx([0.1])
    assert inner.coverage(0.5).tolist() == pytest.approx([50 / 90 - 0.5])


def test_the_picture() -> None:
    found = check(Exact(width=0.5), 60)
    axes = found.plot(["w[1]"]).axes[0]
    line_of_ranks = axes.get_lines()[1].get_ydata()
    assert line_of_ranks[5] > 0.05  # narrow: above the band on the left, below it on the right
    assert line_of_ranks[-5] < -0.05
    assert len(found.plot().axes[0].get_lines()) == 4
    with pytest.raises(DataError, match=r"no quantities \['v'\]"):
        found.plot(["v"])
