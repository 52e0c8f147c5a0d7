"""Linear-Gaussian state spaces: Kalman filter, Rauch-Tung-Striebel smoother, evidence and exact posterior paths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import DataError, ModelError


@dataclass(frozen=True)
class States:
    """A Gaussian for the state at every time.

    Attributes:
        mean: ``[..., T, n]``.
        covariance: ``[..., T, n, n]``.
        log_evidence: log density of the observations ``[...]``.
    """

    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor


@dataclass(frozen=True)
class StateSpace:
    r"""``h_0 ~ N(m, P)``, then for t = 1..T: ``h_t = A h_{t-1} + N(0, Q)`` and ``x_t = H h_t + N(0, R)``.

    All functions are exact, take leading batch dimensions of model and data (they broadcast), can be differentiated,
    and cost T times the cube of the state's dimension. Entries of x that are NaN are missing and left out. With
    ``varying=True`` the four matrices are A_t, Q_t, H_t, R_t: measurements at uneven times, a regression whose inputs
    are the rows of H_t.

    Args:
        initial_mean: m, ``[..., n]``, of the state *before* the first transition.
        initial_covariance: P, ``[..., n, n]``.
        transition: A, ``[..., n, n]``.
        transition_noise: the covariance Q, ``[..., n, n]``, possibly singular.
        observation: H, ``[..., m, n]``.
        observation_noise: the covariance R, ``[..., m, m]``, positive definite.
        varying: whether these four have the time before their last two dimensions, ``[..., T, n, n]`` (or 1 for T,
            where one of them stays the same).

    Source: Sarkka (2013), Bayesian filtering and smoothing, theorems 4.2 and 8.2.
    """

    initial_mean: Tensor
    initial_covariance: Tensor
    transition: Tensor
    transition_noise: Tensor
    observation: Tensor
    observation_noise: Tensor
    varying: bool = False

    def __post_init__(self) -> None:
        """Check that the shapes fit.

        Raises:
            ModelError: they do not.
        """
        n, m = self.initial_mean.shape[-1], self.observation.shape[-2]
        wanted = {
            "initial_covariance": (n, n),
            "transition": (n, n),
            "transition_noise": (n, n),
            "observation": (m, n),
            "observation_noise": (m, m),
        }
        for name, shape in wanted.items():
            got = tuple(getattr(self, name).shape[-2:])
            if got != shape:
                raise ModelError(f"StateSpace: {name} has shape [..., {got}], it must be [..., {shape}].")
        if self.varying and min(matrix.dim() for matrix in self._matrices) < 3:
            raise ModelError("StateSpace(varying=True): the last four matrices are [..., T, rows, columns].")

    @classmethod
    def scalar(
        cls,
        initial_mean: float | Tensor,
        initial_sd: float | Tensor,
        transition: float | Tensor,
        transition_sd: float | Tensor,
        observation_sd: float | Tensor,
    ) -> StateSpace:
        """``h' = a h + N(0, s^2)``, ``x = h' + N(0, r^2)``; arguments are numbers or batches ``[...]``."""
        values = [torch.as_tensor(value, dtype=torch.float64) if not isinstance(value, Tensor) else value
                  for value in (initial_mean, initial_sd, transition, transition_sd, observation_sd)]  # fmt: skip
        mean, sd, a, s, r = (value[..., None, None] for value in values)
        return cls(mean[..., 0], sd.square(), a, s.square(), torch.ones_like(a), r.square())

    def filter(self, x: Tensor) -> States:
        """The state at each time given the observations until then.

        ``log_evidence`` is log p(x). The covariance is updated in Joseph's form, which stays positive semi-definite.

        Args:
            x: ``[..., T, m]``, NaN where missing.

        Raises:
            DataError: the shape is not that of observations.
        """
        m = self.observation.shape[-2]
        if x.dim() < 2 or x.shape[-1] != m:
            raise DataError(f"Observations are [..., T, {m}]; got {tuple(x.shape)}.")
        times = {matrix.shape[-3] for matrix in self._matrices} if self.varying else set()
        if times - {1, x.shape[-2]}:
            raise DataError(f"The matrices are those of {max(times)} times; there are {x.shape[-2]} observations.")
        known = ~x.isnan()
        filled = x.nan_to_num(nan=0.0)
        mean, covariance = self.initial_mean, self.initial_covariance
        total: Tensor | float = 0.0
        means, covariances = [], []
        for t in range(x.shape[-2]):
            mean, covariance = self._predict(t, mean, covariance)
            mean, covariance, term = condition(
                mean, covariance, *self._seen(t, known[..., t, :]), filled[..., t, :], count=known[..., t, :].sum(-1)
            )
            total = total + term
            means.append(mean)
            covariances.append(covariance)
        return States(torch.stack(means, -2), torch.stack(covariances, -3), torch.as_tensor(total))

    def smooth(self, x: Tensor) -> States:
        """The state at each time given all observations; ``x`` as in ``filter``."""
        found = self.filter(x)
        mean, covariance = found.mean[..., -1, :], found.covariance[..., -1, :, :]
        means, covariances = [mean], [covariance]
        for t in range(x.shape[-2] - 2, -1, -1):
            gain, spread, ahead = self._backward(t, found.mean[..., t, :], found.covariance[..., t, :, :])
            mean = found.mean[..., t, :] + _apply(gain, mean - ahead)
            covariance = spread + gain @ covariance @ gain.mT
            means.append(mean)
            covariances.append(covariance)
        return States(torch.stack(means[::-1], -2), torch.stack(covariances[::-1], -3), found.log_evidence)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) ``[...]``, with the states integrated out; ``x`` as in ``filter``."""
        return self.filter(x).log_evidence

    def sample(self, x: Tensor, draws: int, seed: int = 0) -> Tensor:
        """Paths of the state given all observations, ``[draws, ..., T, n]``, by the seed; ``x`` as in ``filter``.

        Forward filtering, backward sampling (Carter and Kohn, 1994).
        """
        found, stream = self.filter(x), generator(seed, "state paths")

        def noise(covariance: Tensor) -> Tensor:
            shape = (draws, *covariance.shape[:-1])
            return _apply(
                _root(covariance), torch.randn(shape, dtype=covariance.dtype, generator=stream).to(covariance)
            )

        state = found.mean[..., -1, :] + noise(found.covariance[..., -1, :, :])
        path = [state]
        for t in range(x.shape[-2] - 2, -1, -1):
            gain, spread, ahead = self._backward(t, found.mean[..., t, :], found.covariance[..., t, :, :])
            state = found.mean[..., t, :] + _apply(gain, state - ahead) + noise(spread)
            path.append(state)
        return torch.stack(path[::-1], -2)

    @property
    def _matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.transition, self.transition_noise, self.observation, self.observation_noise

    def _at(self, t: int) -> tuple[Tensor, ...]:
        """A, Q, H and R that belong to observation number t, counted from 0."""
        if not self.varying:
            return self._matrices
        return tuple(matrix[..., min(t, matrix.shape[-3] - 1), :, :] for matrix in self._matrices)

    def _predict(self, t: int, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The state at observation t, given its law at the one before."""
        transition, noise, _, _ = self._at(t)
        return _apply(transition, mean), transition @ covariance @ transition.mT + noise

    def _seen(self, t: int, known: Tensor) -> tuple[Tensor, Tensor]:
        """H and R with the missing entries replaced by pure noise of variance 1, which tells nothing."""
        _, _, observation, noise = self._at(t)
        kept = known.to(observation.dtype)
        both = kept[..., :, None] * kept[..., None, :]
        return observation * kept[..., :, None], noise * both + torch.diag_embed(1 - kept)

    def _backward(self, t: int, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The law of h_t given h_{t+1} and the past: gain C, its covariance in Joseph's form, and E[h_{t+1}]."""
        transition, noise, _, _ = self._at(t + 1)
        ahead, spread = self._predict(t + 1, mean, covariance)
        # What both noise and past leave certain makes the spread singular, and its pseudo-inverse exact.
        gain = covariance @ transition.mT @ torch.linalg.pinv(spread, hermitian=True)
        rest = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) - gain @ transition
        return gain, rest @ covariance @ rest.mT + gain @ noise @ gain.mT, ahead


def condition(
    mean: Tensor, covariance: Tensor, observation: Tensor, noise: Tensor, value: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One measurement ``value = observation h + N(0, noise)`` of a state ``h ~ N(mean, covariance)``.

    Args:
        mean: ``[..., n]``.
        covariance: ``[..., n, n]``.
        observation: ``[..., m, n]``.
        noise: ``[..., m, m]``.
        value: ``[..., m]``.
        count: how many of the m measurements there are, ``[...]``; the others have noise 1, value 0 and no observation.

    Returns:
        The state's mean and covariance given the value, and the value's log density ``[...]``.
    """
    across = observation @ covariance
    root = torch.linalg.cholesky(across @ observation.mT + noise)
    gain = torch.cholesky_solve(across, root).mT
    away = value - _apply(observation, mean)
    rest = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) - gain @ observation
    white = torch.linalg.solve_triangular(root, away[..., None], upper=False)[..., 0]
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    size = value.shape[-1] if count is None else count.to(value.dtype)
    log_prob = -0.5 * (white.square().sum(-1) + log_det + size * math.log(2 * math.pi))
    return mean + _apply(gain, away), rest @ covariance @ rest.mT + gain @ noise @ gain.mT, log_prob


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _root(covariance: Tensor) -> Tensor:
    """A root of a positive semi-definite matrix, singular ones included."""
    values, directions = torch.linalg.eigh(covariance)
    return directions * values.clamp(min=0.0).sqrt()[..., None, :]
