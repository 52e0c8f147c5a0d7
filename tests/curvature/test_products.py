"""Products with the Hessian and the Fisher information against dense matrices by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev

import bayesdl as bdl
from bayesdl.curvature.products import fisher_products, hessian_products, value_and_grad
from bayesdl.errors import MethodError
from tests.cases import DOUBLE, dataset, network


def points(problem: Any, members: int = 2) -> Tensor:
    stream = torch.Generator().manual_seed(9)
    return 0.5 * torch.randn(members, problem.density.dim, generator=stream, dtype=DOUBLE)


def dense(product: Callable[[Tensor], Tensor], dim: int, members: int) -> Tensor:
    """``[M, D, D]``."""
    units = torch.eye(dim, dtype=DOUBLE)
    return torch.stack([product(unit.expand(members, dim)) for unit in units], 2)


def outputs(row: Tensor, x: Tensor, k: int) -> Tensor:
    """Three erf units and k outputs, by hand, ``[N, k]``."""
    first, bias, second, last = row.split([9, 3, 3 * k, k])
    return torch.erf(x @ first.reshape(3, 3).T + bias) @ second.reshape(k, 3).T + last


def prior_sd(k: int) -> Tensor:
    return torch.cat([torch.full((count,), sd, dtype=DOUBLE) for count, sd in
                      ((9, 3**-0.5), (3, 1.0), (3 * k, 3**-0.5), (k, 1.0))])  # fmt: skip


def law(f: Tensor) -> torch.distributions.Distribution:
    if f.shape[1] == 1:
        return torch.distributions.Bernoulli(logits=f[:, 0], validate_args=False)
    return torch.distributions.Categorical(logits=f, validate_args=False)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(("kind", "k"), [("binary", 1), ("classes", 3)])
def test_networks(kind: str, k: int, batch_size: int | None) -> None:
    """C11-19, A8-05, A5-05: H v is exact; Fisher = Gauss-Newton, positive, and not the Hessian away from a fit."""
    problem = bdl.posterior.prepare(network(kind), dataset(kind))
    z, (x, y) = points(problem), (problem.batch["x"], problem.batch["y"])
    sd = prior_sd(k)

    def loss(row: Tensor) -> Tensor:
        targets = y.double() if k == 1 else y
        return -law(outputs(row, x, k)).log_prob(targets).sum() + 0.5 * (row / sd).square().sum()

    def gauss_newton(row: Tensor) -> Tensor:
        jacobian = jacrev(lambda r: outputs(r, x, k))(row)  # [N, k, D]
        p = torch.sigmoid(outputs(row, x, 1)) if k == 1 else outputs(row, x, k).softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("nkd,nkl,nle->de", jacobian, inner, jacobian) + torch.diag(sd**-2)

    exact = torch.stack([hessian(loss)(row) for row in z])
    found = dense(hessian_products(problem, z, "joint", batch_size), len(sd), 2)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    fisher = dense(fisher_products(problem, z, "joint", batch_size), len(sd), 2)
    want = torch.stack([gauss_newton(row) for row in z])
    torch.testing.assert_close(fisher, want, rtol=1e-8, atol=1e-8)
    assert (fisher - exact).norm() > 0.05 * exact.norm()
    assert torch.linalg.eigvalsh(fisher).min() > 0
    value, gradient = value_and_grad(problem, z, "joint", batch_size)
    whole = problem.density.value_and_grad(z, target="joint")
    torch.testing.assert_close(value, whole[0])
    torch.testing.assert_close(gradient, whole[1])


def weighted(x: Tensor, y: Tensor | None = None) -> None:
    """A rate and a level that are learnt, a weight of 1/2, and a point outside the plate."""
    w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    sd = pyro.sample("sd", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0))
    pyro.sample("anchor", dist.Poisson(w.exp()), obs=torch.tensor(3.0, dtype=DOUBLE))
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(w * x, sd), obs=y)


@pytest.mark.parametrize("target", ["joint", "posterior", "likelihood"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_programs(target: Any, batch_size: int | None) -> None:
    """A8-11: F = -E d^2 log p, by hand, with weights, temperature, and what stands outside the data plate."""
    stream = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 10, generator=stream, dtype=DOUBLE)
    problem = bdl.posterior.prepare(weighted, (x, y), likelihood_temperature=2.0)
    w, u = 0.3, -0.4  # u = log sd
    z = torch.tensor([[w, u]], dtype=DOUBLE)
    precision = torch.exp(torch.tensor(-2 * u))
    fisher = torch.diag(torch.stack([0.5 * x.square().sum() * precision + torch.tensor(w).exp(), torch.tensor(10.0)]))
    fisher = fisher.double() / 2.0
    if target != "likelihood":
        # -log p(w), and -log p(sd) = u + u^2 / 2, which the Jacobian leaves as u^2 / 2
        fisher = fisher + torch.eye(2, dtype=DOUBLE)
    torch.testing.assert_close(dense(fisher_products(problem, z, target, batch_size), 2, 1)[0], fisher)
    found = dense(hessian_products(problem, z, target, batch_size), 2, 1)[0]
    want = -hessian(problem.density.function(target=target))(z[0])
    torch.testing.assert_close(found, want)


def test_control_flow_that_depends_on_values_and_linear_densities() -> None:
    def branching(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        mean = w * x if float(w.detach()) > 0 else w**2 * x
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x = torch.arange(4, dtype=DOUBLE)
    problem = bdl.posterior.prepare(branching, (x, x))
    z = torch.tensor([[2.0], [-1.0]], dtype=DOUBLE)
    found = hessian_products(problem, z)(torch.ones_like(z))
    # below 0: 1 + d^2/dw^2 sum x^2 (1 - w^2)^2 / 2 = 1 + sum x^2 (6 w^2 - 2) = 1 + 14 * 4
    torch.testing.assert_close(found[:, 0], torch.tensor([15.0, 57.0], dtype=DOUBLE))


def test_families_without_a_divergence_say_so() -> None:
    def heavy(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.StudentT(4.0, w * x, 1.0), obs=y)

    x = torch.arange(4, dtype=DOUBLE)
    with pytest.raises(MethodError, match="StudentT at 'y'.*optimizer='newton'"):
        bdl.fit(heavy, (x, x), bdl.MAP(steps=2, optimizer="gauss_newton"))
