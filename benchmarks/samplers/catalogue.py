"""Which samplers are run, with which settings, on which work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LENGTHS = ("warmup", "draws", "count")
"""Settings that ``--scale`` multiplies, to the next multiple of 10."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        package: "bayesdl" or a peer.
        module: file of this folder that runs it.
        function: function of that file.
        settings: keyword arguments on every work.
        by_work: keyword arguments on one work, over the former.
        kind: "sampler", or "gradient" for the bare leapfrog loop.
        heavy: run once a round and not once a seed.
        like: what it is compared with, like for like ("nuts-4", "chees", ...).
    """

    package: str
    module: str
    function: str
    settings: Mapping[str, Any]
    by_work: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kind: str = "sampler"
    heavy: bool = False
    like: str = ""

    def arguments(self, work: str, scale: float) -> dict[str, Any]:
        """Keyword arguments on a work, with the run's length scaled."""
        given = {**self.settings, **self.by_work.get(work, {})}
        return {name: 10 * max(1, round(scale * v / 10)) if name in LENGTHS else v for name, v in given.items()}


def _numpyro(chains: int, **by_work: dict[str, int]) -> Entry:
    return Entry(
        "numpyro", "numpyro_runs", "nuts", {"chains": chains}, by_work, heavy=chains == 64, like=f"nuts-{chains}"
    )


def _blackjax(function: str, like: str, settings: dict[str, Any], **by_work: dict[str, Any]) -> Entry:
    return Entry("blackjax", "blackjax_runs", function, settings, by_work, like=like)


def _ours(method: str, like: str, settings: dict[str, Any], **by_work: dict[str, Any]) -> Entry:
    given = {"method": method, **settings}
    return Entry("bayesdl", "ours", "run", given, by_work, heavy=like == "nuts-64", like=like)


CHEES = {"step_size": 0.1}
RATE = {"network": {"learning_rate": 0.02}, "logistic": {"learning_rate": 0.1}}
"""Picked from one short run each with the identity metric: 0.02 and 0.1 on the network; those and 0.5 on the other."""

CATALOGUE: dict[str, Entry] = {
    "bayesdl NUTS x4": _ours(
        "NUTS", "nuts-4", {"chains": 4}, network={"warmup": 300, "draws": 200}, logistic={"warmup": 300, "draws": 500}
    ),
    "numpyro NUTS x1": _numpyro(1, network={"warmup": 300, "draws": 500}, logistic={"warmup": 300, "draws": 3000}),
    "numpyro NUTS x4": _numpyro(4, network={"warmup": 300, "draws": 200}, logistic={"warmup": 300, "draws": 900}),
    "blackjax NUTS x4": _blackjax(
        "nuts", "nuts-4", {"chains": 4}, network={"warmup": 300, "draws": 200}, logistic={"warmup": 300, "draws": 1000}
    ),
    "bayesdl ChEES x64": _ours(
        "ChEES", "chees", {"chains": 64}, network={"warmup": 300, "draws": 100}, logistic={"warmup": 300, "draws": 400}
    ),
    "blackjax ChEES x64": _blackjax(
        "chees", "chees", {**CHEES, "metric": None}, network={**RATE["network"], "warmup": 300, "draws": 100},
        logistic={**RATE["logistic"], "warmup": 500, "draws": 1000},
    ),
    "blackjax ChEES x64 diagonal": _blackjax(
        "chees", "chees", {**CHEES, "metric": "diagonal"}, network={**RATE["network"], "warmup": 300, "draws": 100},
        logistic={**RATE["logistic"], "warmup": 300, "draws": 400},
    ),
    "bayesdl MCLMC x64": _ours(
        "MCLMC", "mclmc", {"chains": 64, "adjusted": False, "integrator": "minimal_norm"},
        network={"warmup": 300, "draws": 200}, logistic={"warmup": 300, "draws": 400},
    ),
    "bayesdl MCLMC x64 adjusted": _ours(
        "MCLMC", "mclmc", {"chains": 64, "adjusted": True}, network={"warmup": 300, "draws": 100},
        logistic={"warmup": 300, "draws": 400},
    ),
    "blackjax MCLMC x64": _blackjax(
        "mclmc", "mclmc", {"chains": 64, "thin": 5, "diagonal": False}, network={"warmup": 600, "draws": 1500},
        logistic={"warmup": 900, "draws": 2000},
    ),
    "blackjax MCLMC x64 diagonal": _blackjax(
        "mclmc", "mclmc", {"chains": 64, "thin": 5, "diagonal": True}, network={"warmup": 600, "draws": 1500},
        logistic={"warmup": 900, "draws": 2000},
    ),
    "bayesdl NUTS x64": _ours(
        "NUTS", "nuts-64", {"chains": 64}, network={"warmup": 150, "draws": 30}, logistic={"warmup": 200, "draws": 100}
    ),
    "numpyro NUTS x64": _numpyro(64, network={"warmup": 150, "draws": 30}, logistic={"warmup": 200, "draws": 200}),
    "pyro NUTS x1": Entry(
        "pyro", "pyro_runs", "nuts", {"jit": False, "depth": 6}, {
            "network": {"warmup": 20, "draws": 20}, "logistic": {"warmup": 50, "draws": 50},
        },
        heavy=True,
        like="nuts-1",
    ),
    "pyro NUTS x1 jit": Entry(
        "pyro", "pyro_runs", "nuts", {"jit": True, "depth": 6}, {
            "network": {"warmup": 20, "draws": 20}, "logistic": {"warmup": 50, "draws": 50},
        },
        heavy=True,
        like="nuts-1",
    ),
}  # fmt: skip

for _chains in (1, 4, 16, 64):
    for _package, _function in (("bayesdl", "in_bayesdl"), ("jax", "in_jax")):
        CATALOGUE[f"{_package} leapfrog x{_chains}"] = Entry(
            _package, "gradients", _function, {"chains": _chains, "count": 10}, kind="gradient", heavy=True
        )
