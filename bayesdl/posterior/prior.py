"""The prior over z as a Gaussian law, where it is one."""

from __future__ import annotations

from bayesdl.density import LogDensity
from bayesdl.posterior.covariance import Covariance, Diagonal
from bayesdl.posterior.normal import Normal


def prior_law(density: LogDensity) -> Normal | None:
    """The density's prior over z if it is Gaussian, the program's own or one that replaced it; else None."""
    independent = density.gaussian_prior()
    if independent is not None:
        return Normal(independent[0], Diagonal(independent[1]))
    if density.new_prior is None:
        return None
    mean, covariance = density.new_prior
    assert isinstance(covariance, Covariance)  # with_prior_law is who puts one there
    return Normal(mean, covariance)


def with_prior_law(density: LogDensity, law: Normal) -> LogDensity:
    """The same likelihood under a Gaussian prior over z.

    Args:
        density: of a program whose latents are all global and continuous.
        law: of any structure; independent coordinates cost what the program's own prior does.

    Raises:
        ModelError: the program cannot change its prior.
    """
    law = law.to(density.dtype, density.device)
    covariance = law.covariance
    return density.with_gaussian_prior(law.mean, covariance.sd if isinstance(covariance, Diagonal) else covariance)
