"""What a chapter found of its claims."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from IPython.display import Markdown
from myst_nb import glue

from safetyneuron.book.claims import say_finding
from safetyneuron.book.glue import glue_text
from safetyneuron.metrics.verdict import Evidence, Verdict, join_models, judge


def glue_findings(
    found: Mapping[str, Mapping[str, Evidence]],
    numbers: Mapping[str, str],
    ran_on: str | Mapping[str, str],
) -> dict[str, Verdict]:
    """Judge the claims of a chapter together, and glue *What we found* and its rows of the ledger.

    Parameters
    ----------
    found : dict
        Key of a claim to model to its evidence.
    numbers : dict
        Key of a claim to the one number that a reader should remember, as text.
    ran_on : str or dict of str to str
        The models and trainings that the verdicts are about, as text; where not every claim was judged on all of them, what
        to call a model of `found` in full.

    Returns
    -------
    dict of str to Verdict
    """
    each = judge({(key, m): e for key, models in found.items() for m, e in models.items()})
    verdicts = {key: join_models(each[key, m] for m in models) for key, models in found.items()}
    lines = [say_finding(key, v.value, numbers[key]) for key, v in verdicts.items()]
    glue("findings", Markdown("\n".join(lines)))
    told = {key: tell_models(models, ran_on) for key, models in found.items()}
    rows = [
        {"key": key, "verdict": verdict.value, "number": numbers[key], "ran_on": told[key]}
        for key, verdict in verdicts.items()
    ]
    every = dict.fromkeys(model for models in found.values() for model in models)
    glue_text(ledger=json.dumps(rows), ran_on=tell_models(every, ran_on))
    glue_text(**{f"verdict-{key}": verdict.value for key, verdict in verdicts.items()})
    return verdicts


def tell_models(models: Iterable[str], ran_on: str | Mapping[str, str]) -> str:
    """Models that something was judged on, as text; arguments as for `glue_findings`."""
    if isinstance(ran_on, str):
        return ran_on
    return ", ".join(ran_on.get(model, model) for model in models)


def name_runs(families: Mapping[str, list[str]]) -> str:
    """What a chapter ran on, as text. families: model to the names of its trainings."""
    return ", ".join(
        f"{len(names)} trainings of {model}" if len(names) > 1 else model
        for model, names in families.items()
    )
