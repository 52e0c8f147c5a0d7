"""MC dropout: masks are data, predictions are averages over masks, and linear models have closed forms for both."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesdl as bdl
from bayesdl.density import LogDensity
from bayesdl.errors import MethodError, ModelError
from bayesdl.infer.mc_dropout import DropoutEngine
from bayesdl.infer.schedules import Constant
from bayesdl.models.dropout import DropoutNetwork, Masks
from bayesdl.posterior import prepare
from bayesdl.posterior.dropout import SITE, DropoutPosterior
from tests.cases import conjugate, dataset, network

DOUBLE = torch.float64


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def linear(p: float, prior: float = 0.4, sigma: float = 0.5) -> bdl.BayesianNetwork:
    """A line through inputs that are dropped."""
    net = nn.Sequential(nn.Dropout(p), nn.Linear(3, 1, bias=False)).double()
    return bdl.BayesianNetwork(net, bdl.priors.Normal(prior), bdl.likelihoods.Gaussian(noise=sigma))


def dropped(p: float, z: Tensor) -> DropoutPosterior:
    """The posterior of a line with given weights."""
    return DropoutPosterior(prepare(linear(p), conjugate().data), z, {})


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (F.dropout, (4, 3)),
        (F.dropout, (4, 3, 2)),
        (F.dropout1d, (4, 3, 5)),
        (F.dropout2d, (4, 3, 5, 2)),
        (F.dropout3d, (4, 3, 2, 2, 2)),
        (F.alpha_dropout, (4, 3)),
        (F.feature_alpha_dropout, (4, 3, 5)),
    ],
)
def test_masked_dropout_has_the_values_of_torchs(function: Any, shape: tuple[int, ...]) -> None:
    units, p = 1 + rows(1, torch.Size(shape).numel()).abs().reshape(shape), 0.3
    channels = "1d" in function.__name__ or "2d" in function.__name__ or "3d" in function.__name__
    channels |= "feature" in function.__name__
    with Masks(None, 4) as counting:
        assert function(units, p, True) is units
    assert counting.used == (3 if channels else units[0].numel())
    # torch's own draw tells which units it kept; the same mask must give the same numbers
    torch.manual_seed(1)
    theirs = function(units, p, True)
    floor = theirs.min() if "alpha" in function.__name__ else theirs.new_zeros(())
    kept = theirs != floor
    inside = kept.flatten(2)[:, :, 0] if channels else kept.flatten(1)
    with Masks(torch.where(inside, 0.9, 0.1).to(DOUBLE), 4):
        ours = function(units, p, True)
        assert torch.equal(function(units, p, False), units)
    torch.testing.assert_close(ours, theirs)
    assert kept.any()
    assert not kept.all()


def test_a_unit_is_dropped_with_probability_p_and_its_mean_stays() -> None:
    noise = torch.rand(40_000, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    units = torch.full((40_000, 2), 3.0, dtype=DOUBLE)
    with Masks(noise, 40_000):
        out = F.dropout(units, 0.3, True)
    assert float((out == 0).double().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 80_000) ** 0.5)
    assert float(out.mean()) == pytest.approx(3.0, abs=4 * 3 * (0.3 / 0.7 / 80_000) ** 0.5)
    assert len(out.unique(dim=0)) == 4  # each row has a mask of its own


def test_a_module_that_is_called_twice_has_two_masks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.line = nn.Dropout(0.5), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.line(self.drop(x)))

    model = DropoutNetwork(bdl.BayesianNetwork(Twice().double()), rows(5, 6))
    assert model.units == 12
    x = rows(5, 6)
    values = model.model.initial_values(torch.Generator().manual_seed(0))
    for first, second in itertools.product((0.1, 0.9), repeat=2):
        with Masks(torch.tensor([first] * 6 + [second] * 6, dtype=DOUBLE), 5):
            out = model.model.forward(values, x)
        # 0.1 drops everything there: behind a first mask of zeros the bias is left, behind a second one nothing
        inside = 2 * x if first == 0.9 else 0 * x
        expected = 2 * F.linear(inside, values["line.weight"], values["line.bias"]) if second == 0.9 else 0 * x
        torch.testing.assert_close(out, expected)


def test_dropout_behind_a_first_dimension_that_is_not_the_rows_is_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.line = nn.Dropout(0.5), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.drop(x.T).T)[:, 0]

    data = rows(7, 2), rows(7, 1)[:, 0]
    with pytest.raises(ModelError, match="first dimension is not that of the"):
        bdl.MCDropout(steps=2).fit(bdl.BayesianNetwork(Turned().double()), data)


# -- the objective ---------------------------------------------------------------------------------------------------


def test_the_loss_has_the_mean_and_the_minimiser_of_its_closed_form() -> None:
    """E|y - (R x) w|^2 = |y - x w|^2 + p / (1 - p) w^T diag(x^T x) w, with inverted dropout."""
    case, p = conjugate(), 0.3
    gram = case.x.T @ case.x
    penalty = p / (1 - p) * torch.diag(gram.diagonal()) / case.sigma**2
    expected = torch.linalg.solve(case.precision() + penalty, case.x.T @ case.y / case.sigma**2)
    method = bdl.MCDropout(steps=2400, batch_size=20, optimizer="sgd", learning_rate=Constant(0.003), average="polyak")
    found = method.fit(linear(p), case.data)
    assert isinstance(found, DropoutPosterior)
    assert (expected - case.mean()).abs().max() > 0.05
    torch.testing.assert_close(found.z, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("batch_size", [None, 12, 30])
def test_gradients_of_mini_batches_with_masks_are_unbiased(batch_size: int | None) -> None:
    """Averaged over the batches of epochs and over masks: the gradient of the closed form, whatever the batch size."""
    case, p = conjugate(), 0.3
    problem, z = prepare(linear(p), case.data), torch.tensor([[0.3, -0.1, 0.2]], dtype=DOUBLE)
    method = bdl.MCDropout(batch_size=batch_size, optimizer="sgd")
    engine = DropoutEngine(method, problem, 0, 1, lambda: z)
    state, found = engine.init(), []
    for _ in range(1500 if batch_size is None else 1500 * (60 // batch_size) // 3):
        order, moved = engine.order.next(state)
        state |= moved
        found.append(engine.value_and_grad(z, engine.batch(state, order))[1][0])
    gradients = torch.stack(found)
    gram = case.x.T @ case.x / case.sigma**2
    curvature = case.precision() + p / (1 - p) * torch.diag(gram.diagonal())
    expected = case.x.T @ case.y / case.sigma**2 - curvature @ z[0]
    error = gradients.std(0) / len(gradients) ** 0.5  # an upper bound: batches of an epoch cancel
    assert ((gradients.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.04 * expected.abs().max()).all()


def test_masks_are_fresh_every_step_and_differ_between_rows() -> None:
    engine = DropoutEngine(
        bdl.MCDropout(batch_size=8), prepare(linear(0.5), conjugate().data), 0, 1, lambda: rows(1, 3)
    )
    state = engine.init()
    order, moved = engine.order.next(state)
    first, second = (engine.batch(state | moved, order)["masks"] for _ in range(2))
    assert first.shape == (1, 8, 3)
    assert not torch.equal(first, second)
    assert len(first[0].unique(dim=0)) == 8


# -- predictions -----------------------------------------------------------------------------------------------------


def test_a_line_has_the_known_mean_and_epistemic_variance() -> None:
    case, p, z = conjugate(), 0.3, torch.tensor([0.5, -0.4, 0.3], dtype=DOUBLE)
    prediction = dropped(p, z).predict(case.x, max_draws=4000)
    variance = p / (1 - p) * (case.x * z).square().sum(1)
    assert ((prediction.mean - case.x @ z).abs() < 5 * (variance / 4000) ** 0.5).all()
    # relative error of a variance of 4000 draws: sqrt((kurtosis - 1) / 4000), at most 0.04 here
    assert ((prediction.epistemic / variance - 1).abs() < 0.15).all()
    assert float((prediction.epistemic / variance).mean()) == pytest.approx(1.0, abs=0.03)
    # what the masks do is epistemic; the noise of the likelihood comes on top
    torch.testing.assert_close(prediction.aleatoric, torch.full((60,), case.sigma**2, dtype=DOUBLE))
    torch.testing.assert_close(prediction.variance, prediction.epistemic + prediction.aleatoric)


def test_functions_are_joint_draws_with_one_mask_for_all_rows() -> None:
    case, p, z = conjugate(), 0.3, torch.tensor([0.5, -0.4, 0.3], dtype=DOUBLE)
    posterior = dropped(p, z)
    functions = posterior.functions(case.x, 200, seed=3)
    assert functions.shape == (200, 60)
    # every draw is a linear function of x, whose weights are w or 0
    weights = torch.linalg.lstsq(case.x, functions.T).solution.T
    torch.testing.assert_close(weights @ case.x.T, functions, rtol=0, atol=1e-10)
    switched = weights / (z / (1 - p))
    assert (torch.minimum(switched.abs(), (switched - 1).abs()) < 1e-9).all()
    assert torch.equal(functions, posterior.predict(case.x, max_draws=200, seed=3).mean_by_draw)
    with pytest.raises(MethodError, match="functions"):
        posterior.draws(3)
    assert posterior.kl() is None


def test_weight_scaling_is_the_geometric_mean_of_a_softmax_layer() -> None:
    p, d, k = 0.3, 5, 3
    net = nn.Sequential(nn.Dropout(p), nn.Linear(d, k)).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(1.0), bdl.likelihoods.Categorical())
    x, y = rows(6, d, 1), torch.tensor([0, 1, 2, 0, 1, 2])
    problem = prepare(model, (x, y))
    posterior = DropoutPosterior(problem, rows(1, problem.density.dim, 2)[0], {})
    kept = torch.tensor(list(itertools.product([0.0, 1.0], repeat=d)), dtype=DOUBLE)
    weights = (kept * (1 - p) + (1 - kept) * p).prod(1)
    masks = posterior.thinned.density.unconstrain({SITE: kept * 0.8 + 0.1})  # 0.9 is kept, 0.1 is dropped
    from bayesdl.posterior.predictive import predict

    each = predict(posterior.thinned, masks, problem.inputs(x)).mean_by_draw
    geometric = torch.einsum("s,snk->nk", weights, each.log()).softmax(1)
    scaled = predict(problem, posterior.z[None], problem.inputs(x)).probs
    torch.testing.assert_close(geometric, scaled, rtol=0, atol=1e-12)
    arithmetic = torch.einsum("s,snk->nk", weights, each)
    assert (arithmetic - scaled).abs().max() > 0.01
    # MC dropout takes the arithmetic mean
    found = posterior.predict(x, max_draws=20_000, seed=0).probs
    assert (found - arithmetic).abs().max() < 4 * 0.5 / 20_000**0.5


def test_only_dropout_modules_are_switched_on() -> None:
    norm = nn.BatchNorm1d(4)
    norm.running_mean += 1.0
    net = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 1)).double()
    model, data = bdl.BayesianNetwork(net.eval()), dataset("regression")
    switched = model.with_dropout().net
    assert [name for name, module in switched.named_modules() if module.training] == ["3"]
    posterior = bdl.MCDropout(steps=5).fit(model, data)
    assert torch.equal(posterior.problem.model.net[1].running_mean, model.net[1].running_mean)
    whole, single = posterior.predict(data.x, max_draws=50), posterior.predict(data.x[:1], max_draws=50)
    torch.testing.assert_close(whole.mean[:1], single.mean)  # batch statistics would couple the rows


def test_it_trains_convolutions_and_predicts_with_them() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(2 * 16, 3)
    )  # fmt: skip
    model = bdl.BayesianNetwork(net, likelihood=bdl.likelihoods.Categorical())
    x, y = rows(10, 36).float().reshape(10, 1, 6, 6), torch.arange(10) % 3
    posterior = bdl.MCDropout(steps=4, batch_size=5).fit(model, (x, y))
    assert posterior.functions(x, 7).shape == (7, 10, 3)
    assert bool((posterior.predict(x).epistemic > 0).any())


def test_models_without_dropout_are_told_what_to_add() -> None:
    with pytest.raises(MethodError, match=r"add torch.nn.Dropout\(p\)"):
        bdl.MCDropout().fit(network("regression"), dataset("regression"))

    def program(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    with pytest.raises(MethodError, match="no BayesianNetwork"):
        bdl.MCDropout().fit(program, conjugate().data)
    with pytest.raises(MethodError, match="optimizer='lbfgs'"):
        bdl.MCDropout(optimizer="lbfgs")
    with pytest.raises(ModelError, match="dropout must be a rate"):
        bdl.models.mlp(dataset("regression"), dropout=1.0)


def test_log_likelihood_is_that_of_the_masks_of_the_prediction() -> None:
    data = dataset("regression")
    posterior = bdl.MCDropout(steps=10).fit(network("regression", dropout=0.3), data)
    expected = posterior.predict(data.x, max_draws=9, seed=2).log_prob_by_draw(data.y)
    torch.testing.assert_close(posterior.log_likelihood(data.x, data.y, max_draws=9, seed=2), expected)


def test_masks_as_data_are_the_density_that_the_network_in_training_mode_has() -> None:
    case = conjugate()
    network_, noise = DropoutNetwork(linear(0.3), case.x), rows(60, 3, 5).sigmoid()
    density = LogDensity(network_, {"x": case.x, "y": case.y, "masks": noise})
    z = rows(2, 3, 6)
    value = density.value_and_grad(z, target="joint")[0]
    inputs = case.x * (noise >= 0.3) / 0.7
    residual = case.y - z @ inputs.T
    law = torch.distributions.Normal(torch.zeros((), dtype=DOUBLE), case.sigma)
    prior = torch.distributions.Normal(torch.zeros((), dtype=DOUBLE), 0.4)
    torch.testing.assert_close(value, law.log_prob(residual).sum(1) + prior.log_prob(z).sum(1))


def test_more_masks_than_memory_are_refused_with_the_number_that_fits() -> None:
    posterior = dropped(0.3, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    with pytest.raises(MethodError, match=r"10000000000 masks of 3 units take 223\.5 GiB.*use max_draws=178956970"):
        posterior.predict(rows(4, 3), max_draws=10_000_000_000)
