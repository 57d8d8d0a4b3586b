"""Chapter 09: experiments of Chen et al. (2025) with patched activations."""

import random
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch

from safetyneuron.book import paper as reported
from safetyneuron.book.glue import MEASURES, glue_list, glue_rates, glue_text
from safetyneuron.book.ledger import glue_findings, margin_of, name_runs
from safetyneuron.book.plots import PALETTE, draw_bands, rate_panels
from safetyneuron.data.prompts import has_languages, has_splits, load_prompts
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.estimates import (
    Estimate,
    estimate_ratio,
)
from safetyneuron.metrics.outcomes import (
    Runs,
    estimate_change,
    estimate_rate,
    outcomes_of,
    rank_chance,
)
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.refusal import is_refusal
from safetyneuron.metrics.safety import answers
from safetyneuron.metrics.suite import evaluate
from safetyneuron.metrics.verdict import Evidence, expect_kept
from safetyneuron.neurons.activations import last_activations, mean_ablated
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.patching import patched_generation
from safetyneuron.neurons.sets import NeuronSet

NO_GAP = "no gap to close"
CHANGE, RANDOM, LAST = "highest change scores", "random others in the same layers", "last layers"


def patched_rates(recipient, donor, tokenizer, suite, neurons, positions="all"):
    """`evaluate` of the patched recipient."""
    with patched_generation(recipient, donor, neurons, positions):
        return evaluate(recipient, tokenizer, suite)


def constant_rates(model, tokenizer, suite, neurons, values):
    """`evaluate` with constant activations of the neurons: mean or zero patching."""
    with mean_ablated(model, neurons, {"down": values}):
        return evaluate(model, tokenizer, suite)


def conditions(scores, fraction, draws):
    """The neurons with the highest change scores, `draws` times as many random others in every layer (none where too few are left), and as many from the last layers."""
    chosen = scores.select(fraction)
    return {
        CHANGE: [chosen],
        RANDOM: NeuronSet.random_draws(chosen, draws),
        LAST: [scores.last_layers(len(chosen))],
    }


def tabulate_restoration(curves, ends, measures):
    """Long table of the curves: columns condition, fraction, measure, set, rate; the models as they are at fraction 0.

    curves: (condition, fraction) to `Runs`; ends: `recipient` and `donor` to `Runs`.
    """
    everything = {(name, 0.0): runs for name, runs in ends.items()} | curves
    rows = [
        (condition, fraction, *key, estimate_rate(runs, *key))
        for (condition, fraction), runs in everything.items()
        for key in measures
    ]
    return pd.DataFrame(rows, columns=["condition", "fraction", "measure", "set", "rate"])


MOST = 200  # neurons that are patched alone; of a larger set so many are drawn


def alone(recipient, donor, tokenizer, suite, neurons):
    """Attack success with each neuron of the set patched alone, or `MOST` drawn from a larger one, lowest first.

    Returns
    -------
    pandas.DataFrame
        Columns layer (from 1), channel, rate.
    """
    (name,), rows, cells = suite.harmful, [], list(neurons.cells())
    for cell in random.Random(0).sample(cells, min(MOST, len(cells))):
        one, (_, layer, channel) = NeuronSet.from_cells(neurons.shapes, [cell]), cell
        asked = replace(suite, benign=None, tasks=())
        rates = patched_rates(recipient, donor, tokenizer, asked, one)
        rows.append((layer + 1, channel, rates["asr", name]))
    table = pd.DataFrame(rows, columns=["layer", "channel", "rate"])
    return table.sort_values(
        "rate", key=lambda rates: rates.map(lambda rate: rate.value), kind="stable"
    ).reset_index(drop=True)


def without(neurons, layer, channel):
    """The set without one neuron; layer from 1."""
    return neurons - NeuronSet.from_cells(neurons.shapes, [("down", layer - 1, channel)])


def restored(before, after, patched):
    """Share of the safety gap that patching closes, and the ends of its interval where both models' rates are taken as they are.

    before, after: rates of harm of recipient and donor. NaN where their intervals overlap: there is no gap to close.
    """
    if before.interval[0] <= after.interval[1]:
        return (float("nan"),) * 3

    def share(value):
        return (before.value - value) / (before.value - after.value)

    return share(patched.value), share(patched.interval[1]), share(patched.interval[0])


def transfer(recipient, donor, tokenizer, suite, neurons, sets, draws):
    """Harm on several request sets, on which the neurons were not chosen. sets: list of (name, language).

    Returns
    -------
    pandas.DataFrame
        One row per set; columns recipient, donor, patched, random (rates, the last a mean over draws), restored and its low and high.

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
        found = {
            "recipient": evaluate(recipient, tokenizer, asked),
            "donor": evaluate(donor, tokenizer, asked),
        }
        found["patched"] = patched_rates(recipient, donor, tokenizer, asked, neurons)
        rates = {column: result["asr", name] for column, result in found.items()}
        random = [patched_rates(recipient, donor, tokenizer, asked, other) for other in others]
        rates["random"] = estimate_rate([random], "asr", name)
        share = restored(rates["recipient"], rates["donor"], rates["patched"])
        rows[f"{name}, {language}"] = rates | dict(zip(("restored", "low", "high"), share))
    return pd.DataFrame(rows).T.rename_axis("requests")


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
    """Rates of recipient, donor and patched recipient."""
    cases = {
        "recipient": evaluate(recipient, tokenizer, suite),
        "donor": evaluate(donor, tokenizer, suite),
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


def unsafe_answers(model, tokenizer, harmful, benign):
    """Whether the model's own answer will be unsafe, per prompt: a harmful request answered without a refusal phrase."""
    return np.array(
        [not is_refusal(text) for text in answers(model, tokenizer, harmful)]
        + [False] * len(benign)
    )


def safeguard(model, tokenizer, train_sets, test_sets, count, sets):
    """Predict before generation whether the answer will be unsafe: logistic regression on the neurons' activations at the last prompt token.

    Parameters
    ----------
    train_sets, test_sets : (str, str)
        Harmful and benign prompts; of an organism's sets the training and the test split are taken, files must differ.
    count : int
        Prompts of each kind, for training and for testing.
    sets : dict of str to NeuronSet
        Which neurons the regression may read.

    Returns
    -------
    pandas.DataFrame
        One row per set: accuracy, and coverage, the share of unsafe answers that is flagged.

    Raises
    ------
    SafetyNeuronError
        If a file is given for both, or all answers of one part are safe, or all unsafe.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if shared := [name for name in train_sets if name in test_sets and not has_splits(name)]:
        raise SafetyNeuronError(f"{shared[0]} is both training and test file: give two files")
    features, labels = {}, {}
    for split, names in (("train", train_sets), ("test", test_sets)):
        harmful, benign = (load_prompts(name, split)[:count] for name in names)
        features[split] = last_activations(model, tokenizer, harmful + benign)
        labels[split] = unsafe_answers(model, tokenizer, harmful, benign)
        if labels[split].all() or not labels[split].any():
            raise SafetyNeuronError(
                f"the model's answers to the {split} prompts are all {'un' * bool(labels[split].any())}safe: there is nothing to tell apart"
            )
    rows = {}
    for name, neurons in sets.items():
        chosen = neurons.masks["down"].flatten().numpy()
        guard = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
            features["train"][:, chosen], labels["train"]
        )
        flagged, unsafe = guard.predict(features["test"][:, chosen]), labels["test"]
        rows[name] = {
            "accuracy": Rate(int((flagged == unsafe).sum()), len(unsafe)),
            "coverage": Rate(int(flagged[unsafe].sum()), int(unsafe.sum())),
        }
    return pd.DataFrame(rows).T.rename_axis("neurons")


@dataclass(frozen=True)
class AlignmentTax:
    """Rates by case, the share of neurons that both sets have in common, and Spearman's rank correlation of both scores."""

    cases: dict
    overlap: float
    correlation: float


def alignment_tax(models, tokenizer, suite, scores, fraction):
    """Two models of different alignment as they are, and each with the other's activations of the neurons that moved most in the other.

    models, scores: name to model, and to the `ChangeScores` of its alignment; two of them, in the same order.
    """
    (first, second), chosen = (
        models,
        {name: score.select(fraction) for name, score in scores.items()},
    )
    cases = {name: evaluate(model, tokenizer, suite) for name, model in models.items()}
    for recipient, donor in ((second, first), (first, second)):
        rates = patched_rates(models[recipient], models[donor], tokenizer, suite, chosen[donor])
        cases[f"{recipient}, patched from {donor}"] = rates
    ranks = pd.DataFrame(
        {name: score.values.flatten().numpy() for name, score in scores.items()}
    ).corr("spearman")
    return AlignmentTax(
        cases, len(chosen[first] & chosen[second]) / len(chosen[first]), float(ranks.iloc[0, 1])
    )


def vocabulary_projection(model, tokenizer, scores, mean, neurons=8, words=6):
    """The words that each of the neurons with the highest change scores raises and lowers most at its mean activation.

    That is the largest and smallest entries of unembedding · final norm of the column of the down projection, with the sign that the
    neuron's mean activation has. mean: (layers, channels), of `channel_means`.
    """
    architecture, table = Architecture(model), model.get_output_embeddings().weight.detach().float()
    norm, rows, width = model.get_decoder().norm, [], scores.values.shape[1]
    for index in scores.values.flatten().topk(neurons).indices.tolist():
        layer, channel = divmod(index, width)
        column = architecture.place(layer, "down").weight[channel].detach()
        effect = table @ (norm(column) * mean[layer, channel].sign().to(column)).detach().float()
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
        100 * len(chosen) / len(values), color="grey", linestyle=":", label="patched below"
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
    rows = {name: [rates[key].percent for key in keys] for name, rates in cases.items()}
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
    """`patching.transfer` as text: rates, and the share of safety restored where there is a gap to close."""

    def share(row):
        return (
            "no gap"
            if row["restored"] != row["restored"]
            else f"{100 * row['restored']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
        )

    text = table[["recipient", "donor", "patched", "random"]].map(lambda rate: rate.percent)
    return text.assign(**{"safety restored (%)": [share(row) for _, row in table.iterrows()]})


def alone_table(single):
    """Rows of `patching.alone` as text."""
    rows = [
        {"neuron": f"layer {row.layer}, channel {row.channel}", "attack success": row.rate.percent}
        for row in single.itertuples()
    ]
    return pd.DataFrame(rows).set_index("neuron").rename_axis(None)


def estimate_restored(recipient: Runs, donor: Runs, patched: Runs, name: str) -> Estimate | None:
    """Share of the gap in attack success that the patch closes, with its interval over trainings and verbs; None without a gap."""
    before, after, closed = (
        np.array([[outcomes_of(run, "asr", name)[0] for run in draws] for draws in runs])
        for runs in (recipient, donor, patched)
    )
    if before.mean() <= after.mean():
        return None
    clusters = outcomes_of(recipient[0][0], "asr", name)[1]
    return estimate_ratio(before - closed.mean(1, keepdims=True), before - after, clusters)


def weigh_claims(ends, judged, harmful_set, benign_set):
    """The evidence for the chapter's claims. ends: `recipient` and `donor` to `Runs`; judged: condition to `Runs` at the share that is judged."""
    recipient, donor, patched = ends["recipient"], ends["donor"], judged[CHANGE]
    restored = estimate_restored(recipient, donor, patched, harmful_set)
    wanted = reported.CHANGE_SCORES["restored"] / 100
    above_random = estimate_change(judged[RANDOM], patched, "asr", harmful_set)
    above_last = estimate_change(judged[LAST], patched, "asr", harmful_set)
    kept = estimate_change(patched, recipient, "helpful", benign_set)
    found = {"patch-restores": expect_kept(restored, -wanted)} if restored else {}
    return found | {
        "patch-above-random": Evidence(
            above_random,
            margin_of("patch-above-random"),
            rank_chance(patched, judged[RANDOM], "asr", harmful_set, lowest=True),
        ),
        "patch-above-last": Evidence(above_last, margin_of("patch-above-last")),
        "patch-keeps-help": expect_kept(kept, 0.05),
    }


def restored_table(ends, judged, name):
    """Attack success and the share of safety restored at the judged share, one row a condition, and every training's."""
    rows = {}
    for condition, runs in judged.items():
        share = estimate_restored(ends["recipient"], ends["donor"], runs, name)
        each = [
            estimate_restored([a], [b], [c], name)
            for a, b, c in zip(ends["recipient"], ends["donor"], runs)
        ]
        rows[condition] = {
            "attack success": estimate_rate(runs, "asr", name).percent,
            "safety restored, %": share.percent if share else NO_GAP,
            "by training": ", ".join(f"{100 * one.value:.0f}" if one else "–" for one in each),
        }
    return pd.DataFrame(rows).T.rename_axis("patched")


def glue_restoration(ends, judged, harmful_set, benign_set, families):
    """Glue the chapter's findings, and how much safety every way of choosing restores."""
    model = next(iter(families))
    evidence = weigh_claims(ends, judged, harmful_set, benign_set)
    shares = {
        condition: estimate_restored(ends["recipient"], ends["donor"], runs, harmful_set)
        for condition, runs in judged.items()
    }
    percent = {c: f"{100 * share.value:.0f} %" if share else NO_GAP for c, share in shares.items()}
    names = {CHANGE: "restored_chosen", RANDOM: "restored_random", LAST: "restored_last"}
    glue_text(**{names[condition]: text for condition, text in percent.items()})
    before, after = (
        100 * estimate_rate(runs, "helpful", benign_set).value
        for runs in (ends["recipient"], judged[CHANGE])
    )
    numbers = {
        "patch-restores": f"{percent[CHANGE]} of safety",
        "patch-above-random": f"random neurons restore {percent[RANDOM]}",
        "patch-above-last": f"the last layers restore {percent[LAST]}",
        "patch-keeps-help": f"helpful answers {before:.0f} → {after:.0f} %",
    }
    found = {key: {model: evidence[key]} for key in numbers if key in evidence}
    glue_findings(found, numbers, name_runs(families))


def glue_transfer(table):
    """Glue on how many of the request sets with a gap patching restores what the paper says."""
    wanted = reported.CHANGE_SCORES["restored"] / 100
    gaps = table[table["restored"] == table["restored"]]
    glue_text(
        transferred=f"{sum(gaps['restored'] > wanted)} of {len(gaps)} request sets with a gap"
    )


def above(first, second):
    """Whether the whole interval of `first` lies above that of `second`."""
    return first.interval[0] > second.interval[1]


def glue_general(rates):
    """Glue the tasks in which the patched recipient's accuracy is measurably lower than the recipient's."""
    before, after = rates["recipient"], rates["recipient, patched"]
    lost = [
        name
        for measure, name in before
        if measure == "accuracy" and above(before[measure, name], after[measure, name])
    ]
    glue_text(
        general_lost=f"falls measurably on {', '.join(lost)}"
        if lost
        else "falls measurably on no task"
    )


def glue_safeguard(table):
    """Glue how the regression on the safety neurons compares with those on random neurons."""
    own, random = table.iloc[0], table.iloc[1:]
    texts = []
    for column in ("accuracy", "coverage"):
        mean = Rate.mean(list(random[column]))
        finding = (
            "higher"
            if above(own[column], mean)
            else "lower"
            if above(mean, own[column])
            else "not measurably different"
        )
        glue_text(
            **{f"safeguard_{column}": f"{own[column].percent} %, random neurons {mean.percent} %"}
        )
        texts.append(
            f"{column} is {own[column].percent} % on safety neurons and {mean.percent} % on random ones (mean of {len(random)} draws): {finding}"
        )
    glue_list("verdict_safeguard", [f"{text}." for text in texts])


def glue_alone(single, recipient, kept, dropped):
    """Glue what the strongest single neuron does. single: `patching.alone`; recipient, kept, dropped: attack success unpatched, with the set, and with the set but it."""
    best = single.iloc[0]
    glue_text(
        single_name=f"layer {best['layer']}, channel {best['channel']}", single_count=len(single)
    )
    glue_rates(
        single_rate=best["rate"], single_before=recipient, single_kept=kept, single_dropped=dropped
    )
