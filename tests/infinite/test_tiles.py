"""Kernels tile by tile: any tiles give the same numbers, symmetric matrices are so exactly, memory and forecasts."""

import logging

import pytest
import torch
from torch import Tensor

from bayesdl.errors import BayesdlError, DataError, TooLarge
from bayesdl.infinite import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    InfiniteNetwork,
    LayerNorm,
    NTKKernel,
    Sum,
    forecast,
    fully_connected,
    kernel,
    tiles,
)

PADDED = Conv(1.3, 0.2, padding=((1, 1), (1, 1)))
STRIDED = Conv(1.2, 0.1, window=(2, 2), stride=(2, 2))
RELU, ERF = Activation("relu"), Activation("erf", (1.5, 0.7, 0.1))
POOL = AvgPool((2, 2), (2, 2), ((0, 0), (0, 0)))
NETWORKS = {
    "tables": (fully_connected(3, "relu", 1.5, 0.1), (5,)),
    "residual": ((Dense(), Sum(((), (ERF, Dense(0.8, 0.3)))), LayerNorm(), RELU, Dense()), (5,)),
    "flatten": ((PADDED, RELU, STRIDED, ERF, Flatten(), Dense()), (2, 4, 6)),
    "mean": ((PADDED, LayerNorm(), RELU, PADDED, ERF, AvgPool(), Flatten(), Dense()), (2, 4, 6)),
    # a nonlinear layer after the pool: its variances need the covariances between pixels
    "pool between": ((PADDED, RELU, POOL, PADDED, Sum(((), (RELU, PADDED))), ERF, Flatten(), Dense()), (2, 4, 6)),
    "pool, then mean": ((PADDED, RELU, POOL, PADDED, LayerNorm(), RELU, AvgPool(), Flatten(), Dense(), RELU, Dense()),
                        (2, 4, 6)),
}  # fmt: skip


def rows(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_of_any_shape_give_the_matrix_of_the_recursion_without_tiles(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, shape = NETWORKS[name]
    k = InfiniteNetwork(layers)
    x1, x2 = rows(7, shape), rows(5, shape, 1)
    taped = x1.clone().requires_grad_()  # gradients are computed without tiles
    whole, own = (tuple(part.detach() for part in k.kernels(taped, other)) for other in (x2, taped))
    lines = tuple(part.detach() for part in k.kernels(taped[:5], x2, diag=True))
    for size in ((1, 1), (1, 4), (3, 2), (2, 3), (9, 9)):
        monkeypatch.setattr(tiles, "tile_shape", lambda layers, x, size=size: size)
        found = (*k.kernels(x1, x2), *k.kernels(x1), *k.kernels(x1[:5], x2, diag=True), *k.kernels(x1, diag=True))
        # the angle of equal rows is known to half of the digits where both are seen as two inputs
        for a, b in zip(found, (*whole, *own, *lines, *(part.diagonal() for part in own)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        for symmetric in found[2:4]:
            assert torch.equal(symmetric, symmetric.T)


@pytest.mark.parametrize("name", NETWORKS)
def test_symmetric_matrices_are_exactly_so_in_single_precision_too(name: str) -> None:
    layers, shape = NETWORKS[name]
    x = rows(30, shape).float()
    for matrix, exact in zip(
        InfiniteNetwork(layers).kernels(x), InfiniteNetwork(layers).kernels(x.double()), strict=True
    ):
        assert torch.equal(matrix, matrix.T)
        torch.testing.assert_close(matrix.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flatten", "pool between"])
def test_hyperparameters_of_a_batch_see_their_own_images(name: str) -> None:
    layers, shape = NETWORKS[name]
    one = NTKKernel(layers, input_shape=shape, dtype=torch.float64)
    two = NTKKernel(layers, input_shape=shape, batch_shape=torch.Size([2]), dtype=torch.float64)
    scale = torch.tensor([[1.0], [1.7]], dtype=torch.float64)
    two.w_var = scale * one.w_var
    x = rows(3, shape).flatten(1)
    both = two(x).to_dense()
    one.w_var = 1.7 * one.w_var
    torch.testing.assert_close(both[1], one(x).to_dense())
    assert both.shape == (2, 3, 3)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_empty_sets_have_empty_matrices() -> None:
    k = InfiniteNetwork(fully_connected(2))
    for a, b in ((0, 3), (3, 0), (0, 0)):
        assert [part.shape for part in k.kernels(torch.ones(a, 2), torch.ones(b, 2))] == [(a, b)] * 2
    assert k.nngp(torch.ones(0, 2)).shape == (0, 0)


def test_scales_far_from_one_neither_overflow_nor_vanish() -> None:
    k = InfiniteNetwork(fully_connected(2, "relu", 1.4, 0.0))
    x = rows(4, (3,)).float()
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(k.nngp(scale * x) / scale**2, k.nngp(x), rtol=1e-5, atol=0)
        torch.testing.assert_close(k.ntk(scale * x) / scale**2, k.ntk(x), rtol=1e-5, atol=0)


def test_an_image_at_a_time_where_images_are_large() -> None:
    layers, _ = NETWORKS["mean"]
    for pixels, size in ((4, (16, 64)), (16, (1, tiles.RUN)), (32, (1, 1)), (128, (1, 1))):
        assert tiles.tile_shape(layers, torch.empty(1, 2, pixels, pixels)) == size


@pytest.mark.parametrize("name", ["tables", "flatten", "mean"])
def test_forecasts_count_the_tiles_and_the_bytes(name: str) -> None:
    layers, shape = NETWORKS[name]
    k, x = InfiniteNetwork(layers), rows(3, shape)
    for n1, n2 in ((1000, None), (1000, 1000), (10, 3000)):
        told = k.forecast(x, n1, n2)
        made = tiles.Tiles(
            layers, torch.empty(n1, *shape), None if n2 is None else torch.empty(n2, *shape), True, False
        )
        assert told.tiles == len(list(made))
        assert told.results == 2 * 8 * n1 * (n2 or n1)
        assert told.seconds > 0
    assert k.forecast(x, 1000, ntk=False).results == 8 * 1000**2
    assert k.forecast(x.float(), 1000).results == 8 * 1000**2
    assert "GiB of results" in str(told)


@pytest.mark.parametrize("name", ["tables", "flatten", "mean"])
def test_memory_beside_the_results_is_what_the_forecast_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, shape = NETWORKS[name]
    k, x = InfiniteNetwork(layers), rows(400, shape)[: 400 if name != "mean" else 40]
    monkeypatch.setattr(tiles, "keep_freed_memory", lambda: None)
    with torch.profiler.profile(profile_memory=True) as profile:
        k.kernels(x)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    told = k.forecast(x[:5], len(x))
    assert told.results + told.working / 4 < peak < told.results + told.working


def test_impossible_matrices_and_forecasts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    k, x = InfiniteNetwork(fully_connected(1)), torch.ones(100, 2)
    monkeypatch.setattr(forecast, "memory", lambda: 60_000.0)
    with pytest.raises(TooLarge, match="2 kernel matrices of 100 x 100") as caught:
        k.kernels(x)
    assert isinstance(caught.value, (BayesdlError, MemoryError))
    assert k.nngp(x).shape == (100, 100)
    for n1, n2 in ((0, None), (5, 0)):
        with pytest.raises(DataError, match="needs rows"):
            k.forecast(x, n1, n2)


def test_long_computations_say_so_before_they_begin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    k = InfiniteNetwork(fully_connected(1))
    with caplog.at_level(logging.INFO):
        k.nngp(torch.ones(10, 2))
        assert not caplog.messages
        monkeypatch.setattr(kernel, "LONG", 1)
        k.nngp(torch.ones(10, 2))
    assert len(caplog.messages) == 1
    assert "Kernels of 10 x 10 pairs: about" in caplog.messages[0]
