"""Networks through JSON: what comes back is the same function, and what is code says so."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bayesdl.errors import FileError, ModelRequired
from bayesdl.models import BayesianNetwork, Erf
from bayesdl.models.likelihoods import Categorical
from bayesdl.models.priors import Hierarchical, Normal
from bayesdl.models.rebuild import build_net, describe

IMAGE = (2, 4, 8, 8)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)), (2, 3)),
    "named and nested": (
        lambda: nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(3, 4), Erf()), head=nn.Linear(4, 1))),
        (2, 3),
    ),
    "one activation twice": (lambda: _repeat(nn.ReLU()), (2, 3)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", groups=2, bias=False),
            nn.GroupNorm(3, 6),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(6, 2, 3, stride=2, output_padding=1, padding=1, dilation=1),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.AvgPool2d((2, 1), divisor_override=3),
            nn.AdaptiveAvgPool2d((1, None)),
            nn.Flatten(),
        ),
        IMAGE,
    ),
    "conv 1d and 3d": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, padding=2, padding_mode="circular"),
            nn.MaxPool1d(2),
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv3d(1, 2, (1, 2, 2), dilation=(1, 1, 2)),
            nn.Flatten(2),
            nn.AdaptiveMaxPool1d(3),
        ),
        (2, 4, 8),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.LayerNorm(3, bias=False),
            nn.RMSNorm(3, eps=1e-3),
            nn.BatchNorm1d(3, momentum=None, affine=False),
            nn.GELU("tanh"),
            nn.PReLU(3),
            nn.ELU(0.5),
            nn.Softplus(2.0),
            nn.Hardtanh(-0.5, 2.0),
            nn.Dropout(0.3),
            nn.Linear(3, 1),
        ).eval(),
        (2, 3),
    ),
    "instance norm": (
        lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.Linear(32, 1)),
        (2, 4, 8),
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, 0.1, "gelu", 1e-4, batch_first=True, norm_first=True, bias=False),
            nn.Flatten(),
            nn.Linear(12, 1),
        ),
        (2, 3, 4),
    ),
    "a single layer": (lambda: nn.Linear(3, 1), (2, 3)),
}


def _repeat(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 1))


@pytest.mark.parametrize("name", NETS)
def test_a_rebuilt_network_is_the_same_function(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = BayesianNetwork(make().double(), Normal(1.0))
    config = json.loads(json.dumps(model.config(), sort_keys=True))
    state = torch.random.get_rng_state()
    other = BayesianNetwork.from_config(config)
    assert torch.equal(state, torch.random.get_rng_state())
    assert other.config() == model.config()
    assert other.dtype == torch.float64
    other.load_constants(model.constants())
    values = {site.name: torch.randn(site.shape, dtype=torch.float64) for site in model.sites}
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(other.forward(values, x), model.forward(values, x))


def test_an_embedding_keeps_its_padding_row() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Flatten(), nn.Linear(6, 1))
    other = BayesianNetwork.from_config(BayesianNetwork(net).config())
    assert other.sites[0].padding == 1
    assert other.sites[0].shape == (4, 3)


def test_prior_likelihood_dtype_and_frozen_parameters_come_back() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    model = BayesianNetwork(net, Hierarchical(share="global"), Categorical())
    other = BayesianNetwork.from_config(json.loads(json.dumps(model.config())))
    assert other.prior == model.prior
    assert other.likelihood == model.likelihood
    assert other.dtype == torch.float32
    assert [site.name for site in other.sites] == ["0.bias", "2.weight", "2.bias"]


class Mine(nn.Linear):
    """A subclass: code of the user's own."""


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 1))
    net[0].register_forward_hook(lambda *_: None)
    return net


def overridden() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 1))
    net[0].forward = lambda x: x[:, :1]  # type: ignore[method-assign]  # on purpose
    return net


def enlarged() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 1))
    net[0].register_buffer("extra", torch.zeros(1))
    return net


def repeated() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


CODE = {
    "a subclass": (lambda: nn.Sequential(Mine(3, 1)), "Mine"),
    "a recurrent layer": (lambda: nn.LSTM(3, 1), "LSTM"),
    "a hook": (hooked, "hook"),
    "a forward of its own": (overridden, "forward"),
    "an extra buffer": (enlarged, "changed"),
    "a layer twice": (repeated, "Linear twice"),
    "tied weights": (tied, "changed"),
    "parametrised": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))),
        "ParametrizedLinear",
    ),
    "an activation function": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, activation=torch.tanh)),
        "activation",
    ),
}


@pytest.mark.parametrize("case", CODE)
def test_what_a_file_cannot_describe_is_code(case: str) -> None:
    make, word = CODE[case]
    with pytest.raises(ModelRequired, match=word) as caught:
        describe(make())
    assert "model=" in str(caught.value)


GOOD = BayesianNetwork(nn.Sequential(nn.Linear(3, 1))).config()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"net": {"class": "os.system"}}, ModelRequired, "'os.system'"),
        ({"net": {"class": "LSTM"}}, ModelRequired, "'LSTM'"),
        ({"net": "Linear"}, ModelRequired, "None"),
        (
            {"net": {"class": "Linear", "in_features": -3, "out_features": 1, "bias": True}},
            FileError,
            "Linear is damaged",
        ),
        ({"net": {"class": "Linear", "width": 3}}, FileError, "Linear is damaged.*width"),
        ({"net": {"class": "Sequential"}}, FileError, "Sequential is damaged"),
        ({"dtype": "os"}, FileError, "damaged"),
        ({"frozen": ["9.weight"]}, FileError, "'9.weight'"),
        ({"prior": {"class": "Flat"}}, ModelRequired, "'Flat'"),
        ({"likelihood": {"class": "Gaussian", "noise": "x"}}, FileError, "Gaussian is damaged"),
    ],
)
def test_damaged_or_foreign_descriptions_are_refused(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        BayesianNetwork.from_config({**GOOD, **change})


def test_a_description_with_missing_parts_is_refused() -> None:
    with pytest.raises(FileError, match="damaged"):
        build_net({"dtype": "float32", "net": GOOD["net"]})
