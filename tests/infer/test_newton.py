"""Newton steps by conjugate gradients, and what weight decay does in the Hessian's basis."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.curvature.products import fisher_products
from bayesdl.errors import MethodError
from bayesdl.infer import newton
from bayesdl.infer.newton import conjugate_gradients
from tests.cases import DOUBLE, conjugate, dataset, network

STREAM = torch.Generator().manual_seed(9)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=STREAM, dtype=DOUBLE)


def test_conjugate_gradients_solve_within_the_radius() -> None:
    root, gradient = randn(2, 5, 5), randn(2, 5)
    matrix = root @ root.mT + 0.1 * torch.eye(5, dtype=DOUBLE)

    def product(v: Tensor) -> Tensor:
        return (matrix @ v[..., None])[..., 0]

    exact = -torch.linalg.solve(matrix, gradient[..., None])[..., 0]
    far = torch.full((2,), 1e6, dtype=DOUBLE)
    found, fall = conjugate_gradients(product, gradient, far)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fall, -0.5 * (gradient * exact).sum(1), rtol=1e-6, atol=0)
    near, _ = conjugate_gradients(product, gradient, torch.full((2,), 0.1, dtype=DOUBLE))
    torch.testing.assert_close(near.norm(dim=1), torch.full((2,), 0.1, dtype=DOUBLE))
    # Downhill for ever: to the edge, and lower than any step within.
    bent, gain = conjugate_gradients(lambda v: -v, gradient, torch.ones(2, dtype=DOUBLE))
    torch.testing.assert_close(bent, -gradient / gradient.norm(dim=1, keepdim=True))
    torch.testing.assert_close(gain, gradient.norm(dim=1) + 0.5)


@pytest.mark.parametrize("optimizer", ["newton", "gauss_newton"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_quadratic_is_solved_in_one_step(optimizer: str, batch_size: int | None) -> None:
    method = bdl.MAP(steps=1, optimizer=optimizer, batch_size=batch_size)
    found = bdl.fit(conjugate().network(), conjugate().data, method)
    torch.testing.assert_close(found.draws()["weight"].flatten(), conjugate().mean(), rtol=0, atol=1e-7)
    adam = bdl.fit(conjugate().network(), conjugate().data, bdl.MAP(steps=1))
    assert (adam.draws()["weight"].flatten() - conjugate().mean()).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("binary", "newton"), ("regression", "newton"), ("classes", "gauss_newton")]
)
def test_networks_reach_a_stationary_point(kind: str, optimizer: str) -> None:
    found = bdl.fit(network(kind), dataset(kind), bdl.DeepEnsemble(members=3, steps=300, optimizer=optimizer))
    assert found.info["converged"] == [True, True, True]
    z = found.unconstrained_draws()
    density = found.problem.density
    value, gradient = density.value_and_grad(z, target="joint")
    assert gradient.abs().max() < 1e-3
    start = bdl.fit(network(kind), dataset(kind), bdl.DeepEnsemble(members=3, steps=1, learning_rate=1e-9))
    assert (value > density.value_and_grad(start.unconstrained_draws(), target="joint")[0]).all()


def logistic(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], dtype=DOUBLE), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_the_error_is_squared_at_every_step() -> None:
    """C11-19: logistic regression, against Newton's method by hand; the Hessian is the Fisher information here."""
    x = randn(40, 4)
    y = (x[:, 0] + randn(40) > 0).double()

    def derivatives(w: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.sigmoid(x @ w)
        return x.T @ (p - y) + w / 4, (x.T * (p * (1 - p))) @ x + torch.eye(4, dtype=DOUBLE) / 4

    mode = torch.zeros(4, dtype=DOUBLE)
    for _ in range(20):
        slope, matrix = derivatives(mode)
        mode = mode - torch.linalg.solve(matrix, slope)
    start = {"w": mode + 0.3}
    for optimizer in ("newton", "gauss_newton"):
        path: list[Tensor] = []
        method = bdl.MAP(steps=4, optimizer=optimizer)
        bdl.fit(
            logistic, (x, y), method, init=start, callback=lambda state, path=path: bool(path.append(state["z"][0]))
        )
        by_hand = mode + 0.3
        for z in path[:3]:
            slope, matrix = derivatives(by_hand)
            by_hand = by_hand - torch.linalg.solve(matrix, slope)
            torch.testing.assert_close(z, by_hand, rtol=0, atol=1e-6)
        errors = [0.6, *(float((z - mode).norm()) for z in path)]
        for before, after in itertools.pairwise(errors[:4]):
            assert after < max(before**2, 1e-6)
        assert errors[1] > 1e-4  # it had something to square


def test_a_saddle_is_where_newton_jumps_and_what_damping_leaves() -> None:
    """A6-03, S-25, T3-11: (x^2 - y^2) / 2 has no minimum; (x^2 - y^2) / 2 + y^4 / 4 has two, and a saddle between."""

    def saddle() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1e4).to_event(1))
        pyro.factor("loss", -0.5 * (w[0] ** 2 - w[1] ** 2) - w[1] ** 4 / 4)

    start = {"w": torch.tensor([1.0, 1e-6], dtype=DOUBLE)}
    gradient, hessian = start["w"] * torch.tensor([1.0, -1.0]), torch.diag(torch.tensor([1.0, -1.0], dtype=DOUBLE))
    assert (start["w"] - torch.linalg.solve(hessian, gradient)).abs().max() < 1e-15  # undamped: at the saddle
    found = bdl.fit(saddle, {}, bdl.MaximumLikelihood(steps=60, optimizer="newton"), init=start)
    torch.testing.assert_close(found.draws()["w"][0].abs(), torch.tensor([0.0, 1.0], dtype=DOUBLE), rtol=0, atol=1e-6)


def test_a_natural_gradient_does_not_depend_on_the_coordinates() -> None:
    """A8-09: steps of F^-1 grad in p and in logit p give the same p, up to the square of the step size."""
    y = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=DOUBLE)

    def in_p(y: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3, dtype=DOUBLE))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(probs=p), obs=y)

    def in_logit(y: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.3, dtype=DOUBLE).logit())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)

    gaps = []
    for rate in (1e-1, 1e-2, 1e-3):
        ends = []
        for model, back in ((in_p, lambda z: z), (in_logit, torch.sigmoid)):
            problem = bdl.posterior.prepare(model, {"y": y})
            z = problem.density.prior_draws(1)
            value = fisher_products(problem, z, "likelihood")(torch.ones_like(z))
            _, gradient = problem.density.value_and_grad(z, target="likelihood")
            ends.append(float(back(z + rate * gradient / value)))
        assert abs(ends[0] - 0.3 - rate * (0.6 - 0.3)) < 1e-12  # F = n / (p (1 - p)): the step is towards the mean
        gaps.append(abs(ends[1] - ends[0]))
    assert gaps[0] == pytest.approx(100 * gaps[1], rel=0.05)
    assert gaps[1] == pytest.approx(100 * gaps[2], rel=0.05)


@pytest.mark.parametrize("optimizer", ["newton", "gauss_newton"])
def test_units_of_the_curvature_precondition(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs with scales from 1 to 1,000 under a wide prior: 200 steps suffice, and do not without the units."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=stream, dtype=DOUBLE) * torch.logspace(0, 3, 20, dtype=DOUBLE)
    y = (x.sign().sum(1) + 4 * torch.randn(200, generator=stream, dtype=DOUBLE) > 0).double()
    method = bdl.MAP(steps=200, optimizer=optimizer)
    found = bdl.fit(logistic, (x, y), method)
    assert found.info["converged"] == [True]
    w = found.draws()["w"][0]
    slope = x.mT @ (y - torch.sigmoid(x @ w)) - w / 4
    assert (slope / x.std(0)).abs().max() < 1e-3
    monkeypatch.setattr(newton, "POWER", 0.0)
    plain = bdl.fit(logistic, (x, y), method).info
    assert plain["converged"] == [False]
    assert plain["products"] > found.info["products"]


def switch(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
        pyro.sample("y", dist.Normal(w * x * k, 1.0), obs=y)


def double_well(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w[0] ** 2 + w[1] ** 2) * x[:, 0], 0.3), obs=y)


def test_it_leaves_a_saddle_for_a_mode() -> None:
    x = torch.ones(20, 1, dtype=DOUBLE)
    init = {"w": torch.tensor([0.01, 0.0], dtype=DOUBLE)}
    found = bdl.fit(double_well, (x, x[:, 0]), bdl.MAP(steps=50, optimizer="newton"), init=init)
    w = found.draws()["w"][0]
    # 20 (1 - r) 2 / 0.3^2 = 1 / 3^2 for the squared radius r
    assert float(w.square().sum()) == pytest.approx(1 - 0.3**2 / (9 * 40), abs=1e-6)


def test_weight_decay_shrinks_by_the_share_of_the_curvature() -> None:
    """theta* = lambda / (lambda + mu) theta in the Hessian's basis; mu is the prior's precision (summed loss)."""
    curvature, mu = torch.tensor([10.0, 1.0, 0.1], dtype=DOUBLE), 0.5
    basis = torch.linalg.qr(randn(3, 3)).Q
    x = (basis * curvature.sqrt()).T  # so that X^T X has these eigenvalues, with noise 1
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)

    def program(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), mu**-0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    def fit(method: bdl.Method) -> Tensor:
        return bdl.fit(program, (x, y), method).draws()["w"][0] @ basis

    free, decayed = fit(bdl.MaximumLikelihood(steps=3, optimizer="newton")), fit(bdl.MAP(steps=2, optimizer="newton"))
    torch.testing.assert_close(decayed / free, curvature / (curvature + mu), rtol=0, atol=1e-6)
    assert (decayed / free).tolist() == pytest.approx([0.9524, 0.6667, 0.1667], abs=1e-4)
    # The condition number falls from 10 / 0.1 to 10.5 / 0.6.
    gram = x.T @ x
    assert float(torch.linalg.cond(gram)) == pytest.approx(100)
    assert float(torch.linalg.cond(gram + mu * torch.eye(3, dtype=DOUBLE))) == pytest.approx(17.5)


def test_settings_are_checked() -> None:
    with pytest.raises(MethodError, match="'newton'.*all rows.*clip_norm.*gradient"):
        bdl.MAP(optimizer="newton", batch_size=5, clip_norm=1.0, gradient="saga")
    with pytest.raises(MethodError, match="Fisher information: .*'k'.* discrete latents.*'newton'"):
        bdl.fit(switch, (randn(6), randn(6)), bdl.MAP(optimizer="gauss_newton"))
