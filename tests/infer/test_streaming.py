"""Draws that go to a folder, or only leave functions: the bits of a run in memory, whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl._distributed import Ranks
from bayesdl._files import stamp
from bayesdl.errors import DataError, FileError, MethodError
from bayesdl.infer import method as method_module
from bayesdl.infer import record
from bayesdl.infer.loop import InterruptedWarning
from bayesdl.infer.record import Record
from tests.cases import dataset, network, untouched

ROWS = 17 * 2 * 8
"""Bytes of one draw of both chains."""

METHODS: dict[str, Any] = {
    "NUTS": bdl.NUTS(chains=2, warmup=20, draws=12, max_depth=4, thin=2),
    "HMC": bdl.HMC(chains=2, warmup=30, draws=12, leapfrog_steps=3),
    "SGLD": bdl.SGLD(chains=2, warmup=40, draws=12, thin=2, batch_size=7),
    "SAGA": bdl.SGLD(chains=2, warmup=40, draws=12, thin=3, batch_size=7, gradient="saga", step_size=0.01),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BLOCK_BYTES", 5 * ROWS + 1)


def fit(method: Any, **options: Any) -> Any:
    with untouched():
        return method.fit(network("regression"), dataset("regression"), seed=4, progress=False, **options)


@cache
def in_memory(name: str, draws: int = 12) -> Any:
    """The posterior that all others are compared with."""
    return fit(replace(METHODS[name], draws=draws))


def same(one: Any, other: Any) -> bool:
    """Draws and statistics, bit for bit."""
    assert set(one.stats) == set(other.stats)
    stats = all(torch.equal(one.stats[name], other.stats[name]) for name in one.stats)
    return stats and torch.equal(one.z, other.z)


@pytest.mark.parametrize("name", METHODS)
def test_draws_on_disk_are_those_in_memory(name: str, tmp_path: Path) -> None:
    largest = 0

    def look(state: dict[str, Any]) -> None:
        nonlocal largest
        largest = max(largest, state["draws"].nbytes)

    whole, posterior = in_memory(name), fit(METHODS[name], draws_to=tmp_path / "run", callback=look)
    assert posterior.shards.lengths == (5, 5, 2)
    assert largest == 5 * ROWS < whole.z.nbytes
    assert same(posterior, whole)
    assert "MB in" in repr(posterior)
    x = dataset("regression").x
    for draws in (1, 7, 24, 1000):
        for statistic in ("mean", "epistemic", "aleatoric"):
            one, two = (getattr(p.predict(x, max_draws=draws), statistic) for p in (posterior, whole))
            assert torch.equal(one, two)
    for n in (None, 3, 50):
        assert torch.equal(posterior.unconstrained_draws(n, seed=2), whole.unconstrained_draws(n, seed=2))
    assert posterior.diagnostics().sites == whole.diagnostics().sites
    assert posterior.diagnostics().rhat == pytest.approx(whole.diagnostics().rhat, rel=1e-9)
    assert str(posterior.summary()) == str(whole.summary())
    torch.testing.assert_close(posterior.function_draws(x), whole.function_draws(x))


@pytest.mark.parametrize(("name", "loaded"), [("NUTS", False), ("HMC", True), ("SGLD", False), ("SAGA", True)])
def test_a_run_in_a_folder_is_extended(name: str, loaded: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = in_memory(name, 19)
    posterior, data = fit(METHODS[name], draws_to=folder), None
    before = posterior.z
    if loaded:
        posterior.save(folder)
        posterior, data = bdl.load(folder), dataset("regression")
    extended: Any = bdl.extend(posterior, 7, data=data, progress=False)
    assert same(extended, whole)
    assert extended.info["settings"] == whole.info["settings"]
    assert torch.equal(posterior.z, before), "the posterior that was extended stays as it is"
    assert extended.shards.lengths == (5, 5, 2, 5, 2)
    assert same(bdl.extend(posterior, 7, data=data, progress=False), whole), "the same call does the same once more"
    with pytest.raises(MethodError, match="another run"):
        bdl.extend(posterior, 3, data=data, progress=False)
    extended.save(folder)
    assert torch.equal(bdl.load(folder).z, whole.z)  # type: ignore[attr-defined]  # base class


@pytest.mark.parametrize("keep", ["folder", "functions", "both"])
@pytest.mark.parametrize("stop", [23, 41])
def test_a_stopped_run_goes_on_from_its_checkpoint(keep: str, stop: int, tmp_path: Path) -> None:
    def options(name: str) -> dict[str, Any]:
        to = {"draws_to": tmp_path / name} if keep != "functions" else {}
        return to | ({"functions_at": dataset("regression").x[:4]} if keep != "folder" else {})

    whole = fit(METHODS["NUTS"], **options("whole"))
    checkpoint = bdl.Checkpoint(tmp_path / "state", every=6)
    part = fit(METHODS["NUTS"], **options("part"), checkpoint=checkpoint, callback=lambda s: s["step"] == stop)
    assert part.shape[1] == (stop - 20) // 2
    assert part.function_draws(dataset("regression").x[:4]).shape == (2, (stop - 20) // 2, 4)
    resumed = fit(METHODS["NUTS"], **options("part"), checkpoint=checkpoint)
    assert stamp(resumed.tensors()) == stamp(whole.tensors())
    if keep == "folder" and stop == 41:
        # A shard that was written before the checkpoint is gone.
        (tmp_path / "state.safetensors").unlink()
        fit(METHODS["NUTS"], **options("part"), checkpoint=checkpoint, callback=lambda s: s["step"] == 38)
        (tmp_path / "part" / "draws-00000.safetensors").unlink()
        with pytest.raises(FileError, match="draws-00000"):
            fit(METHODS["NUTS"], **options("part"), checkpoint=checkpoint)
    with pytest.raises(bdl.errors.ResumeMismatch, match="kept"):
        fit(METHODS["NUTS"], checkpoint=tmp_path / "state")


def test_a_write_that_is_cut_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, write = in_memory("HMC"), record.write_shard

    def cut(folder: Path, number: int, *rest: Any) -> None:
        monkeypatch.setattr(record, "write_shard", write)
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "write_shard", cut)
    with pytest.warns(InterruptedWarning):
        part = fit(METHODS["HMC"], draws_to=tmp_path)
    assert part.shards.lengths == (4,)
    assert torch.equal(part.z, whole.z[:, :4])
    assert torch.equal(bdl.extend(part, 8, progress=False).z, whole.z)  # type: ignore[attr-defined]  # base class


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    first = fit(METHODS["HMC"], draws_to=tmp_path)
    assert same(fit(METHODS["HMC"], draws_to=tmp_path), first)
    for change in ({"leapfrog_steps": 4}, {"draws": 13}):
        with pytest.raises(MethodError, match="already holds draws of another run"):
            fit(replace(METHODS["HMC"], **change), draws_to=tmp_path, callback=lambda _: pytest.fail("it ran"))
    with pytest.raises(MethodError, match="already holds draws of another run"):
        fit(METHODS["HMC"], draws_to=tmp_path, functions_at=dataset("regression").x)
    other = fit(METHODS["NUTS"], draws_to=tmp_path / "other")
    with pytest.raises(MethodError, match="already holds the draws of another run"):
        other.save(tmp_path)
    assert torch.equal(first.z, in_memory("HMC").z)


# -- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regression", "binary", "classes"])
@pytest.mark.parametrize("to_folder", [False, True])
def test_functions_are_those_of_the_draws(
    kind: str, to_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of at least 5 draws of at most 3 parameters a row, of which the last is not full.
    monkeypatch.setattr(record, "BLOCK_BYTES", 5 * 32 * 2 * 3 * 8)
    data, method = dataset(kind), METHODS["HMC"]
    whole = method.fit(network(kind), data, seed=1, progress=False)
    to = {"draws_to": tmp_path / "run"} if to_folder else {}
    kept = method.fit(network(kind), data, seed=1, progress=False, functions_at=data.x, **to)
    assert kept.shape == whole.shape
    kept.save(tmp_path / "run")
    x, y = data.x, data.y
    for posterior in (kept, bdl.load(tmp_path / "run")):
        for draws in (5, 1000):
            one, two = posterior.predict(max_draws=draws), whole.predict(x, max_draws=draws)
            for statistic in ("mean", "epistemic", "aleatoric"):
                assert torch.equal(getattr(one, statistic), getattr(two, statistic))
            assert torch.equal(one.sample(3, seed=1), two.sample(3, seed=1))
            assert bdl.evaluate(one, y).to_dict() == bdl.evaluate(two, y).to_dict()
        torch.testing.assert_close(posterior.predict(x, batch_size=5).mean, whole.predict(x).mean)
        assert torch.equal(posterior.function_draws(x), whole.function_draws(x))
        torch.testing.assert_close(posterior.log_likelihood(x, y), whole.log_likelihood(x, y).double())
        found, known = posterior.diagnostics(), whole.diagnostics()
        assert (found.function, found.function_squared) == (known.function, known.function_squared)
        assert found.log_likelihood.rhat == pytest.approx(known.log_likelihood.rhat, rel=1e-9)
        assert found.sites == {}
        assert "predictions" in str(found)
        with pytest.raises(DataError, match="at these alone"):
            posterior.predict(x[:3])
        for call in (posterior.draws, posterior.summary, lambda p=posterior: p.z):
            with pytest.raises(MethodError, match="no draws of the latents"):
                call()
    with pytest.raises(DataError, match="needs the targets"):
        bdl.load(tmp_path / "run").log_likelihood(x)
    torch.testing.assert_close(kept.log_likelihood(), whole.log_likelihood(x, y).double())


@pytest.mark.parametrize("to_folder", [False, True])
def test_functions_are_extended(to_folder: bool, tmp_path: Path) -> None:
    x = dataset("regression").x[:3] + 1.0
    to = {"draws_to": tmp_path} if to_folder else {}
    whole, part = in_memory("NUTS", 19), fit(METHODS["NUTS"], functions_at=x, **to)
    assert part.total_log_likelihood() is None
    assert part.diagnostics().log_likelihood is None
    extended: Any = bdl.extend(part, 7, progress=False)
    assert torch.equal(extended.function_draws(), whole.function_draws(x))
    assert torch.equal(part.function_draws(), whole.function_draws(x)[:, :12])


# -- refusals --------------------------------------------------------------------------------------------------------


def test_methods_without_a_stream_of_draws_say_so(tmp_path: Path) -> None:
    calls: list[tuple[bdl.Method, dict[str, Any], str]] = [
        (bdl.MAP(steps=3), {"draws_to": tmp_path}, r"takes no draws_to=.*posterior\.save"),
        (bdl.MeanFieldVI(steps=3), {"functions_at": dataset("regression").x}, r"takes no functions_at=.*predict"),
    ]
    for method, options, words in calls:
        with pytest.raises(MethodError, match=words):
            fit(method, **options)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_module.Ranks, "current", classmethod(lambda cls: Ranks(0, 2)))
    with pytest.raises(MethodError, match="several processes"):
        METHODS["HMC"].fit(network("regression"), dataset("regression"), draws_to=tmp_path)


@pytest.mark.parametrize(
    ("patch", "options", "words"),
    [
        (("memory", lambda: 1000.0), {}, "12 draws take 0.0 MB of memory.*draws_to"),
        (("_free", lambda folder: 1000.0), {"draws_to": True}, "12 draws take 0.0 MB, more than is free"),
    ],
)
def test_what_does_not_fit_is_said_before_the_run(
    patch: tuple[str, Callable[..., float]],
    options: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record, *patch)
    with pytest.raises(MethodError, match=words):
        fit(METHODS["HMC"], **({"draws_to": tmp_path / "new"} if options else {}))


def test_a_record_in_memory_holds_everything() -> None:
    begin = torch.zeros(3, 4)
    state = Record().init(begin, ("energy",), 6)
    assert state["draws"].shape == (3, 6, 4)
    assert state["statistics"].shape == (1, 3, 6)
    assert Record.without(state | {"z": begin}).keys() == {"z"}


def test_the_forecast_tells_of_draws_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [METHODS["SGLD"], bdl.MeanFieldVI(steps=3)]
    for memory, told in ((2.0**40, False), (100.0, True)):
        monkeypatch.setattr(record, "memory", lambda memory=memory: memory)
        found = bdl.describe(network("regression"), dataset("regression"), methods).forecasts
        assert ("draws_to=" in found["SGLD"].note) == told
        assert "draws_to=" not in found["MeanFieldVI"].note
