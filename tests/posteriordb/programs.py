"""The twelve posteriors of ../shared/data/posteriordb as Pyro programs, in float64.

A flat prior is a proper one whose density is masked: the program can be run, and starts where that prior lies, and the
site adds nothing to the log density.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor

DOUBLE = torch.float64
Sites = dict[str, Tensor]


def _t(*values: float) -> Tensor:
    """One number as a scalar, several as a vector."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=DOUBLE)


def _normal(sd: float, *shape: int) -> Any:
    return dist.Normal(torch.zeros(shape, dtype=DOUBLE), _t(sd)).to_event(len(shape))


def _flat_real(*shape: int) -> Any:
    return _normal(1.0, *shape).mask(False)


def _flat_positive() -> Any:
    return dist.LogNormal(_t(0.0), _t(1.0)).mask(False)


# -- linear regressions ------------------------------------------------------------------------------------------------


def regression(x: Tensor, y: Tensor | None = None, *, sigma: Callable[[], Any], beta: Callable[[int], Any]) -> None:
    """y ~ N(x beta, sigma)."""
    slopes = pyro.sample("beta", beta(x.shape[1]))
    noise = pyro.sample("sigma", sigma())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slopes, noise), obs=y)


def flat_regression(x: Tensor, y: Tensor | None = None) -> None:
    """Everything flat: mesquite, nes."""
    regression(x, y, sigma=_flat_positive, beta=_flat_real)


def cauchy_regression(x: Tensor, y: Tensor | None = None) -> None:
    """Flat coefficients, half-Cauchy noise: both kidscore models."""
    regression(x, y, sigma=lambda: dist.HalfCauchy(_t(2.5)), beta=_flat_real)


def normal_regression(x: Tensor, y: Tensor | None = None) -> None:
    """Normal coefficients, half-normal noise: blr."""
    regression(x, y, sigma=lambda: dist.HalfNormal(_t(10.0)), beta=lambda d: _normal(10.0, d))


def autoregression(y: Tensor, lags: int) -> None:
    """An autoregressive series, conditioned on its first values."""
    alpha = pyro.sample("alpha", _normal(10.0))
    beta = pyro.sample("beta", _normal(10.0, lags))
    sigma = pyro.sample("sigma", dist.HalfCauchy(_t(2.5)))
    past = torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)], 1)
    with pyro.plate("time", len(y) - lags):  # not "data": its rows are not those of y
        pyro.sample("y", dist.Normal(alpha + past @ beta, sigma), obs=y[lags:])


def diamonds(x: Tensor, y: Tensor | None = None) -> None:
    """Centred columns, Student-t intercept and noise."""
    b = pyro.sample("b", _normal(1.0, x.shape[1]))
    intercept = pyro.sample("intercept", dist.StudentT(_t(3.0), _t(8.0), _t(10.0)))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(_t(3.0), _t(0.0), _t(10.0))))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + (x - x.mean(0)) @ b, sigma), obs=y)


# -- the others --------------------------------------------------------------------------------------------------------


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> None:
    """The hierarchical model in its non-centred form."""
    mu = pyro.sample("mu", _normal(5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(_t(5.0)))
    with pyro.plate("data", len(sigma)):
        z = pyro.sample("z", dist.Normal(_t(0.0), _t(1.0)))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def recursion(inputs: Tensor, factor: Tensor) -> Tensor:
    """v_t = factor * v_(t-1) + inputs_t along ``[T]`` with v_0 = inputs_0, by doubling: log2(T) operations."""
    values, shift = inputs, 1
    while shift < len(inputs):
        values = values + factor * torch.nn.functional.pad(values[:-shift], (shift, 0))
        factor, shift = factor * factor, 2 * shift
    return values


def garch(y: Tensor, sigma1: float) -> None:
    """GARCH(1,1); (alpha1, beta1, rest) flat on the simplex is (alpha1, beta1) flat on its triangle."""
    mu = pyro.sample("mu", _flat_real())
    alpha0 = pyro.sample("alpha0", _flat_positive())
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=DOUBLE)))
    news = alpha0 + share[0] * (y[:-1] - mu).square()
    variance = recursion(torch.cat([_t(sigma1**2).reshape(1), news]), share[1])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def poisson_process(x: Tensor, k: Tensor | None = None) -> None:
    """Counts under the exponential of a Gaussian process, whitened."""
    rho = pyro.sample("rho", dist.Gamma(_t(25.0), _t(4.0)))
    alpha = pyro.sample("alpha", dist.HalfNormal(_t(2.0)))
    z = pyro.sample("z", _normal(1.0, len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Poisson((_covariance_factor(x, rho, alpha) @ z).exp()), obs=k)


def _covariance_factor(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    distance = (x[:, None] - x) / rho[..., None, None]
    covariance = alpha[..., None, None].square() * (-0.5 * distance.square()).exp()
    factor: Tensor = torch.linalg.cholesky(covariance + 1e-10 * torch.eye(len(x), dtype=DOUBLE))
    return factor


def log_path_sum(first: Tensor, matrices: Tensor) -> Tensor:
    """Log of the sum of all entries of ``first [K] @ matrices [T, K, K]``: log2(T) operations, neighbours in pairs."""
    total = torch.zeros((), dtype=DOUBLE)
    while len(matrices) > 1:
        odd = matrices[len(matrices) // 2 * 2 :]
        matrices = torch.cat([matrices[0 : len(matrices) - 1 : 2] @ matrices[1::2], odd])
        # Whatever the scale is, it goes out here and comes back in there: no gradient flows through it.
        scale = matrices.detach().amax((-1, -2), keepdim=True)
        matrices, total = matrices / scale, total + scale.log().sum()
    return total + (first @ matrices[0]).sum().log()


def hidden_markov(y: Tensor) -> None:
    """Two states with ordered positive means, summed out (pyro.distributions.DiscreteHMM does not run under vmap)."""
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2, dtype=DOUBLE)).to_event(1))
    low = pyro.sample("low", _flat_positive())
    gap = pyro.sample("gap", _flat_positive())
    mu = torch.stack([low, low + gap])
    pyro.factor("prior", dist.Normal(_t(3.0, 10.0), _t(1.0)).log_prob(mu).sum())
    emission = dist.Normal(mu, _t(1.0)).log_prob(y[:, None])
    largest = emission.amax(-1, keepdim=True)
    weights = (emission - largest).exp()
    pyro.factor("y", largest.sum() + log_path_sum(weights[0], rows * weights[1:, None, :]))


def mixture(y: Tensor) -> None:
    """Two Gaussians with ordered means."""
    mu = pyro.sample("mu", dist.TransformedDistribution(_normal(1.0, 2), [OrderedTransform()]).mask(False))
    pyro.factor("prior", dist.Normal(_t(0.0), _t(2.0)).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(_t(2.0)).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(_t(5.0), _t(5.0)))
    with pyro.plate("data", len(y)):
        weights = dist.Categorical(torch.stack([theta, 1 - theta]).expand(len(y), 2))
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma).expand([len(y), 2])), obs=y)


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A program, how its data are read, and how its sites answer to the reference's scalars.

    Attributes:
        name: folder in ../shared/data/posteriordb.
        program: the Pyro program.
        data: what ``fit`` is given, from ``data.json``.
        scalars: the reference's scalars ``[..., P]``, in its order, from sites ``[..., *shape]`` and the raw data.
        sites: the inverse.
    """

    name: str
    program: Callable[..., Any]
    data: Callable[[dict[str, Any]], Any]
    scalars: Callable[[Mapping[str, Tensor], dict[str, Any]], Tensor]
    sites: Callable[[Tensor, dict[str, Any]], Sites]


def load(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """``data.json`` and ``reference.npz`` of a posterior."""
    folder = shared / "data" / "posteriordb" / name
    with np.load(folder / "reference.npz") as file:
        reference = {key: file[key] for key in file.files}
    return json.loads((folder / "data.json").read_text()), reference


def _columns(raw: dict[str, Any], *names: str) -> Tensor:
    return torch.stack([torch.tensor(raw[name], dtype=DOUBLE) for name in names], 1)


def _ones_and(*columns: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(columns[0][:, :1]), *columns], 1)


def _vector(values: Any) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def _kidscore(raw: dict[str, Any], *names: str) -> tuple[Tensor, Tensor]:
    columns = _columns(raw, *names)
    if len(names) == 2:
        columns = torch.cat([columns, columns.prod(1, keepdim=True)], 1)
    return _ones_and(columns), _vector(raw["kid_score"])


def _mesquite(raw: dict[str, Any]) -> tuple[Tensor, Tensor]:
    sizes = _columns(raw, "diam1", "diam2", "canopy_height", "total_height", "density").log()
    return _ones_and(sizes, _columns(raw, "group")), _vector(raw["weight"]).log()


def _nes(raw: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ages = torch.stack([_vector(raw["age_discrete"]) == age for age in (2, 3, 4)], 1).to(DOUBLE)
    first, last = _columns(raw, "real_ideo", "race_adj"), _columns(raw, "educ1", "gender", "income")
    return _ones_and(first, ages, last), _vector(raw["partyid7"])


def _stacked(*names: str) -> Callable[[Mapping[str, Tensor], dict[str, Any]], Tensor]:
    """Sites of one or no dimension, one after the other."""

    def scalars(sites: Mapping[str, Tensor], raw: dict[str, Any]) -> Tensor:
        lead = min(sites[name].dim() for name in names)
        return torch.cat([sites[n] if sites[n].dim() > lead else sites[n][..., None] for n in names], -1)

    return scalars


def _cut(**sizes: int) -> Callable[[Tensor, dict[str, Any]], Sites]:
    """The inverse of ``_stacked``; size 0 is a scalar."""

    def sites(values: Tensor, raw: dict[str, Any]) -> Sites:
        parts = values.split([max(size, 1) for size in sizes.values()], -1)
        return {n: part if size else part[..., 0] for (n, size), part in zip(sizes.items(), parts, strict=True)}

    return sites


def _regression(name: str, program: Callable[..., Any], data: Callable[[dict[str, Any]], Any], columns: int) -> Entry:
    return Entry(name, program, data, _stacked("beta", "sigma"), _cut(beta=columns, sigma=0))


def _schools(sites: Mapping[str, Tensor], raw: dict[str, Any]) -> Tensor:
    mu, tau = sites["mu"][..., None], sites["tau"][..., None]
    return torch.cat([mu + tau * sites["z"], mu, tau], -1)


def _schools_back(values: Tensor, raw: dict[str, Any]) -> Sites:
    theta, mu, tau = values[..., :8], values[..., 8], values[..., 9]
    return {"mu": mu, "tau": tau, "z": (theta - mu[..., None]) / tau[..., None]}


def _garch(sites: Mapping[str, Tensor], raw: dict[str, Any]) -> Tensor:
    return torch.cat([sites["mu"][..., None], sites["alpha0"][..., None], sites["share"][..., :2]], -1)


def _garch_back(values: Tensor, raw: dict[str, Any]) -> Sites:
    share = torch.cat([values[..., 2:], 1 - values[..., 2:].sum(-1, keepdim=True)], -1)
    return {"mu": values[..., 0], "alpha0": values[..., 1], "share": share}


def _poisson(sites: Mapping[str, Tensor], raw: dict[str, Any]) -> Tensor:
    factor = _covariance_factor(_vector(raw["x"]), sites["rho"], sites["alpha"])
    f = (factor @ sites["z"][..., None])[..., 0]
    return torch.cat([sites["rho"][..., None], sites["alpha"][..., None], f], -1)


def _poisson_back(values: Tensor, raw: dict[str, Any]) -> Sites:
    rho, alpha, f = values[..., 0], values[..., 1], values[..., 2:, None]
    factor = _covariance_factor(_vector(raw["x"]), rho, alpha)
    return {"rho": rho, "alpha": alpha, "z": torch.linalg.solve_triangular(factor, f, upper=False)[..., 0]}


def _markov(sites: Mapping[str, Tensor], raw: dict[str, Any]) -> Tensor:
    low = sites["low"][..., None]
    return torch.cat([sites["rows"].flatten(-2), low, low + sites["gap"][..., None]], -1)


def _markov_back(values: Tensor, raw: dict[str, Any]) -> Sites:
    rows = values[..., :4].unflatten(-1, (2, 2))
    rows = rows / rows.sum(-1, keepdim=True)  # the reference is stored in single precision
    return {"rows": rows, "low": values[..., 4], "gap": values[..., 5] - values[..., 4]}


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "arK-arK",
            autoregression,
            lambda raw: {"y": _vector(raw["y"]), "lags": raw["K"]},
            _stacked("alpha", "beta", "sigma"),
            _cut(alpha=0, beta=5, sigma=0),
        ),
        Entry(
            "diamonds-diamonds",
            diamonds,
            lambda raw: (_vector(raw["X"])[:, 1:], _vector(raw["Y"])),
            _stacked("b", "intercept", "sigma"),
            _cut(b=24, intercept=0, sigma=0),
        ),
        Entry(
            "eight_schools-eight_schools_noncentered",
            eight_schools,
            lambda raw: {"sigma": _vector(raw["sigma"]), "y": _vector(raw["y"])},
            _schools,
            _schools_back,
        ),
        Entry(
            "garch-garch11",
            garch,
            lambda raw: {"y": _vector(raw["y"]), "sigma1": raw["sigma1"]},
            _garch,
            _garch_back,
        ),
        Entry(
            "gp_pois_regr-gp_pois_regr",
            poisson_process,
            lambda raw: {"x": _vector(raw["x"]), "k": _vector(raw["k"])},
            _poisson,
            _poisson_back,
        ),
        Entry("hmm_example-hmm_example", hidden_markov, lambda raw: {"y": _vector(raw["y"])}, _markov, _markov_back),
        _regression(
            "kidiq-kidscore_interaction", cauchy_regression, lambda raw: _kidscore(raw, "mom_hs", "mom_iq"), columns=4
        ),
        _regression("kidiq-kidscore_momiq", cauchy_regression, lambda raw: _kidscore(raw, "mom_iq"), columns=2),
        Entry(
            "low_dim_gauss_mix-low_dim_gauss_mix",
            mixture,
            lambda raw: {"y": _vector(raw["y"])},
            _stacked("mu", "sigma", "theta"),
            _cut(mu=2, sigma=2, theta=0),
        ),
        _regression("mesquite-logmesquite", flat_regression, _mesquite, columns=7),
        _regression("nes2000-nes", flat_regression, _nes, columns=9),
        _regression("sblrc-blr", normal_regression, lambda raw: (_vector(raw["X"]), _vector(raw["y"])), columns=5),
    )
}
