"""Diagnostics in words: what is wrong with the chains, and what to do next."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bayesdl.posterior.agreement import LIMIT
from bayesdl.posterior.convergence import nested_limit
from bayesdl.posterior.diagnostics import LOW_EBFMI, Diagnostics, Mixing

GOOD = 1.01
"""R-hat below which nothing is to be said."""
ENOUGH = 400
"""Effective draws below which R-hat and standard errors are themselves too uncertain (Vehtari et al., 2021)."""
SATURATED = 0.01
NAMED = 8
"""Chains that a sentence names one by one."""
WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run.

    Attributes:
        kind: "frozen", "mixing", "divergences", "energy", "depth", "acceptance", "effective draws", or "note".
        text: what was found.
        advice: what to do about it; empty for a note.
    """

    kind: str
    text: str
    advice: str = ""

    @property
    def trouble(self) -> bool:
        """Whether it speaks against the run; a note does not."""
        return self.kind != "note"


@dataclass(frozen=True)
class Verdict:
    """All findings, the gravest first.

    Attributes:
        findings: troubles, then notes.
        summary: the numbers of a run without trouble, in a sentence.
    """

    findings: tuple[Finding, ...]
    summary: str

    @property
    def good(self) -> bool:
        """Whether there is no sign of trouble. Chains that all miss the same mode show none."""
        return not any(finding.trouble for finding in self.findings)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of trouble, in order."""
        return tuple(finding.kind for finding in self.findings if finding.trouble)

    def __str__(self) -> str:
        """A paragraph per finding."""
        lines = [self.summary] if self.good else []
        lines += [f"{finding.text} {finding.advice}".strip() for finding in self.findings]
        return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def judge(found: Diagnostics) -> Verdict:
    """The verdict on diagnostics; a function of these numbers alone, so that it is also that of a loaded posterior."""
    findings = [*_frozen(found), *_mixing(found), *_divergences(found), *_energy(found), *_transitions(found)]
    if not any(finding.kind in ("frozen", "mixing") for finding in findings):
        findings += _effective_draws(found)
    return Verdict((*findings, *_notes(found)), _summary(found))


def _frozen(found: Diagnostics) -> Iterator[Finding]:
    if found.frozen:
        text = f"{_count(found.frozen, found.chains)} never moved{_named(found.frozen)}."
        advice = "Every proposal was rejected there: use a smaller step, a longer warm-up, or another init."
        yield Finding("frozen", text, advice)


def _mixing(found: Diagnostics) -> Iterator[Finding]:
    name, worst = _worst(found)
    limit = GOOD if found.superchains is None else _nested_limit(found.chains, found.superchains)
    agreeing = found.chains if found.agreeing is None else found.agreeing
    if worst.rhat <= limit and not found.apart and not found.moving and agreeing == found.chains:
        return
    place = _place(found)
    measure = "R-hat" if found.superchains is None else f"nested R-hat, for which {limit:.2f} would be good,"
    numbers = f"{measure} of the {name} reaches {worst.rhat:.3g}{_layer(found)}"
    advice = f"Use {_longer(found, 'warmup')}"
    if found.chains == 1 and not worst.rhat <= LIMIT:
        text = f"The chain has not settled {place}: its second half lies elsewhere than its first; {numbers}."
        yield Finding("mixing", text, f"{advice}, {_longer(found, 'draws')}, and more than one chain.")
    elif 2 * agreeing <= found.chains:
        most = "no two of them agree" if agreeing == 1 else f"no more than {agreeing} of {found.chains} agree"
        text = f"The chains have not mixed {place}: {most}; {numbers}."
        hint = (
            f"{advice}: {_of_all(len(found.moving), found.chains)} are still moving."
            if 2 * len(found.moving) > found.chains
            else f"{advice} or another init; chains that stay in different modes do not weigh these modes."
        )
        yield Finding("mixing", text, hint)
    elif found.apart:
        text = f"{_count(found.apart, found.chains)} {_have(found.apart)} not mixed {place}{_named(found.apart)}"
        text += f"; {numbers}."
        moving = [chain for chain in found.apart if chain in found.moving]
        hint = (
            f"{advice}: {_of_all(len(moving), len(found.apart))} of them are still moving."
            if 2 * len(moving) > len(found.apart)
            else "They stay where they are: see to the divergences first."
            if found.divergences
            else f"They stay where they are: use another init, or {_longer(found, 'warmup')}."
        )
        yield Finding("mixing", text, hint)
    elif found.moving:
        text = (
            f"{_count(found.moving, found.chains)} {_are(found.moving)} still moving {place}{_named(found.moving)}: "
            f"the second half lies elsewhere than the first; {numbers}."
        )
        yield Finding("mixing", text, f"{advice}.")
    elif not worst.rhat <= LIMIT or found.superchains is not None:
        text = f"The chains have not mixed {place}: {numbers}, and no single chain is to blame: all are too short."
        yield Finding("mixing", text, f"Use {_longer(found, 'draws')}, after {_longer(found, 'warmup')}.")
    else:
        text = f"The chains have nearly mixed {place}: {numbers}."
        yield Finding("mixing", text, f"For final results use {_longer(found, 'draws')}.")


def _nested_limit(chains: int, superchains: int) -> float:
    return nested_limit(chains // superchains, superchains=superchains)


def _divergences(found: Diagnostics) -> Iterator[Finding]:
    if not found.divergences:
        return
    total = found.chains * found.draws
    many = "transition" if found.divergences == 1 else "transitions"
    text = f"{found.divergences} of {total} {many} diverged, in {_count(found.divergent_chains, found.chains)}"
    text += "".join(
        f"; {place.share:.0%} of them at the {place.side} end of {place.entry} (around {place.typical:.3g})"
        for place in found.places
    )
    target = found.settings.get("target_accept")
    higher = "a smaller step size" if target is None else f"target_accept={min(0.99, 1 - (1 - target) / 4):.2g}"
    advice = f"Estimates may leave out the region where that happens: use {higher}"
    if any(place.side == "low" for place in found.places):
        advice += (
            "; if the named latent is a scale (or its logarithm), write the program in its non-centred form (draw "
            "standard normals and multiply them by the scale)"
        )
    else:
        advice += "; if they stay, write hierarchical parts of the program in their non-centred form"
    yield Finding("divergences", f"{text}.", f"{advice}.")


def _energy(found: Diagnostics) -> Iterator[Finding]:
    if found.low_ebfmi:
        text = (
            f"{_count(found.low_ebfmi, found.chains)} {_have(found.low_ebfmi)} an energy fraction (E-BFMI) below "
            f"{LOW_EBFMI}{_named(found.low_ebfmi)}, the lowest {found.ebfmi:.2f}: tails are explored slowly."
        )
        advice = (
            "Look for heavy tails or a funnel: a non-centred form, or another parametrisation of the widest latents, "
            "helps more than more draws."
        )
        yield Finding("energy", text, advice)


def _transitions(found: Diagnostics) -> Iterator[Finding]:
    if found.saturated is not None and found.saturated > SATURATED:
        text = f"{found.saturated:.0%} of the trajectories were cut at max_depth={found.settings['max_depth']}."
        advice = (
            "The draws are right but dear: raise max_depth, or warm up longer so that the step size and scales fit."
        )
        yield Finding("depth", text, advice)
    target = found.settings.get("target_accept")
    if found.acceptance is not None and found.acceptance < 0.5 * (target or 0.2):
        text = f"Only {found.acceptance:.0%} of the proposals were accepted" + (
            f" ({target:.0%} were asked for)." if target else "."
        )
        yield Finding("acceptance", text, f"Use {_longer(found, 'warmup')}, or a smaller step.")


def _effective_draws(found: Diagnostics) -> Iterator[Finding]:
    parts = _function_space(found) or found.sites
    sizes = {
        (name, kind): getattr(mixing, f"ess_{kind}") for name, mixing in parts.items() for kind in ("bulk", "tail")
    }
    known = {key: size for key, size in sizes.items() if math.isfinite(size)}
    if not known:
        return
    (name, kind), least = min(known.items(), key=lambda item: item[1])
    if least < ENOUGH:
        factor = math.ceil(ENOUGH / max(least, 1.0))
        text = f"The draws are few: {least:.0f} effective ones for the {kind} of the {name} ({ENOUGH} are wanted)."
        advice = f"Use about {factor} times as many draws"
        drawn = found.settings.get("draws")
        yield Finding("effective draws", text, f"{advice} (draws={factor * drawn})." if drawn else f"{advice}.")


def _notes(found: Diagnostics) -> Iterator[Finding]:
    if found.function is not None and not found.sites:
        yield Finding("note", "Only functions were kept: whether the latents agree is not known.")
    elif found.function is not None:
        site, mixing = max(found.sites.items(), key=lambda item: _order(item[1]))
        function = max(part.rhat for part in _function_space(found).values())
        if mixing.rhat > LIMIT >= function:
            numbers = f"({site}: R-hat {mixing.rhat:.3g})"
            yield Finding(
                "note",
                f"Weights differ between chains {numbers} while the functions agree: chains in equivalent modes. "
                "Predictions are not touched; means of single weights mean nothing."
                if _is_weight(site)
                else f"Latents differ between chains {numbers} while the predictions agree: predict, but state nothing "
                f"about {site} itself before its R-hat is below {LIMIT:g}; of labels that can change places it never "
                "is.",
            )
    else:
        yield Finding("note", "Predictions were not at hand, so the latents themselves were compared.")
    missing = [name for name, value in (("divergences", found.divergences), ("energies", found.ebfmi)) if value is None]
    who = found.method or "The method"
    if missing and found.acceptance is not None:
        yield Finding("note", f"{who} records no {' and no '.join(missing)}; nothing is known of them.")
    elif missing:
        yield Finding(
            "note",
            f"{who} records no {' and no '.join(missing)}, and no acceptance: if its steps have a bias, that shows in "
            "none of these numbers; kernel_stein(posterior) can see it.",
        )
    if found.chains == 1:
        yield Finding("note", "One chain can only be compared with itself; a mode that it never saw does not show.")


def _summary(found: Diagnostics) -> str:
    parts = _function_space(found) or found.sites
    of = "latents" if found.function is None and found.log_likelihood is None else "predictions and log likelihood"
    text = f"No sign of trouble: R-hat of the {of} at most {max(m.rhat for m in parts.values()):.3f}"
    bulk, tail = (min(getattr(m, f"ess_{kind}") for m in parts.values()) for kind in ("bulk", "tail"))
    if math.isfinite(bulk):
        text += f", at least {bulk:.0f} effective draws in the bulk and {tail:.0f} in the tails"
    text += ", no divergences" if found.divergences == 0 else ""
    return text + (f", E-BFMI at least {found.ebfmi:.2f}." if found.ebfmi is not None else ".")


def _function_space(found: Diagnostics) -> dict[str, Mixing]:
    parts = {
        "predictions": found.function,
        "squared predictions": found.function_squared,
        "log likelihood": found.log_likelihood,
    }
    return {name: mixing for name, mixing in parts.items() if mixing is not None}


def _worst(found: Diagnostics) -> tuple[str, Mixing]:
    parts = _function_space(found) or {f"latent {name}": mixing for name, mixing in found.sites.items()}
    return max(parts.items(), key=lambda item: _order(item[1]))


def _order(mixing: Mixing) -> float:
    """R-hat for comparisons: what is not finite is the worst there is."""
    return math.inf if math.isnan(mixing.rhat) else mixing.rhat


def _place(found: Diagnostics) -> str:
    return "in function space" if _function_space(found) else "over the latents"


def _layer(found: Diagnostics) -> str:
    if not _function_space(found) or not found.sites:
        return ""
    site, mixing = max(found.sites.items(), key=lambda item: _order(item[1]))
    kind = "layer" if _is_weight(site) else "latent"
    return f", the worst {kind} is {site} (R-hat {mixing.rhat:.3g})"


def _is_weight(site: str) -> bool:
    """Whether a site is a parameter of a network's layer."""
    return site.endswith((".weight", ".bias"))


def _longer(found: Diagnostics, setting: str) -> str:
    value = found.settings.get(setting)
    words = {"warmup": "a longer warm-up", "draws": "more draws"}[setting]
    return f"{words} ({setting}={2 * value})" if isinstance(value, int) and value else words


def _count(chains: Sequence[int], total: int) -> str:
    return _of_all(len(chains), total) + (" chain" if total == 1 else " chains")


def _of_all(count: int, total: int) -> str:
    return f"all {total}" if count == total > 1 else f"{count} of {total}"


def _named(chains: Sequence[int]) -> str:
    kind = "chain" if len(chains) == 1 else "chains"
    return f" ({kind} {', '.join(map(str, chains))})" if len(chains) <= NAMED else ""


def _have(chains: Sequence[int]) -> str:
    return "has" if len(chains) == 1 else "have"


def _are(chains: Sequence[int]) -> str:
    return "is" if len(chains) == 1 else "are"
