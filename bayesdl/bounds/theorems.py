"""The theorems behind the certificates: their names, statements, sources, and what each of them bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from bayesdl.bounds._numbers import Values
from bayesdl.bounds.catoni import catoni
from bayesdl.bounds.majority import majority_vote, tandem
from bayesdl.bounds.pac_bayes import mcallester, pac_bayes_kl, quadratic
from bayesdl.bounds.pac_bayes_bernstein import pac_bayes_bernstein

Predictor = Literal["gibbs", "mean", "mixture", "prior", "majority vote"]


@dataclass(frozen=True)
class Theorem:
    """An inequality that a certificate can rest on.

    Args:
        name: What the certificate calls it.
        text: The inequality in plain text.
        tex: The inequality in LaTeX.
        source: Where it is proven.
        event: Theorems of one event hold together at one delta; every other event has to be paid for.
        predictor: Whom it is about.
        inequality: For PAC-Bayes the bound as a function of ``risk``, ``kl``, ``n`` and ``delta``.
        together: How many independent draws must be wrong on a row for it to count in the risk.
    """

    name: str
    text: str
    tex: str
    source: str
    event: str
    predictor: Predictor
    inequality: Callable[..., Values] | None = None
    together: int = 1


PAC_BAYES: Mapping[str, Theorem] = {
    "kl": Theorem(
        "PAC-Bayes-kl",
        "kl(risk || R) <= (KL + log(2 sqrt(n) / delta)) / n",
        r"\mathrm{kl}(\hat R \,\|\, R) \le \frac{\mathrm{KL} + \log(2 \sqrt{n} / \delta)}{n}",
        "Maurer 2004, Theorem 5",
        "PAC-Bayes-kl",
        "gibbs",
        pac_bayes_kl,
    ),
    "quadratic": Theorem(
        "quadratic",
        "R <= (sqrt(risk + B) + sqrt(B))^2, B = (KL + log(2 sqrt(n) / delta)) / (2 n)",
        r"R \le \bigl(\sqrt{\hat R + B} + \sqrt{B}\bigr)^2,\ B = \frac{\mathrm{KL} + \log(2 \sqrt{n} / \delta)}{2 n}",
        "Perez-Ortiz et al. 2021, eq. 7",
        "PAC-Bayes-kl",
        "gibbs",
        quadratic,
    ),
    "mcallester": Theorem(
        "McAllester",
        "R <= risk + sqrt((KL + log(2 sqrt(n) / delta)) / (2 n))",
        r"R \le \hat R + \sqrt{\frac{\mathrm{KL} + \log(2 \sqrt{n} / \delta)}{2 n}}",
        "McAllester 1999; Maurer 2004",
        "PAC-Bayes-kl",
        "gibbs",
        mcallester,
    ),
    "catoni": Theorem(
        "Catoni",
        "R <= (1 - exp(-C risk - (KL + log(21 / delta)) / n)) / (1 - exp(-C)), C the best of 21 values 1/64 ... 16",
        r"R \le \frac{1 - \exp(-C \hat R - (\mathrm{KL} + \log(21 / \delta)) / n)}{1 - e^{-C}}",
        "Catoni 2007, Theorem 1.2.1",
        "Catoni",
        "gibbs",
        catoni,
    ),
    "bernstein": Theorem(
        "empirical Bernstein",
        "R <= risk + min(2.15 sqrt((e - 2) V K / n), (e - 2) V + K / n), K = KL + log(2 nu / delta), V the variance",
        r"R \le \hat R + \min(2.15 \sqrt{(e - 2) \bar V K / n}, (e - 2) \bar V + K / n),\ "
        r"K = \mathrm{KL} + \log(2 \nu / \delta)",
        "Tolstikhin and Seldin 2013, Theorem 4",
        "empirical Bernstein",
        "gibbs",
        pac_bayes_bernstein,
    ),
    "vote": Theorem(
        "majority vote, first order",
        "R <= 2 G, kl(risk || G) <= (KL + log(2 sqrt(n) / delta)) / n",
        r"R \le 2 G,\ \mathrm{kl}(\hat R \,\|\, G) \le \frac{\mathrm{KL} + \log(2 \sqrt{n} / \delta)}{n}",
        "Masegosa et al. 2020, Theorem 1",
        "PAC-Bayes-kl",
        "majority vote",
        majority_vote,
    ),
    "tandem": Theorem(
        "majority vote, tandem loss",
        "R <= 4 T, kl(risk || T) <= (2 KL + log(2 sqrt(n) / delta)) / n, risk: both of two draws err",
        r"R \le 4 T,\ \mathrm{kl}(\hat T \,\|\, T) \le \frac{2 \mathrm{KL} + \log(2 \sqrt{n} / \delta)}{n}",
        "Masegosa et al. 2020, Theorems 2 and 9",
        "tandem",
        "majority vote",
        tandem,
        together=2,
    ),
}
"""By the name that ``certify(bound=)`` takes."""

BINOMIAL = Theorem(
    "binomial tail",
    "R <= sup { p : P(Bin(n, p) <= errors) >= delta }",
    r"R \le \sup \{ p : P(\mathrm{Bin}(n, p) \le k) \ge \delta \}",
    "Clopper and Pearson 1934; Langford 2005, Theorem 3.3",
    "hold-out",
    "mixture",
)
CHERNOFF = Theorem(
    "Chernoff",
    "kl(risk || R) <= log(1 / delta) / n, R >= risk",
    r"\mathrm{kl}(\hat R \,\|\, R) \le \frac{\log(1 / \delta)}{n},\ R \ge \hat R",
    "Hoeffding 1963, eq. 2.1",
    "hold-out",
    "mixture",
)
THEOREMS: Mapping[str, Theorem] = {theorem.name: theorem for theorem in (*PAC_BAYES.values(), BINOMIAL, CHERNOFF)}
"""By the name that a certificate holds."""
