"""From modules and priors to layers."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayesdl.data import Dataset
from bayesdl.errors import ModelError
from bayesdl.infinite import Activation, Dense, Flatten, Scale, Sum, from_module
from bayesdl.models import BayesianNetwork, Erf, mlp, priors


def test_fan_in_priors_give_their_own_standard_deviations() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8, bias=False), Erf(),
                        nn.Identity(), nn.Linear(8, 1))  # fmt: skip
    layers = from_module(BayesianNetwork(net, priors.Normal("fan_in", w_std=1.5, b_std=0.5)))
    assert [type(layer) for layer in layers] == [Flatten, Dense, Activation, Dense, Activation, Dense]
    widths = [layer for layer in layers if isinstance(layer, Dense)]
    assert [w.w_std for w in widths] == pytest.approx([1.5] * 3, rel=1e-14)
    assert [w.b_std for w in widths] == [0.5, 0.0, 0.5]
    assert [layer.name for layer in layers if isinstance(layer, Activation)] == ["relu", "erf"]


def test_a_plain_scale_is_multiplied_by_the_root_of_the_fan_in() -> None:
    net = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 1))
    first, _, last = from_module(BayesianNetwork(net, priors.Normal(0.5)))
    assert (first.w_std, last.w_std) == pytest.approx((1.5, 1.0))
    assert (first.b_std, last.b_std) == (0.5, 0.5)


def test_patterns_and_nested_sequentials() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), block, nn.Linear(4, 1))
    prior = priors.PerParameter({"2.*": priors.Normal("fan_in", w_std=3.0), "*": priors.Normal("fan_in", w_std=2.0)})
    widths = [layer.w_std for layer in from_module(BayesianNetwork(net, prior)) if isinstance(layer, Dense)]
    assert widths == pytest.approx([2.0, 3.0, 2.0])


def test_an_activation_that_is_used_twice_counts_twice() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(1, 2), act, nn.Linear(2, 2), act, nn.Linear(2, 1))
    layers = from_module(net, w_std=1.0, b_std=1.0)
    assert [type(layer) for layer in layers] == [Dense, Activation, Dense, Activation, Dense]


def test_given_values_override_the_prior_and_make_any_prior_possible() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    expected = (Dense(1.2, 0.3), Activation("relu"), Dense(1.2, 0.0))
    assert from_module(net, w_std=1.2, b_std=0.3) == expected
    assert from_module(BayesianNetwork(net, priors.Laplace(1.0)), w_std=1.2, b_std=0.3) == expected


def test_an_mlp_of_the_zoo_converts() -> None:
    data = Dataset.from_arrays(torch.randn(10, 3, dtype=torch.float64), torch.randn(10, dtype=torch.float64))
    widths = [la for la in from_module(mlp(data, hidden=(5, 5), activation="relu")) if isinstance(la, Dense)]
    assert [w.w_std for w in widths] == pytest.approx([math.sqrt(2)] * 3, rel=1e-14)


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class LayerNormFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(nn.functional.layer_norm(h, (2,)) + h)


def tied() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied_weight() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    return net


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    net[0].weight.requires_grad_(False)
    return net


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    net[1].register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Linear(2, 1)), r"'1' \(MaxPool2d\).*maximum"),
        (nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(2, 1)), r"'1.0'.*other rows"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2), nn.Linear(2, 1)), "LayerNorm.*not Gaussian"),
        (nn.TransformerEncoderLayer(2, 1), "Transformer"),
        (nn.Sequential(nn.Conv1d(2, 4, 1), nn.LayerNorm(5), nn.Flatten(), nn.Linear(20, 1)), "'1'.*all units of a row"),
        (TwoInputs(), "2 inputs"),
        (LayerNormFunction(), "'layer_norm'"),
        (nn.Sequential(nn.Conv1d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(2, 1)), "groups=2"),
        (nn.Sequential(nn.Linear(2, 2), nn.PReLU(), nn.Linear(2, 1)), "slope is a parameter"),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 1)), "first layer"),
        (nn.Sequential(nn.Linear(2, 1), nn.ReLU()), "last layer"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(2, 1)), "Flatten"),
        (tied(), "'0'.*used twice"),
        (tied_weight(), "'0.weight' is tied"),
        (frozen(), "'0.weight' is frozen"),
        (hooked(), "hooks"),
    ],
)
def test_what_has_no_limit_is_refused_by_name(net: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        from_module(net, w_std=1.0, b_std=1.0)


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        (priors.Laplace("fan_in"), "Laplace.*w_std="),
        (priors.StudentT(), "StudentT"),
        (priors.Hierarchical(dist.HalfNormal(1.0)), "itself random"),
    ],
)
def test_priors_without_a_gaussian_limit_are_refused(prior: priors.Prior, words: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(ModelError, match=words):
        from_module(BayesianNetwork(net, prior))


def test_a_module_without_a_prior_has_the_scales_of_torchs_initialisation() -> None:
    first, _, last = from_module(nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 1)), w_std=[2.0, 3.0])
    assert isinstance(first, Dense)
    assert isinstance(last, Dense)
    assert (first.w_std, last.w_std, first.b_std) == pytest.approx((2.0, 3.0, 1 / math.sqrt(1200)))
    default = from_module(nn.Linear(400, 300))[0]
    assert isinstance(default, Dense)
    drawn = nn.Linear(400, 300)
    assert drawn.weight.std().item() * 20 == pytest.approx(default.w_std, rel=0.01)
    assert drawn.bias.std().item() == pytest.approx(default.b_std, rel=0.15)


class Residual(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function, self.a, self.b, self.c = function, nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.c(h + 0.5 * self.b(self.function(h)))


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (lambda x: 0.5 * (torch.erf(x / 1.7) + 1), Activation("erf", (0.5, 1 / 1.7, 0.5))),
        (lambda x: x.abs(), Activation("abs")),
        (lambda x: torch.relu(x) - torch.relu(-x) * 0.25, Activation("piecewise_linear", (0.25, 1.0))),
        (lambda x: x * x, Activation("monomial", (2.0,))),
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), Activation("gelu")),
    ],
)
def test_a_run_of_operations_is_one_activation_and_a_plus_a_sum_of_branches(
    function: object, activation: Activation
) -> None:
    _, branches, _ = from_module(Residual(function), w_std=1.0, b_std=0.0)
    assert isinstance(branches, Sum)
    assert branches.branches[0] == ()
    found, _, scale = branches.branches[1]
    assert isinstance(found, Activation)
    assert (found.name, scale) == (activation.name, Scale(0.5))
    assert found.parameters == pytest.approx(activation.parameters, rel=1e-12)


@pytest.mark.parametrize("slope", [0.01, 0.2, 0.3])
def test_any_leaky_relu_has_its_closed_form(slope: float) -> None:
    layers = from_module(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(slope), nn.Linear(3, 1)))
    assert layers[1] == Activation("piecewise_linear", (slope, 1.0))


def test_a_run_that_is_used_twice_is_one_activation() -> None:
    class Swish(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    net = nn.Sequential(nn.Linear(2, 4), Swish(), nn.Linear(4, 1))
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = from_module(nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1)), w_std=1.5, b_std=0.2)
    found = from_module(net, w_std=1.5, b_std=0.2)
    assert len(found) == 3
    torch.testing.assert_close(found.ntk(x), known.ntk(x), rtol=1e-12, atol=0)
