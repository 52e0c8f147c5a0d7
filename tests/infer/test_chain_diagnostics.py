"""Every sampler's posterior has diagnostics and pictures, whatever it records; so have replicates and single chains."""

from __future__ import annotations

import pytest

import bayesdl as bdl
from bayesdl.evaluate import chain_plots
from bayesdl.posterior import DrawsPosterior, load
from tests.cases import METHODS, dataset, network

SAMPLERS = [name for name, case in METHODS.items() if "chains" in case.settings]
RECORDS = {"divergent": "divergences", "energy": "energies"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_sampler_does_not_record_is_named(name: str) -> None:
    method = getattr(bdl, name)(**METHODS[name].settings)
    posterior = method.fit(network("regression"), dataset("regression"), seed=0, progress=False)
    assert isinstance(posterior, DrawsPosterior)
    found = posterior.diagnostics()
    notes = " ".join(finding.text for finding in found.verdict.findings if finding.kind == "note")
    for statistic, words in RECORDS.items():
        assert (f"no {words}" in notes) == (statistic not in posterior.stats)
    assert ("kernel_stein" in notes) == ("acceptance" not in posterior.stats)
    assert found.method == name
    assert chain_plots.trace(posterior).axes
    assert chain_plots.rhat_by_layer(posterior).axes


def test_replicates_and_single_chains(tmp_path) -> None:
    data = dataset("regression")
    both = bdl.NUTS(chains=1, warmup=20, draws=20, max_depth=3).fit_each(
        network("regression"), [data, data], progress=False
    )
    for posterior in both:
        assert isinstance(posterior, DrawsPosterior)
        found = posterior.diagnostics()
        assert (found.chains, found.draws) == (1, 20)
        assert "One chain can only be compared with itself" in str(found.verdict).replace("\n  ", " ")
    saved = load(both[0].save(tmp_path / "posterior"))
    assert str(saved.diagnostics().verdict) == str(both[0].diagnostics().verdict)
