"""Finite Markov chains: classes, periods, invariant laws, reversal, Metropolis-Hastings, and KL along a chain.

Throughout ``P[i, j] = P(next = j | now = i)``: rows sum to one, and a law moves by the transpose, ``pi' = P^T pi``.
Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csgraph
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import DataError, ModelError

SUM_TOLERANCE = 1e-6
"""How far probabilities may be from summing to one; within it they are normalised."""


@dataclass(frozen=True, eq=False)
class FiniteChain:
    r"""A Markov chain on the states 0, ..., n-1.

    Every such chain has an invariant law, one for each recurrent class. Irreducibility is enough for there to be only
    one; for the laws to converge to it from every start the chain must be aperiodic besides.

    Args:
        P: Transition matrix ``[n, n]``; entries that are exactly zero are impossible transitions.

    Raises:
        DataError: P is not square, or a row is no probability distribution.
    """

    P: Tensor

    def __post_init__(self) -> None:
        """Check and normalise the rows."""
        P = _laws(self.P, "P")
        if P.dim() != 2 or P.shape[0] != P.shape[1]:
            raise DataError(f"P must be a square matrix of transition probabilities; it has shape {tuple(P.shape)}.")
        object.__setattr__(self, "P", P)

    @property
    def n(self) -> int:
        """Number of states."""
        return len(self.P)

    # -- structure ---------------------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """Communicating classes: states that can be reached from each other, ordered by their first state."""
        _, labels = csgraph.connected_components(self._graph, directed=True, connection="strong")
        members = [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
        return tuple(sorted(members))

    @cached_property
    def recurrent_classes(self) -> tuple[tuple[int, ...], ...]:
        """Classes that no transition leaves; the states of all others are transient."""
        return tuple(c for c in self.classes if not np.delete(self._graph[list(c)], c, axis=1).any())

    @property
    def irreducible(self) -> bool:
        """Whether every state can be reached from every other one."""
        return len(self.classes) == 1

    def period(self, state: int) -> int:
        """Greatest common divisor of the times at which a return to ``state`` is possible; 0 if there is none.

        All states of a class share it, and a state that may stay where it is has period 1. With d(i) the distance from
        the state, it is the gcd of d(i) + 1 - d(j) over the transitions i -> j inside the class.
        """
        inside = np.array(next(c for c in self.classes if state in c))
        graph = self._graph[np.ix_(inside, inside)]
        distance = csgraph.shortest_path(graph, unweighted=True, indices=int(np.flatnonzero(inside == state)[0]))
        now, after = graph.nonzero()
        return int(np.gcd.reduce(np.abs(distance[now] + 1 - distance[after]).astype(np.int64), initial=0))

    @property
    def converges(self) -> bool:
        """Whether the laws tend to one and the same invariant law from every start."""
        return len(self.recurrent_classes) == 1 and self.period(self.recurrent_classes[0][0]) == 1

    @cached_property
    def rate(self) -> float:
        """Second largest modulus of the eigenvalues of P: distances to the invariant law fall like rate^t, or less."""
        return float(torch.linalg.eigvals(self.P).abs().sort().values[-2]) if self.n > 1 else 0.0

    # -- laws --------------------------------------------------------------------------------------------------

    def power(self, t: int) -> Tensor:
        """The t-step matrix ``P^t [n, n]``: entry (i, j) is P(state j after t steps | state i)."""
        return torch.linalg.matrix_power(self.P, t)

    def laws(self, start: Tensor, steps: int) -> Tensor:
        """The laws ``[steps + 1, n]`` after 0, 1, ..., ``steps`` steps from the law ``start [n]``."""
        found = [_laws(start, "start", self.n)]
        for _ in range(steps):
            found.append(self.P.T @ found[-1])
        return torch.stack(found)

    @cached_property
    def invariant_laws(self) -> Tensor:
        """The extreme invariant laws ``[R, n]``, one for each recurrent class; all others are mixtures of them.

        They span the null space of ``P^T - I``, whose balance equations have rank n - R: normalisation is not among
        them, it is one equation more. Solved by the elimination of Grassmann, Taksar & Heyman (1985), which subtracts
        nothing, so that every entry, however small, is right to a few roundings. Cost O(n^3).
        """
        found = self.P.new_zeros(len(self.recurrent_classes), self.n)
        for law, members in zip(found, self.recurrent_classes, strict=True):
            inside = torch.tensor(members)
            law[inside] = _eliminate(self.P[inside][:, inside])
        return found

    @property
    def invariant_law(self) -> Tensor:
        """The invariant law ``[n]``.

        Raises:
            ModelError: there are several.
        """
        if len(self.recurrent_classes) > 1:
            raise ModelError(
                f"The chain has {len(self.recurrent_classes)} recurrent classes, {self.recurrent_classes}, each with "
                "an invariant law of its own: see invariant_laws, or long_run(start) for where a start leads."
            )
        return self.invariant_laws[0]

    def long_run(self, start: Tensor) -> Tensor:
        """Share of time ``[n]`` that the chain spends in each state in the long run, from the law ``start [n]``.

        The time average of the laws, ``lim (1/T) sum_t pi_t``. It exists for every chain: periodic ones, whose laws do
        not converge, and those with several recurrent classes, which are entered with their absorption probabilities.
        """
        law = _laws(start, "start", self.n)
        members = torch.zeros(len(self.recurrent_classes), self.n, dtype=law.dtype)
        for row, states in zip(members, self.recurrent_classes, strict=True):
            row[list(states)] = 1.0
        transient = members.sum(0) == 0
        entered = members @ law
        if transient.any():
            inner = torch.eye(int(transient.sum()), dtype=law.dtype) - self.P[transient][:, transient]
            entered = entered + law[transient] @ torch.linalg.solve(inner, self.P[transient] @ members.T)
        return entered @ self.invariant_laws

    # -- runs --------------------------------------------------------------------------------------------------

    def paths(self, steps: int, *, start: Tensor, chains: int = 1, seed: int = 0) -> Tensor:
        """Simulate: states ``[chains, steps + 1]`` (int64) from states drawn from the law ``start [n]``."""
        stream = generator(seed, "finite chain")
        # Divided by its own last entry, the sum is exactly 1 from the last possible state on: no other can be drawn.
        cumulative = self.P.cumsum(1) / self.P.sum(1, keepdim=True)
        first = _laws(start, "start", self.n).cumsum(0)
        found = torch.empty(chains, steps + 1, dtype=torch.int64)
        uniform = torch.rand(chains, generator=stream, dtype=torch.float64)
        found[:, 0] = torch.searchsorted(first / first[-1], uniform, right=True)
        for t in range(steps):
            uniform = torch.rand(chains, 1, generator=stream, dtype=torch.float64)
            found[:, t + 1] = torch.searchsorted(cumulative[found[:, t]], uniform, right=True)[:, 0]
        return found

    def occupancy(self, steps: int, *, start: Tensor, chains: int = 1, seed: int = 0) -> Tensor:
        """Share of the states after step 0 of simulated paths that are each state, ``[chains, n]``."""
        paths = self.paths(steps, start=start, chains=chains, seed=seed)[:, 1:]
        return torch.stack([(paths == state).double().mean(1) for state in range(self.n)], dim=1)

    # -- time backwards ----------------------------------------------------------------------------------------

    def reverse(self) -> FiniteChain:
        r"""The same stationary chain with time running backwards, ``P^rev = diag(pi)^-1 P^T diag(pi)``.

        .. math:: P^{rev}_{ij} = P(w_t = j \mid w_{t+1} = i) = \pi_j P_{ji} / \pi_i

        Rows are indexed by the later state. It exists whenever the invariant law is positive; the chain is called
        reversible only if it equals P.

        Raises:
            ModelError: there are several invariant laws, or states without mass.
        """
        law = self.invariant_law
        if not (law > 0).all():
            raise ModelError("Transient states have no mass under the invariant law: there is no time backwards there.")
        return FiniteChain(self.P.T * law / law[:, None])

    def detailed_balance_violation(self, law: Tensor | None = None) -> float:
        """Largest ``|pi_i P_ij - pi_j P_ji|``; 0 for a reversible chain. ``law`` is the invariant one if None.

        Zero makes ``law`` invariant. It does not make it the only invariant law (irreducibility does), nor the chain
        converge to it (aperiodicity does).
        """
        flow = (self.invariant_law if law is None else _laws(law, "law", self.n))[:, None] * self.P
        return float((flow - flow.T).abs().max())

    @cached_property
    def _graph(self) -> NDArray[np.bool_]:
        return (self.P > 0).numpy()


def metropolis_hastings(target: Tensor, proposal: Tensor) -> FiniteChain:
    r"""The Metropolis-Hastings chain on a finite space (Hastings, 1970).

    .. math:: \alpha(j \mid i) = \min\{1, \pi_j Q_{ji} / (\pi_i Q_{ij})\}, \qquad P_{ij} = Q_{ij} \alpha(j \mid i)

    for j other than i. What is rejected stays: a rejected step counts the old state once more, so ``P_ii`` takes the
    rest of the row. The flow ``pi_i P_ij = min(pi_i Q_ij, pi_j Q_ji)`` is symmetric, which is detailed balance.

    Args:
        target: Positive weights ``[n]``, normalised or not.
        proposal: Proposal probabilities ``[n, n]``, ``Q[i, j]`` from i to j.

    Raises:
        DataError: a weight is not a positive number, or a row of the proposal is no probability distribution.
    """
    Q = FiniteChain(proposal).P
    weights = torch.as_tensor(target, dtype=torch.float64)
    if weights.shape != Q.shape[:1] or not ((weights > 0) & weights.isfinite()).all():
        raise DataError(f"target must be {len(Q)} positive weights, one for each state of the proposal.")
    flow = weights[:, None] * Q
    P = torch.minimum(flow, flow.T) / weights[:, None]
    P.fill_diagonal_(0.0)
    return FiniteChain(P + torch.diag((1.0 - P.sum(1)).clamp(min=0.0)))


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of laws on a finite set, in nats.

    .. math:: KL(p \| q) = \sum_i p_i \log (p_i / q_i), \qquad 0 \log 0 = 0

    Infinite where q has no mass and p has. For densities pass the masses of the cells of a grid. Along a Markov chain
    with invariant law pi neither ``KL(pi || pi_t)`` nor ``KL(pi_t || pi)`` ever increases, reversible or not.

    Args:
        p: ``[..., n]``, each row a law.
        q: ``[..., n]``; the two broadcast.

    Returns:
        ``[...]``, never negative: summed as ``p log(p/q) - p + q``, whose terms are not, and relative to p where the
        two are close, so that a divergence of 1e-20 still has correct digits.

    Raises:
        DataError: a row is no probability distribution.
    """
    p, q = torch.broadcast_tensors(_laws(p, "p"), _laws(q, "q"))
    close = (q - p).abs() < 0.5 * p
    relative = torch.where(close, (q - p) / p, torch.zeros_like(p))
    near = p * (relative - relative.log1p())
    far = torch.special.xlogy(p, p) - torch.special.xlogy(p, q) - p + q
    return torch.where(close, near, far).clamp(min=0.0).sum(-1)


def _laws(values: Tensor, what: str, n: int | None = None) -> Tensor:
    """Rows of probabilities as float64 on the CPU, normalised.

    Raises:
        DataError: they are none.
    """
    rows = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if rows.dim() == 0 or (n is not None and rows.shape != (n,)):
        raise DataError(f"{what} must hold a probability for each of the states; it has shape {tuple(rows.shape)}.")
    total = rows.sum(-1, keepdim=True)
    # Written so that NaN fails.
    if not ((rows >= 0).all() and ((total - 1).abs() < SUM_TOLERANCE).all()):
        raise DataError(f"{what} must consist of probabilities: not negative, summing to one over the last dimension.")
    return rows / total


def _eliminate(P: Tensor) -> Tensor:
    """Invariant law of an irreducible matrix: states are removed one by one, the chain watched on the others."""
    A = P.clone()
    for k in range(len(A) - 1, 0, -1):
        A[:k, k] /= A[k, :k].sum()
        A[:k, :k] += torch.outer(A[:k, k], A[k, :k])
    law = torch.ones(len(A), dtype=A.dtype)
    for k in range(1, len(A)):
        law[k] = law[:k] @ A[:k, k]
    return law / law.sum()
