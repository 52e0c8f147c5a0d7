"""Gradient estimates from mini-batches: plain, or with a control variate (SAGA, SVRG) that takes noise out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.infer.checkpoint import State
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.kernel import ValueAndGrad
from bayesdl.infer.method import Work

OnRows = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Value ``[C]`` and gradient ``[C, D]`` at ``z [C, D]`` on the rows ``[C, B]``, or on all of them, with N/B in both."""
Gradient = Literal["plain", "saga", "svrg"]
GRADIENTS = get_args(Gradient)


@dataclass
class PlainGradient:
    """The function on the next mini-batch; also the base of the estimates with a control variate.

    Samplers give the log density in units of the prior's sd, optimisers their own objective.

    Attributes:
        order: the mini-batches.
        on_rows: the function and its gradient.
    """

    order: DataOrder
    on_rows: OnRows

    def init(self, state: State) -> State:
        """Entries of the state that hold for the positions ``state["z"]``, made anew whenever these jump."""
        return {}

    def estimate(self, state: State) -> tuple[Tensor, Tensor, ValueAndGrad]:
        """At ``state["z"]``: value ``[C]``, gradient ``[C, D]``, and the function on the mini-batch used.

        The new state is changed: the data order moves on, and what the estimate remembers.
        """
        function = self.next_batch(state)
        return *function(state["z"]), function

    def next_batch(self, state: State) -> ValueAndGrad:
        """The function on the next mini-batches; the data order in ``state`` moves on."""
        rows, moved = self.order.next(state)
        state.update(moved)
        return self.on(rows)

    def on(self, rows: Tensor | None) -> ValueAndGrad:
        """The function on the rows ``[C, B]``, or on all of them."""
        return lambda z: self.on_rows(z, rows)


@dataclass
class SVRG(PlainGradient):
    """Control variate at a snapshot (Johnson & Zhang, 2013; for samplers Dubey et al., 2016, algorithm 2).

    ``g_B(z) - g_B(s) + g(s)`` with s the chains' positions at the start of the epoch and g the gradient of all rows. A
    step costs two gradients on the batch, an epoch one of all rows; memory: two vectors ``[C, D]``.
    """

    def init(self, state: State) -> State:
        """No snapshot yet: the first step takes one."""
        return {"svrg.point": state["z"], "svrg.full": torch.zeros_like(state["z"]), "svrg.age": self.order.batches}

    def estimate(self, state: State) -> tuple[Tensor, Tensor, ValueAndGrad]:
        """See the base class."""
        if state["svrg.age"] >= self.order.batches:
            state.update({"svrg.point": state["z"], "svrg.full": self.on(None)(state["z"])[1], "svrg.age": 0})
        function = self.next_batch(state)
        value, gradient = function(state["z"])
        state["svrg.age"] += 1
        return value, gradient - function(state["svrg.point"])[1] + state["svrg.full"], function


@dataclass
class SAGA(PlainGradient):
    """Control variate from a table of the last gradient of every block of rows (Defazio et al., 2014).

    For samplers it is algorithm 1 of Dubey et al. (2016).

    The rows are split once, for every chain anew, into K = ceil(N/B) blocks of nearly equal size n_k; g_k is the
    gradient on block k with its factor N/n_k. A step draws k uniformly and takes

        ``K (n_k/N) (g_k(z) - table_k) + sum_j (n_j/N) table_j``

    which is unbiased given the table. One gradient a step; memory: K vectors ``[C, D]``.
    """

    def init(self, state: State) -> State:
        """Blocks, and their gradients at ``state["z"]``: one gradient per block."""
        n, chains = self.order.problem.n, len(state["z"])
        streams = [generator(self.order.seed, "member", k, "blocks") for k in range(chains)]
        rows = torch.stack([torch.randperm(n, generator=stream) for stream in streams])
        table = torch.stack([self.on(block)(state["z"])[1] for block in self._blocks(rows)], 1)
        return {
            "saga.rows": rows,
            "saga.table": table,
            "saga.mean": (table * self._shares(table)[:, None]).sum(1),
            "saga.last": 0,
            "saga.fresh": table[:, 0].clone(),
            "saga.blocks": state.get("saga.blocks") or generator(self.order.seed, "blocks"),
        }

    def estimate(self, state: State) -> tuple[Tensor, Tensor, ValueAndGrad]:
        """See the base class."""
        table, mean = state["saga.table"], state["saga.mean"]
        # The entry of the step before is written only now: doing it twice changes nothing, so a step that is cut off
        # after it can be forgotten, although the table is no copy.
        table[:, state["saga.last"]] = state["saga.fresh"]
        blocks = self._blocks(state["saga.rows"])
        k = int(torch.randint(len(blocks), (), generator=state["saga.blocks"]))
        function = self.on(blocks[k])
        value, fresh = function(state["z"])
        change = (fresh - table[:, k]) * (blocks[k].shape[1] / self.order.problem.n)
        state.update({"saga.last": k, "saga.fresh": fresh, "saga.mean": mean + change})
        return value, torch.add(mean, change, alpha=len(blocks)), function

    def _blocks(self, rows: Tensor) -> list[Tensor]:
        return list(rows.tensor_split(blocks_of(self.order.problem.n, self.order.size), dim=1))

    def _shares(self, like: Tensor) -> Tensor:
        sizes = [block.shape[1] for block in self._blocks(torch.empty(1, self.order.problem.n))]
        return torch.tensor(sizes, dtype=like.dtype, device=like.device) / self.order.problem.n


def blocks_of(rows: int, batch_size: int | None) -> int:
    """Blocks K of SAGA's table."""
    return -(-rows // (batch_size or rows))


def with_variate(work: Work, gradient: Gradient, rows: int, batch_size: int) -> Work:
    """What a fit with mini-batches evaluates and keeps, once its control variate is counted."""
    if gradient == "svrg":
        note = "counts three gradients a step: two on the batch, one of all rows an epoch"
        return replace(work, calls=3 * work.calls, note=note)
    if gradient == "saga":
        table = work.chains * blocks_of(rows, batch_size)
        return replace(work, draws=work.draws + table, note=f"memory includes SAGA's table of {table} gradients")
    return work


ESTIMATES: dict[str, Callable[[DataOrder, OnRows], PlainGradient]] = {
    "plain": PlainGradient,
    "svrg": SVRG,
    "saga": SAGA,
}
"""Gradient estimates by the name of the setting."""
