"""Machine code gives the program's numbers, is made only where it pays, and is never missed where it cannot be made."""

from __future__ import annotations

import math
import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl.density import LogDensity, approximations, forecast, graph, layout
from bayesdl.density.evaluator import disagreement
from tests.density.programs import CASES


def _program(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A network with two hidden layers of five units."""
    zero, hidden = x.new_zeros(()), x
    for layer, (inputs, outputs) in enumerate(((3, 5), (5, 5), (5, 1))):
        w = pyro.sample(f"w{layer}", dist.Normal(zero, 1.0).expand([outputs, inputs]).to_event(2))
        b = pyro.sample(f"b{layer}", dist.Normal(zero, 1.0).expand([outputs]).to_event(1))
        hidden = torch.nn.functional.linear(hidden if layer == 0 else hidden.tanh(), w, b)
    noise = pyro.sample("noise", dist.HalfNormal(zero + 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(hidden.squeeze(-1), noise), obs=y)


def _network(execution: str = "auto", dtype: torch.dtype = torch.float32) -> LogDensity:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return LogDensity(_program, {"x": x, "y": x.sum(1).tanh()}, execution=execution)


def _close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    tight = 1e-10 if want[0].dtype == torch.float64 else 2e-5
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tight, atol=tight * float(b.abs().max()))


@pytest.fixture(scope="module")
def network() -> LogDensity:
    """One compiled network for the tests below; compiling is what takes their time."""
    density = _network("compile")
    density.value_and_grad(density.prior_draws(3))
    return density


def test_network(network: LogDensity) -> None:
    z = network.prior_draws(3, seed=1)
    assert network.execution == "compile"
    got = network.value_and_grad(z)
    _close(got, _network("handlers").value_and_grad(z))
    for a, b in zip(got, network.value_and_grad(z.T.contiguous().T), strict=True):
        assert torch.equal(a, b)  # the order in memory of what comes in does not matter


def test_data_that_change_in_place_or_by_name_are_seen(network: LogDensity) -> None:
    z = network.prior_draws(3, seed=1)
    before = dict(network.batch)
    try:
        changed = {"x": before["x"].clone(), "y": before["y"].clone()}
        network.batch = changed
        first = network.value_and_grad(z)[0]
        changed["y"].mul_(2.0)
        second = network.value_and_grad(z)[0]
        assert not torch.equal(first, second)
        assert torch.equal(second, network.with_batch({**before, "y": before["y"] * 2.0}).value_and_grad(z)[0])
    finally:
        network.batch = before
    assert torch.equal(first, network.value_and_grad(z)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_programs(name: str) -> None:
    case = CASES[name]
    z = torch.randn(5, LogDensity(case.model, case.batch).dim, dtype=torch.float64)
    density = LogDensity(case.model, case.batch, temperature=2.0, execution="compile")
    got = density.value_and_grad(z)
    assert density.execution == "compile", density.execution_note
    _close(got, LogDensity(case.model, case.batch, temperature=2.0, execution="handlers").value_and_grad(z))


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_minibatches(own: bool) -> None:
    density, slow = _network("compile"), _network("handlers")
    z = density.prior_draws(4, seed=2)
    for first in (0, 3):
        rows = torch.arange(first, first + 8)
        index = torch.stack([rows, rows + 1, rows + 2, rows + 9]) if own else rows
        batch = {name: value[index] for name, value in density.batch.items()}
        _close(density.value_and_grad(z, batch, per_chain=own), slow.value_and_grad(z, batch, per_chain=own))
    assert density.execution == "compile"


@pytest.mark.parametrize("own", [False, True])
def test_blocks_of_chains_are_the_chains(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """Seven chains in blocks of three: the last block overlaps the one before."""
    monkeypatch.setattr(forecast, "block", lambda chains, largest, dtype: min(3, chains))
    density, slow = _network("replay"), _network("handlers")
    z = density.prior_draws(7, seed=3)
    batch = {name: torch.stack([value.roll(k, 0) for k in range(7)]) for name, value in density.batch.items()}
    given: dict[str, Any] = {"batch": batch, "per_chain": True} if own else {}
    _close(density.value_and_grad(z, **given), slow.value_and_grad(z, **given))


def test_block_sizes() -> None:
    chains, numbers = 64, 442 * 50
    size = forecast.block(chains, chains * numbers, torch.float32)
    assert size * numbers * 4 <= forecast.BLOCK_BYTES * torch.get_num_threads()
    assert forecast.block(chains, chains * 8, torch.float32) == chains
    assert forecast.block(2, 2**40, torch.float32) == 1


def test_rational_tanh() -> None:
    """To three units in the last place everywhere, 1 at the ends, NaN kept, and never beyond 1."""
    graph = torch.fx.Graph()
    graph.output(approximations.tanh(graph, graph.placeholder("x")))
    tanh = torch.fx.GraphModule(torch.nn.Module(), graph)
    x = torch.cat([torch.logspace(-30, 1.2, 200001), torch.linspace(0, 10, 200001)])
    want = torch.tanh(x.double())
    got = tanh(x)
    assert float((got / want - 1).abs().nan_to_num().max()) < 4.5e-7
    assert torch.equal(tanh(-x), -got)
    assert float(got.max()) == 1.0
    assert tanh(torch.tensor([math.inf, -math.inf])).tolist() == [1.0, -1.0]
    assert tanh(torch.tensor([math.nan])).isnan().all()


def test_rational_log_sigmoid() -> None:
    """As near to the truth as float32 can be, with the right limits; and what its derivative reads."""
    nodes = torch.fx.Graph()
    nodes.output(approximations.log_sigmoid(nodes, nodes.placeholder("x")))
    function = torch.fx.GraphModule(torch.nn.Module(), nodes)
    x = torch.cat([torch.linspace(-100.0, 80.0, 200001), torch.logspace(-30, 1.9, 100001)])
    value, t = function(x)
    want = torch.nn.functional.logsigmoid(x.double())
    assert float((value / want - 1).abs().max()) < 4e-7
    torch.testing.assert_close(t, (-x.abs()).exp())
    assert function(torch.tensor([math.inf, -math.inf]))[0].tolist() == [0.0, -math.inf]
    assert function(torch.tensor([math.nan]))[0].isnan().all()


def test_a_compiled_bernoulli_uses_it() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> Tensor:
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)

    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    data = {"x": x, "y": (x[:, 0] > 0.0).float()}
    density = LogDensity(program, data, execution="compile")
    z = 5.0 * density.prior_draws(16)
    got = density.value_and_grad(z)
    assert density.execution == "compile", density.execution_note
    _close(got, LogDensity(program, data, execution="handlers").value_and_grad(z))


# -- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operations", "elements", "calls", "worth"),
    [
        (80, 800, 1_000, False),  # eight schools: 0.2 s saved, 6 s to compile
        (80, 800, 100_000, True),
        (100, 130_000, 5_000, False),  # the network on diabetes, one chain
        (100, 130_000, 50_000, True),
        (100, 8_000_000, 1_000, False),  # 64 chains
        (100, 8_000_000, 5_000, True),
        (4_847, 40_000, 5_000, False),  # GARCH: 100 s to compile
        (4_847, 40_000, 20_000, True),
    ],
)
def test_what_pays(operations: int, elements: int, calls: int, worth: bool) -> None:
    assert forecast.pays(operations, elements, calls) is worth


def test_nothing_is_compiled_unless_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("bayesdl.density.blocks.compile_graph", refuse)
    density = _network()
    z = density.prior_draws(2)
    density.value_and_grad(z)
    assert density.execution == "replay"
    assert density.expect(100, z) == "replay"
    with pytest.raises(AssertionError):
        density.expect(10**9, z)
    assert _network("replay").expect(10**9, z) == "replay"
    assert density.expect(10**9, z, execution="handlers") == "handlers"


def test_what_is_expected_settles_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of other shapes, asked for in passing, are replayed and do not change what the run is said to do."""
    monkeypatch.setattr("bayesdl.density.blocks.compile_graph", lambda graph, inputs: graph)
    density = _network()
    assert density.expect(10**9, density.prior_draws(2)) == "compile"
    want = density.value_and_grad(density.prior_draws(1), target="joint")
    assert density.execution == "compile"
    _close(want, _network("handlers").value_and_grad(density.prior_draws(1), target="joint"))


def _broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no C++ compiler\nand more")


def _wrong(graph: Any, inputs: Any) -> Any:
    return lambda *given: tuple(1.01 * part for part in graph(*given))


@pytest.mark.parametrize(("target", "instead", "note"), [
    ("torch._inductor.compile", _broken, "RuntimeError: no C\\+\\+ compiler$"),
    ("bayesdl.density.blocks.compile_graph", _wrong, "value differs from the program's"),
])  # fmt: skip
def test_a_compiler_that_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, target: str, instead: Any, note: str
) -> None:
    monkeypatch.setattr(target, instead)
    density = _network()
    z = density.prior_draws(2)
    assert density.expect(10**9, z) == "replay"
    assert re.search(note, density.execution_note)
    _close(density.value_and_grad(z), _network("handlers").value_and_grad(z))


# -- the graph -----------------------------------------------------------------------------------------------------


def test_what_depends_on_the_data_alone_is_computed_once() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)

    data = {"x": torch.randn(6, 3, dtype=torch.float64), "y": torch.tensor([0, 1, 5, 2, 1, 3], dtype=torch.float64)}
    density = LogDensity(model, data)
    z = density.prior_draws(2)
    _close(density.value_and_grad(z), LogDensity(model, data, execution="handlers").value_and_grad(z))
    (found,) = density._evaluators.values()
    assert "lgamma.default" in found.function.before.code
    assert "lgamma.default" not in found.function.graph.code


def test_a_recursion_by_doubling_is_not_written_out() -> None:
    def program(y: Tensor) -> None:
        factor = pyro.sample("factor", dist.Uniform(torch.zeros((), dtype=torch.float64), 1.0))
        values, power, shift = y, factor, 1
        while shift < len(y):
            values = values + power * torch.nn.functional.pad(values[:-shift], (shift, 0))
            power, shift = power * power, 2 * shift
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(values, 1.0), obs=y)

    density = LogDensity(program, {"y": torch.linspace(0.0, 1.0, 300, dtype=torch.float64)})
    assert density.expect(10**9, torch.zeros(2, 1, dtype=torch.float64)) == "replay"
    assert "written out" in density.execution_note


def test_a_bernoulli_is_written_with_one_exponential() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> Tensor:
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 100.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)

    x = torch.linspace(-3.0, 3.0, 8, dtype=torch.float64)
    data, z = {"x": x, "y": (x > 0.5).double()}, torch.tensor([[1e-3], [2.0], [-40.0], [300.0]], dtype=torch.float64)
    density = LogDensity(program, data)
    _close(density.value_and_grad(z), LogDensity(program, data, execution="handlers").value_and_grad(z))
    (found,) = density._evaluators.values()
    assert "log_sigmoid_forward" in found.function.graph.code
    assert "exp" not in found.function.graph.code.replace("expand", "")


def test_products_are_turned_so_that_rows_fill_registers() -> None:
    def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a @ b, b.T @ a.T

    given = torch.randn(32, 7), torch.randn(7, 5)
    recorded = graph.record(product, given)
    want = recorded(*given)
    layout.fill_registers(recorded)
    recorded.recompile()
    for a, b in zip(recorded(*given), want, strict=True):
        torch.testing.assert_close(a, b)
    assert "mm" in recorded.code
    assert all(node.meta["val"].shape == (5, 32) for node in recorded.graph.nodes if "mm" in str(node.target))


@pytest.mark.parametrize(("error", "found_out"), [(0.02, False), (500.0, True)])
def test_rounding_at_a_mode_is_no_mismatch(error: float, found_out: bool) -> None:
    """There the gradient is a small difference of large numbers, so an error that rounding explains looks large."""

    def program(z: Tensor) -> tuple[Tensor, Tensor]:
        return 5e5 * z.square().sum(1), 1e6 * z

    def graph(z: Tensor) -> tuple[Tensor, Tensor]:
        return 5e5 * z.square().sum(1), 1e6 * z + error

    assert bool(disagreement(graph, program, (torch.zeros(1, 3),))) == found_out
