"""Stochastic weight averaging with a Gaussian (SWAG): the moments of the iterates of SGD at a constant rate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.density.log_density import Target
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Work
from bayesdl.infer.optimise import Training
from bayesdl.infer.snapshots import SnapshotEngine
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import LowRank
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.mixture import MixturePosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem


class NoGradientNoiseWarning(UserWarning):
    """Iterates of a training with all rows at every step have no noise, so their spread means nothing."""


@dataclass(frozen=True)
class SWAG(Training):
    r"""A Gaussian with the moments of the iterates of training at a constant learning rate (Maddox et al., 2019).

    After ``steps`` updates the learning rate is held at ``rate``, and T = ``snapshots`` iterates are taken, one after
    each ``every`` updates. With their mean m and the last K = ``rank`` of them as rows w_k,

        q(z) = N(m, S),   S = 1/2 diag(s^2) + 1/2 D D^T / (K - 1),   D = [w_1 - m, ..., w_K - m],

    s^2 being the iterates' variances (divided by T; the paper's section 3.2). The deviations are from the final mean,
    for which the paper, which does not keep iterates, puts the mean so far. With K = T, S is the average of the sample
    covariance and its diagonal.

    **What it approximates.** Iterates spread by the noise of mini-batches, not by the posterior. For plain SGD on a
    quadratic with curvature A of the loss per row and per-row gradient noise C, the stationary covariance V solves
    A V + V A = (rate / B) C to first order in the rate: with C = A it is ``rate / (2 B) 1``, whatever the posterior.
    Its size is set by ``rate`` and ``batch_size``: choose them on held-out rows. With all rows in a batch there is no
    noise, and what is left is rounding: a ``NoGradientNoiseWarning`` says so. In epochs without replacement the noise
    of an epoch nearly cancels, and iterates at the ends of epochs spread much less than with ``replacement=True``.

    The iterates are those of the density over z, Jacobian included, since q is a density over z.

    Several members (Multi-SWAG; Wilson & Izmailov, 2020) give an equal mixture of such Gaussians, one for each start.

    Cost: one training, and ``snapshots`` x ``every`` updates; memory M K D.

    Args:
        steps: updates before the learning rate is held.
        batch_size: rows in a mini-batch.
        optimizer: for both stages. What is said above holds for "sgd"; others take steps whose spread the noise of the
            gradients decides less.
        snapshots: T, iterates that enter the moments.
        every: updates between them; None is an epoch.
        rank: K, deviations that are kept.
        rate: the constant learning rate.
        replacement: whether rows are drawn independently, instead of in epochs.
        members: M, Gaussians.
    """

    name: ClassVar[str] = "SWAG"
    target: ClassVar[Target] = "posterior"

    batch_size: int | None = 32
    optimizer: str = "sgd"
    snapshots: int = 40
    every: int | None = None
    rank: int = 20
    rate: float = 0.02
    replacement: bool = False
    members: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, at_least=2, snapshots=self.snapshots, rank=self.rank)
        check.whole_or_none(self.name, every=self.every)
        check.whole(self.name, members=self.members)
        check.positive(self.name, rate=self.rate)
        check.flag(self.name, replacement=self.replacement)

    def work(self, problem: Problem) -> Work:
        """One gradient of all members an update, in both stages."""
        training = super().work(problem)
        epoch = 1 if self.batch_size is None else max(1, problem.n // self.batch_size)
        calls = training.calls + self.snapshots * (epoch if self.every is None else self.every)
        return Work(self.members, calls, self.members * (self.rank + 2))

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        engine = SWAGEngine(self, problem, run.seed, self.members, self.begin(problem, run, self.members))
        if engine.order.size is None and problem.n > 1:
            warnings.warn(
                f"SWAG(batch_size={self.batch_size}) takes all {problem.n} rows at every step: its iterates have no "
                "noise, and the covariance is that of rounding and of what is left of the way to the mode. Use a "
                "smaller batch_size.",
                NoGradientNoiseWarning,
                stacklevel=4,
            )
        state = run.drive(engine, problem.density)
        count = engine.taken(state["step"])
        if count < 2:
            raise run.too_early("the second snapshot")
        laws = engine.laws(state)
        info = {"snapshots": count, **engine.report(state)}
        if len(laws) == 1:
            return GaussianPosterior(problem, laws[0], info)
        return MixturePosterior(problem, laws, info)


@dataclass
class SWAGEngine(SnapshotEngine):
    """Training, then a constant rate and the moments of the iterates.

    State besides that of the snapshots: mean ``[M, D]``, square ``[M, D]``, the sum of squared deviations from it.
    """

    method: SWAG

    def __post_init__(self) -> None:
        """Say when the second stage begins and how long it is."""
        super().__post_init__()
        method = self.method
        self.first, self.most = self.total, method.rank
        self.every = self.order.batches if method.every is None else method.every
        self.total += method.snapshots * self.every

    def data_order(self) -> DataOrder:
        """In epochs, or each row by itself."""
        method = self.method
        return DataOrder(self.problem, method.batch_size, self.members, self.seed, method.replacement)

    def rate(self, step: int) -> float:
        """The schedule of the training, then the constant rate."""
        return self.schedule(step) if step < self.first else self.method.rate

    def init(self) -> State:
        """Also no moments."""
        state = super().init()
        return state | {name: torch.zeros_like(state["z"]) for name in ("mean", "square")}

    def keep(self, state: State, count: int) -> State:
        """Also Welford's update of the moments, which does not subtract large numbers from each other."""
        away = state["z"] - state["mean"]
        mean = state["mean"] + away / count
        moments = {"mean": mean, "square": state["square"] + away * (state["z"] - mean)}
        return super().keep(state, count) | moments

    def laws(self, state: State) -> tuple[Normal, ...]:
        """The Gaussian of every member.

        A standard deviation is at least the rounding of its mean, so that there is a density also where nothing moved.
        """
        mean, count = state["mean"], self.taken(state["step"])
        least = torch.finfo(mean.dtype).eps * (1 + mean.abs())
        sd = (state["square"] / (2 * count)).sqrt().maximum(least)
        away: Tensor = state["snapshots"] - mean.unsqueeze(1)
        factor = (away / (2 * (away.shape[1] - 1)) ** 0.5).mT.contiguous()
        return tuple(Normal(mean[k], LowRank(sd[k], factor[k])) for k in range(self.members))
