"""N/B and 1/N of every training engine: mini-batches are unbiased, and rows count as often as they are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.bounds.certify import certify
from bayesdl.infer.ensemble import EnsembleEngine
from bayesdl.infer.snapshots import CyclicalEngine
from bayesdl.infer.svgd import SVGDEngine
from bayesdl.infer.swag import SWAGEngine
from bayesdl.infer.training import OptimiserEngine, TrainingEngine
from bayesdl.posterior import prepare
from tests.cases import conjugate, dataset, network

Z = torch.tensor([[0.3, -0.1, 0.2]], dtype=torch.float64)

ENGINES: dict[str, tuple[Any, type[TrainingEngine]]] = {
    "MAP": (bdl.MAP, OptimiserEngine),
    "DeepEnsemble": (lambda **more: bdl.DeepEnsemble(anchored=True, **more), EnsembleEngine),
    "SnapshotEnsemble": (bdl.SnapshotEnsemble, CyclicalEngine),
    "SWAG": (bdl.SWAG, SWAGEngine),
    "SVGD": (lambda **more: bdl.SVGD(particles=1, **more), SVGDEngine),
}


def engine(name: str, data: tuple[Tensor, Tensor], batch_size: int | None) -> TrainingEngine:
    method, kind = ENGINES[name]
    return kind(method(batch_size=batch_size), prepare(conjugate().program, data), 0, 1, lambda: Z)


def gradients(found: TrainingEngine, count: int) -> Tensor:
    """Of ``count`` steps in a row at one point, ``[count, 3]``."""
    state, parts = found.init(), []
    for _ in range(count):
        rows, moved = found.order.next(state)
        state |= moved
        parts.append(found.value_and_grad(Z, found.batch(state, rows))[1][0])
    return torch.stack(parts)


def anchor(name: str) -> Tensor:
    """The pull of the anchored member's prior mean, which the seed decides and the rows do not."""
    found = engine(name, conjugate().data, None)
    anchors = found.anchors if isinstance(found, EnsembleEngine) else None
    return torch.zeros(3, dtype=torch.float64) if anchors is None else anchors[0] / conjugate().prior


@pytest.mark.parametrize("name", ENGINES)
def test_an_epochs_mini_batches_average_to_the_gradient_of_all_rows(name: str) -> None:
    case = conjugate()
    exact = case.x.T @ (case.y - case.x @ Z[0]) / case.sigma**2 - Z[0] / case.prior**2 + anchor(name)
    for size in (None, 10, 30):
        torch.testing.assert_close(gradients(engine(name, case.data, size), 60 // (size or 60)).mean(0), exact)


@pytest.mark.parametrize("name", ENGINES)
def test_rows_that_are_there_twice_count_twice_and_the_prior_once(name: str) -> None:
    case = conjugate()
    prior = -Z[0] / case.prior**2 + anchor(name)
    once = gradients(engine(name, case.data, None), 1)[0]
    twice = (case.x.repeat(2, 1), case.y.repeat(2))
    for size in (None, 40):
        mean = gradients(engine(name, twice, size), 120 // (size or 120)).mean(0)
        torch.testing.assert_close(mean - prior, 2 * (once - prior))


@pytest.mark.parametrize(
    "method",
    [
        bdl.MCDropout(steps=20),
        bdl.SWAG(steps=20, batch_size=7, snapshots=5, members=2),
        bdl.SVGD(steps=20, particles=3),
        bdl.SnapshotEnsemble(steps=20, cycles=2),
    ],
    ids=lambda method: method.name,
)
def test_rows_that_were_held_out_certify(method: Any) -> None:
    data = dataset("binary")
    posterior = bdl.fit(network("binary", dropout=0.2), data[:20], method)
    assert posterior.kl() is None
    certificate = certify(posterior, data[20:])
    assert certificate.n == 12
    assert certificate.errors == int((posterior.predict(data[20:].x).labels != data[20:].y).sum())


def test_a_swag_gaussian_knows_its_divergence_from_the_prior() -> None:
    data = dataset("binary")
    pair = (data.x - data.x.mean(0)) / data.x.std(0), data.y
    method = bdl.SWAG(steps=60, batch_size=8, snapshots=20, rank=5)
    posterior = bdl.fit(network("binary"), pair, method)
    kl = posterior.kl()
    assert kl is not None
    assert kl > 0
    law, prior = posterior.law, posterior.problem.density.gaussian_prior()  # type: ignore[attr-defined]
    ours = torch.distributions.MultivariateNormal(law.mean, law.covariance.dense())
    theirs = torch.distributions.MultivariateNormal(prior[0], torch.diag(prior[1] ** 2))
    assert kl == pytest.approx(float(torch.distributions.kl_divergence(ours, theirs)), rel=1e-6)
