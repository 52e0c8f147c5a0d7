"""The Python in README and docs runs, with methods shortened: this tests the text, not the methods."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import bayesdl as bdl
from bayesdl._registry import METHODS

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


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, settings in SHORT.items():
        monkeypatch.setattr(bdl, name, shortened(getattr(bdl, name), settings))
    exec(compile("\n".join(blocks(page)), str(page), "exec"), {})


def test_method_of_the_contributing_page_is_a_method(tmp_path, monkeypatch):
    (tmp_path / "gaussian_walk.py").write_text(blocks(ROOT / "CONTRIBUTING.md")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "GaussianWalk", "gaussian_walk:GaussianWalk")
    torch.manual_seed(0)
    x = torch.randn(200, 1, dtype=torch.float64)
    data = bdl.data.Dataset.from_arrays(x, 3.0 * x[:, 0] + 0.1 * torch.randn(200, dtype=torch.float64))
    model = bdl.models.mlp(data, hidden=())
    posterior = bdl.fit(model, data, bdl.GaussianWalk(draws=3000), seed=0)
    # The chains forget their starts within the first third; then the line is known to about 0.1 / sqrt(200).
    draws = posterior.z[:, 1000:].flatten(0, 1)
    late = bdl.posterior.DrawsPosterior(posterior.problem, draws[None], {}, {})
    assert torch.allclose(late.predict(x).mean, 3.0 * x[:, 0], atol=0.1)
