"""What a large data set costs before the first step: a network is looked at through its first rows."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.density.discovery import GLANCE
from bayesdl.errors import DataError


class Seen(nn.Linear):
    """Notes how many rows it is given."""

    rows: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize(
    "method", [bdl.MAP(steps=3, batch_size=20), bdl.MeanFieldVI(steps=3, batch_size=20, samples=1)], ids=["MAP", "VI"]
)
def test_no_more_rows_at_once_than_a_glance(method: bdl.Method) -> None:
    """A convolutional network on all images at once would take the memory of the machine."""
    Seen.rows.clear()
    x = torch.randn(2000, 3)
    posterior = bdl.fit(bdl.BayesianNetwork(Seen(3, 1)), (x, x[:, 0]), method, init="network", progress=False)
    assert max(Seen.rows) <= GLANCE < 2000
    assert posterior.problem.density.n == 2000


def test_rows_with_noise_of_their_own_are_looked_at_as_few() -> None:
    """Local reparameterisation has a number for every output of every row: for images that is all memory there is."""
    seen: list[int] = []
    layer = nn.Linear(3, 1)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    x = torch.randn(2000, 3)
    method = bdl.MeanFieldVI(steps=3, batch_size=20, samples=1, estimator="local")
    posterior = bdl.fit(bdl.BayesianNetwork(layer), (x, x[:, 0]), method, init="network", progress=False)
    assert max(seen) <= GLANCE < 2000
    assert posterior.problem.density.n == 2000


def test_a_target_out_of_range_far_down_is_found() -> None:
    """Discovery looks at the first rows alone."""
    x, y = torch.randn(1000, 3), torch.zeros(1000)
    y[-1] = -1.0
    model = bdl.BayesianNetwork(nn.Linear(3, 1), likelihood=bdl.likelihoods.Poisson())
    with pytest.raises(DataError):
        bdl.fit(model, (x, y), bdl.MAP(steps=3), progress=False)
