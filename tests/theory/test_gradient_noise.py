from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesdl as bdl
from bayesdl.density import LogDensity
from bayesdl.errors import DataError, MethodError, NotFactorised
from bayesdl.theory.gradient_noise import (
    EmpiricalLoss,
    gradient_covariance,
    gradient_spectrum,
    minibatch_factor,
)


def squared_error(w, x, y):
    return 0.5 * (x @ w - y).square()


def regression(n, d, seed=0, batch_size=1024):
    """A linear regression's loss, its rows, a point, and its rows' gradients in closed form."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=stream, dtype=torch.float64)
    y = torch.randn(n, generator=stream, dtype=torch.float64)
    w = torch.randn(d, generator=stream, dtype=torch.float64)
    return EmpiricalLoss.of_function(squared_error, x, y, batch_size=batch_size), w, (x @ w - y)[:, None] * x


def program(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(4.0, x @ w, noise), obs=y)


@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_gradients_of_a_function_equal_the_closed_form(batch_size):
    loss, w, rows = regression(20, 3, batch_size=batch_size)
    assert torch.allclose(torch.cat(list(loss.blocks(w))), rows)
    assert torch.allclose(torch.cat(list(loss.blocks(w, first=9))), rows[9:])
    assert torch.allclose(loss.gradient(torch.stack([w, w]))[1], rows.mean(0))
    index, weights = torch.tensor([[3, 3, 5], [0, 19, 1]]), torch.rand(2, 3, dtype=torch.float64)
    expected = torch.einsum("ck,ckd->cd", weights, rows[index])
    assert torch.allclose(loss.weighted(torch.stack([w, w]), weights, index), expected)


def test_gradients_of_a_density_are_those_of_its_rows_with_an_nth_of_the_prior():
    """C11-14: for any LogDensity; -n times the full gradient is the gradient of the log density."""
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 2, generator=stream), torch.randn(12, generator=stream)
    density = LogDensity(program, {"x": x.double(), "y": y.double()})
    loss = EmpiricalLoss.of_density(density, batch_size=5)
    z = torch.randn(3, 3, generator=stream, dtype=torch.float64)
    assert loss.n == 12
    assert torch.allclose(-12 * loss.gradient(z), density.value_and_grad(z)[1])

    def row_loss(z, x, y):
        likelihood = torch.distributions.StudentT(4.0, x @ z[:2], z[2].exp(), validate_args=False).log_prob(y)
        return -likelihood + (z[:2].square().sum() / 8 + z[2].square() / 2) / 12

    by_hand = EmpiricalLoss.of_function(row_loss, x.double(), y.double())
    assert torch.allclose(torch.cat(list(loss.blocks(z[0]))), torch.cat(list(by_hand.blocks(z[0]))))


def test_a_program_without_independent_rows_is_refused():
    def coupled(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * (x - x.mean()), 1.0), obs=y)

    with pytest.raises(NotFactorised):
        EmpiricalLoss.of_density(LogDensity(coupled, {"x": torch.arange(4.0), "y": torch.zeros(4)}))


@pytest.mark.parametrize("batch_size", [4, 1024])
@pytest.mark.parametrize(("n", "d"), [(30, 4), (9, 25)])
def test_spectrum_equals_that_of_the_dense_covariance(n, d, batch_size):
    """C11-14: by the covariance and by the Gram matrix, in blocks and at once."""
    loss, w, rows = regression(n, d, batch_size=batch_size)
    dense = torch.cov(rows.T, correction=0)
    assert torch.allclose(gradient_covariance(loss, w), dense)
    found = gradient_spectrum(loss, w)
    assert len(found.eigenvalues) == min(n, d)
    assert torch.allclose(found.eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[: min(n, d)], atol=1e-12)
    assert found.rank == min(n - 1, d)


def test_gram_matrix_keeps_small_noise_beside_a_large_mean():
    """C11-14: low rank does not mean small (T20), and small does not mean zero: mean 1e6, noise 1."""
    loss, w, _ = regression(9, 25)
    shifted = EmpiricalLoss(9, lambda w, index: loss.gradients(w, index) + 1e6, batch_size=4)
    expected = gradient_spectrum(loss, w).eigenvalues[:8]
    assert torch.allclose(gradient_spectrum(shifted, w).eigenvalues[:8], expected, rtol=1e-8)


def test_covariance_is_of_a_batch_with_itself_not_with_another():
    """C11-14, T20: over independent batches (g_b - g)(g_b' - g)^T averages to the zero matrix."""
    loss, w, rows = regression(4, 2)
    pairs = torch.tensor(list(itertools.product(range(4), repeat=2)))  # all mini-batches of two with replacement
    deviation = rows[pairs].mean(1) - rows.mean(0)
    itself = deviation.T @ deviation / len(pairs)
    assert torch.allclose(itself, gradient_covariance(loss, w) * minibatch_factor(4, 2))
    other = torch.einsum("ad,be->de", deviation, deviation) / len(pairs) ** 2
    assert other.abs().max() < 1e-15 < 1e-3 < itself.abs().max()


def test_factor_without_replacement_is_exact():
    """C11-27: (n-b)/(n-1), over all 15,504 mini-batches of 5 of 20 rows; with replacement 1/b."""
    loss, w, rows = regression(20, 1)
    subsets = torch.tensor(list(itertools.combinations(range(20), 5)))
    variance = rows[subsets].mean(1).var(correction=0)
    one = float(gradient_covariance(loss, w))
    assert float(variance) == pytest.approx(one / 5 * 15 / 19, rel=1e-12)
    assert one * minibatch_factor(20, 5, replace=False) == pytest.approx(one / 5 * 15 / 19, rel=1e-12)
    # The inventory's run had 0.2852 with replacement, hence 0.2252 expected and 0.2232 found without.
    ratio = minibatch_factor(20, 5, replace=False) / minibatch_factor(20, 5)
    assert 0.2852 * ratio == pytest.approx(0.2252, abs=5e-5)
    assert minibatch_factor(20, 20, replace=False) == 0
    assert minibatch_factor(1, 1, replace=False) == 1


def test_a_network_has_noise_in_few_directions_that_is_not_small():
    """C11-14, T20: rank at most n - 1; few eigenvalues above a thousandth; their noise beside the mean gradient."""
    data = bdl.data.load("iris")
    model = bdl.models.mlp(data, hidden=(16, 8))
    posterior = bdl.fit(model, data.train, bdl.MAP(optimizer="lbfgs", steps=30), seed=0, progress=False)
    density = posterior.problem.density
    loss = EmpiricalLoss.of_density(density, batch_size=64)
    w = posterior.z[0, 0]
    spectrum = gradient_spectrum(loss, w)
    assert spectrum.dim == density.dim > loss.n > spectrum.rank
    assert spectrum.fraction() < 0.1
    assert float(spectrum.eigenvalues.sum()) / 16 > 10 * float(loss.gradient(w[None]).square().sum())


def test_impossible_requests_are_refused():
    with pytest.raises(MethodError, match="21"):
        minibatch_factor(20, 21, replace=False)
    with pytest.raises(MethodError, match="at least 1"):
        EmpiricalLoss(0, lambda w, rows: w)
    with pytest.raises(DataError, match="one point"):
        gradient_spectrum(regression(4, 2)[0], torch.zeros(1, 2))
