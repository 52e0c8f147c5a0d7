"""Values and gradients of LogDensity against densities and Jacobians written by hand, in float64, to 1e-10."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.errors import ModelError
from tests.density.programs import CASES, Case

RTOL = 1e-10


def points(density: LogDensity, n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, density.dim, generator=generator, dtype=torch.float64)


def expected(case: Case, density: LogDensity, z: Tensor, ratio: float = 1.0, temperature: float = 1.0) -> Tensor:
    v = density.constrain(z)
    rows = 0.0 if case.rows is None else ratio * case.rows(v, case.batch).sum(-1)
    return (case.prior(v) + rows + case.outside(v)) / temperature + case.jacobian(v)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("execution", ["replay", "handlers", "loop"])
def test_value_is_the_hand_written_one(case: Case, execution: str, temperature: float) -> None:
    density = LogDensity(case.model, case.batch, temperature=temperature, execution=execution)
    z = points(density)
    want = expected(case, density, z, temperature=temperature)
    value, gradient = density.value_and_grad(z)
    torch.testing.assert_close(value, want, rtol=RTOL, atol=1e-10)
    torch.testing.assert_close(density.log_density(z), want, rtol=RTOL, atol=1e-10)
    leaf = z.clone().requires_grad_()
    (oracle,) = torch.autograd.grad(expected(case, density, leaf, temperature=temperature).sum(), leaf)
    torch.testing.assert_close(gradient, oracle, rtol=1e-8, atol=1e-8)


def test_value_is_pyros_log_prob_sum_plus_the_jacobian(case: Case) -> None:
    if not case.factorised or "k" in _discrete(case):
        pytest.skip("Pyro's log_prob_sum does not sum out discrete latents; the hand-written density covers them")
    density = LogDensity(case.model, case.batch)
    z = points(density)
    for row, value in zip(z, density.log_density(z), strict=True):
        values = density.constrain(row)
        trace = poutine.trace(poutine.condition(case.model, data=values)).get_trace(**case.batch)
        torch.testing.assert_close(value, trace.log_prob_sum() + case.jacobian(values), rtol=RTOL, atol=1e-10)


def _discrete(case: Case) -> set[str]:
    trace = poutine.trace(case.model).get_trace(**case.batch)
    return {name for name, site in trace.nodes.items() if site["type"] == "sample" and site["fn"].has_enumerate_support
            and not site["is_observed"]}  # fmt: skip


def test_joint_has_no_jacobian_and_likelihood_has_no_prior(case: Case) -> None:
    density = LogDensity(case.model, case.batch)
    z = points(density)
    v = density.constrain(z)
    observed = case.outside(v) + (0.0 if case.rows is None else case.rows(v, case.batch).sum(-1))
    local = 0.0
    torch.testing.assert_close(density.value_and_grad(z, target="joint")[0], case.prior(v) + observed + local)
    torch.testing.assert_close(density.value_and_grad(z, target="likelihood")[0], observed)


def test_rows(case: Case) -> None:
    if case.rows is None:
        pytest.skip("its rows are coupled")
    density = LogDensity(case.model, case.batch)
    z = points(density)
    want = case.rows(density.constrain(z), case.batch)
    torch.testing.assert_close(density.log_likelihood(z), want, rtol=RTOL, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "subsampled", "mixed_supports"])
def test_minibatches_carry_n_over_b_once(name: str) -> None:
    case = CASES[name]
    density = LogDensity(case.model, case.batch)
    z = points(density)
    pick = torch.tensor([2, 5, 7])
    part = {key: value[pick] for key, value in case.batch.items()}
    v = density.constrain(z)
    n = len(case.batch["y"])
    want = case.prior(v) + n / 3 * case.rows(v, part).sum(-1) + case.jacobian(v)
    torch.testing.assert_close(density.value_and_grad(z, part)[0], want, rtol=RTOL, atol=1e-10)
    torch.testing.assert_close(density.log_density(z, part), want, rtol=RTOL, atol=1e-10)


def test_minibatches_per_chain_are_those_of_each_chain_alone() -> None:
    case = CASES["linear"]
    density = LogDensity(case.model, case.batch)
    z = points(density, 4)
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    value, gradient = density.value_and_grad(z, {k: t[index] for k, t in case.batch.items()}, per_chain=True)
    for chain in range(4):
        one, slope = density.value_and_grad(z[chain : chain + 1], {k: t[index[chain]] for k, t in case.batch.items()})
        torch.testing.assert_close(value[chain], one[0])
        torch.testing.assert_close(gradient[chain], slope[0])


def test_average_over_all_minibatches_is_the_full_gradient() -> None:
    case = CASES["linear"]
    density = LogDensity(case.model, case.batch)
    z = points(density, 2)
    full = density.value_and_grad(z)[1]
    parts = [density.value_and_grad(z, {k: t[i : i + 3] for k, t in case.batch.items()})[1] for i in range(0, 12, 3)]
    torch.testing.assert_close(torch.stack(parts).mean(0), full)


def test_likelihood_temperature_leaves_the_prior() -> None:
    case = CASES["linear"]
    density = LogDensity(case.model, case.batch, likelihood_temperature=4.0)
    z = points(density)
    v = density.constrain(z)
    want = case.prior(v) + case.rows(v, case.batch).sum(-1) / 4 + case.jacobian(v)
    torch.testing.assert_close(density.value_and_grad(z)[0], want)


def test_temperature_does_not_temper_the_jacobian() -> None:
    """HalfNormal at T = 4 has mean 1.596; tempering the unconstrained energy gives 0.539."""

    def model() -> None:
        pyro.sample("s", pyro.distributions.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))

    density = LogDensity(model, {}, temperature=4.0)
    z = torch.linspace(-12, 4, 4001, dtype=torch.float64)[:, None]
    weight = density.log_density(z).exp()
    mean = float((weight * z[:, 0].exp()).sum() / weight.sum())
    assert mean == pytest.approx(2 * (2 / torch.pi) ** 0.5, abs=1e-3)


def test_constrain_and_unconstrain_are_inverse(case: Case) -> None:
    density = LogDensity(case.model, case.batch)
    z = points(density)
    torch.testing.assert_close(density.unconstrain(density.constrain(z)), z, rtol=1e-6, atol=1e-6)


def test_gaussian_prior_is_found_and_can_be_replaced() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", pyro.distributions.Normal(torch.zeros(3, dtype=x.dtype), 2.0).to_event(1))
        s = pyro.sample("s", pyro.distributions.LogNormal(torch.tensor(-1.0, dtype=x.dtype), 0.5))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", pyro.distributions.Normal(x @ w, s), obs=y)

    batch = CASES["linear"].batch
    density = LogDensity(model, batch)
    prior = density.gaussian_prior()
    assert prior is not None
    torch.testing.assert_close(prior[0], torch.tensor([0, 0, 0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(prior[1], torch.tensor([2, 2, 2, 0.5], dtype=torch.float64))
    z = points(density)
    rows = density.log_likelihood(z).sum(-1)
    normal = torch.distributions.Normal(*prior)
    torch.testing.assert_close(density.value_and_grad(z)[0], rows + normal.log_prob(z).sum(-1))
    mean, sd = torch.full((4,), 0.3, dtype=torch.float64), torch.full((4,), 0.7, dtype=torch.float64)
    other = density.with_gaussian_prior(mean, sd)
    want = rows + torch.distributions.Normal(mean, sd).log_prob(z).sum(-1)
    torch.testing.assert_close(other.value_and_grad(z)[0], want)
    torch.testing.assert_close(other.log_density(z), want)
    assert CASES["linear"].model is not None
    assert LogDensity(CASES["linear"].model, batch).gaussian_prior() is None


def test_prior_draws_follow_the_prior() -> None:
    case = CASES["linear"]
    draws = LogDensity(case.model, case.batch).prior_draws(2000, seed=3)
    w = draws[:, :3]
    error = w.std(0) / 2000**0.5
    assert (w.mean(0).abs() < 4 * error).all()
    torch.testing.assert_close(w.std(0), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), rtol=0.08, atol=0)


def test_parameters_are_coordinates_without_a_prior() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", pyro.distributions.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        s = pyro.param("s", torch.tensor(0.5, dtype=x.dtype), constraint=pyro.distributions.constraints.positive)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", pyro.distributions.Normal(x @ w, s), obs=y)

    before = set(pyro.get_param_store())
    density = LogDensity(model, CASES["linear"].batch)
    assert [site.scope for site in density.sites] == ["global", "param"]
    z = points(density)
    v = density.constrain(z)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(v["w"]).sum(-1)
    rows = _rows(v)
    torch.testing.assert_close(density.value_and_grad(z, target="joint")[0], prior + rows)
    torch.testing.assert_close(density.value_and_grad(z, target="likelihood")[0], rows)
    assert set(pyro.get_param_store()) == before


def _rows(v: dict[str, Tensor]) -> Tensor:
    rows = CASES["linear"].rows
    assert rows is not None
    return rows(v, CASES["linear"].batch).sum(-1)


def test_a_prior_that_depends_on_a_shared_discrete_latent_is_no_gaussian_with_constants() -> None:
    """Two prior draws that happen to have the same component must not pass for a constant prior."""
    for weight in (0.7, 0.999):
        weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        places, scales = (torch.tensor(v, dtype=torch.float64) for v in ([-3.0, 3.0], [0.5, 1.0]))

        def model(weights: Tensor = weights, places: Tensor = places, scales: Tensor = scales) -> None:
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("z", dist.Normal(places[k], scales[k]))

        z = torch.linspace(-5, 5, 7, dtype=torch.float64)[:, None]
        expected = (weights * torch.distributions.Normal(places, scales).log_prob(z).exp()).sum(1).log()
        density = LogDensity(model, {})
        torch.testing.assert_close(density.log_density(z), expected)
        torch.testing.assert_close(density.value_and_grad(z)[0], expected)
        assert density.gaussian_prior() is None


def _mixture(components: Any, weights: tuple[int, ...] = (2,)) -> Any:
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7]).double().expand(weights)), components)


TWO = torch.tensor([0.5, 2.0], dtype=torch.float64)
MIXTURES = {
    "reals": (lambda: _mixture(dist.Normal(TWO, TWO)), ()),
    "vectors": (lambda: _mixture(dist.Normal(TWO[:, None].expand(2, 3), 1.0).to_event(1)), (3,)),
    "rows": (lambda: _mixture(dist.Normal(TWO.expand(3, 2), 1.0), (3, 2)).to_event(1), (3,)),
    "positive": (lambda: _mixture(dist.Gamma(TWO, 1.0)), ()),
    "simplex": (lambda: _mixture(dist.Dirichlet(TWO[:, None].expand(2, 3))), (3,)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_as_prior(name: str) -> None:
    make, shape = MIXTURES[name]

    def program(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", make())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * w.sum(), 1.0), obs=y)

    x, y = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = LogDensity(program, {"x": x, "y": y})
    z = density.prior_draws(4)
    w = density.constrain(z)["w"]
    assert w.shape == (4, *shape)
    likelihood = torch.stack([torch.distributions.Normal(x * one.sum(), 1.0).log_prob(y).sum() for one in w])
    prior = torch.stack([make().log_prob(one).sum() for one in w])
    value, gradient = density.value_and_grad(z)
    torch.testing.assert_close(value, likelihood + prior + density.log_abs_det(z))
    assert gradient.isfinite().all()


def test_a_mixture_over_several_supports_is_refused() -> None:
    def program(law: Any) -> None:
        pyro.sample("w", law)

    law = _mixture(dist.Uniform(torch.zeros(2, dtype=torch.float64), TWO))
    with pytest.raises(ModelError, match="mixture at site 'w' have different supports"):
        LogDensity(program, {"law": law})
