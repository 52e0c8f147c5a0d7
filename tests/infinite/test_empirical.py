"""Empirical kernels: three algorithms against a dense Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bayesdl.errors import DataError, MethodError, ModelError
from bayesdl.infinite import empirical_nngp, empirical_ntk, ntk_costs
from bayesdl.infinite.contraction import Structured
from bayesdl.infinite.empirical import ALGORITHMS
from bayesdl.infinite.finite import FiniteNetwork
from bayesdl.models import BayesianNetwork, priors

NORMAL = priors.Normal("fan_in", w_std=1.5, b_std=0.3)


class Odd(nn.Module):
    """A residual block whose layer is called twice, a normalising layer and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.norm, self.last = (
            nn.Linear(4, 5),
            nn.Linear(5, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 2),
        )
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = self.norm(h + self.twice(torch.relu(self.twice(h))))
        return self.last(self.gain * h)


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    if name == "mlp":
        net: nn.Module = nn.Sequential(
            nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)
        )
        shape: tuple[int, ...] = (4,)
    elif name == "conv":
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 30, 2, stride=2), nn.ReLU(),
            nn.Conv2d(30, 60, (1, 2), padding=(0, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(360, 2),
        )  # fmt: skip
        shape = (2, 4, 4)
    else:
        net, shape = Odd(), (4,)
    return net.double(), torch.randn(5, *shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)


def dense(net: nn.Module, x1: Tensor, x2: Tensor, sd: dict[str, Tensor] | None = None) -> Tensor:
    values = {name: value.detach() for name, value in net.named_parameters()}

    def jacobian(x: Tensor) -> Tensor:
        found = jacrev(lambda theta: functional_call(net, theta, (x,)))(values)
        return torch.cat([(j * (sd[name] if sd else 1.0)).flatten(2) for name, j in found.items()], 2)

    return torch.einsum("nkp,mlp->nmkl", jacobian(x1), jacobian(x2))


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@pytest.mark.parametrize("name", ["mlp", "conv", "odd"])
def test_algorithms_equal_the_dense_jacobian(name: str, algorithm: str) -> None:
    net, x1, x2 = build(name)
    for second, batch in ((x2, None), (x2, 2), (None, 2)):
        exact = dense(net, x1, x1 if second is None else second)
        found = empirical_ntk(net, x1, second, algorithm=algorithm, batch_size=batch, per_output=True)
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
        mean = empirical_ntk(net, x1, second, algorithm=algorithm, batch_size=batch)
        torch.testing.assert_close(mean, exact.diagonal(dim1=2, dim2=3).mean(2), rtol=1e-10, atol=1e-10)


def test_structured_takes_the_cheaper_way_for_each_convolution() -> None:
    net, x1, _ = build("conv")
    method = Structured(FiniteNetwork(net, x=x1), per_output=False)
    assert [t for _, _, t in method.shapes] == [16, 4, 6, 1]
    assert method.gram == [False, False, True, True]
    odd = Structured(FiniteNetwork(build("odd")[0], x=build("odd")[1]), per_output=False)
    assert [layer.name for layer in odd.layers] == ["first", "last"]
    assert odd.rest is not None
    assert {site.name.split(".")[0] for site in odd.rest.sites} == {"twice", "norm", "gain"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ntk_parameterisation_measures_parameters_in_prior_deviations(algorithm: str) -> None:
    net, x1, x2 = build("conv")
    model = BayesianNetwork(net, NORMAL)
    sd = {site.name: NORMAL.distribution(site).stddev for site in model.sites}
    found = empirical_ntk(model, x1, x2, parameterisation="ntk", algorithm=algorithm, per_output=True)
    torch.testing.assert_close(found, dense(net, x1, x2, sd), rtol=1e-10, atol=1e-10)
    # Units that differ within a layer, which no column of its inputs can carry.
    mixed = priors.PerParameter({"0.*": priors.Normal(0.5), "*": NORMAL})
    sd = {site.name: mixed.distribution(site).stddev for site in model.sites}
    found = empirical_ntk(BayesianNetwork(net, mixed), x1, parameterisation="ntk", algorithm=algorithm, per_output=True)
    torch.testing.assert_close(found, dense(net, x1, x1, sd), rtol=1e-10, atol=1e-10)


def test_parameters_can_be_given_and_frozen_ones_do_not_count() -> None:
    net, x1, _ = build("mlp")
    other = {"0.weight": torch.randn(7, 4, dtype=torch.float64)}
    found = empirical_ntk(net, x1, params=other, per_output=True)
    net.load_state_dict({**net.state_dict(), **other})
    torch.testing.assert_close(found, dense(net, x1, x1), rtol=1e-10, atol=1e-10)
    for parameter in net.parameters():
        parameter.requires_grad_(parameter is net[4].bias)
    torch.testing.assert_close(empirical_ntk(net, x1), torch.ones(5, 5, dtype=torch.float64))


def test_choice_by_cost_and_its_order_of_growth() -> None:
    net, x1, _ = build("mlp")
    costs = ntk_costs(net, x1, per_output=True)
    assert min(costs, key=costs.__getitem__) == "structured"
    embedding = nn.Sequential(nn.Embedding(50, 2), nn.Flatten(), nn.Linear(8, 2))
    one = ntk_costs(net, x1[:1].expand(400, 4))
    two = ntk_costs(net, x1[:1].expand(800, 4))
    assert 3.9 < two["vector_products"] / one["vector_products"] < 4.01
    tokens = torch.randint(0, 50, (3, 4))
    assert empirical_ntk(embedding, tokens).shape == (3, 3)


def test_nngp_is_the_covariance_over_the_readout() -> None:
    net, x1, x2 = build("mlp")
    h1, h2 = net[:4](x1).detach(), net[:4](x2).detach()
    torch.testing.assert_close(empirical_nngp(net, x1, x2), h1 @ h2.T / 6, rtol=1e-12, atol=1e-14)
    model = BayesianNetwork(net, NORMAL)
    exact = 1.5**2 * h1 @ h1.T / 6 + 0.3**2
    torch.testing.assert_close(empirical_nngp(model, x1, batch_size=2), exact, rtol=1e-12, atol=1e-14)


def test_what_cannot_be_done_is_said() -> None:
    net, x1, _ = build("mlp")
    with pytest.raises(MethodError, match="algorithm"):
        empirical_ntk(net, x1, algorithm="fast")
    with pytest.raises(ModelError, match="no\nprior|no prior"):
        empirical_ntk(net, x1, parameterisation="ntk")
    with pytest.raises(ModelError, match="Linear"):
        empirical_nngp(nn.Sequential(net, nn.Softmax(1)), x1)
    with pytest.raises(ModelError, match="recurrent"):
        empirical_ntk(Last(nn.LSTM(2, 3, batch_first=True)), torch.randn(2, 4, 2))
    with pytest.raises(DataError, match="NaN"):
        empirical_ntk(net, x1 / 0)
    with pytest.raises(DataError, match="cannot take"):
        empirical_ntk(net, x1[:, :2])
    with pytest.raises(DataError, match=r"at least one row"):
        empirical_ntk(net, x1[:0])
    with pytest.raises(DataError, match="none of"):
        empirical_ntk(net, x1, params={"weight": x1})
