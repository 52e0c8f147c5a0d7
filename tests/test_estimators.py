from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bayesdl.data import Dataset
from bayesdl.errors import DataError, MethodError
from bayesdl.estimators import BayesianClassifier, BayesianRegressor
from bayesdl.infer.optimise import MAP
from bayesdl.infer.variational import MeanFieldVI
from bayesdl.models import mlp

QUICK = MeanFieldVI(steps=300)


@pytest.fixture(scope="module")
def line():
    rng = np.random.default_rng(0)
    x = rng.normal(50.0, 20.0, (120, 2))
    return x, 1000.0 + 30.0 * x[:, 0] + rng.normal(0.0, 60.0, 120)


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(1)
    codes = np.repeat([0, 1, 2], 40)
    x = rng.normal(0.0, 0.7, (120, 2)) + np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])[codes]
    return x, np.array(["setosa", "versicolor", "virginica"])[codes]


def test_regressor_predicts_in_raw_units(line):
    x, y = line
    model = BayesianRegressor(QUICK, hidden=(), random_state=0).fit(x, y)
    mean, sd = model.predict(x, return_std=True)
    assert mean.shape == sd.shape == (120,)
    np.testing.assert_array_equal(model.predict(x), mean)
    assert model.n_features_in_ == 2
    # The line explains all but 60^2 of a variance of about 600^2; a prediction in scaled units would be nowhere near.
    assert model.score(x, y) > 0.95
    # Noise of sd 60 is estimated from 120 rows, so its standard error is 60 / sqrt(240) = 4; six of them.
    assert abs(np.sqrt(np.mean(sd**2)) - 60.0) < 24.0


def test_regressor_is_the_fit_of_the_package(line):
    x, y = line
    model = BayesianRegressor(QUICK, hidden=(5,), activation="relu", random_state=7).fit(x, y)
    data = Dataset.from_arrays(x, y)
    direct = QUICK.fit(mlp(data, hidden=(5,), activation="relu"), data, seed=7)
    np.testing.assert_array_equal(model.predict(x), direct.predict(torch.from_numpy(x)).mean.numpy())


def test_classifier_keeps_labels_and_column_order(blobs):
    x, y = blobs
    model = BayesianClassifier(QUICK, random_state=0).fit(x, y)
    assert list(model.classes_) == ["setosa", "versicolor", "virginica"]
    probabilities = model.predict_proba(x)
    assert probabilities.shape == (120, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(model.predict(x), model.classes_[probabilities.argmax(1)])
    assert model.score(x, y) > 0.95


def test_classifier_with_two_classes_of_numbers(blobs):
    x, y = blobs
    keep = y != "virginica"
    target = np.where(y[keep] == "setosa", 7, -3)
    model = BayesianClassifier(QUICK, random_state=0).fit(x[keep], target)
    assert list(model.classes_) == [-3, 7]
    assert model.predict_proba(x[keep]).shape == (80, 2)
    assert model.score(x[keep], target) > 0.95


def test_random_state_decides_the_fit(line):
    x, y = line
    first, again, other = (
        BayesianRegressor(MAP(steps=20), random_state=seed).fit(x, y).predict(x) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


def test_random_state_may_be_a_generator(line):
    x, y = line
    same = [
        BayesianRegressor(MAP(steps=5), random_state=np.random.RandomState(3)).fit(x, y).predict(x) for _ in range(2)
    ]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("estimator", [BayesianRegressor, BayesianClassifier])
def test_parameters_survive_clone(estimator):
    model = estimator(method := MeanFieldVI(steps=3), hidden=(4, 4), activation="relu", random_state=5)
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert copy.get_params()["method"] == method
    assert copy.set_params(hidden=(2,)).hidden == (2,)
    assert model.hidden == (4, 4)


def test_kinds_are_known_to_scikit_learn():
    assert is_regressor(BayesianRegressor())
    assert is_classifier(BayesianClassifier())


def test_method_may_be_a_name(line):
    x, y = line
    assert BayesianRegressor("MAP", random_state=0).fit(x, y).posterior_.info["method"] == "MAP"
    with pytest.raises(MethodError, match="There is no method 'nutz'"):
        BayesianRegressor("nutz").fit(x, y)


def test_works_inside_pipelines_and_cross_validation(line):
    x, y = line
    model = make_pipeline(StandardScaler(), BayesianRegressor(MAP(steps=200), random_state=0))
    assert cross_val_score(model, x, y, cv=3).min() > 0.9


def test_unfitted_and_misfitting_inputs_are_refused(line):
    x, y = line
    with pytest.raises(NotFittedError):
        BayesianRegressor().predict(x)
    model = BayesianRegressor(MAP(steps=5), random_state=0).fit(x, y)
    with pytest.raises(DataError, match="X has 1 features"):
        model.predict(x[:, :1])
    with pytest.raises(ValueError, match="NaN"):
        model.predict(np.full((1, 2), np.nan))
    with pytest.raises(ValueError, match="inconsistent"):
        model.fit(x, y[:-1])
    with pytest.raises(ValueError, match="continuous"):
        BayesianClassifier(MAP(steps=5)).fit(x, y)
