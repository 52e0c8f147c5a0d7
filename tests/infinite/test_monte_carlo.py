"""Kernels estimated from random networks, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import MethodError
from bayesdl.infinite import monte_carlo_kernel
from bayesdl.models import BayesianNetwork, Erf, priors

W, B = 1.5, 0.4
NORMAL = priors.Normal("fan_in", w_std=W, b_std=B)


def erf_kernels(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of one hidden erf layer (Williams, 1997)."""
    d = x1.shape[1]
    k, q1, q2 = (W**2 * v / d + B**2 for v in (x1 @ x2.T, x1.square().sum(1), x2.square().sum(1)))
    norms = (1 + 2 * q1)[:, None] * (1 + 2 * q2)
    nngp = W**2 * 2 / torch.pi * torch.asin(2 * k / norms.sqrt()) + B**2
    slopes = 4 / torch.pi / (norms - 4 * k**2).sqrt()
    return nngp, nngp + W**2 * k * slopes


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, generator=generator).double(), torch.randn(3, 3, generator=generator).double()


@pytest.mark.parametrize("width", [2, 64])
def test_one_hidden_layer_is_unbiased_at_every_width(width: int) -> None:
    x1, x2 = inputs()
    model = BayesianNetwork(nn.Sequential(nn.Linear(3, width), Erf(), nn.Linear(width, 2)).double(), NORMAL)
    found = monte_carlo_kernel(model, x1, x2, draws=60)
    assert found.ntk is not None
    assert found.ntk_error is not None
    nngp, ntk = erf_kernels(x1, x2)
    for value, error, exact in ((found.nngp, found.nngp_error, nngp), (found.ntk, found.ntk_error, ntk)):
        pulls = (value - exact) / error
        assert pulls.abs().max() < 4
        assert pulls.square().mean() < 3
        assert error.max() < 0.25 * exact.abs().max()


def test_networks_without_a_readout_are_averaged_over_their_outputs() -> None:
    x1, x2 = inputs()
    net = nn.Sequential(nn.Linear(3, 20), Erf(), nn.Linear(20, 3), nn.Identity()).double()
    sine = nn.Sequential(*net, nn.Softsign())
    exact = erf_kernels(x1, x2)[0]
    with_readout = monte_carlo_kernel(BayesianNetwork(net, NORMAL), x1, x2, draws=150, ntk=False)
    assert with_readout.ntk is None
    raw = monte_carlo_kernel(BayesianNetwork(net, priors.StudentT(9.0, w_std=W, b_std=B)), x1, x2, draws=20, ntk=False)
    assert raw.nngp.isfinite().all()
    bounded = monte_carlo_kernel(BayesianNetwork(sine, NORMAL), x1, draws=20, ntk=False).nngp
    assert 0 < bounded.diagonal().max() < 1
    assert ((with_readout.nngp - exact).abs() < 4.5 * with_readout.nngp_error).all()


def test_a_bare_module_is_drawn_from_its_own_initialisation() -> None:
    x1, _ = inputs()
    net = nn.Linear(3, 30).double()  # uniform on +-1 / sqrt(3), for weights and biases
    found = monte_carlo_kernel(net, x1, draws=40, seed=5)
    assert ((found.nngp - (x1 @ x1.T + 1) / 9).abs() < 4 * found.nngp_error).all()
    assert found.nngp_error.max() < 0.05 * found.nngp.max()
    torch.testing.assert_close(found.ntk, x1 @ x1.T + 1)
    again = monte_carlo_kernel(net, x1, draws=40, seed=5)
    assert torch.equal(found.nngp, again.nngp)
    with pytest.raises(MethodError, match="at least 2"):
        monte_carlo_kernel(net, x1, draws=1)
