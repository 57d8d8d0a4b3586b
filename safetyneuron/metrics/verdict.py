"""One rule for every verdict: what an interval says of a claim whose margin was written down before the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from safetyneuron.metrics.estimates import LEVEL, Estimate


class Verdict(Enum):
    """What became of a claim."""

    SEEN = "seen"
    PARTLY = "partly seen"
    NOT_SEEN = "not seen"
    REVERSED = "reversed"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Evidence:
    """The measured effect of a claim, positive where the claim holds.

    Attributes
    ----------
    effect : Estimate
    margin : float
        The smallest effect that would matter, in the unit of the effect.
    rank_chance : float, optional
        Probability of so high a rank among random sets: above 5 % the claim is not *seen*, whatever its effect.
    """

    effect: Estimate
    margin: float
    rank_chance: float | None = None

    def weigh(self) -> tuple[Verdict, float]:
        """The verdict that the effect speaks for most, and the one-sided p-value of what speaks against it."""
        ranks = (self.rank_chance or 0) <= 1 - LEVEL
        seen = self.effect.chance_below(self.margin) if ranks else 1.0
        reversed_ = self.effect.chance_above(-self.margin)
        small = max(self.effect.chance_above(self.margin), self.effect.chance_below(-self.margin))
        chances = {Verdict.SEEN: seen, Verdict.REVERSED: reversed_, Verdict.NOT_SEEN: small}
        verdict = min(chances, key=chances.get)
        return verdict, chances[verdict]


def judge(claims: Mapping[str, Evidence]) -> dict[str, Verdict]:
    """The verdict of every claim of a chapter, corrected for their number (Holm 1979).

    *Seen* where the 95 % interval lies above the margin (and the set's rank among random ones is no
    chance), *reversed* where it lies below minus the margin, *not seen* where it lies between the two,
    else *undecided*.
    """
    level, verdicts = (1 - LEVEL) / 2, dict.fromkeys(claims, Verdict.UNDECIDED)
    weighed = {name: evidence.weigh() for name, evidence in claims.items()}
    order = sorted(weighed, key=lambda name: weighed[name][1])
    for place, name in enumerate(order):
        verdict, chance = weighed[name]
        if chance > level / (len(order) - place):
            break  # this claim and all with weaker evidence
        verdicts[name] = verdict
    return verdicts


def join_models(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict over several models: theirs where they agree, *partly* where some saw it and others did not, *not seen* where some even found it reversed."""
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    if Verdict.SEEN in found:
        return Verdict.PARTLY
    return Verdict.UNDECIDED if Verdict.UNDECIDED in found else Verdict.NOT_SEEN


def expect_kept(change: Estimate, loss: float) -> Evidence:
    """The claim that something falls by less than `loss`: seen above it, reversed below. change: after less before."""
    return Evidence(replace(change, value=change.value + loss), 0.0)
