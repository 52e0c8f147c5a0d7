"""NNGPKernel as a GPyTorch kernel: GPyTorch's own test case, and derivatives."""

import unittest
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase

from bayesdl.infinite import Activation, Dense, NNGPKernel, NTKKernel, fully_connected, nngp


class TestRelu(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: Any) -> NNGPKernel:
        return NNGPKernel(fully_connected(2, "relu", 1.4, 0.3), **kwargs)


class TestErf(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: Any) -> NNGPKernel:
        return NNGPKernel(fully_connected(1, "erf", 1.4, 0.0), **kwargs)


class TestTangent(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: Any) -> NTKKernel:
        return NTKKernel(fully_connected(2, "erf", 1.4, 0.3), **kwargs)


@pytest.mark.slow
class TestTanh(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: Any) -> NNGPKernel:
        return NNGPKernel((Dense(1.4, 0.3), Activation(torch.tanh), Dense(1.4, 0.3)), **kwargs)


def inputs(n: int = 6, d: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_are_those_of_the_recursion() -> None:
    layers = fully_connected(2, "relu", 1.4, 0.3)
    kernel = NNGPKernel(layers, dtype=torch.float64)
    others = inputs(4, seed=1)
    torch.testing.assert_close(kernel(inputs(), others).to_dense(), nngp(layers, inputs(), others))
    torch.testing.assert_close(kernel(inputs(), diag=True), nngp(layers, inputs(), diag=True))
    assert all(isinstance(a, type(b)) for a, b in zip(kernel.layers, layers, strict=True))
    assert [la.w_std for la in kernel.layers if isinstance(la, Dense)] == pytest.approx([1.4] * 3, rel=1e-14)


def test_layers_without_bias_have_no_parameter_for_it() -> None:
    kernel = NNGPKernel((Dense(1.0, 0.0), *fully_connected(1, "relu", 1.0, 0.5)[1:]), dtype=torch.float64)
    assert (kernel.raw_w_var.shape, kernel.raw_b_var.shape) == ((2,), (1,))
    assert [la.b_std for la in kernel.layers if isinstance(la, Dense)] == [0.0, 0.5]
    assert NNGPKernel(fully_connected(1, b_std=0.0)).raw_b_var.numel() == 0


def test_batches_of_hyperparameters_are_independent_kernels() -> None:
    kernel = NNGPKernel(fully_connected(1), batch_shape=torch.Size([2]), dtype=torch.float64)
    kernel.w_var = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    whole = kernel(inputs().expand(2, 6, 3)).to_dense()
    for k in range(2):
        torch.testing.assert_close(whole[k], kernel[k](inputs()).to_dense())
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_gradient_of_hyperparameters_by_finite_differences(activation: str) -> None:
    kernel = NNGPKernel(fully_connected(2, activation, 1.4, 0.3), dtype=torch.float64)
    x = inputs()
    kernel(x).to_dense().square().sum().backward()
    for name in ("raw_w_var", "raw_b_var"):
        raw = getattr(kernel, name)
        for k in range(raw.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    raw[k] += sign * 1e-5
                    ends.append(kernel(x).to_dense().square().sum().item())
                    raw[k] -= sign * 1e-5
            assert raw.grad[k].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-7)


def test_single_and_double_precision_agree() -> None:
    kernel = NNGPKernel(fully_connected(3, "relu", 1.4, 0.3))
    single = kernel(inputs().float()).to_dense()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), kernel.double()(inputs()).to_dense(), rtol=3e-6, atol=3e-6)


def test_constraint_keeps_variances_positive() -> None:
    kernel = NNGPKernel()
    kernel.initialize(raw_w_var=torch.full((2,), -50.0))
    assert (kernel.w_var > 0).all()
    kernel.b_var = 0.25
    torch.testing.assert_close(kernel.b_var, torch.full((2,), 0.25))


def test_batches_of_inputs_meet_batches_of_hyperparameters() -> None:
    kernel = NNGPKernel(fully_connected(1), batch_shape=torch.Size([2]), dtype=torch.float64)
    kernel.w_var = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    x, z = torch.stack([inputs(), inputs(seed=1)]), torch.stack([inputs(4, seed=2)] * 2)
    whole = kernel(x, z).to_dense()
    assert whole.shape == (2, 6, 4)
    for k in range(2):
        torch.testing.assert_close(whole[k], kernel[k](x[k], z[k]).to_dense())
        torch.testing.assert_close(kernel(x, diag=True)[k], kernel[k](x[k]).to_dense().diagonal())
    # three sets of inputs under each of the two sets of hyperparameters
    more = torch.stack([inputs(seed=s) for s in range(3)]).unsqueeze(1)
    grid = kernel(more).to_dense()
    assert grid.shape == (3, 2, 6, 6)
    torch.testing.assert_close(grid[2, 1], kernel[1](more[2, 0]).to_dense())


def test_active_dims_see_only_their_columns() -> None:
    layers = fully_connected(1, "erf", 1.4, 0.3)
    kernel = NNGPKernel(layers, active_dims=(0, 2), dtype=torch.float64)
    x, z = inputs(), inputs(4, seed=1)
    torch.testing.assert_close(kernel(x, z).to_dense(), nngp(layers, x[:, [0, 2]], z[:, [0, 2]]))
    torch.testing.assert_close(kernel(x, diag=True), nngp(layers, x[:, [0, 2]], diag=True))


@pytest.mark.parametrize("kind", [NNGPKernel, NTKKernel])
@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
def test_gradient_of_inputs_by_finite_differences(kind: type[NNGPKernel], activation: str) -> None:
    layers = (Dense(1.4, 0.3), Activation(torch.tanh if activation == "tanh" else activation), Dense(1.4, 0.3))
    kernel, z = kind(layers, dtype=torch.float64), inputs(3, seed=1)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)

    def value(x: torch.Tensor) -> torch.Tensor:
        return (weights * kernel(x, z).to_dense()).sum() + kernel(x, diag=True).sum()

    x = inputs(2).requires_grad_()
    gradient = torch.autograd.grad(value(x), x)[0]
    for i in range(2):
        for j in range(3):
            step = torch.zeros_like(x)
            step[i, j] = 1e-5
            slope = (value(x.detach() + step) - value(x.detach() - step)).item() / 2e-5
            assert gradient[i, j].item() == pytest.approx(slope, rel=2e-4, abs=2e-5)


def test_priors_and_constraints_of_the_users_own() -> None:
    kernel = NNGPKernel(fully_connected(1), dtype=torch.float64)
    kernel.register_prior("w_var_prior", gpytorch.priors.GammaPrior(2.0, 1.0), "w_var")
    kernel.register_constraint("raw_b_var", gpytorch.constraints.Interval(0.01, 4.0))
    (_, _, prior, closure, _) = next(kernel.named_priors())
    kernel.w_var, kernel.b_var = 1.5, 0.25
    wanted = 2 * torch.distributions.Gamma(2.0, 1.0).log_prob(torch.tensor(1.5))
    assert prior.log_prob(closure(kernel)).sum().item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(kernel.b_var, torch.full((2,), 0.25, dtype=torch.float64))
    kernel.initialize(raw_b_var=torch.full((2,), 50.0))
    assert (kernel.b_var < 4 + 1e-6).all()  # GPyTorch keeps the bounds in single precision
    layers = [layer for layer in kernel.layers if isinstance(layer, Dense)]
    assert [layer.b_std for layer in layers] == pytest.approx([2.0, 2.0])
