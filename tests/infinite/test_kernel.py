"""The NNGP recursion against an independent implementation and against wide random networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import DataError, ModelError
from bayesdl.infinite import Activation, AvgPool, Conv, Dense, Sum, from_module, fully_connected, nngp
from bayesdl.infinite.layers import layers_from_json, layers_to_json
from bayesdl.infinite.recursion import Covariance, propagate
from bayesdl.models import BayesianNetwork, Erf, priors

REFERENCE = np.load(Path(__file__).parent / "data" / "infinite_width.npz")


@pytest.mark.parametrize(
    ("name", "depth", "activation"),
    [("dense_relu_1", 1, "relu"), ("dense_relu_3", 3, "relu"), ("dense_erf_2", 2, "erf")],
)
def test_kernel_equals_an_independent_implementation(name: str, depth: int, activation: str) -> None:
    x1, x2, cross, own = (torch.as_tensor(REFERENCE[f"{name}/{part}"]) for part in ("x1", "x2", "nngp", "nngp11"))
    layers = fully_connected(depth, activation, w_std=1.5, b_std=0.1)
    torch.testing.assert_close(nngp(layers, x1, x2), cross, rtol=0, atol=1e-10)
    torch.testing.assert_close(nngp(layers, x1), own, rtol=0, atol=1e-10)
    torch.testing.assert_close(nngp(layers, x1, diag=True), own.diagonal(), rtol=0, atol=1e-10)


def test_all_three_entries_of_the_covariance_are_carried() -> None:
    # Freezing the variances at their start's fixed point, as in the analysis of signal propagation, would give 0.853.
    start = Covariance(*(torch.tensor(v, dtype=torch.float64) for v in (3.0, 0.5, 0.4)))
    w, b = torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    pairs = (start, *(Covariance(q, q, q) for q in (start.q1, start.q2)))
    q12, q1, q2 = (propagate((Activation("relu"), Dense()) * 3, pair, [w] * 3, [b] * 3)[0] for pair in pairs)
    assert (q12 / (q1 * q2).sqrt()).item() == pytest.approx(0.728, abs=5e-4)
    assert q1.item() != pytest.approx(q2.item(), rel=0.05)


@pytest.mark.parametrize("activation", ["relu", "erf", "linear"])
def test_kernel_matrices_are_positive_semi_definite_with_repeated_and_zero_rows(activation: str) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, x[:5], 2 * x[:5], torch.zeros(2, 4, dtype=torch.float64)])
    matrix = nngp(fully_connected(3, activation, 1.3, 0.2), x)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-14, atol=0)
    values = torch.linalg.eigvalsh(matrix)
    assert values.min() > -1e-12 * values.max()


def test_relu_without_biases_is_homogeneous_and_linear_layers_are_the_linear_kernel() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layers = fully_connected(2, "relu", 1.4, 0.0)
    torch.testing.assert_close(nngp(layers, 3 * x, x), 3 * nngp(layers, x), rtol=1e-12, atol=0)
    torch.testing.assert_close(nngp(fully_connected(2, "linear", 1.5, 0.0), x), 1.5**6 * x @ x.T / 3)


def test_gradient_with_respect_to_inputs_is_right_on_the_diagonal_too() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    layers = fully_connected(2, "relu", 1.4, 0.3)
    weights = torch.rand(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * nngp(layers, x)).sum(), x)
    step = 1e-6
    for i in range(4):
        for j in range(3):
            ends = []
            for sign in (1, -1):
                moved = x.detach().clone()
                moved[i, j] += sign * step
                ends.append((weights * nngp(layers, moved)).sum())
            assert gradient[i, j].item() == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-6)


def z_scores(outputs: Tensor, kernel: Tensor) -> Tensor:
    """How many standard errors the mean over networks of f(x) f(x') lies from the kernel; outputs [S, N, units]."""
    products = torch.einsum("snu,smu->snm", outputs, outputs) / outputs.shape[-1]
    return (products.mean(0) - kernel) / (products.std(0) / len(products) ** 0.5)


def prior_outputs(model: BayesianNetwork, x: Tensor, networks: int) -> Tensor:
    """Outputs [S, N, units] of the finite network with weights from its own prior."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = ({site.name: model.prior.distribution(site).sample() for site in model.sites} for _ in range(networks))
        return torch.stack([model.forward(draw, x) for draw in draws])


@pytest.mark.parametrize("kind", [nn.ReLU, Erf])
def test_a_wide_network_with_the_same_prior_has_this_covariance(kind: type[nn.Module]) -> None:
    width, units = 500, 100
    net = nn.Sequential(nn.Linear(3, width), kind(), nn.Linear(width, width), kind(), nn.Linear(width, units)).double()
    model = BayesianNetwork(net, priors.Normal("fan_in", w_std=2**0.5, b_std=0.1**0.5))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    outputs = prior_outputs(model, x, 150)
    layers = from_module(model)
    # 15 entries; the covariance of relu networks is exact at any width, that of erf networks up to O(1/width)
    assert z_scores(outputs, nngp(layers, x)).abs().max() < 4.5
    wrong = fully_connected(2, "relu" if kind is nn.ReLU else "erf", w_std=1.3, b_std=0.1**0.5)
    assert z_scores(outputs, nngp(wrong, x)).abs().max() > 8


def test_scales_that_are_not_fan_in_give_one_model_too() -> None:
    net = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 50)).double()
    model = BayesianNetwork(net, priors.Normal(0.3))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert z_scores(prior_outputs(model, x, 400), nngp(from_module(model), x)).abs().max() < 4.5


def test_layers_survive_json() -> None:
    block = (Conv(1.2, 0.1, 18, padding=((1, 1), (1, 1))), Activation("leaky_relu", (0.2,)), Conv(1.0, 0.0))
    layers = (
        Dense(1.5, 0.0),
        Activation("relu"),
        Sum(((), block)),
        AvgPool((2, 2), (2, 2), ((0, 0), (0, 0))),
        Dense(0.3),
    )
    assert layers_from_json(json.loads(json.dumps(layers_to_json(layers)))) == layers
    assert layers_to_json((Dense(), Activation(torch.tanh), Dense())) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dense(0.0, 1.0), "w_std"),
        (lambda: Dense(1.0, -1.0), "b_std"),
        (lambda: Dense(float("nan"), 1.0), "w_std"),
        (lambda: Activation("tanh"), "relu, abs, erf"),
        (lambda: fully_connected(-1), "depth"),
        (lambda: nngp((Activation("relu"), Dense()), torch.ones(2, 2)), "first layer"),
        (lambda: nngp((Dense(), Activation("relu")), torch.ones(2, 2)), "last layer"),
        (lambda: nngp((), torch.ones(2, 2)), "first layer"),
    ],
)
def test_impossible_layers_are_refused(make: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()


@pytest.mark.parametrize("x2", [torch.ones(2, 3), torch.ones(2)])
def test_inputs_that_do_not_fit_are_refused(x2: Tensor) -> None:
    with pytest.raises(DataError, match=r"\[N, d\]"):
        nngp(fully_connected(1), torch.ones(2, 2), x2)
