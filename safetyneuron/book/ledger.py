"""Claims, written down before the run, and what a chapter found of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import yaml
from IPython.display import Markdown
from myst_nb import glue

from safetyneuron.book.glue import glue_text
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.verdict import Evidence, Verdict, join_models, judge


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


def glue_findings(
    found: Mapping[str, Mapping[str, Evidence]], numbers: Mapping[str, str], ran_on: str
) -> dict[str, Verdict]:
    """Judge the claims of a chapter together, and glue *What we found* and its rows of the ledger.

    Parameters
    ----------
    found : dict
        Key of a claim to model to its evidence.
    numbers : dict
        Key of a claim to the one number that a reader should remember, as text.
    ran_on : str
        The models and trainings that the verdicts are about, as text.

    Returns
    -------
    dict of str to Verdict
    """
    each = judge({(key, m): e for key, models in found.items() for m, e in models.items()})
    verdicts = {key: join_models(each[key, m] for m in models) for key, models in found.items()}
    lines = [say_finding(key, v.value, numbers[key]) for key, v in verdicts.items()]
    glue("findings", Markdown("\n".join(lines)), display=False)
    rows = [
        {"key": key, "verdict": verdict.value, "number": numbers[key], "ran_on": ran_on}
        for key, verdict in verdicts.items()
    ]
    glue_text(ledger=json.dumps(rows), ran_on=ran_on)
    glue_text(**{f"verdict-{key}": verdict.value for key, verdict in verdicts.items()})
    return verdicts


def name_runs(families: Mapping[str, list[str]]) -> str:
    """What a chapter ran on, as text. families: model to the names of its trainings."""
    return ", ".join(
        f"{len(names)} trainings of {model}" if len(names) > 1 else model
        for model, names in families.items()
    )


def sentence_of(key: str, verdict: str) -> str:
    """What a verdict on a claim means, as a sentence to repeat."""
    claim = load_claims()[key]
    return claim.get(verdict) or f"{claim['claim']} Some models say so, others do not."


def say_finding(key: str, verdict: str, number: str) -> str:
    """One finding as a line of Markdown: its badge, a sentence, and the number to remember."""
    badge = f'<span class="badge {verdict.replace(" ", "-")}">{verdict}</span>'
    return f"- {badge} {sentence_of(key, verdict)} <small>{number}</small>"
