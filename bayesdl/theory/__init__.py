"""Theory that can be run: finite Markov chains, and stochastic gradient descent seen as one.

Nothing on the way from data to certificate needs these modules; they use it.
"""

from __future__ import annotations

from bayesdl.theory import gibbs, gradient_noise, markov_chains, sgd

__all__ = ["gibbs", "gradient_noise", "markov_chains", "sgd"]
