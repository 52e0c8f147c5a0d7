"""A4-03: the change of a layer's gradient by the update of the layers before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesdl.errors import DataError
from bayesdl.theory.covariate_shift import internal_covariate_shift


def test_of_two_linear_layers_by_hand() -> None:
    """L = (b a x - y)^2 / 2 with one unit a layer: dL/db = (b a x - y) a x."""
    x, y = 1.5, 0.4

    def loss(p: dict[str, Tensor]) -> Tensor:
        return 0.5 * (p["2.weight"] * p["1.weight"] * x - y) ** 2

    a, b, a_new, b_new = 0.7, -1.1, 0.9, -0.6
    before = {"1.weight": torch.tensor(a), "2.weight": torch.tensor(b)}
    after = {"1.weight": torch.tensor(a_new), "2.weight": torch.tensor(b_new)}
    found = internal_covariate_shift(loss, before, after)
    assert found["1"] == 0
    slopes = [(b * first * x - y) * first * x for first in (a, a_new)]
    assert found["2"] == pytest.approx(abs(slopes[0] - slopes[1]), rel=1e-5)


def test_of_a_network_it_is_zero_first_and_goes_with_the_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return (functional_call(net, p, (x,)) - y).square().mean()

    before = dict(net.named_parameters())
    slopes = torch.autograd.grad(loss(before), list(before.values()))
    shifts = []
    for rate in (1e-3, 1e-4):
        after = {name: value - rate * slope for (name, value), slope in zip(before.items(), slopes, strict=True)}
        shifts.append(internal_covariate_shift(loss, before, after))
    assert list(shifts[0]) == ["0", "2", "4"]
    assert shifts[0]["0"] == shifts[1]["0"] == 0
    for layer in ("2", "4"):
        assert shifts[0][layer] / shifts[1][layer] == pytest.approx(10, rel=0.05)


def test_names_must_agree() -> None:
    one, other = {"a.weight": torch.ones(1)}, {"b.weight": torch.ones(1)}
    with pytest.raises(DataError, match="same"):
        internal_covariate_shift(lambda p: p["a.weight"].sum(), one, other)
