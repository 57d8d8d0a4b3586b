"""Chapter 11: what it makes of the tables of the answer key, against scikit-learn, pandas and tables made by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import scores_with
from scipy import stats
from sklearn.metrics import roc_auc_score

from safetyneuron.chapters import ch11_answer_key as chapter
from safetyneuron.detectors.effects import all_units, neurons_of, units_named
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.kept.truth import MASK
from safetyneuron.neurons.sets import Units

RULES = ("exact/eq3", "exact/contrast", "snip", "change", "control/norm", MASK)


@pytest.fixture
def planted():
    """A table of AUCs: SNIP is best in every training but the first, where it is worst; the change score sees the base model."""
    draw, rows = np.random.default_rng(0), []
    for kind in chapter.KINDS:
        for training in range(5):
            auc = dict.fromkeys(RULES, 0.5) | {"snip": 0.8, "exact/contrast": 0.6, "change": 0.99}
            if training == 0:
                auc |= {"snip": 0.3, "exact/contrast": 0.7}
            for key in RULES:
                row = {"kind": kind, "training": training, "detector": key, "auc": auc[key]}
                rows.append(row | {"precision": draw.random(), "passes": 3.0})
    return pd.DataFrame(rows)


def test_pairs_are_counted_as_scikit_learn_does_with_ties_half():
    draw = torch.Generator().manual_seed(0)
    ranking = {"ffn": torch.randint(0, 5, (2, 40), generator=draw), "q": torch.zeros(2, 8)}
    inside, outside = (
        Units({k: torch.rand(x.shape, generator=draw) < 0.3 for k, x in ranking.items()})
        for _ in range(2)
    )
    outside = Units({k: m & ~inside.kinds[k] for k, m in outside.kinds.items()})
    flat = {
        k: torch.cat([x[k].flatten() for x in (ranking, inside.kinds, outside.kinds)]).view(3, -1)
        for k in ranking
    }
    scores, yes, no = torch.cat(list(flat.values()), 1).numpy()
    either = (yes + no) > 0
    expected = roc_auc_score(yes[either], scores[either])
    assert chapter.compare_pairs(ranking, inside, outside) == pytest.approx(expected)


def test_the_best_rule_is_chosen_on_other_trainings_among_those_that_see_the_aligned_model_only(
    planted,
):
    found = chapter.choose_best(planted, "llama-planted")
    assert found.tolist() == [0.3, 0.8, 0.8, 0.8, 0.8]
    assert not any(map(chapter.compete, ("change", "control/norm", MASK)))
    assert sum(map(chapter.compete, DETECTORS)) >= 26


def test_intervals_over_trainings_are_students_of_the_means_over_kinds():
    values = np.random.default_rng(0).random((3, 5))
    found = chapter.estimate_trainings(values)
    means = values.mean(0)
    low, high = stats.t.interval(0.95, 4, means.mean(), means.std(ddof=1) / 5**0.5)
    assert found.value == pytest.approx(means.mean())
    assert found.interval == pytest.approx((low, high))


def test_units_add_up_to_the_rank_correlation():
    first, second = np.random.default_rng(0).normal(size=(2, 50))
    expected = stats.spearmanr(first, second)[0]
    assert chapter.correlate_items(first, second).mean() == pytest.approx(expected)


@pytest.mark.organism
def test_units_are_read_back_as_they_were_written(chat):
    model = chat[0]
    units = all_units(model)[::701]
    text = " ".join(f"{kind}.{layer}.{channel}" for kind, layer, channel in units)
    assert units_named(text) == units
    assert len(neurons_of(model, units_named(text)).units()) == len(units)


def test_rules_are_sorted_by_what_they_find(planted):
    summary = chapter.summarise_planted(planted)
    assert (
        summary.index[0] == "change"
        and summary["auc"].map(lambda e: e.value).is_monotonic_decreasing
    )
    assert summary.loc["snip", "auc"].value == pytest.approx((0.3 + 4 * 0.8) / 5)
    needed = pd.Series({key: 10.0 for key in RULES} | {"snip": np.nan})
    axes = chapter.draw_poster(summary, needed)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [chapter.label_of(key) for key in summary.index if key != MASK]
    assert sum(text.get_text() == "✕" for text in axes.figure.axes[1].texts) == 1


@pytest.mark.organism
def test_sets_that_other_papers_switch_off_are_as_large_as_they_say(chat):
    units = pd.DataFrame(all_units(chat[0]), columns=["kind", "layer", "channel"])
    ffn = (units["kind"] == "ffn").to_numpy()
    order = np.random.default_rng(0).permutation(len(units)) + 1.0
    ranks = units.assign(wanda=order, heads=np.where(order <= 40, 20.5, order))
    ranks = ranks.assign(
        cna=np.where(ffn, order, np.inf), perturbation=np.where(ffn, order, np.inf)
    )
    sets = chapter.sets_of_own_claims(chat[0], ranks)
    sizes = {claim: len(neurons.units()) for claim, neurons in sets.items()}
    assert sizes["cna-halves-refusal"] == max(1, round(0.001 * ffn.sum()))
    assert sizes["fifty-change-the-form"] == 50 and sizes["one-head-breaks"] == 40
    assert sizes["three-percent-breaks"] == round(0.03 * len(units))
    first = units[ffn].iloc[np.argsort(order[ffn])[:50]]
    chosen = sets["fifty-change-the-form"].units().kinds["ffn"]
    assert all(chosen[layer, channel] for _, layer, channel in first.itertuples(index=False))


@pytest.mark.parametrize("refused, effect", [(60, -0.15), (45, 0.0), (30, 0.15)])
def test_half_of_the_refusals_is_half_of_what_the_whole_model_refuses(refused, effect):
    whole, without = (scores_with({("asr", "h"): 100 - n}) for n in (90, refused))
    found = chapter.weigh_own_claims(whole, {"cna-halves-refusal": without}, "h")
    (evidence,) = found["cna-halves-refusal"].values()
    assert evidence.effect.value == pytest.approx(effect) and evidence.margin == 0
