"""What a program must not do, and what LogDensity says about it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bayesdl.density import LogDensity, SlowProgramWarning
from bayesdl.errors import DataError, DynamicSupport, ModelError, NotFactorised, RandomDensity, RowCoupling

X, Y = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12.0)


def _regression(inside: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(inside(x, w), 1.0), obs=y)

    return model


def own_subsample(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        pyro.sample("y", dist.Normal(x[rows, 0] * w, 1.0), obs=y[rows])


def moving_support(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(a, a + 1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def improper(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


LAYER = nn.Linear(2, 1)


def hidden_module(x: Tensor, y: Tensor) -> None:
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(LAYER(x).squeeze(-1), s), obs=y)


def pyro_module(x: Tensor, y: Tensor) -> None:
    s = pyro.sample("s", dist.HalfNormal(1.0))
    net = pyro.module("net", LAYER)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(net(x).squeeze(-1).detach(), s), obs=y)


COIN = itertools.cycle([False, True])


def sometimes(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if next(COIN):
        pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def nothing(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)


def endless(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(a + k, 1.0), obs=y)


def chain(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    k = torch.tensor(0)
    for t in range(40):
        k = pyro.sample(f"k{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[k]))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + k, 1.0), obs=y)


def sequential(x: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"y{i}", dist.Normal(a, 1.0), obs=y[i])


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (own_subsample, ModelError, "Drop subsample_size"),
        (moving_support, DynamicSupport, "fixed support"),
        (improper, ModelError, "proper prior"),
        (hidden_module, ModelError, "BayesianNetwork"),
        (pyro_module, ModelError, "pyro.module"),
        (sometimes, ModelError, "Only sometimes present: \\['b'\\]"),
        (nothing, ModelError, "nothing to infer"),
        (endless, ModelError, "infinitely many values"),
        (chain, ModelError, "forward algorithm"),
        (sequential, ModelError, "sequential"),
    ],
)
def test_refused(model: Callable[..., Any], error: type[Exception], words: str) -> None:
    before = pyro.get_param_store().get_state()
    with pytest.raises(error, match=words):
        LogDensity(model, {"x": X, "y": Y})
    assert pyro.get_param_store().get_state().keys() == before.keys()


def test_outer_product_of_target_and_mean_is_named() -> None:
    with pytest.raises(ModelError, match=r"\[N, 1\] met a mean of shape \[N\]"):
        LogDensity(_regression(lambda x, w: x @ w), {"x": X, "y": Y[:, None]})


def test_observations_outside_the_support() -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    with pytest.raises(DataError, match="'y'"):
        LogDensity(model, {"y": torch.tensor([1.0, -1.5])})


def test_row_coupling_allows_full_batches_only() -> None:
    density = LogDensity(_regression(lambda x, w: (x - x.mean(0)) @ w), {"x": X, "y": Y})
    z = torch.zeros(1, 2)
    assert torch.isfinite(density.value_and_grad(z)[0]).all()
    for call in (density.log_likelihood, lambda z: density.value_and_grad(z, {"x": X[:3], "y": Y[:3]})):
        with pytest.raises(RowCoupling, match="row . changes"):
            call(z)


def test_no_plate_means_no_rows() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x[:, 0] * w, 1.0).to_event(1), obs=y)

    density = LogDensity(model, {"x": X, "y": Y})
    assert not density.factorised
    assert density.value_and_grad(torch.zeros(1, 1))[0].isfinite()
    with pytest.raises(NotFactorised, match="no plate named 'data'"):
        density.log_likelihood(torch.zeros(1, 1))


def test_another_plate_name() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("people", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0] * w, 1.0), obs=y)

    assert LogDensity(model, {"x": X, "y": Y}, data_plate="people").factorised


def test_local_latents_refuse_minibatches() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x[:, 0] * w + u, 1.0), obs=y)

    density = LogDensity(model, {"x": X, "y": Y})
    assert [site.scope for site in density.sites] == ["global", "local"]
    with pytest.raises(NotFactorised, match="full-batch"):
        density.value_and_grad(torch.zeros(1, 13), {"x": X[:3], "y": Y[:3]})


def test_random_density_is_refused() -> None:
    model = _regression(lambda x, w: nn.functional.dropout(x, 0.5, training=True) @ w)
    with pytest.raises(RandomDensity, match="eval mode"):
        LogDensity(model, {"x": X, "y": Y})


def _one_hot(x: Tensor, w: Tensor) -> Tensor:
    group = x[:, 0].abs().long()
    levels = int(group.max().item()) + 1
    return nn.functional.one_hot(group, levels).float() @ torch.arange(levels).float() * w[0]


def _deduplicated(x: Tensor, w: Tensor) -> Tensor:
    values, place = torch.unique(x[:, 0].round(), return_inverse=True)
    return (values * len(values))[place] / len(values) * w[0]


def _masked(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[x > 0] = x[x > 0]
    return out @ w


@pytest.mark.filterwarnings("ignore::bayesdl.density.SlowProgramWarning")  # recorded or not, the numbers must be right
@pytest.mark.parametrize("inside", [_one_hot, _deduplicated, _masked])
def test_shapes_and_numbers_that_depend_on_data_are_not_frozen(inside: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A graph recorded on the first batch must not be replayed with that batch's values on the second."""
    density = LogDensity(_regression(inside), {"x": X, "y": Y})
    z = torch.ones(2, 2)
    density.value_and_grad(z)
    for factor in (3.0, 0.1):
        other = {"x": factor * X + 1, "y": Y}
        want = LogDensity(_regression(inside), other, execution="loop").value_and_grad(z)
        for got, wanted in zip(density.value_and_grad(z, other), want, strict=True):
            torch.testing.assert_close(got, wanted)


def test_control_flow_on_latents_runs_one_chain_at_a_time() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        slope = w if w > 0 else 2 * w
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0] * slope, 1.0), obs=y)

    density = LogDensity(model, {"x": X, "y": Y})
    z = torch.tensor([[0.5], [-0.5]])
    with pytest.warns(SlowProgramWarning):
        value, gradient = density.value_and_grad(z)
    assert density.execution == "loop"
    for k, factor in enumerate((1.0, 2.0)):
        slope = z[k] * factor
        want = dist.Normal(X[:, 0] * slope, 1.0).log_prob(Y).sum() + dist.Normal(0.0, 1.0).log_prob(z[k]).sum()
        torch.testing.assert_close(value[k], want)
        residual = (Y - X[:, 0] * slope) @ X[:, 0] * factor - z[k]
        torch.testing.assert_close(gradient[k], residual)


def test_sites_that_come_and_go_with_a_value_are_refused_when_seen() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(10.0, 1.0))
        if a < 0:
            pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    density = LogDensity(model, {"x": X, "y": Y})
    with pytest.raises(ModelError, match="other latent sites"), pytest.warns(SlowProgramWarning):
        density.value_and_grad(torch.tensor([[-1.0]]))


def test_missing_and_misshapen_values_are_named() -> None:
    density = LogDensity(_regression(lambda x, w: x @ w), {"x": X, "y": Y})
    with pytest.raises(ModelError, match="missing: \\['w'\\], unknown: \\['v'\\]"):
        density.unconstrain({"v": torch.zeros(2)})
    with pytest.raises(ModelError, match="shape"):
        density.unconstrain({"w": torch.zeros(3)})
    with pytest.raises(ModelError, match="chains, 2"):
        density.value_and_grad(torch.zeros(2))


def test_global_state_is_left_as_it_was() -> None:
    pyro.set_rng_seed(5)
    before = torch.get_rng_state()
    density = LogDensity(_regression(lambda x, w: x @ w), {"x": X, "y": Y})
    density.prior_draws(3)
    density.value_and_grad(torch.zeros(1, 2))
    assert torch.equal(torch.get_rng_state(), before)
