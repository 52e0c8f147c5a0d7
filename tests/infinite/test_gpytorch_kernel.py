"""NNGPKernel as a GPyTorch kernel: GPyTorch's own test case, and derivatives."""

import unittest
from typing import Any

import pytest
import torch
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase

from bayesdl.infinite import Dense, NNGPKernel, NTKKernel, fully_connected, nngp


class TestRelu(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: Any) -> NNGPKernel:
        return NNGPKernel(fully_connected(2, "relu", 1.4, 0.3), **kwargs)


class TestErf(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: Any) -> NNGPKernel:
        return NNGPKernel(fully_connected(1, "erf", 1.4, 0.0), **kwargs)


class TestTangent(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: Any) -> NTKKernel:
        return NTKKernel(fully_connected(2, "erf", 1.4, 0.3), **kwargs)


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
