"""Chapter 09: experiments of Chen et al. (2025) with patched activations; the safeguard and the alignment tax are in files of their own."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch

from safetyneuron.book import paper as reported
from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import MEASURES, glue_text, lines
from safetyneuron.book.ledger import name_runs
from safetyneuron.book.plots import PALETTE, draw_bands, rate_panels
from safetyneuron.book.tables import count_classes
from safetyneuron.data.documents import load_documents
from safetyneuron.data.prompts import has_languages, load_prompts
from safetyneuron.data.sources import TEXTS, load_text
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.cost import answer_costs, rule_cost
from safetyneuron.metrics.estimates import Estimate, estimate_mean, estimate_ratio
from safetyneuron.metrics.outcomes import (
    HELP,
    estimate_change,
    estimate_rate,
    outcomes_of,
    rank_chance,
)
from safetyneuron.metrics.shortfalls import shortfalls
from safetyneuron.metrics.suite import evaluate
from safetyneuron.metrics.verdict import Evidence, expect_kept
from safetyneuron.models import load_model, trainings_of
from safetyneuron.neurons.activations import mean_ablated, written_logits
from safetyneuron.neurons.patching import patched_generation
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism import manifest
from safetyneuron.organism.shipped import full_name

NO_GAP = "no gap to close"
CHANGE, RANDOM = "highest change scores", "random others in the same layers"
LAST = "random in the last layer"
RECIPIENT, DONOR = "recipient", "donor"


def pairs_of(families, trainings):
    """Every pair that is patched: (family, recipient, donor)."""
    return [
        (family, *names)
        for family in families
        for names in _named(family, ("sft", "dpo"), trainings)
    ]


def pairs_again(families, trainings):
    """Pairs of organisms that were trained again on the base of the family's first: (family, recipient, donor); none of other models."""
    again = [
        (family, *(f"{family}-{stage}-again@{seed}" for stage in ("sft", "dpo")))
        for family in families
        for seed in range(1, trainings)
    ]
    return [pair for pair in again if pair[1].removeprefix("organism/") in manifest()]


def tell_shortfalls(families, trainings):
    """A sentence on the organisms among the patched pairs that miss what was asked of them; empty without organisms."""
    models, patched = manifest(), []
    for _, *pair in pairs_of(families, trainings):
        patched += [full_name(name.removeprefix("organism/")) for name in pair]
    known = [key for key in dict.fromkeys(patched) if key in models]
    short = [key for key in known if shortfalls(key, models)]
    if not short:
        return ""
    told = f"{len(short)} of the {len(known)} organisms patched here miss what was asked of them before they were trained"
    return f"{told}, by refusing too much or too little: {', '.join(short)}."


def trios_of(family, trainings):
    """The models of the alignment tax in every training: start, aligned to harmlessness alone, to helpfulness alone.

    The paper's donor is aligned to harmlessness alone; an organism's is not, and has another model for it.
    """
    alone = "harmless" if family.startswith("organism/") else "dpo"
    return _named(family, ("sft", alone, "helpful"), trainings)


def _named(family, stages, trainings):
    return list(zip(*(trainings_of(f"{family}-{stage}", trainings) for stage in stages)))


def name_families(families, trainings):
    """What the chapter ran on, as text, of each family."""
    return {f: name_runs({f: trainings_of(f"{f}-sft", trainings)}) for f in families}


def load_pair(first, second, dtype="auto"):
    """Recipient, donor, and the tokenizer of both."""
    model, tokenizer = load_model(first, dtype=dtype)
    return model, load_model(second, dtype=dtype)[0], tokenizer


def documents_to_weigh(name, count):
    """A running text, or the first documents of a set's test split, for `perplexity`."""
    return load_text(name) if name in TEXTS else load_documents(name, split="test")[:count]


def patched_rates(recipient, donor, tokenizer, suite, neurons, positions="all"):
    """`evaluate` of the patched recipient."""
    with patched_generation(recipient, donor, neurons, positions):
        return evaluate(recipient, tokenizer, suite)


def constant_rates(model, tokenizer, suite, neurons, values):
    """`evaluate` with constant activations of the neurons: mean or zero patching."""
    with mean_ablated(model, neurons, {"down": values}):
        return evaluate(model, tokenizer, suite)


def conditions(scores, fraction, draws):
    """The neurons with the highest change scores, `draws` times as many random others in every layer (none where too few are left), and as often as many random ones of the last layer."""
    chosen = scores.select(fraction)
    return {
        CHANGE: [chosen],
        RANDOM: NeuronSet.random_draws(chosen, draws),
        LAST: [scores.last_layers(len(chosen), seed) for seed in range(draws)],
    }


def sets_to_patch(scores, shares, judged, draws):
    """(condition, share) to the sets that are patched: `draws` random ones at the share that is judged, one elsewhere, none where too few neurons are left."""
    found = {}
    for share in sorted({*shares, judged}):
        for name, sets in conditions(scores, share, draws if share == judged else 1).items():
            if sets:
                found[name, share] = sets
    return found


def costs_of(model, tokenizer, suite, judge):
    """What each of the model's answers to the suite's harmful requests costs; a rule's costs are read off what became of them, without asking again."""
    (name,) = suite.harmful
    if judge is rule_cost:
        rows = evaluate(model, tokenizer, suite).table.query("kind == 'harmful'")
        return [-1.0 if x == "refusal" else float(x in HELP) for x in rows["outcome"]]
    prompts = load_prompts(name, language=suite.language)[: suite.prompts]
    return answer_costs(model, tokenizer, prompts, judge)


def add_ends(runs, costs, family, pair, suite, judge):
    """Add both models as they are to the outcomes and costs of a family."""
    for name, model in ((RECIPIENT, pair[0]), (DONOR, pair[1])):
        runs[family, name, 0].append([evaluate(model, pair[2], suite)])
        costs[family, name].append([costs_of(model, pair[2], suite, judge)])


def tabulate_restoration(runs, family, measures):
    """Long table of one family's curves: columns condition, fraction, measure, set, rate; the models as they are at fraction 0.

    runs: (family, condition, fraction) to `Runs`.
    """
    rows = [
        (condition, fraction, *key, estimate_rate(found, *key))
        for (name, condition, fraction), found in runs.items()
        for key in measures
        if name == family
    ]
    return pd.DataFrame(rows, columns=["condition", "fraction", "measure", "set", "rate"])


ALONE = 10  # neurons that are patched alone: those with the highest scores


def alone(recipient, donor, tokenizer, suite, scores):
    """Attack success with each of the `ALONE` neurons of the highest change scores patched alone, lowest first.

    Returns
    -------
    pandas.DataFrame
        Columns layer (from 1), channel, rate.
    """
    (name,), rows, neurons = suite.harmful, [], scores.top(ALONE)
    asked = replace(suite, benign=None, tasks=())
    for cell in neurons.cells():
        one, (_, layer, channel) = NeuronSet.from_cells(neurons.shapes, [cell]), cell
        rates = patched_rates(recipient, donor, tokenizer, asked, one)
        rows.append((layer + 1, channel, rates["asr", name]))
    table = pd.DataFrame(rows, columns=["layer", "channel", "rate"])
    return table.sort_values(
        "rate", key=lambda rates: rates.map(lambda rate: rate.value), kind="stable"
    ).reset_index(drop=True)


def without(neurons, layer, channel):
    """The set without one neuron; layer from 1."""
    return neurons - NeuronSet.from_cells(neurons.shapes, [("down", layer - 1, channel)])


def share_closed(before, after, patched, clusters=None) -> Estimate | None:
    """Share of the gap in harm between recipient and donor that patching closes; None where alignment did not lower harm measurably.

    before, after, patched: arrays (trainings, draws, items) of outcomes or costs; the draws of one side are averaged.
    """
    before, after, patched = (
        np.asarray(values, dtype=float).mean(1, keepdims=True)
        for values in (before, after, patched)
    )
    gap = estimate_mean(before - after, clusters)
    if gap.value <= 0 or gap.interval[0] <= 0:
        return None
    return estimate_ratio(before - patched, before - after, clusters)


def transfer(recipient, donor, tokenizer, suite, neurons, sets, draws, judge):
    """Harm on several request sets, on which the neurons were not chosen. sets: list of (name, language); judge: a cost.

    Returns
    -------
    pandas.DataFrame
        One row per set; columns recipient, donor, patched, random (rates, the last a mean over draws), restored, and restored by cost.

    Raises
    ------
    SafetyNeuronError
        If a file is to be asked in several languages, or too few neurons lie outside the set.
    """
    rows, others = {}, [NeuronSet.random_like(neurons, seed) for seed in range(draws)]
    for name, language in sets:
        if not has_languages(name) and sum(other == name for other, _ in sets) > 1:
            raise SafetyNeuronError(f"{name} has no languages to choose from: give one language")
        asked = replace(suite, harmful=(name,), benign=None, tasks=(), language=language)

        def ask(model):
            return evaluate(model, tokenizer, asked), costs_of(model, tokenizer, asked, judge)

        found = {RECIPIENT: ask(recipient), DONOR: ask(donor)}
        with patched_generation(recipient, donor, neurons):
            found["patched"] = ask(recipient)
        drawn = [patched_rates(recipient, donor, tokenizer, asked, other) for other in others]
        rows[f"{name}, {language}"] = _transferred(found, drawn, name)
    return pd.DataFrame(rows).T.rename_axis("requests")


def _transferred(found, drawn, name):
    """One row of `transfer`. found: recipient, donor and patched to (scores, costs)."""
    row = {which: scores["asr", name] for which, (scores, _) in found.items()}
    row["random"] = estimate_rate([drawn], "asr", name)
    outcomes = [outcomes_of(scores, "asr", name) for scores, _ in found.values()]
    clusters = outcomes[0][1]
    row["restored"] = share_closed(*([[values]] for values, _ in outcomes), clusters)
    costs = [[[values]] for _, values in found.values()]
    return row | {"by cost": share_closed(*costs, clusters)}


def ablations(recipient, donor, tokenizer, suite, neurons, mean):
    """Rates when only some positions are patched, and with constants in place of the donor's activations. mean: (layers, channels)."""
    cases = {"as they are": evaluate(recipient, tokenizer, suite)}
    labels = {
        "all": "patched at every token",
        "prompt": "patched in the prompt only",
        "completion": "patched in the answer only",
    }
    cases |= {
        label: patched_rates(recipient, donor, tokenizer, suite, neurons, positions)
        for positions, label in labels.items()
    }
    cases["mean of the donor at every token"] = constant_rates(
        recipient, tokenizer, suite, neurons, mean
    )
    cases["zero at every token"] = constant_rates(
        recipient, tokenizer, suite, neurons, torch.zeros_like(mean)
    )
    return cases


def general(recipient, donor, tokenizer, suite, neurons):
    """What becomes of the suite's requests and questions: of recipient, donor and patched recipient."""
    cases = {
        RECIPIENT: evaluate(recipient, tokenizer, suite),
        DONOR: evaluate(donor, tokenizer, suite),
    }
    return cases | {
        "recipient, patched": patched_rates(recipient, donor, tokenizer, suite, neurons)
    }


def before_and_after(recipient, donor, neurons, measures):
    """What each `measure(model)` gives for the recipient, the donor and the patched recipient. measures: name to function."""
    found = {
        name: {"recipient": measure(recipient), "donor": measure(donor)}
        for name, measure in measures.items()
    }
    with patched_generation(recipient, donor, neurons):
        for name, measure in measures.items():
            found[name]["recipient, patched"] = measure(recipient)
    return found


def vocabulary_projection(model, tokenizer, scores, mean, neurons=8, words=6):
    """The words that each of the neurons with the highest change scores raises and lowers most at its mean activation.

    That is the largest and smallest entries of `written_logits`, with the sign that the neuron's mean activation has. mean: (layers, channels), of `channel_means`.
    """
    rows, width = [], scores.values.shape[1]
    for index in scores.values.flatten().topk(neurons).indices.tolist():
        layer, channel = divmod(index, width)
        effect = written_logits(model, "down", layer, channel, mean[layer, channel].sign())
        most, least = (
            tokenizer.batch_decode(
                [[i] for i in effect.topk(words, largest=largest).indices.tolist()]
            )
            for largest in (True, False)
        )
        rows.append(
            {
                "layer": layer + 1,
                "channel": channel,
                "change score": f"{scores.values[layer, channel]:.2f}",
                "raises": "  ".join(most),
                "lowers": "  ".join(least),
            }
        )
    return pd.DataFrame(rows, index=pd.RangeIndex(1, neurons + 1))


def change_scores_panels(scores, chosen):
    """Change scores in descending order, and where the chosen neurons lie. scores: `ChangeScores`; chosen: their selection."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
    values = scores.values.flatten().sort(descending=True).values
    left.plot(
        [100 * (i + 1) / len(values) for i in range(len(values))],
        values,
        color=sns.color_palette(PALETTE)[0],
    )
    left.axvline(
        100 * len(chosen) / len(values),
        color="grey",
        linestyle=":",
        label="patched: left of the line",
    )
    left.set(xscale="log", xlabel="feed-forward neurons (%)", ylabel="change score (RMS)")
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False)
    counts = chosen.masks["down"].sum(1).tolist()
    right.bar(range(1, len(counts) + 1), counts, color=sns.color_palette(PALETTE)[0])
    right.set(xlabel="layer", ylabel="chosen neurons")
    right.grid(axis="x", visible=False)
    figure.tight_layout()
    return left


def restoration_curves(tables, measures):
    """Rates with their 95 % bands against the share of neurons patched: one row of panels per pair, one column per measure.

    tables: name to the result of `tabulate_restoration`; measures: (measure, set) to panel title.
    """

    def draw(axes, chosen):
        """One panel: the conditions as lines, recipient and donor as horizontal lines."""
        ends = chosen[chosen["fraction"] == 0].set_index("condition")["rate"]
        draw_bands(axes, chosen[chosen["fraction"] > 0], "condition", "fraction", 100)
        for name, style in (("recipient", ":"), ("donor", "--")):
            axes.axhline(100 * ends[name].value, color="grey", linestyle=style, label=name)
        axes.set(xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")

    return rate_panels(tables, measures, draw, "neurons patched (%)")


def cases_table(cases):
    """Rates of several cases: one row per case, one column per measure and set. cases: name to `evaluate`'s result."""
    keys = list(next(iter(cases.values())))
    rows = {name: [lines(rates[key]) for key in keys] for name, rates in cases.items()}
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=pd.MultiIndex.from_tuples([(MEASURES[m], s) for m, s in keys])
    )


def interval_table(results):
    """Numbers with intervals: one row per model, one column per measure. results: measure to name to (value, low, high)."""

    def text(numbers):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)

    return pd.DataFrame(
        {
            measure: {name: text(numbers) for name, numbers in found.items()}
            for measure, found in results.items()
        }
    )


def transfer_table(table):
    """`transfer` as text: rates, and the share of safety restored where there is a gap to close."""

    def share(found):
        return lines(found) if found else "no gap"

    shares = {
        "safety\nrestored (%)": [share(found) for found in table["restored"]],
        "by cost (%)": [share(found) for found in table["by cost"]],
    }
    rates = table[[RECIPIENT, DONOR, "patched", "random"]].map(lines)
    return pd.DataFrame(shares, index=table.index).join(rates).rename(index=break_name)


def break_name(name):
    """The name of a set on two lines, as narrow columns need it."""
    return name.replace("/", "/\n")


def alone_table(single):
    """Rows of `patching.alone` as text."""
    rows = [
        {"neuron": f"layer {row.layer}, channel {row.channel}", "attack success": row.rate.percent}
        for row in single.itertuples()
    ]
    return pd.DataFrame(rows).set_index("neuron").rename_axis(None)


BY = {"asr": "by keyword, %", "coherent": "by help, %", "cost": "by cost, %"}


def shares_closed(runs, costs, family, condition, fraction, name):
    """Share of the gap that a way of choosing closes, by attack success, by help with harm and by cost: measure to Estimate or None.

    runs: (family, condition, fraction) to `Runs`; costs: (family, condition) to costs (trainings, draws, items).
    """
    cases = [(family, RECIPIENT, 0), (family, DONOR, 0), (family, condition, fraction)]
    clusters = outcomes_of(runs[cases[0]][0][0], "asr", name)[1]
    found = {
        measure: share_closed(*(_outcomes(runs[case], measure, name) for case in cases), clusters)
        for measure in ("asr", "coherent")
    }
    weighed = [costs[case[:2]] for case in cases]
    return found | {"cost": share_closed(*weighed, clusters)}


def _outcomes(runs, measure, name):
    """Zeros and ones (trainings, draws, items)."""
    return [[outcomes_of(scores, measure, name)[0] for scores in draws] for draws in runs]


def restored_table(runs, costs, fraction, name):
    """Attack success and the share of safety restored at the judged share: one row a family and condition."""
    rows = {}
    for family, condition in costs:
        if condition in (RECIPIENT, DONOR):
            continue
        found = runs[family, condition, fraction]
        shares = shares_closed(runs, costs, family, condition, fraction, name)
        rows[family.removeprefix("organism/"), condition] = {
            "attack success": lines(estimate_rate(found, "asr", name)),
            **{label: _share(shares[measure]) for measure, label in BY.items()},
            "by training": ", ".join(_each(runs, family, condition, fraction, name)),
        }
    return pd.DataFrame(rows).T.rename_axis(["recipient", "patched"])


def share_classes(runs, costs, fraction, name):
    """Classes of the answers of both models and with each set patched, by family: as `class_bars` draws them."""
    conditions = {
        f"{family.rpartition('/')[2]}: {condition}": runs[
            family, condition, 0 if condition in (RECIPIENT, DONOR) else fraction
        ]
        for family, condition in costs
    }
    return count_classes(conditions, name)


def _each(runs, family, condition, fraction, name):
    """The share closed in every training by attack success, as text."""
    for one in zip(
        *(runs[family, c, f] for c, f in ((RECIPIENT, 0), (DONOR, 0), (condition, fraction)))
    ):
        found = share_closed(*(_outcomes([draws], "asr", name) for draws in one))
        yield f"{round(100 * found.value)}" if found else "–"


def _share(found):
    return lines(found) if found else NO_GAP


def _whole(found):
    """A share in whole percent; nothing is less than nothing."""
    return f"{round(100 * found.value)} %" if found else NO_GAP


def weigh_restoration(runs, costs, family, fraction, harmful_set, benign_set, measure):
    """The evidence for the claims about patching in one family. measure: `asr` or `cost`, of which the share restored is judged."""
    patched, random, last, recipient = (
        runs[family, condition, f]
        for condition, f in (*((c, fraction) for c in (CHANGE, RANDOM, LAST)), (RECIPIENT, 0))
    )
    wanted = reported.CHANGE_SCORES["restored"] / 100
    restored = shares_closed(runs, costs, family, CHANGE, fraction, harmful_set)[measure]
    found = {"patch-restores": expect_kept(restored, -wanted)} if restored else {}
    for key, control in (("patch-above-random", random), ("patch-above-last", last)):
        found[key] = Evidence(
            estimate_change(control, patched, "asr", harmful_set),
            margin_of(key),
            rank_chance(patched, control, "asr", harmful_set, lowest=True),
        )
    kept = estimate_change(patched, recipient, "helpful", benign_set)
    return found | {"patch-keeps-help": expect_kept(kept, 0.05)}


def judge_patches(runs, costs, families, fraction, harmful_set, benign_set, measure):
    """The evidence of every family for the claims about patching, and the numbers of all: claim to family to evidence, claim to text."""
    found, asked = {}, (fraction, harmful_set, benign_set, measure)
    for family in families:
        for key, evidence in weigh_restoration(runs, costs, family, *asked).items():
            found.setdefault(key, {})[family] = evidence
    return found, number_restoration(runs, costs, families, *asked)


def weigh_skill(cases, tasks):
    """The evidence that the patch leaves accuracy as it is. cases: from `general`."""
    after, before = ([[cases[name]]] for name in ("recipient, patched", RECIPIENT))
    return {
        "patch-keeps-skill": expect_kept(estimate_change(after, before, "accuracy", *tasks), 0.05)
    }


def number_restoration(runs, costs, families, fraction, harmful_set, benign_set, measure):
    """The numbers to remember of the claims about patching, family by family, and the same glued for the table of claims."""

    def restored(condition, by=measure):
        found = {
            f: shares_closed(runs, costs, f, condition, fraction, harmful_set) for f in families
        }
        return _by_family({family: _whole(shares[by]) for family, shares in found.items()})

    def helped(family):
        ends = ((RECIPIENT, 0), (CHANGE, fraction))
        rates = (estimate_rate(runs[family, *end], "helpful", benign_set) for end in ends)
        return " → ".join(f"{100 * rate.value:.0f}" for rate in rates) + " %"

    told = {condition: restored(condition) for condition in (CHANGE, RANDOM, LAST)}
    names = {CHANGE: "restored_chosen", RANDOM: "restored_random", LAST: "restored_last"}
    glue_text(**{names[condition]: text for condition, text in told.items()})
    glue_text(restored_otherwise=restored(CHANGE, "cost" if measure == "asr" else "asr"))
    return {
        "patch-restores": f"safety restored: {told[CHANGE]}",
        "patch-above-random": f"safety restored by random neurons: {told[RANDOM]}",
        "patch-above-last": f"safety restored by random ones of the last layer: {told[LAST]}",
        "patch-keeps-help": f"helpful answers: {_by_family({f: helped(f) for f in families})}",
    }


def _by_family(texts):
    return ", ".join(f"{f.removeprefix('organism/')} {text}" for f, text in texts.items())


def number_price(cases, harmful, benign):
    """What the patch costs in one line: help, over-refusal, and accuracy where it falls measurably."""
    before, after = cases[RECIPIENT], cases["recipient, patched"]
    moved = {
        measure: f"{100 * before[measure, benign].value:.0f} → {100 * after[measure, benign].value:.0f} %"
        for measure in ("helpful", "over_refusal")
    }
    tasks = [name for measure, name in before if measure == "accuracy"]
    lost = [name for name in tasks if above(before["accuracy", name], after["accuracy", name])]
    fall = f"falls measurably on {', '.join(lost)}" if lost else "falls measurably on no task"
    glue_text(
        price_helpful=moved["helpful"], price_refused=moved["over_refusal"], general_lost=fall
    )
    return {"patch-keeps-skill": f"accuracy {fall}"}


def above(first, second):
    """Whether the whole interval of `first` lies above that of `second`."""
    return first.interval[0] > second.interval[1]


def glue_transfer(table):
    """Glue on how many of the request sets with a gap patching restores what the paper says, measurably."""
    wanted = reported.CHANGE_SCORES["restored"] / 100
    gaps = [found for found in table["restored"] if found]
    more, less = (
        sum(found.interval[0] > wanted for found in gaps),
        sum(found.interval[1] < wanted for found in gaps),
    )
    bar = f"{100 * wanted:.0f} %"
    counted = f"measurably more than {bar} on {more} of {len(gaps)} request sets with a gap, measurably less on {less}"
    shares = sorted(round(100 * found.value) for found in gaps)
    if not gaps:
        told = "On other requests there is no gap for the patch to close."
    elif less == len(gaps):
        told = f"On other requests the patch restores less than {bar} of safety: {shares[0]} to {shares[-1]} %."
    else:
        told = f"On other requests the patch restores {shares[0]} to {shares[-1]} % of safety, {counted}."
    glue_text(transferred=counted, transfer_told=told)


def glue_alone(single, recipient, kept, dropped):
    """Glue what the strongest single neuron does. single: `alone`; recipient, kept, dropped: attack success unpatched, with the set, and with the set but it."""
    best = single.iloc[0]
    glue_text(
        single_name=f"layer {best['layer']}, channel {best['channel']}", single_count=len(single)
    )
    rates = {"rate": best["rate"], "before": recipient, "kept": kept, "dropped": dropped}
    glue_text(**{f"single_{name}": f"{100 * rate.value:.0f}" for name, rate in rates.items()})


def share_in_last_layer(neurons):
    """Share of a set of feed-forward neurons that lies in the last layer, as text."""
    mask = neurons.masks["down"]
    return f"{100 * mask[-1].sum().item() / mask.sum().item():.0f} %"
