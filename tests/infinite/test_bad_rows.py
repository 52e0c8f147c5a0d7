"""Few, repeated, constant and impossible rows: a correct posterior or a named error, never NaN."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import DataError, Divergence, ModelError
from bayesdl.infinite import GP, NNGP, NNGPKernel, from_module, fully_connected, nngp
from bayesdl.models import BayesianNetwork, likelihoods, priors

LAYERS = fully_connected(1, "relu", 1.4, 0.5)
WAYS = (NNGP(), NNGP(solver="cg"), NNGP(inducing=64), GP(steps=10), GP(inducing=3, steps=10))
NAMES = ("cholesky", "cg", "inducing", "rbf", "rbf inducing")
DOUBLE = torch.float64


def model(noise: Any = 0.3, b_std: float = 0.5) -> BayesianNetwork:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    return BayesianNetwork(net, priors.Normal("fan_in", 1.4, b_std), likelihoods.Gaussian(noise=noise))


def rows(n: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    return x, x[:, 0] + 0.1


@pytest.mark.parametrize("method", WAYS[:3], ids=NAMES[:3])
@pytest.mark.parametrize("case", ["one row", "repeated rows", "rows of zeros"])
def test_few_and_repeated_rows_have_the_textbooks_posterior(method: NNGP, case: str) -> None:
    x, y = rows()
    if case == "one row":
        x, y = x[:1], y[:1]
    elif case == "repeated rows":
        x = x[:2].repeat(3, 1)
    else:
        x = torch.zeros_like(x)
    new = rows(9)[0][6:]
    predicted = method.fit(model(), (x, y)).predict(new)
    inverse = torch.linalg.inv(nngp(LAYERS, x) + 0.09 * torch.eye(len(x), dtype=DOUBLE))
    cross = nngp(LAYERS, x, new)
    torch.testing.assert_close(predicted.mean, cross.T @ inverse @ y, rtol=1e-6, atol=1e-6)
    variance = nngp(LAYERS, new, diag=True) - (cross * (inverse @ cross)).sum(0)
    torch.testing.assert_close(predicted.epistemic, variance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", WAYS, ids=NAMES)
@pytest.mark.parametrize("noise", ["mle", 1e-4])
def test_degenerate_tables_never_give_nan(method: Any, noise: Any) -> None:
    x, y = rows()
    tables = [(x[:1], y[:1]), (x[:2].repeat(3, 1), y), (x, torch.ones_like(y)), (torch.zeros_like(x), y)]
    for table in tables:
        try:
            posterior = method.fit(model(noise), table)
            predicted = posterior.predict(x)
        except Divergence as error:
            assert "noise" in str(error)  # noqa: PT017
            continue
        assert predicted.mean.isfinite().all()
        assert predicted.variance.isfinite().all()
        assert (predicted.variance >= 0).all()
        assert math.isfinite(posterior.log_evidence)


@pytest.mark.parametrize("method", WAYS, ids=NAMES)
def test_impossible_rows_are_named(method: Any) -> None:
    x, y = rows()
    with pytest.raises(DataError, match=r"finite|NaN"):
        method.fit(model(), (x.clone().index_fill_(0, torch.tensor([2]), math.nan), y))
    with pytest.raises(DataError, match="no rows"):
        method.fit(model(), (x[:0], y[:0]))
    with pytest.raises(Divergence, match="scale the inputs"):
        method.fit(model(), (1e200 * x, y))
    posterior = method.fit(model(), (x, y))
    for bad, words in ((x * math.inf, r"NaN or infinite"), (x[:0], "no rows"), (x[:, :2], "2")):
        with pytest.raises(DataError, match=words):
            posterior.predict(bad)


def test_half_precision_is_computed_in_double() -> None:
    x, y = (v.half() for v in rows())
    whole, half = (NNGP().fit(model(), (a, b)).predict(rows()[0]) for a, b in ((x.double(), y.double()), (x, y)))
    torch.testing.assert_close(half.mean, whole.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", [NNGPKernel(LAYERS), NNGPKernel(from_module(model()))])
def test_gpytorch_kernels_refuse_what_they_cannot_compute(kernel: NNGPKernel) -> None:
    x = rows()[0].float()
    with pytest.raises(DataError, match="NaN or infinite"):
        kernel(x, x / 0).to_dense()
    with pytest.raises(DataError, match="float16"):
        kernel(x.half()).to_dense()
    assert kernel(x[:0], x).to_dense().shape == (0, 6)
    assert kernel(x[:1]).to_dense().shape == (1, 1)


def test_images_of_another_size_and_networks_of_two_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1)).double()
    kernel = NNGPKernel(from_module(net, w_std=1.0, b_std=0.1), input_shape=(1, 3, 3), dtype=DOUBLE)
    assert kernel(torch.ones(2, 9, dtype=DOUBLE)).to_dense().shape == (2, 2)
    with pytest.raises(DataError, match=r"16 numbers.*\(1, 3, 3\)"):
        kernel(torch.ones(2, 16, dtype=DOUBLE)).to_dense()
    images = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    posterior = NNGP().fit(BayesianNetwork(net, likelihood=likelihoods.Gaussian(noise=0.1)), (images, rows(4)[1]))
    with pytest.raises(DataError, match=r"\(2, 1, 5, 5\)"):
        posterior.predict(torch.ones(2, 1, 5, 5, dtype=DOUBLE))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.first(x) + self.second(z)

    with pytest.raises(ModelError, match="2 inputs"):
        from_module(Pair(), w_std=1.0, b_std=0.0)
