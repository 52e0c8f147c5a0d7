"""The program itself: its sites, its density under torch.func, its symmetries, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings
from typing import ClassVar

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bayesdl.errors import DataError, ModelError, ModelMismatch
from bayesdl.models import BayesianNetwork
from bayesdl.models.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models.priors import Hierarchical, Normal
from tests.models.programs import NETS, Tied, log_joint, model_of, prior_values

# weight_norm and LSTM parts run through vmap's slow fallback, which torch announces; the numbers are the point here.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def mlp(hidden: int = 4, outputs: int = 1, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, hidden), activation(), nn.Linear(hidden, outputs)).double()


def rows(n: int = 6) -> Tensor:
    return torch.linspace(-1.0, 2.0, n * 3, dtype=torch.float64).reshape(n, 3).cos()


@pytest.mark.parametrize("name", NETS)
def test_batched_gradients_equal_autograd_chain_by_chain_and_survive_tracing(name: str) -> None:
    model, x = model_of(name)
    y = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    density = log_joint(model, x, y)
    values = prior_values(model, x, draws=3)
    batched = torch.func.vmap(torch.func.grad_and_value(density))
    gradient, value = batched(values)
    for chain in range(3):
        leaves = {key: tensor[chain].clone().requires_grad_() for key, tensor in values.items()}
        alone = density(leaves)
        expected = torch.autograd.grad(alone, list(leaves.values()))
        torch.testing.assert_close(value[chain], alone.detach(), rtol=1e-11, atol=0)
        for key, wanted in zip(leaves, expected, strict=True):
            # Relative to the site's largest entry: single entries may cancel to zero.
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                gradient[key][chain], wanted, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )
            assert scale > 0, f"the log joint does not depend on {key}"
    torch.testing.assert_close(torch.func.vmap(density)(values), value, rtol=1e-11, atol=0)
    traced = make_fx(batched)(values)
    again = {key: tensor * 1.1 for key, tensor in values.items()}
    torch.testing.assert_close(traced(again), batched(again), rtol=1e-12, atol=1e-12)


def test_values_without_gradients_are_batched_too_for_fused_kernels() -> None:
    for name in ("lstm", "gru", "attention", "transformer"):
        model, x = model_of(name)
        draws = {
            site.name: torch.stack(
                [site.to_site(dict(model.net.named_parameters())[site.name].detach()) * s for s in (1, 2)]
            )
            for site in model.sites
        }
        with torch.no_grad():
            together = torch.func.vmap(lambda values, m=model, x=x: m.forward(values, x))(draws)
            for chain in range(2):
                alone = model.forward({key: value[chain] for key, value in draws.items()}, x)
                torch.testing.assert_close(together[chain], alone, rtol=1e-12, atol=1e-12)


def test_sites_bear_the_names_of_parameters_and_the_plate_is_called_data() -> None:
    net = mlp()
    model = BayesianNetwork(net)
    trace = poutine.trace(model).get_trace(rows(), torch.zeros(6, dtype=torch.float64))
    assert [n for n in trace.nodes if n not in ("_INPUT", "_RETURN")] == [
        *dict(net.named_parameters()),
        "noise",
        "data",
        "y",
    ]
    assert trace.nodes["y"]["cond_indep_stack"][0].name == "data"
    assert trace.nodes["y"]["is_observed"]
    assert not trace.nodes["noise"]["cond_indep_stack"]
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (6,)


def test_log_joint_equals_the_formula_written_by_hand() -> None:
    model = BayesianNetwork(mlp(), Normal("fan_in", w_std=1.5, b_std=0.7), Gaussian(noise=0.4))
    x, y = rows(), torch.linspace(-2, 2, 6, dtype=torch.float64)
    values = {key: tensor[0] for key, tensor in prior_values(model, x, 1).items()}
    w1, b1, w2, b2 = values.values()
    f = (torch.relu(x @ w1.T + b1) @ w2.T + b2)[:, 0]

    def gauss(value: Tensor, sd: float) -> Tensor:
        return (-0.5 * (value / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)).sum()

    expected = gauss(w1, 1.5 / math.sqrt(3)) + gauss(b1, 0.7) + gauss(w2, 1.5 / 2) + gauss(b2, 0.7) + gauss(y - f, 0.4)
    torch.testing.assert_close(log_joint(model, x, y)(values), expected, rtol=1e-13, atol=0)


def test_permuting_hidden_units_leaves_the_log_joint_unchanged() -> None:
    model = BayesianNetwork(mlp(hidden=5, activation=nn.Tanh))
    x, y = rows(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    values = {key: tensor[0] for key, tensor in prior_values(model, x, 1).items()}
    order = torch.tensor([3, 0, 4, 1, 2])  # not its own inverse, so W T and T W differ
    permuted = {
        **values,
        "0.weight": values["0.weight"][order],
        "0.bias": values["0.bias"][order],
        "2.weight": values["2.weight"][:, order],
    }
    density = log_joint(model, x, y)
    assert abs(density(permuted) - density(values)) < 1e-12 * abs(density(values))
    half = {**values, "0.weight": values["0.weight"][order]}
    assert abs(density(half) - density(values)) > 1e-3


@pytest.mark.parametrize("alpha", [0.25, 3.0])
def test_positive_rescaling_of_relu_units_leaves_the_outputs_and_not_the_prior(alpha: float) -> None:
    model = BayesianNetwork(mlp(hidden=5))
    x = rows()
    values = {key: tensor[0] for key, tensor in prior_values(model, x, 1).items()}

    def rescaled(by: float) -> dict[str, Tensor]:
        return {
            **values,
            "0.weight": values["0.weight"] * by,
            "0.bias": values["0.bias"] * by,
            "2.weight": values["2.weight"] / by,
        }

    torch.testing.assert_close(model.forward(rescaled(alpha), x), model.forward(values, x), rtol=1e-12, atol=1e-12)
    assert (model.forward(rescaled(-alpha), x) - model.forward(values, x)).abs().max() > 1e-3
    y = model.forward(values, x)[:, 0]
    assert abs(log_joint(model, x, y)(rescaled(alpha)) - log_joint(model, x, y)(values)) > 1e-3


def test_the_users_module_never_changes() -> None:
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    model = BayesianNetwork(net)
    x = rows()
    model(x)
    model.initial_values(torch.Generator().manual_seed(0))
    model.to(torch.float32)
    assert net.training
    assert model.net is not net
    assert not model.net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_frozen_parameters_and_buffers_are_constants() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().eval()
    net[0].weight.requires_grad_(False)
    net[1].running_mean += 0.5
    model = BayesianNetwork(net)
    assert [site.name for site in model.sites] == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    constants = model.constants()
    assert set(constants) == {"0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    other = BayesianNetwork.from_config(model.config())
    other.load_constants({key: value.clone() for key, value in constants.items()})
    x = rows()
    values = {key: tensor[0] for key, tensor in prior_values(model, x, 1).items()}
    assert torch.equal(other.forward(values, x), model.forward(values, x))
    with pytest.raises(ModelMismatch, match=r"running_mean"):
        other.load_constants({"0.weight": constants["0.weight"]})
    with pytest.raises(ModelMismatch, match=r"0\.weight.*\(4, 3\).*\(2, 2\)"):
        other.load_constants({**constants, "0.weight": torch.zeros(2, 2)})


def test_an_embeddings_padding_row_is_zero_and_no_site() -> None:
    model = BayesianNetwork(Tied(padding=2).double())
    site = model.sites[0]
    assert site.name == "embedding.weight"
    assert site.shape == (4, 4)
    value = torch.arange(16.0, dtype=torch.float64).reshape(4, 4) + 1
    full = site.to_parameter(value)
    assert torch.equal(full[2], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(full[[0, 1, 3, 4]], value)
    assert torch.equal(site.to_site(full), value)
    assert model.initial_values(torch.Generator().manual_seed(0))["embedding.weight"].shape == (4, 4)


def test_initial_values_are_the_modules_own_and_leave_the_global_generator() -> None:
    net = nn.Sequential(
        nn.Linear(200, 100), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(100, 1))
    ).double()
    model = BayesianNetwork(net, Normal(1.0))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = model.initial_values(torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(2), expected)
    again = model.initial_values(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    model.initial_values(generator)
    other = model.initial_values(generator)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name]), name
        assert not torch.equal(value, dict(model.net.named_parameters())[name]), name
    # torch's Linear draws from U[-1/sqrt(d), 1/sqrt(d)], of variance 1/(3 d): not the prior's 1/d.
    weight = first["0.weight"]
    assert weight.abs().max() <= 1 / math.sqrt(200)
    error = math.sqrt((1 / 5 - 1 / 9) / weight.numel()) / 200
    assert abs(weight.square().mean() - 1 / 600) < 5 * error


def test_dropout_is_off_unless_asked_for() -> None:
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.BatchNorm1d(64).eval(), nn.Linear(64, 1)).double()
    model = BayesianNetwork(net)
    x = rows()
    values = {key: tensor[0] for key, tensor in prior_values(model, x, 1).items()}
    assert torch.equal(model.forward(values, x), model.forward(values, x))
    noisy = model.with_dropout()
    assert not torch.equal(noisy.forward(values, x), noisy.forward(values, x))
    assert not noisy.net[2].training
    assert torch.equal(noisy.with_dropout(False).forward(values, x), model.forward(values, x))
    assert not model.net[1].training


def test_dtype_goes_from_the_network_through_every_site() -> None:
    for dtype in (torch.float32, torch.float64):
        model = BayesianNetwork(mlp(), Hierarchical(), Gaussian(noise="mle")).to(dtype)
        assert model.dtype == dtype
        pyro.clear_param_store()
        trace = poutine.trace(model).get_trace(rows().float(), torch.zeros(6, dtype=torch.float64))
        pyro.clear_param_store()
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] in ("sample", "param") and name != "data":
                assert site["value"].dtype == dtype, name
        assert trace.nodes["y"]["log_prob"].dtype == dtype


class WritesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x)


class ReplacesBuffer(WritesBuffer):
    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.linear(x)


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_parameter(name, nn.Parameter(torch.zeros(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def with_value(value: float) -> nn.Module:
    net = nn.Linear(3, 1)
    net.bias.data.fill_(value)
    return net


def with_buffer(value: float) -> nn.Module:
    net = WritesBuffer()
    net.count.fill_(value)
    return net


def frozen() -> nn.Module:
    return nn.Linear(3, 1).requires_grad_(False)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 1)))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Linear(3, 1), torch.zeros(1, 3))


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1).double())


REFUSED = {
    "a function": (lambda: torch.tanh, ["torch.nn.Module", "function"]),
    "scripted": (scripted, ["torch.nn.Module"]),
    "batch norm in training": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
        ["1 (BatchNorm1d)", "other rows", "GroupNorm", "net.eval()"],
    ),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval(),
        ["track_running_stats=False"],
    ),
    "instance norm that tracks": (
        lambda: nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Linear(3, 1)),
        ["running statistics", "net.eval()"],
    ),
    "no parameters": (nn.Tanh, ["no parameter", "prior"]),
    "all frozen": (frozen, ["no parameter"]),
    "NaN": (lambda: with_value(math.nan), ["'bias'", "NaN"]),
    "infinite": (lambda: with_value(math.inf), ["'bias'", "infinite"]),
    "NaN buffer": (lambda: with_buffer(math.nan), ["'count'", "NaN"]),
    "complex": (lambda: nn.Linear(3, 1, dtype=torch.complex64), ["complex64", "real"]),
    "mixed dtypes": (mixed, ["float32", "float64", "net.double()"]),
    "lazy": (lambda: nn.LazyLinear(1), ["lazy", "net(x)"]),
    "max_norm": (lambda: nn.Embedding(3, 1, max_norm=1.0), ["max_norm"]),
    "frequency gradients": (lambda: nn.Embedding(3, 1, scale_grad_by_freq=True), ["scale_grad_by_freq"]),
    "hook-based weight norm": (old_weight_norm, ["copied", "parametrizations.weight_norm"]),
    "bare parameter": (lambda: Named("slope"), ["'slope'", "pattern", "PerParameter"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_why_and_the_alternative(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        BayesianNetwork(make())
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["noise", "y", "data"])
def test_parameters_called_like_other_sites_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}'.*rename"):
        BayesianNetwork(Named(name), Normal(1.0))


def test_hyperparameters_called_like_other_sites_are_refused() -> None:
    with pytest.raises(ModelError, match="'noise'"):
        BayesianNetwork(mlp(), Hierarchical(share="global", name="noise"))
    with pytest.raises(ModelError, match=r"'0\.bias'"):
        BayesianNetwork(mlp(), Hierarchical(name="bias"))


def test_priors_and_likelihoods_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ModelError, match=r"prior must be.*Normal\(1\.0\)"):
        BayesianNetwork(mlp(), 1.0)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ModelError, match=r"likelihood must be.*Gaussian\(\)"):
        BayesianNetwork(mlp(), None, "gaussian")  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("module", [WritesBuffer, ReplacesBuffer])
def test_a_network_that_writes_its_buffers_is_refused_when_it_runs(module: type[nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"writes its buffer 'count'"):
        BayesianNetwork(module())(torch.zeros(2, 3))


OUTPUTS = {
    "a tuple": (nn.LSTM(3, 1, batch_first=True), Gaussian(), ["tuple", "Wrap"], (2, 4, 3)),
    "rows last": (nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), Gaussian(), ["first dimension", "row"], (2, 4, 3)),
    "three dimensions": (nn.Linear(3, 1), Gaussian(), ["[N, K]", "Flatten"], (2, 4, 3)),
    "odd head": (nn.Linear(3, 1), Gaussian(noise="head"), ["two outputs per target"], (2, 3)),
    "one class": (nn.Linear(3, 1), Categorical(), ["one output per class", "Bernoulli"], (2, 3)),
    "two logits": (nn.Linear(3, 2), Bernoulli(), ["one output", "Categorical"], (2, 3)),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_do_not_fit_the_likelihood_are_refused(case: str) -> None:
    net, likelihood, words, shape = OUTPUTS[case]
    model = BayesianNetwork(net, None, likelihood)
    for run in (lambda: model(torch.zeros(shape)), lambda: model.check_data(torch.zeros(shape))):
        with pytest.raises(ModelError) as caught:
            run()
        for word in words:
            assert word in str(caught.value)


def test_a_column_target_never_broadcasts_against_one_output() -> None:
    model = BayesianNetwork(mlp())
    with pytest.raises(ModelError, match=r"\[N\]"):
        model(rows(), torch.zeros(6, 1))
    with pytest.raises(ModelError, match="y has shape"):
        model(rows(), torch.zeros(5))


BAD_DATA = {
    "no rows": (torch.zeros(0, 3), None, ["at least one row"]),
    "not a tensor": ([[0.0]], None, ["tensor", "list"]),
    "too few columns": (torch.zeros(4, 2), None, ["(4, 2)", "cannot take x"]),
    "other number of rows": (torch.zeros(4, 3), torch.zeros(3), ["4 rows", "(3,)"]),
    "column target": (torch.zeros(4, 3), torch.zeros(4, 1), ["[N]", "(4, 1)"]),
    "two targets": (torch.zeros(4, 3), torch.zeros(4, 2), ["2 target column", "has 1"]),
    "NaN target": (torch.zeros(4, 3), torch.full((4,), math.nan), ["NaN"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_check_data_says_what_the_network_cannot_take(case: str) -> None:
    x, y, words = BAD_DATA[case]
    with pytest.raises(DataError) as caught:
        BayesianNetwork(mlp()).check_data(x, y)
    for word in words:
        assert word in str(caught.value)


def test_check_data_passes_good_data_and_describes_itself() -> None:
    model = BayesianNetwork(mlp())
    model.check_data(rows(), torch.zeros(6))
    assert "21 parameters" in repr(model)
    assert "LogNormal(-1.2, 1)" in repr(model)
    assert model.scales_y
    assert model.task == "regression"


class Backends(nn.Linear):
    """Notes which fused attention kernels were allowed while it ran."""

    seen: ClassVar[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.mha.get_fastpath_enabled() or torch.backends.cuda.flash_sdp_enabled())
        return super().forward(x)


def test_fused_attention_is_off_inside_a_users_network_and_only_there() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()

    assert allowed() == (True, True)
    BayesianNetwork(Backends(3, 1))(torch.zeros(2, 3))
    assert Backends.seen == [False]
    assert allowed() == (True, True)
