"""Change of measure (D12-06) and posteriors in the eigenbasis of the curvature (C14-14)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import MethodError
from bayesdl.posterior.covariance import Dense, Diagonal
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.theory import stiffness


def test_change_of_measure_bounds_every_law_and_is_attained_by_the_tilted_one() -> None:
    """D12-06."""
    stream = torch.Generator().manual_seed(0)
    values = torch.randn(6, generator=stream, dtype=torch.float64)
    prior = torch.softmax(torch.randn(6, generator=stream, dtype=torch.float64), 0)
    bound, best = stiffness.change_of_measure(values, prior)

    def gain(q: torch.Tensor) -> torch.Tensor:
        return (q * values).sum(-1) - (q * (q / prior).log()).sum(-1)

    assert float(gain(best)) == pytest.approx(bound, rel=1e-12)
    others = torch.softmax(3 * torch.randn(20_000, 6, generator=stream, dtype=torch.float64), 1)
    assert float(gain(others).max()) < bound
    with pytest.raises(MethodError, match="sum to 1"):
        stiffness.change_of_measure(values, 2 * prior)


def spectrum(dim: int) -> torch.Tensor:
    """Eigenvalues over ten decades, as networks have them."""
    return torch.logspace(4, -6, dim, dtype=torch.float64)


def test_divergence_and_free_energy_are_those_of_the_gaussians() -> None:
    """C14-14: the closed forms against the KL of written covariances in another basis."""
    dim, precision = 12, 0.7
    stream = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=stream, dtype=torch.float64))[0]
    curvatures, away = spectrum(dim), torch.randn(dim, generator=stream, dtype=torch.float64)
    hessian = axes @ curvatures.diag() @ axes.T
    covariance = axes @ (1 / (curvatures + precision)).diag() @ axes.T
    prior = Normal(torch.zeros(dim, dtype=torch.float64), Diagonal(torch.full((dim,), precision**-0.5).double()))
    kl = bdl.bounds.kl_upper(Normal(away, Dense(torch.linalg.cholesky(covariance))), prior)
    square = float(away.square().sum())
    assert kl == pytest.approx(stiffness.divergence(curvatures, precision, square), rel=1e-7)
    expected_loss = float((hessian @ covariance).trace()) / 2
    assert 2 * expected_loss == pytest.approx(stiffness.effective_dimension(curvatures, precision), rel=1e-9)
    assert stiffness.free_energy(curvatures, precision, square) == pytest.approx(kl + expected_loss, rel=1e-7)


def test_an_isotropic_posterior_pays_for_every_direction() -> None:
    """C14-14: the best isotropic Gaussian by search, and its price beside that in the eigenbasis."""
    curvatures, precision = spectrum(1000), 1.0
    flat = torch.full_like(curvatures, float(curvatures.mean()))
    variances = torch.logspace(-6, 0, 20_001, dtype=torch.float64)
    loss = variances * curvatures.sum() / 2
    kl = 1000 / 2 * (precision * variances - 1 - (precision * variances).log())
    assert float((loss + kl).min()) == pytest.approx(stiffness.free_energy(flat, precision), rel=1e-6)
    assert stiffness.free_energy(flat, precision) > 1.5 * stiffness.free_energy(curvatures, precision)
    more = torch.cat([curvatures, torch.full((100_000,), 1e-9, dtype=torch.float64)])
    assert stiffness.divergence(more, precision) == pytest.approx(stiffness.divergence(curvatures, precision), rel=1e-6)
    assert 350 < stiffness.effective_dimension(more, precision) < 450  # of 101,000


def test_the_certificate_in_the_eigenbasis_beats_those_along_the_weights_and_of_a_sphere() -> None:
    """C14-14: on a network with more weights than the rows could pay for one by one."""
    train = bdl.data.load("digits").train
    x, y = train.x.double()[:600] / 16, train.y[:600]
    net = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)).double()
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(0.5), bdl.likelihoods.Categorical())
    settings: dict[str, Any] = {"steps": 500, "predictive": "sampled"}
    found: dict[str, Any] = {
        structure: bdl.fit(model, (x, y), bdl.Laplace(structure=structure, **settings), progress=False)
        for structure in ("full", "diag")
    }
    law = found["full"].law
    dim = law.dim
    curvatures = (torch.linalg.eigvalsh(law.covariance.solve(torch.eye(dim, dtype=torch.float64))) - 4.0).clamp_min(0.0)
    sphere = Normal(law.mean, Diagonal((4.0 + curvatures.mean()).rsqrt().expand(dim).clone()))
    found["sphere"] = GaussianPosterior(found["full"].problem, sphere, {})
    bounds = {name: bdl.certify(q, (x, y), bound="kl", draws=1000) for name, q in found.items()}
    assert bounds["full"].kl == pytest.approx(
        stiffness.divergence(curvatures, 4.0, float(law.mean.square().sum())), rel=1e-6
    )
    assert bounds["full"].bound < 0.75
    assert bounds["full"].bound < min(bounds["diag"].bound, bounds["sphere"].bound) - 0.03
    assert stiffness.effective_dimension(curvatures, 4.0) < dim / 4
