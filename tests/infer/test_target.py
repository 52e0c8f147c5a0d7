"""Steps of a sampler that are compiled together with the gradient inside: the same numbers, and no more work."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, fx

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.density import LogDensity, forecast
from bayesdl.density.compiled import CompilerFailure
from bayesdl.infer.hamiltonian import leapfrog
from bayesdl.infer.metric import RANK, Metric, Shape
from bayesdl.infer.microcanonical import LangevinStep
from bayesdl.infer.target import Target, advance, gradient_at, value_at

DOUBLE, CHAINS = torch.float64, 6
COMPILER = "bayesdl.density.blocks.compile_graph"


def program(x: Tensor, y: Tensor | None = None) -> None:
    """A regression with an unknown noise level."""
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(3, dtype=DOUBLE), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones((), dtype=DOUBLE)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ slopes).tanh(), noise), obs=y)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=generator(seed, "target"))


def density(**settings: Any) -> LogDensity:
    x = normals(20, 3)
    return LogDensity(program, {"x": x, "y": x.sum(1).tanh() + 0.1 * normals(20, seed=1)}, **settings)


def metric(shape: Shape, groups: int) -> Metric:
    """Nothing is 1, so that every part matters."""
    scale = 0.5 + normals(groups, 4, seed=2).square()
    if shape == "diag":
        return Metric(scale)
    if shape == "dense":
        return Metric(
            torch.ones_like(scale), torch.linalg.cholesky(torch.eye(4, dtype=DOUBLE) + 0.5)[None].contiguous()
        )
    directions = torch.zeros(groups, 4, RANK, dtype=DOUBLE)
    directions[:, :2, 0] = 0.5**0.5
    return Metric(scale, None, directions, torch.linspace(2.0, 1.0, RANK, dtype=DOUBLE).expand(groups, -1))


def start() -> tuple[Tensor, ...]:
    return (
        normals(CHAINS, 4, seed=3),
        normals(CHAINS, 4, seed=4),
        normals(CHAINS, 4, seed=5),
        torch.full((CHAINS, 1), 0.1),
    )


@pytest.mark.parametrize(("shape", "groups"), [("diag", 1), ("dense", 1), ("low_rank", 1), ("diag", 3)])
def test_a_compiled_step_is_the_step(shape: Shape, groups: int) -> None:
    rows = None
    if groups > 1:
        rows = {"y": normals(groups, 20, seed=6).repeat_interleave(CHAINS // groups, 0)}
    found, given = density(), start()
    assert found.expect(10**9, given[0], rows, per_chain=rows is not None, fused=True) == "compile"
    got = advance(leapfrog, Target(metric(shape, groups), found, rows), *given)
    assert found.execution == "compile", found.execution_note
    want = advance(leapfrog, Target(metric(shape, groups), density(), rows), *given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # another metric, whose parts have another order in memory
    turned = {name: part.mT.contiguous().mT for name, part in metric(shape, groups).parts().items()}
    for a, b in zip(advance(leapfrog, Target(Metric(**turned), found, rows), *given), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What the compiler is given; it is then replayed."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        found.append(graph)
        return graph

    monkeypatch.setattr(COMPILER, keep)
    return found


def test_blocks_of_chains_are_put_together(graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 of 6 chains: the second overlaps the first."""
    monkeypatch.setattr(forecast, "block", lambda chains, *_: min(chains, 4))
    rows = {"y": normals(CHAINS, 20, seed=6)}
    found = density()
    z, direction, grad, step = start()
    found.expect(10**9, z, rows, per_chain=True, fused=True)
    value, normal = normals(CHAINS, seed=7), normals(CHAINS, 4, seed=8)
    heading, sums, length = (
        direction / direction.norm(dim=1, keepdim=True),
        torch.zeros_like(value),
        torch.ones_like(step),
    )
    given = (z, heading, value, grad, sums, sums, step, length, normal)
    for integrator in ("leapfrog", "minimal_norm"):
        move = LangevinStep(integrator)
        got = advance(move, Target(metric("diag", CHAINS), found, rows), *given)
        want = advance(move, Target(metric("diag", CHAINS), density(execution="handlers"), rows), *given)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert len(graphs) == 2


def test_every_step_is_compiled_once_and_counted(graphs: list[fx.GraphModule]) -> None:
    found = density()
    z, p, grad, step = start()
    found.expect(10**9, z, fused=True)
    before = found.gradients
    for scale in (1.0, 2.0):
        target = Target(Metric(torch.full((1, 4), scale, dtype=DOUBLE)), found, None)
        for _ in range(3):
            advance(leapfrog, target, z, p, grad, step)
    assert len(graphs) == 1
    assert found.gradients - before == 6 * CHAINS
    target(z)  # a gradient alone is replayed
    assert len(graphs) == 1


def test_the_value_alone_is_computed_without_the_gradient(graphs: list[fx.GraphModule]) -> None:
    found, z = density(), start()[0]
    found.expect(10**9, z, fused=True)
    target = Target(metric("diag", 1), found, None)
    both, (value,) = advance(gradient_at, target, z), advance(value_at, target, z)
    torch.testing.assert_close(value, both[0], rtol=0.0, atol=0.0)
    whole, part = (len(graph.graph.nodes) for graph in graphs)
    assert part < 0.7 * whole


def test_where_the_compiler_fails_a_run_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise CompilerFailure("no compiler here")

    def run() -> Any:
        return bdl.NUTS(chains=2, warmup=30, draws=10).fit(program, density().batch, seed=0, progress=False)

    plain = run()
    monkeypatch.setattr(forecast, "pays", lambda *_: True)
    monkeypatch.setattr(COMPILER, refuse)
    refused = run()
    assert plain.info["execution"] == refused.info["execution"] == "replay"
    assert "no compiler here" in refused.problem.density.execution_note
    assert torch.equal(plain.z, refused.z)


def test_a_step_that_is_compiled_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPILER, lambda graph, inputs: lambda *given: [1.01 * part for part in graph(*given)])
    found = density()
    given = start()
    found.expect(10**9, given[0], fused=True)
    advance(leapfrog, Target(metric("diag", 1), found, None), *given)
    assert found.execution == "replay"
    assert "compiled step's" in found.execution_note
