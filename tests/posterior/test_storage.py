"""Posteriors on disk: bit-equal round trips, the wrong model, damage of every kind, saves that are cut off."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl._files import read_tensors, write_tensors
from bayesdl._files import stamp as stamp_of
from bayesdl._rng import generator
from bayesdl.errors import BayesdlError, DataError, FileError, ModelMismatch, ModelRequired
from bayesdl.posterior import DrawsPosterior, GaussianPosterior, prepare, storage
from bayesdl.posterior.covariance import Blocks, Dense, Diagonal, LowRank
from bayesdl.posterior.normal import Normal
from tests.cases import dataset, network, untouched

DOUBLE = torch.float64
X = torch.randn(9, 2, generator=generator(0, "x"), dtype=DOUBLE)
Y = torch.randn(9, generator=generator(0, "y"), dtype=DOUBLE)


def _weights(scale: float = 1.0) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), scale).to_event(1))


def program(x: Tensor, y: Tensor | None = None) -> None:
    """Latents of many supports."""
    w = _weights()
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0, dtype=DOUBLE)))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=DOUBLE)))
    low = torch.tensor([-1.0, 2.0], dtype=DOUBLE)
    bounded = pyro.sample("bounded", dist.Uniform(low, low + 1.5).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(2, torch.tensor(1.0, dtype=DOUBLE)))
    rising = pyro.sample(
        "rising",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0), [dist.transforms.OrderedTransform()]
        ),
    )
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=DOUBLE), 3.0))
    shift = p + share[0] + bounded.sum() + root[1, 0] + rising[1]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + shift, sigma), obs=y)


def chains(model: Any = program, data: Any = (X, Y), c: int = 2, s: int = 5) -> DrawsPosterior:
    problem = prepare(model, data, seed=4)
    z = 0.5 * torch.randn(c, s, problem.density.dim, generator=generator(1, "z"), dtype=problem.density.dtype)
    info = {"method": "test", "settings": {"chains": c}, "nothing": None}
    return DrawsPosterior(problem, z, {"energy": z[..., 0] ** 2, "divergent": z[..., 0] > 0}, info)


def gaussian(model: Any = program, data: Any = (X, Y)) -> GaussianPosterior:
    problem = prepare(model, data)
    dim = problem.density.dim
    law = Normal(torch.linspace(-0.5, 0.5, dim, dtype=DOUBLE), Diagonal(torch.full((dim,), 0.1, dtype=DOUBLE)))
    return GaussianPosterior(problem, law, {"method": "test"})


def fits(kind: str) -> tuple[Any, Any]:
    return network(kind), dataset(kind)


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chains, gaussian])
@pytest.mark.parametrize("kind", ["regression", "binary", "classes"])
def test_networks_predict_the_same_bits(make: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    posterior, data = make(*fits(kind)), dataset(kind)
    with untouched():
        assert posterior.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
        loaded = bdl.load(str(tmp_path / "new" / "folder"))
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "posterior.json",
        "posterior.safetensors",
    ]
    assert type(loaded) is type(posterior)
    assert loaded.info == posterior.info
    assert all(torch.equal(loaded.tensors()[name], value) for name, value in posterior.tensors().items())
    one, two = posterior.predict(data.x), loaded.predict(data.x)
    for name in ("mean", "epistemic", "aleatoric"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(one.sample(4, seed=1), two.sample(4, seed=1))
    assert torch.equal(loaded.log_likelihood(data.x, data.y), posterior.log_likelihood(data.x, data.y))
    old, new = posterior.problem, loaded.problem
    assert (new.rows, new.task, new.classes, new.seed) == (old.rows, old.task, old.classes, old.seed)
    assert (loaded.units, new.complete, new.n) == ("scaled", False, storage.PROBE_ROWS)


@pytest.mark.parametrize("make", [chains, gaussian])
def test_programs_predict_the_same_bits_with_their_model(make: Callable[..., Any], tmp_path: Path) -> None:
    posterior = make()
    posterior.save(tmp_path)
    loaded = bdl.load(tmp_path, program)
    assert torch.equal(loaded.predict(X).mean, posterior.predict(X).mean)
    assert torch.equal(loaded.predict(X).interval()[0], posterior.predict(X).interval()[0])
    assert torch.equal(loaded.log_likelihood(X, Y), posterior.log_likelihood(X, Y))


def test_reserved_rows_and_a_learnt_prior_survive(tmp_path: Path) -> None:
    data, model = dataset("regression"), network("regression")
    posterior = bdl.fit(model, data, bdl.MeanFieldVI(steps=4), prior_rows=0.5)
    loaded = bdl.load(posterior.save(tmp_path))
    assert loaded.problem.prior_rows == posterior.problem.prior_rows
    assert loaded.kl() == pytest.approx(posterior.kl(), rel=1e-12)
    own = bdl.posterior.prepare(model, data).density.gaussian_prior()
    learnt = loaded.problem.density.gaussian_prior()
    assert own is not None
    assert learnt is not None
    assert not torch.equal(own[0], learnt[0])


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (4.0, 1.0), (1.0, 0.5)])
def test_temperatures_survive(temperatures: tuple[float, float], tmp_path: Path) -> None:
    problem = prepare(program, (X, Y), temperature=temperatures[0], likelihood_temperature=temperatures[1])
    DrawsPosterior(problem, problem.density.prior_draws(6)[None], {}, {}).save(tmp_path)
    density = bdl.load(tmp_path, program).problem.density
    assert (density.temperature, density.likelihood_temperature) == temperatures


def test_dicts_keep_all_their_arguments(tmp_path: Path) -> None:
    def powers(x: Tensor, power: int, offset: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x**power @ _weights() + offset, 1.0), obs=y)

    def simple(x: Tensor, power: int, offset: Tensor, y: Tensor | None = None) -> None:
        w = _weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x**power @ w + offset, 1.0), obs=y)

    given = {"x": X, "y": Y, "power": 3, "offset": torch.tensor(2.0, dtype=DOUBLE)}
    posterior = chains(simple, given)
    loaded = bdl.load(posterior.save(tmp_path), simple)
    new = {name: given[name] for name in ("x", "power", "offset")}
    assert torch.equal(loaded.predict(new).mean, posterior.predict(new).mean)
    assert (loaded.problem.x_name, loaded.problem.batch["power"]) == (None, 3)


def test_programs_with_their_own_data_or_latents_of_rows_keep_all_rows(tmp_path: Path) -> None:
    def closed() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", 9):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    def local(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(x[:, 0], 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    for name, model, data in (("closed", closed, {}), ("local", local, (X, Y))):
        posterior = chains(model, data)
        loaded = bdl.load(posterior.save(tmp_path / name), model)
        assert loaded.problem.complete
        assert loaded.problem.n == 9
        assert torch.equal(loaded.draws_by_chain()["mu" if name == "closed" else "theta"], posterior.z.squeeze(-1))


# -- without the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chains, gaussian])
def test_draws_and_summary_need_no_model(make: Callable[..., Any], tmp_path: Path) -> None:
    posterior = make()
    posterior.save(tmp_path)
    with untouched():
        bare = bdl.load(tmp_path)
    assert bare.units == posterior.units == "raw"
    for n in (None, 3, 40):
        mine, theirs = posterior.draws(n, seed=2), bare.draws(n, seed=2)
        assert list(mine) == list(theirs) == ["w", "sigma", "share", "bounded", "root", "rising", "p"]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert str(bare.summary()) == str(posterior.summary())
    for call in (lambda: bare.predict(X), lambda: bare.log_likelihood(X, Y), lambda: bare.save(tmp_path), bare.loo):
        with pytest.raises(ModelRequired, match="model="):
            call()


def test_diagnostics_are_those_of_the_time_of_saving(tmp_path: Path) -> None:
    posterior = chains(c=3, s=20)
    posterior.save(tmp_path)
    expected = posterior.diagnostics()
    assert expected.function is not None
    bare, whole = bdl.load(tmp_path), bdl.load(tmp_path, program)
    assert bare.diagnostics() == whole.diagnostics() == expected
    assert whole.diagnostics(X + 5.0).function != expected.function
    with pytest.raises(ModelRequired):
        bare.diagnostics(X[:3])


class Custom(nn.Module):
    """A module that no table lists."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.linear, self.sign = nn.Linear(3, 1).double(), sign

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * torch.sin(self.linear(x))


def test_networks_of_own_modules_are_code(tmp_path: Path) -> None:
    model, data = bdl.BayesianNetwork(Custom()), dataset("regression")
    posterior = chains(model, data)
    posterior.save(tmp_path)
    bare = bdl.load(tmp_path)
    assert bare.units == "scaled"
    assert torch.equal(bare.draws()["linear.weight"], posterior.draws()["linear.weight"])
    with pytest.raises(ModelRequired, match="model="):
        bare.predict(data.x)
    whole = bdl.load(tmp_path, bdl.BayesianNetwork(Custom()))
    assert torch.equal(whole.predict(data.x).mean, posterior.predict(data.x).mean)
    with pytest.raises(ModelMismatch, match="same sites"):
        bdl.load(tmp_path, bdl.BayesianNetwork(Custom(-1.0)))


def test_supports_that_no_file_describes(tmp_path: Path) -> None:
    """A transform of the user's own: draws need the model, and say of which site."""

    class Cubed(dist.transforms.ExpTransform):
        pass

    class Positive(dist.constraints.Constraint):
        def check(self, value: Tensor) -> Tensor:
            return value > 0

    torch.distributions.biject_to.register(Positive, lambda constraint: Cubed())

    class Odd(dist.LogNormal):
        support = Positive()

    def odd(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", Odd(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], scale), obs=y)

    posterior = chains(odd)
    posterior.save(tmp_path)
    with pytest.raises(ModelRequired, match="'scale'"):
        bdl.load(tmp_path).draws()


# -- the wrong model -------------------------------------------------------------------------------------------------


def _linear(**changes: Any) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        size = changes.get("size", 2)
        w = pyro.sample(
            changes.get("name", "w"),
            dist.Normal(torch.zeros(size, dtype=DOUBLE), changes.get("prior", 1.0)).to_event(1),
        )
        law = changes.get("scale", dist.HalfNormal(torch.tensor(1.0, dtype=changes.get("dtype", DOUBLE))))
        scale = pyro.sample("scale", law)
        if changes.get("more"):
            pyro.sample("more", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, :size] @ w * changes.get("factor", 1.0), scale), obs=y)

    return model


WRONG = {
    "another name": ({"name": "v"}, "v "),
    "another shape": ({"size": 1}, r"w \[1\]"),
    "another support": ({"scale": dist.Uniform(torch.tensor(0.0, dtype=DOUBLE), 9.0)}, r"scale \[\] on Interval"),
    "one site more": ({"more": True}, "3 latent sites, the posterior 2"),
    "another prior": ({"prior": 1.001}, "same sites"),
    "another family on the same support": ({"scale": dist.HalfCauchy(torch.tensor(1.0, dtype=DOUBLE))}, "same"),
    "another likelihood": ({"factor": 1.0001}, "same sites"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("make", [chains, gaussian])
def test_other_models_are_recognised(make: Callable[..., Any], case: str, tmp_path: Path) -> None:
    changes, words = WRONG[case]
    make(_linear()).save(tmp_path)
    bdl.load(tmp_path, _linear())
    with pytest.raises(ModelMismatch, match=words):
        bdl.load(tmp_path, _linear(**changes))


def test_models_that_do_not_run_on_the_stored_rows(tmp_path: Path) -> None:
    chains(*fits("regression")).save(tmp_path)
    four = bdl.BayesianNetwork(nn.Linear(4, 1).double())
    for model in (four, lambda x: None, lambda x, y=None: 1 / 0, 3):
        with pytest.raises(ModelMismatch):
            bdl.load(tmp_path, model)
    with pytest.raises(ModelMismatch, match="float32"):
        bdl.load(tmp_path, network("regression", torch.float32))


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    chains(*fits("regression")).save(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["posterior.json", "posterior.safetensors"])
def test_truncated_files(saved: dict[str, bytes], name: str, tmp_path: Path) -> None:
    content = saved[name]
    for kept in sorted({0, 1, 7, 8, 9, 100, len(content) // 3, len(content) // 2, len(content) - 8, len(content) - 2}):
        _write(tmp_path, {**saved, name: content[:kept]})
        with pytest.raises(FileError):
            bdl.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileError, match=f"{name} does not exist"):
        bdl.load(tmp_path)


def test_flipped_bits_in_the_tensors(saved: dict[str, bytes], tmp_path: Path) -> None:
    content = saved["posterior.safetensors"]
    for place in range(0, len(content), max(1, len(content) // 97)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        _write(tmp_path, {**saved, "posterior.safetensors": bytes(damaged)})
        with pytest.raises(FileError):
            bdl.load(tmp_path)


def test_garbage(saved: dict[str, bytes], tmp_path: Path) -> None:
    for garbage in (
        b"",
        b"[]",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"3",
        b"{}",
        b"\x00\xff",
        b"{'format': 1}",
        b'{"tensors": 1}',
    ):
        _write(tmp_path, {**saved, "posterior.json": garbage})
        with pytest.raises(FileError):
            bdl.load(tmp_path)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        below = [found for key in value for found in _paths(value[key], (*path, key))]
    elif isinstance(value, list):
        below = [found for k in range(min(2, len(value))) for found in _paths(value[k], (*path, k))]
    return ([path] if path else []) + below


def test_every_entry_missing_or_of_another_type(saved: dict[str, bytes], tmp_path: Path) -> None:
    """The description is damaged in every place: never an error of another class, and never silence where it counts."""
    original = json.loads(saved["posterior.json"])
    needed = {"format", "tensors", "kind", "info", "model", "sites", "data", "dtype"}
    for path in _paths(original):
        for replacement in ("missing", None, "text"):
            value = json.loads(saved["posterior.json"])
            inner = value
            for key in path[:-1]:
                inner = inner[key]
            if replacement == "missing":
                del inner[path[-1]]
            else:
                inner[path[-1]] = replacement
            _write(tmp_path, {**saved, "posterior.json": json.dumps(value).encode()})
            try:
                bdl.load(tmp_path)
            except (FileError, ModelRequired, ModelMismatch):
                continue
            except BayesdlError as error:
                pytest.fail(f"{path} = {replacement!r}: {type(error).__name__}: {error}")
            assert not (replacement == "missing" and path[0] in needed and len(path) == 1), path


def test_other_formats_and_tensors_of_another_posterior(saved: dict[str, bytes], tmp_path: Path) -> None:
    other = tmp_path / "other"
    chains(*fits("regression"), s=6).save(other)
    _write(tmp_path, {**saved, "posterior.safetensors": (other / "posterior.safetensors").read_bytes()})
    with pytest.raises(FileError, match="another posterior"):
        bdl.load(tmp_path)
    value = json.loads(saved["posterior.json"]) | {"format": 99}
    _write(tmp_path, {**saved, "posterior.json": json.dumps(value).encode()})
    with pytest.raises(FileError, match="format 99"):
        bdl.load(tmp_path)


def test_tensors_that_are_missing(saved: dict[str, bytes], tmp_path: Path) -> None:
    """Consistent files, written by someone else, that lack what a posterior needs."""
    _write(tmp_path, saved)
    tensors, _ = read_tensors(tmp_path / "posterior.safetensors")
    for name in ("posterior/z", "probe/x", "scaler/x_mean", "check/z", "check/log_density"):
        fewer = {key: value for key, value in tensors.items() if key != name}
        _stamped(tmp_path, saved, fewer)
        with pytest.raises(FileError):
            bdl.load(tmp_path)


def _stamped(folder: Path, saved: dict[str, bytes], tensors: dict[str, Tensor], **changes: Any) -> None:
    stamp = stamp_of(tensors)
    value = json.loads(saved["posterior.json"]) | {"tensors": stamp} | changes
    (folder / "posterior.json").write_text(json.dumps(value))
    write_tensors(folder / "posterior.safetensors", tensors, stamp)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "bayesdl.posterior.draws:DrawsPosterior", "this"])
def test_names_in_files_import_nothing(saved: dict[str, bytes], name: str, tmp_path: Path) -> None:
    def replaced(value: Any) -> Any:
        """Every text that names a class, replaced."""
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        return name if isinstance(value, str) and value.isidentifier() and value[0].isupper() else value

    original = json.loads(saved["posterior.json"])
    before = set(sys.modules)
    for changes in (
        {"kind": name},
        {"model": replaced(original["model"])},
        {"model": name},
        {"sites": [{**site, "transform": name} for site in original["sites"]], "model": None},
    ):
        _write(tmp_path, {**saved, "posterior.json": json.dumps(original | changes).encode()})
        with pytest.raises((FileError, ModelRequired, KeyError) if "sites" in changes else (FileError, ModelRequired)):
            bdl.load(tmp_path).draws()
    assert "this" not in set(sys.modules) - before


# -- saves that fail or are cut off ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("first", [True, False], ids=["first save", "over another"])
@pytest.mark.parametrize("step", range(6))
def test_killed_save_leaves_the_old_or_the_new(
    step: int, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each of the three renames (steps 0, 2, 4) and right after each (1, 3, 5)."""
    old, new = chains(_linear(), s=4), chains(_linear(), s=5)
    if not first:
        old.save(tmp_path)
    replace, seen = os.replace, [0]

    def cut(source: Any, target: Any) -> None:
        place, seen[0] = 2 * seen[0], seen[0] + 1
        if place == step:
            raise Killed
        replace(source, target)
        if place + 1 == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(Killed):
            new.save(tmp_path)
    expected = new if step >= 3 else old
    if first and step < 3:
        with pytest.raises(FileError, match=r"posterior\.json does not exist"):
            bdl.load(tmp_path)
    else:
        assert torch.equal(bdl.load(tmp_path).tensors()["z"], expected.z)
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".part"]
    old.save(tmp_path)
    assert torch.equal(bdl.load(tmp_path).tensors()["z"], old.z)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["posterior.json", "posterior.safetensors"]


def test_what_no_file_can_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    def with_function(x: Tensor, f: Any, y: Tensor | None = None) -> None:
        w = _weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f(x) @ w, 1.0), obs=y)

    posterior = chains(with_function, {"x": X, "y": Y, "f": torch.sin})
    with pytest.raises(DataError, match=r"argument 'f' is of type builtin.*cannot hold"):
        posterior.save(tmp_path / "posterior")
    assert not (tmp_path / "posterior").exists()
    posterior = chains()
    posterior.info["odd"] = object()
    with pytest.raises(DataError, match=r"info\['odd'\] is of type object"):
        posterior.save(tmp_path / "posterior")
    assert not (tmp_path / "posterior").exists()


@pytest.mark.parametrize("structure", ["low rank", "dense", "blocks"])
def test_every_covariance_comes_back(structure: str, tmp_path: Path) -> None:
    problem = prepare(program, (X, Y))
    dim = problem.density.dim
    sd = torch.linspace(0.1, 0.3, dim, dtype=DOUBLE)
    factor = torch.randn(dim, 2, dtype=DOUBLE, generator=generator(2, "factor"))
    covariances = {
        "low rank": LowRank(sd, factor),
        "dense": Dense.of(sd.square().diag() + factor @ factor.mT),
        "blocks": Blocks((LowRank(sd[:2], factor[:2]), Diagonal(sd[2:]))),
    }
    law = Normal(torch.zeros(dim, dtype=DOUBLE), covariances[structure])
    posterior = GaussianPosterior(problem, law, {"method": "test"})
    posterior.save(tmp_path / "saved")
    again = bdl.load(tmp_path / "saved", program)
    assert repr(again) == repr(posterior)
    assert torch.equal(again.unconstrained_draws(5, 1), posterior.unconstrained_draws(5, 1))
