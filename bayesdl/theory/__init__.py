"""Theory that can be run: finite Markov chains, stochastic gradient descent seen as one, and rates of descent.

Nothing on the way from data to certificate needs these modules; they use it.
"""

from __future__ import annotations

from bayesdl.theory import gibbs, gradient_noise, markov_chains, optimisation, sgd

__all__ = ["gibbs", "gradient_noise", "markov_chains", "optimisation", "sgd"]
