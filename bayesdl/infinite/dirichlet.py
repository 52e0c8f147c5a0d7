r"""Classification as regression: the Dirichlet likelihood of Milios et al. (2018).

The label of a row gives each class k the Gamma variable of a Dirichlet posterior, ``Gamma(alpha_k, 1)`` with
``alpha_k = alpha + 1{y = k}``, whose logarithm is taken as normal with the log-normal's moments,

    s_k^2 = log(1 / alpha_k + 1),    y_k = log(alpha_k) - s_k^2 / 2,

a Gaussian observation of the latent function f_k. So the posterior of f is exact, and the classes' probabilities are
``softmax(f)``.

Source: Milios, Camoriano, Michiardi, Rosasco, Filippone (2018), Dirichlet-based Gaussian processes for large-scale
calibrated classification, eqs. 8 and 9.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def dirichlet_targets(y: Tensor, classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return targets and their noise's standard deviations, ``[K, n]`` each.

    The targets are given about their mean over rows and classes: the softmax does not see a shift that is common to
    all classes, and far from the data, where f goes back to its prior mean, all classes are equally probable.

    Args:
        y: ``[n]`` of 0..K-1.
        classes: K.
        alpha: of the Dirichlet prior, positive; small values trust the labels.
    """
    concentration = alpha + one_hot(y.long(), classes).T.double()
    variance = torch.log1p(1 / concentration)
    targets = concentration.log() - variance / 2
    return targets - targets.mean(), variance.sqrt()
