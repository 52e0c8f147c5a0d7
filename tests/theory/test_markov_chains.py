from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bayesdl.errors import DataError, ModelError
from bayesdl.posterior.convergence import mcse_mean
from bayesdl.theory.markov_chains import FiniteChain, kl_divergence, metropolis_hastings


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def point(n: int, state: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[state]


def random_matrix(n: int, stream: torch.Generator, zeros: float = 0.0) -> Tensor:
    """Rows of exponential weights, some of them zero; a cycle through all states keeps it irreducible."""
    weights = -torch.rand(n, n, generator=stream, dtype=torch.float64).log()
    weights = weights.masked_fill(torch.rand(n, n, generator=stream) < zeros, 0.0)
    weights += torch.eye(n, dtype=torch.float64).roll(1, 1)
    return weights / weights.sum(1, keepdim=True)


MOLE = FiniteChain(matrix([0.1, 0.4, 0.5], [0.4, 0.0, 0.6], [0.0, 0.6, 0.4]))
CLOCK = FiniteChain(torch.eye(12, dtype=torch.float64).roll(1, 1))
# 0 and 1 swap, 2 stays, 3 goes to either or back to itself, 4 never comes back to itself.
MIXED = FiniteChain(
    matrix([0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0.3, 0, 0.2, 0.5, 0], [0, 0, 0.5, 0.5, 0])
)
TARGET = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.15, 0.1], dtype=torch.float64)


def test_whack_the_mole_goes_through_the_known_laws():
    """C11-24, T26: the laws move by the transpose; P^t itself tends to rows of the invariant law."""
    laws = MOLE.laws(point(3, 0), 200)
    assert torch.allclose(laws[1:4], matrix([0.1, 0.4, 0.5], [0.17, 0.34, 0.49], [0.153, 0.362, 0.485]), atol=1e-15)
    exact = torch.tensor([3 / 19, 27 / 76, 37 / 76], dtype=torch.float64)
    assert torch.allclose(MOLE.invariant_law, exact, rtol=1e-15)
    assert torch.allclose(laws[-1], exact, rtol=1e-14)
    # The power untransposed, applied to the first law, is no law: one entry of the invariant law three times.
    assert torch.allclose(MOLE.power(200) @ point(3, 0), exact[0].expand(3), rtol=1e-13)


def test_t_step_matrix_composes():
    """C11-23: P^(s+t) = P^s P^t, and row i is the law after t steps from i."""
    assert torch.allclose(MOLE.power(7), MOLE.power(3) @ MOLE.power(4), rtol=1e-14)
    assert torch.allclose(MOLE.power(5)[1], MOLE.laws(point(3, 1), 5)[-1], rtol=1e-14)


def test_classes_recurrence_and_periods():
    """C11-23, T26: the period is the gcd of the return times, not a time whose every multiple is one."""
    assert MOLE.irreducible
    assert MIXED.classes == ((0, 1), (2,), (3,), (4,))
    assert MIXED.recurrent_classes == ((0, 1), (2,))
    assert [MIXED.period(state) for state in range(5)] == [2, 2, 1, 1, 0]
    assert CLOCK.period(3) == 12
    # Returns after 4 and after 6 steps: period 2, although a return after 2 is impossible.
    P = torch.zeros(9, 9, dtype=torch.float64)
    for state, after in ((1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 8), (8, 0)):
        P[state, after] = 1.0
    P[0, 1] = P[0, 4] = 0.5
    chain = FiniteChain(P)
    assert chain.irreducible
    assert {chain.period(state) for state in range(9)} == {2}
    assert chain.power(2)[0, 0] == 0
    assert chain.power(4)[0, 0] > 0


def returns(chain: FiniteChain, state: int) -> int:
    """The period by its definition, from the return times up to three times the number of states squared."""
    reach, found = chain.P > 0, 0
    times = reach.clone()
    for t in range(1, 3 * chain.n**2):
        if times[state, state]:
            found = math.gcd(found, t)
        times = (times.double() @ reach.double()) > 0
    return found


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_structure_equals_its_definition(n, seed):
    """C11-23: classes from reachability, periods from return times, on random sparse graphs."""
    stream = torch.Generator().manual_seed(seed)
    edges = torch.rand(n, n, generator=stream) < 1.4 / n
    edges[edges.sum(1) == 0, 0] = True
    chain = FiniteChain(edges.double() / edges.sum(1, keepdim=True))
    reach = torch.linalg.matrix_power(edges.double() + torch.eye(n, dtype=torch.float64), n) > 0
    together = reach & reach.T
    assert set(chain.classes) == {tuple(row.nonzero()[:, 0].tolist()) for row in together}
    closed = {tuple(together[i].nonzero()[:, 0].tolist()) for i in range(n) if not (reach[i] & ~together[i]).any()}
    assert set(chain.recurrent_classes) == closed
    for state in range(n):
        assert chain.period(state) == returns(chain, state)


def test_invariant_law_exists_always_is_unique_if_irreducible_and_a_limit_if_aperiodic():
    """C11-23, T26: the three statements are different."""
    # Irreducible and periodic: one invariant law, but no convergence.
    assert CLOCK.irreducible
    assert not CLOCK.converges
    assert torch.allclose(CLOCK.invariant_law, torch.full((12,), 1 / 12, dtype=torch.float64))
    assert torch.equal(CLOCK.laws(point(12, 5), 120)[-1], point(12, 5))
    # Two recurrent classes: an invariant law each, and none that could be called the law.
    expected = matrix([0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0])
    assert torch.allclose(MIXED.invariant_laws, expected)
    with pytest.raises(ModelError, match=r"2 recurrent classes, \(\(0, 1\), \(2,\)\)"):
        _ = MIXED.invariant_law
    # Not irreducible, yet unique and convergent: one recurrent class is enough.
    absorbing = FiniteChain(matrix([0.5, 0.5], [0.0, 1.0]))
    assert not absorbing.irreducible
    assert absorbing.converges
    assert torch.equal(absorbing.invariant_law, point(2, 1))


def test_two_state_example_and_the_rank_of_its_balance_equations():
    """C11-25, T27: the balance equations are dependent; normalisation is not contained in them."""
    chain = FiniteChain(matrix([0.5, 0.5], [0.4, 0.6]))
    assert torch.allclose(chain.invariant_law, torch.tensor([4 / 9, 5 / 9], dtype=torch.float64), rtol=1e-15)
    balance = chain.P.T - torch.eye(2, dtype=torch.float64)
    assert torch.linalg.matrix_rank(balance) == 1
    assert torch.allclose(balance @ (7 * chain.invariant_law), torch.zeros(2, dtype=torch.float64), atol=1e-15)
    assert chain.rate == pytest.approx(0.1)
    for found in (MOLE, CLOCK, MIXED):
        rank = torch.linalg.matrix_rank(found.P.T - torch.eye(found.n, dtype=torch.float64))
        assert rank == found.n - len(found.recurrent_classes)


def test_invariant_law_spans_the_null_space():
    """C11-23: against the null space of the balance equations by singular values, on 200 random chains."""
    stream = torch.Generator().manual_seed(1)
    for _ in range(200):
        chain = FiniteChain(random_matrix(6, stream, zeros=0.4))
        null = torch.linalg.svd(chain.P.T - torch.eye(6, dtype=torch.float64)).Vh[-1]
        assert torch.allclose(chain.invariant_law, null / null.sum(), atol=1e-13)


def test_tiny_probabilities_of_the_invariant_law_keep_their_digits():
    """C11-23: a birth-death chain whose law spans 57 decimal orders; the null space loses all but the largest."""
    n, up = 20, 1e-3
    P = torch.zeros(n, n, dtype=torch.float64)
    P.diagonal(1).fill_(up)
    P.diagonal(-1).fill_(1 - up)
    P[0, 0], P[-1, -1] = 1 - up, up
    exact = (up / (1 - up)) ** torch.arange(n, dtype=torch.float64)
    assert torch.allclose(FiniteChain(P).invariant_law, exact / exact.sum(), rtol=1e-13, atol=0)
    null = torch.linalg.svd(P.T - torch.eye(n, dtype=torch.float64)).Vh[-1]
    assert not torch.allclose(null / null.sum(), exact / exact.sum(), rtol=1e-2, atol=0)


def test_invariant_law_of_a_chain_that_hardly_moves():
    """C11-23: with rates of 1e-14, 1 - P_ii has no correct digit left; the rates themselves have all of theirs."""
    P = matrix([1.0, 1e-14, 0.0], [3e-15, 1.0, 2e-14], [0.0, 7e-15, 1.0])
    weights = torch.tensor([1.0, 10 / 3, 10 / 3 * 20 / 7], dtype=torch.float64)
    assert torch.allclose(FiniteChain(P).invariant_law, weights / weights.sum(), rtol=1e-13)


def test_visits_have_the_frequencies_of_the_invariant_law():
    """C11-26: occupancy within Monte-Carlo error, for a convergent and for a periodic chain."""
    for chain in (MOLE, FiniteChain(matrix([0, 1, 0], [0.3, 0, 0.7], [0, 1, 0]))):
        paths = chain.paths(4000, start=point(3, 0), chains=8, seed=2)
        visits = (paths[:, 1:, None] == torch.arange(3)).double()
        shares = chain.occupancy(4000, start=point(3, 0), chains=8, seed=2)
        assert torch.equal(shares, visits.mean(1))
        error = mcse_mean(visits).clamp(
            min=1 / 8000
        )  # visits of a periodic chain's even states are exact but for the end
        assert (((shares.mean(0) - chain.invariant_law) / error).abs() < 4).all()


def test_paths_follow_the_matrix():
    """C11-23: the counts of transitions, and no impossible one."""
    paths = MOLE.paths(3000, start=torch.tensor([0.2, 0.5, 0.3]), chains=16, seed=0)
    counts = torch.zeros(3, 3, dtype=torch.float64)
    counts.index_put_(
        (paths[:, :-1].flatten(), paths[:, 1:].flatten()), torch.ones(48000, dtype=torch.float64), accumulate=True
    )
    assert (counts[MOLE.P == 0] == 0).all()
    total = counts.sum(1, keepdim=True)
    error = (MOLE.P * (1 - MOLE.P) / total).sqrt().clamp(min=1e-12)
    assert (((counts / total - MOLE.P) / error).abs() < 4).all()
    starts = MOLE.paths(0, start=torch.tensor([0.2, 0.5, 0.3]), chains=20000, seed=1)[:, 0]
    assert torch.allclose(starts.bincount() / 20000, torch.tensor([0.2, 0.5, 0.3]), atol=4 * 0.5 / 20000**0.5)


def test_long_run_exists_for_every_chain():
    """C11-26: the time average of the laws, with periods and with several recurrent classes."""
    for chain in (MOLE, CLOCK, MIXED):
        for state in range(chain.n):
            average = chain.laws(point(chain.n, state), 119)[-60:].mean(
                0
            )  # whole periods, once transients have died out
            assert torch.allclose(chain.long_run(point(chain.n, state)), average, atol=1e-12)
    assert torch.allclose(MIXED.long_run(point(5, 3)), torch.tensor([0.3, 0.3, 0.4, 0, 0], dtype=torch.float64))


def test_reverse_matrix_runs_time_backwards():
    """C11-35, T30: it exists for any stationary chain, has rows indexed by the later state, and keeps the law."""
    backwards = MOLE.reverse()
    law = MOLE.invariant_law
    joint = law[:, None] * MOLE.P  # P(now, next)
    assert torch.allclose(backwards.P, joint.T / joint.sum(0)[:, None], rtol=1e-14)
    assert torch.allclose(backwards.P.sum(1), torch.ones(3, dtype=torch.float64), rtol=1e-15)
    assert torch.allclose(backwards.invariant_law, law, rtol=1e-14)
    assert torch.allclose(backwards.reverse().P, MOLE.P, atol=1e-15)
    # The same definition with rows indexed by the earlier state has rows that do not sum to one.
    assert not torch.allclose(backwards.P.T.sum(1), torch.ones(3, dtype=torch.float64), atol=0.01)
    with pytest.raises(ModelError, match="no mass"):
        FiniteChain(matrix([0.5, 0.5], [0.0, 1.0])).reverse()


def test_reversible_means_detailed_balance_and_the_mole_is_not():
    """C11-35, T30: pi_1 P_13 = 0.079, pi_3 P_31 = 0."""
    law = MOLE.invariant_law
    assert law[0] * MOLE.P[0, 2] == pytest.approx(3 / 38)
    assert MOLE.P[2, 0] == 0
    assert MOLE.detailed_balance_violation() == pytest.approx(3 / 38)
    birth_death = FiniteChain(matrix([0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.6, 0.4]))
    assert birth_death.detailed_balance_violation() < 1e-16
    assert torch.allclose(birth_death.reverse().P, birth_death.P, atol=1e-15)


def test_kl_divergence_follows_the_support_rule():
    """C11-34: non-negative, zero only if equal, asymmetric, infinite exactly where q = 0 < p."""
    p, q = matrix([0.5, 0.5, 0.0]), matrix([0.2, 0.3, 0.5])
    assert float(kl_divergence(p, q)) == pytest.approx(0.5 * math.log(2.5) + 0.5 * math.log(5 / 3))
    assert float(kl_divergence(q, p)) == math.inf
    assert float(kl_divergence(p, p)) == 0
    stream = torch.Generator().manual_seed(0)
    laws = torch.stack([random_matrix(7, stream, zeros=0.2)[0] for _ in range(500)])
    pairs = kl_divergence(laws[:, None], laws)
    assert (pairs.diagonal() == 0).all()
    assert (pairs + torch.eye(500) > 0).all()
    assert torch.equal(pairs.isinf(), ((laws[:, None] > 0) & (laws == 0)).any(-1))
    assert not torch.allclose(pairs[:, 0].nan_to_num(posinf=9), pairs[0].nan_to_num(posinf=9))


def test_kl_divergence_keeps_its_digits_near_zero():
    """C11-34: sum (p - q)^2 / 2p, where p log(p/q) would be lost in rounding."""
    p = torch.full((4,), 0.25, dtype=torch.float64)
    shift = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64) * 2.0**-34
    assert float(kl_divergence(p, p + shift)) == pytest.approx(float((shift**2 / (2 * p)).sum()), rel=1e-6)
    assert float(kl_divergence(torch.tensor([1e-320, 1.0], dtype=torch.float64), matrix([0.5, 0.5]))) == pytest.approx(
        math.log(2)
    )


def test_kl_divergence_of_densities_is_that_of_their_masses():
    """C11-34: two Gaussians on a grid against the closed form."""
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    p, q = torch.distributions.Normal(0.3, 1.0), torch.distributions.Normal(-0.5, 1.4)
    masses = [d.log_prob(grid).exp() * (grid[1] - grid[0]) for d in (p, q)]
    exact = torch.distributions.kl_divergence(p, q)
    assert float(kl_divergence(*masses)) == pytest.approx(float(exact), rel=1e-5)


def test_kl_to_the_invariant_law_of_the_mole():
    """C11-36: .9647, .006435, .000192 from (.8, .1, .1); infinite at first from a point mass (T30)."""
    laws = MOLE.laws(torch.tensor([0.8, 0.1, 0.1]), 3)
    divergences = kl_divergence(MOLE.invariant_law, laws)
    assert divergences[:3].tolist() == pytest.approx([0.9647, 0.006435, 0.000192], rel=2e-3)
    from_point = kl_divergence(MOLE.invariant_law, MOLE.laws(point(3, 0), 5))
    assert from_point[0] == math.inf
    assert from_point[1:].isfinite().all()
    assert (from_point.diff() <= 0).all()


def test_kl_never_increases_along_2000_chains_that_are_not_reversible():
    """C11-36, T30: both orders, any start; the lemma needs an invariant law and nothing else."""
    stream = torch.Generator().manual_seed(3)
    checked = 0
    for _ in range(2000):
        chain = FiniteChain(random_matrix(int(torch.randint(3, 7, (), generator=stream)), stream, zeros=0.3))
        checked += chain.detailed_balance_violation() > 1e-3
        start = -torch.rand(chain.n, generator=stream, dtype=torch.float64).log()
        laws = chain.laws(start / start.sum(), 12)
        for divergences in (kl_divergence(chain.invariant_law, laws), kl_divergence(laws, chain.invariant_law)):
            assert (divergences.diff() <= 1e-16).all(), (chain.P, divergences)
    assert checked == 2000
    # Towards a law that is not invariant it does increase: the test sees violations.
    towards = kl_divergence(torch.tensor([0.8, 0.1, 0.1]), MOLE.laws(torch.tensor([0.8, 0.1, 0.1]), 3))
    assert (towards.diff() > 0).any()


def walk(n: int, ring: bool = False) -> Tensor:
    """Propose one to the right with 0.7, one to the left with 0.3; at the ends (without ring) stay."""
    P = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j, mass in ((i + 1, 0.7), (i - 1, 0.3)):
            P[i, j % n if ring else min(max(j, 0), n - 1)] += mass
    return P


@pytest.mark.parametrize("ring", [False, True])
def test_metropolis_hastings_has_detailed_balance_and_the_target(ring):
    """D10-02, D10-03, T3-71: the law exactly, the violation below 1e-15, with a lopsided proposal."""
    chain = metropolis_hastings(TARGET, walk(6, ring))
    assert chain.detailed_balance_violation(TARGET) < 1e-15
    assert torch.allclose(chain.invariant_law, TARGET, rtol=1e-13)
    assert chain.converges
    # Weights need not be normalised.
    assert torch.allclose(metropolis_hastings(731.0 * TARGET, walk(6, ring)).P, chain.P, rtol=1e-14)


def test_the_inverted_ratio_has_another_law():
    """D10-03, T3-71: min{1, pi_i Q_ij / (pi_j Q_ji)} gives (.089, .178, .201, .011, .119, .401)."""
    shares = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0], dtype=torch.float64) / 12
    Q = shares.expand(6, 6)
    flow = TARGET[:, None] * Q
    P = (Q * (flow / flow.T).clamp(max=1)).fill_diagonal_(0.0)
    inverted = FiniteChain(P + torch.diag(1 - P.sum(1))).invariant_law
    assert inverted.tolist() == pytest.approx([0.089, 0.178, 0.201, 0.011, 0.119, 0.401], abs=6e-4)
    assert torch.allclose(inverted, (shares**2 / TARGET) / (shares**2 / TARGET).sum(), rtol=1e-13)
    assert torch.allclose(metropolis_hastings(TARGET, Q).invariant_law, TARGET, rtol=1e-13)


def test_a_rejected_step_counts_the_old_state_again():
    """D10-03, T3-71: without its repetitions the path has the law pi_i (1 - P_ii)."""
    chain = metropolis_hastings(TARGET, walk(6, ring=True))
    path = chain.paths(40_000, start=TARGET, chains=1, seed=0)[0]
    visits = (path[:, None] == torch.arange(6)).double()
    error = mcse_mean(visits[None])
    assert (((visits.mean(0) - TARGET) / error).abs() < 4).all()
    moved = path[1:][path.diff() != 0].bincount(minlength=6).double()
    assert (((moved / moved.sum() - TARGET) / error).abs() > 10).any()
    leaving = TARGET * (1 - chain.P.diagonal())
    assert torch.allclose(moved / moved.sum(), leaving / leaving.sum(), atol=0.015)


def test_detailed_balance_makes_a_law_invariant_but_not_unique():
    """D10-02, T3-70: two separate blocks hold in balance with every mixture of their laws."""
    blocks = FiniteChain(torch.block_diag(matrix([0.5, 0.5], [0.4, 0.6]), matrix([0.9, 0.1], [0.2, 0.8])))
    for share in (0.0, 0.3, 1.0):
        law = torch.cat([share * matrix([4 / 9, 5 / 9])[0], (1 - share) * matrix([2 / 3, 1 / 3])[0]])
        assert blocks.detailed_balance_violation(law) < 1e-16
        assert torch.allclose(blocks.P.T @ law, law, rtol=1e-14)
    # Balanced and irreducible, but of period 2: the law is unique and yet no limit.
    swap = FiniteChain(matrix([0.0, 1.0], [1.0, 0.0]))
    assert swap.detailed_balance_violation() == 0
    assert not swap.converges
    # A law can be invariant without detailed balance.
    assert MOLE.detailed_balance_violation() > 0.05


def test_a_deterministic_map_is_a_markov_chain():
    """C11-33, T70: gradient descent on a grid has one-hot rows, and everything said of chains holds for it."""
    grid = torch.arange(11)
    descent = FiniteChain(torch.eye(11, dtype=torch.float64)[grid - (grid - 5).sign()])
    assert descent.recurrent_classes == ((5,),)
    assert descent.converges
    assert torch.equal(descent.laws(torch.full((11,), 1 / 11), 5)[-1] > 0.99, point(11, 5) > 0)


@pytest.mark.parametrize(
    ("P", "message"),
    [
        (torch.ones(2, 3) / 3, "square"),
        (torch.tensor([[0.5, 0.6], [0.5, 0.5]]), "summing to one"),
        (torch.tensor([[1.5, -0.5], [0.5, 0.5]]), "not negative"),
        (torch.tensor([[math.nan, 1.0], [0.5, 0.5]]), "not negative"),
        (torch.tensor(1.0), "shape"),
    ],
)
def test_a_matrix_that_is_no_chain_is_refused(P, message):
    with pytest.raises(DataError, match=message):
        FiniteChain(P)


def test_bad_laws_and_targets_are_refused():
    with pytest.raises(DataError, match="start"):
        MOLE.laws(torch.ones(4) / 4, 1)
    with pytest.raises(DataError, match="positive weights"):
        metropolis_hastings(torch.tensor([0.0, 1.0, 1.0]), MOLE.P)
    with pytest.raises(DataError, match="q must"):
        kl_divergence(torch.ones(2) / 2, torch.ones(2))
