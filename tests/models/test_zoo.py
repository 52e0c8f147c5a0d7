"""Networks that size themselves from the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import ModelError
from bayesdl.models import BayesianNetwork, Erf, mlp
from bayesdl.models.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, MultiBernoulli, Poisson
from bayesdl.models.priors import Laplace, Normal


@dataclass(frozen=True)
class Data:
    """The part of a Dataset that decides a network's size."""

    x: Tensor
    y: Tensor
    task: str
    n_classes: int = 0


X = torch.ones(6, 5, dtype=torch.float64)
REGRESSION = Data(X, torch.arange(6.0, dtype=torch.float64), "regression")
BINARY = Data(X, torch.tensor([0, 1, 0, 1, 1, 0]), "classification", 2)
CLASSES = Data(X, torch.tensor([0, 1, 2, 3, 1, 0]), "classification", 4)
HEADS = Data(X, torch.ones(6, 3, dtype=torch.int64), "classification", 2)
SEVERAL = Data(X, torch.ones(6, 2, dtype=torch.float64), "regression")


@pytest.mark.parametrize(
    ("data", "likelihood", "outputs"),
    [
        (REGRESSION, Gaussian(), 1),
        (SEVERAL, Gaussian(), 2),
        (BINARY, Bernoulli(), 1),
        (CLASSES, Categorical(), 4),
        (HEADS, MultiBernoulli(), 3),
    ],
    ids=["regression", "several", "binary", "classes", "heads"],
)
def test_outputs_and_likelihood_follow_the_data(data: Data, likelihood: Likelihood, outputs: int) -> None:
    model = mlp(data, hidden=(7, 4))
    assert model.likelihood == likelihood
    assert [site.shape for site in model.sites] == [(7, 5), (7,), (4, 7), (4,), (outputs, 4), (outputs,)]
    assert model.dtype == torch.float64
    model.check_data(data.x, data.y)
    model(data.x, data.y)


def test_the_net_is_a_plain_sequential_that_json_can_hold() -> None:
    model = mlp(REGRESSION, activation="erf")
    assert type(model.net) is nn.Sequential
    assert [type(layer) for layer in model.net] == [nn.Linear, Erf, nn.Linear]
    assert BayesianNetwork.from_config(model.config()).config() == model.config()


def test_images_are_flattened_in_their_dtype() -> None:
    images = Data(torch.zeros(4, 2, 3, 3), torch.tensor([0, 1, 2, 1]), "classification", 3)
    model = mlp(images, hidden=())
    assert [type(layer) for layer in model.net] == [nn.Flatten, nn.Linear]
    assert model.dtype == torch.float32
    assert model.sites[0].shape == (3, 18)
    model(images.x, images.y)


def test_the_default_prior_keeps_the_variance_of_the_activation() -> None:
    assert mlp(REGRESSION).prior == Normal("fan_in", w_std=1.0)
    assert mlp(REGRESSION, activation="relu").prior == Normal("fan_in", w_std=math.sqrt(2.0))
    assert mlp(REGRESSION, prior=Laplace(1.0)).prior == Laplace(1.0)


def test_a_given_likelihood_decides_the_outputs() -> None:
    assert mlp(REGRESSION, likelihood=Gaussian(noise="head")).sites[-1].shape == (2,)
    assert mlp(BINARY, likelihood=Categorical()).sites[-1].shape == (2,)
    assert mlp(REGRESSION, likelihood=Poisson()).sites[-1].shape == (1,)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    mlp(REGRESSION)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation": "rleu"}, ["'rleu'", "relu", "tanh"]),
        ({"hidden": (16, 0)}, ["hidden", "(16, 0)"]),
        ({"hidden": 16}, ["hidden", "16", "sequence"]),
        ({"hidden": "16"}, ["hidden", "'16'"]),
        ({"likelihood": Categorical()}, ["classification", "regression"]),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        mlp(REGRESSION, **settings)  # type: ignore[arg-type]  # on purpose
    for word in words:
        assert word in str(caught.value)
