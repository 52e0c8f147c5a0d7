from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import DataError, MissingExtra
from bayesdl.evaluate import chain_plots
from bayesdl.evaluate.chain_quantities import SHOWN, envelope, quantities, rank_fractions, thinned
from bayesdl.posterior import DrawsPosterior, convergence, prepare

DOUBLE = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=DOUBLE)


X, Y = noise(6, 2), noise(6, seed=1)


def program(x: Tensor, y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0, dtype=DOUBLE)))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2, 2, dtype=DOUBLE), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta.sum(0), scale), obs=y)


def posterior(chains: int = 4, draws: int = 100, statistics: bool = True) -> DrawsPosterior:
    problem = prepare(program, (X, Y))
    divergent = torch.zeros(chains, draws)
    divergent[:, ::20] = 1.0
    stats = {"divergent": divergent, "energy": noise(chains, draws, seed=2)} if statistics else {}
    return DrawsPosterior(problem, 0.3 * noise(chains, draws, problem.density.dim), stats, {"method": "test"})


FITTED = posterior()


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


def test_quantities_by_name_and_by_input() -> None:
    draws = FITTED.draws_by_chain()
    found = quantities(FITTED, ["scale", "beta[1,0]"], X[:2])
    assert list(found) == ["f[0]", "f[1]", "scale", "beta[1,0]"]
    np.testing.assert_array_equal(found["beta[1,0]"], draws["beta"][:, :, 1, 0].numpy())
    np.testing.assert_array_equal(found["f[1]"], FITTED.function_draws(X[:2])[..., 1].numpy())
    assert list(quantities(FITTED, "beta", None)) == ["beta[0,0]", "beta[0,1]", "beta[1,0]", "beta[1,1]"]
    for name in ("gamma", "beta[7,0]"):
        with pytest.raises(DataError, match="scale, beta"):
            quantities(FITTED, name, None)


def test_without_names_the_worst_latents_are_shown() -> None:
    z = FITTED.z.clone()
    site = next(site for site in FITTED.problem.density.sites if site.name == "beta")
    z[0, :, site.start + 2] += 3.0
    found = quantities(DrawsPosterior(FITTED.problem, z, {}, {}), None, None)
    assert len(found) == SHOWN
    assert next(iter(found)) == "beta[1,0]"


def test_trace() -> None:
    figure = chain_plots.trace(FITTED, ["scale", "beta[0,0]"])
    left = figure.axes[0]
    np.testing.assert_array_equal(left.lines[2].get_ydata(), FITTED.draws_by_chain()["scale"][2].numpy())
    assert len(left.lines) == 5  # four chains and the divergences
    assert len(left.lines[4].get_xdata()) == 20
    assert [axes.get_ylabel() for axes in figure.axes][::2] == ["scale", "beta[0,0]"]


def test_rank_histogram_counts_every_draw() -> None:
    figure = chain_plots.rank_histogram(FITTED, "scale", bins=10)
    (axes,) = figure.axes
    heights = np.array([patch.get_data().values for patch in axes.patches if hasattr(patch, "get_data")])
    every = thinned(FITTED.draws_by_chain()["scale"].numpy())[1]
    assert heights.sum() == 4 * len(range(0, 100, every))


def test_rank_ecdf_names_the_chain_outside() -> None:
    z = posterior(4, 400).z
    site = next(site for site in FITTED.problem.density.sites if site.name == "scale")
    assert titles(chain_plots.rank_ecdf(DrawsPosterior(FITTED.problem, z, {}, {}), "scale"))[0].startswith(
        "scale: 0 of"
    )
    z[1, :, site.start] *= 0.2
    outside = titles(chain_plots.rank_ecdf(DrawsPosterior(FITTED.problem, z, {}, {}), "scale"))[0]
    assert not outside.startswith("scale: 0 of")


@pytest.mark.parametrize(("chains", "draws"), [(2, 30), (8, 50)])
def test_envelope_has_its_level_simultaneously(chains: int, draws: int) -> None:
    points = np.linspace(0, 1, 101)[1:-1]
    low, high = envelope(chains, draws, points, 0.9)
    stream, inside = np.random.default_rng(1), 0
    for _ in range(400):
        fractions = np.sort(rank_fractions(stream.normal(size=(chains, draws))), axis=1)
        curves = np.stack([np.searchsorted(row, points, side="right") / draws for row in fractions])
        inside += bool((curves >= low - 1e-12).all() and (curves <= high + 1e-12).all())
    # Counts are whole numbers, so that the level is reached or passed; three standard errors are 0.045.
    assert 0.85 < inside / 400 < 0.97


def test_chains_are_thinned_to_independent_draws() -> None:
    x = np.random.default_rng(0).normal(size=(3, 400))
    assert thinned(x)[1] <= 2
    slow = np.repeat(x, 10, axis=1)
    assert 8 <= thinned(slow)[1] <= 14
    assert thinned(x[:, :3])[1] == 1


def test_energy_shows_both_laws() -> None:
    figure = chain_plots.energy(FITTED)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "energy - mean",
        "change per transition",
    ]
    assert f"{float(convergence.ebfmi(FITTED.stats['energy']).min()):.2f}" in titles(figure)[0]


def test_divergences_are_where_they_were() -> None:
    figure = chain_plots.divergences(FITTED, "scale", "beta[0,1]")
    draws, divergent = figure.axes[0].lines
    assert len(draws.get_xdata()) == 400
    np.testing.assert_array_equal(
        np.sort(divergent.get_ydata()), np.sort(FITTED.draws_by_chain()["beta"][:, ::20, 0, 1].numpy().ravel())
    )
    assert titles(figure) == ["20 divergent of 400 transitions"]
    assert len(chain_plots.divergences(FITTED).axes) == 1
    with pytest.raises(DataError, match="two entries"):
        chain_plots.divergences(FITTED, "beta", "scale")


def test_autocorrelation_starts_at_one() -> None:
    figure = chain_plots.autocorrelation(FITTED, "scale", lags=20)
    pooled = figure.axes[0].lines[-1].get_ydata()
    assert len(pooled) == 21
    assert pooled[0] == pytest.approx(1.0)
    assert np.abs(pooled[1:]).max() < 0.3


def test_rhat_by_layer() -> None:
    figure = chain_plots.rhat_by_layer(FITTED)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "predictions",
        "log likelihood",
        "scale",
        "beta",
    ]
    worst = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert worst[3] == pytest.approx(float(convergence.rhat(FITTED.draws_by_chain()["beta"]).max()))
    stuck = DrawsPosterior(FITTED.problem, FITTED.z[:, :1].expand(-1, 20, -1), {}, {})
    assert chain_plots.rhat_by_layer(stuck).axes[0].get_xlim()[1] >= chain_plots.CEILING


ALL = ["trace", "rank_histogram", "rank_ecdf", "autocorrelation", "rhat_by_layer"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("chains", "draws"), [(1, 40), (70, 30), (2, 5)])
def test_any_number_of_chains_without_statistics(name: str, chains: int, draws: int, tmp_path: Any) -> None:
    few = posterior(chains, draws, statistics=False)
    if name == "rank_ecdf" and chains == 1:
        with pytest.raises(DataError, match="has one"):
            chain_plots.rank_ecdf(few)
        return
    figure = getattr(chain_plots, name)(few)
    figure.savefig(tmp_path / "picture.png", dpi=40)
    assert (tmp_path / "picture.png").stat().st_size > 2000
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = posterior(2, 20, statistics=False)
    with pytest.raises(DataError, match="test records no energies"):
        chain_plots.energy(bare)
    with pytest.raises(DataError, match="test records no divergences"):
        chain_plots.divergences(bare)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"bayesdl\[plots\]"):
        chain_plots.trace(bare)
