"""Shards of draws: partial reads, damage, and what a posterior made of them can do without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._files import read_tensors, write_tensors
from bayesdl._rng import generator
from bayesdl.errors import FileError, ModelRequired
from bayesdl.posterior import DrawsPosterior, diagnostics, prepare
from bayesdl.posterior.shards import InMemory, Shards, shard_file, shards_in, write_shard
from bayesdl.posterior.streamed import StreamedPosterior
from tests.posterior.test_storage import X, Y, program

LENGTHS = (3, 3, 2)


def shards(z: Tensor, folder: Path) -> Shards:
    for number, block in enumerate(z.split(LENGTHS, 1)):
        write_shard(folder, number, {"z": block}, "run")
    return Shards.open(folder, len(LENGTHS))


def posteriors(folder: Path) -> tuple[DrawsPosterior, StreamedPosterior]:
    """The same draws in memory and in a folder; some of them divergent."""
    problem = prepare(program, (X, Y), seed=4)
    z = 0.5 * torch.randn(2, sum(LENGTHS), problem.density.dim, generator=generator(1, "z"), dtype=torch.float64)
    z[1, 2:] = z[1, 1]
    stats, info = {"energy": z[..., 0] ** 2, "divergent": z[..., 1] > 0.1}, {"method": "test"}
    return DrawsPosterior(problem, z, stats, info), StreamedPosterior(problem, shards(z, folder), stats, info)


def test_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    z = torch.randn(3, 8, 6, generator=generator(0, "z"))
    kept, whole = shards(z, tmp_path), InMemory({"z": z})
    assert (kept.chains, kept.draws, kept.lengths) == (whole.chains, whole.draws, LENGTHS)
    assert torch.equal(torch.cat([block["z"] for block in kept.blocks()], 1), z)
    index = torch.tensor([23, 0, 7, 7, 8, 15, 2, 3])
    for part in (slice(None), slice(2, 4), slice(5, 9)):
        assert torch.equal(kept.rows(index, part)["z"], whole.rows(index, part)["z"])
    assert torch.equal(kept.columns("z", slice(1, 3)), z[..., 1:3])
    assert torch.equal(kept.columns("z", [0, 5]), z[..., [0, 5]])
    later = Shards.open(tmp_path, 2, first=1)
    assert later.lengths == LENGTHS[1:]
    assert torch.equal(next(later.blocks())["z"], z[:, 3:6])
    assert Shards.open(tmp_path, 1).joined(later) == kept


def test_prediction_and_summaries_do_not_read_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, kept = posteriors(tmp_path)
    monkeypatch.setattr(StreamedPosterior, "z", property(lambda self: pytest.fail("all draws are read")))
    assert torch.equal(kept.predict(X, max_draws=5).mean, whole.predict(X, max_draws=5).mean)
    assert str(kept.summary()) == str(whole.summary())
    torch.testing.assert_close(kept.function_draws(X), whole.function_draws(X))
    assert kept.frozen().tolist() == [False, False]
    monkeypatch.setattr("bayesdl.posterior.divergences.CELLS", 10)
    found, known = kept.diagnostics(), whole.diagnostics()
    assert found.function is not None
    assert known.function is not None
    assert found.function.rhat == pytest.approx(known.function.rhat, rel=1e-9)
    assert (found.sites, found.apart, found.divergences) == (known.sites, known.apart, known.divergences)
    # Of large sites only those entries are read that are compared.
    monkeypatch.setattr(diagnostics, "CELLS", 16)
    assert next(value.shape[2:] for _, value in kept.site_draws(1)) == (1,)
    assert kept.diagnostics().sites == whole.diagnostics().sites


def test_without_the_model_draws_and_summaries_are_there(tmp_path: Path) -> None:
    whole, kept = posteriors(tmp_path)
    loaded: Any = bdl.load(kept.save(tmp_path))
    assert isinstance(loaded, StreamedPosterior)
    for name, value in whole.draws().items():
        assert torch.equal(loaded.draws()[name], value)
    assert str(loaded.summary()) == str(whole.summary())
    assert loaded.diagnostics().to_json() == kept.diagnostics().to_json()
    with pytest.raises(ModelRequired):
        loaded.predict(X)
    again: Any = bdl.load(tmp_path, program)
    assert torch.equal(again.predict(X).mean, whole.predict(X).mean)
    for name in ("posterior.json", "posterior.safetensors"):
        assert (again.save(tmp_path / "copy") / name).read_bytes() == (tmp_path / name).read_bytes()
    assert shards_in(tmp_path / "copy") == [0, 1, 2]
    assert str(tmp_path) not in (tmp_path / "posterior.json").read_text()
    assert torch.equal(bdl.load(tmp_path / "copy").z, whole.z)  # type: ignore[attr-defined]  # base class


def damage(file: Path, kind: str) -> None:
    tensors, header = read_tensors(file)
    z = tensors["z"]
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "foreign":
        write_tensors(file, {"z": z}, "another file of bayesdl")
    elif kind == "another run":
        write_shard(file.parent, 1, {"z": z + 1}, "run")
    elif kind == "another shape":
        write_tensors(file, {"z": z[..., :-1]}, header)
    elif kind == "another type":
        write_tensors(file, {"z": z.float()}, header)
    elif kind == "another name":
        write_tensors(file, {"w": z}, header)
    elif kind == "no draws":
        write_tensors(file, {"z": z[:, :0]}, header)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated",
        "foreign",
        "another run",
        "another shape",
        "another type",
        "another name",
        "no draws",
    ],
)
def test_damage_is_named_when_a_posterior_is_loaded(kind: str, tmp_path: Path) -> None:
    kept = posteriors(tmp_path)[1]
    kept.save(tmp_path)
    damage(shard_file(tmp_path, 1), kind)
    with pytest.raises(FileError, match=r"draws-00001\.safetensors"):
        bdl.load(tmp_path)


def test_damage_within_a_shard_shows_when_it_is_read(tmp_path: Path) -> None:
    kept = posteriors(tmp_path)[1]
    kept.save(tmp_path)
    file = shard_file(tmp_path, 2)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    loaded: Any = bdl.load(tmp_path, program)
    for call in (lambda: loaded.z, lambda: loaded.function_draws(X), lambda: kept.z):
        with pytest.raises(FileError, match=r"draws-00002\.safetensors is damaged"):
            call()
    for number in range(3):
        shard_file(tmp_path, number).unlink()
    with pytest.raises(FileError, match="draws-00000"):
        loaded.predict(X, max_draws=2)


def test_draws_of_another_model_are_refused(tmp_path: Path) -> None:
    problem = prepare(program, (X, Y), seed=4)
    with pytest.raises(FileError, match="have 3 coordinates"):
        StreamedPosterior(problem, shards(torch.zeros(1, 8, 3), tmp_path), {}, {})
    write_shard(tmp_path / "functions", 0, {"loc": torch.zeros(1, 2, 3)}, "run")
    with pytest.raises(FileError, match="do not hold draws of latents"):
        StreamedPosterior(problem, Shards.open(tmp_path / "functions", 1), {}, {})
    with pytest.raises(FileError, match="holds no draws"):
        Shards.open(tmp_path / "nothing", 0)
