"""Extending a posterior: the draws of one longer run, also after saving, loading and interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import MethodError, ModelMismatch
from bayesdl.infer import schedules
from tests.cases import dataset, network

SAMPLERS = {
    "NUTS": bdl.NUTS(chains=2, warmup=20, draws=12, max_depth=4, thin=2),
    "HMC": bdl.HMC(chains=2, warmup=60, draws=12, leapfrog_steps=3),
    "SGLD": bdl.SGLD(chains=2, warmup=60, draws=12, thin=4, batch_size=7),
    "SAGA": bdl.BAOAB(chains=2, warmup=60, draws=12, thin=3, batch_size=7, gradient="saga", step_size=0.01),
}


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("loaded", [False, True])
def test_a_posterior_is_extended_to_the_draws_of_a_longer_run(name: str, loaded: bool, tmp_path: Path) -> None:
    method, model, data = SAMPLERS[name], network("regression"), dataset("regression")
    whole: Any = replace(method, draws=20).fit(model, data, seed=4, progress=False)
    posterior: Any = method.fit(model, data, seed=4, progress=False)
    given = None
    if loaded:
        posterior.save(tmp_path / "run")
        posterior, given = bdl.load(tmp_path / "run"), data
    before = posterior.z.clone()
    extended: Any = bdl.extend(posterior, 8, data=given, progress=False)
    assert torch.equal(extended.z, whole.z)
    assert all(torch.equal(extended.stats[key], whole.stats[key]) for key in whole.stats)
    assert torch.equal(posterior.z, before)
    assert extended.info["settings"] == whole.info["settings"]
    assert extended.info["gradients"] == whole.info["gradients"]
    again: Any = bdl.extend(bdl.extend(posterior, 5, data=given, progress=False), 3, progress=False)
    assert torch.equal(again.z, whole.z)


def test_an_interrupted_run_goes_on_where_it_stopped() -> None:
    method, model, data = SAMPLERS["NUTS"], network("regression"), dataset("regression")
    whole: Any = replace(method, draws=10).fit(model, data, progress=False)
    # stopped between two kept draws
    part: Any = method.fit(model, data, progress=False, callback=lambda state: state["step"] == 27)
    assert part.z.shape[1] == 3
    assert torch.equal(bdl.extend(part, 7, progress=False).z, whole.z)  # type: ignore[attr-defined]  # base class


def test_what_cannot_be_extended_says_so(tmp_path: Path) -> None:
    model, data = network("regression"), dataset("regression")
    mode = bdl.MAP(steps=5).fit(model, data, progress=False)
    with pytest.raises(MethodError, match="cannot be extended"):
        bdl.extend(mode, 5)
    cooling = bdl.SGLD(chains=2, warmup=5, draws=5, thin=2, step_size=schedules.Polynomial(0.01))
    with pytest.raises(MethodError, match="cannot be extended under Polynomial"):
        bdl.extend(cooling.fit(model, data, progress=False), 5)
    posterior = SAMPLERS["NUTS"].fit(model, data, progress=False)
    posterior.save(tmp_path / "run")
    with pytest.raises(MethodError, match="data="):
        bdl.extend(bdl.load(tmp_path / "run"), 5)
    with pytest.raises(ModelMismatch, match="fitted on"):
        bdl.extend(bdl.load(tmp_path / "run"), 5, data=data.shuffle(1))


def test_settings_come_back_from_json() -> None:
    method = bdl.SGLD(step_size=schedules.Polynomial(0.1, 2.0), batch_size=7)
    assert bdl.SGLD.from_settings(method.settings()) == method
    with pytest.raises(MethodError, match="Spiral"):
        schedules.as_setting({"schedule": "Spiral"})
