"""Simulations: the intervals that the book reports cover the truth as often as they say."""

from itertools import combinations

import numpy as np
import pytest

from safetyneuron import Rate
from safetyneuron.chapters import ch10_comparison
from safetyneuron.metrics.estimates import (
    chance_of_ranks,
    estimate_exact,
    estimate_mean,
    estimate_pairs,
    estimate_ratio,
    rank_among,
    score_best,
)
from safetyneuron.metrics.rates import bootstrap

DRAWS = 4000


def coverage(trials, truth):
    """Share of samples whose Wilson interval holds the true proportion."""
    hits = np.random.default_rng(0).binomial(trials, truth, DRAWS)
    ends = {count: Rate(int(count), trials).interval for count in np.unique(hits)}
    return np.mean([ends[count][0] <= truth <= ends[count][1] for count in hits])


@pytest.mark.parametrize("trials", [20, 60, 100, 400])
def test_wilson_intervals_cover_at_their_nominal_rate(trials):
    rates = [coverage(trials, truth) for truth in np.linspace(0.02, 0.98, 25)]
    assert np.mean(rates) == pytest.approx(
        0.95, abs=0.012
    )  # over proportions; single ones swing, because hits are whole
    assert min(rates) > 0.83


# Spread of trainings, draws, verbs, and verbs of one training, on the scale of log odds.
EFFECTS = [(1.0, 0.7, 0.7, 0.5), (0.3, 0.3, 1.0, 0.3)]
VERBS, REQUESTS = 30, 4


def simulate(generator, centre, effects, trainings, draws, verbs):
    """Outcomes (trainings, draws, requests), each with the probability that its training, draw and verb give it."""
    of_training, of_draw, _, of_both = effects
    odds = centre + verbs + generator.normal(0, of_both, (trainings, 1, VERBS))
    odds = odds + generator.normal(0, of_draw if draws > 1 else 0, (trainings, draws, 1))
    if trainings > 1:  # one training is judged as it is
        odds = odds + generator.normal(0, of_training, (trainings, 1, 1))
    chance = np.repeat(1 / (1 + np.exp(-odds)), REQUESTS, axis=2)
    return (generator.random(chance.shape) < chance).astype(float)


def true_mean(centre, effects, trainings, draws):
    noise = np.random.default_rng(1).normal(size=(200_000, 4))
    spread = np.array(effects) * [trainings > 1, draws > 1, True, True]
    return (1 / (1 + np.exp(-centre - noise @ spread))).mean()


@pytest.mark.parametrize("effects", EFFECTS)
@pytest.mark.parametrize("trainings, draws", [(5, 1), (5, 5), (1, 19), (1, 1)])
def test_intervals_over_trainings_draws_and_verbs_cover(trainings, draws, effects):
    """At five trainings the truth is that of all trainings, at one that of this training."""
    generator, verbs = np.random.default_rng(0), np.repeat(np.arange(VERBS), REQUESTS)
    truth = true_mean(0, effects, trainings, draws)
    covered = []
    for _ in range(1000):
        shared = generator.normal(0, effects[2], VERBS)
        values = simulate(generator, 0, effects, trainings, draws, shared)
        low, high = estimate_mean(values, verbs, proportion=True).interval
        covered.append(low <= truth <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize("effects", EFFECTS)
@pytest.mark.parametrize("trainings, draws", [(5, 5), (1, 19)])
def test_intervals_of_a_difference_from_random_draws_cover(trainings, draws, effects):
    generator, verbs = np.random.default_rng(0), np.repeat(np.arange(VERBS), REQUESTS)
    truth = true_mean(0, effects, trainings, 1) - true_mean(-1, effects, trainings, draws)
    covered = []
    for _ in range(1000):
        shared = generator.normal(0, effects[2], VERBS)
        chosen = simulate(generator, 0, effects, trainings, 1, shared)
        random = simulate(generator, -1, effects, trainings, draws, shared)
        low, high = estimate_mean(chosen - random, verbs).interval
        covered.append(low <= truth <= high)
    assert (
        0.92 <= np.mean(covered) <= 0.98
    )  # verbs move both: the difference has a noise of its own


@pytest.mark.parametrize("trainings", [1, 5])
@pytest.mark.parametrize("attacked", [4, 8, 16])
def test_intervals_of_a_mean_over_direct_requests_and_few_attacked_ones_cover(attacked, trainings):
    """A few requests under three attacks weigh three quarters: the many direct ones lend them no certainty."""
    generator, effects = np.random.default_rng(0), EFFECTS[0]
    verbs, few = np.repeat(np.arange(VERBS), REQUESTS), np.arange(attacked) * REQUESTS
    centres, asked = [0, 1, 1, 2], [np.arange(len(verbs)), few, few, few]
    truth = np.mean([true_mean(centre, effects, trainings, 1) for centre in centres])
    clusters = np.concatenate([verbs[some] for some in asked])
    strata = np.repeat(range(4), [len(some) for some in asked])
    covered = []
    for _ in range(500):
        shared = generator.normal(0, effects[2], VERBS)
        parts = [
            simulate(generator, centre, effects, trainings, 1, shared)[:, :, some]
            for centre, some in zip(centres, asked)
        ]
        low, high = estimate_mean(np.concatenate(parts, 2), clusters, strata).interval
        covered.append(low <= truth <= high)
    assert np.mean(covered) >= 0.93


def test_what_the_interval_leaves_out_is_missed():
    """The interval of independent items is far too narrow where verbs, draws or trainings differ."""
    generator, effects = np.random.default_rng(0), EFFECTS[0]
    covered = []
    for _ in range(300):
        shared = generator.normal(0, effects[2], VERBS)
        values = simulate(generator, 0, effects, 5, 1, shared)
        low, high = Rate(values.sum(), values.size).interval
        covered.append(low <= true_mean(0, effects, 5, 1) <= high)
    assert np.mean(covered) < 0.6


def test_a_mean_over_sets_weighs_each_set_alike():
    values = np.array([1.0] * 10 + [0.0] * 90)[None, None]
    estimate = estimate_mean(values, strata=["a"] * 10 + ["b"] * 90, proportion=True)
    assert estimate.value == 0.5


def test_without_clusters_and_draws_the_interval_is_wilsons():
    values = np.array([1.0] * 30 + [0.0] * 70)
    estimate = estimate_mean(values[None, None], proportion=True)
    assert estimate.interval == pytest.approx(Rate(30, 100).interval, abs=0.004)


def test_outcomes_that_are_all_alike_leave_doubt():
    same = estimate_mean(np.zeros((5, 1, 100)), proportion=True)
    assert same.interval == pytest.approx((0, Rate(0, 100).interval[1]), abs=0.005)
    assert estimate_mean(np.zeros((1, 1, 100))).interval[1] > 0.02


def test_a_ratio_covers_its_truth():
    generator, covered = np.random.default_rng(0), []
    for _ in range(500):
        below = generator.random((1, 1, 200)) < 0.8
        above = below & (generator.random((1, 1, 200)) < 0.5)
        low, high = estimate_ratio(above, below).interval
        covered.append(low <= 0.5 <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_what_is_known_exactly_of_a_training_is_uncertain_over_trainings_only():
    generator, covered = np.random.default_rng(0), []
    for _ in range(1000):
        low, high = estimate_exact(generator.normal(0.3, 0.1, 5)).interval
        covered.append(low <= 0.3 <= high)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert estimate_exact([0.3]).interval == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize("count", [3, 5])
def test_the_interval_over_pairs_of_trainings_covers(count):
    generator, covered = np.random.default_rng(0), []
    for _ in range(1000):
        own = generator.normal(0, 0.05, count)
        pairs = combinations(range(count), 2)
        values = {(i, j): 0.4 + own[i] + own[j] + generator.normal(0, 0.02) for i, j in pairs}
        low, high = estimate_pairs(values, 0.0).interval
        covered.append(low <= 0.4 <= high)
    assert (
        0.93 <= np.mean(covered) <= 0.985
    )  # the jackknife is a little wide where pairs have noise of their own
    assert estimate_pairs({(0, 1): 0.4}, 0.1).interval == pytest.approx((0.204, 0.596), abs=1e-3)


def test_the_best_of_several_is_scored_without_the_luck_of_the_choice():
    generator = np.random.default_rng(0)
    samples = (generator.random((2000, 8, 40)) < 0.3).astype(float)
    assert np.mean([score_best(options).mean() for options in samples]) == pytest.approx(0.3, abs=0.006)  # fmt: skip
    assert np.mean([options.mean(1).max() for options in samples]) > 0.38
    options = np.zeros((3, 10))
    options[1] = 1
    assert score_best(options).tolist() == [1.0] * 10


def test_ranks_are_uniform_under_chance():
    assert rank_among(0.4, [0.1, 0.4, 0.9]) == 3
    assert chance_of_ranks([1], 39) == pytest.approx(1 / 40)
    generator = np.random.default_rng(0)
    chances = []
    for _ in range(4000):
        values = generator.random((5, 9))
        ranks = [rank_among(row[0], row[1:]) for row in values]
        chances.append(chance_of_ranks(ranks, 8))
    for level in (0.05, 0.2, 0.5):
        assert level - 0.05 < np.mean(np.array(chances) <= level) < level + 0.015  # sums are whole


def test_the_bootstrap_of_a_mean_covers_at_its_nominal_rate():
    generator, covered = np.random.default_rng(0), []
    for _ in range(400):
        values = generator.gamma(2.0, 1.0, 100)
        low, high = bootstrap(lambda chosen: values[chosen].mean(-1), len(values), draws=400)
        covered.append(low <= 2.0 <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_intervals_of_the_trade_off_cover():
    """The truth is the harm of the best budget, which is clear here, at what it keeps."""
    generator, covered, kept = np.random.default_rng(0), [], np.array([1.0, 0.95, 0.6])
    truth = ch10_comparison.trade_off(np.array([0.0, 0.5, 0.8]), kept)
    for _ in range(400):
        harm = (generator.random((3, 60)) < np.array([[0.0], [0.5], [0.8]])).astype(float)
        values = ch10_comparison.trade_off_items(harm, kept)
        low, high = estimate_mean(values[None, None]).interval
        covered.append(low <= truth <= high)
    assert 0.92 <= np.mean(covered) <= 0.98
