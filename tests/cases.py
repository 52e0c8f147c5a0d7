"""The tables behind the contract battery: every method, the models it is tried on, and every kind of bad input."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl import errors
from bayesdl._registry import method_class
from bayesdl.infer import schedules

DOUBLE = torch.float64


# -- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodCase:
    """A method with settings under which a fit takes about a second.

    Attributes:
        settings: its arguments.
        random: whether another seed gives another posterior.
        weights: whether the posterior has draws of the latents.
        kinds: the data sets that it can be fitted to.
        dropout: rate behind the hidden layer of the network that it is tried on.
        fewest: rows that it takes at least.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    random: bool = True
    weights: bool = True
    kinds: tuple[str, ...] = ("regression", "binary", "classes")
    dropout: float = 0.0
    fewest: int = 1


METHODS: dict[str, MethodCase] = {
    "MaximumLikelihood": MethodCase({"steps": 60}),
    "MAP": MethodCase({"steps": 60}),
    "DeepEnsemble": MethodCase({"steps": 60, "members": 3}),
    "KalmanFilter": MethodCase({}, kinds=("regression",)),
    "LastLayer": MethodCase({"steps": 60}, kinds=("regression",)),
    "MCDropout": MethodCase({"steps": 60}, weights=False, dropout=0.2),
    "SnapshotEnsemble": MethodCase({"steps": 60, "cycles": 3}),
    "SWAG": MethodCase({"steps": 60, "batch_size": 7, "snapshots": 10, "rank": 4}),
    "SVGD": MethodCase({"steps": 60, "particles": 4}),
    "MeanFieldVI": MethodCase({"steps": 60}),
    "PACBayes": MethodCase({"steps": 60, "prior_steps": 30}, fewest=2),  # one for the prior, one for the bound
    "LowRankVI": MethodCase({"steps": 60, "rank": 3}),
    "MatrixNormalVI": MethodCase({"steps": 60}),
    "FullRankVI": MethodCase({"steps": 60}),
    "IVON": MethodCase({"steps": 60}),
    "GuideVI": MethodCase({"steps": 60, "samples": 4}),
    "Laplace": MethodCase({"steps": 60}),
    "SGLD": MethodCase({"chains": 2, "warmup": 40, "draws": 20, "thin": 2}),
    "PSGLD": MethodCase({"chains": 2, "warmup": 40, "draws": 20, "thin": 2}),
    "SGHMC": MethodCase({"chains": 2, "warmup": 160, "draws": 20, "thin": 2}),
    "SGNHT": MethodCase({"chains": 2, "warmup": 160, "draws": 20, "thin": 2}),
    "BAOAB": MethodCase({"chains": 2, "warmup": 160, "draws": 20, "thin": 2}),
    "RandomWalk": MethodCase({"chains": 2, "warmup": 300, "draws": 20, "thin": 5}),
    "MALA": MethodCase({"chains": 2, "warmup": 60, "draws": 20, "thin": 2}),
    "EllipticalSlice": MethodCase({"chains": 2, "warmup": 20, "draws": 20}),
    "ChEES": MethodCase({"chains": 4, "warmup": 40, "draws": 15}),
    "HMC": MethodCase({"chains": 2, "warmup": 40, "draws": 15, "leapfrog_steps": 4}),
    "NUTS": MethodCase({"chains": 2, "warmup": 20, "draws": 15, "max_depth": 4}),
    "MCLMC": MethodCase({"chains": 2, "warmup": 40, "draws": 15, "length": 0.2}),
    "NNGP": MethodCase({"steps": 20}, random=False, weights=False),
    "GP": MethodCase({"steps": 20}, random=False, weights=False),
}
"""Every method of the registry; a test fails for one that is there and not here."""

VARIANTS: dict[str, tuple[str, MethodCase]] = {
    "MAP-minibatch": ("MAP", MethodCase({"epochs": 12, "batch_size": 5, "validation": 0.2, "average": "polyak"})),
    "MAP-lbfgs": ("MAP", MethodCase({"steps": 12, "optimizer": "lbfgs"})),
    "MAP-newton": ("MAP", MethodCase({"steps": 12, "optimizer": "newton"})),
    "MAP-gauss-newton": ("MAP", MethodCase({"steps": 3, "optimizer": "gauss_newton", "batch_size": 20})),
    "MAP-saga": ("MAP", MethodCase({"epochs": 12, "batch_size": 5, "gradient": "saga", "validation": 0.2})),
    "LastLayer-noise": ("LastLayer", MethodCase({"steps": 40, "noise_levels": 3}, kinds=("regression",))),
    "DeepEnsemble-svrg": ("DeepEnsemble", MethodCase({"steps": 40, "members": 2, "batch_size": 7, "gradient": "svrg"})),
    "DeepEnsemble-minibatch": ("DeepEnsemble", MethodCase({"steps": 40, "members": 2, "batch_size": 7})),
    "DeepEnsemble-randomised": (
        "DeepEnsemble",
        MethodCase({"steps": 40, "members": 2, "batch_size": 7, "anchored": True, "bootstrap": True}),
    ),
    "MCDropout-minibatch": (
        "MCDropout",
        MethodCase({"epochs": 12, "batch_size": 5, "validation": 0.2}, weights=False, dropout=0.2),
    ),
    "SWAG-members": (
        "SWAG",
        MethodCase({"steps": 20, "batch_size": 7, "snapshots": 9, "rank": 3, "members": 3, "replacement": True}),
    ),
    "SVGD-minibatch": ("SVGD", MethodCase({"steps": 40, "particles": 3, "batch_size": 7})),
    "Laplace-kron": ("Laplace", MethodCase({"steps": 20, "structure": "kron", "tune": "layers", "rounds": 2})),
    "Laplace-online": (
        "Laplace",
        MethodCase({"steps": 20, "batch_size": 16, "tune": "parameters", "online_rounds": 2, "rounds": 0, "polish": 9}),
    ),
    "Laplace-minibatch": ("Laplace", MethodCase({"steps": 40, "structure": "low_rank", "rank": 3, "batch_size": 7})),
    "Laplace-last-layer": ("Laplace", MethodCase({"steps": 40, "random": ("2.*", "noise"), "predictive": "sampled"})),
    "MeanFieldVI-minibatch": ("MeanFieldVI", MethodCase({"steps": 40, "batch_size": 7})),
    "KalmanFilter-batches": ("KalmanFilter", MethodCase({"batch_size": 5, "noise": 0.5}, kinds=("regression",))),
    "MeanFieldVI-warmup": (
        "MeanFieldVI",
        MethodCase({"steps": 40, "kl_weight": schedules.Warmup(20), "estimator": "reparameterisation"}),
    ),
    "MeanFieldVI-local": (
        "MeanFieldVI",
        MethodCase({"steps": 40, "batch_size": 7, "estimator": "local", "samples": 2}),
    ),
    "MeanFieldVI-flipout": ("MeanFieldVI", MethodCase({"steps": 40, "batch_size": 7, "estimator": "flipout"})),
    "PACBayes-minibatch": (
        "PACBayes",
        MethodCase({"steps": 40, "prior_steps": 20, "batch_size": 7, "prior_fraction": None}),
    ),
    "LowRankVI-score": ("LowRankVI", MethodCase({"steps": 40, "batch_size": 7, "estimator": "score"})),
    "IVON-minibatch": ("IVON", MethodCase({"steps": 40, "batch_size": 7})),
    "FullRankVI-weighted": ("FullRankVI", MethodCase({"steps": 40, "alpha": 0.0})),
    "SGLD-minibatch": ("SGLD", MethodCase({"chains": 2, "warmup": 30, "draws": 15, "thin": 2, "batch_size": 7})),
    "SGLD-schedule": (
        "SGLD",
        MethodCase({"chains": 2, "warmup": 10, "draws": 15, "thin": 2, "step_size": 0.01, "temperature": 2.0}),
    ),
    "SGLD-saga": (
        "SGLD",
        MethodCase({"chains": 2, "warmup": 30, "draws": 15, "thin": 2, "batch_size": 7, "gradient": "saga"}),
    ),
    "PSGLD-gamma": (
        "PSGLD",
        MethodCase({"chains": 2, "warmup": 30, "draws": 15, "thin": 2, "batch_size": 7, "correction": "gamma"}),
    ),
    "SGHMC-estimate": (
        "SGHMC",
        MethodCase(
            {"chains": 2, "warmup": 30, "draws": 15, "thin": 2, "batch_size": 7, "replacement": True}
            | {"noise_estimate": True, "noise": "signs"}
        ),
    ),
    "SGNHT-minibatch": ("SGNHT", MethodCase({"chains": 2, "warmup": 30, "draws": 15, "thin": 2, "batch_size": 7})),
    "BAOAB-svrg-cyclical": (
        "BAOAB",
        MethodCase(
            {"chains": 2, "warmup": 10, "draws": 15, "thin": 2, "batch_size": 7, "gradient": "svrg"}
            | {"step_size": schedules.Cyclical(0.05, 40, 2, exploration=0.4), "friction": 2.0}
        ),
    ),
    "MCLMC-unadjusted": (
        "MCLMC",
        MethodCase({"chains": 2, "warmup": 40, "draws": 15, "length": 0.2, "adjusted": False}),
    ),
    "MCLMC-fixed-step": (
        "MCLMC",
        MethodCase(
            {"chains": 3, "warmup": 5, "draws": 15, "step_size": 0.05, "length": 0.2, "integrator": "minimal_norm"}
        ),
    ),
    "HMC-fixed-step": (
        "HMC",
        MethodCase({"chains": 3, "warmup": 5, "draws": 15, "step_size": 0.05, "leapfrog_steps": 3}),
    ),
}
"""Other settings that change an engine's state, for the checks of reproducibility and resume."""


# -- models and data -------------------------------------------------------------------------------------------------


def _inputs(n: int, seed: int) -> tuple[Tensor, torch.Generator]:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=stream, dtype=DOUBLE), stream


@cache
def dataset(kind: str) -> bdl.Dataset:
    """A small Dataset in raw units: "regression", "binary" or "classes".

    32 rows of multiples of 1/8: their means are exact, and so is whatever is done to the units by powers of two.
    """
    x, stream = _inputs(32, 1)
    f = x[:, 0] + torch.sin(2 * x[:, 1])
    noise = torch.randn(len(x), generator=stream, dtype=DOUBLE)
    raw = (8 * (x * torch.tensor([3.0, 0.5, 50.0]) + torch.tensor([10.0, 0.0, -200.0]))).round() / 8
    if kind == "regression":
        return bdl.Dataset.from_arrays(raw, (150 + 40 * f + 8 * noise).round(), name=kind)
    score = f + 0.3 * noise
    if kind == "binary":
        return bdl.Dataset.from_arrays(raw, np.where(score.numpy() > 0, "yes", "no"), name=kind)
    thirds = torch.bucketize(score, torch.quantile(score, torch.tensor([1 / 3, 2 / 3], dtype=DOUBLE)))
    return bdl.Dataset.from_arrays(raw, np.array(["high", "low", "middle"])[thirds.numpy()], name=kind)


def network(kind: str, dtype: torch.dtype = DOUBLE, dropout: float = 0.0) -> bdl.BayesianNetwork:
    """A network with three hidden units for ``dataset(kind)``; erf, because it has an infinitely wide limit too."""
    return bdl.models.mlp(dataset(kind), hidden=(3,), activation="erf", dropout=dropout).to(dtype)


NETWORKS = ("regression", "binary", "classes")


@dataclass(frozen=True)
class Conjugate:
    """y = x w + noise with w ~ N(0, prior^2) and noise ~ N(0, sigma^2) known: all of it is known in closed form."""

    x: Tensor
    y: Tensor
    prior: float = 0.4
    sigma: float = 0.5

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """The pair that is never scaled."""
        return self.x, self.y

    def program(self, x: Tensor, y: Tensor | None = None) -> None:
        """The model as a hand-written Pyro program."""
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), self.prior).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, self.sigma), obs=y)

    def network(self) -> bdl.BayesianNetwork:
        """The same model as a network without hidden layers."""
        net = nn.Linear(3, 1, bias=False).double()
        return bdl.BayesianNetwork(
            net, bdl.priors.Normal("fan_in", w_std=self.prior * 3**0.5), bdl.likelihoods.Gaussian(noise=self.sigma)
        )

    def precision(self, temperature: float = 1.0) -> Tensor:
        """Lambda / T of p(w | y)^(1/T), ``[3, 3]``."""
        return (self.x.T @ self.x / self.sigma**2 + torch.eye(3, dtype=DOUBLE) / self.prior**2) / temperature

    def mean(self) -> Tensor:
        """Posterior mean, which no temperature moves, ``[3]``."""
        return torch.linalg.solve(self.precision(), self.x.T @ self.y / self.sigma**2)

    def covariance(self, temperature: float = 1.0) -> Tensor:
        """Posterior covariance, ``[3, 3]``."""
        return torch.linalg.inv(self.precision(temperature))

    def log_evidence(self) -> float:
        """log p(y)."""
        covariance = self.sigma**2 * torch.eye(len(self.y), dtype=DOUBLE) + self.prior**2 * self.x @ self.x.T
        law = torch.distributions.MultivariateNormal(torch.zeros_like(self.y), covariance)
        return float(law.log_prob(self.y))


@cache
def conjugate() -> Conjugate:
    """Sixty rows with correlated columns, so that the posterior has strong correlations and three scales."""
    x, stream = _inputs(60, 2)
    x = x @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.6, 0.3], [0.0, 0.0, 0.5]], dtype=DOUBLE)
    y = x @ torch.tensor([0.5, -0.4, 0.3], dtype=DOUBLE)
    return Conjugate(x, y + 0.5 * torch.randn(len(x), generator=stream, dtype=DOUBLE))


@cache
def fitted(kind: str = "regression", prior_rows: float | None = None) -> bdl.Posterior:
    """A quick posterior on ``dataset(kind)``, for tests of what comes after a fit."""
    if prior_rows is None:
        return bdl.fit(network(kind), dataset(kind), bdl.MAP(steps=5))
    return bdl.fit(network(kind), dataset(kind), bdl.MeanFieldVI(steps=5), prior_rows=prior_rows)


# -- what no call may change -----------------------------------------------------------------------------------------


def _global_state() -> dict[str, Any]:
    store = pyro.get_param_store()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": repr((numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"], numpy_state["gauss"])),
        "torch": torch.random.get_rng_state().tolist(),
        "param store": {name: store[name].tolist() for name in store},
        "pyro validation": pyro.poutine.util.is_validation_enabled(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
    }


@contextmanager
def untouched() -> Iterator[None]:
    """Check that a block leaves every global random state, Pyro's store and flags, and torch's settings alone."""
    store = pyro.get_param_store()
    # Under names that programs and networks use as well: neither may the store change, nor may it leak into a fit.
    for name in ("b", "w", "0.weight", "noise"):
        store[name] = torch.tensor([7.0, 8.0, 9.0])
    before = _global_state()
    try:
        yield
    finally:
        after = _global_state()
        for name in list(store.keys()):
            del store[name]
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"changed: {changed}"


# -- bad input -------------------------------------------------------------------------------------------------------


def _nothing(folder: Path) -> None:
    """No files are needed."""


@dataclass(frozen=True)
class Bad:
    """One kind of bad input: what is called, with which error it must end, and what the message must say.

    Attributes:
        call: takes the folder that ``files`` filled.
        error: class of the exception.
        words: parts of the message.
        files: writes what the call reads.
    """

    call: Callable[[Path], Any]
    error: type[errors.BayesdlError]
    words: tuple[str, ...]
    files: Callable[[Path], None] = _nothing


X = [[1.0, 2.0], [3.0, 4.0], [5.0, 7.0], [0.0, 1.0]]
Y = [0.5, 1.5, 2.5, 3.5]
LABELS = [0, 1, 0, 1]
ARRAYS = bdl.Dataset.from_arrays


def _fit(
    model: Callable[[], Any], data: Any, method: Callable[[], Any] | None = None, **options: Any
) -> Callable[[Path], None]:
    """A fit that would leave a checkpoint and a posterior behind if it got that far."""

    def call(folder: Path) -> None:
        chosen = bdl.MAP(steps=3) if method is None else method()
        bdl.fit(model(), data, chosen, **{"checkpoint": folder / "run", **options}).save(folder / "posterior")

    return call


def _pair(y: Any = Y) -> tuple[Tensor, Tensor]:
    return torch.tensor(X, dtype=DOUBLE), torch.as_tensor(y)


def _layer(kind: type[nn.Module], *sizes: int, **options: Any) -> nn.Module:
    """A layer whose own initialisation leaves the global generator where it was."""
    with torch.random.fork_rng(devices=[]):
        return kind(*sizes, **options)


def _net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


def _small(likelihood: Any = None, outputs: int = 1) -> bdl.BayesianNetwork:
    return bdl.BayesianNetwork(_net(_layer(nn.Linear, 2, outputs)), likelihood=likelihood)


def _nan_parameter() -> nn.Module:
    net = _layer(nn.Linear, 2, 1)
    with torch.no_grad():
        net.weight[0, 0] = torch.nan
    return net


class _Bare(nn.Module):
    """A parameter of no layer, whose fan-in nobody knows."""

    def __init__(self, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ next(self.parameters())


class _Counter(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = _layer(nn.Linear, 2, 1).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.linear(x)


class _Transposed(nn.Module):
    """Puts the columns where the rows belong."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = _layer(nn.Linear, 2, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).T


def _weights() -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))


def program(x: Tensor, y: Tensor | None = None) -> None:
    """A sound linear regression, for rows in which something else is wrong."""
    w = _weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def _column_against_row(x: Tensor, y: Tensor | None = None) -> None:
    mean = x @ _weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=None if y is None else y[:, None])


def _counts(x: Tensor, y: Tensor | None = None) -> None:
    rate = torch.exp(x @ _weights())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(rate), obs=None if y is None else y - 1.5)


def _moving_support(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    b = pyro.sample("b", dist.Uniform(a, a + 1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b, 1.0).expand([len(x)]), obs=y)


def _improper(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), (2,)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


_LINEAR = _layer(nn.Linear, 2, 1).double()


def _pyro_module(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.module("net", _LINEAR)(x)[:, 0] + _weights().sum()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def _hidden_module(x: Tensor, y: Tensor | None = None) -> None:
    mean = _LINEAR(x)[:, 0] + _weights().sum()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def _point_estimate(x: Tensor, y: Tensor | None = None) -> None:
    b = pyro.param("b", lambda: torch.zeros((), dtype=DOUBLE))
    mean = x @ _weights() + b
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def _own_subsample(x: Tensor, y: Tensor | None = None) -> None:
    w = _weights()
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(x[index] @ w, 1.0), obs=None if y is None else y[index])


def _random(x: Tensor, y: Tensor | None = None) -> None:
    mean = x @ _weights() + torch.randn(len(x), dtype=DOUBLE)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def _many_switches(x: Tensor, y: Tensor | None = None) -> None:
    total = _weights().sum()
    for k in range(20):
        total = total + pyro.sample(f"k{k}", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(total, 1.0).expand([len(x)]), obs=y)


def _latent_count(x: Tensor, y: Tensor | None = None) -> None:
    k = pyro.sample("k", dist.Poisson(torch.tensor(3.0, dtype=DOUBLE)))
    mean = x @ _weights() + k
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def _nothing_to_infer(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x.sum(1), 1.0), obs=y)


def _sequential(x: Tensor, y: Tensor | None = None) -> None:
    w = _weights()
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"y{i}", dist.Normal(x[i] @ w, 1.0), obs=None if y is None else y[i])


def _chain(x: Tensor, y: Tensor | None = None) -> None:
    w, state = _weights(), torch.tensor(0)
    for t in pyro.markov(range(3)):
        p = torch.tensor([0.2, 0.8], dtype=DOUBLE)[state]
        state = pyro.sample(f"s{t}", dist.Bernoulli(p)).long()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + state, 1.0), obs=y)


def _sometimes(x: Tensor, y: Tensor | None = None) -> None:
    w = _weights()
    if float(w[0]) > float(w[1]):
        w = w + pyro.sample("extra", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def _coupled(x: Tensor, y: Tensor | None = None) -> None:
    mean = (x - x.mean(0)) @ _weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def _no_plate(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("y", dist.Normal(x @ _weights(), 1.0).to_event(1), obs=y)


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def _csv(text: str | bytes, target: str = "price", **options: Any) -> dict[str, Any]:
    return {
        "files": _write("table.csv", text),
        "call": lambda folder: bdl.data.read_csv(folder / "table.csv", target, **options),
    }


def _uci(folder: Path, **splits: Any) -> None:
    np.savetxt(folder / "data.csv", np.column_stack([X, Y]), delimiter=",")
    np.savez(folder / "splits.npz", **splits)


def _idx(pixels: bytes, labels: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "images").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 2, 2, 2) + pixels)
        (folder / "labels").write_bytes(struct.pack(">HBBI", 0, 8, 1, labels) + bytes(range(labels)))

    return write


def _saved(damage: Callable[[Path], None] = _nothing, kind: str = "regression") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        fitted(kind).save(folder / "posterior")
        damage(folder / "posterior")

    return write


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change posterior.json."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / "posterior.json").read_text())
        change(value)
        (folder / "posterior.json").write_text(json.dumps(value))

    return damage


def _cut(name: str, share: float) -> Callable[[Path], None]:
    """Keep the first part of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def _load(folder: Path, model: Any = None) -> Any:
    return bdl.load(folder / "posterior", model)


def _saved_program(folder: Path) -> None:
    bdl.fit(program, _pair(), bdl.MAP(steps=3)).save(folder / "posterior")


def _checkpointed(folder: Path) -> None:
    bdl.fit(_small(), _pair(), bdl.MAP(steps=3), checkpoint=folder / "run")


def _damaged_checkpoint(folder: Path) -> None:
    _checkpointed(folder)
    _cut("run.safetensors", 0.7)(folder)


def _predict(x: Any, kind: str = "regression", **options: Any) -> Callable[[Path], Any]:
    return lambda folder: fitted(kind).predict(x, **options)


def _certify(**options: Any) -> Callable[[Path], Any]:
    return lambda folder: bdl.certify(fitted(), dataset("regression"), **options)


def _evaluate(y: Any, kind: str = "regression") -> Callable[[Path], Any]:
    return lambda folder: bdl.evaluate(fitted(kind).predict(dataset(kind).x), y)


_DATA = errors.DataError
_MODEL = errors.ModelError
_METHOD = errors.MethodError
_FILE = errors.FileError
_NAN = float("nan")

BAD_DATA: dict[str, Bad] = {
    "NaN in x": Bad(lambda _: ARRAYS([[1.0], [_NAN]], [1.0, 2.0]), _DATA, ("NaN", "row 1, column 0", "Drop")),
    "infinite y": Bad(lambda _: ARRAYS(X, [1.0, np.inf, 2.0, 3.0]), _DATA, ("y holds 1", "infinite", "row 1")),
    "no rows": Bad(lambda _: ARRAYS(np.empty((0, 2)), np.empty(0)), _DATA, ("no rows",)),
    "no columns": Bad(lambda _: ARRAYS(np.empty((3, 0)), np.ones(3)), _DATA, ("no columns",)),
    "lengths differ": Bad(lambda _: ARRAYS(X, Y[:3]), _DATA, ("4 rows", "y has 3", "one target")),
    "text in x": Bad(lambda _: ARRAYS([["a"], ["b"]], [1.0, 2.0]), _DATA, ("text", "encode='onehot'")),
    "None in x": Bad(lambda _: ARRAYS([[1.0], [None]], [1.0, 2.0]), _DATA, ("object", "row 1", "drop")),
    "complex x": Bad(lambda _: ARRAYS([[1j], [2j]], [1.0, 2.0]), _DATA, ("complex", "two columns")),
    "dates in x": Bad(lambda _: ARRAYS(np.array([["2020-01-01"]], "datetime64[D]"), [1.0]), _DATA, ("dates", "days")),
    "identifiers in x": Bad(lambda _: ARRAYS([[2**60], [2**60 + 1]], [1.0, 2.0]), _DATA, ("2**53", "leave that")),
    "ragged x": Bad(lambda _: ARRAYS([[1.0], [1.0, 2.0]], [1.0, 2.0]), _DATA, ("same length",)),
    "sparse x": Bad(lambda _: ARRAYS(torch.eye(2).to_sparse(), [1.0, 2.0]), _DATA, ("sparse", "to_dense")),
    "doubled names": Bad(lambda _: ARRAYS(X, Y, x_names=["a", "a"]), _DATA, ("'a'", "more than one")),
    "one class": Bad(lambda _: ARRAYS(X, [1, 1, 1, 1]), _DATA, ("one class only", "'1'", "classes=")),
    "fractional labels": Bad(lambda _: ARRAYS(X, Y, "classification"), _DATA, ("0.5", "task='regression'")),
    "empty label": Bad(lambda _: ARRAYS(X, ["a", "b", "", "a"]), _DATA, ("empty label", "row 2")),
    "unknown class": Bad(
        lambda _: ARRAYS(X, ["cat", "dog", "dgo", "cat"], classes=["cat", "dog"]),
        _DATA,
        ("'dgo'", "Did you mean 'dog'"),
    ),
    "labels or counts": Bad(
        lambda _: ARRAYS(np.ones((30, 1)), np.arange(30) * 7), _DATA, ("task='classification'", "task='regression'")
    ),
    "labels not from 0": Bad(
        _fit(lambda: _small(bdl.likelihoods.Bernoulli()), _pair([1, 2, 1, 2])),
        _DATA,
        ("1 to 2", "0..K-1", "from_arrays"),
    ),
    "misspelt set": Bad(
        lambda _: bdl.data.load("diabtes"), _DATA, ("'diabtes'", "Did you mean 'diabetes'", "read_csv")
    ),
    "fraction 1.5": Bad(lambda _: dataset("regression").holdout(1.5, 0), _DATA, ("1.5", "between 0 and 1")),
    "one side empty": Bad(lambda _: dataset("regression").holdout(0.001, 0), _DATA, ("one side empty",)),
    "no split": Bad(lambda _: dataset("regression").train, _DATA, ("no split", "holdout")),
    "empty selection": Bad(lambda _: dataset("regression").subset(slice(0, 0)), _DATA, ("none of the 32 rows",)),
    "synthetic without rows": Bad(lambda _: bdl.data.synthetic.two_moons(0), _DATA, ("two_moons", "at least 2")),
    "not a pair": Bad(_fit(_small, torch.ones(3)), _DATA, ("Dataset", "pair (x, y)", "Tensor")),
    "NaN in a pair": Bad(_fit(lambda: program, _pair([1.0, _NAN, 1.0, 1.0])), _DATA, ("y holds 1", "NaN")),
    "empty pair": Bad(_fit(_small, (torch.ones(0, 2), torch.ones(0))), _DATA, ("no rows",)),
}

BAD_TABLES: dict[str, Bad] = {
    "misspelt target": Bad(
        **_csv("a,price\n1,2\n3,4.5\n", "prize"), error=_DATA, words=("'prize'", "Did you mean 'price'")
    ),
    "missing cells": Bad(
        **_csv("a,b,price\n1,,2.5\n3,4,4.5\n"),
        error=_DATA,
        words=("line 2", "'b'", "encode='onehot'", "missing='drop'"),
    ),
    "text column": Bad(
        **_csv("a,b,price\n1,red,2.5\n3,blue,4.5\n"),
        error=_DATA,
        words=("'b'", "'red'", "encode='onehot'", "missing='drop'"),
    ),
    "missing everywhere": Bad(
        **_csv("a,price\n,2.5\nNA,3.5\n", missing="drop"), error=_DATA, words=("every row", "drop=")
    ),
    "ragged": Bad(**_csv("a,b,price\n1,2\n"), error=_DATA, words=("line 2", "2 cells", "header has 3")),
    "empty file": Bad(**_csv(""), error=_DATA, words=("empty", "header")),
    "header only": Bad(**_csv("a,price\n"), error=_DATA, words=("no rows",)),
    "no header": Bad(**_csv("1,2\n3,4\n"), error=_DATA, words=("'price'", "header line missing")),
    "doubled header": Bad(**_csv("a,a,price\n1,2,3.5\n"), error=_DATA, words=("'a'", "more than one column")),
    "target alone": Bad(**_csv("price\n1.5\n2.5\n"), error=_DATA, words=("only column",)),
    "not UTF-8": Bad(**_csv(b"a,price\n\xff,1\n"), error=_DATA, words=("UTF-8",)),
    "unknown encoding": Bad(**_csv("a,price\n1,2.5\n", encode="label"), error=_DATA, words=("'onehot'", "'label'")),
    "infinite cell": Bad(**_csv("a,price\n1e999,2.5\n1,3.5\n"), error=_DATA, words=("line 2", "'a'")),
    "no such file": Bad(lambda f: bdl.data.read_csv(f / "none.csv", "y"), _FILE, ("none.csv", "does not exist")),
    "damaged gzip": Bad(
        lambda f: bdl.data.read_csv(f / "t.csv", "y"), _FILE, ("gzip",), _write("t.csv", b"\x1f\x8b\x08broken")
    ),
    "no UCI folder": Bad(lambda f: bdl.data.read_uci(f / "none"), _FILE, ("none", "data.csv.gz", "splits.npz")),
    "UCI split beyond the table": Bad(
        lambda f: bdl.data.read_uci(f), _DATA, ("row 9", "4 rows"), lambda f: _uci(f, train=[[0, 1]], test=[[2, 9]])
    ),
    "UCI split that overlaps": Bad(
        lambda f: bdl.data.read_uci(f), _DATA, ("twice", "disjoint"), lambda f: _uci(f, train=[[0, 1]], test=[[1, 2]])
    ),
    "IDX cut short": Bad(
        lambda f: bdl.data.read_idx(f / "images", f / "labels"), _DATA, ("2 x 2 x 2", "holds 7"), _idx(bytes(7), 2)
    ),
    "IDX of two sets": Bad(
        lambda f: bdl.data.read_idx(f / "images", f / "labels"), _DATA, ("2 images", "3 labels"), _idx(bytes(8), 3)
    ),
    "IDX swapped": Bad(lambda f: bdl.data.read_idx(f / "labels", f / "images"), _DATA, ("swapped",), _idx(bytes(8), 2)),
}

BAD_MODELS: dict[str, Bad] = {
    "plain module": Bad(_fit(lambda: _layer(nn.Linear, 2, 1), _pair()), _MODEL, ("Linear", "BayesianNetwork(net)")),
    "no program": Bad(_fit(lambda: "model", _pair()), _MODEL, ("callable", "str")),
    "batch normalisation": Bad(
        lambda _: bdl.BayesianNetwork(_net(_layer(nn.Linear, 2, 2), _layer(nn.BatchNorm1d, 2))),
        _MODEL,
        ("BatchNorm1d", "GroupNorm", "eval"),
    ),
    "renormalised embedding": Bad(
        lambda _: bdl.BayesianNetwork(_net(_layer(nn.Embedding, 3, 2, max_norm=1.0))), _MODEL, ("max_norm",)
    ),
    "no parameters": Bad(lambda _: bdl.BayesianNetwork(nn.ReLU()), _MODEL, ("nothing to put a prior on",)),
    "NaN parameter": Bad(lambda _: bdl.BayesianNetwork(_nan_parameter()), _MODEL, ("'weight'", "NaN")),
    "lazy module": Bad(lambda _: bdl.BayesianNetwork(_layer(nn.LazyLinear, 1)), _MODEL, ("lazy", "net(x)")),
    "two dtypes": Bad(
        lambda _: bdl.BayesianNetwork(nn.Sequential(_layer(nn.Linear, 2, 2), _layer(nn.Linear, 2, 1).double())),
        _MODEL,
        ("float32", "float64"),
    ),
    "unknown fan-in": Bad(lambda _: bdl.BayesianNetwork(_Bare()), _MODEL, ("'weight'", "PerParameter")),
    "pattern that matches nothing": Bad(
        lambda _: bdl.BayesianNetwork(
            _layer(nn.Linear, 2, 1),
            bdl.priors.PerParameter({"wieght": bdl.priors.Normal(1.0), "*": bdl.priors.Normal(2.0)}),
        ),
        _MODEL,
        ("'wieght'", "matches nothing", "weight"),
    ),
    "parameter called y": Bad(
        lambda _: bdl.BayesianNetwork(_Bare("y"), bdl.priors.Normal(1.0)), _MODEL, ("'y'", "rename")
    ),
    "negative prior scale": Bad(lambda _: bdl.priors.Normal(-1.0), _MODEL, ("Normal", "scale", "-1.0")),
    "negative noise": Bad(lambda _: bdl.likelihoods.Gaussian(noise=-1.0), _MODEL, ("noise", "-1.0", "positive")),
    "quantile level": Bad(lambda _: bdl.likelihoods.Quantile(tau=1.0), _MODEL, ("tau", "between 0 and 1")),
    "unknown activation": Bad(
        lambda _: bdl.models.mlp(dataset("regression"), activation="than"), _MODEL, ("tanh", "'than'")
    ),
    "hidden=16": Bad(lambda _: bdl.models.mlp(dataset("regression"), hidden=16), _MODEL, ("(16,)", "16")),  # type: ignore[arg-type]
    "likelihood of another task": Bad(
        lambda _: bdl.models.mlp(dataset("regression"), likelihood=bdl.likelihoods.Bernoulli()),
        _MODEL,
        ("classification", "regression"),
    ),
    "one output for classes": Bad(
        _fit(lambda: _small(bdl.likelihoods.Categorical()), _pair(LABELS)), _MODEL, ("K >= 2", "Bernoulli()")
    ),
    "label out of range": Bad(
        _fit(lambda: _small(bdl.likelihoods.Categorical(), 2), _pair([0, 1, 2, 1])), _DATA, ("Label 2", "2 outputs")
    ),
    "three classes for Bernoulli": Bad(
        _fit(lambda: _small(bdl.likelihoods.Bernoulli()), _pair([0, 1, 2, 1])), _DATA, ("0 and 1", "Categorical()")
    ),
    "negative count": Bad(
        _fit(lambda: _small(bdl.likelihoods.Poisson()), _pair([0.0, 1.0, -2.0, 1.0])), _DATA, ("counts", "negative")
    ),
    "two outputs for one target": Bad(_fit(lambda: _small(outputs=2), _pair()), _DATA, ("1 target", "2")),
    "rows last": Bad(_fit(lambda: bdl.BayesianNetwork(_Transposed()), _pair()), _MODEL, ("first dimension", "row")),
    "buffer written": Bad(_fit(lambda: bdl.BayesianNetwork(_Counter()), _pair()), _MODEL, ("'calls'", "buffer")),
    "wrong number of inputs": Bad(
        _fit(lambda: bdl.BayesianNetwork(_net(_layer(nn.Linear, 3, 1))), _pair()), _DATA, ("cannot take x", "(4, 2)")
    ),
    "column against row": Bad(_fit(lambda: _column_against_row, _pair()), _MODEL, ("'y'", "[N, 1]", "squeeze")),
    "data off the support": Bad(_fit(lambda: _counts, _pair([0.0, 1.0, 2.0, 3.0])), _DATA, ("'y'", "Poisson")),
    "moving support": Bad(_fit(lambda: _moving_support, _pair()), errors.DynamicSupport, ("'b'", "Uniform(0, 1)")),
    "improper prior": Bad(_fit(lambda: _improper, _pair()), _MODEL, ("proper prior", "Normal")),
    "pyro.module": Bad(_fit(lambda: _pyro_module, _pair()), _MODEL, ("pyro.module", "BayesianNetwork")),
    "hidden module": Bad(_fit(lambda: _hidden_module, _pair()), _MODEL, ("'y'", "gradient", "BayesianNetwork")),
    "pyro.param in a sampler": Bad(
        _fit(lambda: _point_estimate, _pair(), lambda: bdl.NUTS(warmup=2, draws=2)),
        _METHOD,
        ("'b'", "pyro.param", "pyro.sample", "MAP"),
    ),
    "own subsample": Bad(_fit(lambda: _own_subsample, _pair()), _MODEL, ("subsample_size", "mini-batches")),
    "random density": Bad(_fit(lambda: _random, _pair()), errors.RandomDensity, ("random", "pyro.sample")),
    "too many switches": Bad(_fit(lambda: _many_switches, _pair()), _MODEL, ("1,048,576", "by hand")),
    "infinite discrete latent": Bad(_fit(lambda: _latent_count, _pair()), _MODEL, ("'k'", "Poisson", "by hand")),
    "nothing to infer": Bad(_fit(lambda: _nothing_to_infer, _pair()), _MODEL, ("nothing to infer",)),
    "sequential data plate": Bad(_fit(lambda: _sequential, _pair()), _MODEL, ("'data'", "sequential", "pyro.plate")),
    "markov": Bad(_fit(lambda: _chain, _pair()), _MODEL, ("pyro.markov", "by hand")),
    "sites come and go": Bad(_fit(lambda: _sometimes, _pair()), _MODEL, ("'extra'", "same sites")),
    "one argument": Bad(_fit(lambda: lambda x: None, _pair()), _MODEL, ("two arguments", "dict")),
    "mini-batches of coupled rows": Bad(
        _fit(lambda: _coupled, _pair(), lambda: bdl.MAP(steps=3, batch_size=2)),
        _METHOD,
        ("mini-batches", "batch_size=None"),
    ),
    "mini-batches without a plate": Bad(
        _fit(lambda: _no_plate, _pair(), lambda: bdl.MAP(steps=3, batch_size=2)),
        _METHOD,
        ("mini-batches", "batch_size=None"),
    ),
    "rows of a program without a plate": Bad(
        lambda _: bdl.fit(_no_plate, _pair(), bdl.MAP(steps=3)).log_likelihood(*_pair()),
        errors.NotFactorised,
        ("plate", '"data"'),
    ),
}

BAD_METHODS: dict[str, Bad] = {
    "unknown method": Bad(lambda _: method_class("nutz"), _METHOD, ("'nutz'", "Did you mean nuts", "meanfieldvi")),
    "no draws": Bad(lambda _: bdl.NUTS(draws=0), _METHOD, ("NUTS", "draws=0", "at least 1")),
    "half a chain": Bad(lambda _: bdl.SGLD(chains=0.5), _METHOD, ("SGLD", "chains=0.5", "whole number")),
    "acceptance of 1": Bad(lambda _: bdl.NUTS(target_accept=1), _METHOD, ("target_accept=1", "between 0 and 1")),
    "negative step size": Bad(lambda _: bdl.HMC(step_size=-0.1), _METHOD, ("HMC", "step_size=-0.1", "positive")),
    "NaN step size": Bad(lambda _: bdl.SGLD(step_size=_NAN), _METHOD, ("step_size", "nan", "positive")),
    "jitter of 1": Bad(lambda _: bdl.HMC(jitter=1.0), _METHOD, ("jitter=1.0", "below 1")),
    "unknown optimizer": Bad(lambda _: bdl.MAP(optimizer="adamw"), _METHOD, ("'adamw'", "'adam'", "'lbfgs'")),
    "no members": Bad(lambda _: bdl.DeepEnsemble(members=0), _METHOD, ("members=0", "at least 1")),
    "validation of 2": Bad(lambda _: bdl.MAP(validation=2.0), _METHOD, ("validation=2.0", "between 0 and 1")),
    "validation without rows": Bad(
        _fit(_small, _pair(), lambda: bdl.MAP(validation=0.01)), _METHOD, ("validation=0.01", "at least one")
    ),
    "negative scale": Bad(lambda _: bdl.MeanFieldVI(initial_scale=-1), _METHOD, ("initial_scale=-1", "positive")),
    "temperature of a mode": Bad(
        lambda _: bdl.MAP(temperature=2.0), _METHOD, ("temperature=2.0", "only temperature=1")
    ),
    "temperature of an infinite network": Bad(lambda _: bdl.NNGP(temperature=2.0), _METHOD, ("temperature=2.0",)),
    "negative temperature": Bad(lambda _: bdl.NUTS(temperature=-1.0), _METHOD, ("temperature=-1.0", "positive")),
    "infinite temperature": Bad(
        lambda _: bdl.NUTS(likelihood_temperature=np.inf), _METHOD, ("likelihood_temperature", "positive")
    ),
    "schedule that never converges": Bad(
        lambda _: bdl.SGLD(step_size=schedules.Polynomial(0.1, gamma=2.0)), _METHOD, ("gamma=2.0", "schedule")
    ),
    "seed as text": Bad(_fit(_small, _pair(), seed="1"), _METHOD, ("seed='1'", "whole number")),
    "unknown start": Bad(_fit(_small, _pair(), init="zeros"), _METHOD, ("'zeros'", "prior", "map")),
    "start at NaN": Bad(
        _fit(lambda: program, _pair(), init={"w": torch.tensor([_NAN, 0.0])}), _METHOD, ("init", "NaN")
    ),
    "start at other sites": Bad(
        _fit(lambda: program, _pair(), init={"v": torch.zeros(2)}), errors.BayesdlError, ("'w'", "'v'")
    ),
    "prior rows of a sampler": Bad(
        _fit(_small, _pair(), lambda: bdl.NUTS(warmup=2, draws=2), prior_rows=0.5),
        _METHOD,
        ("prior_rows", "MeanFieldVI"),
    ),
    "prior rows of 2": Bad(
        _fit(_small, _pair(), lambda: bdl.MeanFieldVI(steps=2), prior_rows=2.0), _DATA, ("prior_rows=2.0", "fraction")
    ),
    "prior rows of a dict": Bad(
        _fit(lambda: program, dict(zip("xy", _pair(), strict=True)), lambda: bdl.MeanFieldVI(steps=2), prior_rows=0.5),
        _DATA,
        ("prior_rows", "Dataset", "dict"),
    ),
    "Gaussian process of a program": Bad(
        _fit(lambda: program, _pair(), lambda: bdl.GP()), _METHOD, ("GP", "BayesianNetwork", "likelihood")
    ),
    "infinite softmax": Bad(
        _fit(
            lambda: bdl.BayesianNetwork(_net(_layer(nn.Linear, 2, 2), nn.Softmax(-1), _layer(nn.Linear, 2, 1))),
            _pair(),
            lambda: bdl.NNGP(),
        ),
        _METHOD,
        ("NNGP", "Softmax", "ReLU"),
    ),
    "too many rows": Bad(
        _fit(_small, _pair(), lambda: bdl.GP(solver="cholesky", max_rows=3)), _METHOD, ("4 rows", "max_rows=3", "SGLD")
    ),
    "start of a Gaussian process": Bad(_fit(_small, _pair(), lambda: bdl.GP(), init="prior"), _METHOD, ("init", "GP")),
    "kernel as text": Bad(lambda _: bdl.GP(kernel="rbf"), _METHOD, ("'rbf'", "GPyTorch kernel")),
    "checkpoint every 0 steps": Bad(lambda f: bdl.Checkpoint(f / "run", every=0), _METHOD, ("every=0", "at least 1")),
    "learning rate too large": Bad(
        _fit(lambda: program, _pair(), lambda: bdl.MAP(optimizer="sgd", learning_rate=1e200, steps=9)),
        errors.Divergence,
        ("MAP", "finite", "learning rate", "try"),
    ),
    "checkpoint of another seed": Bad(
        _fit(_small, _pair(), seed=1),
        errors.ResumeMismatch,
        ("run.safetensors", "seed: 0 in the file, 1 now"),
        _checkpointed,
    ),
    "checkpoint of other data": Bad(
        _fit(_small, _pair([1.0, 2.0, 3.0, 5.0])), errors.ResumeMismatch, ("data:", "another run"), _checkpointed
    ),
    "damaged checkpoint": Bad(_fit(_small, _pair()), _FILE, ("run.safetensors", "damaged"), _damaged_checkpoint),
    "foreign checkpoint": Bad(
        _fit(_small, _pair()),
        _FILE,
        ("run.safetensors", "not a tensor file"),
        _write("run.safetensors", b"PK" + bytes(99)),
    ),
}

_XS = dataset("regression").x

BAD_PREDICTIONS: dict[str, Bad] = {
    "wrong columns": Bad(_predict(_XS[:, :2]), _DATA, ("2", "3", "columns")),
    "NaN at prediction": Bad(_predict(_XS.log()), _DATA, ("x holds", "NaN", "first at")),
    "nothing to predict": Bad(_predict(_XS[:0]), _DATA, ("no rows",)),
    "one row without its dimension": Bad(_predict(_XS[0]), _DATA, ("(3,)", "row dimension")),
    "text to predict": Bad(_predict([["a", "b", "c"]]), _DATA, ("no numbers", "onehot")),
    "no prediction draws": Bad(_predict(_XS, max_draws=0), _METHOD, ("max_draws=0", "at least 1")),
    "batches of no rows": Bad(_predict(_XS, batch_size=0), errors.BayesdlError, ("batch_size=0", "at least 1")),
    "unknown site": Bad(_predict(_XS, site="z"), errors.BayesdlError, ("'z'",)),
    "no posterior draws": Bad(lambda _: fitted().draws(0), _METHOD, ("draws(n=0)", "at least 1")),
    "weights of a Gaussian process": Bad(
        lambda _: bdl.fit(_small(), _pair(), bdl.GP(steps=1)).draws(2), _METHOD, ("functions(x, n)",)
    ),
    "targets of another length": Bad(
        lambda _: fitted().log_likelihood(_XS, dataset("regression").y[:5]), _DATA, ("32 rows", "y has 5")
    ),
    "label beyond the classes": Bad(
        lambda _: fitted("classes").log_likelihood(_XS[:1], torch.tensor([3])), _DATA, ("Label 3", "3 outputs")
    ),
    "quantile of 1": Bad(lambda _: fitted().predict(_XS).quantile(1.0), _DATA, ("strictly between 0 and 1", "1.0")),
    "interval of 0": Bad(lambda _: fitted().predict(_XS).interval(0.0), _DATA, ("strictly between 0 and 1",)),
    "probabilities of a number": Bad(lambda _: fitted().predict(_XS).probs, _MODEL, ("classes", "real")),
    "quantile of classes": Bad(lambda _: fitted("classes").predict(_XS).quantile(0.5), _MODEL, ("ordered", "probs")),
    "no samples": Bad(lambda _: fitted().predict(_XS).sample(0), _DATA, ("n=0",)),
    "no such row": Bad(lambda _: fitted().predict(_XS)[99], _DATA, ("32",)),
    "prior predictive of nothing": Bad(
        lambda _: bdl.prior_predictive(_small(), _pair(), 0), _METHOD, ("n=0", "at least 1")
    ),
    "R-hat of a mode": Bad(lambda _: fitted().diagnostics(), _DATA, ("draws", "chain")),
    "scores of other rows": Bad(_evaluate([1.0, 2.0]), _DATA, ("(2,)", "32 rows")),
    "scores of NaN": Bad(_evaluate([_NAN] * 32), _DATA, ("y holds 32", "NaN")),
    "scores of unknown labels": Bad(_evaluate([7] * 32, "classes"), _DATA, ("out of range", "row 0", "7")),
    "scores of text": Bad(_evaluate(["high"] * 32, "classes"), _DATA, ("text",)),
}

BAD_FILES: dict[str, Bad] = {
    "no posterior": Bad(_load, _FILE, ("posterior.json", "does not exist")),
    "no tensors": Bad(
        _load,
        _FILE,
        ("posterior.safetensors", "does not exist"),
        _saved(lambda p: (p / "posterior.safetensors").unlink()),
    ),
    "tensors cut short": Bad(
        _load, _FILE, ("posterior.safetensors", "damaged"), _saved(_cut("posterior.safetensors", 0.6))
    ),
    "tensors empty": Bad(
        _load, _FILE, ("posterior.safetensors", "damaged"), _saved(_cut("posterior.safetensors", 0.0))
    ),
    "tensors are a pickle": Bad(
        _load,
        _FILE,
        ("posterior.safetensors", "foreign"),
        _saved(lambda p: _write("posterior.safetensors", pickle.dumps({"z": 1}))(p)),
    ),
    "description cut short": Bad(_load, _FILE, ("posterior.json", "JSON"), _saved(_cut("posterior.json", 0.5))),
    "description is garbage": Bad(
        _load, _FILE, ("posterior.json", "JSON"), _saved(lambda p: _write("posterior.json", b"\x00\xff\x80")(p))
    ),
    "description of something else": Bad(
        _load, _FILE, ("does not hold a posterior",), _saved(lambda p: _write("posterior.json", "[1, 2]")(p))
    ),
    "foreign format": Bad(_load, _FILE, ("format 99", "reads"), _saved(_edit(lambda d: d.update(format=99)))),
    "unknown kind": Bad(
        _load, _FILE, ("does not hold a posterior", "os:system"), _saved(_edit(lambda d: d.update(kind="os:system")))
    ),
    "missing entry": Bad(_load, _FILE, ("does not hold a posterior", "sites"), _saved(_edit(lambda d: d.pop("sites")))),
    "unknown layer": Bad(
        _load,
        errors.BayesdlError,
        ("Popen",),
        _saved(_edit(lambda d: d["model"]["net"].update(type="subprocess:Popen", kind="Popen", **{"class": "Popen"}))),
    ),
    "another architecture": Bad(
        lambda f: _load(f, bdl.models.mlp(dataset("regression"), hidden=(4,), activation="erf")),
        errors.ModelMismatch,
        ("0.weight", "[4, 3]", "[3, 3]"),
        _saved(),
    ),
    "another likelihood": Bad(
        lambda f: _load(f, bdl.models.mlp(dataset("regression"), hidden=(3,), activation="tanh")),
        errors.ModelMismatch,
        ("log density", "same sites"),
        _saved(),
    ),
    "model of other data": Bad(
        lambda f: _load(f, network("classes")), errors.ModelMismatch, ("2.weight", "[3, 3]"), _saved()
    ),
    "prediction without the model": Bad(
        lambda f: _load(f).predict(_pair()[0]), errors.ModelRequired, ("model=",), _saved_program
    ),
}

BAD_CERTIFICATES: dict[str, Bad] = {
    "fitted rows without a density": Bad(_certify(), errors.CertificateError, ("32", "held out", "prior_rows")),
    "delta of 0": Bad(_certify(delta=0.0), errors.CertificateError, ("delta", "0")),
    "delta of 1.5": Bad(_certify(delta=1.5), errors.CertificateError, ("delta", "1.5")),
    "delta NaN": Bad(_certify(delta=_NAN), errors.CertificateError, ("delta", "NaN")),
    "no certificate draws": Bad(_certify(draws=0), errors.CertificateError, ("draws", "0")),
    "unknown bound": Bad(_certify(bound="tightest"), errors.CertificateError, ("'tightest'", "'kl'")),
    "no candidates": Bad(lambda _: bdl.certify([], dataset("regression")), errors.CertificateError, ("candidates",)),
    "hold-out on fitted rows": Bad(_certify(bound="holdout"), errors.CertificateError, ("32", "has not seen")),
    "rows twice": Bad(
        lambda _: bdl.certify(fitted(), bdl.Dataset.concat([dataset("regression")] * 2)),
        errors.CertificateError,
        ("32 rows", "more than once"),
    ),
    "prior that saw the rows": Bad(
        lambda _: bdl.certify(fitted("binary", 0.5), _prior_rows("binary"), draws=10),
        errors.DataDependentPrior,
        ("16 rows", "prior"),
    ),
    "scaler that saw the rows": Bad(
        lambda _: bdl.certify(
            bdl.fit(network("binary"), dataset("binary"), bdl.MeanFieldVI(steps=2)), dataset("binary")
        ),
        errors.DataDependentPrior,
        ("32", "scaler"),
    ),
    "other classes": Bad(
        lambda _: bdl.certify(fitted("binary"), dataset("classes")), errors.CertificateError, ("yes", "middle")
    ),
    "other task": Bad(
        lambda _: bdl.certify(fitted("binary"), dataset("regression")), errors.CertificateError, ("classification",)
    ),
    "ceiling of 0": Bad(lambda _: bdl.bounds.bounded("nll", 0.0), errors.CertificateError, ("ceiling", "positive")),
}


def _prior_rows(kind: str) -> bdl.Dataset:
    rows = fitted(kind, 0.5).problem.prior_rows
    assert rows is not None
    return dataset(kind).subset(dataset(kind).rows.isin(rows))


BAD: dict[str, Bad] = {
    **BAD_DATA,
    **BAD_TABLES,
    **BAD_MODELS,
    **BAD_METHODS,
    **BAD_PREDICTIONS,
    **BAD_FILES,
    **BAD_CERTIFICATES,
}
