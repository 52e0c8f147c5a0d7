"""The bundled and the synthetic sets."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bayesdl.data import load, synthetic
from bayesdl.errors import DataError

SHAPES = {
    "diabetes": (442, 10, 0),
    "breast_cancer": (569, 30, 2),
    "digits": (1797, 64, 10),
    "iris": (150, 4, 3),
    "wine": (178, 13, 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bundled_sets(name):
    data = load(name)
    n, width, classes = SHAPES[name]
    assert tuple(data.x.shape) == (n, width)
    assert data.n_classes == classes
    assert data.name == name
    assert len(data.test) == round(0.2 * n)
    assert len(data.train) + len(data.test) == n
    assert data.train.rows.overlap(data.test.rows) == 0
    assert load(name).test.rows == data.test.rows
    assert set(data.train.y.tolist()) == set(data.y.tolist()) or classes == 0


def test_diabetes_is_raw():
    data = load("diabetes")
    assert data.x[0, 0] == 59  # years
    assert data.x_names[:3] == ("age", "sex", "bmi")
    assert data.y.mean().item() == pytest.approx(152.13348416, abs=1e-6)


def test_labels_keep_their_names():
    assert load("breast_cancer").classes == ("malignant", "benign")
    assert load("iris").classes == ("setosa", "versicolor", "virginica")
    assert load("digits").classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("name", "words"),
    [("diabetis", "mean 'diabetes'"), ("Iris", "mean 'iris'"), ("boston", "There are: breast_cancer"), (3, "wine")],
)
def test_an_unknown_set_is_an_error_that_lists_them(name, words):
    with pytest.raises(DataError, match=words) as caught:
        load(name)
    assert all(known in str(caught.value) for known in SHAPES)


def test_the_gap_is_empty_and_the_noise_is_as_stated():
    data = synthetic.regression_gap(4000, seed=3)
    x = data.x[:, 0]
    assert not ((x > synthetic.GAP[0]) & (x < synthetic.GAP[1])).any()
    assert (x.abs() <= 3).all()
    assert (x < 0).sum() == 2000
    residual = data.y - synthetic.gap_mean(x)
    check_noise(residual, synthetic.GAP_NOISE)


def test_sine_line_has_its_mean_and_noise():
    data = synthetic.sine_line(4000, noise=0.5, seed=1)
    x = data.x[:, 0]
    assert ((x >= 0) & (x <= 5)).all()
    check_noise(data.y - (2 * torch.sin(x) + x), 0.5)


def check_noise(residual, sd):
    """Mean and standard deviation within four standard errors of normal noise."""
    n = len(residual)
    assert abs(residual.mean()) < 4 * sd / n**0.5
    assert abs(residual.std() - sd) < 4 * sd / (2 * n) ** 0.5


def test_two_moons_without_noise_lie_on_their_half_circles():
    data = synthetic.two_moons(101, noise=0.0, seed=5)
    upper, lower = data.x[data.y == 0], data.x[data.y == 1]
    assert (len(upper), len(lower)) == (51, 50)
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(51, dtype=torch.float64))
    assert (upper[:, 1] >= 0).all()
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5])).norm(dim=1), torch.ones(50, dtype=torch.float64))
    assert (lower[:, 1] <= 0.5).all()


def test_two_moons_noise():
    calm, rough = synthetic.two_moons(4000, noise=0.0, seed=5), synthetic.two_moons(4000, noise=0.3, seed=5)
    check_noise((rough.x - calm.x).flatten(), 0.3)


@pytest.mark.parametrize("make", [synthetic.regression_gap, synthetic.sine_line, synthetic.two_moons])
def test_a_seed_gives_one_set_and_another_seed_another(make):
    before = torch.random.get_rng_state()
    assert make(20, seed=0).rows == make(20, seed=0).rows
    assert make(20, seed=0).rows.overlap(make(20, seed=1).rows) == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(DataError, match="holdout"):
        make(20).train  # noqa: B018
    for n in (1, 0, -3, 2.0, True, "9"):
        with pytest.raises(DataError, match="at least 2 rows"):
            make(n)


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf"), "loud"])
def test_noise_is_a_standard_deviation(noise):
    with pytest.raises(DataError, match="at least 0"):
        synthetic.two_moons(10, noise=noise)
    with pytest.raises(DataError, match="at least 0"):
        synthetic.sine_line(10, noise=noise)


def test_the_import_loads_no_heavy_library():
    heavy = {"matplotlib", "pandas", "pyro", "scipy", "sklearn"}
    code = f"import sys, bayesdl.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
