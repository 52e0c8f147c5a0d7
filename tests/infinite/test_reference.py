"""Kernels of converted modules against an independent implementation, and against finite networks' gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.data import Dataset
from bayesdl.errors import DataError, ModelError
from bayesdl.infinite import NNGPKernel, NTKKernel, from_module
from bayesdl.models import BayesianNetwork, likelihoods, priors

REFERENCE = np.load(Path(__file__).parent / "data" / "infinite_width.npz")


class Function(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b, self.o = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        h = h + self.a(h.relu())
        h = self.b(torch.relu(h)) + h
        return self.o(nn.functional.relu(h))


def dense(depth: int, activation: nn.Module) -> nn.Module:
    hidden = [part for k in range(depth) for part in (nn.Linear(8 if k else 5, 8), activation)]
    return nn.Sequential(*hidden, nn.Linear(8, 1))


def images(*tail: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU(), *tail)


POOLED = (
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
    nn.Linear(72, 1),
)  # fmt: skip
CASES = [
    ("dense_relu_1", dense(1, nn.ReLU()), (1.5, 0.1)),
    ("dense_relu_3", dense(3, nn.ReLU()), (1.5, 0.1)),
    ("dense_erf_2", dense(2, Function(torch.erf)), (1.5, 0.1)),
    ("dense_leaky_2", dense(2, nn.LeakyReLU(0.2)), (1.5, 0.1)),
    ("dense_gelu_2", dense(2, nn.GELU()), (1.5, 0.1)),
    ("dense_sin_1", dense(1, Function(torch.sin)), (1.5, 0.1)),
    ("resmlp_relu_2", Residual(), (1.2, 0.05)),
    ("conv_relu_2_flatten", images(nn.Flatten(), nn.Linear(288, 1)), (1.4, 0.1)),
    ("conv_relu_2_gap", images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)), (1.4, 0.1)),
    ("conv_relu_2_avgpool_flatten", nn.Sequential(*POOLED), (1.4, 0.1)),
]


def arrays(name: str) -> dict[str, Tensor]:
    parts = ("x1", "x2", "nngp", "ntk", "nngp11", "ntk11")
    found = {part: torch.as_tensor(REFERENCE[f"{name}/{part}"]) for part in parts}
    for part in ("x1", "x2"):
        if found[part].dim() == 4:
            found[part] = found[part].permute(0, 3, 1, 2).contiguous()
    return found


@pytest.mark.parametrize(("name", "net", "w_b"), CASES, ids=[case[0] for case in CASES])
def test_kernels_equal_an_independent_implementation(name: str, net: nn.Module, w_b: tuple[float, float]) -> None:
    a = arrays(name)
    k = from_module(net, w_std=w_b[0], b_std=w_b[1])
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        x1, x2 = a["x1"].to(dtype), a["x2"].to(dtype)
        for (x, y), suffix in (((x1, x2), ""), ((x1, None), "11")):
            both = k.kernels(x, y)
            assert both.nngp.dtype == dtype
            torch.testing.assert_close(both.nngp.double(), a["nngp" + suffix], rtol=rtol, atol=rtol / 100)
            torch.testing.assert_close(both.ntk.double(), a["ntk" + suffix], rtol=rtol, atol=rtol / 100)
    torch.testing.assert_close(k.ntk(a["x1"], diag=True), a["ntk11"].diagonal(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(k.nngp(a["x1"], a["x2"]), a["nngp"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dense_gelu_2", "dense_sin_1"])
def test_quadrature_equals_it_too(name: str) -> None:
    # one part in 1e10 beside the known function keeps its closed form from being seen
    function = nn.functional.gelu if name == "dense_gelu_2" else torch.sin
    net = dense(int(name[-1]), Function(lambda x: function(x) + 1e-10 * torch.tanh(x)))
    a, k = arrays(name), from_module(net, w_std=1.5, b_std=0.1)
    both = k.kernels(a["x1"], a["x2"])
    torch.testing.assert_close(both.nngp, a["nngp"], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(both.ntk, a["ntk"], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("index", [1, 8])
@pytest.mark.parametrize("kind", [NNGPKernel, NTKKernel])
def test_gpytorch_kernels_agree_and_have_gradients(index: int, kind: type[NNGPKernel]) -> None:
    name, net, w_b = CASES[index]
    a, k = arrays(name), from_module(net, w_std=w_b[0], b_std=w_b[1])
    x = a["x1"][:3]
    made = kind(k, input_shape=x.shape[1:], dtype=torch.float64)
    known = a["nngp11" if kind is NNGPKernel else "ntk11"][:3, :3]
    matrix = made(x.flatten(1)).to_dense()
    torch.testing.assert_close(matrix, known, rtol=1e-7, atol=1e-9)
    (gradient,) = torch.autograd.grad(matrix.sum(), made.raw_w_var)
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            made.raw_w_var[0] += step
        ends.append(made(x.flatten(1)).to_dense().sum().item())
    assert gradient[0].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_gradients_by_inputs_are_finite_on_the_diagonal_of_the_tangent_kernel() -> None:
    name, net, w_b = CASES[1]
    k = from_module(net, w_std=w_b[0], b_std=w_b[1])
    x = torch.cat([arrays(name)["x1"][:3], torch.zeros(1, 5, dtype=torch.float64)]).requires_grad_()
    assert torch.autograd.grad(k.ntk(x).sum(), x)[0].isfinite().all()


def networks() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    n = 256
    return [
        ("tanh", nn.Sequential(nn.Linear(4, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 1)), (4,)),
        ("norm", nn.Sequential(nn.Linear(4, n), nn.LayerNorm(n, elementwise_affine=False), nn.ReLU(),
                               nn.Linear(n, 1)), (4,)),
        ("stride", nn.Sequential(nn.Conv2d(2, n, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(n, n, 2), nn.ReLU(),
                                 nn.Flatten(), nn.Linear(n * 4, 1)), (2, 5, 6)),
        ("line", nn.Sequential(nn.Conv1d(2, n, 3, padding=2, dilation=2), nn.GELU(), nn.AvgPool1d(3, 2, 1),
                               nn.Flatten(), nn.Linear(n * 3, 1)), (2, 6)),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(4))
def test_finite_networks_scatter_around_both_kernels(index: int) -> None:
    name, net, shape = networks()[index]
    net = net.double()
    k = from_module(net, w_std=1.3, b_std=0.4, parameterisation="standard")
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws, tangents, outputs = 60, [], []
    stream = torch.Generator().manual_seed(1)
    for _ in range(draws):
        with torch.no_grad():
            for key, p in net.named_parameters():
                p.normal_(generator=stream).mul_(0.4 if key.endswith("bias") else 1.3 / p[0].numel() ** 0.5)
        rows = []
        for row in net(x).squeeze(-1):
            rows.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(row, list(net.parameters()), retain_graph=True)])
            )
        jacobian = torch.stack(rows)
        tangents.append(jacobian @ jacobian.T)
        # given the hidden units the output is Gaussian, so that the read-out's variance is taken in closed form
        hidden = net[:-1](x)
        outputs.append(1.3**2 * hidden @ hidden.T / hidden.shape[1] + 0.4**2)
    for samples, limit in ((outputs, k.nngp(x)), (tangents, k.ntk(x))):
        stacked = torch.stack(samples)
        error = stacked.std(0) / draws**0.5
        # a bias of order 1/width, and the standard error
        assert ((stacked.mean(0) - limit).abs() < 4.5 * error + 0.015 * limit.abs()).all(), name
        assert ((stacked.mean(0) - limit).abs() / limit.abs()).max() < 0.1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x.half(), DataError, "float32 or float64"),
        (lambda x: x[:, :2], DataError, "3 features or channels"),
        (lambda x: x * float("nan"), DataError, "NaN"),
        (lambda x: x[0, 0], DataError, "H, W"),
    ],
)
def test_bad_images_are_refused(change: object, error: type[Exception], words: str) -> None:
    k = from_module(CASES[7][1], w_std=1.0, b_std=0.0)
    with pytest.raises(error, match=words):
        k.nngp(change(torch.ones(2, 3, 6, 6)))


def test_images_of_another_size_no_rows_and_missing_flatten() -> None:
    k = from_module(CASES[7][1], w_std=1.0, b_std=0.0)
    x = torch.ones(2, 3, 6, 6)
    assert k.ntk(x[:0], x).shape == (0, 2)
    assert k.ntk(x[:1]).shape == (1, 1)
    with pytest.raises(DataError, match="H, W"):
        k.nngp(x, torch.ones(2, 3, 5, 6))
    with pytest.raises(ModelError, match="Flatten"):
        from_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(4, 1)), w_std=1.0, b_std=0.0).nngp(x)


def test_a_convolutional_network_is_fitted_saved_and_loaded_in_one_call_each(tmp_path: Path) -> None:
    x = torch.randn(20, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = Dataset.from_arrays(x, 3 * x[:, 0].mean((1, 2)))
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 1)
    ).double()
    model = BayesianNetwork(net, priors.Normal("fan_in", w_std=1.4, b_std=0.3), likelihoods.Gaussian(noise=0.1))
    posterior = bdl.fit(model, data, bdl.NNGP())
    mean = posterior.predict(x).mean
    assert (mean - data.y).abs().mean() < 0.15 * data.y.std()
    posterior.save(tmp_path / "gp")
    assert torch.equal(bdl.load(tmp_path / "gp", model).predict(x).mean, mean)
