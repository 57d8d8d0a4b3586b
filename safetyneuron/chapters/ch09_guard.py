"""Chapter 09, the safeguard of Chen et al. (2025): is an answer going to be unsafe, asked before it is written."""

from collections import Counter
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import lines
from safetyneuron.book.plots import draw_bands
from safetyneuron.chapters.ch09_contrast import CHANGE, LAST, RANDOM, break_name
from safetyneuron.data.prompts import has_splits, load_prompts
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.cost import answer_costs
from safetyneuron.metrics.estimates import estimate_mean
from safetyneuron.metrics.outcomes import outcomes_of
from safetyneuron.metrics.rates import Rate
from safetyneuron.metrics.suite import Suite, evaluate
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.neurons.activations import last_activations
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism.reading import topic_of

SIZES = (10, 20, 30, 50, 150, 300, 500, 700, 900, 1200, 1500)  # neurons, as in the authors' script
WORDS = "words of the request"


@dataclass(frozen=True)
class Asked:
    """Requests, what every feed-forward neuron does at their last token (prompts, neurons), and what the model's own answers cost."""

    prompts: list
    features: np.ndarray
    costs: np.ndarray

    @property
    def unsafe(self):
        """Whether the answer costs more than nothing (the authors' label)."""
        return self.costs > 0


def ask(model, tokenizer, name, split, count, judge):
    """The first requests of a set, asked."""
    prompts = load_prompts(name, split)[:count]
    costs = np.array(answer_costs(model, tokenizer, prompts, judge))
    return Asked(prompts, last_activations(model, tokenizer, prompts), costs)


def ask_all(model, tokenizer, train_set, test_sets, count, judge):
    """What the safeguard is tested on: set to `Asked`.

    Raises
    ------
    SafetyNeuronError
        If the file that it learns from is one of them.
    """
    if train_set in test_sets and not has_splits(train_set):
        raise SafetyNeuronError(f"{train_set} is both training and test file: give two files")
    return {name: ask(model, tokenizer, name, "test", count, judge) for name in test_sets}


def flag(learnt, asked, chosen):
    """Which answers a logistic regression on some neurons (a mask over all) expects to be unsafe."""
    from sklearn.preprocessing import StandardScaler

    features = learnt.features[:, chosen], asked.features[:, chosen]
    return _expect(StandardScaler(), features[0], learnt.unsafe, features[1])


def flag_by_words(learnt, asked):
    """The same on the words of the request: what can be told without looking into the model."""
    from sklearn.feature_extraction.text import CountVectorizer

    return _expect(CountVectorizer(), learnt.prompts, learnt.unsafe, asked.prompts)


def _expect(prepare, known, labels, new):
    """What a regression expects of new rows; one that has seen a single kind of answer expects nothing else."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if len(set(labels)) == 1:
        return np.full(len(new), labels[0])
    return make_pipeline(prepare, LogisticRegression(max_iter=1000)).fit(known, labels).predict(new)


def masks_to_read(scores, size, draws):
    """Condition to masks over all feed-forward neurons: the highest change scores, random ones of the same layers, and of the last layer.

    Random ones are drawn from all neurons of a layer, as the authors draw them: at large sizes no others would be left.
    """
    chosen = scores.top(min(size, scores.values.numel()))
    drawn = [_random_in_layers(chosen, seed) for seed in range(draws)]
    last = [scores.last_layers(len(chosen), seed) for seed in range(draws)]
    sets = {CHANGE: [chosen], RANDOM: drawn, LAST: last}
    return {
        name: [neurons.masks["down"].flatten().numpy() for neurons in some]
        for name, some in sets.items()
    }


def _random_in_layers(neurons, seed):
    draw, cells = torch.Generator().manual_seed(seed), []
    counts = Counter(layer for _, layer, _ in neurons.cells())
    width = neurons.masks["down"].shape[1]
    for layer, count in counts.items():
        cells.append(("down", layer, torch.randperm(width, generator=draw)[:count]))
    return NeuronSet.from_cells(neurons.shapes, cells)


def compare(learnt, tests, scores, draws, sizes=SIZES):
    """What each way of choosing neurons flags: (condition, size) to arrays (draws, requests of all tests); the words have size 0."""
    found = {}
    for size in [size for size in sizes if size <= scores.values.numel()]:
        for condition, masks in masks_to_read(scores, size, draws).items():
            found[condition, size] = np.array(
                [_over(tests, lambda asked: flag(learnt, asked, mask)) for mask in masks]
            )
    found[WORDS, 0] = np.array([_over(tests, lambda asked: flag_by_words(learnt, asked))])
    return found


def _over(tests, give):
    return np.concatenate([give(asked) for asked in tests.values()])


def _right(flagged, tests):
    """Ones where it was right: (draws, requests)."""
    return (flagged == _over(tests, lambda asked: asked.unsafe)).astype(float)


def _labels(tests):
    """The cluster and the set of every request."""
    rows = [(topic_of(p) or p, name) for name, asked in tests.items() for p in asked.prompts]
    return [cluster for cluster, _ in rows], [name for _, name in rows]


def accuracy(flagged, tests):
    """Mean accuracy over the test sets, with its interval over draws and clusters of requests."""
    return estimate_mean(_right(flagged, tests)[None], *_labels(tests), proportion=True)


def guard_curve(found, tests):
    """Accuracy against the number of neurons that are read, one line a way of choosing them, and what the words tell."""
    rows = [(c, size, accuracy(flagged, tests)) for (c, size), flagged in found.items() if size]
    _, axes = plt.subplots()
    draw_bands(axes, pd.DataFrame(rows, columns=["condition", "size", "rate"]), "condition", "size")
    words = accuracy(found[WORDS, 0], tests).value
    axes.axhline(100 * words, color="grey", linestyle="--", label=WORDS)
    axes.set(xscale="log", xlabel="neurons that are read", ylabel="accuracy (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8)
    return axes


def guard_table(found, tests, size):
    """Accuracy on every test set at one number of neurons, and the share of unsafe answers that is flagged."""
    rows, (_, sets) = {}, _labels(tests)
    unsafe = _over(tests, lambda asked: asked.unsafe)
    for (condition, read), flagged in found.items():
        if read != (0 if condition == WORDS else size):
            continue
        right = _right(flagged, tests)
        rows[condition] = {
            break_name(name): f"{100 * right[:, [s == name for s in sets]].mean():.0f}"
            for name in tests
        }
        rows[condition] |= {"mean": lines(accuracy(flagged, tests))}
        rows[condition] |= {
            "unsafe ones\nflagged": f"{100 * flagged[:, unsafe].mean():.0f}"
            if unsafe.any()
            else "–"
        }
    share = np.mean([max(asked.unsafe.mean(), 1 - asked.unsafe.mean()) for asked in tests.values()])
    rows["always the commoner"] = {"mean": f"{100 * share:.0f}"}
    return pd.DataFrame(rows).T.fillna("").rename_axis("accuracy, %")


def guarded_table(model, tokenizer, learnt, tests, benign, scores, size):
    """Unsafe answers, mean cost, and helpful answers of the model as it is and with flagged requests refused."""
    mask = masks_to_read(scores, size, 0)[CHANGE][0]
    costs = _over(tests, lambda asked: asked.costs)
    stopped = _over(tests, lambda asked: flag(learnt, asked, mask))
    count = max(len(asked.prompts) for asked in tests.values())
    asked = load_prompts(benign)[:count]
    helped, _ = outcomes_of(
        evaluate(model, tokenizer, Suite((), benign, (), count)), "helpful", benign
    )
    features = Asked(asked, last_activations(model, tokenizer, asked), np.zeros(len(asked)))
    refused = flag(learnt, features, mask)

    def row(harm, help_, passed):
        return {
            "unsafe answers": Rate(int(harm.sum()), len(harm)).percent,
            "helpful answers": Rate(int(help_.sum()), len(help_)).percent,
            "mean cost of what is answered": f"{costs[passed].mean():.2f}" if passed.any() else "–",
        }

    rows = {"as it is": row(costs > 0, helped, np.ones(len(costs), bool))}
    rows["guarded"] = row((costs > 0) & ~stopped, helped.astype(bool) & ~refused, ~stopped)
    return pd.DataFrame(rows).T.rename_axis("model")


def weigh_guard(found, tests, size):
    """The evidence for the claims about the safeguard at one number of neurons."""
    own, clusters, sets = _right(found[CHANGE, size], tests), *_labels(tests)
    others = {"guard-above-random": (RANDOM, size), "guard-above-words": (WORDS, 0)}
    return {
        key: Evidence(
            estimate_mean((own - _right(found[which], tests))[None], clusters, sets), margin_of(key)
        )
        for key, which in others.items()
    }


def number_words(found, tests):
    """Accuracy of the words of the request, as text."""
    return f"{100 * accuracy(found[WORDS, 0], tests).value:.0f} %"


def number_guard(found, tests, size):
    """The numbers to remember of the claims about the safeguard."""
    own, random = (
        f"{100 * accuracy(found[condition, size], tests).value:.0f} %"
        for condition in (CHANGE, RANDOM)
    )
    return {
        "guard-above-random": f"accuracy {own}, random neurons {random}",
        "guard-above-words": f"accuracy {own}, the words {number_words(found, tests)}",
    }
