"""Claims, written down before the run, and the sentences that say what became of them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml

from safetyneuron.errors import SafetyNeuronError


@cache
def load_claims() -> dict[str, dict]:
    """Every claim by its key: chapter, paper, claim, effect, margin, and a sentence for each verdict."""
    return yaml.safe_load(files(__package__).joinpath("claims.yaml").read_text(encoding="utf-8"))


def margin_of(key: str) -> float:
    """The margin of a claim.

    Raises
    ------
    SafetyNeuronError
        If no claim has this key.
    """
    if key not in load_claims():
        raise SafetyNeuronError(
            f"no claim is called {key!r}: write it down in book/claims.yaml first"
        )
    return load_claims()[key]["margin"]


def sentence_of(key: str, verdict: str) -> str:
    """What a verdict on a claim means, as a sentence to repeat."""
    claim = load_claims()[key]
    return claim.get(verdict) or f"{claim['claim']} Some models say so, others do not."


def badge_of(verdict: str) -> str:
    """A verdict as the HTML of its badge."""
    return f'<span class="badge {verdict.replace(" ", "-")}">{verdict}</span>'


def say_claim(key: str, verdict: str) -> str:
    """The claim that was tested and what became of it, as HTML."""
    return f'<small class="claim">Claim: {load_claims()[key]["claim"]} {badge_of(verdict)}</small>'


def say_finding(key: str, verdict: str, number: str) -> str:
    """One finding as a line of Markdown: a sentence, the number to remember, and the claim with its verdict."""
    return f"- {sentence_of(key, verdict)} <small>{number}</small><br>{say_claim(key, verdict)}"
