"""Bad input ends in a named error that says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests import cases


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
    with cases.untouched(), pytest.raises(row.error) as caught:
        row.call(tmp_path)
    message = str(caught.value)
    missing = [word for word in row.words if word not in message]
    assert not missing, f"{missing} are not in: {message}"
    assert "nan" not in message.lower() or "NaN" in message or "nan" in " ".join(row.words), message
    assert _contents(tmp_path) == before
