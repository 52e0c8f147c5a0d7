"""Every structure of a covariance against the matrix written out, and the algebra of normal laws by its formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.posterior import covariance as structures
from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, Kronecker, LowRank, restore
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import Placed, Spectral, among

DOUBLE, DIM = torch.float64, 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=generator(seed, "normal"))


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(size, size, seed=seed))[0]


def structure(name: str, seed: int = 0) -> Covariance:
    """A covariance of six coordinates."""
    sd = 0.5 + noise(DIM, seed=seed).abs()
    if name == "diagonal":
        return Diagonal(sd)
    if name == "low rank":
        return LowRank(sd, noise(DIM, 2, seed=seed + 1))
    if name == "dense":
        root = noise(DIM, DIM, seed=seed + 2)
        return Dense.of(root @ root.mT + 0.5 * torch.eye(DIM, dtype=DOUBLE))
    if name == "kronecker":
        return Kronecker(orthogonal(2, seed + 3), orthogonal(3, seed + 4), sd.square().reshape(2, 3))
    if name == "spectral":
        return Spectral(orthogonal(DIM, seed + 6)[:, :2], sd[:2].square(), sd[3].square())
    if name == "placed":
        order = torch.tensor([4, 0, 5, 2, 1, 3])
        return Placed(
            order,
            order[:0],
            0.5 + sd,
            Blocks((structure("spectral", seed + 7).marginal(slice(0, 2)), Diagonal(sd[2:]))),
        )
    return Blocks((Diagonal(sd[:1]), LowRank(sd[1:4], noise(3, 1, seed=seed + 5)), Diagonal(sd[4:])))


NAMES = ("diagonal", "low rank", "dense", "kronecker", "spectral", "placed", "blocks")


def written_out(covariance: Covariance) -> Tensor:
    """The matrix from the definition of each structure."""
    if isinstance(covariance, Diagonal):
        return covariance.sd.square().diag()
    if isinstance(covariance, LowRank):
        return covariance.sd.square().diag() + covariance.factor @ covariance.factor.mT
    if isinstance(covariance, Dense):
        return covariance.root @ covariance.root.mT
    if isinstance(covariance, Kronecker):
        basis = torch.kron(covariance.left, covariance.right)
        return basis @ covariance.spread.reshape(-1).diag() @ basis.mT
    if isinstance(covariance, Spectral):
        whole = covariance.basis @ covariance.basis.mT
        rest = covariance.across * (torch.eye(covariance.dim, dtype=DOUBLE) - whole)
        return (covariance.basis * covariance.along) @ covariance.basis.mT + rest
    if isinstance(covariance, Placed):
        chosen = torch.eye(covariance.dim, dtype=DOUBLE)[:, covariance.place] * covariance.scale
        return chosen @ written_out(covariance.inner) @ chosen.mT
    assert isinstance(covariance, Blocks)
    return torch.block_diag(*map(written_out, covariance.blocks))


def oracle(law: Normal) -> MultivariateNormal:
    return MultivariateNormal(law.mean, written_out(law.covariance))


def law(name: str, seed: int = 0) -> Normal:
    return Normal(noise(DIM, seed=seed + 9), structure(name, seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_structure_is_its_matrix(name: str) -> None:
    found, rows = structure(name), noise(4, 3, DIM)
    matrix = written_out(found)
    inverse = torch.linalg.inv(matrix)
    assert found.dim == DIM
    torch.testing.assert_close(found.dense(), matrix)
    torch.testing.assert_close(found.times(rows), rows @ matrix)
    torch.testing.assert_close(found.solve(rows), rows @ inverse)
    torch.testing.assert_close(found.log_det(), torch.linalg.slogdet(matrix).logabsdet)
    torch.testing.assert_close(found.variances(), matrix.diagonal())
    torch.testing.assert_close(found.precisions(), inverse.diagonal())
    root = found.scaled(torch.eye(found.noise_dim, dtype=DOUBLE))
    torch.testing.assert_close(root.mT @ root, matrix)
    for part in (slice(0, 2), slice(1, 4), slice(3, None), slice(None)):
        torch.testing.assert_close(written_out(found.marginal(part)), matrix[part, part])
    again = restore(found.tensors())
    assert type(again) is type(found)
    torch.testing.assert_close(written_out(again), matrix, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_draws_and_densities(name: str) -> None:
    found = law(name)
    exact, z = oracle(found), noise(5, 2, DIM, seed=3)
    torch.testing.assert_close(found.log_prob(z), exact.log_prob(z))
    draws = found.draws(40_000, seed=1)
    away = torch.linalg.solve_triangular(exact.scale_tril, (draws - found.mean).mT, upper=False)
    # whitened draws: means are N(0, 1/n), entries of the second moment have variance 1/n (2/n on the diagonal)
    assert float(away.mean(1).abs().max()) * 200.0 < 4.0
    second = (away @ away.mT) / draws.shape[0] - torch.eye(DIM, dtype=DOUBLE)
    assert float(second.abs().max()) * 200.0 < 4.5 * 2**0.5
    assert torch.equal(draws, found.draws(40_000, seed=1))


@pytest.mark.parametrize(("one", "other"), list(itertools.product(NAMES, NAMES)))
def test_kl_of_every_pair(one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "CHUNK", 4)  # the root of six columns comes in two pieces
    p, q = law(one), law(other, seed=20)
    torch.testing.assert_close(p.kl(q), kl_divergence(oracle(p), oracle(q)), rtol=1e-10, atol=1e-10)
    assert float(p.kl(p).abs()) < 1e-12
    single = Normal(p.mean.float(), restore({k: v.float() for k, v in p.covariance.tensors().items()}))
    assert single.kl(q).dtype == DOUBLE


@pytest.mark.parametrize(("one", "other"), list(itertools.product(NAMES, NAMES)))
def test_products_add_precisions_and_quotients_take_them_away(one: str, other: str) -> None:
    p, q = law(one), law(other, seed=20)
    both = p.times(q)
    precisions = [torch.linalg.inv(written_out(x.covariance)) for x in (p, q)]
    matrix = torch.linalg.inv(precisions[0] + precisions[1])
    torch.testing.assert_close(written_out(both.covariance), matrix)
    torch.testing.assert_close(both.mean, matrix @ (precisions[0] @ p.mean + precisions[1] @ q.mean))
    z = noise(4, DIM, seed=5)
    ratio = both.log_prob(z) - p.log_prob(z) - q.log_prob(z)
    torch.testing.assert_close(ratio, ratio[:1].expand(4))
    back = both.without(q)
    torch.testing.assert_close(back.mean, p.mean)
    torch.testing.assert_close(written_out(back.covariance), written_out(p.covariance))


def test_products_keep_their_structure() -> None:
    assert isinstance(law("diagonal").times(law("diagonal", 20)).covariance, Diagonal)
    for one, other in (("low rank", "diagonal"), ("diagonal", "low rank"), ("low rank", "low rank")):
        assert isinstance(law(one).times(law(other, 20)).covariance, LowRank)
    product = law("blocks").times(law("blocks", 20)).covariance
    assert isinstance(product, Blocks)
    assert [type(block) for block in product.blocks] == [Diagonal, LowRank, Diagonal]
    assert isinstance(law("low rank").times(law("diagonal", 20)).without(law("diagonal", 20)).covariance, LowRank)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_wider_cannot_be_taken_out(name: str) -> None:
    narrow, wide = law(name), Normal(torch.zeros(DIM, dtype=DOUBLE), Diagonal(torch.full((DIM,), 9.0, dtype=DOUBLE)))
    narrow.without(wide)
    with pytest.raises(MethodError, match="There is no Gaussian left"):
        wide.without(narrow)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 4), slice(2, 5)])
def test_marginals_and_conditionals(name: str, part: slice) -> None:
    found, value = law(name), noise(part.stop - part.start, seed=7)
    matrix, given = written_out(found.covariance), torch.zeros(DIM, dtype=torch.bool)
    given[part] = True
    marginal = found.marginal(part)
    torch.testing.assert_close(marginal.mean, found.mean[part])
    torch.testing.assert_close(written_out(marginal.covariance), matrix[part, part])
    conditional = found.conditional(part, value)
    precision = torch.linalg.inv(matrix)
    torch.testing.assert_close(written_out(conditional.covariance), torch.linalg.inv(precision[~given][:, ~given]))
    # the joint density is the marginal one times the conditional one
    z = torch.empty(DIM, dtype=DOUBLE)
    z[given], z[~given] = value, noise(DIM - len(value), seed=8)
    torch.testing.assert_close(found.log_prob(z), marginal.log_prob(value) + conditional.log_prob(z[~given]))


def test_conditionals_keep_their_structure() -> None:
    value = noise(3)
    assert isinstance(law("diagonal").conditional(slice(0, 3), value).covariance, Diagonal)
    assert isinstance(law("low rank").conditional(slice(0, 3), value).covariance, LowRank)
    assert isinstance(law("blocks").conditional(slice(1, 4), value).covariance, Blocks)


def test_nothing_large_is_written_out() -> None:
    large = LowRank(torch.ones(100_000), torch.ones(100_000, 2))
    assert large.scaled(torch.zeros(1, large.noise_dim)).shape == (1, 100_000)
    with pytest.raises(MethodError, match="100000 coordinates written out takes 75 GiB"):
        large.dense()
    with pytest.raises(MethodError, match="6 and 5 coordinates"):
        law("dense").kl(Normal(torch.zeros(5), Diagonal(torch.ones(5))))
    with pytest.raises(MethodError, match="not positive definite"):
        Dense.of(-torch.eye(2))
    with pytest.raises(MethodError, match="No covariance has the parts"):
        restore({"sd": torch.ones(2), "other": torch.ones(2)})


def test_what_is_not_placed_is_a_point() -> None:
    inner = structure("dense").marginal(slice(0, 3))
    found = Placed(torch.tensor([5, 0, 2]), torch.tensor([1, 3, 4]), torch.tensor([2.0, 1.0, 0.5], dtype=DOUBLE), inner)
    matrix = written_out(found)
    rows = noise(4, DIM)
    torch.testing.assert_close(found.dense(), matrix)
    torch.testing.assert_close(found.variances(), matrix.diagonal())
    assert (found.scaled(noise(50, 3))[:, found.points] == 0).all()
    assert found.log_det() == -torch.inf
    assert (found.precisions()[found.points] == torch.inf).all()
    for part in (slice(0, 3), slice(3, 5), slice(2, 6)):
        torch.testing.assert_close(found.marginal(part).dense(), matrix[part, part])
    rows[:, found.points] = 0.0
    torch.testing.assert_close(found.times(found.solve(rows)), rows)
    again = restore(found.tensors())
    torch.testing.assert_close(again.dense(), matrix)
    assert Normal(rows[0], found).kl(law("diagonal")) == torch.inf


def test_a_covariance_of_some_coordinates_leaves_points() -> None:
    stream = generator(4, "partial")
    root = torch.randn(2, 2, generator=stream, dtype=torch.float64).tril(-1) + torch.eye(2, dtype=torch.float64)
    random = torch.tensor([True, False, True])
    found = among(Dense(root), random)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 0], expected[0, 2], expected[2, 0], expected[2, 2] = (root @ root.T).flatten()
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(found.variances(), expected.diag())
    noise = torch.randn(5, found.noise_dim, generator=stream, dtype=torch.float64)
    torch.testing.assert_close(found.scaled(noise)[:, [0, 2]], noise @ root.T)
    assert float(found.log_det()) == -torch.inf
    inner = torch.linalg.inv(root @ root.T)
    torch.testing.assert_close(found.precisions()[[0, 2]], inner.diag())
    assert found.precisions()[1] == torch.inf
    rows = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(found.solve(rows)[:, [0, 2]], rows[:, :2] @ inner)
    assert (found.solve(rows)[:, 1] == torch.inf).all()
    assert isinstance(among(Diagonal(torch.ones(2)), random), Diagonal)
    assert among(found, torch.ones(3, dtype=torch.bool)) is found
    for part in (slice(0, 3), slice(0, 2), slice(1, 2), slice(2, 3)):
        torch.testing.assert_close(found.marginal(part).dense(), expected[part, part])
    again = restore(found.double().tensors())
    torch.testing.assert_close(again.dense(), expected)
    law = Normal(torch.arange(3, dtype=torch.float64), found)
    assert law.kl(Normal(law.mean, Diagonal(torch.ones(3, dtype=torch.float64)))) == torch.inf
    torch.testing.assert_close(law.without_points().mean, law.mean[[0, 2]])
    torch.testing.assert_close(law.without_points().covariance.dense(), root @ root.T)
