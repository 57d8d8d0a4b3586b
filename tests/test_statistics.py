"""Simulations: the intervals that the book reports cover the truth as often as they say."""

import numpy as np
import pytest

from safetyneuron import Rate
from safetyneuron.chapters import ch10_comparison
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


def test_the_interval_of_a_mean_over_draws_is_not_too_narrow():
    """Random sets share their prompts: the mean's interval is that of one draw, and covers at least as often as it says."""
    generator, truth, covered = np.random.default_rng(0), 0.3, []
    for _ in range(1500):
        prompts = generator.beta(
            3, 7, 60
        )  # every prompt has a rate of its own, common to all draws
        rates = [Rate(int((generator.random(60) < prompts).sum()), 60) for _ in range(5)]
        low, high = Rate.mean(rates).interval
        covered.append(low <= truth <= high)
    assert 0.94 < np.mean(covered) <= 1


def test_the_bootstrap_of_a_mean_covers_at_its_nominal_rate():
    generator, covered = np.random.default_rng(0), []
    for _ in range(400):
        values = generator.gamma(2.0, 1.0, 100)
        low, high = bootstrap(lambda chosen: values[chosen].mean(-1), len(values), draws=400)
        covered.append(low <= 2.0 <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_the_bootstrap_of_the_trade_off_covers_at_about_its_nominal_rate():
    generator, covered = np.random.default_rng(0), []
    harm, kept = np.array([0.0, 0.5, 0.8]), np.array([0.95, 0.9, 0.6])
    truth = ch10_comparison.trade_off(harm, kept / kept[0])
    for _ in range(200):

        def sample(shares):
            return (generator.random((len(shares), 60)) < shares[:, None]).astype(int).tolist()

        outcomes = [{"coherent": h, "accuracy": a} for h, a in zip(sample(harm), sample(kept))]
        row = ch10_comparison.areas(
            outcomes[0], {("x", i): o for i, o in enumerate(outcomes[1:])}, draws=300
        ).loc["x"]
        covered.append(row["low"] <= truth <= row["high"])
    assert 0.88 < np.mean(covered) <= 1
