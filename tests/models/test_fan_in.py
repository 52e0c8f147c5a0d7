"""Prior scales by module type: against hand formulas, and by what they are for, a preserved variance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import ModelError
from bayesdl.models import BayesianNetwork
from bayesdl.models.fan_in import Role
from bayesdl.models.parameters import ParameterInfo, parameters_of
from bayesdl.models.prior import location_and_sd
from bayesdl.models.priors import Laplace, Normal, PerParameter, StudentT
from tests.models.programs import Tied

BIAS, GAIN, SHIFT = Role("bias"), Role("gain"), Role("shift")

ROLES: dict[str, tuple[Callable[[], nn.Module], dict[str, Role]]] = {
    "linear": (lambda: nn.Linear(7, 5), {"weight": Role("weight", 7), "bias": BIAS}),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), {"weight": Role("weight", 12), "bias": BIAS}),
    "conv": (
        lambda: nn.Conv2d(6, 4, (3, 5), stride=2, groups=2),
        {"weight": Role("weight", 3 * 3 * 5), "bias": BIAS},
    ),
    "transposed conv": (
        lambda: nn.ConvTranspose2d(6, 4, (4, 6), stride=(2, 3), groups=2),
        {"weight": Role("weight", 3 * (4 / 2) * (6 / 3)), "bias": BIAS},
    ),
    "embedding": (lambda: nn.Embedding(9, 4), {"weight": Role("weight", 1)}),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), {"weight": Role("weight", 1)}),
    "rnn": (
        lambda: nn.RNN(3, 5, num_layers=2, bidirectional=True, bias=False),
        {
            **dict.fromkeys(("weight_ih_l0", "weight_ih_l0_reverse"), Role("weight", 3)),
            **dict.fromkeys(("weight_ih_l1", "weight_ih_l1_reverse"), Role("weight", 10)),
            **dict.fromkeys([f"weight_hh_l{i}{r}" for i in (0, 1) for r in ("", "_reverse")], Role("weight", 5)),
        },
    ),
    "lstm with projection": (
        lambda: nn.LSTM(3, 5, proj_size=2),
        {
            "weight_ih_l0": Role("weight", 3),
            "weight_hh_l0": Role("weight", 2),
            "weight_hr_l0": Role("weight", 5),
            "bias_ih_l0": BIAS,
            "bias_hh_l0": BIAS,
        },
    ),
    "gru cell": (
        lambda: nn.GRUCell(3, 5),
        {"weight_ih": Role("weight", 3), "weight_hh": Role("weight", 5), "bias_ih": BIAS, "bias_hh": BIAS},
    ),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {
            "in_proj_weight": Role("weight", 4),
            "in_proj_bias": BIAS,
            "out_proj.weight": Role("weight", 4),
            "out_proj.bias": BIAS,
            "bias_k": BIAS,
            "bias_v": BIAS,
        },
    ),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
        {
            "q_proj_weight": Role("weight", 4),
            "k_proj_weight": Role("weight", 3),
            "v_proj_weight": Role("weight", 5),
            "out_proj.weight": Role("weight", 4),
        },
    ),
    **{
        type(norm()).__name__: (norm, {"weight": GAIN, "bias": SHIFT})
        for norm in (
            lambda: nn.LayerNorm(4),
            lambda: nn.GroupNorm(2, 4),
            lambda: nn.BatchNorm2d(4),
            lambda: nn.InstanceNorm1d(4, affine=True),
        )
    },
    "RMSNorm": (lambda: nn.RMSNorm(4), {"weight": GAIN}),
    "tied, the larger place counts": (lambda: Tied(), {"embedding.weight": Role("weight", 4)}),
}


def sites(net: nn.Module) -> dict[str, ParameterInfo]:
    return {site.name: site for site in parameters_of(net)}


@pytest.mark.parametrize("case", ROLES)
def test_roles_follow_the_type_of_the_module(case: str) -> None:
    make, expected = ROLES[case]
    found = {name: site.role for name, site in sites(make()).items()}
    assert {name: found[name] for name in expected} == expected
    if not case.startswith("tied"):
        assert set(found) == set(expected)


def test_mean_and_sd_by_role() -> None:
    linear, norm = sites(nn.Linear(16, 2)), sites(nn.LayerNorm(3))
    assert location_and_sd(linear["weight"], "fan_in", 1.5, 0.3) == (0.0, 1.5 / 4)
    assert location_and_sd(linear["bias"], "fan_in", 1.5, 0.3) == (0.0, 0.3)
    assert location_and_sd(norm["weight"], "fan_in", 1.5, 0.3) == (1.0, 0.3)
    assert location_and_sd(norm["bias"], "fan_in", 1.5, 0.3) == (0.0, 0.3)
    assert location_and_sd(norm["weight"], 0.2, 1.0, 1.0) == (0.0, 0.2)


def draw(net: nn.Module, prior: Normal | Laplace | StudentT, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {site.name: prior.distribution(site)() for site in parameters_of(net.double())}


def signs(*shape: int) -> Tensor:
    """Inputs of exactly unit second moment, so that only the weights are random."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(7)).double() * 2 - 1


def close_to(found: Tensor, expected: float, independent: int) -> None:
    """The mean square of Gaussians agrees within five standard errors."""
    error = expected * math.sqrt(2 / independent)
    assert abs(float(found.square().mean()) - expected) < 5 * error


@pytest.mark.parametrize(
    "prior", [Normal("fan_in", w_std=1.3), Laplace("fan_in", w_std=1.3), StudentT(5.0, "fan_in", w_std=1.3)]
)
def test_a_wide_layer_keeps_the_variance_whatever_the_family(prior: Normal | Laplace | StudentT) -> None:
    net = nn.Linear(400, 3000, bias=False)
    outputs = torch.func.functional_call(net.double(), draw(net, prior), (signs(1, 400),))
    close_to(outputs, 1.3**2, 3000)


def test_a_convolution_keeps_the_variance() -> None:
    net = nn.Conv2d(8, 4000, 5, groups=4, bias=False)
    outputs = torch.func.functional_call(net.double(), draw(net, Normal()), (signs(1, 8, 5, 5),))
    close_to(outputs, 1.0, 4000)


def test_a_transposed_convolution_keeps_the_variance_averaged_over_positions() -> None:
    net = nn.ConvTranspose1d(20, 2000, 3, stride=2, padding=3, bias=False)
    outputs = torch.func.functional_call(net.double(), draw(net, Normal()), (signs(1, 20, 12),))
    # Position p gets the taps k with p = 2 i - 3 + k: one at even p, two at odd p, 3 / 2 on average.
    even, odd = outputs[..., 0:18:2], outputs[..., 1:18:2]
    close_to(even, 1 / 1.5, 2000)
    close_to(odd, 2 / 1.5, 2000)
    close_to(torch.stack([even, odd]), 1.0, 2000)


def test_every_gate_of_an_lstm_sums_over_its_own_inputs() -> None:
    net = nn.LSTM(300, 700, bias=False)
    values = draw(net, Normal())
    gates = values["weight_ih_l0"] @ signs(300)
    close_to(gates, 1.0, 2800)
    close_to(values["weight_hh_l0"] @ signs(700), 1.0, 2800)


def test_bilinear_and_embedding_keep_the_variance() -> None:
    net = nn.Bilinear(10, 12, 3000, bias=False)
    outputs = torch.func.functional_call(net.double(), draw(net, Normal()), (signs(1, 10), signs(1, 12)))
    close_to(outputs, 1.0, 3000)
    close_to(draw(nn.Embedding(60, 50), Normal(w_std=0.7))["weight"], 0.49, 3000)


def test_relu_needs_twice_the_variance_or_halves_the_second_moment_per_layer() -> None:
    layers = 3
    net = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(1500, 1500, bias=False), nn.ReLU())))
    for w_std, factor in ((math.sqrt(2.0), 1.0), (1.0, 0.5**layers)):
        last = list(net.children())[:-1]
        values = draw(net, Normal("fan_in", w_std=w_std))
        pre = torch.func.functional_call(nn.Sequential(*last).double(), values, (signs(1, 1500),))
        # Each layer adds the relative error sqrt(5 / width) of the mean of relu(z)^2 to that of its successor.
        expected = 2.0 * factor
        error = expected * math.sqrt(2 / 1500 + (layers - 1) * 5 / 1500)
        assert abs(float(pre.square().mean()) - expected) < 5 * error


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.PReLU()), "1.weight"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))), "0.parametrizations.weight.original0"),
    ],
)
def test_unknown_modules_ask_for_a_pattern_that_then_works(net: nn.Module, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        BayesianNetwork(net)
    for word in ("fan_in", repr(name), "PerParameter"):
        assert word in str(caught.value)
    BayesianNetwork(
        net,
        PerParameter({"*original*": Normal(1.0), "*": Normal()})
        if "para" in name
        else PerParameter({name: Normal(1.0), "*": Normal()}),
    )


def test_a_parameter_tied_between_unlike_places_asks_for_a_pattern() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    net[1].weight = net[0].bias
    with pytest.raises(ModelError, match=r"'0\.bias' is tied.*bias and a gain.*PerParameter"):
        BayesianNetwork(net)
