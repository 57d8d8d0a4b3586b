"""Chapter 09, what two trainings have in common: the alignment tax of harmlessness and helpfulness, and whether trainings again find the same neurons."""

from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import pandas as pd
import torch

from safetyneuron.book.claims import margin_of
from safetyneuron.chapters.ch09_contrast import patched_rates
from safetyneuron.kept.contrast import change_scores
from safetyneuron.metrics.estimates import Estimate, estimate_exact, estimate_pairs
from safetyneuron.metrics.outcomes import Scores, estimate_change, estimate_rate
from safetyneuron.metrics.suite import evaluate
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.models import load_model
from safetyneuron.neurons.placement import awake

HARMLESS, HELPFUL = "harmless", "helpful"
TO_HELPFUL, TO_HARMLESS = "helpful, patched from harmless", "harmless, patched from helpful"


@dataclass(frozen=True)
class Common:
    """What two changes of one model have in common: the share of their most moved neurons, what chance gives, and rank correlations of both change scores."""

    shared: float
    chance: float
    spread: float  # standard deviation of what chance gives
    correlation: float
    within: float  # the same over ranks within layers


@dataclass(frozen=True)
class Tax(Common):
    """One training: what both alignments have in common, and outcomes by case."""

    cases: dict[str, Scores]


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
    shared = moved[HARMLESS].select(fraction) & moved[HELPFUL].select(fraction)
    with awake(*models.values()):
        cases = {name: evaluate(model, tokenizer, suite) for name, model in models.items()}
        for case, to, source in ((TO_HELPFUL, HELPFUL, HARMLESS), (TO_HARMLESS, HARMLESS, HELPFUL)):
            pair = models[to], models[source]
            cases[case] = patched_rates(*pair, tokenizer, suite, shared)
    return Tax(**vars(compare(*moved.values(), fraction)), cases=cases)


def compare(first, second, fraction):
    """What two `ChangeScores` have in common at a share of the neurons."""
    masks = [scores.select(fraction).masks["down"] for scores in (first, second)]
    (chance, spread), size = shared_by_chance(*masks), int(masks[0].sum())
    shared = int((masks[0] & masks[1]).sum())
    ranks = correlations(first.values, second.values)
    return Common(shared / size, chance / size, spread / size, *ranks)


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


def on_one_base(changes):
    """Change scores whose neurons carry a common number, of families to those of their trainings.

    Trainings of an organism begin with bases of their own, so the first stands alone; an aligned model's all begin with one base.
    """
    return {
        family: scores[:1] if family.startswith("organism/") else list(scores)
        for family, scores in changes.items()
    }


def agree(alike, fraction):
    """What any two trainings on one base have in common, of families to `Common` by pair of trainings; none where there is one training."""
    return {
        family: {
            (i, j): compare(scores[i], scores[j], fraction)
            for i, j in combinations(range(len(scores)), 2)
        }
        for family, scores in alike.items()
    }


def agreement_table(agreement):
    """A row a family: means over pairs of trainings, lowest and highest in brackets."""
    columns = ("shared, %", "by chance, %", "ρ", "ρ within layers")
    rows = [_agreement(pairs) if pairs else ("–",) * 4 for pairs in agreement.values()]
    table = pd.DataFrame(rows, list(agreement), columns)
    table.insert(0, "pairs of trainings", [str(len(pairs)) for pairs in agreement.values()])
    return table.rename_axis("family")


def _agreement(pairs):
    chance, spread = _mean(pairs, "chance"), _mean(pairs, "spread")
    return (
        _spanned([100 * each.shared for each in pairs.values()], 0),
        f"{100 * chance:.0f} ± {100 * spread:.0f}",
        _spanned([each.correlation for each in pairs.values()], 2),
        _spanned([each.within for each in pairs.values()], 2),
    )


def _spanned(values, digits):
    middle, low, high = sum(values) / len(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _mean(pairs, part):
    return sum(getattr(each, part) for each in pairs.values()) / len(pairs)


def weigh_agreement(agreement):
    """The evidence for the claims about trainings on one base, by claim and family."""
    found = {"trainings-share": {}, "trainings-mostly": {}}
    for family, pairs in _asked(agreement).items():
        spread = _mean(pairs, "spread")
        beyond = {pair: each.shared - each.chance for pair, each in pairs.items()}
        most = {pair: each.shared - 0.5 for pair, each in pairs.items()}
        for key, values in zip(found, (beyond, most)):
            found[key][family] = Evidence(estimate_pairs(values, spread), margin_of(key))
    return {key: evidence for key, evidence in found.items() if evidence}


def number_agreement(agreement):
    """The numbers to remember of these claims, of the first family that can be asked."""
    pairs = next(iter(_asked(agreement).values()), None)
    if not pairs:
        return {}
    shared, chance = _mean(pairs, "shared"), _mean(pairs, "chance")
    return {
        "trainings-share": f"{100 * shared:.0f} % shared, by chance {100 * chance:.0f} %",
        "trainings-mostly": f"{100 * shared:.0f} % shared, ρ {_mean(pairs, 'correlation'):.2f}",
    }


def _asked(agreement):
    return {family: pairs for family, pairs in agreement.items() if pairs}


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


def tell_one_way(taxes, suite):
    """A sentence where the harmless model helps with too little to lose anything that would count, so that the tax shows in one direction only; else empty."""
    rates = {
        measure: 100 * estimate_rate(_runs(taxes, HARMLESS), measure, suite.benign).value
        for measure in ("over_refusal", "helpful")
    }
    if rates["helpful"] > 100 * margin_of("tax-paid"):
        return ""
    return (
        f"The model that was trained for harmlessness alone refuses {rates['over_refusal']:.0f} % of the harmless requests "
        f"and helps with {rates['helpful']:.0f} %, so “{TO_HARMLESS}” has no help to lose: the tax was tested in one direction only."
    )


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
        "tax-shared": f"{100 * shared:.0f} % shared, by chance {100 * chance:.0f} %",
        "tax-safer": f"attack success {moved('asr', harmful)}",
        "tax-paid": f"helpful answers {moved('helpful', benign)}",
    }
