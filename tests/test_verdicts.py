"""One rule for every verdict."""

import numpy as np
import pytest

from safetyneuron.metrics.estimates import Estimate, estimate_mean
from safetyneuron.metrics.verdict import Evidence, Verdict, join_models, judge


def effect(value, error=0.02, freedom=100):
    return Estimate(value, error, freedom, 100)


@pytest.mark.parametrize(
    "value, error, verdict",
    [
        (0.30, 0.05, Verdict.SEEN),
        (-0.30, 0.05, Verdict.REVERSED),
        (0.02, 0.02, Verdict.NOT_SEEN),
        (0.15, 0.05, Verdict.UNDECIDED),
        (0.02, 0.10, Verdict.UNDECIDED),
    ],
)
def test_a_verdict_is_where_the_interval_lies(value, error, verdict):
    claim = Evidence(effect(value, error), 0.1)
    low, high = claim.effect.interval
    expected = (
        Verdict.SEEN
        if low > 0.1
        else Verdict.REVERSED
        if high < -0.1
        else Verdict.NOT_SEEN
        if -0.1 < low and high < 0.1
        else Verdict.UNDECIDED
    )
    assert judge({"a": claim})["a"] is verdict is expected


def test_a_set_that_random_ones_equal_is_not_seen_to_matter():
    strong = effect(0.5)
    assert judge({"a": Evidence(strong, 0.1, rank_chance=0.025)})["a"] is Verdict.SEEN
    assert judge({"a": Evidence(strong, 0.1, rank_chance=0.3)})["a"] is Verdict.UNDECIDED


def test_the_number_of_claims_does_not_ask_for_more_random_sets():
    strong = Evidence(effect(0.5), 0.1, rank_chance=1 / 20)  # the first of twenty
    assert set(judge(dict.fromkeys("abcdef", strong)).values()) == {Verdict.SEEN}
    assert judge({"a": Evidence(effect(0.5), 0.1, rank_chance=1 / 19)})["a"] is Verdict.UNDECIDED


def test_claims_of_one_chapter_are_corrected_together():
    weak = Evidence(effect(0.145), 0.1)  # its own interval just lies above the margin
    assert judge({"a": weak})["a"] is Verdict.SEEN
    many = judge({name: weak for name in "abcdef"})
    assert set(many.values()) == {Verdict.UNDECIDED}
    strong = Evidence(effect(0.9), 0.1)
    assert judge({"a": weak, "b": strong}) == {"a": Verdict.SEEN, "b": Verdict.SEEN}


def test_models_that_disagree_see_a_claim_partly():
    assert join_models([Verdict.SEEN] * 2) is Verdict.SEEN
    assert join_models([Verdict.SEEN, Verdict.NOT_SEEN]) is Verdict.PARTLY
    assert join_models([Verdict.NOT_SEEN, Verdict.REVERSED]) is Verdict.NOT_SEEN
    assert join_models([Verdict.NOT_SEEN, Verdict.UNDECIDED]) is Verdict.UNDECIDED


def test_an_effect_at_the_margin_is_rarely_called_seen():
    """Six claims whose effects are exactly the margin: in at most one run of twenty is any called seen or not seen."""
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        values = generator.normal(0.1, 1, (6, 5, 1, 40))
        claims = {i: Evidence(estimate_mean(rows), 0.1) for i, rows in enumerate(values)}
        wrong += any(verdict is Verdict.SEEN for verdict in judge(claims).values())
    assert wrong / 400 < 0.05
