"""Gauss-Newton and Fisher matrices against dense ones in numpy, and what does not change them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import NetworkOutputs, dense, diagonal, hessian, hessian_times, top
from bayesdl.curvature.kfac import Factors, factors, rescaled
from bayesdl.curvature.layers import layers_of, signals
from bayesdl.curvature.outputs import Curvature
from bayesdl.errors import MethodError
from bayesdl.posterior import prepare
from tests.curvature.networks import DOUBLE, NOISE, Tiny, noise

KINDS = ("regression", "classes", "counts")
CURVATURES: tuple[Curvature, ...] = ("ggn", "fisher")


def close(found: Tensor, wanted: object) -> None:
    torch.testing.assert_close(
        found, wanted if isinstance(wanted, Tensor) else torch.from_numpy(np.array(wanted)), rtol=1e-10, atol=1e-11
    )


def oracle(tiny: Tiny, z: Tensor, curvature: str) -> np.ndarray:
    jacobian, hessians, slopes = tiny.oracle(z)
    middle = hessians if curvature == "ggn" else slopes[:, :, None] * slopes[:, None]
    return np.einsum("nkd,nkl,nle->de", jacobian, middle, jacobian)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_the_dense_matrix_in_numpy(kind: str, curvature: Curvature) -> None:
    tiny = Tiny(kind)
    network = tiny.network()
    wanted = oracle(tiny, network.z, curvature)
    close(dense(network, network.sites, curvature), wanted)
    close(diagonal(network, network.sites, curvature), wanted.diagonal())
    rows = noise(5, len(network.z), seed=3)
    close(network.times(rows, curvature), rows.numpy() @ wanted)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 100])
def test_batches_only_split_the_sum(batch_size: int) -> None:
    network = Tiny("classes").network()
    layers = layers_of(network, network.sites)[0]
    close(dense(network, network.sites, "ggn", batch_size), dense(network, network.sites))
    close(diagonal(network, network.sites, "ggn", batch_size), diagonal(network, network.sites))
    rows = noise(2, len(network.z), seed=3)
    close(network.times(rows, "ggn", batch_size), network.times(rows))
    close(hessian(network.problem, network.z, None, batch_size), hessian(network.problem, network.z))
    for part, whole in zip(factors(network, layers, "ggn", batch_size), factors(network, layers), strict=True):
        close(part.left, whole.left)
        close(part.right, whole.right)


def test_twice_the_rows_have_twice_the_curvature() -> None:
    once, twice = Tiny("classes").network(), Tiny("classes", copies=2).network()
    assert torch.equal(once.z, twice.z)
    close(dense(twice, twice.sites), 2 * dense(once, once.sites))
    for one, two in zip(kron(once), kron(twice), strict=True):
        close(two, 2 * one)


def kron(network: NetworkOutputs) -> list[Tensor]:
    """K-FAC of every layer written out, in the order of the layer's coordinates."""
    layers = layers_of(network, network.sites)[0]
    return [torch.kron(f.left, f.right) for f in factors(network, layers)]


def test_labels_change_the_empirical_fisher_and_not_the_gauss_newton_matrix() -> None:
    network = Tiny("classes").network()
    batch = dict(network.problem.batch)
    other = {"x": batch["x"], "y": batch["y"].flip(0)}
    assert not torch.equal(batch["y"], other["y"])
    close(network.roots(batch, "ggn"), network.roots(other, "ggn"))
    assert not torch.allclose(network.roots(batch, "fisher"), network.roots(other, "fisher"))


def test_the_gauss_newton_matrix_is_the_fisher_information_of_the_model() -> None:
    """sum over classes of p_c s_c s_c^T with s_c the score of label c."""
    network = Tiny("classes").network()
    with torch.no_grad():
        p = network.at(network.z, network.problem.batch["x"]).softmax(1)
    x, total = network.problem.batch["x"], 0.0
    for label in range(3):
        scores = network.roots({"x": x, "y": torch.full((len(x),), label)}, "fisher")
        total = total + p[:, label, None, None] * (scores @ scores.mT)
    roots = network.roots(network.problem.batch, "ggn")
    close(roots @ roots.mT, total)


def test_the_hessian_of_a_network_is_gauss_newton_plus_residuals() -> None:
    """With targets equal to the outputs nothing is left of the second term; else it is there."""
    tiny = Tiny("regression")
    network = tiny.network()
    exact = network.at(network.z, tiny.x)
    model = network.problem.model
    perfect = prepare(model, (tiny.x, exact))
    precision = 1 / perfect.density.gaussian_prior()[1].square()
    close(-hessian(perfect, network.z), dense(network, network.sites) + precision.diag())
    residual = -hessian(network.problem, network.z) - precision.diag() - dense(network, network.sites)
    assert residual.abs().max() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_hessians_are_those_of_the_log_density(temperature: float) -> None:
    tiny = Tiny("classes")
    network = tiny.network()
    problem = prepare(network.problem.model, (tiny.x, tiny.y), temperature=temperature)
    z, step = network.z, 1e-5
    found = hessian(problem, z, chunk=5)
    units = step * torch.eye(len(z), dtype=DOUBLE)
    ahead, behind = (problem.density.value_and_grad(z + sign * units)[1] for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    rows = noise(4, len(z), seed=5)
    close(hessian_times(problem, z, rows), rows @ found)
    some = torch.tensor([7, 2, 11])
    close(hessian(problem, z, some), found[some][:, some])
    scaled = NetworkOutputs(problem, z)
    close(dense(scaled, scaled.sites), dense(network, network.sites) / temperature)


def test_a_hessian_that_does_not_fit_is_refused_with_its_size() -> None:
    problem = prepare(bdl.BayesianNetwork(nn.Linear(10_000, 10)), (torch.zeros(2, 10_000), torch.zeros(2, 10)))
    with pytest.raises(MethodError, match=r"A Hessian of 100,011 unknowns takes 37 GiB.*kron"):
        hessian(problem, torch.zeros(problem.density.dim))


def test_the_largest_eigenvalues_are_found() -> None:
    root = noise(40, 40, seed=8) * torch.linspace(0.1, 3, 40, dtype=DOUBLE) ** 3
    matrix = root @ root.mT
    values, vectors = top(lambda rows: rows @ matrix, matrix[0], 5)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix).flip(0)[:5], rtol=1e-7, atol=0)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-2)
    narrow = noise(40, 3, seed=9)
    values, vectors = top(lambda rows: rows @ narrow @ narrow.mT, matrix[0], 6)
    close((vectors * values) @ vectors.mT, narrow @ narrow.mT)


# -- K-FAC -----------------------------------------------------------------------------------------------------------


def linear_network(*widths: int, x: Tensor | None = None) -> NetworkOutputs:
    layers = [nn.Linear(a, b).double() for a, b in pairwise(widths)]
    x = noise(9, widths[0]) if x is None else x
    model = bdl.BayesianNetwork(nn.Sequential(*layers), likelihood=bdl.likelihoods.Gaussian(noise=NOISE))
    problem = prepare(model, (x, noise(len(x), widths[-1], seed=1)))
    return NetworkOutputs(problem, noise(problem.density.dim, seed=4))


@pytest.mark.parametrize("widths", [(3, 2), (3, 4, 2), (3, 4, 3, 2)])
def test_kfac_is_exact_for_every_layer_of_a_linear_network(widths: tuple[int, ...]) -> None:
    """The gradients at a layer are the same in all rows there, so the sum over rows factorises (Bernacchia, 2018)."""
    network = linear_network(*widths)
    whole = dense(network, network.sites)
    for layer, found in zip(layers_of(network, network.sites)[0], kron(network), strict=True):
        place = layer.place.flatten()
        close(found, whole[place][:, place])


def test_kfac_is_not_exact_where_gradients_depend_on_the_row() -> None:
    network = Tiny("regression").network()
    layer, place = kron(network)[0], layers_of(network, network.sites)[0][0].place.flatten()
    assert (layer - dense(network, network.sites)[place][:, place]).abs().max() > 0.1


def test_ekfac_has_the_exact_diagonal_in_its_basis() -> None:
    network = Tiny("classes").network()
    layers = layers_of(network, network.sites)[0]
    bases = [(torch.linalg.eigh(f.left)[1], torch.linalg.eigh(f.right)[1]) for f in factors(network, layers)]
    whole = dense(network, network.sites)
    for layer, (left, right), found in zip(layers, bases, rescaled(network, layers, bases), strict=True):
        place, basis = layer.place.flatten(), torch.kron(left, right)
        close(found.flatten(), (basis.mT @ whole[place][:, place] @ basis).diagonal())


class Convolutional(nn.Module):
    """A convolution, something in place, a frozen gain, an embedding by hand, and two linear layers of which one is
    called twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, stride=1, padding=1)
        self.norm = nn.LayerNorm(4)
        self.twice = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.conv(x)).sum(1).flatten(1)[:, :4]
        return self.last(self.norm(self.twice(torch.tanh(self.twice(h)))))


def test_layers_of_any_network_give_the_same_diagonal_as_row_by_row() -> None:
    x, y = noise(5, 2, 3, 3), noise(5, 2, seed=1)
    problem = prepare(bdl.BayesianNetwork(Convolutional().double()), (x, y))
    network = NetworkOutputs(problem, 0.5 * noise(problem.density.dim, seed=3))
    layers, others = layers_of(network, network.sites)
    assert [layer.name for layer in layers] == ["conv", "last"]
    assert [site.name for site in others] == ["norm.weight", "norm.bias", "twice.weight", "twice.bias"]
    close(diagonal(network, network.sites), dense(network, network.sites).diagonal())
    f, found = signals(network, layers, x)
    close(f, network.at(network.z, x))
    rows = network.row_factors(x, torch.eye(2, dtype=DOUBLE).expand(5, 2, 2))
    for layer, signal in zip(layers, found, strict=True):
        derivatives = torch.cat(list(signal.derivatives()), 1).movedim(0, 1)
        first = network.sites[0].start
        close(derivatives, rows[:, :, layer.place - first])


def test_kfac_of_a_convolution_is_that_of_its_patches() -> None:
    """One pixel of output: the layer is linear on its only patch, so the factors are exact as those of a linear one."""
    x, y = noise(6, 2, 3, 3), noise(6, 2, seed=1)
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten()).double()
    problem = prepare(bdl.BayesianNetwork(net, likelihood=bdl.likelihoods.Gaussian(noise=NOISE)), (x, y))
    network = NetworkOutputs(problem, noise(problem.density.dim, seed=3))
    place = layers_of(network, network.sites)[0][0].place.flatten()
    close(kron(network)[0], dense(network, network.sites)[place][:, place])


def test_factors_sum_rows_once() -> None:
    network = linear_network(3, 2)
    found = factors(network, layers_of(network, network.sites)[0])[0]
    assert isinstance(found, Factors)
    x = torch.cat([network.problem.batch["x"], torch.ones(9, 1, dtype=DOUBLE)], 1)
    close(found.right, x.mT @ x / 9)
    close(found.left, 9 / NOISE**2 * torch.eye(2, dtype=DOUBLE))
