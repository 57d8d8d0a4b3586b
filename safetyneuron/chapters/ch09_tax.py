"""Chapter 09, the alignment tax: do harmlessness and helpfulness lie in the same neurons, and what does each do to the other?"""

from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import pandas as pd
import torch

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import glue_list
from safetyneuron.chapters.ch09_contrast import patched_rates
from safetyneuron.detectors.change_scores import change_scores
from safetyneuron.metrics.estimates import Estimate, estimate_exact
from safetyneuron.metrics.outcomes import Scores, estimate_change, estimate_rate
from safetyneuron.metrics.suite import evaluate
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.models import awake, load_model

HARMLESS, HELPFUL = "harmless", "helpful"
TO_HELPFUL, TO_HARMLESS = "helpful, patched from harmless", "harmless, patched from helpful"


@dataclass(frozen=True)
class Tax:
    """One training: outcomes by case, what both sets share, what chance gives, and rank correlations of both change scores."""

    cases: dict[str, Scores]
    shared: float
    chance: float
    spread: float  # standard deviation of what chance gives
    correlation: float
    within: float  # the same over ranks within layers


def pay(start, harmless, helpful, prompts, suite, fraction, max_new_tokens=None, dtype="auto"):
    """The tax of one training: both models are scored against their start on the same prompts, and patched from each other in the neurons that both moved most.

    start, harmless, helpful: names of models. One of the three rests in main memory at any time.
    """
    before, tokenizer = load_model(start, dtype=dtype)
    models, moved = {}, {}
    for name, model in ((HARMLESS, harmless), (HELPFUL, helpful)):
        models[name], _ = load_model(model, dtype=dtype)
        with awake(before, models[name]):
            moved[name] = change_scores(before, models[name], tokenizer, prompts, max_new_tokens)
    chosen = {name: scores.select(fraction) for name, scores in moved.items()}
    shared = chosen[HARMLESS] & chosen[HELPFUL]
    with awake(*models.values()):
        cases = {name: evaluate(model, tokenizer, suite) for name, model in models.items()}
        for case, to, source in ((TO_HELPFUL, HELPFUL, HARMLESS), (TO_HARMLESS, HARMLESS, HELPFUL)):
            pair = models[to], models[source]
            cases[case] = patched_rates(*pair, tokenizer, suite, shared)
    size = len(chosen[HARMLESS])
    chance, spread = shared_by_chance(*(neurons.masks["down"] for neurons in chosen.values()))
    values = [scores.values for scores in moved.values()]
    return Tax(cases, len(shared) / size, chance / size, spread / size, *correlations(*values))


def shared_by_chance(first, second):
    """Expected number of neurons that two random sets of the same layers share, and its standard deviation (hypergeometric). Masks (layers, channels)."""
    width, mean, variance = first.shape[1], 0.0, 0.0
    for a, b in zip(first.sum(1).tolist(), second.sum(1).tolist()):
        mean += a * b / width
        variance += a * b / width * (1 - b / width) * (width - a) / max(1, width - 1)
    return mean, sqrt(variance)


def correlations(first, second):
    """Spearman's rank correlation of two scores (layers, channels) over all neurons, and of their ranks within layers."""
    values = [pd.Series(scores.flatten().numpy()) for scores in (first, second)]
    layers = torch.arange(len(first)).repeat_interleave(first.shape[1]).numpy()
    ranks = [series.groupby(layers).rank() for series in values]
    return float(values[0].corr(values[1], "spearman")), float(ranks[0].corr(ranks[1]))


def glue_agreement(changes, fraction):
    """Glue how far trainings of a family agree on neurons, one sentence a family. changes: family to the `ChangeScores` of its trainings.

    It can be asked only where trainings begin with one base model, as those of the papers' models do.
    """
    lines = []
    for family, scores in changes.items():
        if family.startswith("organism/"):
            lines.append(
                f"Trainings of {family} begin with different base models, so their neurons carry no common number, and this cannot be asked of them."
            )
        elif len(scores) > 1:
            lines.append(_agreement(family, scores, fraction))
    glue_list("agreement", lines or ["One training of each family: nothing to compare."])


def _agreement(family, scores, fraction):
    masks = [each.select(fraction).masks["down"] for each in scores]
    pairs = list(combinations(range(len(scores)), 2))
    size = masks[0].sum().item()
    shared = sum((masks[a] & masks[b]).sum().item() for a, b in pairs) / len(pairs) / size
    chance = sum(shared_by_chance(masks[a], masks[b])[0] for a, b in pairs) / len(pairs) / size
    ranks = [correlations(scores[a].values, scores[b].values)[0] for a, b in pairs]
    return f"{family}, {len(scores)} trainings: two share {shared:.0%} of their neurons (by chance {chance:.0%}), and ρ is {sum(ranks) / len(ranks):.2f}."


def _runs(taxes, case):
    return [[tax.cases[case]] for tax in taxes]


def tax_table(taxes, suite):
    """Harm and help of both models, and of each with the other's activations of the shared neurons."""
    (harmful,), benign = suite.harmful, suite.benign
    columns = {("asr", harmful): "attack success", ("helpful", benign): "helpful answers"}
    columns |= {("over_refusal", benign): "over-refusal"}
    return pd.DataFrame(
        {
            case: {
                label: estimate_rate(_runs(taxes, case), *key).percent
                for key, label in columns.items()
            }
            for case in taxes[0].cases
        }
    ).T.rename_axis("model")


def overlap_table(taxes):
    """What both sets share in every training, beside chance, and the rank correlations."""
    rows = {
        f"training {i}": {
            "shared, %": f"{100 * tax.shared:.0f}",
            "by chance, %": f"{100 * tax.chance:.0f} ± {100 * tax.spread:.0f}",
            "ρ": f"{tax.correlation:.2f}",
            "ρ within layers": f"{tax.within:.2f}",
        }
        for i, tax in enumerate(taxes)
    }
    return pd.DataFrame(rows).T


def weigh_tax(taxes, suite):
    """The evidence for the claims about the alignment tax."""
    (harmful,), benign = suite.harmful, suite.benign
    before, after = _runs(taxes, HELPFUL), _runs(taxes, TO_HELPFUL)
    effects = {
        "tax-shared": _above_chance(taxes),
        "tax-safer": estimate_change(before, after, "asr", harmful),
        "tax-paid": estimate_change(before, after, "helpful", benign),
    }
    return {key: Evidence(effect, margin_of(key)) for key, effect in effects.items()}


def _above_chance(taxes):
    """What is shared beyond chance, over trainings; of one training, with the spread of chance."""
    beyond = [tax.shared - tax.chance for tax in taxes]
    if len(taxes) > 1:
        return estimate_exact(beyond)
    return Estimate(beyond[0], max(taxes[0].spread, 1e-9), 1e6, 1)


def number_tax(taxes, suite):
    """The numbers to remember of the claims about the alignment tax."""
    (harmful,), benign = suite.harmful, suite.benign
    count = len(taxes)
    shared, chance = (
        sum(getattr(tax, part) for tax in taxes) / count for part in ("shared", "chance")
    )

    def moved(measure, name):
        before, after = (
            100 * estimate_rate(_runs(taxes, case), measure, name).value
            for case in (HELPFUL, TO_HELPFUL)
        )
        return f"{before:.0f} → {after:.0f} %"

    return {
        "tax-shared": f"{shared:.0%} shared, by chance {chance:.0%}",
        "tax-safer": f"attack success {moved('asr', harmful)}",
        "tax-paid": f"helpful answers {moved('helpful', benign)}",
    }
