"""Bad input ends in a named error that says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bayesdl as bdl
from tests import cases
from tests.cases import dataset, fitted, untouched


def _contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def test_the_table_is_long_enough() -> None:
    assert len(cases.BAD) >= 40


@pytest.mark.parametrize("name", cases.BAD)
def test_bad_input_is_a_named_error_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    row = cases.BAD[name]
    row.files(tmp_path)
    before = _contents(tmp_path)
    with untouched(), pytest.raises(row.error) as raised:  # a warning would be an error of another class
        row.call(tmp_path)
    message = str(raised.value)
    missing = [word for word in row.words if word not in message]
    assert not missing, f"{missing} are not in: {message}"
    assert _contents(tmp_path) == before


NUMBERS = st.floats(width=64) | st.sampled_from([0.0, -0.0, 1e-320, 1e300, -1e300, float("nan"), float("inf")])


@given(data=st.data(), rows=st.integers(1, 6), classes=st.booleans())
@settings(max_examples=25)
def test_random_tables_are_refused_or_give_finite_predictions(data: Any, rows: int, classes: bool) -> None:
    x = data.draw(st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=rows, max_size=rows))
    y = data.draw(st.lists(st.integers(-1, 2) if classes else NUMBERS, min_size=rows, max_size=rows))
    try:
        given = bdl.Dataset.from_arrays(np.array(x), np.array(y))
        assert np.isfinite(x).all()
        assert np.isfinite(y).all()
        prediction = bdl.fit(bdl.models.mlp(given, hidden=(2,)), given, bdl.NNGP()).predict(given.x)
    except bdl.errors.BayesdlError as error:
        assert len(str(error)) > 20, "says what is wrong"  # noqa: PT017
        return
    assert prediction.mean.isfinite().all()
    assert not prediction.variance.isnan().any()


@given(data=st.data(), rows=st.integers(2, 6), poison=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_one_bad_number_is_found_wherever_it_is(data: Any, rows: int, poison: float) -> None:
    x, y = np.arange(2.0 * rows).reshape(rows, 2), np.arange(1.0 * rows)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 2))
    if column < 2:
        x[row, column] = poison
    else:
        y[row] = poison
    for call in (
        lambda: bdl.Dataset.from_arrays(x, y),
        lambda: bdl.fit(fitted().problem.model, (x, y), bdl.MAP(steps=1)),
        lambda: bdl.fit(cases.program, (x, y), bdl.MAP(steps=1)),
    ):
        with pytest.raises(bdl.errors.DataError, match=r"(NaN|infinite)") as raised:
            call()
        assert ("x holds" if column < 2 else "y holds") in str(raised.value)
        assert f"{row}" in str(raised.value)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield (*path, key)
        yield from _places(entry, (*path, key))


JUNK = st.sampled_from([None, -1, 0, 3, 1.5, "x", "", [], {}, [1, 2], {"a": 1}, True, "torch.os", float("nan"), 2**70])


def _load_or_refuse(folder: Path) -> None:
    """Loading ends in a named error or in a posterior that predicts finite numbers."""
    before = _contents(folder)
    try:
        with untouched():
            posterior = bdl.load(folder)
        prediction = posterior.predict(dataset("regression").x)
    except bdl.errors.BayesdlError as error:
        assert len(str(error)) > 20, "says what is wrong"  # noqa: PT017
    else:
        assert prediction.mean.isfinite().all()
    assert _contents(folder) == before


@given(data=st.data(), junk=JUNK, remove=st.booleans())
@settings(max_examples=60)
def test_a_changed_description_is_refused_or_harmless(data: Any, junk: Any, remove: bool) -> None:
    with TemporaryDirectory() as name:
        path = fitted().save(Path(name) / "posterior") / "posterior.json"
        description = json.loads(path.read_text())
        *parents, last = data.draw(st.sampled_from(sorted(_places(description), key=str)))
        holder = description
        for key in parents:
            holder = holder[key]
        if remove:
            del holder[last]
        else:
            holder[last] = junk
        path.write_text(json.dumps(description))
        _load_or_refuse(path.parent)


@given(
    file=st.sampled_from(["posterior.json", "posterior.safetensors"]),
    cut=st.floats(0, 0.999),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=3),
)
@settings(max_examples=40)
def test_a_damaged_file_is_refused_or_harmless(file: str, cut: float, flips: list[tuple[float, int]]) -> None:
    with TemporaryDirectory() as name:
        path = fitted().save(Path(name) / "posterior") / file
        content = bytearray(path.read_bytes())
        header = len(content)
        if file.endswith("safetensors"):
            header = 8 + int.from_bytes(content[:8], "little")  # numbers behind the header cannot be told from others
        for place, value in flips:
            content[int(place * header)] = value
        path.write_bytes(content if flips else content[: int(cut * len(content))])
        _load_or_refuse(path.parent)
