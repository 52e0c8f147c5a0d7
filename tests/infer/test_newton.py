"""Newton steps by conjugate gradients, and what weight decay does in the Hessian's basis."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.density import LogDensity
from bayesdl.errors import MethodError
from bayesdl.infer.newton import conjugate_gradients, hessian_product
from tests.cases import DOUBLE, conjugate, dataset, network

STREAM = torch.Generator().manual_seed(9)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=STREAM, dtype=DOUBLE)


def test_hessian_products_are_those_of_the_dense_hessian() -> None:
    data, model = dataset("binary"), network("binary")
    problem = bdl.posterior.prepare(model, data)
    z, v = 0.5 * randn(2, problem.density.dim), randn(2, problem.density.dim)
    found = hessian_product(problem.density, z, v, "joint")
    x, y = problem.batch["x"], problem.batch["y"]

    def joint(row: Tensor) -> Tensor:
        """By hand: three erf units, one logit, N(0, 1 / fan-in) weights and N(0, 1) biases."""
        first, bias, second, last = row.split([9, 3, 3, 1])
        f = torch.erf(x @ first.reshape(3, 3).T + bias) @ second + last
        sd = torch.cat([torch.full((9,), 3**-0.5), torch.ones(3), torch.full((3,), 3**-0.5), torch.ones(1)]).double()
        likelihood = torch.distributions.Bernoulli(logits=f).log_prob(y.double()).sum()
        return likelihood - 0.5 * (row / sd).square().sum()

    want = torch.stack([torch.autograd.functional.hessian(joint, row) @ w for row, w in zip(z, v, strict=True)])
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


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


def test_a_quadratic_is_solved_in_one_step() -> None:
    found = bdl.fit(conjugate().network(), conjugate().data, bdl.MAP(steps=1, optimizer="newton"))
    torch.testing.assert_close(found.draws()["weight"].flatten(), conjugate().mean(), rtol=0, atol=1e-7)
    adam = bdl.fit(conjugate().network(), conjugate().data, bdl.MAP(steps=1))
    assert (adam.draws()["weight"].flatten() - conjugate().mean()).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_networks_reach_a_stationary_point(kind: str) -> None:
    found = bdl.fit(network(kind), dataset(kind), bdl.DeepEnsemble(members=3, steps=200, optimizer="newton"))
    assert found.info["converged"] == [True, True, True]
    z = found.unconstrained_draws()
    density = found.problem.density
    value, gradient = density.value_and_grad(z, target="joint")
    assert gradient.abs().max() < 1e-3
    start = bdl.fit(network(kind), dataset(kind), bdl.DeepEnsemble(members=3, steps=1, learning_rate=1e-9))
    assert (value > density.value_and_grad(start.unconstrained_draws(), target="joint")[0]).all()


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
    with pytest.raises(MethodError, match="'newton'.*all rows.*batch_size"):
        bdl.MAP(optimizer="newton", batch_size=5)
    density = LogDensity(conjugate().network(), {"x": conjugate().x, "y": conjugate().y})
    assert hessian_product(density, randn(2, 3), torch.zeros(2, 3, dtype=DOUBLE), "joint").abs().max() == 0
