"""The verdict's words, from numbers alone and from planted failures of whole posteriors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import DataError
from bayesdl.posterior import DrawsPosterior, prepare
from bayesdl.posterior.diagnostics import Diagnostics, Mixing
from bayesdl.posterior.divergences import divergent_draws
from tests.cases import dataset

DOUBLE = torch.float64
FINE = Mixing(1.003, 2000.0, 1500.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=DOUBLE)


def diagnostics(**changes: Any) -> Diagnostics:
    """A run without trouble, but for the changes."""
    numbers: dict[str, Any] = {
        "function": FINE,
        "function_squared": FINE,
        "log_likelihood": FINE,
        "sites": {"0.weight": FINE, "2.weight": FINE},
        "divergences": 0,
        "acceptance": 0.8,
        "ebfmi": 0.9,
        "chains": 64,
        "draws": 500,
        "agreeing": 64,
        "saturated": 0.0,
        "method": "NUTS",
        "settings": {"warmup": 1000, "draws": 500, "target_accept": 0.8, "max_depth": 10},
    }
    return Diagnostics(**(numbers | changes))


def test_no_trouble() -> None:
    verdict = diagnostics().verdict
    assert verdict.good
    assert verdict.kinds == ()
    assert str(verdict).replace("\n  ", " ") == (
        "No sign of trouble: R-hat of the predictions and log likelihood at most 1.003, at least 2000 effective draws "
        "in the bulk and 1500 in the tails, no divergences, E-BFMI at least 0.90."
    )


SITES = {"0.weight": Mixing(1.1, 300.0, 300.0), "2.weight": Mixing(1.32, 60.0, 60.0)}
POOR = Mixing(1.21, 80.0, 90.0)


@pytest.mark.parametrize(
    ("changes", "kinds", "words"),
    [
        (
            {"function": POOR, "sites": SITES, "apart": (1, 5, 6, 60), "agreeing": 60},
            ("mixing",),
            (
                "4 of 64 chains have not mixed in function space (chains 1, 5, 6, 60); R-hat of the predictions",
                "reaches 1.21, the worst layer is 2.weight (R-hat 1.32)",
                "They stay where they are: use another init",
            ),
        ),
        (
            {"function": POOR, "apart": (7,), "moving": (7,), "agreeing": 63},
            ("mixing",),
            ("1 of 64 chains has not mixed", "(chain 7)", "warmup=2000", "still moving"),
        ),
        (
            {"function": POOR, "agreeing": 32},
            ("mixing",),
            ("no more than 32 of 64 agree", "do not weigh these modes"),
        ),
        ({"function": POOR}, ("mixing",), ("all are too short", "draws=1000")),
        ({"log_likelihood": Mixing(1.02, 900.0, 900.0)}, ("mixing",), ("nearly mixed", "R-hat of the log likelihood")),
        ({"function": Mixing(math.nan, math.nan, math.nan)}, ("mixing",), ("have not mixed", "nan")),
        ({"frozen": (2, 3)}, ("frozen",), ("2 of 64 chains never moved (chains 2, 3)", "smaller step")),
        (
            {"divergences": 1, "divergent_chains": (4,)},
            ("divergences",),
            ("1 of 32000 transition diverged, in 1 of 64",),
        ),
        (
            {"divergences": 30, "divergent_chains": (4, 5)},
            ("divergences",),
            ("30 of 32000 transitions", "target_accept=0.95", "non-centred"),
        ),
        (
            {"ebfmi": 0.12, "low_ebfmi": (0, 9)},
            ("energy",),
            ("2 of 64 chains have an energy fraction (E-BFMI) below 0.3", "lowest 0.12", "non-centred"),
        ),
        ({"saturated": 0.2}, ("depth",), ("20% of the trajectories were cut at max_depth=10",)),
        ({"acceptance": 0.1}, ("acceptance",), ("Only 10% of the proposals", "(80% were asked for)")),
        (
            {"function_squared": Mixing(1.004, 90.0, 120.0)},
            ("effective draws",),
            ("90 effective ones for the bulk of the squared predictions", "5 times as many draws (draws=2500)"),
        ),
    ],
)
def test_each_trouble_has_its_words(changes: dict[str, Any], kinds: tuple[str, ...], words: tuple[str, ...]) -> None:
    found = diagnostics(**changes)
    assert found.verdict.kinds == kinds
    assert not found.verdict.good
    text = str(found.verdict).replace("\n  ", " ")
    for part in words:
        assert part in text
    assert "No sign of trouble" not in text
    assert str(found.verdict) in str(found)
    again = Diagnostics.from_json(json.loads(json.dumps(found.to_json())))
    assert str(again.verdict) == str(found.verdict)


def test_what_was_not_recorded_is_said() -> None:
    sgld = diagnostics(divergences=None, acceptance=None, ebfmi=None, saturated=None, method="SGLD").verdict
    assert sgld.good
    assert "SGLD records no divergences and no energies" in str(sgld)
    assert "kernel_stein" in str(sgld)
    walk = diagnostics(divergences=None, ebfmi=None, method="RandomWalk").verdict
    assert "RandomWalk records no divergences and no energies; nothing is known of them" in str(walk).replace(
        "\n  ", " "
    )
    assert "One chain" in str(diagnostics(chains=1, agreeing=1).verdict)
    bare = diagnostics(function=None, function_squared=None, log_likelihood=None).verdict
    assert "R-hat of the latents" in str(bare)
    assert "Predictions were not at hand" in str(bare)


def test_equivalent_modes_are_a_note() -> None:
    verdict = diagnostics(sites=SITES).verdict
    assert verdict.good
    assert "Weights differ between chains (2.weight: R-hat 1.32) while the functions agree" in str(verdict)


def test_nested_rhat_has_its_own_limit() -> None:
    short = Mixing(1.12, math.nan, math.nan)
    settings = {"function": short, "function_squared": short, "log_likelihood": short, "draws": 1, "superchains": 16}
    assert diagnostics(**settings).verdict.good
    apart = diagnostics(**(settings | {"function": Mixing(1.5, math.nan, math.nan)})).verdict
    assert apart.kinds == ("mixing",)
    assert "nested R-hat, for which 1.33 would be good" in str(apart).replace("\n  ", " ")


def test_latents_that_differ_where_predictions_agree_are_named_for_what_they_are() -> None:
    apart = Mixing(1.2, 500.0, 500.0)
    weights = str(diagnostics(sites={"0.weight": apart}).verdict).replace("\n  ", " ")
    assert "Weights differ between chains (0.weight: R-hat 1.2)" in weights
    latents = str(diagnostics(sites={"tau": apart}).verdict).replace("\n  ", " ")
    assert "equivalent modes" not in latents
    assert "state nothing about tau itself before its R-hat is below 1.05" in latents


# -- posteriors ------------------------------------------------------------------------------------------------------


def network_posterior(chains: int, draws: int, spread: float = 0.05) -> DrawsPosterior:
    """A network's draws around one point, equal in law in all chains."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    problem = prepare(bdl.BayesianNetwork(net), dataset("regression"))
    z = problem.density.prior_draws(1, 5) + spread * noise(chains, draws, problem.density.dim)
    return DrawsPosterior(problem, z, {}, {"method": "test"})


def test_planted_chains_of_a_network_are_named() -> None:
    posterior = network_posterior(32, 60)
    clean = posterior.diagnostics()
    assert (clean.apart, clean.moving, clean.agreeing) == ((), (), 32)
    assert "mixing" not in [kind for kind in clean.verdict.kinds if clean.rhat <= 1.05]
    layer = next(site for site in posterior.problem.density.sites if site.name == "2.weight")
    z = posterior.z.clone()
    z[[3, 11, 30], :, layer.start : layer.stop] += 0.6
    found = DrawsPosterior(posterior.problem, z, {}, {}).diagnostics()
    assert found.apart == (3, 11, 30)
    assert max(found.sites, key=lambda name: found.sites[name].rhat) == "2.weight"
    assert "3 of 32 chains have not mixed in function space (chains 3, 11, 30)" in str(found).replace("\n  ", " ")
    assert "2.weight" in str(found.verdict)


def test_permuted_units_are_no_trouble() -> None:
    posterior = network_posterior(2, 1500, 0.02)
    values = posterior.problem.density.constrain(posterior.z)
    order = [2, 3, 0, 1]
    other = dict(values) | {"0.bias": values["0.bias"][..., order], "2.weight": values["2.weight"][..., order]}
    other["0.weight"] = values["0.weight"][..., order, :]
    z = torch.cat([posterior.z, posterior.problem.density.unconstrain(other)])
    found = DrawsPosterior(posterior.problem, z, {}, {}).diagnostics()
    assert found.sites["0.weight"].rhat > 1.5
    assert found.verdict.good
    assert "equivalent modes" in str(found.verdict).replace("\n  ", " ")


def scale_and_effects() -> Any:
    def program(y: Tensor | None = None) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(3.0, dtype=DOUBLE)))
        with pyro.plate("data", 5):
            theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), tau))
            pyro.sample("y", dist.Normal(theta, torch.tensor(5.0, dtype=DOUBLE)), obs=y)

    return prepare(program, {"y": noise(5, seed=2)})


def test_divergences_have_a_place() -> None:
    problem = scale_and_effects()
    z = noise(4, 300, problem.density.dim)
    divergent = torch.zeros(4, 300)
    start = next(site.start for site in problem.density.sites if site.name == "tau")
    divergent[z[..., start] < -1.5] = 1.0
    stats = {"divergent": divergent, "energy": noise(4, 300, seed=1)}
    posterior = DrawsPosterior(problem, z, stats, {"method": "NUTS", "settings": {"target_accept": 0.8}})
    found = divergent_draws(posterior)
    assert len(found) == int(divergent.sum()) > 40
    tau = posterior.draws_by_chain()["tau"]
    assert found.values["tau"].equal(tau[found.chain, found.draw])
    assert found.values["theta"].shape == (len(found), 5)
    (place,) = found.places
    assert (place.entry, place.side, place.share) == ("tau", "low", 1.0)
    assert place.typical == pytest.approx(float(found.values["tau"].median()))
    text = str(posterior.diagnostics().verdict).replace("\n  ", " ")
    assert f"{len(found)} of 1200 transitions diverged" in text
    assert "100% of them at the low end of tau" in text
    assert "standard normals and multiply them by the scale" in text
    elsewhere = torch.zeros(4, 300)
    elsewhere[:, ::10] = 1.0
    assert divergent_draws(DrawsPosterior(problem, z, {"divergent": elsewhere}, {})).places == ()
    with pytest.raises(DataError, match="records no divergences"):
        divergent_draws(DrawsPosterior(problem, z, {}, {}))


def test_statistics_of_bad_chains() -> None:
    problem = scale_and_effects()
    z = noise(4, 400, problem.density.dim)
    z[2] = z[2, :1]
    energy = noise(4, 400, seed=3)
    energy[1] = energy[1].cumsum(0)
    depth = torch.full((4, 400), 5.0)
    depth[:, ::10] = 7.0
    settings = {"max_depth": 7, "target_accept": 0.8, "warmup": 100, "something": "else"}
    stats = {"energy": energy, "depth": depth, "acceptance": torch.full((4, 400), 0.3)}
    found = DrawsPosterior(problem, z, stats, {"method": "NUTS", "settings": settings}).diagnostics()
    assert found.frozen == (2,)
    assert found.low_ebfmi == (1,)
    assert found.saturated == pytest.approx(0.1)
    assert found.apart == (2,)
    assert found.settings == {"max_depth": 7, "target_accept": 0.8, "warmup": 100}
    assert found.verdict.kinds == ("frozen", "mixing", "energy", "depth", "acceptance")


def test_one_chain_and_short_chains() -> None:
    posterior = network_posterior(1, 800)
    assert posterior.diagnostics().verdict.good
    z = posterior.z + torch.linspace(0, 1, 800, dtype=DOUBLE)[:, None]
    moving = DrawsPosterior(posterior.problem, z, {}, {}).diagnostics().verdict
    assert "The chain has not settled in function space" in str(moving)
    short = network_posterior(8, 10).diagnostics().verdict
    assert "effective draws" in short.kinds or "all are too short" in str(short)


def test_many_short_chains_by_superchains() -> None:
    posterior = network_posterior(256, 1)
    with pytest.raises(DataError, match="superchains="):
        posterior.diagnostics()
    found = posterior.diagnostics(superchains=64)
    assert found.superchains == 64
    assert found.verdict.good
    starts = posterior.z[::4].repeat_interleave(4, 0)
    near = DrawsPosterior(posterior.problem, starts + 0.01 * noise(*starts.shape, seed=8), {}, {"superchains": 64})
    assert near.diagnostics().verdict.kinds == ("mixing",)
    assert near.diagnostics(superchains=list(np.arange(256) // 4)).rhat == near.diagnostics().rhat
    assert "nested R-hat" in str(near.diagnostics())
