from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bayesdl.data import Scaler
from bayesdl.errors import DataError

tables = hnp.arrays("float64", hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(-1e6, 1e6))
wild = hnp.arrays("float64", hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(-1e300, 1e300))


@given(tables, st.booleans())
def test_scaling_a_target_and_back_is_the_identity(table, scale_y):
    x, y = torch.from_numpy(table), torch.from_numpy(table[:, 0])
    scaler = Scaler.fit(x, y, scale_y=scale_y)
    torch.testing.assert_close(scaler.unscale_y(scaler.y(y)), y, rtol=1e-9, atol=1e-12 * max(1.0, float(y.abs().max())))


@given(wild)
def test_scaled_inputs_are_finite_and_constant_columns_become_zero(table):
    x = torch.from_numpy(table)
    scaler = Scaler.fit(x)
    scaled = scaler.x(x)
    assert torch.isfinite(scaled).all()
    assert (scaler.x_scale > 0).all()
    constant = (x == x[0]).all(0)
    assert (scaled[:, constant] == 0).all()
    assert (scaler.x_scale[constant] == 1).all()


def test_means_and_scales_are_those_of_the_columns():
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 7 + 3
    y = x.sum(1)
    scaler = Scaler.fit(x, y, scale_y=True)
    torch.testing.assert_close(scaler.x_mean, x.mean(0))
    torch.testing.assert_close(scaler.x_scale, x.std(0, correction=0))
    torch.testing.assert_close(scaler.y_scale, y.std(correction=0))
    assert scaler.y_mean.shape == scaler.y_scale.shape == ()
    torch.testing.assert_close(scaler.x(x).square().mean(0), torch.ones(3, dtype=torch.float64))


def test_extreme_columns_neither_overflow_nor_underflow():
    x = torch.tensor([[1e300, 1e-200, 1e9 + 1], [-1e300, -1e-200, 1e9 + 2]], dtype=torch.float64)
    torch.testing.assert_close(Scaler.fit(x).x(x), torch.tensor([[1, 1, -1], [-1, -1, 1]], dtype=torch.float64))


def test_a_constant_that_float64_rounds_has_scale_one():
    x = torch.full((7, 1), 0.1, dtype=torch.float64)
    scaler = Scaler.fit(x, x[:, 0], scale_y=True)
    assert scaler.x_scale.item() == scaler.y_scale.item() == 1
    assert scaler.x(x).abs().max() == 0
    assert scaler.y(x[:, 0]).abs().max() == 0


def test_images_have_one_mean_and_scale_for_each_channel():
    x = torch.rand(20, 2, 4, 5, generator=torch.Generator().manual_seed(2))
    x[:, :, 0, 0] = 0
    scaler = Scaler.fit(x)
    assert scaler.x_mean.shape == (2, 1, 1)
    torch.testing.assert_close(scaler.x_mean.flatten(), x.double().mean((0, 2, 3)))
    assert scaler.x(x).dtype == torch.float32
    assert scaler.x(x[:, :, :2]).shape == (20, 2, 2, 5)
    with pytest.raises(DataError, match=r"shape \[N, 2, 1, 1\]"):
        scaler.x(x[:, :1])


def test_fit_is_in_float64_whatever_comes_in():
    x = (torch.arange(1000.0)[:, None] + 1e6).float()
    scaler = Scaler.fit(x)
    assert scaler.x_mean.dtype == torch.float64
    torch.testing.assert_close(scaler.x_mean.item(), 1e6 + 499.5, rtol=1e-15, atol=0)
    assert scaler.x(x).dtype == torch.float32
    assert scaler.x(x.long()).dtype == torch.float64


def test_classes_pass_through_an_unscaled_target():
    scaler = Scaler.fit(torch.rand(4, 2))
    y = torch.tensor([0, 1, 1, 0])
    assert scaler.y(y) is y
    assert scaler.unscale_y(y) is y


def test_identity_changes_nothing_but_still_checks_the_columns():
    x = torch.rand(4, 3, dtype=torch.float64)
    scaler = Scaler.identity(x)
    assert torch.equal(scaler.x(x), x)
    assert torch.equal(scaler.y(x[:, 0]), x[:, 0])
    with pytest.raises(DataError, match="same columns"):
        scaler.x(x[:, :2])


def test_one_dimensional_inputs():
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert Scaler.fit(x).x(x).tolist() == [-1, 1]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4), (3,), (5, 3, 1), ()])
def test_another_number_of_columns_is_refused(shape):
    scaler = Scaler.fit(torch.rand(4, 3))
    with pytest.raises(DataError, match=r"fitted on have shape \[N, 3\].*x\[None\]"):
        scaler.x(torch.rand(shape))


def test_a_table_of_one_column_does_not_broadcast():
    with pytest.raises(DataError, match="same columns"):
        Scaler.fit(torch.rand(4, 1)).x(torch.rand(4, 3))


def test_state_round_trip():
    scaler = Scaler.fit(torch.rand(4, 3), torch.rand(4), scale_y=True)
    again = Scaler.from_state(scaler.state())
    assert all(torch.equal(again.state()[name], value) for name, value in scaler.state().items())
    with pytest.raises(DataError, match="lacks y_scale"):
        Scaler.from_state({name: value for name, value in scaler.state().items() if name != "y_scale"})
    with pytest.raises(DataError, match="positive scales"):
        Scaler.from_state({**scaler.state(), "x_scale": torch.zeros(3)})


def test_misuse_of_fit():
    with pytest.raises(DataError, match="no rows"):
        Scaler.fit(torch.empty(0, 3))
    with pytest.raises(DataError, match="scale_y=True needs y"):
        Scaler.fit(torch.rand(4, 3), scale_y=True)
