r"""From the Gibbs predictor to the majority vote.

The majority vote of Q answers with the label that has most of Q's mass. Where it is wrong, at least half of Q is wrong
(with any number of classes), and Markov's inequality for the share of Q that is wrong, or for its square, bounds its
risk. Both are about the vote of Q itself; a vote over finitely many draws is another predictor, near it.
"""

from __future__ import annotations

import numpy as np

from bayesdl.bounds._numbers import Values, arrays, like, require, up
from bayesdl.bounds.concentration import kl_inverse_upper
from bayesdl.bounds.pac_bayes import complexity, pac_bayes_kl


def majority_vote(*, risk: Values, kl: Values, n: Values, delta: Values) -> Values:
    r"""First-order bound on the risk of the majority vote: twice the PAC-Bayes-kl bound of the Gibbs predictor.

    .. math:: R(MV_Q) \le 2 R(Q)
        \le 2\, kl^{-1}\left( \hat R(Q), \frac{KL(Q \| P) + \log(2 \sqrt n / \delta)}{n} \right)

    Assumptions: those of ``pac_bayes_kl``, on whose event it holds, and a 0-1 loss.
    Source: Langford and Shawe-Taylor (2002); Masegosa et al. (2020), Theorem 1.

    Args:
        risk: Average 0-1 loss of Q on the rows of the bound, or an upper bound on it, in [0, 1].
        kl: KL(Q || P) in nats or an upper bound on it, non-negative; may be infinite (the bound is then 1).
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).

    Returns:
        Upper bound on the risk of the vote, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    gibbs = arrays(bound=pac_bayes_kl(risk=risk, kl=kl, n=n, delta=delta))[0]
    return like(np.minimum(2 * gibbs, 1.0), risk, kl, n, delta)


def tandem(*, risk: Values, kl: Values, n: Values, delta: Values) -> Values:
    r"""Second-order bound on the risk of the majority vote, by the tandem loss: two draws wrong on the same row.

    .. math:: R(MV_Q) \le 4\, E_{h, h' \sim Q} P(h \text{ and } h' \text{ err})
        \le 4\, kl^{-1}\left( \hat R_2(Q), \frac{2 KL(Q \| P) + \log(2 \sqrt n / \delta)}{n} \right)

    It is below the first-order bound where draws err on different rows, because then :math:`\hat R_2` is far below
    :math:`\hat R`. Q x Q against P x P has twice the divergence. Assumptions: those of ``pac_bayes_kl``, a 0-1 loss.
    Source: Masegosa, Lorenzen, Igel and Seldin (2020), Theorems 2 and 9; the kl form of their Appendix.

    Args:
        risk: Average over the rows of the share of independent pairs from Q that are both wrong, or an upper bound.
        kl: KL(Q || P), of one draw, in nats or an upper bound on it, non-negative; may be infinite.
        n: Number of rows of the bound.
        delta: Failure probability in (0, 1).

    Returns:
        Upper bound on the risk of the vote, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    kl_ = arrays(kl=kl)[0]
    require(kl_ >= 0, "kl", "non-negative", kl_)
    risk_, bound = complexity(risk, 2 * kl_, n, delta)
    both = np.asarray(kl_inverse_upper(risk_, bound))
    return like(np.minimum(up(4 * both), 1.0), risk, kl, n, delta)
