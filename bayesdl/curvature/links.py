"""Class probabilities of Gaussian logits in closed form: the probit approximation and the Laplace bridge."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.models.likelihood import Likelihood
from bayesdl.models.likelihoods import Bernoulli, Categorical

LINKS = ("monte_carlo", "probit", "bridge")

Link = Callable[[Tensor, Tensor], Tensor]


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logits whose probabilities are about those of ``N(mean, covariance)``: ``m_k / sqrt(1 + pi v_k / 8)``.

    For one logit, ``sigmoid(m / sqrt(1 + pi v / 8))`` is within 0.02 of the integral (MacKay, 1992, Neural Computation
    4:720). For K classes each logit is shrunk by its own variance, a rule of thumb: what the logits have in common and
    how they depend on each other is left out, so probabilities are too even where all logits move together.

    Args:
        mean: ``[B, K]``.
        covariance: ``[B, K, K]``.
    """
    return mean / (1.0 + math.pi / 8.0 * covariance.diagonal(dim1=1, dim2=2)).sqrt()


def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Parameters ``[B, K]`` of the Dirichlet whose Laplace approximation over centred logits is nearest (by diagonals).

        alpha_k = (1 - 2/K + exp(m_k) / K^2 sum_l exp(-m_l)) / v_k        (Hobbhahn et al., 2022, eq. 12)

    with mean and variances those of logits that sum to 0. Wide Gaussians are first made as narrow as a Dirichlet can be
    in that basis, as there (section 3.3): mean over ``sqrt(c)``, variances over c, where
    ``c = mean_k v_k / sqrt(K/2)`` is above 1; without, probabilities would not fall with the variance.

    Exact where the Gaussian is a Dirichlet's approximation. Off elsewhere, even without variance: unlike softmax it
    gives small classes too much where K is large and the largest logit small. For two classes and ``c < 1`` the mean is
    ``sigmoid(m)``, whatever the variance.

    Args:
        mean: ``[B, K]``.
        covariance: ``[B, K, K]``.
    """
    count = mean.shape[1]
    rows = covariance.sum(2)
    variance = covariance.diagonal(dim1=1, dim2=2)
    # The Gaussian on the condition that its logits sum to 0, which they may do already.
    whole = rows.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).eps * float(variance.max()))
    variance = variance - rows.square() / whole
    centred = mean - rows * mean.sum(1, keepdim=True) / whole
    wide = (variance.mean(1, keepdim=True) / math.sqrt(count / 2.0)).clamp(min=1.0)
    centred, variance = centred / wide.sqrt(), variance / wide
    return (1.0 - 2.0 / count + centred.exp() / count**2 * (-centred).exp().sum(1, keepdim=True)) / variance


def link_of(name: str, likelihood: Likelihood) -> Link | None:
    """From means and covariances of the outputs to logits, or None for "monte_carlo".

    Raises:
        MethodError: the likelihood has no class probabilities.
    """
    if name == "monte_carlo":
        return None
    if type(likelihood) is Categorical:
        return probit if name == "probit" else _bridged
    if type(likelihood) is Bernoulli:
        return probit if name == "probit" else _bridged_logit
    raise MethodError(
        f"link={name!r} gives class probabilities: it needs the likelihood Categorical() or Bernoulli(), and this is "
        f"{likelihood}; use link='monte_carlo'."
    )


def _bridged(mean: Tensor, covariance: Tensor) -> Tensor:
    return bridge(mean, covariance).log()


def _bridged_logit(mean: Tensor, covariance: Tensor) -> Tensor:
    """One logit f is the two logits f/2 and -f/2."""
    halves = mean.new_tensor([0.5, -0.5])
    alpha = bridge(mean * halves, covariance * torch.outer(halves, halves))
    return (alpha[:, :1] / alpha[:, 1:]).log()
