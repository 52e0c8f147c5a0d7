"""The Python in README and docs runs, with methods shortened: this tests the text, not the methods."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import bayesdl as bdl

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {
    "NUTS": {"warmup": 10, "draws": 10, "max_depth": 4},
    "MeanFieldVI": {"steps": 100},
    "MAP": {"steps": 100},
    "DeepEnsemble": {"steps": 100},
}


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def shortened(method, settings):
    return lambda **given: dataclasses.replace(method(**given), **settings)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, settings in SHORT.items():
        monkeypatch.setattr(bdl, name, shortened(getattr(bdl, name), settings))
    exec(compile("\n".join(blocks(page)), str(page), "exec"), {})
